"""How likely text goes on from the end of one cluster with the start of another, by short strings of its own.

What follows a few letters is far from random, in every language: across the border between two clusters
that belong behind each other, too.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from math import log

ORDER = 3
"""So many bytes before one tell of it, and of so many behind a border is told."""
SAMPLE_BYTES, SAMPLED_MAX = 64, 1 << 19
"""So much of a block is learnt from, and so much in all."""
PSEUDO = 2.0
"""A longer context counts as much as the shorter one once it was seen so often."""
FOLLOWS_MAX = 6.0


class Continuity:
    """Learns how text goes on."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._samples: list[bytes] = []
        self._sampled_bytes = 0
        self._counts: dict[bytes, int] | None = None
        self._total = 0
        self.follows = lru_cache(maxsize=1 << 16)(self._follows)

    def add(self, block: bytes) -> None:
        """Take a block of text."""
        if self._sampled_bytes < SAMPLED_MAX:
            middle = len(block) // 2
            self._samples.append(block[middle : middle + SAMPLE_BYTES])
            self._sampled_bytes += SAMPLE_BYTES

    def _count(self) -> dict[bytes, int]:
        counts: Counter[bytes] = Counter()
        for sample in self._samples:
            for length in range(1, ORDER + 2):
                counts.update(sample[at : at + length] for at in range(len(sample) - length + 1))
        self._total = sum(count for string, count in counts.items() if len(string) == 1)
        self._samples.clear()
        return counts

    def _chance(self, context: bytes, byte: bytes) -> float:
        """Return how likely a byte is behind others."""
        counts = self._counts or {}
        chance = (counts.get(byte, 0) + 1) / (self._total + 256)
        for start in range(len(context) - 1, -1, -1):
            known = context[start:]
            seen = counts.get(known, 0)
            if not seen:
                break
            chance = (counts.get(known + byte, 0) + PSEUDO * chance) / (seen + PSEUDO)
        return chance

    def _follows(self, end: bytes, start: bytes) -> float:
        """Return what it tells that text ends and other text starts so: a logarithm of odds."""
        if self._counts is None:
            self._counts = self._count()
        told = 0.0
        for at in range(min(ORDER, len(start))):
            before, byte = start[:at], start[at : at + 1]
            told += log(self._chance((end + before)[-ORDER:], byte) / self._chance(before, byte))
        return max(-FOLLOWS_MAX, min(FOLLOWS_MAX, told))
