"""The survey of a file: what it is read as, what its tables say, what nobody names.

SV1. What a snapshot names is no orphan, and does not make the disk's own use of a cluster a double one.
SV2. Where the tables may be older than the data, as without the journal of a live image, nothing is certain.
SV3. An orphan of an image with snapshots may be of the disk, or of what it was when one was taken: the
    guest's structures tell its place, and not its time. So nothing that evidence placed is certain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jqcow.errors import SnapshotNotFound
from jqcow.ondisk.frame import IntentOperation
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.sectors import SectorCipher
from jqcow.ondisk.snapshots import Snapshot
from jqcow.salvage.candidates import TableSearch
from jqcow.salvage.decrypting import DecryptedSource
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guest.find import find
from jqcow.salvage.guest.partition_layout import SECTOR_SIZES
from jqcow.salvage.guest.partitions import size_by_partitions
from jqcow.salvage.guest.sizes import sizes_seen
from jqcow.salvage.guestmap import GuestMap, Open
from jqcow.salvage.marks import Bits, Marks
from jqcow.salvage.orphans import OrphanClusters, Unnamed, mark_header
from jqcow.salvage.others import Others, Places, mark_others, read_others
from jqcow.salvage.packed import MixedOrphans
from jqcow.salvage.placing import Placed, place_orphans
from jqcow.salvage.protection import Protection, find_protection
from jqcow.salvage.reading import Below, PieceReader
from jqcow.salvage.shape import Damage, Shape
from jqcow.salvage.snapshots import NAMELESS, FoundSnapshot, copies_of_l1, find_snapshots, with_names
from jqcow.salvage.source import Source
from jqcow.salvage.streams import StreamOrphans, find_streams
from jqcow.salvage.tables import (
    COMPRESSED,
    DATA,
    DiskTables,
    Fate,
    Known,
    read_snapshot_tables,
    read_tables,
)

LARGEST_BYTES = 1 << 40
"""So large a disk is at most whose size is lost, if no table tells of more."""
START_BYTES = 128 << 10
"""In so much of the start of a disk a file system tells of itself."""
STREAMS_MIN = 8
"""So many streams are no chance where no table tells of compressed data."""


@dataclass
class Survey:
    """What was found out of a file, as far as one of its disks is to be had back.

    Attributes:
        source: the file.
        shape: what it is read as.
        others: the structures beside tables and refcounts.
        guest_map: of the disk, or of the snapshot that was asked for.
        snapshot_tables: those of all snapshots.
        unnamed: which clusters nobody names.
        found_snapshots: the snapshots as the search for tables knows them.
        is_active: the disk is the active one, no snapshot's.
        is_size_known: the size of the disk, lost with the header, is that which the guest tells.
        is_supposed: by a supposition: see `guest.sizes`.
        ceiling: nothing is surer than this.
        placed: what became of the orphans; None as long as they were not placed.
        intents: writes of the guest that a journal has, and the tables do not show, in their order.
    """

    source: Source
    shape: Shape
    others: Others
    guest_map: GuestMap
    snapshot_tables: list[DiskTables]
    unnamed: Unnamed
    found_snapshots: list[FoundSnapshot] = field(default_factory=list)
    is_active: bool = True
    is_size_known: bool = False
    is_supposed: bool = False
    ceiling: Certainty = Certainty.CERTAIN
    placed: Placed | None = None
    intents: tuple[IntentOperation, ...] = ()
    _ciphers: list[SectorCipher] = field(default_factory=list)

    @property
    def tables(self) -> DiskTables:
        """The tables of the disk that is to be had back."""
        return self.guest_map.tables

    def unlock(self, cipher: SectorCipher | None) -> None:
        """Read the guest's data of an encrypted image by ``cipher``."""
        self._ciphers = [] if cipher is None else [cipher]

    def orphans(self, *, decrypted: bool = True) -> OrphanClusters:
        """Return the clusters that nobody names, a new set."""
        source, bits = self.source, self._unnamed_bits()
        for cipher in self._ciphers if decrypted else ():
            source = DecryptedSource(source, cipher, keeps_zeros=True)
        return OrphanClusters(source, self.shape.geometry.cluster_bits, bits)

    def _unnamed_bits(self) -> Bits:
        bits = Bits(self.unnamed.bits.cluster_count)
        bits.data[:] = self.unnamed.bits.data
        return bits

    def _with_streams(self, orphans: OrphanClusters) -> OrphanClusters:
        """Return the orphans with compressed ones, if there may be such: as tables say, or none is left."""
        every = [self.tables, *self.snapshot_tables]
        has_data, has_packed = (any(each.counts[kind] for each in every) for kind in (DATA, COMPRESSED))
        if not len(orphans) or (has_data and not has_packed):
            return orphans
        found = find_streams(self.source, self.shape, orphans.bits)
        if not found or (not has_packed and len(found) < STREAMS_MIN):
            return orphans
        streams = StreamOrphans(self.source, self.shape, found)
        mixed = MixedOrphans(orphans.source, orphans.cluster_bits, orphans.bits, streams, self.source.size())
        self.guest_map.packed = mixed.packed
        return mixed

    def reader(self, below: Below | None = None) -> PieceReader:
        """Return what reads the pieces of the disk; ``below`` reads the backing disk."""
        source = self.source
        for cipher in self._ciphers:
            source = DecryptedSource(source, cipher)
        return PieceReader(source, self.shape, below)

    def place(self, below: Below | None = None) -> Placed:
        """Place the orphans, once.

        Raises:
            OSError: the host failed, other than by what it cannot read.
        """
        if self.placed is None:
            protection = self._protection()
            if protection is not None and "size" in self.shape.lost | self.shape.inferred:
                self._resize(protection.units.disk_bytes)
            self.grow()
            search = self._search()
            orphans = self._with_streams(self.orphans())
            has_snapshots = bool(self.others.snapshots or self.shape.area.header.nb_snapshots)
            self.placed = place_orphans(
                self.guest_map,
                self.reader(below),
                orphans,
                find,
                protection,
                search,
                are_current=not has_snapshots and self.unnamed.counts_once(),
            )
            if self.is_supposed or has_snapshots:
                self.guest_map.doubt()
            if "size" in self.shape.lost and not self.is_size_known:
                self.tables.end_at(max(SECTOR_BYTES, self.placed.end))
        return self.placed

    def grow(self) -> None:
        """Have the disk be as large as any where nothing tells its size: what is placed will."""
        if "size" in self.shape.lost and not self.is_size_known:
            index = LARGEST_BYTES // self.tables.table_covers
            self.tables.grow(max(index, len(self.tables.fates)) - 1)

    def _resize(self, size: int) -> None:
        """Take a size that is known after all."""
        self.is_size_known, self.is_supposed = True, False
        index = (size - 1) // self.tables.table_covers
        if index >= len(self.tables.fates):
            self.tables.grow(index)
        self.tables.end_at(size)

    def _protection(self) -> Protection | None:
        """Return the sums of the active disk, and mark where they lie: that looks like tables."""
        if not self.is_active or not len(self.unnamed.bits):
            return None
        found = find_protection(self.source, self.shape.area, self.orphans(decrypted=False))
        for host in found.structures if found is not None else ():
            self.guest_map.marks.set_structure(host, self.shape.geometry.cluster_bytes)
            self.unnamed.bits.discard(host >> self.guest_map.marks.cluster_bits)
        return found

    def _search(self) -> TableSearch | None:
        """Return what finds tables, if some are missed."""
        tables = self.tables
        is_doubtful = bool(len(self.unnamed.bits)) and not all(
            tables.is_absent_sure(index) for index, fate in enumerate(tables.fates) if fate == Fate.ABSENT
        )
        if not self.is_active or not (is_doubtful or Fate.LOST in tables.fates or Fate.EMPTY in tables.fates):
            return None
        copies = copies_of_l1(
            self.source,
            self.shape,
            self.found_snapshots,
            self.unnamed,
            with_old=is_doubtful or tables.is_l1_damaged,
        )
        return TableSearch(tables, self.guest_map.marks, self.unnamed, copies)

    def damages(self) -> list[Damage]:
        """Return all that is wrong: header, tables, other structures, refcounts."""
        found = [*self.shape.damages, *self.tables.damages]
        for tables in self.snapshot_tables:
            found += tables.damages
        found += self._wiped()
        return [*found, *self.others.damages, *self.unnamed.damages]

    def _wiped(self) -> Iterator[Damage]:
        """Yield the tables with entries of 0 where data belongs, with certainty."""
        disk = self.guest_map
        for index, placed in disk.placed.items():
            entries = [part.entries for part in disk.open_parts(index) if part.why in (Open.EMPTY, Open.HOLE)]
            count = sum(
                placed.certainties[each.start : each.stop].count(Certainty.CERTAIN) for each in entries
            )
            if count:
                meaning = f"{count} of its entries are 0, and there is data for them"
                yield Damage("L2 table", disk.tables.offsets[index], meaning, *disk.tables.guest_range(index))


