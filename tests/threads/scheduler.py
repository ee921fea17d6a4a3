"""Threads of which one runs at a time, in an order drawn from a seed: an interleaving that can be replayed.

A thread may be stopped before and after each call of the device, in the midst of each barrier and of some
writes, and wherever it takes or has released a lock of the engine. Who goes on is chosen from those that do
not wait for a taken lock; nobody sleeps. When all wait, that is a deadlock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace, TracebackType
from typing import Any

from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice
from tests.support import inside

SECTOR = 512


class Deadlock(AssertionError):
    """All threads wait for locks that others have."""


class _Abandoned(BaseException):
    """Ends a thread that will not be waited for."""


class Worker:
    """A thread under a scheduler. ``where`` is its newest point, ``doing`` what it was asked to do."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.where = "start"
        self.doing = ""
        self.waits_for: ScheduledLock | None = None
        self.has_ended = False
        self._baton = threading.Semaphore(0)

    @property
    def can_run(self) -> bool:
        return not self.has_ended and (self.waits_for is None or self.waits_for.owner is None)

    def wait(self) -> None:
        self._baton.acquire()

    def wake(self) -> None:
        self._baton.release()


class Scheduler:
    """Runs bodies, one at a time. ``at_point`` is called at each point, with everything standing still."""

    def __init__(self, random: Random, at_point: Callable[[str], None] = lambda where: None) -> None:
        self.random = random
        self.at_point = at_point
        self.workers: list[Worker] = []
        self.points = 0
        self.switches = 0
        self._stays = random.choice((0.0, 0.3, 0.6, 0.85))
        self._sleeper: Worker | None = None
        self._sleeps_until = 0
        self._current: Worker | None = None
        self._error: BaseException | None = None
        self._all_ended = threading.Semaphore(0)

    @property
    def situation(self) -> tuple[str, ...]:
        """What each thread does and where it is, whichever thread it is."""
        return tuple(sorted(f"{worker.doing} {worker.where}" for worker in self.workers))

    def run(self, *bodies: Callable[[Worker], None]) -> None:
        """Run the bodies to their ends; raise what the first of them raised."""
        self.workers = [Worker(number) for number in range(len(bodies))]
        threads = [
            threading.Thread(target=self._work, args=(worker, body), daemon=True)
            for worker, body in zip(self.workers, bodies, strict=True)
        ]
        for thread in threads:
            thread.start()
        self._go_on()
        self._all_ended.acquire()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def point(self, where: str) -> None:
        """Let another thread go on, perhaps. Outside of the threads under way this does nothing."""
        me = self._current
        if me is None:
            return
        me.where = where
        self.points += 1
        self._look(where)
        if self.random.random() >= self._stays:
            self._yield(me)

    def wait_for(self, lock: ScheduledLock) -> None:
        """Let others go on until nobody has the lock."""
        me = self._current
        if me is None:
            raise Deadlock("a lock was left taken")
        me.waits_for = lock
        while lock.owner is not None:
            self._yield(me)
        me.waits_for = None

    def _look(self, where: str) -> None:
        """Whoever looks runs by himself: no thread goes on meanwhile."""
        current, self._current = self._current, None
        try:
            self.at_point(where)
        finally:
            self._current = current

    def _work(self, worker: Worker, body: Callable[[Worker], None]) -> None:
        worker.wait()
        try:
            if self._error is None:
                body(worker)
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = self._error or error
        worker.has_ended = True
        self._go_on()

    def _yield(self, me: Worker) -> None:
        self._go_on()
        me.wait()
        if self._error is not None:
            raise _Abandoned

    def _go_on(self) -> None:
        """Wake the thread that goes on; it may be the one that calls."""
        left = [worker for worker in self.workers if not worker.has_ended]
        able = left if self._error is not None else [worker for worker in left if worker.can_run]
        if left and not able:
            self._error = Deadlock("; ".join(f"{worker.doing} at {worker.where}" for worker in left))
            able = left
        if not able:
            self._current = None
            self._all_ended.release()
            return
        chosen = self._choose(able)
        self.switches += chosen is not self._current
        self._current = chosen
        chosen.wake()

    def _choose(self, able: list[Worker]) -> Worker:
        """Choose who goes on. Now and then one sleeps for long: much may happen while it is in flight."""
        if self.points >= self._sleeps_until:
            is_time = self.random.random() < 0.1
            self._sleeper = self.random.choice(self.workers) if is_time else None
            self._sleeps_until = self.points + self.random.randrange(20, 250) if is_time else 0
        return self.random.choice([worker for worker in able if worker is not self._sleeper] or able)


