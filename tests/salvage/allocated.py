"""Where the files of a file system lie on its disk, by the kernel: what a user misses when it is gone."""

from __future__ import annotations

import array
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from tests.salvage.foreign import looped, run, unmount

FS_IOC_FIEMAP = 0xC020660B
FIBMAP = 1
EXTENT = struct.Struct("=QQQQQIIII")
REQUEST = struct.Struct("=QQIIII")
COUNT = 500
LAST = 1
UNKNOWN = 0x02
ENCODED = 0x08
INLINE = 0x200
TAIL = 0x400
UNWRITTEN = 0x800
NOT_ON_DISK = UNKNOWN | ENCODED | INLINE | TAIL | UNWRITTEN
BLOCK_BYTES = 4096


def files_of(disk: Path, kind: str, folder: Path, offset: int = 0) -> list[tuple[int, int]]:
    """Return (offset, length) in bytes, on a raw disk, of all extents of all its files."""
    point = folder / "looked-at"
    point.mkdir(exist_ok=True)
    found: list[tuple[int, int]] = []
    # What is mounted may be written to: a copy is.
    copy = folder / "looked-at.raw"
    run("cp", "--sparse=always", disk, copy)
    with looped(copy) as device:
        chunks = _chunks(device) if kind == "btrfs" else []
        if kind == "ntfs":
            run("ntfs-3g", "-o", "ro", device, point)
        else:
            run("mount", "-t", kind, device, point)
        try:
            for path in sorted(point.rglob("*")):
                if not path.is_symlink() and path.is_file():
                    extents = _by_block(path) if kind == "ntfs" else _by_extent(path)
                    found += [(_physical(place, chunks) + offset, length) for place, length in extents]
        finally:
            unmount(point)
    copy.unlink()
    return sorted(found)


def _by_extent(path: Path) -> Iterator[tuple[int, int]]:
    start, descriptor = 0, os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    try:
        while True:
            asked = REQUEST.pack(start, (1 << 64) - 1 - start, 0, 0, COUNT, 0)
            answer = bytearray(asked + bytes(EXTENT.size * COUNT))
            fcntl.ioctl(descriptor, FS_IOC_FIEMAP, answer)
            count = REQUEST.unpack_from(answer)[3]
            for number in range(count):
                logical, physical, length, *_, flags, _, _, _ = EXTENT.unpack_from(
                    answer, REQUEST.size + number * EXTENT.size
                )
                if not flags & NOT_ON_DISK and logical < size:
                    yield physical, min(length, size - logical)
                start = logical + length
                if flags & LAST:
                    return
            if not count:
                return
    finally:
        os.close(descriptor)


def _by_block(path: Path) -> Iterator[tuple[int, int]]:
    """Yield blocks, as FIBMAP knows them: of ntfs-3g, which has no extents to show."""
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    try:
        for start in range(0, size, BLOCK_BYTES):
            number = array.array("i", [start // BLOCK_BYTES])
            try:
                fcntl.ioctl(descriptor, FIBMAP, number)
            except OSError:  # a file that lies within its record
                return
            if number[0]:
                yield number[0] * BLOCK_BYTES, min(BLOCK_BYTES, size - start)
    finally:
        os.close(descriptor)


def _chunks(device: str) -> list[tuple[int, int, int]]:
    """Return (logical address, length, place on the disk) of the chunks of a btrfs."""
    told = run("btrfs", "inspect-internal", "dump-tree", "-t", "chunk", device)
    found = []
    for part in told.split("CHUNK_ITEM ")[1:]:
        logical, length, place = (
            int(one[1])
            for one in (
                re.match(r"(\d+)", part),
                re.search(r"length (\d+)", part),
                re.search(r"stripe 0 devid \d+ offset (\d+)", part),
            )
            if one
        )
        found.append((logical, length, place))
    return found


def _physical(address: int, chunks: list[tuple[int, int, int]]) -> int:
    for logical, length, place in chunks:
        if logical <= address < logical + length:
            return address - logical + place
    return address
