"""Places that are known: used where they hold, forgotten where they may not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import jqcow
from jqcow.engine import known
from jqcow.engine.known import KnownPlaces
from jqcow.testing import SimulatedDevice
from tests.unit.engines import CLUSTER, OLD, SECTOR, reopened, written_image

NEW = b"n" * SECTOR


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    """An image of which the places of two clusters are known: one to read, the other one to write too."""
    with written_image(device) as image:
        assert image.pread(SECTOR, CLUSTER) == OLD[CLUSTER : CLUSTER + SECTOR]
        image.pwrite(OLD[2 * CLUSTER : 2 * CLUSTER + SECTOR], 2 * CLUSTER)
        assert set(places(image).to_read) == {1, 2}
        assert set(places(image).to_write) == {2}
        yield image


def places(image: jqcow.Image) -> KnownPlaces:
    return image._engine.blocks.known


def without_plans(image: jqcow.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("it is planned")

    monkeypatch.setattr(image._guest.requests, "planned", refuse)


def test_requests_within_a_known_cluster_need_no_plan(
    image: jqcow.Image, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        without_plans(image, patch)
        assert image.pread(100, CLUSTER + 1000) == OLD[CLUSTER + 1000 : CLUSTER + 1100]
        assert image.pwrite(NEW, 2 * CLUSTER + SECTOR) == SECTOR
        assert image.pread(SECTOR, 2 * CLUSTER + SECTOR) == NEW
    image.flush()
    with reopened(device.killed()) as again:
        assert again.pread(SECTOR, 2 * CLUSTER + SECTOR) == NEW


@pytest.mark.parametrize("offset", [2 * CLUSTER + 1, 3 * CLUSTER - SECTOR, 9 * CLUSTER])
def test_other_writes_are_planned(image: jqcow.Image, offset: int) -> None:
    image.pwrite(NEW * 2, offset)
    assert image.pread(2 * SECTOR, offset) == NEW * 2


def snapshot(image: jqcow.Image) -> None:
    image.create_snapshot("before")


def discard(image: jqcow.Image) -> None:
    image.discard(CLUSTER, 2 * CLUSTER)


def commit(image: jqcow.Image) -> None:
    with image.transaction() as transaction:
        transaction.pwrite(NEW, 2 * CLUSTER)


def shrink(image: jqcow.Image) -> None:
    image.resize(2 * CLUSTER)


@pytest.mark.parametrize("change", [snapshot, discard, commit, shrink])
def test_what_changes_metadata_makes_all_be_forgotten(
    image: jqcow.Image, change: Callable[[jqcow.Image], None]
) -> None:
    change(image)
    assert not places(image).to_write


def changed_after_a_snapshot(image: jqcow.Image) -> bytes:
    """Overwrite what a snapshot has; return what the snapshot shows then."""
    image.create_snapshot("before")
    image.pwrite(NEW, 2 * CLUSTER)
    image.apply_snapshot("before")
    return image.pread(SECTOR, 2 * CLUSTER)


def test_a_snapshot_keeps_what_it_has(image: jqcow.Image) -> None:
    assert changed_after_a_snapshot(image) == OLD[2 * CLUSTER : 2 * CLUSTER + SECTOR]


def test_a_place_that_is_not_forgotten_breaks_a_snapshot(
    image: jqcow.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q4."""
    monkeypatch.setattr(KnownPlaces, "forget", lambda _: None)
    assert changed_after_a_snapshot(image) == NEW


def test_a_place_that_is_not_forgotten_shows_what_was_discarded(
    image: jqcow.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q4."""
    with monkeypatch.context() as patch:
        patch.setattr(KnownPlaces, "forget", lambda _: None)
        image.discard(CLUSTER, 2 * CLUSTER)
        assert image.pread(SECTOR, 2 * CLUSTER) != bytes(SECTOR)
    places(image).forget()
    assert image.pread(SECTOR, 2 * CLUSTER) == bytes(SECTOR)


def test_bitmaps_take_note(image: jqcow.Image) -> None:
    image.bitmaps.add("b", CLUSTER)
    for _ in range(2):
        image.pwrite(NEW, 2 * CLUSTER)
    assert [(one.offset, one.length) for one in image.bitmaps.dirty_extents("b")] == [(2 * CLUSTER, CLUSTER)]


def test_a_change_waits_for_a_transaction(image: jqcow.Image) -> None:
    with image.transaction():
        assert not image._guest.writes._write_known(places(image), memoryview(NEW), 2 * CLUSTER)


def test_a_closed_or_poisoned_image_refuses(image: jqcow.Image, device: SimulatedDevice) -> None:
    image.close()
    image = reopened(device)
    image.pwrite(NEW, 2 * CLUSTER)
    image._medium.poisoned = True
    with pytest.raises(jqcow.PoisonedError):
        image.pwrite(NEW, 2 * CLUSTER)
    image.close()
    with pytest.raises(jqcow.ImageClosedError):
        image.pread(SECTOR, 2 * CLUSTER)


def test_so_many_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "CLUSTERS_MAX", 3)
    found = KnownPlaces()
    for cluster in range(7):
        found.learn_to_read(cluster, cluster << 16)
        found.learn_to_write(cluster, cluster << 16)
    assert found.to_read == found.to_write == {6: 6 << 16}


@pytest.mark.parametrize("options", [{"extended_l2": True, "cluster_size": 65536}])
def test_where_nothing_is_known(options: dict[str, int]) -> None:
    with jqcow.create_on_device(SimulatedDevice(), 1 << 20, **options) as image:  # type: ignore[arg-type]
        for _ in range(2):
            image.pwrite(NEW, 0)
        assert not places(image).to_write
