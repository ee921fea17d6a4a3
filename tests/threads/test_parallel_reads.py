"""Reads of many threads wait for the device at the same time."""

from __future__ import annotations

import time
from functools import partial

import jqcow
from jqcow.testing import SimulatedDevice
from tests.support.beside import run_threads

THREADS = 8
READS = 24
PAGE = 4096
LATENCY_SECONDS = 0.005
RATIO_MAX = 1.3


class DistantDevice(SimulatedDevice):
    """A device whose reads take long, any number of them at a time."""

    latency_seconds = 0.0

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        time.sleep(self.latency_seconds)
        super().pread_into(buffer, offset)


def seconds(image: jqcow.Image, threads: int) -> float:
    """Return how long so many threads take, each for a share of its own."""

    def read(number: int) -> None:
        for index in range(READS):
            offset = (number * READS + index) * PAGE
            assert image.pread(PAGE, offset) == bytes([number + 1]) * PAGE

    start = time.perf_counter()
    run_threads(*(partial(read, number) for number in range(threads)))
    return time.perf_counter() - start


def test_eight_threads_take_as_long_as_one() -> None:
    """Nobody waits for the device's data with the lock held."""
    device = DistantDevice()
    with jqcow.create_on_device(device, THREADS * READS * PAGE, cluster_size=PAGE) as image:
        for number in range(THREADS):
            image.pwrite(bytes([number + 1]) * READS * PAGE, number * READS * PAGE)
        image.flush()
        device.latency_seconds = LATENCY_SECONDS
        # A second try for a machine that was busy with something else.
        ratios = [seconds(image, THREADS) / seconds(image, 1)]
        if ratios[0] > RATIO_MAX:
            ratios.append(seconds(image, THREADS) / seconds(image, 1))
    assert min(ratios) <= RATIO_MAX, ratios