def survey(source: Source, shape: Shape, snapshot: str | None = None, also: Places | None = None) -> Survey:
    """Look at all structures of a file, and at no data, but where the header is lost.

    Args:
        source: the file.
        shape: what it is read as.
        snapshot: id or name of the snapshot whose disk is to be had back, instead of the active one.
        also: other structures that lie in the file, and have no refcounts.

    Raises:
        SnapshotNotFound: no entry of the snapshot table has that id or name.
        UnsupportedFeatureError: a file of too many clusters.
        OSError: the host failed, other than by what it cannot read.
    """
    found = _survey(source, shape, snapshot, also)
    if "size" in shape.inferred | shape.lost and not shape.area.header.crypt_method:
        size, is_supposed = _size_by_guest(found)
        resized = shape if size is None else shape.resized(size)
        if resized is not shape:
            found = _survey(source, resized, snapshot, also)
        found.is_size_known, found.is_supposed = size is not None, is_supposed
    return found


def _size_by_guest(found: Survey) -> tuple[int | None, bool]:
    """Return the size of a disk by its partition table, or else by its file systems, which is a supposition.

    Where tables tell, it is not less than they map.
    """
    disk, reader, geometry = found.guest_map, found.reader(), found.shape.geometry
    least = 0 if "size" in found.shape.lost else disk.size - geometry.cluster_bytes + 1
    start = b"".join(
        (reader.read(piece) or b"").ljust(piece.length, b"\0") for piece in disk.pieces(0, START_BYTES)
    ).ljust(START_BYTES, b"\0")
    sectors = [start[place : place + SECTOR_BYTES] for place in SECTOR_SIZES]
    size = size_by_partitions(least, sectors, found.orphans())
    if size is not None:
        return size, False
    seen = {size for _, content in found.orphans() for size in sizes_seen(content)} | set(sizes_seen(start))
    size = max((size for size in seen if least <= size <= LARGEST_BYTES), default=None)
    return size, size is not None


