"""Protection: a checksum for each unit of the disk, in bitmaps that any program keeps (docs/format).

Three persistent bitmaps:

    jqcow-sums      disabled, one unit / 32: its payload has 4 bytes for each unit, big-endian
    jqcow-changed   enabled, one bit for each unit: what was written since its sum was made
    jqcow-record    disabled: its payload says what the payload of jqcow-sums is

A unit is a cluster, or 16 KiB where clusters are smaller: no bitmap has a granularity below 512 bytes. A sum
is the CRC-32C of what the guest reads of a unit, zeros behind the disk's end, from the last byte to the
first, XOR that of a unit of zeros. So a disk of zeros has sums of zeros, which take no space; and what
another program adds to a disk is right.

From last to first: guests end some blocks with the CRC-32C of them, and the CRC-32C of such a block is the
same whatever is in it. All superblocks of ext4, of any time and place, would have one sum.

Record block, one after the other at multiples of 512 bytes of the payload of jqcow-record::

    Byte  0 - 15:   magic "jqcow-protection"
         16 - 19:   version, 1
         20 - 23:   CRC-32C of the block, with zeros in this field
         24 - 31:   stamp: nanoseconds since 1970, more than in any block before
         32 - 39:   size of the disk in bytes, as the sums were made
         40 - 43:   cluster size, as a power of two in bytes
         44 - 47:   unit, as a power of two in bytes
         48 - 51:   index of the first cluster of sums that the block is about
         52 - 55:   number of clusters of sums it is about, at most 114
    variable:       CRC-32C of each of them, up to the last sum of the disk; all bits of it other, where the
                    cluster was found to be damaged: then its sums are in doubt
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from jqcow import _native
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk.bitmaps import MAX_BITMAP_BYTES, MIN_GRANULARITY_BITS, BitmapEntry
from jqcow.ondisk.layout import MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, SECTOR_BYTES

SUMS, CHANGED, RECORD = "jqcow-sums", "jqcow-changed", "jqcow-record"
NAMES = (SUMS, CHANGED, RECORD)

SUM_BYTES = 4
_SUM_BITS_SHIFT = 5
"""A sum has 32 bits: one bit of its bitmap stands for a unit / 32."""
MIN_UNIT_BITS = MIN_GRANULARITY_BITS + _SUM_BITS_SHIFT
MIN_DISK_BYTES = 1 << 20
"""A record has room in a bitmap of a disk of this size."""

MAGIC = b"jqcow-protection"
VERSION = 1
BLOCK_STRUCT = struct.Struct(">16sIIQQIIII")
BLOCK_BYTES = SECTOR_BYTES
CHECKS_MAX = (BLOCK_BYTES - BLOCK_STRUCT.size) // SUM_BYTES
IN_DOUBT = 0xFFFFFFFF
_CHECK_FIELD = slice(20, 24)
_MAX_RECORD_GRANULARITY_BITS = 24


def unit_bits(cluster_bits: int) -> int:
    """Return the size of a unit as a power of two in bytes."""
    return max(cluster_bits, MIN_UNIT_BITS)


@dataclass(frozen=True)
class Units:
    """How a disk is divided. ``bits`` and ``cluster_bits`` are powers of two in bytes."""

    disk_bytes: int
    cluster_bits: int

    @property
    def bits(self) -> int:
        """The size of a unit."""
        return unit_bits(self.cluster_bits)

    @property
    def unit_bytes(self) -> int:
        """The size of a unit in bytes."""
        return 1 << self.bits

    @property
    def count(self) -> int:
        """How many units there are; the last one may reach past the end of the disk."""
        return -(-self.disk_bytes >> self.bits)

    def length(self, first: int, end: int) -> int:
        """Return how many bytes of the disk units [first, end) are."""
        return min(end << self.bits, self.disk_bytes) - (first << self.bits)

    @property
    def sums_bits(self) -> int:
        """The granularity of jqcow-sums."""
        return self.bits - _SUM_BITS_SHIFT

    @property
    def per_cluster(self) -> int:
        """How many sums a cluster of them has."""
        return (1 << self.cluster_bits) // SUM_BYTES

    @property
    def sum_clusters(self) -> int:
        """How many clusters of sums there are."""
        return -(-self.count // self.per_cluster)

    @property
    def record_bytes(self) -> int:
        """How long the record is."""
        blocks, rest = divmod(self.sum_clusters, CHECKS_MAX)
        return blocks * BLOCK_BYTES + (rest and BLOCK_STRUCT.size + rest * SUM_BYTES)

    @property
    def record_bits(self) -> int:
        """The granularity of a new jqcow-record: coarse, with room for twice the record.

        Twice as much stays enough, however much the disk grows: the bitmap grows with it.
        """
        bits = _MAX_RECORD_GRANULARITY_BITS
        while bits > MIN_GRANULARITY_BITS and self.room(bits) < 2 * self.record_bytes:
            bits -= 1
        return bits

    def room(self, granularity_bits: int) -> int:
        """Return how many whole bytes a bitmap of this granularity has."""
        return self.disk_bytes >> granularity_bits + 3

    def sums_of_cluster(self, index: int) -> tuple[int, int]:
        """Return (first unit, unit behind the last) of a cluster of sums."""
        first = index * self.per_cluster
        return first, min(first + self.per_cluster, self.count)


_zero_sums: dict[int, int] = {}


def reversed_crc(content: bytes) -> int:
    """Return the CRC-32C of bytes from the last to the first."""
    return _native.crc32c(content[::-1])


def sum_of(content: bytes, unit_bytes: int) -> int:
    """Return the sum of a unit; what is missing of it, behind the end of the disk, is zeros."""
    return reversed_crc(content.ljust(unit_bytes, b"\0")) ^ zeros_crc(unit_bytes)


def zeros_crc(unit_bytes: int) -> int:
    """Return the CRC-32C of a unit of zeros."""
    if unit_bytes not in _zero_sums:
        _zero_sums[unit_bytes] = _native.crc32c(bytes(unit_bytes))
    return _zero_sums[unit_bytes]


def unpack_sums(payload: bytes) -> array[int]:
    """Return the sums in a part of the payload of jqcow-sums."""
    return array("I", struct.unpack(f">{len(payload) // SUM_BYTES}I", payload))


def pack_sums(sums: Iterable[int]) -> bytes:
    """Return sums as in the payload of jqcow-sums."""
    found = tuple(sums)
    return struct.pack(f">{len(found)}I", *found)


@dataclass(frozen=True)
class RecordBlock:
    """What a block of the record says; see the top of the file. ``checks`` are of clusters of sums."""

    stamp: int
    disk_bytes: int
    cluster_bits: int
    first: int
    checks: tuple[int, ...]

    @property
    def units(self) -> Units:
        """How the disk was divided that the block is about."""
        return Units(self.disk_bytes, self.cluster_bits)

    def pack(self) -> bytes:
        """Return the block as on disk."""
        block = bytearray(
            BLOCK_STRUCT.pack(
                MAGIC,
                VERSION,
                0,
                self.stamp,
                self.disk_bytes,
                self.cluster_bits,
                unit_bits(self.cluster_bits),
                self.first,
                len(self.checks),
            )
            + pack_sums(self.checks)
        )
        block[_CHECK_FIELD] = _native.crc32c(bytes(block)).to_bytes(4, "big")
        return bytes(block)

    @classmethod
    def unpack(cls, data: bytes) -> RecordBlock | None:
        """Return the block that data begins with, None if it is none.

        Raises:
            UnsupportedFeatureError: it is one of a newer version.
        """
        if len(data) < BLOCK_STRUCT.size or not data.startswith(MAGIC):
            return None
        _, version, crc, stamp, size, cluster_bits, bits, first, count = BLOCK_STRUCT.unpack_from(data)
        length = BLOCK_STRUCT.size + count * SUM_BYTES
        if count > CHECKS_MAX or length > len(data):
            return None
        block = bytearray(data[:length])
        block[_CHECK_FIELD] = bytes(4)
        if _native.crc32c(bytes(block)) != crc:
            return None
        if version != VERSION:
            raise UnsupportedFeatureError(f"protection of version {version}")
        if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS or bits != unit_bits(cluster_bits):
            return None
        units = Units(size, cluster_bits)
        if units.count * SUM_BYTES > MAX_BITMAP_BYTES or first + count > units.sum_clusters:
            return None
        return cls(stamp, size, cluster_bits, first, tuple(unpack_sums(data[BLOCK_STRUCT.size : length])))


@dataclass(frozen=True)
class Record:
    """The whole record: the check of each cluster of sums, None where the record is damaged."""

    stamp: int
    units: Units
    checks: tuple[int | None, ...]

    @classmethod
    def blank(cls, units: Units, stamp: int) -> Record:
        """Return that of a disk of zeros."""
        counts = (units.sums_of_cluster(index) for index in range(units.sum_clusters))
        checks = tuple(_native.crc32c(bytes((end - first) * SUM_BYTES)) for first, end in counts)
        return cls(stamp, units, checks)

    @classmethod
    def of_blocks(cls, blocks: Iterable[RecordBlock], cluster_bits: int) -> Record | None:
        """Put blocks together, those that say the most recent size; None if there is none.

        The newer one of two that are about the same clusters counts.
        """
        found = sorted(
            (block for block in blocks if block.cluster_bits == cluster_bits), key=lambda block: block.stamp
        )
        if not found:
            return None
        units = found[-1].units
        checks: dict[int, int] = {}
        for block in found:
            if block.disk_bytes == units.disk_bytes:
                checks.update(enumerate(block.checks, block.first))
        return cls(found[-1].stamp, units, tuple(checks.get(index) for index in range(units.sum_clusters)))

    @classmethod
    def unpack(cls, payload: bytes, cluster_bits: int) -> Record | None:
        """Return the record in the payload of jqcow-record, None if there is none.

        Raises:
            UnsupportedFeatureError: it is one of a newer version.
        """
        starts = range(0, len(payload), BLOCK_BYTES)
        found = (RecordBlock.unpack(payload[start : start + BLOCK_BYTES]) for start in starts)
        return cls.of_blocks((block for block in found if block is not None), cluster_bits)

    def blocks(self) -> Iterator[bytes]:
        """Yield the blocks as on disk. What is not known of a cluster is written as 0."""
        for index in range(-(-len(self.checks) // CHECKS_MAX)):
            checks = tuple(check or 0 for check in self.block_checks(index))
            units = self.units
            first = index * CHECKS_MAX
            yield RecordBlock(self.stamp, units.disk_bytes, units.cluster_bits, first, checks).pack()

    def block_checks(
        self, index: int, checks: tuple[int | None, ...] | None = None
    ) -> tuple[int | None, ...]:
        """Return the part of the checks, or of others, that the block of an index says."""
        first = index * CHECKS_MAX
        return (self.checks if checks is None else checks)[first : first + CHECKS_MAX]

    def with_checks(self, changed: dict[int, int], stamp: int) -> Record:
        """Return the record with other checks, by index."""
        checks = tuple(changed.get(index, check) for index, check in enumerate(self.checks))
        return replace(self, stamp=stamp, checks=checks)


def fault_of(entries: dict[str, BitmapEntry], units: Units) -> str:
    """Return why bitmaps are not those of a protection, in words, "" if they are."""
    missing = [name for name in NAMES if name not in entries]
    if missing:
        return f"there is no bitmap {missing[0]}"
    for name in NAMES:
        if entries[name].is_in_use:
            return f"a program that wrote to the image did not close it: bitmap {name} is in use"
        if entries[name].is_enabled != (name == CHANGED):
            return f"bitmap {name} is {'enabled' if entries[name].is_enabled else 'disabled'}"
    granularity = {SUMS: units.sums_bits, CHANGED: units.bits}
    for name, bits in granularity.items():
        if entries[name].granularity_bits != bits:
            return f"bitmap {name} has a granularity of {entries[name].granularity} bytes"
    if units.room(entries[RECORD].granularity_bits) < units.record_bytes:
        return f"bitmap {RECORD} has no room for the record"
    return ""
