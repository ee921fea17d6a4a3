"""What a guest's write does: find what it may overwrite, take clusters for the rest, write, map.

W1. In place only where the refcount, staged changes included, is 1 and the entry has the COPIED flag, which
    no operation but a transaction's sets on a cluster that exists; in a transaction, only in clusters that
    it allocated since its last savepoint.
W2. A newly visible pair (guest range, host range) is zero-safe only if the guest's old content reads as
    zeros and the host range would read as zeros if its data never came. Every other pair is ordered.
W3. A cluster that is not zero-safe is written whole.
W4. Data goes to the device before the entry that maps it is staged.
M5. The file ends where a sector does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jqcow.engine.changes import Run
from jqcow.engine.guard import Request
from jqcow.engine.mapping import MappedRun
from jqcow.engine.medium import PLANNED
from jqcow.engine.request import Requests
from jqcow.ondisk import layout
from jqcow.ondisk.entries import COMPRESSED_CLUSTER, DATA, UNALLOCATED, ZERO_CLUSTER, L2Entry, data_entry
from jqcow.ondisk.layout import SECTOR_BYTES, ClusterIndex, GuestCluster, GuestOffset, HostOffset


class Piece(NamedTuple):
    """``length`` guest bytes of a request at ``offset``, mapped as ``run``.

    ``in_place``: they may be written where they are (W1).
    """

    offset: GuestOffset
    length: int
    run: MappedRun
    in_place: bool


class Fresh(NamedTuple):
    """Guest clusters from ``cluster`` on that will be mapped to ``run``, and the piece that is written there.

    ``is_kept``: they have the host cluster already, behind a zero entry.
    """

    piece: Piece
    cluster: GuestCluster
    run: Run
    is_kept: bool


@dataclass
class WritePlan:
    """What a write does; ``ordered`` once a pair turned out not to be zero-safe (W2)."""

    pieces: list[Piece]
    fresh: list[Fresh] = field(default_factory=list)
    ordered: bool = False
    taken: list[Run] = field(default_factory=list)
    """The runs that it took and has not counted; those that were counted are the operation's to give up."""


