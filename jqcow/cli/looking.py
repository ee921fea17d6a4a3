"""Commands that look into an image: info, check, map, journal. Only `check -r` writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jqcow.checker.header import OVERRULED
from jqcow.cli import common, names, snapshots
from jqcow.cli.common import human_size, plural
from jqcow.disks.policy import Following
from jqcow.errors import printable
from jqcow.offline.info import (
    ImageFacts,
    Qcow2Facts,
    check_file,
    read_chain,
    read_info,
)
from jqcow.ondisk.bitmaps import Bitmap
from jqcow.ondisk.naming import protocol_of, resolve

if TYPE_CHECKING:
    from jqcow import CheckReport, RepairReport
    from jqcow.offline.map import MapLine
    from jqcow.offline.records import JournalListing, Record

_COMPAT = {2: "0.10", 3: "1.1"}
_MAP_ROW = "{:<16}{:<16}{:<16}{}"


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    info = commands.add_parser("info", help="say what an image is", description="Say what an image is.")
    info.add_argument(
        "--backing-chain", action="store_true", help="say it of every file of the backing chain, too"
    )
    info.set_defaults(command=info_command, driver=None)
    check = commands.add_parser(
        "check",
        help="check refcounts and tables",
        description="Check refcounts and tables. An image with a live journal is checked as it will be "
        "after recovery. Nothing is written, unless -r is given.",
    )
    check.add_argument(
        "-r",
        "--repair",
        dest="repair",
        choices=("leaks", "all"),
        help="first repair refcounts that are too high, or all; a crashed image is recovered before",
    )
    common.add_journal_size(check)
    check.add_argument(
        "--free-lost-data",
        action="store_true",
        help="with -r: give up leaked clusters that look like lost data, too",
    )
    common.add_quiet(check)
    check.set_defaults(command=check_command)
    mapping = commands.add_parser(
        "map", help="say where the data of a disk lies", description="Say where the data of a disk lies."
    )
    mapping.add_argument("-s", "--start-offset", metavar="OFFSET", default="0", help="start here")
    mapping.add_argument("-l", "--max-length", metavar="LENGTH", help="and end after this many bytes")
    mapping.set_defaults(command=map_command, export=None)
    journal = commands.add_parser(
        "journal",
        help="say where a live journal lies, and list its records",
        description="Say where the live journal of a crashed image lies, how large it is, and what its "
        "records hold. Nothing is written.",
    )
    journal.set_defaults(command=journal_command)
    undo = commands.add_parser(
        "undo",
        help="take the last repair back",
        description="Give an image the bytes that it had before check -r, from the undo file beside it.",
    )
    undo.add_argument("--force", action="store_true", help="also where the image was written since")
    undo.set_defaults(command=undo_command)
    common.add_cache(check, "-T")
    for parser in (info, check, mapping):
        common.add_format(parser)
        names.add_image_opts(parser)
        names.add_objects(parser)
        common.add_force_share(parser)
    for parser in (info, mapping):
        common.add_allow_files(parser)
    for parser in (info, check, mapping, journal, undo):
        common.add_output(parser)
        parser.add_argument("image", metavar="IMAGE")


def _following(arguments: argparse.Namespace) -> Following:
    """Return what the library is to do about the files that images name."""
    # What is looked at are tables: an encrypted file needs no passphrase.
    return Following(
        arguments.allow_files, arguments.probe, share_writers=arguments.force_share, reads_data=False
    )


# info


def info_command(arguments: argparse.Namespace) -> int:
    """Print what an image is, or what each file of its backing chain is."""
    common.print_warnings(arguments, arguments.image, arguments.format, force_share=arguments.force_share)
    if arguments.backing_chain:
        return _chain_info(arguments)
    with common.opening(arguments, arguments.image):
        facts = read_info(
            arguments.image, common.disk_format(arguments.format), force_share=arguments.force_share
        )
    _refuse_what_qemu_does(arguments, facts)
    name = facts.filename
    if arguments.driver is not None:
        name, facts = names.shown(arguments), dataclasses.replace(facts, format=arguments.driver)
    elif arguments.profile.is_qemu and arguments.secret is not None:
        name = names.told_by_options(arguments, facts.format)
    if arguments.output == "json":
        common.print_json(_info_json(facts) | {"filename": name})
    else:
        print("\n".join(_info_lines(facts, name)))
    return common.EXIT_OK


def _refuse_what_qemu_does(arguments: argparse.Namespace, facts: ImageFacts) -> None:
    """Refuse headers that qemu-img would, which tells nothing of such an image."""
    special = facts.qcow2
    if not arguments.profile.is_qemu or special is None:
        return
    told = ", ".join(fault for fault in special.header_faults if fault != OVERRULED)
    if special.unknown_incompatible:
        from jqcow.cli.qemu.wording import unsupported

        told = unsupported(", ".join(special.unknown_features))
    if told:
        raise common.CommandError(f"Could not open '{arguments.given}': {told}")


def _chain_info(arguments: argparse.Namespace) -> int:
    with common.opening(arguments, arguments.image):
        chain = read_chain(
            arguments.image, common.disk_format(arguments.format), following=_following(arguments)
        )
    for facts in chain:
        _refuse_what_qemu_does(arguments, facts)
    if arguments.output == "json":
        common.print_json([_info_json(facts) for facts in chain])
    else:
        print("\n\n".join("\n".join(_info_lines(facts, facts.filename)) for facts in chain))
    return common.EXIT_OK


_INFO_ORDER = (
    "snapshots",
    "backing-filename-format",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "format-specific",
    "full-backing-filename",
    "encrypted",
    "backing-filename",
    "dirty-flag",
    "jqcow-journal",
)
"""As qemu-img 7.2 prints them."""


def _info_json(facts: ImageFacts) -> dict[str, Any]:
    """Return the facts with qemu-img's names; what only jqcow knows is under ``jqcow-journal``."""
    special = facts.qcow2
    told: dict[str, Any] = {
        "virtual-size": facts.virtual_size,
        "filename": facts.filename,
        "format": facts.format,
        "actual-size": facts.actual_size,
        "dirty-flag": special is not None and special.dirty,
    }
    if special is not None:
        told["cluster-size"] = special.cluster_size
        told["format-specific"] = {"type": "qcow2", "data": _specific(special)}
        if special.snapshots:
            told["snapshots"] = [snapshots.snapshot_json(snapshot) for snapshot in special.snapshots]
        if special.backing_file is not None:
            told |= _backing(special.backing_file, special.backing_format, facts.filename)
        if special.encryption is not None:
            told["encrypted"] = True
        if special.journal is not None:
            told["jqcow-journal"] = common.as_json(special.journal)
    return {name: told[name] for name in _INFO_ORDER if told.get(name) is not None}


