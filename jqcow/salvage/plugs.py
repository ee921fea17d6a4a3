"""The two places where what others find out is plugged in: the header, and the structures of a guest."""

from __future__ import annotations

from collections.abc import Iterable

from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import MAX_CLUSTER_BITS
from jqcow.salvage.evidence import GuestStructure, Orphans, PlacedDisk
from jqcow.salvage.shape import Shape
from jqcow.salvage.source import Source


def shape_of(source: Source) -> Shape:
    """Return what a file is to be read as.

    Raises:
        FormatError, CorruptionError: nothing tells.
    """
    return Shape(HeaderArea.parse(source.pread(1 << MAX_CLUSTER_BITS, 0)))


def find(disk: PlacedDisk, orphans: Orphans) -> Iterable[GuestStructure]:
    """Return the structures of the guest."""
    return ()
