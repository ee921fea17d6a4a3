"""The tables of an image, read by another program than those compared: it says which of them is right.

It knows the layout by itself and takes nothing from jqcow. What lies past the end of the file is None.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OFFSET = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
_ENTRIES_MAX = 1 << 20
"""So many L1 entries are looked at."""


@dataclass(frozen=True)
class Fields:
    """Those fields of the header that the comparison needs; zeros where the file is shorter."""

    version: int
    backing_offset: int
    backing_bytes: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_bytes: int
    compression_type: int

    @classmethod
    def of(cls, content: bytes) -> Fields:
        """Read the header of an image."""
        head = content[:112].ljust(112, b"\0")
        version, *fields = struct.unpack_from(">IQIIQIIQQIIQ", head, 4)
        incompatible, compatible, autoclear, order, length = struct.unpack_from(">QQQII", head, 72)
        if version < 3:
            return cls(version, *fields, 0, 0, 0, 4, 72, 0)
        kind = head[104] if length > 104 else 0
        return cls(version, *fields, incompatible, compatible, autoclear, order, length, kind)


_BITMAPS = 0x23852875


@dataclass(frozen=True)
class L1:
    """An L1 table: where, how many entries, and the size of its disk."""

    offset: int
    count: int
    disk_bytes: int


class Tables:
    """The L1 and L2 tables of one image."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.fields = Fields.of(content)
        # Neither program opens an image with clusters of another size.
        self.cluster_bytes = 1 << min(max(self.fields.cluster_bits, 9), 21)
        self.is_extended = bool(self.fields.incompatible & 1 << 4)
        self.has_data_file = bool(self.fields.incompatible & 1 << 2)
        self.entry_bytes = 16 if self.is_extended else 8
        self.per_table = self.cluster_bytes // self.entry_bytes

    def below(self) -> Iterator[Tables]:
        """Yield the tables of the images below, of those that are named by a path from the root."""
        start = self.fields.backing_offset
        name = bytes(self.content[start : start + min(self.fields.backing_bytes, 1023)])
        path = Path(name.replace(b"\0", b"").decode("utf-8", "surrogateescape"))
        if path.is_absolute() and path.is_file():
            image = Tables(path.read_bytes())
            yield image
            yield from image.below()

    def word(self, place: int) -> int | None:
        """Return the 8 bytes at a host offset as a number."""
        piece = self.content[place : place + 8]
        return int.from_bytes(piece, "big") if len(piece) == 8 else None

    @property
    def active(self) -> L1:
        """The table of the disk."""
        return L1(self.fields.l1_offset, self.fields.l1_size, self.fields.size)

    def snapshots(self) -> Iterator[tuple[str, L1]]:
        """Yield (id, L1 table) of the snapshots; those that are not there are left out."""
        place = self.fields.snapshots_offset
        for _ in range(min(self.fields.snapshot_count, 100)):
            if place + 40 > len(self.content):
                return
            offset, count, id_bytes, name_bytes = struct.unpack_from(">QIHH", self.content, place)
            (extra_bytes,) = struct.unpack_from(">I", self.content, place + 36)
            extra = self.content[place + 40 : place + 40 + extra_bytes]
            disk_bytes = int.from_bytes(extra[8:16], "big") if extra_bytes >= 16 else self.fields.size
            start = place + 40 + extra_bytes
            yield self.content[start : start + id_bytes].decode("latin-1"), L1(offset, count, disk_bytes)
            place = -(-(start + id_bytes + name_bytes) // 8) * 8

    def table_of(self, snapshot: str) -> L1 | None:
        """Return the L1 table of the disk, or of a snapshot by its id."""
        return dict(self.snapshots()).get(snapshot) if snapshot else self.active

    def faults_at(self, guest: int, l1: L1) -> set[str]:
        """Return what is wrong with the entries that map a guest offset, by names of its own."""
        l1_index, l2_index = divmod(guest // self.cluster_bytes, self.per_table)
        if l1_index >= l1.count:
            return {"no L1 entry"}
        entry = self.word(l1.offset + 8 * l1_index)
        if entry is None:
            return {"gone"}
        table, faults = entry & OFFSET, set[str]()
        if entry & L1_RESERVED or (entry and not table):
            faults.add("invalid")
        if table % self.cluster_bytes:
            faults.add("unaligned")
        if table + self.cluster_bytes > len(self.content):
            faults.add("gone")
        if not table or faults:
            return faults
        place = table + self.entry_bytes * l2_index
        entry = self.word(place) or 0
        if self.is_extended and entry & COMPRESSED and self.word(place + 8):
            faults.add("invalid")
        return faults | self.faults_of(entry)

    def faults_of(self, entry: int) -> set[str]:
        """Return what is wrong with an L2 entry."""
        if entry & COMPRESSED:
            width = 62 - (self.fields.cluster_bits - 8)
            host = entry & (1 << width) - 1
            faults = {"copied"} if entry & COPIED else set()
            return faults | self.faults_of_host(host)
        host, faults = entry & OFFSET, set[str]()
        is_zeros = bool(entry & 1)
        if entry & L2_RESERVED or (is_zeros and (self.fields.version < 3 or self.is_extended)):
            faults.add("invalid")
        if host and host % self.cluster_bytes:
            faults.add("unaligned")
        if host:
            faults |= self.faults_of_host(host)
        return faults

    def faults_of_host(self, host: int) -> set[str]:
        """Return what is wrong with a host offset that an entry names, in this file."""
        if self.has_data_file:
            return set()
        faults = {"gone"} if host >= len(self.content) else set()
        return faults | ({"header"} if host < self.cluster_bytes else set())

    def missing(self, l1: L1) -> Iterator[int]:
        """Yield guest offsets whose data or tables lie past the end of the file, one for each entry."""
        span = self.per_table * self.cluster_bytes
        needed = min(-(-l1.disk_bytes // span), l1.count, _ENTRIES_MAX)
        for index in range(needed):
            entry = self.word(l1.offset + 8 * index)
            if entry is None:
                yield index * span
                return
            table = entry & OFFSET
            if table and not table % self.cluster_bytes:
                yield from self._missing_below(table, index * span, l1)

    def _missing_below(self, table: int, start: int, l1: L1) -> Iterator[int]:
        clusters = -(-(l1.disk_bytes - start) // self.cluster_bytes)
        for position in range(min(self.per_table, clusters)):
            guest = start + position * self.cluster_bytes
            entry = self.word(table + self.entry_bytes * position)
            if entry is None:
                yield guest
                return
            # What reads as zeros misses nothing.
            is_read = bool(entry & COMPRESSED or not entry & 1)
            if self.is_extended and not entry & COMPRESSED:
                is_read = bool((self.word(table + 16 * position + 8) or 0) & 0xFFFF_FFFF)
            if is_read and "gone" in self.faults_of(entry):
                yield guest

    def l1_entries(self, l1: L1) -> list[int]:
        """Return the entries of an L1 table that are there."""
        found = (self.word(l1.offset + 8 * index) for index in range(min(l1.count, _ENTRIES_MAX)))
        return [entry for entry in found if entry]

    def shared_tables(self, l1: L1) -> set[int]:
        """Return the L2 tables that more than one entry of an L1 table names."""
        counted = Counter(entry & OFFSET for entry in self.l1_entries(l1))
        return {table for table, count in counted.items() if table and count > 1}

    def has_hole(self) -> bool:
        """Return True if a table has room: an L1 entry, or a sector of an L2 table, is zeros or gone."""
        for l1 in (self.active, *(l1 for _, l1 in self.snapshots())):
            entries = self.l1_entries(l1)
            if len(entries) < min(l1.count, _ENTRIES_MAX) or not entries:
                return True
            for entry in entries:
                piece = self.content[entry & OFFSET :][: self.cluster_bytes]
                if len(piece) < self.cluster_bytes or not all(
                    any(piece[at : at + 512]) for at in range(0, len(piece), 512)
                ):
                    return True
        return False

    def has_lost_table(self) -> bool:
        """Return True if a cluster that no entry names can be an L2 table, by its own entries."""
        used = self.referenced() | self.metadata()
        for cluster in range(1, len(self.content) // self.cluster_bytes):
            if cluster not in used:
                piece = self.content[cluster * self.cluster_bytes :][: self.cluster_bytes]
                entries = [word for (word,) in struct.iter_unpack(">Q", piece) if word]
                if entries and not any(map(self.faults_of, entries)):
                    return True
        return False

    def referenced(self) -> set[int]:
        """Return the host clusters of L2 tables and data that entries without a fault name."""
        found = set[int]()
        for l1 in (self.active, *(l1 for _, l1 in self.snapshots())):
            for entry in self.l1_entries(l1):
                table = entry & OFFSET
                if entry & L1_RESERVED or not table or table % self.cluster_bytes:
                    continue
                found.add(table // self.cluster_bytes)
                words = (
                    self.word(table + self.entry_bytes * position) or 0 for position in range(self.per_table)
                )
                found.update(cluster for word in words if word for cluster in self._clusters_of(word))
        return found

    def _clusters_of(self, entry: int) -> range:
        """Return the host clusters that an L2 entry names, none where it has a fault."""
        if self.faults_of(entry) or self.has_data_file:
            return range(0)
        width = 62 - (self.fields.cluster_bits - 8)
        host = entry & OFFSET
        length = self.cluster_bytes if host else 0
        if entry & COMPRESSED:
            host = entry & (1 << width) - 1
            length = ((entry & COMPRESSED - 1) >> width) * 512 + 512 - host % 512
        return range(host // self.cluster_bytes, -(-(host + length) // self.cluster_bytes))

    def metadata(self) -> set[int]:
        """Return the host clusters of the header, all L1 and L2 tables, the snapshot and refcount tables."""
        fields, size = self.fields, self.cluster_bytes
        found = {0}

        def add(offset: int, length: int) -> None:
            end = min(offset + length, len(self.content))
            found.update(range(offset // size, -(-end // size)))

        all_l1 = [self.active, *(l1 for _, l1 in self.snapshots())]
        for l1 in all_l1:
            add(l1.offset, 8 * l1.count)
            for entry in self.l1_entries(l1):
                add(entry & OFFSET, size if entry & OFFSET else 0)
        length = fields.refcount_table_clusters * size
        add(fields.refcount_table_offset, length)
        for place in range(fields.refcount_table_offset, fields.refcount_table_offset + min(length, size), 8):
            block = self.word(place) or 0
            add(block & ~0x1FF, size if block else 0)
        if fields.snapshot_count:
            add(fields.snapshots_offset, size)
        return found

    def host_of(self, guest: int, l1: L1) -> int | None:
        """Return the host offset that a guest offset is mapped to, None for none or compressed data."""
        l1_index, l2_index = divmod(guest // self.cluster_bytes, self.per_table)
        table = (self.word(l1.offset + 8 * l1_index) or 0) & OFFSET if l1_index < l1.count else 0
        entry = (self.word(table + self.entry_bytes * l2_index) or 0) if table else 0
        return None if entry & COMPRESSED or not entry & OFFSET else entry & OFFSET

    def extensions(self) -> Iterator[tuple[int, int, int]]:
        """Yield (place, type, length) of the header extensions, the end marker last."""
        place = self.fields.header_bytes
        end = self.fields.backing_offset or self.cluster_bytes
        while place + 8 <= min(end, len(self.content)):
            kind, length = struct.unpack_from(">II", self.content, place)
            yield place, kind, length
            if not kind or length > end - place:
                return
            place += 8 + -(-length // 8) * 8

    def bitmaps(self) -> Iterator[tuple[int, int]]:
        """Yield (flags, bytes of extra data) of the first bitmap of each directory."""
        for place, kind, length in self.extensions():
            directory = self.word(place + 24) if kind == _BITMAPS and length >= 24 else None
            if directory is not None and directory + 24 <= len(self.content):
                flags, extra_bytes = struct.unpack_from(">12xI4xI", self.content, directory)
                yield flags, extra_bytes
