"""Orphans that do not tell their place: what is expected of clusters, how they look, where they go."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from jqcow.salvage.anchoring import Anchors
from jqcow.salvage.evidence import BlockSum, Certainty, FilePiece, Orphans, PlacedDisk, Placement
from jqcow.salvage.expecting import FREE, SLACK, SYSTEM, UNKNOWN, Expectations
from jqcow.salvage.filling import Filling
from jqcow.salvage.looks import NOISE, OTHER, TEXT, ZEROS, Looks, changes, kind_of
from jqcow.salvage.ranges import Ranges
from jqcow.salvage.weighing import Odds
from tests.support.lost_disk import LostDisk

CLUSTER = 65536
BLOCK = 4096


@dataclass
class FakeSystem:
    """A file system that tells what it is given."""

    told: list[FilePiece]
    free_ranges: list[tuple[int, int]] = field(default_factory=list)
    gone: list[FilePiece] = field(default_factory=list)
    name: str = "a file system"

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        return iter(())

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        return iter(self.told)

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        return iter(self.gone)

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        return iter(self.free_ranges)

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        return iter(())


class FakeDisk:
    size = 1 << 30

    def read(self, offset: int, length: int) -> bytes | None:
        return None


class FakeOrphans:
    """Clusters by host offset."""

    cluster_bytes = CLUSTER

    def __init__(self, clusters: dict[int, bytes]) -> None:
        self.clusters = clusters

    def __len__(self) -> int:
        return len(self.clusters)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return iter(sorted(self.clusters.items()))

    def read(self, host_offset: int) -> bytes:
        return self.clusters[host_offset]


def piece(
    guest: int, length: int, valid: int, number: int, offset: int = 0, *, is_data: bool = True
) -> FilePiece:
    return FilePiece(guest, length, valid, (number, number, offset), is_data)


def expectations_of(pieces: list[FilePiece], free: list[tuple[int, int]] | None = None) -> Expectations:
    expectations = Expectations(CLUSTER)
    expectations.take([FakeSystem(pieces, free or [])], FakeDisk())
    return expectations


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (bytes(BLOCK), ZEROS),
        (b"some words of a text\n" * 200, TEXT),
        (random.Random(1).randbytes(BLOCK), NOISE),
        (bytes(range(1, 9)) * 512, OTHER),
        (bytes(BLOCK - 1) + b"a", TEXT),
    ],
)
def test_the_kind_of_a_block(content: bytes, kind: int) -> None:
    assert kind_of(content) == kind


def test_changes_leave_zeros_out() -> None:
    assert changes([TEXT, TEXT, NOISE, ZEROS, TEXT, OTHER]) == [2, 5]


def test_what_is_expected_of_a_cluster() -> None:
    expectations = expectations_of(
        [
            piece(0, 4 * BLOCK, 3 * BLOCK + 5, 7),
            piece(4 * BLOCK, 4 * BLOCK, BLOCK, 8),
            piece(8 * BLOCK, BLOCK, BLOCK, 0, is_data=False),
        ],
        [(9 * BLOCK, 5 * BLOCK)],
    )
    found = expectations.of(0)
    assert found.owners == (7,) * 4 + (8, SLACK, SLACK, SLACK, SYSTEM) + (FREE,) * 5 + (UNKNOWN,) * 2
    assert found.tails == {3: 5}
    assert found.edges == {4, 5, 8, 9, 14}
    assert found.is_data and not found.is_idle
    assert expectations.of(1).is_idle and not expectations.of(1).is_free


def test_the_unit_is_that_of_the_smallest_file_system() -> None:
    assert expectations_of([piece(BLOCK, BLOCK, 7, 1)]).block_bytes == 4096
    assert expectations_of([piece(1024, 3072, 7, 1)]).block_bytes == 1024
    assert expectations_of([piece(1, 3, 1, 1)]).block_bytes == 512


def test_what_comes_next() -> None:
    expectations = expectations_of(
        [
            piece(2 * CLUSTER, CLUSTER, CLUSTER, 1),
            piece(9 * CLUSTER, CLUSTER, CLUSTER, 1, CLUSTER),
            piece(5 * CLUSTER, CLUSTER, CLUSTER, 2),
        ]
    )
    assert expectations.next_in_use(2, 1) == 5
    assert expectations.next_in_use(5, -1) == 2
    assert list(expectations.beside_in_file(2, 1)) == [9]
    assert list(expectations.beside_in_file(9, -1)) == [2]
    assert list(expectations.beside_in_time(9, 1)) == [5]
    assert list(expectations.by_writing()) == [2, 9, 5]
    assert expectations.next_in_use(9, 1) is None


def test_a_long_piece_before_is_seen_behind_short_ones() -> None:
    pieces = [piece(0, 100 * CLUSTER, 100 * CLUSTER, 1)]
    pieces += [piece(step * CLUSTER, BLOCK, BLOCK, 1 + step) for step in range(1, 40)]
    assert expectations_of(pieces).of(60).owners == (1,) * 16


def test_a_file_s_end_tells_and_what_is_longer_does_not_fit() -> None:
    looks = Looks(BLOCK, CLUSTER)
    chance = random.Random(2)
    for length in (CLUSTER, CLUSTER - 100, CLUSTER, 3 * BLOCK + 5, CLUSTER):
        looks.add((chance.randbytes(length - 1) + b"x").ljust(CLUSTER, b"\0"))
    odds = Odds(looks)
    expected = expectations_of([piece(0, 4 * BLOCK, 3 * BLOCK + 5, 7)], [(4 * BLOCK, 12 * BLOCK)]).of(0)
    gains = [odds.of(expected, index) for index in range(5)]
    assert max(gains) == gains[3] > 5
    assert gains[0] < -5


def test_two_files_in_turns_that_are_alike_are_so_once() -> None:
    """Where one has every other block, it is no wonder that none differs from the one before."""
    looks, chance = Looks(BLOCK, CLUSTER), random.Random(4)
    for _ in range(8):
        looks.add(chance.randbytes(CLUSTER))
        looks.add(b"some words of a text, and more" * (CLUSTER // 30) + bytes(CLUSTER % 30))
    odds = Odds(looks)

    def gain(edges: list[int], files: int) -> float:
        """Return what noise tells where files begin at such blocks, so many in turns."""
        ends = [0, *edges, CLUSTER // BLOCK]
        pieces = [
            piece(first * BLOCK, (stop - first) * BLOCK, (stop - first) * BLOCK, 1 + at % files)
            for at, (first, stop) in enumerate(pairwise(ends))
        ]
        return odds.of(expectations_of(pieces).of(0), 0)

    edge = odds.edge(is_edge=True, is_changed=False)
    assert edge < -0.1
    assert gain([2, 6, 8, 12], 2) - gain([2, 6, 8, 12], 5) == pytest.approx(-3 * edge)


def written_disk(seed: int) -> tuple[list[FilePiece], dict[int, bytes], dict[int, int]]:
    """Return files, orphans by host offset, and where these belong: files written one after the other."""
    chance = random.Random(seed)
    pieces: list[FilePiece] = []
    clusters: dict[int, bytes] = {}
    truth: dict[int, int] = {}
    places = list(range(0, 800, 100))
    chance.shuffle(places)
    host = CLUSTER
    for number, place in enumerate(places, 1):
        count = chance.randrange(1, 8)
        length = count * CLUSTER - chance.randrange(1, CLUSTER)
        pieces.append(piece(place * CLUSTER, -(-length // BLOCK) * BLOCK, length, number))
        content = (chance.randbytes(length - 1) + b"x").ljust(count * CLUSTER, b"\0")
        for step in range(count):
            clusters[host] = content[step * CLUSTER : (step + 1) * CLUSTER]
            truth[host] = (place + step) * CLUSTER
            host += CLUSTER
    return pieces, clusters, truth


def test_where_one_text_ends_and_another_begins_files_do() -> None:
    chance = random.Random(3)
    words = ["journal", "cluster", "replay", "barrier", "checkpoint", "snapshot"]
    looks = Looks(BLOCK, CLUSTER)
    for _ in range(12):
        text = " ".join(chance.choices(words, k=CLUSTER // 5)).encode()
        looks.add(text[:CLUSTER])
    ended = 8 * BLOCK
    text = (b"replay " * CLUSTER)[:ended].removesuffix(b"play re") + b"ter clu"
    looks.add(text[:ended] + (b"journal barrier " * CLUSTER)[: CLUSTER - ended])
    odds = Odds(looks)
    one = piece(0, CLUSTER, CLUSTER, 1)
    two = [piece(CLUSTER, ended, ended, 1), piece(CLUSTER + ended, CLUSTER - ended, CLUSTER - ended, 2)]
    known = expectations_of([one, *two])
    whole, parted = known.of(0), known.of(1)
    for index, is_right in ((0, False), (12, True)):
        assert (odds.of(parted, index) > odds.of(whole, index)) == is_right


def test_files_that_grew_in_turns_come_in_turns() -> None:
    """Only the first piece of each has a time of its own: the others have that of the last change."""
    pieces = [
        FilePiece(
            (20 + 2 * at + number) * CLUSTER, CLUSTER, CLUSTER, (9000 * bool(at) + 1, number, at * CLUSTER)
        )
        for number in (0, 1)
        for at in range(5)
    ]
    known = expectations_of(pieces)
    assert [known.next_written(cluster, 1) for cluster in (20, 21, 24)] == [21, 22, 25]
    assert [known.next_written(cluster, -1) for cluster in (21, 25)] == [20, 24]
    assert known.next_written(50, 1) is None


@pytest.mark.parametrize("seed", range(2))
def test_files_written_one_after_the_other_are_placed(seed: int) -> None:
    pieces, clusters, truth = written_disk(seed)
    guest_map = LostDisk()
    expectations = expectations_of(pieces)
    Filling(guest_map, CLUSTER, sorted(clusters.items()), expectations, []).fill()
    right = sum(
        placement.guest_offset == truth[placement.host_offset] for placement in guest_map.placed.values()
    )
    assert right > 0.95 * len(truth)


def test_nothing_is_more_than_likely_and_no_cluster_comes_twice() -> None:
    """FI1, and one place for each orphan."""
    pieces, clusters, _ = written_disk(5)
    guest_map = LostDisk()
    Filling(guest_map, CLUSTER, sorted(clusters.items()), expectations_of(pieces), []).fill()
    assert max(placement.certainty for placement in guest_map.placed.values()) == Certainty.LIKELY
    hosts = [placement.host_offset for placement in guest_map.placed.values()]
    assert len(hosts) == len(set(hosts))


def test_what_is_placed_more_surely_stays() -> None:
    pieces, clusters, truth = written_disk(6)
    guest = next(iter(truth.values()))
    guest_map = LostDisk()
    sure = Placement(guest, 1 << 40, CLUSTER, Certainty.CERTAIN, "a table")
    guest_map.place(sure)
    Filling(guest_map, CLUSTER, sorted(clusters.items()), expectations_of(pieces), [(1 << 40, guest)]).fill()
    assert guest_map.placed[guest] is sure


def test_lies_about_files_end_in_time() -> None:
    """Pieces that overlap, lie beyond the disk, have no length, or are told again and again."""
    chance = random.Random(7)
    pieces = [
        FilePiece(
            chance.choice((0, BLOCK, chance.randrange(1 << 62))),
            chance.choice((0, BLOCK, 1 << 60)),
            chance.randrange(1 << 61),
            (chance.randrange(-(1 << 70), 1 << 70), chance.randrange(1 << 66), chance.randrange(1 << 63)),
        )
        for _ in range(300)
    ]
    clusters = {step * CLUSTER: chance.randbytes(CLUSTER) for step in range(1, 6)}
    guest_map = LostDisk()
    Filling(guest_map, CLUSTER, sorted(clusters.items()), expectations_of(pieces), []).fill()
    assert all(0 <= guest < guest_map.size for guest in guest_map.placed)


def test_a_part_that_tells_its_place_is_certain_alone() -> None:
    """A3."""
    orphans = FakeOrphans({CLUSTER: bytes(CLUSTER)})
    told = Placement(5 * CLUSTER + BLOCK, CLUSTER + BLOCK, BLOCK, Certainty.CERTAIN, "a node")
    for are_current, certainty in ((False, Certainty.LIKELY), (True, Certainty.CERTAIN)):
        guest_map, parts = LostDisk(), Ranges()
        anchors = Anchors(guest_map, orphans, parts, are_current=are_current)
        assert anchors.add(told)
        assert anchors.settle()
        assert guest_map.placed[5 * CLUSTER].certainty == certainty
        assert parts.has(5 * CLUSTER + BLOCK, BLOCK) == (not are_current)
        assert not parts.has(5 * CLUSTER, BLOCK)
        assert not anchors.add(told)
        assert not anchors.settle()


def test_parts_of_clusters_that_are_rivals_are_not_certain() -> None:
    """A2."""
    orphans = FakeOrphans({CLUSTER: bytes(CLUSTER), 2 * CLUSTER: b"x" * CLUSTER})
    guest_map, parts = LostDisk(), Ranges()
    anchors = Anchors(guest_map, orphans, parts, are_current=False)
    for host in orphans.clusters:
        anchors.add(Placement(0, host, BLOCK, Certainty.CERTAIN, "a node"))
    anchors.settle()
    assert guest_map.placed[0].certainty == Certainty.LIKELY
    assert not parts.total()


def test_ranges_know_what_they_have() -> None:
    ranges = Ranges([(10, 10), (30, 5)])
    assert ranges.has(10, 10) and ranges.has(12, 3) and ranges.has(0, 0)
    assert not ranges.has(9, 2) and not ranges.has(18, 3) and not ranges.has(20, 1)


def test_the_rest_is_looked_for_among_so_many_places_however_long_a_piece_is() -> None:
    """A container may claim any length; the search for places of what is left over ends all the same."""
    guest_map = LostDisk(size=1 << 60)
    clusters = {step * CLUSTER: bytes([step]) * CLUSTER for step in range(1, 6)}
    told = expectations_of([piece(0, 1 << 60, 1 << 60, 1, is_data=is_data) for is_data in (True, False)])
    Filling(guest_map, CLUSTER, sorted(clusters.items()), told, []).fill()
    assert len(guest_map.placed) <= len(clusters)
