"""The independent checker: does every cluster's refcount equal the references to it?

It judges the engine, so it shares nothing with it but the on-disk structures. It reads an image through
a function, walks every table and counts the references to every cluster, then compares them with the
refcounts. An image with a live journal is checked through a function that shows it as replayed.

The numbers are those of ``qemu-img check``: the same damage gives the same ``corruptions`` and ``leaks``.
It is stricter in four points, which count as ``errors`` (or leaks) but not as QEMU's corruptions:

- metadata and something else share a cluster, with refcounts that allow it;
- an entry points into a reserved range (the journal);
- the L1 table is too small for the disk (QEMU does not open the image);
- a refcount past the end of the file is a leak.

Time and memory are bounded by the file's size and the tables' limits: a table that is pointed to many
times is walked once.
"""

from __future__ import annotations

import enum
import mmap
import struct
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jqcow import _native
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk import entries
from jqcow.ondisk.header import (
    AUTOCLEAR_BITMAPS,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_EXTENDED_L2,
    INCOMPATIBLE_EXTERNAL_DATA,
    INCOMPATIBLE_JOURNAL,
    Header,
)
from jqcow.ondisk.layout import ENTRY_BYTES, SECTOR_BYTES

Read = Callable[[int, int], bytes]
"""Reads (length, offset) in bytes from the image file; what lies past its end reads as zeros."""

MAX_CLUSTERS = 1 << 28
"""The largest file, in clusters, that is checked: 16 TiB with clusters of 64 KiB. It bounds memory."""

KEPT_FINDINGS = 100

_CHECKED_FEATURES = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_COMPRESSION
_REFUSED_FEATURES = {
    INCOMPATIBLE_JOURNAL: "a live journal (it must be replayed first)",
    INCOMPATIBLE_EXTERNAL_DATA: "an external data file",
    INCOMPATIBLE_EXTENDED_L2: "extended L2 entries",
}

_GROUP_BYTES = SECTOR_BYTES
_GROUP_STRUCT = struct.Struct(f">{_GROUP_BYTES // ENTRY_BYTES}Q")
_ZERO_GROUP = bytes(_GROUP_BYTES)
_COMPARED_CLUSTERS = 8192
_LAZY_BYTES = 1 << 20
_Code = Literal["B", "H", "I", "Q"]
_REFCOUNT_CODES: dict[int, _Code] = {3: "B", 4: "H", 5: "I", 6: "Q"}


class Kind(enum.StrEnum):
    """What is wrong; the values are for people and JSON."""

    LEAK = "leak"
    LEAK_PAST_END = "leak past the end of the file"
    REFCOUNT_TOO_LOW = "refcount too low"
    COPIED_FLAG = "wrong COPIED flag"
    PAST_END = "past the end of the file"
    UNALIGNED = "unaligned offset"
    RESERVED_BITS = "reserved bits set"
    OVERLAP = "overlap"
    RESERVED_RANGE = "entry into a reserved range"
    L1_TOO_SMALL = "L1 table too small"


