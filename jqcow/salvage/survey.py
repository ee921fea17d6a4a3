"""The survey of a file: what it is read as, what its tables say, what nobody names.

Y1. What a snapshot names is no orphan, and does not make the disk's own use of a cluster a double one.
Y2. Where the tables may be older than the data, as without the journal of a live image, nothing is certain.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jqcow.errors import SnapshotNotFound
from jqcow.ondisk.sectors import SectorCipher
from jqcow.ondisk.snapshots import Snapshot
from jqcow.salvage.decrypting import DecryptedSource
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.marks import Bits, Marks
from jqcow.salvage.orphans import OrphanClusters, Unnamed, mark_header
from jqcow.salvage.others import Others, Places, mark_others, read_others
from jqcow.salvage.placing import Placed, place_orphans
from jqcow.salvage.plugs import find
from jqcow.salvage.reading import Below, PieceReader
from jqcow.salvage.shape import Damage, Shape
from jqcow.salvage.source import Source
from jqcow.salvage.tables import DiskTables, Known, read_snapshot_tables, read_tables


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
        ceiling: nothing is surer than this.
        placed: what became of the orphans; None as long as they were not placed.
    """

    source: Source
    shape: Shape
    others: Others
    guest_map: GuestMap
    snapshot_tables: list[DiskTables]
    unnamed: Unnamed
    ceiling: Certainty = Certainty.CERTAIN
    placed: Placed | None = None
    _ciphers: list[SectorCipher] = field(default_factory=list)

    @property
    def tables(self) -> DiskTables:
        """The tables of the disk that is to be had back."""
        return self.guest_map.tables

    def unlock(self, cipher: SectorCipher | None) -> None:
        """Read the guest's data of an encrypted image by ``cipher``."""
        self._ciphers = [] if cipher is None else [cipher]

    def orphans(self) -> OrphanClusters:
        """Return the clusters that nobody names, a new set."""
        bits = Bits(self.unnamed.bits.cluster_count)
        bits.data[:] = self.unnamed.bits.data
        source = self.source
        for cipher in self._ciphers:
            source = DecryptedSource(source, cipher, keeps_zeros=True)
        return OrphanClusters(source, self.shape.geometry.cluster_bits, bits)

    def reader(self, below: Below | None = None) -> PieceReader:
        """Return what reads the pieces of the disk; ``below`` reads the backing disk."""
        source = self.source
        for cipher in self._ciphers:
            source = DecryptedSource(source, cipher)
        return PieceReader(source, self.shape, below)

    def place(self, below: Below | None = None) -> Placed:
        """Place the orphans, once."""
        if self.placed is None:
            self.placed = place_orphans(self.guest_map, self.reader(below), self.orphans(), find)
        return self.placed

    def damages(self) -> list[Damage]:
        """Return all that is wrong: header, tables, other structures, refcounts."""
        found = [*self.shape.damages, *self.tables.damages]
        for tables in self.snapshot_tables:
            found += tables.damages
        return [*found, *self.others.damages, *self.unnamed.damages]


def survey(source: Source, shape: Shape, snapshot: str | None = None, also: Places | None = None) -> Survey:
    """Look at all structures of a file, and at no data.

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
    others = read_others(source, shape)
    marks = _fresh_marks(source, shape)
    mark_others(others, marks)
    known: Known = {}
    tables = read_tables(source, shape, marks, known)
    named, snapshot_tables = marks, []
    if others.snapshots:
        named = Marks(shape.geometry.cluster_bits, source.size())
        named.data[:] = marks.data
        for each in others.snapshots:
            snapshot_tables.append(read_snapshot_tables(source, shape, each, named, known))
    unnamed = Unnamed(source, shape, named)
    for _, offset, length in also or ():
        named.set_structure(offset, length)
        unnamed.bits.discard_range(offset >> named.cluster_bits, -(-(offset + length) >> named.cluster_bits))
    if snapshot is not None:
        marks = _fresh_marks(source, shape)
        wanted = _find(others.snapshots, snapshot)
        tables = read_snapshot_tables(source, shape, wanted, marks)
    if named is not marks:
        _spread_structures(named, marks)
    return Survey(source, shape, others, GuestMap(tables, marks), snapshot_tables, unnamed)


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
