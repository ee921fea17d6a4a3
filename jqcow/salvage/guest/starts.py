"""Where a file system starts that was seen in orphans only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from jqcow.salvage.evidence import Certainty, PlacedDisk, Volume

_PARTITION_START = 1 << 20
_FOUND_MAX = 32
"""Each costs passes over the orphans."""
Geometry = TypeVar("Geometry")


@dataclass(frozen=True)
class Start:
    """Where a file system starts, and how surely."""

    offset: int
    certainty: Certainty
    name: str


@dataclass(frozen=True)
class Found(Generic[Geometry]):
    """A file system, by whatever tells its geometry, and its start."""

    geometry: Geometry
    length: int
    start: Start


def compatible(found: Sequence[Found[Geometry]]) -> list[Found[Geometry]]:
    """Return what can be there together: an image in a file looks like a file system of the disk.

    Of those that overlap, those that are not certain give way; where several are certain, none is.
    """
    kept: list[Found[Geometry]] = []
    found = sorted(found, key=lambda one: -one.start.certainty)[:_FOUND_MAX]
    for one in found:
        rivals = [
            other
            for other in found
            if other is not one
            and other.start.offset < one.start.offset + one.length
            and one.start.offset < other.start.offset + other.length
            and other.start.certainty is Certainty.CERTAIN
        ]
        if rivals and one.start.certainty is Certainty.CERTAIN:
            doubted = Start(one.start.offset, Certainty.LIKELY, one.start.name)
            kept.append(Found(one.geometry, one.length, doubted))
        elif not rivals:
            kept.append(one)
    return kept


@dataclass(frozen=True)
class Seen:
    """A file system that was seen.

    Attributes:
        length: of it in bytes.
        unit_bytes: what it leaves unused at the end of its volume is shorter.
        agrees: whether what was seen lies in its clusters as it must for a start.
        is_confirmed: whether the placed disk shows it for a start.
    """

    length: int
    unit_bytes: int
    agrees: Callable[[int], bool]
    is_confirmed: Callable[[int], bool]


def room(volume: Volume, disk: PlacedDisk) -> int:
    """Return how long a file system in a volume can be."""
    return min(volume.length or disk.size, disk.size - volume.offset)


def start_of(seen: Seen, volumes: Sequence[Volume], disk: PlacedDisk, cluster_bytes: int) -> Start | None:
    """Return the best start for a file system.

    It fills its volume as a rule: where what is left over is less than a cluster, no other start in the
    volume gives what was seen its offset in its cluster.
    """
    starts: list[Start] = []
    for volume in volumes:
        slack = room(volume, disk) - seen.length
        if slack < 0 or not seen.agrees(volume.offset):
            continue
        if seen.is_confirmed(volume.offset):
            return Start(volume.offset, Certainty.CERTAIN, volume.name)
        if disk.read(volume.offset, 512) is None:
            is_tight = slack < max(seen.unit_bytes, cluster_bytes)
            certainty = Certainty.CERTAIN if is_tight else Certainty.LIKELY
            starts.append(Start(volume.offset, certainty, volume.name))
    sure = [start for start in starts if start.certainty is Certainty.CERTAIN]
    if len(sure) == 1:
        return sure[0]
    if not sure and all(volume.offset == 0 for volume in volumes):
        slack = disk.size - seen.length - _PARTITION_START
        if 0 <= slack <= 2 * _PARTITION_START and seen.agrees(_PARTITION_START):
            return Start(_PARTITION_START, Certainty.LIKELY, "a partition whose table is lost")
    starts.sort(key=lambda start: start.offset == 0)
    return Start(starts[0].offset, Certainty.LIKELY, starts[0].name) if starts else None
