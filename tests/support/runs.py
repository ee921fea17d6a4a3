"""Long runs on several processes: what comes of the parts adds up, and is told on the way."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from jqcow.testing import Ledger

FAILURES_MAX = 10
Part = TypeVar("Part")


def part_of(text: str) -> tuple[int, int]:
    """Parse ``K/N``, the kth of N equal parts; raises `ValueError` for what is none."""
    number, _, count = text.partition("/")
    if not 1 <= int(number) <= int(count):
        raise ValueError(text)
    return int(number), int(count)


@dataclass
class Outcome:
    """What came of a run or a part of it. ``failures`` are texts, each with a line for a replay."""

    counts: Counter[str] = field(default_factory=Counter)
    ledger: Ledger = field(default_factory=Ledger, compare=False)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        """Take the outcome of another part in."""
        self.counts += other.counts
        self.ledger.merge(other.ledger)
        self.failures += other.failures


Total = TypeVar("Total", bound=Outcome)


def run_parts(
    work: Callable[[Part], Total],
    parts: Iterable[Part],
    jobs: int,
    is_met: Callable[[Total], bool] = lambda total: False,
    new_total: Callable[[], Total] = Outcome,  # type: ignore[assignment]
) -> Iterator[Total]:
    """Do parts, until there are no more, the total is enough, or ten failed; yield the total after each."""
    total, started, left = new_total(), time.monotonic(), iter(parts)
    running: set[Future[Total]] = set()
    with ProcessPoolExecutor(jobs) as pool:
        while True:
            if len(total.failures) < FAILURES_MAX and not is_met(total):
                running |= {pool.submit(work, part) for part in islice(left, jobs - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                total.add(future.result())
            total.seconds = time.monotonic() - started
            yield total


def show(totals: Iterable[Total], describe: Callable[[Total], str]) -> Total:
    """Show a run as it goes on: failures on the standard output, the rest beside. Return the whole of it."""
    shown = 0
    for total in totals:
        print(f"\r{describe(total)}, {total.seconds:.0f} s ", end="", file=sys.stderr, flush=True)
        for failure in total.failures[shown:]:
            print(f"\n{failure}", flush=True)
        shown = len(total.failures)
    print(file=sys.stderr)
    return total


def table(names: Sequence[str], rows: Iterable[tuple[str | float, ...]]) -> Iterator[str]:
    """Yield rows as aligned lines, under the names of their columns; the first column is text."""
    cells = [[value if isinstance(value, str) else f"{value:,}" for value in row] for row in rows]
    lines = [list(names), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        numbers = (number.rjust(width) for number, width in zip(others, widths[1:], strict=True))
        yield "  ".join((first.ljust(widths[0]), *numbers))
