"""What the guest wrote and no cluster holds yet: small writes that wait in memory, and in the journal.

A piece is whole sectors that the guest wrote. It is in one of these layers, the newest first:

    fresh       in memory alone: no flush has acknowledged it
    in flight   in the record that is being written
    logged      in a durable record, as an intent; not declared done
    tables      where the ordinary path has written it

and `leaving` keeps what has been written by the ordinary path until the record that says so is durable.

I1. A guest reads what is fresh, then what is in flight, then what is logged, then what the tables map.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from jqcow.ondisk.frame import IntentOperation

COUNT_MAX = 256
"""So many pieces are pending at most: destaging them takes some milliseconds."""


class Piece(NamedTuple):
    """``data`` that the guest wrote at guest ``offset``; ``sequence`` of its record, 0 if there is none."""

    offset: int
    data: memoryview
    sequence: int = 0

    @property
    def end(self) -> int:
        """The guest offset behind the piece."""
        return self.offset + len(self.data)

    def part(self, start: int, end: int) -> Piece:
        """Return what of the piece lies in a guest range that it reaches into."""
        first, stop = max(start, self.offset), min(end, self.end)
        # A copy, so that a few sectors do not keep a long write in memory.
        data = memoryview(bytes(self.data[first - self.offset : stop - self.offset]))
        return Piece(first, data, self.sequence)


class Pieces:
    """Pieces that do not overlap, in the order of their offsets. ``length_bytes`` is what they come to."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._pieces: list[Piece] = []
        self.length_bytes = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def __iter__(self) -> Iterator[Piece]:
        return iter(self._pieces)

    def _reach(self, start: int, end: int) -> tuple[int, int]:
        """Return the indices [first, stop) of the pieces that reach into a guest range."""
        first = bisect_right(self._offsets, start)
        if first and self._pieces[first - 1].end > start:
            first -= 1
        return first, bisect_left(self._offsets, end, first)

    def reaches_into(self, start: int, end: int) -> bool:
        """Return True if a piece reaches into a guest range."""
        offsets = self._offsets
        if not offsets:
            return False
        stop = bisect_left(offsets, end)
        return stop > 0 and self._pieces[stop - 1].end > start

    def within(self, start: int, end: int) -> Sequence[Piece]:
        """Return the pieces that reach into a guest range, whole."""
        first, stop = self._reach(start, end)
        return self._pieces[first:stop]

    def lay(self, piece: Piece) -> None:
        """Put a piece over what is there."""
        start, end = piece.offset, piece.end
        first, stop = self._reach(start, end)
        if first == stop:
            # As nearly always: nothing is there.
            self._offsets.insert(first, start)
            self._pieces.insert(first, piece)
            self.length_bytes += end - start
            return
        over = self._pieces[first:stop]
        new = [piece]
        if over[0].offset < start:
            new.insert(0, over[0].part(over[0].offset, start))
        if over[-1].end > end:
            new.append(over[-1].part(end, over[-1].end))
        self.length_bytes += sum(len(each.data) for each in new) - sum(len(each.data) for each in over)
        self._offsets[first:stop] = [each.offset for each in new]
        self._pieces[first:stop] = new

    def keep(self, is_kept: Callable[[Piece], bool]) -> list[Piece]:
        """Leave out the pieces that are not kept, and return these."""
        left_out = [piece for piece in self._pieces if not is_kept(piece)]
        if left_out:
            self._fill([piece for piece in self._pieces if is_kept(piece)])
        return left_out

    def _fill(self, pieces: list[Piece]) -> None:
        self._pieces, self._offsets = pieces, [piece.offset for piece in pieces]
        self.length_bytes = sum(len(piece.data) for piece in pieces)

    @classmethod
    def of(cls, layers: Iterable[Piece]) -> Pieces:
        """Return what pieces show that are laid one over another, the last on top, however many there are."""
        found, laid = cls(), list(layers)
        bounds = sorted({bound for piece in laid for bound in (piece.offset, piece.end)})
        starting = sorted(range(len(laid)), key=lambda index: laid[index].offset, reverse=True)
        shown: list[Piece] = []
        # The newest of the pieces that have begun is on top.
        begun: list[int] = []
        before = -1
        for start, end in pairwise(bounds):
            while starting and laid[starting[-1]].offset <= start:
                heapq.heappush(begun, -starting.pop())
            while begun and laid[-begun[0]].end <= start:
                heapq.heappop(begun)
            top = -begun[0] if begun else -1
            if top >= 0 and top == before:
                shown[-1] = laid[top].part(shown[-1].offset, end)
            elif top >= 0:
                shown.append(laid[top].part(start, end))
            before = top
        found._fill(shown)
        return found


