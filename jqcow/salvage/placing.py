"""One place for each orphan of a disk: by what tells its place itself, by what is expected, by order."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from jqcow.salvage.anchoring import Find
from jqcow.salvage.candidates import TableSearch
from jqcow.salvage.evidence import Certainty, GuestStructure, Orphans, PlacedDisk, Placement
from jqcow.salvage.expecting import Expectations
from jqcow.salvage.filling import BLOCKS_MAX, CLUSTERS_MAX, Filling
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.in_turns import anchor_in_turns
from jqcow.salvage.orphans import ZEROS_MAX, OrphanClusters
from jqcow.salvage.protection import Protection
from jqcow.salvage.reading import MappedDisk, PieceReader


@dataclass(frozen=True)
class Placed:
    """What became of the orphans of a disk.

    Attributes:
        structures: what of the guest was recognised, for people.
        anchored: how many clusters told by themselves where they belong.
        orphans: how many there were.
        end: how far the disk goes at least, by what was placed and by what file systems say.
    """

    structures: tuple[str, ...] = ()
    anchored: int = 0
    orphans: int = 0
    end: int = 0


def place_orphans(
    guest_map: GuestMap,
    reader: PieceReader,
    orphans: OrphanClusters,
    find: Find,
    protection: Protection | None = None,
    search: TableSearch | None = None,
    *,
    are_current: bool = False,
) -> Placed:
    """Place the orphans in what a disk has lost.

    Args:
        guest_map: of the disk; the placements are put into it.
        reader: of its pieces.
        orphans: what is to be placed.
        find: finds the structures of the guest.
        protection: the sums that `jqcow protect` made, where there are any.
        search: finds tables that no L1 table names; None where none is missed.
        are_current: no orphan is an old copy: sound refcounts say that none has two users, and there are no
            snapshots. Else what tells the place of a part of a cluster is certain of no more than that part.
    """
    if protection is not None:
        for host in protection.structures:
            orphans.bits.discard(host // orphans.cluster_bytes)
        guest_map.opens_shared = True
    guest_map.tables.are_empty_sure = not len(orphans)
    disk = MappedDisk(guest_map, reader)
    anchored, structures = anchor_in_turns(
        guest_map, disk, orphans, find, protection, search, are_current=are_current
    )
    expectations = Expectations(orphans.cluster_bytes)
    expectations.take(structures, disk.trusting(Certainty.LIKELY))
    if len(expectations):
        _fill(guest_map, orphans, expectations, list(anchored.items()))
    if not len(expectations) and not anchored:
        _place_in_order(guest_map, orphans)
    guest_map.tables.are_empty_sure = _is_all_certain(guest_map, anchored, orphans)
    end = _end(guest_map, structures, disk) if "size" in guest_map.tables.shape.lost else 0
    return Placed(_names(structures), len(anchored), len(orphans), end)


def _end(guest_map: GuestMap, structures: list[GuestStructure], disk: PlacedDisk) -> int:
    """Return how far a disk goes at least."""
    cluster_bytes, end = guest_map.tables.shape.geometry.cluster_bytes, 0
    for index, placed in guest_map.placed.items():
        count = len(placed.certainties.rstrip(b"\0"))
        end = max(end, guest_map.tables.guest_range(index)[0] + count * cluster_bytes)
    for index in guest_map.tables.likely:
        end = max(end, sum(guest_map.tables.guest_range(index)))
    for structure in structures:
        pieces = ((piece.guest_offset, piece.length) for piece in structure.pieces(disk))
        for offset, length in chain(pieces, structure.free(disk)):
            end = max(end, offset + length)
    return min(end, guest_map.size)


def _is_all_certain(guest_map: GuestMap, anchored: dict[int, int], orphans: Orphans) -> bool:
    """Return True if the place of every orphan is certain: then what tables leave out is nothing."""
    if len(anchored) < len(orphans) or guest_map.tables.likely:
        return False
    for host, _ in orphans:
        piece = next(guest_map.pieces(anchored[host], 1), None) if host in anchored else None
        if piece is None or piece.certainty < Certainty.CERTAIN:
            return False
    return True


def _fill(
    guest_map: GuestMap,
    orphans: OrphanClusters,
    expectations: Expectations,
    anchored: list[tuple[int, int]],
) -> None:
    """Place what does not tell its place, so many clusters at a time."""
    at_home, offset_of = {host for host, _ in anchored}, orphans.offset_of
    found = heapq.merge(
        ((host, content) for host, content in orphans.in_file_order() if host not in at_home),
        ((host, b"") for host in _short_zeros(orphans)),
        key=lambda one: offset_of(one[0]),
    )
    by_offset = sorted((offset_of(host), guest) for host, guest in anchored)
    blocks = orphans.cluster_bytes // expectations.block_bytes
    count = max(1, min(CLUSTERS_MAX, BLOCKS_MAX // blocks))
    while True:
        some = islice(found, count)
        filling = Filling(guest_map, orphans.cluster_bytes, some, expectations, by_offset, offset_of)
        if not len(filling):
            return
        filling.fill()


def _short_zeros(orphans: OrphanClusters) -> Iterator[int]:
    """Yield the host offsets of zeros among the orphans; long runs are what was never written to."""
    for first, count in orphans.zeros.runs():
        if count <= ZEROS_MAX:
            yield from range(
                first * orphans.cluster_bytes, (first + count) * orphans.cluster_bytes, orphans.cluster_bytes
            )


def _place_in_order(guest_map: GuestMap, orphans: Orphans) -> None:
    """Put the orphans where something is lost, in the order of the file: nothing is known but that order."""
    places = _open_places(guest_map, orphans.cluster_bytes)
    for host, _ in orphans:
        guest = next(places, None)
        if guest is None:
            return
        guest_map.place(
            Placement(guest, host, orphans.cluster_bytes, Certainty.GUESS, "the order of the file")
        )


def _open_places(guest_map: GuestMap, cluster_bytes: int) -> Iterator[int]:
    for index in range(len(guest_map.tables.fates)):
        start, length = guest_map.tables.guest_range(index)
        for guest in range(start, start + length, cluster_bytes):
            if guest_map.is_open(guest) and not guest_map.is_placed(guest):
                yield guest


def _names(structures: list[GuestStructure]) -> tuple[str, ...]:
    return tuple(structure.name for structure in structures)
