"""Where new content goes: into a new file, or onto a block device, which has no second place for it.

What a device of fixed size held goes with the first write. Until the new content is whole and durable, the
device holds nothing that anybody takes for an image:

V1. Before anything else is written sector 0 is zeros, durably, and so is a root copy that could stand in.
V2. Sector 0 is written last, by one write, when all that lies behind it is durable.
V3. All of the new content is written, also what is zeros: the device shows old bytes elsewhere.

An image and its data file are replaced by two steps, and no crash may leave a part of each:

V4. Before the data file is replaced, or written over, nobody finds the old image under its name, durably; the
    new one gets the name when the new data file is durable under its own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Protocol

from jqcow.device.base import Device, ReadBuffer, filled_bytes, has_fixed_size, no_space, write_zeros
from jqcow.device.file import FileDevice, give_up_old, is_new, keep_old, path_of, remove_file
from jqcow.ondisk import root as roots
from jqcow.ondisk.layout import SECTOR_BYTES


class NewContent:
    """The content of a device of fixed size, to be written anew: a device itself, which starts empty.

    It grows within the device below, and shows zeros where nothing was written. `publish` ends it.
    """

    read_only = False

    def __init__(self, below: Device) -> None:
        """Nothing is given up before the first write."""
        self.below = below
        self.before: Callable[[], None] = lambda: None
        """What has to be done before the old content goes."""
        self.is_untouched = True
        """True while the device holds what it held."""
        self._sector = bytearray(SECTOR_BYTES)
        """Sector 0, which is held back."""
        self._filled_bytes = SECTOR_BYTES
        """All below this was written, but for sector 0."""
        self._size = 0
        self._is_begun = False

    def begin(self) -> None:
        """Give up what the device holds, once, before anything else is written."""
        if self._is_begun:
            return
        self.before()
        self.is_untouched = False
        self.below.pwrite(bytes(min(SECTOR_BYTES, self.below.size())), 0)
        if roots.unpack_root_copy(self.below.pread(roots.ROOT_COPY_BYTES, roots.ROOT_COPY_OFFSET)):
            self.below.pwrite(bytes(roots.ROOT_COPY_BYTES), roots.ROOT_COPY_OFFSET)
        # Durable now: the old content is none (V1). What follows goes over it.
        self.below.barrier("anew.begin")
        self._is_begun = True

    def size(self) -> int:
        """Return the length of the new content."""
        return self._size

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes of the new content."""
        return filled_bytes(self, length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what was not written is zeros."""
        end = offset + len(buffer)
        held, written = min(end, SECTOR_BYTES), min(end, self._filled_bytes)
        if offset < held:
            buffer[: held - offset] = self._sector[offset:held]
        start = max(offset, SECTOR_BYTES)
        if start < written:
            self.below.pread_into(buffer[start - offset : written - offset], start)
        start = max(offset, self._filled_bytes)
        if start < end:
            buffer[start - offset :] = bytes(end - start)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write ``buffer``; what of it belongs to sector 0 is held back."""
        data = memoryview(buffer).cast("B")
        end = offset + len(data)
        self._reach(end)
        if offset < SECTOR_BYTES:
            held = min(end, SECTOR_BYTES) - offset
            self._sector[offset : offset + held] = data[:held]
            data, offset = data[held:], offset + held
        if data:
            self.begin()
            self._fill(offset)
            self.below.pwrite(data, offset)
            self._filled_bytes = max(self._filled_bytes, end)

    def _fill(self, end: int) -> None:
        """Write zeros up to an offset where nothing was written yet (V3)."""
        start = self._filled_bytes
        if start < end:
            self.begin()
            write_zeros(self.below, start, end - start)
            self._filled_bytes = end

    def _reach(self, end: int) -> None:
        if end > self.below.size():
            error = no_space("the new content", end, None, self.below.size())
            error.filename = path_of(self.below) or None
            raise error
        self._size = max(self._size, end)

    def barrier(self, name: str) -> None:
        """Nothing is durable before `publish`."""

    def truncate(self, size_bytes: int) -> None:
        """Let the content reach to an offset, where there is room."""
        self._reach(size_bytes)

    def allocate(self, offset: int, length: int) -> None:
        """Let the content reach to the end of a range, where there is room."""
        self._reach(offset + length)

    def punch(self, offset: int, length: int) -> bool:
        """Return False: nothing is given back."""
        return False

    def publish(self) -> None:
        """Make the new content whole and durable.

        Raises:
            OSError: the host failed; the device holds no image.
        """
        self.begin()
        self._fill(self._size)
        # Durable now: all but sector 0, which makes an image of it (V2).
        self.below.barrier("anew.content")
        self.below.pwrite(memoryview(self._sector)[: self._size], 0)
        # Durable now: the new content, for who is told that it is there.
        self.below.barrier("anew.end")

    def close(self) -> None:
        """The device below stays open."""


class Target(Protocol):
    """What is made anew. ``content`` is to be written, and ``file`` is the open file of it."""

    content: Device
    file: FileDevice

    @property
    def is_untouched(self) -> bool:
        """True while what is to be replaced is as it was."""
        ...

    def give_up_old(self) -> None:
        """Have nobody find what is replaced, durably.

        Raises:
            ImageInUse: another process uses it.
        """
        ...

    def keep_old(self) -> None:
        """After an error: have what was given up found again, where it is still there."""
        ...

    def publish(self, overwrite: bool) -> None:
        """Make all of it durable and give it its name; as `FileDevice.publish`."""
        ...

    def withdraw(self) -> None:
        """Take back the name that `publish` gave, if it gave one."""
        ...


class _NewFile:
    """A file that gets its name when it is whole."""

    def __init__(self, path: str | os.PathLike[str], *, nocow: bool) -> None:
        self.file = FileDevice.create_temporary(path, nocow=nocow)
        self.content: Device = self.file

    @property
    def is_untouched(self) -> bool:
        return is_new(self.file)

    def give_up_old(self) -> None:
        give_up_old(self.file)

    def keep_old(self) -> None:
        keep_old(self.file)

    def publish(self, overwrite: bool) -> None:
        self.file.publish(overwrite)

    def withdraw(self) -> None:
        remove_file(self.file)


class _OverDevice:
    """A block device whose content is replaced."""

    def __init__(self, file: FileDevice) -> None:
        self.file = file
        new = NewContent(file)
        self.content: Device = new
        self._new = new

    @property
    def is_untouched(self) -> bool:
        return self._new.is_untouched

    def give_up_old(self) -> None:
        self._new.begin()

    def keep_old(self) -> None:
        """It is gone."""

    def publish(self, overwrite: bool) -> None:
        self._new.publish()

    def withdraw(self) -> None:
        """A device keeps its name; what it held is gone."""


def give_up_before(image: Target, data_file: Target) -> None:
    """Have a new image's predecessor given up before the first byte of its data file's is (V4)."""
    if isinstance(data_file.content, NewContent):
        data_file.content.before = image.give_up_old


def publish_both(image: Target, data_file: Target, *, overwrite: bool) -> None:
    """Give a data file its name, and then its image (V4).

    Raises:
        FileExistsError, ImageInUse, OSError: as `Target.publish`. What they would have replaced is as it was,
            or neither name leads to anything.
    """
    if overwrite:
        image.give_up_old()
    try:
        data_file.publish(overwrite)
    except BaseException:
        if data_file.is_untouched:
            image.keep_old()
        raise
    try:
        image.publish(overwrite)
    except BaseException:
        try:
            image.withdraw()
        finally:
            data_file.withdraw()
        raise


def new_target(path: str | os.PathLike[str], *, overwrite: bool, nocow: bool = False) -> Target:
    """Return an empty target, locked; the caller closes its file.

    An existing block device is never replaced: its content is, in place, from the first write on.

    Args:
        path: the name that it has, or will have.
        overwrite: allows a block device of this name to be written over. Of files `Target.publish` asks.
        nocow: have the file system write a new file in place.

    Raises:
        FileExistsError: a block device, and ``overwrite`` is False.
        ImageInUse: the block device is in use.
    """
    try:
        is_device = stat.S_ISBLK(os.stat(path).st_mode)
    except FileNotFoundError:
        is_device = False
    if not is_device:
        return _NewFile(path, nocow=nocow)
    if not overwrite:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))
    file = FileDevice.open(path, writable=True)
    try:
        if not has_fixed_size(file):
            raise FileExistsError(errno.EEXIST, "a file took the place of the device", os.fspath(path))
        return _OverDevice(file)
    except BaseException:
        file.close()
        raise
