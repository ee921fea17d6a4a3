"""The data path: what a guest read, write, zeroing or discard does.

A guest write in one breath: resolve the runs; where a cluster belongs to this guest cluster alone, write
in place; otherwise allocate, write the data into the new clusters, and stage the entries that map them.
Nothing maps the data before the record is durable.

W1. In place only where the refcount, staged changes included, is 1; in a transaction, only in clusters
    that it allocated since its last savepoint.
W2. A newly visible pair (guest range, host range) is zero-safe only if the guest's old content reads as
    zeros and the host range would read as zeros if its data never came. Every other pair is ordered.
W3. A cluster that is not zero-safe is written whole.
W4. Data goes to the device before the entry that maps it is staged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jqcow.engine.mapping import COMPRESSED, DATA, UNALLOCATED, ZERO, MappedRun
from jqcow.engine.space import Run
from jqcow.engine.store import Store
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk import entries
from jqcow.ondisk.entries import l2_entry

EntryFor = Callable[[int], int]
"""Makes the new L2 entry of a guest cluster from the host offset that it has (0: none)."""

ZERO_CHUNK_BYTES = 1 << 20
_ZEROS = bytes(ZERO_CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a guest request: ``length`` bytes at guest ``offset``, mapped as ``run``.

    ``in_place``: it may be written where it is (W1).
    """

    offset: int
    length: int
    run: MappedRun
    in_place: bool


