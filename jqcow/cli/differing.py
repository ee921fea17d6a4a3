"""The command that tells where two disks differ, from their tables alone."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

from jqcow.cli import common, names

if TYPE_CHECKING:
    from jqcow.disks.chain import Chain


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    parser = commands.add_parser(
        "diff",
        help="tell where two disks or snapshots differ",
        description="Tell where a disk may differ from an older one, as JSON, from tables alone: "
        "nothing of what they hold is read.",
    )
    common.add_format(parser)
    parser.add_argument("-F", dest="older_format", choices=common.formats(parser), help="format of OLDER")
    parser.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="of IMAGE, instead of its disk")
    parser.add_argument(
        "--from", dest="older_snapshot", metavar="SNAPSHOT", help="of OLDER, instead of its disk"
    )
    common.add_allow_files(parser)
    common.add_force_share(parser)
    parser.add_argument("older", metavar="OLDER")
    parser.add_argument(
        "image", metavar="IMAGE", nargs="?", help="the newer disk (default: OLDER, with --from or -l)"
    )
    parser.set_defaults(command=diff_command)


def diff_command(arguments: argparse.Namespace) -> int:
    """Print where two disks may differ."""
    from jqcow.offline.diff import changed_extents

    newer = arguments.image or arguments.older
    if arguments.image is None and arguments.snapshot is None and arguments.older_snapshot is None:
        raise common.CommandError("two images, or a snapshot of one: --from or -l")
    with (
        closing(
            _open(arguments, arguments.older, arguments.older_format, arguments.older_snapshot)
        ) as before,
        closing(_open(arguments, newer, arguments.format, arguments.snapshot)) as after,
    ):
        # A line for each: there may be millions.
        start = "["
        for found in changed_extents(before, after):
            print(f"{start}{json.dumps(common.as_json(found))}", end="")
            start = ",\n"
        print("[]" if start == "[" else "]")
    return common.EXIT_OK


def _open(arguments: argparse.Namespace, name: str, image_format: str | None, snapshot: str | None) -> Chain:
    from jqcow.disks.chain import open_disk
    from jqcow.disks.policy import Following
    from jqcow.offline.losses import refuse_lost_data

    given = names.named(name, image_format)
    arguments.given = name
    following = Following(
        arguments.allow_files, arguments.probe, share_writers=arguments.force_share, reads_data=False
    )
    with common.opening(arguments, given.path):
        chain = open_disk(
            given.path, common.disk_format(given.format), snapshot=snapshot, following=following
        )
        try:
            # A lost table reads as zeros.
            refuse_lost_data(chain.layers)
        except BaseException:
            chain.close()
            raise
        return chain
