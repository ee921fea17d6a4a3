"""The commands that put disks into a directory of chunks, and take them out: export, import."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from jqcow.cli import common, secrets
from jqcow.cli.common import human_size
from jqcow.cli.progress import add_progress, progress_of
from jqcow.errors import printable


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    export = commands.add_parser(
        "export",
        help="write a disk as chunks that are shared with other exports",
        description="Write a disk into a directory, in chunks of one length that are named by the hash of "
        "what they hold: what two exports share is there once.",
    )
    common.add_format(export)
    export.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="export a snapshot, by id or name")
    export.add_argument(
        "--chunk-size", metavar="SIZE", default="1M", help="a power of two from 4k to 64M (default: 1M)"
    )
    common.add_force_share(export)
    common.add_allow_files(export)
    secrets.add_passphrase(export)
    add_progress(export)
    common.add_output(export)
    common.add_quiet(export)
    export.add_argument("image", metavar="IMAGE")
    export.add_argument("directory", metavar="DIRECTORY", help="may hold other exports")
    export.add_argument("name", metavar="NAME", help="of this export, which is new")
    export.set_defaults(command=export_command)
    back = commands.add_parser(
        "import",
        help="make an image of what was exported",
        description="Make an image of the disk that an index of an export tells of. Every chunk is checked.",
    )
    common.add_target_format(back)
    common.add_options(back, common.FORM_OPTIONS_HELP)
    common.add_overwrite(back)
    add_progress(back)
    common.add_quiet(back)
    back.add_argument("index", metavar="INDEX", help="DIRECTORY/NAME.json")
    back.add_argument("target", metavar="TARGET")
    back.set_defaults(command=import_command)


def export_command(arguments: argparse.Namespace) -> int:
    """Export a disk."""
    from jqcow.disks.policy import Following
    from jqcow.offline.export import export

    following = Following(
        arguments.allow_files,
        arguments.probe,
        share_writers=arguments.force_share,
        passphrase=secrets.passphrase_of(arguments),
    )
    with common.about(arguments.image), progress_of(arguments) as progress:
        report = export(
            arguments.image,
            arguments.directory,
            arguments.name,
            source_format=common.disk_format(arguments.format),
            snapshot=arguments.snapshot,
            chunk_bytes=common.parse_size(arguments.chunk_size, unit=1),
            following=following,
            progress=progress,
        )
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif not arguments.quiet:
        chunks = common.plural(report.chunk_count, "chunk")
        print(f"{printable(report.index)}: a disk of {human_size(report.virtual_size)} in {chunks}")
        print(f"  {report.new_chunk_count} of them are new and take {human_size(report.new_bytes)}")
    return common.EXIT_OK


def import_command(arguments: argparse.Namespace) -> int:
    """Make an image of an export."""
    from jqcow.offline.convert import convert_disk
    from jqcow.offline.export import ExportedDisk

    target_format = common.disk_format(arguments.target_format) or "raw"
    options = common.file_options(common.named_options(arguments.options, target_format, common.FORM_OPTIONS))
    with (
        common.about(arguments.index),
        closing(ExportedDisk(arguments.index)) as disk,
        progress_of(arguments) as progress,
    ):
        convert_disk(
            disk, arguments.target, target_format, overwrite=arguments.overwrite, progress=progress, **options
        )
    return common.EXIT_OK
