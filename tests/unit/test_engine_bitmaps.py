"""Bitmaps as they are managed: each change whole, counted, and true to what was asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

import jqcow
from jqcow.engine.bitmaps import dirty_ranges
from jqcow.errors import BitmapError, BitmapNotFound, CorruptionError, UnsupportedFeatureError
from jqcow.ondisk.header import EXTENSION_BITMAPS
from jqcow.testing import SimulatedDevice
from tests.unit.engines import CLUSTER, MIB, OLD, reopened, written_image

CHUNK = bytes([0b00001111, 0xFF, 0, 0b10000000])


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


def test_runs_of_bits() -> None:
    assert list(dirty_ranges([(0, CHUNK)], 9, MIB)) == [(0, 2048), (4096, 8192), (31 * 512, 32 * 512)]
    joined = [(0, b"\0" * 600 + b"\xff"), (601, b"\xff")]
    assert list(dirty_ranges(joined, 9, 1 << 30)) == [(600 * 4096, 602 * 4096)]
    assert list(dirty_ranges([(0, b"\1")], 16, 1000)) == [(0, 1000)]


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


def flags_place(content: bytes, number: int = 0) -> int:
    at = content.index(struct.pack(">II", EXTENSION_BITMAPS, 24))
    offset: int = struct.unpack_from(">Q", content, at + 24)[0]
    return offset + 12


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


def broken_images(device: SimulatedDevice) -> Iterator[tuple[bytes, int]]:
    """Yield images, and how many of their two bitmaps are left when the rest is given up."""
    content = device.content()
    entry = flags_place(content) - 12
    table: int = struct.unpack_from(">Q", content, entry)[0]
    for place, data, left in (
        (entry, bytes(8), 1), (entry + 18, b"\0\0", 0), (table, b"\xff" * 8, 1), (entry + 8, b"\0\0\0\7", 1),
        (content.index(struct.pack(">II", EXTENSION_BITMAPS, 24)) + 24, b"\1" * 8, 0),
        (entry, content[40:48], 1),
    ):  # fmt: skip
        damaged = bytearray(content)
        damaged[place : place + len(data)] = data
        yield bytes(damaged), left


def test_damaged_bitmaps_are_given_up_when_asked_for(device: SimulatedDevice, image: jqcow.Image) -> None:
    image.bitmaps.add("second", 512)
    image.pwrite(b"x", 0)
    image.close()
    for damaged, left in broken_images(device):
        with reopened(SimulatedDevice(damaged)) as image, pytest.raises(CorruptionError):
            image.discard(CLUSTER, 0)
        repaired = SimulatedDevice(damaged)
        with jqcow.open_device(repaired, "r+", repair="bitmaps") as image:
            assert image.repaired is not None and image.repaired.bitmaps == 2 - left
            assert len(image.bitmaps) == left
            assert image.check().errors == image.check().lost
            image.pwrite(b"new", 8192)
