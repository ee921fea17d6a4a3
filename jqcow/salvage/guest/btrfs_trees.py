"""Following the trees of a btrfs from the roots that its superblock names.

BT5. A node is followed only where its address and its generation are what the node above says: so no tree
    leads into what was there before, and no node is visited twice.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from jqcow.salvage.evidence import PlacedDisk
from jqcow.salvage.guest.btrfs_chunks import ChunkMap, system_chunks
from jqcow.salvage.guest.btrfs_layout import (
    LEVEL_MAX,
    LOG_TREE,
    ROOT_ITEM,
    ROOT_TREE,
    Chunk,
    Key,
    Node,
    Root,
    Superblock,
)
from jqcow.salvage.guest.btrfs_nodes import FoundNodes, Said, read_out


class Reader:
    """Reads nodes from the guest's disk."""

    def __init__(self, superblock: Superblock, volume_offset: int) -> None:
        self._superblock = superblock
        self._volume_offset = volume_offset

    def read(self, disk: PlacedDisk, chunks: ChunkMap, bytenr: int, generation: int) -> Node | None:
        """Return a node of an address and a generation; None if it is in none of its places."""
        node_bytes = self._superblock.node_bytes
        for place in chunks.places(bytenr, node_bytes):
            data = disk.read(self._volume_offset + place, node_bytes)
            node = Node.unpack(data, self._superblock.node_uuid) if data is not None else None
            if node is not None and (node.bytenr, node.generation) == (bytenr, generation):
                return node
        return None


class Subtree(NamedTuple):
    """The topmost node that was found of a part of a tree."""

    level: int
    owner: int
    bytenr: int
    generation: int


class LiveNodes:
    """The nodes that the newest superblock leads to, found on the disk and among the orphans.

    Attributes:
        generations: of each by its address, also of those that were not found.
        missing: how many were not found.
        chunks: where addresses lie.
        sure_chunks: False if a part of the chunk tree was not found, and older ones had to serve.
        clock: when transactions were, as far as inodes tell.
        loose: parts of trees that are live, though what leads to them was not found; the largest first.
    """

    def __init__(self, superblock: Superblock, reader: Reader, found: FoundNodes) -> None:
        self.generations: dict[int, int] = {}
        self.missing = 0
        self.sure_chunks = True
        self.clock: dict[int, int] = {}
        self.loose: list[Subtree] = []
        self._superblock = superblock
        self._reader = reader
        self._found = found
        self._own_chunks: list[Chunk] = []
        self._allocated: dict[int, int] = {}
        self.chunks = ChunkMap(system_chunks(superblock), superblock.device_bytes)

    def follow(self, disk: PlacedDisk) -> None:
        """Follow all trees, the chunk tree first."""
        superblock = self._superblock
        self._follow(disk, superblock.chunk_root, superblock.chunk_root_generation)
        if self.missing:
            self.sure_chunks = False
            self._take_older_chunks()
        self.chunks = ChunkMap(self._own_chunks, superblock.device_bytes)
        self._follow(disk, superblock.root, superblock.generation)
        if superblock.log_root:
            self._follow(disk, superblock.log_root, superblock.generation + 1)
        if self.missing:
            self._follow_loose(disk)

    def _follow_loose(self, disk: PlacedDisk) -> None:
        """Follow what the superblock names beside the tree of roots, and what the extent tree has."""
        ahead = dict(self._superblock.other_roots)
        while ahead:
            for bytenr, generation in ahead.items():
                if bytenr not in self.generations:
                    top = self._follow(disk, bytenr, generation)
                    if top is not None:
                        self.loose.append(top)
            ahead = {bytenr: at for bytenr, at in self._allocated.items() if bytenr not in self.generations}
        self.loose.sort(reverse=True)

    def _take_older_chunks(self) -> None:
        """Take chunks from all leaves that were found, the newest first, where the tree has none."""
        self._own_chunks += system_chunks(self._superblock)
        leaves = [node for nodes in self._found.by_address.values() for node in nodes if node.says.chunks]
        leaves.sort(key=lambda node: node.generation, reverse=True)
        taken = {chunk.logical for chunk in self._own_chunks}
        for leaf in leaves:
            fresh = [chunk for chunk in leaf.says.chunks if chunk.logical not in taken]
            taken.update(chunk.logical for chunk in fresh)
            self._own_chunks += fresh

    def _follow(self, disk: PlacedDisk, bytenr: int, generation: int) -> Subtree | None:
        """Follow all that a node leads to; return the node, None if it was not found."""
        ahead = array("Q", (bytenr, generation))
        top = None
        while ahead:
            at, place = ahead.pop(), ahead.pop()
            if not place or place in self.generations:
                continue
            self.generations[place] = at
            level_owner_said = self._said(disk, place, at)
            if level_owner_said is None:
                self.missing += 1
                continue
            level, owner, said = level_owner_said
            if place == bytenr:
                top = Subtree(level, owner, bytenr, generation)
            ahead.extend(said.links)
            self._own_chunks += said.chunks
            self._allocated.update(zip(said.blocks[::2], said.blocks[1::2], strict=True))
            if said.changed is not None:
                changed, time_ns = said.changed
                self.clock[changed] = max(self.clock.get(changed, 0), time_ns)
        return top

    def _said(self, disk: PlacedDisk, bytenr: int, generation: int) -> tuple[int, int, Said] | None:
        found = self._found.find(bytenr, generation)
        if found is not None:
            return found.level, found.owner, found.says
        node = self._reader.read(disk, self.chunks, bytenr, generation)
        return None if node is None else (node.level, node.owner, read_out(node, self._superblock.devid))


