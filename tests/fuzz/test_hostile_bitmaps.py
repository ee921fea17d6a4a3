"""Bitmap directories, tables and header extensions of any bytes: jqcow's own errors, or a sound image."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from random import Random

import pytest

import jqcow
from jqcow.errors import JqcowError
from jqcow.ondisk.header import EXTENSION_BITMAPS
from jqcow.testing import SimulatedDevice

CLUSTER = 4096
SIZE = (1 << 20) + 512
NUMBERS = (0, 1, 2, 7, 8, 9, 24, 31, 32, 63, 255, 512, 1023, 1024, 4096, 65535, 1 << 31, (1 << 32) - 1)
SEEDS = 40

Act = Callable[[jqcow.Image], object]


@functools.cache
def good_image() -> tuple[bytes, tuple[int, ...]]:
    """Return an image with three bitmaps, and where the fields are that say so."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, SIZE, cluster_size=CLUSTER) as image:
        for name, granularity in (("a", 512), ("b", 4096), ("c", 65536)):
            image.bitmaps.add(name, granularity)
        image.pwrite(b"x" * 70000, 0)
        image.create_snapshot("one")
        image.bitmaps.disable("b")
        image.pwrite(b"y" * 70000, 30000)
    content = device.content()
    at = content.index(struct.pack(">II", EXTENSION_BITMAPS, 24))
    directory, length = struct.unpack_from(">Q", content, at + 24)[0], 3 * 32
    places = [*range(at, at + 32), *range(directory, directory + length)]
    for number in range(3):
        table = struct.unpack_from(">Q", content, directory + number * 32)[0]
        places += range(table, table + 16)
    return content, tuple(places)


def mutated(random: Random) -> bytes:
    """Return the image with some fields of its bitmaps changed, to numbers that mean something here."""
    good, places = good_image()
    content = bytearray(good)
    for _ in range(random.randint(1, 3)):
        place, width = random.choice(places), random.choice((1, 2, 4, 8))
        clusters = random.randrange(len(content) // CLUSTER + 3) * CLUSTER
        number = random.choice((*NUMBERS, clusters, clusters, random.getrandbits(64)))
        content[place : place + width] = (number & (1 << 8 * width) - 1).to_bytes(width, "big")
    return bytes(content)


def look(image: jqcow.Image) -> None:
    image.check()
    image.info()
    for bitmap in list(image.bitmaps):
        try:
            list(image.bitmaps.dirty_extents(bitmap.name))
        except JqcowError:
            continue


def in_turn(*acts: Act) -> Act:
    def act(image: jqcow.Image) -> None:
        for one in acts:
            try:
                one(image)
            except JqcowError:
                continue

    return act


CHANGES: dict[str, Act] = {
    "write": lambda image: image.pwrite(b"z" * 5000, 200),
    "zeroes": lambda image: image.write_zeroes(70000, 100),
    "grow": lambda image: image.resize(3 << 20),
    "shrink": lambda image: image.resize(65536),
    "apply": lambda image: image.apply_snapshot("one"),
    "bitmaps": in_turn(
        lambda image: image.bitmaps.add("new"),
        lambda image: image.bitmaps.merge("new", "a"),
        lambda image: image.bitmaps.merge("a", "c"),
        lambda image: image.bitmaps.clear("b"),
        lambda image: image.bitmaps.rename("c", "d"),
        lambda image: image.bitmaps.remove("a"),
    ),
}


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_bytes(seed: int) -> None:
    random = Random(f"bitmaps {seed}")
    content = mutated(random)
    try:
        with jqcow.open_device(SimulatedDevice(content), "r") as image:
            look(image)
    except JqcowError:
        pass
    name = random.choice(sorted(CHANGES))
    changed = SimulatedDevice(content)
    try:
        with jqcow.open_device(changed, "r+") as image:
            was_sound = image.check().ok
            in_turn(CHANGES[name], look, CHANGES["write"])(image)
            assert image.check().ok or not was_sound
    except JqcowError:
        pass
    repaired = SimulatedDevice(content)
    try:
        with jqcow.open_device(repaired, "r+", repair="bitmaps") as image:
            in_turn(CHANGES[name], look)(image)
            report = image.check()
            assert report.errors == report.lost, report.findings[:2]
    except JqcowError:
        pass