class Pending:
    """The pending writes of one image. The lock is held, but for what only the holder of the turn changes.

    Attributes:
        fresh: changed with the lock held.
        in_flight: what the record holds that is being written, if one is; changed by whoever has the turn,
            with the lock held, as are ``logged`` and ``leaving``.
        logged: what durable records hold.
        leaving: what a later record declares done, which is not durable yet.
    """

    def __init__(self) -> None:
        self.fresh = Pieces()
        self.in_flight = Pieces()
        self.logged = Pieces()
        self.leaving: list[Piece] = []

    def load(self, intents: Sequence[IntentOperation]) -> None:
        """Take what an earlier process left in the journal."""
        pieces = (Piece(each.offset, memoryview(each.data), each.sequence) for each in intents)
        self.logged = Pieces.of(pieces)

    @property
    def is_empty(self) -> bool:
        """True if the tables tell all that the guest reads."""
        return not (len(self.fresh) or len(self.logged) or len(self.in_flight))

    @property
    def length_bytes(self) -> int:
        """What all layers come to."""
        return self.fresh.length_bytes + self.in_flight.length_bytes + self.logged.length_bytes

    @property
    def count(self) -> int:
        """How many pieces all layers have."""
        return len(self.fresh) + len(self.in_flight) + len(self.logged)

    def is_full(self, length: int, limit: int) -> bool:
        """Return True if a piece of ``length`` bytes would be too much beside the others, or one too many."""
        return self.length_bytes + length > limit or self.count >= COUNT_MAX

    def overlaps(self, start: int, end: int) -> bool:
        """Return True if any piece reaches into a guest range."""
        return (
            self.logged.reaches_into(start, end)
            or self.fresh.reaches_into(start, end)
            or self.in_flight.reaches_into(start, end)
        )

    def covers(self, start: int, end: int) -> bool:
        """Return True if pieces make up all of a guest range."""
        return lies_within(ranges_of(self.layers(start, end)), start, end)

    def layers(self, start: int, end: int) -> list[Piece]:
        """Return the pieces that reach into a guest range, in the order in which they are laid (I1)."""
        if self.is_empty:
            return []
        found: list[Piece] = []
        for layer in (self.logged, self.in_flight, self.fresh):
            found += layer.within(start, end)
        return found

    # A record

    def cut(self) -> list[Piece]:
        """Put what is fresh in flight, and return it."""
        self.in_flight, self.fresh = self.fresh, Pieces()
        return list(self.in_flight)

    def landed(self, sequence: int, done: int) -> None:
        """The record ``sequence`` is durable, which declared intents up to ``done`` done; 0: none."""
        for piece in self.in_flight:
            self.logged.lay(piece._replace(sequence=sequence))
        self.in_flight = Pieces()
        if done:
            self.leaving = [piece for piece in self.leaving if piece.sequence > done]

    def take_back(self) -> None:
        """The record failed: what was in flight is fresh, below what came since."""
        newer, self.fresh = self.fresh, self.in_flight
        self.in_flight = Pieces()
        for piece in newer:
            self.fresh.lay(piece)

    def carried(self, done: int) -> list[IntentOperation]:
        """Return all intents that a record which declares those up to ``done`` done leaves to be done."""
        left = (*self.leaving, *self.logged)
        return [
            IntentOperation(piece.sequence, piece.offset, bytes(piece.data))
            for piece in left
            if piece.sequence > done
        ]

    # Destaging

    def begin_round(self, newest: int) -> Round:
        """Return all that is pending behind the record ``newest``; nothing is in flight."""
        fresh = list(self.fresh)
        return Round(newest, Pieces.of((*self.logged, *fresh)), fresh)

    def end_round(self, written: Round, newest: int) -> int:
        """The ordinary path has staged a round; ``newest`` is the newest record now.

        Records of the round itself may have logged what was fresh, and what came since (I10).

        Returns the sequence up to which a record is to declare intents done, 0 if there are none.
        """
        # What was written over since is another piece, or a part of one.
        done = {id(piece.data) for piece in written.fresh}
        self.fresh.keep(lambda piece: id(piece.data) not in done)
        later = (
            piece.sequence
            for piece in self.logged
            if piece.sequence > written.newest and id(piece.data) not in done
        )
        newest = min(later, default=newest + 1) - 1
        leaving = self.logged.keep(lambda piece: piece.sequence > newest)
        self.leaving += leaving
        return newest if leaving else 0


class Round(NamedTuple):
    """What was pending behind the record ``newest``: ``pieces`` as the guest reads them.

    ``fresh`` are those that were in no record.
    """

    newest: int
    pieces: Pieces
    fresh: list[Piece]

    def runs(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the pieces, joined where they lie side by side: (guest offset, bytes)."""
        joined: list[memoryview] = []
        start = end = -1
        for piece in self.pieces:
            if piece.offset != end:
                if joined:
                    yield start, _joined(joined)
                joined, start = [], piece.offset
            joined.append(piece.data)
            end = piece.end
        if joined:
            yield start, _joined(joined)


def ranges_of(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Return the guest ranges [start, end) that pieces, in any order, make up together, in order."""
    ranges: list[tuple[int, int]] = []
    for piece in sorted(pieces, key=lambda piece: piece.offset) if pieces else ():
        if ranges and piece.offset <= ranges[-1][1]:
            start, end = ranges.pop()
            ranges.append((start, max(end, piece.end)))
        else:
            ranges.append((piece.offset, piece.end))
    return ranges


def lies_within(ranges: Sequence[tuple[int, int]], start: int, end: int) -> bool:
    """Return True if a guest range lies within one of those that `ranges_of` returns."""
    at = bisect_right(ranges, start, key=itemgetter(0))
    return at > 0 and end <= ranges[at - 1][1]


def _joined(parts: list[memoryview]) -> memoryview:
    return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
