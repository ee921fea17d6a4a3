"""What a guest's write may do where: what it overwrites, and which clusters it takes for the rest.

The rules are those of write.py (W1, M5) and, for a data file, of datafile.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jqcow.engine.clusters import Run
from jqcow.engine.mapping import MappedRun
from jqcow.engine.medium import EXPECTED
from jqcow.engine.places import Places
from jqcow.engine.read import Reads
from jqcow.engine.request import Request
from jqcow.ondisk import layout
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, UNALLOCATED, ZERO_CLUSTER, L2Entry
from jqcow.ondisk.layout import SECTOR_BYTES, ClusterIndex, GuestCluster, GuestOffset, HostOffset


class Piece(NamedTuple):
    """``length`` guest bytes at ``offset``, mapped as ``run``; the request may cover part of them, or none.

    ``in_place``: they may be written where they are (W1).
    """

    offset: GuestOffset
    length: int
    run: MappedRun
    in_place: bool


class Fresh(NamedTuple):
    """Guest clusters from ``cluster`` on that will be mapped to ``run``, and the piece that is written there.

    ``is_new``: the run was taken for them. Else they have it already, behind subclusters without data, or it
    was taken for the piece before.
    """

    piece: Piece
    cluster: GuestCluster
    run: Run
    is_new: bool


@dataclass
class WritePlan:
    """What a write does; ``ordered`` once a pair turned out not to be zero-safe (W2).

    ``changed`` is what of the disk it changes: (guest offset, length) in bytes.
    """

    pieces: list[Piece]
    changed: tuple[int, int]
    fresh: list[Fresh] = field(default_factory=list)
    ordered: bool = False
    uncounted: list[Run] = field(default_factory=list)
    """The runs that it took and has not counted: its own to give back, should it fail."""
    zeroes: bool = False
    """It makes zeros of what it covers, without any data."""


class Planning:
    """Plans of a guest's writes, made with the lock held."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.requests = reads.requests
        self.tables = reads.tables
        self.medium = reads.medium
        self.data = reads.data
        self.guard = reads.requests.guard
        self.geometry = reads.requests.geometry
        self._cluster_bytes = self.geometry.cluster_bytes
        self._subcluster_bytes = reads.tables.mapping.codec.subcluster_bytes
        self._is_outside = self.geometry.has_data_file
        self.places = Places(reads.requests)

    def plan(self, request: Request, offset: GuestOffset, length: int, *, copies: bool = False) -> WritePlan:
        """Find what may be written in place, take clusters for the rest, and begin the request.

        ``copies``: what is written is what the disk reads there anyway.

        Raises:
            Cold: bitmaps have to be durable first (tracking.py, B1).
        """
        start = offset - offset % SECTOR_BYTES
        self.requests.require_settled(start, layout.round_up(offset + length, SECTOR_BYTES) - start)
        plan = WritePlan(self.pieces(offset, length), (offset, 0 if copies else length))
        if self._subcluster_bytes < self._cluster_bytes and not self._is_outside:
            self._carry(plan, offset, offset + length)
        if all(piece.in_place for piece in plan.pieces):
            # It changes no entry, so none is its own (Q1); its clusters stay where they are (S6).
            first, end = self.requests.clusters_of_sectors(offset, length)
            self.guard.require_free(first, end)
            self._fill_last_sector(offset + length)
            self.requests.dirty.will_write(offset, length)
            if plan.pieces:
                self.reads.learn(plan.pieces[0].run, offset, to_write=True)
            self.guard.begin(request, changes=True, first=first, end=end)
            return plan
        first, end = offset // self._cluster_bytes, self.geometry.clusters(offset + length)
        self.guard.require_free(first, end)
        self.requests.require_live()
        self.places.require_data(first, end)
        # Outside the section: a block that is not in memory interrupts the plan, and must leave no doubt.
        kept = [self._kept_clusters(piece) for piece in plan.pieces]
        if self._changes_in_place(plan, kept):
            self.requests.dirty.will_write(offset, length)
        with self.medium.section():
            try:
                for piece, piece_kept in zip(plan.pieces, kept, strict=True):
                    if not piece.in_place:
                        self._take_fresh(plan, piece, piece_kept)
                self._fill_last_sector(offset + length)
            except EXPECTED:
                self.tables.space.give_back(plan.uncounted)
                raise
            self.guard.begin(request, changes=True, first=first, end=end)
        return plan

    def _fill_last_sector(self, end: int) -> None:
        """Make the file reach its frontier before a write that ends within a sector, maybe its last (M5).

        Clusters are whole sectors, so the guest's offset tells as much as the host's.
        """
        if end % SECTOR_BYTES and self._is_outside:
            if self.medium.data_file is not None:
                self.medium.data_file.grow(layout.round_up(end, SECTOR_BYTES))
        elif end % SECTOR_BYTES:
            self.medium.grow(self.geometry.offset_of(self.tables.space.frontier))

    def _carry(self, plan: WritePlan, start: int, end: int) -> None:
        """Add to a plan what else of its first and last cluster moves to another host cluster with it."""
        for position in {start - start % self._cluster_bytes, end - end % self._cluster_bytes}:
            cluster_end = position + self._cluster_bytes
            inside = [
                piece
                for piece in plan.pieces
                if piece.offset < cluster_end and position < piece.offset + piece.length
            ]
            if all(piece.in_place for piece in inside):
                continue
            entry = self.tables.mapping_at_hand.l2_entry(GuestCluster(position // self._cluster_bytes))
            if not entry.host or self._may_be_kept(entry):
                continue
            # Subclusters that are written in part are completed; these are not written at all.
            first = start - start % self._subcluster_bytes
            last = layout.round_up(end, self._subcluster_bytes)
            for begin, stop in ((position, first), (max(position, last), cluster_end)):
                if begin < stop:
                    plan.pieces += self._carried(GuestOffset(begin), stop - begin)
        plan.pieces.sort(key=lambda piece: piece.offset)

    def _carried(self, offset: GuestOffset, length: int) -> Iterator[Piece]:
        for run in self.tables.mapping_at_hand.runs(offset, length):
            if run.kind in (DATA, COMPRESSED_CLUSTER):
                yield Piece(offset, run.length, run, False)
            offset = GuestOffset(offset + run.length)

    def pieces(self, offset: GuestOffset, length: int) -> list[Piece]:
        """Return the runs of a guest range that is about to be changed; data clusters are checked for it.

        Raises:
            CorruptionError: a data cluster holds metadata, or has refcount 0.
        """
        pieces: list[Piece] = []
        for run in self.tables.mapping_at_hand.runs(offset, length):
            if run.kind == DATA:
                pieces += self._split_at_shared(offset, run)
            else:
                pieces.append(Piece(offset, run.length, run, False))
            offset = GuestOffset(offset + run.length)
        return pieces

    def _split_at_shared(self, offset: GuestOffset, run: MappedRun) -> Iterator[Piece]:
        """Cut a data run where clusters that may be overwritten meet such that may not (W1)."""
        end, cluster_bytes = offset + run.length, self._cluster_bytes

        def may_overwrite(position: int) -> bool:
            host = HostOffset(run.host + position - offset)
            return self.may_overwrite(self.geometry.cluster_of(host), copied=run.copied)

        def piece(start: int, end: int) -> Piece:
            part = run._replace(host=HostOffset(run.host + start - offset), length=end - start)
            return Piece(GuestOffset(start), end - start, part, in_place)

        start, in_place = int(offset), may_overwrite(offset)
        for position in range(start - start % cluster_bytes + cluster_bytes, end, cluster_bytes):
            if may_overwrite(position) != in_place:
                yield piece(start, position)
                start, in_place = position, not in_place
        yield piece(start, end)

    def may_overwrite(self, cluster: ClusterIndex, *, copied: bool) -> bool:
        """Return True if a cluster that a guest's entry names may be written in place (W1, W5, G2)."""
        if self._is_outside:
            if not self.tables.changes.may_overwrite(cluster):
                self.places.refuse_overwriting()
            return True
        is_shared = self.tables.refcounts_at_hand.data_refcount(cluster) > 1
        is_own = copied and not is_shared and cluster not in self.tables.space.left_alone
        return is_own and self.tables.changes.may_overwrite(cluster)

    def _may_be_kept(self, entry: L2Entry) -> bool:
        """Return True if an entry has a host cluster that may be written where it holds no data (W1)."""
        if not entry.host or entry.kind == COMPRESSED_CLUSTER:
            return False
        return self.may_overwrite(self.geometry.cluster_of(entry.host), copied=entry.copied)

    def _changes_in_place(self, plan: WritePlan, kept: list[dict[int, HostOffset]]) -> bool:
        """Return True if a crash before the next record may show what a plan writes."""
        # What an entry keeps under zeros may be data in the last record; so may all of a data file.
        return self._is_outside or any(kept) or any(piece.in_place for piece in plan.pieces)

    def _kept_clusters(self, piece: Piece) -> dict[int, HostOffset]:
        """Return what entries without data there keep and may be reused: host offsets by guest cluster."""
        if self._is_outside:
            return {}
        if piece.run.kind != ZERO_CLUSTER and not (piece.run.kind == UNALLOCATED and piece.run.host):
            return {}
        kept = {}
        first, end = piece.offset // self._cluster_bytes, self.geometry.clusters(piece.offset + piece.length)
        for cluster in range(first, end):
            entry = self.tables.mapping_at_hand.l2_entry(GuestCluster(cluster))
            if self._may_be_kept(entry):
                kept[cluster] = entry.host
        return kept

    def _take_fresh(self, plan: WritePlan, piece: Piece, kept: dict[int, HostOffset]) -> None:
        """Take clusters for a piece that needs another mapping: new ones, or those that its entries keep."""
        cluster = piece.offset // self._cluster_bytes
        end = self.geometry.clusters(piece.offset + piece.length)
        if self._is_outside:
            run = self.places.run_of(cluster, end - cluster)
            self.places.require_spare(run, piece.offset, piece.length)
            self.places.occupy(run)
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run, is_new=False))
            return
        before = plan.fresh[-1] if plan.fresh else None
        if before is not None and cluster == before.cluster + before.run.count - 1:
            # Other subclusters of the cluster in which the piece before ends.
            last = ClusterIndex(before.run.start + before.run.count - 1)
            run = Run(last, 1, zero_safe=self._plan_part(last, cluster, piece))
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run, is_new=False))
            cluster += 1
        while cluster < end:
            is_new = cluster not in kept
            if is_new:
                count = end - cluster
                if kept:
                    count = next((at - cluster for at in range(cluster, end) if at in kept), count)
                self._leave_place_for_table(cluster)
                run = self.tables.refcounts.take(count)
                plan.uncounted.append(run)
                self._plan_new(run, cluster, piece)
            else:
                # Whatever an entry keeps has old bytes in it, unless this process knows better.
                place = self.geometry.cluster_of(kept[cluster])
                run = Run(place, 1, zero_safe=self._plan_part(place, cluster, piece))
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run, is_new))
            cluster += run.count

    def _leave_place_for_table(self, cluster: int) -> None:
        """Where tables are to lie before what they map: keep a place for the L2 table of a guest cluster."""
        space, mapping = self.tables.space, self.tables.mapping
        if space.tables_first:
            l1_index = cluster // mapping.codec.per_table
            if l1_index not in space.kept_for_tables and not mapping.l2_table(l1_index):
                space.kept_for_tables[l1_index] = space.take(1)

    def _plan_new(self, run: Run, cluster: int, piece: Piece) -> None:
        """Remember what a piece leaves unwritten of new clusters, of which the first is for ``cluster``."""
        subclusters = self.tables.mapping.codec.subclusters
        if subclusters > 1:
            for at in range(run.count):
                place = ClusterIndex(run.start + at)
                self.tables.space.unwritten.taken(place, subclusters, zero_safe=run.zero_safe)
                self._plan_part(place, cluster + at, piece)

    def _plan_part(self, place: ClusterIndex, cluster: int, piece: Piece) -> bool:
        """A piece will be written in a guest cluster at a place; return True if it is zero-safe there."""
        part = self.tables.mapping.codec.part(cluster, piece.offset, piece.offset + piece.length)
        return self.tables.space.unwritten.plan_to_write(place, part)
