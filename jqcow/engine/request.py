"""Requests of a guest: plan, run, stage. Here: how a request is planned, and what a read does.

A request is planned with the lock held: its runs are resolved, and the clusters that it needs are taken. It
runs without the lock, any number of requests at a time: bytes are read, copied, written. What it changes in
the tables is staged with the lock held, in one operation. Nothing maps its data before a record is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from jqcow.device.disk import Disk, read_padded, shows_zeros
from jqcow.engine.blocks import Absent
from jqcow.engine.commit import Commits
from jqcow.engine.guard import Busy, Guard, Request
from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.mapping import MappedRun
from jqcow.engine.tables import Tables
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import compression
from jqcow.ondisk.entries import COMPRESSED_CLUSTER, DATA, UNALLOCATED, L2Entry
from jqcow.ondisk.layout import GuestCluster, GuestOffset, HostOffset

Planned = TypeVar("Planned")

RUNS_AT_ONCE = 1024
"""Runs that are resolved with the lock held: it bounds memory, and how long others wait."""

ZERO_CHUNK_BYTES = 1 << 20
_ZEROS = bytes(ZERO_CHUNK_BYTES)


class NotLive(Exception):
    """The image needs its journal before a request can be planned."""


class Requests:
    """Guest requests on one image through one set of tables. Ranges are (guest offset, length) in bytes.

    Errors of all: ValueError where a range reaches past the disk's end; CorruptionError where a table on the
    way is damaged; OSError where the host failed; PoisonedError where the image has to be opened again; and
    what ``enter`` raises, which is called with the lock held before anything else.
    """

    def __init__(
        self,
        tables: Tables,
        lifecycle: Lifecycle,
        commits: Commits,
        guard: Guard,
        enter: Callable[[bool], None],
        backing: Disk | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """``backing``: the disk that unallocated clusters read from. ``alone``: the caller is (Q2)."""
        self.tables = tables
        self.lifecycle = lifecycle
        self.commits = commits
        self.guard = guard
        self.backing = backing
        self.medium = tables.blocks.medium
        self.geometry = tables.geometry
        self.enter = enter
        self.alone = alone
        self.lock = self.medium.lock
        self._cluster_bytes = tables.geometry.cluster_bytes
        self._span_bytes = tables.mapping.codec.per_block * self._cluster_bytes
        self._decompressed: tuple[int, HostOffset, bytes] | None = None

    # Planning

    def planned(self, plan: Callable[[], Planned]) -> Planned:
        """Call ``plan`` with the lock held, until nothing is in its way."""
        while True:
            try:
                try:
                    with self.lock:
                        self.medium.require_known()
                        return plan()
                except NotLive:
                    # Asked again with the turn taken: much may have happened meanwhile.
                    self.lifecycle.go_live(self._require_admitted)
            except Absent as absent:
                self._load(absent)
            except Busy as busy:
                self.guard.wait(busy)

    def _require_admitted(self) -> None:
        """Refuse a change that the image's state does not allow, or that somebody who is alone keeps out."""
        self.enter(True)
        if not self.alone:
            self.guard.require_not_alone()

    def _load(self, absent: Absent) -> None:
        """Read a missing block from the device, as a request that a close waits for."""
        request = Request()
        with request.running:
            with self.lock:
                self.enter(False)
                self.guard.begin(request)
            try:
                self.tables.blocks.load_unlocked(absent)
            finally:
                self.guard.end(request)

    def enter_change(self) -> None:
        """First thing in the plan of a change: look whether it may be made at all."""
        self._require_admitted()
        self.lifecycle.prepare_to_change()
        if self.tables.view.header.autoclear_features:
            # A bit that jqcow does not know vouches for the data; going live clears it under a barrier.
            self.require_live()

    def require_live(self) -> None:
        """Raise NotLive unless the image has its journal: metadata will change."""
        if self.lifecycle.log.journal is None:
            raise NotLive

    def commit_if_large(self) -> None:
        """After a change, with the lock free: keep what is staged within bounds. Who is alone does not."""
        if not self.alone:
            self.commits.flush_if_large(lambda: self.enter(True))

    def check_range(self, offset: int, length: int) -> None:
        """Raise ValueError unless a guest range lies within the disk."""
        size = self.tables.mapping.disk_bytes
        if length < 0 or offset < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} are not within the disk of {size} bytes")

    def check_whole_clusters(self, offset: int, length: int) -> None:
        """Raise ValueError unless a guest range within the disk is one of whole clusters, or to its end."""
        self.check_range(offset, length)
        ends = offset + length == self.tables.mapping.disk_bytes or not length % self._cluster_bytes
        if offset % self._cluster_bytes or not ends:
            raise ValueError(
                f"{length} bytes at {offset} are not whole clusters of {self._cluster_bytes} bytes"
            )

    def spans(self, offset: int, length: int) -> Iterator[tuple[GuestOffset, int]]:
        """Cut a guest range where the metadata blocks of its L2 tables end: (offset, length) of each part."""
        end = offset + length
        while offset < end:
            reach = min(end, offset - offset % self._span_bytes + self._span_bytes)
            yield GuestOffset(offset), reach - offset
            offset = reach

    # Read

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the guest's bytes at ``offset``."""
        position = self._read_some(buffer, offset, 0)
        while position < len(buffer):
            position = self._read_some(buffer, offset, position)

    def _read_some(self, buffer: memoryview, offset: int, position: int) -> int:
        """Read what can be resolved at once, from ``position`` in the buffer on; return how far that is."""
        request = Request()
        with request.running:
            runs = self.planned(lambda: self._plan_read(request, offset + position, len(buffer) - position))
            try:
                for run in runs:
                    self.read_run(
                        run, buffer[position : position + run.length], GuestOffset(offset + position)
                    )
                    position += run.length
            finally:
                self.guard.end(request)
        return position

    def _plan_read(self, request: Request, offset: int, length: int) -> list[MappedRun]:
        self.enter(False)
        self.check_range(offset, length)
        runs = self._runs_at_hand(GuestOffset(offset), length)
        self.guard.begin(request)
        return runs

    def _runs_at_hand(self, offset: GuestOffset, length: int) -> list[MappedRun]:
        """Return the first runs of a guest range, up to a block that is not in memory.

        Raises:
            Absent: that is the first block that the range needs.
        """
        found: list[MappedRun] = []
        end = offset + length
        try:
            while offset < end and len(found) < RUNS_AT_ONCE:
                run = self.tables.mapping_at_hand.run(offset, end - offset)
                found.append(run)
                offset = GuestOffset(offset + run.length)
        except Absent:
            if not found:
                raise
        return found

    def read_run(self, run: MappedRun, part: memoryview, offset: GuestOffset) -> None:
        """Fill ``part`` with what a run of guest bytes at ``offset`` reads as; the request is in flight."""
        if run.kind == DATA:
            self.medium.pread_into(part, run.host)
        elif run.kind == COMPRESSED_CLUSTER:
            within = offset % self._cluster_bytes
            part[:] = self._decompress(run)[within : within + len(part)]
        elif run.kind == UNALLOCATED and self.backing is not None:
            read_padded(self.backing, part, offset)
        else:
            _fill_zeros(part)

    def _decompress(self, run: MappedRun) -> bytes:
        """Return the bytes of a compressed cluster. The last one is kept: it is often read piece by piece.

        It serves until clusters come back: from then on the host cluster may hold something else.
        """
        kept, reuses = self._decompressed, self.tables.space.reuses
        if kept is not None and kept[:2] == (reuses, run.host):
            return kept[2]
        kind = self.tables.view.header.compression_type
        try:
            stream = self.medium.pread(run.host, run.packed_bytes)
            data = compression.decompress(stream, self._cluster_bytes, kind)
        except FormatError as error:
            raise CorruptionError("compressed cluster", run.host, str(error)) from error
        self._decompressed = reuses, run.host, data
        return data

    def runs(self, offset: int, length: int) -> Iterator[MappedRun]:
        """Yield what a guest range is mapped to; it need not lie within the disk."""
        end = offset + length
        while offset < end:
            for run in self.planned(partial(self._look, offset, end - offset)):
                yield run
                offset += run.length

    def _look(self, offset: int, length: int) -> list[MappedRun]:
        self.enter(False)
        return self._runs_at_hand(GuestOffset(offset), length)

    def first_run(self, offset: int, length: int) -> MappedRun:
        """Return the first run of a guest range."""

        def look() -> MappedRun:
            self.enter(False)
            return self.tables.mapping_at_hand.run(GuestOffset(offset), length)

        return self.planned(look)

    def entry(self, cluster: int) -> L2Entry:
        """Return the L2 entry of a guest cluster."""

        def look() -> L2Entry:
            self.enter(False)
            return self.tables.mapping_at_hand.l2_entry(GuestCluster(cluster))

        return self.planned(look)

    def reads_as_zeros(self, offset: int, length: int) -> bool:
        """Return True if a guest range reads as zeros, as far as the tables of the chain tell."""
        for run in self.runs(offset, length):
            if run.kind in (DATA, COMPRESSED_CLUSTER):
                return False
            if run.kind == UNALLOCATED and not self.below_reads_as_zeros(offset, run.length):
                return False
            offset += run.length
        return True

    def below_reads_as_zeros(self, offset: int, length: int) -> bool:
        """Return True if what lies below a guest range, which may reach past either disk, reads as zeros."""
        return shows_zeros(self.backing, length, offset)

    def reads_from_below(self, offset: int, length: int) -> bool:
        """Return True if the backing file may hold data of a range."""
        if self.backing is None:
            return False
        for run in self.runs(offset, length):
            if run.kind == UNALLOCATED and not self.below_reads_as_zeros(offset, run.length):
                return True
            offset += run.length
        return False


def _fill_zeros(buffer: memoryview) -> None:
    for position in range(0, len(buffer), ZERO_CHUNK_BYTES):
        part = buffer[position : position + ZERO_CHUNK_BYTES]
        part[:] = _ZEROS[: len(part)]
