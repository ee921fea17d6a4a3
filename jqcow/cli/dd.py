"""The command that copies a part of a disk: spelled as in qemu-img."""

from __future__ import annotations

import argparse
from contextlib import closing
from typing import Any

from jqcow.cli import common, names, secrets
from jqcow.cli.common import CommandError

_OPERANDS = ("bs", "count", "if", "of", "skip")
_BLOCK_BYTES = 512
_COUNT_MAX = (1 << 63) - 1


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    parser = commands.add_parser(
        "dd",
        help="copy a part of a disk",
        description="Copy blocks of a disk into a new file. It appears under its name whole and durable.",
    )
    common.add_format(parser)
    common.add_target_format(parser, default="raw")
    names.add_image_opts(parser)
    names.add_objects(parser)
    secrets.add_passphrase(parser)
    common.add_allow_files(parser)
    common.add_force_share(parser)
    common.add_overwrite(parser)
    parser.add_argument(
        "operands",
        metavar="OPERAND",
        nargs="*",
        help="if=SOURCE, of=TARGET, bs=BYTES of a block (512), count=BLOCKS, skip=BLOCKS of the source",
    )
    parser.set_defaults(command=dd_command)


def dd_command(arguments: argparse.Namespace) -> int:
    """Copy blocks."""
    from jqcow.disks.chain import open_disk
    from jqcow.disks.policy import Following
    from jqcow.offline.convert import convert_disk
    from jqcow.offline.copy_into import Window

    found = _operands(arguments.operands)
    if "if" not in found or "of" not in found:
        raise CommandError("Must specify both input and output files")
    block = _number(found, "bs", _BLOCK_BYTES, lowest=1, highest=(1 << 31) - 1)
    skip = _number(found, "skip", 0) * block
    given = names.named(found["if"], arguments.format, image_opts=arguments.image_opts, takes_exports=True)
    arguments.given = found["if"]
    names.take_secrets(arguments, given)
    following = Following(
        arguments.allow_files,
        arguments.probe,
        share_writers=arguments.force_share or bool(given.force_share),
        passphrase=secrets.passphrase_of(arguments),
    )
    with common.opening(arguments, found["if"]):
        chain = open_disk(given.path, common.disk_format(given.format), following=following)
    with closing(chain):
        end = chain.size
        if "count" in found:
            # qemu-img counts from the start of the source, too, where it skips.
            before = 0 if arguments.profile.is_qemu else skip
            end = min(end, before + _number(found, "count", 0) * block)
        if skip > chain.size:
            raise CommandError(f"{found['if']}: cannot skip to specified offset")
        size = max(0, end - skip)
        part = Window(chain, skip, size)
        target_format = common.disk_format(arguments.target_format) or "raw"
        with common.opening(arguments, found["of"]):
            convert_disk(
                part,
                names.named(found["of"], None).path,
                target_format,
                overwrite=arguments.overwrite,
                **common.unasked(arguments, target_format),
            )
    return common.EXIT_OK


def _operands(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for operand in given:
        name, equals, value = operand.partition("=")
        if name not in _OPERANDS:
            raise CommandError(f"unrecognized operand {name}")
        if not equals:
            raise CommandError(f"unrecognized operand {operand}")
        found[name] = value
    return found


def _number(
    found: dict[str, str], name: str, otherwise: int, lowest: int = 0, highest: int = _COUNT_MAX
) -> int:
    if name not in found:
        return otherwise
    try:
        number = common.parse_size(found[name], unit=1)
    except ValueError:
        raise CommandError(f"invalid number: '{found[name]}'") from None
    if not lowest <= number <= highest:
        raise CommandError(f"invalid number: '{found[name]}'")
    return number