def _backing(name: str, backing_format: str | None, filename: str) -> dict[str, Any]:
    told = {"backing-filename": name, "full-backing-filename": _full_name(name, filename)}
    return told if backing_format is None else told | {"backing-filename-format": backing_format}


def _full_name(name: str, filename: str) -> str:
    """Return the path that a backing file name means; one with a protocol is no path, and stays."""
    return name if protocol_of(name) is not None else resolve(name, filename)


def _specific(special: Qcow2Facts) -> dict[str, Any]:
    data: dict[str, Any] = {
        "compat": _COMPAT[special.version],
        "compression-type": special.compression_type,
    }
    if special.version >= 3:
        data["lazy-refcounts"] = special.lazy_refcounts
    if special.bitmaps:
        data["bitmaps"] = [_bitmap_json(bitmap) for bitmap in special.bitmaps]
    data["refcount-bits"] = special.refcount_bits
    if special.external_data is not None and special.external_data.name is not None:
        data["data-file"] = special.external_data.name
    if special.encryption is not None:
        data["encrypt"] = {"format": special.encryption}
        if special.luks is not None:
            from jqcow.cli.passphrases import luks_json

            data["encrypt"] = luks_json(special.luks)
    if special.external_data is not None:
        data["data-file-raw"] = special.external_data.is_raw
    if special.version >= 3:
        data |= {"corrupt": special.corrupt, "extended-l2": special.extended_l2}
    if special.unknown_features:
        data["unknown-features"] = list(special.unknown_features)
    return data


