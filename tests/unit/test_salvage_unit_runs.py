"""Units of several clusters that lie in two places of the file are put together by their sums."""

from __future__ import annotations

from pathlib import Path
from random import Random

import jqcow
from jqcow.offline.protect import protect
from jqcow.offline.salvage import diagnose, salvage
from tests.support.patients import Tables

CLUSTER = 4096
UNIT = 16384
SIZE = 2 << 20
UNITS = 40


def make(path: Path, chance: Random) -> bytearray:
    """Make a protected image of units that lie in two pieces each; return its disk."""
    disk = bytearray(SIZE)
    with jqcow.create(path, SIZE, cluster_size=CLUSTER) as image:
        pieces = []
        for number in chance.sample(range(SIZE // UNIT), UNITS):
            cut = chance.randrange(1, UNIT // CLUSTER) * CLUSTER
            pieces += [(number * UNIT, cut), (number * UNIT + cut, UNIT - cut)]
        chance.shuffle(pieces)
        for start, length in pieces:
            disk[start : start + length] = chance.randbytes(length)
            image.pwrite(disk[start : start + length], start)
    protect(path)
    return disk


def test_units_in_two_pieces(tmp_path: Path) -> None:
    path, target, chance = tmp_path / "a.qcow2", tmp_path / "saved.raw", Random(1)
    disk = make(path, chance)
    tables = Tables(path.read_bytes())
    tables.image[tables.l2 : tables.l2 + CLUSTER] = chance.randbytes(CLUSTER)
    path.write_bytes(tables.image)
    made = salvage(path, target, target_format="raw")
    assert target.read_bytes() == disk
    assert made.likely >= UNITS // 2 * UNIT, "a pair of runs is never certain"


def test_zeros_may_lie_between_two_pieces(tmp_path: Path) -> None:
    path, target, chance = tmp_path / "a.qcow2", tmp_path / "saved.raw", Random(2)
    disk = bytearray(SIZE)
    with jqcow.create(path, SIZE, cluster_size=CLUSTER) as image:
        for start in (3 * UNIT, 6 * UNIT, 3 * UNIT + 3 * CLUSTER):
            disk[start : start + CLUSTER] = chance.randbytes(CLUSTER)
            image.pwrite(disk[start : start + CLUSTER], start)
    protect(path)
    tables = Tables(path.read_bytes())
    tables.image[tables.l2 : tables.l2 + CLUSTER] = chance.randbytes(CLUSTER)
    path.write_bytes(tables.image)
    salvage(path, target, target_format="raw")
    assert target.read_bytes() == disk


def test_what_has_the_place_of_another_is_found_by_its_sum(tmp_path: Path) -> None:
    """UR3: the other clusters of the units are where their table says."""
    path, target, chance = tmp_path / "a.qcow2", tmp_path / "saved.raw", Random(3)
    disk = make(path, chance)
    tables = Tables(path.read_bytes())
    entries = [at for at in range(tables.l2, tables.l2 + CLUSTER, 8) if any(tables.image[at : at + 8])]
    chosen = chance.sample(entries, 12)
    for one, other in zip(chosen[:6], chosen[6:], strict=True):
        tables.image[other : other + 8] = tables.image[one : one + 8]
    path.write_bytes(tables.image)
    made = salvage(path, target, target_format="raw")
    assert target.read_bytes() == disk
    assert made.likely == 6 * CLUSTER, "those whose entries are right, and named twice"
    found = diagnose(path, deep=True)
    assert (found.disks[0].certain, found.disks[0].likely) == (made.certain, made.likely)
