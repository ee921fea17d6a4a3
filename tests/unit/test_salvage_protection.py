"""Salvage by the sums of jqcow protect: found with and without a header, certain only where that is known."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

import jqcow
from jqcow import _native
from jqcow.device.file import FileDevice
from jqcow.ondisk.bitmaps import place_of
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.protection import CHANGED, RECORD, SUMS, reversed_crc
from jqcow.salvage.anchoring import Anchors, by_protection
from jqcow.salvage.evidence import BlockSum, Certainty, Placement
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.marks import Marks
from jqcow.salvage.orphans import OrphanClusters, Unnamed, mark_header
from jqcow.salvage.protection import Protection, find_protection
from jqcow.salvage.ranges import Ranges
from jqcow.salvage.reading import MappedDisk, PieceReader
from jqcow.salvage.shape import Shape
from jqcow.salvage.source import Source
from jqcow.salvage.sums import SumIndex
from jqcow.salvage.tables import read_tables
from jqcow.salvage.unit_runs import UnitRuns

CLUSTER = 16384
MIB = 1 << 20


def made(path: Path, seed: int = 1, cluster_size: int = CLUSTER) -> bytes:
    """Make a protected image that was written to since; return what its disk holds."""
    chance = Random(seed)
    with jqcow.create(path, 4 * MIB, cluster_size=cluster_size) as image:
        for _ in range(20):
            image.pwrite(chance.randbytes(CLUSTER * 2), chance.randrange(200) * CLUSTER)
        image.protection.refresh()
        for _ in range(3):
            image.pwrite(chance.randbytes(CLUSTER), chance.randrange(256) * CLUSTER)
        return image.pread(image.size, 0)


def area_of(path: Path) -> HeaderArea:
    return HeaderArea.parse(path.read_bytes()[:65536])


def places_of(path: Path) -> dict[str, int]:
    """Return where the parts of a closed image lie."""
    area = area_of(path)
    place = place_of(area)
    assert place is not None
    with jqcow.open(path) as image:
        bitmaps = image._engine.public.bitmaps
        found = {
            name: next((at for _, at in bitmaps.allocated(bitmaps.find(name))), 0)
            for name in (SUMS, CHANGED, RECORD)
        }
    return found | {"directory": place.offset, "L1": area.header.l1_table_offset}


def lose(path: Path, *offsets: int, fill: int | None = None) -> None:
    """Overwrite clusters of a file, and all its L2 tables."""
    area = area_of(path)
    content = bytearray(path.read_bytes())
    cluster = area.header.geometry.cluster_bytes
    l1 = content[area.header.l1_table_offset :][: 8 * area.header.l1_size]
    tables = [entry & 0x00FFFFFFFFFFFE00 for (entry,) in struct.iter_unpack(">Q", l1)]
    for offset in (*(table for table in tables if table), *offsets):
        noise = Random(offset).randbytes(cluster) if fill is None else bytes([fill]) * cluster
        content[offset : offset + cluster] = noise[: len(content) - offset]
    path.write_bytes(content)


def found_in(path: Path, area: HeaderArea) -> tuple[Protection | None, dict[int, Placement]]:
    """Return the protection of a damaged file, and the placements that it makes."""
    device = FileDevice.open(path, writable=False)
    try:
        source, shape = Source(device), Shape(area)
        marks = Marks(shape.geometry.cluster_bits, source.size())
        mark_header(shape, marks)
        tables = read_tables(source, shape, marks)
        guest_map = GuestMap(tables, marks)
        orphans = OrphanClusters(source, marks.cluster_bits, Unnamed(source, shape, marks).bits)
        protection = find_protection(source, area, orphans)
        if protection is None:
            return None, {}
        anchors = Anchors(guest_map, orphans, Ranges(), are_current=True)
        disk = MappedDisk(guest_map, PieceReader(source, shape))
        placements = list(by_protection(protection, guest_map, disk, orphans))
        for placement in placements:
            anchors.add(placement)
        anchors.settle()
        return protection, {placement.guest_offset: placement for placement in placements}
    finally:
        device.close()


def judge(path: Path, disk: bytes, placements: dict[int, Placement]) -> tuple[int, int]:
    """Return how many placements are certain, and how many clusters of data have none; none is wrong."""
    content = path.read_bytes()
    for guest, placement in placements.items():
        held = content[placement.host_offset :][: placement.length]
        if placement.certainty == Certainty.CERTAIN:
            assert disk[guest : guest + placement.length] == held
    certain = [guest for guest, one in placements.items() if one.certainty == Certainty.CERTAIN]
    data = [at for at in range(0, len(disk), CLUSTER) if any(disk[at : at + CLUSTER])]
    return len(certain), len(set(data) - set(placements))


@pytest.mark.parametrize("is_header_lost", [False, True])
def test_all_that_has_a_sum_is_certain(tmp_path: Path, *, is_header_lost: bool) -> None:
    path = tmp_path / "disk.qcow2"
    disk = made(path)
    area = area_of(path)
    if is_header_lost:
        lose(path, 0, area.header.l1_table_offset, area.header.refcount_table_offset)
        area = replace(area, extensions=())
    else:
        lose(path)
    protection, placements = found_in(path, area)
    assert protection is not None and protection.certainty == Certainty.CERTAIN
    certain, missing = judge(path, disk, placements)
    assert certain > 20 and missing <= 3


def test_without_the_directory_nothing_is_certain(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    disk = made(path)
    area, places = area_of(path), places_of(path)
    lose(path, 0, places["directory"])
    protection, placements = found_in(path, replace(area, extensions=()))
    assert protection is not None and protection.certainty == Certainty.LIKELY
    assert judge(path, disk, placements)[0] == 0
    assert len(placements) > 20


@pytest.mark.parametrize("name", [SUMS, CHANGED, RECORD])
@pytest.mark.parametrize("fill", [None, 0, 255])
def test_a_part_that_is_lost_makes_nothing_wrong(tmp_path: Path, name: str, fill: int | None) -> None:
    path = tmp_path / "disk.qcow2"
    disk = made(path)
    area, places = area_of(path), places_of(path)
    lose(path, places[name], fill=fill)
    protection, placements = found_in(path, area)
    judge(path, disk, placements)
    if name != CHANGED:
        assert protection is None
    elif fill == 0:
        assert protection is not None and protection.certainty == Certainty.LIKELY


def test_what_a_program_left_in_use_is_not_certain(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    made(path)
    content, place = bytearray(path.read_bytes()), places_of(path)["directory"]
    content[place + 15] |= 1
    path.write_bytes(content)
    area = area_of(path)
    lose(path)
    for known in (area, replace(area, extensions=())):
        protection, _ = found_in(path, known)
        assert protection is not None and protection.certainty == Certainty.LIKELY


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_overwritten_nothing_fails_and_nothing_certain_is_wrong(
    tmp_path: Path, seed: int
) -> None:
    path = tmp_path / "disk.qcow2"
    disk = made(path, seed)
    area, chance = area_of(path), Random(seed)
    lose(path)
    content = bytearray(path.read_bytes())
    for _ in range(8):
        at, length = chance.randrange(len(content)), chance.choice((1, 512, 5000, 40000))
        content[at : at + length] = chance.randbytes(min(length, len(content) - at))
    path.write_bytes(content)
    for known in (area, replace(area, extensions=())):
        protection, placements = found_in(path, known)
        if protection is not None:
            judge_sums(path, disk, placements)


def judge_sums(path: Path, disk: bytes, placements: dict[int, Placement]) -> None:
    """What is certain is what the disk held."""
    content = path.read_bytes()
    for guest, one in placements.items():
        if one.certainty == Certainty.CERTAIN:
            assert content[one.host_offset :][: one.length] == disk[guest : guest + one.length]


# How sure a sum makes


class Clusters:
    """Orphans by host offset."""

    cluster_bytes = 4096

    def __init__(self, contents: dict[int, bytes]) -> None:
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(sorted(self.contents.items()))

    def read(self, host_offset: int) -> bytes:
        return self.contents[host_offset]


class Everywhere:
    """A map in which all is open."""

    size = 1 << 40

    def is_open(self, _: int) -> bool:
        return True

    def read(self, _: int, length: int) -> bytes | None:
        raise AssertionError("nothing is known")


def block(number: int) -> bytes:
    return Random(number).randbytes(4096)


def sums_of(blocks: dict[int, int]) -> SumIndex:
    index = SumIndex(Everywhere(), 4096)  # type: ignore[arg-type]
    for guest, number in blocks.items():
        index.add(BlockSum(guest, 4096, _native.crc32c(block(number))))
    return index


def placed(index: SumIndex, contents: dict[int, bytes]) -> dict[int, tuple[int, Certainty]]:
    return {
        one.guest_offset: (one.host_offset, one.certainty) for one in index.placements(Clusters(contents))
    }


def test_one_sum_is_certain_among_few() -> None:
    found = placed(sums_of({0: 1, 8192: 2}), {4096: block(1), 12288: block(3)})
    assert found == {0: (4096, Certainty.CERTAIN)}


def test_one_sum_is_likely_among_many_unless_a_neighbour_is_right_too() -> None:
    sums = {guest * 4096: guest for guest in range(100)}
    strangers = {(1000 + 2 * number) * 4096: block(1000 + number) for number in range(100)}
    found = placed(sums_of(sums), strangers | {4096: block(1), 40960: block(7), 45056: block(8)})
    assert found == {
        4096: (4096, Certainty.LIKELY),
        7 * 4096: (40960, Certainty.CERTAIN),
        8 * 4096: (45056, Certainty.CERTAIN),
    }


def test_content_of_several_places_is_certain_if_there_is_enough_of_it() -> None:
    sums = sums_of({0: 5, 8192: 5})
    assert placed(sums, {4096: block(5)}) == {0: (4096, Certainty.LIKELY)}
    assert placed(sums, {4096: block(5), 12288: block(5)}) == {
        0: (4096, Certainty.CERTAIN),
        8192: (12288, Certainty.CERTAIN),
    }


def test_two_contents_of_one_sum_are_not_certain() -> None:
    body = block(1)[:4092]
    one = body + _native.crc32c(body).to_bytes(4, "little")
    other = b"x" * 4092 + _native.crc32c(b"x" * 4092).to_bytes(4, "little")
    index = SumIndex(Everywhere(), 4096)  # type: ignore[arg-type]
    index.add(BlockSum(0, 4096, _native.crc32c(one)))
    found = list(index.placements(Clusters({4096: one, 8192: other})))
    assert [placement.certainty for placement in found] == [Certainty.LIKELY] * 2


def runs_of(*units: tuple[int, list[int | None]]) -> UnitRuns:
    """Return what knows units by guest offset, each of blocks or zeros."""
    index = UnitRuns(Everywhere(), Everywhere(), 4096, 16384, "sums", Certainty.CERTAIN)  # type: ignore[arg-type]
    for guest, numbers in units:
        content = b"".join(bytes(4096) if number is None else block(number) for number in numbers)
        index.add(BlockSum(guest, 16384, reversed_crc(content)))
    return index


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [None, 1, 2, None], [None, None, None, 3], [0, None]])
def test_a_sum_of_several_clusters_places_a_run_of_them(numbers: list[int | None]) -> None:
    numbers = numbers + [None] * (4 - len(numbers))
    known = ((place, number) for place, number in enumerate(numbers) if number is not None)
    contents = {(9 + place) * 4096: block(number) for place, number in known}
    found = {
        one.guest_offset: (one.host_offset, one.certainty)
        for one in runs_of((32768, numbers)).placements(Clusters(contents | {4096: block(77)}))
    }
    assert found == {32768 + host - 36864: (host, Certainty.CERTAIN) for host in contents}


def test_runs_that_have_too_many_strangers_are_likely_without_a_neighbour() -> None:
    strangers = {(1000 + number) * 4096: block(1000 + number) for number in range(400)}
    lost = [(1 << 20 | at << 14, [5000 + at, None, None, None]) for at in range(8)]
    index = runs_of((0, [0, 1, 2, 3]), (16384, [4, 5, None, None]), (65536, [6, 7, 8, 9]), *lost)
    contents = {(9 + place) * 4096: block(place) for place in range(6)}
    contents |= {(30 + place) * 4096: block(6 + place) for place in range(4)}
    found = {one.guest_offset: one.certainty for one in index.placements(Clusters(strangers | contents))}
    assert {found[guest * 4096] for guest in range(6)} == {Certainty.CERTAIN}
    assert {found[65536 + at] for at in range(0, 16384, 4096)} == {Certainty.LIKELY}


def test_runs_of_one_content_share_no_cluster() -> None:
    index = runs_of((0, [1, 1, 1, 1]), (65536, [1, 1, 1, 1]))
    contents = {(9 + place) * 4096: block(1) for place in range(8)}
    found = list(index.placements(Clusters(contents)))
    assert len({one.host_offset for one in found}) == len(found) == 8
    assert {one.certainty for one in found} == {Certainty.CERTAIN}
