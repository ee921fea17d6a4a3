"""Commands about an image as a whole: create, info, check, resize."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

import jqcow
from jqcow.cli import common
from jqcow.cli.common import human_size, plural
from jqcow.image import DEFAULT_CLUSTER_BYTES
from jqcow.offline.check import CheckReport
from jqcow.offline.convert import create_raw
from jqcow.offline.info import ImageFacts, Qcow2Facts, check_file, read_info

_COMPAT = {2: "0.10", 3: "1.1"}


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    _add_create(commands)
    info = commands.add_parser("info", help="say what an image is", description="Say what an image is.")
    common.add_format(info)
    common.add_output(info)
    info.add_argument("image", metavar="IMAGE")
    info.set_defaults(command=info_command)
    check = commands.add_parser(
        "check",
        help="check refcounts and tables",
        description="Check refcounts and tables. An image with a live journal is checked as it will be "
        "after recovery. Nothing is written.",
    )
    common.add_format(check)
    common.add_output(check)
    common.add_quiet(check)
    check.add_argument("image", metavar="IMAGE")
    check.set_defaults(command=check_command)
    resize = commands.add_parser(
        "resize",
        help="make a disk larger",
        description="Make the disk of a qcow2 image larger. A crashed image is recovered first.",
    )
    common.add_format(resize)
    common.add_quiet(resize)
    resize.add_argument("image", metavar="IMAGE")
    resize.add_argument("size", metavar="[+]SIZE", help="the new size; with +, what to add")
    resize.set_defaults(command=resize_command)


def _add_create(commands: Any) -> None:
    create = commands.add_parser(
        "create", help="create an image", description="Create an image. It appears whole and durable."
    )
    create.add_argument(
        "-f", dest="format", choices=common.FORMATS, default="qcow2", help="format (default: qcow2)"
    )
    common.add_options(create)
    create.add_argument("--overwrite", action="store_true", help="replace an existing file")
    common.add_quiet(create)
    create.add_argument("image", metavar="IMAGE")
    create.add_argument("size", metavar="SIZE", help="of the disk, rounded up to 512 bytes")
    create.set_defaults(command=create_command)


def create_command(arguments: argparse.Namespace) -> int:
    """Create an image."""
    size = common.parse_size(arguments.size)
    cluster_size = common.cluster_size_of(arguments.options, arguments.format, DEFAULT_CLUSTER_BYTES)
    with common.about(arguments.image):
        if arguments.format == "raw":
            create_raw(arguments.image, size, overwrite=arguments.overwrite)
        else:
            jqcow.create(
                arguments.image, size, cluster_size=cluster_size, overwrite=arguments.overwrite
            ).close()
    if not arguments.quiet:
        clusters = f" cluster_size={cluster_size}" if arguments.format == "qcow2" else ""
        print(f"Formatting '{arguments.image}', fmt={arguments.format}{clusters} size={size}")
    return common.EXIT_OK


# info


def info_command(arguments: argparse.Namespace) -> int:
    """Print what an image is."""
    with common.about(arguments.image):
        facts = read_info(arguments.image, arguments.format)
    if arguments.output == "json":
        common.print_json(_info_json(facts))
    else:
        print("\n".join(_info_lines(facts)))
    return common.EXIT_OK


def _info_json(facts: ImageFacts) -> dict[str, Any]:
    """Return the facts with qemu-img's names; what only jqcow knows is under ``jqcow-journal``."""
    told: dict[str, Any] = {"virtual-size": facts.virtual_size, "filename": facts.filename}
    special = facts.qcow2
    if special is not None:
        told["cluster-size"] = special.cluster_size
    told |= {"format": facts.format, "actual-size": facts.actual_size}
    if special is not None:
        told["format-specific"] = {"type": "qcow2", "data": _specific(special)}
        if special.backing_file is not None:
            told |= _backing(special.backing_file, special.backing_format, facts.filename)
    told["dirty-flag"] = special is not None and special.dirty
    if special is not None and special.journal is not None:
        told["jqcow-journal"] = common.as_json(special.journal)
    return told


def _backing(name: str, backing_format: str | None, filename: str) -> dict[str, Any]:
    told = {"backing-filename": name, "full-backing-filename": os.path.join(os.path.dirname(filename), name)}
    return told if backing_format is None else told | {"backing-filename-format": backing_format}


