"""Host clusters that two guest clusters have without a snapshot: each is copied, and the last one has it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import jqcow
from jqcow.engine import sharing
from jqcow.ondisk.layout import GuestCluster
from jqcow.testing import SimulatedDevice, enumerate_states
from tests.unit.engines import CLUSTER, MIB, OLD, SECTOR, changing, reopened, written_image

OWNERS = (1, 6)
SHARED = OLD[OWNERS[0] * CLUSTER :][:CLUSTER]


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with written_image(device) as image:
        first, second = OWNERS
        with changing(image._engine) as tables:
            shared = tables.mapping.l2_entry(GuestCluster(first))._replace(copied=False)
            tables.refcounts.share(tables.geometry.cluster_of(shared.host), 1)
            gone = tables.mapping.l2_entry(GuestCluster(second))
            tables.mapping.set_entries(GuestCluster(first), [shared])
            tables.mapping.set_entries(GuestCluster(second), [shared])
            tables.refcounts.release(tables.geometry.cluster_of(gone.host))
        image.flush()
        yield image


def content(image: jqcow.Image, owner: int) -> bytes:
    return image.pread(CLUSTER, OWNERS[owner] * CLUSTER)


@pytest.mark.parametrize("owner", [0, 1])
def test_a_write_goes_to_a_copy(image: jqcow.Image, owner: int) -> None:
    image.pwrite(b"new", OWNERS[owner] * CLUSTER + 5)
    old = SHARED
    assert content(image, owner) == old[:5] + b"new" + old[8:]
    assert content(image, 1 - owner) == old and image.check().ok


def test_a_write_over_both(image: jqcow.Image) -> None:
    """The last reference goes with the second of them."""
    new = bytes(range(1, 256)) * 100
    image.pwrite(new, CLUSTER + 5)
    assert image.pread(len(new), CLUSTER + 5) == new and image.check().ok


@pytest.mark.parametrize("owner", [0, 1])
@pytest.mark.parametrize("way", ["discard", "unmap", "zeroes", "compressed", "resize"])
def test_what_gives_one_up_leaves_the_other(image: jqcow.Image, way: str, owner: int) -> None:
    offset = OWNERS[owner] * CLUSTER
    expected = bytes(CLUSTER)
    match way:
        case "discard":
            image.discard(CLUSTER, offset)
        case "unmap" | "zeroes":
            image.write_zeroes(CLUSTER, offset, unmap=way == "unmap")
        case "compressed":
            expected = b"packed".ljust(CLUSTER, b"\1")
            image.pwrite_compressed(expected, offset)
        case "resize":
            owner, expected = 1, bytes(CLUSTER)
            image.resize(OWNERS[1] * CLUSTER)
            image.resize(MIB)
    assert content(image, owner) == expected
    assert content(image, 1 - owner) == SHARED and image.check().ok


def test_a_zero_entry_is_not_written_into_what_it_keeps(image: jqcow.Image) -> None:
    offset = OWNERS[0] * CLUSTER
    image.write_zeroes(CLUSTER, offset, unmap=False)
    image.pwrite(b"new", offset)
    assert content(image, 0) == b"new".ljust(CLUSTER, b"\0")
    assert content(image, 1) == SHARED and image.check().ok


def test_in_a_transaction_that_is_undone(image: jqcow.Image) -> None:
    with image.transaction() as transaction:
        transaction.pwrite(b"new", OWNERS[0] * CLUSTER)
        transaction.discard(CLUSTER, OWNERS[1] * CLUSTER)
        transaction.rollback()
    assert content(image, 0) == content(image, 1) == SHARED and image.check().ok


def test_a_crash_keeps_each_old_or_new(device: SimulatedDevice, image: jqcow.Image) -> None:
    """Once one has moved, not durably, the other one must not write what they shared."""
    for owner in (0, 1):
        image.pwrite(bytes([0xA0 + owner]) * SECTOR, OWNERS[owner] * CLUSTER)
    for state in enumerate_states(device, budget=64):
        with reopened(device.crash(state)) as crashed:
            for owner in (0, 1):
                found = crashed.pread(CLUSTER, OWNERS[owner] * CLUSTER)
                assert found[SECTOR:] == SHARED[SECTOR:]
                assert found[:SECTOR] in (SHARED[:SECTOR], bytes([0xA0 + owner]) * SECTOR)
            assert crashed.check().ok


def copied(image: jqcow.Image, owner: int) -> bool:
    with image._lock:
        return image._engine.public.mapping.l2_entry(GuestCluster(OWNERS[owner])).copied


def test_the_last_owner_writes_in_place_in_the_next_session(
    device: SimulatedDevice, image: jqcow.Image
) -> None:
    """W5: it has the flag at once, and is copied once more in the session that left it alone."""
    image.pwrite(b"new", OWNERS[0] * CLUSTER)
    assert copied(image, 1)
    image.close()
    with reopened(device) as later:
        later.pwrite(b"later", OWNERS[1] * CLUSTER)
        assert later._engine.log.journal is None, "in place"


def test_after_a_rollback_the_owners_are_looked_for_anew(image: jqcow.Image) -> None:
    """What a transaction saw of the tables may be undone."""
    with image.transaction() as transaction:
        transaction.pwrite(b"new", OWNERS[0] * CLUSTER)
        transaction.rollback()
    image.pwrite(b"new", OWNERS[1] * CLUSTER)
    assert copied(image, 0) and image.check().ok


def test_so_many_owners_are_kept_in_mind(image: jqcow.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag of one that is not stays missing, as in QEMU: it costs a copy."""
    monkeypatch.setattr(sharing, "MAX_SHARERS", 0)
    image.pwrite(b"new", OWNERS[0] * CLUSTER)
    image.pwrite(b"more", OWNERS[1] * CLUSTER)
    assert content(image, 1) == b"more" + SHARED[4:] and image.check().ok
