"""A fault at every call of some work, with transactions and snapshots, and a second one just behind it.

The second fault strikes within the rollback, the retry of sector 0, or whatever the engine does before the
error reaches the user. Afterwards the image is used, or its process killed and its recovery fails as well, or
the power cut. Each case is judged: errors are raised (P5), and nothing acknowledged is lost.
"""

from __future__ import annotations

import errno
from itertools import pairwise
from random import Random

import pytest

from jqcow.testing import CrashSpace, Fault, FaultPlan
from tests.crash import stories
from tests.crash.judge import Judge, fail_recovery, judge_closed, recover_and_judge
from tests.crash.stories import Story, tell
from tests.support.player import FAILURES, Player
from tests.support.starts import STARTS as PREPARED
from tests.support.users import Session

STORIES: dict[str, tuple[Story, str, int]] = {
    # The story, what it starts from, and its cluster size.
    "transactions": (stories.TRANSACTIONS, "used", 4096),
    "transactions-dirty": (stories.TRANSACTIONS, "unpunchable", 1024),
    "savepoints": (stories.SAVEPOINTS, "full", 4096),
    "rollbacks": (stories.ROLLBACKS, "dirty", 512),
    "too-large": (stories.TOO_LARGE, "used", 4096),
    "resizes": (stories.RESIZES, "full", 8192),
    "reuse": (stories.REUSE_AFTER_TRANSACTIONS, "full", 4096),
    "snapshots": (stories.BETWEEN_WRITES, "snapshots", 4096),
    "snapshots-transactions": (stories.IN_TRANSACTIONS, "snapshots-unpunchable", 1024),
    "snapshots-sizes": (stories.other_sizes, "used", 512),
    "compressed": (stories.compressed, "snapshots", 8192),
}
STARTS = {
    name: PREPARED[start](cluster_bytes, Random(f"nested faults {name}"))
    for name, (_, start, cluster_bytes) in STORIES.items()
}
CASES_OF_A_STORY = 32
STATES_OF_A_CASE = 2


def new_session(name: str) -> Session:
    return Session(STARTS[name].device(), STARTS[name].expectation(), written=1 << 16)


def tell_story(name: str, session: Session, plan: FaultPlan) -> None:
    """Begin anew, and do all that the story tells, the same on every run, while the host fails as planned.

    An error leaves an open transaction before anybody goes on: the collector would leave it some time later.
    """
    player = Player(session, Random(f"nested faults {name}"))
    with player.faults(plan):
        if session.image is not None:
            session.close()
        tell(STORIES[name][0], player)


def calls_of(name: str) -> int:
    plan = FaultPlan()
    tell_story(name, new_session(name), plan)
    return plan.total


def fault_at(number: int, random: Random) -> Fault:
    error, applied_bytes = random.choice(list(FAILURES.values()))
    return Fault(error, at=number, applied_bytes=applied_bytes)


@pytest.mark.parametrize("name", STORIES)
def test_two_faults_in_a_row(name: str) -> None:
    """The cases of one story: first faults spread over all of its calls, second ones close behind."""
    random = Random(f"faults of {name}")
    total = calls_of(name)
    retries = 0
    for number in spread(total, random):
        second = number + random.choice((1, 1, 1, 2, 2, 3, 4, 6))
        session = new_session(name)
        plan = FaultPlan(fault_at(number, random), fault_at(second, random))
        try:
            retries += break_and_judge(name, session, plan, random)
        except BaseException as error:
            error.add_note(f"{name}: {plan.faults}, met by {plan.fired_calls}")
            raise
    # Most rollbacks need no call of the device; all retries do.
    assert retries > CASES_OF_A_STORY // 2, "hardly a second fault struck"


def spread(total: int, random: Random) -> list[int]:
    """Return numbers of calls, one out of each of as many equal parts as there are cases."""
    edges = [1 + total * part // CASES_OF_A_STORY for part in range(CASES_OF_A_STORY + 1)]
    return [random.randrange(low, max(high, low + 1)) for low, high in pairwise(edges)]


def break_and_judge(name: str, session: Session, plan: FaultPlan, random: Random) -> bool:
    """Judge one case. Return True if the retry failed too."""
    tell_story(name, session, plan)
    assert plan.fired, "the call was not reached"
    # An error of a punch is kept from the user: what it frees is only not known to be zeros.
    if set(plan.fired_calls) != {"punch"}:
        assert session.faults_seen == 1, "the error did not reach the user"
    judge_failing_recovery(session, random)
    judge_power_cuts(session, random)
    # The same work fails once more, and then succeeds.
    again = FaultPlan(fault_at(random.randint(1, 40), random))
    tell_story(name, session, again)
    judge_power_cuts(session, random)
    tell_story(name, session, FaultPlan())
    session.look()
    session.close()
    judge_closed(session.device, session.expectation)
    return bool(again.fired)


def judge_failing_recovery(session: Session, random: Random) -> None:
    """Were the process killed now, the next one could fail at two calls, and the one after it finds all."""
    twin, expectation = session.device.killed(), session.expectation.copy()
    for _ in range(2):
        fault = fault_at(random.randint(1, 60), random)
        fail_recovery(twin, expectation, fault, Fault(errno.EIO, at=fault.at + random.randint(1, 3)))
    recover_and_judge(twin, expectation)


def judge_power_cuts(session: Session, random: Random) -> None:
    """Were the power cut now, what is left would keep the promises; so would a cut of the failed recovery."""
    device = session.device.killed()
    expectation = session.expectation.copy()
    fault = fault_at(random.randint(10, 60), random)
    for recovered in (False, True):
        if recovered:
            fail_recovery(device, expectation, fault)
            # What recovery brings home depends on what the killed process left unsynced.
            expectation.closed = None
        space = CrashSpace(device.in_flight(), seed=random.randrange(1 << 16))
        for state in space.states(STATES_OF_A_CASE):
            Judge()(device.crash(state), expectation.copy(), state)
