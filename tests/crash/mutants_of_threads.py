"""Mutants (`tests.crash.mutants`) without a rule that holds where threads meet, or a call is cut off."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from tests.crash.scenarios import CLUSTER_BYTES
from tests.crash.trials import SCENARIO
from tests.support.mutant import (
    BLOCKS,
    COMMITS,
    GUARD,
    MEDIUM,
    OPERATION,
    PACKED,
    READS,
    SPACE,
    TURN,
    Mutant,
)
from tests.support.patches import (
    Function,
    after,
    holding,
    replacing,
    returning,
    setting,
    skipping,
    with_argument,
)


class NoTurn(nullcontext[None]):
    """A turn that anybody has at any time."""

    def _is_owned(self) -> bool:
        return False


def grow_unlocked(grow: Function, medium: Any, size_bytes: int) -> None:
    """Make the file longer with the lock free."""
    medium.lock.release()
    try:
        grow(medium, size_bytes)
    finally:
        medium.lock.acquire()


def go_on(_: None, operation: Any, *__: object) -> None:
    """Go on after an operation, however it ended."""
    operation._section._medium.in_doubt = False


def stay_clean(_: None, commits: Any, *__: object) -> None:
    """Take all that was changed while a commit was under way to be in it."""
    commits.turn.is_clean = True


OF_MEDIUM = (
    Mutant(
        "M2-grown-without-the-lock",
        replacing(f"{MEDIUM}.grow", grow_unlocked),
        trials=(SCENARIO + "write-beside-a-growth",),
    ),
    Mutant(
        "M2-grown-less-than-to-the-frontier",
        with_argument(f"{MEDIUM}.grow", "size_bytes", lambda size: size - CLUSTER_BYTES),
        trials=(SCENARIO + "growth-beside-a-write",),
    ),
    Mutant(
        "M3-covered-by-a-barrier-that-ran",
        after(f"{COMMITS}._publish", stay_clean),
        trials=(SCENARIO + "write-during-a-barrier",),
    ),
    Mutant(
        "M4-barrier-after-a-failed-one",
        skipping(f"{MEDIUM}.require_healthy", during=f"{MEDIUM}.barrier"),
        trials=(SCENARIO + "close-behind-a-failed-flush",),
    ),
    Mutant(
        "M6-operation-cut-off-goes-on",
        after(f"{OPERATION}.__exit__", go_on),
        trials=(SCENARIO + "interrupted-operation",),
    ),
)

OF_REQUESTS = (
    Mutant(
        "Q1-entries-of-another-request",
        skipping(f"{GUARD}.require_free"),
        trials=(SCENARIO + "writers-of-one-cluster",),
    ),
    Mutant(
        "Q2-alone-beside-older-requests",
        skipping(f"{GUARD}.drain"),
        trials=(SCENARIO + "snapshot-beside-a-write",),
    ),
    Mutant(
        "Q2-alone-beside-newer-requests",
        skipping(f"{GUARD}.require_not_alone"),
        trials=(SCENARIO + "write-beside-a-transaction",),
    ),
    Mutant(
        "Q3-reads-not-in-flight",
        skipping(f"{GUARD}.begin", during=f"{READS}._plan_read"),
        trials=(SCENARIO + "read-beside-a-discard",),
    ),
    Mutant(
        "Q4-places-kept-when-metadata-changes",
        skipping("jqcow.engine.known:KnownPlaces.forget"),
        trials=("snapshots/4096/0", "snapshots/4096/1"),
    ),
    Mutant(
        "S6-freed-without-grace",
        with_argument(
            "jqcow.engine.space:_before",
            "number",
            lambda number: number + (1 << 40),
            during=f"{SPACE}.start_recycling",
        ),
        trials=(SCENARIO + "read-beside-a-discard",),
    ),
    Mutant(
        "R4-packing-behind-what-was-freed-meanwhile",
        returning(f"{PACKED}._is_stale", False),
        trials=(SCENARIO + "packing-beside-a-discard",),
    ),
    Mutant(
        "D6-old-block-kept",
        returning(f"{BLOCKS}._is_current", True),
        trials=(SCENARIO + "block-read-beside-a-checkpoint",),
    ),
)

OF_COMMITS = (
    Mutant(
        "C1-commits-side-by-side",
        setting(f"{TURN}.__init__", "self.lock", NoTurn),
        skipping(f"{COMMITS}.begin_turn"),
        trials=(SCENARIO + "checkpoint-while-flushing",),
    ),
    Mutant(
        "C2-flush-shares-an-older-commit",
        replacing(f"{TURN}.cover", lambda cover, turn, _: cover(turn, next(turn._tickets))),
        trials=(SCENARIO + "flush-during-a-flush",),
    ),
    Mutant(
        "C3-commit-cut-off-goes-on",
        holding(f"{COMMITS}.begin_turn", "self.turn.is_undecided", False),
        trials=(SCENARIO + "flush-cut-off",),
    ),
    Mutant(
        "C3-commit-cut-off-is-shown",
        skipping(f"{COMMITS}._leave_in_doubt_if_undecided"),
        trials=(SCENARIO + "transaction-cut-off",),
    ),
)

MUTANTS_OF_THREADS = (*OF_MEDIUM, *OF_REQUESTS, *OF_COMMITS)
