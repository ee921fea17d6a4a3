"""Following the trees of a btrfs from the roots that its superblock names.

T1. A node is followed only where its address and its generation are what the node above says: so no tree
    leads into what was there before, and no node is visited twice.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from jqcow.salvage.evidence import PlacedDisk
from jqcow.salvage.guest.btrfs_chunks import ChunkMap, system_chunks
from jqcow.salvage.guest.btrfs_layout import (
    LEVEL_MAX,
    LOG_TREE,
    ROOT_ITEM,
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


class LiveNodes:
    """The nodes that the newest superblock leads to, found on the disk and among the orphans.

    Attributes:
        generations: of each by its address, also of those that were not found.
        missing: how many were not found.
        chunks: where addresses lie.
        sure_chunks: False if a part of the chunk tree was not found, and older ones had to serve.
        clock: when transactions were, as far as inodes tell.
    """

    def __init__(self, superblock: Superblock, reader: Reader, found: FoundNodes) -> None:
        self.generations: dict[int, int] = {}
        self.missing = 0
        self.sure_chunks = True
        self.clock: dict[int, int] = {}
        self._superblock = superblock
        self._reader = reader
        self._found = found
        self._own_chunks: list[Chunk] = []
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

    def _follow(self, disk: PlacedDisk, bytenr: int, generation: int) -> None:
        ahead = array("Q", (bytenr, generation))
        while ahead:
            generation, bytenr = ahead.pop(), ahead.pop()
            if not bytenr or bytenr in self.generations:
                continue
            self.generations[bytenr] = generation
            said = self._said(disk, bytenr, generation)
            if said is None:
                self.missing += 1
                continue
            ahead.extend(said.links)
            self._own_chunks += said.chunks
            if said.changed is not None:
                changed, time_ns = said.changed
                self.clock[changed] = max(self.clock.get(changed, 0), time_ns)

    def _said(self, disk: PlacedDisk, bytenr: int, generation: int) -> Said | None:
        found = self._found.find(bytenr, generation)
        if found is not None:
            return found.says
        node = self._reader.read(disk, self.chunks, bytenr, generation)
        return None if node is None else read_out(node, self._superblock.devid)


class Trees:
    """The trees on the disk, as far as they are placed."""

    def __init__(self, superblock: Superblock, reader: Reader, chunks: ChunkMap, disk: PlacedDisk) -> None:
        self._superblock = superblock
        self._reader = reader
        self._chunks = chunks
        self._disk = disk

    def read(self, bytenr: int, generation: int) -> Node | None:
        """Return a node; None if it is not placed."""
        return self._reader.read(self._disk, self._chunks, bytenr, generation)

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

    def roots(self) -> Iterator[tuple[Key, Root]]:
        """Yield the trees that the tree of roots names, and those of the tree of logs."""
        superblock = self._superblock
        tops = [(superblock.root, superblock.generation)]
        if superblock.log_root:
            tops.append((superblock.log_root, superblock.generation + 1))
        for top in tops:
            for leaf in self.leaves(*top):
                if leaf is not None:
                    for key, data in leaf.items(ROOT_ITEM):
                        root = Root.unpack(data)
                        if root is not None and (root.reference_count or key.objectid == LOG_TREE):
                            yield key, root
