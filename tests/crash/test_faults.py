"""Errors of the host, one at a time, at every call of a mixed workload: raised, survived, recovered from."""

from __future__ import annotations

import errno
from random import Random

import pytest

from jqcow.device.base import ReadBuffer
from jqcow.ondisk.root import MIN_JOURNAL_BYTES
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.crash.judge import judge_closed, recover_and_judge
from tests.crash.stories import EACH_ONCE, MIXED
from tests.support import inside
from tests.support.expectation import SECTOR_BYTES
from tests.support.player import FAILURES, Player
from tests.support.starts import full_image
from tests.support.users import Session

CLUSTER_BYTES = 4096
STORIES = {"mixed": MIXED, "snapshots": EACH_ONCE}
START = full_image(CLUSTER_BYTES, Random("faults"))
GROUPS = 8


class PunchedDevice(SimulatedDevice):
    """Remembers which punches failed: (offset, length); and whether there was no room for a new journal."""

    def __init__(self, initial: bytes) -> None:
        super().__init__(initial)
        self.failed_punches: list[tuple[int, int]] = []
        self.was_short_of_space = False
        self._new_journal = range(0)

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        if len(buffer) >= MIN_JOURNAL_BYTES and not any(buffer):
            self._new_journal = range(offset, offset + len(buffer))
        try:
            super().pwrite(buffer, offset)
        except OSError as error:
            self.was_short_of_space |= error.errno == errno.ENOSPC and offset in self._new_journal
            raise

    def punch(self, offset: int, length: int) -> bool:
        try:
            return super().punch(offset, length)
        except OSError:
            self.failed_punches.append((offset, length))
            raise


def new_session() -> Session:
    return Session(PunchedDevice(START.content), START.expectation(), written=1 << 16)


def was_short_of_space(session: Session) -> bool:
    assert isinstance(session.device, PunchedDevice)
    return session.device.was_short_of_space


def failed_punches(session: Session) -> list[tuple[int, int]]:
    assert isinstance(session.device, PunchedDevice)
    return session.device.failed_punches


def count_calls(story: str) -> int:
    session = new_session()
    session.device.faults = plan = FaultPlan()
    Player(session, Random(0)).play(story)
    return plan.total


CALLS = {name: count_calls(story) for name, story in STORIES.items()}


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("name", STORIES)
def test_each_call_may_fail_once(name: str, kind: str, group: int) -> None:
    """The error reaches the caller as it is; the image stays right, and the same work succeeds afterwards.

    Two errors may be kept from the caller: that of a punch (`test_failed_punch_leaves_unknown_clusters`), and
    that of a full disk where a shorter journal does.
    """
    error, applied_bytes = FAILURES[kind]
    for number in range(1 + group, CALLS[name] + 1, GROUPS):
        fail_at(STORIES[name], Fault(error, at=number, applied_bytes=applied_bytes))


def fail_at(story: str, fault: Fault) -> None:
    session = new_session()
    plan, player = FaultPlan(fault), Player(session, Random(0))
    with player.faults(plan):
        try:
            player.play(story)
        except OSError as error:
            assert error.errno == fault.error, f"call {fault.at} raised {error!r}"
            raise
    assert plan.fired, f"call {fault.at} was not reached"
    if not failed_punches(session) and not was_short_of_space(session):
        assert session.faults_seen == 1, f"the error of call {fault.at} did not reach the caller"
    judge_killed(session)
    Player(session, Random(0)).play(story)
    assert session.image is None
    judge_closed(session.device, session.expectation)


def judge_killed(session: Session) -> None:
    """Were the process killed now, the next one would find what was promised."""
    recover_and_judge(session.device.killed(), session.expectation.copy())


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("number", [1, 2])
def test_failed_punch_leaves_unknown_clusters(number: int, kind: str) -> None:
    """The flush that freed the clusters is durable, and says so. They hold old bytes, and are treated so."""
    error, applied_bytes = FAILURES[kind]
    session = new_session()
    session.open()
    session.discard(0, 3 * CLUSTER_BYTES)
    session.discard(4 * CLUSTER_BYTES, 4 * CLUSTER_BYTES)
    plan = FaultPlan(Fault(error, at=number, call="punch", applied_bytes=applied_bytes))
    with session.faults(plan):
        session.flush()
    assert plan.fired and session.faults_seen == 0
    ((offset, length),) = failed_punches(session)
    clusters = range(offset // CLUSTER_BYTES, (offset + length) // CLUSTER_BYTES)
    assert inside.are_zero_safe(session.live, clusters) is False
    session.flush()
    assert inside.are_zero_safe(session.live, clusters) is False
    judge_killed(session)
    use_again(session, clusters)
    judge_killed(session)
    session.close()
    judge_closed(session.device, session.expectation)


def use_again(session: Session, clusters: range) -> None:
    """Write a sector of each guest cluster until host ``clusters`` are in use: old bytes would show."""
    for position in range(0, session.expectation.windows.model_bytes, CLUSTER_BYTES):
        session.write(position + SECTOR_BYTES, SECTOR_BYTES)
        session.flush()
        session.look()
        if inside.are_used(session.live, clusters):
            return
    pytest.fail(f"clusters {clusters} are not used again")
