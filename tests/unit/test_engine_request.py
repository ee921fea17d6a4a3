"""Requests: who waits for whom, what becomes of those that were cut off, and how one is planned."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import jqcow
from jqcow.engine.engine import Engine, make_writable, open_engine
from jqcow.engine.medium import Medium
from jqcow.engine.request import Busy, Guard, Request, Requests
from jqcow.errors import PoisonedError
from jqcow.ondisk.layout import GuestOffset
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.beside import is_taken
from tests.unit.engines import CLUSTER, JOURNAL, MIB, SECTOR, admit, device_of, new_engine, written_image


@pytest.fixture
def guard() -> Guard:
    return Guard(Medium(SimulatedDevice()))


def begin(guard: Guard, first: int = 0, end: int = 0, *, changes: bool = True) -> Request:
    request = Request()
    guard.begin(request, changes=changes, first=first, end=end)
    return request


class Running:
    """A request of another thread, which holds its lock until it is told to go on."""

    def __init__(self, guard: Guard, first: int = 0, end: int = 0, *, ends: bool = True) -> None:
        self.request = Request()
        self._clusters = first, end
        self._guard, self._ends = guard, ends
        self._begun, self.go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self.request.running:
            first, end = self._clusters
            self._guard.begin(self.request, changes=True, first=first, end=end)
            self._begun.set()
            assert self.go_on.wait(60)
            if self._ends:
                self._guard.end(self.request)

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._begun.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._thread.join()

    def go_on_soon(self) -> None:
        threading.Timer(0.02, self.go_on.set).start()


class TestConflicts:
    @pytest.mark.parametrize(
        ("first", "end", "is_free"),
        [(0, 4, True), (0, 5, False), (4, 5, False), (7, 8, False), (7, 20, False), (8, 9, True)],
    )
    def test_clusters_of_another_request_are_its_own(
        self, guard: Guard, first: int, end: int, is_free: bool
    ) -> None:
        """Q1."""
        other = begin(guard, 4, 8)
        if is_free:
            guard.require_free(first, end)
        else:
            with pytest.raises(Busy) as caught:
                guard.require_free(first, end)
            assert caught.value.request is other
        guard.end(other)
        guard.require_free(first, end)

    def test_who_maps_nothing_is_in_nobodys_way(self, guard: Guard) -> None:
        begin(guard, changes=False)
        begin(guard, changes=True)
        guard.require_free(0, 1 << 40)

    def test_the_oldest_request_counts(self, guard: Guard) -> None:
        """Q3: none in flight is a number that none has yet."""
        assert guard.oldest() == 1
        first, second = begin(guard), begin(guard)
        assert guard.oldest() == first.number
        guard.end(first)
        assert guard.oldest() == second.number
        guard.end(second)
        assert guard.oldest() == guard.newest + 1 == 3

    def test_ending_twice_or_without_a_beginning(self, guard: Guard) -> None:
        request = begin(guard)
        guard.end(request)
        guard.end(request)
        guard.end(Request())
        assert guard.oldest() == 2


class TestWaiting:
    def test_until_the_request_has_ended(self, guard: Guard) -> None:
        with Running(guard, 0, 4) as other:
            other.go_on_soon()
            guard.wait(Busy(other.request))
            guard.require_free(0, 4)
        assert not is_taken(guard.medium.lock) and not is_taken(other.request.running)

    def test_for_one_that_was_cut_off(self, guard: Guard) -> None:
        """It holds no lock any more, and it never ends: what it left is not known."""
        with Running(guard, ends=False) as other:
            other.go_on.set()
            with pytest.raises(PoisonedError):
                guard.wait(Busy(other.request))
        assert guard.medium.in_doubt

    def test_for_oneself(self, guard: Guard) -> None:
        """A finaliser that comes back to the image in the midst of a request of its own thread."""
        request = begin(guard)
        with request.running, pytest.raises(RuntimeError, match="finaliser"):
            guard.wait(Busy(request))
        with guard.turnstile, pytest.raises(RuntimeError, match="finaliser"):
            guard.wait(Busy(None))
        assert not guard.medium.in_doubt


@contextmanager
def alone_in_a_thread(guard: Guard) -> Iterator[threading.Event]:
    """Be alone in another thread, until the event that is yielded is set."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with guard.turnstile, guard.alone():
            begun.set()
            assert go_on.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    try:
        yield go_on
    finally:
        go_on.set()
        thread.join()


class TestAlone:
    def test_others_that_change_are_kept_out(self, guard: Guard) -> None:
        """Q2."""
        with alone_in_a_thread(guard) as go_on:
            with pytest.raises(Busy) as caught:
                guard.require_not_alone()
            threading.Timer(0.02, go_on.set).start()
            guard.wait(caught.value)
            guard.require_not_alone()

    def test_it_waits_for_changes_that_began_before(self, guard: Guard) -> None:
        with Running(guard) as other:
            other.go_on_soon()
            with guard.turnstile, guard.alone():
                assert other.go_on.is_set() and guard.is_alone
        assert not guard.is_alone

    def test_it_does_not_wait_for_readers(self, guard: Guard) -> None:
        reader = begin(guard, changes=False)
        with reader.running, guard.turnstile, guard.alone():
            assert guard.oldest() == reader.number

    def test_a_reader_that_was_cut_off_keeps_no_cluster_from_reuse(self, guard: Guard) -> None:
        """Nobody holds its lock: it never ends."""
        begin(guard, changes=False)
        assert guard.oldest() == guard.newest + 1

    def test_a_change_that_was_cut_off_before(self, guard: Guard) -> None:
        begin(guard)
        with guard.turnstile, pytest.raises(PoisonedError), guard.alone():
            pytest.fail("somebody may still be changing the image")
        assert not guard.is_alone

    def test_somebody_alone_who_was_cut_off(self, guard: Guard) -> None:
        """Whoever comes next finds it out, be it alone or not."""
        guard.is_alone = True
        with pytest.raises(PoisonedError):
            guard.wait(Busy(None))
        guard.medium.in_doubt = False
        with guard.turnstile, pytest.raises(PoisonedError), guard.alone():
            pytest.fail("what the other left is not known")


