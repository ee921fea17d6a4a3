"""A disk into a pipe: raw or qcow2, in one pass over the target.

A raw disk goes out as it is read. The header of a qcow2 image comes first and names the places of the tables;
so these have to be known before the first byte is written. Two ways lead there:

- *Read twice.* The first reading finds which clusters are not zero. All of them take one whole cluster, so
  every place follows: header, refcounts, L1 table, L2 tables, then the data, read a second time. It needs no
  space, and memory of one bit for a cluster of the tables that have data. The source must not change
  meanwhile; its lock sees to that.
- *A spool.* What a compressed cluster takes is known when it is compressed. To compress twice would cost the
  slow part again; to keep the compressed clusters costs their space for a while. So such an image is built as
  it would be into a file, in one without a name, and then copied out. So is one with bitmaps, with encryption
  (its key is made with its header), or with preallocated tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jqcow.device.disk import Disk, read_padded
from jqcow.device.stream import OutputStream
from jqcow.offline.compare import Progress, nonzero_runs, windows
from jqcow.ondisk import layout
from jqcow.ondisk.blank import new_area, new_header, new_l1_size, pack_ones, refcount_clusters
from jqcow.ondisk.entries import pack_refcount_table, put_l1
from jqcow.ondisk.form import Form
from jqcow.ondisk.l2 import NO_ENTRY, codec_of
from jqcow.ondisk.layout import Geometry, HostOffset

BUFFER_BYTES = 2 << 20


@dataclass(frozen=True)
class StreamAmounts:
    """What a stream came to, in bytes: what was read of the disk, counted once, and what was not zero."""

    read_bytes: int
    written_bytes: int


def stream_raw(disk: Disk, stream: OutputStream, progress: Progress) -> StreamAmounts:
    """Write a disk as a raw one.

    Raises:
        JqcowError: it cannot be read.
        OSError: the host failed, or nobody reads the stream any more.
    """
    buffer = memoryview(bytearray(BUFFER_BYTES))
    end = read_bytes = 0
    progress(0, disk.size)
    for offset, length in windows(disk, layout.SECTOR_BYTES, BUFFER_BYTES):
        stream.write_zeros(offset - end)
        disk.read_into(buffer[:length], offset)
        stream.write(buffer[:length])
        read_bytes += length
        end = offset + length
        progress(end, disk.size)
    stream.write_zeros(disk.size - end)
    progress(disk.size, disk.size)
    return StreamAmounts(read_bytes, read_bytes)


@dataclass
class Plan:
    """Which clusters of a disk are not zero.

    Attributes:
        per_table: clusters that an L2 table maps.
        tables: of each L2 table with data a number with a bit for each of its clusters.
    """

    per_table: int
    tables: dict[int, int] = field(default_factory=dict)

    def add(self, first: int, count: int) -> None:
        """Take clusters in; they may lie in several tables."""
        while count:
            index, within = divmod(first, self.per_table)
            length = min(count, self.per_table - within)
            self.tables[index] = self.tables.get(index, 0) | ((1 << length) - 1) << within
            first, count = first + length, count - length

    @property
    def cluster_count(self) -> int:
        """How many clusters have data."""
        return sum(bits.bit_count() for bits in self.tables.values())

    def runs(self, index: int) -> Iterator[tuple[int, int]]:
        """Yield (first, count) of clusters in a row, within a table."""
        bits, first = self.tables[index], 0
        while bits:
            gap = (bits & -bits).bit_length() - 1
            bits >>= gap
            count = (~bits & bits + 1).bit_length() - 1
            bits >>= count
            yield first + gap, count
            first += gap + count


def plan_of(disk: Disk, geometry: Geometry, per_table: int, progress: Progress) -> tuple[Plan, int]:
    """Read a disk; return which clusters are not zero, and how many bytes were read."""
    plan, unit, read_bytes = Plan(per_table), geometry.cluster_bytes, 0
    buffer = memoryview(bytearray(BUFFER_BYTES))
    progress(0, disk.size)
    for offset, length in windows(disk, unit, BUFFER_BYTES):
        data = buffer[:length]
        disk.read_into(data, offset)
        read_bytes += length
        for start, end in nonzero_runs(data, unit):
            plan.add((offset + start) // unit, geometry.clusters(end - start))
        progress(offset + length, disk.size)
    return plan, read_bytes


def stream_image(disk: Disk, form: Form, stream: OutputStream, progress: Progress) -> StreamAmounts:
    """Write a disk as a qcow2 image, whose data is neither compressed nor encrypted.

    Raises:
        ValueError: no image of this form has such a disk.
        JqcowError: it cannot be read.
        OSError: the host failed, or nobody reads the stream any more.
    """
    geometry = form.geometry
    # Before anything is read: what no image can have is refused.
    new_l1_size(geometry, disk.size)
    plan, read_bytes = plan_of(disk, geometry, codec_of(geometry).per_table, progress)
    written_bytes = _Stream(disk, form, plan, stream).write(progress)
    return StreamAmounts(read_bytes, written_bytes)


class _Stream:
    """One image, from its header on."""

    def __init__(self, disk: Disk, form: Form, plan: Plan, stream: OutputStream) -> None:
        self._disk = disk
        self._form = form
        self._plan = plan
        self._stream = stream
        self._geometry = form.geometry
        self._codec = codec_of(form.geometry)
        self._indices = sorted(plan.tables)
        self._cluster_bytes = form.geometry.cluster_bytes

    def write(self, progress: Progress) -> int:
        """Write all of it; return how many bytes of the disk it has."""
        geometry, cluster_bytes = self._geometry, self._cluster_bytes
        l1_size = new_l1_size(geometry, self._disk.size)
        l1_clusters = geometry.clusters(layout.table_bytes(l1_size))
        others = 1 + l1_clusters + len(self._indices) + self._plan.cluster_count
        table_clusters, block_count = refcount_clusters(geometry, others)
        if table_clusters * cluster_bytes > layout.MAX_REFCOUNT_TABLE_BYTES:
            raise ValueError(
                f"what the disk holds needs larger clusters, or narrower refcounts, than {cluster_bytes} "
                f"bytes and {1 << self._form.refcount_order} bits"
            )
        table = cluster_bytes
        blocks = table + table_clusters * cluster_bytes
        l1_table = blocks + block_count * cluster_bytes
        tables = l1_table + l1_clusters * cluster_bytes
        places = {"l1_table_offset": l1_table, "refcount_table_offset": table}
        header = new_header(self._form, self._disk.size, **places, refcount_table_clusters=table_clusters)
        self._put(new_area(self._form, header).data, 1)
        self._put(pack_refcount_table(geometry, blocks, block_count), table_clusters)
        self._put_refcounts(others + table_clusters + block_count, block_count)
        self._put(self._l1_table(l1_size, tables), l1_clusters)
        self._put_l2_tables(tables + len(self._indices) * cluster_bytes)
        return self._put_data(progress)

    def _put(self, data: bytes | bytearray, clusters: int) -> None:
        self._stream.write(data)
        self._stream.write_zeros(clusters * self._cluster_bytes - len(data))

    def _put_refcounts(self, used: int, block_count: int) -> None:
        per_block = self._geometry.refcounts_per_cluster
        whole = pack_ones(self._geometry, per_block)
        for index in range(block_count):
            count = min(per_block, used - index * per_block)
            self._put(whole if count == per_block else pack_ones(self._geometry, count), 1)

    def _l1_table(self, l1_size: int, tables: int) -> bytearray:
        table = bytearray(layout.table_bytes(l1_size))
        for place, index in enumerate(self._indices):
            put_l1(table, index, tables + place * self._cluster_bytes)
        return table

    def _put_l2_tables(self, data: int) -> None:
        """Write the L2 tables of data that lies in a row from host offset ``data`` on."""
        host, whole = data, range(self._codec.subclusters)
        for index in self._indices:
            table = bytearray(self._cluster_bytes)
            for first, count in self._plan.runs(index):
                self._codec.encode_row(
                    table, first, self._codec.filled(NO_ENTRY, HostOffset(host), whole), count
                )
                host += count * self._cluster_bytes
            self._put(table, 1)

    def _put_data(self, progress: Progress) -> int:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        written_bytes = 0
        progress(0, self._disk.size)
        for index in self._indices:
            start = index * self._plan.per_table * self._cluster_bytes
            for first, count in self._plan.runs(index):
                offset, end = (start + at * self._cluster_bytes for at in (first, first + count))
                for place in range(offset, end, BUFFER_BYTES):
                    data = buffer[: min(BUFFER_BYTES, end - place)]
                    # The last cluster may reach past the end of the disk.
                    read_padded(self._disk, data, place)
                    self._stream.write(data)
                    done = min(place + len(data), self._disk.size)
                    written_bytes += done - place
                    progress(done, self._disk.size)
        progress(self._disk.size, self._disk.size)
        return written_bytes
