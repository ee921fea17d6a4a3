"""The name of a new file: none at first, where the file system can, then its final one, at once.

A file without a name goes with the process that makes it, however that ends. It gets its name by a hard link,
which never replaces a file: to replace one it is linked under a temporary name, and renamed at once.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import warnings

from jqcow.device import libc

_TMPFILE_MISSING = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)
_XATTRS_OF_THE_CONTENT = {"security.ima", "security.evm"}


def open_unnamed(directory: str) -> int | None:
    """Return the descriptor of a new file without a name; None where the host has none that can be linked."""
    try:
        descriptor = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _TMPFILE_MISSING:
            return None
        raise
    # Without /proc it could never get a name.
    if os.path.exists(_path_of(descriptor)):
        return descriptor
    os.close(descriptor)
    return None


def temporary_name(target: str) -> str:
    """Return a free name beside ``target``, hidden and not to be mistaken for an image."""
    directory, base = os.path.split(target)
    return os.path.join(directory, f".{base[:50]}.{secrets.token_hex(4)}.partial")


def link_unnamed(descriptor: int, target: str) -> bool:
    """Give a file without a name its first one; return False, having done nothing, where that is taken."""
    source = os.fsencode(_path_of(descriptor))
    try:
        libc.call("linkat", libc.AT_FDCWD, source, libc.AT_FDCWD, os.fsencode(target), libc.AT_SYMLINK_FOLLOW)
    except FileExistsError:
        return False
    except OSError as error:
        error.filename = target
        raise
    return True


def _path_of(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def rename_without_replacing(source: str, target: str) -> bool:
    """Rename a file; return False, having done nothing, where ``target`` exists."""
    names = libc.AT_FDCWD, os.fsencode(source), libc.AT_FDCWD, os.fsencode(target)
    try:
        libc.call("renameat2", *names, libc.RENAME_NOREPLACE)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            error.filename, error.filename2 = source, target
            raise
        return _link_without_replacing(source, target)
    return True


def _link_without_replacing(source: str, target: str) -> bool:
    """Rename by way of a hard link, where the file system has no exclusive renaming."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    os.unlink(source)
    return True


def is_name_of(descriptor: int, name: str) -> bool:
    """Return True if ``name`` is, at this moment and not by way of a link, the name of an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(name))
    except FileNotFoundError:
        return False


def sync_directory(directory: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def keep_attributes(old: int, new: int, name: str) -> None:
    """Give a file that replaces another one its owner, permission bits and extended attributes.

    What the host does not allow is told by a warning.

    Args:
        old: descriptor of the file to be replaced.
        new: descriptor of the file that takes its place.
        name: of both, for the warning.
    """
    state, new_state = os.fstat(old), os.fstat(new)
    denied = []
    if (state.st_uid, state.st_gid) != (new_state.st_uid, new_state.st_gid):
        try:
            os.fchown(new, state.st_uid, state.st_gid)
        except OSError as error:
            denied.append(f"owner {state.st_uid}:{state.st_gid} ({error.strerror})")
    denied += _keep_extended(old, new)
    # Last: a change of the owner clears bits, an access control list changes those of the group.
    os.fchmod(new, stat.S_IMODE(state.st_mode))
    if denied:
        warnings.warn(f"{name} was replaced and did not keep its {', '.join(denied)}", stacklevel=2)


def _keep_extended(old: int, new: int) -> list[str]:
    """Copy extended attributes; return those that the host does not allow."""
    wanted, found = _extended(old), _extended(new)
    denied = []
    for name in sorted((wanted.keys() | found.keys()) - _XATTRS_OF_THE_CONTENT):
        if wanted.get(name) == found.get(name):
            continue
        try:
            if name in wanted:
                os.setxattr(new, name, wanted[name])
            else:
                # An access control list that the directory gives each new file.
                os.removexattr(new, name)
        except OSError as error:
            denied.append(f"{name} ({error.strerror})")
    return denied


def _extended(descriptor: int) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(descriptor, name) for name in os.listxattr(descriptor)}
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return {}
        raise
