"""``check`` as in qemu-img: its findings, line by line, and what of them a repair mends."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jqcow.checker.findings import Finding, Kind
from jqcow.cli import common
from jqcow.cli.common import CommandError
from jqcow.cli.qemu.changing import format_of
from jqcow.cli.qemu.wording import opening

if TYPE_CHECKING:
    from jqcow.checker.check import CheckReport
    from jqcow.offline.info import Qcow2Facts

_COUNTS = re.compile(r"refcount (\d+), references (\d+)")
_PAST_END = re.compile(r"(?:data|L2 table) at 0x([0-9a-f]+)$")
_COPIED = re.compile(r"0x([0-9a-f]+), refcount (\d+)")
_LEAKS = (Kind.LEAK, Kind.LOST_DATA, Kind.LEAK_PAST_END)
_UNKNOWN_TO_QEMU = (Kind.OVERLAP, Kind.RESERVED_RANGE, Kind.LEAK_PAST_END)
_OFFSET_MASK = (1 << 56) - 1
_L1_ENTRY_SHIFT = 3
_L1_ENTRIES_MAX = (1 << 31) - 1
_ALWAYS = ("image-end-offset", "check-errors")


def check(arguments: argparse.Namespace) -> int:
    """Check an image, and repair it where that is asked for."""
    if format_of(arguments) != "qcow2":
        raise CommandError("This image format does not support checks", common.EXIT_UNSUPPORTED)
    fixed = {"leaks": 0, "corruptions": 0}
    if arguments.repair is not None:
        fixed = _repair(arguments)
    report, facts = _look(arguments)
    if arguments.repair is None or any(fixed.values()):
        for line in _lines(report, facts, repairing=None):
            print(line, file=sys.stderr)
    _print(arguments, report, fixed)
    if report.corruptions:
        return common.EXIT_CORRUPT
    return common.EXIT_LEAKS if _leaks(report) else common.EXIT_OK


def _look(arguments: argparse.Namespace) -> tuple[CheckReport, Qcow2Facts]:
    from jqcow.offline.info import check_file, read_info

    with opening(arguments.given):
        info = read_info(arguments.image, "qcow2", force_share=arguments.force_share)
        report = check_file(arguments.image, force_share=arguments.force_share)
    facts = info.qcow2
    if facts is None:
        raise CommandError(f"Could not open '{arguments.given}': Image is not in qcow2 format")
    if any(found.kind == Kind.L1_TOO_SMALL and found.structure == "header" for found in report.findings):
        # QEMU does not open it, also for a check.
        is_big = info.virtual_size > _L1_ENTRIES_MAX * facts.cluster_size * (
            facts.cluster_size >> _L1_ENTRY_SHIFT
        )
        told = "Image is too big" if is_big else "L1 table is too small"
        raise CommandError(f"Could not open '{arguments.given}': {told}")
    return report, facts


def _leaks(report: CheckReport) -> int:
    return report.leaks + report.lost - report.counts.get(Kind.LEAK_PAST_END, 0)


def _repair(arguments: argparse.Namespace) -> dict[str, int]:
    from jqcow.disks.undo import undo_path
    from jqcow.image.opening import open_alone

    before, facts = _look(arguments)
    flags = _flags_to_come(arguments, before, facts)
    for line in _lines(before, facts, repairing=arguments.repair, flags=flags):
        print(line, file=sys.stderr)
    with opening(arguments.given):
        # qemu-img has no way back, and the next repair must not be held up by one.
        with suppress(FileNotFoundError):
            os.unlink(undo_path(arguments.image))
        image = open_alone(arguments.image, "r+", repair=arguments.repair, free_lost=True)
        with image:
            done = image.repaired
        with suppress(FileNotFoundError):
            os.unlink(undo_path(arguments.image))
    fixed = {
        "leaks": 0 if done is None else max(0, done.leaks - before.counts.get(Kind.LEAK_PAST_END, 0)),
        "corruptions": 0 if done is None else done.too_low + done.copied_flags,
    }
    if any(fixed.values()) and arguments.output == "human" and not arguments.quiet:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {fixed['leaks']} leaked clusters")
        print(f"    {fixed['corruptions']} corruptions\n")
        print("Double checking the fixed image now...")
        sys.stdout.flush()
    return fixed


def _mended(report: CheckReport, facts: Qcow2Facts, repairing: str | None) -> dict[int, int]:
    """Return the refcounts that a repair mends, by clusters."""
    found = dict[int, int]()
    for finding in report.findings:
        counts = _COUNTS.match(finding.detail)
        if counts and repairing is not None and (finding.kind in _LEAKS or repairing == "all"):
            found[finding.offset // facts.cluster_size] = int(counts[2])
    return found


def _flags_to_come(arguments: argparse.Namespace, report: CheckReport, facts: Qcow2Facts) -> list[Finding]:
    """Return the COPIED flags that are wrong when refcounts are mended: QEMU tells that it mends them."""
    from jqcow.checker.copied import wrong_copied_flags
    from jqcow.disks.view import open_view

    mended = _mended(report, facts, arguments.repair)
    if not mended:
        return []
    with opening(arguments.given), open_view(arguments.image) as view:
        return list(wrong_copied_flags(view.read, view.area, mended))


def _lines(
    report: CheckReport, facts: Qcow2Facts, *, repairing: str | None, flags: Sequence[Finding] = ()
) -> Iterator[str]:
    """Yield findings in the order in which QEMU comes across them: tables, refcounts, COPIED flags.

    ``flags``: those that are wrong when the refcounts are mended.
    """

    def place_of(finding: Finding) -> int:
        if finding.kind == Kind.COPIED_FLAG:
            return 2
        return 1 if _COUNTS.match(finding.detail) else 0

    found = [finding for finding in report.findings if finding.kind not in _UNKNOWN_TO_QEMU]
    found.sort(key=place_of)
    mended = _mended(report, facts, repairing)
    for finding in found:
        if place_of(finding) == 1 and repairing is not None:
            # It tells refcounts once more when it mends them.
            yield _line(finding, facts, None)
    # Where leaks are all else that is wrong, QEMU sets flags right with them.
    is_sure = repairing is not None and report.corruptions == report.counts.get(Kind.COPIED_FLAG, 0)
    for finding in found:
        if finding.kind != Kind.COPIED_FLAG:
            yield _line(finding, facts, repairing)
        elif _cluster_of(finding, facts) not in mended:
            yield _line(finding, facts, "all" if is_sure else repairing)
    for finding in flags:
        yield _line(finding, facts, "all" if is_sure else repairing)


def _cluster_of(finding: Finding, facts: Qcow2Facts) -> int | None:
    """Return the cluster whose COPIED flag is wrong: by its refcount, if that is right."""
    entry = _COPIED.match(finding.detail)
    return None if entry is None else (int(entry[1], 16) & _OFFSET_MASK) // facts.cluster_size


def _line(finding: Finding, facts: Qcow2Facts, repairing: str | None) -> str:
    mends_all = repairing == "all"
    counts = _COUNTS.match(finding.detail)
    if counts:
        is_leak = finding.kind in _LEAKS
        word = "Leaked" if is_leak else "ERROR"
        if mends_all or (repairing == "leaks" and is_leak):
            word = "Repairing"
        cluster = finding.offset // facts.cluster_size
        return f"{word} cluster {cluster} refcount={counts[1]} reference={counts[2]}"
    copied = _COPIED.match(finding.detail) if finding.kind == Kind.COPIED_FLAG else None
    word = "Repairing" if mends_all else "ERROR"
    past_end = _PAST_END.search(finding.detail) if finding.kind == Kind.PAST_END else None
    if past_end is not None:
        return (
            "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
            f"offset 0x{past_end[1]} size {facts.cluster_size:#x}"
        )
    if copied is None:
        return f"ERROR {finding.structure} at {finding.offset:#x}: {finding.detail}"
    entry = copied[1].lstrip("0") or "0"
    if finding.structure == "L1 entry":
        index = (finding.offset - facts.l1_table_offset) >> _L1_ENTRY_SHIFT
        return f"{word} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry} refcount={copied[2]}"
    return f"{word} OFLAG_COPIED data cluster: l2_entry={entry} refcount={copied[2]}"


def _print(arguments: argparse.Namespace, report: CheckReport, fixed: dict[str, int]) -> None:
    if arguments.output == "json":
        common.print_json(_json(report, arguments.image, fixed))
    elif not arguments.quiet:
        print("\n".join(_summary(report)))


def _json(report: CheckReport, filename: str, fixed: dict[str, int]) -> dict[str, Any]:
    told = {
        "image-end-offset": report.image_end_offset,
        "compressed-clusters": report.compressed_clusters,
        "total-clusters": report.total_clusters,
        "corruptions": report.corruptions,
        "corruptions-fixed": fixed["corruptions"],
        "check-errors": 0,
        "leaks": _leaks(report),
        "leaks-fixed": fixed["leaks"],
        "allocated-clusters": report.allocated_clusters,
        "filename": filename,
        "format": "qcow2",
        "fragmented-clusters": report.fragmented_clusters,
    }
    # Without the numbers that are 0 and may be.
    return {name: value for name, value in told.items() if value or name in _ALWAYS}


def _summary(report: CheckReport) -> Iterator[str]:
    leaks = _leaks(report)
    if not report.corruptions and not leaks:
        yield "No errors were found on the image."
    if report.corruptions:
        yield f"\n{report.corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if leaks:
        yield f"\n{leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if report.total_clusters and report.allocated_clusters:
        allocated, total = report.allocated_clusters, report.total_clusters
        yield (
            f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
            f"{100 * report.fragmented_clusters / allocated:.2f}% fragmented, "
            f"{100 * report.compressed_clusters / allocated:.2f}% compressed clusters"
        )
    if report.image_end_offset:
        yield f"Image end offset: {report.image_end_offset}"