class TestEndOfAll:
    def test_it_waits_for_every_request(self, guard: Guard) -> None:
        with Running(guard) as other:
            other.go_on_soon()
            guard.end_all()
            assert other.go_on.is_set()
        assert guard.oldest() == guard.newest + 1

    @pytest.mark.parametrize("changes", [False, True])
    def test_one_that_was_cut_off_holds_nothing_back(self, guard: Guard, changes: bool) -> None:
        begin(guard, changes=changes)
        guard.end_all()
        assert guard.oldest() == guard.newest + 1 and not guard.medium.in_doubt

    def test_a_forked_child_waits_for_nobody(self, guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
        parents_pid = os.getpid()
        with Running(guard) as other:
            monkeypatch.setattr(os, "getpid", lambda: parents_pid + 1)
            guard.end_all()
            assert guard.oldest() == other.request.number


class TestRanges:
    def test_past_the_end_of_the_disk_they_are_refused(self) -> None:
        with written_image(SimulatedDevice()) as image:
            for length, offset in ((1, MIB), (2, MIB - 1), (MIB + 1, 0)):
                with pytest.raises(ValueError):
                    image.pread(length, offset)
                with pytest.raises(ValueError):
                    image.pwrite(b"x" * length, offset)

    @pytest.mark.parametrize(
        ("offset", "length"), [(1, CLUSTER), (0, CLUSTER - 1), (MIB - CLUSTER + 1, CLUSTER - 1)]
    )
    def test_whole_clusters_are_asked_for(self, offset: int, length: int) -> None:
        requests = new_engine(cluster_bytes=CLUSTER).guest(admit).requests
        with pytest.raises(ValueError, match="not whole clusters"):
            requests.check_whole_clusters(offset, length)

    def test_the_end_of_the_disk_completes_the_last_cluster(self) -> None:
        requests = new_engine(MIB - SECTOR, cluster_bytes=CLUSTER).guest(admit).requests
        requests.check_whole_clusters(MIB - CLUSTER, CLUSTER - SECTOR)

    def test_they_are_cut_where_the_blocks_of_l2_entries_end(self) -> None:
        """One part is one operation: its entries lie in one metadata block."""
        requests = new_engine(cluster_bytes=SECTOR).guest(admit).requests
        span = 64 * SECTOR
        assert list(requests.spans(span - 5, span + 7)) == [
            (GuestOffset(span - 5), 5),
            (GuestOffset(span), span),
            (GuestOffset(2 * span), 2),
        ]


def not_live() -> tuple[Engine, Requests]:
    """Return the engine of a clean image, as it was opened for writing, and its requests."""
    device = SimulatedDevice()
    jqcow.create_on_device(device, MIB, cluster_size=CLUSTER).close()
    device.reopen()
    opened = open_engine(Medium(device), writable=True, journal_bytes=JOURNAL)
    make_writable(opened)
    return opened.engine, opened.engine.guest(admit).requests


class TestPlanning:
    def test_blocks_that_are_missing_are_read_with_the_lock_free(self) -> None:
        """And the plan is made again, from its start."""
        engine, requests = not_live()
        tables, device = engine.public, device_of(engine)
        taken: list[bool] = []
        device.faults = FaultPlan(
            Fault.delay(lambda: taken.append(is_taken(engine.medium.lock)), call="pread")
        )
        tries: list[int] = []

        def plan() -> int:
            tries.append(len(tries))
            return tables.mapping_at_hand.run(GuestOffset(0), CLUSTER).length

        assert requests.planned(plan) == CLUSTER
        assert len(tries) == 2 and taken == [False]

    def test_a_close_waits_for_a_block_that_is_being_read(self) -> None:
        """Q3: loading is a request; it ends, well or not."""
        engine, requests = not_live()
        device = device_of(engine)
        oldest: list[int] = []
        device.faults = FaultPlan(Fault.delay(lambda: oldest.append(engine.guard.oldest()), call="pread"))
        requests.planned(lambda: engine.public.mapping_at_hand.run(GuestOffset(0), CLUSTER))
        assert oldest == [engine.guard.newest] and not engine.guard._requests

    def test_the_image_goes_live_before_a_change_is_planned(self) -> None:
        engine, requests = not_live()

        def plan() -> None:
            requests.enter_change()
            requests.require_live()

        assert engine.log.journal is None
        requests.planned(plan)
        assert engine.log.journal is not None

    def test_who_is_alone_keeps_changes_out_and_reads_in(self) -> None:
        """Q2."""
        engine = new_engine()
        mine, others = engine.guest(admit, alone=True).requests, engine.guest(admit).requests
        with engine.guard.turnstile, engine.guard.alone():
            mine.check_change(0, 1)
            with pytest.raises(Busy):
                others.enter_change()
            others.planned(lambda: engine.public.mapping_at_hand.run(GuestOffset(0), 1))
