"""The exhaustive search: a quarter of the sequences of one and two operations, and a sample of three."""

from __future__ import annotations

import pytest

from jqcow.testing import CrashFailure
from tests.crash.exhaustive import Plan, Run, Search, Sequence, run_search, search_group
from tests.crash.exhaustive_operations import LAYOUT, OPERATIONS

STATES = 12
QEMU_EVERY = 400
RED = {
    "flush.data": ("overwrite", "flush"),
    "flush.record": ("allocating-write", "flush"),
    "flush.ordered": ("transaction-commit",),
    "live.prepare": ("allocating-write",),
    "checkpoint.homes": ("allocating-write", "close-and-reopen"),
    "close.data": ("overwrite", "close-and-reopen"),
    "close.clear": ("allocating-write", "close-and-reopen"),
    "close.release": ("allocating-write", "close-and-reopen"),
    "move.range": ("resize-down",),
}
"""A barrier, and a sequence that is broken without it. The others serve what no sequence of these does."""


def accept(plan: Plan, sequences: list[Sequence]) -> None:
    outcome = search_group(plan, sequences)
    assert not outcome.failures, outcome.failures[0]
    assert outcome.counts["sequences"] == len(sequences) > 0


@pytest.mark.parametrize("first", OPERATIONS)
def test_two_operations(first: str) -> None:
    plan = Plan(depth=2, part=(1, 4), states=STATES, qemu_every=QEMU_EVERY)
    accept(plan, [sequence for sequence in plan.sequences() if sequence[0] == first])


@pytest.mark.parametrize("cluster_bytes", [1024, 4096])
def test_sample_of_three_operations(cluster_bytes: int) -> None:
    plan = Plan(cluster_bytes=cluster_bytes, part=(1, 2000), states=STATES, qemu_every=QEMU_EVERY)
    accept(plan, [sequence for sequence in plan.sequences() if len(sequence) == 3])


@pytest.mark.parametrize("barrier", RED)
def test_search_finds_a_missing_barrier(barrier: str) -> None:
    search = Search(Plan(qemu_every=0))
    with pytest.raises(CrashFailure) as caught:
        search.run(RED[barrier], drop_barriers=[barrier])
    line = caught.value.replay_line
    with pytest.raises(CrashFailure) as again:
        Search(Plan(qemu_every=0)).replay(line, drop_barriers=[barrier])
    assert (again.value.spec, again.value.cause) == (caught.value.spec, caught.value.cause)


def test_failing_sequence_is_printed_with_its_replay_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of its own")

    monkeypatch.setitem(OPERATIONS, "flush", fail)
    plan = Plan(depth=2, only=("flush", "overwrite"), states=1, qemu_every=0)
    outcome = search_group(plan, list(plan.sequences()))
    assert [failure.splitlines() for failure in outcome.failures] == [
        ["ZeroDivisionError: of its own", f"  replay:   1024/{name}"]
        for name in ("flush", "overwrite+flush", "flush+overwrite", "flush+flush")
    ]
    with pytest.raises(ZeroDivisionError):
        Search(plan).replay("1024/overwrite+flush")
    Search(plan).replay("1024/overwrite+overwrite")


def test_every_sequence_is_in_one_part() -> None:
    whole = list(Plan().sequences())
    count = len(OPERATIONS)
    assert len(whole) == len(set(whole)) == count + count**2 + count**3
    parts = [list(Plan(part=(number, 7)).sequences()) for number in range(1, 8)]
    assert sorted(sequence for part in parts for sequence in part) == sorted(whole)
    assert max(map(len, parts)) < 1.2 * min(map(len, parts))


def test_groups_give_the_whole_search() -> None:
    plan = Plan(depth=2, only=("flush", "discard", "resize-up"), states=4, qemu_every=0, jobs=2)
    total = list(run_search(plan))[-1]
    alone = search_group(plan, list(plan.sequences()))
    for outcome in (total, alone):
        # Each process forgets what the others have judged.
        outcome.counts.pop("known with the same expectation", None)
    assert total.counts == alone.counts
    assert (alone.counts["sequences of 1"], alone.counts["sequences of 2"]) == (3, 9)
    assert total.ledger.report() == alone.ledger.report()


@pytest.mark.parametrize("cluster_bytes", [1024, 4096])
def test_start_image_has_places_of_all_kinds(cluster_bytes: int) -> None:
    run = Run(("flush",), cluster_bytes)
    run.before_last()
    assert [run.places.kind(place) for place in range(len(LAYOUT))] == list(LAYOUT)
