"""The disk as files in a directory, by FUSE: ``disk.img``, and each partition beside it.

It needs the extra ``mount`` and libfuse 3. What the kernel keeps of a file that is only read cannot change;
where files are written, it keeps nothing: the disk and its partitions are the same bytes.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from jqcow.device import libc
from jqcow.errors import JqcowError, MissingPackageError
from jqcow.image import Image
from jqcow.offline.shown import Part, files_of

try:
    import mfusepy
except ImportError as missing:
    raise MissingPackageError("a mount needs the package mfusepy: pip install 'jqcow[mount]'") from missing
except OSError as missing:
    raise MissingPackageError("a mount needs libfuse: install fuse3") from missing

THREADS = 8
BLOCK_BYTES = 512
_ENDING = (signal.SIGTERM, signal.SIGHUP)


def mount(
    image: Image,
    directory: str | os.PathLike[str],
    *,
    ready: Callable[[list[str]], object] = lambda names: None,
    tell: Callable[[str], object] = lambda text: None,
) -> None:
    """Show the disk of an open image in an empty directory, until somebody unmounts it.

    A signal that asks the process to end unmounts it, too. All that was written is flushed then; the caller
    closes the image.

    Args:
        image: open for reading, or for writing: then the files can be written.
        directory: where.
        ready: is called with the names of the files when they are there.
        tell: is called, once for each text, with errors that programs see as a number alone.

    Raises:
        OSError: the directory is not empty, or the host refuses a mount.
        JqcowError: the disk cannot be read, or flushed at the end.
    """
    if os.listdir(directory):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), os.fspath(directory))
    shown = ShownDisk(image, files_of(image), ready=ready, tell=tell)
    options = {"ro": not shown.writable, "direct_io": shown.writable, "kernel_cache": not shown.writable}
    # Both: libfuse 3.14 complains of a maximum alone.
    threads = {"max_threads": THREADS, "max_idle_threads": THREADS}
    try:
        with _signals_for_libfuse():
            mfusepy.FUSE(shown, os.fspath(directory), foreground=True, fsname="jqcow", **threads, **options)
    except RuntimeError as error:
        # A signal that ends a mount counts as an error, too.
        if not shown.is_mounted:
            raise OSError(errno.EPERM, "FUSE refused the mount", os.fspath(directory)) from error
    image.flush()


@contextmanager
def _signals_for_libfuse() -> Iterator[None]:
    """Leave signals to libfuse, which runs no Python between two requests: it ends the mount by them."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signal.SIG_DFL) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ShownDisk(mfusepy.Operations):  # type: ignore[misc]
    """What the kernel asks of the directory. Paths begin with a slash; offsets and lengths are in bytes."""

    use_ns = True

    def __init__(
        self,
        image: Image,
        files: dict[str, Part],
        *,
        ready: Callable[[list[str]], object],
        tell: Callable[[str], object],
    ) -> None:
        """Show ``files`` of an image; arguments as `mount`."""
        self.is_mounted = False
        self.writable = image.mode == "r+"
        self._image = image
        self._files = {f"/{name}": part for name, part in files.items()}
        self._ready = ready
        self._tell = tell
        self._told: set[str] = set()

    def init(self, path: str) -> None:
        """The files are there from now on."""
        self.is_mounted = True
        self._ready([name.lstrip("/") for name in self._files])

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        """Return what a name is."""
        found: dict[str, Any] = {"st_uid": os.getuid(), "st_gid": os.getgid()}
        rights = 0o644 if self.writable else 0o444
        if path == "/":
            return found | {"st_mode": stat.S_IFDIR | 0o555, "st_nlink": 2}
        size = self._part(path).size
        blocks = -(-size // BLOCK_BYTES)
        return found | {"st_mode": stat.S_IFREG | rights, "st_nlink": 1, "st_size": size, "st_blocks": blocks}

    def readdir(self, path: str, fh: int) -> list[str]:
        """Return all names."""
        return [".", "..", *(name.lstrip("/") for name in self._files)]

    def open(self, path: str, flags: int) -> int:
        """Open a file."""
        self._part(path)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._require_writable()
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Return up to ``size`` bytes."""
        with self._answering():
            return self._part(path).pread(size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        """Write what fits; a file does not grow."""
        part = self._part(path)
        room = part.size - offset
        if room <= 0:
            raise mfusepy.FuseOSError(errno.ENOSPC)
        with self._answering():
            return part.pwrite(data[:room], offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        """Refuse another length: the disk is as long as it is."""
        if self._part(path).size != length:
            raise mfusepy.FuseOSError(errno.EPERM)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        """Give space back, or make zeros, as a file system in the disk asks for it."""
        self._require_writable()
        part = self._part(path)
        size = min(size, part.size - offset)
        if not mode & (libc.FALLOC_PUNCH_HOLE | libc.FALLOC_ZERO_RANGE):
            raise mfusepy.FuseOSError(errno.EOPNOTSUPP)
        if size > 0:
            with self._answering():
                part.write_zeroes(size, offset, unmap=bool(mode & libc.FALLOC_PUNCH_HOLE))
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        """Make everything durable that was written to the image."""
        with self._answering():
            self._image.flush()
        return 0

    def flush(self, path: str, fh: int) -> int:
        """A file is closed: the same."""
        return self.fsync(path, 0, fh)

    def _part(self, path: str) -> Part:
        part = self._files.get(path)
        if part is None:
            raise mfusepy.FuseOSError(errno.ENOENT)
        return part

    def _require_writable(self) -> None:
        if not self.writable:
            raise mfusepy.FuseOSError(errno.EROFS)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Answer with a number, and tell what stands behind it."""
        try:
            yield
        except (JqcowError, OSError) as error:
            if str(error) not in self._told:
                self._told.add(str(error))
                self._tell(str(error))
            number = error.errno if isinstance(error, OSError) else None
            raise mfusepy.FuseOSError(number or errno.EIO) from error
