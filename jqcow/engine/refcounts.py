"""Refcounts, read through one view (qcow2 specification, "Host cluster management")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jqcow import _native
from jqcow.engine.blocks import View
from jqcow.engine.space import Space
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk.entries import DamagedEntry, decode_refcount_table
from jqcow.ondisk.layout import ENTRY_BYTES, ClusterIndex, HostOffset

TABLE_ENTRY_ORDER = 6
"""A table entry is as wide as a refcount of this order."""


class Piece(NamedTuple):
    """Refcounts [position, stop) of the metadata block at ``block``, 0 for none: of ``first`` and on."""

    first: ClusterIndex
    block: HostOffset
    position: int
    stop: int


class Search:
    """Which host clusters hold metadata, and how far the image was searched for free ones."""

    def __init__(self) -> None:
        self.metadata: set[ClusterIndex] = set()
        self.cluster = 0
        self.end = 0

    def start(self, end: ClusterIndex) -> None:
        """Search the refcounts for free clusters, as allocation asks for them, up to ``end``."""
        self.cluster, self.end = 0, end


class Refcounts:
    """The refcounts of one image through one view, to be read; `jqcow.engine.allocation` changes them."""

    def __init__(self, view: View, space: Space, search: Search) -> None:
        self.view = view
        self.space = space
        self.search = search
        self.geometry = view.geometry
        self._order = view.geometry.refcount_order

    @property
    def largest(self) -> int:
        """The largest refcount that the image's refcount width holds."""
        return (1 << (1 << self._order)) - 1

    @property
    def table_entries(self) -> int:
        """Entries in the refcount table."""
        return self.view.header.refcount_table_clusters * self.geometry.cluster_bytes // ENTRY_BYTES

    def refcount_block(self, index: int) -> HostOffset:
        """Return the host offset of the refcount block ``index``, 0 where all its refcounts are 0.

        Raises:
            CorruptionError: the refcount table entry is not one that an image can have.
        """
        header = self.view.header
        if index * ENTRY_BYTES >= header.refcount_table_clusters * self.geometry.cluster_bytes:
            return HostOffset(0)
        place = HostOffset(header.refcount_table_offset + index * ENTRY_BYTES)
        try:
            return decode_refcount_table(self.view.entry(place), self.geometry)
        except DamagedEntry as error:
            raise CorruptionError("refcount table", place, str(error)) from error

    def get(self, cluster: ClusterIndex) -> int:
        """Return the refcount of a host cluster, staged changes included."""
        index, within = divmod(cluster, self.geometry.refcounts_per_cluster)
        block = self.refcount_block(index)
        if not block:
            return 0
        number, position = divmod(within, self.geometry.refcounts_per_block)
        data = self.view.block(HostOffset(block + number * self.geometry.block_bytes))
        return _native.refcount_get(data, position, self._order)

    def _piece(self, start: int, end: int) -> Piece:
        """Return where the refcounts of [start, end) begin, as many as lie in one metadata block."""
        index, within = divmod(start, self.geometry.refcounts_per_cluster)
        number, position = divmod(within, self.geometry.refcounts_per_block)
        stop = min(position + end - start, self.geometry.refcounts_per_block)
        block = self.refcount_block(index)
        if block:
            block = HostOffset(block + number * self.geometry.block_bytes)
        return Piece(ClusterIndex(start), block, position, stop)

    def used_end(self) -> ClusterIndex:
        """Return the cluster index behind the highest cluster with a nonzero refcount.

        Raises:
            CorruptionError: a refcount block is used twice, so that a search could take forever.
        """
        seen: set[int] = set()
        for index, block in self.blocks_from_top():
            if block in seen:
                raise CorruptionError("refcount table", block, "one refcount block is used twice")
            seen.add(block)
            last = self._last_used(block)
            if last >= 0:
                return ClusterIndex(index * self.geometry.refcounts_per_cluster + last + 1)
        return ClusterIndex(0)

    def blocks_from_top(self) -> Iterator[tuple[int, HostOffset]]:
        """Yield (index, host offset) of all refcount blocks, highest index first."""
        table, per_block = self.view.header.refcount_table_offset, self.geometry.entries_per_block
        for base in reversed(range(0, self.table_entries, per_block)):
            entries = self.view.block(HostOffset(table + base * ENTRY_BYTES))
            for position in range(_native.refcount_last_used(entries, TABLE_ENTRY_ORDER), -1, -1):
                block = self.refcount_block(base + position)
                if block:
                    yield base + position, block

    def _last_used(self, block: HostOffset) -> int:
        for number in reversed(range(self.geometry.cluster_bytes // self.geometry.block_bytes)):
            data = self.view.block(HostOffset(block + number * self.geometry.block_bytes))
            last = _native.refcount_last_used(data, self._order)
            if last >= 0:
                return number * self.geometry.refcounts_per_block + last
        return -1

    def runs(self, start: int, count: int) -> Iterator[tuple[ClusterIndex, int, int]]:
        """Yield (start, count, refcount) of clusters in a row that have the same refcount."""
        end = start + count
        while start < end:
            piece = self._piece(start, end)
            value, length = 0, piece.stop - piece.position
            if piece.block:
                data = self.view.block(piece.block)
                value, length = _native.refcount_run(data, self._order, piece.position, piece.stop)
            yield piece.first, length, value
            start += length

    def is_free(self, start: int, end: int) -> bool:
        """Return True if all clusters in [start, end) have refcount 0."""
        return not any(refcount for _, _, refcount in self.runs(start, end - start))

    def data_refcount(self, cluster: ClusterIndex) -> int:
        """Return the refcount of a cluster that a guest's entry names; it holds no metadata (G2).

        Raises:
            CorruptionError: its refcount is 0, or it holds metadata, which a guest's entry must not change.
            UnsupportedFeatureError: it is shared, but there is no snapshot to share it with: two guest
                clusters have it, or the refcount is wrong.
        """
        refcount = self.get(cluster)
        if refcount == 1 and cluster not in self.search.metadata:
            return 1
        offset = self.geometry.offset_of(cluster)
        if refcount == 0:
            raise CorruptionError("refcount block", offset, "a cluster in use has refcount 0")
        self.check_holds_data(cluster)
        if refcount > 1 and not self.view.header.nb_snapshots:
            raise UnsupportedFeatureError(
                "a cluster shared without a snapshot", f"refcount {refcount} at host offset {offset:#x}"
            )
        return refcount

    def check_holds_data(self, cluster: ClusterIndex) -> None:
        """Raise CorruptionError if a cluster holds metadata: a guest's entry must not change it (G2)."""
        if cluster in self.search.metadata:
            offset = self.geometry.offset_of(cluster)
            raise CorruptionError("L2 table", offset, "a guest cluster is mapped onto metadata")
