"""How much it tells that a cluster looks as it does: logarithms of odds, against an orphan at random.

What most orphans look like tells nothing; a file's end where one is expected is one in thousands.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import exp, log

from jqcow.salvage.expecting import FREE, SLACK, SYSTEM, UNKNOWN, Expected
from jqcow.salvage.looks import NOISE, OTHER, TEXT, ZEROS, Looks, changes

IN_USE, IN_FREE = 0.25, -0.15
"""Of clusters in use nearly each was written, of free ones some were."""
NEAR_BYTES = 16
"""A file may end with some zeros of its own."""
LONGER = -9.0
"""A file that ends before the bytes do; only stale metadata says so."""
ALL_ZEROS = -0.1
"""A cluster of zeros where a file has data: it may be, but nothing is lost if it is not placed."""
RUN_MAX = 2.0
"""So much a run of blocks of one owner tells at most: neighbours are alike."""
UNTOLD = -1.5
"""A block looks like a file's end where none is."""
UNTOLD_MAX = -4.5
CHANGED = -2.0
"""Within a file the kind of bytes changes."""
CHANGED_MAX = -4.0

PARTS = -2.0
"""Two blocks of text of which it tells so little that one goes on with the other are of two texts."""
PARTED_MIN, PARTED_WITHIN = 0.005, 0.25
"""Two blocks of text behind each other are of two at least so often; and so many of these within one file."""

STRANGE, STRANGE_MAX = -0.4, -4.0
"""A block that the file system itself uses is text or noise, and so much at most."""
OF_KIND, OF_OTHER = 0.05, -0.1
"""A file's blocks are of the kind of bytes that others of its blocks are, or are not."""
MIXED = -1
"""The kind of a file that has several."""

# How often it is so: a file's end, by what precedes the zeros; a whole run of blocks being zeros, or none.
_TAIL_RIGHT, _TAIL_NEAR, _TAIL_ZERO, _TAIL_SHORT = 0.9, 0.04, 0.03, 0.02
_DATA_ZEROS, _DATA_FULL = 0.06, 0.85
_FREE_ZEROS, _FREE_FULL = 0.5, 0.5
_SLACK_ZEROS, _SLACK_FULL = 0.97, 0.01
_CHANGE_AT_EDGE = 0.9


