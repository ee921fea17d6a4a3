"""Runs of the simulation, seed after seed, on several processes."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.support.simulation import Program, SimulationFailure, run
from tests.support.simulation_minimise import minimise
from tests.support.simulation_programs import program_of

SEEDS_AT_ONCE = 20


@dataclass
class Outcome:
    """What came of some seeds. ``failures`` are texts, each with a line for a replay."""

    seeds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        """Take the outcome of other seeds in."""
        self.seeds += other.seeds
        self.counts += other.counts
        self.failures += other.failures


def program_named(name: str, drop_barriers: tuple[str, ...] = ()) -> Program:
    """Return the program of a seed, or of a replay line. Raises ``ValueError`` if it is neither."""
    return program_of(int(name), drop_barriers) if name.isdecimal() else Program.parse(name)


def describe(failure: SimulationFailure, heading: str) -> str:
    """Return a failure as lines of text."""
    return f"{heading}: {failure}\n  replay: tools/simulate --replay '{failure.program}'"


def run_seeds(seeds: range, drop_barriers: tuple[str, ...] = ()) -> Outcome:
    """Run the programs of some seeds; minimise those that fail."""
    outcome = Outcome(seeds=len(seeds))
    for seed in seeds:
        try:
            outcome.counts += run(program_of(seed, drop_barriers)).counts
        except SimulationFailure as failure:
            steps = len(failure.program.steps)
            small = minimise(failure)
            heading = f"seed {seed}, {steps} steps, minimised to {len(small.program.steps)}"
            outcome.failures.append(describe(small, heading))
    return outcome


def run_all(first: int, count: int, jobs: int, drop_barriers: tuple[str, ...] = ()) -> Iterator[Outcome]:
    """Run ``count`` seeds from ``first`` on; yield the running total as it grows."""
    total, started = Outcome(), time.monotonic()
    ends = range(first, first + count, SEEDS_AT_ONCE)
    chunks = [range(start, min(start + SEEDS_AT_ONCE, first + count)) for start in ends]
    work = functools.partial(run_seeds, drop_barriers=drop_barriers)
    with ProcessPoolExecutor(jobs) as pool:
        for outcome in pool.map(work, chunks):
            total.add(outcome)
            total.seconds = time.monotonic() - started
            yield total
