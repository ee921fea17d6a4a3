"""The device of every day: a regular file on Linux. `jqcow.device.block` has block devices.

Reads and writes are plain ``pread`` and ``pwrite``. Only ``barrier`` and ``publish`` sync. The file's
locks (:mod:`jqcow.device.locks`) are taken before the first byte is read, and last until ``close``.

A new file starts without a name, or under a temporary one, in its final directory, and gets its final name at
once and whole by ``publish`` (:mod:`jqcow.device.names`). So no reader ever finds half an image under it.

K1. What is opened for the sake of a name in an image is the file that whoever allowed it was told of, all
    links resolved.

Threads may read and write at the same time. ``truncate`` must not run beside other changes, nor
``allocate`` beside a write into the range that it allocates.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from jqcow.device import libc, locks, names
from jqcow.device.base import Device, ReadBuffer, has_fixed_size
from jqcow.device.names import NewFile
from jqcow.errors import ImageInUse, ReadOnlyError, UnsupportedFeatureError

_CALL_MISSING = (errno.EOPNOTSUPP, errno.ENOSYS)
_FILE_KINDS = {
    stat.S_IFCHR: "a character device",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


class FileDevice:
    """A :class:`jqcow.device.base.Device` on a regular file."""

    kinds: ClassVar[dict[int, type[FileDevice]]] = {}
    """What files are opened as, by the kind that ``stat`` tells; others are refused by name."""

    protocols: ClassVar[dict[str, Callable[[str], FileDevice]]] = {}
    """What opens, to be read, names that are no paths, by what stands before their ``://``."""

    is_on_host: ClassVar[bool] = True
    """A file of this machine, which has a path."""
    _descriptor = -1

    def __init__(
        self,
        descriptor: int,
        path: str,
        *,
        writable: bool,
        new: NewFile | None = None,
    ) -> None:
        """Take over an open descriptor; :meth:`open` and :meth:`create_temporary` are the ways in.

        ``new`` is the file if it does not have its final name yet.
        """
        self._descriptor = descriptor
        self._path = path
        self._writable = writable
        self._new = new
        self._owner_pid = os.getpid()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        writable: bool,
        share_writers: bool = False,
        real_path: str | None = None,
    ) -> FileDevice:
        """Open an existing file or block device, and lock it.

        Args:
            path: the file; symbolic links are followed.
            writable: False makes every changing method raise ReadOnlyError.
            share_writers: read beside a writer. What is read may be inconsistent.
            real_path: the path, all links resolved, of the file that is meant; None: any.

        Raises:
            ImageInUse: another process holds locks that exclude this use, another file is in its place, or a
                block device is mounted.
            UnsupportedFeatureError: another kind of file, no locks on this file system, or not Linux.
        """
        _require_linux()
        if writable and share_writers:
            raise ValueError("a writer cannot share the file with other writers")
        name = os.fsdecode(path)
        opener = cls.protocols.get(name.partition("://")[0])
        if opener is not None and "://" in name:
            if writable:
                raise UnsupportedFeatureError("writing to what is no file", name)
            return opener(name)
        for _ in range(names.ATTEMPTS):
            descriptor, kind = open_kind(name, writable=writable)
            try:
                if real_path is not None and _real_path_of(descriptor, name) != real_path:
                    raise ImageInUse(f"{name} leads elsewhere than to {real_path}, as it did before")
                if writable:
                    locks.lock_for_writing(descriptor, name)
                else:
                    locks.lock_for_reading(descriptor, name, share_writers=share_writers)
                # Between the open and the lock a new file may have been published under this name.
                if os.path.samestat(os.fstat(descriptor), os.stat(name)):
                    return cls.kinds[kind](descriptor, name, writable=writable)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        raise ImageInUse(f"{name} is in use: another process keeps replacing it")

    @classmethod
    def create_temporary(
        cls, path: str | os.PathLike[str], *, follow_links: bool = True, nocow: bool = False
    ) -> FileDevice:
        """Create an empty, locked file that :meth:`publish` will name ``path``.

        Until then it has no name where the file system can do that, else a temporary one in the same
        directory. ``close`` removes it if it was never published. A symbolic link of that name stays, and
        what it points to is replaced, unless ``follow_links`` is False. ``nocow`` has the file system
        write the file in place, if it knows how to do otherwise.

        Raises:
            UnsupportedFeatureError: no locks on this file system, or not Linux.
        """
        _require_linux()
        name = os.fsdecode(path)
        new = NewFile.create(os.path.realpath(name) if follow_links else os.path.abspath(name))
        try:
            locks.lock_for_writing(new.descriptor, new.name)
            if nocow:
                libc.write_in_place(new.descriptor)
        except BaseException:
            os.close(new.descriptor)
            new.remove()
            raise
        return cls(new.descriptor, new.name, writable=True, new=new)

    def publish(self, overwrite: bool) -> None:
        """Make the file durable, then give it its final name, durably: see :meth:`NewFile.publish`.

        Raises:
            FileExistsError: the name is taken and ``overwrite`` is False.
            ImageInUse: another process uses the file to be replaced.
        """
        self._require_writable()
        if self._new is None:
            raise ValueError(f"{self._path} is already published")
        with self._naming_errors():
            self._new.publish(overwrite, lambda name: _open_regular(name, writable=True))
        self._path, self._new = self._new.target, None
        names.sync_directory(os.path.dirname(self._path))

    @property
    def path(self) -> str:
        """The name of the file; until it is published the temporary one, or the final one if it has none."""
        return self._path

    @property
    def read_only(self) -> bool:
        """True when every changing method raises."""
        return not self._writable

    def size(self) -> int:
        """Return the length of the file in bytes."""
        with self._naming_errors():
            return os.fstat(self._descriptor).st_size

    def pread(self, length: int, offset: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``; what lies past the end reads as zeros."""
        try:
            data = os.pread(self._descriptor, length, offset)
        except OSError as error:
            self._name(error)
            raise
        if len(data) == length:
            return data
        buffer = bytearray(length)
        buffer[: len(data)] = data
        if data:
            self.pread_into(memoryview(buffer)[len(data) :], offset + len(data))
        return bytes(buffer)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; what lies past the end reads as zeros."""
        rest = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
        try:
            while rest:
                count = os.preadv(self._descriptor, [rest], offset)
                if not count:
                    rest[:] = bytes(len(rest))
                    return
                rest = rest[count:]
                offset += count
        except OSError as error:
            self._name(error)
            raise

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole of ``buffer`` at ``offset``, growing the file where needed, or raise."""
        self._require_writable()
        try:
            count = os.pwrite(self._descriptor, buffer, offset)
            rest = memoryview(buffer).cast("B")[count:]
            while rest:
                if not count:
                    raise OSError(errno.EIO, "the kernel wrote nothing")
                offset += count
                count = os.pwrite(self._descriptor, rest, offset)
                rest = rest[count:]
        except OSError as error:
            self._name(error)
            raise

    def barrier(self, name: str) -> None:
        """Make everything changed before this call durable; ``name`` names the call site."""
        self._require_writable()
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            # Not by a call: an exception that came within it would take the place of this error.
            error.filename = self._path
            raise

    def forget_cached(self) -> None:
        """Drop the file from the page cache, so that reads show what the disk has.

        After a failed barrier the kernel takes pages for clean that the disk does not have. Pages that are
        dirty, or mapped into some program's memory, stay.
        """
        with self._naming_errors():
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def truncate(self, size_bytes: int) -> None:
        """Set the length. Growth reads as zeros; shrinking discards what lay past the new end."""
        self._require_writable()
        with self._naming_errors():
            os.ftruncate(self._descriptor, size_bytes)

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space for a range, growing the file to its end; existing bytes stay.

        Where the file system cannot promise space this only grows the file.
        """
        self._require_writable()
        with self._naming_errors():
            if _fallocate(self._descriptor, 0, offset, length):
                return
            end = offset + length
            if os.fstat(self._descriptor).st_size < end:
                # Not ftruncate: it could cut what another thread has written past ``end`` meanwhile.
                os.pwrite(self._descriptor, b"\0", end - 1)

    def punch(self, offset: int, length: int) -> bool:
        """Give a range back to the host; it then reads as zeros. The size does not change.

        Returns False, having changed nothing, where the file system cannot punch holes.
        """
        self._require_writable()
        with self._naming_errors():
            return _fallocate(
                self._descriptor, libc.FALLOC_PUNCH_HOLE | libc.FALLOC_KEEP_SIZE, offset, length
            )

    def free_bytes(self) -> int | None:
        """Return how many bytes the file system has left for this user; a quota may allow less."""
        with self._naming_errors():
            state = os.fstatvfs(self._descriptor)
        return state.f_bavail * state.f_frsize

    def identity(self) -> tuple[int, int]:
        """Return what tells the file from all others, whatever its name; see `identity_in`."""
        with self._naming_errors():
            return identity_in(os.fstat(self._descriptor))

    def take_attributes_of(self, other: FileDevice) -> None:
        """Get the owner, permission bits and extended attributes of another file; see `keep_attributes`."""
        with self._naming_errors():
            names.keep_attributes(other._descriptor, self._descriptor, self._path)

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) in bytes of the parts of a range that may hold data, in order.

        The rest reads as zeros. Where the file system knows no holes this is the whole range up to
        the end of the file. A file that changes meanwhile gives a mixture of old and new extents.
        """
        end = offset + length
        while offset < end:
            with self._naming_errors():
                start = self._seek(offset, os.SEEK_DATA)
                if start is None or start >= end:
                    return
                stop = self._seek(start, os.SEEK_HOLE)
            # Without a hole the file was cut behind ``start`` between the two calls.
            if stop is None:
                return
            offset = min(stop, end)
            yield start, offset - start

    def close(self) -> None:
        """Release the file and its locks, and remove it if it was never published. Syncs nothing."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            # A forked child shares the locks and the temporary file: it must only drop its descriptor.
            if self._new is not None and os.getpid() == self._owner_pid:
                self._new.remove()
        finally:
            os.close(descriptor)

    def __del__(self) -> None:
        # Whoever lost the device, by an exception that came at the wrong moment, must not keep the locks.
        self.close()

    def _seek(self, offset: int, whence: int) -> int | None:
        """Return the next data or hole from ``offset``; None past the last one."""
        try:
            return os.lseek(self._descriptor, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise

    def _require_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self._path} is open for reading only")
        if os.getpid() != self._owner_pid:
            raise ReadOnlyError(f"{self._path} was opened by the parent process: open it again after fork")

    def _name(self, error: OSError) -> None:
        """Put the file's name into an error of the kernel."""
        if error.filename is None:
            error.filename = self._path

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._name(error)
            raise


