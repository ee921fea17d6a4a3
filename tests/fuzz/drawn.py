"""Chance that is drawn from bytes: what a seed tells elsewhere, the guided fuzzer tells here."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

WIDE_BITS = 64
SEED_BYTES = 4


class Drawn(random.Random):
    """Takes each choice from the next bytes of an input; behind its end chance is always the same.

    More than 64 bits at once, such as the content of a write, cost four bytes: what they are hardly matters.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._position = 0

    def take(self, length: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        taken = self._data[self._position : self._position + length]
        self._position += len(taken)
        return taken

    @property
    def is_spent(self) -> bool:
        """True if the input is at its end."""
        return self._position >= len(self._data)

    def number(self, length: int) -> int:
        """Return a number of so many bytes; zeros stand behind the end."""
        return int.from_bytes(self.take(length).ljust(length, b"\0"), "big")

    def random(self) -> float:
        """Return a number from 0 to below 1."""
        return super().random() if self.is_spent else self.number(2) / (1 << 16)

    def getrandbits(self, k: int, /) -> int:
        """Return a number of ``k`` bits."""
        if k == 0 or self.is_spent:
            return super().getrandbits(k)
        if k > WIDE_BITS:
            return random.Random(self.number(SEED_BYTES)).getrandbits(k)
        return self.number(-(-k // 8)) & ((1 << k) - 1)


PATCH_STRUCT = struct.Struct(">BHBQ")


def patches(data: bytes, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (which, where, how, what) of each whole patch in an input, ``limit`` of them at most."""
    whole = min(len(data) // PATCH_STRUCT.size, limit) * PATCH_STRUCT.size
    yield from PATCH_STRUCT.iter_unpack(data[:whole])
