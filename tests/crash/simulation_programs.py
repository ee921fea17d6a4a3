"""Programs of the simulation out of seeds: what is done to an image, what befalls it, and runs of many."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from random import Random

from tests.crash.simulation import LARGE_ONLY, Program, SimulationFailure, run
from tests.crash.simulation_minimise import minimise
from tests.support.expectation import SECTOR_BYTES, Windows
from tests.support.operations import Step
from tests.support.runs import Outcome, run_parts
from tests.support.starts import SIMULATED

CLUSTER_SIZES = (512, 1024, 4096, 8192, 65536)
CLUSTER_WEIGHTS = (4, 4, 6, 4, 1)
JOURNALS = (64 << 10, 64 << 10, 64 << 10, 72 << 10, 128 << 10)
START_SEEDS = 4
"""A start costs more than a run: so many of each kind are made."""

CALLS = (
    *("pwrite",) * 3, *("any",) * 2, *("barrier",) * 2, "allocate", "punch", "truncate", "pread",
)  # fmt: skip
PHASE_WEIGHTS = (8, 9, 4, 2, 7)
"""Of plain work, transactions, resizes, many flushes, and snapshots."""

RESIZED_TO = (0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 8)
APPLIED: tuple[int | str, ...] = (0, 0, 512, 4096, "all")
ERROR_NAMES = ("EIO", "EIO", "EIO", "ENOSPC", "INT")


def program_of(seed: int, drop_barriers: tuple[str, ...] = ()) -> Program:
    """Return the program of a seed: always the same."""
    random = Random(f"simulation {seed}")
    (cluster_bytes,) = random.choices(CLUSTER_SIZES, CLUSTER_WEIGHTS)
    starts = [name for name in SIMULATED if cluster_bytes > 4096 or name not in LARGE_ONLY]
    start, start_seed = random.choice(starts), random.randrange(START_SEEDS)
    steps = tuple(_Writer(random, cluster_bytes).steps())
    return Program(cluster_bytes, start, start_seed, random.choice(JOURNALS), steps, drop_barriers)


class _Writer:
    """Writes the steps of one program."""

    def __init__(self, random: Random, cluster_bytes: int) -> None:
        self.random = random
        self.cluster_bytes = cluster_bytes
        self.windows = Windows.of(cluster_bytes)
        self.clusters = self.windows.model_bytes // cluster_bytes
        # A few clusters are used again and again: what is freed there is taken there.
        self.favourites = [random.randrange(self.clusters) for _ in range(4)]
        self.troubled = random.random() < 0.7
        self.outgrows = random.random() < 0.08

    def steps(self) -> Iterator[Step]:
        """Yield the steps: phases, each with something that may go wrong."""
        for _ in range(self.random.randint(2, 5)):
            yield from self._trouble()
            phases = (self._plain, self._transaction, self._resizes, self._flushes, self._snapshots)
            yield from self.random.choices(phases, PHASE_WEIGHTS)[0]()
            if self.random.random() < 0.3:
                yield Step(self.random.choice(("close", "kill", "kill", "checkpoint", "look")))
            if self.random.random() < 0.4:
                yield Step("well")
        if self.outgrows:
            yield from self._trouble()
            yield from self._outgrowing()

    # What is done

    def _plain(self) -> Iterator[Step]:
        flush_often = self.random.random()
        for _ in range(self.random.randint(1, 7)):
            yield self._change()
            if self.random.random() < flush_often:
                yield Step(self.random.choice(("flush",) * 6 + ("checkpoint",)))

    def _transaction(self) -> Iterator[Step]:
        yield Step("begin")
        for _ in range(self.random.randint(1, 7)):
            chance = self.random.random()
            if chance < 0.12:
                yield Step("savepoint")
            elif chance < 0.24:
                yield Step("return", (self.random.randrange(3),))
            elif chance < 0.3:
                yield Step(self.random.choice(("flush", "look", "look")))
            elif chance < 0.36:
                yield self._resize()
            elif chance < 0.46:
                yield self._snapshot()
            else:
                yield self._change()
            if self.random.random() < 0.06:
                yield from self._trouble()
        yield Step(self.random.choice(("commit",) * 7 + ("rollback", "abort", "kill")))
        for _ in range(self.random.randrange(3)):
            yield self._change()

    def _resizes(self) -> Iterator[Step]:
        for _ in range(self.random.randint(1, 3)):
            yield self._change()
            yield self._resize()
            yield self._change()
            if self.random.random() < 0.5:
                yield Step("flush")

    def _snapshots(self) -> Iterator[Step]:
        for _ in range(self.random.randint(1, 5)):
            yield self._snapshot()
            for _ in range(self.random.randrange(3)):
                yield self._change()
            if self.random.random() < 0.3:
                yield Step("flush")

    def _snapshot(self) -> Step:
        """Return a step that makes, applies or deletes a snapshot."""
        kind = self.random.choice(("snapshot", "snapshot", "apply", "delete"))
        return Step(kind) if kind == "snapshot" else Step(kind, (self.random.randrange(4),))

    def _flushes(self) -> Iterator[Step]:
        """So many records that an epoch ends."""
        for _ in range(self.random.randint(6, 14)):
            yield self._change()
            yield Step("flush")

    def _outgrowing(self) -> Iterator[Step]:
        yield Step("begin")
        yield self._change()
        yield Step("outgrow")
        yield self._change()
        yield Step("commit")
        yield self._change()
        yield Step("flush")

    def _change(self) -> Step:
        kinds = ("write",) * 8 + ("packed",) * 3 + ("fua", "zeroes", "unmap", "discard", "discard", "unmap")
        kind = self.random.choice(kinds)
        cluster = self.random.choice(self.favourites)
        if self.random.random() < 0.4:
            cluster = self.random.randrange(self.clusters)
        position, length = cluster * self.cluster_bytes, self.cluster_bytes * self.random.randint(1, 4)
        if kind in ("write", "fua") and self.random.random() < 0.75:
            position += self.random.randrange(self.cluster_bytes // SECTOR_BYTES) * SECTOR_BYTES
            length = self.random.choice((1, 2, 3, 8)) * SECTOR_BYTES
            if self.random.random() < 0.15:
                position += self.random.randrange(SECTOR_BYTES)
                length = self.random.randint(1, length)
        return Step(kind, (position, length))

    def _resize(self) -> Step:
        inside = self.random.randrange(self.windows.window_bytes // SECTOR_BYTES) * SECTOR_BYTES
        return Step("resize", (self.random.choice(RESIZED_TO), self.random.choice((0, inside))))

    # What befalls it

    def _trouble(self) -> Iterator[Step]:
        chance = self.random.random()
        if self.troubled and chance < 0.3:
            yield from self._faults()
        elif chance < 0.36:
            yield Step("full", (self.random.randrange(200),))
        if self.random.random() < 0.55:
            yield from self._cut()

    def _faults(self) -> Iterator[Step]:
        """One fault, or several: the later ones strike while the engine deals with the first."""
        at = 1
        for _ in range(self.random.choice((1, 1, 2, 2, 3))):
            at += self._early(16)
            if self.random.random() < 0.1:
                yield Step("tear", (at, self.random.randrange(1 << 8), self._error()))
            else:
                yield self._fail("fail", at)

    def _fail(self, kind: str, at: int) -> Step:
        call = self.random.choice(CALLS)
        if call == "barrier":
            at = 1 + at // 4
        return Step(kind, (call, at, self._error(), self.random.choice(APPLIED)))

    def _error(self) -> str:
        return self.random.choice(ERROR_NAMES)

    def _cut(self) -> Iterator[Step]:
        yield Step("cut", (self._early(40), self._pick()))
        while self.random.random() < 0.4:
            if self.random.random() < 0.7:
                yield Step("recut", (self._early(24), self._pick()))
            else:
                yield self._fail("refail", self._early(24))

    def _early(self, below: int) -> int:
        """Return a number from 1 on, small ones more often."""
        return 1 + min(self.random.randrange(below), self.random.randrange(below))

    def _pick(self) -> int:
        return self.random.randrange(1 << 16)


# Runs of many

SEEDS_AT_ONCE = 20


def program_named(name: str, drop_barriers: tuple[str, ...] = ()) -> Program:
    """Return the program of a seed, or of a replay line. Raises ``ValueError`` if it is neither."""
    return program_of(int(name), drop_barriers) if name.isdecimal() else Program.parse(name)


def describe(failure: SimulationFailure, heading: str) -> str:
    """Return a failure as lines of text."""
    return f"{heading}: {failure}\n  replay: tools/simulate --replay '{failure.program}'"


def run_seeds(seeds: range, drop_barriers: tuple[str, ...] = ()) -> Outcome:
    """Run the programs of some seeds; minimise those that fail."""
    outcome = Outcome(Counter(seeds=len(seeds)))
    for seed in seeds:
        try:
            outcome.counts += run(program_of(seed, drop_barriers)).counts
        except SimulationFailure as failure:
            small = minimise(failure)
            steps = f"{len(failure.program.steps)} steps, minimised to {len(small.program.steps)}"
            outcome.failures.append(describe(small, f"seed {seed}, {steps}"))
    return outcome


def run_all(first: int, count: int, jobs: int, drop_barriers: tuple[str, ...] = ()) -> Iterator[Outcome]:
    """Run ``count`` seeds from ``first`` on; yield the running total as it grows."""
    seeds = range(first, first + count)
    parts = (seeds[start : start + SEEDS_AT_ONCE] for start in range(0, count, SEEDS_AT_ONCE))
    return run_parts(functools.partial(run_seeds, drop_barriers=drop_barriers), parts, jobs)
