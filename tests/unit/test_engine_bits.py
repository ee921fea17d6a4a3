"""The bits of bitmaps: found in runs, set, looked at and joined, in whatever steps."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

import jqcow
from jqcow.engine import bits
from jqcow.engine.bits import dirty_ranges
from jqcow.testing import SimulatedDevice
from tests.unit.engines import MIB, written_image

CHUNK = bytes([0b00001111, 0xFF, 0, 0b10000000])


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with written_image(device) as image:
        yield image


def dirty(image: jqcow.Image, name: str) -> list[tuple[int, int]]:
    return [(part.offset, part.end) for part in image.bitmaps.dirty_extents(name)]


def test_runs_of_bits() -> None:
    assert list(dirty_ranges([(0, CHUNK)], 9, MIB)) == [(0, 2048), (4096, 8192), (31 * 512, 32 * 512)]
    joined = [(0, b"\0" * 600 + b"\xff"), (601, b"\xff")]
    assert list(dirty_ranges(joined, 9, 1 << 30)) == [(600 * 4096, 602 * 4096)]
    assert list(dirty_ranges([(0, b"\1")], 16, 1000)) == [(0, 1000)]


def granules(image: jqcow.Image, name: str, granularity: int) -> set[int]:
    return {
        at for start, end in dirty(image, name) for at in range(start // granularity, -(-end // granularity))
    }


@pytest.mark.parametrize("step", [1, 1 << 20])
@pytest.mark.parametrize("source", [9, 10, 12, 16, 17])
@pytest.mark.parametrize("target", [9, 11, 12, 16, 18])
def test_joining_bitmaps_of_other_granularities(
    image: jqcow.Image, monkeypatch: pytest.MonkeyPatch, target: int, source: int, step: int
) -> None:
    monkeypatch.setattr(bits, "STEP_BYTES", step)
    random = Random(f"{target} {source}")
    size = MIB - 512 * random.randrange(300)
    image.resize(size)
    for name, granularity in (("target", target), ("source", source)):
        image.bitmaps.add(name, 1 << granularity, enabled=False)
        marked = [jqcow.DirtyExtent(random.randrange(size), random.choice((1, 512, 9000))) for _ in range(9)]
        image.bitmaps.mark(name, marked)
    expected = granules(image, "target", 1 << target)
    for start, end in dirty(image, "source"):
        expected.update(range(start >> target, -(-end >> target)))
    image.bitmaps.merge("target", "source")
    assert granules(image, "target", 1 << target) == expected
    # Nothing behind the end: another program may refuse that, and growing would show it.
    image.resize(2 * MIB)
    assert max(end for _, end in dirty(image, "target")) <= size + (1 << target) - 1 >> target << target
    assert image.check().ok


def test_joining_takes_steps_of_both(image: jqcow.Image) -> None:
    image.resize(6 << 30)
    image.bitmaps.add("fine", 512, enabled=False)
    image.bitmaps.add("coarse", 1 << 31, enabled=False)
    image.bitmaps.mark("fine", [jqcow.DirtyExtent((5 << 30) + at * 4096, 512) for at in range(9)])
    image.bitmaps.merge("coarse", "fine")
    assert dirty(image, "coarse") == [(4 << 30, 6 << 30)]
    with image.transaction() as transaction:
        transaction.bitmaps.merge("fine", "coarse")
        # Whole clusters of ones are said in the table.
        assert len(transaction._changes.tables.changes.blocks) < 20
    assert dirty(image, "fine") == [(4 << 30, 6 << 30)]


def test_marks_that_are_many_come_in_parts(image: jqcow.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jqcow.image.bitmaps.MARKED_AT_ONCE", 2)
    image.bitmaps.add("name", 512, enabled=False)
    marks = [jqcow.DirtyExtent(at * 2048, 512) for at in range(5)]
    image.bitmaps.mark("name", iter(marks))
    assert dirty(image, "name") == [(mark.offset, mark.end) for mark in marks]
