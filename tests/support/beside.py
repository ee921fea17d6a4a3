"""Threads beside the one that tells a story, and calls of a device that are held up meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Any, Self

from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice

MOMENT_SECONDS = 0.5
"""Who should wait is given so long to show that it does not."""
PATIENCE_SECONDS = 20


class Others:
    """Other threads, as a context manager: its end waits for them, and raises what they raised."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(4)
        self._bodies: list[Future[object]] = []

    def __enter__(self) -> Self:
        return self

    def start(self, body: Callable[[], object]) -> Future[object]:
        """Run ``body`` in a thread of its own."""
        self._bodies.append(self._pool.submit(body))
        return self._bodies[-1]

    def run(self, body: Callable[[], object]) -> None:
        """Run ``body`` in a thread of its own, to its end unless it has to wait for something."""
        wait([self.start(body)], MOMENT_SECONDS)

    def __exit__(self, *exception: object) -> None:
        done, waiting = wait(self._bodies, PATIENCE_SECONDS)
        self._pool.shutdown(wait=False)
        if waiting:
            raise TimeoutError("the threads wait for each other")
        if exception[0] is None:
            for body in done:
                body.result()


class HeldUp(Others):
    """Other threads, of which the first is held up in a call of the device until the end of the block."""

    def __init__(
        self, device: SimulatedDevice, body: Callable[[], object], error: int | None = None, **call: Any
    ) -> None:
        """``call`` is the first such call from here on, as in `Fault`; with an ``error`` it fails then."""
        super().__init__()
        self._device = device
        self._body = body
        self._error = error
        self._call = call
        self._begun = Event()
        self._go_on = Event()

    def __enter__(self) -> Self:
        self._device.faults = FaultPlan(
            Fault(self._error, applied_bytes=0 if self._error else EVERYTHING, wait=self._wait, **self._call)
        )
        body = self.start(self._body)
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
