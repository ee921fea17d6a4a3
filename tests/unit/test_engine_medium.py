"""The medium: barriers that fail or overlap, and how far the file may reach after a crash."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from jqcow.engine.medium import Medium
from jqcow.errors import PoisonedError
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice
from tests.support.held import is_taken

KIB = 1024


class GatedDevice(SimulatedDevice):
    """Each barrier reports that it has begun, and completes when its gate is opened."""

    def __init__(self, initial: bytes = b"") -> None:
        super().__init__(initial)
        self.begun = {name: threading.Event() for name in ("first", "second")}
        self.gates = {name: threading.Event() for name in ("first", "second")}

    def barrier(self, name: str) -> None:
        self.begun[name].set()
        assert self.gates[name].wait(timeout=60)
        super().barrier(name)


class Overlap:
    """Two barriers of two threads: the second starts while the first is under way."""

    def __init__(self, size_bytes: int = 0) -> None:
        self.device = GatedDevice(bytes(size_bytes))
        self.medium = Medium(self.device)
        self.completed: list[int] = []
        self.medium.listeners.append(self.completed.append)
        self._threads = {
            name: threading.Thread(target=self._place, args=(name,)) for name in self.device.gates
        }

    def _place(self, name: str) -> None:
        with suppress(OSError):
            self.medium.barrier(name, unlocked=True)

    def start(self, name: str) -> None:
        """Start a barrier; return when it has its number. The device gets them one after the other."""
        number = self.medium.barriers_started + 1
        self._threads[name].start()
        while self.medium.barriers_started < number:
            time.sleep(0.001)
        if name == "first":
            assert self.device.begun[name].wait(timeout=60)

    def complete(self, name: str) -> None:
        """Let a barrier complete; return when its listeners have been told."""
        self.device.gates[name].set()
        self._threads[name].join()


class TestNumbers:
    def test_listeners_are_told_the_number_of_each(self) -> None:
        medium = Medium(SimulatedDevice())
        told: list[int] = []
        medium.listeners.append(told.append)
        assert medium.barriers_started == 0
        for _ in range(3):
            medium.barrier("test")
        assert told == [1, 2, 3] and medium.barriers_started == 3

    def test_barriers_are_numbered_as_they_start(self) -> None:
        """M3: a number tells what was changed before its barrier began."""
        overlap = Overlap()
        overlap.start("first")
        assert overlap.medium.barriers_started == 1
        overlap.start("second")
        assert overlap.medium.barriers_started == 2
        assert not overlap.device.begun["second"].is_set(), "M4: two barriers at a time"
        overlap.complete("first")
        overlap.complete("second")
        assert overlap.completed == [1, 2]

    def test_none_follows_a_failed_one(self) -> None:
        """M4: it would succeed, as the kernel tells of lost pages once."""
        overlap = Overlap()
        overlap.device.faults = FaultPlan(Fault(errno.EIO, barrier_name="first"))
        overlap.start("first")
        overlap.start("second")
        overlap.complete("first")
        overlap.complete("second")
        assert not overlap.device.begun["second"].is_set()
        assert overlap.completed == []

    def test_the_lock_is_free_while_the_device_works(self) -> None:
        """And taken while the listeners are told."""
        overlap = Overlap()
        locked: list[bool] = []
        overlap.medium.listeners.append(lambda _: locked.append(is_taken(overlap.medium.lock)))
        overlap.start("first")
        with overlap.medium.lock:
            overlap.medium.pwrite(b"meanwhile", 0)
        overlap.complete("first")
        assert locked == [True] and not is_taken(overlap.medium.lock)

    def test_the_callers_lock_is_left_alone(self) -> None:
        medium = Medium(SimulatedDevice())
        with medium.lock:
            medium.barrier("test")
            assert is_taken(medium.lock)


class TestHighWater:
    """M2: a range past it reads as zeros in every crash state."""

    def test_every_way_to_grow_raises_it(self) -> None:
        medium = Medium(SimulatedDevice(bytes(KIB)))
        assert medium.high_water == KIB
        medium.pwrite(b"x" * KIB, KIB)
        assert medium.high_water == 2 * KIB
        medium.allocate(2 * KIB, KIB)
        assert medium.high_water == 3 * KIB
        medium.grow(4 * KIB)
        assert medium.high_water == 4 * KIB
        medium.grow(KIB)
        medium.pwrite(b"x", 0)
        assert medium.high_water == 4 * KIB

    @pytest.mark.parametrize("applied_bytes", [0, 512, EVERYTHING])
    def test_failed_write_raises_it_too(self, applied_bytes: int) -> None:
        """Nobody knows how much of it was done."""
        device = SimulatedDevice()
        medium = Medium(device)
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", applied_bytes=applied_bytes))
        with pytest.raises(OSError):
            medium.pwrite(b"x" * KIB, 0)
        assert medium.high_water == KIB

    def test_shrinking_lowers_it_under_a_barrier_only(self) -> None:
        medium = Medium(SimulatedDevice())
        medium.pwrite(b"x" * 4 * KIB, 0)
        medium.shrink(KIB)
        assert medium.high_water == 4 * KIB
        medium.barrier("test")
        assert medium.high_water == KIB

    def test_failed_barrier_leaves_it(self) -> None:
        device = SimulatedDevice()
        medium = Medium(device)
        medium.pwrite(b"x" * 4 * KIB, 0)
        medium.shrink(KIB)
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError):
            medium.barrier("test")
        assert medium.high_water == 4 * KIB

    def test_written_and_cut_off_during_a_barrier(self) -> None:
        """The barrier does not cover the cutting: the bytes may show up after a crash."""
        overlap = Overlap()
        overlap.start("first")
        overlap.medium.pwrite(b"x" * 4 * KIB, 0)
        overlap.medium.shrink(KIB)
        overlap.complete("first")
        assert overlap.medium.high_water == 4 * KIB

    @pytest.mark.parametrize("cut_off", ["before both", "between", "during both"])
    def test_overlapping_barriers(self, cut_off: str) -> None:
        """At no moment is it below a size that a crash may leave."""
        overlap = Overlap()
        medium, device = overlap.medium, overlap.device
        medium.pwrite(b"x" * 4 * KIB, 0)

        def cut_if(moment: str) -> None:
            if cut_off == moment:
                medium.shrink(KIB)

        cut_if("before both")
        overlap.start("first")
        cut_if("between")
        overlap.start("second")
        cut_if("during both")
        enough = {"before both": 1, "between": 2, "during both": 3}[cut_off]
        overlap.complete("first")
        if enough > 1:
            assert medium.high_water == 4 * KIB
        overlap.complete("second")
        assert device.size() == KIB
        # The newer barrier covers all that the older one does.
        assert medium.high_water == (KIB if enough <= 2 else 4 * KIB)

    def test_growth_during_the_newer_barrier(self) -> None:
        overlap = Overlap(KIB)
        overlap.start("first")
        overlap.start("second")
        overlap.medium.pwrite(b"x" * KIB, 7 * KIB)
        overlap.medium.shrink(KIB)
        overlap.complete("first")
        assert overlap.medium.high_water == 8 * KIB
        overlap.complete("second")
        assert overlap.medium.high_water == 8 * KIB


CHANGES: dict[str, Callable[[Medium], object]] = {
    "pwrite": lambda medium: medium.pwrite(b"x", 0),
    "allocate": lambda medium: medium.allocate(0, 512),
    "grow": lambda medium: medium.grow(8 * KIB),
    "shrink": lambda medium: medium.shrink(0),
    "punch": lambda medium: medium.punch(0, 512),
    "barrier": lambda medium: medium.barrier("again"),
    "unlocked barrier": lambda medium: medium.barrier("again", unlocked=True),
}


class TestFailedBarrier:
    """M1: it is final."""

    @pytest.fixture(params=[False, True], ids=["locked", "unlocked"])
    def medium(self, request: pytest.FixtureRequest) -> Medium:
        device = SimulatedDevice(bytes(4 * KIB))
        medium = Medium(device)
        medium.listeners.append(lambda number: pytest.fail(f"barrier {number} is said to have completed"))
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError) as caught:
            medium.barrier("test", unlocked=request.param)
        assert caught.value.errno == errno.EIO
        device.faults = FaultPlan()
        return medium

    @pytest.mark.parametrize("name", CHANGES)
    def test_no_change_reaches_the_device(self, medium: Medium, name: str) -> None:
        assert medium.poisoned and medium.read_only
        with pytest.raises(PoisonedError):
            CHANGES[name](medium)
        plan = medium.device.faults  # type: ignore[attr-defined]
        assert plan.total == 0
        assert not is_taken(medium.lock)

    def test_reading_goes_on(self, medium: Medium) -> None:
        buffer = bytearray(b"x" * 16)
        medium.pread_into(memoryview(buffer), 4 * KIB - 8)
        assert bytes(buffer) == bytes(16) == medium.pread(16, 0)

    def test_an_exception_from_outside_is_none(self) -> None:
        """An interrupted barrier has not completed; the next one covers the same."""
        device = SimulatedDevice(bytes(4 * KIB))
        medium = Medium(device)
        told: list[int] = []
        medium.listeners.append(told.append)
        device.faults = FaultPlan(Fault(KeyboardInterrupt(), call="barrier"))
        with pytest.raises(KeyboardInterrupt):
            medium.barrier("test")
        assert not medium.poisoned and told == []
        medium.barrier("test")
        assert told == [2]

    def test_failure_while_another_barrier_is_under_way(self) -> None:
        """The other one may complete: what it covers is durable. Nothing else begins."""
        overlap = Overlap()
        overlap.start("first")
        overlap.medium.poisoned = True
        overlap.complete("first")
        assert overlap.completed == [1]
        with pytest.raises(PoisonedError):
            overlap.medium.pwrite(b"x", 0)
