"""``convert`` as in qemu-img: its checks in its order and words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from jqcow.cli import common, copying, secrets
from jqcow.cli.common import CommandError
from jqcow.cli.progress import Allocated
from jqcow.cli.qemu import creating
from jqcow.cli.qemu import options as options_of
from jqcow.cli.qemu.numbers import size_of
from jqcow.cli.qemu.options import is_on
from jqcow.cli.qemu.wording import reason, reworded
from jqcow.errors import JqcowError, SnapshotNotFound

if TYPE_CHECKING:
    from jqcow.device.disk import Extent
    from jqcow.disks.chain import Chain

_SPARSE_MAX = 1 << 63


def convert(arguments: argparse.Namespace) -> int:
    """Convert disks."""
    text = options_of.accumulated(arguments.options)
    _check_options(arguments, text)
    if options_of.asks_for_help(text):
        return creating.print_help(arguments.target if arguments.sources else None, _format(arguments))
    if not arguments.sources:
        raise CommandError("Must specify image file name")
    with ExitStack() as stack:
        chains = _open_sources(arguments, stack)
        found = {} if arguments.into else _new_target(arguments, text, sum(chain.size for chain in chains))
        _check_target(arguments, found, len(chains))
        if arguments.bitmaps:
            _check_bitmaps(arguments, chains)
        if arguments.progress is not None:
            arguments.allocated = Allocated(_extents(chains))
        if not arguments.into and _is_whole(arguments, found):
            stack.close()
            _convert_one(arguments, found)
            return common.EXIT_OK
        if not arguments.into:
            with reworded(f"{arguments.target}: error while converting {_format(arguments)}: "):
                creating.write(arguments, arguments.target, _format(arguments), found)
        _copy(arguments, chains, found)
    return common.EXIT_OK


def _format(arguments: argparse.Namespace) -> str:
    return arguments.target_format or "raw"


def _check_options(arguments: argparse.Namespace, text: str) -> None:
    if arguments.sparse is not None:
        size_of("buffer size for sparse output", arguments.sparse)
    if arguments.skip_broken_bitmaps and not arguments.bitmaps:
        raise CommandError("Use of --skip-broken-bitmaps requires --bitmaps")
    if arguments.offload:
        if arguments.compressed:
            raise CommandError("Cannot enable copy offloading when -c is used")
        if arguments.sparse is not None:
            raise CommandError("Cannot enable copy offloading when -S is used")
        if arguments.salvage:
            raise CommandError("Cannot use copy offloading in salvaging mode")
    if not arguments.into:
        if arguments.target_image_opts:
            raise CommandError("--target-image-opts requires use of -n flag")
        if arguments.target_is_zero:
            raise CommandError("--target-is-zero requires use of -n flag")
    elif text:
        raise CommandError("-o has no effect when skipping image creation")


def _open_sources(arguments: argparse.Namespace, stack: ExitStack) -> list[Chain]:
    if arguments.snapshot is not None and len(arguments.sources) > 1:
        raise CommandError("No support for concatenating multiple snapshot")
    try:
        return copying.open_sources(arguments, stack)
    except CommandError as error:
        if isinstance(error.__cause__, SnapshotNotFound):
            raise CommandError("Failed to load snapshot: Can't find snapshot") from error
        raise


def _extents(chains: list[Chain]) -> Iterator[Extent]:
    """Yield what all sources hold, one behind the other."""
    start = 0
    for chain in chains:
        for extent in chain.extents(chain.size, 0):
            yield replace(extent, offset=start + extent.offset)
        start += chain.size


def _new_target(arguments: argparse.Namespace, text: str, size: int) -> dict[str, str]:
    image_format = _format(arguments)
    options_of.require_format(image_format)
    if image_format not in common.FORMATS:
        raise CommandError(f"jqcow does not write disks in the format '{image_format}'")
    found = options_of.parsed(text, options_of.of_new(image_format))
    if creating.is_aes(found):
        raise CommandError("jqcow does not write disks with AES alone: use encrypt.format=luks")
    found["size"] = str(size)
    creating.take_backing(arguments, image_format, found)
    return found


def _check_target(arguments: argparse.Namespace, found: dict[str, str], count: int) -> None:
    base = found.get("backing_file", arguments.backing_file)
    if arguments.target_is_zero and base is not None:
        raise CommandError("Cannot use --target-is-zero when the destination image has a backing file")
    if count > 1 and base is not None:
        raise CommandError(
            "Having a backing file for the target makes no sense when concatenating multiple input images"
        )
    if "backing_file" in found and "backing_fmt" not in found:
        raise CommandError("Use of backing file requires explicit backing format")
    arguments.backing_file = base
    if not arguments.compressed:
        return
    if not arguments.target_image_opts and _format(arguments) != "qcow2":
        raise CommandError("Compression not supported for this file format")
    if is_on(found.get("encryption")) or "encrypt.format" in found:
        raise CommandError("Compression and encryption not supported at the same time")
    if found.get("preallocation", "off") != "off":
        raise CommandError("Compression and preallocation not supported at the same time")


def _check_bitmaps(arguments: argparse.Namespace, chains: list[Chain]) -> None:
    from jqcow.disks.image import ImageDisk
    from jqcow.offline.bitmaps import choose

    if len(chains) > 1:
        raise CommandError("Copying bitmaps only possible with single source")
    if _format(arguments) != "qcow2":
        raise CommandError(f"Format driver '{_format(arguments)}' does not support bitmaps")
    top = chains[0].layers[0]
    if not isinstance(top, ImageDisk):
        raise CommandError("Source lacks bitmap support")
    in_use = [entry.text for entry in top.bitmaps.directory.entries if entry.is_in_use]
    if in_use and not arguments.skip_broken_bitmaps:
        # It looks at the last one first.
        told = f"Cannot copy inconsistent bitmap '{in_use[-1]}'"
        hint = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
        raise CommandError(f"{told}\n{hint}")
    with reworded(""):
        choose(top, "sound" if arguments.skip_broken_bitmaps else "all")


def _is_whole(arguments: argparse.Namespace, found: dict[str, str]) -> bool:
    """Tell whether the target can be made whole before it gets its name."""
    return (
        len(arguments.sources) == 1
        and "backing_file" not in found
        and copying.sparse_bytes(arguments) > 0
        and int(found["size"]) > 0
    )


def _convert_one(arguments: argparse.Namespace, found: dict[str, str]) -> None:
    image_format = _format(arguments)
    creating.check_values(image_format, found)
    if image_format == "qcow2":
        with reworded(f"{arguments.target}: error while converting {image_format}: "):
            creating.check_form(int(found["size"]), found)
    arguments.options = [
        f"{name}={value.replace(',', ',,')}"
        for name, value in found.items()
        if name in (*common.FORM_OPTIONS, *secrets.ENCRYPTION_OPTIONS)
    ]
    report = copying.convert_one(arguments)
    for lost in report.lost:
        print(f"qemu-img: warning: error while reading offset {lost.offset}: {lost.reason}", file=sys.stderr)
    for name in reversed(report.skipped_bitmaps):
        print(f"qemu-img: warning: Skipping inconsistent bitmap '{name}'", file=sys.stderr)


def _copy(arguments: argparse.Namespace, chains: list[Chain], found: dict[str, str]) -> None:
    if "encrypt.key-secret" in found:
        arguments.secret = found["encrypt.key-secret"]
    try:
        copying.copy_chains(arguments, chains, is_zero=not arguments.into or arguments.target_is_zero)
    except (JqcowError, OSError, ValueError) as error:
        told = reason(error)
        # All sources are open by now: it is that of the target.
        is_below = told.startswith("Could not open backing file: ")
        raise CommandError(f"Could not open '{arguments.target}': {told}" if is_below else told) from error
