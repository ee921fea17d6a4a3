"""Units of several clusters that lie in two places of the file are put together by their sums."""

from __future__ import annotations

from pathlib import Path
from random import Random

import jqcow
from jqcow.offline.protect import protect
from jqcow.offline.salvage import salvage
from tests.support.patients import Tables

CLUSTER = 4096
UNIT = 16384
SIZE = 2 << 20
UNITS = 40


def test_units_in_two_pieces(tmp_path: Path) -> None:
    path, target, disk, chance = tmp_path / "a.qcow2", tmp_path / "saved.raw", bytearray(SIZE), Random(1)
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
    tables = Tables(path.read_bytes())
    tables.image[tables.l2 : tables.l2 + CLUSTER] = chance.randbytes(CLUSTER)
    path.write_bytes(tables.image)
    made = salvage(path, target, target_format="raw")
    assert target.read_bytes() == disk
    assert made.likely >= UNITS // 2 * UNIT, "a pair of runs is never certain"
