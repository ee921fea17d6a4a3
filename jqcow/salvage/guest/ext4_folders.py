"""Directories of ext4 with an index: the hashes of the names in a block tell which block it is.

The index starts in a directory's first block: a sorted list of (least hash, block in the directory). It names
the blocks with the names, or further blocks with such lists.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from jqcow.salvage.guest.ext4_ondisk import Inode, Superblock
from jqcow.salvage.guest.ext4_volume import Volume4

HALF_MD4 = 1
UNSIGNED_HASHES = 0x2
"""Flag of the superblock: bytes of names above 127 are not negative."""
INDEX_LEVELS_MAX = 3
_WORD = 0xFFFF_FFFF


@dataclass
class Folder:
    """Where the blocks of a directory are to be.

    Attributes:
        first: its first block; None when not known.
        rest: (first block of the volume, how many) of the others.
        leaves: (least hash, block of the volume) of the blocks with names, in order; empty without index.
        nodes: the same of the blocks of the index.
    """

    first: int | None = None
    rest: list[tuple[int, int]] = field(default_factory=list)
    leaves: list[tuple[int, int]] = field(default_factory=list)
    nodes: list[tuple[int, int]] = field(default_factory=list)

    def block_of(self, least: int, most: int, of_index: bool) -> int | None:
        """Return the only block that may have hashes from the least to the most; None where none, or more."""
        listed = self.nodes if of_index else self.leaves
        last = bisect_right(listed, (least | 1, 1 << 62)) - 1
        first = bisect_left(listed, (most & ~1, 0)) - 1
        fitting = {
            listed[index][1]
            for index in {first, first + 1, last - 1, last}
            if 0 <= index < len(listed)
            and listed[index][0] & ~1 <= least
            and (index + 1 == len(listed) or most <= listed[index + 1][0])
        }
        return fitting.pop() if len(fitting) == 1 else None


def folder(volume: Volume4, inode: Inode) -> Folder:
    """Return where a directory's blocks are, with its index as far as that is placed."""
    found = Folder()
    runs = list(volume.directory_runs(inode))
    for logical, start, count in runs:
        skipped = int(logical == 0)
        if skipped:
            found.first = start
        if count > skipped:
            found.rest.append((start + skipped, count - skipped))
    root = None if found.first is None or not found.rest else volume.read(found.first)
    if root is not None and root[24:28] == b"\0\0\0\0" and root[28:30] == b"\x01\x08":
        _Index(volume, runs, found).take(root, 32, min(root[30], INDEX_LEVELS_MAX), 0)
    found.leaves.sort()
    found.nodes.sort()
    return found


class _Index:
    """Walks the index of a directory, no block of it twice."""

    def __init__(self, volume: Volume4, runs: list[tuple[int, int, int]], found: Folder) -> None:
        self._volume = volume
        self._runs = sorted(runs)
        self._found = found
        self._named: set[int] = set()

    def take(self, data: bytes, at: int, levels: int, least: int) -> None:
        """Take a list in."""
        for hash_, logical in entries(data, at):
            index = bisect_right(self._runs, (logical, 1 << 62)) - 1
            first, start, count = self._runs[index] if index >= 0 else (0, 0, 0)
            block, low = start + logical - first, max(hash_, least)
            if logical - first >= count or block in self._named:
                continue
            self._named.add(block)
            if not levels:
                self._found.leaves.append((low, block))
                continue
            self._found.nodes.append((low, block))
            below = self._volume.read(block)
            if below is not None:
                self.take(below, 8, levels - 1, low)


def entries(data: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Yield (least hash, block in the directory) of a list in the index; the first has no hash of its own."""
    limit, count, block = struct.unpack_from("<HHI", data, at)
    if not 0 < count <= limit or at + 8 * limit > len(data):
        return
    yield 0, block
    yield from struct.iter_unpack("<II", data[at + 8 : at + 8 * count])


def hash_range(superblock: Superblock, data: bytes) -> tuple[int, int] | None:
    """Return the least and the greatest hash of the names in a block, or in a list; None without any."""
    if data[:8] == struct.pack("<IHH", 0, len(data) & 0xFFFF, 0):
        hashes = [hash_ for hash_, _ in entries(data, 8)][1:]
    else:
        hashes = [half_md4(name, superblock) for name in _names(data)]
    return (min(hashes), max(hashes)) if hashes else None


def _names(data: bytes) -> Iterator[bytes]:
    at = 0
    while at + 12 <= len(data):
        inode, length, name_length = struct.unpack_from("<IHB", data, at)
        if length < 12 or at + length > len(data) or 8 + name_length > length:
            return
        if inode and name_length:
            yield data[at + 8 : at + 8 + name_length]
        at += length


def half_md4(name: bytes, superblock: Superblock) -> int:
    """Return the hash of a name by which directories are sorted: three short rounds like those of MD4."""
    state = list(superblock.hash_seed)
    if not any(state):
        state = [0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476]
    is_signed = not superblock.flags & UNSIGNED_HASHES
    for start in range(0, len(name), 32):
        words = _words(name[start:], is_signed)
        state = [(old + new) & _WORD for old, new in zip(state, _rounds(state, words), strict=True)]
    found = state[1] & ~1
    return found if found != 0xFFFF_FFFE else 0xFFFF_FFFC


def _words(name: bytes, is_signed: bool) -> list[int]:
    """Return eight words of a name; what it is too short for is filled with its length."""
    filling = (len(name) & 255) * 0x0101_0101
    words = []
    for start in range(0, 32, 4):
        word = filling
        for byte in name[start : min(start + 4, 32)]:
            word = (byte - (256 if is_signed and byte > 127 else 0) + (word << 8)) & _WORD
        words.append(word)
    return words


_ORDERS = (
    ((0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19), 0),
    ((1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13), 0x5A827999),
    ((3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15), 0x6ED9EBA1),
)


def _rounds(state: list[int], words: list[int]) -> list[int]:
    a, b, c, d = state
    for number, (order, shifts, constant) in enumerate(_ORDERS):
        for step, index in enumerate(order):
            if number == 0:
                mixed = d ^ (b & (c ^ d))
            elif number == 1:
                mixed = (b & c) + ((b ^ c) & d)
            else:
                mixed = b ^ c ^ d
            total = (a + mixed + words[index] + constant) & _WORD
            shift = shifts[step % 4]
            a, b, c, d = d, (total << shift | total >> (32 - shift)) & _WORD, b, c
    return [a, b, c, d]
