"""What reviews found in the engine; what takes threads is in `tests.threads.test_found`."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import TracebackType

import pytest

import jqcow
from jqcow.engine import metadata
from jqcow.engine.medium import Medium
from jqcow.engine.refcounts import Allocation
from jqcow.errors import PoisonedError
from jqcow.testing import Fault, FaultPlan, SimulatedDevice, enumerate_states
from tests.support.users import in_place

MIB = 1 << 20
CLUSTER = 4096
SECTOR = 512

# A stale stream


def test_what_was_packed_anew_is_not_read_from_the_last_stream() -> None:
    """Clusters that come back by a rollback are taken anew; what was decompressed from them is stale."""
    with jqcow.create_on_device(SimulatedDevice(), MIB, cluster_size=CLUSTER) as image:
        with image.transaction() as transaction:
            savepoint = transaction.savepoint()
            for content in (b"A" * CLUSTER, b"B" * CLUSTER, b"C" * CLUSTER):
                savepoint.rollback()
                transaction.pwrite_compressed(content, 0)
                assert transaction.pread(CLUSTER, 0) == content
        assert image.pread(CLUSTER, 0) == b"C" * CLUSTER


# A flush that is cut off


class Interrupting:
    """The image's lock; its release number ``at`` is followed by a KeyboardInterrupt."""

    def __init__(self, lock: object, at: int) -> None:
        self._lock, self._left = lock, at

    def __enter__(self) -> None:
        self._lock.__enter__()  # type: ignore[attr-defined]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)  # type: ignore[attr-defined]
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())  # type: ignore[attr-defined]


