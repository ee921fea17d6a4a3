"""The nodes of a btrfs among the orphans.

One pass finds every node: its uuid stands at a known place of each sector. What is remembered of a node is
its address, its generation, the orphans it is in, and the nodes that it names: so trees can be followed
before anything of them is placed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice, product
from typing import NamedTuple

from jqcow.salvage.evidence import Orphans
from jqcow.salvage.guest.btrfs_layout import (
    CHUNK_ITEM,
    CHUNK_TREE,
    EXTENT_ITEM,
    EXTENT_OF_TREE,
    EXTENT_STRUCT,
    EXTENT_TREE,
    FS_TREE,
    HEADER_STRUCT,
    INODE_ITEM,
    LOG_TREE,
    METADATA_ITEM,
    ROOT_ITEM,
    ROOT_TREE,
    SIZES,
    SUBVOLUMES,
    Chunk,
    Inode,
    Node,
    Root,
    Superblock,
)
from jqcow.salvage.guest.signs import windows

UUID_OFFSET = 32
HEADER_END = UUID_OFFSET + HEADER_STRUCT.size
STEP_BYTES = SIZES[0]
TORN_MAX = 1 << 16
COPIES_MAX = 8
CHOICES_MAX = 32
NO_LINKS = array("Q")


class Said(NamedTuple):
    """What a node says that leads on.

    Attributes:
        links: address and generation of each node that it names, one after the other.
        chunks: what a leaf of the chunk tree has.
        blocks: address and generation of each node that a leaf of the extent tree has, as in links.
        changed: transaction and time (nanoseconds since 1970) of an inode's last change, if it has inodes.
    """

    links: array[int]
    chunks: tuple[Chunk, ...] = ()
    blocks: array[int] = NO_LINKS
    changed: tuple[int, int] | None = None


class FoundNode(NamedTuple):
    """A node in orphans.

    Attributes:
        generation: the transaction that wrote it.
        owner: the tree that it was written for.
        level: 0 is a leaf.
        start: where in the first orphan it begins.
        clusters: host offsets of the orphans that it is in.
        says: what it names.
    """

    generation: int
    owner: int
    level: int
    start: int
    clusters: tuple[int, ...]
    says: Said


class FoundNodes:
    """All nodes of one file system among the orphans, by logical address.

    Attributes:
        by_address: what was found, in the order of the file.
        digests: of the content of each orphan that has a node or a part of one.
        covered_bytes: how much of each such orphan is nodes.
    """

    def __init__(self, superblock: Superblock) -> None:
        self.by_address: dict[int, list[FoundNode]] = {}
        self.digests: dict[int, int] = {}
        self.covered_bytes: dict[int, int] = {}
        self._superblock = superblock
        self._torn: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def scan(self, orphans: Orphans, volume_offset: int) -> None:
        """Find the nodes.

        Args:
            orphans: to read, once.
            volume_offset: where the file system begins on the guest's disk, in bytes.
        """
        node_bytes = self._superblock.node_bytes
        cluster_bytes = orphans.cluster_bytes
        first = volume_offset % min(STEP_BYTES, cluster_bytes)
        for clusters, contents in windows(orphans, node_bytes):
            for start in self._starts(contents, first):
                count = -(-(start + node_bytes) // cluster_bytes)
                data = contents[0][start : start + node_bytes]
                if count > 1:
                    data = b"".join(contents[:count])[start : start + node_bytes]
                node = Node.unpack(data, self._superblock.node_uuid)
                if node is not None:
                    self._add(node, start, clusters[:count], contents)
                elif count > 1:
                    self._keep_torn(data, start, clusters[0])
        self._join_torn(orphans)

    def _keep_torn(self, data: bytes, start: int, host: int) -> None:
        """Remember where a node begins that does not go on in the next orphans."""
        address = HEADER_STRUCT.unpack_from(data, UUID_OFFSET)[1:3]
        copies = self._torn.setdefault(address, []) if len(self._torn) < TORN_MAX else []
        if len(copies) < COPIES_MAX:
            copies.append((start, host))

    def _join_torn(self, orphans: Orphans) -> None:
        """Find nodes that go on in the file, where zeros are no orphans, or else in parts of another copy."""
        cluster_bytes = orphans.cluster_bytes
        for (bytenr, generation), copies in self._torn.items():
            count = -(-(copies[0][0] + self._superblock.node_bytes) // cluster_bytes)
            runs = [tuple(host + index * cluster_bytes for index in range(count)) for _, host in copies]
            for (start, _), clusters in zip(copies, runs, strict=True):
                self._try(start, clusters, orphans)
            mixed = islice(product(*zip(*runs[:2], strict=True)), CHOICES_MAX)
            while self.find(bytenr, generation) is None:
                chosen = next(mixed, None)
                if chosen is None:
                    break
                self._try(copies[0][0], chosen, orphans)

    def _try(self, start: int, clusters: tuple[int, ...], orphans: Orphans) -> None:
        contents = [orphans.read(host) for host in clusters]
        data = b"".join(contents)[start : start + self._superblock.node_bytes]
        node = Node.unpack(data, self._superblock.node_uuid)
        if node is not None:
            self._add(node, start, clusters, contents)

    def _starts(self, contents: list[bytes], first: int) -> Iterator[int]:
        """Yield where in the first of some orphans a node may begin."""
        content = contents[0]
        uuid = self._superblock.node_uuid
        step_bytes = min(STEP_BYTES, len(content))
        lowest = content[first + UUID_OFFSET :: step_bytes]
        index = lowest.find(uuid[0])
        while index >= 0:
            start = first + index * step_bytes
            if content.startswith(uuid, start + UUID_OFFSET):
                yield start
            index = lowest.find(uuid[0], index + 1)

    def _add(self, node: Node, start: int, clusters: tuple[int, ...], contents: list[bytes]) -> None:
        said = read_out(node, self._superblock.devid)
        found = FoundNode(node.generation, node.owner, node.level, start, clusters, said)
        self.by_address.setdefault(node.bytenr, []).append(found)
        begin, end = start, start + len(node.data)
        for host, content in zip(clusters, contents, strict=False):
            if host not in self.digests:
                self.digests[host] = hash(content)
            covered_bytes = min(end, len(content)) - begin
            self.covered_bytes[host] = self.covered_bytes.get(host, 0) + covered_bytes
            begin, end = 0, end - len(content)

    def find(self, bytenr: int, generation: int) -> FoundNode | None:
        """Return a node of an address and a generation; None if no orphan has it."""
        for found in self.by_address.get(bytenr, ()):
            if found.generation == generation:
                return found
        return None


def read_out(node: Node, devid: int) -> Said:
    """Return what a node says of others, and of time."""
    links = array("Q")
    for _, bytenr, generation in node.pointers():
        links.extend((bytenr, generation))
    if node.owner in (ROOT_TREE, LOG_TREE):
        for _, data in node.items(ROOT_ITEM):
            root = Root.unpack(data)
            if root is not None:
                links.extend((root.bytenr, root.generation))
    if node.owner == CHUNK_TREE:
        items = (Chunk.unpack(key.offset, data, devid) for key, data in node.items(CHUNK_ITEM))
        return Said(links or NO_LINKS, tuple(chunk for chunk, _ in items if chunk is not None))
    if node.owner == EXTENT_TREE:
        return Said(links or NO_LINKS, blocks=_blocks(node) or NO_LINKS)
    if node.owner == FS_TREE or node.owner in SUBVOLUMES:
        for _, data in node.items(INODE_ITEM):
            inode = Inode.unpack(data)
            if inode is not None:
                return Said(links or NO_LINKS, changed=(inode.generation, inode.changed_ns))
    return Said(links or NO_LINKS)


def _blocks(leaf: Node) -> array[int]:
    blocks = array("Q")
    for key, data in leaf.items(EXTENT_ITEM, METADATA_ITEM):
        if len(data) >= EXTENT_STRUCT.size:
            generation, flags = EXTENT_STRUCT.unpack_from(data)
            if key.type == METADATA_ITEM or flags & EXTENT_OF_TREE:
                blocks.extend((key.objectid, generation))
    return blocks
