"""Where the journal's own blocks belong: transactions follow each other, and each tells how long it is.

Nothing in a block of the journal says its place, so what follows from counting is likely, not certain. It
keeps the journal's blocks from being taken for a file's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jqcow.salvage.guest.ext4_journal import COMMIT, DESCRIPTOR, REVOKE, Copy, JournalSuperblock

Spot = tuple[int, int]
"""Host offset of an orphan, and where in it a block starts, in bytes."""


@dataclass
class Transaction:
    """The blocks of a transaction that were found: revoked blocks, then descriptors with copies, its end."""

    revokes: list[Spot] = field(default_factory=list)
    descriptors: list[tuple[Spot, list[Copy]]] = field(default_factory=list)
    commits: list[Spot] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Return how many blocks of the journal it takes."""
        return len(self.revokes) + sum(1 + len(copies) for _, copies in self.descriptors) + 1

    def places(self) -> Iterator[tuple[int, Spot | Copy]]:
        """Yield (block of the transaction, where that is in an orphan, or what it is a copy of)."""
        at = 0
        for spot in sorted(self.revokes):
            yield at, spot
            at += 1
        for spot, copies in sorted(self.descriptors, key=lambda one: one[0]):
            yield at, spot
            yield from enumerate(copies, at + 1)
            at += 1 + len(copies)
        for spot in self.commits:
            yield at, spot


class LogPlaces:
    """Counts the transactions from the one whose place the journal's superblock tells."""

    def __init__(self) -> None:
        self._transactions: dict[int, Transaction] = {}

    def add(self, kind: int, sequence: int, spot: Spot, copies: list[Copy]) -> None:
        """Take a block of the journal in; the copies are a descriptor's."""
        transaction = self._transactions.setdefault(sequence, Transaction())
        if kind == DESCRIPTOR:
            transaction.descriptors.append((spot, copies))
        elif kind == REVOKE:
            transaction.revokes.append(spot)
        elif kind == COMMIT:
            transaction.commits.append(spot)

    def blocks(self, journal: JournalSuperblock) -> Iterator[tuple[int, Spot | Copy]]:
        """Yield (block of the journal, where that is in an orphan, or what it is a copy of).

        It counts from where the log starts, or from where an empty one goes on, back and forth for as long as
        each transaction was found once and whole.
        """
        number, start = journal.sequence, journal.start
        if not start:
            number, start = max(self._transactions, default=0) + 1, journal.head
        length = journal.blocks - journal.first
        if not journal.first <= start <= journal.blocks:
            return
        for step in (-1, 1):
            at, left = start, length
            current = number - 1 if step < 0 else number
            while found := self._transactions.get(current):
                left -= found.blocks
                if len(found.commits) != 1 or left < 0:
                    break
                at -= found.blocks if step < 0 else 0
                for index, what in found.places():
                    yield (at + index - journal.first) % length + journal.first, what
                at += found.blocks if step > 0 else 0
                current += step


def offsets(
    blocks: Iterator[tuple[int, Spot | Copy]],
    spots: Mapping[tuple[int, int], list[Spot]],
    place: Mapping[int, int],
    cluster_bytes: int,
) -> dict[int, int]:
    """Return the guest offset of each orphan in which blocks of the journal agree on one.

    Args:
        blocks: as `LogPlaces.blocks` yields them.
        spots: where blocks are that name a home, by that home and `crc_inverse.alone` of them.
        place: guest offset of each block of the journal, in bytes.
        cluster_bytes: length of an orphan.
    """
    votes: dict[int, Counter[int]] = {}
    for number, what in blocks:
        if number not in place:
            continue
        if isinstance(what, Copy):
            listed = spots.get((what.home, what.alone), []) if what.alone is not None else []
        else:
            listed = [what]
        for host_offset, at in listed:
            offset = place[number] - at
            if offset >= 0 and offset % cluster_bytes == 0:
                votes.setdefault(host_offset, Counter())[offset] += 1
    found: dict[int, int] = {}
    for host_offset, counted in votes.items():
        (offset, count), *others = counted.most_common(2)
        if not others or others[0][1] < count:
            found[host_offset] = offset
    return found
