"""Where things are in a whole image: what a damage can hit, and where the host has what the guest sees.

An image with a live journal is taken apart by a recovered copy of it; the journal itself is where its own
sector 0 says. What is read here is whole: nothing of it is checked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jqcow.ondisk.entries import OFFSET_MASK
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, codec_of
from jqcow.ondisk.luks import pointer_of
from jqcow.ondisk.root import is_live, unpack_root
from jqcow.ondisk.snapshots import Snapshot, parse_table
from tests.salvage.sectors import SECTOR_BYTES

EXTENSION_BITMAPS = 0x23852875
Range = tuple[int, int]
"""Host offset and length in bytes."""


@dataclass(frozen=True)
class Piece:
    """A guest cluster: where its entries stand, and where its data lies.

    Attributes:
        guest_offset: of the cluster in bytes.
        l1_place: host offset of its L1 entry.
        l2_place: host offset of its L2 entry; -1 where there is no L2 table.
        host_offset: of its data; -1 where it has none.
        host_bytes: length of that data in the file.
        is_compressed: whether that is a stream.
    """

    guest_offset: int
    l1_place: int
    l2_place: int
    host_offset: int = -1
    host_bytes: int = 0
    is_compressed: bool = False


@dataclass(frozen=True)
class Anatomy:
    """The structures of an image file, as host ranges; what it does not have is empty.

    Attributes:
        header: parsed.
        cluster_bytes: length of a cluster.
        l1: the active L1 table.
        l2: the L2 tables that it names.
        refcount_table: the table.
        refcount_blocks: its blocks.
        snapshot_table: the table.
        snapshot_l1: the L1 tables of the snapshots.
        snapshot_l2: the L2 tables that only those name.
        snapshots: themselves.
        bitmap_directory: the directory.
        bitmap_clusters: tables and bits of bitmaps.
        journal: of a live image.
        luks: header and key material.
        file_bytes: length of the file.
    """

    header: Header
    cluster_bytes: int
    l1: Range
    l2: tuple[Range, ...]
    refcount_table: Range
    refcount_blocks: tuple[Range, ...]
    snapshot_table: Range | None
    snapshot_l1: tuple[Range, ...]
    snapshot_l2: tuple[Range, ...]
    snapshots: tuple[Snapshot, ...]
    bitmap_directory: Range | None
    bitmap_clusters: tuple[Range, ...]
    journal: Range | None
    luks: Range | None
    file_bytes: int

    @classmethod
    def of(cls, path: Path, recovered: Path | None = None) -> Anatomy:
        """Take an image apart.

        Args:
            path: the image.
            recovered: a copy whose tables are at home, where the image is live.
        """
        with path.open("rb") as file:
            sector = file.read(SECTOR_BYTES)
        journal = None
        if is_live(sector):
            _, extent = unpack_root(sector)
            journal = (extent.offset, extent.length)
        with (recovered or path).open("rb") as file:
            return _Reader(file.fileno()).anatomy(journal, path.stat().st_size)

    def pieces(self, path: Path, l1: Range, size: int) -> Iterator[Piece]:
        """Yield the clusters of a disk by an L1 table in a file, without those of L1 entries that are 0."""
        codec = codec_of(self.header.geometry)
        step, per_table = self.cluster_bytes, codec_entries(self)
        width = step // per_table
        with path.open("rb") as file:
            table = os.pread(file.fileno(), l1[1], l1[0])
            for index, (word,) in enumerate(struct.iter_unpack(">Q", table)):
                start = index * per_table * step
                if start >= size:
                    break
                l1_place, l2 = l1[0] + 8 * index, word & OFFSET_MASK
                if not l2:
                    yield Piece(start, l1_place, -1)
                    continue
                content = os.pread(file.fileno(), step, l2)
                for number in range(min(per_table, -(-(size - start) // step))):
                    entry = codec.decode(content, number)
                    guest, place = start + number * step, l2 + number * width
                    if entry.kind == COMPRESSED_CLUSTER:
                        yield Piece(guest, l1_place, place, entry.host, entry.length, True)
                    elif entry.kind == DATA:
                        yield Piece(guest, l1_place, place, entry.host, step)
                    else:
                        yield Piece(guest, l1_place, place)


def codec_entries(anatomy: Anatomy) -> int:
    """Return how many entries an L2 table has."""
    return anatomy.header.geometry.l2_entries


class _Reader:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.area = HeaderArea.parse(self._read(2 << 20, 0))
        self.header = self.area.header
        self.cluster_bytes = 1 << self.header.cluster_bits

    def _read(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, length, offset).ljust(length, b"\0")

    def _words(self, offset: int, length: int) -> Iterator[int]:
        for (word,) in struct.iter_unpack(">Q", self._read(length, offset)):
            if word:
                yield word

    def anatomy(self, journal: Range | None, file_bytes: int) -> Anatomy:
        """Return all that the file has."""
        header, step = self.header, self.cluster_bytes
        l1 = (header.l1_table_offset, 8 * header.l1_size)
        table = (header.refcount_table_offset, header.refcount_table_clusters * step)
        snapshots = self._snapshots()
        snapshot_l1 = tuple((one.l1_table_offset, 8 * one.l1_size) for one in snapshots)
        active = self._named(*l1)
        others = sorted({table for place in snapshot_l1 for table in self._named(*place)} - set(active))
        pointer = pointer_of(self.area)
        directory, bitmaps = self._bitmaps()
        return Anatomy(
            header=header,
            cluster_bytes=step,
            l1=l1,
            l2=tuple((table, step) for table in active),
            refcount_table=table,
            refcount_blocks=tuple((word, step) for word in self._words(*table)),
            snapshot_table=(header.snapshots_offset, step) if header.nb_snapshots else None,
            snapshot_l1=snapshot_l1,
            snapshot_l2=tuple((table, step) for table in others),
            snapshots=snapshots,
            bitmap_directory=directory,
            bitmap_clusters=bitmaps,
            journal=journal,
            luks=None if pointer is None else (pointer.offset, pointer.length),
            file_bytes=file_bytes,
        )

    def _named(self, offset: int, length: int) -> list[int]:
        """Return the L2 tables that an L1 table names."""
        return [word & OFFSET_MASK for word in self._words(offset, length)]

    def _snapshots(self) -> tuple[Snapshot, ...]:
        header = self.header
        found = parse_table(self._read, header.snapshots_offset, header.nb_snapshots, header=header)
        return tuple(found.snapshots)

    def _bitmaps(self) -> tuple[Range | None, tuple[Range, ...]]:
        extension = self.area.find(EXTENSION_BITMAPS)
        if extension is None:
            return None, ()
        count, _, length, offset = struct.unpack_from(">IIQQ", extension.data)
        directory = self._read(length, offset)
        found: list[Range] = []
        place = 0
        for _ in range(count):
            table, entries, _, _, _, name_bytes, extra_bytes = struct.unpack_from(
                ">QIIBBHI", directory, place
            )
            found.append((table, 8 * entries))
            found += [
                (word & OFFSET_MASK, self.cluster_bytes)
                for word in self._words(table, 8 * entries)
                if word & OFFSET_MASK
            ]
            place += -(-(24 + extra_bytes + name_bytes) // 8) * 8
        return (offset, length), tuple(found)
