"""An exception thrown at any point leaves an image that works on, or one that refuses everything."""

from __future__ import annotations

import contextlib
import errno
import random
import sys
from collections import Counter
from collections.abc import Callable

import pytest

import jqcow
from jqcow.errors import JqcowError, PoisonedError
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice
from tests.support.beside import Others
from tests.threads.interrupts import Interrupted, Interrupter
from tests.threads.scenarios import SCENARIOS, Act, Trial

SAMPLES = 12
"""Points of one scenario that a test run tries; `python -m tests.threads.every_point` tries all."""

CALLS = 12
"""Calls of the device that a test run cuts off in one scenario."""

FAILURES = 15
"""Pairs of a failing call and an interrupt for each scenario."""

SECTOR = 512
CLUSTER = 4096

every_scenario = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda act: act.__name__)
clean_and_live = pytest.mark.parametrize("live", [False, True], ids=["clean", "live"])


class Waiting(FaultPlan):
    """A plan that notes whether the call that it cuts off is one that is waited for without the lock."""

    def __init__(self, trial: Trial, fault: Fault) -> None:
        super().__init__(fault)
        self._trial = trial

    def count(self, call: str, barrier_name: str | None = None) -> Fault | None:
        fault = super().count(call, barrier_name)
        if fault is not None:
            self._trial.may_be_poisoned = call not in ("barrier", "pwrite")
        return fault


def try_point(scenario: Act, *, live: bool, at: int) -> None:
    trial = Trial(live=live)
    interrupter = Interrupter(at)
    assert interrupter.run(lambda: scenario(trial)), "the scenario ended before the point"
    try:
        trial.judge()
    except BaseException as error:
        error.add_note(f"{scenario.__name__}, live {live}, interrupted at point {at}: {interrupter.where}")
        raise


def count_points(scenario: Act, *, live: bool) -> int:
    interrupter = Interrupter()
    trial = Trial(live=live)
    assert not interrupter.run(lambda: scenario(trial))
    trial.judge()
    return interrupter.points


@every_scenario
@clean_and_live
def test_interrupted_between_bytecodes(scenario: Act, live: bool) -> None:
    points = count_points(scenario, live=live)
    chosen = random.Random(f"{scenario.__name__}/{live}").sample(range(1, points + 1), min(points, SAMPLES))
    for at in sorted(chosen):
        try_point(scenario, live=live, at=at)


def count_calls(scenario: Act, *, live: bool) -> int:
    trial = Trial(live=live)
    trial.device.faults = plan = FaultPlan()
    scenario(trial)
    return plan.total


def try_call(scenario: Act, *, live: bool, at: int, applied: int) -> None:
    trial = Trial(live=live)
    trial.device.faults = Waiting(trial, Fault(Interrupted(), at, applied_bytes=applied))
    with pytest.raises(Interrupted):
        scenario(trial)
    trial.device.faults = None
    try:
        trial.judge()
    except BaseException as error:
        error.add_note(
            f"{scenario.__name__}, live {live}, interrupted in call {at}, {applied} bytes of it applied"
        )
        raise


@every_scenario
@clean_and_live
@pytest.mark.parametrize("applied", [0, EVERYTHING], ids=["before", "after"])
def test_interrupted_in_a_call_of_the_device(scenario: Act, live: bool, applied: int) -> None:
    every = range(1, count_calls(scenario, live=live) + 1)
    chosen = random.Random(f"{scenario.__name__}/{live}/{applied}").sample(every, min(len(every), CALLS))
    for at in sorted(chosen):
        try_call(scenario, live=live, at=at, applied=applied)


@every_scenario
def test_interrupted_while_a_failure_of_the_host_is_handled(scenario: Act) -> None:
    """Two faults at once: the device fails a call, and the interrupt comes soon after."""
    trial = Trial(live=True)
    trial.device.faults = plan = FaultPlan()
    scenario(trial)
    chosen = random.Random(scenario.__name__)
    for _ in range(FAILURES if plan.total else 0):
        at, points_later = chosen.randint(1, plan.total), chosen.randint(1, 60)
        try_point_after_failure(scenario, at, points_later, applied=chosen.choice((0, SECTOR, EVERYTHING)))


