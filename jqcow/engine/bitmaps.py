"""Persistent dirty bitmaps through one view (qcow2 specification, "Bitmaps"): found, read and changed.

The directory, the tables and the clusters of bits are metadata like any other. Each change of which bitmaps
there are writes the directory anew, in other clusters, and the header names that in the same record.

B5. The bitmap directory, the tables and the clusters of bits are counted once each, in the record that names
    them; a table has as many entries as the size of the disk asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from jqcow.engine.bits import Bits
from jqcow.engine.metadata import View
from jqcow.engine.refcounts import Allocation
from jqcow.errors import BitmapError, BitmapNotFound, UnsupportedFeatureError
from jqcow.ondisk import bitmaps as ondisk
from jqcow.ondisk import layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.bitmaps import Bitmap, BitmapEntry, Directory, Place
from jqcow.ondisk.header import AUTOCLEAR_BITMAPS, HeaderArea
from jqcow.ondisk.layout import ClusterIndex, HostOffset


class Bitmaps(Bits):
    """The bitmaps of one image through one view. What changes them is called inside an operation."""

    def __init__(self, view: View, refcounts: Allocation) -> None:
        super().__init__(view, refcounts)
        self._area: HeaderArea | None = None
        """The header that ``_directory`` was read for."""
        self._directory = Directory()
        self._enabled: tuple[BitmapEntry, ...] = ()

    # Looking

    @property
    def directory(self) -> Directory:
        """All bitmaps that count.

        Raises:
            CorruptionError: the directory is damaged.
        """
        if self.space.sound_bitmaps is not None:
            return self.space.sound_bitmaps
        area = self.view.area
        if area is not self._area:
            self._directory = ondisk.read_directory(self.read_host, area)
            self._enabled = tuple(entry for entry in self._directory.entries if entry.is_enabled)
            self._area = area
        return self._directory

    @property
    def enabled(self) -> tuple[BitmapEntry, ...]:
        """The bitmaps that take note of every change."""
        if not self.view.header.autoclear_features & AUTOCLEAR_BITMAPS or not self.directory.entries:
            return ()
        return self._enabled

    def told(self) -> tuple[Bitmap, ...]:
        """Return what people are told of the bitmaps, damaged ones included.

        Raises:
            CorruptionError: the directory cannot be told apart.
        """
        return ondisk.read_bitmaps(self.read_host, self.view.area)

    def read_host(self, length: int, offset: int) -> bytes:
        """Return bytes of the image file as the view has them."""
        return self.view.read(HostOffset(offset), length)

    def require_kept(self) -> None:
        """Raise UnsupportedFeatureError if a bitmap is to note changes, and jqcow cannot see to it."""
        for entry in self.directory.entries:
            if not entry.is_kept:
                raise UnsupportedFeatureError(
                    "writing to an image with a bitmap of an unknown kind", entry.text
                )

    def find(self, name: str) -> BitmapEntry:
        """Return the bitmap of this name.

        Raises:
            BitmapNotFound: there is none.
        """
        found = self.directory.find(name)
        if found is None:
            raise BitmapNotFound(name)
        return found

    def usable(self, name: str) -> BitmapEntry:
        """Return the bitmap of this name, whose bits can be believed.

        Raises:
            BitmapNotFound: there is none.
            BitmapError: it was left in use, or is of an unknown kind.
        """
        found = self.find(name)
        if found.is_in_use:
            raise BitmapError(name, "it was left in use, and may be wrong: it can only be removed")
        if not found.is_usable:
            raise BitmapError(name, "it is of a kind that jqcow does not know")
        return found

    def clusters(self) -> Iterator[tuple[str, ClusterIndex]]:
        """Yield what bitmaps take: (structure, cluster index); a table before it is read.

        Raises:
            CorruptionError: the directory or a table is damaged.
        """
        directory = self.directory
        yield from self.run_of("bitmap directory", directory.offset, directory.length_bytes)
        for entry in directory.entries:
            yield from self.clusters_of(entry)

    def clusters_of(self, entry: BitmapEntry) -> Iterator[tuple[str, ClusterIndex]]:
        """Yield what one bitmap takes, as `clusters`."""
        yield from self.run_of("bitmap table", entry.table_offset, layout.table_bytes(entry.table_entries))
        for _, bits in self.allocated(entry):
            yield "bits of a bitmap", self.geometry.cluster_of(bits)

    def run_of(self, structure: str, offset: int, length: int) -> Iterator[tuple[str, ClusterIndex]]:
        """Yield the clusters of a structure in a row, as `clusters`."""
        first = self.geometry.cluster_of(HostOffset(offset))
        for cluster in range(first, first + self.geometry.clusters(length)):
            yield structure, ClusterIndex(cluster)

    # Which bitmaps there are

    def add(self, name: str, granularity_bits: int, *, enabled: bool) -> None:
        """Add a bitmap in which nothing is dirty.

        Raises:
            BitmapError: there is one of this name, or as many as there can be.
            UnsupportedFeatureError: an image of version 2, or a bitmap larger than QEMU opens.
            OSError: the host has no space for it.
        """
        directory, header = self.directory, self.view.header
        if header.version < 3:
            raise UnsupportedFeatureError("bitmaps in an image of version 2")
        if directory.find(name) is not None:
            raise BitmapError(name, "there is one of this name")
        count = self._table_entries(granularity_bits, header.size)
        offset = self.refcounts.allocate_metadata(self.geometry.clusters(layout.table_bytes(count)))
        flags = ondisk.AUTO if enabled else 0
        encoded = name.encode("utf-8", "surrogateescape")
        entry = BitmapEntry(offset, count, flags, ondisk.DIRTY_TRACKING, granularity_bits, encoded)
        self._write_directory((*directory.entries, entry))

    def _table_entries(self, granularity_bits: int, disk_bytes: int) -> int:
        header = replace(self.view.header, size=disk_bytes)
        count = ondisk.table_entries_for(header, granularity_bits)
        if count * self.geometry.cluster_bytes > ondisk.MAX_BITMAP_BYTES:
            raise UnsupportedFeatureError(
                "a bitmap of more than 512 MiB",
                f"one bit for {1 << granularity_bits} of {disk_bytes} bytes",
            )
        return count

    def remove(self, name: str) -> None:
        """Remove a bitmap, whatever it is like."""
        entry = self.find(name)
        self._release(entry)
        self._write_directory(kept for kept in self.directory.entries if kept is not entry)

    def _release(self, entry: BitmapEntry) -> None:
        for _, bits in list(self.allocated(entry)):
            self.refcounts.release_metadata(self.geometry.cluster_of(bits))
        self._release_table(entry)

    def _release_table(self, entry: BitmapEntry) -> None:
        first = self.geometry.cluster_of(HostOffset(entry.table_offset))
        count = self.geometry.clusters(layout.table_bytes(entry.table_entries))
        self.refcounts.release_metadata(first, count)

    def clear(self, name: str) -> None:
        """Make everything clean in a bitmap."""
        entry = self.usable(name)
        for index in range(entry.table_entries):
            self.drop_cluster(entry, index, 0)

    def set_enabled(self, name: str, *, enabled: bool) -> None:
        """Have a bitmap take note of changes, or not."""
        entry = self.usable(name)
        flags = entry.flags | ondisk.AUTO if enabled else entry.flags & ~ondisk.AUTO
        self._replace(entry, replace(entry, flags=flags))

    def rename(self, name: str, new: str) -> None:
        """Give a bitmap another name."""
        entry = self.usable(name)
        if self.directory.find(new) is not None:
            raise BitmapError(new, "there is one of this name")
        self._replace(entry, replace(entry, name=new.encode("utf-8", "surrogateescape")))

    def merge(self, name: str, source: str) -> None:
        """Make dirty in a bitmap what is dirty in another one too."""
        self.join(self.usable(name), self.usable(source))

    def _replace(self, old: BitmapEntry, new: BitmapEntry) -> None:
        if old != new:
            self._write_directory(new if entry is old else entry for entry in self.directory.entries)

    def _write_directory(self, kept: Iterable[BitmapEntry]) -> None:
        """Write the directory anew, in other clusters, and give up the old one (B5)."""
        kept, old = tuple(kept), self.directory
        data = ondisk.pack_directory(kept)
        if len(kept) > ondisk.MAX_BITMAPS or len(data) > ondisk.MAX_DIRECTORY_BYTES:
            raise UnsupportedFeatureError(f"more than {ondisk.MAX_BITMAPS} bitmaps, or 64 MiB of their names")
        if ondisk.tables_bytes(kept) > ondisk.MAX_TABLES_BYTES:
            raise UnsupportedFeatureError("bitmaps with tables of more than 64 MiB in all")
        offset = HostOffset(0)
        if data:
            offset = self.refcounts.allocate_metadata(self.geometry.clusters(len(data)))
            self.edit(offset, data)
        self.name_directory(Place(len(kept), len(data), offset))
        if old.length_bytes:
            first = self.geometry.cluster_of(HostOffset(old.offset))
            self.refcounts.release_metadata(first, self.geometry.clusters(old.length_bytes))

    def name_directory(self, place: Place) -> None:
        """Have the header name a directory."""
        area, features = self.view.area, self.view.header.autoclear_features
        features = features | AUTOCLEAR_BITMAPS if place.count else features & ~AUTOCLEAR_BITMAPS
        area = area.with_extension(place.pack(), autoclear_features=features)
        roots.check_room(area.header, len(area.data))
        self.view.set_area(area)

    # Another disk

    def resize(self, disk_bytes: int, *, replaced: bool = False) -> None:
        """Before the disk gets another size: give every bitmap the table for it.

        What is added is dirty in those that take note of changes: an older copy of the disk, of which less
        was cut off, may have data there. With ``replaced`` all of the new disk is.

        Raises:
            UnsupportedFeatureError: a bitmap would get too large, or is of an unknown kind.
        """
        old_bytes = self.view.header.size
        kept = []
        for entry in self.directory.entries:
            new = entry
            if not entry.is_in_use and not entry.is_usable:
                raise UnsupportedFeatureError("resizing a bitmap of an unknown kind", entry.text)
            if entry.is_usable:
                new = self._resized(entry, disk_bytes)
                if new.is_enabled and (replaced or disk_bytes > old_bytes):
                    first = 0 if replaced else old_bytes >> new.granularity_bits
                    self.set_bits(new, first, new.bits_for(disk_bytes))
            kept.append(new)
        if tuple(kept) != self.directory.entries:
            self._write_directory(kept)

    def _resized(self, entry: BitmapEntry, disk_bytes: int) -> BitmapEntry:
        count = self._table_entries(entry.granularity_bits, disk_bytes)
        for index, bits in list(self.allocated(entry)):
            if index >= count:
                self.refcounts.release_metadata(self.geometry.cluster_of(bits))
        new = entry
        if count != entry.table_entries:
            offset = self.refcounts.allocate_metadata(self.geometry.clusters(layout.table_bytes(count)))
            kept_bytes = layout.table_bytes(min(count, entry.table_entries))
            self.view.copy_table(HostOffset(entry.table_offset), offset, kept_bytes)
            self._release_table(entry)
            new = replace(entry, table_offset=offset, table_entries=count)
        self.clear_tail(new, new.bits_for(disk_bytes))
        return new
