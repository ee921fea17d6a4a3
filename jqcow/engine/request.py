"""Requests of a guest: how one is planned, and who is kept from what while it runs.

A request is planned with the lock held: its runs are resolved, and the clusters that it needs are taken. It
runs without the lock, any number of requests at a time: bytes are read, copied, written. What it changes in
the tables is staged with the lock held, in one operation. Nothing maps its data before a record is durable.

Each request holds a lock of its own from before its plan until after its end; who has to wait for it waits
for that lock. Locks are taken by ``with`` alone: an exception at any point leaves none of them taken.

Q1. The guest clusters that a request will map are its own until it has ended: no other request changes
    their entries.
Q2. While somebody is alone (a transaction, a resize, a close) no other request changes anything, and none
    that began before is still running.
Q3. What a request resolved stays in place until it has ended (space.py, S6).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from jqcow.engine.commit import Commits
from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import Absent
from jqcow.engine.pending import Pending
from jqcow.engine.tables import Tables
from jqcow.engine.tracking import Cold, PrivateMarks, Tracking
from jqcow.ondisk import layout
from jqcow.ondisk.header import CRYPT_NONE
from jqcow.ondisk.layout import GuestOffset

Planned = TypeVar("Planned")


class Request:
    """A request in flight. ``first`` and ``end`` are guest clusters that are its own, as far as it needs.

    ``brings_bytes``: so much will wait in the journal when it has ended. ``destages``: what it writes the
    disk reads already.
    """

    __slots__ = ("brings_bytes", "changes", "destages", "end", "first", "number", "running")

    def __init__(self) -> None:
        self.running = threading.RLock()
        self.number = 0
        self.changes = False
        self.first = 0
        self.end = 0
        self.brings_bytes = 0
        self.destages = False


class Busy(Exception):
    """What has to end first before a request can be planned. ``request`` None: somebody is alone."""

    def __init__(self, request: Request | None) -> None:
        super().__init__()
        self.request = request


class Guard:
    """The requests of one image in flight. The lock is held, but for `end` and what waits."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        self.newest = 0
        """The number of the newest request."""
        self.turnstile = threading.RLock()
        """Held by whoever is alone."""
        self.is_alone = False
        self._requests: dict[int, Request] = {}
        self._owner_pid = os.getpid()

    # One request

    def begin(self, request: Request, *, changes: bool = False, first: int = 0, end: int = 0) -> None:
        """A request has its plan, and runs from here on; it will map the guest clusters [first, end) (Q1)."""
        self.newest += 1
        request.number, request.changes = self.newest, changes
        request.first, request.end = first, end
        self._requests[self.newest] = request

    def end(self, request: Request) -> None:
        """A request has ended, well or not. One call of the interpreter: it needs no lock."""
        self._requests.pop(request.number, None)

    def require_free(self, first: int, end: int, *, but_destaging: bool = False) -> None:
        """Raise Busy if another request will change the entries of guest clusters [first, end) (Q1).

        ``but_destaging``: who destages is in nobody's way.
        """
        for request in list(self._requests.values()) if first < end else ():
            if request.first < end and first < request.end and not (but_destaging and request.destages):
                raise Busy(request)

    def coming(self) -> list[Request]:
        """Return the requests that bring what will wait in the journal (destaging.py, I7)."""
        return [request for request in list(self._requests.values()) if request.brings_bytes]

    def require_not_changing(self, first: int, end: int) -> None:
        """Raise Busy if another request changes data in guest clusters [first, end) (guestdata.py, E2)."""
        for request in list(self._requests.values()) if first < end else ():
            if request.changes and request.first < end and first < request.end:
                raise Busy(request)

    def require_not_alone(self) -> None:
        """Raise Busy while somebody is alone (Q2)."""
        if self.is_alone:
            raise Busy(None)

    def oldest(self) -> int:
        """Return the number of the oldest request in flight, or one that none has yet (Q3).

        A reader that was cut off is forgotten: nobody holds its lock.
        """
        for number, request in list(self._requests.items()):
            if request.changes or is_held(request.running):
                return number
            self.end(request)
        return self.newest + 1

    def require_not_mine(self) -> None:
        """Raise RuntimeError if the calling thread is in the midst of a request: it is a finaliser."""
        if any(is_mine(request.running) for request in list(self._requests.values())):
            raise RuntimeError("the image is in use by this thread: a finaliser must not come back to it")

    # Waiting, with the lock free

    def wait(self, busy: Busy) -> None:
        """Wait until what is in the way has ended.

        Raises:
            PoisonedError: it was cut off, and will never end.
            RuntimeError: the calling thread would wait for itself.
        """
        lock = self.turnstile if busy.request is None else busy.request.running
        if is_mine(lock):
            raise RuntimeError("the image is in use by this thread: a finaliser must not come back to it")
        with lock, self.medium.lock:
            left = self.is_alone if busy.request is None else busy.request.number in self._requests
            if left and busy.request is not None and not busy.request.changes:
                # A reader that was cut off has left nothing behind.
                self.end(busy.request)
            elif left:
                self.medium.leave_in_doubt()
            self.medium.require_known()

    def alone(self) -> Alone:
        """Return a context that keeps all other changes out; the caller holds the turnstile, not the lock."""
        return Alone(self)

    def drain(self) -> None:
        """Wait until no request that changes is in flight.

        Raises:
            PoisonedError: one of them was cut off.
        """
        for request in list(self._requests.values()):
            if request.changes:
                self.wait(Busy(request))

    def end_all(self) -> None:
        """Wait until no request at all is in flight; one that was cut off holds nothing back any more.

        A forked child does not wait: the requests of its parent never end there.
        """
        if os.getpid() != self._owner_pid:
            return
        for request in list(self._requests.values()):
            with request.running:
                self.end(request)


