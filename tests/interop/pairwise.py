"""Covering arrays: few rows in which every allowed pair of levels of two factors occurs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product

Level = str | int
Row = dict[str, Level]
Pair = tuple[str, Level, str, Level]
Rule = Callable[[Row], bool]

CANDIDATES_PER_ROW = 12


class CoveringArray:
    """Rows over factors, such that every pair of levels occurs that some allowed row has.

    Args:
        factors: the levels of each factor.
        allowed: whether a row may be; called with rows that lack factors too, of which it must say yes if
            nothing in them is forbidden yet.
        seed: of the choices between rows that cover as much.
    """

    def __init__(self, factors: Mapping[str, Sequence[Level]], allowed: Rule, seed: int) -> None:
        self.factors = factors
        self.allowed = allowed
        self.chance = random.Random(seed)
        self.pairs = set(self._possible_pairs())
        self.rows = self._cover()

    def _possible_pairs(self) -> Iterator[Pair]:
        for one, other in combinations(self.factors, 2):
            for level, other_level in product(self.factors[one], self.factors[other]):
                if self._complete({one: level, other: other_level}, set()) is not None:
                    yield one, level, other, other_level

    def _complete(self, row: Row, wanted: set[Pair]) -> Row | None:
        """Return an allowed row that begins like ``row`` and covers much of ``wanted``, or None."""
        if not self.allowed(row):
            return None
        left = [factor for factor in self.factors if factor not in row]
        if not left:
            return row
        # Seen now: else it would be met again with every choice for the factors between.
        if any(not any(self.allowed({**row, name: level}) for level in self.factors[name]) for name in left):
            return None
        factor = self.chance.choice(left) if wanted else left[0]
        levels = list(self.factors[factor])
        if wanted:
            self.chance.shuffle(levels)
            gain = {level: len(pairs_with(row, factor, level, self.factors) & wanted) for level in levels}
            # Where nothing is gained, the first level: the plain one, which costs the least to try.
            levels.sort(
                key=lambda level: (-gain[level], not gain[level] and self.factors[factor].index(level))
            )
        for level in levels:
            whole = self._complete({**row, factor: level}, wanted)
            if whole is not None:
                return whole
        return None

    def _cover(self) -> list[Row]:
        rows: list[Row] = []
        wanted = set(self.pairs)
        while wanted:
            one, level, other, other_level = min(wanted, key=repr)
            candidates = [
                self._complete({one: level, other: other_level}, wanted) for _ in range(CANDIDATES_PER_ROW)
            ]
            found = [row for row in candidates if row is not None]
            best = max(found, key=lambda row: len(pairs_of(row, self.factors) & wanted))
            rows.append({factor: best[factor] for factor in self.factors})
            wanted -= pairs_of(best, self.factors)
        return rows


def pairs_with(row: Row, factor: str, level: Level, order: Mapping[str, object]) -> set[Pair]:
    """Return the pairs that a row gains with one more level."""
    names = list(order)
    return {
        (other, row[other], factor, level)
        if names.index(other) < names.index(factor)
        else (factor, level, other, row[other])
        for other in row
    }


def pairs_of(row: Row, order: Mapping[str, object]) -> set[Pair]:
    """Return the pairs of a whole row, each with its factors in their order."""
    return {(one, row[one], other, row[other]) for one, other in combinations(order, 2)}


def table_of(rows: Sequence[Row]) -> str:
    """Return rows as aligned text, under the names of their factors."""
    lines = [["row", *rows[0]], *([str(index), *map(str, row.values())] for index, row in enumerate(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
