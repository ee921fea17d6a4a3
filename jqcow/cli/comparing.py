"""The command that compares two disks: spelled as in qemu-img."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import TYPE_CHECKING, Any

from jqcow.cli import common, names, secrets
from jqcow.cli.progress import add_progress, progress_of

if TYPE_CHECKING:
    from jqcow.disks.chain import Chain
    from jqcow.offline.compare import Comparison

EXIT_DIFFERENT = 1
EXIT_NOT_COMPARED = 2
"""As qemu-img: 1 is an answer, 2 is none."""


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    parser = commands.add_parser(
        "compare",
        help="tell whether two disks are equal",
        description="Tell whether two disks hold the same bytes, whatever their formats. "
        "What lies past the end of the smaller one counts as zeros.",
    )
    common.add_format(parser)
    parser.add_argument(
        "-F", dest="second_format", choices=common.formats(parser), help="format of the second"
    )
    parser.add_argument(
        "-s",
        dest="strict",
        action="store_true",
        help="sizes must be equal too, and which ranges are data, zeros or in no file",
    )
    names.add_image_opts(parser)
    names.add_objects(parser)
    secrets.add_passphrase(parser)
    common.add_cache(parser, "-T")
    common.add_allow_files(parser)
    common.add_force_share(parser)
    add_progress(parser)
    common.add_output(parser)
    common.add_quiet(parser)
    parser.add_argument("first", metavar="FIRST")
    parser.add_argument("second", metavar="SECOND")
    parser.set_defaults(command=compare_command)


def compare_command(arguments: argparse.Namespace) -> int:
    """Compare two disks."""
    from jqcow.offline.compare import compare_disks

    try:
        with (
            closing(_open(arguments, arguments.first, arguments.format)) as one,
            closing(_open(arguments, arguments.second, arguments.second_format)) as other,
            progress_of(arguments) as progress,
        ):
            found = compare_disks(one, other, strict=arguments.strict, progress=progress)
    except common.CommandError as error:
        code = EXIT_NOT_COMPARED if error.code == common.EXIT_FAILED else error.code
        raise common.CommandError(str(error), code) from error
    is_equal = (
        found.content is None and found.status is None and not (arguments.strict and found.sizes_differ)
    )
    if arguments.output == "json":
        common.print_json({"equal": is_equal, **common.as_json(found)})
    elif not arguments.quiet:
        print("\n".join(_lines(found, strict=arguments.strict)))
    return common.EXIT_OK if is_equal else EXIT_DIFFERENT


def _open(arguments: argparse.Namespace, name: str, image_format: str | None) -> Chain:
    from jqcow.disks.chain import open_disk
    from jqcow.disks.policy import Following
    from jqcow.offline.losses import refuse_lost_data

    given = names.named(name, image_format, image_opts=arguments.image_opts, takes_exports=True)
    arguments.given, arguments.secret = name, given.secret
    following = Following(
        arguments.allow_files,
        arguments.probe,
        share_writers=arguments.force_share or bool(given.force_share),
        passphrase=secrets.passphrase_of(arguments),
    )
    with common.opening(arguments, name):
        chain = open_disk(given.path, common.disk_format(given.format), following=following)
        try:
            # A lost table reads as zeros, and the disks would seem to be equal.
            refuse_lost_data(chain.layers)
        except BaseException:
            chain.close()
            raise
        return chain


def _lines(found: Comparison, *, strict: bool) -> list[str]:
    if strict and found.sizes_differ:
        return ["Strict mode: Image size mismatch!"]
    if found.status is not None:
        return [f"Strict mode: Offset {found.status} block status mismatch!"]
    lines = ["Warning: Image size mismatch!"] if found.sizes_differ else []
    if found.content is not None:
        return [*lines, f"Content mismatch at offset {found.content}!"]
    return [*lines, "Images are identical."]
