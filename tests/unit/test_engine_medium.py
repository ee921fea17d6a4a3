"""The medium: barriers that fail or overlap, and sections that are cut off."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from jqcow.engine.medium import Medium
from jqcow.errors import FormatError, PoisonedError
from jqcow.ondisk.layout import HostOffset
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.beside import is_taken

KIB = 1024
START = HostOffset(0)


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
            self.medium.barrier(name)

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
            overlap.medium.pwrite(b"meanwhile", START)
        overlap.complete("first")
        assert locked == [True] and not is_taken(overlap.medium.lock)


class TestLength:
    """M2: the file grows to what it is told, and a call for less cuts nothing off."""

    def test_growing_and_shrinking(self) -> None:
        medium = Medium(SimulatedDevice(bytes(KIB)))
        medium.grow(4 * KIB)
        assert medium.size() == 4 * KIB
        medium.grow(KIB)
        assert medium.size() == 4 * KIB
        medium.shrink(2 * KIB)
        assert medium.size() == 2 * KIB
        medium.shrink(4 * KIB)
        assert medium.size() == 2 * KIB


class TestSections:
    """M6: what a section planned for leaves the state as good; anything else leaves it in doubt."""

    @pytest.fixture
    def medium(self) -> Medium:
        return Medium(SimulatedDevice(bytes(KIB)))

    def test_in_doubt_from_start_to_end(self, medium: Medium) -> None:
        with medium.lock, medium.section():
            assert medium.in_doubt
        assert not medium.in_doubt

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), FormatError("damaged")])
    def test_planned_errors_pass_through(self, medium: Medium, error: Exception) -> None:
        with pytest.raises(type(error)), medium.lock, medium.section():
            raise error
        assert not medium.in_doubt
        with medium.lock, medium.section():
            pass

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError(), ValueError()])
    def test_anything_else_leaves_it_in_doubt(self, medium: Medium, error: BaseException) -> None:
        with pytest.raises(type(error)), medium.lock, medium.section():
            raise error
        assert medium.in_doubt
        for _ in range(2):
            with pytest.raises(PoisonedError), medium.lock, medium.section():
                pytest.fail("the state is not known")
            with pytest.raises(PoisonedError):
                medium.require_known()
        assert medium.in_doubt and not is_taken(medium.lock)

    def test_listener_that_is_cut_off(self, medium: Medium) -> None:
        def interrupted(_: int) -> None:
            raise KeyboardInterrupt

        medium.listeners.append(interrupted)
        with pytest.raises(KeyboardInterrupt):
            medium.barrier("test")
        assert medium.in_doubt and not medium.poisoned

    def test_sections_do_not_nest(self, medium: Medium) -> None:
        with medium.lock, medium.section(), pytest.raises(PoisonedError), medium.section():
            pytest.fail("the inner one would end the doubt of the outer one")


CHANGES: dict[str, Callable[[Medium], object]] = {
    "pwrite": lambda medium: medium.pwrite(b"x", START),
    "allocate": lambda medium: medium.allocate(START, 512),
    "grow": lambda medium: medium.grow(8 * KIB),
    "shrink": lambda medium: medium.shrink(0),
    "punch": lambda medium: medium.punch(START, 512),
    "barrier": lambda medium: medium.barrier("again"),
}


class TestFailedBarrier:
    """M1: it is final."""

    @pytest.fixture
    def medium(self) -> Medium:
        device = SimulatedDevice(bytes(4 * KIB))
        medium = Medium(device)
        medium.listeners.append(lambda number: pytest.fail(f"barrier {number} is said to have completed"))
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError) as caught:
            medium.barrier("test")
        assert caught.value.errno == errno.EIO
        device.faults = FaultPlan()
        return medium

    @pytest.mark.parametrize("name", CHANGES)
    def test_no_change_reaches_the_device(self, medium: Medium, name: str) -> None:
        assert medium.poisoned
        with pytest.raises(PoisonedError):
            CHANGES[name](medium)
        plan = medium.device.faults  # type: ignore[attr-defined]
        assert plan.total == 0
        assert not is_taken(medium.lock)

    def test_reading_goes_on(self, medium: Medium) -> None:
        buffer = bytearray(b"x" * 16)
        medium.pread_into(memoryview(buffer), HostOffset(4 * KIB - 8))
        assert bytes(buffer) == bytes(16) == medium.pread(16, START)

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
            overlap.medium.pwrite(b"x", START)
