"""Creating images: by path, with their backing and data files, or on a device of the caller's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Unpack

from jqcow.device.base import Device, check_device, closed_on_error, has_fixed_size
from jqcow.device.filling import take_space
from jqcow.device.targets import NewContent, new_target
from jqcow.disks.chain import open_below
from jqcow.disks.making import create_data_file, plan_image, publish, write_blank
from jqcow.disks.policy import FilePolicy, Following, allowing_what_it_names
from jqcow.engine.engine import random_salt
from jqcow.image.arguments import optional_path
from jqcow.image.below import Below, FindBelow
from jqcow.image.image import Image
from jqcow.image.opening import open_blank, open_device
from jqcow.ondisk import layout, naming
from jqcow.ondisk import root as roots
from jqcow.ondisk.encryption import Encryption
from jqcow.ondisk.form import FileOptions, Preallocation
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.keys import Passphrase, hidden
from jqcow.ondisk.naming import DiskFormat


def create(
    path: str | os.PathLike[str],
    size: int,
    *,
    backing_file: str | os.PathLike[str] | None = None,
    backing_format: DiskFormat | None = None,
    allow_files: FilePolicy = False,
    overwrite: bool = False,
    journal_size: int = roots.DEFAULT_JOURNAL_BYTES,
    encryption: Encryption | None = None,
    passphrase: Passphrase | None = None,
    **options: Unpack[FileOptions],
) -> Image:
    """Create an image and return it open for reading and writing.

    The file appears under its name at once and whole; it and its directory are durable on return. A block
    device is written in place: until the new image is whole it holds none (`jqcow.device.targets`).

    Args:
        path: where; an existing file is refused unless ``overwrite``.
        size: of the disk in bytes, a multiple of 512.
        backing_file: the file whose disk shows where nothing was written. The name is stored as it is, and is
            relative to the directory of the image.
        backing_format: of the backing file; needed with it.
        allow_files: whether the files may be opened that the backing file names, as in `open`.
        overwrite: replace an existing file, if nobody uses it.
        journal_size: in bytes, of the journal that writing will use; a multiple of 8192 from 64 KiB to 1 GiB.
        encryption: how to encrypt the image; None: not at all.
        passphrase: of encrypted backing files, as in `open`.
        options: what the image is to be, as `FileOptions` says.

    Raises:
        ValueError: a size or options that no image can have, or a name that cannot be stored.
        FileAccessDenied: the backing file names another one.
        JqcowError: the backing file cannot be read.
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name, and on a block device no image.
    """
    passphrase = hidden(passphrase)
    journal_size, size = roots.journal_length(journal_size), layout.disk_size(size)
    below = optional_path(backing_file)
    form, host_use, blank = plan_image(size, options, below, backing_format, encryption=encryption)
    target = os.fspath(path)
    new = new_target(path, overwrite=overwrite, nocow=host_use.nocow)
    with closed_on_error(new.file) as device:
        named = naming.backing_file_of(HeaderArea.parse(blank.parts[0][1]), target)
        # First: an image whose backing file cannot be read is of no use.
        following = Following(allowing_what_it_names(target, allow_files), passphrase=passphrase)
        chain = None if named is None else open_below(named, [device.identity()], following)
        with closed_on_error(chain):
            backing_path = None if named is None else named.path
            data = create_data_file(
                form, target, new, size, host_use, overwrite=overwrite, backing_path=backing_path
            )
            with closed_on_error(None if data is None else data.file) as data_file:
                write_blank(new.content, blank, host_use.preallocation)
                publish(new, data, overwrite=overwrite)
                key = None if encryption is None else encryption.passphrase
                return open_blank(device, data_file, chain, journal_size=journal_size, passphrase=key)


def create_on_device(
    device: Device,
    size: int,
    *,
    backing_file: str | os.PathLike[str] | None = None,
    backing_format: DiskFormat | None = None,
    backing: Below | FindBelow | None = None,
    journal_size: int = roots.DEFAULT_JOURNAL_BYTES,
    new_salt: Callable[[], bytes] = random_salt,
    encryption: Encryption | None = None,
    data_device: Device | None = None,
    **options: Unpack[FileOptions],
) -> Image:
    """Create an image on an empty device of your own, durably, and return it open; see `create`.

    ``backing`` is what `open_device` takes, for the name ``backing_file``; it is opened when the image is
    there. ``data_device`` is an empty one for the external data file that ``data_file`` of the options names.
    """
    check_device(device)
    journal_size, size = roots.journal_length(journal_size), layout.disk_size(size)
    below = optional_path(backing_file)
    form, host_use, blank = plan_image(size, options, below, backing_format, encryption=encryption)
    preallocation = host_use.preallocation
    if (data_device is None) != (form.data_file is None):
        raise ValueError("an external data file has a name, data_file, and a device, data_device")
    content = NewContent(device) if has_fixed_size(device) else device
    if data_device is not None:
        if isinstance(content, NewContent):
            # An older image must not be found over the new data (V4).
            content.begin()
        _make_zeros(data_device, size, preallocation)
    write_blank(content, blank, preallocation)
    if isinstance(content, NewContent):
        content.publish()
    passphrase = None if encryption is None else encryption.passphrase
    # The opening makes it durable (M7).
    return open_device(
        device,
        "r+",
        journal_size=journal_size,
        new_salt=new_salt,
        passphrase=passphrase,
        backing=backing,
        data_file=data_device,
    )


def _make_zeros(device: Device, size: int, preallocation: Preallocation) -> None:
    """Make a disk of zeros on a data file's device."""
    content = NewContent(device) if has_fixed_size(device) else device
    content.truncate(size)
    take_space(content, 0, size, preallocation)
    if isinstance(content, NewContent):
        content.publish()
