"""Refcounts and mapping: tables that grow, move, and give their old clusters back."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

import jqcow
from jqcow.ondisk.layout import ClusterIndex, GuestOffset
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

CLUSTER = 512
JOURNAL = 64 << 10
MIB = 1 << 20


def reopened(device: SimulatedDevice, mode: jqcow.image.Mode = "r+") -> jqcow.Image:
    device.reopen()
    return jqcow.open_device(device, mode, journal_size=JOURNAL)


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with jqcow.create_on_device(device, 16 * MIB, cluster_size=CLUSTER, journal_size=JOURNAL) as image:
        yield image


def fill(image: jqcow.Image, length: int, seed: int = 1) -> bytes:
    data = random.Random(seed).randbytes(length)
    for offset in range(0, length, 64 << 10):
        image.pwrite(data[offset : offset + (64 << 10)], offset)
    return data


class TestRefcountGrowth:
    """With 512-byte clusters a block counts 256 clusters, and one table cluster holds 64 blocks: 8 MiB."""

    def test_blocks_are_added(self, image: jqcow.Image) -> None:
        data = fill(image, MIB)
        assert image.check().ok
        assert image.pread(MIB, 0) == data

    def test_table_moves_and_the_old_one_is_freed(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        header = image._engine.public.view.header
        old = header.refcount_table_offset // CLUSTER, header.refcount_table_clusters
        data = fill(image, 10 * MIB)
        header = image._engine.public.view.header
        assert header.refcount_table_clusters > old[1]
        assert header.refcount_table_offset // CLUSTER != old[0]
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
        data = fill(image, 8 * MIB - (64 << 10))
        more = random.Random(2).randbytes(512 << 10)
        for offset in range(0, len(more), 64 << 10):
            image.pwrite(more[offset : offset + (64 << 10)], len(data) + offset)
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


class TestL1Growth:
    def test_table_moves_and_the_old_one_is_freed(self, device: SimulatedDevice) -> None:
        with jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=JOURNAL) as image:
            image.pwrite(b"first", 0)
            old = image._engine.public.view.header
            image.resize(100 * MIB)
            image.pwrite(b"last", 100 * MIB - 4)
            new = image._engine.public.view.header
            assert new.l1_size > old.l1_size and new.l1_table_offset != old.l1_table_offset
            assert image._engine.public.refcounts.get(ClusterIndex(old.l1_table_offset // CLUSTER)) == 0
            assert image.check().ok
            image.flush()
            killed = device.killed()
        for each in (device, killed):
            with reopened(each) as again:
                assert again.size == 100 * MIB
                assert again.pread(5, 0) == b"first" and again.pread(4, 100 * MIB - 4) == b"last"
                assert again.check().ok

    def test_failed_growth_leaves_the_old_size(self, device: SimulatedDevice) -> None:
        with jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=JOURNAL) as image:
            image.pwrite(b"first", 0)
            image.flush()
            before = image._engine.public.view.header
            device.faults = FaultPlan(Fault(errno.ENOSPC, call="allocate"))
            with pytest.raises(OSError):
                image.resize(100 * MIB)
            device.faults = None
            assert image._engine.public.view.header == before and image.size == MIB
            assert image.check().ok
            image.resize(100 * MIB)
            assert image.check().ok


class TestSparseTables:
    def test_walking_a_huge_empty_disk_is_quick(self) -> None:
        """The extents of 8 TiB are found table block by table block, not cluster by cluster."""
        device = SimulatedDevice()
        size = 8 << 40
        with jqcow.create_on_device(device, size, journal_size=JOURNAL) as image:
            image.pwrite(b"x", size // 2)
            mapping = image._engine.public.mapping
            assert len(list(mapping.runs(GuestOffset(0), size))) < 100
            kinds = [(extent.kind, extent.length) for extent in image.extents()]
            assert kinds == [
                ("unallocated", size // 2),
                ("data", 65536),
                ("unallocated", size // 2 - 65536),
            ]
