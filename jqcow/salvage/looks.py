"""What orphans look like: how far each block is filled, and with what kind of bytes."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import pairwise

from jqcow import _native
from jqcow.salvage.continuity import ORDER, Continuity

ZEROS, TEXT, NOISE, OTHER = range(4)
"""Kinds of bytes: text, or noise, as packed and encrypted data is."""

_TEXT = bytes(range(32, 127)) + b"\t\n\r"
_SAMPLE_BYTES = 512
SPARSE = 8
"""A sample of which fewer than one byte in so many is not zero says too little."""
_CHUNK_BYTES = 128


def kind_of(block: bytes) -> int:
    """Return what kind of bytes a block has, by a sample of it, zeros left out."""
    step = max(_CHUNK_BYTES, len(block) * _CHUNK_BYTES // _SAMPLE_BYTES)
    sample = b"".join(block[start : start + _CHUNK_BYTES] for start in range(0, len(block), step))
    dense = sample.replace(b"\0", b"")
    if len(dense) * SPARSE < len(sample):
        dense = block.replace(b"\0", b"")[:_SAMPLE_BYTES]
        if not dense:
            return ZEROS
        sample = dense
    if len(dense.translate(None, _TEXT)) * 20 < len(dense):
        return TEXT
    # Of N random bytes that many differ; what is packed or encrypted comes close.
    expected = 256 * (1 - (255 / 256) ** len(sample))
    return NOISE if len(set(sample)) > 0.85 * expected else OTHER


class Looks:
    """What the blocks of many clusters look like, three bytes for each block.

    Attributes:
        block_bytes: length of a block.
        per_cluster: how many blocks a cluster has.
        lengths: for each block, how many of its bytes come before the zeros at its end.
        kinds: the kind of bytes of each block.
        continuity: how text goes on in them.
    """

    def __init__(self, block_bytes: int, cluster_bytes: int) -> None:
        """Begin without clusters."""
        self.block_bytes = block_bytes
        self.per_cluster = cluster_bytes // block_bytes
        self.lengths = array("H")
        self.kinds = bytearray()
        self.continuity = Continuity()
        self._ends = bytearray()
        self._zeros = array("H", bytes(2 * self.per_cluster)), bytes(self.per_cluster)

    def __len__(self) -> int:
        """Return how many clusters there are."""
        return len(self.kinds) // self.per_cluster

    def add(self, content: bytes) -> None:
        """Take a cluster; an empty one is zeros."""
        if not content or _native.is_zero(content):
            self.lengths.extend(self._zeros[0])
            self.kinds += self._zeros[1]
            self._ends += bytes(2 * ORDER)
            return
        self._ends += content[:ORDER] + content[-ORDER:]
        for start in range(0, len(content), self.block_bytes):
            block = content[start : start + self.block_bytes]
            filled = len(block.rstrip(b"\0"))
            self.lengths.append(filled)
            self.kinds.append(kind_of(block) if filled else ZEROS)
            if self.kinds[-1] == TEXT and filled == len(block):
                self.continuity.add(block)

    def lengths_of(self, index: int) -> array[int]:
        """Return how far the blocks of a cluster are filled."""
        return self.lengths[index * self.per_cluster : (index + 1) * self.per_cluster]

    def follows(self, first: int, second: int) -> float:
        """Return what it tells that the text of one cluster goes on with that of another."""
        per, ends = self.per_cluster, self._ends
        if self.kinds[first * per + per - 1] != TEXT or self.kinds[second * per] != TEXT:
            return 0.0
        end = bytes(ends[(2 * first + 1) * ORDER : (2 * first + 2) * ORDER])
        told = self.continuity.follows(end, bytes(ends[2 * second * ORDER : (2 * second + 1) * ORDER]))
        # Neighbours in the file go on from each other wherever they belong: it tells nothing of one place.
        return min(0.0, told) if second == first + 1 else told

    def kinds_of(self, index: int) -> bytes:
        """Return what kinds of bytes the blocks of a cluster have."""
        return bytes(self.kinds[index * self.per_cluster : (index + 1) * self.per_cluster])


def changes(kinds: Iterable[int]) -> list[int]:
    """Return the blocks that have other bytes than the one before, of those that have some."""
    pairs = enumerate(pairwise(kinds), 1)
    return [block for block, (before, kind) in pairs if before != kind and before and kind]
