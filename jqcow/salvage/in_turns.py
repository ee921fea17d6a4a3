"""Tables and data that tells its place by itself, each found by the other, in turns.

A table that no L1 table names is placed by data whose place is certain; what it then says of other data may
place more. Where nothing more is placed so, data is looked at in the order of the table that names it.
"""

from __future__ import annotations

from jqcow.salvage.anchoring import Find, anchor
from jqcow.salvage.candidates import TableSearch, Told
from jqcow.salvage.evidence import Certainty, GuestStructure
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.named_data import NamedData
from jqcow.salvage.orphans import OrphanClusters
from jqcow.salvage.protection import Protection
from jqcow.salvage.reading import MappedDisk

TURNS_MAX = 8
"""So often tables are looked for anew."""


def anchor_in_turns(
    guest_map: GuestMap,
    disk: MappedDisk,
    orphans: OrphanClusters,
    find: Find,
    protection: Protection | None,
    search: TableSearch | None,
    *,
    are_current: bool = False,
) -> tuple[dict[int, int], list[GuestStructure]]:
    """Place what tells by itself where it belongs, and tables.

    Args:
        guest_map: of the disk; the placements are put into it.
        disk: as far as it is placed with certainty.
        orphans: what is to be placed; what tables name that were found is taken out.
        find: finds the structures of the guest.
        protection: the sums that `jqcow protect` made.
        search: finds tables; None where none is missed.
        are_current: no orphan is an old copy (AN3).

    Returns:
        The guest offset of what was placed, by host offset, and the structures that were found.
    """
    if search is not None:
        search.place({})
        orphans.bits.remove(search.adopted_hosts)
    anchors, structures = anchor(guest_map, disk, orphans, find, protection, are_current=are_current)
    placed = dict(anchors.placed)
    for _ in range(TURNS_MAX if search is not None else 0):
        if search is None or not _place_tables(search, guest_map, disk, placed, find):
            break
        orphans.bits.remove(search.adopted_hosts)
        anchors, structures = anchor(guest_map, disk, orphans, find, protection, are_current=are_current)
        placed |= anchors.placed
    if search is not None:
        search.place_in_order()
        orphans.bits.remove(search.adopted_hosts)
        orphans.bits.remove(search.used_hosts)
    return placed, structures


def _place_tables(
    search: TableSearch, guest_map: GuestMap, disk: MappedDisk, placed: dict[int, int], find: Find
) -> int:
    """Place tables by data whose place is certain, or else by what the data of each tells of itself."""
    known = _certain(guest_map, placed)
    if count := search.place(known):
        return count
    shown = NamedData(guest_map.tables, search.unplaced(), disk.reader)
    told: dict[Told, None] = {}
    for structure in find(disk, shown) if len(shown) else ():
        told.update((one, None) for each in structure.place(disk, shown) if (one := shown.told_by(each)))
    return search.place(known, told) if told else 0


def _certain(guest_map: GuestMap, placed: dict[int, int]) -> dict[int, int]:
    """Return what was placed with certainty, compressed data by where it lies in the file."""
    found = {}
    for guest in placed.values():
        piece = next(guest_map.pieces(guest, 1), None)
        if piece is not None and piece.certainty == Certainty.CERTAIN:
            found[piece.host_offset] = guest
    return found