class Alone:
    """Nobody else changes the image, and nobody is still doing so (Q2).

    Where it is cut off the guard still says that somebody is alone, and whoever comes next finds that out.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    def __enter__(self) -> None:
        guard = self._guard
        with guard.medium.lock:
            if guard.is_alone:
                guard.medium.leave_in_doubt()
            guard.medium.require_known()
            guard.is_alone = True
        try:
            guard.drain()
        except BaseException:
            guard.is_alone = False
            raise

    def __exit__(self, *exception: object) -> None:
        self._guard.is_alone = False


class NotLive(Exception):
    """The image needs its journal before a request can be planned."""


class NotData(Exception):
    """What is to be written in a raw data file has to be data first; ``make`` does that (datafile.py, X3)."""

    def __init__(self, make: Callable[[], None]) -> None:
        super().__init__()
        self.make = make


class Unsettled(Exception):
    """What is pending has to be destaged before a request can be planned (destaging.py, I4)."""


class Requests:
    """Guest requests on one image through one set of tables. Ranges are (guest offset, length) in bytes.

    Errors of all: ValueError where a range reaches past the disk's end; CorruptionError where a table on the
    way is damaged; OSError where the host failed; PoisonedError where the image has to be opened again; and
    what ``admit`` raises, which is called with the lock held before anything else: with True for a change.
    """

    def __init__(
        self,
        tables: Tables,
        lifecycle: Lifecycle,
        commits: Commits,
        guard: Guard,
        admit: Callable[[bool], None],
        *,
        alone: bool = False,
        destages: bool = False,
    ) -> None:
        """``alone``: the caller is (Q2). ``destages``: it sees what is pending as if it were not there."""
        self.tables = tables
        self.lifecycle = lifecycle
        self.commits = commits
        self.dirty: Tracking | PrivateMarks = (
            commits.tracking if tables is commits.public else PrivateMarks(tables)
        )
        self.pending = commits.pending if tables is commits.public and not destages else Pending()
        self.destages = destages
        self.guard = guard
        self.medium = tables.blocks.medium
        self.geometry = tables.geometry
        self.admit = admit
        self.alone = alone
        self.lock = self.medium.lock
        self._cluster_bytes = tables.geometry.cluster_bytes
        self._span_bytes = tables.mapping.codec.per_block * self._cluster_bytes

    def planned(self, plan: Callable[[], Planned]) -> Planned:
        """Call ``plan`` with the lock held, until nothing is in its way."""
        try:
            return self._planned(plan)
        except OSError as error:
            if not self.makes_space(error):
                raise
            return self._planned(plan)

    def makes_space(self, error: OSError) -> bool:
        """After ``error``: bring clusters back that wait for a commit; True if the change may be tried again.

        Raises:
            OSError: the host failed.
        """
        is_full = error.errno == errno.ENOSPC and self.medium.has_fixed_size
        if not is_full or self.alone or not self.tables.space.is_waiting:
            return False
        self.commits.checkpoint(self.require_admitted)
        return True

    def _planned(self, plan: Callable[[], Planned]) -> Planned:
        while True:
            try:
                try:
                    with self.lock:
                        self.medium.require_known()
                        return plan()
                except NotLive:
                    # Asked again with the turn taken: much may have happened meanwhile.
                    self.lifecycle.go_live(self.require_admitted)
            except Absent as absent:
                self._load(absent)
            except Cold as cold:
                self._heat(cold)
            except NotData as missing:
                self._wait_for(missing.make)
            except Unsettled:
                self.settle()
            except Busy as busy:
                self.guard.wait(busy)

    def require_admitted(self) -> None:
        """Refuse a change that the image's state does not allow, or that somebody who is alone keeps out."""
        self.admit(True)
        if not self.alone:
            self.guard.require_not_alone()

    def _heat(self, cold: Cold) -> None:
        self._wait_for(lambda: self.commits.heat(cold, self.require_admitted))

    def settle(self) -> None:
        """Have what is pending destaged, or wait for what is in the way; errors as `Commits.settle`."""
        self._wait_for(lambda: self.commits.settle(self.require_admitted))

    def _wait_for(self, act: Callable[[], None]) -> None:
        """Do what is to be durable before; where others are in the way wait for them instead."""
        try:
            act()
        except Busy as busy:
            self.guard.wait(busy)

    def _load(self, absent: Absent) -> None:
        """Read a missing block from the device, as a request that a close waits for."""
        request = Request()
        with request.running:
            with self.lock:
                self.admit(False)
                self.guard.begin(request)
            try:
                self.tables.blocks.load_unlocked(absent)
            finally:
                self.guard.end(request)

    def enter_change(self) -> None:
        """First thing in the plan of a change: look whether it may be made at all."""
        self.require_admitted()
        self.lifecycle.prepare_to_change()
        header = self.tables.view.header
        if header.has_data_file:
            self.lifecycle.require_own_offsets()
        if header.autoclear_features & ~header.raw_bit:
            # A bit that jqcow does not know vouches for the data; going live clears it under a barrier.
            self.require_live()

    def require_settled(self, offset: int, length: int) -> None:
        """Raise Unsettled if a write is pending in a guest range: it comes before a change there (I4)."""
        if not self.pending.is_empty and self.pending.overlaps(offset, offset + length):
            raise Unsettled

    def require_live(self) -> None:
        """Raise NotLive unless the image has its journal: metadata will change."""
        if not self.lifecycle.is_live:
            raise NotLive

    def commit_if_large(self) -> None:
        """After a change, with the lock free: keep what is staged within bounds. Who is alone does not."""
        if not self.alone:
            self.commits.flush_if_large(lambda: self.admit(True))

    def check_range(self, offset: int, length: int) -> None:
        """Raise ValueError unless a guest range lies within the disk."""
        size = self.tables.mapping.disk_bytes
        if length < 0 or offset < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} are not within the disk of {size} bytes")

    def clusters_of_sectors(self, offset: int, length: int) -> tuple[int, int]:
        """Return the guest clusters [first, end) that a request has to itself for its data's sake.

        None, unless the image is encrypted (guestdata.py, E2).
        """
        if self.tables.view.header.crypt_method == CRYPT_NONE:
            return 0, 0
        return offset // self._cluster_bytes, self.geometry.clusters(offset + length)

    def check_whole_clusters(self, offset: int, length: int) -> None:
        """Raise ValueError unless a guest range within the disk is one of whole clusters, or to its end."""
        self._check_whole(offset, length, self._cluster_bytes, "clusters")

    def check_whole_subclusters(self, offset: int, length: int) -> None:
        """Raise ValueError unless a range within the disk is one of whole subclusters, or to its end."""
        self._check_whole(offset, length, self.tables.mapping.codec.subcluster_bytes, "subclusters")

    def _check_whole(self, offset: int, length: int, unit_bytes: int, what: str) -> None:
        self.check_range(offset, length)
        ends = offset + length == self.tables.mapping.disk_bytes or not length % unit_bytes
        if offset % unit_bytes or not ends:
            raise ValueError(f"{length} bytes at {offset} are not whole {what} of {unit_bytes} bytes")

    def check_change(self, offset: int, length: int) -> int:
        """Refuse a change of a guest range that may not be made as a whole; return the size of the disk."""

        def check() -> int:
            self.enter_change()
            self.check_range(offset, length)
            # Whole clusters: what is looked at next are their entries.
            start = offset - offset % self._cluster_bytes
            self.require_settled(start, layout.round_up(offset + length, self._cluster_bytes) - start)
            return self.tables.mapping.disk_bytes

        return self.planned(check)

    def spans_to_change(self, offset: int, length: int) -> Iterator[tuple[GuestOffset, int]]:
        """As `spans`. Several are refused together; each is to be checked again when it is planned."""
        if length <= 0 or offset % self._span_bytes + length > self._span_bytes:
            self.check_change(offset, length)
        return self.spans(offset, length)

    def spans(self, offset: int, length: int) -> Iterator[tuple[GuestOffset, int]]:
        """Cut a guest range where the metadata blocks of its L2 tables end: (offset, length) of each part."""
        end = offset + length
        while offset < end:
            reach = min(end, offset - offset % self._span_bytes + self._span_bytes)
            yield GuestOffset(offset), reach - offset
            offset = reach


def is_held(lock: threading.RLock) -> bool:
    """Return True if any thread has the lock."""
    if is_mine(lock):
        return True
    is_free = lock.acquire(blocking=False)
    if is_free:
        lock.release()
    return not is_free


def is_mine(lock: threading.RLock) -> bool:
    """Return True if the calling thread has the lock: a finaliser runs in the midst of anything."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]
