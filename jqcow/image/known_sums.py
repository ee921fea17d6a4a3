"""The protection that an image has, through one view of its bitmaps; and what is told of units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jqcow import _native
from jqcow.engine.bitmaps import Bitmaps
from jqcow.ondisk import protection as ondisk
from jqcow.ondisk.bitmaps import BitmapEntry
from jqcow.ondisk.protection import CHANGED, NAMES, RECORD, SUM_BYTES, SUMS, Record, Units

SLICE_UNITS = 1024
"""So many units are looked at in one go: whole bytes of jqcow-changed."""
RECORD_BYTES_MAX = 64 << 20

State = Literal["changed", "wrong", "unreadable", "unsure"]


@dataclass(frozen=True)
class UnitRange:
    """A range of the disk, in bytes, and what is the matter with it.

    Attributes:
        state: ``changed``: written since its sum was made, or it never had one; ``wrong``: it has not the
            content that it had then; ``unreadable``: it cannot be read; ``unsure``: it has another sum, but
            the stored one may be what is damaged.
    """

    offset: int
    length: int
    state: State


class UnitRanges:
    """Collects units in order, neighbours of one state as one range."""

    def __init__(self, units: Units) -> None:
        """Begin with none of a disk."""
        self._units = units
        self._found: list[tuple[int, int, State]] = []

    def add(self, unit: int, state: State) -> None:
        """Take a unit that lies behind all before."""
        first = unit
        if self._found and self._found[-1][1:] == (unit, state):
            first = self._found.pop()[0]
        self._found.append((first, unit + 1, state))

    def ranges(self) -> tuple[UnitRange, ...]:
        """Return what was collected."""
        units = self._units
        return tuple(
            UnitRange(first << units.bits, units.length(first, end), state)
            for first, end, state in self._found
        )


def slices(units: Units, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yield [first, end) of units from ``start`` on, in steps that do not cross clusters of sums."""
    step = min(SLICE_UNITS, units.per_cluster)
    for first in range(start, units.count, step):
        yield first, min(first + step, units.count)


def unpack_bits(packed: bytes, count: int) -> list[int]:
    """Return bits, the lowest of a byte first."""
    if not any(packed):
        return [0] * count
    digits = f"{int.from_bytes(packed, 'little'):0{len(packed) << 3}b}"[::-1]
    return [int(digit) for digit in digits[:count]]


def pack_bits(bits: list[int]) -> bytes:
    """Return bits as bytes, the lowest of each first."""
    return int("".join(map(str, reversed(bits))), 2).to_bytes(len(bits) + 7 >> 3, "little")


@dataclass(frozen=True)
class KnownSums:
    """The protection of an image.

    Attributes:
        bitmaps: of the image, through one view.
        units: how the disk is divided.
        entries: its bitmaps, by name, as far as there are any.
        record: None if there is a fault.
        fault: why its sums do not count, in words; "" if they do.
    """

    bitmaps: Bitmaps
    units: Units
    entries: dict[str, BitmapEntry]
    record: Record | None
    fault: str

    @classmethod
    def of(cls, bitmaps: Bitmaps) -> KnownSums:
        """Look at what an image has; its lock is held.

        Raises:
            CorruptionError: the bitmap directory or a table is damaged.
            UnsupportedFeatureError: protection of a newer version.
        """
        header = bitmaps.view.header
        units = Units(header.size, header.cluster_bits)
        found = ((name, bitmaps.directory.find(name)) for name in NAMES)
        entries = {name: entry for name, entry in found if entry is not None}
        fault, record = ondisk.fault_of(entries, units), None
        if not fault:
            payload = cls(bitmaps, units, entries, None, "").record_payload()
            record = Record.unpack(payload, header.cluster_bits)
            fault = "" if record is not None else "its record is damaged"
        return cls(bitmaps, units, entries, record, fault)

    def record_payload(self) -> bytes:
        """Return all that may be the record."""
        entry = self.entries[RECORD]
        return self.bitmaps.read(entry, 0, min(self.units.room(entry.granularity_bits), RECORD_BYTES_MAX))

    @property
    def known_record(self) -> Record:
        """The record of a protection without fault."""
        if self.record is None:
            raise RuntimeError("a protection with a fault has no record to go by")
        return self.record

    def sums(self, first: int, end: int) -> bytes:
        """Return the sums of units [first, end) as they are stored."""
        return self.bitmaps.read(self.entries[SUMS], first * SUM_BYTES, (end - first) * SUM_BYTES)

    def changed(self, first: int, end: int) -> bytes:
        """Return the bits of jqcow-changed for units [first, end); ``first`` is a multiple of 8."""
        return self.bitmaps.read(self.entries[CHANGED], first >> 3, (end + 7 >> 3) - (first >> 3))

    def check(self, index: int) -> int:
        """Return the check of a cluster of sums as it is."""
        return _native.crc32c(self.sums(*self.units.sums_of_cluster(index)))

    def is_sound(self, index: int) -> bool:
        """Return True if a cluster of sums is what the record says, as far as the record knows it."""
        record = self.known_record
        if index >= len(record.checks):
            return True
        first, end = record.units.sums_of_cluster(index)
        if end > self.units.count:
            # The disk was made smaller: what was cut off cannot be checked.
            return False
        return record.checks[index] == _native.crc32c(self.sums(first, end))

    @property
    def sure_units(self) -> int:
        """Units from this one on have no sum: the disk had another size when sums were made."""
        before = self.known_record.units
        if self.units.disk_bytes < before.disk_bytes:
            return self.units.disk_bytes >> self.units.bits
        return before.count
