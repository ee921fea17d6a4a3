"""The pieces that a guest's files consist of: by place on the disk, by place in the file, by time.

Clusters are allocated when they are first written to: so the order of writing is the order of the file. What
an inode tells of it is two times. Files that were made at one time and last changed at one time grew in
turns, and so does a file that has many pieces: such a file is taken to have grown evenly, and is cut where
clusters begin, so that the clusters of several of them come in turns.

PI1. However many pieces it is told of, it has no more than `PIECES_MAX`; none is lost by being cut.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby

from jqcow.salvage.evidence import FilePiece

PIECES_MAX = 1 << 20
"""So many pieces are taken in; what lies in others is not expected."""
PARTS_MAX = 1 << 12
"""Into so many parts a piece is cut."""
OVERLAPS_MAX = 64
"""So many pieces are looked through that begin before a cluster and may reach into it."""
MADE_TOGETHER, CHANGED_TOGETHER = 16, 8
"""Two files grew together that were made, and changed last, within such parts of the time that it took: the
first and the last change of one may be a turn before those of the other. Each has more than a cluster: else
there are no turns."""
BESIDE = 2
"""And so many files at most were made between them, or changed."""

_FIELDS = ("starts", "lengths", "valid", "numbers", "offsets", "times", "changed")

SYSTEM_OWN, FILE_DATA, PAST = 0, 1, 2
"""Who has a piece: the file system itself, a file, or a file that had it before the one that has it now."""


class Order:
    """Some of the pieces in an order, and where each of them comes in it."""

    def __init__(self, count: int, order: Iterable[int]) -> None:
        """Take the order, of ``count`` pieces in all."""
        self.pieces = array("I", order)
        self._places = array("i", [-1]) * count
        for place, at in enumerate(self.pieces):
            self._places[at] = place

    def __len__(self) -> int:
        """Return how many pieces come in it."""
        return len(self.pieces)

    def place(self, at: int) -> int | None:
        """Return where a piece comes; None if it does not."""
        place = self._places[at]
        return None if place < 0 else place

    def beside(self, at: int, step: int) -> int | None:
        """Return the piece that comes next, or before."""
        place = self._places[at] + step
        return self.pieces[place] if self._places[at] >= 0 and 0 <= place < len(self.pieces) else None


class Pieces:
    """Pieces of files in arrays, by guest offset, by place in the file, and by time.

    Attributes:
        data: of each piece, SYSTEM_OWN, FILE_DATA or PAST.
        by_file: those of files, by file and by place in it.
        by_time: those that were written to, in that order.
        by_turns: those of them whose time is known better than by two times of an inode, in that order.
    """

    def __init__(self, cluster_bytes: int) -> None:
        """Begin without any."""
        self._cluster_bytes = cluster_bytes
        self.starts, self.lengths, self.valid = array("Q"), array("Q"), array("Q")
        self.numbers, self.offsets, self.times, self.changed = array("Q"), array("Q"), array("q"), array("q")
        self.data, self.timed = bytearray(), bytearray()
        self.by_file = self.by_time = self.by_turns = Order(0, ())
        self._reach = array("Q")

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.starts)

    def add(self, piece: FilePiece, *, is_past: bool = False) -> None:
        """Take one in; where one ``is_past`` another may be now, but it was the first there."""
        self.starts.append(piece.guest_offset)
        self.lengths.append(piece.length)
        self.valid.append(min(piece.valid_bytes, piece.length))
        self.numbers.append(piece.written[1] & (1 << 64) - 1)
        self.offsets.append(max(0, piece.written[2]))
        self.times.append(_bounded(piece.written[0]))
        self.changed.append(_bounded(piece.changed_ns))
        self.data.append(PAST if is_past else piece.is_data)
        self.timed.append(piece.is_timed)

    def sort(self) -> None:
        """Sort by guest offset, and make the other orders anew."""
        self._sort_by_place()
        if self._spread():
            self._sort_by_place()
        key = self.times, self.numbers, self.offsets
        # What was never written to has no place in that order.
        written = [at for at in self.by_file.pieces if self.valid[at]]
        written.sort(key=lambda at: tuple(one[at] for one in key))
        self.by_time = Order(len(self), written)
        self.by_turns = Order(len(self), (at for at in written if self.timed[at]))
        ends = (start + length for start, length in zip(self.starts, self.lengths, strict=True))
        self._reach = array("Q", accumulate(ends, max))

    def _sort_by_place(self) -> None:
        order = sorted(range(len(self)), key=self.starts.__getitem__)
        for name in _FIELDS:
            values = getattr(self, name)
            setattr(self, name, array(values.typecode, (values[at] for at in order)))
        self.data, self.timed = (bytearray(one[at] for at in order) for one in (self.data, self.timed))
        of_files = [at for at in range(len(self)) if self.data[at]]
        of_files.sort(key=lambda at: (self.numbers[at], self.offsets[at]))
        self.by_file = Order(len(self), of_files)

    # When they were written

    def _spread(self) -> bool:
        """Have files grow evenly of which only the first and the last time are known; return if one was cut.

        That are those of many pieces, of which only the first has a time of its own, and those that grew
        together with others. These are cut.
        """
        together, count = self._together(), len(self)
        for number, group in groupby(self.by_file.pieces, key=self.numbers.__getitem__):
            first, *rest = group
            if self.timed[first] or any(self.times[at] != self.times[rest[0]] for at in rest):
                continue
            if number not in together and len(rest) < 2:
                continue
            made = self.times[first]
            took = together[number] - made if number in together else self.times[rest[0]] - made
            begin = self.offsets[first]
            size = max(
                1, self.offsets[rest[-1] if rest else first] + self.lengths[rest[-1] if rest else first]
            )
            for at in (first, *rest):
                self.times[at] = made + took * (self.offsets[at] - begin) // size
                if number in together:
                    self._cut(at, took / size)
        return len(self) > count

    def _together(self) -> dict[int, int]:
        """Return by their number the files that grew together with others, and when each was last changed.

        Of many files some have times that are near to each other by chance. But between those that grew
        together no other was made, nor was another changed.
        """
        lives: list[tuple[int, int, int]] = []
        large: set[int] = set()
        for number, group in groupby(self.by_file.pieces, key=self.numbers.__getitem__):
            first, *rest = group
            if self.lengths[first] + sum(self.lengths[at] for at in rest) > self._cluster_bytes:
                large.add(number)
            if not self.offsets[first]:
                lives.append((self.times[first], max(self.changed[first], self.times[first]), number))
        lives.sort()
        by_change = sorted(range(len(lives)), key=lambda at: lives[at][1])
        place = {at: place for place, at in enumerate(by_change)}
        found: dict[int, int] = {}
        for at, (made, changed, number) in enumerate(lives):
            took = changed - made
            for other in range(at + 1, min(len(lives), at + 1 + BESIDE)):
                other_made, other_changed, other_number = lives[other]
                is_near = other_made - made <= took // MADE_TOGETHER
                is_near = is_near and abs(other_changed - changed) <= took // CHANGED_TOGETHER
                is_near = is_near and {number, other_number} <= large
                if took and is_near and abs(place[at] - place[other]) <= BESIDE:
                    found |= {number: changed, other_number: other_changed}
        return found

    def _cut(self, at: int, pace: float) -> None:
        """Cut a piece where clusters begin; ``pace``: nanoseconds that it took to grow by a byte."""
        start, end, step = self.starts[at], self.starts[at] + self.lengths[at], self._cluster_bytes
        count = (end - 1) // step - start // step + 1
        step *= -(-count // PARTS_MAX)
        if len(self) + min(count, PARTS_MAX) > PIECES_MAX:
            return
        valid_end, made, number = start + self.valid[at], self.times[at], self.numbers[at]
        offset = self.offsets[at] - start
        for low in range(start // step * step, end, step):
            high = min(low + step, end)
            if low <= start:
                self.lengths[at], self.valid[at], self.timed[at] = (
                    high - start,
                    min(valid_end, high) - start,
                    1,
                )
                continue
            valid_bytes = max(0, min(valid_end, high) - low)
            written = made + int(pace * (low - start)), number, offset + low
            self.add(FilePiece(low, high - low, valid_bytes, written, is_timed=True))

    def near_end(self, at: int, step: int) -> int:
        """Return the cluster in which a piece begins; for a negative step, that in which it ends."""
        return (self.starts[at] + (0 if step > 0 else self.lengths[at] - 1)) // self._cluster_bytes

    def touching(self, start: int, end: int) -> Iterator[int]:
        """Yield the pieces that have bytes in [start, end)."""
        first = bisect_left(self.starts, start)
        for at in range(first - 1, max(-1, first - 1 - OVERLAPS_MAX), -1):
            if self._reach[at] <= start:
                break
            if self.starts[at] + self.lengths[at] > start:
                yield at
        for at in range(first, len(self)):
            if self.starts[at] >= end:
                break
            yield at


def _bounded(nanoseconds: int) -> int:
    return max(-(1 << 62), min(1 << 62, nanoseconds))
