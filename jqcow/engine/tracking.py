"""Which parts of the disk the enabled bitmaps of a live image call dirty, ahead of every write.

The disk is divided into *regions*. A region is

    cold   its bits are what the bitmaps' blocks say
    warm   all its bits are set in the blocks, by a change that may not be durable yet; memory knows which of
           them have a reason
    hot    warm, and durable

    state   event                                                        next state   function
    cold    a write into it is staged, or is to come in place            warm         `warm`
    warm    the record that sets its bits is durable                     hot          `made_durable`
    warm,   others need its place, somebody is alone, the image is       cold         `cool`
    hot     closed: the bits that have a reason are staged

So a write costs one look-up, however many bitmaps there are, and nothing but the first one into a region
waits for the disk. A crash leaves the regions of the last while dirty all over: more than was written, never
less.

B1. A write in place, or into a host cluster that an entry kept under zeros, reaches the device only when its
    region is hot. Its bits have a reason from then on.
B2. A change of the mapping travels in one record with the bits for it: the region is warm before the change
    is staged, and a commit cuts both or none.
B3. A region cools with the bits that had a reason before it was warm, and all that came since; a request in
    flight has named its own when it was planned.
B4. A transaction finds all regions cold, and stages its bits with its changes: they come and go with these.
"""

from __future__ import annotations

from jqcow.engine.tables import Tables
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk.bitmaps import BitmapEntry, Directory
from jqcow.ondisk.header import AUTOCLEAR_BITMAPS

REGION_BITS = 24
"""A region has 16 MiB, or as much as one bit of the coarsest bitmap stands for; less, if bitmaps are many."""
REGIONS_MAX = 4096
REGION_MEMORY_MAX = 64 << 20
"""So many regions are warm at a time, or as many as take so many bytes; a crash leaves these dirty."""


class Cold(Exception):
    """A write in place has to wait until a range of the disk, in bytes, is hot.

    Not regions: until the caller has the turn, the bitmaps and the disk may be others.
    """

    def __init__(self, offset: int, end: int) -> None:
        super().__init__(offset, end)
        self.offset = offset
        self.end = end


class Region:
    """A warm region. ``written`` has a byte for each granule of the finest bitmap, 1 for those written since.

    ``before`` are the bits that each enabled bitmap had for it.
    """

    __slots__ = ("before", "is_hot", "written")

    def __init__(self, before: tuple[bytes, ...], granules: int) -> None:
        self.before = before
        self.written = bytearray(granules)
        self.is_hot = False


