"""Disks written into a file that exists already: one after the other, in place.

The target shows every step to who reads it, and what a crash leaves of it is a part of the copy: it was there
before, under its name. A qcow2 target goes through its journal, so a crash leaves it without a leak.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from jqcow import _native
from jqcow.device.base import Device
from jqcow.device.disk import Disk, Extent, WritableDisk
from jqcow.device.file import FileDevice
from jqcow.disks.policy import FilePolicy
from jqcow.disks.raw import RawDisk
from jqcow.image import Image
from jqcow.image.opening import open as open_image
from jqcow.offline.compare import Progress, windows
from jqcow.ondisk import layout
from jqcow.ondisk.keys import Passphrase
from jqcow.ondisk.naming import DiskFormat

BUFFER_BYTES = 2 << 20
SPARSE_BYTES = 4096


@dataclass(frozen=True)
class CopyReport:
    """What a copy wrote, in bytes: ``written_bytes`` as data, ``zeroed_bytes`` as zeros."""

    written_bytes: int
    zeroed_bytes: int


class Concatenated(Disk):
    """Disks one behind the other."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        """Read from ``disks``, which `close` closes."""
        self._disks = disks
        self._starts = [0, *accumulate(disk.size for disk in disks)]

    @property
    def size(self) -> int:
        """Size of all of them."""
        return self._starts[-1]

    def _parts(self, length: int, offset: int) -> Iterator[tuple[Disk, int, int, int]]:
        """Yield a disk, where it starts, and the start and end of a range that lies in it."""
        end = offset + length
        index = bisect_right(self._starts, offset) - 1
        while offset < end:
            start, stop = self._starts[index], self._starts[index + 1]
            if offset < stop:
                yield self._disks[index], start, offset, min(end, stop)
                offset = min(end, stop)
            index += 1

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        for disk, start, first, end in self._parts(len(buffer), offset):
            disk.read_into(buffer[first - offset : end - offset], first - start)

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what a range holds; host offsets are those in the file of each disk."""
        for disk, start, first, end in self._parts(length, offset):
            for extent in disk.extents(end - first, first - start):
                yield replace(extent, offset=extent.offset + start)

    def close(self) -> None:
        """Close all disks."""
        for disk in self._disks:
            disk.close()


class Window(Disk):
    """A part of a disk: ``length`` bytes from ``start`` on, filled up to a whole sector with zeros."""

    def __init__(self, disk: Disk, start: int, length: int) -> None:
        """Read from ``disk``, which `close` closes. The part lies within it."""
        self._disk = disk
        self._start = start
        self._length = length

    @property
    def size(self) -> int:
        """Size of the part, in whole sectors."""
        return layout.round_up(self._length, layout.SECTOR_BYTES)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        inside = max(0, min(len(buffer), self._length - offset))
        if inside:
            self._disk.read_into(buffer[:inside], offset + self._start)
        buffer[inside:] = bytes(len(buffer) - inside)

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what a range holds."""
        inside = max(0, min(length, self._length - offset))
        for extent in self._disk.extents(inside, offset + self._start) if inside else ():
            yield replace(extent, offset=extent.offset - self._start)
        if inside < length:
            yield Extent(offset + inside, length - inside, "zero", None)

    def close(self) -> None:
        """Close the disk."""
        self._disk.close()


class OwnPart(Disk):
    """What a chain has in its first file; all else shows from below its copy, and is ``unallocated``."""

    def __init__(self, chain: Disk) -> None:
        """Read from ``chain``, which `close` closes."""
        self._chain = chain

    @property
    def size(self) -> int:
        """Size of the disk."""
        return self._chain.size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        self._chain.read_into(buffer, offset)

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what a range holds."""
        for extent in self._chain.extents(length, offset):
            yield extent if extent.depth == 0 else replace(extent, kind="unallocated", host_offset=None)

    def close(self) -> None:
        """Close the chain."""
        self._chain.close()


def copy_into(
    disk: Disk,
    path: str | os.PathLike[str],
    target_format: DiskFormat,
    *,
    is_zero: bool = False,
    keeps_below: bool = False,
    sparse_bytes: int = SPARSE_BYTES,
    compressed: bool = False,
    allow_files: FilePolicy = False,
    probe: bool = False,
    journal_size: int | None = None,
    passphrase: Passphrase | None = None,
    progress: Progress = lambda done, total: None,
) -> CopyReport:
    """Write a disk into a file that exists, from its start on; durable on return.

    Args:
        disk: to be copied; the caller closes it.
        path: the file.
        target_format: of the file.
        is_zero: the target reads as zeros: these are not written.
        keeps_below: what is ``unallocated`` in ``disk`` is not written: the target shows it from below.
        sparse_bytes: so many bytes of zeros in data are written as zeros that take no space; 0: none are.
        compressed: write the clusters of a qcow2 image compressed.
        allow_files: whether files may be opened that the target names.
        probe: tell formats that are not stored by the magic.
        journal_size: in bytes, of a qcow2 target, as in `jqcow.open`.
        passphrase: of the target.
        progress: called with the bytes of the disk that are done, and all of them.

    Raises:
        ValueError: the target is smaller, or raw and to be compressed.
        JqcowError: one of the disks cannot be read, or the target is in use.
        OSError: the host failed.
    """
    if compressed and target_format == "raw":
        raise ValueError("a raw file cannot be compressed")
    following = {"allow_files": allow_files, "probe": probe, "passphrase": passphrase}
    with _opened(path, target_format, journal_size=journal_size, **following) as target:
        if target.size < disk.size:
            raise ValueError("output file is smaller than input file")
        return copy_disk(
            disk,
            target,
            is_zero=is_zero,
            keeps_below=keeps_below,
            sparse_bytes=sparse_bytes,
            compressed=compressed,
            progress=progress,
        )


