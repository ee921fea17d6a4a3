"""Commands that make and change an image: create, resize."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import jqcow
from jqcow.cli import common, names, secrets
from jqcow.cli.common import SECTOR_BYTES, human_size
from jqcow.errors import printable

_OPTIONS = (*common.FORM_OPTIONS, *secrets.ENCRYPTION_OPTIONS, "backing_file", "backing_fmt")
_SIGNS = {"+": 1, "-": -1}


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    _add_create(commands)
    _add_resize(commands)


def _add_create(commands: Any) -> None:
    create = commands.add_parser(
        "create", help="create an image", description="Create an image. It appears whole and durable."
    )
    profile = common.profile_of(create)
    create.add_argument(
        "-f",
        dest="format",
        choices=common.formats(create),
        default=profile.new_format,
        help=f"format (default: {profile.new_format})",
    )
    common.add_options(
        create,
        f"{common.FORM_OPTIONS_HELP}, {secrets.ENCRYPTION_HELP}, backing_file=NAME, backing_fmt=FORMAT",
    )
    names.add_objects(create)
    secrets.add_passphrase(create, what="the new image, with encrypt.format=luks")
    create.add_argument(
        "--overwrite", action="store_true", default=profile.overwrites, help="replace an existing file"
    )
    create.add_argument(
        "-b", dest="backing_file", metavar="BASE", help="backing file; a relative name is relative to IMAGE"
    )
    create.add_argument(
        "-F", dest="backing_format", metavar="FORMAT", choices=common.formats(create), help="format of BASE"
    )
    create.add_argument(
        "-u", dest="unsafe", action="store_true", help="do not open BASE, which need not exist"
    )
    common.add_quiet(create)
    create.add_argument("image", metavar="IMAGE", nargs="?" if profile.is_qemu else None)
    create.add_argument(
        "size", metavar="SIZE", nargs="?", help="of the disk, rounded up to 512 bytes (default: that of BASE)"
    )
    create.set_defaults(command=create_command)


def _add_resize(commands: Any) -> None:
    resize = commands.add_parser(
        "resize",
        help="make a disk larger or smaller",
        description="Make the disk of a qcow2 image larger or smaller, as a whole or not at all. "
        "A crashed image is recovered first.",
    )
    common.add_format(resize)
    names.add_image_opts(resize)
    names.add_objects(resize)
    resize.add_argument(
        "--shrink", action="store_true", help="allow a smaller disk: what lies behind its end is lost"
    )
    common.add_preallocation(resize)
    common.add_allow_files(resize)
    secrets.add_passphrase(resize)
    common.add_journal_size(resize)
    common.add_quiet(resize)
    resize.add_argument("image", metavar="IMAGE")
    resize.add_argument("size", metavar="[+|-]SIZE", help="the new size; with a sign, the difference")
    resize.set_defaults(command=resize_command)


def create_command(arguments: argparse.Namespace) -> int:
    """Create an image."""
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu import creating

        return creating.create(arguments)
    found = _take_options(arguments)
    _check_backing_options(arguments)
    with common.about(arguments.image):
        size = _size_of_new(arguments)
        make(arguments, found, size)
    if not arguments.quiet:
        from jqcow.ondisk.form import DEFAULT_CLUSTER_BYTES

        cluster_bytes = common.file_options(found).get("cluster_size", DEFAULT_CLUSTER_BYTES)
        clusters = f" cluster_size={cluster_bytes}" if arguments.format == "qcow2" else ""
        base = ""
        if arguments.backing_file is not None:
            base = f" backing_file={arguments.backing_file} backing_fmt={arguments.backing_format}"
        told = f"Formatting '{arguments.image}', fmt={arguments.format}{clusters} size={size}{base}"
        print(printable(told))
    return common.EXIT_OK


def _take_options(arguments: argparse.Namespace) -> dict[str, str]:
    """Return what -o says of a qcow2 image; what it says of the base becomes that of -b and -F."""
    found = common.named_options(arguments.options, arguments.format, _OPTIONS)
    for option, name in (("backing_file", "backing_file"), ("backing_fmt", "backing_format")):
        if option in found:
            if getattr(arguments, name) not in (None, found[option]):
                raise common.CommandError(f"{option} of -o contradicts -{'b' if name == option else 'F'}")
            setattr(arguments, name, found[option])
    if arguments.backing_format not in (None, *common.FORMATS):
        raise common.CommandError(f"backing_fmt must be qcow2 or raw, not {arguments.backing_format}")
    return found


def _check_backing_options(arguments: argparse.Namespace) -> None:
    """Raise CommandError where -b, -F, -u and SIZE do not go together."""
    if arguments.backing_file is None:
        if arguments.backing_format is not None or arguments.unsafe:
            raise common.CommandError("-F and -u are about a backing file: name it with -b")
        if arguments.size is None:
            raise common.CommandError("a new image needs a size")
    elif arguments.format == "raw":
        raise common.CommandError("a raw file cannot have a backing file")
    elif arguments.backing_format is None:
        raise common.CommandError("a backing file needs its format: -F qcow2 or -F raw")
    elif arguments.unsafe and arguments.size is None:
        raise common.CommandError("with -u the backing file is not opened, so the size must be given")


def _size_of_new(arguments: argparse.Namespace) -> int:
    """Return the size given, or that of the base, which is opened unless -u is given."""
    found = 0
    if arguments.backing_file is not None and not arguments.unsafe:
        from jqcow.offline.overlay import base_size

        found = base_size(arguments.image, arguments.backing_file, arguments.backing_format)
    return found if arguments.size is None else common.parse_size(arguments.size)


def make(arguments: argparse.Namespace, found: Mapping[str, str], size: int) -> None:
    """Make an empty image as arguments and -o say; ``found`` is what these say of a qcow2 image."""
    from jqcow.disks.making import create_closed, create_raw

    path, overwrite = arguments.image, arguments.overwrite
    wanted = common.file_options(found)
    encryption = secrets.encryption_of(arguments, found, path)
    if arguments.format == "raw":
        preallocation, nocow = wanted.get("preallocation", "off"), wanted.get("nocow", False)
        create_raw(path, size, overwrite=overwrite, preallocation=preallocation, nocow=nocow)
    else:
        create_closed(
            path,
            size,
            **wanted,
            backing_file=arguments.backing_file,
            backing_format=arguments.backing_format,
            encryption=encryption,
            overwrite=overwrite,
        )


# resize


def resize_command(arguments: argparse.Namespace) -> int:
    """Make a disk larger or smaller."""
    if arguments.profile.is_qemu:
        from jqcow.cli.qemu import changing

        return changing.resize(arguments)
    if arguments.format == "raw":
        raise common.CommandError("a raw file is resized by truncate; jqcow resizes qcow2 images")
    text: str = arguments.size
    sign = _SIGNS.get(text[:1], 0)
    change = common.parse_size(text[1:] if sign else text, unit=1)
    journal_size = common.journal_size_of(arguments)
    name = arguments.image
    following = {
        "allow_files": arguments.allow_files,
        "probe": arguments.probe,
        "passphrase": secrets.passphrase_of(arguments),
    }
    with common.about(name), jqcow.open(name, "r+", journal_size=journal_size, **following) as image:
        if image.recovered is not None and not arguments.quiet:
            print("The image had crashed; it was recovered first.", file=sys.stderr)
        size = _new_size(image.size, change, sign)
        lost = _data_from(image, size)
        if size < image.size and not arguments.shrink:
            raise common.CommandError(f"{name}: {_warning(image.size, size, lost)}")
        image.resize(size, arguments.preallocation)
    if not arguments.quiet:
        print("Image resized.")
        if lost:
            print(f"Data behind the new end, now lost: {human_size(lost)}.")
    return common.EXIT_OK


def _new_size(size: int, change: int, sign: int) -> int:
    """Return the size in whole sectors that a disk of ``size`` bytes is to get; without a sign ``change``."""
    from jqcow.ondisk.layout import round_up

    wanted = round_up(size + sign * change if sign else change, SECTOR_BYTES)
    if wanted <= 0:
        raise common.CommandError(f"the new size of a disk of {size} bytes must be more than 0, not {wanted}")
    return wanted


def _data_from(image: jqcow.Image, offset: int) -> int:
    """Return how many bytes of data the disk has from ``offset`` on."""
    if offset >= image.size:
        return 0
    extents = image.extents(offset=offset)
    return sum(extent.length for extent in extents if extent.kind in ("data", "compressed"))


def _warning(size: int, wanted: int, lost: int) -> str:
    what = f"{human_size(lost)} of data behind the new end would be lost" if lost else "no data would be lost"
    return f"the disk has {size} bytes; shrunk to {wanted} bytes {what}. Use --shrink to do it"
