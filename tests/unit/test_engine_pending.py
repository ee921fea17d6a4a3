"""What waits: pieces laid over each other, and the layers that they pass through."""

from __future__ import annotations

from random import Random

import pytest

from jqcow.engine.pending import Pending, Piece, Pieces
from jqcow.ondisk.frame import IntentOperation

LENGTH = 64


def piece(offset: int, letters: bytes, sequence: int = 0) -> Piece:
    return Piece(offset, memoryview(letters), sequence)


def shown(pieces: Pieces) -> bytes:
    """Return what pieces show of a disk of dots; they must be in order, and apart."""
    disk, end = bytearray(b"." * LENGTH), 0
    for each in pieces:
        assert each.offset >= end and len(each.data)
        disk[each.offset : each.end] = each.data
        end = each.end
    assert pieces.length_bytes == sum(len(each.data) for each in pieces)
    return bytes(disk)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_show_what_bytes_would(seed: int) -> None:
    random, disk, pieces = Random(seed), bytearray(b"." * LENGTH), Pieces()
    laid = []
    for number in range(40):
        start = random.randrange(LENGTH)
        letters = bytes([97 + number % 26]) * random.randint(1, min(12, LENGTH - start))
        disk[start : start + len(letters)] = letters
        laid.append(piece(start, letters, number))
        pieces.lay(laid[-1])
        assert shown(pieces) == disk
        first = random.randrange(LENGTH)
        reached = {at for each in pieces.within(first, first + 5) for at in range(each.offset, each.end)}
        assert {at for at in range(first, min(first + 5, LENGTH)) if disk[at] != ord(".")} <= reached
    # All at once they show the same, each part with the sequence of what was laid there last.
    at_once = Pieces.of(laid)
    assert shown(at_once) == disk
    assert {each.sequence for each in at_once} == {each.sequence for each in pieces}


def test_many_pieces_are_laid_at_once_in_little_time() -> None:
    """A hostile journal has any number of them, all over each other."""
    laid = [piece(at, b"x" * 600, at) for at in range(5_000)]
    assert len(Pieces.of(laid)) == 5_000


def read(pending: Pending, start: int = 0, end: int = LENGTH) -> bytes:
    disk = bytearray(b"." * (end - start))
    for each in pending.layers(start, end):
        part = each.part(start, end)
        disk[part.offset - start : part.end - start] = part.data
    return bytes(disk)


def test_layers_are_read_the_newest_first() -> None:
    pending = Pending()
    pending.fresh.lay(piece(0, b"aaaa"))
    pending.cut()
    pending.landed(5, 0)
    pending.fresh.lay(piece(1, b"bb"))
    pending.cut()
    pending.fresh.lay(piece(2, b"c"))
    assert read(pending, 0, 6) == b"abca.."
    assert pending.overlaps(3, 9) and not pending.overlaps(4, 9)
    pending.take_back()
    assert read(pending, 0, 6) == b"abca.."
    assert [bytes(each.data) for each in pending.cut()] == [b"b", b"c"]


def round_trip(pending: Pending) -> list[tuple[int, bytes]]:
    return [(offset, bytes(data)) for offset, data in pending.begin_round(9).runs()]


def test_a_round_joins_what_lies_side_by_side() -> None:
    pending = Pending()
    pending.load([IntentOperation(3, 0, b"aa"), IntentOperation(4, 2, b"bb")])
    pending.fresh.lay(piece(4, b"cc"))
    pending.fresh.lay(piece(8, b"d"))
    assert round_trip(pending) == [(0, b"aabbcc"), (8, b"d")]


def test_what_came_during_a_round_is_not_declared_done() -> None:
    pending = Pending()
    pending.load([IntentOperation(3, 0, b"aa")])
    pending.fresh.lay(piece(4, b"bb"))
    begun = pending.begin_round(3)
    # A record of the round logs what was fresh, and what came since.
    pending.fresh.lay(piece(8, b"cc"))
    pending.cut()
    pending.landed(4, 0)
    assert pending.end_round(begun, 4) == 3
    assert read(pending, 0, 10) == b"....bb..cc"
    assert [each.sequence for each in pending.carried(0)] == [3, 4, 4]
    assert [each.sequence for each in pending.carried(3)] == [4, 4]
    pending.landed(5, 3)
    assert [each.sequence for each in pending.carried(0)] == [4, 4]


def test_a_round_that_logged_only_its_own_declares_all_done() -> None:
    pending = Pending()
    pending.fresh.lay(piece(4, b"bb"))
    begun = pending.begin_round(3)
    pending.cut()
    pending.landed(4, 0)
    assert pending.end_round(begun, 4) == 4
    assert pending.is_empty and pending.carried(0)


def test_what_was_written_over_during_a_round_stays() -> None:
    pending = Pending()
    pending.fresh.lay(piece(0, b"aaaa"))
    begun = pending.begin_round(3)
    pending.fresh.lay(piece(1, b"b"))
    assert pending.end_round(begun, 3) == 0
    # The ends are parts of what was written: they are written again, which does no harm.
    assert read(pending, 0, 5) == b"abaa."


def test_a_part_does_not_keep_the_whole_in_memory() -> None:
    whole = piece(0, b"x" * 4096)
    assert whole.part(8, 16).data.obj == b"x" * 8
