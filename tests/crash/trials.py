"""Trials: what must keep every promise on jqcow as it is, and break one on a mutant of it.

A trial is named by a text: a workload of the campaign, cut in every interval (``deep:``: with more states of
each; ``root:``: where sector 0 is in flight, with garbage in its block), a program of the simulation
(``simulation:``), or a scenario (``scenario:``; ``dropping:``: one that is told which barriers do nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from jqcow.testing import (
    SECTOR_BYTES,
    CrashState,
    LabOptions,
    Laboratory,
    SimulatedDevice,
    Workload,
    Write,
    enumerate_states,
)
from jqcow.testing.crash import GARBAGE_BLOCK_BYTES
from tests.crash.judge import Judge
from tests.crash.scenarios import DROPPING_SCENARIOS, SCENARIOS
from tests.crash.simulation import Program
from tests.crash.simulation import run as run_program
from tests.crash.workloads import workload_named
from tests.support.expectation import Expectation

SCENARIO = "scenario:"
DROPPING = "dropping:"
ROOT = "root:"
DEEP = "deep:"
SIMULATION = "simulation:"
KINDS = (SCENARIO, DROPPING, ROOT, DEEP, SIMULATION)
BUDGET = 4
DEEP_BUDGET = 16
ROOT_BUDGET = 32


@dataclass(frozen=True)
class _Garbled:
    """A crash state with garbage in the block of sector 0."""

    state: CrashState

    def content(self) -> bytes:
        return (
            Random(self.state.spec).randbytes(GARBAGE_BLOCK_BYTES)
            + self.state.content()[GARBAGE_BLOCK_BYTES:]
        )

    def data_sectors(self) -> set[int]:
        return self.state.data_sectors() | set(range(GARBAGE_BLOCK_BYTES // SECTOR_BYTES))


def garble_sector_0(workload: Workload[Expectation], drop_barriers: tuple[str, ...] = ()) -> None:
    """Cut a workload wherever sector 0 is in flight: every state of all else, with garbage in its block."""
    device, expectation = workload.make_device(), workload.make_model()
    device.drop_barriers.update(drop_barriers)
    judge = Judge()
    failures: list[Exception] = []

    def cut(name: str, device: SimulatedDevice) -> None:
        if failures or not any(isinstance(change, Write) and not change.offset for change in device.changes):
            return
        for state in enumerate_states(device, budget=ROOT_BUDGET):
            try:
                judge(device.crash(_Garbled(state)), expectation.copy(), state)
            except Exception as error:
                # Kept back: within a barrier the engine would take it for an error of the host.
                failures.append(error)
                return

    device.barrier_listeners.append(cut)
    workload.run(device, expectation)
    if failures:
        raise failures[0]


def is_special(trial: str) -> bool:
    """Return True for all but workloads that are cut with the usual number of states."""
    return trial.startswith(KINDS)


def action_of(trial: str, drop_barriers: tuple[str, ...] = ()) -> Callable[[], object]:
    """Return what runs a trial: it raises where a promise breaks."""
    kind = next((kind for kind in KINDS if trial.startswith(kind)), "")
    name = trial.removeprefix(kind)
    if kind == SCENARIO:
        return SCENARIOS[name]
    if kind == DROPPING:
        return lambda: DROPPING_SCENARIOS[name](drop_barriers)
    if kind == SIMULATION:
        return lambda: run_program(Program.parse(name))
    if kind == ROOT:
        return lambda: garble_sector_0(workload_named(name), drop_barriers)
    laboratory = Laboratory(Judge(), options=LabOptions(budget=DEEP_BUDGET if kind else BUDGET, seed=1))
    return lambda: laboratory.run(workload_named(name), drop_barriers=drop_barriers)


def judge_trial(trial: str, drop_barriers: tuple[str, ...] = ()) -> Exception | None:
    """Run a trial. Returns what broke, None if every promise held."""
    try:
        action_of(trial, drop_barriers)()
    except Exception as failure:
        return failure
    return None
