"""Files that grew in turns: when each part was written, and which cluster's turn comes next."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from jqcow import _native
from jqcow.salvage.evidence import FilePiece
from jqcow.salvage.expecting import Expectations
from jqcow.salvage.filling import Filling
from jqcow.salvage.guest import growing
from jqcow.salvage.guest.growing import Growths
from jqcow.salvage.guest.xfs_log import LoggedInode, logged_inodes
from jqcow.salvage.guest.xfs_ondisk import Superblock
from jqcow.salvage.pieces import Pieces
from tests.support.lost_disk import LostDisk
from tests.unit.test_salvage_solver import BLOCK, CLUSTER, FakeDisk, FakeSystem, expectations_of

LEFT, RIGHT, COUNT = 20, 60, 12
"""Where two files begin, and how many clusters each has."""
JOURNAL = 200
"""Where the journal does."""


def together(made: int = 0, changed: int = 10_000, count: int = COUNT) -> list[FilePiece]:
    """Two files in one piece each, of which the second lived from ``made`` to ``changed``."""
    length = count * CLUSTER
    return [
        FilePiece(LEFT * CLUSTER, length, length, (1_000_000, 1, 0), changed_ns=1_010_000),
        FilePiece(RIGHT * CLUSTER, length, length, (1_000_000 + made, 2, 0), changed_ns=1_000_000 + changed),
    ]


def test_files_of_the_same_times_grew_in_turns() -> None:
    known = expectations_of(together(made=100, changed=10_100))
    assert [known.turn(cluster, 1) for cluster in (20, 60, 21, 61)] == [60, 21, 61, 22]
    assert [known.turn(cluster, -1) for cluster in (60, 21, 71)] == [20, 60, 31]
    assert known.turn(71, 1) is None and known.turn(99, 1) is None
    # They need not have grown evenly.
    assert [list(known.near_turns(cluster, 1)) for cluster in (20, 60, 71)] == [[21, 61], [61, 22, 20], [31]]
    assert list(known.near_turns(61, -1)) == [60, 20, 22] and not list(known.near_turns(99, 1))
    # The last change of one may be a turn before that of the other; and the first.
    assert expectations_of(together(made=100, changed=9_000)).turn(20, 1) == 60
    assert expectations_of(together(made=600)).turn(20, 1) == 60
    # In a cluster there are no turns.
    assert expectations_of(together(count=1)).turn(20, 1) is None


@pytest.mark.parametrize(("made", "changed"), [(0, 5_000), (1_000, 10_000), (0, 0)])
def test_files_of_other_times_did_not(made: int, changed: int) -> None:
    known = expectations_of(together(made, changed))
    assert known.turn(20, 1) is None and known.rank(31) == known.rank(20)


def test_files_between_which_others_were_made_did_not() -> None:
    others = [
        FilePiece(number * CLUSTER, CLUSTER, CLUSTER, (1_000_000 + number, number, 0)) for number in (3, 4)
    ]
    assert expectations_of(together(made=9) + others[:1]).turn(20, 1) == 60
    assert expectations_of(together(made=9) + others).turn(20, 1) is None


def test_a_cut_keeps_all_and_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """PI1."""
    for most, count in ((1 << 20, 24), (20, 13), (5, 2)):
        monkeypatch.setattr("jqcow.salvage.pieces.PIECES_MAX", most)
        pieces = Pieces(CLUSTER)
        for piece in together():
            pieces.add(piece)
        pieces.sort()
        assert len(pieces) == count
        assert sum(pieces.lengths) == sum(pieces.valid) == 2 * COUNT * CLUSTER
    monkeypatch.setattr("jqcow.salvage.pieces.PIECES_MAX", 1 << 20)
    monkeypatch.setattr("jqcow.salvage.pieces.PARTS_MAX", 3)
    pieces = Pieces(CLUSTER)
    for piece in together():
        pieces.add(piece)
    pieces.sort()
    assert list(pieces.lengths) == [4 * CLUSTER] * 6


def test_what_another_had_first_was_not_written_in_turn() -> None:
    """A file that is deleted had the clusters before: they were allocated when that was written."""
    length = COUNT * CLUSTER
    before = FilePiece(LEFT * CLUSTER, length, length, (500, 9, 0))
    known = Expectations(CLUSTER)
    known.take([FakeSystem(together(), gone=[before])], FakeDisk())
    assert known.rank(20) == known.rank(31) == 0 and known.turn(20, 1) is None
    assert known.of(20).owners == (1,) * 16
    assert known.turn(60, 1) == 61
    # What was a part of the same file is no other.
    known = Expectations(CLUSTER)
    known.take(
        [FakeSystem(together(), gone=[FilePiece(LEFT * CLUSTER, length, length, (500, 1, 0))])], FakeDisk()
    )
    assert known.turn(20, 1) == 60


def test_what_is_not_written_yet_is_zeros_and_has_no_turn() -> None:
    known = expectations_of([FilePiece(0, CLUSTER, 0, (5, 1, 0)), *together()])
    assert known.rank(0) is None and not known.of(0).tails and known.rank(20) == 0


@pytest.mark.parametrize(("seed", "every"), [(0, 0), (1, 1), (0, 3)])
def test_noise_that_grew_in_turns_is_placed(seed: int, every: int) -> None:
    """FI3: nothing but the order of writing tells of noise: the journal has it to the turn.

    The blocks of that journal lie between, each behind ``every`` so many clusters.
    """
    chance, growths = random.Random(seed), Growths()
    done, order = {LEFT: 0, RIGHT: 0}, list[int]()
    whole = COUNT * CLUSTER
    while min(done.values()) < whole:
        start = chance.choice([one for one in done if done[one] < whole]) if done[LEFT] else LEFT
        before, done[start] = done[start], min(done[start] + chance.randrange(1, 6) * BLOCK, whole)
        growths.add(1 if start == LEFT else 2, done[start], 1_000_000)
        order += range(start + -(-before // CLUSTER), start + -(-done[start] // CLUSTER))
    own = iter(range(JOURNAL, JOURNAL + len(order)))
    lies = [one for at, cluster in enumerate(order) for one in (*own_before(at, own, every), cluster)]
    pieces = [part for piece in together() for part in growths.parts(piece, BLOCK)]
    log = FilePiece(JOURNAL * CLUSTER, 100 * CLUSTER, 100 * CLUSTER, (1, 8, 0), is_data=False)
    clusters = [(h * CLUSTER, chance.randbytes(CLUSTER)) for h, at in enumerate(lies) if at < JOURNAL]
    anchored = [(h * CLUSTER, at * CLUSTER) for h, at in enumerate(lies) if at >= JOURNAL]
    guest_map = LostDisk()
    Filling(guest_map, CLUSTER, clusters, expectations_of([*pieces, log]), anchored).fill()
    placed = {one.host_offset // CLUSTER: one.guest_offset // CLUSTER for one in guest_map.placed.values()}
    assert [placed.get(h) for h, at in enumerate(lies) if at < JOURNAL] == order


def own_before(at: int, own: Iterator[int], every: int) -> list[int]:
    return [next(own)] if every and at % every == 0 else []


# How files grew, by the journals of file systems


def parts(growths: Growths, piece: FilePiece) -> list[tuple[int, int, int]]:
    found = list(growths.parts(piece, BLOCK))
    assert sum(part.length for part in found) == piece.length
    assert sum(part.valid_bytes for part in found) == piece.valid_bytes
    return [(part.guest_offset // BLOCK, part.length // BLOCK, part.written[0]) for part in found]


def test_a_piece_is_cut_where_its_file_ended_once() -> None:
    growths = Growths()
    for size, changed in ((2 * BLOCK, 100), (2 * BLOCK, 150), (3 * BLOCK + 5, 200), (6 * BLOCK, 200)):
        growths.add(7, size, changed)
    piece = FilePiece(50 * BLOCK, 8 * BLOCK, 8 * BLOCK - 9, (90, 7, 0), changed_ns=400)
    assert parts(growths, piece) == [(50, 2, 90), (52, 2, 200), (54, 2, 201), (56, 2, 400)]
    late = FilePiece(50 * BLOCK, 3 * BLOCK, 3 * BLOCK, (400, 7, 1 * BLOCK))
    assert parts(growths, late) == [(50, 1, 100), (51, 2, 200)]
    other = FilePiece(0, BLOCK, BLOCK, (1, 8, 0))
    assert list(growths.parts(other, BLOCK)) == [other]


def test_the_order_of_the_journal_counts_more_than_its_times() -> None:
    growths = Growths()
    for number, size, changed in ((1, 1, 500), (2, 1, 300), (1, BLOCK + 1, 500), (2, BLOCK + 1, 490)):
        growths.add(number, size, changed)
    found = [
        parts(growths, FilePiece(0, 2 * BLOCK, 2 * BLOCK, (0, number, 0), changed_ns=0))[1][2]
        for number in (1, 2)
    ]
    assert found == [502, 503]


def test_a_file_that_was_cut_off_grew_anew() -> None:
    growths = Growths()
    for size, changed in ((4 * BLOCK, 10), (8 * BLOCK, 20), (2 * BLOCK, 30), (5 * BLOCK, 40)):
        growths.add(1, size, changed)
    piece = FilePiece(0, 5 * BLOCK, 5 * BLOCK, (5, 1, 0))
    assert parts(growths, piece) == [(0, 2, 5), (2, 3, 40)]


def test_so_many_copies_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """GR1."""
    monkeypatch.setattr(growing, "COPIES_MAX", 3)
    growths = Growths()
    for size in range(1, 100):
        growths.add(1, size * BLOCK, size)
    assert len(parts(growths, FilePiece(0, 100 * BLOCK, 100 * BLOCK, (0, 1, 0)))) == 4


UUID = bytes(range(50, 66))
LOG, LOG_BLOCKS = 3, 16


def superblock() -> Superblock:
    return Superblock(4096, 100, UUID, LOG, (), 64, 100, 1, LOG_BLOCKS, 512, 512, 3, 7, 4096, False, False, 0)


def inode(number: int, size: int, order: str, *, is_big: bool = True) -> bytes:
    """An inode as the kernel's `struct xfs_log_dinode` has it."""
    stamp = (1 << 31) * 10**9 + 77 if is_big else 0
    word = ">" if order == "big" else "<"
    times = struct.pack(f"{word}24x") if is_big else struct.pack(f"{word}8x8xii", 3, 9)
    head = struct.pack(f"{word}HHBB26x", 0x494E, 0o100644, 3, 2) + times
    if is_big:
        head = head[:48] + struct.pack(f"{word}Q", stamp)
    middle = struct.pack(f"{word}Q56xQ24xQ", size, 8 if is_big else 0, number)
    return head + middle + UUID