class Writes:
    """Writes of a guest. Each part up to a metadata block of mapping is all or nothing in its mapping."""

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self.tables = requests.tables
        self.medium = requests.medium
        self.guard = requests.guard
        self.geometry = requests.geometry
        self._cluster_bytes = requests.geometry.cluster_bytes

    def write(self, data: memoryview, offset: int) -> None:
        """Write the guest's bytes at ``offset``.

        Raises:
            OSError: sectors of the failed part that were overwritten in place may be old or new; all else
                of it is as before.
        """
        spans = self.requests.spans(offset, len(data)) if data else [(GuestOffset(offset), 0)]
        for start, length in spans:
            self.write_span(data[start - offset : start - offset + length], start, within_disk=True)

    def write_span(self, data: memoryview, offset: GuestOffset, *, within_disk: bool = False) -> None:
        """Write within one metadata block of mapping; ``within_disk``: and within the disk."""

        def plan(request: Request) -> WritePlan:
            self.requests.enter_change()
            if within_disk:
                self.requests.check_range(offset, len(data))
            return self._plan_write(request, offset, len(data))

        self._perform(offset, plan, lambda plan: data)

    def _perform(
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
                self._run_write(plan, data_for(plan), offset)
                # C2: a flush from here on must not take an older commit for its own.
                requests.commits.turn.is_clean = False
                if plan.fresh:
                    with requests.lock, self.tables.operation():
                        self._stage_write(plan)
            except BaseException:
                self.give_back(plan.taken)
                raise
            finally:
                self.guard.end(request)
        if plan.fresh:
            requests.commit_if_large()

    def _plan_write(self, request: Request, offset: GuestOffset, length: int) -> WritePlan:
        plan = WritePlan(self._pieces(offset, length))
        if all(piece.in_place for piece in plan.pieces):
            self._reach(offset + length)
            self.guard.begin(request, changes=True)
            return plan
        first, end = offset // self._cluster_bytes, self.geometry.clusters(offset + length)
        self.guard.require_free(first, end)
        self.requests.require_live()
        kept = [self._kept_clusters(piece) for piece in plan.pieces]
        with self.medium.section():
            try:
                for piece, piece_kept in zip(plan.pieces, kept, strict=True):
                    if not piece.in_place:
                        self._take_fresh(plan, piece, piece_kept)
                self._reach(offset + length)
            except PLANNED:
                self.tables.space.give_back(plan.taken)
                raise
            request.first, request.end = first, end
            self.guard.begin(request, changes=True)
        return plan

    def _reach(self, end: int) -> None:
        """Make the file reach its frontier before a write that ends within a sector, maybe its last (M5)."""
        if end % SECTOR_BYTES:
            self.medium.grow(self.geometry.offset_of(self.tables.space.frontier))

    def _pieces(self, offset: GuestOffset, length: int) -> list[Piece]:
        """Return the runs of a guest range that is about to be changed, all of them checked for it.

        Raises:
            CorruptionError: a cluster holds metadata, or is mapped with refcount 0.
            UnsupportedFeatureError: a cluster is shared, and there is no snapshot to share it with.
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
        cluster_bytes, end = self._cluster_bytes, offset + run.length
        start = offset
        in_place = self.may_overwrite(self.geometry.cluster_of(run.host), copied=run.copied)
        while start < end:
            reach, follows = int(start), in_place
            while reach < end and follows == in_place:
                reach = min(end, reach - reach % cluster_bytes + cluster_bytes)
                if reach < end:
                    host = HostOffset(run.host + reach - offset)
                    follows = self.may_overwrite(self.geometry.cluster_of(host), copied=run.copied)
            part = run._replace(host=HostOffset(run.host + start - offset), length=reach - start)
            yield Piece(start, reach - start, part, in_place)
            start, in_place = GuestOffset(reach), follows

    def may_overwrite(self, cluster: ClusterIndex, *, copied: bool) -> bool:
        """Return True if a cluster that a guest's entry names may be written in place (W1, G2)."""
        is_shared = self.tables.refcounts_at_hand.data_refcount(cluster) > 1
        fresh = self.tables.changes.fresh
        return copied and not is_shared and (fresh is None or cluster in fresh)

    def _kept_clusters(self, piece: Piece) -> dict[int, HostOffset]:
        """Return what zero entries of a piece keep and may be reused: host offsets by guest cluster."""
        if piece.run.kind != ZERO_CLUSTER:
            return {}
        kept = {}
        first, end = piece.offset // self._cluster_bytes, self.geometry.clusters(piece.offset + piece.length)
        for cluster in range(first, end):
            entry = self.tables.mapping_at_hand.l2_entry(GuestCluster(cluster))
            if entry.host and self.may_overwrite(self.geometry.cluster_of(entry.host), copied=entry.copied):
                kept[cluster] = entry.host
        return kept

    def _take_fresh(self, plan: WritePlan, piece: Piece, kept: dict[int, HostOffset]) -> None:
        """Take clusters for a piece that needs another mapping: new ones, or those that zero entries keep."""
        cluster = piece.offset // self._cluster_bytes
        end = self.geometry.clusters(piece.offset + piece.length)
        while cluster < end:
            if cluster in kept:
                run = Run(self.geometry.cluster_of(kept[cluster]), 1)
            else:
                count = next((at - cluster for at in range(cluster, end) if at in kept), end - cluster)
                run = self.tables.refcounts.take(count)
                plan.taken.append(run)
            plan.fresh.append(Fresh(piece, GuestCluster(cluster), run, cluster in kept))
            cluster += run.count

    def _run_write(self, plan: WritePlan, data: memoryview, offset: GuestOffset) -> None:
        for piece in plan.pieces:
            if piece.in_place:
                start = piece.offset - offset
                self.medium.pwrite(data[start : start + piece.length], piece.run.host)
        for fresh in plan.fresh:
            start = fresh.piece.offset - offset
            plan.ordered |= self._write_fresh(fresh, data[start : start + fresh.piece.length])

    def _write_fresh(self, fresh: Fresh, data: memoryview) -> bool:
        """Write the part of a piece's ``data`` that falls into a fresh run; return True if it is ordered."""
        piece, run = fresh.piece, fresh.run
        guest_start = fresh.cluster * self._cluster_bytes
        guest_end = guest_start + run.count * self._cluster_bytes
        start, end = max(guest_start, piece.offset), min(guest_end, piece.offset + piece.length)
        part = data[start - piece.offset : end - piece.offset]
        host = self.geometry.offset_of(run.start)
        if run.zero_safe and self._was_zero(piece, guest_start, guest_end):
            self.medium.pwrite(part, HostOffset(host + start - guest_start))
            return False
        # W2, W3: without the barrier in between, a crash could show what the host clusters held before.
        if len(part) < guest_end - guest_start:
            whole = bytearray(guest_end - guest_start)
            for edge, edge_end in ((guest_start, start), (end, guest_end)):
                if edge < edge_end:
                    self._read_edge(
                        piece, edge, memoryview(whole)[edge - guest_start : edge_end - guest_start]
                    )
            whole[start - guest_start : end - guest_start] = part
            part = memoryview(whole)
        self.medium.pwrite(part, host)
        return True

    def _read_edge(self, piece: Piece, offset: int, buffer: memoryview) -> None:
        """Read the guest's old bytes beside a piece, in the first or last of its clusters."""
        run = piece.run
        if run.kind == DATA:
            run = run._replace(host=HostOffset(run.host + offset - piece.offset))
        self.requests.read_run(run, buffer, GuestOffset(offset))

    def _was_zero(self, piece: Piece, guest_start: int, guest_end: int) -> bool:
        """Return True if whole guest clusters of a piece read as zeros until now (W2)."""
        if piece.run.kind == UNALLOCATED:
            return self.requests.below_reads_as_zeros(guest_start, guest_end - guest_start)
        return piece.run.kind == ZERO_CLUSTER

    def _stage_write(self, plan: WritePlan) -> None:
        tables, changes = self.tables, self.tables.changes
        if plan.ordered:
            tables.view.require_order()
        for piece, first, run, is_kept in plan.fresh:
            if not is_kept:
                plan.taken.remove(run)
                tables.refcounts.count_in(run)
                if changes.fresh is not None:
                    changes.fresh.update(ClusterIndex(at) for at in range(run.start, run.start + run.count))
            start = self.geometry.offset_of(run.start)
            values = [data_entry(HostOffset(start + at * self._cluster_bytes)) for at in range(run.count)]
            replaced: list[L2Entry] = []
            if piece.run.kind != UNALLOCATED:
                clusters = range(first, first + run.count)
                replaced = [tables.mapping.l2_entry(GuestCluster(cluster)) for cluster in clusters]
            self.replace_entries(first, replaced, values)

    def replace_entries(self, first: GuestCluster, replaced: list[L2Entry], values: list[L2Entry]) -> None:
        """Stage other L2 entries, and give up what the old ones referred to and the new ones do not.

        ``replaced`` are the old ones, none where none of them refers to anything.
        """
        mapping, refcounts = self.tables.mapping, self.tables.refcounts
        mapping.set_entries(first, values, refcounts)
        for old, new in zip(replaced, values, strict=bool(replaced)):
            # A packed cluster counted its own references, also in the host cluster of what it replaces.
            kept = range(0) if new.kind == COMPRESSED_CLUSTER else mapping.codec.hosts(new)
            hosts = mapping.codec.hosts(old)
            if hosts and hosts != kept:
                refcounts.release(ClusterIndex(hosts.start), len(hosts))

    def give_back(self, taken: list[Run]) -> None:
        """A request failed: what it took and did not count is free again."""
        if taken:
            self.medium.undo(lambda: self.tables.space.give_back(taken))

    def copy_up(self, offset: int, length: int) -> None:
        """Give the clusters of a range that read from below the same data of their own."""
        start = offset - offset % self._cluster_bytes
        end = layout.round_up(offset + length, self._cluster_bytes)
        end = min(end, self.tables.mapping.disk_bytes)
        for run in self.requests.runs(start, end - start):
            if run.kind == UNALLOCATED:
                for cluster in range(start, start + run.length, self._cluster_bytes):
                    self._copy_up_cluster(GuestOffset(cluster), min(self._cluster_bytes, end - cluster))
            start += run.length

    def _copy_up_cluster(self, offset: GuestOffset, length: int) -> None:
        if self.requests.below_reads_as_zeros(offset, length):
            return

        def plan(request: Request) -> WritePlan | None:
            if self.guard.is_alone and not self.requests.alone:
                # A read does not wait for a transaction; a later one copies.
                return None
            self.requests.enter_change()
            self.guard.require_free(offset // self._cluster_bytes, offset // self._cluster_bytes + 1)
            inside = min(length, self.tables.mapping.disk_bytes - offset)
            if inside < length or self.tables.mapping_at_hand.run(offset, length).kind != UNALLOCATED:
                # It was written or cut off meanwhile: the copy must not undo that.
                return None
            return self._plan_write(request, offset, length)

        def data(plan: WritePlan) -> memoryview:
            buffer = memoryview(bytearray(length))
            self.requests.read_run(plan.pieces[0].run, buffer, offset)
            return buffer

        self._perform(offset, plan, data)
