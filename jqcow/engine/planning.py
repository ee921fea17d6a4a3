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
from jqcow.engine.metadata import Absent
from jqcow.engine.places import Places
from jqcow.engine.read import Reads
from jqcow.engine.refcounts import Allocation
from jqcow.engine.request import Request
from jqcow.ondisk import layout
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, UNALLOCATED, ZERO_CLUSTER, L2Entry
from jqcow.ondisk.layout import SECTOR_BYTES, ClusterIndex, GuestCluster, GuestOffset, HostOffset

Part = tuple[GuestOffset, memoryview]
"""Bytes that the guest wrote, and where."""


class Piece(NamedTuple):
    """``length`` guest bytes at ``offset``, mapped as ``run``; the request may cover part of them, or none.

    ``in_place``: they may be written where they are (W1).
    """

    offset: GuestOffset
    length: int
    run: MappedRun
    in_place: bool


class Fresh(NamedTuple):
    """Guest clusters from ``cluster`` on that will be mapped to ``run``, and the piece written there."""

    piece: Piece
    cluster: GuestCluster
    run: Run


@dataclass
class WritePlan:
    """What a write of ``length`` bytes at guest ``offset`` does.

    ``copies``: what is written is what the disk reads there anyway. ``ordered``: a pair turned out not to be
    zero-safe (W2).
    """

    pieces: list[Piece]
    offset: GuestOffset
    length: int
    copies: bool
    fresh: list[Fresh] = field(default_factory=list)
    ordered: bool = False
    uncounted: list[Run] = field(default_factory=list)
    """The runs that its request took and has not counted: its own to give back, should it fail."""
    zeroes: bool = False
    """It makes zeros of what it covers, without any data."""
    waits_with: WritePlan | None = None
    """What it covers waits in the journal, with what this plan writes in its midst (destaging.py, I7)."""

    @property
    def end(self) -> int:
        """The guest offset behind what it writes."""
        return self.offset + self.length

    @property
    def changed(self) -> tuple[int, int]:
        """What of the disk it changes: (guest offset, length) in bytes."""
        return self.offset, 0 if self.copies else self.length

    @property
    def is_in_place(self) -> bool:
        """True if it needs no other mapping."""
        return all(piece.in_place for piece in self.pieces)