FileDevice.kinds[stat.S_IFREG] = FileDevice


def open_partial(path: str | os.PathLike[str], partial: str) -> FileDevice:
    """Open or create the file ``partial``, which `FileDevice.publish` names ``path``; it stays until then.

    Raises:
        ImageInUse: another process writes to it.
        UnsupportedFeatureError: no regular file, no locks on this file system, or not Linux.
    """
    _require_linux()
    new = NewFile.keep(os.path.realpath(path), os.path.realpath(partial))
    try:
        if not stat.S_ISREG(os.fstat(new.descriptor).st_mode):
            raise UnsupportedFeatureError("a special file", f"{partial} is not a regular file")
        locks.lock_for_writing(new.descriptor, new.name)
        if not names.is_name_of(new.descriptor, new.name):
            raise ImageInUse(f"{partial} is in use: another process took it away")
    except BaseException:
        os.close(new.descriptor)
        raise
    names.sync_directory(os.path.dirname(new.name))
    return FileDevice(new.descriptor, new.name, writable=True, new=new)


def remove_file(device: FileDevice) -> None:
    """Take an open file's name away, durably, if it is still this file's and no link."""
    if names.is_name_of(device._descriptor, device.path):
        os.unlink(device.path)
        names.sync_directory(os.path.dirname(os.path.realpath(device.path)))


