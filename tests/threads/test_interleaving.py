"""Requests that cross each other, stopped at every turn; the campaign is `tests.threads.interleaving`."""

from __future__ import annotations

from random import Random

import pytest

from jqcow.engine.request import Guard
from jqcow.testing import SimulatedDevice
from tests.threads.crossing import Broken, Judgement, Record, filled
from tests.threads.interleaving import Interleaving
from tests.threads.scheduler import Deadlock, ScheduledLock, Scheduler, Worker

SEEDS = range(12)
ONE, TWO = b"00000001", b"00000002"


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_in_flight_are_linearisable_and_crash_safe(seed: int) -> None:
    Interleaving(seed).run()


def test_an_interleaving_can_be_replayed() -> None:
    first, second = Interleaving(3), Interleaving(3)
    assert first.run() == second.run()
    assert first.trace.digest() == second.trace.digest()


def test_four_requests_are_in_flight() -> None:
    interleaving = Interleaving(1)
    outcome = interleaving.run()
    assert len(outcome.situations) > 50
    assert outcome.counts["crashes"] > 5
    assert len(outcome.states) > 30


def test_requests_that_do_not_wait_for_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guard, "require_free", lambda *_: None)
    with pytest.raises(Exception):  # noqa: B017
        for seed in range(20):
            Interleaving(seed).run()


def test_a_deadlock_is_found() -> None:
    scheduler = Scheduler(Random(0))
    locks = [ScheduledLock(scheduler, again=False) for _ in range(2)]

    def work(worker: Worker) -> None:
        first, second = locks if worker.number else reversed(locks)
        with first:
            scheduler.point("between")
            with second:
                pass

    with pytest.raises(Deadlock):
        for _ in range(100):
            scheduler.run(work, work)


# The judgement itself


def test_what_was_flushed_must_be_there() -> None:
    record = Record()
    with record.changing({0: ONE}):
        pass
    Judgement(record).judge_disk(bytes(512), crashed=True)
    with record.flushing():
        pass
    Judgement(record).judge_disk(filled(ONE, 1), crashed=True)
    with pytest.raises(Broken):
        Judgement(record).judge_disk(bytes(512), crashed=True)


def test_a_change_that_happens_as_a_whole_is_not_there_in_part() -> None:
    record = Record()
    with record.changing({0: ONE, 1: ONE}, whole=True):
        judgement = Judgement(record)
        judgement.judge_disk(bytes(1024), crashed=True)
        judgement.judge_disk(filled(ONE, 2), crashed=True)
        with pytest.raises(Broken):
            judgement.judge_disk(filled(ONE, 1) + bytes(512), crashed=True)
    with record.changing({1: TWO}):
        Judgement(record).judge_disk(filled(ONE, 1) + filled(TWO, 1), crashed=True)


def test_a_snapshot_that_was_acknowledged_is_there() -> None:
    record = Record()
    with record.taking("kept"):
        Judgement(record).judge_snapshots({})
    with pytest.raises(Broken):
        Judgement(record).judge_snapshots({})
    with record.deleting("kept"):
        Judgement(record).judge_snapshots({})
    with pytest.raises(Broken):
        Judgement(record).judge_snapshots({"kept": bytes(512)})


def test_a_torn_sector_is_found() -> None:
    device = SimulatedDevice(filled(ONE, 1))
    device.pwrite(TWO, 0)
    with pytest.raises(Broken):
        Judgement(Record()).judge_disk(device.content(), crashed=False)


def test_a_flush_is_not_for_what_could_be_seen_and_had_not_returned() -> None:
    record = Record()
    with record.changing({0: ONE}):
        record.was_read(0, filled(ONE, 1), record.now())
        with record.flushing():
            pass
        Judgement(record).judge_disk(bytes(512), crashed=True)
        with pytest.raises(Broken):
            Judgement(record).judge_disk(bytes(512), crashed=False)