class Odds:
    """Weighs how clusters look by how all orphans look.

    Attributes:
        kinds: of which kind the bytes of files are, by number.
    """

    def __init__(self, looks: Looks, ends: int = 0) -> None:
        """Take what the orphans look like; they must be all there by now.

        ``ends``: in so many blocks a file is expected to end. What looks like an end, or changes, more often
        than that does so within files, too.
        """
        self._looks = looks
        self._block_bytes = looks.block_bytes
        self._counts = Counter(looks.lengths)
        self._total = max(1, len(looks.lengths))
        self._partial = self._total - self._counts[0] - self._counts[self._block_bytes]
        zeros = (self._counts[0] + 2) / (self._total + 4)
        partial = (self._partial + 1) / (self._total + 4)
        self._zeros, self._full = zeros, max(0.05, 1 - zeros - partial)
        within = max(0.01, (self._partial - ends) / (self._total + 4))
        self._untold = min(0.0, max(UNTOLD, log(within / partial)))
        seen, changed, pairs, parted = 200, 10, 200, 10
        for index in range(0, len(looks), max(1, len(looks) // 5000)):
            kinds = looks.kinds_of(index)
            seen += len(kinds) - 1 - kinds.count(ZEROS)
            changed += len(changes(kinds))
            pairs += len(kinds) - 1
            parted += sum(bool(one) != bool(other) for one, other in pairwise(kinds))
        self.kinds: dict[int, int] = {}
        dense = [looks.kinds.count(kind) for kind in (TEXT, NOISE, OTHER)]
        same = sum(count * count for count in dense) / max(1, sum(dense)) ** 2
        self._at_edge = max(0.05, _CHANGE_AT_EDGE * (1 - same))
        self._changed = min(0.5, changed / max(1, seen))
        within = self._changed - ends / (self._total + 4)
        self._change = max(CHANGED, log(max(0.001, within) / self._changed))
        self._text_ends = self._share_of_ends()
        # Zeros begin or end at a block far less often than blocks are zeros.
        self._parted = max(0.0, log(self._zeros * (1 - self._zeros) * pairs / parted))

    def _share_of_ends(self) -> float:
        """Return how often one text ends between two blocks of text."""
        looks, per = self._looks, self._looks.per_cluster
        pairs, ended = 200, 200 * PARTED_MIN
        for index in range(0, len(looks), max(1, len(looks) // 5000)):
            for block in range(index * per + 1, (index + 1) * per):
                told = looks.goes_on(block - 1, block)
                pairs += told is not None
                ended += told is not None and told < PARTS
        return ended / pairs

    def _text(self, one: int, other: int, *, is_edge: bool) -> float:
        """Return what it tells that text goes on from one block to another, or does not."""
        told = self._looks.goes_on(one, other)
        if told is None:
            return 0.0
        ends = self._text_ends
        at_random = (1 - ends) * exp(told) + ends
        within = PARTED_WITHIN * ends
        return log((1.0 if is_edge else (1 - within) * exp(told) + within) / at_random)

    def learn(self, expected: Expected, index: int) -> None:
        """Take from an orphan in its place of what kind files are."""
        kinds = self._looks.kinds_of(index)
        for first, stop, owner in expected.runs:
            if owner >= 0:
                for kind in set(kinds[first:stop]) - {ZEROS}:
                    self.kinds[owner] = kind if self.kinds.get(owner, kind) == kind else MIXED

    def _kind(self, kinds: bytes, usual: int) -> float:
        """Return what it tells that blocks of a file are of the kind of others of it, or are not."""
        seen = set(kinds) - {ZEROS}
        if usual == MIXED or not seen:
            return 0.0
        return OF_KIND if seen == {usual} else OF_OTHER

    def tail(self, length: int, valid: int) -> float:
        """Return what a last block tells with so many bytes before its zeros, of so many of the file."""
        if length > valid:
            return LONGER
        if length == valid:
            return log(_TAIL_RIGHT / self._chance_of(length))
        if not length:
            return min(0.0, log(_TAIL_ZERO / self._zeros))
        if valid - length < NEAR_BYTES:
            return max(-2.0, log(_TAIL_NEAR / NEAR_BYTES / self._chance_of(length)))
        return log(_TAIL_SHORT / valid / self._chance_of(length))

    def _chance_of(self, length: int) -> float:
        """Return how often a block is filled so far; for lengths that are rare, as often as others."""
        usual = (self._partial + 1) / self._block_bytes
        return (max(self._counts[length] - 1, 0) + usual) / (self._total + 4)

    def of(self, expected: Expected, index: int) -> float:
        """Return how well an orphan meets what is expected of a cluster."""
        if expected.is_idle:
            return IN_FREE + self._strange(expected, index)
        lengths = self._looks.lengths_of(index)
        if not any(lengths):
            return ALL_ZEROS if expected.is_data else 0.0
        total = sum(self.tail(lengths[block], valid) for block, valid in expected.tails.items())
        untold = 0.0
        kinds = self._looks.kinds_of(index)
        for first, stop, owner in expected.runs:
            if owner in self.kinds:
                total += self._kind(kinds[first:stop], self.kinds[owner])
            if owner not in (SYSTEM, UNKNOWN):
                total += self._run(lengths[first:stop], owner)
                untold += self._ends(lengths[first:stop]) if owner >= 0 else 0.0
        total += max(UNTOLD_MAX, untold) + self._strange(expected, index)
        return total + self._edges(expected, index) + (IN_USE if expected.is_data else 0.0)

    def _strange(self, expected: Expected, index: int) -> float:
        """Return what it tells that a file system's own blocks are not what it writes there."""
        kinds = self._looks.kinds_of(index)
        owned = (kinds[first:stop] for first, stop, owner in expected.runs if owner == SYSTEM)
        return max(STRANGE_MAX, STRANGE * sum(part.count(TEXT) + part.count(NOISE) for part in owned))

    def _run(self, lengths: array[int], owner: int) -> float:
        zero = lengths.count(0)
        if 0 < zero < len(lengths):
            return -2.5 if owner == SLACK else -0.5
        of_zeros, of_full = {FREE: (_FREE_ZEROS, _FREE_FULL), SLACK: (_SLACK_ZEROS, _SLACK_FULL)}.get(
            owner, (_DATA_ZEROS, _DATA_FULL)
        )
        told = log(of_zeros / self._zeros) if zero else log(of_full / (1 - self._zeros))
        return max(-RUN_MAX, min(RUN_MAX, told))

    def _ends(self, lengths: Sequence[int]) -> float:
        """Return what it tells that blocks look like ends of files where no file ends."""
        full = self._block_bytes
        return self._untold * sum(0 < length < full - NEAR_BYTES for length in lengths)

    def _edges(self, expected: Expected, index: int) -> float:
        """Return what it tells where the kind of bytes changes, and where files end and others begin."""
        kinds = self._looks.kinds_of(index)
        changed = changes(kinds)
        within = 0.0
        total = 0.0
        for block in changed:
            if block in expected.edges:
                total += self.edge(is_edge=True, is_changed=True)
            elif expected.owners[block] >= 0:
                within += self._change
        alike: set[frozenset[int]] = set()
        for block in expected.edges:
            if kinds[block] == kinds[block - 1] != ZEROS:
                # Two files that are alike are so at each edge between them.
                alike.add(frozenset(expected.owners[block - 1 : block + 1]))
            elif self._is_end(expected, block) and (kinds[block] == ZEROS) != (kinds[block - 1] == ZEROS):
                total += self._parted
        total += len(alike) * self.edge(is_edge=True, is_changed=False)
        first = index * self._looks.per_cluster
        for block in range(1, len(kinds)):
            if kinds[block - 1] == kinds[block] == TEXT:
                is_edge = block in expected.edges
                if is_edge or expected.owners[block] >= 0:
                    text = self._text(first + block - 1, first + block, is_edge=is_edge)
                    total, within = (total + text, within) if is_edge else (total, within + text)
        return total + max(CHANGED_MAX, within)

    def _is_end(self, expected: Expected, block: int) -> bool:
        """Return if a file ends or begins between two blocks, and none of them is filled in part."""
        before, owner = expected.owners[block - 1], expected.owners[block]
        return (before >= 0) != (owner >= 0) and not {block - 1, block} & expected.tails.keys()

    def edge(self, *, is_edge: bool, is_changed: bool) -> float:
        """Return what two neighbouring blocks tell, by their owners and their kinds of bytes."""
        if not is_edge:
            return self._change if is_changed else -log(1 - self._changed)
        if is_changed:
            return max(0.0, log(self._at_edge / self._changed))
        return min(0.0, log((1 - self._at_edge) / (1 - self._changed)))

    def parts(self, index: int) -> bool:
        """Return if an orphan begins with other bytes than the one before it in the file ended with."""
        first = index * self._looks.per_cluster
        return self._looks.kinds[first] != self._looks.kinds[first - 1]

    def joint(self, one: Expected, first: int, other: Expected, second: int) -> float:
        """Return what the last block of an orphan and the first of another tell, placed side by side."""
        before, behind = one.owners[-1], other.owners[0]
        if (before < 0 and behind < 0) or one.is_idle or other.is_idle:
            return 0.0
        kinds = self._looks.kinds
        per = self._looks.per_cluster
        last, start = kinds[first * per + per - 1], kinds[second * per]
        if not last or not start:
            return 0.0
        told = self.edge(is_edge=before != behind, is_changed=last != start)
        if before == behind and second != first + 1:
            return told + self._looks.follows(first, second)
        # Neighbours in the file mostly go on from each other, wherever they belong.
        return told + self._text(first * per + per - 1, second * per, is_edge=before != behind)
