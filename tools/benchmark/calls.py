"""CPU time per call, beside that of another checkout: processes in turn, and the medians of the ratios."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class CallCost:
    """Median CPU times of one call in microseconds; ``ratio`` is the median of the rounds' own."""

    name: str
    here: float
    there: float
    ratio: float


@dataclass(frozen=True)
class CallCosts:
    """What calls cost in this checkout and in another."""

    rounds: int
    costs: tuple[CallCost, ...]

    def format_table(self) -> str:
        """Return the times for people."""
        lines = [f"{'microseconds of CPU, medians of ' + str(self.rounds):<36} here   there   ratio"]
        lines += [f"{c.name:<34} {c.here:>6.1f}  {c.there:>6.1f}  {c.ratio:>6.2f}" for c in self.costs]
        return "\n".join(lines)


def compare_calls(folder: Path, rounds: int, calls: int, other: Path) -> CallCosts:
    """Measure this checkout and ``other`` in turn, each time in a new process.

    Raises:
        subprocess.CalledProcessError: a measurement failed.
    """
    pairs = [(_measure(folder, calls, ROOT), _measure(folder, calls, other)) for _ in range(rounds)]
    costs = []
    for name in pairs[0][0]:
        here, there = [pair[0][name] for pair in pairs], [pair[1][name] for pair in pairs]
        ratio = statistics.median(mine / its for mine, its in zip(here, there, strict=True))
        costs.append(CallCost(name, statistics.median(here), statistics.median(there), ratio))
    return CallCosts(rounds, tuple(costs))


def _measure(folder: Path, calls: int, checkout: Path) -> dict[str, float]:
    image = folder / "calls.qcow2"
    command = [sys.executable, "-P", str(Path(__file__).with_name("caller.py")), str(image), str(calls)]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    image.unlink()
    answer = json.loads(done.stdout)
    if not Path(answer["jqcow"]).is_relative_to(checkout):
        raise RuntimeError(f"measured {answer['jqcow']}, which is not in {checkout}")
    found: dict[str, float] = answer["microseconds"]
    return found
