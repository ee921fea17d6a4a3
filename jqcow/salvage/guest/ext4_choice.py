"""Which of several orphans that name one place is there, and which are copies in the journal or old."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guest.ext4_marks import SELF_SUMMED, Kind, Mark
from jqcow.salvage.guest.ext4_ondisk import Inode, Superblock
from jqcow.salvage.guest.ext4_places import Known, Places

RIVALS_MAX = 64
"""More different orphans that name one place are not compared, each with each."""


@dataclass(frozen=True)
class Candidate:
    """An orphan that may be at a place.

    Attributes:
        host_offset: of the orphan in the file, in bytes.
        offset: of the place on the guest's disk, in bytes.
        support: its marks that name the place.
    """

    host_offset: int
    offset: int
    support: list[Mark]


class Choice:
    """Chooses among candidates.

    Attributes:
        is_whole: whether no orphan is known to be missing, or an orphan has so many blocks that a part of
            the journal does not pass for another place.
        spots: (host offset, where in the orphan) of blocks that name a home, by that and their content.

    Args:
        superblock: the newest copy.
        known: what was learnt.
        places: finds the places of marks.
        is_clean: whether the journal has nothing that is not at home.
        read: reads an orphan.
    """

    def __init__(
        self,
        superblock: Superblock,
        known: Known,
        places: Places,
        is_clean: bool,
        read: Callable[[int], bytes],
    ) -> None:
        self._superblock = superblock
        self._known = known
        self._places = places
        self._is_clean = is_clean
        self.is_whole = True
        self._read = read
        self._claims: Counter[tuple[int, int | None]] = Counter()
        self.spots: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._in_company: set[int] = set()
        self._equal: Counter[tuple[int, int]] = Counter()

    def count(self, host_offset: int, marks: Iterable[Mark]) -> None:
        """Take note of what names a home, wherever it lies."""
        for mark in marks:
            home = self._home(mark)
            if home is not None:
                self.spots.setdefault((home, mark.alone), []).append((host_offset, mark.at))
                self._claims[home, self._content(mark)] += 1
                if mark.kind is Kind.EXTENTS:
                    self._equal[home, mark.alone] += 1

    def misses(self, homes: Iterable[int]) -> bool:
        """Return whether an orphan is missing: a copy of one of the homes that the journal must have."""
        log = self._known.log
        return any(
            copy.alone is not None
            and copy.sequence > log.unbroken_from()
            and not self._claims[home, copy.alone] + log.placed(copy.alone)
            for home in homes
            for copy in log.of(home)
        )

    def _home(self, mark: Mark) -> int | None:
        ranges = self._places.of_mark(mark) if mark.kind is not Kind.JOURNAL else None
        if ranges and (mark.kind is Kind.DESCRIPTORS or (len(ranges) == 1 and ranges[0][1] == 1)):
            return ranges[0][0]
        return None

    def is_copy(self, mark: Mark) -> bool:
        """Return whether the journal accounts for all blocks that hold the same for the same home."""
        home = self._home(mark)
        if home is None:
            return False
        if (mark.key, mark.extra, mark.alone) in self._known.sound_nodes:
            return False
        content = self._content(mark)
        log = self._known.log
        placed = 0 if content is None else log.placed(content)
        return self._claims[home, content] + placed <= log.promised(home, content)

    def _content(self, mark: Mark) -> int | None:
        """Return what tells contents apart by the journal's checksums; None where these cannot."""
        return None if mark.kind in SELF_SUMMED else mark.alone

    def choose(self, candidates: list[Candidate]) -> tuple[Candidate, Certainty] | None:
        """Return who is at home, and how surely; None where nobody is."""
        chosen = self._choose(candidates)
        if chosen and not self.is_whole and not all(map(self._is_current, chosen[0].support)):
            return chosen[0], Certainty.LIKELY
        return chosen

    def _is_current(self, mark: Mark) -> bool:
        """Return whether a block is one of those that cannot be a copy that nothing tells of."""
        if mark.kind in (Kind.RESERVED, Kind.BITMAP) or (mark.kind is Kind.SUPERBLOCK and mark.key):
            return True
        if (mark.key, mark.extra, mark.alone) in self._known.sound_nodes:
            return True
        home = self._home(mark)
        return self._is_clean and home is not None and self._known.log.newest(home, True) == mark.alone

    def take_neighbours(self, decided: Mapping[int, list[Candidate]], length: int) -> None:
        """Take note of the orphans next to which there lies, in the file, what is next to their place."""
        offsets = {one.host_offset: offset for offset, group in decided.items() for one in group}
        for host_offset, offset in offsets.items():
            for step in (-length, length):
                if offsets.get(host_offset + step) == offset + step:
                    self._in_company.add(host_offset)

    def _choose(self, candidates: list[Candidate]) -> tuple[Candidate, Certainty] | None:
        living = [one for one in candidates if not all(self.is_copy(mark) for mark in one.support)]
        if len(living) < 2:
            return (living[0], Certainty.CERTAIN) if living else None
        living.sort(key=lambda one: one.host_offset in self._in_company)
        different = list({self._digest(one): one for one in living}.values())
        if len(different) == 1:
            return different[0], Certainty.CERTAIN
        if len(different) > RIVALS_MAX:
            return None
        contents = {one.host_offset: self._read(one.host_offset) for one in different}
        for one in different:
            if all(self._order(one, other, contents) > 0 for other in different if other is not one):
                return one, Certainty.CERTAIN if self._is_clean else Certainty.LIKELY
        return None

    def _digest(self, candidate: Candidate) -> bytes:
        """Return what is equal where contents are, and takes less room."""
        return hashlib.blake2b(self._read(candidate.host_offset), digest_size=32).digest()

    def share_out(
        self, free: list[int], offsets: tuple[int, ...], candidates: list[Candidate]
    ) -> Iterator[tuple[int, Candidate, Certainty]]:
        """Yield (guest offset, orphan, how surely) where several orphans may each be at several places.

        Args:
            free: places that nothing is at yet.
            offsets: all places that each of the orphans may have; the one in use first, for descriptors.
            candidates: the orphans.
        """
        kinds = {mark.kind for one in candidates for mark in one.support}
        by_content: dict[bytes, list[Candidate]] = {}
        for one in candidates:
            by_content.setdefault(self._digest(one), []).append(one)
        if kinds == {Kind.BITMAP}:
            if len(by_content) == 1:
                for offset, one in zip(free, candidates, strict=False):
                    yield offset, one, Certainty.CERTAIN
            return
        certainty = Certainty.CERTAIN if self.is_whole else Certainty.LIKELY
        if (
            kinds == {Kind.DIRECTORY}
            and len(by_content) == 1
            and len(candidates) == len(offsets) == len(free)
        ):
            for offset, one in zip(free, candidates, strict=True):
                yield offset, one, certainty
        if kinds == {Kind.DESCRIPTORS}:
            for offset, one in self._share_descriptors(free, offsets, by_content):
                yield offset, one, certainty

    def _share_descriptors(
        self, free: list[int], offsets: tuple[int, ...], by_content: dict[bytes, list[Candidate]]
    ) -> Iterator[tuple[int, Candidate]]:
        """Backups are alike, and as they were made; the one in use is another, or one more of them."""
        surplus = {
            content: count
            for content, group in by_content.items()
            if (count := len(group) - min(self._promised(mark) for mark in group[0].support)) > 0
        }
        backups, first = len(offsets) - 1, offsets[0]
        made = [content for content, count in surplus.items() if count >= max(2, backups)]
        used = [content for content in surplus if content not in made]
        if len(used) > 1 and self._is_clean:
            used = [content for content in used if self._is_newest(by_content[content][0])]
        if backups == 1 and len(surplus) == 2:
            newest = [content for content in surplus if self._is_newest(by_content[content][0])]
            made, used = [content for content in surplus if content not in newest], newest
        if len(made) != 1 or len(used) > 1:
            return
        if used and first in free:
            yield first, by_content[used[0]][0]
        elif not used and first in free and surplus[made[0]] > backups:
            yield first, by_content[made[0]][-1]
        rest = [offset for offset in free if offset != first]
        yield from zip(rest, by_content[made[0]], strict=False)

    def _unused_inodes(self, block: bytes) -> int:
        """Return how many inodes a block of descriptors says were never used: they never get more."""
        step = self._superblock.descriptor_bytes
        starts = range(0, len(block), step)
        return sum(int.from_bytes(block[at + 0x1C : at + 0x1E], "little") for at in starts)

    def _is_newest(self, candidate: Candidate) -> bool:
        mark = candidate.support[0]
        home = self._home(mark)
        return home is not None and self._known.log.newest(home) == mark.alone

    def _promised(self, mark: Mark) -> int:
        home = self._home(mark)
        return 0 if home is None else self._known.log.promised(home, self._content(mark))

    def _order(self, left: Candidate, right: Candidate, contents: dict[int, bytes]) -> int:
        """Return 1 when the left one is newer wherever they differ, -1 when the right one is, else 0."""
        verdicts: set[int] = set()
        others = {mark.at: mark for mark in right.support}
        for mark in left.support:
            other = others.get(mark.at)
            if other is None or other.kind is not mark.kind or other.alone == mark.alone:
                continue
            home = self._home(mark)
            newest = self._known.log.newest(home) if home is not None else None
            if mark.kind not in SELF_SUMMED and newest in (mark.alone, other.alone):
                verdicts.add(1 if newest == mark.alone else -1)
                continue
            if mark.kind is Kind.EXTENTS and home is not None and newest is not None:
                counts = [self._equal[home, one.alone] > 1 for one in (mark, other)]
                verdicts.add(counts[0] - counts[1])
                continue
            size = self._superblock.block_bytes
            blocks = [contents[one.host_offset][mark.at : mark.at + size] for one in (left, right)]
            verdicts.add(self._newer(mark.kind, blocks[0], blocks[1]))
        verdicts.discard(0)
        return verdicts.pop() if len(verdicts) == 1 else 0

    def _newer(self, kind: Kind, left: bytes, right: bytes) -> int:
        """Return 1 when by its own times the left block is newer, -1 when the right one is, else 0."""
        if kind is Kind.SUPERBLOCK:
            at = 0 if self._superblock.block_bytes == 1024 else 1024
            both = [Superblock.unpack(block[at : at + 1024]) for block in (left, right)]
            pairs = [[(one.write_seconds, one.kib_written) if one else (0, 0) for one in both]]
        elif kind is Kind.INODES:
            step = self._superblock.inode_bytes
            pairs = [
                [(inode.changed, inode.modified) for inode in map(Inode.unpack, slots)]
                for at in range(0, len(left), step)
                if left[at : at + step] != right[at : at + step]
                for slots in ((left[at : at + step], right[at : at + step]),)
            ]
        elif kind is Kind.DESCRIPTORS:
            pairs = [[(-self._unused_inodes(block), 0) for block in (left, right)]]
        else:
            return 0
        orders = {(first > second) - (first < second) for first, second in pairs} - {0}
        return orders.pop() if len(orders) == 1 else 0
