"""A file of which no structure is left that tells the cluster size: the guest's own structures tell it.

A cluster lies in the file at a multiple of its size, and on the disk, too. So the distances between places
of what tells by itself where it belongs are multiples of that size, and only half of them of a larger one.
Blocks of one content may be taken for each other: a few distances are wrong. Where the start of the disk is
lost, too, nothing is certain, and what is likely tells.
"""

from __future__ import annotations

from jqcow.errors import FormatError
from jqcow.ondisk import layout
from jqcow.salvage.anchoring import anchor
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guest.find import find
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.heading import DEFAULT_CLUSTER_BITS, read_shape
from jqcow.salvage.reading import MappedDisk
from jqcow.salvage.shape import Shape
from jqcow.salvage.source import Source
from jqcow.salvage.survey import survey

TRIED_BITS = 12
"""In clusters of that size, which are parts of larger ones, the guest is looked for."""
DISTANCES_MIN = 4
"""So many different distances tell."""
RIGHT = 0.66
"""So many of them are right, or more."""


def shape_of(source: Source) -> Shape:
    """Return what a file must be read as: see `read_shape`.

    Raises:
        FormatError: nothing in the file looks like a part of a qcow2 image, or of the disk of one.
        UnsupportedFeatureError: the data of the disk lies in another file.
        OSError: the host failed, other than by what it cannot read.
    """
    try:
        return read_shape(source)
    except FormatError:
        distances = _distances(source)
        if not any(distances):
            return read_shape(source, by_chance=True)
    if len(distances) < DISTANCES_MIN:
        return read_shape(source, DEFAULT_CLUSTER_BITS)
    sizes = range(layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS + 1)
    shares = {bits: sum(not distance % (1 << bits) for distance in distances) for bits in sizes}
    return read_shape(source, max(bits for bits in sizes if shares[bits] >= RIGHT * len(distances)))


def _distances(source: Source) -> set[int]:
    """Return how far what tells by itself where it belongs lies from there, in bytes, each distance once."""
    found = survey(source, read_shape(source, TRIED_BITS))
    found.grow()
    disk = MappedDisk(found.guest_map, found.reader())
    anchors, _ = anchor(found.guest_map, disk, found.orphans(), find)
    for least in (Certainty.CERTAIN, Certainty.LIKELY):
        placed = anchors.placed.items()
        sure = {host - guest for host, guest in placed if _is_so_sure(found.guest_map, guest, least)}
        if any(sure):
            return sure
    return set()


def _is_so_sure(guest_map: GuestMap, guest: int, least: Certainty) -> bool:
    return all(piece.certainty >= least for piece in guest_map.pieces(guest, 1))
