"""A new LUKS volume in a raw file: its header, then the disk, as ``qemu-img create -f luks`` makes it."""

from __future__ import annotations

import os
from typing import Unpack

from jqcow.device.filling import take_space
from jqcow.device.targets import new_target
from jqcow.ondisk import layout
from jqcow.ondisk.encryption import Encryption, new_luks
from jqcow.ondisk.form import FileOptions, HostUse


def create_luks(
    path: str | os.PathLike[str],
    size: int,
    encryption: Encryption,
    *,
    overwrite: bool = False,
    **options: Unpack[FileOptions],
) -> None:
    """Create a LUKS volume, durably. What nobody wrote reads as noise.

    Args:
        path: where.
        size: of the disk in bytes, a multiple of 512.
        encryption: the cipher and the passphrase.
        overwrite: replace an existing file, if nobody uses it.
        options: ``preallocation`` (not ``metadata``) and ``nocow`` alone.

    Raises:
        ValueError: another option, or a size that no disk has.
        MissingPackageError: cryptography is not installed.
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name.
    """
    size, use = layout.disk_size(size), HostUse.of(options)
    if use.preallocation == "metadata" or not set(options) <= {"preallocation", "nocow"}:
        raise ValueError("a LUKS volume has no tables, and takes preallocation and nocow alone")
    header = new_luks(encryption)
    new = new_target(path, overwrite=overwrite, nocow=use.nocow)
    try:
        new.content.truncate(header.length + size)
        take_space(new.content, 0, header.length + size, use.preallocation)
        for offset, data in header.parts:
            new.content.pwrite(data, offset)
        new.publish(overwrite)
    finally:
        new.file.close()
