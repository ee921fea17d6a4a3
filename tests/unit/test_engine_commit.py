"""Commits: what a flush may rely on that another thread's commit has made durable, and failures."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import pytest

import jqcow
from jqcow.engine.commit import Turn
from jqcow.errors import PoisonedError
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice
from tests.support.beside import is_taken

MIB = 1 << 20
CLUSTER = 4096


def drawn(turn: Turn) -> int:
    """Return the ticket of a flush after a change that is staged."""
    return turn.draw(nothing_staged=False)


class TestTickets:
    def test_nothing_is_durable_before_the_first_commit(self) -> None:
        """Not even nothing: an earlier process may have left something unsynced."""
        turn = Turn()
        assert not turn.is_covered(turn.draw(nothing_staged=True))

    def test_a_commit_covers_tickets_drawn_before_it(self) -> None:
        """C2: a flush that began since then needs the next one."""
        turn = Turn()
        before, commit, after = drawn(turn), turn.cut(), drawn(turn)
        turn.cover(commit)
        assert turn.is_covered(before) and not turn.is_covered(after)

    def test_an_older_commit_takes_nothing_back(self) -> None:
        turn = Turn()
        older, ticket, newer = turn.cut(), drawn(turn), turn.cut()
        turn.cover(newer)
        turn.cover(older)
        assert turn.is_covered(ticket)

    def test_where_nothing_changed_the_newest_cut_covers_all_once_it_is_durable(self) -> None:
        turn = Turn()
        commit = turn.cut()
        assert not turn.is_covered(turn.draw(nothing_staged=True)), "it may still fail"
        turn.cover(commit)
        assert turn.is_covered(turn.draw(nothing_staged=True))

    @pytest.mark.parametrize("nothing_staged", [False, True])
    def test_what_changed_since_needs_a_commit_of_its_own(self, nothing_staged: bool) -> None:
        turn = Turn()
        turn.cover(turn.cut())
        turn.is_clean = not nothing_staged
        assert not turn.is_covered(turn.draw(nothing_staged=nothing_staged))

    def test_a_new_image_is_nobodys_turn(self) -> None:
        turn = Turn()
        assert not is_taken(turn.lock) and not is_taken(turn.under_way)


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    image = jqcow.create_on_device(device, 4 * MIB, cluster_size=CLUSTER, journal_size=1 << 18)
    image.pwrite(b"first", 0)
    image.flush()
    yield image
    device.faults = None
    image.close()


def durable(device: SimulatedDevice, length: int, offset: int) -> bytes:
    """Return guest bytes as they are after a crash that loses everything in flight."""
    crashed = SimulatedDevice(device.durable_content())
    with jqcow.open_device(crashed, "r") as again:
        return again.pread(length, offset)


class LockWithHook:
    """The image's lock, as a request takes it; once armed, something comes first, with the lock free."""

    def __init__(self, lock: object, hook: Callable[[], None]) -> None:
        self._lock, self._hook = lock, hook
        self.is_armed = False

    def __enter__(self) -> None:
        if self.is_armed:
            self.is_armed = False
            self._hook()
        self._lock.__enter__()  # type: ignore[attr-defined]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)  # type: ignore[attr-defined]


class TestCoverage:
    @pytest.mark.parametrize("packed", [False, True])
    def test_staged_after_a_commit_was_cut(
        self, device: SimulatedDevice, image: jqcow.Image, packed: bool
    ) -> None:
        """C2, T2: a commit that comes between the data and its mapping does not cover the mapping."""
        requests = image._guest.requests
        lock = LockWithHook(requests.lock, lambda: image._engine.commits.checkpoint(lambda: None))
        write = device.pwrite

        def pwrite(buffer: bytes, offset: int) -> None:
            write(buffer, offset)
            device.pwrite = write  # type: ignore[method-assign]
            lock.is_armed = True

        device.pwrite = pwrite  # type: ignore[method-assign,assignment]
        requests.lock = lock  # type: ignore[assignment]
        data = b"x" * CLUSTER
        if packed:
            image.pwrite_compressed(data, MIB)
        else:
            image.pwrite(data, MIB)
        assert not lock.is_armed
        image.flush()
        assert durable(device, CLUSTER, MIB) == data

    def test_write_while_a_commit_is_under_way(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        """C2: what is written in place after the cut needs a barrier of its own."""
        image.pwrite(b"second", MIB)

        def write() -> None:
            with ThreadPoolExecutor(1) as other:
                other.submit(image.pwrite, b"third", 0).result(60)

        device.faults = FaultPlan(Fault(None, call="barrier", applied_bytes=EVERYTHING, wait=write))
        image.flush()
        device.faults = None
        before = device.barriers.total()
        image.flush()
        assert device.barriers.total() > before
        assert durable(device, 5, 0) == b"third" and durable(device, 6, MIB) == b"second"

    def test_nothing_changed_needs_no_barrier(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        image.flush()
        before = device.barriers.total()
        image.flush()
        assert device.barriers.total() == before


class TestFailures:
    def test_failed_append_is_staged_again(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        image.pwrite(b"second", MIB)
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
        with pytest.raises(OSError):
            image.flush()
        device.faults = None
        assert image.pread(6, MIB) == b"second"
        image.flush()
        assert durable(device, 6, MIB) == b"second" and image.check().ok

    def test_failed_barrier_is_final(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        """M1."""
        image.pwrite(b"second", MIB)
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier", barrier_name="flush.record"))
        with pytest.raises(OSError):
            image.flush()
        for change in (image.flush, lambda: image.pwrite(b"x", 0)):
            with pytest.raises(PoisonedError):
                change()
        assert image.pread(6, MIB) == b"second"

    def test_interrupted_commit_is_taken_back(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        image.pwrite(b"second", MIB)
        device.faults = FaultPlan(Fault(KeyboardInterrupt(), call="barrier"))
        with pytest.raises(KeyboardInterrupt):
            image.flush()
        device.faults = None
        image.flush()
        assert durable(device, 6, MIB) == b"second"

    def test_commit_that_was_cut_off(self, image: jqcow.Image) -> None:
        """C3: neither published nor taken back."""
        image.pwrite(b"second", MIB)
        image._engine.commits.turn.is_undecided = True
        with pytest.raises(PoisonedError):
            image.flush()
        with pytest.raises(PoisonedError):
            image.pread(1, 0)

    def test_durable_commit_that_is_not_published(
        self, device: SimulatedDevice, image: jqcow.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody reads the state before a record that is durable already; opening again shows its change."""

        def cut_off(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("jqcow.engine.commit.Commits._publish", cut_off)
        with pytest.raises(KeyboardInterrupt), image.transaction() as transaction:
            transaction.pwrite(b"second", MIB)
        monkeypatch.undo()
        with pytest.raises(PoisonedError):
            image.pread(1, MIB)
        assert durable(device, 6, MIB) == b"second"

    def test_failed_checkpoint_can_be_tried_again(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        image.flush()
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
        with pytest.raises(OSError):
            image.checkpoint()
        device.faults = None
        image.checkpoint()
        assert not image._engine.blocks.images and durable(device, 5, 0) == b"first"
