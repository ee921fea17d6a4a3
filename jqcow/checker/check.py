"""The independent checker: does every cluster's refcount equal the references to it?

It judges the engine, so it shares nothing with it but the on-disk structures. It reads an image through
a function, walks every table and counts the references to every cluster, then compares them with the
refcounts. An image with a live journal is checked through a function that shows it as replayed.

``corruptions`` and ``leaks`` count what ``qemu-img check`` has a notion of. After most damage both give the
same numbers, and `docs/damage` tells where they differ. These are ``errors`` (or leaks) to jqcow alone:

- leaked clusters may look like lost data (`jqcow.checker.lost`);
- metadata and something else share a cluster, with refcounts that allow it;
- an entry points into a reserved range (the journal);
- an L1 table is too small for its disk, or the header is damaged (`jqcow.checker.header`): QEMU does not open
  the image, or not this snapshot;
- a refcount past the end of the file is a leak.

Internal snapshots share L2 tables and data with the disk and with each other, which is their purpose; their
L1 tables share with nothing. As in QEMU, COPIED flags are judged in the tables of the active disk alone, and
how many clusters are allocated, fragmented or compressed is said of it alone.

Time and memory are bounded by the file's size and the tables' limits: a table that is pointed to many
times is walked once, and so is what several L1 tables have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from jqcow import _native
from jqcow.checker.bitmaps import walk_bitmaps
from jqcow.checker.claims import OWNERS, Claims, Read
from jqcow.checker.findings import Finding, Kind
from jqcow.checker.header import CRYPT_METHOD_PLACE, header_faults
from jqcow.checker.lost import Holes, LostData
from jqcow.checker.tables import (
    REFCOUNT_CODES,
    Counts,
    layers,
    used,
    zeroed,
)
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import entries, features, layout, luks, snapshots
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, ZERO_CLUSTER, FoundEntry, codec_of, reserved_bits
from jqcow.ondisk.layout import DATA_FILE, MAX_CLUSTER_BITS, MAX_L1_ENTRIES, SECTOR_BYTES, table_bytes
from jqcow.ondisk.snapshots import MAX_SNAPSHOT_L1_BYTES, TableEntry

_L1_STEP_BYTES = 1 << 20
_ENTRIES_AT_ONCE = 64

_LEAKS = (Kind.LEAK, Kind.LEAK_PAST_END)
_STRICTER = (*_LEAKS, Kind.LOST_DATA, Kind.OVERLAP, Kind.RESERVED_RANGE, Kind.L1_TOO_SMALL, Kind.HEADER)


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
    def lost(self) -> int:
        """Leaked clusters that look like lost data (`jqcow.checker.lost`); they are among the errors."""
        return self.counts.get(Kind.LOST_DATA, 0)

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
        FormatError: not a qcow2 image, or a header or snapshot table that breaks the specification.
        CorruptionError: the header places a table where none can be.
        UnsupportedFeatureError: a feature that the checker does not know, a file of too many clusters, or
            L1 tables of snapshots that take more than MAX_SNAPSHOT_L1_BYTES.
    """
    area = HeaderArea.parse(read(min(file_bytes, 1 << MAX_CLUSTER_BITS), 0))
    features.refuse(area, "check")
    check = _Check(read, area, file_bytes, reserved)
    for structure, place, detail in header_faults(area):
        check.findings.add(Kind.HEADER, structure, place, detail)
    return check.run()


def _luks_pointer(area: HeaderArea) -> luks.Pointer | None:
    """Return where the LUKS header is, None where there is none or the image's header is wrong about it."""
    with suppress(CorruptionError, FormatError):
        return luks.pointer_of(area)
    return None


