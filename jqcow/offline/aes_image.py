"""A new image in QEMU's old encryption, AES without LUKS. jqcow makes it for others, and does not open it.

Nothing of the passphrase is in the file: whoever opens the image makes the key of it (qcow2 specification,
``crypt_method``).
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from typing import Unpack

from jqcow.device.targets import new_target
from jqcow.disks.making import plan_image, write_blank
from jqcow.ondisk import layout
from jqcow.ondisk.form import FileOptions
from jqcow.ondisk.header import CRYPT_AES, HeaderArea


def create_aes(
    path: str | os.PathLike[str],
    size: int,
    *,
    backing_file: str | None = None,
    backing_format: str | None = None,
    overwrite: bool = False,
    **options: Unpack[FileOptions],
) -> None:
    """Create an image that is encrypted with AES alone, durably.

    Args:
        path: where.
        size: of the disk in bytes, a multiple of 512.
        backing_file: name to be stored as it is; it is not opened.
        backing_format: of the backing file.
        overwrite: replace an existing file, if nobody uses it.
        options: what the image is to be, as `FileOptions` says; no preallocation and no data file.

    Raises:
        ValueError: a size or options that no image can have, or a name that cannot be stored.
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name.
    """
    size = layout.disk_size(size)
    form, use, blank = plan_image(size, options, backing_file=backing_file, backing_format=backing_format)
    if use.preallocation != "off" or form.data_file is not None:
        raise ValueError("an image with AES alone takes no preallocation and no data_file")
    area = HeaderArea.parse(blank.parts[0][1])
    encrypted = area.with_header(replace(area.header, crypt_method=CRYPT_AES))
    blank = replace(blank, parts=((0, encrypted.data), *blank.parts[1:]))
    new = new_target(path, overwrite=overwrite, nocow=use.nocow)
    with closing(new.file):
        write_blank(new.content, blank)
        new.publish(overwrite)
