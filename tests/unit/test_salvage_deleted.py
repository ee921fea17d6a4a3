"""What files had that are deleted, and how text goes on: both tell what belongs to no live file."""

from __future__ import annotations

import random
from pathlib import Path

from jqcow.salvage.continuity import ORDER, Continuity
from jqcow.salvage.evidence import FilePiece
from jqcow.salvage.expecting import DELETED, FREE, Expectations
from jqcow.salvage.guest import ext4
from jqcow.salvage.looks import Looks
from jqcow.salvage.ranges import Ranges
from jqcow.salvage.weighing import Odds
from tests.salvage.foreign import WORDS
from tests.unit import test_salvage_ext4, test_salvage_ntfs
from tests.unit.test_salvage_solver import BLOCK, CLUSTER, FakeDisk, FakeSystem, piece

NTFS_IN_USE_AT = 22


def test_the_rest_of_a_range() -> None:
    ranges = Ranges([(10, 5), (20, 5)])
    assert list(ranges.without(0, 30)) == [(0, 10), (15, 5), (25, 5)]
    assert list(ranges.without(12, 2)) == []
    assert list(ranges.without(12, 10)) == [(15, 5)]


def test_what_was_written_last_counts_of_what_is_deleted() -> None:
    deleted = [
        piece(0, 8 * BLOCK, 7 * BLOCK + 9, 1),
        piece(4 * BLOCK, 2 * BLOCK, 2 * BLOCK, 2),
        piece(12 * BLOCK, BLOCK, BLOCK, 3, is_data=False),
    ]
    live = [piece(0, 2 * BLOCK, 2 * BLOCK, 4)]
    expectations = Expectations(CLUSTER)
    expectations.take([FakeSystem(live, [(2 * BLOCK, 14 * BLOCK)], deleted)], FakeDisk())
    found = expectations.of(0)
    first, second = DELETED | 1, DELETED | 2
    assert found.owners == (4, 4, first, first, second, second, first, first) + (FREE,) * 8
    assert found.tails == {7: 9}
    assert list(expectations.by_writing()) == [0]


def test_an_ext4_tells_of_each_copy_of_an_inode(tmp_path: Path) -> None:
    data = test_salvage_ext4.make(tmp_path)
    orphans, disk, truth = test_salvage_ext4.scatter(data, 3)
    (found,) = ext4.find(test_salvage_ext4.volumes(data), disk, orphans)
    list(found.place(disk, orphans))
    disk.placed, disk.reads_zeros = truth, True
    live = {one for one in found.pieces(disk) if one.is_data}
    assert len(live) > 30
    assert {one for one in found.deleted(disk) if one.is_data} == live


@test_salvage_ntfs.pytestmark
def test_an_ntfs_tells_of_records_that_are_not_in_use(tmp_path: Path) -> None:
    disk = test_salvage_ntfs.make(tmp_path, files=20)
    structure, truth = test_salvage_ntfs.whole(disk)
    live = {one for one in structure.pieces(truth) if one.is_data}
    assert not list(structure.deleted(truth))
    found = bytearray(disk.read_bytes())
    at = -1
    while (at := found.find(b"FILE", at + 1)) >= 0:
        if int.from_bytes(found[at + 44 : at + 48], "little") >= 64:
            found[at + NTFS_IN_USE_AT] = 0
    disk.write_bytes(found)
    structure, truth = test_salvage_ntfs.whole(disk)
    assert {one for one in structure.deleted(truth) if one.is_data} == live
    assert not [one for one in structure.pieces(truth) if one.is_data]


def text(seed: int, length: int) -> bytes:
    return b" ".join(random.Random(seed).choices(WORDS, k=length))[:length]


def test_text_goes_on_where_it_was_parted() -> None:
    whole = text(1, 64 * BLOCK)
    continuity = Continuity()
    for start in range(0, len(whole), 128):
        continuity.add(whole[start : start + 128])
    places = range(BLOCK + 1, len(whole) - BLOCK, BLOCK)
    right = [continuity.follows(whole[at - 3 : at], whole[at : at + 3]) for at in places]
    wrong = [continuity.follows(whole[at - 3 : at], whole[at + 999 : at + 1002]) for at in places]
    assert sum(right) / len(right) > 1 and sum(wrong) / len(wrong) < -1


def test_neighbours_in_the_file_go_on_anywhere() -> None:
    """What is seldom between neighbours is taken for chance there, and tells between others."""
    looks = Looks(BLOCK, BLOCK)
    whole = text(2, 40 * BLOCK)
    for start in (*range(30), 35):
        looks.add(whole[start * BLOCK : (start + 1) * BLOCK])
    for start in range(0, len(whole), 128):
        looks.continuity.add(whole[start : start + 128])
    looks.add(random.Random(3).randbytes(BLOCK))
    looks.add(b"")
    pairs = range(29)
    best = max(pairs, key=lambda one: looks.follows(one, one + 1))
    parted = min(pairs, key=lambda one: looks.follows(29, one))
    assert looks.follows(29, parted) < -2 < 2 < looks.follows(best, best + 1)
    assert looks.follows(30, 31) == looks.follows(31, 0) == looks.follows(30, 32) == 0.0
    odds, expectations = Odds(looks), Expectations(BLOCK)
    expectations.take([FakeSystem([piece(0, 2 * BLOCK, 2 * BLOCK, 1)])], FakeDisk())

    def joint(first: int, second: int) -> float:
        return odds.joint(expectations.of(0), first, expectations.of(1), second)

    assert joint(29, parted) < -2 and 0 <= joint(best, best + 1) < 0.5
    # Were they neighbours, they would be so by chance.
    looks._ends[30 * 2 * ORDER : 31 * 2 * ORDER] = looks._ends[parted * 2 * ORDER : (parted + 1) * 2 * ORDER]
    assert -2 < joint(29, 30) < 0


def test_a_piece_that_ends_before_the_file_does_is_full() -> None:
    expectations = Expectations(CLUSTER)
    deleted = [FilePiece(0, 4 * BLOCK, 4 * BLOCK, (1, 1, 0))]
    expectations.take([FakeSystem([piece(2 * BLOCK, BLOCK, 5, 2)], [], deleted)], FakeDisk())
    assert expectations.of(0).owners[:4] == (DELETED | 1, DELETED | 1, 2, DELETED | 1)
    assert expectations.of(0).tails == {2: 5}