class _Check(Claims):
    """One walk through an image.

    Metadata is claimed first, each cluster by the structure that owns it; then the L2 tables are
    walked, so that an entry that points into metadata is seen. ``active_pointers`` and ``snapshot_pointers``
    count for each cluster the entries of the disk's L1 table, and of the snapshots', that say that it is an
    L2 table.
    """

    def __init__(
        self, read: Read, area: HeaderArea, file_bytes: int, reserved: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(read, area, file_bytes, reserved)
        header = area.header
        self.codec = codec_of(header.geometry)
        self.refcounts = zeroed(REFCOUNT_CODES.get(header.refcount_order, "B"), self.cluster_count)
        self.active_pointers = zeroed("I", self.cluster_count)
        self.snapshot_pointers = zeroed("Q", self.cluster_count if header.nb_snapshots else 0)
        self.counted = _native.CountedFile(
            references=self.references,
            refcounts=self.refcounts,
            owners=self.owners,
            cluster_bits=self.cluster_bits,
            entry_bytes=self.codec.entry_bytes,
            reserved_bits=reserved_bits(header.geometry),
            refcount_max=self.refcount_max,
            avoided=self.hull_of_reserved(),
            outside=DATA_FILE if header.geometry.has_data_file else 0,
        )
        self.blocks: dict[int, int] = {}
        self.past_end: set[int] = set()
        used_clusters = self.geometry.clusters(header.size)
        self.holes = Holes(used_clusters * self.codec.entry_bytes)
        self.allocated = self.fragmented = self.compressed = self.zeros = 0
        self.following = 0
        """Where the data cluster before ended on the host, in the L2 table that is walked."""

    def run(self) -> CheckReport:
        """Walk everything, compare, and report."""
        header = self.header
        self.claim("header", 0, self.cluster_bytes, "header", 0)
        pointer = _luks_pointer(self.area)
        if pointer is not None:
            self.claim("encryption header", pointer.offset, pointer.length, "header", CRYPT_METHOD_PLACE)
        self.walk_refcount_table()
        self.walk_active_l1_table()
        if header.nb_snapshots:
            self.walk_snapshots()
        walk_bitmaps(self)
        self.walk_l2_tables()
        self.compare()
        return CheckReport(
            counts=dict(self.findings.counts),
            findings=tuple(self.findings.kept),
            image_end_offset=Counts(self.references, self.refcounts).end() << self.cluster_bits,
            total_clusters=self.geometry.clusters(header.size),
            allocated_clusters=self.allocated,
            fragmented_clusters=self.fragmented,
            compressed_clusters=self.compressed,
            zero_clusters=self.zeros,
        )

    def walk_refcount_table(self) -> None:
        """Claim the refcount table and its blocks, and load the refcounts of the file's clusters."""
        header = self.header
        if not header.has_refcount_table:
            detail = f"{header.refcount_table_clusters} clusters at {header.refcount_table_offset:#x}"
            self.findings.add(Kind.NO_REFCOUNT_TABLE, "header", 48, detail)
            return
        length = header.refcount_table_clusters << self.cluster_bits
        # A table that reaches past the end of the file is one error; what there is of it still counts.
        self.claim("refcount table", header.refcount_table_offset, length, "header", 48)
        table = self.read(length, header.refcount_table_offset)
        seen_past_end: set[int] = set()
        for index, entry in entries.nonzero_entries(table):
            place = header.refcount_table_offset + table_bytes(index)
            block, has_reserved = entries.split_refcount_table(entry)
            if has_reserved:
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
            self.refcounts[first : first + inside] = _native.refcount_decode(data[:inside_bytes], order)[
                :inside
            ]
        whole_bytes, bits = divmod(inside << order, 8)
        outside = bytearray(data[whole_bytes:])
        if bits:
            # The last byte also holds refcounts of clusters inside the file.
            outside[0] &= 0xFF << bits & 0xFF
        if not _native.is_zero(outside):
            self.report_leaks_past_end(first + (whole_bytes << 3 >> order), outside)

    def report_leaks_past_end(self, first: int, data: bytes | bytearray) -> None:
        """Report the nonzero refcounts in ``data``, which starts with that of cluster ``first``."""
        for cluster, refcount in enumerate(_native.refcount_decode(data, self.header.refcount_order), first):
            if refcount:
                detail = f"refcount {refcount} of a cluster past the end of the file"
                place = cluster << self.cluster_bits
                self.findings.add(Kind.LEAK_PAST_END, "cluster", place, detail)

    def walk_active_l1_table(self) -> None:
        """Claim the L1 table of the disk and the L2 tables that it points to."""
        header = self.header
        length = table_bytes(header.l1_size)
        if header.l1_size < self.geometry.l1_entries_for(header.size):
            self.findings.add(Kind.L1_TOO_SMALL, "header", 36, f"{header.l1_size} entries")
        self.claim("L1 table", header.l1_table_offset, length, "header", 40)
        self.walk_l1_entries(header.l1_table_offset, length, self.active_pointers, 1)

    def walk_snapshots(self) -> None:
        """Claim the snapshot table, the L1 tables of all snapshots and the L2 tables that they point to.

        L1 tables that overlap, as only hostile ones do, are read once where they do, and count as often as
        they are there.
        """
        header = self.header
        start = end = header.snapshots_offset
        ranges: list[tuple[int, int]] = []
        for entry in snapshots.read_entries(self.read, start, header.nb_snapshots, header=header):
            end = entry.offset + entry.length
            if self.check_snapshot(entry) and entry.snapshot.l1_size:
                offset = entry.snapshot.l1_table_offset
                ranges.append((offset, offset + table_bytes(entry.snapshot.l1_size)))
        self.claim("snapshot table", start, end - start, "header", 64)
        # What there is of a table that reaches past the end of the file still counts.
        file_end = layout.round_up(self.file_bytes, SECTOR_BYTES)
        present = [(first, min(last, file_end)) for first, last in ranges if first < file_end]
        total = sum(last - first for first, last, _ in layers(present))
        if total > MAX_SNAPSHOT_L1_BYTES:
            raise UnsupportedFeatureError(f"snapshots with L1 tables of {total} bytes in all")
        self.claim_snapshot_tables(ranges)
        for first, last, depth in layers(present):
            self.walk_l1_entries(first, last - first, self.snapshot_pointers, depth)

    def check_snapshot(self, entry: TableEntry) -> bool:
        """Check an entry of the snapshot table; return whether its L1 table can be walked."""
        snapshot, place = entry.snapshot, entry.offset
        length = table_bytes(snapshot.l1_size)
        if self.header.version >= 3 and entry.extra_bytes < snapshots.REQUIRED_EXTRA_BYTES:
            detail = f"{entry.extra_bytes} bytes of extra data"
            self.findings.add(Kind.INCOMPLETE_SNAPSHOT, "snapshot table entry", place, detail)
        elif snapshot.l1_size < self.geometry.l1_entries_for(snapshot.disk_bytes):
            self.findings.add(
                Kind.L1_TOO_SMALL, "snapshot table entry", place + 8, f"{snapshot.l1_size} entries"
            )
        if snapshot.l1_table_offset & (self.cluster_bytes - 1):
            detail = f"{snapshot.l1_table_offset:#x}"
            self.findings.add(Kind.UNALIGNED, "snapshot table entry", place, detail)
            return False
        if snapshot.l1_size > MAX_L1_ENTRIES:
            detail = f"{snapshot.l1_size} entries"
            self.findings.add(Kind.L1_TOO_LARGE, "snapshot table entry", place + 8, detail)
            return False
        if self.geometry.clusters(snapshot.l1_table_offset + length) > self.cluster_count and length:
            detail = f"L1 table at {snapshot.l1_table_offset:#x}"
            self.findings.add(Kind.PAST_END, "snapshot table entry", place, detail)
        return True

    def claim_snapshot_tables(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Claim the clusters of the L1 tables, given as (start, end) in bytes, that lie in the file."""
        table = self.header.snapshots_offset
        clusters = [(first >> self.cluster_bits, self.geometry.clusters(end)) for first, end in ranges]
        inside = [(first, end) for first, end in clusters if end <= self.cluster_count]
        for first, end, depth in layers(inside):
            for cluster in range(first, end):
                self.claim_cluster("L1 table", cluster, "snapshot table", table, depth)
                if depth > 1:
                    place, detail = cluster << self.cluster_bits, f"the L1 table of {depth} snapshots"
                    self.findings.add(Kind.OVERLAP, "L1 table", place, detail, depth - 1)

    def walk_l1_entries(self, offset: int, length: int, pointers: memoryview, repeats: int) -> None:
        """Check ``length`` bytes of L1 entries that ``repeats`` L1 tables hold; count and claim L2 tables.

        ``pointers`` is where the entries are counted: active_pointers or snapshot_pointers.
        """
        is_active = pointers is self.active_pointers
        following = offset
        for start in range(offset, offset + length, _L1_STEP_BYTES):
            data = self.read(min(_L1_STEP_BYTES, offset + length - start), start)
            for index, entry in entries.nonzero_entries(data):
                place = start + table_bytes(index)
                self.holes.tables |= place != following
                following = place + table_bytes(1)
                cluster, copied = self.check_l1_entry(place, entry, repeats)
                if cluster is None:
                    continue
                if is_active:
                    self.check_copied("L1 entry", place, entry, copied, cluster, 1)
                if cluster >= self.cluster_count:
                    table = cluster << self.cluster_bits
                    self.findings.add(Kind.PAST_END, "L1 entry", place, f"L2 table at {table:#x}", repeats)
                    continue
                if self.is_known_l2_table(cluster):
                    self.refer(cluster, "L1 entry", place, repeats)
                else:
                    self.claim_cluster("L2 table", cluster, "L1 entry", place, repeats)
                pointers[cluster] += repeats
        self.holes.tables |= bool(length) and following == offset

    def check_l1_entry(self, place: int, entry: int, repeats: int) -> tuple[int | None, bool]:
        """Check an L1 entry that is not zero; return the cluster of its L2 table, if any, and COPIED."""
        table, copied, has_reserved = entries.split_l1(entry)
        if has_reserved:
            self.findings.add(Kind.RESERVED_BITS, "L1 entry", place, f"{entry:#018x}", repeats)
        if table & (self.cluster_bytes - 1):
            self.findings.add(Kind.UNALIGNED, "L1 entry", place, f"{entry:#018x}", repeats)
            return None, copied
        if not table:
            if copied:
                detail = "COPIED without an L2 table"
                self.findings.add(Kind.COPIED_FLAG, "L1 entry", place, detail, repeats)
            return None, copied
        return table >> self.cluster_bits, copied

    def is_known_l2_table(self, cluster: int) -> bool:
        """Return whether an L1 entry was met that says that this cluster is an L2 table."""
        if self.active_pointers[cluster]:
            return True
        return bool(self.header.nb_snapshots and self.snapshot_pointers[cluster])

    def walk_l2_tables(self) -> None:
        """Walk each L2 table once, with the number of L1 entries that point to it."""
        for cluster in used(self.active_pointers, self.snapshot_pointers):
            active = self.active_pointers[cluster]
            others = self.snapshot_pointers[cluster] if self.header.nb_snapshots else 0
            self.walk_l2_table(cluster << self.cluster_bits, active, active + others)

    def walk_l2_table(self, offset: int, active: int, repeats: int) -> None:
        """Check one L2 table that ``repeats`` L1 entries point to, ``active`` of them of the active disk."""
        self.following, position = 0, 0
        data = self.read(self.cluster_bytes, offset)
        self.holes.see_l2_table(data)
        while position < self.codec.per_table:
            position = self.count_right_entries(data, position, active, repeats)
            # Where one entry is wrong its neighbours often are.
            stop = min(position + _ENTRIES_AT_ONCE, self.codec.per_table)
            if position < stop:
                self.check_l2_entries(data, offset, position, stop, active, repeats)
            position = stop

    def count_right_entries(self, data: bytes, position: int, active: int, repeats: int) -> int:
        """Count the references of entries of an L2 table up to one that needs a look; return its position."""
        found = _native.count_entries(
            self.counted, data, position, self.codec.per_table, self.following, bool(active), repeats
        )
        self.following = found.following
        self.allocated += found.allocated * active
        self.fragmented += found.fragmented * active
        self.compressed += found.compressed * active
        self.zeros += found.zeros * active
        return found.stop

    def check_l2_entries(
        self, data: bytes, offset: int, start: int, stop: int, active: int, repeats: int
    ) -> None:
        """Check entries [start, stop) of the L2 table at ``offset`` one by one."""
        entry_bytes = self.codec.entry_bytes
        for found in self.codec.found(data[start * entry_bytes : stop * entry_bytes]):
            place = offset + (start + found.position) * entry_bytes
            if found.bitmap_fault:
                detail = f"{found.raw:#018x} has {found.bitmap_fault}"
                self.findings.add(Kind.SUBCLUSTERS, "L2 entry", place, detail, repeats)
            if self.geometry.has_data_file:
                self.check_outside(place, found, active, repeats)
            elif found.kind == COMPRESSED_CLUSTER:
                self.check_compressed(place, found, active, repeats)
            else:
                self.check_standard(place, found, active, repeats)

    def check_standard(self, place: int, found: FoundEntry, active: int, repeats: int) -> None:
        """Check the L2 entry of a cluster that is not compressed."""
        kind, host, raw = found.kind, found.host, found.raw
        if found.has_reserved or (kind == ZERO_CLUSTER and self.header.version == 2):
            self.findings.add(Kind.RESERVED_BITS, "L2 entry", place, f"{raw:#018x}", repeats)
        self.zeros += active if kind == ZERO_CLUSTER else 0
        if not host:
            return
        self.allocated += active
        self.fragmented += active if self.following and host != self.following else 0
        self.following = host + self.cluster_bytes
        if host % self.cluster_bytes:
            self.findings.add(Kind.UNALIGNED, "L2 entry", place, f"{raw:#018x}", repeats)
            return
        cluster = host >> self.cluster_bits
        if active:
            self.check_copied("L2 entry", place, raw, found.copied, cluster, active)
        self.refer_data(place, cluster, "data", host, repeats)

    def check_outside(self, place: int, found: FoundEntry, active: int, repeats: int) -> None:
        """Check the L2 entry of a cluster in an external data file, which no refcount counts."""
        kind, host = found.kind, found.host
        if found.has_reserved:
            self.findings.add(Kind.RESERVED_BITS, "L2 entry", place, f"{found.raw:#018x}", repeats)
        self.zeros += active if kind == ZERO_CLUSTER else 0
        if kind == COMPRESSED_CLUSTER:
            detail = f"{found.raw:#018x} is compressed, and the data is in a data file"
            self.findings.add(Kind.RESERVED_BITS, "L2 entry", place, detail, repeats)
        elif host:
            self.allocated += active
            self.fragmented += active if self.following and host != self.following else 0
            self.following = host + self.cluster_bytes
            if active and not found.copied:
                detail = f"{found.raw:#018x}, in a data file"
                self.findings.add(Kind.COPIED_FLAG, "L2 entry", place, detail, active)
            if host % self.cluster_bytes:
                self.findings.add(Kind.UNALIGNED, "L2 entry", place, f"{found.raw:#018x}", repeats)

    def check_compressed(self, place: int, found: FoundEntry, active: int, repeats: int) -> None:
        """Check the L2 entry of a compressed cluster and count the clusters that its data touches."""
        self.allocated += active
        self.compressed += active
        self.fragmented += active
        _, _, _, host, copied, length, *_ = found
        if copied:
            detail = "COPIED on a compressed cluster"
            self.findings.add(Kind.COPIED_FLAG, "L2 entry", place, detail, repeats)
        end = host + length
        last = (end - 1) >> self.cluster_bits
        # As in QEMU: data may reach up to a cluster past the end of the file. It must begin before.
        is_gone = host >= self.cluster_count << self.cluster_bits
        if is_gone or (last >= self.cluster_count and end - self.file_bytes >= self.cluster_bytes):
            self.findings.add(Kind.PAST_END, "L2 entry", place, f"compressed data at {host:#x}", repeats)
            return
        for cluster in range(host >> self.cluster_bits, last + 1):
            if cluster >= self.cluster_count:
                self.check_past_end(cluster)
            elif self.owners[cluster]:
                self.refer_data(place, cluster, "compressed data", host, repeats)
            else:
                self.refer(cluster, "L2 entry", place, repeats)

    def check_past_end(self, cluster: int) -> None:
        """Check a cluster past the end of the file that data reaches into: it must have a refcount."""
        if cluster not in self.past_end and not self.refcount_past_end(cluster):
            detail = "refcount 0, and compressed data reaches there, past the end of the file"
            self.findings.add(Kind.REFCOUNT_TOO_LOW, "cluster", cluster << self.cluster_bits, detail)
        self.past_end.add(cluster)

    def refer_data(self, place: int, cluster: int, what: str, host: int, repeats: int) -> None:
        """Count the references of the L2 entry at ``place`` to a cluster of ``what`` at ``host``."""
        if cluster >= self.cluster_count:
            self.findings.add(Kind.PAST_END, "L2 entry", place, f"{what} at {host:#x}", repeats)
            return
        if self.owners[cluster]:
            self.report_overlap(
                "L2 entry", place, f"{what} at {host:#x}, which is", self.owners[cluster], repeats
            )
        self.refer(cluster, "L2 entry", place, repeats)

    def check_copied(
        self, structure: str, place: int, entry: int, copied: bool, cluster: int, repeats: int
    ) -> None:
        """COPIED must say whether the refcount is 1."""
        refcount = (
            self.refcounts[cluster] if cluster < self.cluster_count else self.refcount_past_end(cluster)
        )
        if (refcount == 1) != copied:
            detail = f"{entry:#018x}, refcount {refcount}"
            self.findings.add(Kind.COPIED_FLAG, structure, place, detail, repeats)

    def refcount_past_end(self, cluster: int) -> int:
        """Return the refcount of a cluster that lies past the end of the file."""
        index, slot = divmod(cluster, self.geometry.refcounts_per_cluster)
        if index not in self.blocks:
            return 0
        order = self.header.refcount_order
        position, bits = divmod(slot << order, 8)
        data = self.read(max(1 << order >> 3, 1), self.blocks[index] + position)
        return _native.refcount_decode(data, order)[bits >> order]

    def compare(self) -> None:
        """Compare refcounts with references, cluster by cluster where they differ."""
        counts = Counts(self.references, self.refcounts)
        lost = LostData(
            counts.is_leaked, counts.is_counted, self.read_cluster, self.codec, self.cluster_bits, self.holes
        )
        lost.look_at(cluster for cluster, *_ in counts.differences() if counts.is_leaked(cluster))
        for cluster, stored, counted in counts.differences():
            kind = Kind.LEAK if stored > counted else Kind.REFCOUNT_TOO_LOW
            owner = self.owners[cluster]
            used_as = "data" if counted and not owner else OWNERS[owner]
            detail = f"refcount {stored}, references {counted}, in use as {used_as}"
            # What has another use tells nothing as a refcount; and no repair frees anything then.
            if not counted and not self.refcounts_are_used_twice and lost.is_lost(cluster):
                kind = Kind.LOST_DATA
            self.findings.add(kind, "cluster", cluster << self.cluster_bits, detail)

    def read_cluster(self, cluster: int) -> bytes:
        """Return a whole cluster."""
        return self.read(self.cluster_bytes, cluster << self.cluster_bits)