def _survey(source: Source, shape: Shape, snapshot: str | None, also: Places | None) -> Survey:
    others = read_others(source, shape)
    marks = _fresh_marks(source, shape)
    mark_others(others, marks)
    known: Known = {}
    tables = read_tables(source, shape, marks, known)
    unnamed = Unnamed(source, shape, marks)
    found_snapshots, _ = find_snapshots(source, shape, unnamed)
    others.snapshots += with_names(found_snapshots, others.snapshots, shape, unnamed)
    snapshot_tables, named = [], marks
    if others.snapshots:
        named = Marks(shape.geometry.cluster_bits, source.size())
        named.data[:] = marks.data
        for each in others.snapshots:
            snapshot_tables.append(read_snapshot_tables(source, shape, each, named, known))
            if each.name.startswith(NAMELESS):
                snapshot_tables[-1].certainty = Certainty.LIKELY
        unnamed.leave_out(named)
    for _, offset, length in also or ():
        named.set_structure(offset, length)
        unnamed.bits.discard_range(offset >> named.cluster_bits, -(-(offset + length) >> named.cluster_bits))
    if snapshot is not None:
        marks = _fresh_marks(source, shape)
        wanted = _find(others.snapshots, snapshot)
        certainty = snapshot_tables[others.snapshots.index(wanted)].certainty
        tables = read_snapshot_tables(source, shape, wanted, marks)
        tables.certainty = certainty
    if named is not marks:
        _spread_structures(named, marks)
    guest_map = GuestMap(tables, marks)
    is_active = snapshot is None
    return Survey(
        source, shape, others, guest_map, snapshot_tables, unnamed, found_snapshots, is_active=is_active
    )


def _fresh_marks(source: Source, shape: Shape) -> Marks:
    marks = Marks(shape.geometry.cluster_bits, source.size())
    mark_header(shape, marks)
    return marks


def _find(snapshots: list[Snapshot], wanted: str) -> Snapshot:
    """Return the snapshot of an id, or of a name where no id is that."""
    for names in ([each.id for each in snapshots], [each.name for each in snapshots]):
        if wanted in names:
            return snapshots[names.index(wanted)]
    raise SnapshotNotFound(wanted)


def _spread_structures(known: Marks, marks: Marks) -> None:
    """Mark the structures that one set of marks knows in another one."""
    low = int.from_bytes(b"\x55" * len(known.data), "little")
    both = int.from_bytes(known.data, "little")
    structures = both & both >> 1 & low
    merged = int.from_bytes(marks.data, "little") | structures | structures << 1
    marks.data[:] = merged.to_bytes(len(marks.data), "little")
