"""Overlays: new, empty images that name a backing file and show its disk until they are written to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Unpack

from jqcow.disks.making import create_closed
from jqcow.errors import printable
from jqcow.ondisk import layout
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.naming import DiskFormat, decode_name, named_file

if TYPE_CHECKING:
    from jqcow.ondisk.encryption import Encryption
    from jqcow.ondisk.form import FileOptions


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
    from jqcow.offline.info import read_info

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

    Arguments and errors are those of `create_closed`; the size of the backing file's disk may be another.
    """
    create_closed(
        path,
        size,
        backing_file=os.fspath(backing_file),
        backing_format=backing_format,
        overwrite=overwrite,
        encryption=encryption,
        **options,
    )
