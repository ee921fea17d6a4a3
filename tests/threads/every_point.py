"""Interrupt scenarios at every nth point, 1 by default: ``python -m tests.threads.every_point [n [name]]``.

Every nth call of the device is cut off too, before it does anything and after it has done all.
Prints, for each scenario, how many points and calls there are, and how many were tried; a finding is raised.
"""

from __future__ import annotations

import sys

from jqcow.testing import EVERYTHING
from tests.threads.scenarios import SCENARIOS
from tests.threads.test_interrupts import count_calls, count_points, try_call, try_point


def main(step: int, names: list[str]) -> None:
    total = 0
    for scenario in [known for known in SCENARIOS if not names or known.__name__ in names]:
        for live in (False, True):
            points = count_points(scenario, live=live)
            tried = range(1, points + 1, step)
            for at in tried:
                try_point(scenario, live=live, at=at)
            calls = count_calls(scenario, live=live)
            cut = range(1, calls + 1, step)
            for at in cut:
                for applied in (0, EVERYTHING):
                    try_call(scenario, live=live, at=at, applied=applied)
            total += len(tried) + 2 * len(cut)
            state = "live" if live else "clean"
            told = f"{points:>6} points {len(tried):>6} tried {calls:>4} calls {len(cut):>4} tried"
            print(f"{scenario.__name__:<24} {state:<6} {told}", flush=True)
    print(f"{total} interrupts, no finding")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, sys.argv[2:])