def is_new(device: FileDevice) -> bool:
    """Return True for a file that is not published yet."""
    return device._new is not None


def give_up_old(device: FileDevice) -> None:
    """Before publishing: take the name from the file that has it, durably; see `NewFile.move_aside`.

    Raises:
        ImageInUse: another process uses that file.
    """
    if device._new is not None:
        with device._naming_errors():
            device._new.move_aside(lambda name: _open_regular(name, writable=True))


def keep_old(device: FileDevice) -> None:
    """Have the file that was given up under its name again."""
    if device._new is not None:
        with device._naming_errors():
            device._new.put_back()


def path_of(device: Device) -> str:
    """Return the path of a device that is a file; of one of the caller's own, nothing."""
    return device.path if isinstance(device, FileDevice) else ""


def open_kind(name: str, *, writable: bool) -> tuple[int, int]:
    """Open an existing file; return its descriptor and its kind.

    A block device that is to be written is claimed: nobody mounts it meanwhile.

    Raises:
        UnsupportedFeatureError: a kind of file that is not in `FileDevice.kinds`.
        ImageInUse: a block device is mounted, or a part of another one.
    """
    # Without O_NONBLOCK the opening of a named pipe would wait for its other end.
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    descriptor = os.open(name, flags)
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind == stat.S_IFBLK and writable:
        os.close(descriptor)
        try:
            descriptor = os.open(name, flags | os.O_EXCL)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            reason = "it is mounted, a part of another device, or being written by another process"
            raise ImageInUse(f"{name} is in use: {reason}") from error
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind not in FileDevice.kinds:
        os.close(descriptor)
        detail = f"{name} is not a regular file, and not a block device"
        raise UnsupportedFeatureError(_FILE_KINDS.get(kind, "a special file"), detail)
    return descriptor, kind


