"""An image takes less space, and holds what it held: its disk and its snapshots.

Two things are given back: clusters of the disk that hold nothing but zeros, and what the file still keeps of
clusters that nothing uses. The first are found by reading; they are freed by the journal, so a crash leaves
an image that reads the same. The second are holes punched into the clean image, where a refcount is 0. A
cluster that a snapshot shares with the disk stays: to free it for one alone would save nothing.

What lies at the end of the file stays there, so the file is as long as before; its holes take no space.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from jqcow import _native
from jqcow.checker.check import check_structure
from jqcow.device.base import has_fixed_size
from jqcow.device.disk import Extent
from jqcow.device.file import FileDevice
from jqcow.disks.chain import Chain, open_disk
from jqcow.disks.image import ImageDisk
from jqcow.disks.policy import FilePolicy, Following
from jqcow.disks.view import FileView
from jqcow.errors import JqcowError
from jqcow.image import Image
from jqcow.image.opening import open as open_image
from jqcow.offline.compare import Progress
from jqcow.offline.diff import changed_extents
from jqcow.ondisk import layout
from jqcow.ondisk.keys import Passphrase, hidden

BUFFER_BYTES = 2 << 20
BLOCK_BYTES = 512

Range = tuple[int, int]
"""Start and end, in bytes."""


@dataclass(frozen=True)
class CompactReport:
    """What was given back, in bytes.

    Attributes:
        zeroed_bytes: of the disk, whose clusters held zeros.
        punched_bytes: of free clusters that the file still kept.
        before_bytes: what the file took of the host.
        after_bytes: what it takes now.
    """

    zeroed_bytes: int
    punched_bytes: int
    before_bytes: int
    after_bytes: int


def compact(
    path: str | os.PathLike[str],
    *,
    allow_files: FilePolicy = False,
    probe: bool = False,
    passphrase: Passphrase | None = None,
    journal_size: int | None = None,
    progress: Progress = lambda done, total: None,
) -> CompactReport:
    """Give back what an image does not need; see the module.

    Args:
        path: the image; a crashed one is recovered first.
        allow_files: whether files may be opened that it names, as in `jqcow.open`.
        probe: tell formats that are not stored by the magic.
        passphrase: of encrypted files.
        journal_size: in bytes, as in `jqcow.open`.
        progress: called with the bytes of the disk that were looked at, and all of them.

    Raises:
        JqcowError: a check finds errors, which are to be repaired first; the image is in use, or damaged.
        OSError: the host failed.
    """
    passphrase = hidden(passphrase)
    before_bytes = _taken(path)
    options: dict[str, Any] = {"allow_files": allow_files, "probe": probe, "passphrase": passphrase}
    options["journal_size"] = journal_size
    with open_image(path, "r+", **options) as image:
        _refuse_errors(image)
        snapshots = [snapshot.id for snapshot in image.snapshots()]
    found = _zero_ranges(path, snapshots, Following(allow_files, probe, passphrase=passphrase), progress)
    with open_image(path, "r+", **options) as image:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        zeroed_bytes = sum(_zero(image, start, end, buffer) for start, end in found)
    punched_bytes = _punch_free(path)
    return CompactReport(zeroed_bytes, punched_bytes, before_bytes, _taken(path))


def _taken(path: str | os.PathLike[str]) -> int:
    return os.stat(path).st_blocks * BLOCK_BYTES


def _refuse_errors(image: Image) -> None:
    report = image.check()
    if report.errors:
        raise JqcowError(f"a check finds {report.errors} errors: {report.findings[0]}; repair them first")


# Zeros of the disk


def _zero_ranges(
    path: str | os.PathLike[str], snapshots: list[str], following: Following, progress: Progress
) -> list[Range]:
    """Return the ranges of whole clusters that could be freed, by reading alone."""
    with ExitStack() as stack:
        disk, *others = (
            stack.enter_context(closing(open_disk(path, "qcow2", snapshot=snapshot, following=following)))
            for snapshot in (None, *snapshots)
        )
        ranges: Iterable[Range] = [(0, disk.size)]
        for other in others:
            changed = ((part.start, part.start + part.length) for part in changed_extents(other, disk))
            ranges = _in_both(ranges, changed)
        found = array("Q")
        progress(0, disk.size)
        for start, end in ranges:
            for first, last in _zeros_within(disk, start, end):
                found.extend((first, last))
            progress(end, disk.size)
        progress(disk.size, disk.size)
    return list(zip(found[::2], found[1::2], strict=True))


def _in_both(one: Iterable[Range], other: Iterable[Range]) -> Iterator[Range]:
    """Yield what two rows of ranges have in common; both rise."""
    first, second = iter(one), iter(other)
    left, right = next(first, None), next(second, None)
    while left is not None and right is not None:
        start, end = max(left[0], right[0]), min(left[1], right[1])
        if start < end:
            yield start, end
        if left[1] <= right[1]:
            left = next(first, None)
        else:
            right = next(second, None)


def _zeros_within(disk: Chain, start: int, end: int) -> Iterator[Range]:
    """Yield the whole clusters of a range that the image keeps, and that read as zeros."""
    top = disk.layers[0]
    if not isinstance(top, ImageDisk):
        raise TypeError("a raw file has no clusters")
    unit = top.area.header.geometry.cluster_bytes
    for extent in disk.extents(end - start, start):
        first = layout.round_up(extent.offset, unit)
        last = extent.end if extent.end == disk.size else extent.end - extent.end % unit
        if extent.depth or first >= last:
            continue
        if extent.kind == "data":
            yield from _zero_runs(disk, first, last, unit)
        elif top.may_keep(extent) and _keeps(top, extent):
            yield first, last


def _keeps(top: ImageDisk, extent: Extent) -> bool:
    return any(part.host_offset is not None for part in top.kept_clusters(extent))


def _zero_runs(disk: Chain, start: int, end: int, unit: int) -> Iterator[Range]:
    buffer = memoryview(bytearray(max(unit, BUFFER_BYTES)))
    for offset in range(start, end, len(buffer)):
        data = buffer[: min(len(buffer), end - offset)]
        disk.read_into(data, offset)
        index, count = 0, len(data) // unit
        while index < count:
            is_zero, length = _native.zero_run(data, index, count, unit)
            if is_zero:
                yield offset + index * unit, offset + (index + length) * unit
            index += length
        if len(data) % unit and _native.is_zero(data[count * unit :]):
            yield offset + count * unit, offset + len(data)


def _zero(image: Image, start: int, end: int, buffer: memoryview) -> int:
    """Free a range if it still reads as zeros; return how many bytes that is."""
    for offset in range(start, end, len(buffer)):
        data = buffer[: min(len(buffer), end - offset)]
        image.pread_into(data, offset)
        if not _native.is_zero(data):
            return 0
    image.write_zeroes(end - start, start)
    return end - start


# Free clusters of the file


def _punch_free(path: str | os.PathLike[str]) -> int:
    """Punch what a clean image keeps of free clusters; return how many bytes that is.

    What a crash undoes of it takes space again, and is as free as before: so nothing is made durable here.
    """
    with closing(FileDevice.open(path, writable=True)) as device:
        view = FileView.of_file(device)
        report = check_structure(view.read, view.size(), reserved=view.reserved)
        if view.journal is not None or report.errors or has_fixed_size(device):
            # Another program was faster, or there is no file to make smaller.
            return 0
        punched_bytes = 0
        for start, end in _free_ranges(view):
            for offset, length in device.data_extents(start, end - start):
                if device.punch(offset, length):
                    punched_bytes += length
        return punched_bytes


def _free_ranges(view: FileView) -> Iterator[Range]:
    """Yield what of the file no refcount counts."""
    unit, order = view.geometry.cluster_bytes, view.header.refcount_order
    reached, end_of_file = 0, view.size()
    for first, refcounts in sorted(view.refcount_blocks()):
        index, count = 0, view.geometry.refcounts_per_cluster
        while index < count:
            used = _native.refcount_find_used(refcounts, order, index, count)
            if used < 0:
                break
            start = min((first + used) * unit, end_of_file)
            if reached < start:
                yield reached, start
            free = _native.refcount_find_zero(refcounts, order, used, count)
            index = count if free < 0 else free
            reached = (first + index) * unit
    if reached < end_of_file:
        yield reached, end_of_file