def record(block: int, cycle: int, body: bytes, order: str) -> bytes:
    """A record as the kernel writes it: the header has what was where the cycle stands in 512 bytes."""
    body = body.ljust(-(-len(body) // 512) * 512, b"\0")
    cut = bytearray(body)
    cycles = b"".join(body[at : at + 4] for at in range(0, len(body), 512))
    for at in range(0, len(body), 512):
        cut[at : at + 4] = cycle.to_bytes(4)
    head = struct.pack(">IIIIQ", 0xFEEDBABE, cycle, 2, len(body), cycle << 32 | block).ljust(44, b"\0")
    head += cycles.ljust(256, b"\0") + struct.pack(">I16sI", 1 if order == "little" else 2, UUID, 32768)
    crc = _native.crc32c(bytes(cut), _native.crc32c(head.ljust(328, b"\0")))
    return (head[:32] + crc.to_bytes(4, "little") + head[36:]).ljust(512, b"\0") + bytes(cut)


@pytest.mark.parametrize("order", ["little", "big"])
def test_an_xfs_log_has_the_inodes_of_each_turn(order: str) -> None:
    log = bytearray(LOG_BLOCKS * 4096)
    cuts = (
        inode(5, 111, order),
        bytes(420) + inode(6, 222, order),
        bytes(340) + inode(5, 333, order, is_big=False),
    )
    places = (20, 60, 1), (1, 1, 2), (40, 60, 1)
    for (block, _, cycle), body in zip(places, cuts, strict=True):
        one = record(block, cycle, body, order)
        log[block * 512 : block * 512 + len(one)] = one

    def read(at: int, length: int) -> bytes | None:
        return bytes(log[at - LOG * 4096 :][:length])

    assert list(logged_inodes(read, superblock())) == [
        LoggedInode(5, 111, 77),
        LoggedInode(5, 333, 3_000_000_009),
        LoggedInode(6, 222, 77),
    ]
    log[40 * 512 + 700] ^= 1
    assert [one.size for one in logged_inodes(read, superblock())] == [111, 222]
    assert not list(logged_inodes(lambda at, length: None, superblock()))