_LEAKS = (Kind.LEAK, Kind.LEAK_PAST_END)
_STRICTER = (*_LEAKS, Kind.OVERLAP, Kind.RESERVED_RANGE, Kind.L1_TOO_SMALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    ``structure`` names what holds the wrong value, in the specification's words; ``offset`` is its host
    offset in bytes (of the entry in a table, of the cluster for a leak or a wrong refcount).
    """

    kind: Kind
    structure: str
    offset: int
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.structure} at {self.offset:#x}: {self.detail}"


@dataclass(frozen=True)
class CheckReport:
    """What a check found. The numbers of clusters are those of ``qemu-img check``.

    Attributes:
        counts: how many findings there are of each kind that was found.
        findings: the first of them, at most KEPT_FINDINGS.
        image_end_offset: end in bytes of the last cluster with a refcount or a reference.
        total_clusters: guest clusters of the virtual disk.
        allocated_clusters: guest clusters with a host cluster or compressed data.
        fragmented_clusters: those of them that do not follow the one before on the host.
        compressed_clusters: guest clusters with compressed data.
        zero_clusters: guest clusters whose entry says that they read as zeros.
    """

    counts: dict[Kind, int]
    findings: tuple[Finding, ...]
    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    zero_clusters: int

    @property
    def leaks(self) -> int:
        """Clusters whose refcount is higher than the references to it: space lost, no harm to data."""
        return sum(self.counts.get(kind, 0) for kind in _LEAKS)

    @property
    def errors(self) -> int:
        """Everything wrong that is not a leak."""
        return sum(self.counts.values()) - self.leaks

    @property
    def corruptions(self) -> int:
        """The errors that ``qemu-img check`` has a notion of."""
        return sum(count for kind, count in self.counts.items() if kind not in _STRICTER)

    @property
    def ok(self) -> bool:
        """True if nothing at all was found, not even a leak."""
        return not self.counts


def check_structure(read: Read, file_bytes: int, *, reserved: Sequence[tuple[int, int]] = ()) -> CheckReport:
    """Check the tables and refcounts of an image.

    Args:
        read: reads (length, offset) in bytes from the image file.
        file_bytes: length of the image file.
        reserved: ranges (offset, length) in bytes that nothing may use, as the journal's.

    Raises:
        FormatError: not a qcow2 image, or a header that breaks the specification.
        CorruptionError: the header places a table where none can be.
        UnsupportedFeatureError: a feature that the checker does not know, or a file of too many clusters.
    """
    header = Header.unpack(read(min(file_bytes, SECTOR_BYTES), 0))
    header.validate()
    _refuse_unknown(header)
    return _Check(read, header, file_bytes, reserved).run()


def _refuse_unknown(header: Header) -> None:
    """Refuse what would make the walk miss references."""
    unknown = header.incompatible_features & ~_CHECKED_FEATURES
    for feature, name in _REFUSED_FEATURES.items():
        if unknown & feature:
            raise UnsupportedFeatureError(name, "the checker does not know it")
    if unknown:
        raise UnsupportedFeatureError(f"incompatible features {unknown:#x}")
    if header.nb_snapshots:
        raise UnsupportedFeatureError("internal snapshots", "the checker does not know them")
    if header.crypt_method:
        raise UnsupportedFeatureError("encryption", "the checker does not know it")
    if header.autoclear_features & AUTOCLEAR_BITMAPS:
        raise UnsupportedFeatureError("persistent bitmaps", "the checker does not know them")


@dataclass
class _Findings:
    """Counts all findings and keeps the first."""

    counts: Counter[Kind] = field(default_factory=Counter)
    kept: list[Finding] = field(default_factory=list)

    def add(self, kind: Kind, structure: str, offset: int, detail: str, count: int = 1) -> None:
        self.counts[kind] += count
        if len(self.kept) < KEPT_FINDINGS:
            self.kept.append(Finding(kind, structure, offset, detail))


class _Check:
    """One walk through an image.

    Metadata is claimed first, each cluster by the structure that owns it; then the L2 tables are
    walked, so that an entry that points into metadata is seen.
    """

    def __init__(
        self, read: Read, header: Header, file_bytes: int, reserved: Sequence[tuple[int, int]]
    ) -> None:
        self.read = read
        self.header = header
        self.geometry = header.geometry
        self.cluster_bits = header.cluster_bits
        self.cluster_bytes = 1 << header.cluster_bits
        # As in QEMU, the last cluster may be cut short by the end of the file.
        self.cluster_count = self.geometry.clusters(file_bytes)
        if self.cluster_count > MAX_CLUSTERS:
            raise UnsupportedFeatureError(f"an image file of {self.cluster_count} clusters")
        self.file_bytes = file_bytes
        self.reserved = [
            (offset >> self.cluster_bits, self.geometry.clusters(offset + length))
            for offset, length in reserved
        ]
        self.count_code: _Code = "Q" if header.refcount_order > 5 else "I"
        self.count_limit = (1 << 8 * array(self.count_code).itemsize) - 1
        self.references = _zeroed(self.count_code, self.cluster_count)
        self.refcounts = _zeroed(_REFCOUNT_CODES.get(header.refcount_order, "B"), self.cluster_count)
        self.blocks: dict[int, int] = {}
        self.owners: dict[int, str] = {}
        self.findings = _Findings()
        self.allocated = self.fragmented = self.compressed = self.zeros = 0

    def run(self) -> CheckReport:
        """Walk everything, compare, and report."""
        header = self.header
        self.claim("header", 0, self.cluster_bytes, "header", 0)
        self.walk_refcount_table()
        for table, repeats in self.walk_l1_table().items():
            self.walk_l2_table(table, repeats)
        self.compare()
        return CheckReport(
            counts=dict(self.findings.counts),
            findings=tuple(self.findings.kept),
            image_end_offset=self.image_end_cluster() << self.cluster_bits,
            total_clusters=self.geometry.clusters(header.size),
            allocated_clusters=self.allocated,
            fragmented_clusters=self.fragmented,
            compressed_clusters=self.compressed,
            zero_clusters=self.zeros,
        )

    def claim(
        self, owner: str, offset: int, length: int, source: str, source_offset: int, count: int = 1
    ) -> bool:
        """Count ``count`` references to the clusters of a metadata structure, and note their owner.

        ``source`` at ``source_offset`` is what points to it. Returns False, having counted nothing, if
        the structure reaches past the end of the file.
        """
        if not length:
            return True
        first = offset >> self.cluster_bits
        last = (offset + length - 1) >> self.cluster_bits
        if last >= self.cluster_count:
            self.findings.add(Kind.PAST_END, source, source_offset, f"{owner} at {offset:#x}", count)
            return False
        for cluster in range(first, last + 1):
            other = self.owners.setdefault(cluster, owner)
            if self.references[cluster]:
                place = cluster << self.cluster_bits
                self.findings.add(Kind.OVERLAP, owner, place, f"the cluster is also in use as {other}")
            self.refer(cluster, source, source_offset, count)
        return True

    def refer(self, cluster: int, source: str, source_offset: int, count: int) -> None:
        """Count references to a cluster inside the file."""
        # Saturates: a hostile table can be pointed to often enough to overflow the counter.
        self.references[cluster] = min(self.references[cluster] + count, self.count_limit)
        for first, end in self.reserved:
            if first <= cluster < end:
                detail = f"it points to {cluster << self.cluster_bits:#x}"
                self.findings.add(Kind.RESERVED_RANGE, source, source_offset, detail, count)

    def walk_refcount_table(self) -> None:
        """Claim the refcount table and its blocks, and load the refcounts of the file's clusters."""
        header = self.header
        length = header.refcount_table_clusters << self.cluster_bits
        # A table that reaches past the end of the file is one error; what there is of it still counts.
        self.claim("refcount table", header.refcount_table_offset, length, "header", 48)
        table = self.read(length, header.refcount_table_offset)
        seen_past_end: set[int] = set()
        for index, entry in _nonzero_entries(table):
            place = header.refcount_table_offset + index * ENTRY_BYTES
            block = entry & entries.REFCOUNT_TABLE_OFFSET_MASK
            if entry & entries.REFCOUNT_TABLE_RESERVED:
                self.findings.add(Kind.RESERVED_BITS, "refcount table entry", place, f"{entry:#018x}")
            if block & (self.cluster_bytes - 1):
                self.findings.add(Kind.UNALIGNED, "refcount table entry", place, f"{entry:#018x}")
            elif block and self.claim(
                "refcount block", block, self.cluster_bytes, "refcount table entry", place
            ):
                self.blocks[index] = block
                self.load_refcounts(index, block, seen_past_end)

    def load_refcounts(self, index: int, block: int, seen_past_end: set[int]) -> None:
        """Read one refcount block; a refcount past the end of the file is a leak."""
        first = index * self.geometry.refcounts_per_cluster
        inside = min(max(self.cluster_count - first, 0), self.geometry.refcounts_per_cluster)
        if not inside and block in seen_past_end:
            return
        seen_past_end.add(block)
        data = self.read(self.cluster_bytes, block)
        order = self.header.refcount_order
        if inside:
            inside_bytes = (inside << order) + 7 >> 3
            self.refcounts[first : first + inside] = _decode_refcounts(data[:inside_bytes], order)[:inside]
        whole_bytes, bits = divmod(inside << order, 8)
        outside = bytearray(data[whole_bytes:])
        if bits:
            # The last byte also holds refcounts of clusters inside the file.
            outside[0] &= 0xFF << bits & 0xFF
        if not _native.is_zero(outside):
            self.report_leaks_past_end(first + (whole_bytes << 3 >> order), outside)

    def report_leaks_past_end(self, first: int, data: bytes | bytearray) -> None:
        """Report the nonzero refcounts in ``data``, which starts with that of cluster ``first``."""
        for cluster, refcount in enumerate(_decode_refcounts(data, self.header.refcount_order), first):
            if refcount:
                detail = f"refcount {refcount} of a cluster past the end of the file"
                place = cluster << self.cluster_bits
                self.findings.add(Kind.LEAK_PAST_END, "cluster", place, detail)

    def walk_l1_table(self) -> Counter[int]:
        """Claim the L1 table and the L2 tables; return how often each L2 table is pointed to."""
        header = self.header
        offset = header.l1_table_offset
        if header.l1_size < self.geometry.l1_entries_for(header.size):
            self.findings.add(Kind.L1_TOO_SMALL, "header", 36, f"{header.l1_size} entries")
        pointers: Counter[int] = Counter()
        places: dict[int, int] = {}
        length = header.l1_size * ENTRY_BYTES
        self.claim("L1 table", offset, length, "header", 40)
        for index, entry in _nonzero_entries(self.read(length, offset)):
            place = offset + index * ENTRY_BYTES
            table = entry & entries.OFFSET_MASK
            if entry & entries.L1_RESERVED:
                self.findings.add(Kind.RESERVED_BITS, "L1 entry", place, f"{entry:#018x}")
            if table & (self.cluster_bytes - 1):
                self.findings.add(Kind.UNALIGNED, "L1 entry", place, f"{entry:#018x}")
                continue
            if not table:
                if entry & entries.COPIED:
                    self.findings.add(Kind.COPIED_FLAG, "L1 entry", place, "COPIED without an L2 table")
                continue
            self.check_copied("L1 entry", place, entry, table >> self.cluster_bits, 1)
            pointers[table] += 1
            places.setdefault(table, place)
        return Counter(
            {
                table: count
                for table, count in pointers.items()
                if self.claim("L2 table", table, self.cluster_bytes, "L1 entry", places[table], count)
            }
        )

    def walk_l2_table(self, offset: int, repeats: int) -> None:
        """Check one L2 table that ``repeats`` L1 entries point to."""
        following = 0
        reserved = entries.L2_RESERVED | (entries.ZERO if self.header.version == 2 else 0)
        unaligned = self.cluster_bytes - 1
        for index, entry in _nonzero_entries(self.read(self.cluster_bytes, offset)):
            place = offset + index * ENTRY_BYTES
            if entry & entries.COMPRESSED:
                self.check_compressed(place, entry, repeats)
                continue
            if entry & reserved:
                self.findings.add(Kind.RESERVED_BITS, "L2 entry", place, f"{entry:#018x}", repeats)
            if entry & entries.ZERO:
                self.zeros += repeats
            host = entry & entries.OFFSET_MASK
            if not host:
                continue
            self.allocated += repeats
            if following and host != following:
                self.fragmented += repeats
            following = host + self.cluster_bytes
            if host & unaligned:
                self.findings.add(Kind.UNALIGNED, "L2 entry", place, f"{entry:#018x}", repeats)
                continue
            cluster = host >> self.cluster_bits
            self.check_copied("L2 entry", place, entry, cluster, repeats)
            self.refer_data(place, cluster, f"data at {host:#x}", repeats)

    def check_compressed(self, place: int, entry: int, repeats: int) -> None:
        """Check the L2 entry of a compressed cluster and count the clusters that its data touches."""
        self.allocated += repeats
        self.compressed += repeats
        self.fragmented += repeats
        if entry & entries.COPIED:
            detail = "COPIED on a compressed cluster"
            self.findings.add(Kind.COPIED_FLAG, "L2 entry", place, detail, repeats)
        offset, length = _compressed_extent(entry, self.cluster_bits)
        last = (offset + length - 1) >> self.cluster_bits
        # As in QEMU: less than a cluster past the end of the file is fine, more is one error.
        if last >= self.cluster_count and offset + length - self.file_bytes >= self.cluster_bytes:
            detail = f"compressed data at {offset:#x}"
            self.findings.add(Kind.PAST_END, "L2 entry", place, detail, repeats)
            return
        for cluster in range(offset >> self.cluster_bits, min(last + 1, self.cluster_count)):
            self.refer_data(place, cluster, f"compressed data at {offset:#x}", repeats)

    def refer_data(self, place: int, cluster: int, target: str, repeats: int) -> None:
        """Count the references of the L2 entry at ``place`` to a cluster of guest data."""
        if cluster >= self.cluster_count:
            self.findings.add(Kind.PAST_END, "L2 entry", place, target, repeats)
            return
        if cluster in self.owners:
            detail = f"{target}, which is in use as {self.owners[cluster]}"
            self.findings.add(Kind.OVERLAP, "L2 entry", place, detail, repeats)
        self.refer(cluster, "L2 entry", place, repeats)

    def check_copied(self, structure: str, place: int, entry: int, cluster: int, repeats: int) -> None:
        """COPIED must say whether the refcount is 1."""
        refcount = (
            self.refcounts[cluster] if cluster < self.cluster_count else self.refcount_past_end(cluster)
        )
        if (refcount == 1) != (entry >= entries.COPIED):
            detail = f"{entry:#018x}, refcount {refcount}"
            self.findings.add(Kind.COPIED_FLAG, structure, place, detail, repeats)

    def refcount_past_end(self, cluster: int) -> int:
        """Return the refcount of a cluster that lies past the end of the file."""
        index, slot = divmod(cluster, self.geometry.refcounts_per_cluster)
        if index not in self.blocks:
            return 0
        order = self.header.refcount_order
        first_bit = slot << order
        data = self.read(max(1 << order >> 3, 1), self.blocks[index] + first_bit // 8)
        return _decode_refcounts(data, order)[first_bit % 8 >> order]

    def compare(self) -> None:
        """Compare refcounts with references, cluster by cluster where they differ."""
        for start in range(0, self.cluster_count, _COMPARED_CLUSTERS):
            stop = min(start + _COMPARED_CLUSTERS, self.cluster_count)
            if self.is_unused(start, stop):
                continue
            references = array(self.count_code, self.references[start:stop])
            refcounts = array(self.count_code, self.refcounts[start:stop])
            if references == refcounts:
                continue
            for cluster, (stored, counted) in enumerate(zip(refcounts, references, strict=True), start):
                if stored != counted:
                    kind = Kind.LEAK if stored > counted else Kind.REFCOUNT_TOO_LOW
                    used_as = self.owners.get(cluster, "data" if counted else "nothing")
                    detail = f"refcount {stored}, references {counted}, in use as {used_as}"
                    self.findings.add(kind, "cluster", cluster << self.cluster_bits, detail)

    def is_unused(self, start: int, stop: int) -> bool:
        """Return True if no cluster in [start, stop) has a refcount or a reference."""
        counts = (self.references[start:stop], self.refcounts[start:stop])
        return all(_native.is_zero(part.cast("B")) for part in counts)

    def image_end_cluster(self) -> int:
        """Return the index behind the last cluster with a refcount or a reference."""
        for stop in range(self.cluster_count, 0, -_COMPARED_CLUSTERS):
            start = max(stop - _COMPARED_CLUSTERS, 0)
            if self.is_unused(start, stop):
                continue
            used = zip(self.references[start:stop], self.refcounts[start:stop], strict=True)
            last = max((index for index, pair in enumerate(used, start) if any(pair)), default=-1)
            if last >= 0:
                return last + 1
        return 0


def _zeroed(code: _Code, count: int) -> memoryview:
    """Return ``count`` zeros of an array type code, without touching the memory of a large array."""
    size_bytes = count * array(code).itemsize
    store = bytearray(size_bytes) if size_bytes < _LAZY_BYTES else mmap.mmap(-1, size_bytes)
    return memoryview(store).cast("B").cast(code)


def _nonzero_entries(table: bytes) -> Iterator[tuple[int, int]]:
    """Yield (index, entry) of the entries that are not zero; most of a table often is."""
    whole = len(table) - len(table) % _GROUP_BYTES
    for position in range(0, whole, _GROUP_BYTES):
        group = table[position : position + _GROUP_BYTES]
        if group != _ZERO_GROUP:
            index = position // ENTRY_BYTES
            for entry in _GROUP_STRUCT.unpack(group):
                if entry:
                    yield index, entry
                index += 1
    for position in range(whole, len(table), ENTRY_BYTES):
        (entry,) = entries.ENTRY.unpack_from(table, position)
        if entry:
            yield position // ENTRY_BYTES, entry


def _decode_refcounts(data: bytes | bytearray, order: int) -> array[int]:
    """Return the refcounts of ``1 << order`` bits in ``data``."""
    if order >= 3:
        refcounts = array(_REFCOUNT_CODES[order], bytes(data))
        if sys.byteorder == "little":
            refcounts.byteswap()
        return refcounts
    width = 1 << order
    mask = (1 << width) - 1
    # Refcounts of less than a byte start at the least significant bit.
    return array("B", [byte >> shift & mask for byte in data for shift in range(0, 8, width)])


def _compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return host offset and length in bytes of the sectors that hold a compressed cluster.

    The specification's descriptor: from bit ``62 - (cluster_bits - 8)`` to 61 the number of further
    sectors, below that the host offset of the first byte.
    """
    offset_bits = 62 - (cluster_bits - 8)
    descriptor = entry & (entries.COMPRESSED - 1)
    offset = descriptor & (1 << offset_bits) - 1
    sectors = (descriptor >> offset_bits) + 1
    return offset, sectors * SECTOR_BYTES - offset % SECTOR_BYTES
