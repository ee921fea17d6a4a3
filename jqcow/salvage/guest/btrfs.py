"""btrfs: every node of its trees says where it belongs, and file data has checksums.

It is read as one device writes it, with data and metadata single or DUP; a file system of several devices,
with zones or with other checksums than CRC-32C is not recognised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from jqcow.salvage.evidence import (
    BlockSum,
    Certainty,
    FilePiece,
    GuestStructure,
    Orphans,
    PlacedDisk,
    Placement,
    Volume,
)
from jqcow.salvage.guest.btrfs_chunks import ChunkMap, gaps
from jqcow.salvage.guest.btrfs_files import Clock, FileWalk
from jqcow.salvage.guest.btrfs_layout import (
    CHECKSUM_TREE,
    CHECKSUMS,
    CRC_STRUCT,
    EXTENT_CHECKSUM,
    EXTENT_ITEM,
    EXTENT_OF_TREE,
    EXTENT_STRUCT,
    EXTENT_TREE,
    LOG_TREE,
    MAGIC,
    MAGIC_OFFSET,
    METADATA_ITEM,
    SUPERBLOCK_BYTES,
    SUPERBLOCK_PLACES,
    Superblock,
)
from jqcow.salvage.guest.btrfs_nodes import FoundNodes
from jqcow.salvage.guest.btrfs_places import settle
from jqcow.salvage.guest.btrfs_trees import LiveNodes, Reader, Trees
from jqcow.salvage.guest.signs import Sighting, Sign, sightings

SUPERBLOCK_SIGN = Sign(MAGIC, MAGIC_OFFSET, SUPERBLOCK_BYTES)
SUPERBLOCK_WITNESS = "btrfs superblock"


@dataclass(frozen=True)
class FoundSuperblock:
    """A superblock among the orphans."""

    superblock: Superblock
    sighting: Sighting


@dataclass(frozen=True)
class Extent:
    """An extent of a file or a node, as the extent tree has it."""

    bytenr: int
    length: int
    generation: int
    is_node: bool


@dataclass
class _Known:
    """What the orphans said when they were read."""

    found: FoundNodes
    live: LiveNodes
    placements: list[Placement] = field(default_factory=list)


class Btrfs:
    """A btrfs in a volume."""

    def __init__(self, volume: Volume, superblock: Superblock, copies: list[FoundSuperblock]) -> None:
        self._volume = volume
        self._superblock = superblock
        self._copies = copies
        self._reader = Reader(superblock, volume.offset)
        self._known: _Known | None = None

    @property
    def name(self) -> str:
        """Return what it is and where."""
        return f"btrfs in {self._volume.name}"

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield the orphans that hold a superblock or nodes, as far as these say where they belong."""
        if self._known is None:
            found = FoundNodes(self._superblock)
            found.scan(orphans, self._volume.offset)
            self._known = self._learn(disk, orphans, found)
        elif self._known.live.missing:
            self._known = self._learn(disk, orphans, self._known.found)
        yield from self._known.placements

    def _learn(self, disk: PlacedDisk, orphans: Orphans, found: FoundNodes) -> _Known:
        live = LiveNodes(self._superblock, self._reader, found)
        live.follow(disk)
        cluster_bytes = orphans.cluster_bytes
        placements = [] if self._known is None else self._known.placements
        taken = {placement.guest_offset for placement in placements}
        hosts = {placement.host_offset for placement in placements}
        fresh = [
            *self._place_superblocks(disk, orphans),
            *settle(found, live, self._superblock, self._volume, disk, cluster_bytes, self._is_layered()),
        ]
        placements += [new for new in fresh if new.guest_offset not in taken and new.host_offset not in hosts]
        return _Known(found, live, placements)

    def _is_layered(self) -> bool:
        """Return True if one place of a superblock has several that differ."""
        copies = {(copy.superblock.bytenr, copy.superblock.generation) for copy in self._copies}
        return len(copies) > len({bytenr for bytenr, _ in copies})

    def _place_superblocks(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        cluster_bytes = orphans.cluster_bytes
        newest: dict[int, FoundSuperblock] = {}
        for copy in self._copies:
            bytenr = copy.superblock.bytenr
            if bytenr not in newest or newest[bytenr].superblock.generation < copy.superblock.generation:
                newest[bytenr] = copy
        for bytenr, copy in newest.items():
            is_newest = copy.superblock.generation == self._superblock.generation
            certainty = self._volume.certainty if is_newest else Certainty.GUESS
            first = self._volume.offset + bytenr - copy.sighting.start
            count = -(-(copy.sighting.start + SUPERBLOCK_BYTES) // cluster_bytes)
            if first < 0 or first % cluster_bytes:
                continue
            for index, host in enumerate(copy.sighting.clusters[:count]):
                place = first + index * cluster_bytes
                if disk.read(place, 1) is None:
                    yield Placement(place, host, cluster_bytes, certainty, SUPERBLOCK_WITNESS)

    def _trees(self, disk: PlacedDisk) -> tuple[Trees, LiveNodes]:
        if self._known is None:
            live = LiveNodes(self._superblock, self._reader, FoundNodes(self._superblock))
            live.follow(disk)
        else:
            live = self._known.live
        return Trees(self._superblock, self._reader, live, disk), live

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what files have; then the rest of extents that files have in part; then nodes."""
        trees, live = self._trees(disk)
        clock = Clock(live.clock)
        walk = FileWalk(self._superblock, trees)
        for part in walk.ranges():
            written = (clock.time_ns(part.generation), part.number, part.offset)
            for place in self._guest_places(live.chunks, part.bytenr, part.length):
                yield FilePiece(place, part.length, part.valid_bytes, written, part.is_data)
        nodes = dict(live.generations)
        for extent in self._extents(trees):
            if extent is None:
                continue
            if extent.is_node:
                nodes[extent.bytenr] = extent.generation
                continue
            written = (clock.time_ns(extent.generation), 0, extent.bytenr)
            for bytenr, length in walk.rest(extent.bytenr, extent.length):
                for place in self._guest_places(live.chunks, bytenr, length):
                    yield FilePiece(place, length, length, written, False)
        node_bytes = self._superblock.node_bytes
        for bytenr, generation in nodes.items():
            written = (clock.time_ns(generation), 0, bytenr)
            for place in self._guest_places(live.chunks, bytenr, node_bytes):
                yield FilePiece(place, node_bytes, node_bytes, written, False)
        latest_ns = clock.time_ns(self._superblock.generation)
        for place in SUPERBLOCK_PLACES:
            if place + SUPERBLOCK_BYTES <= self._superblock.device_bytes:
                start = self._volume.offset + place
                yield FilePiece(start, SUPERBLOCK_BYTES, SUPERBLOCK_BYTES, (latest_ns, 0, place), False)

    def _guest_places(self, chunks: ChunkMap, bytenr: int, length: int) -> list[int]:
        return [self._volume.offset + place for place in chunks.places(bytenr, length)]

    def _extents(self, trees: Trees) -> Iterator[Extent | None]:
        """Yield what is allocated, in ascending order; None where a part of the extent tree is not placed."""
        seen: set[int] = set()
        for index, top in enumerate(trees.tops(lambda tree: tree == EXTENT_TREE)):
            if index:
                yield None
            yield from self._extents_below(trees, top, seen)

    def _extents_below(self, trees: Trees, top: tuple[int, int], seen: set[int]) -> Iterator[Extent | None]:
        for leaf in trees.leaves(*top, seen):
            if leaf is None:
                yield None
                continue
            for key, data in leaf.items(EXTENT_ITEM, METADATA_ITEM):
                if len(data) < EXTENT_STRUCT.size:
                    continue
                generation, flags = EXTENT_STRUCT.unpack_from(data)
                is_small = key.type == METADATA_ITEM
                length = self._superblock.node_bytes if is_small else key.offset
                yield Extent(key.objectid, length, generation, is_small or bool(flags & EXTENT_OF_TREE))

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield nothing: file data tells its place by its checksums, mostly."""
        return iter(())

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        """Yield what is in no chunk, and what the extent tree has free between two extents.

        After a crash what the tree of logs has is not in the extent tree yet: then the latter tells nothing.
        """
        trees, live = self._trees(disk)
        if not live.sure_chunks:
            return
        for start, length in live.chunks.outside(self._superblock.device_bytes):
            yield self._volume.offset + start, length
        if self._superblock.log_root:
            return
        end: int | None = None if live.missing else 0
        for extent in self._extents(trees):
            if extent is None:
                end = None
                continue
            if end is not None and end < extent.bytenr:
                yield from self._free_in_chunks(live.chunks, end, extent.bytenr)
            end = max(end or 0, extent.bytenr + extent.length)
        if end and not live.missing:
            yield from self._free_in_chunks(live.chunks, end, 1 << 64)

    def _free_in_chunks(self, chunks: ChunkMap, start: int, end: int) -> Iterator[tuple[int, int]]:
        kept = [(place, SUPERBLOCK_BYTES) for place in SUPERBLOCK_PLACES]
        for chunk in chunks.between(start, end):
            first = max(start, chunk.logical)
            length = min(end, chunk.logical + chunk.length) - first
            for place in chunks.places(first, length):
                for offset, rest in gaps(kept, place, place + length):
                    yield self._volume.offset + offset, rest

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        """Yield the checksums of file data; none of what is not placed, or no more in use."""
        trees, live = self._trees(disk)
        if not live.sure_chunks:
            return
        sector_bytes = self._superblock.sector_bytes
        seen: set[int] = set()
        for top in trees.tops(lambda tree: tree in (CHECKSUM_TREE, LOG_TREE)):
            for leaf in trees.leaves(*top, seen):
                if leaf is None:
                    continue
                for item, data in leaf.items(EXTENT_CHECKSUM):
                    if item.objectid != CHECKSUMS:
                        continue
                    whole = len(data) - len(data) % CRC_STRUCT.size
                    for index, (crc,) in enumerate(CRC_STRUCT.iter_unpack(data[:whole])):
                        bytenr = item.offset + index * sector_bytes
                        for place in self._guest_places(live.chunks, bytenr, sector_bytes):
                            yield BlockSum(place, sector_bytes, crc)


def find(volumes: list[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[GuestStructure]:
    """Yield every btrfs of which a superblock is in a volume, or among the orphans.

    A superblock does not say where its volume begins, only how long it is: see `_assign`.
    """
    copies: dict[bytes, list[FoundSuperblock]] = {}
    for sighting in sightings(orphans, SUPERBLOCK_SIGN):
        superblock = Superblock.unpack(sighting.read(orphans, 0, SUPERBLOCK_BYTES))
        if superblock is not None:
            copies.setdefault(superblock.fsid, []).append(FoundSuperblock(superblock, sighting))
    open_volumes = []
    for volume in volumes:
        placed = _on_disk(volume, disk)
        if placed is None:
            open_volumes.append(volume)
        else:
            own = copies.pop(placed.fsid, [])
            yield Btrfs(volume, _newest([placed, *(copy.superblock for copy in own)]), own)
    for volume, own in _assign(open_volumes, list(copies.values()), orphans.cluster_bytes):
        yield Btrfs(volume, _newest([copy.superblock for copy in own]), own)


def _on_disk(volume: Volume, disk: PlacedDisk) -> Superblock | None:
    found = []
    for place in SUPERBLOCK_PLACES:
        data = disk.read(volume.offset + place, SUPERBLOCK_BYTES)
        superblock = None if data is None else Superblock.unpack(data)
        if superblock is not None and superblock.bytenr == place:
            found.append(superblock)
    return _newest(found) if found else None


def _newest(superblocks: list[Superblock]) -> Superblock:
    return max(superblocks, key=lambda superblock: superblock.generation)


def _assign(
    volumes: list[Volume], systems: list[list[FoundSuperblock]], cluster_bytes: int
) -> Iterator[tuple[Volume, list[FoundSuperblock]]]:
    """Yield which of the superblocks among the orphans belong to which volume, and how surely.

    For sure only those that fill a volume, if no others do and they fill no other: a file of the guest may
    hold the image of another disk, but that is shorter than the disk itself. Several that fill volumes of
    one length are taken in the order of the file; a single one that is left goes to a volume that is left.
    """
    filled = [[volume for volume in volumes if _fits(own, volume, cluster_bytes, True)] for own in systems]
    taken: set[Volume] = set()
    rest = []
    for own, mine in zip(systems, filled, strict=True):
        rivals = [other for other in filled if set(other) & set(mine)]
        free = [volume for volume in mine if volume not in taken]
        if free:
            sure = len(rivals) == 1 and len(mine) == 1
            taken.add(free[0])
            yield (free[0] if sure else replace(free[0], certainty=Certainty.GUESS)), own
        elif not mine:
            rest.append(own)
    left = [volume for volume in volumes if volume not in taken]
    if len(rest) == 1 and len(left) == 1 and _fits(rest[0], left[0], cluster_bytes, False):
        yield replace(left[0], certainty=min(left[0].certainty, Certainty.LIKELY)), rest[0]


def _fits(own: list[FoundSuperblock], volume: Volume, cluster_bytes: int, fills: bool) -> bool:
    """Return True if a file system may be in a volume, and also fills it if that is asked."""
    newest = _newest([copy.superblock for copy in own])
    starts = (volume.offset + copy.superblock.bytenr - copy.sighting.start for copy in own)
    if not any(start >= 0 and start % cluster_bytes == 0 for start in starts):
        return False
    rest_bytes = volume.length - newest.device_bytes
    return 0 <= rest_bytes < newest.sector_bytes if fills else rest_bytes >= 0 or not volume.length
