"""Sums of units compared with what the disk holds."""

from __future__ import annotations

from jqcow.errors import CorruptionError
from jqcow.image.bitmaps import BitmapReader
from jqcow.image.known_sums import KnownSums, State, UnitRanges, unpack_bits
from jqcow.image.unit_sums import BELOW, UNREADABLE, ReadableDisk, kinds, measure
from jqcow.ondisk.protection import CHANGED, unpack_sums

TRIES = 8
"""Others may write while a slice is compared: then it is compared again."""


class Comparing:
    """Compares units of one disk in order.

    Attributes:
        right_bytes: of the disk have the content of their sums.
        below_bytes: of the disk are left to the backing file, and have no sum.
        found: all other units.
    """

    def __init__(
        self, disk: ReadableDisk, reader: BitmapReader, known: KnownSums, *, has_below: bool
    ) -> None:
        """Compare a disk with its sums, which have no fault."""
        self._disk, self._reader, self._known, self._has_below = disk, reader, known, has_below
        self._sound: tuple[int, bool] = (-1, True)
        self.right_bytes = self.below_bytes = 0
        self.found = UnitRanges(known.units)

    def compare(self, first: int, end: int) -> None:
        """Compare units [first, end), a slice of one cluster of sums."""
        changed, sums = self._look(first, end)
        states = self._states(first, changed, sums)
        for _ in range(TRIES):
            again = self._look(first, end)
            if again == (changed, sums) or set(states) <= {"right", "changed", "below"}:
                break
            changed, sums = again
            states = self._states(first, changed, sums)
        self._count(first, states)

    def _look(self, first: int, end: int) -> tuple[list[int], list[int]]:
        """Return the bits and the sums of units, as they are now."""
        known, entry = self._known, self._known.entries[CHANGED]
        with self._reader.lock:
            self._reader.enter(False)
            packed = known.changed(first, end)
            if self._reader.tracking is not None:
                packed = self._reader.tracking.exact(entry, first >> 3, packed)
            sums = known.sums(first, end)
            index = first // known.units.per_cluster
            if self._sound[0] != index:
                self._sound = index, known.is_sound(index)
        bits = unpack_bits(packed, end - first)
        for unit in range(max(first, known.sure_units), end):
            bits[unit - first] = 1
        return bits, list(unpack_sums(sums))

    def _states(self, first: int, changed: list[int], sums: list[int]) -> list[str]:
        """Return a state for each unit: those of ranges, ``right`` or ``below``."""
        states = ["changed"] * len(changed)
        if any(changed) and self._has_below:
            self._find_below(first, changed, states)
        start = 0
        while start < len(changed):
            stop = start + 1
            while stop < len(changed) and changed[stop] == changed[start]:
                stop += 1
            if not changed[start]:
                states[start:stop] = self._compared(first + start, sums[start:stop])
            start = stop
        return states

    def _find_below(self, first: int, changed: list[int], states: list[str]) -> None:
        """Tell which of the units without a sum are none of the image's own."""
        try:
            own, _ = kinds(self._disk, self._known.units, first, first + len(changed), has_below=True)
        except CorruptionError:
            # Nobody knows whose they are; the others are found one by one.
            return
        for place, is_own in enumerate(own):
            if changed[place] and not is_own:
                states[place] = "below"

    def _compared(self, first: int, sums: list[int]) -> list[str]:
        """Return the states of units that have not changed."""
        known, end = self._known, first + len(sums)
        values = measure(self._disk, known.units, first, end, has_below=self._has_below)
        for place, value in enumerate(values):
            if value == BELOW:
                # It was the image's own, and the guest must read the same below.
                unit = first + place
                values[place] = measure(self._disk, known.units, unit, unit + 1, has_below=False)[0]
        other = "wrong" if self._sound[1] else "unsure"
        return [
            "right" if value == wanted else "unreadable" if value == UNREADABLE else other
            for value, wanted in zip(values, sums, strict=True)
        ]

    def _count(self, first: int, states: list[str]) -> None:
        length = self._known.units.length
        if set(states) == {"right"}:
            self.right_bytes += length(first, first + len(states))
            return
        names: dict[str, State] = {name: name for name in ("changed", "wrong", "unreadable", "unsure")}
        for unit, state in enumerate(states, first):
            if state == "right":
                self.right_bytes += length(unit, unit + 1)
            elif state == "below":
                self.below_bytes += length(unit, unit + 1)
            else:
                self.found.add(unit, names[state])
