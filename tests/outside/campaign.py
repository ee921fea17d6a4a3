"""The long runs: recorded processes crashed between their real barriers, real processes and guests killed.

    python -m tests.outside.campaign recordings --seed 1 --sessions 60 --budget 20
    python -m tests.outside.campaign kills --seed 1 --kills 300
    python -m tests.outside.campaign guests --seed 1 --kills 20

Each prints its figures and its seed; the first broken promise ends it with status 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from jqcow.testing import Ledger
from tests.outside.guest import kill_guests
from tests.outside.kills import kill_writers
from tests.outside.sessions import crash, record_session
from tests.outside.test_system_calls import changes_during_barriers, check_recording, messages_in
from tests.support import qemu

THREADED_EVERY = 3


def run_recordings(seed: int, sessions: int, budget: int) -> None:
    """Record sessions and judge their crash states; every third one has four threads."""
    ledger, start = Ledger(), time.monotonic()
    calls: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    during = 0
    for number in range(seed, seed + sessions):
        threads = 4 if number % THREADED_EVERY == 0 else 1
        with tempfile.TemporaryDirectory(prefix="jqcow-outside-") as folder:
            session = record_session(Path(folder), number, threads=threads)
            check_recording(session)
            if number % 2 == 0:
                complaint = qemu.complaint(Path(folder, "image.qcow2"))
                assert not complaint, complaint
        during += changes_during_barriers(session)
        operations += messages_in(session)
        for run in session.runs:
            calls += run.recording.calls
        crash(session, ledger, budget=budget, seed=number)
        print(f"{session.name}: {ledger.distinct_of(session.name)} states", flush=True)
    print(ledger.report().format_table())
    print(f"calls on the images: {_listed(calls)}")
    print(f"messages: {_listed(operations)}")
    print(f"changes during a barrier of another thread: {during}")
    print(f"{sessions} sessions from seed {seed} in {time.monotonic() - start:.0f} s, nothing broken")


def run_kills(seed: int, kills: int) -> None:
    """Kill writers and judge what they leave."""
    with tempfile.TemporaryDirectory(prefix="jqcow-kills-") as folder:
        report = kill_writers(Path(folder), seed, kills)
    for name, value in vars(report).items():
        print(f"{name.replace('_', ' '):24} {value:10,.0f}")
    print(f"{kills} kills from seed {seed}, nothing broken")


def run_guests(seed: int, kills: int) -> None:
    """Kill guests with the servers of their disk, and judge what they leave."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="jqcow-guests-") as folder:
        report = kill_guests(Path(folder), seed, kills)
    for name, value in vars(report).items():
        print(f"{name.replace('_', ' '):24} {value:10,}")
    print(f"{kills} kills from seed {seed} in {time.monotonic() - start:.0f} s, nothing broken")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="campaign-outside")
    parser.add_argument("what", choices=("recordings", "kills", "guests"))
    parser.add_argument("--seed", type=int, default=int(time.time()) % 1_000_000)
    parser.add_argument("--sessions", type=int, default=60)
    parser.add_argument("--budget", type=int, default=20, help="crash states of each interval")
    parser.add_argument("--kills", type=int, help="default: 300 of writers, 20 of guests")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    try:
        if options.what == "recordings":
            run_recordings(options.seed, options.sessions, options.budget)
        elif options.what == "kills":
            run_kills(options.seed, options.kills or 300)
        else:
            run_guests(options.seed, options.kills or 20)
    except AssertionError as failure:
        print(f"BROKEN: {failure}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
