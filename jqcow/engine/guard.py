"""Requests in flight: who is kept from what meanwhile.

A request is planned and staged with the lock held, and runs without it. Each holds a lock of its own from
before its plan until after its end; who has to wait for it waits for that lock. Locks are taken by ``with``
alone: an exception at any point leaves none of them taken.

Q1. The guest clusters that a request will map are its own until it has ended: no other request changes
    their entries.
Q2. While somebody is alone (a transaction, a resize, a close) no other request changes anything, and none
    that began before is still running.
Q3. What a request resolved stays in place until it has ended (space.py, S6).
"""

from __future__ import annotations

import os
import threading

from jqcow.engine.medium import Medium


class Request:
    """A request in flight. ``first`` and ``end`` are guest clusters whose entries it will change."""

    __slots__ = ("changes", "end", "first", "number", "running")

    def __init__(self) -> None:
        self.running = threading.RLock()
        self.number = 0
        self.changes = False
        self.first = 0
        self.end = 0


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

    def begin(self, request: Request, *, changes: bool = False) -> None:
        """A request has its plan, and runs from here on."""
        self.newest += 1
        request.number, request.changes = self.newest, changes
        self._requests[self.newest] = request

    def end(self, request: Request) -> None:
        """A request has ended, well or not. One call of the interpreter: it needs no lock."""
        self._requests.pop(request.number, None)

    def require_free(self, first: int, end: int) -> None:
        """Raise Busy if another request will change the entries of guest clusters [first, end) (Q1)."""
        for request in list(self._requests.values()):
            if request.first < end and first < request.end:
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
            if left:
                self.medium.in_doubt = True
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
                guard.medium.in_doubt = True
            guard.medium.require_known()
            guard.is_alone = True
        try:
            guard.drain()
        except BaseException:
            guard.is_alone = False
            raise

    def __exit__(self, *exception: object) -> None:
        self._guard.is_alone = False


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