def try_point_after_failure(scenario: Act, at: int, points_later: int, *, applied: int) -> None:
    trial = Trial(live=True)
    interrupter = Interrupter()

    class Plan(FaultPlan):
        def count(self, call: str, barrier_name: str | None = None) -> Fault | None:
            fault = super().count(call, barrier_name)
            if fault is not None:
                interrupter.at = interrupter.points + points_later
            return fault

    trial.device.faults = Plan(Fault(errno.EIO, at, applied_bytes=applied))
    with contextlib.suppress(OSError):
        interrupter.run(lambda: scenario(trial))
    trial.device.faults = None
    try:
        trial.judge()
    except BaseException as error:
        error.add_note(f"call {at} of the device failed, {points_later} points later: {interrupter.where}")
        raise


def test_the_scenarios_reach_what_they_are_for() -> None:
    barriers: Counter[str] = Counter()
    for scenario in SCENARIOS:
        for live in (False, True):
            trial = Trial(live=live)
            scenario(trial)
            barriers += trial.device.barriers
    names = {
        "live.prepare", "live.root", "flush.data", "flush.ordered", "flush.record",
        "checkpoint.homes", "move.range", "move.root", "close.data", "close.epoch", "close.clear",
        "close.release",
    }  # fmt: skip
    assert names <= barriers.keys()


def overwrite(image: jqcow.Image) -> None:
    image.pwrite(b"B" * CLUSTER, 0)


def overwrite_durably(image: jqcow.Image) -> None:
    image.pwrite(b"B" * CLUSTER, 0, fua=True)


def zero_a_part(image: jqcow.Image) -> None:
    image.write_zeroes(SECTOR, SECTOR)


def allocate(image: jqcow.Image) -> None:
    image.pwrite(b"B" * CLUSTER, 6 * CLUSTER + SECTOR)


def flushed_image() -> tuple[SimulatedDevice, jqcow.Image]:
    """Return an image of which everything is durable, so that the next flush has nothing to do."""
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, 1 << 20, cluster_size=CLUSTER, journal_size=1 << 16)
    image.pwrite(b"A" * 4 * CLUSTER, 0)
    image.flush()
    return device, image


@pytest.mark.parametrize("change", [overwrite, overwrite_durably, zero_a_part, allocate])
def test_a_flush_makes_durable_what_an_interrupted_change_left(change: Callable[[jqcow.Image], None]) -> None:
    """C2: a flush must not rely on the one before the change, at whatever point that was cut off."""
    counting, (_, image) = Interrupter(), flushed_image()
    counting.run(lambda: change(image))
    for at in range(1, counting.points + 1):
        device, image = flushed_image()
        interrupter = Interrupter(at)
        interrupter.run(lambda image=image: change(image))  # type: ignore[misc]
        try:
            shown = image.pread(image.size, 0)
            image.flush()
        except PoisonedError:
            continue
        with jqcow.open_device(SimulatedDevice(device.durable_content())) as reopened:
            assert reopened.pread(image.size, 0) == shown, f"point {at}: {interrupter.where}"


def test_nobody_flushes_into_a_journal_that_closing_gave_up() -> None:
    """Another thread comes between a close that was cut off and the end of the image."""
    counting, (_, image) = Interrupter(), flushed_image()
    counting.run(image.close)
    for at in sorted(random.Random("close").sample(range(1, counting.points + 1), 60)):
        close_beside_a_flush(at)


def close_beside_a_flush(at: int) -> None:
    device, image = flushed_image()
    interrupter, end, flushed = Interrupter(at), image._end, []

    def work() -> None:
        with contextlib.suppress(JqcowError):
            image.pwrite(b"B" * CLUSTER, 80 * CLUSTER)
            image.flush()
            flushed.append(at)

    def end_later() -> None:
        before = sys.gettrace()
        sys.settrace(None)
        with Others(work) as others:
            others.is_waiting(0.05 if image._engine.guard.is_alone else 5)
            sys.settrace(before)
            end()

    image._end = end_later  # type: ignore[method-assign]
    interrupter.run(image.close)
    with jqcow.open_device(device.killed(), "r+") as reopened:
        assert reopened.check().ok
        assert reopened.pread(CLUSTER, 0) == b"A" * CLUSTER
        if flushed:
            assert reopened.pread(CLUSTER, 80 * CLUSTER) == b"B" * CLUSTER, f"point {at}: {interrupter.where}"