def _bitmap_json(bitmap: Bitmap) -> dict[str, Any]:
    name = bitmap.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return {"flags": list(bitmap.flags), "name": name, "granularity": bitmap.granularity}


def _nested_lines(value: Any, indent: str) -> Iterator[str]:
    """Yield what is nested in JSON values as qemu-img prints it for people."""
    items = value.items() if isinstance(value, dict) else ((f"[{n}]", item) for n, item in enumerate(value))
    for name, item in items:
        shown = f"{indent}{name.replace('-', ' ')}:"
        if isinstance(item, dict | list):
            yield shown
            yield from _nested_lines(item, indent + "    ")
        else:
            yield f"{shown} {str(item).lower() if isinstance(item, bool) else printable(str(item))}"


def _info_lines(facts: ImageFacts, name: str) -> Iterator[str]:
    yield f"image: {printable(name)}"
    yield f"file format: {facts.format}"
    yield f"virtual size: {human_size(facts.virtual_size)} ({facts.virtual_size} bytes)"
    yield f"disk size: {'unavailable' if facts.actual_size is None else human_size(facts.actual_size)}"
    special = facts.qcow2
    if special is None:
        return
    if special.encryption is not None:
        yield "encrypted: yes"
    yield f"cluster_size: {special.cluster_size}"
    if special.dirty:
        yield "cleanly shut down: no"
    if special.backing_file is not None:
        path = _full_name(special.backing_file, facts.filename)
        actual = "" if path == special.backing_file else f" (actual path: {printable(path)})"
        yield f"backing file: {printable(special.backing_file)}{actual}"
    if special.backing_format is not None:
        yield f"backing file format: {printable(special.backing_format)}"
    if special.snapshots:
        yield from snapshots.snapshot_lines(special.snapshots)
    yield "Format specific information:"
    yield from _nested_lines(_specific(special), "    ")
    if special.journal is not None:
        journal = special.journal
        records = plural(journal.record_count, "record")
        torn = ", and one torn by a crash" if journal.torn_tail else ""
        yield f"Live journal: {records}{torn}, {human_size(journal.length)} at {journal.offset:#x}"
        if journal.pending_bytes:
            yield f"    Small writes of the guest wait in it: {human_size(journal.pending_bytes)}"
        yield "    The image was not closed. Nothing that was flushed is lost."
        yield "    jqcow replays the journal when it opens the image; for other programs run jqcow-recover."


# check


def check_command(arguments: argparse.Namespace) -> int:
    """Check an image; print the findings on stderr and the summary on stdout, as qemu-img does."""
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu import checking

        return checking.check(arguments)
    repaired = _repair(arguments)
    with common.opening(arguments, arguments.image):
        report, is_live = _checked(arguments)
    if is_live and not arguments.quiet:
        print("The journal is live: checked as after recovery (jqcow-recover).", file=sys.stderr)
    for finding in report.findings:
        print(finding, file=sys.stderr)
    if arguments.output == "json":
        common.print_json(_check_json(report, arguments.image, repaired))
    elif not arguments.quiet:
        print("\n".join(_check_lines(report)))
    if report.errors:
        return common.EXIT_CORRUPT
    return common.EXIT_LEAKS if report.leaks else common.EXIT_OK


