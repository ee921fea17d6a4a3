"""What a guest's zeroing or discard does: other entries for whole subclusters, zeros over what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from jqcow.engine.write import Writes
from jqcow.ondisk import layout
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, NO_ENTRY, UNALLOCATED, L2Entry
from jqcow.ondisk.layout import ClusterIndex, GuestCluster, GuestOffset

ZEROS_AT_ONCE = 1 << 20
"""So many zeros are written at once: it bounds memory."""

EntryFor = Callable[[L2Entry, range], L2Entry]
"""Makes the new L2 entry of a guest cluster from the one that it has, and the subclusters to change."""


class Zeroing:
    """Zeroing and discarding guest ranges, (guest offset, length) in bytes. Errors as `Writes.write`."""

    def __init__(self, writes: Writes) -> None:
        self.writes = writes
        self.reads = writes.reads
        self.requests = writes.requests
        self.tables = writes.tables
        self._codec = writes.tables.mapping.codec
        self._has_zero_flag = self._codec.geometry.has_zero_flag
        self._cluster_bytes = writes.geometry.cluster_bytes

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros; ``unmap`` frees the clusters that it covers whole."""
        for start, span in self.requests.spans_to_change(offset, length):
            if self._is_raw_outside:
                self._zero_raw(start, start + span)
                continue
            while not self._zero_span(start, span, unmap=unmap):
                pass

    @property
    def _is_raw_outside(self) -> bool:
        return self.tables.view.header.is_raw_outside

    def _zero_raw(self, start: int, end: int) -> None:
        """Make zeros of the data in a range of a raw data file; all else reads as zeros (datafile.py, X3)."""
        for run in self.reads.runs(start, max(0, end - start)):
            if run.kind == DATA:
                self.writes.zero_raw(GuestOffset(start), run.length)
            start += run.length

    def _zero_span(self, start: int, span: int, *, unmap: bool) -> bool:
        """Zero a range within one metadata block; return False if it is to be looked at anew."""
        size = self.requests.check_change(start, span)
        head, tail = self._whole_subclusters(start, span, size)
        if head >= tail or not (self._has_zero_flag or (unmap and self._can_hide)):
            self.zero_part(start, span, within_disk=True)
            return True
        # The first whole subcluster may begin behind the end of the disk.
        self.zero_part(start, min(head, start + span) - start, within_disk=True)
        zeroed = partial(self._codec.zeroed, unmap=unmap) if self._has_zero_flag else self._codec.emptied
        if not self._set_whole(head, tail, zeroed, size):
            return False
        self.zero_part(tail, start + span - tail, within_disk=True)
        return True

    def discard(self, offset: int, length: int) -> None:
        """Free the clusters that a range covers whole; they read as zeros. The rest stays as it is.

        So does, in version 2, what lies over data of a backing file.
        """
        for start, span in self.requests.spans_to_change(offset, length):
            while not self._discard_span(start, span):
                pass

    def _discard_span(self, start: int, span: int) -> bool:
        """Discard a range within one metadata block; return False if it is to be looked at anew."""
        size = self.requests.check_change(start, span)
        head, tail = self._whole_subclusters(start, span, size)
        if self._is_raw_outside:
            self._zero_raw(head, min(tail, size))
            return True
        return head >= tail or self._set_whole(head, tail, self._discarded, size)

    @property
    def _can_hide(self) -> bool:
        """True if an entry can make a cluster read as zeros whatever lies below: in version 2 it cannot."""
        return self._has_zero_flag or self.reads.backing is None

    def hide_below(self, offset: int, length: int) -> None:
        """Make whole subclusters read as zeros whatever lies below them, now or later."""
        self.requests.planned(lambda: self.requests.check_whole_subclusters(offset, length))
        for start, span in self.requests.spans(offset, length):
            head, tail = self._whole_subclusters(start, span, self.tables.mapping.disk_bytes)
            if self._is_raw_outside:
                self._zero_raw(head, min(tail, self.tables.mapping.disk_bytes))
            elif self._has_zero_flag:
                self._set_entries(self._clusters(head, tail), head, tail, self._hidden)
                # What is left at the ends are parts of compressed clusters: no entry can tell of these.
                self.zero_part(start, min(head, start + span) - start)
                self.zero_part(tail, start + span - tail)
            else:
                self.write_over(head, tail - head)

    def hide_new(self, start: int, end: int) -> None:
        """Make whole clusters read as zeros, behind the end of the disk too."""
        for offset, length in self.requests.spans(start, max(0, end - start)):
            if self._can_hide:
                self._set_whole(offset, offset + length, self._discarded)
            else:
                self.zero_part(offset, length)

    def unmap(self, start: int, end: int) -> None:
        """Leave whole clusters without an entry, behind the end of the disk too."""
        for offset, length in self.requests.spans(start, max(0, end - start)):
            mapped: dict[int, None] = {}
            position = int(offset)
            for run in self.reads.runs(offset, length):
                if run.kind != UNALLOCATED or run.host:
                    mapped |= dict.fromkeys(self._clusters(position, position + run.length))
                position += run.length
            self._set_entries(mapped, offset, offset + length, lambda entry, part: NO_ENTRY)

    def zero_part(self, offset: int, length: int, *, within_disk: bool = False) -> None:
        """Write zeros over the part of a range that holds data (less than a cluster at either end)."""
        for run in self.reads.runs(offset, max(0, length)):
            if not self.reads.reads_as_zeros(offset, run.length):
                self.write_over(offset, run.length, within_disk=within_disk)
            offset += run.length

    def write_over(self, offset: int, length: int, *, within_disk: bool = False) -> None:
        """Write zeros over a range within one metadata block."""
        for position in range(offset, offset + length, ZEROS_AT_ONCE):
            zeros = memoryview(bytes(min(ZEROS_AT_ONCE, offset + length - position)))
            self.writes.write_span(zeros, GuestOffset(position), within_disk=within_disk)

    def _clusters(self, start: int, end: int) -> range:
        """Return the guest clusters that a guest range touches."""
        return range(start // self._cluster_bytes, self.tables.geometry.clusters(end))

    def _hidden(self, entry: L2Entry, part: range) -> L2Entry:
        """Return an entry that hides what lies below, and keeps no host cluster for that."""
        return self._codec.zeroed(entry, part, unmap=True)

    def _discarded(self, entry: L2Entry, part: range) -> L2Entry:
        """Return the entry of a discarded cluster: none, unless the backing file would show through.

        In version 2 a cluster over data in the backing file stays as it is.
        """
        if self.reads.backing is None or not self._can_hide:
            return self._codec.emptied(entry, part)
        return self._hidden(entry, part)

    def _whole_subclusters(self, offset: int, length: int, disk_bytes: int) -> tuple[int, int]:
        """Return the guest range of the subclusters covered whole; the end of the disk completes the last.

        A compressed cluster has one subcluster, itself.
        """
        end, unit = offset + length, self._codec.subcluster_bytes
        head = layout.round_up(offset, unit)
        if end == disk_bytes:
            end = layout.round_up(end, self._cluster_bytes)
        tail = max(head, end - end % unit)
        if self._is_within_compressed(head):
            head = min(tail, layout.round_up(head, self._cluster_bytes))
        if self._is_within_compressed(tail):
            tail = max(head, tail - tail % self._cluster_bytes)
        return head, tail

    def _is_within_compressed(self, offset: int) -> bool:
        """Return True if a compressed cluster begins before a guest offset, and ends behind it."""
        cluster, within = divmod(offset, self._cluster_bytes)
        return bool(within) and self.reads.entry(cluster).kind == COMPRESSED_CLUSTER

    def _set_whole(self, start: int, end: int, entry_for: EntryFor, disk_bytes: int | None = None) -> bool:
        """Give whole guest subclusters another entry where they do not read as zeros for want of one.

        Returns False, having changed nothing, if the size of the disk is not ``disk_bytes`` any more, or a
        cluster of which this is a part was compressed meanwhile.
        """
        clusters = dict.fromkeys(self._clusters_to_zero(start, end))
        return self._set_entries(clusters, start, end, entry_for, disk_bytes)

    def _clusters_to_zero(self, start: int, end: int) -> Iterator[int]:
        """Yield the guest clusters that need, and can have, another entry for a range to read as zeros."""
        can_hide = self._can_hide
        for run in self.reads.runs(start, end - start):
            stop, is_mapped = start + run.length, run.kind != UNALLOCATED
            if is_mapped and can_hide:
                yield from self._clusters(start, stop)
            elif is_mapped or not self.reads.below_reads_as_zeros(start, run.length):
                for cluster in self._clusters(start, stop):
                    offset = max(start, cluster * self._cluster_bytes)
                    reach = min(stop, (cluster + 1) * self._cluster_bytes)
                    if is_mapped if self.reads.below_reads_as_zeros(offset, reach - offset) else can_hide:
                        yield cluster
            start = stop

    def _set_entries(
        self,
        clusters: Iterable[int],
        start: int,
        end: int,
        entry_for: EntryFor,
        disk_bytes: int | None = None,
    ) -> bool:
        """Give guest clusters, within one metadata block, another entry, made from the one that they have.

        Of the first and last of them the subclusters in the guest range [start, end) alone.
        """
        done = self.requests.planned(lambda: self._stage(clusters, start, end, entry_for, disk_bytes))
        self.requests.commit_if_large()
        return done

    def _mark(self, clusters: list[GuestCluster], start: int, end: int) -> None:
        """Tell the bitmaps which guest clusters change, the first and last of them in [start, end) alone."""
        first = clusters[0]
        for cluster, following in zip(clusters, [*clusters[1:], -1], strict=True):
            if following != cluster + 1:
                begin = max(start, first * self._cluster_bytes)
                stop = min(end, (cluster + 1) * self._cluster_bytes)
                self.requests.dirty.will_stage(begin, stop - begin)
                first = GuestCluster(following)

    def _stage(
        self, clusters: Iterable[int], start: int, end: int, entry_for: EntryFor, disk_bytes: int | None
    ) -> bool:
        self.requests.enter_change()
        if disk_bytes not in (None, self.tables.mapping.disk_bytes):
            # The end of the disk completed the last cluster, and is elsewhere now.
            return False
        first = start - start % self._cluster_bytes
        # Again: a small write may have come, or have been waited for.
        self.requests.require_settled(first, layout.round_up(end, self._cluster_bytes) - first)
        mapping, refcounts = self.tables.mapping_at_hand, self.tables.refcounts_at_hand
        changes = []
        for cluster in map(GuestCluster, clusters):
            self.requests.guard.require_free(cluster, cluster + 1)
            old = mapping.l2_entry(cluster)
            if old.kind != COMPRESSED_CLUSTER:
                for host in mapping.codec.hosts(old):
                    refcounts.data_refcount(ClusterIndex(host))
            part = mapping.codec.part(cluster, start, end)
            if old.kind == COMPRESSED_CLUSTER and len(part) < mapping.codec.subclusters:
                return False
            new = entry_for(old, part)
            if new != old:
                changes.append((cluster, old, new))
        if changes:
            self.requests.require_live()
            self._mark([cluster for cluster, _, _ in changes], start, end)
            with self.tables.operation():
                for cluster, old, new in changes:
                    self.writes.replace_entries(cluster, [old], [new])
        return True
