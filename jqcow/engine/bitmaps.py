"""Persistent dirty bitmaps through one view (qcow2 specification, "Bitmaps"): found, read and changed.

The directory, the tables and the clusters of bits are metadata like any other. Each change of which bitmaps
there are writes the directory anew, in other clusters, and the header names that in the same record.

B5. The bitmap directory, the tables and the clusters of bits are counted once each, in the record that names
    them; a table has as many entries as the size of the disk asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from jqcow import _native
from jqcow.engine.metadata import View
from jqcow.engine.refcounts import Allocation
from jqcow.errors import BitmapError, BitmapNotFound, CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import bitmaps as ondisk
from jqcow.ondisk import entries, layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.bitmaps import Bitmap, BitmapEntry, Directory, Place
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.header import AUTOCLEAR_BITMAPS, HeaderArea
from jqcow.ondisk.layout import ClusterIndex, HostOffset, entry_place

MERGE_BYTES = 1 << 20
"""So many bytes of a bitmap are looked at in one go."""
RUN_BYTES = 512


class Bitmaps:
    """The bitmaps of one image through one view. What changes them is called inside an operation."""

    def __init__(self, view: View, refcounts: Allocation) -> None:
        self.view = view
        self.refcounts = refcounts
        self.space = refcounts.space
        self.geometry = view.geometry
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
            self._directory = ondisk.read_directory(self._read, area)
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
        return ondisk.read_bitmaps(self._read, self.view.area)

    def _read(self, length: int, offset: int) -> bytes:
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
        yield from self._run("bitmap directory", directory.offset, directory.length_bytes)
        for entry in directory.entries:
            yield from self.clusters_of(entry)

    def clusters_of(self, entry: BitmapEntry) -> Iterator[tuple[str, ClusterIndex]]:
        """Yield what one bitmap takes, as `clusters`."""
        yield from self._run("bitmap table", entry.table_offset, layout.table_bytes(entry.table_entries))
        for _, bits in self._allocated(entry):
            yield "bits of a bitmap", self.geometry.cluster_of(bits)

    def _run(self, structure: str, offset: int, length: int) -> Iterator[tuple[str, ClusterIndex]]:
        first = self.geometry.cluster_of(HostOffset(offset))
        for cluster in range(first, first + self.geometry.clusters(length)):
            yield structure, ClusterIndex(cluster)

    def _allocated(self, entry: BitmapEntry) -> Iterator[tuple[int, HostOffset]]:
        """Yield (index, host offset) of the clusters of bits that a bitmap has."""
        block_bytes, table = self.geometry.block_bytes, HostOffset(entry.table_offset)
        for start in range(0, layout.table_bytes(entry.table_entries), block_bytes):
            block = self.view.block(HostOffset(table + start))
            if _native.is_zero(block):
                continue
            first = layout.table_entries(start)
            for index in range(first, min(first + layout.table_entries(block_bytes), entry.table_entries)):
                bits, _ = self._bits_at(entry, index)
                if bits:
                    yield index, bits

    def _bits_at(self, entry: BitmapEntry, index: int) -> tuple[HostOffset, bool]:
        assert index < entry.table_entries, "behind the end of a bitmap table"
        table = HostOffset(entry.table_offset)
        try:
            return entries.decode_bitmap_table(self.view.entry(table, index), self.geometry)
        except DamagedEntry as error:
            raise CorruptionError("bitmap table", entry_place(table, index), str(error)) from error

    # Bits, as bytes of a bitmap: bit n is bit n % 8 of byte n / 8

    def read(self, entry: BitmapEntry, start: int, length: int) -> bytes:
        """Return bytes [start, start + length) of a bitmap."""
        parts = []
        for index, within, count in self._pieces(start, length):
            bits, all_ones = self._bits_at(entry, index)
            if bits:
                parts.append(self.view.read(HostOffset(bits + within), count))
            else:
                parts.append((b"\xff" if all_ones else b"\0") * count)
        return b"".join(parts)

    def write(self, entry: BitmapEntry, start: int, data: bytes) -> None:
        """Replace bytes of a bitmap from ``start`` on; a cluster for them is taken if they ask for one.

        Raises:
            OSError: the host has no space for it.
        """
        position = 0
        for index, within, count in self._pieces(start, len(data)):
            part = data[position : position + count]
            position += count
            bits, all_ones = self._bits_at(entry, index)
            if not bits:
                if part.count(255 if all_ones else 0) == count:
                    continue
                bits = self._take_cluster(entry, index, all_ones=all_ones)
            self._edit(HostOffset(bits + within), part)

    def _pieces(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the table entry, offset in its cluster, length) of bytes of a bitmap."""
        end, cluster_bytes = start + length, self.geometry.cluster_bytes
        while start < end:
            index, within = divmod(start, cluster_bytes)
            count = min(cluster_bytes - within, end - start)
            yield index, within, count
            start += count

    def _take_cluster(self, entry: BitmapEntry, index: int, *, all_ones: bool) -> HostOffset:
        bits = self.refcounts.allocate_metadata()
        if all_ones:
            self._edit(bits, b"\xff" * self.geometry.cluster_bytes)
        self.view.set_entry(HostOffset(entry.table_offset), index, bits)
        return bits

    def _edit(self, offset: HostOffset, data: bytes) -> None:
        block_bytes, position = self.geometry.block_bytes, 0
        while position < len(data):
            within = offset % block_bytes
            part = data[position : position + block_bytes - within]
            self.view.edit(HostOffset(offset - within))[within : within + len(part)] = part
            offset, position = HostOffset(offset + len(part)), position + len(part)

    def set_bits(self, entry: BitmapEntry, first: int, end: int) -> None:
        """Set bits [first, end) of a bitmap; whole clusters of them take no space."""
        per_cluster = self._bits_per_cluster
        while first < end:
            index, within = divmod(first, per_cluster)
            stop = min(end, first - within + per_cluster)
            if stop - first == per_cluster:
                self._drop_cluster(entry, index, entries.ALL_ONES)
            else:
                self._set_in_cluster(entry, first, stop)
            first = stop

    @property
    def _bits_per_cluster(self) -> int:
        return self.geometry.cluster_bytes << 3

    def _set_in_cluster(self, entry: BitmapEntry, first: int, end: int) -> None:
        start, stop = first >> 3, end + 7 >> 3
        old = self.read(entry, start, stop - start)
        mask = (1 << end - (start << 3)) - (1 << first - (start << 3))
        new = (int.from_bytes(old, "little") | mask).to_bytes(len(old), "little")
        if new != old:
            self.write(entry, start, new)

    def _drop_cluster(self, entry: BitmapEntry, index: int, value: int) -> None:
        """Give a table entry another value, without a cluster, and give up the cluster that it has."""
        table = HostOffset(entry.table_offset)
        bits, _ = self._bits_at(entry, index)
        if self.view.entry(table, index) != value:
            self.view.set_entry(table, index, value)
        if bits:
            self.refcounts.release_metadata(self.geometry.cluster_of(bits))

    def mark(self, entry: BitmapEntry, offset: int, length: int) -> None:
        """Set the bits of a range of the disk, as far as there are any."""
        end = min(offset + length, self.view.header.size)
        if offset < end:
            bits = entry.granularity_bits
            self.set_bits(entry, offset >> bits, (end - 1 >> bits) + 1)

    def is_marked(self, entry: BitmapEntry, offset: int, length: int) -> bool:
        """Return True if a range of the disk is dirty all over, as far as there is a disk."""
        end = min(offset + length, self.view.header.size)
        if offset >= end:
            return True
        first, stop = offset >> entry.granularity_bits, (end - 1 >> entry.granularity_bits) + 1
        start = first >> 3
        data = self.read(entry, start, (stop + 7 >> 3) - start)
        mask = (1 << stop - (start << 3)) - (1 << first - (start << 3))
        return int.from_bytes(data, "little") & mask == mask

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
        for _, bits in list(self._allocated(entry)):
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
            self._drop_cluster(entry, index, 0)

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
        target, other = self.usable(name), self.usable(source)
        if target.granularity_bits != other.granularity_bits:
            for start, end in list(self.dirty_runs(other)):
                self.mark(target, start, end - start)
            return
        for start in range(0, target.bits_for(self.view.header.size) + 7 >> 3, MERGE_BYTES):
            length = min(MERGE_BYTES, (target.bits_for(self.view.header.size) + 7 >> 3) - start)
            old, added = self.read(target, start, length), self.read(other, start, length)
            joined = int.from_bytes(old, "little") | int.from_bytes(added, "little")
            self.write(target, start, joined.to_bytes(length, "little"))

    def dirty_runs(self, entry: BitmapEntry) -> Iterator[tuple[int, int]]:
        """Yield [start, end) in bytes of the disk of what is dirty."""
        length = entry.bits_for(self.view.header.size) + 7 >> 3
        chunks = (
            (start, self.read(entry, start, min(MERGE_BYTES, length - start)))
            for start in range(0, length, MERGE_BYTES)
        )
        return dirty_ranges(chunks, entry.granularity_bits, self.view.header.size)

    def _replace(self, old: BitmapEntry, new: BitmapEntry) -> None:
        if old != new:
            self._write_directory(new if entry is old else entry for entry in self.directory.entries)

    def _write_directory(self, kept: Iterable[BitmapEntry]) -> None:
        """Write the directory anew, in other clusters, and give up the old one (B5)."""
        kept, old = tuple(kept), self.directory
        data = ondisk.pack_directory(kept)
        if len(kept) > ondisk.MAX_BITMAPS or len(data) > ondisk.MAX_DIRECTORY_BYTES:
            raise UnsupportedFeatureError(f"more than {ondisk.MAX_BITMAPS} bitmaps, or 64 MiB of their names")
        offset = HostOffset(0)
        if data:
            offset = self.refcounts.allocate_metadata(self.geometry.clusters(len(data)))
            self._edit(offset, data)
        self._name_directory(Place(len(kept), len(data), offset))
        if old.length_bytes:
            first = self.geometry.cluster_of(HostOffset(old.offset))
            self.refcounts.release_metadata(first, self.geometry.clusters(old.length_bytes))

    def _name_directory(self, place: Place) -> None:
        area, features = self.view.area, self.view.header.autoclear_features
        features = features | AUTOCLEAR_BITMAPS if place.count else features & ~AUTOCLEAR_BITMAPS
        area = area.with_extension(place.pack(), autoclear_features=features)
        roots.check_room(area.header, len(area.data))
        self.view.set_area(area)

    # What a repair leaves

    def give_up_broken(self, others: set[ClusterIndex]) -> None:
        """Forget the bitmaps that are damaged, before a repair counts what there is; `stage_sound` follows.

        A bitmap stays if its entry, its table and the places of all its bits are those of a bitmap, and not
        among ``others``, which hold other metadata.
        """
        area, taken = self.view.area, set(others)
        found = ondisk.read_directory(self._read, area, without_broken=True)
        own = [cluster for _, cluster in self._run("bitmap directory", found.offset, found.length_bytes)]
        is_apart = taken.isdisjoint(own)
        taken.update(own)
        sound = [entry for entry in found.entries if is_apart and self._is_sound(entry, taken)]
        announced = ondisk.announced_in(area)
        if len(sound) == announced:
            return
        length = len(ondisk.pack_directory(sound))
        self.space.sound_bitmaps = Directory(tuple(sound), found.offset if sound else 0, length)
        self.space.given_up_bitmaps = max(1, announced - len(sound))
        self.space.abandoned = (self._named_by_broken() - taken) | (set(own) - others)

    def _named_by_broken(self) -> set[ClusterIndex]:
        """Return what all bitmaps that can be told apart have, or seem to have."""
        found: set[ClusterIndex] = set()
        with suppress(CorruptionError):
            place = ondisk.place_of(self.view.area)
            for _, entry in ondisk.read_entries(self._read, place) if place is not None else ():
                if entry.has_table(self.view.header):
                    with suppress(CorruptionError):
                        found.update(cluster for _, cluster in self.clusters_of(entry))
        return found

    def _is_sound(self, entry: BitmapEntry, taken: set[ClusterIndex]) -> bool:
        """Return True if a bitmap can be believed to be one; what it has is taken then."""
        seen: set[ClusterIndex] = set()
        file_end = self.geometry.clusters(self.view.blocks.medium.size())
        try:
            for _, cluster in self.clusters_of(entry):
                if (
                    cluster in seen
                    or cluster in taken
                    or (cluster >= file_end and not self.view.holds(self.geometry.offset_of(cluster)))
                ):
                    return False
                seen.add(cluster)
        except CorruptionError:
            return False
        taken |= seen
        return True

    def stage_sound(self) -> None:
        """Write the directory that `give_up_broken` left where it is: it has not become longer."""
        sound = self.space.sound_bitmaps
        if sound is not None:
            data = ondisk.pack_directory(sound.entries)
            self._edit(HostOffset(sound.offset), data)
            self._name_directory(Place(len(sound.entries), len(data), sound.offset))

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
        for index, bits in list(self._allocated(entry)):
            if index >= count:
                self.refcounts.release_metadata(self.geometry.cluster_of(bits))
        new = entry
        if count != entry.table_entries:
            offset = self.refcounts.allocate_metadata(self.geometry.clusters(layout.table_bytes(count)))
            kept_bytes = layout.table_bytes(min(count, entry.table_entries))
            self.view.copy_table(HostOffset(entry.table_offset), offset, kept_bytes)
            self._release_table(entry)
            new = replace(entry, table_offset=offset, table_entries=count)
        self._clear_tail(new, new.bits_for(disk_bytes))
        return new

    def _clear_tail(self, entry: BitmapEntry, end: int) -> None:
        """Clear what the last cluster of bits has behind bit ``end``: nothing there stands for the disk."""
        start, stop = end >> 3, layout.round_up(end + 7 >> 3, self.geometry.cluster_bytes)
        stop = max(stop, self.geometry.cluster_bytes)
        if end % self._bits_per_cluster or not end:
            old = self.read(entry, start, stop - start)
            if not _native.is_zero(old):
                first = old[0] & (1 << (end & 7)) - 1
                self.write(entry, start, bytes([first]) + bytes(len(old) - 1))


