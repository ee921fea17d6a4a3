"""Making a failing program small: steps are left out and numbers made smaller while it fails alike.

Delta debugging: chunks of steps first, halves, quarters, down to single ones; then the numbers of each step,
and what the program starts from. The result is 1-minimal in its steps: without any one of them it passes, or
fails in another way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.crash.simulation import Program, SimulationFailure, run
from tests.support.operations import Step

MAX_RUNS = 3000
JOURNAL_BYTES = 64 << 10
SIMPLE_STARTS = ("empty", "used")


def minimise(failure: SimulationFailure, max_runs: int = MAX_RUNS) -> SimulationFailure:
    """Return a failure of the same nature whose program is small. Stops early after ``max_runs`` runs."""
    search = _Search(failure, max_runs)
    search.run()
    return search.best


class _Search:
    def __init__(self, failure: SimulationFailure, max_runs: int) -> None:
        self.best = failure
        self.runs_left = max_runs

    def run(self) -> None:
        """Try whatever makes it smaller, until nothing does."""
        before = None
        while before != self.best.program and self.runs_left:
            before = self.best.program
            self._drop_steps()
            self._take_all(lambda: _simpler_starts(self.best.program))
            for number in range(len(self.best.program.steps)):
                self._take_all(functools.partial(self._with_smaller_step, number))

    def _fails(self, program: Program) -> bool:
        """Run a candidate; keep it if it fails alike."""
        if not self.runs_left:
            return False
        self.runs_left -= 1
        try:
            run(program)
        except SimulationFailure as failure:
            if failure.nature == self.best.nature:
                self.best = failure
                return True
        return False

    def _drop_steps(self) -> None:
        size = max(1, len(self.best.program.steps) // 2)
        while True:
            dropped = self._drop_chunks(size)
            if size > 1:
                size //= 2
            elif not dropped:
                return

    def _drop_chunks(self, size: int) -> bool:
        """Drop each chunk of that size that is not needed, last ones first. Return True if there was one."""
        dropped = False
        start = len(self.best.program.steps) - size
        while start > -size:
            steps = self.best.program.steps
            kept = steps[: max(0, start)] + steps[start + size :]
            dropped |= self._fails(replace(self.best.program, steps=kept))
            start -= size
        return dropped

    def _with_smaller_step(self, number: int) -> Iterator[Program]:
        program = self.best.program
        for smaller in _smaller_steps(program.steps[number]):
            yield replace(program, steps=(*program.steps[:number], smaller, *program.steps[number + 1 :]))

    def _take_all(self, candidates: Callable[[], Iterator[Program]]) -> None:
        """Take the first candidate that fails, and go on from there."""
        while any(self._fails(candidate) for candidate in candidates()):
            pass


def _simpler_starts(program: Program) -> Iterator[Program]:
    if program.journal_bytes != JOURNAL_BYTES:
        yield replace(program, journal_bytes=JOURNAL_BYTES)
    if program.start_seed:
        yield replace(program, start_seed=0)
    for start in SIMPLE_STARTS:
        if program.start == start:
            return
        yield replace(program, start=start)


def _smaller_steps(step: Step) -> Iterator[Step]:
    for place, value in enumerate(step.arguments):
        if not isinstance(value, int):
            continue
        # A range that begins where a cluster or a sector does is easier to follow.
        candidates = {0, 1, value // 2, value - value % 4096, value - value % 512}
        if value < 64:
            candidates.add(value - 1)
        for less in sorted(candidates):
            if 0 <= less < value:
                yield step._replace(arguments=(*step.arguments[:place], less, *step.arguments[place + 1 :]))