def _open_regular(name: str, *, writable: bool) -> int:
    """Open a file that is to be replaced, which a new file can do to regular ones alone."""
    descriptor, kind = open_kind(name, writable=writable)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise UnsupportedFeatureError("replacing a block device", f"{name} is not a regular file")
    return descriptor


def identity_in(state: os.stat_result) -> tuple[int, int]:
    """Return what tells a file from all others: device and inode, or the number of a block device."""
    return (-1, state.st_rdev) if stat.S_ISBLK(state.st_mode) else (state.st_dev, state.st_ino)


def _real_path_of(descriptor: int, name: str) -> str:
    """Return the path of an open file, all links resolved; as ``name`` leads now where there is no /proc."""
    link = f"/proc/self/fd/{descriptor}"
    return os.readlink(link) if os.path.exists(link) else os.path.realpath(name)


def _require_linux() -> None:
    if sys.platform != "linux":
        raise UnsupportedFeatureError(f"the platform {sys.platform}", "jqcow runs on Linux")


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> bool:
    """Call ``fallocate``; return False where the file system does not offer this mode."""
    while True:
        try:
            libc.call("fallocate", descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
        except InterruptedError:
            continue
        except OSError as error:
            if error.errno in _CALL_MISSING:
                return False
            raise
        return True


def reserve(device: Device, offset: int, length: int) -> bool:
    """Reserve host space as `Device.allocate` does; False where a file's host cannot promise any."""
    if not isinstance(device, FileDevice) or has_fixed_size(device):
        device.allocate(offset, length)
        return not has_fixed_size(device)
    device._require_writable()
    with device._naming_errors():
        return _fallocate(device._descriptor, 0, offset, length)


def birth_of(device: FileDevice) -> tuple[int, int]:
    """Return what tells a file from later ones of its name: inode, and its birth in ns, 0 if unknown."""
    with device._naming_errors():
        return os.fstat(device._descriptor).st_ino, libc.born_nanoseconds(device._descriptor)
