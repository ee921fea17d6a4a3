"""Threads beside the one that tells a story, and calls of a device that are held up meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Event, Thread
from typing import Any, Protocol, Self

from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice

MOMENT_SECONDS = 0.5
"""Who should wait is given so long to show that it does not."""
PATIENCE_SECONDS = 20
LONG_WORK_SECONDS = 120

Body = Callable[[], object]


class Others:
    """Other threads, as a context manager: its end waits for them, and raises what they raised.

    A deadlock is a failure; the threads that wait for each other die with the process.
    """

    def __init__(self, *bodies: Body, patience: float = PATIENCE_SECONDS) -> None:
        """Take what is started when the block begins."""
        self._first = bodies
        self._patience = patience
        self._bodies: list[Future[object]] = []

    def __enter__(self) -> Self:
        for body in self._first:
            self.start(body)
        return self

    def start(self, body: Body) -> Future[object]:
        """Run ``body`` in a thread of its own."""
        future: Future[object] = Future()
        self._bodies.append(future)
        Thread(target=_run, args=(future, body), daemon=True).start()
        return future

    def run(self, body: Body) -> None:
        """Run ``body`` in a thread of its own, to its end unless it has to wait for something."""
        wait([self.start(body)], MOMENT_SECONDS)

    def is_waiting(self, seconds: float = 0.2) -> bool:
        """Return True if a body has not ended after that time."""
        return bool(wait(self._bodies, seconds).not_done)

    def __exit__(self, *exception: object) -> None:
        done, waiting = wait(self._bodies, self._patience)
        if exception[0] is None:
            for body in self._bodies:
                if body in done:
                    body.result()
        if waiting:
            raise TimeoutError("the threads wait for each other")


def _run(future: Future[object], body: Body) -> None:
    try:
        future.set_result(body())
    except BaseException as error:
        future.set_exception(error)


def run_threads(*bodies: Body) -> None:
    """Run the bodies at the same time; raise what one of them raised."""
    with Others(*bodies, patience=LONG_WORK_SECONDS):
        pass


class HeldUp(Others):
    """Other threads, of which the first is held up in a call of the device until the end of the block."""

    def __init__(self, device: SimulatedDevice, body: Body, error: int | None = None, **call: Any) -> None:
        """``call`` is the first such call from here on, as in `Fault`; with an ``error`` it fails then."""
        super().__init__(body)
        self._device = device
        self._error = error
        self._call = call
        self._begun = Event()
        self._go_on = Event()

    def __enter__(self) -> Self:
        self._device.faults = FaultPlan(
            Fault(self._error, applied_bytes=0 if self._error else EVERYTHING, wait=self._wait, **self._call)
        )
        super().__enter__()
        (body,) = self._bodies
        while not self._begun.wait(MOMENT_SECONDS):
            if body.done():
                body.result()
                raise RuntimeError(f"there was no such call: {self._call}")
        return self

    def _wait(self) -> None:
        self._begun.set()
        self._go_on.wait(PATIENCE_SECONDS)

    def let_go(self) -> None:
        """End the wait, and wait for the body that was held up."""
        self._go_on.set()
        wait(self._bodies[:1], PATIENCE_SECONDS)

    def __exit__(self, *exception: object) -> None:
        self._go_on.set()
        super().__exit__(*exception)


class _Lock(Protocol):
    def acquire(self, blocking: bool = True) -> bool: ...

    def release(self) -> None: ...


def is_taken(lock: _Lock) -> bool:
    """Return True unless another thread than the caller's could take the lock now."""
    could_take: list[bool] = []

    def take() -> None:
        could_take.append(lock.acquire(blocking=False))
        if could_take[0]:
            lock.release()

    run_threads(take)
    return not could_take[0]
