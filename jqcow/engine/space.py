"""Free host clusters, by what is known of their content. Refcounts are kept elsewhere (refcounts.py).

A free cluster is in exactly one of these places:

    staged frees     freed by a change that is not yet in a durable record
    metadata frees   freed metadata: their old log images may still be replayed
    retired          of a journal range or transaction that was given up; free once a barrier has completed
    released         free, to be given back to the host next
    settling         free, and given back to the host; they read as zeros once a barrier has completed
    zero-safe        read as zeros in every crash state until they are written
    unknown          free, with old bytes in them
    the frontier     past the end of everything: zero-safe without being listed

S1. A freed data cluster is handed out only after the record that frees it is durable.
S2. A freed metadata cluster is handed out only after a durable frame declares the epoch that frees it
    checkpointed: until then replay may write its old blocks.
S3. A cluster is zero-safe only if it lies past the largest size since the last barrier, or this process
    punched it under a completed barrier. Clusters of a failed operation are unknown.
S4. Clusters of a live journal range are never handed out.
S5. Clusters of a transaction whose record failed wait for a barrier: the record may come back to life.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from jqcow.engine.medium import Medium
from jqcow.ondisk.layout import Geometry

RECYCLE_CLUSTERS = 8
"""Unknown clusters given back to the host ahead of need: hardly more old bytes go than are written over."""


@dataclass(frozen=True)
class Run:
    """``count`` free clusters from cluster index ``start``; ``zero_safe`` as in S3."""

    start: int
    count: int
    zero_safe: bool


class ClusterRuns:
    """A set of cluster indices, kept as sorted runs [start, end).

    Each change is one assignment: an exception that comes at any time finds it done, or not begun.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __contains__(self, cluster: int) -> bool:
        place = bisect_right(self._runs, (cluster, sys.maxsize)) - 1
        return place >= 0 and cluster < self._runs[place][1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (start, count) in order."""
        return ((start, end - start) for start, end in self._runs)

    def holds(self, count: int) -> bool:
        """Return True if there are at least ``count`` clusters in the set."""
        held = 0
        for _, length in self:
            held += length
            if held >= count:
                return True
        return count <= 0

    def add(self, start: int, count: int) -> None:
        """Add a run that does not overlap the set: a cluster listed twice would be handed out twice."""
        runs, end = self._runs, start + count
        first = past = bisect_left(runs, (start, start))
        overlaps_next = first < len(runs) and runs[first][0] < end
        if overlaps_next or (first and runs[first - 1][1] > start):
            raise RuntimeError(f"free clusters {start}-{end} are listed already")
        if first and runs[first - 1][1] == start:
            first -= 1
            start = runs[first][0]
        if past < len(runs) and runs[past][0] == end:
            end = runs[past][1]
            past += 1
        runs[first:past] = [(start, end)]

    def discard(self, start: int, count: int) -> None:
        """Remove what the set holds of a run."""
        runs, end = self._runs, start + count
        first = bisect_left(runs, (start, start))
        if first and runs[first - 1][1] > start:
            first -= 1
        past = max(first, bisect_left(runs, (end, end)))
        kept = []
        if first < past and runs[first][0] < start:
            kept.append((runs[first][0], start))
        if first < past and runs[past - 1][1] > end:
            kept.append((end, runs[past - 1][1]))
        runs[first:past] = kept

    def copy(self) -> ClusterRuns:
        """Return a set of the same clusters."""
        copied = ClusterRuns()
        copied._runs = list(self._runs)
        return copied

    def take(self, count: int) -> tuple[int, int]:
        """Remove and return the lowest run, at most ``count`` clusters of it: (start, count)."""
        start, end = self._runs[0]
        taken = min(count, end - start)
        if start + taken == end:
            del self._runs[0]
        else:
            self._runs[0] = (start + taken, end)
        return start, taken


@dataclass
class Frees:
    """Clusters freed by changes that travel in one record; ``count`` tells roughly how many."""

    data: ClusterRuns = field(default_factory=ClusterRuns)
    metadata: ClusterRuns = field(default_factory=ClusterRuns)
    count: int = 0

    def copy(self) -> Frees:
        """Return the same frees; changing what they hold leaves these alone."""
        return Frees(self.data.copy(), self.metadata.copy(), self.count)

    def take_back(self, undo: _Undo) -> None:
        """Forget what an operation freed."""
        for start, count in undo.data:
            self.data.discard(start, count)
        for start, count in undo.metadata:
            self.metadata.discard(start, count)
        self.count = max(0, self.count - sum(count for _, count in (*undo.data, *undo.metadata)))


@dataclass(frozen=True)
class SpaceMark:
    """Where a transaction stood: how many runs it had taken, and what it had freed."""

    taken: int
    frees: Frees


@dataclass
class _Undo:
    taken: list[Run] = field(default_factory=list)
    data: list[tuple[int, int]] = field(default_factory=list)
    metadata: list[tuple[int, int]] = field(default_factory=list)


_Waiting = dict[tuple[int, int], int]
"""Runs (start, count) that wait for a barrier, each with how many barriers had started before."""


class Space:
    """The pools of free clusters of one image that is open for writing.

    An exception may cut any method off, at any point. A cluster on its way from one place to another is
    then in neither, and so not handed out until the image is opened again; it is never in both.
    """

    def __init__(self, medium: Medium, geometry: Geometry) -> None:
        self.medium = medium
        self.geometry = geometry
        self.frontier = 0
        self.reserved: list[tuple[int, int]] = []
        self.zero_safe = ClusterRuns()
        self.unknown = ClusterRuns()
        self.fresh: set[int] | None = None
        """In a transaction: the clusters allocated since its start or last savepoint; None outside."""
        self._settling: _Waiting = {}
        self._retired: _Waiting = {}
        self._released: list[tuple[int, int]] = []
        self._staged = Frees()
        self._in_flight: Frees | None = None
        self._metadata_frees: list[tuple[int, ClusterRuns]] = []
        self._undo: _Undo | None = None
        self._transaction: list[Run] | None = None
        self._host_punches = True
        medium.listeners.append(self._barrier_completed)

    def is_pending(self, cluster: int) -> bool:
        """Return True for a free cluster that must not be handed out yet, or is listed already."""
        in_flight = self._in_flight
        return (
            cluster in self._staged.data
            or cluster in self._staged.metadata
            or (in_flight is not None and (cluster in in_flight.data or cluster in in_flight.metadata))
            or any(cluster in clusters for _, clusters in self._metadata_frees)
            or any(start <= cluster < end for start, end in self.reserved)
            or any(start <= cluster < start + count for runs in self._waiting_runs() for start, count in runs)
            or cluster in self.zero_safe
            or cluster in self.unknown
        )

    def _waiting_runs(self) -> tuple[Iterable[tuple[int, int]], ...]:
        return (self._settling, self._retired, self._released)

    # Handing out

    @property
    def is_short(self) -> bool:
        """True when zero-safe clusters run out and none are on their way: unknown ones are to be recycled."""
        return not self.zero_safe.holds(RECYCLE_CLUSTERS) and not self._settling

    def take(self, count: int) -> Run:
        """Take up to ``count`` clusters, zero-safe ones first; at least one."""
        self.recycle()
        if self.zero_safe:
            run = Run(*self.zero_safe.take(count), zero_safe=True)
        elif self.unknown and (self._transaction is not None or not self._host_punches):
            # All data of a transaction is ordered: its clusters need not be zero-safe, only written whole.
            run = Run(*self.unknown.take(count), zero_safe=False)
        else:
            return self.take_at_frontier(count)
        self._note_taken(run)
        return run

    def withdraw(self, start: int, count: int) -> None:
        """Take clusters off the lists of free ones: they turned out to be in use."""
        self.zero_safe.discard(start, count)
        self.unknown.discard(start, count)
        for waiting in (self._settling, self._retired):
            for run_start, run_count in [run for run in waiting if _overlap(run, (start, count))]:
                # What is left of the run stays out of use until the image is opened again.
                del waiting[run_start, run_count]
        self._released = [run for run in self._released if not _overlap(run, (start, count))]

    def take_at_frontier(self, count: int) -> Run:
        """Take exactly ``count`` clusters in a row, past the end of everything."""
        start = self.frontier
        zero_safe = start * self.geometry.cluster_bytes >= self.medium.high_water
        run = Run(start, count, zero_safe)
        self.frontier += count
        self._note_taken(run)
        return run

    def _note_taken(self, run: Run) -> None:
        if self._undo is not None:
            self._undo.taken.append(run)

    def recycle(self) -> None:
        """When short, give a few unknown clusters back to the host, for use after the next barrier (S3).

        Raises:
            OSError: the host failed; the clusters stay unknown.
        """
        wanted = RECYCLE_CLUSTERS if self.is_short else 0
        while wanted and self.unknown and self._host_punches:
            start, taken = self.unknown.take(wanted)
            self._punch(start, taken)
            wanted -= taken

    def _punch(self, start: int, count: int) -> None:
        """Punch free clusters; they become zero-safe under the next barrier."""
        cluster_bytes = self.geometry.cluster_bytes
        try:
            self._host_punches = self.medium.punch(start * cluster_bytes, count * cluster_bytes)
        except BaseException:
            self.unknown.add(start, count)
            raise
        if self._host_punches:
            self._settling[start, count] = self.medium.barriers_started
        else:
            self.unknown.add(start, count)

    def add_found(self, start: int, count: int) -> None:
        """List free clusters found in the refcounts, below the end of the file.

        Where the host shows a hole, that is no proof: a failed barrier may have lost the punching.
        """
        self.unknown.add(start, count)

    # Operations

    @property
    def in_operation(self) -> bool:
        """True from `begin` until the operation is finished or rolled back."""
        return self._undo is not None

    def begin(self) -> None:
        """Start to note what an operation takes and frees."""
        self._undo = _Undo()

    def finish(self) -> None:
        """The operation succeeded."""
        undo, self._undo = self._undo, None
        if undo is not None and self._transaction is not None:
            self._transaction += undo.taken

    def roll_back(self) -> None:
        """The operation failed: what it took is free again with unknown content (S3)."""
        undo = self._undo
        if undo is None:
            return
        self._staged.take_back(undo)
        self._undo = None
        for run in undo.taken:
            self.unknown.add(run.start, run.count)

    # Transactions

    def begin_transaction(self) -> None:
        """Start to note what a user transaction takes; nothing may be staged."""
        self._transaction, self.fresh = [], set()

    def mark(self) -> SpaceMark:
        """Return where a transaction stands, for `return_to`. Its fresh clusters are closed."""
        self.fresh = set()
        return SpaceMark(len(self._require_transaction()), self._staged.copy())

    def return_to(self, mark: SpaceMark) -> None:
        """Undo what the transaction took and freed since ``mark``."""
        taken = self._require_transaction()
        given_up = taken[mark.taken :]
        self.fresh, self._staged = set(), mark.frees.copy()
        del taken[mark.taken :]
        for run in given_up:
            self.unknown.add(run.start, run.count)

    def end_transaction(self) -> None:
        """The transaction is durable: what it took is in use."""
        self._transaction = self.fresh = None

    def abandon_transaction(self) -> None:
        """The transaction's record failed. Should it come back to life it needs its clusters (S5)."""
        if self._transaction is None:
            return
        now = self.medium.barriers_started
        taken = ClusterRuns()
        for run in self._transaction:
            taken.add(run.start, run.count)
        retired = self._retired | dict.fromkeys(taken, now)
        self._retired, self._staged = retired, Frees()
        self._transaction = self.fresh = self._in_flight = None

    def _require_transaction(self) -> list[Run]:
        if self._transaction is None:
            raise RuntimeError("no transaction is open")
        return self._transaction

    def free_data(self, start: int, count: int = 1) -> None:
        """A staged change frees data clusters."""
        if self._undo is not None:
            self._undo.data.append((start, count))
        self._staged.data.add(start, count)
        self._staged.count += count

    def free_metadata(self, start: int, count: int = 1) -> None:
        """A staged change frees metadata clusters."""
        if self._undo is not None:
            self._undo.metadata.append((start, count))
        self._staged.metadata.add(start, count)
        self._staged.count += count

    @property
    def staged_frees(self) -> int:
        """About how many clusters the staged changes free: an exception may have cut the counting off."""
        return self._staged.count

    # Records and barriers

    def cut(self) -> None:
        """Freeze the staged frees: they travel in the next record."""
        self._in_flight, self._staged = self._staged, Frees()

    def uncut(self) -> None:
        """The record failed: its frees are staged again."""
        failed = self._in_flight
        if failed is None:
            return
        both = failed.copy()
        for start, count in self._staged.data:
            both.data.add(start, count)
        for start, count in self._staged.metadata:
            both.metadata.add(start, count)
        both.count += self._staged.count
        self._staged, self._in_flight = both, None

    def publish(self, epoch: int) -> None:
        """A record of ``epoch`` is durable: its data frees are released, its metadata frees wait (S1, S2).

        If cut off it can be done again.
        """
        frees = Frees() if self._in_flight is None else self._in_flight
        released = self._released + list(frees.data)
        waiting = [(epoch, frees.metadata)] if frees.metadata else []
        for freeing_epoch, clusters in self._metadata_frees:
            if freeing_epoch < epoch:
                released += list(clusters)
            else:
                waiting.append((freeing_epoch, clusters))
        # No call in between: an exception that comes at any time finds all of this done, or nothing.
        self._released, self._metadata_frees, self._in_flight = released, waiting, None

    def retire(self, offset: int, length: int) -> None:
        """List a journal range that was given up; free once a barrier has made the other root durable."""
        cluster_bytes = self.geometry.cluster_bytes
        start, end = offset // cluster_bytes, self.geometry.clusters(offset + length)
        if (start, end) in self.reserved:
            self.reserved.remove((start, end))
        self.frontier = max(self.frontier, end)
        self._retired[start, end - start] = self.medium.barriers_started

    def reserve(self, offset: int, length: int) -> None:
        """Keep the clusters of a live journal range from being handed out (S4)."""
        start, end = offset // self.geometry.cluster_bytes, self.geometry.clusters(offset + length)
        self.reserved.append((start, end))
        self.frontier = max(self.frontier, end)

    def unreserve(self, offset: int, length: int) -> None:
        """Forget a reserved range that nothing names."""
        start, end = offset // self.geometry.cluster_bytes, self.geometry.clusters(offset + length)
        self.reserved.remove((start, end))

    def give_back(self) -> None:
        """Punch what durable records freed; what cannot be punched is unknown.

        The commit before it is durable, whatever the host says now. So an error is not the caller's: it would
        read as if the commit had failed. It is raised when the cluster is punched anew, for its next use.
        """
        while self._released:
            with suppress(OSError):
                self._punch(*self._released.pop())

    def _barrier_completed(self, number: int) -> None:
        for run in _covered(self._settling, number):
            del self._settling[run]
            self.zero_safe.add(*run)
        for run in _covered(self._retired, number):
            del self._retired[run]
            self._released.append(run)


def _overlap(run: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return True if two runs (start, count) have a cluster in common."""
    return run[0] < other[0] + other[1] and other[0] < run[0] + run[1]


def _covered(waiting: _Waiting, number: int) -> list[tuple[int, int]]:
    """Return the runs that were listed before barrier ``number`` started."""
    return [run for run, started_before in waiting.items() if started_before < number]
