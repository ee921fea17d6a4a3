"""A disk into a file of another format, or anew in the same: sparse, streamed, whole or not there at all.

The target is written under a temporary name beside its final one, made durable, and named last. Only what
may hold data is read, and only what is not zero is written: whole clusters in a qcow2 image, and steps of
4096 bytes in a raw file, as in qemu-img.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from typing import Protocol

from jqcow import _native
from jqcow.device.file import FileDevice
from jqcow.errors import JqcowError
from jqcow.offline.build import ImageBuilder
from jqcow.offline.compare import Progress, first_difference
from jqcow.offline.disks import Disk, disk_on, open_disk, windows
from jqcow.offline.info import Format
from jqcow.ondisk import layout

BUFFER_BYTES = 2 << 20
RAW_UNIT_BYTES = 4096
DEFAULT_CLUSTER_BYTES = 65536


@dataclass(frozen=True)
class ConvertReport:
    """What was converted; sizes in bytes.

    Attributes:
        source: name of the source.
        source_format: given, or told by its magic.
        target: name of the target.
        target_format: ``raw`` or ``qcow2``.
        virtual_size: of the disk.
        read_bytes: what was read from the source: all that may hold data.
        written_bytes: what of it was not zero.
        target_bytes: length of the target file.
        seconds: of the conversion, durability included, verification not.
        verify_seconds: of rereading and comparing both, None if it was not asked for.
    """

    source: str
    source_format: Format
    target: str
    target_format: Format
    virtual_size: int
    read_bytes: int
    written_bytes: int
    target_bytes: int
    seconds: float
    verify_seconds: float | None


class _Target(Protocol):
    unit: int

    def write(self, data: memoryview, offset: int) -> None: ...

    def finish(self) -> None: ...


class _RawTarget:
    """Writes a raw file; what is not written stays a hole."""

    def __init__(self, device: FileDevice, size: int) -> None:
        self.unit = RAW_UNIT_BYTES
        self._device = device
        device.truncate(size)

    def write(self, data: memoryview, offset: int) -> None:
        self._device.pwrite(data, offset)

    def finish(self) -> None:
        """Nothing is left to write."""


class _ImageTarget:
    """Builds a qcow2 image."""

    def __init__(self, device: FileDevice, size: int, cluster_size: int) -> None:
        self.unit = cluster_size
        self._builder = ImageBuilder(device, size, cluster_size.bit_length() - 1)

    def write(self, data: memoryview, offset: int) -> None:
        self._builder.write(data, offset)

    def finish(self) -> None:
        self._builder.finish()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    source_format: Format | None = None,
    target_format: Format = "qcow2",
    cluster_size: int = DEFAULT_CLUSTER_BYTES,
    overwrite: bool = False,
    verify: bool = False,
    progress: Progress = lambda done, total: None,
) -> ConvertReport:
    """Copy a disk into a new file of ``target_format``, durably.

    Args:
        source: the file to read; locked against writers meanwhile.
        target: the file to make; it appears under this name when it is whole and durable.
        source_format: None tells it by the magic.
        target_format: ``raw`` or ``qcow2``.
        cluster_size: of a qcow2 target, in bytes.
        overwrite: replace an existing file, if nobody uses it.
        verify: reread both and compare them before the target gets its name.
        progress: called with the bytes of the disk that are done, and all of them.

    Raises:
        ValueError: a cluster size that no image can have, or source and target are the same file.
        FileExistsError: the target exists.
        JqcowError: the source cannot be read, one of the files is in use, or the verification found a
            difference; there is no target then.
        OSError: the host failed; there is no target then.
    """
    _check_cluster_size(cluster_size)
    _check_target(source, target, overwrite=overwrite)
    started = time.perf_counter()
    with open_disk(source, source_format) as (disk, known_format):
        device = FileDevice.create_temporary(target)
        try:
            read_bytes, written_bytes = _copy(
                disk, _make_target(device, disk, target_format, cluster_size), progress
            )
            verify_seconds = _verify(disk, device, target_format) if verify else None
            target_bytes = device.size()
            device.publish(overwrite)
        finally:
            device.close()
        return ConvertReport(
            source=os.fspath(source),
            source_format=known_format,
            target=os.fspath(target),
            target_format=target_format,
            virtual_size=disk.size,
            read_bytes=read_bytes,
            written_bytes=written_bytes,
            target_bytes=target_bytes,
            seconds=time.perf_counter() - started - (verify_seconds or 0),
            verify_seconds=verify_seconds,
        )


def _check_cluster_size(cluster_size: int) -> None:
    smallest, largest = 1 << layout.MIN_CLUSTER_BITS, 1 << layout.MAX_CLUSTER_BITS
    if cluster_size & (cluster_size - 1) or not smallest <= cluster_size <= largest:
        raise ValueError(f"the cluster size must be a power of two from 512 to 2 MiB, not {cluster_size}")


def _check_target(source: str | os.PathLike[str], target: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Find out before the work whether the target could get its name after it."""
    if not os.path.lexists(target):
        return
    if os.path.exists(target) and os.path.samefile(source, target):
        raise ValueError(f"{os.fspath(target)} is the source as well as the target")
    if not overwrite:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
    if os.path.exists(target):
        FileDevice.open(target, writable=True).close()


def _make_target(device: FileDevice, disk: Disk, target_format: Format, cluster_size: int) -> _Target:
    if target_format == "raw":
        return _RawTarget(device, disk.size)
    return _ImageTarget(device, disk.size, cluster_size)


def _copy(disk: Disk, target: _Target, progress: Progress) -> tuple[int, int]:
    """Copy what is not zero; return the bytes read and the bytes written."""
    read_bytes = written_bytes = 0
    buffer = bytearray(BUFFER_BYTES)
    progress(0, disk.size)
    for offset, length in windows(disk, target.unit, BUFFER_BYTES):
        data = memoryview(buffer)[:length]
        disk.read_into(data, offset)
        read_bytes += length
        for start, end in nonzero_runs(data, target.unit):
            target.write(data[start:end], offset + start)
            written_bytes += end - start
        progress(offset + length, disk.size)
    target.finish()
    progress(disk.size, disk.size)
    return read_bytes, written_bytes


def nonzero_runs(data: memoryview, unit: int) -> list[tuple[int, int]]:
    """Return (start, end) of the parts of ``data`` that are not zero, in steps of ``unit`` bytes."""
    runs: list[tuple[int, int]] = []
    for start in range(0, len(data), unit):
        end = min(start + unit, len(data))
        if _native.is_zero(data[start:end]):
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return runs


def _verify(disk: Disk, device: FileDevice, target_format: Format) -> float:
    started = time.perf_counter()
    difference = first_difference(disk, disk_on(device, target_format))
    if difference is not None:
        raise JqcowError(f"verification failed: source and target differ at guest offset {difference:#x}")
    return time.perf_counter() - started


def create_raw(path: str | os.PathLike[str], size: int, *, overwrite: bool = False) -> None:
    """Create a raw file of zeros, all of it a hole, durably.

    Raises:
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name.
    """
    device = FileDevice.create_temporary(path)
    try:
        device.truncate(size)
        device.publish(overwrite)
    finally:
        device.close()
