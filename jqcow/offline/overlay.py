"""Overlays: new, empty images that name a backing file and show its disk until they are written to."""

from __future__ import annotations

import os
from contextlib import closing, nullcontext
from typing import Unpack

from jqcow.device.targets import new_target
from jqcow.errors import printable
from jqcow.image.creating import create_data_file, plan_image, publish, write_blank
from jqcow.offline.info import read_info
from jqcow.ondisk import layout
from jqcow.ondisk.encryption import Encryption
from jqcow.ondisk.form import FileOptions
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.naming import DiskFormat, decode_name, named_file, resolve


def base_size(path: str | os.PathLike[str], backing_file: str, backing_format: DiskFormat) -> int:
    """Return the size of the disk that an image at ``path`` would have below it: bytes, whole sectors.

    The base is opened by the name that its overlay is to store. Nothing that the base itself names is.

    Args:
        path: where the overlay is to be, which need not exist.
        backing_file: name of the base, relative to the directory of the overlay.
        backing_format: of the base.

    Raises:
        JqcowError: a name that cannot be stored or has a protocol, or a base that is no image of this format,
            damaged or in use.
        OSError: the host failed. A note names the overlay.
    """
    overlay = os.fspath(path)
    decode_name(os.fsencode(backing_file))
    base = named_file(overlay, backing_file, backing_format).path
    try:
        facts = read_info(base, backing_format)
    except OSError as error:
        error.add_note(printable(f"{base} would be the backing file of {overlay}"))
        raise
    return layout.round_up(facts.virtual_size, SECTOR_BYTES)


def create_overlay(
    path: str | os.PathLike[str],
    size: int,
    *,
    backing_file: str | os.PathLike[str],
    backing_format: DiskFormat,
    overwrite: bool = False,
    encryption: Encryption | None = None,
    **options: Unpack[FileOptions],
) -> None:
    """Create an empty qcow2 image over a backing file, durably. The backing file is not opened.

    Args:
        path: where; an existing file is refused unless ``overwrite``.
        size: of the disk in bytes, a multiple of 512; that of the backing file may be another.
        backing_file: name to be stored as it is: relative to the directory of the new image.
        backing_format: of the backing file.
        overwrite: replace an existing file, if nobody uses it.
        encryption: how to encrypt the new image; None: not at all.
        options: what the image is to be, as `FileOptions` says.

    Raises:
        ValueError: a size that no image can have, a name that cannot be stored, or that of the image itself.
        UnsupportedFeatureError: a name with a protocol.
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name.
    """
    size = layout.disk_size(size)
    backing_file = os.fspath(backing_file)
    named_below = {"backing_file": backing_file, "backing_format": backing_format}
    form, host_use, blank = plan_image(size, options, **named_below, encryption=encryption)
    overlay = os.fspath(path)
    # By name, not by inode: a hard link keeps the base when this name of it is replaced.
    if os.path.realpath(resolve(backing_file, overlay)) == os.path.realpath(overlay):
        raise ValueError(f"{overlay} would be its own backing file")
    new = new_target(path, overwrite=overwrite, nocow=host_use.nocow)
    try:
        data = create_data_file(
            form,
            overlay,
            new,
            size,
            host_use,
            overwrite=overwrite,
            backing_path=resolve(backing_file, overlay),
        )
        with nullcontext() if data is None else closing(data.file):
            write_blank(new.content, blank, host_use.preallocation)
            publish(new, data, overwrite=overwrite)
    finally:
        new.file.close()