def _repair(arguments: argparse.Namespace) -> RepairReport | None:
    """Repair an image where that was asked for, and say what was wrong."""
    journal_size = common.journal_size_of(arguments)
    if arguments.repair is None:
        if journal_size is not None:
            raise common.CommandError("--journal-size is for what writes: use it with -r")
        if arguments.free_lost_data:
            raise common.CommandError("--free-lost-data says what a repair may free: use it with -r")
        return None
    from jqcow.image.opening import open_alone

    if arguments.force_share:
        raise common.CommandError("-r writes: it cannot be used beside another writer, with -U")
    with (
        common.opening(arguments, arguments.image),
        open_alone(
            arguments.image,
            "r+",
            journal_size=journal_size,
            repair=arguments.repair,
            free_lost=arguments.free_lost_data,
        ) as image,
    ):
        report = image.repaired
    if report is not None and report.changed and arguments.output == "human" and not arguments.quiet:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {report.leaks} leaked clusters")
        print(f"    {_corruptions(report)} corruptions\n")
        if report.refcount_table:
            print("The refcount table was lost. A new one lies at the end of the file.\n")
        print("Double checking the fixed image now...")
    return report


def _corruptions(report: RepairReport) -> int:
    return report.too_low + report.copied_flags


def _checked(arguments: argparse.Namespace) -> tuple[CheckReport, bool]:
    """Return what the check finds, and whether the journal is live."""
    shared = arguments.force_share
    facts = read_info(arguments.image, arguments.format, force_share=shared)
    if facts.qcow2 is None:
        raise common.CommandError(
            f"{arguments.image}: a raw file has nothing to check", common.EXIT_UNSUPPORTED
        )
    return check_file(arguments.image, force_share=shared), facts.qcow2.journal is not None


def _check_json(report: CheckReport, filename: str, repaired: RepairReport | None) -> dict[str, Any]:
    """Return the report with qemu-img's names; like it, without the numbers that are 0 and may be."""
    optional = {
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "corruptions": report.errors - report.lost,
        "leaks": report.leaks,
        "lost-data": report.lost,
        "corruptions-fixed": 0 if repaired is None else _corruptions(repaired),
        "leaks-fixed": 0 if repaired is None else repaired.leaks,
        "fragmented-clusters": report.fragmented_clusters,
        "compressed-clusters": report.compressed_clusters,
    }
    return {
        "image-end-offset": report.image_end_offset,
        "check-errors": 0,
        "filename": filename,
        "format": "qcow2",
        **{name: count for name, count in optional.items() if count},
    }


def _check_lines(report: CheckReport) -> Iterator[str]:
    if report.ok:
        yield "No errors were found on the image."
    if report.errors > report.lost:
        yield f"\n{report.errors - report.lost} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if report.leaks:
        yield f"\n{report.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if report.lost:
        yield f"\n{report.lost} leaked clusters look like lost data: a table has a hole that they may fill."
        yield "They may be the only copy. No repair frees them without --free-lost-data."
    if report.allocated_clusters:
        yield _allocation_line(report)
    yield f"Image end offset: {report.image_end_offset}"


def _allocation_line(report: CheckReport) -> str:
    allocated, total = report.allocated_clusters, report.total_clusters
    # Shares of the allocated clusters, as in qemu-img.
    fragmented = 100 * report.fragmented_clusters / allocated
    compressed = 100 * report.compressed_clusters / allocated
    # A disk of size 0 may have clusters all the same; qemu-img, too, tells them.
    share = 100 * allocated / total if total else 100
    return (
        f"{allocated}/{total} = {share:.2f}% allocated, "
        f"{fragmented:.2f}% fragmented, {compressed:.2f}% compressed clusters"
    )


# undo


def undo_command(arguments: argparse.Namespace) -> int:
    """Take a repair back."""
    from jqcow.offline.undo import undo_repair

    with common.opening(arguments, arguments.image):
        report = undo_repair(arguments.image, force=arguments.force)
    common.print_undone(report, arguments.output)
    return common.EXIT_OK


