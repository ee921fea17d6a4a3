"""Commands on backing chains: commit an overlay into its base, put it over another one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jqcow.cli import common, names, secrets
from jqcow.cli.common import human_size
from jqcow.cli.progress import add_progress, progress_of
from jqcow.errors import printable
from jqcow.offline.commit import commit
from jqcow.offline.rebase import rebase


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    parsers = _add_commit(commands), _add_rebase(commands)
    for parser in parsers:
        common.add_format(parser)
        names.add_image_opts(parser)
        names.add_objects(parser)
        common.add_cache(parser, "-t")
        common.add_allow_files(parser)
        secrets.add_passphrase(parser)
        common.add_journal_size(parser)
        add_progress(parser)
        common.add_output(parser)
        common.add_quiet(parser)
        parser.add_argument("image", metavar="IMAGE")


def _add_commit(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "commit",
        help="write an overlay into its backing file",
        description="Write what an overlay has of its own into its backing file, and empty the overlay. "
        "Whatever interrupts it, the overlay reads as before.",
    )
    parser.add_argument("-d", dest="keep", action="store_true", help="do not empty the overlay")
    parser.add_argument(
        "-b",
        dest="base",
        metavar="BASE",
        help="the file of the chain that takes what all above it have; no overlay is emptied",
    )
    parser.add_argument("-r", dest="rate", metavar="RATE", help="taken as qemu-img takes it, and not needed")
    parser.set_defaults(command=commit_command)
    return parser


def _add_rebase(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "rebase",
        help="give an overlay another backing file",
        description="Give an overlay another backing file, whole or not at all. What would read otherwise is "
        "copied into the overlay first.",
    )
    parser.add_argument(
        "-b",
        dest="backing_file",
        metavar="FILE",
        required=not common.profile_of(parser).is_qemu,
        help="the new backing file, as it is to be stored: relative to the overlay; empty for none",
    )
    parser.add_argument(
        "-F", dest="backing_format", choices=common.formats(parser), help="format of the new one"
    )
    parser.add_argument(
        "-u", dest="unsafe", action="store_true", help="change the name alone, and open no backing file"
    )
    common.add_cache(parser, "-T")
    common.add_force_share(parser)
    parser.set_defaults(command=rebase_command)
    return parser


def commit_command(arguments: argparse.Namespace) -> int:
    """Commit an overlay."""
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu import changing

        return changing.commit(arguments)
    with common.about(arguments.image), progress_of(arguments) as progress:
        report = commit(
            arguments.image, base=arguments.base, keep=arguments.keep, **_how(arguments), progress=progress
        )
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif not arguments.quiet:
        print("Image committed.")
        written, zeroed = human_size(report.written_bytes), human_size(report.zeroed_bytes)
        print(f"{printable(report.base)}: {written} written, {zeroed} zeroed.")
    return common.EXIT_OK


def _how(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what both commands take, in the library's words."""
    journal_size = common.journal_size_of(arguments)
    return {
        "allow_files": arguments.allow_files,
        "probe": arguments.probe,
        "journal_size": journal_size,
        "passphrase": secrets.passphrase_of(arguments),
    }


def rebase_command(arguments: argparse.Namespace) -> int:
    """Put an overlay over another backing file."""
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu import changing

        return changing.rebase(arguments)
    name = arguments.backing_file or None
    # As in qemu-img, what -F says of no backing file is not looked at.
    image_format = None if name is None else arguments.backing_format
    if name is not None and image_format is None:
        raise common.CommandError("a backing file needs its format: -F qcow2 or -F raw")
    with common.about(arguments.image), progress_of(arguments) as progress:
        report = rebase(
            arguments.image, name, image_format, unsafe=arguments.unsafe, **_how(arguments), progress=progress
        )
    if arguments.output == "json":
        common.print_json(common.as_json(report))
    elif report.copied_bytes and not arguments.quiet:
        print(f"{human_size(report.copied_bytes)} copied into {printable(arguments.image)}.", file=sys.stderr)
    return common.EXIT_OK
