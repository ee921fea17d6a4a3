"""A file system of fsspec: the disk in an image, and its partitions, as files to be read.

    with fsspec.open("qcow2://disk.img::file:///images/vm.qcow2") as file:
        file.read(512)

The part behind ``::`` is where the image lies: any file system of fsspec. A local one is opened by its path,
with its locks; of what lies elsewhere nobody may change a byte meanwhile. It needs the extra ``fsspec``.
"""

from __future__ import annotations

import errno
import io
import os
import posixpath
from contextlib import ExitStack
from typing import Any

from fsspec.core import url_to_fs
from fsspec.registry import filesystem
from fsspec.spec import AbstractFileSystem

import jqcow
from jqcow.disks.policy import FilePolicy, check_policy, require_allowed
from jqcow.image.file import ImageFile
from jqcow.offline.shown import files_of
from jqcow.ondisk.keys import Passphrase
from jqcow.ondisk.naming import NamedFile

LOCAL = ("file", "local")


class DiskFile(io.BufferedReader):
    """A file of a disk; ``size`` in bytes, as fsspec asks for it."""

    def __init__(self, raw: ImageFile, size: int) -> None:
        """Buffer ``raw``."""
        super().__init__(raw)
        self.size = size


class Qcow2FileSystem(AbstractFileSystem):  # type: ignore[misc]
    """The files of a disk: ``disk.img``, and ``partition1.img`` and so on."""

    protocol = "qcow2"
    root_marker = ""
    cachable = False

    def __init__(
        self,
        fo: Any = "",
        *,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        snapshot: str | None = None,
        passphrase: Passphrase | None = None,
        allow_files: FilePolicy = False,
        **options: Any,
    ) -> None:
        """Open an image to be read; it stays open until `close`.

        Args:
            fo: where the image lies: a path or URL, or an open file.
            target_protocol: of the file system that it lies in; fsspec fills it in from ``::``.
            target_options: of that file system.
            snapshot: id or name of an internal snapshot to show instead of the disk.
            passphrase: as in `jqcow.open`.
            allow_files: as in `jqcow.open`. The names inside an image elsewhere are paths beside it.
            options: of fsspec's file systems.

        Raises:
            JqcowError, OSError: as `jqcow.open`.
        """
        super().__init__(**options)
        check_policy(allow_files)
        self._closing = ExitStack()
        with ExitStack() as stack:
            how: dict[str, Any] = {"snapshot": snapshot, "passphrase": passphrase}
            if hasattr(fo, "read"):
                image = jqcow.open(fo, **how)
            else:
                image = _open_in(stack, fo, target_protocol, target_options or {}, allow_files, how)
            self.image = stack.enter_context(image)
            self._files = files_of(self.image)
            self._closing = stack.pop_all()

    def close(self) -> None:
        """Close the image, and the files that it lies in."""
        self._closing.close()

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """List the files; of one of them, that one.

        Raises:
            FileNotFoundError: there is no such file.
        """
        path = self._strip_protocol(path)
        if path and path not in self._files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        names = [path] if path else list(self._files)
        if not detail:
            return names
        return [{"name": name, "size": self._files[name].size, "type": "file"} for name in names]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> DiskFile:
        if mode != "rb":
            raise OSError(errno.EROFS, "the disk can be read, not written", path)
        self.ls(path)
        part = self._files[self._strip_protocol(path)]
        return DiskFile(part.as_file(), part.size)


def _open_in(
    stack: ExitStack,
    place: str | os.PathLike[str],
    protocol: str | None,
    options: dict[str, Any],
    allow_files: FilePolicy,
    how: dict[str, Any],
) -> jqcow.Image:
    """Open an image in a file system of fsspec; ``stack`` closes what it lies in."""
    place = os.fspath(place)
    if protocol is None:
        system, path = url_to_fs(place, **options)
    else:
        system = filesystem(protocol, **options)
        path = system._strip_protocol(place)
    protocols = (system.protocol,) if isinstance(system.protocol, str) else system.protocol
    if set(protocols) & set(LOCAL):
        return jqcow.open(path, allow_files=allow_files, **how)

    def find(named: NamedFile) -> Any:
        require_allowed(named, allow_files)
        beside = posixpath.normpath(posixpath.join(posixpath.dirname(path), named.name))
        return stack.enter_context(system.open(beside, "rb"))

    return jqcow.open_device(stack.enter_context(system.open(path, "rb")), backing=find, **how)