def _specific(special: Qcow2Facts) -> dict[str, Any]:
    data: dict[str, Any] = {
        "compat": _COMPAT[special.version],
        "compression-type": special.compression_type,
    }
    if special.version >= 3:
        data["lazy-refcounts"] = special.lazy_refcounts
    data["refcount-bits"] = special.refcount_bits
    if special.version >= 3:
        data |= {"corrupt": special.corrupt, "extended-l2": special.extended_l2}
    return data


def _info_lines(facts: ImageFacts) -> Iterator[str]:
    yield f"image: {facts.filename}"
    yield f"file format: {facts.format}"
    yield f"virtual size: {human_size(facts.virtual_size)} ({facts.virtual_size} bytes)"
    yield f"disk size: {human_size(facts.actual_size)}"
    special = facts.qcow2
    if special is None:
        return
    yield f"cluster_size: {special.cluster_size}"
    if special.backing_file is not None:
        yield f"backing file: {special.backing_file}"
    if special.backing_format is not None:
        yield f"backing file format: {special.backing_format}"
    yield "Format specific information:"
    for name, value in _specific(special).items():
        shown = str(value).lower() if isinstance(value, bool) else value
        yield f"    {name.replace('-', ' ')}: {shown}"
    if special.snapshot_count:
        yield f"Snapshots: {special.snapshot_count}"
    if special.journal is not None:
        journal = special.journal
        records = plural(journal.record_count, "record")
        torn = ", and one torn by a crash" if journal.torn_tail else ""
        yield f"Live journal: {records}{torn}, {human_size(journal.length)} at {journal.offset:#x}"
        yield "    The image was not closed. Nothing that was flushed is lost."
        yield "    jqcow replays the journal when it opens the image; for other programs run jqcow-recover."


# check


def check_command(arguments: argparse.Namespace) -> int:
    """Check an image; print the findings on stderr and the summary on stdout, as qemu-img does."""
    with common.about(arguments.image):
        facts = read_info(arguments.image, arguments.format)
        if facts.qcow2 is None:
            raise common.CommandError(
                f"{arguments.image}: a raw file has nothing to check", common.EXIT_UNSUPPORTED
            )
        report = check_file(arguments.image)
    is_live = facts.qcow2.journal is not None
    if is_live and not arguments.quiet:
        print("The journal is live: checked as after recovery (jqcow-recover).", file=sys.stderr)
    for finding in report.findings:
        print(finding, file=sys.stderr)
    if arguments.output == "json":
        common.print_json(_check_json(report, facts.filename))
    elif not arguments.quiet:
        print("\n".join(_check_lines(report)))
    if report.errors:
        return common.EXIT_CORRUPT
    return common.EXIT_LEAKS if report.leaks else common.EXIT_OK


def _check_json(report: CheckReport, filename: str) -> dict[str, Any]:
    """Return the report with qemu-img's names; like it, without the numbers that are 0 and may be."""
    optional = {
        "total-clusters": report.total_clusters,
        "allocated-clusters": report.allocated_clusters,
        "corruptions": report.errors,
        "leaks": report.leaks,
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
    if report.errors:
        yield f"\n{report.errors} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if report.leaks:
        yield f"\n{report.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if report.allocated_clusters:
        yield _allocation_line(report)
    yield f"Image end offset: {report.image_end_offset}"


def _allocation_line(report: CheckReport) -> str:
    allocated, total = report.allocated_clusters, report.total_clusters
    # Shares of the allocated clusters, as in qemu-img.
    fragmented = 100 * report.fragmented_clusters / allocated
    compressed = 100 * report.compressed_clusters / allocated
    return (
        f"{allocated}/{total} = {100 * allocated / total:.2f}% allocated, "
        f"{fragmented:.2f}% fragmented, {compressed:.2f}% compressed clusters"
    )


# resize


def resize_command(arguments: argparse.Namespace) -> int:
    """Make a disk larger."""
    text: str = arguments.size
    size = common.parse_size(text.removeprefix("+"))
    if arguments.format == "raw":
        raise common.CommandError("a raw file is resized by truncate; jqcow resizes qcow2 images")
    with common.about(arguments.image), jqcow.open(arguments.image, "r+") as image:
        if image.recovered is not None and not arguments.quiet:
            print("The image had crashed; it was recovered first.", file=sys.stderr)
        new_size = image.size + size if text.startswith("+") else size
        if new_size < image.size:
            raise common.CommandError(
                f"{arguments.image}: the disk has {image.size} bytes; jqcow does not shrink disks"
            )
        image.resize(new_size)
    if not arguments.quiet:
        print("Image resized.")
    return common.EXIT_OK