class Taking:
    """The clusters that a request takes. ``ahead`` of them it is sure to take: they come in few runs."""

    def __init__(self, refcounts: Allocation, ahead: int) -> None:
        self.uncounted: list[Run] = []
        self._refcounts = refcounts
        self._ahead = ahead
        self._left: Run | None = None

    def take(self, count: int) -> Run:
        """Take up to ``count`` clusters in a row, at least one."""
        left = self._left
        if left is None:
            left = self._refcounts.take(max(count, self._ahead))
            self.uncounted.append(left)
        taken = min(count, left.count)
        self._ahead -= taken
        rest = Run(ClusterIndex(left.start + taken), left.count - taken, zero_safe=left.zero_safe)
        self._left = rest if rest.count else None
        return Run(left.start, taken, zero_safe=left.zero_safe)


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
        plan = self.look(offset, length, copies=copies)
        self.begin(request, plan)
        return plan

    def look(self, offset: GuestOffset, length: int, *, copies: bool = False) -> WritePlan:
        """Find what may be written in place, and what goes elsewhere with the rest."""
        plan = WritePlan(self.pieces(offset, length), offset, length, copies)
        if self._subcluster_bytes < self._cluster_bytes and not self._is_outside:
            self._carry(plan, offset, offset + length)
        return plan

    def begin(self, request: Request, plan: WritePlan) -> None:
        """Take the clusters that a plan needs, and begin its request; errors as `plan`."""
        start = plan.offset - plan.offset % SECTOR_BYTES
        self.requests.require_settled(start, layout.round_up(plan.end, SECTOR_BYTES) - start)
        self._begin(request, [plan])

    def plan_some(
        self, request: Request, parts: list[Part], limit: int
    ) -> tuple[list[WritePlan], list[Part]]:
        """Plan up to ``limit`` of many writes, and begin one request for them; return the others, too.

        Each lies within one metadata block of mapping, and writes what the disk reads there anyway.
        """
        plans: list[WritePlan] = []
        later: list[Part] = []
        mapped_end = 0
        for at, part in enumerate(parts):
            offset, data = part
            if offset // self._cluster_bytes < mapped_end:
                # One before it gives its cluster a place: then it goes there.
                later.append(part)
                continue
            self.requests.check_range(offset, len(data))
            try:
                plan = self.look(offset, len(data), copies=True)
            except Absent:
                if not plans:
                    raise
                later += parts[at:]
                break
            plans.append(plan)
            if not plan.is_in_place:
                mapped_end = self.geometry.clusters(plan.end)
            if len(plans) == limit:
                later += parts[at + 1 :]
                break
        self._begin(request, plans)
        return plans, later

    def _begin(self, request: Request, plans: list[WritePlan]) -> None:
        """Take the clusters that plans need, and begin their request.

        Raises:
            Cold: bitmaps have to be durable first (tracking.py, B1).
        """
        start, stop = min(plan.offset for plan in plans), max(plan.end for plan in plans)
        if all(plan.is_in_place for plan in plans):
            # It changes no entry, so none is its own (Q1); its clusters stay where they are (S6).
            first, end = self.requests.clusters_of_sectors(start, stop - start)
            self.guard.require_free(first, end)
            for plan in plans:
                self._fill_last_sector(plan.end)
                self.requests.dirty.will_write(*plan.changed)
                if plan.pieces:
                    self.reads.learn(plan.pieces[0].run, plan.offset, to_write=True)
            self.guard.begin(request, changes=True, first=first, end=end)
            return
        first, end = start // self._cluster_bytes, self.geometry.clusters(stop)
        self.guard.require_free(first, end)
        self.requests.require_live()
        # Outside the section: a block that is not in memory interrupts the plan, and must leave no doubt.
        kept = [self._require_places(plan) for plan in plans]
        with self.medium.section():
            taking = Taking(self.tables.refcounts, self._needed(plans, kept))
            try:
                for plan, kept_in_plan in zip(plans, kept, strict=True):
                    plan.uncounted = taking.uncounted
                    for piece, kept_in_piece in zip(plan.pieces, kept_in_plan, strict=True):
                        if not piece.in_place:
                            self._take_fresh(plan, piece, kept_in_piece, taking)
                    self._fill_last_sector(plan.end)
            except EXPECTED:
                self.tables.space.give_back(taking.uncounted)
                raise
            self.guard.begin(request, changes=True, first=first, end=end)

    def _require_places(self, plan: WritePlan) -> list[dict[int, HostOffset]]:
        """Have made durable what a plan needs; return the clusters that the entries of its pieces keep."""
        self.places.require_data(plan.offset // self._cluster_bytes, self.geometry.clusters(plan.end))
        kept = [self._kept_clusters(piece) for piece in plan.pieces]
        if self._changes_in_place(plan, kept):
            self.requests.dirty.will_write(*plan.changed)
        return kept

    def _needed(self, plans: list[WritePlan], kept: list[list[dict[int, HostOffset]]]) -> int:
        """Return how many clusters several plans are sure to take; 0 where that is hard to tell."""
        if len(plans) == 1 or self._is_outside or self._subcluster_bytes < self._cluster_bytes:
            return 0
        return sum(
            self.geometry.clusters(piece.offset + piece.length)
            - piece.offset // self._cluster_bytes
            - len(kept_in_piece)
            for plan, kept_in_plan in zip(plans, kept, strict=True)
            for piece, kept_in_piece in zip(plan.pieces, kept_in_plan, strict=True)
            if not piece.in_place
        )

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

    def _take_fresh(self, plan: WritePlan, piece: Piece, kept: dict[int, HostOffset], taking: Taking) -> None:
        """Take clusters for a piece that needs another mapping: new ones, or those that its entries keep."""
        cluster = piece.offset // self._cluster_bytes
        end = self.geometry.clusters(piece.offset + piece.length)
        if self._is_outside:
            run = self.places.run_of(cluster, end - cluster)
            self.places.require_spare(run, piece.offset, piece.length)
            self.places.occupy(run)
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run))
            return
        before = plan.fresh[-1] if plan.fresh else None
        if before is not None and cluster == before.cluster + before.run.count - 1:
            # Other subclusters of the cluster in which the piece before ends.
            last = ClusterIndex(before.run.start + before.run.count - 1)
            run = Run(last, 1, zero_safe=self._plan_part(last, cluster, piece))
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run))
            cluster += 1
        while cluster < end:
            if cluster not in kept:
                count = end - cluster
                if kept:
                    count = next((at - cluster for at in range(cluster, end) if at in kept), count)
                self._leave_place_for_table(cluster)
                run = taking.take(count)
                self._plan_new(run, cluster, piece)
            else:
                # Whatever an entry keeps has old bytes in it, unless this process knows better.
                place = self.geometry.cluster_of(kept[cluster])
                run = Run(place, 1, zero_safe=self._plan_part(place, cluster, piece))
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run))
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
