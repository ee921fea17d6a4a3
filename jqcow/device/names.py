"""The name of a new file: none at first, where the file system can, then its final one, at once.

A file without a name goes with the process that makes it, however that ends. It gets its name by a hard link,
which never replaces a file: to replace one it is linked under a temporary name, and renamed at once.
"""

from __future__ import annotations

import errno
import os
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from jqcow.device import libc, locks
from jqcow.errors import ImageInUse

ATTEMPTS = 8
"""How often to try again where another process replaces a name between a look at it and the lock."""

_TMPFILE_MISSING = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)
_XATTRS_OF_THE_CONTENT = {"security.ima", "security.evm"}


@dataclass(frozen=True)
class _Aside:
    """A file that had the final name, open and locked, and the one that it has meanwhile."""

    descriptor: int
    name: str


class NewFile:
    """A file that does not have its final name yet. Whoever takes the descriptor closes it.

    Attributes:
        descriptor: open for reading and writing.
        target: its final name.
    """

    def __init__(self, descriptor: int, target: str, temporary: str | None) -> None:
        """``temporary`` is the name that it has, if any; `create` is the way in."""
        self.descriptor = descriptor
        self.target = target
        self._temporary = temporary
        self.is_kept = False
        """True if it stays under its temporary name where it is not published."""
        self._aside: _Aside | None = None

    @classmethod
    def create(cls, target: str) -> NewFile:
        """Create an empty file beside ``target``: without a name where the file system can do that."""
        descriptor = open_unnamed(os.path.dirname(target))
        if descriptor is not None:
            return cls(descriptor, target, None)
        temporary = temporary_name(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        return cls(descriptor, target, temporary)

    @classmethod
    def keep(cls, target: str, temporary: str) -> NewFile:
        """Open the file ``temporary``, or create it; it stays under that name until it is published.

        Raises:
            OSError: the host failed, or a link has that name.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        new = cls(os.open(temporary, flags, 0o666), target, temporary)
        new.is_kept = True
        return new

    @property
    def name(self) -> str:
        """The name that it has or, where that is none, will have."""
        return self._temporary or self.target

    def remove(self) -> None:
        """Take its temporary name away, and what was moved aside for it."""
        try:
            if self._temporary is not None and not self.is_kept:
                # What cut `publish` off may have come before the name was given, or after it was taken.
                with suppress(FileNotFoundError):
                    os.unlink(self._temporary)
        finally:
            self._forget_aside()

    def move_aside(self, open_writable: Callable[[str], int]) -> None:
        """Take the final name from the file that has it, durably, if one does and nobody uses it.

        That file goes when the new one is published, or removed; a killed process leaves it under a temporary
        name.

        Raises:
            ImageInUse: another process uses it, or keeps replacing it.
        """
        for _ in range(ATTEMPTS if self._aside is None else 0):
            try:
                descriptor = open_writable(self.target)
            except FileNotFoundError:
                return
            try:
                locks.lock_for_writing(descriptor, self.target)
                if is_name_of(descriptor, self.target):
                    self._aside = _Aside(descriptor, temporary_name(self.target))
                    os.rename(self.target, self._aside.name)
                    sync_directory(os.path.dirname(self.target))
                    return
            except BaseException:
                self._aside = None
                os.close(descriptor)
                raise
            os.close(descriptor)
        if self._aside is None:
            raise ImageInUse(f"{self.target} is in use: another process keeps replacing it")

    def put_back(self) -> None:
        """Give a file that was moved aside its name again, unless another one has it now."""
        aside, self._aside = self._aside, None
        if aside is not None:
            try:
                rename_without_replacing(aside.name, self.target)
                sync_directory(os.path.dirname(self.target))
            finally:
                os.close(aside.descriptor)

    def _forget_aside(self) -> None:
        aside, self._aside = self._aside, None
        if aside is not None:
            try:
                if is_name_of(aside.descriptor, aside.name):
                    os.unlink(aside.name)
            finally:
                os.close(aside.descriptor)

    def publish(self, overwrite: bool, open_writable: Callable[[str], int]) -> None:
        """Make the file durable, then give it its final name; durable when its directory is.

        ``overwrite`` allows it to replace an existing regular file that nobody uses; its owner, permission
        bits and extended attributes are kept, and a warning names those that the host denies. It is opened
        with ``open_writable``. An error leaves the new file without the name and the existing file as it was.

        Raises:
            FileExistsError: the name is taken and ``overwrite`` is False.
            ImageInUse: another process uses the file to be replaced.
        """
        # Durable first: after a crash the name must not lead to a file without its content.
        os.fsync(self.descriptor)
        if self._aside is not None:
            keep_attributes(self._aside.descriptor, self.descriptor, self.target)
            os.fsync(self.descriptor)
        for _ in range(ATTEMPTS):
            if self._take_free_name():
                self._forget_aside()
                return
            if not overwrite:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.target)
            if self._replace_target(open_writable):
                return
        raise ImageInUse(f"{self.target} is in use: another process keeps replacing it")

    def _take_free_name(self) -> bool:
        """Give the file its final name; return False, having done nothing, where that is taken."""
        if self._temporary is None:
            return link_unnamed(self.descriptor, self.target)
        return rename_without_replacing(self._temporary, self.target)

    def _replace_target(self, open_writable: Callable[[str], int]) -> bool:
        """Rename over the target while holding a writer's locks on it.

        Returns False, having done nothing to it, where the name leads to another file than the locked one.
        """
        target = self.target
        try:
            replaced = open_writable(target)
        except FileNotFoundError:
            return False
        try:
            locks.lock_for_writing(replaced, target)
            # Between the open and the lock another file may have been published under this name.
            if not is_name_of(replaced, target):
                return False
            keep_attributes(replaced, self.descriptor, target)
            # Durable, too, before the name leads to it.
            os.fsync(self.descriptor)
            if self._temporary is None:
                # Before the link, so that whatever cuts this off leaves no file behind.
                self._temporary = temporary_name(target)
                if not link_unnamed(self.descriptor, self._temporary):
                    self._temporary = None
                    return False
            # Who respects locks cannot have replaced it since; of the others as many as possible are seen.
            if not is_name_of(replaced, target):
                return False
            os.replace(self._temporary, target)
            return True
        finally:
            os.close(replaced)


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
    return os.path.join(directory, f".{base[:50]}.{os.urandom(4).hex()}.partial")


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
    """Give a file that replaces another one, or holds a part of it, its owner, permissions and attributes.

    What the host does not allow is told by a warning.

    Args:
        old: descriptor of the file to be replaced.
        new: descriptor of the file that takes its place.
        name: of the new one, for the warning.
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
        warnings.warn(f"{name} did not keep its {', '.join(denied)}", stacklevel=2)


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
