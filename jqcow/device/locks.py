"""Locks that keep jqcow and QEMU out of each other's way.

QEMU marks what it does with an image by shared locks on single bytes of the file, and so does jqcow.
Each permission has two bytes::

    Byte 100 + permission:   a holder uses the permission
         200 + permission:   a holder does not share the permission with others

    permission 0:   consistent read: what is read is a valid image
               1:   write
               2:   write unchanged: write the data that is already there
               3:   resize

The bytes are locks only: the content of the file there means nothing, and the file may be shorter.
A new user first takes all its locks, then looks for holders that exclude it, and gives up if it finds one.
In this order two users that start together may both be refused, but never both be admitted.

The locks belong to the open file description (``F_OFD_SETLK``). They end when its last descriptor is
closed, also when the process is killed.
"""

from __future__ import annotations

import enum
import errno
import struct
import sys

from jqcow.errors import ImageInUse, UnsupportedFeatureError

# Where it is missing the device refuses the platform by name when a file is opened.
if sys.platform != "win32":
    import fcntl

HOLD_OFFSET = 100
UNSHARE_OFFSET = 200

F_OFD_GETLK = 36
F_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi0q")
"""The kernel's ``struct flock``: type, whence, start, length, pid."""

_LOCKS_MISSING = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Permission(enum.IntFlag):
    """What a user does with an image; the bit number is the permission's number."""

    CONSISTENT_READ = 1 << 0
    WRITE = 1 << 1
    WRITE_UNCHANGED = 1 << 2
    RESIZE = 1 << 3


_OTHER = "another process, or another part of this one,"
_CHANGES = Permission.WRITE | Permission.RESIZE
_USED_BY_OTHER = {
    Permission.CONSISTENT_READ: "is reading it",
    Permission.WRITE: "has it open for writing",
    Permission.WRITE_UNCHANGED: "is filling it from its backing file",
    Permission.RESIZE: "may resize it",
}
_WANTED = {
    Permission.CONSISTENT_READ: "be read",
    Permission.WRITE: "be written",
    Permission.WRITE_UNCHANGED: "be filled from its backing file",
    Permission.RESIZE: "be resized",
}


def lock_for_writing(descriptor: int, name: str) -> None:
    """Keep all other writers and all exclusive readers out while ``descriptor`` is open.

    Raises:
        ImageInUse: another user excludes this one; ``name`` is the file's name for the message.
        UnsupportedFeatureError: the file system has no such locks.
    """
    _take(descriptor, name, held=Permission.CONSISTENT_READ | _CHANGES, unshared=_CHANGES)


def lock_for_reading(descriptor: int, name: str, *, share_writers: bool = False) -> None:
    """Keep writers out while ``descriptor`` is open; with ``share_writers`` let them be.

    Raises:
        ImageInUse: another user excludes this one; ``name`` is the file's name for the message.
        UnsupportedFeatureError: the file system has no such locks, and writers are to be kept out.
    """
    unshared = Permission(0) if share_writers else _CHANGES
    try:
        _take(descriptor, name, held=Permission.CONSISTENT_READ, unshared=unshared)
    except UnsupportedFeatureError:
        # Who shares keeps nobody out: locks would only tell others that it reads.
        if not share_writers:
            raise


def _take(descriptor: int, name: str, *, held: Permission, unshared: Permission) -> None:
    """Take the locks of one user, or none of them."""
    try:
        for permission in held:
            _set(descriptor, fcntl.F_RDLCK, HOLD_OFFSET + _number(permission))
        for permission in unshared:
            _set(descriptor, fcntl.F_RDLCK, UNSHARE_OFFSET + _number(permission))
        refused = _refused(descriptor, held)
        conflict = _find_conflict(descriptor, unshared) or refused
    except OSError as error:
        release(descriptor)
        if error.errno in _LOCKS_MISSING:
            raise UnsupportedFeatureError(
                f"locking {name}", "its file system has no open file description locks"
            ) from error
        # A foreign program may hold an exclusive lock on one of the bytes.
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ImageInUse(_advise(name, f"{_OTHER} has locked it exclusively")) from error
        error.filename = name
        raise
    if conflict:
        release(descriptor)
        raise ImageInUse(_advise(name, conflict), refused=bool(refused))


def release(descriptor: int) -> None:
    """Drop every lock that this open file description holds."""
    try:
        fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, 0, 0, 0))
    except OSError as error:
        if error.errno not in _LOCKS_MISSING:
            raise


def _find_conflict(descriptor: int, unshared: Permission) -> str:
    """Return what another user does that this one does not let others do, or an empty string."""
    for permission in unshared:
        if _is_locked(descriptor, HOLD_OFFSET + _number(permission)):
            return f"{_OTHER} {_USED_BY_OTHER[permission]}"
    return ""


def _refused(descriptor: int, held: Permission) -> str:
    """Return what this user wants to do that another one does not let others do, or an empty string."""
    for permission in held:
        if _is_locked(descriptor, UNSHARE_OFFSET + _number(permission)):
            return f"{_OTHER} uses it and does not let it {_WANTED[permission]}"
    return ""


def _advise(name: str, reason: str) -> str:
    return (
        f"{name} is in use: {reason}. "
        "Close the program that holds it (a virtual machine, qemu-nbd, jqcow) and try again."
    )


def _number(permission: Permission) -> int:
    return permission.bit_length() - 1


def _set(descriptor: int, kind: int, byte: int) -> None:
    fcntl.fcntl(descriptor, F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))


def _is_locked(descriptor: int, byte: int) -> bool:
    """Return True if another open file description holds any lock on ``byte``."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0)
    found: int = _FLOCK.unpack(fcntl.fcntl(descriptor, F_OFD_GETLK, asked))[0]
    return found != fcntl.F_UNLCK
