"""Free host clusters, by what is known of their content. Refcounts are kept elsewhere (refcounts.py).

A free cluster is in exactly one of these places, and moves on by these calls:

    place          what it holds                              goes on to (by)
    lent           taken by a request, and not counted yet    in use (count_in), unknown (give_back, undo)
    freed          freed by changes not yet in a durable      released (publish), in use (forget_frees)
                   record
    old metadata   freed metadata: its old log images may     released (publish of a later epoch,
                   still be replayed                          journal_is_gone)
    retired        of a journal range or transaction that     released (a barrier)
                   was given up
    released       a request in flight may still use it       punching (start_recycling)
    punching       being given back to the host               settling, unknown (end_recycling)
    settling       given back to the host                     zero-safe (a barrier)
    zero-safe      read as zeros in every crash state         lent (take)
    unknown        free, with old bytes in them               lent (take), punching (start_recycling)
    the frontier   past the end of everything: zero-safe,     lent (take_at_frontier)
                   unless the device is of fixed size

S1. A freed data cluster is handed out only after the record that frees it is durable.
S2. A freed metadata cluster is handed out only after a durable frame declares the epoch that frees it
    checkpointed, or the journal is gone: until then replay may write its old blocks.
S3. A cluster is zero-safe only if it lies past the frontier, which never goes back, or was left out when a
    journal range was laid further behind, or this process punched it under a completed barrier; so is, later,
    what of it no request has planned to write. Clusters of a failed operation are unknown. On a device of
    fixed size, which shows old bytes everywhere, none is zero-safe.
S4. Clusters of a live journal range are never handed out.
S5. Clusters of a transaction whose record failed wait for a barrier: the record may come back to life.
S6. A freed cluster is punched or handed out only after every request has ended that began before the record
    which frees it was durable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

from jqcow.engine.clusters import ClusterRuns, Run, UnwrittenParts
from jqcow.engine.frontier import Frontier
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import ChangeSet, Undone
from jqcow.ondisk import layout
from jqcow.ondisk.bitmaps import Directory
from jqcow.ondisk.layout import ClusterIndex, Geometry, GuestCluster, HostOffset

RECYCLE_CLUSTERS = 8
"""Unknown clusters given back to the host ahead of need: hardly more old bytes go than are written over."""

_Waiting = dict[Run, int]
"""Runs that wait until a number is passed: of an epoch (old metadata), a request (released) or a barrier."""


class InFlight(Protocol):
    """The requests in flight, which are numbered as they begin (request.py, Q3)."""

    newest: int

    def oldest(self) -> int:
        """Return the number of the oldest request in flight, or one that none has yet."""
        ...


class Vacated(Protocol):
    """The places of a data file that go back to the host (vacated.py). Called with the lock held."""

    def publish(self, places: ClusterRuns) -> None:
        """A durable record gives them up."""
        ...

    def withdraw(self, run: Run) -> None:
        """Somebody will write there."""
        ...

    def give_back(self) -> None:
        """Punch what no request uses any more. The lock is free."""
        ...


class Space(Frontier):
    """The pools of free clusters of one image that is open for writing. The lock is held by the caller.

    Attributes:
        reserved: the clusters of journal ranges (S4).
        left_out: clusters before the last of these that were free when it was laid.
        metadata: the clusters that hold metadata, so that no guest cluster may be written there (G2).
        search_at, search_end: where the refcounts are still to be searched for free clusters.
        host_punches: False once the host has refused to.
        reuses: how often clusters came back. While it stays, no cluster that was in use is used anew.
        lost_table: (host offset, clusters) of a refcount table that no refcount can be read from.
        left_alone: data clusters that lost owners in this session, and have one left (sharing.py, W5).
        sharers: who shares clusters without a snapshot, once that was looked for.
        sound_bitmaps: what a repair leaves of a damaged bitmap directory, and
        given_up_bitmaps: how many bitmaps it gives up, and
        abandoned: the clusters that these had, as far as that can be told: no data is lost with them.
        unwritten: the subclusters that still are as zero-safe as their cluster when it was taken (S3).
        vacated: of an image with a data file, what goes back to the host.
        tables_first: L2 tables get a place before the data that they map.
        kept_for_tables: clusters that were taken for L2 tables to be made, by the index of their L1 entry.
        is_distrusted: a refcount turned out to be too low; see `distrust`.
    """

    def __init__(self, medium: Medium, geometry: Geometry, requests: InFlight) -> None:
        super().__init__(medium, geometry)
        self.reserved: list[Run] = []
        self.zero_safe = ClusterRuns()
        self.left_out = range(0)
        self.unknown = ClusterRuns()
        self.metadata: set[ClusterIndex] = set()
        self.search_at = 0
        self.search_end = 0
        self.host_punches = not medium.has_fixed_size
        self.reuses = 0
        self.lost_table: tuple[int, int] | None = None
        self.left_alone: set[ClusterIndex] = set()
        self.sharers: dict[ClusterIndex, list[GuestCluster]] | None = None
        self.sound_bitmaps: Directory | None = None
        self.given_up_bitmaps = 0
        self.abandoned: set[ClusterIndex] = set()
        self.vacated: Vacated | None = None
        self.unwritten = UnwrittenParts()
        self.is_distrusted = False
        self._requests = requests
        self.tables_first = False
        self.kept_for_tables: dict[int, Run] = {}
        self._lent = ClusterRuns()
        self._freed = ClusterRuns()
        self._old_metadata: _Waiting = {}
        self._retired: _Waiting = {}
        self._released: _Waiting = {}
        self._punching: list[Run] = []
        self._settling: _Waiting = {}
        medium.listeners.append(self._barrier_completed)

    def is_listed(self, cluster: ClusterIndex) -> bool:
        """Return True for a free cluster that must not be handed out yet, or is listed already."""
        waiting = (self._old_metadata, self._retired, self._released, self._punching, self._settling)
        return (
            any(cluster in pool for pool in (self._lent, self._freed, self.zero_safe, self.unknown))
            or any(run.start <= cluster < run.start + run.count for run in self.reserved)
            or any(run.start <= cluster < run.start + run.count for runs in waiting for run in runs)
        )

    # Handing out

    @property
    def is_short(self) -> bool:
        """True when zero-safe clusters run out and none are on their way: unknown ones are to be recycled."""
        return not self.is_distrusted and not self.zero_safe.holds(RECYCLE_CLUSTERS) and not self._settling

    def take(self, count: int, *, ordered: bool = False) -> Run:
        """Take up to ``count`` clusters, at least one; ``ordered``: they need not be zero-safe."""
        if self.zero_safe and not self.is_distrusted:
            run = replace(self.zero_safe.take(count), zero_safe=True)
        elif self.unknown and (ordered or not self.host_punches) and not self.is_distrusted:
            run = self.unknown.take(count)
        else:
            room = self._room()
            return self.take_at_frontier(count if room is None else max(1, min(count, room)))
        self._lent.add(run.start, run.count)
        return run

    def take_at_frontier(self, count: int) -> Run:
        """Take exactly ``count`` clusters in a row, past the end of everything (S3)."""
        self.require_room(self.frontier + count)
        run = Run(self.frontier, count, zero_safe=not self.medium.has_fixed_size)
        self.frontier = ClusterIndex(self.frontier + count)
        self._lent.add(run.start, run.count)
        return run

    def take_row(self, count: int) -> Run:
        """Take exactly ``count`` clusters in a row: at the frontier or, where that ends, between others."""
        row = None if self.is_distrusted else _row_within(self.zero_safe, self.left_out, count)
        if row is not None:
            self.zero_safe.discard(row.start, count)
            self._lent.add(row.start, count)
            return row
        if self._has_room(count) or self.is_distrusted:
            return self.take_at_frontier(count)
        start = self.free_row(count)
        if start is None:
            return self.take_at_frontier(count)
        self.unknown.discard(start, count)
        self._lent.add(start, count)
        return Run(start, count)

    def free_row(self, count: int, align_clusters: int = 1) -> ClusterIndex | None:
        """Return where ``count`` clusters in a row are known to be free, below the frontier."""
        for run in self.unknown if not self.is_distrusted else ():
            start = layout.round_up(run.start, align_clusters)
            if start + count <= run.start + run.count:
                return ClusterIndex(start)
        return None

    @property
    def is_waiting(self) -> bool:
        """True if clusters are on their way back."""
        return bool(self._freed or self._old_metadata or self._retired or self._released)

    def distrust(self) -> None:
        """A cluster in use has refcount 0, and so may others that look free: none is used or punched (F1)."""
        self.is_distrusted = True

    def count_in(self, run: Run) -> None:
        """The clusters have a refcount now."""
        self._lent.discard(run.start, run.count)
        if self.left_alone:
            self.left_alone.difference_update(range(run.start, run.start + run.count))

    def undo(self, undone: Undone) -> None:
        """An operation was undone: what it took has unknown content (S3), what it freed is in use."""
        self.reuses += 1
        self.sharers = None
        for run in undone.taken:
            self._lent.discard(run.start, run.count)
            self.unknown.add(run.start, run.count)
        self.forget_frees(undone.freed)

    def give_back(self, runs: Iterable[Run]) -> None:
        """A request failed: those of its clusters that it has not counted have unknown content (S3)."""
        for run in runs:
            if run.start in self._lent:
                self._lent.discard(run.start, run.count)
                self.unknown.add(run.start, run.count)

    def retire(self, runs: Iterable[Run]) -> None:
        """Take back runs that a failed record or root may still name; they are free after a barrier (S5)."""
        self.sharers = None
        for run in ClusterRuns(runs):
            self._lent.discard(run.start, run.count)
            self._retired[run] = self.medium.barriers_started

    def withdraw(self, start: ClusterIndex, count: int) -> None:
        """Take clusters off the lists of free ones: they turned out to be in use."""
        for pool in (self.zero_safe, self.unknown):
            pool.discard(start, count)
        for waiting in (self._settling, self._retired, self._released):
            for run in [
                run for run in waiting if run.start < start + count and start < run.start + run.count
            ]:
                # What is left of the run stays out of use until the image is opened again.
                del waiting[run]

    def add_found(self, start: ClusterIndex, count: int) -> None:
        """List free clusters found in the refcounts, below the end of the file.

        Where the host shows a hole, that is no proof: a failed barrier may have lost the punching.
        """
        self.unknown.add(start, count)

    # Frees, on their way back

    def free(self, start: ClusterIndex, count: int) -> None:
        """A staged change frees clusters (S1)."""
        self._freed.add(start, count)

    def forget_frees(self, runs: Iterable[Run]) -> None:
        """The clusters are not among the staged frees any more."""
        for run in runs:
            self._freed.discard(run.start, run.count)

    def publish(self, durable: ChangeSet, epoch: int) -> None:
        """A record of ``epoch`` is durable: its data frees are released, its metadata frees wait (S1, S2)."""
        self.reuses += 1
        self.forget_frees((*durable.freed_data, *durable.freed_metadata))
        newest = self._requests.newest
        self._released |= dict.fromkeys(ClusterRuns(durable.freed_data), newest)
        home = [run for run, freeing_epoch in self._old_metadata.items() if freeing_epoch < epoch]
        for run in home:
            del self._old_metadata[run]
        self._released |= dict.fromkeys(home, newest)
        self._old_metadata |= dict.fromkeys(ClusterRuns(durable.freed_metadata), epoch)
        if self.vacated is not None:
            self.vacated.publish(durable.vacated)

    def journal_is_gone(self) -> None:
        """The image is clean: nothing will be replayed any more (S2)."""
        self._released |= dict.fromkeys(self._old_metadata, self._requests.newest)
        self._old_metadata.clear()

    def _barrier_completed(self, number: int) -> None:
        for run in _before(self._settling, number):
            del self._settling[run]
            self.zero_safe.add(run.start, run.count)
        for run in _before(self._retired, number):
            del self._retired[run]
            self._released[run] = self._requests.newest

    def start_recycling(self, *, refill: bool) -> list[Run]:
        """Return runs to be punched: those that no request uses any more, and unknown ones when short (S6).

        They are on no other list until `end_recycling`; the lock may be free meanwhile.
        """
        if self.is_distrusted:
            return []
        runs = _before(self._released, self._requests.oldest()) if self._released else []
        for run in runs:
            del self._released[run]
        missing = RECYCLE_CLUSTERS if refill and self.is_short and self.host_punches else 0
        while missing and self.unknown:
            runs.append(self.unknown.take(missing))
            missing -= runs[-1].count
        self._punching += runs
        return runs

    def end_recycling(self, run: Run, *, punched: bool) -> None:
        """A run is punched, and zero-safe after the next barrier (S3), or it could not be."""
        self._punching.remove(run)
        if punched and not self.medium.has_fixed_size:
            self._settling[run] = self.medium.barriers_started
        else:
            self.unknown.add(run.start, run.count)

    # The journal's range

    def _clusters_of(self, offset: HostOffset, length: int) -> Run:
        start = self.geometry.cluster_of(offset)
        return Run(start, self.geometry.clusters(offset + length) - start)

    def reserve(self, offset: HostOffset, length: int, end: ClusterIndex | None = None) -> None:
        """Keep the clusters of a journal range from being handed out (S4).

        It is laid behind ``end``, past the frontier, if that is given: what lies between is free (S3).
        """
        run = self._clusters_of(offset, length)
        if end is not None:
            self.zero_safe.add(end, run.start - end)
            self.left_out = range(end, run.start)
        self.reserved.append(run)
        self.unknown.discard(run.start, run.count)
        self.frontier = ClusterIndex(max(self.frontier, run.start + run.count))

    def unreserve(self, offset: HostOffset, length: int) -> None:
        """A journal range was given up: free after a barrier, from when on no root names it."""
        run = self._clusters_of(offset, length)
        self.reserved.remove(run)
        self.retire([run])


def _row_within(runs: ClusterRuns, within: range, count: int) -> Run | None:
    """Return ``count`` zero-safe clusters in a row that lie in a range."""
    for run in runs if within else ():
        start = max(run.start, within.start)
        if start + count <= min(run.start + run.count, within.stop):
            return Run(ClusterIndex(start), count, zero_safe=True)
    return None


def _before(waiting: _Waiting, number: int) -> list[Run]:
    """Return the runs that wait for less than ``number``."""
    return [run for run, waits_for in waiting.items() if waits_for < number]
