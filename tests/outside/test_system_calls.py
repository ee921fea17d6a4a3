"""What real processes did, call by call: nothing escapes, and power cuts between barriers do no harm."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from jqcow.testing import CrashFailure, Ledger
from tests.outside.recorder import BarrierBegun, BarrierEnded, CallFailed, Change, Message
from tests.outside.sessions import Session, crash, record_session

BUDGET = 5
# The calls that may touch an image. More than these is a change of the engine that someone must have meant.
EXPECTED_CALLS = {
    "close", "fadvise64", "fallocate", "fcntl", "fdatasync", "fstatfs", "fsync", "ftruncate", "linkat",
    "lseek", "newfstatat", "openat", "pwrite64",
}  # fmt: skip


def messages_in(session: Session) -> Counter[str]:
    """Return how often each kind of operation was begun."""
    events = [event for run in session.runs for event in run.recording.events]
    return Counter(event.content.get("do", "end") for event in events if isinstance(event, Message))


def changes_during_barriers(session: Session) -> int:
    """Return how many changes were made by other threads while a barrier ran."""
    during = 0
    for run in session.runs:
        running = 0
        for event in run.recording.events:
            running += isinstance(event, BarrierBegun) - isinstance(event, BarrierEnded)
            during += running > 0 and isinstance(event, Change)
    return during


def check_recording(session: Session) -> None:
    """The recording is complete: its changes alone make the file, byte for byte."""
    calls: Counter[str] = Counter()
    for run in session.runs:
        assert run.status == 0
        assert not any(isinstance(event, CallFailed) for event in run.recording.events)
        calls += run.recording.calls
    assert set(calls) <= EXPECTED_CALLS
    assert session.replayed_content() == session.content


@pytest.mark.parametrize(("seed", "cluster_bytes"), [(1, 512), (2, 4096), (3, 4096), (4, 65536)])
def test_a_recorded_process_survives_power_cuts(tmp_path: Path, seed: int, cluster_bytes: int) -> None:
    session = record_session(tmp_path, seed, cluster_bytes=cluster_bytes, operations=30)
    check_recording(session)
    done = messages_in(session)
    assert min(done[kind] for kind in ("write", "discard", "flush", "transaction", "commit")) > 0
    ledger = Ledger()
    # With large clusters each state is large: there the recoveries are not crashed too.
    crash(session, ledger, budget=BUDGET, seed=seed, depth=2 if cluster_bytes < 65536 else 1)
    assert ledger.distinct_of(session.name) > 100


def test_threads_whose_changes_overlap_barriers(tmp_path: Path) -> None:
    # The scheduler decides: on a busy host the threads may take turns for long.
    for seed in range(4, 24):
        folder = tmp_path / str(seed)
        folder.mkdir()
        session = record_session(folder, seed, cluster_bytes=4096, threads=4, operations=60)
        check_recording(session)
        if changes_during_barriers(session):
            break
    assert changes_during_barriers(session), "in no session did a thread change anything while a barrier ran"
    crash(session, Ledger(), budget=BUDGET)


@pytest.mark.parametrize("barrier", ["flush fdatasync", "commit fdatasync"])
def test_a_missing_barrier_is_noticed(tmp_path: Path, barrier: str) -> None:
    """The judgement is worth something: without its barriers the same recording breaks a promise."""
    session = record_session(tmp_path, 2, cluster_bytes=4096, runs=1, operations=20)
    check_recording(session)
    with pytest.raises(CrashFailure):
        crash(session, Ledger(), budget=20, depth=1, drop_barriers={barrier})
