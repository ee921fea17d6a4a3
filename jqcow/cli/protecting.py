"""Commands about sums of what an image holds: protect, verify, heal."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from jqcow.cli import common
from jqcow.cli.common import human_size
from jqcow.cli.progress import add_progress, progress_of
from jqcow.errors import printable
from jqcow.image.known_sums import State, UnitRange
from jqcow.image.protection import VerifyReport
from jqcow.offline import protect as offline

EXIT_WRONG = common.EXIT_CORRUPT
EXIT_NOT_VERIFIED = 3

_TOLD: dict[State, str] = {
    "wrong": "has not the content that it had",
    "unreadable": "cannot be read",
    "unsure": "has another sum, but the stored one may be damaged",
    "changed": "written since its sum was made",
}
RANGES_SHOWN = 1000
"""People are told so many ranges; JSON has all."""


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    protect = commands.add_parser(
        "protect",
        help="keep checksums of what an image holds in it",
        description="Keep a checksum of each cluster in the image, where every program leaves them alone, "
        "and note what is written since. A crashed image is recovered first.",
    )
    action = protect.add_mutually_exclusive_group()
    action.add_argument("--refresh", action="store_true", help="renew the sums of what has changed")
    action.add_argument("--remove", action="store_true", help="take the sums away")
    protect.set_defaults(command=protect_command)
    verify = commands.add_parser(
        "verify",
        help="compare what a protected image holds with its checksums",
        description="Compare what a protected image holds with its checksums. Nothing is written.",
    )
    verify.set_defaults(command=verify_command)
    heal = commands.add_parser(
        "heal",
        help="replace what is wrong in a protected image by what a backup has",
        description="Replace what is wrong in a protected image by what a backup has, where that has the "
        "right checksum.",
    )
    heal.add_argument("--from", dest="backup", metavar="BACKUP", required=True, help="an image or a raw file")
    heal.add_argument("-F", dest="backup_format", choices=common.FORMATS, help="format of BACKUP")
    heal.set_defaults(command=heal_command)
    for parser in (protect, verify, heal):
        common.add_allow_files(parser)
        add_progress(parser)
        common.add_output(parser)
        common.add_quiet(parser)
        parser.add_argument("image", metavar="IMAGE")
    for parser in (protect, heal):
        common.add_journal_size(parser)


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what all commands take, in the library's words."""
    return {"allow_files": arguments.allow_files, "probe": arguments.probe}


def protect_command(arguments: argparse.Namespace) -> int:
    """Protect an image, renew its protection or take it away."""
    journal_size = common.journal_size_of(arguments)
    if arguments.remove:
        with common.about(arguments.image):
            had_any = offline.unprotect(arguments.image, journal_size=journal_size)
        if not arguments.quiet and arguments.output == "human":
            print("The protection is removed." if had_any else "There is no protection.")
        return common.EXIT_OK
    with common.about(arguments.image), progress_of(arguments) as progress:
        report = offline.protect(
            arguments.image,
            refresh=arguments.refresh,
            journal_size=journal_size,
            progress=progress,
            **_how(arguments),
        )
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif not arguments.quiet:
        if report.fault:
            print(f"All sums were made anew: {report.fault}.")
        print(f"{human_size(report.renewed_bytes)} got new sums.")
        if report.unreadable_bytes:
            print(f"{human_size(report.unreadable_bytes)} cannot be read, and have none.")
    return common.EXIT_OK


def verify_command(arguments: argparse.Namespace) -> int:
    """Verify an image."""
    with common.about(arguments.image), progress_of(arguments) as progress:
        report = offline.verify(arguments.image, progress=progress, **_how(arguments))
    if arguments.output == "json":
        common.print_json(_verify_json(report))
    elif not arguments.quiet:
        print("\n".join(_verify_lines(report)))
    if report.fault:
        return EXIT_NOT_VERIFIED
    return common.EXIT_OK if report.ok else EXIT_WRONG


def heal_command(arguments: argparse.Namespace) -> int:
    """Heal an image."""
    journal_size = common.journal_size_of(arguments)
    with common.about(arguments.image), progress_of(arguments) as progress:
        report = offline.heal(
            arguments.image,
            arguments.backup,
            arguments.backup_format,
            journal_size=journal_size,
            progress=progress,
            **_how(arguments),
        )
    if arguments.output == "json":
        told = {"healed-bytes": report.healed_bytes, "left": [_range_json(found) for found in report.left]}
        common.print_json({"found": _verify_json(report.found), **told})
    elif not arguments.quiet:
        print("\n".join(_verify_lines(report.found)))
        if not report.found.fault:
            print(f"{human_size(report.healed_bytes)} healed.")
        if report.left:
            left = human_size(sum(found.length for found in report.left))
            print(f"{left} not: the backup has something else there:")
            print("\n".join(_range_lines(report.left)))
    if report.found.fault:
        return EXIT_NOT_VERIFIED
    return EXIT_WRONG if report.left else common.EXIT_OK


def _verify_json(report: VerifyReport) -> dict[str, Any]:
    return {
        "protected": report.is_protected,
        "fault": report.fault,
        "unit-bytes": report.unit_bytes,
        "refreshed": report.refreshed,
        "right-bytes": report.right_bytes,
        "below-bytes": report.below_bytes,
        "changed-bytes": report.bytes_of("changed"),
        "wrong-bytes": report.wrong_bytes,
        "ranges": [_range_json(found) for found in report.ranges],
    }


def _range_json(found: UnitRange) -> dict[str, Any]:
    return {"start": found.offset, "length": found.length, "state": found.state}


def _verify_lines(report: VerifyReport) -> Iterator[str]:
    if not report.is_protected:
        yield "Nothing was verified: the image has no protection. jqcow protect adds it."
        return
    if report.fault:
        yield f"Nothing was verified: {printable(report.fault)}. jqcow protect --refresh makes all sums anew."
        return
    moment = datetime.fromtimestamp(report.refreshed, UTC)
    yield f"Sums of {moment:%Y-%m-%d %H:%M:%S} UTC, each of {human_size(report.unit_bytes)}."
    yield f"{human_size(report.right_bytes)} right."
    if report.below_bytes:
        yield f"{human_size(report.below_bytes)} left to the backing file."
    for state, meaning in _TOLD.items():
        found = [part for part in report.ranges if part.state == state]
        if found:
            yield f"{human_size(report.bytes_of(state))} {state}: {meaning}."
            if state != "changed":
                yield from _range_lines(tuple(found))


def _range_lines(ranges: tuple[UnitRange, ...]) -> Iterator[str]:
    for found in ranges[:RANGES_SHOWN]:
        yield f"    {found.offset:#x} {found.length:#x} {found.state}"
    if len(ranges) > RANGES_SHOWN:
        yield f"    and {len(ranges) - RANGES_SHOWN:,} more: --output=json has all"