class Tracking:
    """The enabled bitmaps of one image, outside transactions. The lock is held by the caller."""

    def __init__(self, public: Tables) -> None:
        self.tables = public
        self.bitmaps = public.bitmaps
        self._regions: dict[int, Region] = {}
        self._warm: list[Region] = []
        """Regions that are not hot yet."""
        self._directory: Directory | None = None
        self._entries: tuple[BitmapEntry, ...] = ()
        self._region_bits = REGION_BITS
        self._unit_bits = 0
        self._regions_max = REGIONS_MAX

    @property
    def is_cold(self) -> bool:
        """True if memory knows nothing that the blocks do not say."""
        return not self._regions

    def _is_on(self) -> bool:
        """Return True if there is an enabled bitmap, known as the directory has it now."""
        if not self.tables.view.header.autoclear_features & AUTOCLEAR_BITMAPS:
            return False
        directory = self.bitmaps.directory
        if directory is not self._directory:
            entries = self.bitmaps.enabled
            if self._regions and entries != self._entries:
                raise RuntimeError("bitmaps change while all regions are cold")
            if entries:
                self._set_sizes([entry.granularity_bits for entry in entries])
            # Last: what was cut off before this is done again.
            self._directory, self._entries = directory, entries
        return bool(self._entries)

    def _set_sizes(self, granularity_bits: list[int]) -> None:
        """Make regions as large as memory allows; they have at least one bit of each bitmap."""
        coarsest, finest = max(granularity_bits), min(granularity_bits)
        for region_bits in range(max(REGION_BITS, coarsest), coarsest - 1, -1):
            before = sum(1 << max(0, region_bits - bits - 3) for bits in granularity_bits)
            memory = before + (1 << region_bits - finest)
            if memory <= REGION_MEMORY_MAX:
                break
        else:
            raise UnsupportedFeatureError(
                f"writing beside {len(granularity_bits)} bitmaps of such granularities",
                f"they range from {1 << finest} to {1 << coarsest} bytes: disable some",
            )
        self._unit_bits, self._region_bits = finest, region_bits
        self._regions_max = min(REGIONS_MAX, REGION_MEMORY_MAX // memory)

    # Writes

    def will_write(self, offset: int, length: int) -> None:
        """A request is planned that writes a range of the disk in place (B1).

        Raises:
            Cold: it has to wait.
        """
        length = min(length, self.tables.view.header.size - offset)
        if length <= 0 or not self._is_on():
            return
        bits, regions = self._region_bits, self._regions
        first, last = offset >> bits, offset + length - 1 >> bits
        for index in range(first, last + 1):
            region = regions.get(index)
            if region is None or not region.is_hot:
                raise Cold(offset, offset + length)
        self._note(offset, offset + length)

    def will_stage(self, offset: int, length: int) -> None:
        """Changes of what a range of the disk shows are staged next, outside an operation (B2).

        Raises:
            OSError: the host has no space for a bitmap.
        """
        length = min(length, self.tables.view.header.size - offset)
        if length <= 0 or not self._is_on():
            return
        bits, end = self._region_bits, offset + length
        first, stop = offset >> bits, (end - 1 >> bits) + 1
        if stop - first > self._regions_max // 2:
            # Too much to keep in mind: these regions stay cold.
            self._mark_cold(offset, end)
            return
        if any(index not in self._regions for index in range(first, stop)):
            self.warm(first, stop)
        self._note(offset, end)

    def _note(self, offset: int, end: int) -> None:
        bits, unit = self._region_bits, self._unit_bits
        mask, regions = (1 << bits - unit) - 1, self._regions
        first, last = offset >> unit, end - 1 >> unit
        if first == last:
            regions[first >> bits - unit].written[first & mask] = 1
            return
        while first <= last:
            stop = min(last, first | mask)
            count = stop - first + 1
            start = first & mask
            regions[first >> bits - unit].written[start : start + count] = b"\1" * count
            first = stop + 1

    def _mark_cold(self, offset: int, end: int) -> None:
        self.cool()
        with self.tables.operation():
            for entry in self._entries:
                self.bitmaps.mark(entry, offset, end - offset)

    # Regions

    def warm(self, first: int, end: int) -> None:
        """Set all bits of the regions [first, end) in the blocks.

        Raises:
            OSError: the host has no space for a bitmap; they are as before.
        """
        if not self._is_on():
            return
        wanted = [index for index in range(first, end) if index not in self._regions]
        if wanted:
            self._make_room(len(wanted), range(first, end))
            with self.tables.operation():
                fresh = {index: self._set_all(index) for index in wanted}
                # Within the section: what is cut off between the blocks and memory leaves the image in doubt.
                self._regions.update(fresh)
                self._warm += fresh.values()

    def warm_for(self, cold: Cold) -> None:
        """Set all bits of the regions that a write waits for, as far as there is a disk; errors as `warm`."""
        end = min(cold.end, self.tables.view.header.size)
        if self._is_on() and cold.offset < end:
            self.warm(cold.offset >> self._region_bits, (end - 1 >> self._region_bits) + 1)

    def cut(self) -> list[Region]:
        """A commit cuts what is staged; return the regions that are hot once its record is durable (B1)."""
        return list(self._warm)

    def made_durable(self, regions: list[Region]) -> None:
        """The record of that commit is durable."""
        for region in regions:
            region.is_hot = True
        if regions:
            self._warm = [region for region in self._warm if not region.is_hot]

    def _make_room(self, count: int, kept: range) -> None:
        """Cool regions that were warm for longest, many at a time, where there would be too many."""
        if len(self._regions) + count > self._regions_max:
            oldest = [index for index in self._regions if index not in kept]
            self._cool(oldest[: max(count, self._regions_max // 4)])

    def _set_all(self, index: int) -> Region:
        before, size = [], self.tables.view.header.size
        for entry in self._entries:
            start, length, count = self._place(entry, index)
            before.append(old := self.bitmaps.read(entry, start, length))
            valid = min(count, entry.bits_for(size) - (index << self._region_bits - entry.granularity_bits))
            mask = (1 << valid) - 1 << self._shift(entry, index)
            new = (int.from_bytes(old, "little") | mask).to_bytes(length, "little")
            if new != old:
                self.bitmaps.write(entry, start, new)
        return Region(tuple(before), 1 << self._region_bits - self._unit_bits)

    def _place(self, entry: BitmapEntry, index: int) -> tuple[int, int, int]:
        """Return where a bitmap has its bits of a region: (first byte, bytes, bits).

        No more bytes than its table maps: behind that other programs leave anything.
        """
        count_bits = self._region_bits - entry.granularity_bits
        start, length = index << count_bits >> 3, max(1, 1 << count_bits >> 3)
        mapped = entry.table_entries * self.bitmaps.geometry.cluster_bytes
        return start, min(length, mapped - start), 1 << count_bits

    def _shift(self, entry: BitmapEntry, index: int) -> int:
        """Return where in its first byte the bits of a region begin: several share a byte if they are few."""
        return (index << self._region_bits - entry.granularity_bits) & 7

    def cool(self) -> None:
        """Have the blocks say what has a reason, and nothing else (B3)."""
        if self._regions and self._is_on():
            self._cool(list(self._regions))

    def _cool(self, indices: list[int]) -> None:
        with self.tables.operation():
            for index in indices:
                for number, entry in enumerate(self._entries):
                    self._stage_exact(entry, index, number)
            # Within the section: a region that is hot in memory, and not in the blocks, would break B1.
            for index in indices:
                del self._regions[index]

    def _stage_exact(self, entry: BitmapEntry, index: int, number: int) -> None:
        start, length, _ = self._place(entry, index)
        now = self.bitmaps.read(entry, start, length)
        new = self._exact(entry, index, number, now)
        if new != now:
            self.bitmaps.write(entry, start, new)

    def _exact(self, entry: BitmapEntry, index: int, number: int, now: bytes) -> bytes:
        """Return the bytes of a bitmap for a warm region with the bits that have a reason (B3)."""
        _, length, count = self._place(entry, index)
        region, shift = self._regions[index], self._shift(entry, index)
        written = _folded(region.written, 1 << entry.granularity_bits - self._unit_bits)
        bits = int.from_bytes(region.before[number], "little") | written << shift
        mask = (1 << count) - 1 << shift
        return (int.from_bytes(now, "little") & ~mask | bits & mask).to_bytes(length, "little")

    # Looking

    def exact(self, entry: BitmapEntry, first: int, chunk: bytes) -> bytes:
        """Return bytes of a bitmap from ``first`` on with the bits alone that have a reason."""
        if not self._regions or not self._is_on() or entry not in self._entries:
            return chunk
        number, end = self._entries.index(entry), first + len(chunk)
        found = bytearray(chunk)
        for index in self._regions:
            start, length, _ = self._place(entry, index)
            if start < end and first < start + length:
                # As the blocks have it, so far; several regions may share a byte.
                whole = bytearray(self.bitmaps.read(entry, start, length))
                low, high = max(start, first), min(start + length, end)
                whole[low - start : high - start] = found[low - first : high - first]
                exact = self._exact(entry, index, number, bytes(whole))
                found[low - first : high - first] = exact[low - start : high - start]
        return bytes(found)


def _folded(written: bytearray, granules: int) -> int:
    """Return bytes of 0 and 1 as a number of bits, the first of them lowest: so many bytes make one bit."""
    if granules > 1:
        starts = range(0, len(written), granules)
        written = bytearray(written.find(1, at, at + granules) >= 0 for at in starts)
    return int(written[::-1].translate(_DIGITS), 2)


_DIGITS = bytes([48 + (value & 1) for value in range(256)])


class PrivateMarks:
    """The bitmaps as a transaction changes them: bits are staged with its changes (B4)."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.bitmaps = tables.bitmaps

    def will_write(self, offset: int, length: int) -> None:
        """As `Tracking.will_write`: what is written in place is the transaction's own cluster."""
        self.will_stage(offset, length)

    def cool(self) -> None:
        """As `Tracking.cool`: there is nothing to stage."""

    def will_stage(self, offset: int, length: int) -> None:
        """As `Tracking.will_stage`."""
        for entry in self.bitmaps.enabled:
            if not self.bitmaps.is_marked(entry, offset, length):
                with self.tables.operation():
                    self.bitmaps.mark(entry, offset, length)
