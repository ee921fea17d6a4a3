"""The command that shows a disk as files in a directory: mount."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import jqcow
from jqcow.cli import common, names, secrets
from jqcow.cli.common import CommandError
from jqcow.errors import printable


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    parser = commands.add_parser(
        "mount",
        help="show a disk and its partitions as files in a directory",
        description="Show the disk of a qcow2 image as the file disk.img in a directory, and its partitions "
        "as partition1.img and so on beside it, until `fusermount3 -u DIRECTORY` or Ctrl-C. It needs FUSE "
        "and the extra mount.",
    )
    names.add_image_opts(parser)
    parser.add_argument(
        "--writable", action="store_true", help="let the files be written (default: only read)"
    )
    parser.add_argument("--snapshot", metavar="SNAPSHOT", help="show a snapshot, by id or name")
    common.add_force_share(parser)
    common.add_allow_files(parser)
    common.add_journal_size(parser)
    names.add_objects(parser)
    secrets.add_passphrase(parser)
    common.add_quiet(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("directory", metavar="DIRECTORY", help="an empty one")
    parser.set_defaults(command=mount_command, format=None)


def mount_command(arguments: argparse.Namespace) -> int:
    """Show a disk until it is unmounted."""
    from jqcow.mount import mount

    if arguments.writable and arguments.snapshot is not None:
        raise CommandError("a snapshot is only read: --snapshot and --writable do not go together")
    if arguments.format == "raw":
        raise CommandError("a raw disk is a file already")

    def ready(shown: list[str]) -> None:
        if not arguments.quiet:
            print(f"{arguments.directory}: {' '.join(shown)}", flush=True)

    def tell(text: str) -> None:
        print(f"jqcow: {printable(text)}", file=sys.stderr, flush=True)

    with (
        common.about(arguments.image),
        jqcow.open(
            arguments.image,
            "r+" if arguments.writable else "r",
            snapshot=arguments.snapshot,
            force_share=arguments.force_share,
            allow_files=arguments.allow_files,
            probe=arguments.probe,
            journal_size=common.journal_size_of(arguments),
            passphrase=secrets.passphrase_of(arguments),
        ) as image,
    ):
        mount(image, arguments.directory, ready=ready, tell=tell)
    return common.EXIT_OK
