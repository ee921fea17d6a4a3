"""Small writes of a guest: into the journal first, and by the ordinary path later, many at a time.

A small write waits in memory (`pending`). A flush logs it as an intent: data and all in one record, under one
barrier, without any metadata. *Destaging* does what is pending by the ordinary path, in the order of the
disk, and stages the declaration that it is done. Other changes of the same place come after that.

I2. The record that declares intents done is ordered: what destaging wrote is durable before it (T1).
I4. Nothing but a small write changes what the guest reads at a place while a piece is pending there: who
    wants to waits until it is destaged. Who is alone, or closes, finds nothing pending at all.
I5. A small write is whole sectors: laid over any state of a sector it leaves the sector that it wrote.
I7. A small write needs nothing from below, and no stream of a compressed cluster: what it would need waits
    with it, read when it came. So whoever recovers an image needs no backing file, and destaging asks none:
    where there is one, nothing that has no entry counts as zeros (W2).
I8. The bits of a small write are durable in the bitmaps before it is pending (tracking.py, B1).
I9. Destaging waits for the changes in flight that began before: one of them may write the same place, and
    what was read since would come back.
I10. A round declares intents done up to the first that it has not written.
"""

from __future__ import annotations

from jqcow.engine.commit import Commits
from jqcow.engine.pending import Piece
from jqcow.engine.planning import WritePlan
from jqcow.engine.request import Busy, Unsettled
from jqcow.engine.write import Writes
from jqcow.ondisk import frame as frames
from jqcow.ondisk import layout
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, UNALLOCATED
from jqcow.ondisk.layout import SECTOR_BYTES, GuestOffset

SMALL_BYTES_MAX = 32 << 10
"""A longer write goes the ordinary way: it would cost more to write it twice."""
FRESH_BYTES_MAX = 128 << 10
"""So much waits for a flush. Who writes more without one goes the ordinary way, which writes it once."""
SPARE_BYTES = 1 << 20
"""The host has so much more space than what is pending will need, or small writes go the ordinary way."""
UNASKED_MAX = 64
"""After so many writes the host is asked again how much space it has."""
WIDENED_BYTES_MAX = 64 << 10
"""What waits with a write, that included: a longer copy goes the ordinary way, which writes it once."""


class Destaging:
    """The ordinary path, for what is pending."""

    def __init__(self, writes: Writes, commits: Commits) -> None:
        """Take a way in that finds nothing pending, and waits for nobody who is alone."""
        self.writes = writes
        self.commits = commits
        self.public = commits.public
        self.pending = commits.pending
        self.medium = commits.medium

    def run(self) -> None:
        """Do all that is pending; whoever calls this has the turn, and commits next.

        Raises:
            JqcowError, OSError: it is pending still.
        """
        if self.pending.is_empty:
            return
        with self.medium.lock:
            begun = self.pending.begin_round(self.commits.log.require_journal().sequence)
        # None of them waits for the turn: those that run do without it.
        self.writes.guard.drain()
        spans = self.writes.requests.spans
        parts = [
            (start, data[start - offset : start - offset + length])
            for offset, data in begun.runs()
            for start, length in spans(offset, len(data))
        ]
        limit = self.commits.destaged_at_once()
        while parts:
            parts = self.writes.write_some(parts, limit)
            if self.commits.is_large(self.public.changes):
                self.commits.commit(self.public)
        with self.medium.lock, self.medium.section():
            done = self.pending.end_round(begun, self.commits.log.require_journal().sequence)
            if done:
                self.public.changes.done = done
                self.public.changes.ordered = True


