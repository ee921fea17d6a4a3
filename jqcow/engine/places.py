"""Where a guest's writes go in an external data file, and what has to be before (datafile.py)."""

from __future__ import annotations

from typing import NoReturn

from jqcow.engine.clusters import Run
from jqcow.engine.request import NotData, Requests
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk.l2 import DATA
from jqcow.ondisk.layout import DATA_FILE, ClusterIndex, GuestCluster, GuestOffset, HostOffset


class Places:
    """The places of guest clusters in the data file of one image: each has its own."""

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self.tables = requests.tables
        self.geometry = requests.geometry
        self._cluster_bytes = requests.geometry.cluster_bytes

    def run_of(self, cluster: int, count: int) -> Run:
        """Return the place of guest clusters in a row, whatever it holds (X2)."""
        host = HostOffset(DATA_FILE + cluster * self._cluster_bytes)
        return Run(self.geometry.cluster_of(host), count, zero_safe=False)

    def vacate(self, cluster: int, count: int) -> None:
        """Guest clusters in a row are staged to have no place any more (X7)."""
        self.tables.changes.vacated.update([self.run_of(cluster, count)])

    def occupy(self, run: Run) -> None:
        """A request will write there: nobody gives it back (X7)."""
        staged, vacated = self.tables.staged, self.tables.space.vacated
        for changes in (staged.changes, staged.in_flight):
            if changes is not None:
                changes.vacated.discard(run.start, run.count)
        if vacated is not None:
            vacated.withdraw(run)

    def refuse_overwriting(self) -> NoReturn:
        """There is no other place for what a transaction would overwrite (X4)."""
        raise UnsupportedFeatureError(
            "overwriting data in a transaction",
            "the image has an external data file, so there is no second place for the data",
        )

    def require_spare(self, run: Run, offset: GuestOffset, length: int) -> None:
        """Refuse clusters that a transaction must not write to: others see data there, or may again (X4)."""
        changes = self.tables.changes
        if not changes.is_private:
            return
        places = {ClusterIndex(at) for at in range(run.start, run.start + run.count)}
        public = self.requests.commits.public.mapping_at_hand
        is_seen = any(seen.kind == DATA for seen in public.runs(offset, length))
        if is_seen or not changes.outside.isdisjoint(places - (changes.own or set())):
            self.refuse_overwriting()

    def require_data(self, first: int, end: int) -> None:
        """Raise NotData if guest clusters lie in a raw data file: they are not data yet (X3)."""
        if self.tables.view.header.is_raw_outside:
            raise NotData(lambda: self.make_data(first, end))

    def make_data(self, first: int, end: int) -> None:
        """Make data of all guest clusters in [first, end) of a raw data file, durably (X3).

        Called with the lock free.
        """
        requests, tables = self.requests, self.tables
        if tables.changes.is_private:
            self.refuse_overwriting()
        with requests.commits.turn.lock:
            requests.commits.begin_turn()
            with requests.lock:
                requests.require_admitted()
                self._clear(first * self._cluster_bytes, end * self._cluster_bytes)
                with tables.operation():
                    self._map(first, end)
            # The zeros are durable before the record (X1), and that before any data.
            requests.commits.commit(tables)

    def _clear(self, start: int, end: int) -> None:
        """Make zeros in the file of what is no data in a guest range; the disk may end in it."""
        data_file, disk_bytes = self.requests.medium.data_file, self.tables.mapping.disk_bytes
        for run in self.tables.mapping.runs(GuestOffset(start), end - start):
            inside = min(run.length, disk_bytes - start)
            if run.kind != DATA and inside > 0 and data_file is not None:
                data_file.zero(HostOffset(DATA_FILE + start), inside)
            start += run.length

    def _map(self, first: int, end: int) -> None:
        mapping = self.tables.mapping
        for cluster in map(GuestCluster, range(first, end)):
            host = HostOffset(DATA_FILE + cluster * self._cluster_bytes)
            whole = range(mapping.codec.subclusters)
            mapping.set_entries(cluster, [mapping.codec.filled(mapping.l2_entry(cluster), host, whole)])
