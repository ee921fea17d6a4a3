"""The data path: what a guest read, write, zeroing or discard does.

A guest write in one breath: resolve the runs; where a cluster belongs to this guest cluster alone, write
in place; otherwise allocate, write the data into the new clusters, and stage the entries that map them.
Nothing maps the data before the record is durable. What a new cluster needs besides the written data comes
from where the guest read it before: a shared or compressed cluster, or the backing file.

W1. In place only where the refcount, staged changes included, is 1 and the entry has the COPIED flag, which
    no operation but a transaction's sets on a cluster that exists; in a transaction, only in clusters that
    it allocated since its last savepoint.
W2. A newly visible pair (guest range, host range) is zero-safe only if the guest's old content reads as
    zeros and the host range would read as zeros if its data never came. Every other pair is ordered.
W3. A cluster that is not zero-safe is written whole.
W4. Data goes to the device before the entry that maps it is staged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from jqcow.device.disk import Disk
from jqcow.engine.mapping import COMPRESSED, DATA, UNALLOCATED, ZERO, MappedRun
from jqcow.engine.space import Run
from jqcow.engine.store import Store
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import compression, entries, layout
from jqcow.ondisk.entries import l2_entry

EntryFor = Callable[[int], int]
"""Makes the new L2 entry of a guest cluster from the one that it has (0: none)."""

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

    def __init__(self, store: Store, backing: Disk | None = None) -> None:
        """``backing`` is the disk that unallocated clusters read from; None: they read as zeros."""
        self.store = store
        self.backing = backing
        self._decompressed: tuple[int, bytes] | None = None
        self.medium = store.medium
        self.mapping = store.mapping
        self.refcounts = store.refcounts
        self.geometry = store.geometry
        self._cluster_bytes = store.geometry.cluster_bytes

    def check_range(self, length: int, offset: int) -> None:
        """Raise ValueError unless a guest range lies within the disk."""
        size = self.mapping.disk_bytes
        if length < 0 or offset < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} are not within the disk of {size} bytes")

    def check_whole_clusters(self, length: int, offset: int) -> None:
        """Raise ValueError unless a guest range within the disk is one of whole clusters, or to its end."""
        self.check_range(length, offset)
        ends = offset + length == self.mapping.disk_bytes or not length % self._cluster_bytes
        if offset % self._cluster_bytes or not ends:
            raise ValueError(
                f"{length} bytes at {offset} are not whole clusters of {self._cluster_bytes} bytes"
            )

    # Read

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the guest's bytes at ``offset``.

        Raises:
            CorruptionError: a table entry on the way is damaged, or compressed data is.
            OSError: the host failed.
        """
        position = 0
        for run in self.mapping.runs(offset, len(buffer)):
            self._read_run(run, buffer[position : position + run.length], offset + position)
            position += run.length

    def _read_run(self, run: MappedRun, part: memoryview, offset: int) -> None:
        if run.kind == DATA:
            self.medium.pread_into(part, run.host_offset)
        elif run.kind == COMPRESSED:
            within = offset % self._cluster_bytes
            part[:] = self._decompress(run.host_offset)[within : within + len(part)]
        elif run.kind == UNALLOCATED and self.backing is not None:
            inside = max(0, min(len(part), self.backing.size - offset))
            if inside:
                self.backing.read_into(part[:inside], offset)
            _fill_zeros(part[inside:])
        else:
            _fill_zeros(part)

    def _decompress(self, descriptor: int) -> bytes:
        """Return the bytes of a compressed cluster. The last one is kept: it is often read piece by piece."""
        kept = self._decompressed
        if kept is not None and kept[0] == descriptor:
            return kept[1]
        offset, length = entries.compressed_extent(descriptor, self.geometry.cluster_bits)
        kind = self.store.metadata.header.compression_type
        try:
            data = compression.decompress(self.medium.pread(length, offset), self._cluster_bytes, kind)
        except FormatError as error:
            raise CorruptionError("compressed cluster", offset, str(error)) from error
        self._decompressed = descriptor, data
        return data

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        """Return True if a guest range reads as zeros, as far as the tables of the chain tell.

        Raises:
            CorruptionError: a table entry on the way is damaged.
        """
        for run in self.mapping.runs(offset, length):
            if run.kind in (DATA, COMPRESSED):
                return False
            if run.kind == UNALLOCATED and not self._backing_reads_as_zeros(run.length, offset):
                return False
            offset += run.length
        return True

    def _backing_reads_as_zeros(self, length: int, offset: int) -> bool:
        """Return True if what lies below a guest range, which may reach past either disk, reads as zeros."""
        if self.backing is None or offset >= self.backing.size:
            return True
        return self.backing.reads_as_zeros(min(length, self.backing.size - offset), offset)

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
        # What a freed cluster held is not what its next user finds there.
        self._decompressed = None
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
            CorruptionError: a cluster holds metadata, or is mapped with refcount 0.
            UnsupportedFeatureError: a cluster is shared, and there is no snapshot to share it with.
        """
        pieces: list[_Piece] = []
        for run in self.mapping.runs(offset, length):
            piece = _Piece(offset, run.length, run, in_place=False)
            if run.kind == DATA:
                pieces += self._split_at_shared(piece)
            else:
                pieces.append(piece)
            offset += run.length
        return pieces

    def _split_at_shared(self, piece: _Piece) -> Iterator[_Piece]:
        """Cut a data piece where clusters that may be overwritten meet such that may not (W1)."""
        start, end = piece.offset, piece.offset + piece.length
        first = piece.run.host_offset // self._cluster_bytes - start // self._cluster_bytes
        in_place = self._may_overwrite(first + start // self._cluster_bytes, copied=piece.run.copied)
        while start < end:
            reach, follows = start, in_place
            while reach < end and follows == in_place:
                reach = min(end, reach - reach % self._cluster_bytes + self._cluster_bytes)
                if reach < end:
                    cluster = first + reach // self._cluster_bytes
                    follows = self._may_overwrite(cluster, copied=piece.run.copied)
            run = replace(
                piece.run, host_offset=piece.run.host_offset + start - piece.offset, length=reach - start
            )
            yield _Piece(start, reach - start, run, in_place)
            start, in_place = reach, follows

    def _may_overwrite(self, cluster: int, *, copied: bool) -> bool:
        """Return True if a cluster that a guest's entry names may be written in place (W1, G2)."""
        is_shared = self.refcounts.data_refcount(cluster) > 1
        fresh = self.store.space.fresh
        return copied and not is_shared and (fresh is None or cluster in fresh)

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
        entry = self.mapping.l2_entry(guest_cluster)
        host = entry & entries.OFFSET_MASK
        copied = entry >= entries.COPIED
        return host if host and self._may_overwrite(host // self._cluster_bytes, copied=copied) else 0

    def _unkept_count(self, piece: _Piece, cluster: int, last: int) -> int:
        if piece.run.kind != ZERO:
            return last - cluster + 1
        count = 1
        while cluster + count <= last and not self._kept_cluster(piece, cluster + count):
            count += 1
        return count

    def _write_run(self, piece: _Piece, data: memoryview, guest_cluster: int, run: Run) -> None:
        """Write the part of ``data`` that falls into ``run``, which will hold guest_cluster and on."""
        guest_start = guest_cluster * self._cluster_bytes
        guest_end = guest_start + run.count * self._cluster_bytes
        start, end = max(guest_start, piece.offset), min(guest_end, piece.offset + piece.length)
        part = data[start - piece.offset : end - piece.offset]
        host_start = run.start * self._cluster_bytes
        if run.zero_safe and self._was_zero(piece, guest_start, guest_end):
            self.medium.pwrite(part, host_start + start - guest_start)
            return
        # W2, W3: without the barrier in between, a crash could show what the host clusters held before.
        self.store.metadata.require_order()
        whole = bytearray(guest_end - guest_start)
        # The guest's old bytes: the entries that lead to them are still what they were.
        for edge, edge_end in ((guest_start, start), (end, guest_end)):
            if edge < edge_end:
                self.read_into(memoryview(whole)[edge - guest_start : edge_end - guest_start], edge)
        whole[start - guest_start : end - guest_start] = part
        self.medium.pwrite(whole, host_start)

    def _was_zero(self, piece: _Piece, guest_start: int, guest_end: int) -> bool:
        """Return True if whole guest clusters of a piece read as zeros until now (W2)."""
        if piece.run.kind == UNALLOCATED:
            return self._backing_reads_as_zeros(guest_end - guest_start, guest_start)
        return piece.run.kind == ZERO

    def _map_run(self, piece: _Piece, guest_cluster: int, run: Run) -> None:
        hosts = range(run.start, run.start + run.count)
        values = [l2_entry(cluster * self._cluster_bytes) for cluster in hosts]
        guest_clusters = range(guest_cluster, guest_cluster + run.count)
        has_entries = piece.run.kind != UNALLOCATED
        replaced = [self.mapping.l2_entry(cluster) for cluster in guest_clusters] if has_entries else []
        self._replace_entries(guest_cluster, replaced, values)

    def _replace_entries(self, guest_cluster: int, replaced: list[int], values: list[int]) -> None:
        """Stage other L2 entries, and give up what the old ones referred to and the new ones do not.

        ``replaced`` are the old ones, none where all of them are 0.
        """
        self.mapping.set_entries(guest_cluster, values, self.refcounts)
        for old, new in zip(replaced, values, strict=bool(replaced)):
            # A packed cluster counted its own references, also in the host cluster of what it replaces.
            kept = range(0) if new & entries.COMPRESSED else self.mapping.hosts(new)
            hosts = self.mapping.hosts(old)
            if hosts and hosts != kept:
                self.refcounts.release(hosts.start, len(hosts))

    def copy_up(self, length: int, offset: int) -> None:
        """Give the clusters of a range that read from below the same data of their own.

        Raises:
            OSError: as `write`.
        """
        self._start_change()
        start = offset - offset % self._cluster_bytes
        end = min(layout.round_up(offset + length, self._cluster_bytes), self.mapping.disk_bytes)
        for run in list(self.mapping.runs(start, end - start)):
            if run.kind == UNALLOCATED:
                for part, count in self.spans(start, run.length):
                    self._copy_up_span(count, part)
            start += run.length

    def _copy_up_span(self, length: int, offset: int) -> None:
        for start in range(offset, offset + length, self._cluster_bytes):
            count = min(self._cluster_bytes, offset + length - start)
            if not self._backing_reads_as_zeros(count, start):
                data = bytearray(count)
                self.read_into(memoryview(data), start)
                self._write_span(memoryview(data), start)

    def reads_from_below(self, length: int, offset: int) -> bool:
        """Return True if the backing file may hold data of a range."""
        for run in self.mapping.runs(offset, length):
            if run.kind == UNALLOCATED and not self._backing_reads_as_zeros(run.length, offset):
                return True
            offset += run.length
        return False

    # Compressed data

    def write_compressed(self, data: memoryview, offset: int, level: int | None = None) -> None:
        """Write whole guest clusters compressed, each where that saves at least a sector.

        The range starts at a cluster and ends at one, or at the end of the disk.

        Raises:
            OSError: as `write`.
        """
        self._start_change()
        kind = self.store.metadata.header.compression_type
        for position in range(0, len(data), self._cluster_bytes):
            part = data[position : position + self._cluster_bytes]
            start = offset + position
            packed = None
            if len(part) == self._cluster_bytes or start + len(part) == self.mapping.disk_bytes:
                packed = compression.compress(bytes(part).ljust(self._cluster_bytes, b"\0"), kind, level)
            if packed is None or not self._write_packed(packed, start):
                self._write_span(part, start)

    def _write_packed(self, packed: bytes, offset: int) -> bool:
        """Store one cluster's compressed bytes; return False if that would save nothing."""
        if layout.round_up(len(packed), layout.SECTOR_BYTES) >= self._cluster_bytes:
            return False
        with self.store.operation():
            # W2: a descriptor must not become durable before what it describes.
            self.store.metadata.require_order()
            host = self.refcounts.allocate_packed(len(packed))
            try:
                entry = entries.compressed_entry(host, len(packed), self.geometry.cluster_bits)
            except ValueError as error:
                raise UnsupportedFeatureError(
                    "compressed data this far out in the file", str(error)
                ) from error
            # To the end of the sector: a reader takes whole ones.
            self.medium.pwrite(packed.ljust(layout.round_up(len(packed), layout.SECTOR_BYTES), b"\0"), host)
            cluster = offset // self._cluster_bytes
            self._replace_entries(cluster, [self.mapping.l2_entry(cluster)], [entry])
        return True

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
                self._set_whole(head, tail, lambda entry: self._zeroed_entry(entry, unmap=unmap))
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
                self._set_whole(head, tail, self._discarded_entry)

    def hide_below(self, length: int, offset: int) -> None:
        """Make whole clusters read as zeros whatever lies below them, now or later.

        Raises:
            OSError: as `write`.
        """
        self._start_change()
        for start, span in self.spans(offset, length):
            head, tail = self._whole_clusters(start, span)
            clusters = range(head // self._cluster_bytes, tail // self._cluster_bytes)
            self._set_entries_of(clusters, lambda entry: self._zeroed_entry(entry, unmap=True))

    def _zeroed_entry(self, entry: int, *, unmap: bool) -> int:
        """Return the entry of a cluster that reads as zeros; only a standard cluster can be kept."""
        keeps = entry & entries.OFFSET_MASK and not entry & entries.COMPRESSED and not unmap
        return entry | entries.ZERO if keeps else entries.ZERO

    def _discarded_entry(self, entry: int) -> int:
        """Return the entry of a discarded cluster: none, unless the backing file would show through."""
        return 0 if self.backing is None else entries.ZERO

    def _whole_clusters(self, offset: int, length: int) -> tuple[int, int]:
        """Return the guest range of the clusters covered whole; the end of the disk completes the last."""
        end = offset + length
        head = -(-offset // self._cluster_bytes) * self._cluster_bytes
        if end == self.mapping.disk_bytes:
            end = self.geometry.clusters(end) * self._cluster_bytes
        return head, end - end % self._cluster_bytes

    def _zero_in_place(self, offset: int, length: int) -> None:
        """Write zeros over the part of a range that holds data (less than a cluster at either end)."""
        if length <= 0:
            return
        for run in list(self.mapping.runs(offset, length)):
            if not self.reads_as_zeros(run.length, offset):
                self._write_span(memoryview(bytes(run.length)), offset)
            offset += run.length

    def _set_whole(self, start: int, end: int, entry_for: EntryFor) -> None:
        """Give whole guest clusters another entry where they do not read as zeros for want of one."""
        self._set_entries_of(self._clusters_to_zero(start, end), entry_for)

    def _set_entries_of(self, clusters: Iterable[int], entry_for: EntryFor) -> None:
        """Give guest clusters another entry, made from the one that they have."""
        changes = []
        for cluster in clusters:
            old = self.mapping.l2_entry(cluster)
            if not old & entries.COMPRESSED:
                for host in self.mapping.hosts(old):
                    self.refcounts.data_refcount(host)
            new = entry_for(old)
            if new != old:
                changes.append((cluster, old, new))
        if not changes:
            return
        with self.store.operation():
            for cluster, old, new in changes:
                self._replace_entries(cluster, [old], [new])

    def _clusters_to_zero(self, start: int, end: int) -> Iterator[int]:
        """Yield the guest clusters that have an entry, or below which the backing file may hold data."""
        for run in list(self.mapping.runs(start, end - start)):
            if run.kind != UNALLOCATED or not self._backing_reads_as_zeros(run.length, start):
                first = start // self._cluster_bytes
                for cluster in range(first, first + self.geometry.clusters(run.length)):
                    offset = cluster * self._cluster_bytes
                    if run.kind != UNALLOCATED or not self._backing_reads_as_zeros(
                        self._cluster_bytes, offset
                    ):
                        yield cluster
            start += run.length

    # Resizing the disk

    def is_one_operation(self, size_bytes: int) -> bool:
        """Return True if `resize` is one operation; otherwise it must be part of a transaction."""
        old_size = self.mapping.disk_bytes
        return size_bytes >= old_size and (self.backing is None or self.backing.size <= old_size)

    def resize(self, size_bytes: int) -> None:
        """Set the size of the disk. What is added reads as zeros; what is cut off is freed.

        Raises:
            OSError: the disk has its old size.
        """
        self._start_change()
        if size_bytes < self.mapping.disk_bytes:
            self._shrink(size_bytes)
        else:
            self._grow(size_bytes)

    def _grow(self, size_bytes: int) -> None:
        old_size = self.mapping.disk_bytes
        # Whoever made the image may have left mapped what lies past its end.
        self._free_past(old_size)
        with self.store.operation():
            # What lies behind the old end in its last cluster was never the guest's.
            self._zero_tail(old_size)
            self.mapping.grow_l1(self.geometry.l1_entries_for(size_bytes), self.refcounts)
            self.store.metadata.set_header(size=size_bytes)
        if self.backing is not None and self.backing.size > old_size:
            # What the backing file has there was never the guest's either.
            hidden = self.geometry.clusters(old_size) * self._cluster_bytes
            end = min(size_bytes, self.geometry.clusters(self.backing.size) * self._cluster_bytes)
            for start, length in self.spans(hidden, max(0, end - hidden)):
                whole = self.geometry.clusters(length) * self._cluster_bytes
                self._set_whole(start, start + whole, self._discarded_entry)

    def _zero_tail(self, size_bytes: int) -> None:
        within = size_bytes % self._cluster_bytes
        if not within:
            return
        length = self._cluster_bytes - within
        if not self.reads_as_zeros(length, size_bytes):
            self._write_pieces(self._pieces(size_bytes, length), memoryview(bytes(length)), size_bytes)
            self.store.metadata.require_order()

    def _shrink(self, size_bytes: int) -> None:
        self._free_past(size_bytes)
        with self.store.operation():
            # Whoever makes the disk larger again, with whatever program, must not find the old bytes.
            self._zero_tail(size_bytes)
            self.store.metadata.set_header(size=size_bytes)

    def make_empty(self) -> None:
        """Give up all that the disk has of its own; part of a transaction, as it is many operations.

        Raises:
            OSError: the transaction must go back.
        """
        self._start_change()
        for l1_index, table in self.mapping.l2_tables(0):
            self._drop_table(l1_index, table)

    def _free_past(self, size_bytes: int) -> None:
        """Free the clusters that lie whole past a guest offset, and the L2 tables that map nothing else."""
        first = self.geometry.clusters(size_bytes)
        kept_tables = self.geometry.l1_entries_for(size_bytes)
        end = kept_tables * self.geometry.l2_entries * self._cluster_bytes
        start = first * self._cluster_bytes
        for offset, length in self.spans(start, max(0, end - start)):
            self._unmap_whole(offset, offset + length)
        for l1_index, table in self.mapping.l2_tables(kept_tables):
            self._drop_table(l1_index, table)

    def _unmap_whole(self, start: int, end: int) -> None:
        """Leave whole guest clusters without an entry."""
        runs, offset = [], start
        for run in self.mapping.runs(start, end - start):
            if run.kind != UNALLOCATED:
                first = offset // self._cluster_bytes
                runs.append(range(first, first + self.geometry.clusters(run.length)))
            offset += run.length
        if runs:
            with self.store.operation():
                for clusters in runs:
                    replaced = [self.mapping.l2_entry(cluster) for cluster in clusters]
                    self._replace_entries(clusters.start, replaced, [0] * len(clusters))

    def _drop_table(self, l1_index: int, table: int) -> None:
        """Free an L2 table and all that it maps."""
        with self.store.operation():
            for start, count in self.mapping.references(table):
                self.refcounts.release(start, count)
            self.mapping.drop_l2_table(l1_index, self.refcounts)


def _fill_zeros(buffer: memoryview) -> None:
    for position in range(0, len(buffer), ZERO_CHUNK_BYTES):
        part = buffer[position : position + ZERO_CHUNK_BYTES]
        part[:] = _ZEROS[: len(part)]
