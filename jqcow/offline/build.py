"""A new image built in one pass, from the first guest cluster to the last.

It is written into a file that nobody sees yet, so nothing of it has to survive a crash, and it needs no
journal: the layout is header, L1 table, then data and L2 tables in the order of the guest, then refcounts.
Every cluster of the file is used once, so all refcounts are 1.
"""

from __future__ import annotations

from jqcow.device.base import Device
from jqcow.ondisk import entries, layout
from jqcow.ondisk.blank import refcount_clusters
from jqcow.ondisk.header import CREATED_HEADER_BYTES, Header
from jqcow.ondisk.layout import ENTRY_BYTES, Geometry


class ImageBuilder:
    """Builds a version 3 image on an empty device. Offsets and lengths in bytes."""

    def __init__(self, device: Device, size: int, cluster_bits: int) -> None:
        """Start an image of a disk of ``size`` bytes.

        Raises:
            ValueError: the disk needs an L1 table larger than 32 MiB.
        """
        self._device = device
        self._size = size
        self._geometry = Geometry(cluster_bits)
        l1_size = self._geometry.l1_entries_for(size)
        if l1_size * ENTRY_BYTES > layout.MAX_L1_BYTES:
            raise ValueError(f"a disk of {size} bytes needs clusters larger than {1 << cluster_bits} bytes")
        self._l1_table = bytearray(l1_size * ENTRY_BYTES)
        self._next_cluster = 1 + self._geometry.clusters(len(self._l1_table))
        self._l2_index = -1
        self._l2_table = bytearray()
        self._reached = 0

    @property
    def cluster_bytes(self) -> int:
        """Bytes in a cluster."""
        return self._geometry.cluster_bytes

    def write(self, data: memoryview, offset: int) -> None:
        """Map whole guest clusters from ``offset`` on to ``data``; offsets only rise.

        The last cluster of the disk may be cut at the disk's end.
        """
        if offset % self.cluster_bytes or offset < self._reached:
            raise ValueError("clusters are built in the order of the guest, whole")
        host = self._next_cluster * self.cluster_bytes
        self._device.pwrite(data, host)
        count = self._geometry.clusters(len(data))
        # The host offsets of one write are in a row, also where an L2 table ends within it.
        self._next_cluster += count
        first = offset // self.cluster_bytes
        for cluster in range(first, first + count):
            self._map(cluster, host + (cluster - first) * self.cluster_bytes)
        self._reached = offset + count * self.cluster_bytes

    def _map(self, guest_cluster: int, host_offset: int) -> None:
        l2_index, within = divmod(guest_cluster, self._geometry.l2_entries)
        if l2_index != self._l2_index:
            self._finish_l2_table()
            self._l2_index = l2_index
            self._l2_table = bytearray(self.cluster_bytes)
        entries.ENTRY.pack_into(self._l2_table, within * ENTRY_BYTES, entries.l2_entry(host_offset))

    def _finish_l2_table(self) -> None:
        if self._l2_index < 0:
            return
        host = self._next_cluster * self.cluster_bytes
        self._next_cluster += 1
        self._device.pwrite(self._l2_table, host)
        entries.ENTRY.pack_into(self._l1_table, self._l2_index * ENTRY_BYTES, entries.l1_entry(host))
        self._l2_index = -1

    def finish(self) -> None:
        """Write tables, refcounts and header. Nothing is durable yet."""
        self._finish_l2_table()
        geometry, cluster_bytes = self._geometry, self.cluster_bytes
        table_clusters, block_count = refcount_clusters(geometry, self._next_cluster)
        table = self._next_cluster * cluster_bytes
        blocks = table + table_clusters * cluster_bytes
        used = self._next_cluster + table_clusters + block_count
        # Whole clusters up to the end: the disk's last cluster may have been shorter than a cluster.
        self._device.truncate(used * cluster_bytes)
        for index in range(block_count):
            first = index * geometry.refcounts_per_cluster
            count = min(geometry.refcounts_per_cluster, used - first)
            self._device.pwrite(b"\0\1" * count, blocks + index * cluster_bytes)
            entry = entries.ENTRY.pack(blocks + index * cluster_bytes)
            self._device.pwrite(entry, table + index * ENTRY_BYTES)
        self._device.pwrite(self._l1_table, cluster_bytes)
        self._device.pwrite(self._header(table, table_clusters).pack(), 0)

    def _header(self, refcount_table_offset: int, refcount_table_clusters: int) -> Header:
        return Header(
            version=3,
            backing_file_offset=0,
            backing_file_size=0,
            cluster_bits=self._geometry.cluster_bits,
            size=self._size,
            crypt_method=0,
            l1_size=len(self._l1_table) // ENTRY_BYTES,
            l1_table_offset=self.cluster_bytes,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            nb_snapshots=0,
            snapshots_offset=0,
            header_length=CREATED_HEADER_BYTES,
        )
