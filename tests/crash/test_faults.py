"""Errors of the host, one at a time, at every call of a mixed workload: raised, survived, recovered from."""

from __future__ import annotations

import errno
from random import Random

import pytest

from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice
from tests.support.images import SECTOR_BYTES, Expectation, Session
from tests.support.judge import judge_closed, judge_running, recover
from tests.support.workloads import full_image, mixed

CLUSTER_BYTES = 4096
START = full_image(CLUSTER_BYTES, Random("faults"))
GROUPS = 8


def new_session() -> Session:
    device = START.device()
    return Session(device, START.expectation(), written=1 << 16)


def count_calls() -> int:
    session = new_session()
    session.device.faults = plan = FaultPlan()
    mixed(session)
    return plan.total


CALLS = count_calls()
FAULTS = {
    "EIO": (errno.EIO, 0),
    "ENOSPC": (errno.ENOSPC, 0),
    "short": (errno.EIO, SECTOR_BYTES),
    "late": (errno.EIO, EVERYTHING),
}


@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize("kind", FAULTS)
def test_each_call_may_fail_once(kind: str, group: int) -> None:
    """The error reaches the caller as it is; the image stays right, and the same work succeeds afterwards."""
    error, applied_bytes = FAULTS[kind]
    for number in range(1 + group, CALLS + 1, GROUPS):
        fail_at(Fault(error, at=number, applied_bytes=applied_bytes))


def fail_at(fault: Fault) -> None:
    session = new_session()
    plan = FaultPlan(fault)
    with session.faults(plan):
        try:
            mixed(session)
        except OSError as error:
            assert error.errno == fault.error, f"call {fault.at} raised {error!r}"
            raise
    assert plan.fired, f"call {fault.at} was not reached"
    assert session.faults_seen == 1, f"the error of call {fault.at} did not reach the caller"
    judge_killed(session)
    mixed(session)
    assert session.image is None
    judge_closed(session.device, session.expectation)


def judge_killed(session: Session) -> None:
    """Were the process killed now, the next one would find what was promised."""
    twin: SimulatedDevice = session.device.killed()
    expectation: Expectation = session.expectation.copy()
    image = recover(twin)
    judge_running(image, expectation)
    image.close()
    judge_closed(twin, expectation)
