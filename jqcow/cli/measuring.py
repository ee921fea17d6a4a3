"""The command that tells how much space an image will take: spelled as in qemu-img."""

from __future__ import annotations

import argparse
from typing import Any

from jqcow.cli import common, names, secrets
from jqcow.offline.measure import Measurement, measure, measure_size
from jqcow.ondisk import root as roots


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    parser = commands.add_parser(
        "measure",
        help="tell how much space an image takes",
        description="Tell how large a file or a block device has to be for a disk: of a size, or converted "
        "from a file.",
    )
    common.add_format(parser)
    names.add_image_opts(parser)
    names.add_objects(parser)
    common.add_target_format(parser, default="raw")
    common.add_options(parser, f"{common.FORM_OPTIONS_HELP}, {secrets.ENCRYPTION_HELP}")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="a snapshot, by id or name")
    parser.add_argument("--size", metavar="SIZE", help="of a new disk, instead of a file")
    common.add_journal_size(parser)
    common.add_allow_files(parser)
    common.add_force_share(parser)
    common.add_output(parser)
    parser.add_argument("source", metavar="FILE", nargs="*" if common.profile_of(parser).is_qemu else "?")
    parser.set_defaults(command=measure_command)


def measure_command(arguments: argparse.Namespace) -> int:
    """Measure a disk."""
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu.measuring import measured

        _print(arguments, measured(arguments))
        return common.EXIT_OK
    if (arguments.size is None) == (arguments.source is None):
        raise common.CommandError("either --size or a file is to be measured")
    named = common.named_options(
        arguments.options, arguments.target_format, (*common.FORM_OPTIONS, *secrets.ENCRYPTION_OPTIONS)
    )
    options = common.file_options(named)
    encryption = secrets.encryption_to_measure(named)
    journal_size = common.journal_size_of(arguments) or roots.DEFAULT_JOURNAL_BYTES
    if arguments.source is None:
        if arguments.format is not None or arguments.snapshot is not None:
            raise common.CommandError("-f and -l are of a file, not of --size")
        found = measure_size(
            common.parse_size(arguments.size),
            target_format=arguments.target_format,
            encryption=encryption,
            journal_size=journal_size,
            **options,
        )
    else:
        given = names.named(arguments.source, arguments.format, image_opts=arguments.image_opts)
        with common.about(arguments.source):
            found = measure(
                given.path,
                source_format=common.disk_format(given.format),
                snapshot=arguments.snapshot,
                allow_files=arguments.allow_files,
                probe=arguments.probe,
                force_share=arguments.force_share or bool(given.force_share),
                target_format=arguments.target_format,
                encryption=encryption,
                journal_size=journal_size,
                **options,
            )
    _print(arguments, found)
    return common.EXIT_OK


def _print(arguments: argparse.Namespace, found: Measurement) -> None:
    if arguments.output == "json":
        values = common.as_json(found)
        if arguments.profile.is_qemu:
            values = {name: values[name] for name in ("bitmaps", "required", "fully-allocated")}
        common.print_json({name: value for name, value in values.items() if value is not None})
        return
    print(f"required size: {found.required}")
    print(f"fully allocated size: {found.fully_allocated}")
    if found.bitmaps is not None:
        print(f"bitmaps size: {found.bitmaps}")
    if found.journal:
        print(f"journal size: {found.journal}")
