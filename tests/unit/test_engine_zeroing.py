"""Zeroing and discarding: which entries whole clusters get, and zeros over what is left of a range."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import jqcow
from jqcow.ondisk.l2 import NO_ENTRY, ZERO_CLUSTER, ZERO_ENTRY, L2Entry
from jqcow.testing import SimulatedDevice
from tests.unit.engines import CLUSTER, MIB, OLD, SECTOR, Below, overlay

WIDE, UNIT = 1 << 16, 2048
"""A cluster with subclusters, and one of its 32."""


@pytest.fixture
def extended() -> Iterator[jqcow.Image]:
    """An empty image with subclusters, over a backing file of sevens."""
    device = SimulatedDevice()
    with (
        jqcow.create_on_device(device, MIB, cluster_size=WIDE, extended_l2=True) as image,
        image.transaction() as transaction,
    ):
        transaction.set_backing_file("base.raw", "raw")
    device.reopen()
    with jqcow.open_device(device, "r+", backing=Below(b"\7" * MIB)) as image:
        yield image


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroing(image: jqcow.Image, unmap: bool) -> None:
    image.write_zeroes(2 * CLUSTER, CLUSTER // 2, unmap=unmap)
    half = CLUSTER // 2
    assert (
        image.pread(3 * CLUSTER, 0)
        == OLD[:half] + bytes(2 * CLUSTER) + OLD[-half - 5 * CLUSTER : -5 * CLUSTER]
    )
    assert image.check().ok


def test_a_cluster_that_is_kept_is_written_again(image: jqcow.Image) -> None:
    """Without ``unmap`` the host cluster stays: it need not be allocated again."""
    reads = image._guest.reads
    host = reads.entry(0).host
    image.write_zeroes(CLUSTER, 0, unmap=False)
    assert reads.entry(0) == L2Entry(ZERO_CLUSTER, host, True)
    image.write_zeroes(CLUSTER, 0, unmap=True)
    assert reads.entry(0) == ZERO_ENTRY
    refcounts = image._engine.public.refcounts
    assert refcounts.get(refcounts.geometry.cluster_of(host)) == 0


def test_a_compressed_cluster_cannot_be_kept(image: jqcow.Image) -> None:
    image.pwrite_compressed(b"x" * CLUSTER, 0)
    image.write_zeroes(CLUSTER, 0, unmap=False)
    assert image._guest.reads.entry(0) == ZERO_ENTRY
    assert image.pread(CLUSTER, 0) == bytes(CLUSTER) and image.check().ok


def test_what_reads_as_zeros_is_left_alone(image: jqcow.Image) -> None:
    image.write_zeroes(MIB // 4, MIB // 2)
    assert image._engine.public.changes.is_empty


class TestDiscard:
    def test_whole_clusters_alone(self, image: jqcow.Image) -> None:
        """What a range covers in part stays as it is."""
        image.discard(2 * CLUSTER, CLUSTER // 2)
        assert image.pread(3 * CLUSTER, 0) == OLD[:CLUSTER] + bytes(CLUSTER) + OLD[2 * CLUSTER : 3 * CLUSTER]
        assert image._guest.reads.entry(1) == NO_ENTRY and image.check().ok

    def test_the_end_of_the_disk_completes_the_last_cluster(self, image: jqcow.Image) -> None:
        image.resize(7 * CLUSTER + SECTOR)
        image.discard(SECTOR, 7 * CLUSTER)
        assert image._guest.reads.entry(7) == NO_ENTRY

    def test_what_lies_below_does_not_show_through(self) -> None:
        with jqcow.open_device(overlay(), "r+", backing=Below(b"\7" * MIB)) as image:
            image.pwrite(b"x" * CLUSTER, 0)
            image.discard(2 * CLUSTER, 0)
            assert [image._guest.reads.entry(cluster) for cluster in (0, 1)] == [ZERO_ENTRY, ZERO_ENTRY]
            assert image.pread(2 * CLUSTER + 1, 0) == bytes(2 * CLUSTER) + b"\7"


def test_zeros_that_lie_below_are_not_hidden() -> None:
    """No entry is needed where the backing file reads as zeros, past its end or within it."""
    below = Below(bytes(CLUSTER) + b"\7" * CLUSTER + b"\7" * SECTOR)
    with jqcow.open_device(overlay(), "r+", backing=below) as image:
        image.write_zeroes(4 * CLUSTER, 0)
        reads = image._guest.reads
        found = [reads.entry(cluster) for cluster in range(4)]
        assert found == [NO_ENTRY, ZERO_ENTRY, ZERO_ENTRY, NO_ENTRY]


def test_hiding_what_may_come_below(image: jqcow.Image) -> None:
    """Whatever reads as zeros now: the file below may be another one later."""
    with image.transaction() as transaction:
        transaction.hide_below(CLUSTER, MIB // 2)
    assert image._guest.reads.entry(MIB // 2 // CLUSTER) == ZERO_ENTRY


class TestHidingSubclusters:
    """In an image with subclusters, whole ones are enough: what shows from below may begin at any."""

    def test_a_part_of_a_cluster(self, extended: jqcow.Image) -> None:
        with extended.transaction() as transaction:
            transaction.pwrite(b"x" * UNIT, 0)
            transaction.hide_below(2 * UNIT, 2 * UNIT)
        assert extended.pread(5 * UNIT, 0) == b"x" * UNIT + b"\7" * UNIT + bytes(2 * UNIT) + b"\7" * UNIT
        assert extended.check().ok

    def test_a_part_of_a_compressed_cluster_is_written(self, extended: jqcow.Image) -> None:
        """No entry tells of a part of it."""
        extended.pwrite_compressed(b"x" * 2 * WIDE, 0)
        with extended.transaction() as transaction:
            transaction.hide_below(WIDE, WIDE // 2)
        half = b"x" * (WIDE // 2)
        assert extended.pread(2 * WIDE, 0) == half + bytes(WIDE) + half and extended.check().ok

    def test_less_than_one_is_refused(self, extended: jqcow.Image) -> None:
        with extended.transaction() as transaction, pytest.raises(ValueError, match="not whole subclusters"):
            transaction.hide_below(UNIT - SECTOR, 0)


@pytest.mark.parametrize("act", ["write_zeroes", "discard"])
def test_a_disk_that_ends_within_a_subcluster(act: str) -> None:
    """Its last part may be less than any whole one; where a discard does nothing zeros are written."""
    size = 12 * WIDE + 3 * SECTOR
    with jqcow.create_on_device(SimulatedDevice(), size, cluster_size=WIDE, extended_l2=True) as image:
        image.pwrite(b"x" * (2 * UNIT), size - 2 * UNIT)
        getattr(image, act)(SECTOR, size - SECTOR)
        if act == "write_zeroes":
            assert image.pread(2 * SECTOR, size - 2 * SECTOR) == b"x" * SECTOR + bytes(SECTOR)
        assert image.check().ok


def test_a_resize_meanwhile_is_noticed(image: jqcow.Image) -> None:
    """The end of the disk completed the last cluster: behind a new end there may be data."""
    zeroing, size = image._guest.zeroing, image.size
    assert not zeroing._set_whole(0, CLUSTER, lambda entry, host: NO_ENTRY, size + SECTOR)
    assert image.pread(CLUSTER, 0) == OLD[:CLUSTER]
    assert zeroing._set_whole(0, CLUSTER, lambda entry, host: NO_ENTRY, size)
    assert image.pread(CLUSTER, 0) == bytes(CLUSTER)