class DataPath:
    """Guest requests on one image. Offsets and lengths are in bytes, and lie within the disk."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.medium = store.medium
        self.mapping = store.mapping
        self.refcounts = store.refcounts
        self.geometry = store.geometry
        self._cluster_bytes = store.geometry.cluster_bytes

    def check_range(self, length: int, offset: int) -> None:
        """Raise ValueError unless a guest range lies within the disk."""
        size = self.store.metadata.header.size
        if length < 0 or offset < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} are not within the disk of {size} bytes")

    # Read

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the guest's bytes at ``offset``.

        Raises:
            UnsupportedFeatureError: the range holds a compressed cluster.
            CorruptionError: a table entry on the way is damaged.
        """
        position = 0
        for run in self.mapping.runs(offset, len(buffer)):
            part = buffer[position : position + run.length]
            if run.kind == DATA:
                self.medium.pread_into(part, run.host_offset)
            elif run.kind == COMPRESSED:
                raise UnsupportedFeatureError("a compressed cluster", f"at guest offset {offset + position}")
            else:
                _fill_zeros(part)
            position += run.length

    # Write

    def write(self, data: memoryview, offset: int) -> None:
        """Write the guest's bytes. Each part up to a metadata block of mapping is all or nothing.

        Raises:
            OSError: sectors of the failed part that were overwritten in place may be old or new; all else
                of it is as before.
        """
        self._start_change()
        for start, length in self.spans(offset, len(data)):
            self._write_span(data[start - offset : start - offset + length], start)

    def _start_change(self) -> None:
        self.store.prepare_to_change()
        if self.store.metadata.header.autoclear_features:
            # A bit that jqcow does not know vouches for the data; going live clears it under a barrier.
            self.store.go_live()

    def spans(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Cut a guest range where the metadata blocks of its L2 tables end: (offset, length) of each part."""
        span_bytes = self.geometry.entries_per_block * self._cluster_bytes
        end = offset + length
        while offset < end:
            reach = min(end, offset - offset % span_bytes + span_bytes)
            yield offset, reach - offset
            offset = reach

    def _pieces(self, offset: int, length: int) -> list[_Piece]:
        """Return the runs of a guest range that is about to be changed, all of them checked for it.

        Raises:
            UnsupportedFeatureError: a cluster is compressed, or shared.
            CorruptionError: a cluster holds metadata, or is mapped with refcount 0.
        """
        pieces: list[_Piece] = []
        for run in self.mapping.runs(offset, length):
            if run.kind == COMPRESSED:
                raise UnsupportedFeatureError("a compressed cluster", f"at guest offset {offset}")
            piece = _Piece(offset, run.length, run, in_place=run.kind == DATA)
            if run.kind == DATA:
                self._check_exclusive(run.host_offset, run.length)
            if run.kind == DATA and self.store.space.fresh is not None:
                pieces += self._split_at_fresh(piece)
            else:
                pieces.append(piece)
            offset += run.length
        return pieces

    def _check_exclusive(self, host_offset: int, length: int) -> None:
        """Raise unless the host clusters hold one guest range's data, and nothing else (W1, G2)."""
        first = host_offset // self._cluster_bytes
        for cluster in range(first, self.geometry.clusters(host_offset + length)):
            self.refcounts.require_exclusive_data(cluster)

    def _split_at_fresh(self, piece: _Piece) -> Iterator[_Piece]:
        """Cut a data piece where clusters that may be overwritten meet such that may not (W1)."""
        start, end = piece.offset, piece.offset + piece.length
        first = piece.run.host_offset // self._cluster_bytes - start // self._cluster_bytes
        while start < end:
            in_place = self._may_overwrite(first + start // self._cluster_bytes)
            reach = start
            while reach < end and self._may_overwrite(first + reach // self._cluster_bytes) == in_place:
                reach = min(end, reach - reach % self._cluster_bytes + self._cluster_bytes)
            run = MappedRun(piece.run.kind, piece.run.host_offset + start - piece.offset, reach - start)
            yield _Piece(start, reach - start, run, in_place)
            start = reach

    def _may_overwrite(self, cluster: int) -> bool:
        """Return True if an exclusive data cluster may be written in place (W1)."""
        fresh = self.store.space.fresh
        return fresh is None or cluster in fresh

    def _write_span(self, data: memoryview, offset: int) -> None:
        pieces = self._pieces(offset, len(data))
        if all(piece.in_place for piece in pieces):
            self._write_pieces(pieces, data, offset)
            return
        with self.store.operation():
            self._write_pieces(pieces, data, offset)

    def _write_pieces(self, pieces: list[_Piece], data: memoryview, offset: int) -> None:
        for piece in pieces:
            part = data[piece.offset - offset : piece.offset - offset + piece.length]
            if piece.in_place:
                self.medium.pwrite(part, piece.run.host_offset)
            else:
                self._write_new(piece, part)

    def _write_new(self, piece: _Piece, data: memoryview) -> None:
        """Write data that needs another mapping: new clusters, or kept ones of a zero run."""
        first = piece.offset // self._cluster_bytes
        last = (piece.offset + piece.length - 1) // self._cluster_bytes
        cluster = first
        while cluster <= last:
            kept = self._kept_cluster(piece, cluster)
            if kept:
                run = Run(kept // self._cluster_bytes, 1, zero_safe=False)
            else:
                run = self.refcounts.allocate(self._unkept_count(piece, cluster, last))
                if self.store.space.fresh is not None:
                    self.store.space.fresh.update(range(run.start, run.start + run.count))
            self._write_run(piece, data, cluster, run)
            self._map_run(piece, cluster, run)
            cluster += run.count

    def _kept_cluster(self, piece: _Piece, guest_cluster: int) -> int:
        """Return the host offset of the cluster that a zero entry keeps and that may be reused, or 0."""
        if piece.run.kind != ZERO:
            return 0
        host = self.mapping.entry_host(guest_cluster)
        if host:
            self._check_exclusive(host, self._cluster_bytes)
        return host if host and self._may_overwrite(host // self._cluster_bytes) else 0

    def _unkept_count(self, piece: _Piece, cluster: int, last: int) -> int:
        if piece.run.kind != ZERO:
            return last - cluster + 1
        count = 1
        while cluster + count <= last and not self.mapping.entry_host(cluster + count):
            count += 1
        return count

    def _write_run(self, piece: _Piece, data: memoryview, guest_cluster: int, run: Run) -> None:
        """Write the part of ``data`` that falls into ``run``, which will hold guest_cluster and on."""
        guest_start = guest_cluster * self._cluster_bytes
        guest_end = guest_start + run.count * self._cluster_bytes
        start, end = max(guest_start, piece.offset), min(guest_end, piece.offset + piece.length)
        part = data[start - piece.offset : end - piece.offset]
        host_start = run.start * self._cluster_bytes
        if run.zero_safe and piece.run.kind != DATA:
            self.medium.pwrite(part, host_start + start - guest_start)
            return
        # W2, W3: without the barrier in between, a crash could show what the host clusters held before.
        self.store.metadata.require_order()
        whole = bytearray(guest_end - guest_start)
        if piece.run.kind == DATA:
            old_start = piece.run.host_offset + guest_start - piece.offset
            for edge, edge_end in ((guest_start, start), (end, guest_end)):
                old = memoryview(whole)[edge - guest_start : edge_end - guest_start]
                self.medium.pread_into(old, old_start + edge - guest_start)
        whole[start - guest_start : end - guest_start] = part
        self.medium.pwrite(whole, host_start)

    def _map_run(self, piece: _Piece, guest_cluster: int, run: Run) -> None:
        hosts = range(run.start, run.start + run.count)
        values = [l2_entry(cluster * self._cluster_bytes) for cluster in hosts]
        replaced = []
        if piece.run.kind != UNALLOCATED:
            guest_clusters = range(guest_cluster, guest_cluster + run.count)
            replaced = [self.mapping.entry_host(cluster) // self._cluster_bytes for cluster in guest_clusters]
        self.mapping.set_entries(guest_cluster, values, self.refcounts)
        for old in replaced:
            if old and old not in hosts:
                self.refcounts.release(old)

    # Zero and discard

    def write_zeroes(self, length: int, offset: int, *, unmap: bool) -> None:
        """Make a guest range read as zeros; ``unmap`` frees the clusters that it covers whole.

        Raises:
            OSError: as `write`.
        """
        self._start_change()
        for start, span in self.spans(offset, length):
            head, tail = self._whole_clusters(start, span)
            if head < tail:
                self._zero_in_place(start, head - start)
                self._set_whole(head, tail, lambda host: self._zeroed_entry(host, unmap=unmap))
                self._zero_in_place(tail, start + span - tail)
            else:
                self._zero_in_place(start, span)

    def discard(self, length: int, offset: int) -> None:
        """Free the clusters that a guest range covers whole; they read as zeros. The rest stays as it is.

        Raises:
            OSError: as `write`.
        """
        self._start_change()
        for start, span in self.spans(offset, length):
            head, tail = self._whole_clusters(start, span)
            if head < tail:
                self._set_whole(head, tail, lambda host: 0)

    def _zeroed_entry(self, host: int, *, unmap: bool) -> int:
        keeps = host and not unmap
        return l2_entry(host, zero=True) if keeps else entries.ZERO

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Return the guest range of the clusters covered whole; the end of the disk completes the last."""
        end = offset + length
        head = -(-offset // self._cluster_bytes) * self._cluster_bytes
        if end == self.store.metadata.header.size:
            end = self.geometry.clusters(end) * self._cluster_bytes
        return head, end - end % self._cluster_bytes

    def _zero_in_place(self, offset: int, length: int) -> None:
        """Write zeros over the part of a range that holds data (less than a cluster at either end)."""
        if length <= 0:
            return
        for piece in self._pieces(offset, length):
            if piece.run.kind == DATA:
                self._write_span(memoryview(bytes(piece.length)), piece.offset)

    def _set_whole(self, start: int, end: int, entry_for: EntryFor) -> None:
        """Give whole guest clusters another entry, made from the host offset they have (0: none)."""
        changes = []
        for cluster in self._mapped_clusters(start, end):
            old = self.mapping.l2_entry(cluster)
            host = old & entries.OFFSET_MASK
            if host:
                self._check_exclusive(host, self._cluster_bytes)
            new = entry_for(host)
            if new != old:
                changes.append((cluster, host, new))
        if not changes:
            return
        with self.store.operation():
            for cluster, host, new in changes:
                self.mapping.set_entries(cluster, [new], self.refcounts)
                if host and not new & entries.OFFSET_MASK:
                    self.refcounts.release(host // self._cluster_bytes)

    def _mapped_clusters(self, start: int, end: int) -> Iterator[int]:
        """Yield the guest clusters that have an entry; without a backing file all others read as zeros."""
        for run in self.mapping.runs(start, end - start):
            if run.kind != UNALLOCATED:
                first = start // self._cluster_bytes
                yield from range(first, first + self.geometry.clusters(run.length))
            start += run.length

    # Resizing the disk

    def resize(self, size_bytes: int) -> None:
        """Set the size of the disk. What is added reads as zeros; what is cut off is freed.

        Cutting must be part of a transaction: it is more than one operation may stage.

        Raises:
            OSError: the disk has its old size.
        """
        self._start_change()
        if size_bytes < self.store.metadata.header.size:
            self._shrink(size_bytes)
        else:
            self._grow(size_bytes)

    def _grow(self, size_bytes: int) -> None:
        old_size = self.store.metadata.header.size
        # Whoever made the image may have left mapped what lies past its end.
        self._free_past(old_size)
        with self.store.operation():
            # What lies behind the old end in its last cluster was never the guest's.
            self._zero_tail(old_size)
            self.mapping.grow_l1(self.geometry.l1_entries_for(size_bytes), self.refcounts)
            self.store.metadata.set_header(size=size_bytes)

    def _zero_tail(self, size_bytes: int) -> None:
        within = size_bytes % self._cluster_bytes
        if not within:
            return
        zeros = memoryview(bytes(self._cluster_bytes - within))
        pieces = [piece for piece in self._pieces(size_bytes, len(zeros)) if piece.run.kind == DATA]
        if pieces:
            self._write_pieces(pieces, zeros, size_bytes)
            self.store.metadata.require_order()

    def _shrink(self, size_bytes: int) -> None:
        self._free_past(size_bytes)
        with self.store.operation():
            # Whoever makes the disk larger again, with whatever program, must not find the old bytes.
            self._zero_tail(size_bytes)
            self.store.metadata.set_header(size=size_bytes)

    def _free_past(self, size_bytes: int) -> None:
        """Free the clusters that lie whole past a guest offset, and the L2 tables that map nothing else."""
        first = self.geometry.clusters(size_bytes)
        kept_tables = self.geometry.l1_entries_for(size_bytes)
        end = kept_tables * self.geometry.l2_entries * self._cluster_bytes
        for start, length in self.spans(
            first * self._cluster_bytes, max(0, end - first * self._cluster_bytes)
        ):
            self._set_whole(start, start + length, lambda host: 0)
        for l1_index, _ in self.mapping.l2_tables(kept_tables):
            self._drop_table(l1_index)

    def _drop_table(self, l1_index: int) -> None:
        """Free an L2 table and all that it maps."""
        table_bytes = self.geometry.l2_entries * self._cluster_bytes
        start = l1_index * table_bytes
        with self.store.operation():
            for cluster in self._mapped_clusters(start, start + table_bytes):
                host = self.mapping.entry_host(cluster)
                if host:
                    self.refcounts.release(host // self._cluster_bytes)
            self.mapping.drop_l2_table(l1_index, self.refcounts)


def _fill_zeros(buffer: memoryview) -> None:
    for position in range(0, len(buffer), ZERO_CHUNK_BYTES):
        part = buffer[position : position + ZERO_CHUNK_BYTES]
        part[:] = _ZEROS[: len(part)]