class ScheduledLock:
    """Serves as ``threading.Lock``, and as ``threading.RLock`` if ``again``."""

    def __init__(self, scheduler: Scheduler, *, again: bool) -> None:
        self._scheduler = scheduler
        self._again = again
        self.owner: int | None = None
        self._depth = 0

    def acquire(self, blocking: bool = True) -> bool:
        me = threading.get_ident()
        if not blocking and self.owner not in (None, me):
            return False
        if not (self._again and self.owner == me):
            self._scheduler.point("lock")
            if self.owner is not None:
                self._scheduler.wait_for(self)
            self.owner = me
        self._depth += 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if not self._depth:
            self.owner = None
            self._scheduler.point("released")

    def _is_owned(self) -> bool:
        return self.owner == threading.get_ident()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def scheduled_locks(scheduler: Scheduler) -> Iterator[None]:
    """Give the engine locks of the scheduler's, in every image that is opened meanwhile."""
    shim: Any = SimpleNamespace(
        Lock=lambda: ScheduledLock(scheduler, again=False),
        RLock=lambda: ScheduledLock(scheduler, again=True),
        get_ident=threading.get_ident,
    )
    modules = inside.modules_with_locks()
    for module in modules:
        module.threading = shim
    try:
        yield
    finally:
        for module in modules:
            module.threading = threading


class ScheduledDevice(SimulatedDevice):
    """A device whose calls take time: others go on before, after, and in the midst of them."""

    def __init__(self, scheduler: Scheduler, initial: bytes) -> None:
        super().__init__(initial)
        self._scheduler = scheduler
        self.fail()

    def fail(self, *faults: Fault) -> None:
        """Let calls from now on meet these faults; every other barrier takes its time."""
        slow = Fault(
            None, 1, "barrier", EVERYTHING, repeats=True, wait=lambda: self._scheduler.point("in barrier")
        )
        self.faults = FaultPlan(*faults, slow)

    @property
    def has_failed(self) -> bool:
        """True if a call met a fault that was asked for."""
        return self.faults is not None and any(fault.error is not None for fault in self.faults.fired)

    def pread(self, length: int, offset: int) -> bytes:
        self._scheduler.point("pread")
        half = self._half(length)
        found = super().pread(half, offset)
        if half < length:
            self._scheduler.point("in pread")
            found += super().pread(length - half, offset + half)
        self._scheduler.point("pread done")
        return found

    def pwrite(self, buffer: Any, offset: int) -> None:
        self._scheduler.point("pwrite")
        data = bytes(buffer)
        half = self._half(len(data))
        super().pwrite(data[:half], offset)
        if half < len(data):
            self._scheduler.point("in pwrite")
            super().pwrite(data[half:], offset + half)
        self._scheduler.point("pwrite done")

    def truncate(self, size_bytes: int) -> None:
        self._scheduler.point("truncate")
        super().truncate(size_bytes)
        self._scheduler.point("truncate done")

    def allocate(self, offset: int, length: int) -> None:
        self._scheduler.point("allocate")
        super().allocate(offset, length)
        self._scheduler.point("allocate done")

    def punch(self, offset: int, length: int) -> bool:
        self._scheduler.point("punch")
        done = super().punch(offset, length)
        self._scheduler.point("punch done")
        return done

    def barrier(self, name: str) -> None:
        self._scheduler.point(name)
        super().barrier(name)
        self._scheduler.point(f"{name} done")

    def _half(self, length: int) -> int:
        """Return where a call is cut in two, at the end of a sector; most are not."""
        sectors = length // SECTOR
        if sectors < 2 or self._scheduler.random.random() < 0.6:
            return length
        return self._scheduler.random.randrange(1, sectors) * SECTOR
