"""Patches and the judge of mutants, on a small class of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Thread

import pytest

from tests.support import patches
from tests.support.mutant import Mutant
from tests.support.mutation import Verdict, judge
from tests.support.patches import Number, Patch, PatchError

STEP = 2
HERE = f"{__name__}:"
ADD, ADD_TWICE = HERE + "Counter.add", HERE + "Counter.add_twice"


class Counter:
    def __init__(self) -> None:
        self.total = 0
        self.added: list[int] = []

    def add(self, count: int, *, factor: int = 1) -> int:
        self.added.append(count)
        self.total += count * factor * STEP
        return self.total

    def add_twice(self, count: int) -> int:
        self.add(count)
        return self.add(count)

    def fail(self, count: int) -> None:
        self.add(count)
        raise OSError("no room")

    def each(self) -> Iterator[int]:
        yield from self.added

    @property
    def half(self) -> int:
        return self.total // 2

    @classmethod
    def new(cls) -> Counter:
        return cls()


class Child(Counter):
    pass


def total_with(patch: Patch | Number, action: Callable[[Counter], object]) -> int:
    """Return the total after an action with a patch, which is gone afterwards."""
    counter = Counter()
    with patch.installed():
        action(counter)
    assert Counter().add_twice(3) == 12
    return counter.total


@pytest.mark.parametrize(
    ("patch", "total"),
    [
        (patches.skipping(ADD), 0),
        (patches.skipping(ADD, only=lambda counter, count, **_: count == 1), 6 + 6 + 6),
        (patches.skipping(ADD, during=ADD_TWICE), 2 + 6),
        (patches.with_argument(ADD, "factor", lambda factor: factor + 1), 2 * (2 + 6 + 6 + 6)),
        (patches.with_result(ADD, lambda total: total + 1), 2 + 6 + 6 + 6),
        (patches.replacing(ADD, lambda add, counter, count: add(counter, 1)), 2 + 2 + 2 + 2),
        (patches.before(ADD_TWICE, lambda counter, count: counter.add(10)), 2 + 20 + 6 + 6 + 6),
        (patches.after(ADD_TWICE, lambda result, counter, count: counter.add(result)), 2 + 12 + 28 + 2 * 3),
        (patches.restoring(ADD_TWICE, "self.total"), 2 + 6),
        (patches.setting(ADD_TWICE, "self.total", lambda: 100), 100 + 6),
        (patches.holding(ADD_TWICE, "self.total", 50), 2 + 6),
        (Number(HERE + "STEP", 5), 5 + 15 + 15 + 15),
    ],
)
def test_patch_acts_and_tells_so(patch: Patch | Number, total: int) -> None:
    def action(counter: Counter) -> None:
        counter.add(1)
        counter.add_twice(3)
        counter.add(3)

    assert total_with(patch, action) == total
    assert patch.reached


def test_property_and_class_method() -> None:
    with patches.returning(HERE + "Counter.half", 7).installed():
        assert Counter().half == 7
    with patches.returning(HERE + "Counter.new", None).installed():
        assert Counter.new() is None
    assert Counter.new().half == 0


@pytest.mark.parametrize(
    "patch",
    [
        patches.skipping(ADD),
        patches.with_argument(ADD_TWICE, "count", lambda count: count),
        patches.with_result(ADD_TWICE, lambda total: total),
        patches.holding(ADD_TWICE, "self.total", 0),
        patches.restoring(HERE + "Counter.each", "self.total"),
        Number(HERE + "STEP", 5),
    ],
)
def test_patch_that_changes_nothing_is_not_reached(patch: Patch | Number) -> None:
    with patch.installed():
        Counter().each()
    assert not patch.reached


def test_attribute_is_restored_where_the_call_fails() -> None:
    with patches.restoring(HERE + "Counter.fail", "self.total").installed():
        counter = Counter()
        with pytest.raises(OSError, match="no room"):
            counter.fail(1)
    assert (counter.total, counter.added) == (0, [1])


def test_other_threads_are_not_during_a_call() -> None:
    counter = Counter()

    def add_elsewhere(_: Counter, __: int) -> None:
        thread = Thread(target=counter.add, args=(5,))
        thread.start()
        thread.join()

    outer = patches.before(ADD_TWICE, add_elsewhere)
    with outer.installed(), patches.skipping(ADD, during=ADD_TWICE).installed():
        counter.add_twice(1)
    assert counter.added == [5]


@pytest.mark.parametrize(
    "patch",
    [
        patches.skipping("jqcow.engine.gone:Gone.method"),
        patches.skipping(HERE + "Gone.method"),
        patches.skipping(HERE + "Counter.gone"),
        patches.skipping(HERE + "Child.add"),
        patches.skipping(HERE + "STEP"),
        patches.skipping(ADD, during=HERE + "Counter.gone"),
        patches.skipping(ADD, during=HERE + "Counter.each"),
        patches.with_argument(ADD, "gone", lambda value: value),
        patches.holding(ADD, "gone.total", 1),
        Number(HERE + "GONE", 1),
        Number(ADD, 1),
        Number(HERE + "STEP", STEP),
    ],
)
def test_patch_whose_target_is_gone(patch: Patch | Number) -> None:
    with pytest.raises(PatchError):
        patch.check()


@pytest.mark.parametrize(
    ("patch", "verdict", "text"),
    [
        (patches.returning(ADD, 0), Verdict.RED, "AssertionError: total"),
        (patches.before(ADD, lambda *_: None), Verdict.GREEN, "without X1 every promise holds"),
        (patches.skipping(ADD_TWICE), Verdict.FAULTY, "never reached"),
        (patches.with_result(ADD, str), Verdict.FAULTY, "the mutant itself failed"),
        (patches.holding(ADD, "self.gone", 1), Verdict.FAULTY, "the mutant itself failed"),
    ],
)
def test_verdict(patch: Patch, verdict: Verdict, text: str) -> None:
    def promise() -> None:
        assert Counter().add(1) + 0 == 2, "total"

    found = judge(Mutant("X1-broken", patch, trials=()), [promise])
    assert found[0] is verdict and text in found[1]
