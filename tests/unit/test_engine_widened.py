"""Small writes over a backing file, or into a compressed cluster: what they need waits with them (I7)."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest

import jqcow
from jqcow.errors import CorruptionError, PoisonedError
from jqcow.ondisk.frame import FRAME_MAGIC
from jqcow.testing import Fault, FaultPlan, SimulatedDevice, enumerate_states
from tests.support.beside import PATIENCE_SECONDS, HeldUp, Others
from tests.unit.engines import CLUSTER, JOURNAL, MIB, SECTOR, Below, barriers

PLACE = 9 * CLUSTER
OLD, NEW = b"\x22", b"\x55"


class Slow(Below):
    """A backing disk that is full of old bytes, and fails, or waits, where it is told to."""

    def __init__(self) -> None:
        super().__init__(OLD * MIB)
        self.error: OSError | None = None
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        self.begun.set()
        self.go_on.wait(PATIENCE_SECONDS)
        if self.error is not None:
            raise self.error
        super().read_into(buffer, offset)

    def hold(self) -> None:
        self.begun.clear()
        self.go_on.clear()


def over(below: Below, size: int = MIB, *, journal_size: int = JOURNAL, **options: Any) -> Any:
    """Return a live image over a backing disk, on its device."""
    device = SimulatedDevice()
    options.setdefault("cluster_size", CLUSTER)
    made = jqcow.create_on_device(
        device, size, backing_file="below.raw", backing_format="raw", backing=below, **options
    )
    made.close()
    return device, reopened(device, below, journal_size=journal_size)


def reopened(device: SimulatedDevice, below: Any = None, *, journal_size: int = JOURNAL) -> jqcow.Image:
    device.reopen()
    image = jqcow.open_device(device, "r+", journal_size=journal_size, small_writes="journal", backing=below)
    image.pwrite(b"\x33" * (4 * CLUSTER), 0)
    image.checkpoint()
    return image


def packed(size: int = MIB) -> tuple[SimulatedDevice, jqcow.Image]:
    """Return a live image with a compressed cluster, on its device."""
    device = SimulatedDevice()
    jqcow.create_on_device(device, size, cluster_size=CLUSTER).close()
    image = reopened(device)
    image.pwrite_compressed(OLD * min(CLUSTER, size - PLACE), PLACE)
    image.checkpoint()
    return device, image


def damage(device: SimulatedDevice, image: jqcow.Image) -> None:
    """Overwrite the stream of the compressed cluster."""
    device.pwrite(b"\xff" * 32, image._guest.reads.entry(PLACE // CLUSTER).host)
    device.barrier("damage")
    image._guest.reads._decompressed = None


KINDS: dict[str, Callable[[], Any]] = {"below": lambda: over(Slow()), "compressed": packed}
of_both_kinds = pytest.mark.parametrize("kind", KINDS)


@of_both_kinds
def test_a_flush_is_one_barrier_and_recovery_needs_nothing_else(kind: str) -> None:
    device, image = KINDS[kind]()
    names = barriers(device)
    image.pwrite(NEW * SECTOR, PLACE + SECTOR)
    image.pwrite(NEW * SECTOR, PLACE + 3 * SECTOR)
    image.flush()
    assert names == ["flush.record"]
    expected = OLD * SECTOR + NEW * SECTOR + OLD * SECTOR + NEW * SECTOR + OLD * (CLUSTER - 4 * SECTOR)
    assert image.pread(CLUSTER, PLACE) == expected
    if kind == "compressed":
        damage(device, image)
    killed, below = device.killed(), Slow() if kind == "below" else None
    if below is not None:
        below.error = OSError(errno.EIO, "nobody asks")
    jqcow.open_device(killed, "r+", backing=below).close()
    killed.reopen()
    with jqcow.open_device(killed, backing=below) as recovered:
        assert recovered.check().ok
        assert recovered.pread(CLUSTER, PLACE) == expected


@pytest.mark.parametrize(
    "options", [{}, {"extended_l2": True, "cluster_size": 16384}], ids=["clusters", "subclusters"]
)
def test_what_was_never_flushed_is_old_or_new_when_it_is_brought_home(options: dict[str, Any]) -> None:
    """Destaging asks no backing file: what has no entry is no zeros for it (W2)."""
    below = Slow()
    device, image = over(below, **options)
    image.pwrite(NEW * SECTOR, PLACE + SECTOR)
    seen: set[bytes] = set()

    def cut(name: str, now: SimulatedDevice) -> None:
        for state in enumerate_states(now, budget=200):
            with jqcow.open_device(now.crash(state), "r", backing=below) as image:
                seen.add(image.pread(3 * SECTOR, PLACE))

    device.barrier_listeners.append(cut)
    image.checkpoint()
    device.barrier_listeners.clear()
    assert seen == {OLD * 3 * SECTOR, OLD * SECTOR + NEW * SECTOR + OLD * SECTOR}


@pytest.mark.parametrize("act", ["discard", "write_zeroes"])
def test_who_zeroes_after_it_has_waited_zeroes_all(act: str) -> None:
    below = Slow()
    _, image = over(below)
    below.hold()
    with Others(lambda: image.pwrite(NEW * SECTOR, PLACE + SECTOR)) as others:
        assert below.begun.wait(PATIENCE_SECONDS)
        others.run(lambda: getattr(image, act)(CLUSTER, PLACE))
        below.go_on.set()
    for _ in range(2):
        assert image.pread(CLUSTER, PLACE) == bytes(CLUSTER)
        image.checkpoint()


@pytest.mark.parametrize(("cluster", "journal_size"), [(16384, 1 << 16), (65536, 1 << 18), (65536, 1 << 19)])
def test_what_no_journal_has_room_for_goes_the_ordinary_way(cluster: int, journal_size: int) -> None:
    device, image = over(Slow(), journal_size=journal_size, cluster_size=cluster)
    names = barriers(device)
    with Others(lambda: image.pwrite(NEW * SECTOR, 9 * cluster)):
        pass
    image.flush()
    assert names == ["flush.ordered", "flush.record"]


def test_the_last_part_of_a_cluster_waits_for_nothing_that_may_be_unreadable() -> None:
    device, image = packed(PLACE + 4 * SECTOR)
    damage(device, image)
    with pytest.raises(CorruptionError):
        image.pwrite(NEW * 4 * SECTOR, PLACE)
    image.flush()
    image.close()


@of_both_kinds
@pytest.mark.parametrize("data", [NEW * CLUSTER, FRAME_MAGIC.ljust(CLUSTER, NEW)], ids=["any", "a frame"])
def test_who_overwrites_all_needs_nothing(kind: str, data: bytes) -> None:
    below = Slow()
    device, image = over(below) if kind == "below" else packed()
    if kind == "below":
        below.error = OSError(errno.EIO, "no")
    else:
        damage(device, image)
    image.pwrite(data, PLACE)
    image.flush()
    for _ in range(2):
        assert image.pread(CLUSTER, PLACE) == data
        image.checkpoint()


def test_an_error_from_below_leaves_nothing_behind() -> None:
    below = Slow()
    _, image = over(below)
    below.error = OSError(errno.EIO, "no")
    with pytest.raises(OSError, match="no"):
        image.pwrite(NEW * SECTOR, PLACE)
    below.error = None
    assert image.pread(CLUSTER, PLACE) == OLD * CLUSTER
    image.pwrite(NEW * SECTOR, PLACE)
    assert image.pread(2 * SECTOR, PLACE) == NEW * SECTOR + OLD * SECTOR
    assert image.check().ok
    image.close()


def test_a_small_write_beside_a_compressed_one_waits_for_it() -> None:
    device = SimulatedDevice()
    jqcow.create_on_device(device, MIB, cluster_size=CLUSTER).close()
    image = reopened(device)
    with HeldUp(device, lambda: image.pwrite_compressed(OLD * CLUSTER, PLACE), call="pwrite") as held:
        held.run(lambda: image.pwrite(NEW * SECTOR, PLACE + SECTOR))
    image.flush()
    damage(device, image)
    image.checkpoint()
    assert image.pread(3 * SECTOR, PLACE) == OLD * SECTOR + NEW * SECTOR + OLD * SECTOR
    image.close()


def test_nothing_is_laid_on_a_poisoned_image() -> None:
    below = Slow()
    device, image = over(below)
    image.pwrite(NEW * SECTOR, 40 * CLUSTER)
    below.hold()
    found: list[BaseException] = []

    def write() -> None:
        try:
            image.pwrite(NEW * SECTOR, PLACE)
        except PoisonedError as error:
            found.append(error)

    with Others(write):
        assert below.begun.wait(PATIENCE_SECONDS)
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError):
            image.flush()
        below.go_on.set()
    assert found


def test_what_is_being_read_counts_as_waiting() -> None:
    below = Slow()
    _, image = over(below, journal_size=JOURNAL)
    limit = image._engine.commits.pending_limit()
    below.hold()
    with Others(
        *(lambda at=at: image.pwrite(NEW * SECTOR, (9 + at) * CLUSTER) for at in range(12))
    ) as others:
        others.is_waiting(0.5)
        coming = image._engine.guard.coming()
        assert 0 < sum(request.brings_bytes for request in coming) <= limit
        below.go_on.set()
    for at in range(12):
        assert image.pread(SECTOR, (9 + at) * CLUSTER) == NEW * SECTOR
    image.close()
