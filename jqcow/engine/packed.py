"""What a guest's compressed write does: whole clusters, each where that saves at least a sector."""

from __future__ import annotations

import threading
from typing import NamedTuple

from jqcow.engine.clusters import Run
from jqcow.engine.request import Request
from jqcow.engine.write import Writes
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk import compression, layout
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, L2Entry
from jqcow.ondisk.layout import SECTOR_BYTES, GuestCluster, GuestOffset, HostOffset


class PackPlan(NamedTuple):
    """Where a compressed cluster goes: ``taken`` is the new host cluster for it, if any.

    ``packed_end`` is where the data before it ended when this was planned.
    """

    host: HostOffset
    taken: Run | None
    packed_end: int


class PackedWrites:
    """Compressed writes of a guest; one at a time is packed, behind the one before it."""

    def __init__(self, writes: Writes) -> None:
        self.writes = writes
        self.requests = writes.requests
        self.tables = writes.tables
        self._packing = threading.RLock()

    def write(self, data: memoryview, offset: int, level: int | None = None) -> None:
        """Write whole guest clusters compressed; the last one may end with the disk.

        Raises:
            ValueError: not whole clusters, or they reach past the end.
            UnsupportedFeatureError: the image is encrypted, and compressed data would not be.
            OSError: the failed cluster is as before.
        """
        requests, cluster_bytes = self.requests, self.tables.geometry.cluster_bytes
        kind = requests.planned(lambda: self._begin(offset, len(data)))
        for position in range(0, len(data), cluster_bytes):
            part = data[position : position + cluster_bytes]
            stream = compression.compress(bytes(part).ljust(cluster_bytes, b"\0"), kind, level)
            start = GuestOffset(offset + position)
            if stream is None or layout.round_up(len(stream), SECTOR_BYTES) >= cluster_bytes:
                self.writes.write_span(part, start, within_disk=True)
            else:
                while not self._pack(stream, start):
                    pass
                requests.commit_if_large()

    def _begin(self, offset: int, length: int) -> int:
        """Check a range; return the type of compression."""
        self.requests.enter_change()
        self.requests.check_whole_clusters(offset, length)
        if self.tables.geometry.has_data_file:
            raise UnsupportedFeatureError("compressed writing to an external data file")
        if self.writes.data.is_encrypted:
            raise UnsupportedFeatureError(
                "compressed writing to an encrypted image", "qcow2 stores compressed clusters unencrypted"
            )
        return self.tables.view.header.compression_type

    def _pack(self, stream: bytes, offset: GuestOffset) -> bool:
        """Store one cluster's stream; return False if it has to be planned anew."""
        request = Request()
        with self._packing, request.running:
            plan = self.requests.planned(lambda: self._plan(request, stream, offset))
            taken = [] if plan.taken is None else [plan.taken]
            try:
                # To the end of the sector: a reader takes whole ones.
                padded = stream.ljust(layout.round_up(len(stream), SECTOR_BYTES), b"\0")
                self.requests.medium.pwrite(padded, plan.host)
                with self.requests.lock:
                    if self._is_stale(plan):
                        with self.requests.medium.section():
                            self.tables.space.give_back(taken)
                        return False
                    self.requests.dirty.will_stage(offset, self.tables.geometry.cluster_bytes)
                    with self.tables.operation():
                        # From here on the operation gives them up, should it fail.
                        taken.clear()
                        self._stage(plan, len(stream), offset)
            except BaseException:
                self.writes.give_back(taken)
                raise
            finally:
                self.requests.guard.end(request)
        return True

    def _plan(self, request: Request, stream: bytes, offset: GuestOffset) -> PackPlan:
        requests = self.requests
        requests.enter_change()
        cluster_bytes = self.tables.geometry.cluster_bytes
        requests.check_range(offset, min(cluster_bytes, self.tables.mapping.disk_bytes - offset))
        requests.require_settled(offset, cluster_bytes)
        first = offset // cluster_bytes
        requests.guard.require_free(first, first + 1)
        requests.require_live()
        with requests.medium.section():
            host, taken = self.tables.refcounts.take_packed(len(stream))
            requests.guard.begin(request, changes=True, first=first, end=first + 1)
        return PackPlan(host, taken, self.tables.changes.packed_end)

    def _is_stale(self, plan: PackPlan) -> bool:
        """Return True if what was packed before was undone or freed meanwhile (R4)."""
        return self.tables.changes.packed_end != plan.packed_end

    def _stage(self, plan: PackPlan, length: int, offset: GuestOffset) -> None:
        tables = self.tables
        # W2: a descriptor must not become durable before what it describes.
        tables.changes.ordered = True
        tables.refcounts.count_in_packed(plan.host, length, plan.taken)
        cluster = GuestCluster(offset // tables.geometry.cluster_bytes)
        entry = L2Entry(COMPRESSED_CLUSTER, plan.host, False, length)
        self.writes.replace_entries(cluster, [tables.mapping.l2_entry(cluster)], [entry])
