"""What an overlay has of its own, written into its backing file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from jqcow.device.base import Device
from jqcow.device.file import FileDevice
from jqcow.errors import UnsupportedFeatureError
from jqcow.image import Image
from jqcow.offline.compare import Progress
from jqcow.offline.info import Format, probe_format
from jqcow.offline.rebase import refuse_snapshots
from jqcow.ondisk.naming import FilePolicy, NamedFile, known_format, require_allowed
from jqcow.opening import open as open_image
from jqcow.opening import open_alone

WINDOW_BYTES = 4 << 20


@dataclass(frozen=True)
class CommitReport:
    """What a commit did; sizes in bytes.

    Attributes:
        base: path of the backing file that took the data.
        written_bytes: data that was written to it.
        zeroed_bytes: what was made to read as zeros in it.
        base_size: size of its disk now.
        emptied: the overlay holds nothing of its own any more.
    """

    base: str
    written_bytes: int
    zeroed_bytes: int
    base_size: int
    emptied: bool


class _Base(Protocol):
    """The disk that takes the data."""

    @property
    def size(self) -> int: ...

    def resize(self, size: int) -> None: ...

    def pwrite(self, buffer: bytes, offset: int) -> object: ...

    def write_zeroes(self, length: int, offset: int) -> None: ...


class _RawBase:
    """A raw disk, written in place."""

    def __init__(self, device: Device) -> None:
        self._device = device

    @property
    def size(self) -> int:
        return self._device.size()

    def resize(self, size: int) -> None:
        self._device.truncate(size)

    def pwrite(self, buffer: bytes, offset: int) -> None:
        self._device.pwrite(buffer, offset)

    def write_zeroes(self, length: int, offset: int) -> None:
        if not self._device.punch(offset, length):
            for start in range(offset, offset + length, WINDOW_BYTES):
                self._device.pwrite(bytes(min(WINDOW_BYTES, offset + length - start)), start)


def commit(
    path: str | os.PathLike[str],
    *,
    keep: bool = False,
    allow_files: FilePolicy = False,
    probe: bool = False,
    progress: Progress = lambda done, total: None,
) -> CommitReport:
    """Write what an overlay has of its own into its backing file; then empty the overlay.

    A qcow2 base takes all of it in one transaction. Until that is durable the overlay stays as it is, so a
    crash at any time leaves an overlay whose disk reads as before. A raw base is written in place: other
    readers of it see it change. A base that is smaller than the overlay grows.

    Args:
        path: the overlay; a crashed one is recovered first.
        keep: leave the overlay as it is.
        allow_files: whether the backing file may be opened, and what it names, as in `jqcow.open`.
        probe: tell formats that are not stored by the magic.
        progress: called with the bytes of the overlay's disk that are done, and all of them.

    Raises:
        ValueError: the image has no backing file.
        FileAccessDenied: the backing file is not allowed.
        UnsupportedFeatureError: the overlay has internal snapshots, which show the backing file too.
        JqcowError: one of the files cannot be read, or is in use.
        OSError: the host failed; the overlay reads as before.
    """
    with open_alone(path, "r+") as overlay:
        named = overlay.backing_file
        if named is None:
            raise ValueError(f"{os.fspath(path)} has no backing file to commit to")
        refuse_snapshots(overlay, "a commit")
        require_allowed(named, allow_files)
        with _open_base(named, allow_files, probe=probe) as base:
            written, zeroed = copy_into(overlay, base, progress)
            base_size = base.size
        if not keep:
            with overlay.transaction() as transaction:
                transaction.make_empty()
    return CommitReport(named.path, written, zeroed, base_size, emptied=not keep)


@contextmanager
def _open_base(named: NamedFile, allow_files: FilePolicy, *, probe: bool) -> Iterator[_Base]:
    """Open the backing file for writing; at the end of the block all changes are durable."""
    try:
        if _format_of(named, probe=probe) == "qcow2":
            with (
                open_image(named.path, "r+", allow_files=allow_files, probe=probe) as base,
                base.transaction() as transaction,
            ):
                yield transaction
            return
        device = FileDevice.open(named.path, writable=True)
    except FileNotFoundError as error:
        error.add_note(f"{named.image} names it as its backing file, by {named.name!r}")
        raise
    try:
        with raw_base(device) as raw:
            yield raw
    finally:
        device.close()


@contextmanager
def raw_base(device: Device) -> Iterator[_RawBase]:
    """Take a raw disk as a base; at the end of the block all changes are durable."""
    yield _RawBase(device)
    # Durable now: all that the overlay had. The overlay may be emptied from here on.
    device.barrier("commit.base")


def _format_of(named: NamedFile, *, probe: bool) -> Format:
    stored = known_format(named)
    if stored is not None:
        return stored
    if not probe:
        detail = f"{named.image} names {named.name!r}; a guess could take a guest's bytes for an image"
        raise UnsupportedFeatureError("a backing file without a format", detail)
    device = FileDevice.open(named.path, writable=False)
    try:
        return probe_format(device)
    finally:
        device.close()


def copy_into(overlay: Image, base: _Base, progress: Progress = lambda done, total: None) -> tuple[int, int]:
    """Copy the overlay's own data and zeros; return the bytes of both."""
    if base.size < overlay.size:
        base.resize(overlay.size)
    written = zeroed = 0
    for extent in overlay.extents():
        if extent.kind == "zero":
            base.write_zeroes(extent.length, extent.offset)
            zeroed += extent.length
        elif extent.kind != "unallocated":
            end = extent.offset + extent.length
            for start in range(extent.offset, end, WINDOW_BYTES):
                base.pwrite(overlay.pread(min(WINDOW_BYTES, end - start), start), start)
            written += extent.length
        progress(extent.offset + extent.length, overlay.size)
    return written, zeroed