def dirty_ranges(
    chunks: Iterable[tuple[int, bytes]], granularity_bits: int, disk_bytes: int
) -> Iterator[tuple[int, int]]:
    """Yield [start, end) in bytes of the disk of the bits that are set, neighbours joined.

    ``chunks`` are parts of a bitmap that follow each other: (first byte, bytes).
    """
    pending: tuple[int, int] | None = None
    for first, chunk in chunks:
        for start, end in _runs_of_ones(chunk, first << 3):
            if pending is not None and pending[1] == start:
                pending = pending[0], end
                continue
            if pending is not None:
                yield _in_bytes(pending, granularity_bits, disk_bytes)
            pending = start, end
    if pending is not None:
        yield _in_bytes(pending, granularity_bits, disk_bytes)


def _in_bytes(bits: tuple[int, int], granularity_bits: int, disk_bytes: int) -> tuple[int, int]:
    return bits[0] << granularity_bits, min(bits[1] << granularity_bits, disk_bytes)


def _runs_of_ones(chunk: bytes, first: int) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of the bits that are set, the first of which is bit ``first``.

    In steps: a number in digits takes time with the square of its length.
    """
    for position in range(0, len(chunk), RUN_BYTES):
        part = chunk[position : position + RUN_BYTES]
        if _native.is_zero(part):
            continue
        digits, base = f"{int.from_bytes(part, 'little'):b}"[::-1], first + (position << 3)
        start = digits.find("1")
        while start >= 0:
            end = digits.find("0", start)
            end = len(digits) if end < 0 else end
            yield base + start, base + end
            start = digits.find("1", end)
