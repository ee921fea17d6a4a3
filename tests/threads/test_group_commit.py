"""Flushes of many threads share barriers, and share only those that cover them."""

from __future__ import annotations

import time

import pytest

import jqcow
from jqcow.testing import SimulatedDevice
from tests.support.beside import Others, run_threads

THREADS = 8
ROUNDS = 25
PAGE = 4096
SHARE_MAX = 0.5
"""Barriers per flush that are allowed. One would be no sharing, 1 / THREADS is the best there is; on an idle
machine it is about 0.25 (`tools/bench threads`)."""


class SlowDevice(SimulatedDevice):
    """A device whose barriers take as long as on a slow solid-state disk."""

    def barrier(self, name: str) -> None:
        super().barrier(name)
        time.sleep(0.005)


def barriers_per_flush(device: SlowDevice, *, allocating: bool) -> float:
    size = THREADS * (ROUNDS + 1) * PAGE
    with jqcow.create_on_device(device, size, cluster_size=PAGE, journal_size=1 << 20) as image:
        if not allocating:
            image.pwrite(b"\1" * size, 0)
        image.flush()
        before = device.barriers.total()

        def work(number: int) -> None:
            for index in range(ROUNDS):
                image.pwrite(bytes([number + 1]) * PAGE, (number * ROUNDS + index) * PAGE)
                image.flush()

        run_threads(*(lambda number=number: work(number) for number in range(THREADS)))
        return (device.barriers.total() - before) / (THREADS * ROUNDS)


@pytest.mark.parametrize("allocating", [True, False], ids=["allocating", "in-place"])
def test_eight_threads_share_barriers(allocating: bool) -> None:
    assert barriers_per_flush(SlowDevice(), allocating=allocating) <= SHARE_MAX


def test_fua_shares_barriers_too() -> None:
    device = SlowDevice()
    with jqcow.create_on_device(device, THREADS * PAGE, cluster_size=PAGE) as image:
        image.pwrite(b"\1" * PAGE, 0)
        image.flush()
        before = device.barriers.total()

        def work(number: int) -> None:
            for index in range(ROUNDS):
                image.pwrite(bytes([index + 1]) * PAGE, number * PAGE, fua=True)

        run_threads(*(lambda number=number: work(number) for number in range(THREADS)))
        assert (device.barriers.total() - before) / (THREADS * ROUNDS) <= SHARE_MAX


def test_one_thread_needs_one_barrier_for_each_flush() -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 64 * PAGE, cluster_size=PAGE) as image:
        image.pwrite(b"\1" * PAGE, 0)
        image.flush()
        before = device.barriers.total()
        for index in range(1, 21):
            image.pwrite(b"\2" * PAGE, index * PAGE)
            image.flush()
        assert device.barriers.total() - before == 20


def test_a_flush_is_not_shared_with_a_barrier_that_began_before_its_write() -> None:
    """Each thread looks at what a power cut would leave at the moment when its flush returns."""
    device = SlowDevice()
    with jqcow.create_on_device(device, 8 * 16 * PAGE, cluster_size=PAGE, journal_size=65536) as image:

        def work(number: int) -> None:
            for index in range(12):
                # In place and allocating in turn.
                offset = (number * 16 + index // 2) * PAGE
                data = bytes([number + 1, index + 1]) * (PAGE // 2)
                image.pwrite(data, offset)
                image.flush()
                cut = SimulatedDevice(device.durable_content())
                with jqcow.open_device(cut) as found:
                    assert found.pread(PAGE, offset) == data

        run_threads(*(lambda number=number: work(number) for number in range(8)))


def test_others_go_on_while_a_flush_waits_for_the_device() -> None:
    events: list[str] = []

    class StuckDevice(SimulatedDevice):
        stuck = False

        def barrier(self, name: str) -> None:
            if self.stuck:
                self.stuck = False
                deadline = time.monotonic() + 20
                while len(events) < 3 and time.monotonic() < deadline:
                    time.sleep(0.001)
                events.append("barrier ends")
            super().barrier(name)

    device = StuckDevice()
    with jqcow.create_on_device(device, 64 * PAGE, cluster_size=PAGE) as image:
        image.pwrite(b"\1" * PAGE, 0)
        device.stuck = True
        with Others(image.flush) as flush:
            while device.stuck:
                time.sleep(0.001)
            assert image.pread(PAGE, 0) == b"\1" * PAGE
            events.append("read")
            image.pwrite(b"\2" * PAGE, PAGE)
            events.append("allocating write")
            image.pwrite(b"\3" * PAGE, 0)
            events.append("write in place")
            assert not flush.is_waiting(20)
    assert events == ["read", "allocating write", "write in place", "barrier ends"]
