"""The command about persistent bitmaps: add, remove, clear and so on; spelled as in qemu-img."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import jqcow
from jqcow.cli import common, names
from jqcow.errors import printable
from jqcow.image.bitmaps import granularity_bits
from jqcow.image.opening import open_alone

Action = tuple[str, str | None]


class _Append(argparse.Action):
    """Actions are done in the order in which they are given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        name = (option_string or "").removeprefix("--")
        found = [*(namespace.actions or []), (name, values if isinstance(values, str) else None)]
        namespace.actions = found


def add_parsers(commands: Any) -> None:
    """Add the subcommand of this module."""
    bitmap = commands.add_parser(
        "bitmap",
        help="add, remove or change persistent bitmaps",
        description="Add, remove or change persistent bitmaps, in the order given: all of it, durably, or "
        "nothing. A crashed image is recovered first.",
    )
    bitmap.set_defaults(command=bitmap_command, actions=None)
    for name, text in (
        ("add", "add BITMAP; it takes note of changes unless --disable follows"),
        ("remove", "remove BITMAP"),
        ("clear", "make everything clean in BITMAP"),
        ("enable", "have BITMAP take note of changes"),
        ("disable", "have BITMAP stay as it is"),
    ):
        bitmap.add_argument(f"--{name}", action=_Append, nargs=0, help=text)
    bitmap.add_argument(
        "--merge", action=_Append, metavar="SOURCE", help="make dirty what is dirty in SOURCE"
    )
    bitmap.add_argument("--rename", action=_Append, metavar="NEW", help="give BITMAP another name")
    bitmap.add_argument(
        "--dirty", action="store_true", help="list what BITMAP calls dirty; nothing is written"
    )
    bitmap.add_argument(
        "--remove-broken",
        action="store_true",
        help="give up damaged bitmaps and repair as check -r all; jqcow undo takes that back",
    )
    bitmap.add_argument(
        "-g", "--granularity", dest="granularity", metavar="SIZE", help="what one bit stands for, with --add"
    )
    bitmap.add_argument(
        "-b", "--source-file", dest="source", metavar="FILE", help="the image that SOURCE of --merge is in"
    )
    bitmap.add_argument(
        "-F", "--source-format", dest="source_format", choices=("qcow2",), help="the format of FILE"
    )
    bitmap.add_argument("-f", "--format", dest="format", choices=("qcow2",), help="the format of IMAGE")
    names.add_image_opts(bitmap)
    names.add_objects(bitmap)
    common.add_journal_size(bitmap)
    common.add_output(bitmap)
    common.add_quiet(bitmap)
    bitmap.add_argument("image", metavar="IMAGE")
    bitmap.add_argument("bitmap", metavar="BITMAP", nargs="?")


def bitmap_command(arguments: argparse.Namespace) -> int:
    """Change the bitmaps of an image, or look at one."""
    _check(arguments)
    if arguments.remove_broken:
        return _remove_broken(arguments)
    if arguments.dirty:
        return _print_dirty(arguments)
    name, changes = arguments.bitmap, _changes(arguments)
    journal_size = common.journal_size_of(arguments)
    # What is below the image stays closed: bitmaps are its own.
    with (
        common.opening(arguments, arguments.image),
        open_alone(arguments.image, "r+", journal_size=journal_size) as image,
    ):
        if image.recovered is not None and not arguments.quiet:
            print("The image had crashed; it was recovered first.", file=sys.stderr)
        with image.transaction() as transaction:
            for change in changes:
                name = change(transaction, name)
    return common.EXIT_OK


def _check(arguments: argparse.Namespace) -> None:
    kinds = [bool(arguments.actions), arguments.dirty, arguments.remove_broken]
    if sum(kinds) != 1:
        raise common.CommandError(
            "say what to do: --add, --remove, --clear, --enable, --disable, --merge, "
            "--rename, or --dirty or --remove-broken alone"
        )
    names = [name for name, _ in arguments.actions or ()]
    if (arguments.bitmap is None) != arguments.remove_broken:
        raise common.CommandError("all but --remove-broken needs the name of a bitmap, and that takes none")
    if "add" in names and "remove" in names[names.index("add") :]:
        raise common.CommandError("--remove after --add leaves nothing")
    if arguments.granularity is not None and "add" not in names:
        raise common.CommandError("-g is for --add")
    if (arguments.source is not None) and "merge" not in names:
        raise common.CommandError("-b is for --merge")
    if arguments.source_format is not None and arguments.source is None:
        raise common.CommandError("-F is the format of -b")
    if arguments.output == "json" and not arguments.dirty:
        raise common.CommandError("--output is for --dirty")


Change = Callable[[jqcow.Transaction, str], str]
"""Changes a bitmap of this name; returns the name that it then has."""


def _changes(arguments: argparse.Namespace) -> list[Change]:
    granularity = None
    if arguments.granularity is not None:
        granularity = common.parse_size(arguments.granularity, unit=1)
        granularity_bits(granularity, 0)
    return [_change(action, arguments.source, granularity) for action in arguments.actions]


def _change(action: Action, source: str | None, granularity: int | None) -> Change:
    kind, value = action

    def change(transaction: jqcow.Transaction, name: str) -> str:
        bitmaps = transaction.bitmaps
        if kind == "add":
            bitmaps.add(name, granularity)
        elif kind == "rename":
            bitmaps.rename(name, cast(str, value))
            return cast(str, value)
        elif kind == "merge" and source is not None:
            _merge_from(source, cast(str, value), transaction, name)
        elif kind == "merge":
            bitmaps.merge(name, cast(str, value))
        else:
            getattr(bitmaps, kind)(name)
        return name

    return change


def _merge_from(path: str, source: str, transaction: jqcow.Transaction, name: str) -> None:
    with common.about(path), open_alone(path, "r") as other:
        if other.size != transaction.size:
            raise common.CommandError(f"{path} has a disk of {other.size} bytes, not {transaction.size}")
        transaction.bitmaps.mark(name, other.bitmaps.dirty_extents(source))


def _print_dirty(arguments: argparse.Namespace) -> int:
    with common.opening(arguments, arguments.image), open_alone(arguments.image, "r") as image:
        found = list(image.bitmaps.dirty_extents(arguments.bitmap))
    if arguments.output == "json":
        common.print_json([{"start": extent.offset, "length": extent.length} for extent in found])
    else:
        for extent in found:
            print(f"{extent.offset:#x} {extent.length:#x}")
    return common.EXIT_OK


def _remove_broken(arguments: argparse.Namespace) -> int:
    journal_size = common.journal_size_of(arguments)
    with (
        common.about(arguments.image),
        open_alone(arguments.image, "r+", journal_size=journal_size, repair="bitmaps") as image,
    ):
        repaired = image.repaired
        kept = [printable(bitmap.name) for bitmap in image.bitmaps]
    count = 0 if repaired is None else repaired.bitmaps
    if not arguments.quiet:
        told = f"Given up: {common.plural(count, 'damaged bitmap')}." if count else "No bitmap is damaged."
        print(f"{told} Kept: {', '.join(kept) if kept else 'none'}.")
        if count:
            print("jqcow undo takes that back.")
    return common.EXIT_OK
