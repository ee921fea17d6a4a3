"""A new image built in one pass, from the first guest cluster to the last.

It is written into a file that nobody sees yet, so nothing of it has to survive a crash, and it needs no
journal: the layout is header, L1 table, LUKS header, then data and L2 tables in the order of the guest, then
refcounts.

Compressed clusters are packed one behind another, each from the start of a sector, across the border of two
host clusters where these are neighbours. The refcount of a host cluster is the number of compressed clusters
that touch it; of all others it is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from jqcow import _native
from jqcow.device.base import Device
from jqcow.disks.making import write_blank
from jqcow.ondisk import entries, layout
from jqcow.ondisk.blank import (
    blank_image,
    new_area,
    new_header,
    new_l1_size,
    pack_ones,
    refcount_clusters,
)
from jqcow.ondisk.encryption import NewLuks
from jqcow.ondisk.form import Form, Preallocation
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, NO_ENTRY, L2Entry, codec_of
from jqcow.ondisk.layout import SECTOR_BYTES, HostOffset


@dataclass(frozen=True)
class BuildState:
    """How far an image without compressed clusters is built: all that is not on its device yet.

    Attributes:
        next_cluster: the first host cluster that is free.
        reached: the guest offset up to which nothing comes any more.
        l1_table: as it is so far.
        l2_index: of the L2 table that is being filled; -1 for none.
        l2_table: that table.
    """

    next_cluster: int
    reached: int
    l1_table: bytes
    l2_index: int
    l2_table: bytes


class ImageBuilder:
    """Builds an image on an empty device. Offsets and lengths in bytes."""

    def __init__(
        self,
        device: Device,
        size: int,
        form: Form,
        luks: NewLuks | None = None,
        data_file: Device | None = None,
        backing: tuple[bytes, bytes | None] | None = None,
    ) -> None:
        """Start an image of a disk of ``size`` bytes; with ``luks`` an encrypted one, without compression.

        ``data_file`` is that of the form, if it has one, empty. ``backing`` are name and format of a backing
        file, as a header stores them.

        Raises:
            ValueError: the disk needs an L1 table larger than 32 MiB.
        """
        self._device = device
        self._data_file = data_file
        self._backing = backing
        self._size = size
        self._form = form
        self._geometry = form.geometry
        self._codec = codec_of(self._geometry)
        self._l1_table = bytearray(layout.table_bytes(new_l1_size(self._geometry, size)))
        self._luks = luks
        self._luks_cluster = 1 + self._geometry.clusters(len(self._l1_table))
        luks_clusters = 0 if luks is None else self._geometry.clusters(luks.length)
        self._next_cluster = self._luks_cluster + luks_clusters
        self._l2_index = -1
        self._l2_table = bytearray()
        self._reached = 0
        self._packed_end = 0
        self._shared_refcounts: dict[int, bytearray] = {}

    @property
    def cluster_bytes(self) -> int:
        """Bytes in a cluster."""
        return self._geometry.cluster_bytes

    def write(self, data: memoryview, offset: int) -> None:
        """Map whole guest clusters from ``offset`` on to ``data``; offsets only rise.

        The last cluster of the disk may be cut at the disk's end.
        """
        self._reach(offset, len(data))
        host = self._next_cluster * self.cluster_bytes
        count = self._geometry.clusters(len(data))
        if self._data_file is not None:
            _write_data(self._data_file, self._luks, data, offset, count * self.cluster_bytes)
            host = layout.DATA_FILE + offset
        else:
            _write_data(self._device, self._luks, data, host, count * self.cluster_bytes)
            # The host offsets of one write are in a row, also where an L2 table ends within it.
            self._next_cluster += count
        first, whole = offset // self.cluster_bytes, range(self._codec.subclusters)
        done = 0
        while done < count:
            within = self._open_l2_table(first + done)
            length = min(count - done, self._codec.per_table - within)
            place = HostOffset(host + done * self.cluster_bytes)
            entry = self._codec.filled(NO_ENTRY, place, whole)
            self._codec.encode_row(self._l2_table, within, entry, length)
            done += length

    def write_parts(self, data: memoryview, offset: int, filled: list[range], zeroed: list[range]) -> None:
        """Map parts of one guest cluster: some subclusters to ``data``, some to zeros; the rest shows below.

        Where an image has no subclusters a cluster has one part alone.
        """
        self._reach(offset, len(data))
        entry = NO_ENTRY
        for part in zeroed:
            entry = self._codec.zeroed(entry, part, unmap=True)
        if filled:
            host = HostOffset(self._next_cluster * self.cluster_bytes)
            _write_data(self._device, self._luks, data, host, self.cluster_bytes)
            self._next_cluster += 1
            for part in filled:
                entry = self._codec.filled(entry, host, part)
        self._map(offset // self.cluster_bytes, entry)

    def map_zeros(self, length: int, offset: int) -> None:
        """Say of whole guest clusters that they read as zeros, whatever is below."""
        self._reach(offset, length)
        first = offset // self.cluster_bytes
        for cluster in range(first, first + self._geometry.clusters(length)):
            self._map(cluster, self._codec.zero_entry)

    def state(self) -> BuildState:
        """Return how far the image is built; what that leaves out is on the device, to be made durable."""
        tables = bytes(self._l1_table), self._l2_index, bytes(self._l2_table)
        return BuildState(self._next_cluster, self._reached, *tables)

    def go_on(self, state: BuildState) -> None:
        """Take up what another builder left; what its device has behind that state goes."""
        self._next_cluster, self._reached = state.next_cluster, state.reached
        self._l1_table[:] = state.l1_table
        self._l2_index, self._l2_table = state.l2_index, bytearray(state.l2_table)
        self._device.truncate(state.next_cluster * self.cluster_bytes)

    def write_compressed(self, stream: bytes, offset: int) -> None:
        """Map the guest cluster at ``offset`` to its compressed content; offsets only rise."""
        if self._luks is not None or self._data_file is not None:
            raise RuntimeError("compressed clusters are not encrypted, and lie in no data file")
        self._reach(offset, self.cluster_bytes)
        length = layout.round_up(len(stream), SECTOR_BYTES)
        host = self._pack(length)
        self._device.pwrite(stream.ljust(length, b"\0"), host)
        entry = L2Entry(COMPRESSED_CLUSTER, HostOffset(host), length=length)
        self._map(offset // self.cluster_bytes, entry)

    def _reach(self, offset: int, length_bytes: int) -> None:
        if offset % self.cluster_bytes or offset < self._reached:
            raise ValueError("clusters are built in the order of the guest, whole")
        self._reached = offset + layout.round_up(length_bytes, self.cluster_bytes)

    def _pack(self, length_bytes: int) -> int:
        """Return where the next compressed cluster goes, with its host clusters taken and counted."""
        fresh = self._next_cluster * self.cluster_bytes
        host = self._packed_end
        room = -host % self.cluster_bytes
        goes_on = room > 0 and (length_bytes <= room or host + room == fresh)
        if not (goes_on and self._share(host // self.cluster_bytes)):
            host = fresh
        self._packed_end = host + length_bytes
        self._next_cluster = max(self._next_cluster, self._geometry.clusters(self._packed_end))
        return host

    def _share(self, host_cluster: int) -> bool:
        """Count one more user of a host cluster; return False if its refcount does not hold that.

        Refcount blocks of ones alone are not kept in memory.
        """
        block, within = divmod(host_cluster, self._geometry.refcounts_per_cluster)
        refcounts = self._shared_refcounts.get(block)
        if refcounts is None:
            refcounts = bytearray(pack_ones(self._geometry, self._geometry.refcounts_per_cluster))
            self._shared_refcounts[block] = refcounts
        return _native.refcount_add(refcounts, self._form.refcount_order, within, within + 1, 1) < 0

    def _refcounts(self, index: int, count: int) -> bytes | bytearray:
        """Return the refcounts of the ``count`` clusters in use that a refcount block is for."""
        shared = self._shared_refcounts.get(index)
        if shared is None:
            return pack_ones(self._geometry, count)
        # Behind the last cluster each is the 1 that it began with.
        end = self._geometry.refcounts_per_cluster
        _native.refcount_add(shared, self._form.refcount_order, count, end, -1)
        return shared

    def _map(self, guest_cluster: int, entry: L2Entry) -> None:
        within = self._open_l2_table(guest_cluster)
        self._codec.encode(self._l2_table, within, entry)

    def _open_l2_table(self, guest_cluster: int) -> int:
        """Go on in the L2 table of a guest cluster, which may be the next one; return its index there."""
        l2_index, within = divmod(guest_cluster, self._codec.per_table)
        if l2_index != self._l2_index:
            self._finish_l2_table()
            self._l2_index = l2_index
            self._l2_table = bytearray(self.cluster_bytes)
        return within

    def _finish_l2_table(self) -> None:
        if self._l2_index < 0:
            return
        host = self._next_cluster * self.cluster_bytes
        self._next_cluster += 1
        self._device.pwrite(self._l2_table, host)
        entries.put_l1(self._l1_table, self._l2_index, host)
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
            self._device.pwrite(self._refcounts(index, count), blocks + index * cluster_bytes)
        self._device.pwrite(entries.pack_refcount_table(geometry, blocks, block_count), table)
        self._device.pwrite(self._l1_table, cluster_bytes)
        header = new_header(
            self._form,
            self._size,
            l1_table_offset=cluster_bytes,
            refcount_table_offset=table,
            refcount_table_clusters=table_clusters,
        )
        luks_offset = self._luks_cluster * cluster_bytes
        for offset, data in () if self._luks is None else self._luks.parts:
            self._device.pwrite(data, luks_offset + offset)
        area = new_area(self._form, header, self._luks, luks_offset)
        if self._backing is not None:
            area = area.with_backing_file(*self._backing)
        self._device.pwrite(area.data, 0)


def _write_data(device: Device, luks: NewLuks | None, data: memoryview, host: int, whole_bytes: int) -> None:
    """Write clusters; encrypted ones whole: what is behind the disk's end must read as zeros, if it grows."""
    if luks is None:
        device.pwrite(data, host)
        return
    whole = bytes(data).ljust(whole_bytes, b"\0")
    device.pwrite(luks.cipher.encrypt(whole, host // SECTOR_BYTES), host)


class PreallocatedImage:
    """A preallocated image on an empty device, whose disk is written. Offsets and lengths in bytes."""

    def __init__(
        self,
        device: Device,
        size: int,
        form: Form,
        preallocation: Preallocation,
        luks: NewLuks | None = None,
        data_file: Device | None = None,
    ) -> None:
        """Write the image, all of it, with a disk of ``size`` bytes of zeros; with ``luks`` an encrypted one.

        ``data_file`` is that of the form, if it has one, and has the length of the disk.

        Raises:
            ValueError: the disk is too large for clusters of this size.
        """
        blank = blank_image(size, form, preallocated=True, luks=luks)
        write_blank(device, blank, preallocation)
        self._device = device
        self._data_file = data_file
        self._blank = blank
        self._luks = luks
        self._codec = codec_of(form.geometry)
        self.cluster_bytes = form.geometry.cluster_bytes

    def write(self, data: memoryview, offset: int) -> None:
        """Write whole guest clusters from ``offset`` on; the last one may be cut at the disk's end."""
        disk = self._blank.disk
        if disk is None:
            raise RuntimeError("a preallocated image has a preallocated disk")
        host, count = disk.row.host + offset, self._codec.geometry.clusters(len(data))
        if self._data_file is not None:
            _write_data(self._data_file, self._luks, data, offset, count * self.cluster_bytes)
        else:
            _write_data(self._device, self._luks, data, host, count * self.cluster_bytes)
        if self._codec.subclusters > 1 or self._luks is not None:
            self._fill(disk.tables, host, offset // self.cluster_bytes, count)

    def _fill(self, tables: int, host: int, first: int, count: int) -> None:
        """Say of clusters that all their subclusters are data; their entries lie in a row, tables and all."""
        codec = self._codec
        row = bytearray(count * codec.entry_bytes)
        entry = codec.filled(NO_ENTRY, HostOffset(host), range(codec.subclusters))
        codec.encode_row(row, 0, entry, count)
        self._device.pwrite(row, tables + first * codec.entry_bytes)

    def finish(self) -> None:
        """Nothing is left to write."""
