"""Interrupt scenarios at every nth point, 1 by default: ``python -m tests.threads.every_point [n [name]]``.

Prints, for each scenario, how many points there are and how many were tried. The first finding is raised.
"""

from __future__ import annotations

import sys

from tests.threads.scenarios import SCENARIOS
from tests.threads.test_interrupts import count_points, try_point


def main(step: int, names: list[str]) -> None:
    total = 0
    for scenario in [known for known in SCENARIOS if not names or known.__name__ in names]:
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
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, sys.argv[2:])
