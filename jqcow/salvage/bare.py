"""A file of which no structure is left that tells the cluster size: the guest's own structures tell it.

A cluster lies in the file at a multiple of its size, and on the disk, too. So the distances between places
of what tells by itself where it belongs are multiples of that size, and only half of them of a larger one.
Blocks of one content may be taken for each other: a few distances are wrong, and these are multiples of
blocks. The size is taken by which all distances together are likeliest. Where the start of the disk is lost,
too, nothing is certain, and what is likely tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import inf, log

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
WRONG = (0.001, 0.03, 0.1, 0.2, 0.33)
"""Such shares of them may be wrong."""


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
    return read_shape(source, likeliest_bits(distances))


def likeliest_bits(distances: Iterable[int]) -> int:
    """Return the cluster size, as a power of two, by which distances in bytes are likeliest."""
    sizes = range(layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS + 1)
    counts = Counter(min((one & -one).bit_length() - 1, sizes.stop) for one in distances if one)
    return max(sizes, key=lambda bits: max(_told(counts, bits, wrong) for wrong in WRONG))


def _told(counts: Counter[int], cluster_bits: int, wrong: float) -> float:
    """Return how likely distances are, a logarithm, if a share of them is wrong.

    ``counts``: how many of them are divided by which power of two, and by none that is larger.
    """
    block_bits = min(TRIED_BITS, cluster_bits)
    told = 0.0
    for bits, count in counts.items():
        chance = (1 - wrong) * 2.0 ** (cluster_bits - bits) if bits >= cluster_bits else 0.0
        chance += wrong * 2.0 ** (block_bits - bits) if bits >= block_bits else 0.0
        told += count * log(chance) if chance else -inf
    return told


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
