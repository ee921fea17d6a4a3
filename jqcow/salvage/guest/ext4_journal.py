"""The journal of an ext4 (jbd2): which copies of metadata it holds. All numbers are big-endian.

What lies in the journal looks like what lies at home. The descriptors tell for each copy its home and, with
checksums, what its bytes are: so copies are counted, and what is more than the journal has is at home.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from jqcow import _native
from jqcow.salvage.guest import crc_inverse
from jqcow.salvage.guest.ext4_ondisk import raw

DESCRIPTOR, COMMIT, SUPERBLOCK_OLD, SUPERBLOCK, REVOKE = 1, 2, 3, 4, 5
WIDE, CSUM_V2, CSUM_V3 = 0x2, 0x8, 0x10
_SAME_UUID, _LAST = 0x2, 0x8


@dataclass(frozen=True)
class JournalSuperblock:
    """The first block of the journal.

    ::

        Byte 0x00  magic, type 4, sequence   0x0C  bytes of a block   0x10  blocks   0x14  first of the log
             0x18  first sequence number   0x1C  where it starts, 0 when the log is empty
             0x28  incompatible features   0x30  UUID   0x58  where an empty log goes on
    """

    blocks: int
    first: int
    sequence: int
    start: int
    incompat: int
    uuid: bytes
    head: int

    @classmethod
    def unpack(cls, data: bytes) -> JournalSuperblock | None:
        """Return the superblock that the bytes hold; None where they hold none."""
        if len(data) < 1024:
            return None
        _, kind, _, block_bytes, blocks, first, sequence, start = struct.unpack_from(">8I", data)
        if kind != SUPERBLOCK or block_bytes != len(data) or not 0 < first < blocks:
            return None
        incompat, head = int.from_bytes(data[0x28:0x2C]), int.from_bytes(data[0x58:0x5C])
        return cls(blocks, first, sequence, start, incompat, data[0x30:0x40], head)


@dataclass(frozen=True)
class Copy:
    """A copy that a descriptor promises in a block of the journal.

    Attributes:
        home: block of the volume that was copied.
        sequence: number of the transaction.
        alone: of the copy's bytes, as `crc_inverse.alone` counts it; None without checksums.
    """

    home: int
    sequence: int
    alone: int | None


def copies(data: bytes, journal: JournalSuperblock) -> Iterator[Copy]:
    """Yield what a descriptor block promises in the blocks behind it, in order."""
    sequence = int.from_bytes(data[8:12])
    end = len(data) - (4 if journal.incompat & (CSUM_V2 | CSUM_V3) else 0)
    seed = _native.crc32c(journal.uuid)
    summed = raw(_native.crc32c(b"\0\0\0\0", _native.crc32c(data[:end], seed)))
    if end < len(data) and summed != int.from_bytes(data[end:]):
        return
    of_sequence = raw(_native.crc32c(data[8:12], seed))
    before = crc_inverse.forward(len(data))(of_sequence)
    at = 12
    while True:
        length, home, flags, checksum = _tag(data, at, journal.incompat)
        if at + length > end:
            return
        yield Copy(home, sequence, None if checksum is None else checksum ^ before)
        at += length + (0 if flags & _SAME_UUID else 16)
        if flags & _LAST:
            return


def _tag(data: bytes, at: int, incompat: int) -> tuple[int, int, int, int | None]:
    """Return length, home, flags and checksum of a tag: 8, 12, 14 or 16 bytes, as the features say."""
    words = data[at : at + 16].ljust(16, b"\0")
    home, second, high, checksum = struct.unpack(">4I", words)
    if incompat & CSUM_V3:
        return 16, home | high << 32, second, checksum
    length = 8 + (2 if incompat & CSUM_V2 else 0) + (4 if incompat & WIDE else 0)
    return length, home | (high << 32 if incompat & WIDE else 0), second & 0xFFFF, None


class Log:
    """What the journal's descriptors that were found say, all together."""

    def __init__(self) -> None:
        self._by_home: dict[int, list[Copy]] = {}
        self._described: set[int] = set()
        self._committed: set[int] = set()
        self._crowded = -1
        self._expected = -1
        self._placed: Counter[int] = Counter()
        self._unbroken_from = self._strictly_from = 0

    def add(self, data: bytes, journal: JournalSuperblock) -> list[Copy]:
        """Take a descriptor block in, and return what it promises."""
        found = list(copies(data, journal))
        for copy in found:
            self._by_home.setdefault(copy.home, []).append(copy)
            self._described.add(copy.sequence)
        if len(found) >= len(data) // 32:
            self._crowded = max(self._crowded, found[0].sequence)
        return found

    def commit(self, sequence: int) -> None:
        """Take note of a transaction whose end was found."""
        self._committed.add(sequence)

    def expect(self, sequence: int) -> None:
        """Take note of a transaction that was the last, found or not."""
        self._expected = max(self._expected, sequence)

    def of(self, home: int) -> list[Copy]:
        """Return the copies of a block that the journal has or had."""
        return self._by_home.get(home, [])

    def settle(self) -> None:
        """Find, when all was taken in, from which sequence number on no transaction is missing.

        A transaction without a descriptor is empty, or its descriptor was not found: strictly, it is missing.
        """
        found = self._described | self._committed
        last = max(found, default=0)
        self._unbroken_from = _run_start(last, found)
        self._strictly_from = _run_start(max(last, self._expected), self._described)

    def unbroken_from(self, strictly: bool = False) -> int:
        """Return the sequence number from which on no transaction is missing, as of `settle`."""
        return max(self._strictly_from, self._crowded + 1) if strictly else self._unbroken_from

    def newest(self, home: int, strictly: bool = False) -> int | None:
        """Return what the last copy of a block holds; None where a newer one may have been.

        Args:
            home: the block.
            strictly: whether descriptors may be missing: also of transactions with so many copies that they
                may have had more than one.
        """
        last = max(self.of(home), key=lambda copy: copy.sequence, default=None)
        return last.alone if last and last.sequence >= self.unbroken_from(strictly) else None

    def promised(self, home: int, alone: int | None) -> int:
        """Return how many copies of a block have this content; how many there are, for None."""
        return sum(alone is None or copy.alone == alone for copy in self.of(home))

    def take_placed(self, alone: int) -> None:
        """Take note of a block whose place in the journal is known: it is no orphan."""
        self._placed[alone] += 1

    def placed(self, alone: int) -> int:
        """Return how many blocks with a content are placed in the journal."""
        return self._placed[alone]


def _run_start(number: int, found: set[int]) -> int:
    while number in found:
        number -= 1
    return number + 1
