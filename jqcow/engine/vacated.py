"""Places of a data file that nobody maps any more: they go back to the host. See datafile.py, X7.

A place is the index of a guest cluster, counted from `DATA_FILE` on. The list is a hint: what is missing on
it keeps its space on the host, and is written over like all else (X2).
"""

from __future__ import annotations

from jqcow.engine.clusters import ClusterRuns, Run
from jqcow.engine.medium import Medium
from jqcow.engine.request import Busy, Guard, Request
from jqcow.ondisk.layout import DATA_FILE, Geometry, HostOffset

BYTES_AT_ONCE = 1 << 30
"""So much is punched while writers of these guest clusters wait."""


class VacatedPlaces:
    """What durable records gave up in the data file of one image, and nobody was to write since."""

    def __init__(self, medium: Medium, geometry: Geometry, guard: Guard) -> None:
        self.medium = medium
        self.geometry = geometry
        self.guard = guard
        self._waiting: dict[int, ClusterRuns] = {}
        """By the number of the newest request that may still use them."""

    def publish(self, places: ClusterRuns) -> None:
        """The record that gives them up is durable; the lock is held."""
        if places:
            self.withdraw_all(places)
            self._waiting.setdefault(self.guard.newest, ClusterRuns()).update(places)

    def withdraw_all(self, places: ClusterRuns) -> None:
        """As `withdraw`."""
        for run in places:
            self.withdraw(run)

    def withdraw(self, run: Run) -> None:
        """Somebody will write there; the lock is held."""
        for waiting in self._waiting.values():
            waiting.discard(run.start, run.count)

    def give_back(self) -> None:
        """Punch what no request uses any more. The caller has the turn, and the lock is free.

        Raises:
            OSError: the host failed; what it did not punch keeps its space.
        """
        data_file = self.medium.data_file
        while data_file is not None and self._waiting:
            request = Request()
            with request.running:
                with self.medium.lock, self.medium.section():
                    run = self._begin(request)
                if run is None:
                    return
                try:
                    self.medium.require_healthy()
                    length = run.count * self.geometry.cluster_bytes
                    data_file.punch(self.geometry.offset_of(run.start), length)
                finally:
                    self.guard.end(request)

    def _begin(self, request: Request) -> Run | None:
        """Take some places, which are the request's own from here on; None if none can be had now."""
        oldest = self.guard.oldest()
        for number, places in list(self._waiting.items()):
            if not places:
                del self._waiting[number]
            elif number < oldest:
                run = places.take(max(1, BYTES_AT_ONCE // self.geometry.cluster_bytes))
                first = run.start - self.geometry.cluster_of(HostOffset(DATA_FILE))
                try:
                    self.guard.require_free(first, first + run.count)
                except Busy:
                    places.add(run.start, run.count)
                    return None
                self.guard.begin(request, changes=True, first=first, end=first + run.count)
                return run
        return None
