"""What a guest's file systems let expect of clusters that are not placed yet.

What is kept is the pieces that files consist of, in arrays; what they make of a cluster is told when it is
asked for. So the memory is bounded by the count of pieces, however large they are.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import nlargest
from itertools import chain, islice
from math import gcd

from jqcow.salvage.evidence import FilePiece, GuestStructure, PlacedDisk
from jqcow.salvage.pieces import FILE_DATA, PAST, PIECES_MAX, SYSTEM_OWN, Order, Pieces
from jqcow.salvage.ranges import Ranges

BLOCK_BYTES_MAX, BLOCK_BYTES_MIN = 4096, 512
"""Files end in blocks of the file system; of several sizes the smallest is taken."""
WRITTEN_LOOKED_AT = 64
"""Of so many pieces the next is taken of which a cluster was first written to."""
NEAR_TURNS = (2, 3, -1)
"""So many turns from one that is known in part another may have come behind it."""
CACHED = 1 << 15
DELETED = 1 << 63
"""Marks the numbers of files that are deleted."""

FREE, SYSTEM, SLACK, UNKNOWN = -1, -2, -3, -4
"""Owners of blocks that no file owns: nobody, the file system, a file that ended before, or who knows."""


@dataclass(frozen=True)
class Expected:
    """What a guest cluster is expected to hold.

    Attributes:
        owners: the number of the file that each of its blocks belongs to; or FREE, SYSTEM, SLACK.
        tails: for each block in which a file ends, how many of its bytes are the file's.
        counts_system: what the file system itself uses was written, too.
        runs: (first block, block behind the last, owner) of blocks of one owner; without those with tails.
        edges: the blocks that have another owner than the one before.
        is_data: a file has data in it.
        is_free: nobody misses what it holds.
        is_needed: a file that is not deleted has data in it.
        is_idle: no file has something in it: it may never have been written.
    """

    owners: tuple[int, ...]
    tails: dict[int, int]
    counts_system: bool = False
    runs: tuple[tuple[int, int, int], ...] = field(init=False)
    edges: frozenset[int] = field(init=False)
    is_data: bool = field(init=False)
    is_free: bool = field(init=False)
    is_needed: bool = field(init=False)
    is_idle: bool = field(init=False)

    def __post_init__(self) -> None:
        """Derive the rest from owners and tails."""
        runs: list[tuple[int, int, int]] = []
        owners = self.owners
        for block, owner in enumerate(owners):
            if block in self.tails:
                continue
            if runs and runs[-1][1:] == (block, owner):
                runs[-1] = (runs[-1][0], block + 1, owner)
            else:
                runs.append((block, block + 1, owner))
        changed = (block for block in range(1, len(owners)) if owners[block] != owners[block - 1])
        object.__setattr__(self, "runs", tuple(runs))
        object.__setattr__(self, "edges", frozenset(changed))
        all_owners = set(owners)
        object.__setattr__(self, "is_data", max(all_owners) >= 0)
        object.__setattr__(self, "is_free", all_owners == {FREE})
        object.__setattr__(self, "is_needed", any(0 <= owner < DELETED for owner in all_owners))
        object.__setattr__(
            self, "is_idle", max(all_owners) < 0 and not (self.counts_system and SYSTEM in all_owners)
        )


class Expectations:
    """What is expected of clusters, each by its number: its guest offset in clusters.

    Attributes:
        block_bytes: the unit in which it is told.
    """

    def __init__(self, cluster_bytes: int) -> None:
        """Expect nothing yet."""
        self._cluster_bytes = cluster_bytes
        self._pieces = Pieces(cluster_bytes)
        self._free_starts, self._free_ends = array("Q"), array("Q")
        self.block_bytes = min(BLOCK_BYTES_MAX, cluster_bytes)
        self._counts_system = False
        self.of = lru_cache(maxsize=CACHED)(self._of)

    def __len__(self) -> int:
        """Return how many pieces are known."""
        return len(self._pieces)

    def take(self, structures: Iterable[GuestStructure], disk: PlacedDisk) -> None:
        """Take what file systems say is in use, and what they say is free."""
        unit = self.block_bytes
        free: list[tuple[int, int]] = []
        structures = list(structures)
        for structure in structures:
            for piece in islice(structure.pieces(disk), PIECES_MAX - len(self._pieces)):
                if piece.length > 0 and piece.guest_offset >= 0:
                    self._pieces.add(piece)
                    unit = gcd(unit, piece.guest_offset, piece.length)
            free += (
                (offset, offset + length)
                for offset, length in structure.free(disk)
                if length > 0 and offset >= 0 and len(free) < PIECES_MAX
            )
        self.block_bytes = max(unit, min(BLOCK_BYTES_MIN, self._cluster_bytes))
        free.sort()
        self._free_starts = array("Q", (start for start, _ in free))
        self._free_ends = array("Q", (end for _, end in free))
        self._pieces.sort()
        self._take_deleted(chain.from_iterable(structure.deleted(disk) for structure in structures))
        self._pieces.sort()
        self.of.cache_clear()

    def _take_deleted(self, deleted: Iterable[FilePiece]) -> None:
        """Take what files had that are deleted; of what others have now, only when it was written first.

        Of what several had what was written last counts.
        """
        pieces, taken = self._pieces, Ranges()
        for at in range(len(pieces)):
            taken.add(pieces.starts[at], pieces.lengths[at])
        some = islice(deleted, PIECES_MAX - len(pieces))
        found = {piece for piece in some if piece.is_data and piece.length > 0 and piece.guest_offset >= 0}
        past: dict[tuple[int, int], FilePiece] = {}
        left: list[FilePiece] = []
        for piece in sorted(found, key=lambda one: (one.written, one.guest_offset), reverse=True):
            if piece.guest_offset % self.block_bytes or piece.length % self.block_bytes:
                continue
            written_ns, number, offset = piece.written
            for start, length in list(taken.without(piece.guest_offset, piece.length)):
                skipped = start - piece.guest_offset
                valid_bytes = max(0, min(length, piece.valid_bytes - skipped))
                written = written_ns, number | DELETED, offset + skipped
                left.append(FilePiece(start, length, valid_bytes, written))
                taken.add(start, length)
            if not self._is_live(piece):
                past[number, piece.guest_offset] = replace(
                    piece, written=(written_ns, number | DELETED, offset)
                )
        for piece in left:
            pieces.add(piece)
        for piece in islice(past.values(), max(0, PIECES_MAX - len(pieces))):
            pieces.add(piece, is_past=True)

    def _is_live(self, piece: FilePiece) -> bool:
        """Return whether what a file had is what a file with its number has still."""
        pieces = self._pieces
        touching = pieces.touching(piece.guest_offset, piece.guest_offset + 1)
        return any(pieces.numbers[at] == piece.written[1] for at in touching)

    def count_system(self, counts: bool) -> None:
        """Say whether what the file system itself uses is taken for written, as what files have is."""
        self._counts_system = counts
        self.of.cache_clear()

    def _is_used(self, at: int) -> bool:
        data = self._pieces.data[at]
        return data == FILE_DATA or (self._counts_system and data == SYSTEM_OWN)

    def _of(self, cluster: int) -> Expected:
        """Return what a cluster is expected to hold."""
        start = cluster * self._cluster_bytes
        count, unit = self._cluster_bytes // self.block_bytes, self.block_bytes
        owners = [UNKNOWN] * count
        place = max(0, bisect_right(self._free_starts, start) - 1)
        while place < len(self._free_starts) and self._free_starts[place] < start + self._cluster_bytes:
            low = max(0, self._free_starts[place] - start) // unit
            high = min(count, max(0, self._free_ends[place] - start) // unit)
            if high > low:
                owners[low:high] = [FREE] * (high - low)
            place += 1
        tails: dict[int, int] = {}
        pieces = self._pieces
        for at in pieces.touching(start, start + self._cluster_bytes):
            begin = pieces.starts[at] - start
            low = max(0, begin) // unit
            high = min(count, -(-(begin + pieces.lengths[at]) // unit))
            if pieces.data[at] == PAST:
                continue
            if pieces.data[at] == SYSTEM_OWN:
                owners[low:high] = [SYSTEM] * (high - low)
                continue
            valid_end = begin + pieces.valid[at]
            full = max(low, min(high, -(-valid_end // unit)))
            owners[low:full] = [pieces.numbers[at]] * (full - low)
            owners[full:high] = [SLACK] * (high - full)
            if valid_end % unit and low <= valid_end // unit < high:
                tails[valid_end // unit] = valid_end % unit
        return Expected(tuple(owners), tails, self._counts_system)

    def tails(self) -> Iterator[tuple[int, int, int]]:
        """Yield (cluster, block in it, bytes of the file in that block) for each file's end."""
        pieces = self._pieces
        for at in range(len(pieces)):
            end = pieces.starts[at] + pieces.valid[at]
            if pieces.data[at] == FILE_DATA and end % self.block_bytes:
                cluster, within = divmod(end, self._cluster_bytes)
                yield cluster, within // self.block_bytes, end % self.block_bytes

    def large(self, count: int) -> Iterator[int]:
        """Yield the first cluster of each of so many of the largest pieces."""
        pieces = self._pieces
        used = (at for at in range(len(pieces)) if self._is_used(at))
        for at in nlargest(count, used, key=pieces.lengths.__getitem__):
            yield pieces.starts[at] // self._cluster_bytes

    # Which cluster comes next

    def in_use(self, cluster: int) -> bool:
        """Return whether a file has something in a cluster."""
        start = cluster * self._cluster_bytes
        return any(self._is_used(at) for at in self._pieces.touching(start, start + self._cluster_bytes))

    def begins(self, cluster: int) -> bool:
        """Return whether a piece of a file begins in a cluster."""
        at = bisect_left(self._pieces.starts, cluster * self._cluster_bytes)
        end = (cluster + 1) * self._cluster_bytes
        while at < len(self._pieces) and self._pieces.starts[at] < end:
            if self._is_used(at):
                return True
            at += 1
        return False

    def next_in_use(self, cluster: int, step: int) -> int | None:
        """Return the nearest cluster in use behind one, or before it."""
        if self.in_use(cluster + step):
            return cluster + step
        pieces = self._pieces
        if step > 0:
            at = bisect_left(pieces.starts, (cluster + 1) * self._cluster_bytes)
            while at < len(pieces) and not self._is_used(at):
                at += 1
            return pieces.starts[at] // self._cluster_bytes if at < len(pieces) else None
        at = bisect_left(pieces.starts, max(0, cluster * self._cluster_bytes)) - 1
        while at >= 0 and not self._is_used(at):
            at -= 1
        return None if at < 0 else (pieces.starts[at] + pieces.lengths[at] - 1) // self._cluster_bytes

    def beside_in_file(self, cluster: int, step: int) -> Iterator[int]:
        """Yield where a file goes on that leaves a cluster, or where it came from."""
        for at in self._leaving(cluster, step):
            other = self._pieces.by_file.beside(at, step)
            if other is not None and self._pieces.numbers[other] == self._pieces.numbers[at]:
                yield self._pieces.near_end(other, step)

    def beside_in_time(self, cluster: int, step: int) -> Iterator[int]:
        """Yield what was written next to what ends in a cluster."""
        for at in self._leaving(cluster, step):
            other = self._pieces.by_time.beside(at, step)
            if other is not None:
                yield self._pieces.near_end(other, step)

    def next_written(self, cluster: int, step: int) -> int | None:
        """Return the cluster that was first written to next, or before, where a piece leaves a cluster."""
        return self._next(self._pieces.by_time, cluster, step)

    def turn(self, cluster: int, step: int) -> int | None:
        """Return the cluster whose turn is next, or was before, where it is known what came in turns."""
        order = self._pieces.by_turns
        place = self._rank(order, cluster)
        if place is not None and cluster != self._pieces.near_end(order.pieces[place], -step):
            return cluster + step
        return self._next(order, cluster, step)

    def near_turns(self, cluster: int, step: int) -> Iterator[int]:
        """Yield clusters whose turn was near: two times of a file do not tell how evenly it grew."""
        order = self._pieces.by_turns
        rank = self._rank(order, cluster)
        for away in NEAR_TURNS if rank is not None else ():
            place = (rank or 0) + away * step
            if 0 <= place < len(order):
                other = self._pieces.near_end(order.pieces[place], step)
                if self._rank(order, other) == place:
                    yield other

    def _next(self, order: Order, cluster: int, step: int) -> int | None:
        rank = self._rank(order, cluster)
        if rank is None or cluster != self._pieces.near_end(order.pieces[rank], -step):
            return None
        stop = rank + step * (1 + WRITTEN_LOOKED_AT)
        for place in range(rank + step, min(len(order), max(-1, stop)), step):
            first, last = (self._pieces.near_end(order.pieces[place], way) for way in (step, -step))
            for other in (first, first + step) if first != last else (first,):
                if self._rank(order, other) == place:
                    return other
        return None

    def rank(self, cluster: int) -> int | None:
        """Return the number, in the order of writing, of what was first written to a cluster."""
        return self._rank(self._pieces.by_time, cluster)

    def turn_of(self, cluster: int) -> int | None:
        """Return when a cluster's turn was, where it is known what came in turns."""
        return self._rank(self._pieces.by_turns, cluster)

    def _rank(self, order: Order, cluster: int) -> int | None:
        """Return where in an order that comes which was first written to a cluster."""
        start, by_time = cluster * self._cluster_bytes, self._pieces.by_time
        places = map(by_time.place, self._pieces.touching(start, start + self._cluster_bytes))
        first = min((place for place in places if place is not None), default=None)
        return None if first is None else order.place(by_time.pieces[first])

    def _leaving(self, cluster: int, step: int) -> Iterator[int]:
        """Yield the pieces of files that end in a cluster, or begin there."""
        pieces, start = self._pieces, cluster * self._cluster_bytes
        for at in pieces.touching(start, start + self._cluster_bytes):
            edge = pieces.starts[at] + pieces.lengths[at] - 1 if step > 0 else pieces.starts[at]
            if pieces.data[at] and edge // self._cluster_bytes == cluster:
                yield at

    def needed(self) -> Iterator[int]:
        """Yield the clusters in which files have data that are not deleted, in order."""
        pieces, end = self._pieces, 0
        for at in range(len(pieces)):
            if pieces.data[at] == FILE_DATA and not pieces.numbers[at] & DELETED:
                first = max(end, pieces.starts[at] // self._cluster_bytes)
                end = max(end, -(-(pieces.starts[at] + pieces.valid[at]) // self._cluster_bytes))
                yield from range(first, end)

    def by_writing(self) -> Iterator[int]:
        """Yield the clusters of files in the order in which they were written; some come again."""
        for at in self._pieces.by_time.pieces:
            if self._pieces.numbers[at] & DELETED:
                continue
            first = self._pieces.starts[at] // self._cluster_bytes
            last = (self._pieces.starts[at] + self._pieces.lengths[at] - 1) // self._cluster_bytes
            yield from range(first, last + 1)
