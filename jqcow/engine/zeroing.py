"""What a guest's zeroing or discard does: other entries for whole clusters, zeros over what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from jqcow.engine.write import Writes
from jqcow.ondisk.entries import COMPRESSED_CLUSTER, NO_ENTRY, UNALLOCATED, ZERO_CLUSTER, ZERO_ENTRY, L2Entry
from jqcow.ondisk.layout import ClusterIndex, GuestCluster, GuestOffset

EntryFor = Callable[[L2Entry], L2Entry]
"""Makes the new L2 entry of a guest cluster from the one that it has."""


class Zeroing:
    """Zeroing and discarding guest ranges, (guest offset, length) in bytes. Errors as `Writes.write`."""

    def __init__(self, writes: Writes) -> None:
        self.writes = writes
        self.reads = writes.reads
        self.requests = writes.requests
        self.tables = writes.tables
        self._cluster_bytes = writes.geometry.cluster_bytes

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros; ``unmap`` frees the clusters that it covers whole."""
        for start, span in self.requests.spans_to_change(offset, length):
            while not self._zero_span(start, span, unmap=unmap):
                pass

    def _zero_span(self, start: int, span: int, *, unmap: bool) -> bool:
        """Zero a range within one metadata block; return False if the disk was resized meanwhile."""
        size = self.requests.check_change(start, span)
        head, tail = self._whole_clusters(start, span, size)
        if head >= tail:
            self.zero_part(start, span, within_disk=True)
            return True
        self.zero_part(start, head - start, within_disk=True)
        if not self._set_whole(head, tail, lambda entry: _zeroed(entry, unmap=unmap), size):
            return False
        self.zero_part(tail, start + span - tail, within_disk=True)
        return True

    def discard(self, offset: int, length: int) -> None:
        """Free the clusters that a range covers whole; they read as zeros. The rest stays as it is."""
        for start, span in self.requests.spans_to_change(offset, length):
            while not self._discard_span(start, span):
                pass

    def _discard_span(self, start: int, span: int) -> bool:
        """Discard a range within one metadata block; return False if the disk was resized meanwhile."""
        size = self.requests.check_change(start, span)
        head, tail = self._whole_clusters(start, span, size)
        return head >= tail or self._set_whole(head, tail, self._discarded, size)

    def hide_below(self, offset: int, length: int) -> None:
        """Make whole clusters read as zeros whatever lies below them, now or later."""
        self.requests.planned(lambda: self.requests.check_whole_clusters(offset, length))
        for start, span in self.requests.spans(offset, length):
            head, tail = self._whole_clusters(start, span, self.tables.mapping.disk_bytes)
            clusters = range(head // self._cluster_bytes, tail // self._cluster_bytes)
            self._set_entries(clusters, lambda entry: _zeroed(entry, unmap=True))

    def hide_new(self, start: int, end: int) -> None:
        """Discard whole clusters, behind the end of the disk too."""
        for offset, length in self.requests.spans(start, max(0, end - start)):
            self._set_whole(offset, offset + length, self._discarded)

    def unmap(self, start: int, end: int) -> None:
        """Leave whole clusters without an entry, behind the end of the disk too."""
        for offset, length in self.requests.spans(start, max(0, end - start)):
            mapped: list[int] = []
            position = int(offset)
            for run in self.reads.runs(offset, length):
                if run.kind != UNALLOCATED:
                    first = position // self._cluster_bytes
                    mapped += range(first, first + self.tables.geometry.clusters(run.length))
                position += run.length
            self._set_entries(mapped, lambda entry: NO_ENTRY)

    def zero_part(self, offset: int, length: int, *, within_disk: bool = False) -> None:
        """Write zeros over the part of a range that holds data (less than a cluster at either end)."""
        for run in self.reads.runs(offset, max(0, length)):
            if not self.reads.reads_as_zeros(offset, run.length):
                zeros = memoryview(bytes(run.length))
                self.writes.write_span(zeros, GuestOffset(offset), within_disk=within_disk)
            offset += run.length

    def _discarded(self, entry: L2Entry) -> L2Entry:
        """Return the entry of a discarded cluster: none, unless the backing file would show through."""
        return NO_ENTRY if self.reads.backing is None else ZERO_ENTRY

    def _whole_clusters(self, offset: int, length: int, disk_bytes: int) -> tuple[int, int]:
        """Return the guest range of the clusters covered whole; the end of the disk completes the last."""
        end = offset + length
        head = -(-offset // self._cluster_bytes) * self._cluster_bytes
        if end == disk_bytes:
            end = self.tables.geometry.clusters(end) * self._cluster_bytes
        return head, end - end % self._cluster_bytes

    def _set_whole(self, start: int, end: int, entry_for: EntryFor, disk_bytes: int | None = None) -> bool:
        """Give whole guest clusters another entry where they do not read as zeros for want of one.

        Returns False, having changed nothing, if the size of the disk is not ``disk_bytes`` any more.
        """
        return self._set_entries(list(self._clusters_to_zero(start, end)), entry_for, disk_bytes)

    def _clusters_to_zero(self, start: int, end: int) -> Iterator[int]:
        """Yield the guest clusters that have an entry, or below which the backing file may hold data."""
        for run in self.reads.runs(start, end - start):
            is_mapped = run.kind != UNALLOCATED
            if is_mapped or not self.reads.below_reads_as_zeros(start, run.length):
                for offset in range(start, start + run.length, self._cluster_bytes):
                    if is_mapped or not self.reads.below_reads_as_zeros(offset, self._cluster_bytes):
                        yield offset // self._cluster_bytes
            start += run.length

    def _set_entries(
        self, clusters: Iterable[int], entry_for: EntryFor, disk_bytes: int | None = None
    ) -> bool:
        """Give guest clusters, within one metadata block, another entry, made from the one that they have."""
        done = self.requests.planned(lambda: self._stage(clusters, entry_for, disk_bytes))
        self.requests.commit_if_large()
        return done

    def _stage(self, clusters: Iterable[int], entry_for: EntryFor, disk_bytes: int | None) -> bool:
        self.requests.enter_change()
        if disk_bytes not in (None, self.tables.mapping.disk_bytes):
            # The end of the disk completed the last cluster, and is elsewhere now.
            return False
        mapping, refcounts = self.tables.mapping_at_hand, self.tables.refcounts_at_hand
        changes = []
        for cluster in map(GuestCluster, clusters):
            self.requests.guard.require_free(cluster, cluster + 1)
            old = mapping.l2_entry(cluster)
            if old.kind != COMPRESSED_CLUSTER:
                for host in mapping.codec.hosts(old):
                    refcounts.data_refcount(ClusterIndex(host))
            new = entry_for(old)
            if new != old:
                changes.append((cluster, old, new))
        if changes:
            self.requests.require_live()
            with self.tables.operation():
                for cluster, old, new in changes:
                    self.writes.replace_entries(cluster, [old], [new])
        return True


def _zeroed(entry: L2Entry, *, unmap: bool) -> L2Entry:
    """Return the entry of a cluster that reads as zeros; only a standard cluster can be kept."""
    if entry.host and entry.kind != COMPRESSED_CLUSTER and not unmap:
        return entry._replace(kind=ZERO_CLUSTER)
    return ZERO_ENTRY
