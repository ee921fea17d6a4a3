"""A longer run: ``python -m tests.fuzz.campaign --count 10000``. Exit status 1 if any case failed."""

from __future__ import annotations

import argparse
import resource
import sys
import traceback
from collections import Counter

from tests.fuzz.handling import handle
from tests.fuzz.hostile import make_case, samples


def main(arguments: list[str] | None = None) -> int:
    """Handle cases by number, print failures and what became of the rest."""
    parser = argparse.ArgumentParser(prog="campaign", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument("--memory", type=int, default=0, metavar="MIB", help="bound the address space")
    parser.add_argument("--verbose", action="store_true", help="print every case and full tracebacks")
    options = parser.parse_args(arguments)
    samples()
    if options.memory:
        limit = options.memory << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes: Counter[str] = Counter()
    failed, slowest = 0, (0.0, -1)
    for number in range(options.first, options.first + options.count):
        case = make_case(number)
        if options.verbose:
            print(case, flush=True)
        try:
            seen, seconds = handle(case)
        except AssertionError as error:
            failed += 1
            print(f"FAILED {error}", flush=True)
            if options.verbose:
                traceback.print_exc()
            continue
        outcomes += seen
        slowest = max(slowest, (seconds, number))
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8}  {outcome}")
    print(f"{options.count} cases, {failed} failed; slowest: case {slowest[1]}, {slowest[0]:.2f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
