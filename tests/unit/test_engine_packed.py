"""Compressed writes of a guest: where they are packed, in which order, and what a failure leaves."""

from __future__ import annotations

import errno
import random

import pytest

import jqcow
from jqcow.ondisk import compression
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.unit.engines import CLUSTER, MIB, OLD, SECTOR, written_image


def test_failed_write_is_as_before(device: SimulatedDevice, image: jqcow.Image) -> None:
    """W4: what it took is unknown, and nothing is staged."""
    device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
    with pytest.raises(OSError):
        image.pwrite_compressed(b"x" * CLUSTER, MIB // 2)
    device.faults = None
    assert image.pread(CLUSTER, MIB // 2) == bytes(CLUSTER)
    assert image._engine.public.changes.is_empty and image._engine.space.unknown.holds(1)
    image.pwrite_compressed(b"x" * CLUSTER, MIB // 2)
    assert image.pread(CLUSTER, MIB // 2) == b"x" * CLUSTER and image.check().ok


def test_a_descriptor_is_ordered(image: jqcow.Image) -> None:
    """W2: a compressed cluster is described only once it is durable, over data or over nothing."""
    for offset in (MIB // 2, 0):
        image.pwrite_compressed(b"x" * CLUSTER, offset)
        assert image._engine.public.changes.ordered
        image.flush()
    assert image.pread(2 * CLUSTER, 0) == b"x" * CLUSTER + OLD[CLUSTER : 2 * CLUSTER]


def test_what_is_replaced_is_released(image: jqcow.Image) -> None:
    refcounts = image._engine.public.refcounts
    reads = image._guest.reads
    old = refcounts.geometry.cluster_of(reads.entry(0).host)
    image.pwrite_compressed(b"x" * CLUSTER, 0)
    new = refcounts.geometry.cluster_of(reads.entry(0).host)
    assert (refcounts.get(old), refcounts.get(new)) == (0, 1)


def test_one_lies_behind_the_other(image: jqcow.Image) -> None:
    """R4: whole sectors, in one host cluster while there is room; each is a reference to it."""
    image.pwrite_compressed(b"a" * CLUSTER + b"b" * CLUSTER + b"c" * CLUSTER, MIB // 2)
    first = MIB // 2 // CLUSTER
    hosts = [image._guest.reads.entry(first + position).host for position in range(3)]
    assert hosts == [hosts[0], hosts[0] + SECTOR, hosts[0] + 2 * SECTOR]
    refcounts = image._engine.public.refcounts
    assert refcounts.get(refcounts.geometry.cluster_of(hosts[0])) == 3
    assert image.check().ok


def test_a_whole_sector_is_written() -> None:
    """A reader takes whole ones: behind the stream no old bytes of the host cluster are left."""
    device = SimulatedDevice(can_punch=False)
    with written_image(device) as image:
        used = {image._guest.reads.entry(cluster).host for cluster in range(8)}
        image.discard(len(OLD), 0)
        image.flush()
        image.pwrite_compressed(b"a" * CLUSTER, MIB // 2)
        host = image._guest.reads.entry(MIB // 2 // CLUSTER).host
        stream = compression.compress(b"a" * CLUSTER, 0, None)
        assert host in used and stream is not None
        assert device.pread(SECTOR, host) == stream.ljust(SECTOR, b"\0")


@pytest.mark.parametrize("saved", [0, SECTOR - 100])
def test_what_does_not_shrink_is_written_as_it_is(image: jqcow.Image, saved: int) -> None:
    """A sector at least is to be saved."""
    content = random.Random(2).randbytes(CLUSTER - saved).ljust(CLUSTER, b"\0")
    assert (compression.compress(content, 0, None) is None) == (not saved)
    image.pwrite_compressed(content + b"x" * CLUSTER, MIB // 2)
    first = MIB // 2 // CLUSTER
    kinds = [image._guest.reads.entry(first + position).kind for position in range(2)]
    assert kinds == [DATA, COMPRESSED_CLUSTER]
    assert image.pread(2 * CLUSTER, MIB // 2) == content + b"x" * CLUSTER


def test_nothing_is_packed_behind_what_was_freed(image: jqcow.Image) -> None:
    """R4: until the record that frees them is durable its sectors are an older one's."""
    image.pwrite_compressed(b"a" * CLUSTER, MIB // 2)
    host = image._guest.reads.entry(MIB // 2 // CLUSTER).host
    image.discard(CLUSTER, MIB // 2)
    image.pwrite_compressed(b"b" * CLUSTER, MIB // 2)
    cluster_of = image._engine.geometry.cluster_of
    assert cluster_of(image._guest.reads.entry(MIB // 2 // CLUSTER).host) != cluster_of(host)
    assert image.check().ok
