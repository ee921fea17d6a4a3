"""What a read does that copies: clusters that it read from below become the overlay's own."""

from __future__ import annotations

from jqcow.engine.planning import WritePlan
from jqcow.engine.request import Request
from jqcow.engine.write import Writes
from jqcow.ondisk import layout
from jqcow.ondisk.l2 import UNALLOCATED
from jqcow.ondisk.layout import GuestOffset


class Copying:
    """Copies from the backing file, one guest cluster at a time. Errors as `Writes.write`."""

    def __init__(self, writes: Writes) -> None:
        self.writes = writes
        self.reads = writes.reads
        self.requests = writes.requests
        self.tables = writes.tables
        self._cluster_bytes = writes.geometry.cluster_bytes

    def copy_up(self, offset: int, length: int) -> None:
        """Give the clusters of a range that read from below the same data of their own."""
        start = offset - offset % self._cluster_bytes
        end = layout.round_up(offset + length, self._cluster_bytes)
        end = min(end, self.tables.mapping.disk_bytes)
        for run in self.reads.runs(start, end - start):
            stop = start + run.length
            while start < stop:
                reach = min(stop, start - start % self._cluster_bytes + self._cluster_bytes)
                if run.kind == UNALLOCATED:
                    self._copy_up(GuestOffset(start), reach - start)
                start = reach

    def _copy_up(self, offset: GuestOffset, length: int) -> None:
        backing = self.reads.backing
        if backing is None or self.reads.below_reads_as_zeros(offset, length):
            return

        def plan(request: Request) -> WritePlan | None:
            guard, requests = self.requests.guard, self.requests
            if guard.is_alone and not requests.alone:
                # A read does not wait for a transaction; a later one copies.
                return None
            requests.enter_change()
            guard.require_free(offset // self._cluster_bytes, offset // self._cluster_bytes + 1)
            inside = min(length, self.tables.mapping.disk_bytes - offset)
            run = self.tables.mapping_at_hand.run(offset, length)
            if inside < length or run.kind != UNALLOCATED or run.length < length:
                # It was written or cut off meanwhile: the copy must not undo that.
                return None
            return self.writes.plan(request, offset, length, copies=True)

        def data(plan: WritePlan) -> memoryview:
            buffer = memoryview(bytearray(length))
            self.reads.read_run(
                next(piece.run for piece in plan.pieces if piece.offset == offset), buffer, offset
            )
            return buffer

        self.writes.perform(plan, data)