def flush_cut_off(device: SimulatedDevice, at: int) -> bool:
    """Cut a flush off after that release of the lock, and flush again; return False if it was not cut off."""
    image = jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=1 << 16)
    image.pwrite(b"z" * CLUSTER, 0)
    image.flush()
    image.pwrite(b"k" * CLUSTER, MIB // 2)
    lock = image._medium.lock
    image._medium.lock = Interrupting(lock, at)  # type: ignore[assignment]
    try:
        image.flush()
    except KeyboardInterrupt:
        pass
    else:
        return False
    finally:
        image._medium.lock = lock
    try:
        image.flush()
    except PoisonedError:
        return True
    assert image.pread(CLUSTER, MIB // 2) == b"k" * CLUSTER
    with jqcow.open_device(device.killed(), "r+") as recovered:
        assert recovered.pread(CLUSTER, MIB // 2) == b"k" * CLUSTER
        assert recovered.check().ok
    return True


def test_a_flush_after_one_that_was_cut_off_acknowledges_only_what_is_there() -> None:
    """Wherever the lock was released: above all once what is staged was cut, and nobody had been told."""
    released = 0
    while flush_cut_off(SimulatedDevice(), released + 1):
        released += 1
    assert released > 3


# A flush that is acknowledged


def test_a_flush_is_acknowledged_whatever_the_search_for_free_clusters_meets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The record is durable by then: an error would read as if it were not."""
    device = SimulatedDevice()
    image = in_place(jqcow.create_on_device(device, MIB, cluster_size=CLUSTER))
    image.pwrite(b"n" * CLUSTER, MIB // 2)
    searches = []

    def fail(refcounts: Allocation) -> None:
        searches.append(refcounts)
        raise OSError(errno.EIO, "the device failed")

    def fail_from_here(name: str, device: SimulatedDevice) -> None:
        if name == "flush.record":
            monkeypatch.setattr(Allocation, "search_if_short", fail)

    device.barrier_listeners.append(fail_from_here)
    image.flush()
    assert searches
    monkeypatch.undo()
    device.barrier_listeners.clear()
    with jqcow.open_device(device.killed(), "r") as recovered:
        assert recovered.pread(CLUSTER, MIB // 2) == b"n" * CLUSTER
    image.pwrite(b"m" * CLUSTER, 0)
    image.flush()
    assert image.check().ok
    image.close()


# More metadata than memory


def disk_of_many_tables(device: SimulatedDevice, tables: int) -> jqcow.Image:
    """Return an image, opened for reading, with one cluster of data in each of its L2 tables."""
    span = SECTOR // 8 * SECTOR
    with jqcow.create_on_device(device, tables * span, cluster_size=SECTOR, journal_size=MIB) as image:
        for start in range(0, image.size, span):
            image.pwrite(b"q" * SECTOR, start)
    device.reopen()
    return jqcow.open_device(device, "r")


@pytest.mark.parametrize(
    "walk",
    [
        lambda image: image.pread(image.size, 0),
        lambda image: list(image.extents()),
        lambda image: image.reads_as_zeros(image.size - SECTOR, SECTOR),
    ],
    ids=["pread", "extents", "reads_as_zeros"],
)
def test_a_walk_over_more_blocks_than_memory_holds_ends(
    walk: Callable[[jqcow.Image], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "CLEAN_BLOCKS_MAX", 4)
    device = SimulatedDevice()
    image = disk_of_many_tables(device, 12)
    # It would load the same blocks again and again.
    device.faults = FaultPlan(Fault(errno.EIO, at=200, call="pread", repeats=True))
    walk(image)
    device.faults = None
    image.close()


# A file that ends within a sector


@pytest.mark.parametrize("length", [3, SECTOR, SECTOR + 1, CLUSTER - 1])
def test_the_file_ends_where_a_sector_does(length: int) -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, MIB, cluster_size=CLUSTER) as image:
        image.pwrite(b"x" * length, 3 * CLUSTER)
        assert device.size() % SECTOR == 0
        image.pwrite(b"y" * length, 7 * CLUSTER)
        image.flush()
        assert device.size() % SECTOR == 0


@pytest.mark.parametrize("first", [3, SECTOR + 3, CLUSTER - 1])
def test_no_crash_tears_the_last_sector_of_the_file(first: int) -> None:
    """M5: in place it is old or new, also where the file used to end within it."""
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=1 << 16)
    image.pwrite(b"1" * CLUSTER, 0)
    image.pwrite(b"o" * first, 3 * CLUSTER)
    image.flush()
    sector = 3 * CLUSTER + first - first % SECTOR
    old = image.pread(SECTOR, sector)
    image.pwrite(b"n" * SECTOR, sector)
    for state in enumerate_states(device, budget=200):
        with jqcow.open_device(device.crash(state), "r") as crashed:
            assert crashed.pread(SECTOR, sector) in (old, b"n" * SECTOR)
    image.close()


def test_a_transaction_that_was_cut_off_within_a_resize_is_not_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interrupt comes as the half-done change is to be undone, and the caller goes on regardless."""

    def cut_off(medium: Medium, action: Callable[[], None]) -> None:
        raise KeyboardInterrupt

    with jqcow.create_on_device(SimulatedDevice(), 1 << 20, cluster_size=4096) as image:
        with pytest.raises(PoisonedError), image.transaction() as transaction:
            transaction.pwrite(b"never", 0)
            with monkeypatch.context() as patch:
                patch.setattr(Medium, "undo", cut_off)
                with pytest.raises(KeyboardInterrupt), transaction._changes.whole():
                    raise KeyboardInterrupt
        assert image.pread(5, 0) == bytes(5)
        image.pwrite(b"works on", 0)
        assert image.check().ok


# What readers of the paths found


def test_a_flush_after_a_write_that_failed_half_way_is_a_barrier() -> None:
    """C2: what the failed write left can be read, so the flush that follows makes it durable."""
    device = SimulatedDevice()
    image = in_place(jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=1 << 16))
    image.pwrite(b"A" * CLUSTER, 0)
    image.flush()
    device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", applied_bytes=2 * SECTOR))
    with pytest.raises(OSError):
        image.pwrite(b"B" * CLUSTER, 0)
    device.faults = None
    shown = image.pread(CLUSTER, 0)
    assert shown == b"B" * 2 * SECTOR + b"A" * (CLUSTER - 2 * SECTOR)
    image.flush()
    for state in enumerate_states(device, budget=50):
        with jqcow.open_device(device.crash(state), "r") as crashed:
            assert crashed.pread(CLUSTER, 0) == shown


@pytest.mark.parametrize("call", ["pwrite", "write_zeroes", "discard"])
def test_a_range_past_the_end_changes_nothing(call: str) -> None:
    """Also where it is so long that it is done part by part."""
    size = 5 * CLUSTER * CLUSTER // 8
    with jqcow.create_on_device(SimulatedDevice(), size, cluster_size=CLUSTER) as image:
        image.pwrite(b"A" * CLUSTER, 0)
        change = getattr(image, call)
        arguments = (bytes(size + 1), 0) if call == "pwrite" else (size + 1, 0)
        with pytest.raises(ValueError, match=f"^{size + 1} bytes at 0 are not within"):
            change(*arguments)
        assert image.pread(CLUSTER, 0) == b"A" * CLUSTER


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside a second flush"])
def test_reading_goes_on_where_a_record_cannot_be_revoked(others: bool) -> None:
    """The image turns read-only; nothing that it shows was acknowledged, whoever comes next."""
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=1 << 16)
    image.pwrite(b"A" * CLUSTER, 0)
    image.flush()
    image.pwrite(b"B" * CLUSTER, CLUSTER)
    device.faults = FaultPlan(*(Fault(errno.EIO, at=at, call="pwrite") for at in (1, 2)))
    with pytest.raises(OSError):
        image.flush()
    device.faults = None
    if others:
        with pytest.raises(PoisonedError):
            image.flush()
    assert image.pread(2 * CLUSTER, 0) == b"A" * CLUSTER + b"B" * CLUSTER
    image.close()


def test_closing_gives_back_what_the_last_epoch_freed() -> None:
    """S2: once the journal is gone nothing is replayed into freed tables."""
    device = SimulatedDevice()
    with in_place(jqcow.create_on_device(device, 1 << 30, cluster_size=CLUSTER)) as image:
        for number in range(20):
            image.pwrite(b"x" * CLUSTER, number * (2 << 20))
        # The tables are not at the end of the file, which closing cuts off.
        image.pwrite(b"last", MIB // 2)
    device.reopen()
    with jqcow.open_device(device, "r+") as image:
        before = {table for _, table in image._engine.public.mapping.l2_tables(0)}
        image.resize(MIB)
        kept = {table for _, table in image._engine.public.mapping.l2_tables(0)}
    device.reopen()
    freed = {table for table in before - kept if table < device.size()}
    assert len(freed) > 10
    assert all(device.is_hole(table, CLUSTER) for table in freed)


def test_a_checkpoint_of_nothing_leaves_the_newest_frames_alone() -> None:
    """The half of the newest frames is not the next to be written."""
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=1 << 16)
    image.pwrite(b"A" * CLUSTER, 0)
    image.checkpoint()
    epoch = image._engine.log.require_journal().epoch
    with image._engine.commits.turn.lock:
        image._engine.log.checkpoint()
    assert image._engine.log.require_journal().epoch == epoch
    image.pwrite(b"B" * CLUSTER, CLUSTER)
    image.flush()
    with jqcow.open_device(device.killed(), "r") as crashed:
        assert crashed.pread(2 * CLUSTER, 0) == b"A" * CLUSTER + b"B" * CLUSTER
    image.close()
