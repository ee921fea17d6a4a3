"""What a guest's write does: find what it may overwrite, take clusters for the rest, write, map.

W1. In place only where the refcount, staged changes included, is 1 and the entry has the COPIED flag, which
    no operation but a transaction's sets on a cluster that exists (save W5); in a transaction, only in
    clusters that it allocated since its last savepoint.
W2. A newly visible pair (guest range, host range) is zero-safe only if the guest's old content reads as
    zeros and the host range would read as zeros if its data never came. Every other pair is ordered.
W3. A subcluster that is not zero-safe is written whole.
W4. Data goes to the device before the entry that maps it is staged.
M5. The file ends where a sector does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jqcow.engine.clusters import Run
from jqcow.engine.mapping import MappedRun
from jqcow.engine.medium import EXPECTED
from jqcow.engine.places import Places
from jqcow.engine.read import Reads
from jqcow.engine.request import Request
from jqcow.engine.sharing import leave_to_one
from jqcow.ondisk import layout
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, NO_ENTRY, UNALLOCATED, ZERO_CLUSTER, L2Entry
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


class Writes:
    """Writes of a guest. Each part up to a metadata block of mapping is all or nothing in its mapping."""

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

    def write(self, data: memoryview, offset: int) -> None:
        """Write the guest's bytes at ``offset``.

        Raises:
            OSError: sectors of the failed part that were overwritten in place may be old or new; all else
                of it is as before.
        """
        for start, length in self.requests.spans_to_change(offset, len(data)):
            self.write_span(data[start - offset : start - offset + length], start, within_disk=True)

    def write_span(self, data: memoryview, offset: GuestOffset, *, within_disk: bool) -> None:
        """Write within one metadata block of mapping; ``within_disk``: and within the disk."""

        def plan(request: Request) -> WritePlan:
            self.requests.enter_change()
            if within_disk:
                self.requests.check_range(offset, len(data))
            return self.plan(request, offset, len(data))

        self.perform(offset, plan, lambda _: data)

    def zero_raw(self, offset: GuestOffset, length: int) -> None:
        """Make zeros of data in a raw data file, within one metadata block and the disk (datafile.py, X3)."""

        def plan(request: Request) -> WritePlan:
            self.requests.enter_change()
            self.requests.check_range(offset, length)
            planned = self.plan(request, offset, length)
            planned.zeroes = True
            return planned

        self.perform(offset, plan, lambda _: memoryview(b""))

    def perform(
        self,
        offset: GuestOffset,
        plan_for: Callable[[Request], WritePlan | None],
        data_for: Callable[[WritePlan], memoryview],
    ) -> None:
        """Plan, run and stage a write; a plan of None has nothing to do."""
        requests = self.requests
        request = Request()
        with request.running:
            plan = requests.planned(lambda: plan_for(request))
            if plan is None:
                return
            try:
                try:
                    self._run_write(plan, data_for(plan), offset)
                finally:
                    # Also after a failure: what it left can be read. Not by a call, which could be cut off.
                    requests.commits.turn.is_clean = False
                if plan.fresh:
                    with requests.lock:
                        requests.dirty.will_stage(*plan.changed)
                        with self.tables.operation():
                            self._stage_write(plan)
            except BaseException:
                self.give_back(plan.uncounted)
                raise
            finally:
                self.guard.end(request)
        if plan.fresh:
            requests.commit_if_large()

    # Plan, with the lock held

    def plan(self, request: Request, offset: GuestOffset, length: int, *, copies: bool = False) -> WritePlan:
        """Find what may be written in place, take clusters for the rest, and begin the request.

        ``copies``: what is written is what the disk reads there anyway.

        Raises:
            Cold: bitmaps have to be durable first (tracking.py, B1).
        """
        plan = WritePlan(self._pieces(offset, length), (offset, 0 if copies else length))
        if self._subcluster_bytes < self._cluster_bytes and not self._is_outside:
            self._carry(plan, offset, offset + length)
        if all(piece.in_place for piece in plan.pieces):
            # It changes no entry, so none is its own (Q1); its clusters stay where they are (S6).
            first, end = self.requests.clusters_of_sectors(offset, length)
            self.guard.require_free(first, end)
            self._fill_last_sector(offset + length)
            self.requests.dirty.will_write(offset, length)
            self.guard.begin(request, changes=True, first=first, end=end)
            return plan
        first, end = offset // self._cluster_bytes, self.geometry.clusters(offset + length)
        self.guard.require_free(first, end)
        self.requests.require_live()
        self.places.require_data(first, end)
        if self._may_overwrite_old(plan):
            self.requests.dirty.will_write(offset, plan.changed[1])
        # Outside the section: a block that is not in memory interrupts the plan, and must leave no doubt.
        kept = [self._kept_clusters(piece) for piece in plan.pieces]
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

    def _pieces(self, offset: GuestOffset, length: int) -> list[Piece]:
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
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run, is_new=False))
            return
        before = plan.fresh[-1] if plan.fresh else None
        if before is not None and cluster == before.cluster + before.run.count - 1:
            # Other subclusters of the cluster in which the piece before ends.
            last = ClusterIndex(before.run.start + before.run.count - 1)
            run = Run(last, 1, zero_safe=before.run.zero_safe)
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run, is_new=False))
            cluster += 1
        while cluster < end:
            is_new = cluster not in kept
            if is_new:
                count = end - cluster
                if kept:
                    count = next((at - cluster for at in range(cluster, end) if at in kept), count)
                run = self.tables.refcounts.take(count)
                plan.uncounted.append(run)
            else:
                # Whatever an entry keeps has old bytes in it.
                run = Run(self.geometry.cluster_of(kept[cluster]), 1, zero_safe=False)
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run, is_new))
            cluster += run.count

    def _may_overwrite_old(self, plan: WritePlan) -> bool:
        """Return True if a write may change bytes that a durable entry shows (tracking.py, B1).

        In a data file a new cluster may lie over one whose discard is not durable.
        """
        return self._is_outside or any(piece.in_place for piece in plan.pieces)

    # Run, without the lock

    def _run_write(self, plan: WritePlan, data: memoryview, offset: GuestOffset) -> None:
        if plan.zeroes:
            for piece in plan.pieces:
                if self.medium.data_file is not None:
                    self.medium.require_healthy()
                    self.medium.data_file.zero(piece.run.host, piece.length)
            return
        for piece in plan.pieces:
            if piece.in_place:
                start = piece.offset - offset
                self.data.pwrite(data[start : start + piece.length], piece.run.host)
        for fresh in plan.fresh:
            plan.ordered |= self._write_fresh(fresh, data, offset)

    def _write_fresh(self, fresh: Fresh, data: memoryview, offset: GuestOffset) -> bool:
        """Write what of a request's ``data`` falls into a fresh run; return True if it is ordered."""
        piece, run, unit = fresh.piece, fresh.run, self._subcluster_bytes
        run_start = fresh.cluster * self._cluster_bytes
        # Where the run's first byte would be if the guest began with it.
        host = self.geometry.offset_of(run.start) - run_start
        first = max(run_start, piece.offset)
        stop = min(run_start + run.count * self._cluster_bytes, piece.offset + piece.length)
        start, end = max(first, offset), min(stop, offset + len(data))
        first, stop = first - first % unit, layout.round_up(stop, unit)
        if start >= end:
            # It moves with the rest of its cluster.
            whole = memoryview(bytearray(stop - first))
            self._read_old(piece, GuestOffset(first), whole)
            self.data.pwrite(whole, HostOffset(host + first))
            return True
        part = data[start - offset : end - offset]
        if run.zero_safe and self._shows_holes() and self._was_zero(piece, first, stop):
            self.data.pwrite(part, HostOffset(host + start))
            return False
        # W2, W3: without the barrier in between, a crash could show what the host clusters held before.
        position, whole_end = GuestOffset(first), end - end % unit
        while position < stop:
            if start <= position < whole_end:
                whole = part[position - start : whole_end - start]
            else:
                whole = self._complete(piece, position, part, start)
            self.data.pwrite(whole, HostOffset(host + position))
            position = GuestOffset(position + len(whole))
        return True

    def _complete(self, piece: Piece, offset: GuestOffset, part: memoryview, start: int) -> memoryview:
        """Return a whole subcluster: of ``part``, which begins at ``start``, and old bytes beside it.

        Behind the end of the disk these may come from a longer backing file; growing hides them.
        """
        whole = memoryview(bytearray(self._subcluster_bytes))
        first, end = max(0, start - offset), min(len(whole), start + len(part) - offset)
        if first:
            self._read_old(piece, offset, whole[:first])
        if end < len(whole):
            self._read_old(piece, GuestOffset(offset + end), whole[end:])
        whole[first:end] = part[offset + first - start : offset + end - start]
        return whole

    def _read_old(self, piece: Piece, offset: GuestOffset, buffer: memoryview) -> None:
        """Read the guest's old bytes beside a piece, in the first or last of its subclusters, or in it."""
        run = piece.run
        if run.kind == DATA:
            run = run._replace(host=HostOffset(run.host + offset - piece.offset))
        self.reads.read_run(run, buffer, offset)

    def _shows_holes(self) -> bool:
        """True if what was never written reads as zeros (E1)."""
        return not self.data.is_encrypted

    def _was_zero(self, piece: Piece, start: int, end: int) -> bool:
        """Return True if whole subclusters of a piece read as zeros until now (W2)."""
        if piece.run.kind == UNALLOCATED:
            return self.reads.below_reads_as_zeros(start, end - start)
        return piece.run.kind == ZERO_CLUSTER

    # Stage, with the lock held, in an operation

    def _stage_write(self, plan: WritePlan) -> None:
        tables = self.tables
        if plan.ordered and not self._is_outside:
            # In a data file X1 sees to that.
            tables.changes.ordered = True
        for fresh in plan.fresh:
            if tables.changes.own is not None and self._is_outside:
                places = map(ClusterIndex, range(fresh.run.start, fresh.run.start + fresh.run.count))
                tables.changes.own.update(places)
                tables.changes.outside |= tables.changes.own
            if fresh.is_new:
                # From here on they are the operation's to give up, should it fail.
                plan.uncounted.remove(fresh.run)
                tables.refcounts.count_in(fresh.run)
            self._map(fresh)

    def _map(self, fresh: Fresh) -> None:
        piece, first, run, _ = fresh
        codec, mapping = self.tables.mapping.codec, self.tables.mapping
        clusters = range(first, first + run.count)
        replaced = None
        if piece.run.kind != UNALLOCATED or codec.subclusters > 1:
            replaced = [mapping.l2_entry(GuestCluster(cluster)) for cluster in clusters]
        host = self.geometry.offset_of(run.start)
        values = [
            codec.filled(
                replaced[at] if replaced else NO_ENTRY,
                HostOffset(host + at * self._cluster_bytes),
                codec.part(cluster, piece.offset, piece.offset + piece.length),
            )
            for at, cluster in enumerate(clusters)
        ]
        self.replace_entries(first, replaced, values)

    def replace_entries(
        self, first: GuestCluster, replaced: list[L2Entry] | None, values: list[L2Entry]
    ) -> None:
        """Stage other L2 entries, and give up what the old ones referred to and the new ones do not.

        ``replaced`` are the old ones, None where none of them refers to anything.
        """
        mapping, refcounts = self.tables.mapping, self.tables.refcounts
        mapping.set_entries(first, values)
        for old, new in zip(replaced or (), values, strict=replaced is not None):
            # A new compressed cluster has counted references of its own, also where it lies in the host
            # cluster of the old one: all references of that one go.
            kept = range(0) if new.kind == COMPRESSED_CLUSTER else mapping.codec.hosts(new)
            hosts = mapping.codec.hosts(old)
            if hosts and hosts != kept:
                left_one = refcounts.release(ClusterIndex(hosts.start), len(hosts))
                if old.kind != COMPRESSED_CLUSTER:
                    # Compressed clusters share host clusters as a matter of course, and have no flag.
                    leave_to_one(self.tables, left_one)

    def give_back(self, uncounted: list[Run]) -> None:
        """A request failed: what it took and did not count is free again."""
        if uncounted:
            self.medium.undo(lambda: self.tables.space.give_back(uncounted))
