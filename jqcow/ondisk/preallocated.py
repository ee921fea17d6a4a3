"""Tables of guest clusters in a row that are mapped to host clusters in a row: those of preallocated disks.

They are made one at a time: the tables of a large disk do not fit in memory together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from jqcow import _native
from jqcow.ondisk.l2 import L2Codec, L2Entry
from jqcow.ondisk.layout import Geometry, HostOffset


def entries_for(codec: L2Codec, *, is_encrypted: bool) -> Callable[[HostOffset], L2Entry]:
    """Return what makes the entries of a preallocated disk with nothing below; they read as zeros.

    What was never written to an encrypted image is noise, so there a flag says that it is zeros.

    Raises:
        ValueError: the image is encrypted, and its version has no such flag.
    """
    if is_encrypted and not codec.geometry.has_zero_flag:
        raise ValueError("preallocation of an encrypted disk needs compat=1.1: else it reads as noise")
    if is_encrypted and codec.subclusters == 1:
        return partial(codec.preallocated_zeros, as_data=False)
    return codec.preallocated


@dataclass(frozen=True)
class MappedRow:
    """``count`` guest clusters from ``first`` on, mapped to the host clusters from ``host`` on.

    ``entry_for`` makes the L2 entry of a cluster from its host offset.
    """

    codec: L2Codec
    first: int
    count: int
    host: HostOffset
    entry_for: Callable[[HostOffset], L2Entry]

    @property
    def end(self) -> int:
        """The guest cluster behind the last one."""
        return self.first + self.count

    @property
    def host_end(self) -> int:
        """The host offset behind the last cluster."""
        return self.host + self.count * self.codec.geometry.cluster_bytes

    @property
    def table_indices(self) -> range:
        """The indices of the L2 tables that map the row."""
        first, end = self.first // self.codec.per_table, -(-self.end // self.codec.per_table)
        return range(first, end if self.count else first)

    def behind(self, first: int) -> MappedRow:
        """Return the part of the row from guest cluster ``first`` on."""
        host = HostOffset(self.host + (first - self.first) * self.codec.geometry.cluster_bytes)
        return MappedRow(self.codec, first, self.end - first, host, self.entry_for)

    def l2_tables(self) -> Iterator[bytearray]:
        """Yield the L2 tables, which map nothing else."""
        codec = self.codec
        for index in self.table_indices:
            start = max(self.first, index * codec.per_table)
            count = min(self.end, (index + 1) * codec.per_table) - start
            host = HostOffset(self.host + (start - self.first) * codec.geometry.cluster_bytes)
            table = bytearray(codec.geometry.cluster_bytes)
            codec.encode_row(table, start % codec.per_table, self.entry_for(host), count)
            yield table


@dataclass(frozen=True)
class PreallocatedDisk:
    """A new image with a preallocated disk: where the parts lie that do not fit in memory.

    Attributes:
        row: the whole disk.
        tables: host offset of its L2 tables, which lie in a row.
        blocks: host offset of the refcount blocks, which lie in a row.
        used_clusters: so many clusters, from the first one on, have one user each; the others none.
    """

    row: MappedRow
    tables: HostOffset
    blocks: HostOffset
    used_clusters: int

    def refcount_blocks(self) -> Iterator[bytes | bytearray]:
        """Yield the refcount blocks."""
        geometry = self.row.codec.geometry
        for index in range(-(-self.used_clusters // geometry.refcounts_per_cluster)):
            yield refcount_block_of_ones(geometry, index, 0, self.used_clusters)


def refcount_block_of_ones(geometry: Geometry, index: int, start: int, end: int) -> bytes | bytearray:
    """Return the refcount block ``index`` of an image whose clusters [start, end) have one user each."""
    per_block = geometry.refcounts_per_cluster
    first, stop = max(start - index * per_block, 0), min(end - index * per_block, per_block)
    block = bytearray(geometry.cluster_bytes)
    _native.refcount_add(block, geometry.refcount_order, first, stop, 1)
    return block