def copy_disk(
    disk: Disk,
    target: WritableDisk,
    *,
    is_zero: bool = False,
    keeps_below: bool = False,
    sparse_bytes: int = SPARSE_BYTES,
    compressed: bool = False,
    progress: Progress = lambda done, total: None,
) -> CopyReport:
    """Write a disk into an open one, which is at least as large. Arguments and errors as `copy_into`."""
    copy = _Copy(disk, target, is_zero=is_zero, sparse_bytes=sparse_bytes)
    if compressed and isinstance(target, Image):
        copy.compressed(target, progress)
        return CopyReport(copy.written_bytes, copy.zeroed_bytes)
    for extent in disk.extents(disk.size, 0):
        if extent.holds_data:
            copy.data(extent)
        elif not (keeps_below and extent.kind == "unallocated"):
            copy.zeros(extent.offset, extent.length)
        progress(extent.end, disk.size)
    return CopyReport(copy.written_bytes, copy.zeroed_bytes)


@contextmanager
def _opened(
    path: str | os.PathLike[str],
    target_format: DiskFormat,
    **how: Any,
) -> Iterator[WritableDisk]:
    """Open the target for writing; at the end of the block all changes are durable."""
    if target_format == "qcow2":
        with open_image(path, "r+", **how) as image:
            yield image
        return
    with closing(FileDevice.open(path, writable=True)) as device, raw_target(device) as raw:
        yield raw


@contextmanager
def raw_target(device: Device) -> Iterator[RawDisk]:
    """Take a raw disk as a target; at the end of the block all changes are durable."""
    yield RawDisk(device)
    # Durable now: the whole copy, for who is told that it is there.
    device.barrier("copy.target")


class _Copy:
    """Writes one disk into another."""

    def __init__(self, disk: Disk, target: WritableDisk, *, is_zero: bool, sparse_bytes: int) -> None:
        self._disk = disk
        self._target = target
        self._is_zero = is_zero
        self._sparse_bytes = sparse_bytes
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self.written_bytes = self.zeroed_bytes = 0

    def data(self, extent: Extent) -> None:
        """Copy data, but for what of it is zero."""
        for start in range(extent.offset, extent.end, BUFFER_BYTES):
            data = self._buffer[: min(BUFFER_BYTES, extent.end - start)]
            self._disk.read_into(data, start)
            for first, end, is_zero in self._runs(data):
                if is_zero:
                    self.zeros(start + first, end - first)
                else:
                    self._write(data[first:end], start + first)

    def compressed(self, image: Image, progress: Progress) -> None:
        """Copy whole clusters, compressed."""
        unit = image.info().cluster_size
        reached = 0
        for offset, length in windows(self._disk, unit, BUFFER_BYTES):
            if reached < offset:
                self._compressed_zeros(image, reached, offset - reached, unit)
            data = self._buffer[:length]
            self._disk.read_into(data, offset)
            for start in range(0, length, unit):
                cluster = data[start : start + unit]
                if self._sparse_bytes and _native.is_zero(cluster):
                    self.zeros(offset + start, len(cluster))
                else:
                    image.pwrite_compressed(cluster, offset + start)
                    self.written_bytes += len(cluster)
            reached = offset + length
            progress(reached, self._disk.size)
        if reached < self._disk.size:
            self._compressed_zeros(image, reached, self._disk.size - reached, unit)

    def _compressed_zeros(self, image: Image, offset: int, length: int, unit: int) -> None:
        """Have a range read as zeros; with no sparse step, by compressed clusters of zeros."""
        if self._sparse_bytes:
            self.zeros(offset, length)
            return
        for start in range(offset, offset + length, unit):
            count = min(unit, offset + length - start)
            image.pwrite_compressed(bytes(count), start)
            self.written_bytes += count

    def _runs(self, data: memoryview) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, end, is it zero) of the parts of data."""
        unit = self._sparse_bytes
        if not unit:
            yield 0, len(data), False
            return
        start, kind = 0, False
        for first in range(0, len(data), unit):
            is_zero = _native.is_zero(data[first : first + unit])
            if first and is_zero != kind:
                yield start, first, kind
                start = first
            kind = is_zero
        yield start, len(data), kind

    def zeros(self, offset: int, length: int) -> None:
        """Have a range read as zeros, if it does not yet; with no sparse step it is filled with them."""
        if not self._sparse_bytes:
            for start in range(offset, offset + length, BUFFER_BYTES):
                self._write(memoryview(bytes(min(BUFFER_BYTES, offset + length - start))), start)
        elif not self._is_zero:
            self._target.write_zeroes(length, offset)
            self.zeroed_bytes += length

    def _write(self, data: memoryview, offset: int) -> None:
        self._target.pwrite(data, offset)
        self.written_bytes += len(data)
