"""Interrupt the scenarios at every point, or at every nth: ``python -m tests.threads.every_point [n]``.

Prints, for each scenario, how many points there are and how many were tried. The first finding is raised.
"""

from __future__ import annotations

import sys

from tests.threads.scenarios import SCENARIOS
from tests.threads.test_interrupts import count_points, try_point


def main(step: int) -> None:
    total = 0
    for scenario in SCENARIOS:
        for live in (False, True):
            points = count_points(scenario, live=live)
            tried = range(1, points + 1, step)
            for at in tried:
                try_point(scenario, live=live, at=at)
            total += len(tried)
            state = "live" if live else "clean"
            print(f"{scenario.__name__:<24} {state:<6} {points:>6} points {len(tried):>6} tried", flush=True)
    print(f"{total} interrupts, no finding")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
