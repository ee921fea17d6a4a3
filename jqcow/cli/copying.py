"""Commands that copy whole disks: convert."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from jqcow.cli import common, secrets
from jqcow.cli.common import human_size
from jqcow.cli.progress import add_progress, progress_kind, shown_progress
from jqcow.disks.files import open_to_read
from jqcow.errors import printable
from jqcow.offline.convert import ConvertReport, convert
from jqcow.ondisk.naming import DiskFormat


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    parser = commands.add_parser(
        "convert",
        help="copy a disk into another format",
        description="Copy a disk into a new file, raw or qcow2. Zeros take no space in the target. "
        "The target appears under its name when it is whole and durable.",
    )
    common.add_format(parser)
    parser.add_argument(
        "-O", dest="target_format", choices=common.FORMATS, default="raw", help="format (default: raw)"
    )
    common.add_options(parser, f"{common.FORM_OPTIONS_HELP}, {secrets.ENCRYPTION_HELP}")
    secrets.add_objects(parser)
    secrets.add_passphrase(parser)
    parser.add_argument(
        "-c", dest="compressed", action="store_true", help="compress the clusters of a qcow2 image"
    )
    parser.add_argument(
        "--compression-level",
        type=int,
        metavar="LEVEL",
        help="1-9 for zlib (default: 6), 1-22 for zstd (default: 3)",
    )
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="copy a snapshot, by id or name")
    common.add_allow_files(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing target")
    parser.add_argument(
        "--verify", action="store_true", help="reread source and target and compare them, before naming it"
    )
    parser.add_argument(
        "--salvage", action="store_true", help="make zeros of what cannot be read, and say what that is"
    )
    parser.add_argument("--bitmaps", action="store_true", help="copy persistent bitmaps too")
    parser.add_argument(
        "--skip-broken-bitmaps",
        action="store_true",
        help="leave out bitmaps that may be wrong, with a warning",
    )
    add_progress(parser)
    common.add_output(parser)
    common.add_quiet(parser)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("target", metavar="TARGET")
    parser.set_defaults(command=convert_command)


def convert_command(arguments: argparse.Namespace) -> int:
    """Convert a disk."""
    source, target = arguments.source, arguments.target
    if target == "-":
        raise common.CommandError("'-' as the target: jqcow writes no pipe; ./- is a file of that name")
    if arguments.skip_broken_bitmaps and not arguments.bitmaps:
        raise common.CommandError("--skip-broken-bitmaps is for --bitmaps")
    known = (*common.FORM_OPTIONS, *secrets.ENCRYPTION_OPTIONS)
    named = common.named_options(arguments.options, arguments.target_format, known)
    options = common.file_options(named)
    # Read once: a descriptor gives it once.
    passphrase = secrets.passphrase_of(arguments)
    encryption = secrets.encryption_of(arguments, named, target, passphrase)
    common.print_warnings(source, arguments.format)
    with common.about(source), shown_progress(progress_kind(arguments), sys.stderr) as progress:
        report = convert(
            source,
            target,
            source_format=arguments.format or _probe(source, quiet=arguments.quiet),
            snapshot=arguments.snapshot,
            allow_files=arguments.allow_files,
            probe=arguments.probe,
            target_format=arguments.target_format,
            compressed=arguments.compressed,
            compression_level=arguments.compression_level,
            passphrase=passphrase,
            encryption=encryption,
            **options,
            overwrite=arguments.overwrite,
            verify=arguments.verify,
            salvage=arguments.salvage,
            bitmaps=("sound" if arguments.skip_broken_bitmaps else "all") if arguments.bitmaps else None,
            progress=progress,
        )
    for line in _warnings(report):
        print(line, file=sys.stderr)
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif not arguments.quiet:
        print("\n".join(_report_lines(report)))
    return common.EXIT_OK


def _probe(source: str, *, quiet: bool) -> DiskFormat:
    """Tell the format of the source; raw is what everything else looks like, so it is said."""
    device, found = open_to_read(source)
    device.close()
    if found == "raw" and not quiet:
        print(
            f"WARNING: the format of '{source}' was not given and it looks raw. Use -f raw if it is.",
            file=sys.stderr,
        )
    return found


def _warnings(report: ConvertReport) -> Iterator[str]:
    for lost in report.lost:
        place = "" if lost.host_offset is None else f" (host offset {lost.host_offset:#x})"
        what = f"guest offset {lost.offset:#x}, {lost.length} bytes{place}"
        yield f"warning: {what} cannot be read and became zeros: {printable(lost.reason)}"
    for name in report.skipped_bitmaps:
        yield f"warning: bitmap {printable(name)!r} may be wrong, and was left out"


def _report_lines(report: ConvertReport) -> Iterator[str]:
    source, target = printable(report.source), printable(report.target)
    yield f"{source} ({report.source_format}) is now {target} ({report.target_format})"
    disk, written = human_size(report.virtual_size), human_size(report.written_bytes)
    yield f"  a disk of {disk}, {written} of it not zero, in {report.seconds:.2f} s"
    if report.lost:
        lost = human_size(sum(part.length for part in report.lost))
        yield f"  {lost} could not be read and became zeros, in {common.plural(len(report.lost), 'range')}"
    if report.bitmaps:
        names = ", ".join(printable(name) for name in report.bitmaps)
        yield f"  with {common.plural(len(report.bitmaps), 'bitmap')}: {names}"
    if report.compression_type is not None:
        whole, packed = human_size(report.compressed_bytes), human_size(report.packed_bytes)
        yield f"  {whole} of it compressed to {packed} ({report.compression_type})"
    if report.verify_seconds is not None:
        yield f"  verified: source and target are equal ({report.verify_seconds:.2f} s)"
