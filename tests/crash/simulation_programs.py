"""Programs of the simulation out of seeds: a story that chance tells anew for each, and runs of many."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from random import Random

from tests.crash.simulation import LARGE_ONLY, Program, SimulationFailure, run
from tests.crash.simulation_minimise import minimise
from tests.support.expectation import Windows
from tests.support.operations import Step
from tests.support.runs import Outcome, run_parts
from tests.support.starts import SIMULATED
from tests.support.telling import Teller

CLUSTER_SIZES = (512, 1024, 4096, 8192, 65536)
CLUSTER_WEIGHTS = (4, 4, 6, 4, 1)
JOURNALS = (64 << 10, 64 << 10, 64 << 10, 72 << 10, 128 << 10)
START_SEEDS = 4
"""A start costs more than a run: so many of each kind are made."""


def either(*weighted: tuple[int, str]) -> str:
    """Return words that do one of some texts; each has a weight."""
    return f"one{{ {' | '.join(text for weight, text in weighted for _ in range(weight))} }}"


# What is done

# A few clusters are used again and again: what is freed there is taken there.
FAVOURITES = "a=4w%c b=4w%c d=4w%c e=4w%c"
CHANGE = "p=a|b|d|e|4w%c|4w%c|4w%c " + either(
    (2, "write:p:1..4c"),
    (5, "write:p+c%s:s|2s|3s|8s"),
    (1, "write:p+c%s+0..511:1..512|1..1536|1..4096"),
    (1, "fua:p+c%s:s|2s|3s|8s"),
    (3, "packed:p:1..4c"),
    (1, "zeroes:p:1..4c"),
    (2, "unmap:p:1..4c"),
    (2, "discard:p:1..4c"),
)
RESIZE = "resize:0|1|1|2|2|3|3|4|4|4|8:0|w%s"
SNAPSHOT = either((2, "snapshot"), (1, "apply:0..3"), (1, "delete:0..3"))

INSIDE = either(
    (27, CHANGE), (6, "savepoint"), (6, "return:0..2"), (1, "flush"), (2, "look"), (3, RESIZE), (5, SNAPSHOT)
)
END = either((7, "commit"), (1, "rollback"), (1, "abort"), (1, "kill"))

PLAIN = f"1..7*{{ {CHANGE} 0.1|0.5|0.9{{ {either((6, 'flush'), (1, 'checkpoint'))} }} }}"
TRANSACTION = f"begin 1..7*{{ {INSIDE} 0.06{{ TROUBLE }} }} {END} 0..2*{{ {CHANGE} }}"
RESIZES = f"1..3*{{ {CHANGE} {RESIZE} {CHANGE} 0.5{{ flush }} }}"
FLUSHES = f"6..14*{{ {CHANGE} flush }}"
"""So many records that an epoch ends."""
SNAPSHOTS = f"1..5*{{ {SNAPSHOT} 0..2*{{ {CHANGE} }} 0.3{{ flush }} }}"
OUTGROWING = f"begin {CHANGE} outgrow {CHANGE} commit {CHANGE} flush"

# What befalls it. Small numbers come more often: so many calls has hardly any step.

ERROR = "EIO|EIO|EIO|ENOSPC|INT"
APPLIED = "0|0|512|4096|all"
CALL = "pwrite|pwrite|pwrite|any|any|allocate|punch|truncate|pread"
FAULT = "t=t+1..4|t+1..16 " + either(
    (7, f"fail:{CALL}:t:{ERROR}:{APPLIED}"),
    (2, f"fail:barrier:1+t/4:{ERROR}:{APPLIED}"),
    (1, f"tear:t:0..255:{ERROR}"),
)
FAULTS = f"t=0 {FAULT} 0.6{{ {FAULT} 0.33{{ {FAULT} }} }}"
"""One fault, or several: the later ones strike while the engine deals with the first."""

AGAIN = either(
    (14, "recut:1..6|1..24:0..65535"),
    (5, f"refail:{CALL}:1..6|1..24:{ERROR}:{APPLIED}"),
    (1, f"refail:barrier:1..6:{ERROR}:{APPLIED}"),
)
CUT = f"0.55{{ cut:1..10|1..40:0..65535 0.4{{ {AGAIN} 0.4{{ {AGAIN} }} }} }}"
CALM = f"0.36{{ full:0..199 }} {CUT}"
TROUBLED = f"{either((5, FAULTS), (1, 'full:0..199'), (9, ''))} {CUT}"

PHASE = either((8, PLAIN), (9, TRANSACTION), (4, RESIZES), (2, FLUSHES), (7, SNAPSHOTS))
AFTERWARDS = either((1, "close"), (2, "kill"), (1, "checkpoint"), (1, "look"))
TURN = f"TROUBLE {PHASE} 0.3{{ {AFTERWARDS} }} 0.4{{ well }}"
PROGRAM = f"{FAVOURITES} 2..5*{{ {TURN} }} 0.08{{ TROUBLE {OUTGROWING} }}"
PROGRAMS = either((7, PROGRAM.replace("TROUBLE", TROUBLED)), (3, PROGRAM.replace("TROUBLE", CALM)))


class Writer(Teller):
    """Writes down what it tells."""

    def __init__(self, cluster_bytes: int, random: Random) -> None:
        """Start with no step."""
        super().__init__(cluster_bytes, Windows.of(cluster_bytes).window_bytes, random)
        self.steps: list[Step] = []

    def perform(self, step: Step) -> None:
        """Write a step down."""
        self.steps.append(step)


def program_of(seed: int, drop_barriers: tuple[str, ...] = ()) -> Program:
    """Return the program of a seed: always the same."""
    return program_drawn(Random(f"simulation {seed}"), drop_barriers)


def program_drawn(random: Random, drop_barriers: tuple[str, ...] = ()) -> Program:
    """Return the program that chance tells."""
    (cluster_bytes,) = random.choices(CLUSTER_SIZES, CLUSTER_WEIGHTS)
    starts = [name for name in SIMULATED if cluster_bytes > 4096 or name not in LARGE_ONLY]
    start, start_seed, journal = random.choice(starts), random.randrange(START_SEEDS), random.choice(JOURNALS)
    writer = Writer(cluster_bytes, random)
    writer.play(PROGRAMS)
    return Program(cluster_bytes, start, start_seed, journal, tuple(writer.steps), drop_barriers)


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
