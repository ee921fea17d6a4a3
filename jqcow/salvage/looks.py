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
    """What the blocks of many clusters look like, nine bytes for each block.

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
            self._ends += bytes(2 * ORDER * self.per_cluster)
            return
        for start in range(0, len(content), self.block_bytes):
            block = content[start : start + self.block_bytes]
            filled = len(block.rstrip(b"\0"))
            self._ends += block[:ORDER] + block[-ORDER:]
            self.lengths.append(filled)
            self.kinds.append(kind_of(block) if filled else ZEROS)
            if self.kinds[-1] == TEXT and filled == len(block):
                self.continuity.add(block)

    def lengths_of(self, index: int) -> array[int]:
        """Return how far the blocks of a cluster are filled."""
        return self.lengths[index * self.per_cluster : (index + 1) * self.per_cluster]

    def follows(self, first: int, second: int) -> float:
        """Return what it tells that the text of one cluster goes on with that of another."""
        return self.goes_on((first + 1) * self.per_cluster - 1, second * self.per_cluster) or 0.0

    def goes_on(self, one: int, other: int) -> float | None:
        """Return what it tells that one block goes on with another; None if both are not full of text."""
        if self.kinds[one] != TEXT or self.kinds[other] != TEXT or self.lengths[one] < self.block_bytes:
            return None
        end = (2 * one + 1) * ORDER
        start = 2 * other * ORDER
        return self.continuity.follows(
            bytes(self._ends[end : end + ORDER]), bytes(self._ends[start : start + ORDER])
        )

    def kinds_of(self, index: int) -> bytes:
        """Return what kinds of bytes the blocks of a cluster have."""
        return bytes(self.kinds[index * self.per_cluster : (index + 1) * self.per_cluster])


def changes(kinds: Iterable[int]) -> list[int]:
    """Return the blocks that have other bytes than the one before, of those that have some."""
    pairs = enumerate(pairwise(kinds), 1)
    return [block for block, (before, kind) in pairs if before != kind and before and kind]