class Trees:
    """The trees on the disk, as far as they are placed."""

    def __init__(self, superblock: Superblock, reader: Reader, live: LiveNodes, disk: PlacedDisk) -> None:
        self._superblock = superblock
        self._reader = reader
        self._live = live
        self._disk = disk

    def read(self, bytenr: int, generation: int) -> Node | None:
        """Return a node; None if it is not placed."""
        return self._reader.read(self._disk, self._live.chunks, bytenr, generation)

    def leaves(self, bytenr: int, generation: int, seen: set[int] | None = None) -> Iterator[Node | None]:
        """Yield the leaves of a tree in the order of their keys, and None for each gap.

        Args:
            bytenr: of the root.
            generation: of the root.
            seen: nodes that are passed over without a word; it grows by those that are visited.
        """
        seen = set() if seen is None else seen
        ahead = [(bytenr, generation)]
        while ahead:
            bytenr, generation = ahead.pop()
            if bytenr in seen:
                continue
            seen.add(bytenr)
            node = self.read(bytenr, generation)
            if node is None or not node.level:
                yield node
            else:
                ahead += [(child, child_generation) for _, child, child_generation in node.pointers()][::-1]

    def item(self, bytenr: int, generation: int, key: Key) -> bytes | None:
        """Return the data of an item; None if the tree has it not, or it is not placed."""
        for _ in range(LEVEL_MAX + 1):
            node = self.read(bytenr, generation)
            if node is None:
                return None
            if not node.level:
                return next((data for found, data in node.items(key.type) if found == key), None)
            below = [
                (child, child_generation)
                for start, child, child_generation in node.pointers()
                if start <= key
            ]
            if not below:
                return None
            bytenr, generation = below[-1]
        return None

    def tops(self, is_meant: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
        """Yield address and generation of the roots of some trees, then of loose parts of these.

        Args:
            is_meant: says of the number of a tree if it is one of them.
        """
        superblock = self._superblock
        tops = [(superblock.root, superblock.generation)]
        if superblock.log_root:
            tops.append((superblock.log_root, superblock.generation + 1))
        tops += [(part.bytenr, part.generation) for part in self._live.loose if part.owner == ROOT_TREE]
        seen: set[int] = set()
        for top in tops:
            for leaf in self.leaves(*top, seen):
                for key, data in leaf.items(ROOT_ITEM) if leaf is not None else ():
                    root = Root.unpack(data)
                    is_alive = root is not None and (root.reference_count or key.objectid == LOG_TREE)
                    if root is not None and is_alive and is_meant(key.objectid):
                        yield root.bytenr, root.generation
        for part in self._live.loose:
            if is_meant(part.owner):
                yield part.bytenr, part.generation