class SmallWrites:
    """A guest's small writes, as long as they are pending. Errors as `Requests`."""

    def __init__(self, writes: Writes) -> None:
        self.writes = writes
        self.requests = writes.requests
        self.commits = writes.requests.commits
        self.pending = self.commits.pending
        self.medium = writes.medium
        self._cluster_bytes = writes.geometry.cluster_bytes
        self._unasked = 0
        """So many more writes the host has room for, as it said last."""

    def take(self, data: memoryview, plan: WritePlan) -> bool:
        """Have a write wait, if it is one that may, and gains by it; else it has to go another way.

        Raises:
            Unsettled: too much waits already.
            Busy: somebody reads what the write needs, to have it wait with another.
        """
        if not self._is_small(plan) or not self._gains(plan) or not self._may_wait(plan):
            return False
        copy = bytes(data)
        if not frames.may_be_intent(copy):
            return False
        self._require_room(plan.length)
        self.requests.dirty.will_write(plan.offset, plan.length)
        self._lay(copy, plan.offset)
        return True

    def widened(self, plan: WritePlan) -> WritePlan | None:
        """Return the plan of all of a cluster, or of subclusters, where a write needs what is there (I7).

        None if it does not, or goes the ordinary way. Until it has been laid nobody else changes the
        cluster (request.py, Q1). Errors as `take`.
        """
        needed = self._needed(plan)
        if needed is None or needed == (plan.offset, plan.end) or not self._is_small(plan):
            return None
        start, end = needed
        longest = min(WIDENED_BYTES_MAX, self.commits.pending_limit() // 2)
        cluster, last = start // self._cluster_bytes, (end - 1) // self._cluster_bytes
        if end - start > longest or cluster != last or self._reaches_past_the_disk(end):
            return None
        if self.pending.overlaps(start, end):
            return None
        pieces = self.writes.pieces(GuestOffset(start), end - start)
        wide = WritePlan(pieces, GuestOffset(start), end - start, copies=False, waits_with=plan)
        if not self._gains(wide) or not self._has_space():
            return None
        self.writes.guard.require_free(cluster, cluster + 1)
        self._require_room(wide.length)
        self.requests.dirty.will_write(plan.offset, plan.length)
        return wide

    def lay(self, data: bytes, plan: WritePlan) -> bool:
        """Have what a widened plan covers wait, with the lock free; False if no frame may have it (I6)."""
        if not frames.may_be_intent(data):
            return False
        with self.requests.lock:
            self.medium.require_healthy()
            self._lay(data, plan.offset)
        return True

    def _lay(self, data: bytes, offset: int) -> None:
        with self.medium.section():
            # Before it can be read: the next flush acknowledges it (commit.py, C2).
            self.commits.turn.is_clean = False
            self.pending.fresh.lay(Piece(offset, memoryview(data)))

    def _is_small(self, plan: WritePlan) -> bool:
        # Without a journal the limit is 0: an image goes live with a change of its tables.
        longest = min(SMALL_BYTES_MAX, self.commits.pending_limit() // 2)
        return 0 < plan.length <= longest and _are_whole_sectors(plan.offset, plan.length)

    def _require_room(self, length: int) -> None:
        """Raise Unsettled if too much would wait, or Busy if it would with what is still being read."""
        limit = self.commits.pending_limit()
        if self.pending.is_full(length, limit):
            raise Unsettled
        coming = self.writes.guard.coming()
        if coming and self.pending.is_full(length + sum(each.brings_bytes for each in coming), limit):
            raise Busy(coming[0])

    def _gains(self, plan: WritePlan) -> bool:
        """Return True if a write costs less when it waits; not in place, or without flushes.

        Over what is pending it waits in any case: it would have to wait for that otherwise (I4).
        """
        is_short = self.pending.fresh.length_bytes + plan.length <= FRESH_BYTES_MAX
        return (is_short and not plan.is_in_place) or self.pending.overlaps(plan.offset, plan.end)

    def _may_wait(self, plan: WritePlan) -> bool:
        """Return True if nothing but the host's failure can keep a write from being done later."""
        needed = self._needed(plan)
        if needed is not None:
            start, end = needed
            if self._reaches_past_the_disk(end):
                return False
            if needed != (plan.offset, plan.end) and not self.pending.covers(start, end):
                return False
        if plan.is_in_place:
            return True
        # Who reads there what is to wait with a write would lay it over this one, and who changes the entry
        # may make one that needs what is there.
        first, stop = plan.offset // self._cluster_bytes, self.writes.geometry.clusters(plan.end)
        self.writes.guard.require_free(first, stop, but_destaging=True)
        return self._has_space()

    def _reaches_past_the_disk(self, end: int) -> bool:
        """Return True if the cluster that is needed ends behind the disk: no guest can write all of it."""
        return end > self.writes.tables.mapping.disk_bytes

    def _needed(self, plan: WritePlan) -> tuple[int, int] | None:
        """Return all of the clusters, or subclusters, whose old bytes another file has, or a stream (I7).

        None if a write needs no such bytes when it is done later.
        """
        start, end, is_needed = plan.offset, plan.end, False
        for piece in plan.pieces:
            if piece.run.kind == COMPRESSED_CLUSTER:
                unit = self._cluster_bytes
            elif piece.run.kind == UNALLOCATED and self.writes.reads.backing is not None:
                # What has no entry shows what lies below.
                unit = self.writes.tables.mapping.codec.subcluster_bytes
            else:
                continue
            is_needed = True
            start = min(start, GuestOffset(piece.offset - piece.offset % unit))
            end = max(end, layout.round_up(piece.offset + piece.length, unit))
        return (start, end) if is_needed else None

    def _has_space(self) -> bool:
        """Return True if the host has room for a new cluster for each piece, and what else that takes."""
        if self._unasked:
            self._unasked -= 1
            return True
        free_bytes = self.medium.free_bytes()
        if free_bytes is None:
            return True
        left_bytes = free_bytes - SPARE_BYTES - (self.pending.count + 2) * self._cluster_bytes
        # Half of it: others write, too.
        self._unasked = min(UNASKED_MAX, max(0, left_bytes // self._cluster_bytes // 2))
        return left_bytes >= 0


def _are_whole_sectors(offset: int, length: int) -> bool:
    """Return True if a range begins and ends between sectors (I5)."""
    return not offset % SECTOR_BYTES and not length % SECTOR_BYTES
