"""New files: a qcow2 image laid down whole, with its data file, or a raw disk. Nothing is opened for that.

What only makes files needs nothing of the engine, and so starts sooner.
"""

from __future__ import annotations

import os
from contextlib import closing, nullcontext
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Unpack

from jqcow.device.base import Device, closed_on_error
from jqcow.device.filling import take_space, write_row
from jqcow.device.targets import Target, give_up_before, new_target, publish_both
from jqcow.ondisk import layout, naming
from jqcow.ondisk.blank import BlankImage, blank_image
from jqcow.ondisk.form import FileOptions, Form, HostUse, Preallocation
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.naming import OTHER_PROTOCOLS, protocol_of

if TYPE_CHECKING:
    from jqcow.ondisk.encryption import Encryption

RAW_UNIT_BYTES = 4096
"""The steps in which a raw file is written."""
NO_RAW_METADATA = "a raw file has no metadata to preallocate: its preallocation is off, falloc or full"


def create_closed(
    path: str | os.PathLike[str],
    size: int,
    *,
    backing_file: str | None = None,
    backing_format: str | None = None,
    foreign: bool = False,
    overwrite: bool = False,
    is_short: bool = False,
    encryption: Encryption | None = None,
    **options: Unpack[FileOptions],
) -> None:
    """Create an empty qcow2 image, durably, without opening it. A backing file is not opened either.

    Args:
        path: where; an existing file is refused unless ``overwrite``.
        size: of the disk in bytes, a multiple of 512.
        backing_file: name to be stored as it is: relative to the directory of the new image.
        backing_format: of the backing file; needed with it.
        foreign: the backing file may be one that other programs know, as `name_backing_file` says.
        overwrite: replace an existing file, if nobody uses it.
        is_short: the file ends with its last table, as QEMU's does, not with that table's cluster.
        encryption: how to encrypt the new image; None: not at all.
        options: what the image is to be, as `FileOptions` says.

    Raises:
        ValueError: a size or options that no image can have, or a name that cannot be stored.
        UnsupportedFeatureError: a name with a protocol.
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name, and on a block device no image.
    """
    size, image = layout.disk_size(size), os.fspath(path)
    form, host_use, blank = plan_image(
        size, options, backing_file, backing_format, foreign=foreign, encryption=encryption
    )
    if is_short:
        blank = replace(blank, length=blank.shortest)
    backing_path = None
    if backing_file is not None and not (foreign and protocol_of(backing_file) in OTHER_PROTOCOLS):
        backing_path = naming.resolve(backing_file, image)
    # By name, not by inode: a hard link keeps the base when this name of it is replaced.
    if backing_path is not None and os.path.realpath(backing_path) == os.path.realpath(image):
        raise ValueError(f"{image} would be its own backing file")
    new = new_target(path, overwrite=overwrite, nocow=host_use.nocow)
    with closing(new.file):
        data = create_data_file(
            form, image, new, size, host_use, overwrite=overwrite, backing_path=backing_path
        )
        with nullcontext() if data is None else closing(data.file):
            write_blank(new.content, blank, host_use.preallocation)
            publish(new, data, overwrite=overwrite)


def plan_image(
    size: int,
    options: FileOptions,
    backing_file: str | None = None,
    backing_format: str | None = None,
    *,
    foreign: bool = False,
    encryption: Encryption | None = None,
) -> tuple[Form, HostUse, BlankImage]:
    """Return what a new image is to be, and its bytes.

    Raises:
        ValueError, TypeError: options that no image can have, or a name that cannot be stored.
    """
    form, host_use = Form.of(options), HostUse.of(options)
    luks = None
    if encryption is not None:
        from jqcow.ondisk.encryption import new_luks

        luks = new_luks(encryption)
    blank = blank_image(
        size,
        form,
        backing_file=backing_file,
        backing_format=backing_format,
        foreign=foreign,
        preallocated=host_use.preallocation != "off",
        luks=luks,
    )
    return form, host_use, blank


def create_data_file(
    form: Form,
    image: str,
    above: Target,
    size: int,
    host_use: HostUse,
    *,
    overwrite: bool,
    backing_path: str | None = None,
) -> Target | None:
    """Make the data file of a new image, of zeros, without its name yet; None where it is to have none.

    Args:
        form: of the image, which names it.
        image: path of the image.
        above: the image, which is being made.
        size: of the disk.
        host_use: of both.
        overwrite: replace what is there.
        backing_path: of the image's backing file.

    Raises:
        ValueError: it would be the image itself, or its backing file.
        UnsupportedFeatureError: a name with a protocol that is no plain file.
        FileExistsError: a block device, and ``overwrite`` is False.
        OSError: the host failed.
    """
    if form.data_file is None:
        return None
    path = naming.meaning_of(form.data_file, "").path
    if os.path.realpath(path) == os.path.realpath(image):
        raise ValueError(f"{image} would be its own data file")
    if backing_path is not None and os.path.realpath(path) == os.path.realpath(backing_path):
        raise ValueError(f"{path} would be the data file of {image} and its backing file")
    new = new_target(path, overwrite=overwrite, nocow=host_use.nocow)
    give_up_before(above, new)
    with closed_on_error(new.file):
        new.content.truncate(size)
        take_space(new.content, 0, size, host_use.preallocation)
    return new


def publish(new: Target, data_file: Target | None, *, overwrite: bool) -> None:
    """Give a new image its name, with its data file, if it has one; errors as `publish_both`."""
    if data_file is None:
        new.publish(overwrite)
    else:
        publish_both(new, data_file, overwrite=overwrite)


def write_blank(device: Device, blank: BlankImage, preallocation: Preallocation = "off") -> None:
    """Write a new image to an empty device; durable after the caller's barrier.

    Nobody opens the device before that, so nothing has to be in order, and the tables of a preallocated disk
    are written as they are made.
    """
    device.truncate(blank.length)
    disk = blank.disk
    if disk is not None:
        # First: it is what a full host refuses.
        tables_end = min(disk.row.host, blank.length)
        take_space(device, 0, tables_end, "off" if preallocation in ("off", "metadata") else "falloc")
        take_space(device, tables_end, blank.length - tables_end, preallocation)
        write_row(device, disk.tables, disk.row.l2_tables())
        write_row(device, disk.blocks, disk.refcount_blocks())
    for offset, data in blank.parts:
        device.pwrite(data, offset)


def create_raw(
    path: str | os.PathLike[str],
    size: int,
    *,
    overwrite: bool = False,
    preallocation: Preallocation = "off",
    nocow: bool = False,
    writes_first_block: bool = False,
) -> None:
    """Create a raw file of zeros, durably: a hole, unless ``preallocation`` is ``falloc`` or ``full``.

    ``writes_first_block``: as QEMU does, which tells by it later how direct I/O has to be aligned.

    Raises:
        ValueError: another preallocation.
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name.
    """
    size = index(size)
    use = HostUse.of(FileOptions(preallocation=preallocation, nocow=nocow))
    if use.preallocation == "metadata":
        raise ValueError(NO_RAW_METADATA)
    new = new_target(path, overwrite=overwrite, nocow=use.nocow)
    with closing(new.file):
        new.content.truncate(size)
        take_space(new.content, 0, size, use.preallocation)
        if writes_first_block and size and use.preallocation == "off":
            new.content.pwrite(bytes(RAW_UNIT_BYTES if size >= RAW_UNIT_BYTES else SECTOR_BYTES), 0)
        new.publish(overwrite)
