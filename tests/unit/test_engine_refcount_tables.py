"""Refcount blocks and tables: added, moved, and given back."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

import jqcow
from jqcow.engine.clusters import Run
from jqcow.engine.engine import Engine
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk.layout import ENTRY_BYTES, ClusterIndex, HostOffset
from jqcow.testing import FaultPlan, SimulatedDevice
from tests.unit.engines import (
    JOURNAL,
    MIB,
    PER_BLOCK,
    SECTOR,
    changing,
    check,
    counts,
    device_of,
    new_engine,
    reopened,
    take_data,
)


@pytest.fixture
def engine() -> Engine:
    return new_engine()


class TestBlocks:
    """With 512-byte clusters a block counts 256 clusters, and one table cluster holds 64 blocks: 8 MiB."""

    def test_a_new_block_may_count_itself(self, engine: Engine) -> None:
        """The first cluster that it counts is its own."""
        engine.space.frontier = ClusterIndex(4 * PER_BLOCK)
        with changing(engine) as tables:
            run = engine.space.take_at_frontier(1)
            tables.refcounts.count_in(run)
        block = engine.public.refcounts.refcount_block(4)
        assert engine.geometry.cluster_of(block) == run.start + 1
        assert engine.public.refcounts.get(engine.geometry.cluster_of(block)) == 1
        assert engine.public.refcounts.refcount_block(3) == 0

    def test_a_new_block_may_need_another_new_block(self, engine: Engine) -> None:
        """The last cluster of a block is taken for data: the block that counts it lies in the next one."""
        engine.space.frontier = ClusterIndex(5 * PER_BLOCK - 1)
        run = take_data(engine)
        refcounts = engine.public.refcounts
        blocks = [refcounts.refcount_block(index) for index in (4, 5)]
        clusters = [engine.geometry.cluster_of(block) for block in blocks]
        assert clusters == [5 * PER_BLOCK, 5 * PER_BLOCK + 1]
        assert [refcounts.get(cluster) for cluster in (run.start, *clusters)] == [1, 1, 1]

    def test_a_run_over_many_blocks(self, engine: Engine) -> None:
        run = take_data(engine, 3 * PER_BLOCK + 5)
        assert set(counts(engine, run)) == {1}
        assert list(engine.public.refcounts.runs(run.start, 1)) == [(run.start, 1, 1)]
        with changing(engine) as tables:
            tables.refcounts.release(run.start, run.count)
        assert engine.public.refcounts.is_free(run.start, run.start + run.count)
        device_of(engine).truncate(engine.space.frontier * SECTOR)
        assert check(engine).ok

    def test_a_table_grows_past_the_end_and_counts_itself(self, engine: Engine) -> None:
        old = engine.public.view.header
        engine.space.frontier = ClusterIndex(64 * PER_BLOCK)
        run = take_data(engine)
        new, refcounts = engine.public.view.header, engine.public.refcounts
        assert new.refcount_table_clusters > old.refcount_table_clusters
        table = Run(ClusterIndex(new.refcount_table_offset // SECTOR), new.refcount_table_clusters)
        assert table.start > run.start and set(counts(engine, table)) == {1}
        assert counts(engine, run) == [1]
        assert refcounts.get(ClusterIndex(old.refcount_table_offset // SECTOR)) == 0
        assert engine.public.changes.freed_metadata == [Run(ClusterIndex(1), 1)]
        assert refcounts.used_end() == engine.space.frontier
        device_of(engine).truncate(engine.space.frontier * SECTOR)
        assert refcounts.get(ClusterIndex(0)) == 1, "the old blocks moved along"

    def test_a_table_that_would_be_too_large(self, engine: Engine) -> None:
        """What QEMU opens."""
        entries = layout.MAX_REFCOUNT_TABLE_BYTES // ENTRY_BYTES
        engine.space.frontier = ClusterIndex(entries * PER_BLOCK)
        with pytest.raises(UnsupportedFeatureError, match="8 MiB"):
            take_data(engine)
        assert engine.public.changes.is_empty

    def test_a_table_entry_that_no_image_can_have(self, engine: Engine) -> None:
        table = engine.public.view.header.refcount_table_offset
        with changing(engine) as tables:
            tables.view.set_entry(HostOffset(table), 0, 3 * SECTOR + 1)
        with pytest.raises(CorruptionError, match="not valid") as caught:
            engine.public.refcounts.get(ClusterIndex(0))
        assert (caught.value.structure, caught.value.offset) == ("refcount table", table)

    def test_a_block_that_is_used_twice(self, engine: Engine) -> None:
        """A search from the top could take forever."""
        table = engine.public.view.header.refcount_table_offset
        with changing(engine) as tables:
            empty = tables.refcounts.allocate_metadata()
            for index in (5, 6):
                tables.view.set_entry(HostOffset(table), index, empty)
        with pytest.raises(CorruptionError, match="used twice"):
            engine.public.refcounts.used_end()

    def test_the_highest_cluster_in_use(self, engine: Engine) -> None:
        """Past blocks whose refcounts are all 0."""
        refcounts = engine.public.refcounts
        engine.space.frontier = ClusterIndex(3 * PER_BLOCK)
        high = take_data(engine)
        block = engine.geometry.cluster_of(refcounts.refcount_block(3))
        with changing(engine):
            refcounts.release(high.start)
        assert refcounts.used_end() == block + 1
        with changing(engine):
            refcounts.release_metadata(block)
        assert refcounts.used_end() < PER_BLOCK


def fill(image: jqcow.Image, length: int, seed: int = 1) -> bytes:
    """Write random bytes at the start of the disk, and return them."""
    data = random.Random(seed).randbytes(length)
    for offset in range(0, length, JOURNAL):
        image.pwrite(data[offset : offset + (JOURNAL)], offset)
    return data


class TestGrowingImages:
    """As `TestBlocks`, by what a guest writes."""

    @pytest.fixture
    def device(self) -> SimulatedDevice:
        return SimulatedDevice()

    @pytest.fixture
    def image(self, device: SimulatedDevice) -> Iterator[jqcow.Image]:
        with jqcow.create_on_device(device, 16 * MIB, cluster_size=SECTOR, journal_size=JOURNAL) as image:
            yield image

    def test_blocks_are_added(self, image: jqcow.Image) -> None:
        data = fill(image, MIB)
        assert image.check().ok
        assert image.pread(MIB, 0) == data

    def test_table_moves_and_the_old_one_is_freed(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        header = image._engine.public.view.header
        old = header.refcount_table_offset // SECTOR, header.refcount_table_clusters
        data = fill(image, 10 * MIB)
        header = image._engine.public.view.header
        assert header.refcount_table_clusters > old[1]
        assert header.refcount_table_offset // SECTOR != old[0]
        assert image.check().ok
        image.flush()
        image.close()
        with reopened(device) as again:
            assert again.recovered is None
            assert again.check().ok
            assert again.pread(len(data), 0) == data
            refcounts = again._engine.public.refcounts
            found = image._engine.public.view.header
            assert again._engine.public.view.header.refcount_table_offset == found.refcount_table_offset
            # Freed, and perhaps in use again, but by one owner: the check above counts.
            assert all(
                refcounts.get(ClusterIndex(cluster)) <= 1 for cluster in range(old[0], old[0] + old[1])
            )

    def test_growth_survives_a_crash_at_any_flush(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        data = fill(image, 8 * MIB - (JOURNAL))
        more = random.Random(2).randbytes(512 << 10)
        for offset in range(0, len(more), JOURNAL):
            image.pwrite(more[offset : offset + (JOURNAL)], len(data) + offset)
            image.flush()
        with reopened(device.killed()) as recovered:
            assert recovered.recovered is not None
            assert recovered.check().ok
            assert recovered.pread(len(data) + len(more), 0) == data + more

    def test_full_host_fails_the_write_and_nothing_else(
        self, device: SimulatedDevice, image: jqcow.Image
    ) -> None:
        """R3: the disk is full while a refcount block, an L2 table or data is allocated."""
        data = fill(image, 256 << 10)
        image.flush()
        for calls in range(1, 40):
            device.faults = FaultPlan(full_from=calls)
            try:
                image.pwrite(b"y" * (40 << 10), 300 << 10)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            device.faults = None
            assert image.check().ok
            assert image.pread(len(data), 0) == data
        image.pwrite(b"z" * (40 << 10), 300 << 10)
        image.flush()
        assert image.check().ok

    def test_free_clusters_of_an_earlier_session_are_found(
        self, device: SimulatedDevice, image: jqcow.Image
    ) -> None:
        fill(image, 2 * MIB)
        image.discard(MIB, 0)
        image.close()
        size = len(device.content())
        data = random.Random(3).randbytes(MIB // 2)
        with reopened(device) as again:
            for offset in range(0, len(data), 4096):
                again.pwrite(data[offset : offset + 4096], 4 * MIB + offset)
                again.flush()
            assert again.pread(len(data), 4 * MIB) == data
        # Unknown clusters are punched a few at a time, and used after the next barrier.
        assert len(device.content()) - size < len(data) * 3 // 4

    def test_freed_clusters_are_used_again(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        """Writing and discarding for ever does not make the file grow for ever."""
        sizes = []
        for round_number in range(8):
            fill(image, MIB, seed=round_number)
            image.flush()
            image.discard(MIB, 0)
            image.checkpoint()
            sizes.append(device.size())
        assert sizes[-1] <= sizes[2]
