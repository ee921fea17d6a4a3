"""What a guest's read does: resolve runs, then read each from where it is, or from the backing file."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import partial

from jqcow.device.disk import Disk, read_padded, shows_zeros
from jqcow.engine.guestdata import GuestData
from jqcow.engine.known import KnownPlaces
from jqcow.engine.mapping import MappedRun
from jqcow.engine.metadata import Absent
from jqcow.engine.pending import Piece, lies_within, ranges_of
from jqcow.engine.request import Request, Requests
from jqcow.engine.walk import Walk
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import compression
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, UNALLOCATED, L2Entry
from jqcow.ondisk.layout import GuestCluster, GuestOffset, HostOffset

RUNS_AT_ONCE = 1024
"""Runs that are resolved with the lock held: it bounds memory, and how long others wait."""

PENDING = -1
"""The kind of a run that the guest wrote, and that no cluster holds yet."""

ZERO_CHUNK_BYTES = 1 << 20
_ZEROS = bytes(ZERO_CHUNK_BYTES)


class Reads:
    """Reads of a guest, and questions about what it would read. Errors as `Requests`.

    ``data``: how data is read and written. ``backing``: the disk that unallocated clusters read from.
    """

    def __init__(self, requests: Requests, data: GuestData, backing: Disk | None = None) -> None:
        self.requests = requests
        self.data = data
        self.tables = requests.tables
        self.medium = requests.medium
        self.backing = backing
        self._cluster_bytes = requests.geometry.cluster_bytes
        self._decompressed: tuple[int, HostOffset, bytes] | None = None
        self.known: KnownPlaces | None = None
        """Places that reads and writes may go to without a look into the tables, where there are any (Q4)."""

    @property
    def is_blind(self) -> bool:
        """True where there is a backing file, and who destages does not ask it (destaging.py, I7)."""
        return self.requests.destages and bool(self.tables.view.header.backing_file_offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the guest's bytes at ``offset``."""
        if self.known is not None and self._read_known(self.known, buffer, offset):
            return
        position = self._read_some(buffer, offset, 0)
        while position < len(buffer):
            position = self._read_some(buffer, offset, position)

    def _read_known(self, known: KnownPlaces, buffer: memoryview, offset: int) -> bool:
        """Read within a cluster whose place is known; False, and nothing is read, if it is not."""
        cluster, within = divmod(offset, self._cluster_bytes)
        if within + len(buffer) > self._cluster_bytes:
            return False
        request, requests = Request(), self.requests
        with request.running:
            with requests.lock:
                host = known.to_read.get(cluster)
                if host is None or requests.pending.overlaps(offset, offset + len(buffer)):
                    return False
                requests.admit(False)
                requests.guard.begin(request)
            try:
                self.data.pread_into(buffer, HostOffset(host + within))
            finally:
                requests.guard.end(request)
        return True

    def learn(self, run: MappedRun, offset: int, *, to_write: bool) -> None:
        """Remember where the cluster at ``offset`` lies; the lock is held, and the tables told just now."""
        cluster, within = divmod(offset, self._cluster_bytes)
        end = (cluster + 1) * self._cluster_bytes
        if self.known is not None and run.kind == DATA and end <= self.tables.mapping.disk_bytes:
            self.known.learn_to_read(cluster, run.host - within)
            if to_write:
                self.known.learn_to_write(cluster, run.host - within)

    def _read_some(self, buffer: memoryview, offset: int, position: int) -> int:
        """Read what can be resolved at once, from ``position`` in the buffer on; return how far that is."""
        request = Request()
        with request.running:
            runs, pieces = self.requests.planned(
                lambda: self._plan_read(request, offset + position, len(buffer) - position)
            )
            start, hidden = position, ranges_of(pieces)
            try:
                for run in runs:
                    at = GuestOffset(offset + position)
                    # What is hidden may be unreadable, and is not needed.
                    if not lies_within(hidden, at, at + run.length):
                        self.read_run(run, buffer[position : position + run.length], at)
                    position += run.length
            finally:
                self.requests.guard.end(request)
        for piece in pieces:
            # I1: what is pending lies over what the tables map.
            part = piece.part(offset + start, offset + position)
            if len(part.data):
                buffer[part.offset - offset : part.end - offset] = part.data
        return position

    def _plan_read(self, request: Request, offset: int, length: int) -> tuple[list[MappedRun], list[Piece]]:
        self.requests.admit(False)
        self.requests.check_range(offset, length)
        runs = self._runs_at_hand(GuestOffset(offset), length)
        first, end = self.requests.clusters_of_sectors(offset, length)
        self.requests.guard.require_not_changing(first, end)
        if runs:
            self.learn(runs[0], offset, to_write=False)
        self.requests.guard.begin(request, first=first, end=end)
        return runs, self.requests.pending.layers(offset, offset + length)

    def _runs_at_hand(self, offset: GuestOffset, length: int, walk: Walk | None = None) -> list[MappedRun]:
        """Return the first runs of a guest range, up to a block that is not in memory.

        Raises:
            Absent: that is the first block that the range needs.
            CorruptionError: a table on the way is damaged, or was met before on the ``walk``.
        """
        found: list[MappedRun] = []
        end = offset + length
        try:
            while offset < end and len(found) < RUNS_AT_ONCE:
                run = self.tables.mapping_at_hand.run(offset, end - offset)
                if walk is not None:
                    walk.meet(self.tables.mapping_at_hand, offset)
                found.append(run)
                offset = GuestOffset(offset + run.length)
        except Absent:
            if not found:
                raise
        return found

    def read_run(self, run: MappedRun, part: memoryview, offset: GuestOffset) -> None:
        """Fill ``part`` with what a run of guest bytes at ``offset`` reads as; the request is in flight."""
        if run.kind == DATA:
            self.data.pread_into(part, run.host)
        elif run.kind == COMPRESSED_CLUSTER:
            within = offset % self._cluster_bytes
            try:
                data = self._decompress(run)
            except CorruptionError as error:
                self.tables.mapping.name_guest_range(error, offset, self._cluster_bytes)
                raise
            part[:] = data[within : within + len(part)]
        elif run.kind == UNALLOCATED and self.is_blind:
            raise RuntimeError("what waits in the journal needs the backing file")
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
            stream = self.medium.pread(run.packed_bytes, run.host)
            data = compression.decompress(stream, self._cluster_bytes, kind)
        except FormatError as error:
            raise CorruptionError("compressed cluster", run.host, str(error)) from error
        self._decompressed = reuses, run.host, data
        return data

    def runs(self, offset: int, length: int) -> Iterator[MappedRun]:
        """Yield what a guest range is mapped to; it need not lie within the disk."""
        end, walk = offset + length, self.walk()
        while offset < end:
            for run in self.requests.planned(partial(self._look, offset, end - offset, walk)):
                yield run
                offset += run.length

    def _look(self, offset: int, length: int, walk: Walk) -> list[MappedRun]:
        self.requests.admit(False)
        return self._runs_at_hand(GuestOffset(offset), length, walk)

    def of_whole_tables(self) -> Reads:
        """Return reads for walks over an image that nobody changes: they take L2 tables whole."""
        reads = copy(self)
        reads.tables = self.tables.of_whole_tables()
        return reads

    def walk(self) -> Walk:
        """Begin a walk over the disk."""
        return Walk(self.tables.space)

    def first_run(self, offset: int, length: int, walk: Walk | None = None) -> MappedRun:
        """Return the first run of a guest range, which may be a step of a ``walk``; a piece is one, too."""

        def look() -> MappedRun:
            self.requests.admit(False)
            waiting = self.requests.pending.layers(offset, offset + length)
            if waiting:
                first = min(waiting, key=lambda piece: piece.offset)
                if first.offset <= offset:
                    return MappedRun(PENDING, HostOffset(0), min(length, first.end - offset))
                return step(first.offset - offset)
            return step(length)

        def step(length: int) -> MappedRun:
            run = self.tables.mapping_at_hand.run(GuestOffset(offset), length)
            if walk is not None:
                walk.meet(self.tables.mapping_at_hand, offset)
            return run

        return self.requests.planned(look)

    def entry(self, cluster: int) -> L2Entry:
        """Return the L2 entry of a guest cluster."""

        def look() -> L2Entry:
            self.requests.admit(False)
            return self.tables.mapping_at_hand.l2_entry(GuestCluster(cluster))

        return self.requests.planned(look)

    def reads_as_zeros(self, offset: int, length: int) -> bool:
        """Return True if a guest range reads as zeros, as far as the tables of the chain tell."""
        if self.requests.planned(lambda: self.requests.pending.overlaps(offset, offset + length)):
            return False
        for run in self.runs(offset, length):
            if run.kind in (DATA, COMPRESSED_CLUSTER):
                return False
            if run.kind == UNALLOCATED and not self.below_reads_as_zeros(offset, run.length):
                return False
            offset += run.length
        return True

    def below_reads_as_zeros(self, offset: int, length: int) -> bool:
        """Return True if what lies below a guest range, which may reach past either disk, reads as zeros."""
        return not self.is_blind and shows_zeros(self.backing, length, offset)

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