# map


def map_command(arguments: argparse.Namespace) -> int:
    """Print the extents of a disk."""
    if arguments.export is not None:
        from jqcow.cli.qemu.exports import map_export

        return map_export(arguments)
    from jqcow.offline.map import map_file

    common.print_warnings(arguments, arguments.image, arguments.format, force_share=arguments.force_share)
    start = common.parse_size(arguments.start_offset, unit=1)
    length = None if arguments.max_length is None else common.parse_size(arguments.max_length, unit=1)
    with common.opening(arguments, arguments.image):
        lines = map_file(arguments.image, arguments.format, start, length, following=_following(arguments))
    if arguments.output == "json":
        tells_compressed = not arguments.profile.is_qemu
        print("[" + ",\n".join(_json_line(line, tells_compressed) for line in lines) + "]")
        return common.EXIT_OK
    print(_MAP_ROW.format("Offset", "Length", "Mapped to", "File"))
    for line in lines:
        extent = line.extent
        if extent.holds_data and extent.host_offset is None:
            kind = "compressed" if extent.kind == "compressed" else "encrypted"
            raise common.CommandError(
                f"{printable(line.path)}: {kind} clusters have no offset to map to: use --output=json"
            )
        if not line.zero and extent.host_offset is not None:
            place = _hex(extent.offset), _hex(extent.length), _hex(extent.host_offset)
            print(_MAP_ROW.format(*place, printable(line.path)))
    return common.EXIT_OK


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def _json_line(line: MapLine, tells_compressed: bool) -> str:
    extent = line.extent
    told = {"start": extent.offset, "length": extent.length, "depth": extent.depth}
    told |= {"present": line.present, "zero": line.zero, "data": line.data}
    if extent.kind == "compressed" and tells_compressed:
        told["compressed"] = True
    if extent.host_offset is not None:
        told["offset"] = extent.host_offset
    return f"{{ {json.dumps(told)[1:-1]}}}"


# journal


def journal_command(arguments: argparse.Namespace) -> int:
    """Print the records of a live journal."""
    from jqcow.offline.records import read_journal

    with common.opening(arguments, arguments.image):
        listing = read_journal(arguments.image)
    if arguments.output == "json":
        common.print_json(common.as_json(listing))
    elif listing is None:
        print(f"{printable(arguments.image)}: clean, no live journal")
    else:
        print("\n".join(_journal_lines(listing, arguments.image)))
    return common.EXIT_OK


def _journal_lines(listing: JournalListing, name: str) -> Iterator[str]:
    length = human_size(listing.length)
    yield f"{printable(name)}: a live journal, {length} at host offset {listing.offset:#x}"
    for number, half in enumerate(listing.halves):
        use = (
            f"{human_size(half.used_bytes)} of {human_size(half.length)} in use" if half.live else "not live"
        )
        yield f"  half {number} at {half.offset:#x}: {use}"
    if listing.stale_frames:
        yield f"  {plural(listing.stale_frames, 'record')} of earlier epochs, home already"
    for record in listing.records:
        yield from _record_lines(record)
    torn = listing.torn_tail
    if torn is None:
        yield "the end: the newest record is whole"
    else:
        yield f"torn record {torn.sequence}, epoch {torn.epoch}, at {torn.offset:#x}: {torn.reason}"
        yield "  no flush returned for it; recovery drops it"


def _record_lines(record: Record) -> Iterator[str]:
    size = f"{human_size(record.length)} ({human_size(record.decoded_length)} unpacked)"
    yield f"record {record.sequence}, epoch {record.epoch}, {size} at {record.offset:#x}"
    for operation in record.operations:
        place = "" if operation.kind == "header" else f" at {operation.offset:#x}, {operation.length} bytes"
        yield f"  {operation.kind}{place}: {operation.meaning.removeprefix('header: ')}"
