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

from collections.abc import Callable
from typing import Protocol

from jqcow.engine.clusters import Run
from jqcow.engine.known import KnownPlaces
from jqcow.engine.planning import Fresh, Part, Piece, Planning, WritePlan
from jqcow.engine.request import Request
from jqcow.engine.sharing import leave_to_one
from jqcow.engine.tracking import Cold
from jqcow.ondisk import layout
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, NO_ENTRY, UNALLOCATED, ZERO_CLUSTER, L2Entry
from jqcow.ondisk.layout import SECTOR_BYTES, ClusterIndex, GuestCluster, GuestOffset, HostOffset


class _NoIntent(Exception):
    """What was to wait has something in it that no frame may have."""


class SmallWriting(Protocol):
    """Who takes small writes (destaging.py)."""

    def take(self, data: memoryview, plan: WritePlan) -> bool:
        """Have a write wait, with the lock held; False if it has to go another way."""
        ...

    def widened(self, plan: WritePlan) -> WritePlan | None:
        """Return a plan that waits with what it needs of what is there; None: it goes the ordinary way."""
        ...

    def lay(self, data: bytes, plan: WritePlan) -> bool:
        """Have what a widened plan covers wait; False if it has to go the ordinary way, all the same."""
        ...


class Writes(Planning):
    """Writes of a guest. Each part up to a metadata block of mapping is all or nothing in its mapping.

    ``small`` takes those that wait in the journal, where there are any.
    """

    small: SmallWriting | None = None

    def write(self, data: memoryview, offset: int) -> None:
        """Write the guest's bytes at ``offset``.

        Raises:
            OSError: sectors of the failed part that were overwritten in place may be old or new; all else
                of it is as before.
        """
        known = self.reads.known
        if known is not None and self._write_known(known, data, offset):
            return
        for start, length in self.requests.spans_to_change(offset, len(data)):
            part = data[start - offset : start - offset + length]
            self.write_span(part, start, within_disk=True, may_wait=self.small is not None)

    def _write_known(self, known: KnownPlaces, data: memoryview, offset: int) -> bool:
        """Write sectors within a cluster that may be overwritten, and whose place is known (Q4).

        Returns False, having written nothing, if there is none, or something has to come first.
        """
        cluster, within = divmod(offset, self._cluster_bytes)
        if within + len(data) > self._cluster_bytes or (offset | len(data)) % SECTOR_BYTES:
            return False
        request, requests = Request(), self.requests
        with request.running:
            with requests.lock:
                host = known.to_write.get(cluster)
                if (
                    host is None
                    or self.guard.is_alone
                    or requests.pending.overlaps(offset, offset + len(data))
                ):
                    return False
                requests.admit(True)
                try:
                    requests.dirty.will_write(offset, len(data))
                except Cold:
                    return False
                self.guard.begin(request, changes=True)
            try:
                self.data.pwrite(data, HostOffset(host + within))
            finally:
                # As in `_perform`.
                requests.commits.turn.is_clean = False
                self.guard.end(request)
        return True

    def write_span(
        self, data: memoryview, offset: GuestOffset, *, within_disk: bool, may_wait: bool = False
    ) -> None:
        """Write within one metadata block of mapping; ``within_disk``: and within the disk.

        ``may_wait``: it may wait in the journal, if it is small.
        """

        small = self.small if may_wait else None

        def plan(request: Request) -> WritePlan | None:
            self.requests.enter_change()
            if within_disk:
                self.requests.check_range(offset, len(data))
            planned = self.look(offset, len(data))
            if small is not None:
                if small.take(data, planned):
                    return None
                widened = small.widened(planned)
                if widened is not None:
                    cluster = widened.offset // self._cluster_bytes
                    request.brings_bytes = widened.length
                    self.guard.begin(request, changes=True, first=cluster, end=cluster + 1)
                    return widened
            self.begin(request, planned)
            return planned

        try:
            self.perform(plan, lambda _: data)
        except _NoIntent:
            self.write_span(data, offset, within_disk=within_disk)

    def zero_raw(self, offset: GuestOffset, length: int) -> None:
        """Make zeros of data in a raw data file, within one metadata block and the disk (datafile.py, X3)."""

        def plan(request: Request) -> WritePlan:
            self.requests.enter_change()
            self.requests.check_range(offset, length)
            planned = self.plan(request, offset, length)
            planned.zeroes = True
            return planned

        self.perform(plan, lambda _: memoryview(b""))

    def write_some(self, parts: list[Part], limit: int) -> list[Part]:
        """Write up to ``limit`` of many parts, each within one metadata block of mapping; return the others.

        Each is what the disk reads there already, since it is pending (destaging.py).
        """
        data, later = dict(parts), parts

        def plan(request: Request) -> list[WritePlan]:
            nonlocal later
            self.requests.enter_change()
            plans, later = self.plan_some(request, parts, limit)
            return plans

        self._perform(plan, lambda plan: data[plan.offset])
        return later

    def perform(
        self,
        plan_for: Callable[[Request], WritePlan | None],
        data_for: Callable[[WritePlan], memoryview],
    ) -> None:
        """Plan, run and stage a write; a plan of None has nothing to do."""

        def plans_for(request: Request) -> list[WritePlan]:
            plan = plan_for(request)
            return [] if plan is None else [plan]

        try:
            self._perform(plans_for, data_for)
        except OSError as error:
            if not self.requests.makes_space(error):
                raise
            self._perform(plans_for, data_for)

    def _perform(
        self,
        plans_for: Callable[[Request], list[WritePlan]],
        data_for: Callable[[WritePlan], memoryview],
    ) -> None:
        requests = self.requests
        request = Request()
        request.destages = requests.destages
        with request.running:
            plans = requests.planned(lambda: plans_for(request))
            if not plans:
                return
            staged = [plan for plan in plans if plan.fresh]
            try:
                try:
                    for plan in plans:
                        self._run_write(plan, data_for(plan))
                finally:
                    # Also after a failure: what it left can be read. Not by a call, which could be cut off.
                    requests.commits.turn.is_clean = False
                if staged:
                    with requests.lock:
                        for plan in staged:
                            requests.dirty.will_stage(*plan.changed)
                        with self.tables.operation():
                            for plan in staged:
                                self._stage_write(plan)
            except BaseException:
                # They share what they took.
                self.give_back(plans[0].uncounted)
                raise
            finally:
                self.guard.end(request)
        if staged:
            requests.commit_if_large()

    # Run, without the lock

    def _run_write(self, plan: WritePlan, data: memoryview) -> None:
        offset = plan.offset
        if plan.waits_with is not None:
            self._lay_widened(plan, plan.waits_with, data)
            return
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

    def _lay_widened(self, plan: WritePlan, inner: WritePlan, data: memoryview) -> None:
        """Read what is there, and have it wait with the data in the midst of it."""
        whole = memoryview(bytearray(plan.length))
        for piece in plan.pieces:
            start = piece.offset - plan.offset
            self.reads.read_run(piece.run, whole[start : start + piece.length], piece.offset)
        start = inner.offset - plan.offset
        whole[start : start + inner.length] = data
        if self.small is None or not self.small.lay(bytes(whole), plan):
            raise _NoIntent

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
        while plan.uncounted:
            # From here on they are the operation's to give up, should it fail.
            tables.refcounts.count_in(plan.uncounted.pop(0))
        for fresh in plan.fresh:
            if tables.changes.own is not None and self._is_outside:
                places = map(ClusterIndex, range(fresh.run.start, fresh.run.start + fresh.run.count))
                tables.changes.own.update(places)
                tables.changes.outside |= tables.changes.own
            self._map(fresh)

    def _map(self, fresh: Fresh) -> None:
        piece, first, run = fresh
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
        for at, (old, new) in enumerate(zip(replaced or (), values, strict=replaced is not None)):
            if self._is_outside and old.host and not new.host:
                self.places.vacate(first + at, 1)
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
