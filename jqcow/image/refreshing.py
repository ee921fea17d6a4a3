"""One transaction of a refresh: sums of what has changed, made and stored, and the bits of it cleared.

Y1. A unit that jqcow-changed calls clean has the sum of what the guest reads there. A sum is read, stored and
    its bit cleared in one transaction: nobody writes meanwhile, and a crash leaves all of it or nothing.
Y2. The sum of a unit that is called clean is never made anew: what rots stays wrong until it is healed, by
    content that has the sum. A cluster of sums that is not what the record says stays in doubt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from jqcow import _native
from jqcow.image.known_sums import KnownSums, pack_bits, slices, unpack_bits
from jqcow.image.unit_sums import UNREADABLE, ReadableDisk, measure
from jqcow.ondisk.bitmaps import BitmapEntry
from jqcow.ondisk.protection import (
    BLOCK_BYTES,
    CHANGED,
    IN_DOUBT,
    NAMES,
    RECORD,
    SUM_BYTES,
    SUMS,
    Record,
    pack_sums,
)

if TYPE_CHECKING:
    from jqcow.engine.bitmaps import Bitmaps
    from jqcow.engine.tables import Tables
    from jqcow.image.transaction import Transaction

STEP_BYTES = 256 << 20
"""A transaction reads about so much of the disk: others wait for it."""

Progress = Callable[[int, int], None]


def stamp_behind(before: int) -> int:
    """Return the stamp of a record that comes after another one."""
    return max(before + 1, time.time_ns())


class Refresh:
    """A part of a refresh, within a transaction.

    Attributes:
        known: the protection, as the transaction has it.
        renewed_bytes: of the disk got a sum.
        unreadable_bytes: got none, as they cannot be read.
    """

    def __init__(self, disk: ReadableDisk, transaction: Transaction, *, has_below: bool) -> None:
        """Work on a disk that nobody else changes while the transaction is open."""
        self._disk, self._transaction, self._has_below = disk, transaction, has_below
        self._touched: set[int] = set()
        self._doubtful: set[int] = set()
        self._read_bytes = 0
        self.renewed_bytes = self.unreadable_bytes = 0
        self.known = KnownSums.of(transaction._tables.bitmaps)

    # At the beginning

    def begin(self) -> None:
        """Make the protection one of the disk as it is. One with a fault was removed before."""
        if self.known.fault:
            self._set_up()
        elif self.known.known_record.units != self.known.units:
            self._settle_size()

    def _set_up(self) -> None:
        """Begin with a protection in which everything has changed."""
        bitmaps, units = self._transaction.bitmaps, self.known.units
        bitmaps.add(SUMS, 1 << units.sums_bits, enabled=False)
        bitmaps.add(CHANGED, 1 << units.bits)
        bitmaps.add(RECORD, 1 << units.record_bits, enabled=False)
        found = self._transaction._tables.bitmaps
        entries = {name: found.find(name) for name in NAMES}
        record = Record.blank(units, stamp_behind(0))
        self.known = KnownSums(found, units, entries, record, "")
        self._mark(0, units.count)
        self._write_record(record, whole=True)

    def _settle_size(self) -> None:
        """The disk has another size: what was added or cut has no sum, and the record says the new size."""
        known, units = self.known, self.known.units
        record = known.known_record
        self._mark(known.sure_units, units.count)
        checks = list(record.checks[: units.sum_clusters])
        checks += [None] * (units.sum_clusters - len(checks))
        for index in range(units.sum_clusters):
            is_same = index < len(record.checks) and (
                record.units.sums_of_cluster(index) == units.sums_of_cluster(index)
            )
            if not is_same:
                is_cut = units.disk_bytes < record.units.disk_bytes
                checks[index] = self._check_of(index, is_sound=is_cut or known.is_sound(index))
        self._write_record(Record(stamp_behind(record.stamp), units, tuple(checks)), whole=True)

    def _mark(self, first: int, end: int) -> None:
        """Call units changed."""
        bitmaps, entry = self.known.bitmaps, self.known.entries[CHANGED]
        if first < end:
            self._transaction._operate(lambda _: bitmaps.set_bits(entry, first, end))

    # Units

    def run(self, start: int, progress: Progress) -> int:
        """Make sums from a unit on; return where the next transaction is to go on."""
        known, units = self.known, self.known.units
        for first, end in slices(units, start):
            index = first // units.per_cluster
            if (first % units.per_cluster == 0 or first == start) and not known.is_sound(index):
                self._doubtful.add(index)
            packed = known.changed(first, end)
            if any(packed):
                self._renew(first, unpack_bits(packed, end - first))
            progress(units.length(0, end), units.disk_bytes)
            if self._read_bytes >= STEP_BYTES or self._transaction._is_large:
                return end
        return units.count

    def _check_of(self, index: int, *, is_sound: bool) -> int:
        """Return what the record is to say of a cluster of sums: of one in doubt what it is not."""
        check = self.known.check(index)
        return check if is_sound else check ^ IN_DOUBT

    def _renew(self, first: int, bits: list[int]) -> None:
        """Make the sums of a slice that its bits call changed."""
        units, known = self.known.units, self.known
        for start, stop in _runs(bits):
            found = measure(self._disk, units, first + start, first + stop, has_below=self._has_below)
            unsummed = [place for place, value in enumerate(found, start) if value < 0]
            bits[start:stop] = [0] * (stop - start)
            self.renewed_bytes += units.length(first + start, first + stop)
            for place in unsummed:
                bits[place] = 1
                length = units.length(first + place, first + place + 1)
                self.renewed_bytes -= length
                self.unreadable_bytes += length if found[place - start] == UNREADABLE else 0
            data = pack_sums(max(0, value) for value in found)
            if data != known.sums(first + start, first + stop):
                self._write(SUMS, (first + start) * SUM_BYTES, data)
            self._read_bytes += units.length(first + start, first + stop) if any(found) else 0
        self._write(CHANGED, first >> 3, pack_bits(bits))
        self._touched.add(first // units.per_cluster)

    def _write(self, name: str, start: int, data: bytes) -> None:
        bitmaps, entry = self.known.bitmaps, self.known.entries[name]
        self._transaction._operate(lambda _: bitmaps.write(entry, start, data))

    # At the end

    def finish(self) -> None:
        """Have the record say what the sums are now."""
        record = self.known.known_record
        checks = {
            index: self._check_of(index, is_sound=index not in self._doubtful) for index in self._touched
        }
        changed = {index: check for index, check in checks.items() if record.checks[index] != check}
        self._drop_zeros()
        if changed:
            self._write_record(record.with_checks(changed, stamp_behind(record.stamp)), whole=False)

    def _drop_zeros(self) -> None:
        """Take away clusters in which all bits are clear: one of zeros that is found later was damaged."""
        bitmaps, entry = self.known.bitmaps, self.known.entries[CHANGED]
        clear = [
            index
            for index, place in bitmaps.allocated(entry)
            if _native.is_zero(bitmaps.read_host(bitmaps.geometry.cluster_bytes, place))
        ]
        for index in clear:
            self._transaction._operate(partial(_drop, bitmaps, entry, index))

    def _write_record(self, record: Record, *, whole: bool) -> None:
        """Write the blocks of the record that say something else than before, or all of them."""
        before = () if whole else self.known.known_record.checks
        for index, block in enumerate(record.blocks()):
            if whole or record.block_checks(index) != record.block_checks(index, before):
                self._write(RECORD, index * BLOCK_BYTES, block)
        self.known = KnownSums(self.known.bitmaps, self.known.units, self.known.entries, record, "")


def _drop(bitmaps: Bitmaps, entry: BitmapEntry, index: int, _: Tables) -> None:
    bitmaps.drop_cluster(entry, index, 0)


def _runs(bits: list[int]) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of the bits that are set."""
    start = None
    for place, bit in enumerate([*bits, 0]):
        if bit and start is None:
            start = place
        elif not bit and start is not None:
            yield start, place
            start = None
