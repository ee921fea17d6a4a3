"""What the enabled bitmaps call dirty, ahead of every write: exactly, and durably before the data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import jqcow
from jqcow.engine import tracking
from jqcow.ondisk import bitmaps
from jqcow.ondisk.header import HeaderArea
from jqcow.testing import Fault, FaultPlan, SimulatedDevice, enumerate_states
from tests.unit.engines import CLUSTER, MIB, OLD, reopened, written_image

REGION = 1 << 14
GRANULARITIES = (512, 4096, 65536)


@pytest.fixture(autouse=True)
def small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "REGION_BITS", 14)
    monkeypatch.setattr(tracking, "REGIONS_MAX", 4)


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


@pytest.fixture
def image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    with written_image(device) as image:
        for granularity in GRANULARITIES:
            image.bitmaps.add(str(granularity), granularity)
        yield image


def dirty(image: jqcow.Image, granularity: int = 512) -> list[tuple[int, int]]:
    return [(part.offset, part.end) for part in image.bitmaps.dirty_extents(str(granularity))]


def granules(ranges: list[tuple[int, int]], granularity: int) -> set[int]:
    return {at for start, end in ranges for at in range(start // granularity, -(-end // granularity))}


@pytest.mark.parametrize("seed", range(8))
def test_exactly_what_was_written_is_dirty(device: SimulatedDevice, image: jqcow.Image, seed: int) -> None:
    random, written = Random(seed), list[tuple[int, int]]()
    for _ in range(60):
        offset, length = random.randrange(MIB - 40000), random.choice((1, 512, 5000, 40000))
        way = random.random()
        if way < 0.7:
            image.pwrite(bytes(length), offset)
            written.append((offset, offset + length))
        elif way < 0.8:
            with image.transaction() as transaction:
                transaction.pwrite(b"x" * length, offset)
            written.append((offset, offset + length))
        elif way < 0.9:
            image.flush()
        else:
            image.create_snapshot("one")
            image.delete_snapshot("one")
    for granularity in GRANULARITIES:
        assert granules(dirty(image, granularity), granularity) == granules(written, granularity)
    image.close()
    with reopened(device) as again:
        assert again.check().ok
        for granularity in GRANULARITIES:
            assert granules(dirty(again, granularity), granularity) == granules(written, granularity)


def test_what_reads_as_before_stays_clean(image: jqcow.Image) -> None:
    image.discard(CLUSTER, 20 * CLUSTER)
    image.write_zeroes(CLUSTER, 21 * CLUSTER)
    assert dirty(image) == []
    image.discard(CLUSTER, CLUSTER)
    image.write_zeroes(512, 4 * CLUSTER)
    assert dirty(image) == [(CLUSTER, 2 * CLUSTER), (4 * CLUSTER, 4 * CLUSTER + 512)]


def test_compressed_writes(image: jqcow.Image) -> None:
    image.pwrite_compressed(bytes(2 * CLUSTER), CLUSTER)
    assert dirty(image) == [(CLUSTER, 3 * CLUSTER)]


def test_a_region_waits_for_the_disk_once(device: SimulatedDevice, image: jqcow.Image) -> None:
    image.flush()
    before = device.barriers.total()
    image.pwrite(b"x", 0)
    waited = device.barriers.total()
    for offset in range(0, len(OLD), 512):
        image.pwrite(b"x", offset)
    assert before < waited == device.barriers.total()


def test_an_image_that_was_not_written_stays_as_it_is(device: SimulatedDevice, image: jqcow.Image) -> None:
    image.pwrite(b"x", 0)
    image.close()
    before = device.content()
    with reopened(device) as again:
        assert dirty(again) == [(0, 512)]
    assert device.content() == before


def test_no_crash_leaves_a_change_clean(device: SimulatedDevice, image: jqcow.Image) -> None:
    image.flush()
    image.pwrite(b"\xff" * 100, 5 * CLUSTER)
    image.pwrite(b"\xff" * 100, 30 * CLUSTER)
    for state in enumerate_states(device, budget=64):
        with reopened(device.crash(state)) as crashed:
            if not len(crashed.bitmaps):
                continue
            now = crashed.pread(8 * CLUSTER, 0)
            changed = {at for at in range(0, len(now), 512) if now[at : at + 512] != OLD[at : at + 512]}
            assert changed <= {at * 512 for at in granules(dirty(crashed), 512)}


@pytest.mark.parametrize("at", range(1, 6))
def test_a_write_that_waits_in_vain_changes_nothing(
    device: SimulatedDevice, image: jqcow.Image, at: int
) -> None:
    image.flush()
    device.faults = FaultPlan(Fault(28, at=at, call="pwrite"))
    for offset in (0, REGION):
        try:
            image.pwrite(b"\xff" * 512, offset)
        except OSError:
            assert image.pread(512, offset) in (OLD[offset : offset + 512], b"\xff" * 512)
    device.faults = None
    image.pwrite(b"\xff" * 512, 0)
    assert (0, 512) in dirty(image) and image.check().ok


class CutOff(BaseException):
    """As Ctrl-C, anywhere."""


@pytest.mark.parametrize("is_warming", [True, False])
def test_what_is_cut_off_between_blocks_and_memory_leaves_the_image_in_doubt(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, is_warming: bool
) -> None:
    class Cut(dict[int, tracking.Region]):
        def update(self, *_: object) -> None:  # type: ignore[override]
            raise CutOff

        def __delitem__(self, _: int) -> None:
            raise CutOff

    with written_image(device) as written:
        written.bitmaps.add("fine", 512)
    image = reopened(device)
    image.pwrite(b"x", 0)
    known = image._engine.commits.tracking
    monkeypatch.setattr(known, "_regions", Cut(known._regions))
    with pytest.raises(CutOff):
        if is_warming:
            image.pwrite(b"x", 3 * REGION)
        else:
            image.bitmaps.clear("fine")
    with pytest.raises(jqcow.PoisonedError):
        image.pread(1, 0)


def test_many_bitmaps_have_smaller_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "REGION_MEMORY_MAX", 128)
    with jqcow.create_on_device(SimulatedDevice(), 1 << 21, cluster_size=CLUSTER) as image:
        for number in range(64):
            image.bitmaps.add(f"fine {number}", 512)
        image.pwrite(b"x" * 512, 0)
        known = image._engine.commits.tracking
        assert (known._region_bits, known._regions_max) == (12, 1)
        image.bitmaps.add("coarse", 1 << 20)
        with pytest.raises(jqcow.UnsupportedFeatureError, match="disable some"):
            image.pwrite(b"x" * 512, 4096)
        image.bitmaps.disable("coarse")
        image.pwrite(b"x" * 512, 4096)
        assert [part.offset for part in image.bitmaps.dirty_extents("fine 9")] == [0, 4096]


def test_what_lies_behind_a_table_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU leaves old bytes behind the entries of a table; a region reaches further than a small disk."""
    monkeypatch.setattr(tracking, "REGION_BITS", 24)
    path = tmp_path / "image.qcow2"
    with jqcow.create(path, 600 << 10, cluster_size=512) as image:
        image.bitmaps.add("512", 512)
        image.pwrite(b"old!" * 128, 0)
        image.checkpoint()
        (guest,) = [extent.host_offset for extent in image.extents(512, 0)]
    content = bytearray(path.read_bytes())
    area = HeaderArea.parse(bytes(content[:512]))
    place = bitmaps.place_of(area)
    assert place is not None
    table = int.from_bytes(content[place.offset : place.offset + 8], "big")
    for behind in (guest, 0x1_0000_0003):
        assert behind is not None
        content[table + 8 : table + 512] = behind.to_bytes(8, "big") * 63
        path.write_bytes(content)
        with jqcow.open(path, "r+") as image:
            assert dirty(image) == [(0, 512)]
            image.write_zeroes(1024, 300 << 10)
            image.pwrite(b"new" * 100, 0)
            image.pwrite(b"x", (600 << 10) - 1)
            assert image.pread(301, 0) == b"new" * 100 + b"o"
            assert dirty(image)[-1] == ((600 << 10) - 512, 600 << 10)
            assert image.check().ok
        with jqcow.open(path) as image:
            assert image.pread(301, 0) == b"new" * 100 + b"o"


@pytest.mark.parametrize("size", [CLUSTER, MIB])
def test_the_disk_and_the_bitmaps_may_be_others_when_a_write_has_waited(
    image: jqcow.Image, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    commits, heat = image._engine.commits, image._engine.commits.heat
    offset = MIB - 5000
    image.pwrite(b"x" * 5000, offset)
    image.flush()
    with image.transaction():
        pass

    def meanwhile(*arguments: Any) -> None:
        monkeypatch.undo()
        if size < MIB:
            image.resize(size)
        else:
            image.bitmaps.add("coarse", 1 << 20)
        heat(*arguments)

    monkeypatch.setattr(commits, "heat", meanwhile)
    try:
        image.pwrite(b"y" * 512, offset)
    except ValueError:
        assert size < MIB
    assert image.size == size and image.check().ok
    assert not any(end > size for _, end in dirty(image))
    if size == MIB:
        assert [part.length for part in image.bitmaps.dirty_extents("coarse")] == [MIB]
