"""The command that makes an image take less space: compact."""

from __future__ import annotations

import argparse
from typing import Any

from jqcow.cli import common, secrets
from jqcow.cli.common import human_size
from jqcow.cli.progress import add_progress, progress_of
from jqcow.errors import printable


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    parser = commands.add_parser(
        "compact",
        help="give unused space back to the host",
        description="Free the clusters of a disk that hold nothing but zeros, and punch what the file keeps "
        "of free ones. The disk and its snapshots stay as they are.",
    )
    common.add_allow_files(parser)
    secrets.add_passphrase(parser)
    common.add_journal_size(parser)
    add_progress(parser)
    common.add_output(parser)
    common.add_quiet(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.set_defaults(command=compact_command)


def compact_command(arguments: argparse.Namespace) -> int:
    """Make an image take less space."""
    from jqcow.offline.compact import compact

    with common.about(arguments.image), progress_of(arguments) as progress:
        report = compact(
            arguments.image,
            allow_files=arguments.allow_files,
            probe=arguments.probe,
            passphrase=secrets.passphrase_of(arguments),
            journal_size=common.journal_size_of(arguments),
            progress=progress,
        )
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif not arguments.quiet:
        zeros, free = human_size(report.zeroed_bytes), human_size(report.punched_bytes)
        before, after = human_size(report.before_bytes), human_size(report.after_bytes)
        print(f"{printable(arguments.image)}: {zeros} of zeros freed, {free} of free clusters punched")
        print(f"  it takes {after}, {before} before")
    return common.EXIT_OK
