"""What reviews found where requests cross: each is stopped at the place where another one has to come."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any, Self

import pytest

import jqcow
from jqcow.engine.clusters import Run
from jqcow.engine.copying import Copying
from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.metadata import Blocks
from jqcow.engine.write import Writes
from jqcow.engine.zeroing import Zeroing
from jqcow.errors import ImageClosedError
from jqcow.ondisk import root
from jqcow.ondisk.frame import BlockOperation
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.below import Below
from tests.support.beside import PATIENCE_SECONDS, HeldUp, Others
from tests.support.expectation import Windows
from tests.support.inside import copy_on_read, show_through

MIB = 1 << 20
CLUSTER = 4096
SECTOR = 512
MOMENT_SECONDS = 0.01
READER_SECONDS = 5


class Stop(Others):
    """Other threads, of which the first one to call a method stays before it until `go`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        super().__init__()
        self._reached, self._go = threading.Event(), threading.Event()
        method = getattr(owner, name)

        def stopped(*arguments: Any, **named: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() and not self._reached.is_set():
                self._reached.set()
                self._go.wait(PATIENCE_SECONDS)
            return method(*arguments, **named)

        monkeypatch.setattr(owner, name, stopped)

    def reach(self) -> None:
        """Wait until a thread has stopped."""
        assert self._reached.wait(PATIENCE_SECONDS), "nobody came here"

    def go(self) -> None:
        """Let it go on."""
        self._go.set()

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.go()
        super().__exit__(*exception)


def image_with(device: SimulatedDevice, size: int = MIB) -> None:
    """Make an image whose first cluster holds data, and close it."""
    with jqcow.create_on_device(device, size, cluster_size=CLUSTER, journal_size=1 << 16) as image:
        image.pwrite(b"1" * CLUSTER, 0)
    device.reopen()


# Zeroing beside a resize


@pytest.mark.parametrize(
    "zero",
    [
        lambda image: image.write_zeroes(SECTOR, CLUSTER, unmap=False),
        lambda image: image.write_zeroes(SECTOR, CLUSTER),
        lambda image: image.discard(SECTOR, CLUSTER),
    ],
    ids=["write_zeroes", "unmap", "discard"],
)
def test_zeroing_to_the_old_end_spares_what_is_behind_it(
    zero: Callable[[jqcow.Image], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the disk completes its last cluster; it must not be completed where the disk grew."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, CLUSTER + SECTOR, cluster_size=CLUSTER) as image:
        image.pwrite(b"x" * SECTOR, CLUSTER)
        with Stop(monkeypatch, Zeroing, "_set_whole") as others:
            others.start(lambda: zero(image))
            others.reach()
            image.resize(2 * CLUSTER)
            image.pwrite(b"N" * SECTOR, CLUSTER + 2 * SECTOR)
            image.flush()
        assert image.pread(SECTOR, CLUSTER + 2 * SECTOR) == b"N" * SECTOR
        assert image.check().ok


# Closing beside requests


@pytest.mark.parametrize("moment", ["others may change again", "the file closes"])
def test_nobody_makes_a_closed_image_live(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that found no journal goes on at either moment, the last ones at which it could do harm."""
    device = SimulatedDevice()
    image_with(device)
    image = jqcow.open_device(device, "r+")
    with Stop(monkeypatch, Lifecycle, "go_live") as others:
        writing = others.start(lambda: refused(lambda: image.pwrite(b"2" * CLUSTER, 2 * CLUSTER)))
        others.reach()
        owner, name = (device, "close") if moment == "the file closes" else (image, "_end")
        then = getattr(owner, name)

        def let_go_first() -> None:
            others.go()
            wait([writing], PATIENCE_SECONDS)
            then()

        monkeypatch.setattr(owner, name, let_go_first)
        image.close()
        assert writing.result(PATIENCE_SECONDS)
    device.reopen()
    assert not root.is_live(device.pread(SECTOR, 0))


def refused(call: Callable[[], object]) -> bool:
    """Return True if a call is refused because the image is closed."""
    try:
        call()
    except ImageClosedError:
        return True
    return False


def test_close_waits_for_a_reader_that_loads_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader gets its bytes, or hears that the image is closed, but no error of the host."""
    device = SimulatedDevice()
    image_with(device)
    image = jqcow.open_device(device, "r")
    with Stop(monkeypatch, Blocks, "load_unlocked") as others:
        reading = others.start(lambda: refused(lambda: image.pread(CLUSTER, 0)))
        others.reach()
        closing = others.start(image.close)
        wait([closing], MOMENT_SECONDS)
        others.go()
        reading.result(PATIENCE_SECONDS)
        closing.result(PATIENCE_SECONDS)
    assert device.closed


# Copy on read beside a transaction


def test_a_read_that_copies_does_not_wait_for_a_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    with jqcow.create_on_device(SimulatedDevice(), MIB, cluster_size=CLUSTER) as image:
        content = b"B" * (4 * CLUSTER)
        show_through(image, Below(Windows(1, len(content), MIB), content, MIB))
        copy_on_read(image)
        with Stop(monkeypatch, Copying, "_copy_up") as others:
            reading = others.start(lambda: image.pread(CLUSTER, 0))
            others.reach()
            with image.transaction():
                others.go()
                assert reading.result(READER_SECONDS) == b"B" * CLUSTER
        assert not image._guest.reads.entry(0).host, "the read that crossed a transaction copied"
        assert image.pread(CLUSTER, 0) == b"B" * CLUSTER
        assert image._guest.reads.entry(0).host, "a later read did not copy"


# What failed


def test_a_failed_record_spells_out_no_zeros() -> None:
    """What was zeroed before and since the cut travels as zeroed clusters."""
    device = SimulatedDevice()
    cluster = 16 * CLUSTER
    span = cluster // 8 * cluster
    with jqcow.create_on_device(device, 4 * span, cluster_size=cluster) as image:
        image.pwrite(b"1" * CLUSTER, 0)
        with HeldUp(device, lambda: failing(image.flush), errno.EIO, call="pwrite"):
            image.pwrite(b"2" * CLUSTER, span)
        device.faults = None
        changes = image._engine.public.changes
        assert changes.zeroed_bytes >= 2 * cluster
        spelt = [operation for operation in changes.operations() if isinstance(operation, BlockOperation)]
        assert spelt and all(any(operation.data) for operation in spelt)
        image.flush()
        assert image.pread(CLUSTER, span) == b"2" * CLUSTER and image.check().ok


def failing(call: Callable[[], object]) -> None:
    """Make a call that fails because of the host."""
    with pytest.raises(OSError):
        call()


@pytest.mark.parametrize("fails", ["a refcount block", "an L2 table"])
def test_a_request_that_fails_while_it_is_staged_gives_back_nothing_that_it_counted(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it counted its operation gave up, and another request may have it before the rest comes back."""
    device = SimulatedDevice(can_punch=False)
    with jqcow.create_on_device(device, MIB, cluster_size=SECTOR, journal_size=1 << 16) as image:
        count = leave_holes(image)
        # Both are missing once all runs are counted.
        place = HERE if fails == "a refcount block" else 3 * MIB // 4
        give_back = Writes.give_back

        def cross(writes: Writes, taken: list[Run]) -> None:
            monkeypatch.undo()
            assert not taken
            with HeldUp(device, lambda: image.pwrite(b"B" * SECTOR, THERE), call="pwrite"):
                give_back(writes, taken)
                image.pwrite(b"C" * SECTOR, THERE + SECTOR)

        monkeypatch.setattr(Writes, "give_back", cross)
        device.faults = plan = FaultPlan(Fault(errno.ENOSPC, call="allocate"))
        failing(lambda: image.pwrite(b"A" * (count * SECTOR), place))
        assert plan.fired and not image._engine.space._lent
        device.faults = None
        assert image.pread(2 * SECTOR, THERE) == b"B" * SECTOR + b"C" * SECTOR
        image.pwrite(b"A" * (count * SECTOR), place)
        assert image.pread(2 * SECTOR, THERE) == b"B" * SECTOR + b"C" * SECTOR
        assert image.pread(count * SECTOR, place) == b"A" * (count * SECTOR)
        assert image.check().ok


HERE, THERE = MIB // 4, MIB // 2
"""Where L2 tables begin, that exist once `leave_holes` was called."""


def leave_holes(image: jqcow.Image) -> int:
    """Leave two free clusters that do not touch, and few before the next refcount block is needed.

    Returns for how many clusters it is needed.
    """
    space, per_block = image._engine.space, image._engine.geometry.refcounts_per_cluster
    for offset in (*range(0, 5 * SECTOR, SECTOR), HERE + 60 * SECTOR, THERE + 60 * SECTOR):
        image.pwrite(b"h" * SECTOR, offset)
    filler = 8 * SECTOR
    while per_block - space.frontier % per_block > 20:
        image.pwrite(b"f" * SECTOR, filler)
        filler += SECTOR
    image.flush()
    for number in (1, 3):
        image.discard(SECTOR, number * SECTOR)
    image.flush()
    image.flush()
    assert len(list(space.unknown)) == 2 and not space.zero_safe
    return per_block - space.frontier % per_block + 4
