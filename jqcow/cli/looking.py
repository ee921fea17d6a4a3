"""Commands that look into an image: map, journal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from jqcow.cli import common
from jqcow.cli.common import human_size, plural
from jqcow.offline.map import MapExtent, map_file
from jqcow.offline.records import JournalListing, Record, read_journal

_MAP_ROW = "{:<16}{:<16}{:<16}{}"


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    mapping = commands.add_parser(
        "map", help="say where the data of a disk lies", description="Say where the data of a disk lies."
    )
    common.add_format(mapping)
    common.add_output(mapping)
    mapping.add_argument("-s", "--start-offset", metavar="OFFSET", default="0", help="start here")
    mapping.add_argument("-l", "--max-length", metavar="LENGTH", help="and end after this many bytes")
    mapping.add_argument("image", metavar="IMAGE")
    mapping.set_defaults(command=map_command)
    journal = commands.add_parser(
        "journal",
        help="list the records of a live journal",
        description="List the records of the live journal of a crashed image. Nothing is written.",
    )
    common.add_output(journal)
    journal.add_argument("image", metavar="IMAGE")
    journal.set_defaults(command=journal_command)


# map


def map_command(arguments: argparse.Namespace) -> int:
    """Print the extents of a disk."""
    start = common.parse_size(arguments.start_offset, unit=1)
    length = None if arguments.max_length is None else common.parse_size(arguments.max_length, unit=1)
    with common.about(arguments.image):
        extents = map_file(arguments.image, arguments.format, start, length)
    if arguments.output == "json":
        print("[" + ",\n".join(_json_line(extent) for extent in extents) + "]")
        return common.EXIT_OK
    print(_MAP_ROW.format("Offset", "Length", "Mapped to", "File"))
    for extent in extents:
        if extent.compressed:
            raise common.CommandError(
                f"{arguments.image}: compressed clusters have no offset to map to: use --output=json"
            )
        if extent.data and not extent.zero and extent.offset is not None:
            place = _hex(extent.start), _hex(extent.length), _hex(extent.offset)
            print(_MAP_ROW.format(*place, arguments.image))
    return common.EXIT_OK


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def _json_line(extent: MapExtent) -> str:
    told = {"start": extent.start, "length": extent.length, "depth": extent.depth}
    told |= {"present": extent.present, "zero": extent.zero, "data": extent.data}
    if extent.compressed:
        told["compressed"] = True
    if extent.offset is not None:
        told["offset"] = extent.offset
    return f"{{ {json.dumps(told)[1:-1]}}}"


# journal


def journal_command(arguments: argparse.Namespace) -> int:
    """Print the records of a live journal."""
    with common.about(arguments.image):
        listing = read_journal(arguments.image)
    if arguments.output == "json":
        common.print_json(common.as_json(listing))
    elif listing is None:
        print(f"{arguments.image}: clean, no live journal")
    else:
        print("\n".join(_journal_lines(listing, arguments.image)))
    return common.EXIT_OK


def _journal_lines(listing: JournalListing, name: str) -> Iterator[str]:
    yield f"{name}: a live journal, {human_size(listing.length)} at host offset {listing.offset:#x}"
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
