"""The commit turn: what a flush may rely on that another thread's commit has made durable."""

from __future__ import annotations

from jqcow.engine.turn import Turn
from tests.support.held import is_taken


def test_nothing_is_durable_before_the_first_commit() -> None:
    """Not even nothing: an earlier process may have left something unsynced."""
    turn = Turn()
    assert turn.changes == 0
    assert not turn.is_covered(turn.changes)
    turn.cover(turn.changes)
    assert turn.is_covered(turn.changes)


def test_a_commit_covers_the_changes_before_it() -> None:
    """C2: a change that began since then needs the next one."""
    turn = Turn()
    turn.changing()
    first = turn.changes
    turn.changing()
    second = turn.changes
    assert first < second
    turn.cover(first)
    assert turn.is_covered(first) and not turn.is_covered(second)
    turn.changing()
    turn.cover(second)
    assert turn.is_covered(second) and not turn.is_covered(turn.changes)


def test_a_change_makes_older_tickets_no_less_durable() -> None:
    turn = Turn()
    turn.changing()
    ticket = turn.changes
    turn.cover(ticket)
    turn.changing()
    assert turn.is_covered(ticket)


def test_an_older_commit_takes_nothing_back() -> None:
    turn = Turn()
    turn.changing()
    older = turn.changes
    turn.changing()
    newer = turn.changes
    turn.cover(newer)
    turn.cover(older)
    assert turn.is_covered(newer)


def test_a_new_image_is_nobodys_turn() -> None:
    turn = Turn()
    assert not is_taken(turn.taken) and not is_taken(turn.under_way)
