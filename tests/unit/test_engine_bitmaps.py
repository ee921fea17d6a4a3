"""Bitmaps as they are managed: each change whole, counted, and true to what was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import jqcow
from jqcow.errors import BitmapError, BitmapNotFound, UnsupportedFeatureError
from jqcow.ondisk import bitmaps as ondisk
from jqcow.ondisk.header import EXTENSION_BITMAPS
from jqcow.testing import SimulatedDevice
from tests.unit.engines import CLUSTER, MIB, OLD, flags_place, reopened, written_image


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with written_image(device) as image:
        image.bitmaps.add("fine", 512)
        yield image


def dirty(image: jqcow.Image | jqcow.Transaction, name: str = "fine") -> list[tuple[int, int]]:
    return [(part.offset, part.end) for part in image.bitmaps.dirty_extents(name)]


def test_names_and_flags(image: jqcow.Image) -> None:
    image.bitmaps.add("off", enabled=False)
    assert [(one.name, one.granularity, one.is_enabled) for one in image.bitmaps] == [
        ("fine", 512, True), ("off", 4096, False)
    ]  # fmt: skip
    image.bitmaps.enable("off")
    image.bitmaps.disable("fine")
    image.bitmaps.rename("fine", "ü")
    assert [(one.name, one.is_enabled) for one in image.bitmaps] == [("ü", False), ("off", True)]
    image.pwrite(b"x", CLUSTER)
    assert dirty(image, "ü") == [] and dirty(image, "off") == [(CLUSTER, 2 * CLUSTER)]
    for name in ("ü", "off"):
        image.bitmaps.remove(name)
    assert not len(image.bitmaps) and image.check().ok
    header = image._engine.public.view.area
    assert header.find(EXTENSION_BITMAPS) is None and not header.header.autoclear_features


@pytest.mark.parametrize("name", ["", "x" * 1024, "a\0b"])
def test_names_that_no_bitmap_has(image: jqcow.Image, name: str) -> None:
    with pytest.raises(ValueError, match="name of a bitmap"):
        image.bitmaps.add(name)


@pytest.mark.parametrize("granularity", [0, 256, 1000, 1 << 32])
def test_granularities_that_no_bitmap_has(image: jqcow.Image, granularity: int) -> None:
    with pytest.raises(ValueError, match="granularity"):
        image.bitmaps.add("new", granularity)


def test_what_is_not_there_or_there_already(image: jqcow.Image) -> None:
    for change in (image.bitmaps.remove, image.bitmaps.clear, image.bitmaps.enable):
        with pytest.raises(BitmapNotFound):
            change("other")
    image.bitmaps.add("other")
    for again in (lambda: image.bitmaps.add("fine"), lambda: image.bitmaps.rename("fine", "other")):
        with pytest.raises(BitmapError):
            again()


@pytest.mark.parametrize("name", ["\ud800", 5, None, b"fine"])
def test_what_is_no_name_is_found_out_before_anything_changes(image: jqcow.Image, name: Any) -> None:
    bitmaps = image.bitmaps
    for act in (
        bitmaps.add,
        bitmaps.remove,
        bitmaps.clear,
        bitmaps.enable,
        bitmaps.disable,
        bitmaps.dirty_extents,
        lambda found: bitmaps.rename(found, "other"),
        lambda found: bitmaps.rename("fine", found),
        lambda found: bitmaps.merge(found, "fine"),
        lambda found: bitmaps.merge("fine", found),
        lambda found: bitmaps.mark(found, ()),
        lambda found: bitmaps.mark("fine", [found]),
    ):
        with pytest.raises((TypeError, ValueError, AttributeError, BitmapNotFound)):
            act(name)
    assert image.pread(512, 0) == OLD[:512] and [one.name for one in bitmaps] == ["fine"]


@pytest.mark.parametrize("extent", [jqcow.DirtyExtent(-512, 512), jqcow.DirtyExtent(512, -1)])
def test_ranges_that_no_disk_has(image: jqcow.Image, extent: jqcow.DirtyExtent) -> None:
    with pytest.raises(ValueError, match="no range of a disk"):
        image.bitmaps.mark("fine", [jqcow.DirtyExtent(0, 512), extent])
    assert dirty(image) == [] and image.check().ok
    image.bitmaps.mark("fine", [jqcow.DirtyExtent(2 * MIB, 512), jqcow.DirtyExtent(MIB - 1, MIB)])
    assert dirty(image) == [(MIB - 512, MIB)]


def test_a_transaction_brings_or_takes_all(image: jqcow.Image) -> None:
    with image.transaction() as transaction:
        transaction.pwrite(b"x" * 512, 0)
        savepoint = transaction.savepoint()
        transaction.pwrite(b"y" * 512, 8192)
        assert dirty(transaction) == [(0, 512), (8192, 8704)] and dirty(image) == []
        savepoint.rollback()
        transaction.bitmaps.add("second", 512)
        transaction.pwrite(b"z" * 512, 4096)
    assert dirty(image) == [(0, 512), (4096, 4608)] and dirty(image, "second") == [(4096, 4608)]
    with image.transaction() as transaction:
        transaction.bitmaps.clear("fine")
        transaction.rollback()
    assert dirty(image) == [(0, 512), (4096, 4608)]
    image.bitmaps.clear("fine")
    assert dirty(image) == [] and image.check().ok


def test_merging(image: jqcow.Image) -> None:
    image.bitmaps.add("coarse", 65536)
    image.bitmaps.add("same", 512)
    image.pwrite(b"x", 70000)
    image.bitmaps.clear("fine")
    image.pwrite(b"x", 0)
    image.bitmaps.disable("same")
    image.bitmaps.merge("fine", "same")
    assert dirty(image) == [(0, 512), (69632, 70144)]
    image.bitmaps.merge("fine", "coarse")
    assert dirty(image) == [(0, 131072)]
    image.bitmaps.mark("coarse", [jqcow.DirtyExtent(MIB - 512, 512)])
    assert dirty(image, "coarse") == [(0, 131072), (MIB - 65536, MIB)]


@pytest.mark.parametrize("size", [0, 512, 65536, MIB - 512, MIB + 512, 40 * MIB])
@pytest.mark.parametrize("granularity", [512, 65536])
def test_resizing(device: SimulatedDevice, image: jqcow.Image, size: int, granularity: int) -> None:
    image.bitmaps.add("other", granularity)
    image.bitmaps.add("off", granularity, enabled=False)
    image.pwrite(b"x" * MIB, 0)
    image.bitmaps.clear("other")
    image.pwrite(b"x", 0)
    image.resize(size)
    grown = [(MIB - MIB % granularity, size)] if size > MIB else []
    # The zeros behind a new end within a cluster are writes, too.
    cut = [(size - size % granularity, size)] if size < MIB and size % granularity else []
    first = [(0, min(size, granularity))] if size else []
    assert dirty(image, "other") in (first + grown, first + cut)
    assert dirty(image, "off") == []
    assert image.check().ok
    image.resize(2 * MIB)
    assert (2 * MIB) in {end for _, end in dirty(image, "other")} or size > 2 * MIB
    image.close()
    with reopened(device) as again:
        assert again.check().ok and len(again.bitmaps) == 3


def test_applying_a_snapshot_makes_everything_dirty(image: jqcow.Image) -> None:
    image.create_snapshot("before")
    image.resize(2 * MIB)
    image.bitmaps.clear("fine")
    image.apply_snapshot("before")
    assert dirty(image) == [(0, MIB)] and image.check().ok


def test_an_image_of_version_2_has_none() -> None:
    made = jqcow.create_on_device(SimulatedDevice(), MIB, compat="0.10")
    with made as image, pytest.raises(UnsupportedFeatureError, match="version 2"):
        image.bitmaps.add("name")


def test_a_bitmap_that_would_be_too_large(image: jqcow.Image) -> None:
    with pytest.raises(UnsupportedFeatureError, match="512 MiB"):
        image.resize(1 << 42)
    assert image.size == MIB and image.check().ok


def test_tables_that_nobody_would_read_again(image: jqcow.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ondisk, "MAX_TABLES_BYTES", 16)
    image.bitmaps.add("second")
    for change in (lambda: image.bitmaps.add("third"), lambda: image.resize(40 * MIB)):
        with pytest.raises(UnsupportedFeatureError, match="in all"):
            change()
    assert image.size == MIB and len(image.bitmaps) == 2 and image.check().ok
    image.pwrite(b"x", 0)


def with_flags(device: SimulatedDevice, flags: int) -> SimulatedDevice:
    content = bytearray(device.content())
    place = flags_place(content)
    content[place : place + 4] = flags.to_bytes(4, "big")
    return SimulatedDevice(bytes(content))


def test_one_that_was_left_in_use_can_only_be_removed(device: SimulatedDevice, image: jqcow.Image) -> None:
    image.close()
    with reopened(with_flags(device, 3)) as image:
        (found,) = image.bitmaps
        assert not found.is_consistent and not found.is_enabled
        bitmaps = image.bitmaps
        for change in (bitmaps.clear, bitmaps.enable, bitmaps.disable, bitmaps.dirty_extents):
            with pytest.raises(BitmapError, match="left in use"):
                change("fine")
        image.pwrite(OLD, 8192)
        image.resize(2 * MIB)
        image.bitmaps.remove("fine")
        assert image.check().ok


def test_one_of_an_unknown_kind_that_should_take_note_hinders_writing(
    device: SimulatedDevice, image: jqcow.Image
) -> None:
    image.close()
    content = bytearray(device.content())
    content[flags_place(content) + 4] = 2
    with reopened(SimulatedDevice(bytes(content))) as image:
        with pytest.raises(UnsupportedFeatureError, match="unknown kind"):
            image.pwrite(b"x", 0)
        assert image.pread(512, 0) == OLD[:512]
