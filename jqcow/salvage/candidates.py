"""L2 tables that no surviving L1 table names: found by what they look like, placed by what knows of them.

CT1. A table is certain in a place only if something that knows says so: a live snapshot's L1 table and a
    refcount that counts one user more, or data whose place is certain, or that a live snapshot has, and that
    it names just there, while its own cluster is in use and no other table would do.
CT2. A table never names its own cluster, nor one in which a structure lies, and no table names it: else it is
    data, of an image in the image.
CT3. Two tables of one disk never name the same cluster: where they do, one of them is old.
"""

from __future__ import annotations

import sys
from array import array
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from jqcow import _native
from jqcow._native import COMPRESSED, MARK_ORDER
from jqcow.ondisk import entries
from jqcow.ondisk.layout import Geometry
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.marks import NOBODY, STRUCTURE, Bits, Marks
from jqcow.salvage.orphans import Unnamed
from jqcow.salvage.sweep import sweep
from jqcow.salvage.tables import INVALID, DiskTables, Fate

CANDIDATES_MAX = 1 << 16
COMPARED_MAX = 1 << 12
"""So many are compared with each other."""
SHARED_MAX = 1 << 22
"""So many clusters of snapshots are looked for in tables."""
CERTAIN_BITS = 32
"""Data that a table names in the right place tells so many bits, together, before that alone is certain."""
MANY_ENTRIES = 16
"""A table with so many entries, all for data that nobody else names, is one."""
ORDER_SAMPLED = 256
RISING = 0.95
"""Where so many clusters follow each other as their entries do, a file grew in the order of its disk."""
DATA_KINDS = slice(1, 4)


@dataclass(frozen=True)
class Candidate:
    """A cluster that looks like an L2 table.

    Attributes:
        offset: in the file, in bytes.
        named: how many of its entries name something.
        refcount: of its cluster; None where that is lost.
        is_alone: all that it names is in use, as far as refcounts tell, and nobody else names it.
        of_snapshots: how many snapshots have it.
        indices: where L1 tables, live or old ones, have it.
    """

    offset: int
    named: int
    refcount: int | None
    is_alone: bool
    of_snapshots: int = 0
    indices: frozenset[int] = frozenset()

    @property
    def may_be_used(self) -> bool:
        """True unless refcounts say that the active disk does not have it."""
        return self.refcount is None or self.refcount > self.of_snapshots

    @property
    def is_used(self) -> bool:
        """True if refcounts say that the active disk has it, if it is a table at all."""
        return self.refcount is not None and self.refcount > self.of_snapshots


@dataclass
class _Vote:
    """What data of known place says of a candidate: so many clusters of it, certain ones and likely ones."""

    right: int = 0
    wrong: int = 0
    likely: int = 0


class Told(NamedTuple):
    """What a cluster that a table names tells of its place.

    Attributes:
        table: host offset of the table.
        position: of the entry in it.
        guest_offset: of the cluster on the disk, in bytes.
        certainty: how surely.
    """

    table: int
    position: int
    guest_offset: int
    certainty: Certainty


@dataclass
class L1Copies:
    """What L1 tables say that are not the disk's: those of snapshots, and old ones.

    Attributes:
        live: the (index, host offset) of entries of live snapshots; one that several have comes as often.
        old: those of L1 tables that nothing names.
        are_known: False if there may be snapshots that are lost.
        places: the host offsets of their clusters: no L2 table lies there.
    """

    live: list[tuple[int, int]] = field(default_factory=list)
    old: list[tuple[int, int]] = field(default_factory=list)
    are_known: bool = True
    places: set[int] = field(default_factory=set)


class TableSearch:
    """Finds tables for what a disk has lost.

    Attributes:
        candidates: what may be an L2 table, by host offset.
        used_hosts: clusters that likely tables name; they are placed, if not certainly.
        adopted_hosts: clusters of tables that are certain, and what these name.
    """

    def __init__(self, tables: DiskTables, marks: Marks, unnamed: Unnamed, copies: L1Copies) -> None:
        """Look at what nobody names, for tables that may be those that ``tables`` has lost."""
        self._tables, self._marks, self._unnamed, self._copies = tables, marks, unnamed, copies
        self.used_hosts = Bits(marks.cluster_count)
        self.adopted_hosts = Bits(marks.cluster_count)
        self.candidates: dict[int, Candidate] = {}
        self._packed: set[int] = set()
        self._of_snapshots = {offset for _, offset in copies.live} - set(tables.offsets)
        indices: dict[int, set[int]] = defaultdict(set)
        snapshots: dict[int, int] = defaultdict(int)
        for index, offset in copies.live:
            indices[offset].add(index)
            snapshots[offset] += 1
        for index, offset in copies.old:
            indices[offset].add(index)
        for offset in self._look():
            found = self._candidate(offset)
            if found is not None and len(self.candidates) < CANDIDATES_MAX:
                self.candidates[offset] = replace(
                    found,
                    of_snapshots=snapshots.get(offset, 0),
                    indices=frozenset(indices.get(offset, ())),
                )
        self._drop_data()
        self._shared = self._shared_data()
        if any(found.is_used and found.named for found in self.candidates.values()) or (
            len(unnamed.bits) and not any(tables.fates)
        ):
            tables.doubt_absent()

    # Finding

    def _look(self) -> Iterator[int]:
        """Yield the clusters that nobody names and that have sectors of a table, in order."""
        bits = self._marks.cluster_bits
        parts = [(first << bits, count << bits) for first, count in self._unmarked()]
        found = set(sweep(self._tables.source, parts).clusters(1 << bits))
        # Those of snapshots need not have the look of tables: who names them says that they are.
        yield from sorted(found | {offset for _, offset in self._copies.live})

    def _unmarked(self) -> Iterator[tuple[int, int]]:
        marks, cluster = self._marks, 0
        while cluster < marks.cluster_count:
            mark, count = _native.refcount_run(marks.data, MARK_ORDER, cluster, marks.cluster_count)
            if mark == NOBODY:
                yield cluster, count
            cluster += count

    def _candidate(self, offset: int) -> Candidate | None:
        """Return what a cluster is, if it can be a table (CT2)."""
        tables, marks, bits = self._tables, self._marks, self._marks.cluster_bits
        mark = marks.of(offset >> bits)
        is_of_snapshot = mark == STRUCTURE and offset in self._of_snapshots
        if not (mark == NOBODY or is_of_snapshot) or not offset or offset in self._copies.places:
            return None
        table = tables.source.pread(1 << bits, offset)
        shape = tables.shape
        counts = _native.l2_judge(
            table, shape.codec.entry_bytes, bits, shape.reserved, tables.source.size(), None
        )
        if counts[INVALID] or not any(counts[DATA_KINDS]):
            return None
        if counts[COMPRESSED]:
            self._packed.add(offset)
        named = alone = 0
        for found in shape.codec.found(table):
            cluster = found.host >> bits
            if not found.host:
                continue
            if cluster == offset >> bits or marks.of(cluster) == STRUCTURE:
                return None
            named += 1
            alone += marks.of(cluster) == NOBODY and cluster in self._unnamed.bits
        return Candidate(offset, named, self._unnamed.refcount(offset >> bits), alone == named)

    def _drop_data(self) -> None:
        """Take out the candidates that tables name as data (CT2).

        What nobody names is a table, and what a table names is data: so it names nothing. Where some name
        each other, the one that names most is the table.
        """
        if len(self.candidates) > COMPARED_MAX:
            return
        wanted = _entries_of(self.candidates)
        names = {offset: self._names(offset, wanted) for offset in self.candidates}
        named_by: dict[int, set[int]] = defaultdict(set)
        for offset, named in names.items():
            for other in named:
                named_by[other].add(offset)
        waiting = sorted(self.candidates.values(), key=lambda found: (-found.named, found.offset))
        while waiting:
            tables = [found for found in waiting if not named_by[found.offset]] or waiting[:1]
            data = {other for found in tables for other in names[found.offset]}
            data -= {found.offset for found in tables}
            for other in data & self.candidates.keys():
                del self.candidates[other]
                for third in names[other]:
                    named_by[third].discard(other)
            done = data | {found.offset for found in tables}
            waiting = [found for found in waiting if found.offset not in done]

    def _shared_data(self) -> dict[int, int]:
        """Return the guest offset of data that live snapshots name, by host offset.

        The disk may share it: then it has it in the same place.
        """
        shared: dict[int, int] = {}
        tables = self._tables
        for index, offset in self._copies.live:
            if len(shared) > SHARED_MAX or not 0 < offset < tables.source.size():
                continue
            start = index * tables.table_covers
            table = tables.source.pread(tables.shape.geometry.cluster_bytes, offset)
            for found in tables.shape.codec.found(table):
                if found.host and not found.length and not found.has_reserved:
                    shared[found.host] = start + found.position * tables.shape.geometry.cluster_bytes
        return shared

    def _names(self, offset: int, wanted: set[int]) -> set[int]:
        """Return the clusters that a table names, of those with ``wanted`` entries."""
        return {entries.split_l1(word)[0] for word in wanted.intersection(self._words(offset))}

    def _positions(self, offset: int, hosts: Container[int], wanted: set[int]) -> list[tuple[int, int]]:
        """Return (host offset, position) of what a table names.

        Args:
            offset: of the table.
            hosts: which of it is asked for.
            wanted: the entries of ``hosts``, as `_entries_of` returns them.
        """
        found = []
        words = self._words(offset)
        for word in wanted.intersection(words):
            host = entries.split_l1(word)[0]
            position = words.index(word)
            found.append((host, position // (2 if self._tables.shape.geometry.has_subclusters else 1)))
        if offset in self._packed:
            table = self._tables.source.pread(self._tables.shape.geometry.cluster_bytes, offset)
            for entry in self._tables.shape.codec.found(table):
                if entry.length and entry.host in hosts:
                    found.append((entry.host, entry.position))
        return found

    def _words(self, offset: int) -> array[int]:
        words = array("Q", self._tables.source.pread(self._tables.shape.geometry.cluster_bytes, offset))
        if sys.byteorder == "little":
            words.byteswap()
        return words

    # Placing

    def place(self, known: Mapping[int, int], told: Iterable[Told] = ()) -> int:
        """Place tables by copies of the L1 table and by data whose place is certain; return how many are new.

        Args:
            known: the guest offset of each host cluster whose place is certain, by host offset.
            told: what the data that a table names tells of its own place.
        """
        votes = self._votes({**self._shared, **known})
        _count_told(votes, told, self._tables.shape.geometry)
        rivals: dict[int, list[tuple[Candidate, _Vote]]] = defaultdict(list)
        for offset, found in self.candidates.items():
            best = self._best_index(found, votes.get(offset, {}))
            if best is not None and self._is_open(best):
                rivals[best].append((found, votes.get(offset, {}).get(best, _Vote())))
        count = 0
        by_index: dict[int, dict[int, int]] = defaultdict(dict)
        for host, guest in known.items():
            by_index[guest // self._tables.table_covers][guest] = host
        for index, several in rivals.items():
            for found, vote in several:
                vote.wrong += self._contradictions(found, index, by_index.get(index, {}))
            count += self._decide(index, several)
        return count

    def _votes(self, known: Mapping[int, int]) -> dict[int, dict[int, _Vote]]:
        """Return by candidate and L1 index what data of known place says."""
        geometry = self._tables.shape.geometry
        votes: dict[int, dict[int, _Vote]] = {}
        if not known:
            return votes
        wanted = _entries_of(known)
        for offset in self.candidates:
            own: dict[int, _Vote] = defaultdict(_Vote)
            wrong = 0
            for host, position in self._positions(offset, known, wanted):
                index, entry = divmod(known[host] // geometry.cluster_bytes, geometry.l2_entries)
                if entry == position:
                    own[index].right += 1
                else:
                    wrong += 1
            for index, vote in own.items():
                others = sum(other.right for key, other in own.items() if key != index)
                vote.wrong = wrong + others
            votes[offset] = dict(own)
        return votes

    @staticmethod
    def _best_index(found: Candidate, votes: dict[int, _Vote]) -> int | None:
        if votes:
            index = max(votes, key=lambda key: votes[key].right + votes[key].likely)
            return index if votes[index].right + votes[index].likely > votes[index].wrong else None
        return next(iter(found.indices)) if len(found.indices) == 1 else None

    def _is_open(self, index: int) -> bool:
        if index >= len(self._tables.fates):
            return self._tables.grow(index)
        return self._tables.fates[index] in (Fate.LOST, Fate.EMPTY)

    def _contradictions(self, found: Candidate, index: int, known: dict[int, int]) -> int:
        """Return how many clusters of an L1 entry's range are known to lie elsewhere than a table says."""
        if not known:
            return 0
        hosts = set(known.values())
        named = set(self._positions(found.offset, hosts, _entries_of(hosts)))
        geometry = self._tables.shape.geometry
        return sum(
            (host, guest // geometry.cluster_bytes % geometry.l2_entries) not in named
            for guest, host in known.items()
        )

    def _decide(self, index: int, rivals: list[tuple[Candidate, _Vote]]) -> int:
        """Give an L1 entry the best of the tables that would do; return 1 if that is new."""
        usable = [(found, vote) for found, vote in rivals if found.may_be_used] or rivals
        usable.sort(
            key=lambda one: (one[0].is_used, one[1].right + one[1].likely - one[1].wrong, one[0].offset)
        )
        found, vote = usable[-1]
        if self._is_certain(index, found, vote, alone=len(usable) == 1):
            self._adopt(index, found)
            return 1
        certainty = Certainty.LIKELY if found.may_be_used and not vote.wrong else Certainty.GUESS
        return self._set_likely(index, found, certainty)

    def _is_certain(self, index: int, found: Candidate, vote: _Vote, *, alone: bool) -> bool:
        """Return if CT1 holds for a table in a place."""
        if not (alone and self._copies.are_known and found.is_used and not vote.wrong):
            return False
        if (index, found.offset) in self._copies.live:
            return True
        bits_each = self._tables.shape.geometry.l2_entries.bit_length() - 1
        if vote.right * bits_each >= CERTAIN_BITS:
            return True
        return vote.right > 0 and found.is_alone and found.named >= MANY_ENTRIES

    def _adopt(self, index: int, found: Candidate) -> None:
        self._tables.adopt(index, found.offset, self._marks)
        self.candidates.pop(found.offset, None)
        for host in (found.offset >> self._marks.cluster_bits, *self._hosts(found.offset)):
            self._unnamed.bits.discard(host)
            self.adopted_hosts.add(host)

    def unplaced(self) -> list[int]:
        """Return the host offsets of the tables that are in no place with certainty, and may be in use."""
        return [offset for offset, found in self.candidates.items() if found.may_be_used]

    def _set_likely(self, index: int, found: Candidate, certainty: Certainty) -> int:
        if self._tables.likely.get(index) == (found.offset, certainty):
            return 0
        self._tables.likely[index] = found.offset, certainty
        if certainty == Certainty.LIKELY:
            for host in self._hosts(found.offset):
                self.used_hosts.add(host)
        return 1

    def _hosts(self, offset: int, *, with_compressed: bool = True) -> Iterator[int]:
        """Yield the clusters that a table names; compressed data may share one with that of other tables."""
        table = self._tables.source.pread(self._tables.shape.geometry.cluster_bytes, offset)
        for found in self._tables.shape.codec.found(table):
            cluster = found.host >> self._marks.cluster_bits
            if found.host and cluster < self._marks.cluster_count and (with_compressed or not found.length):
                yield cluster

    # What is left

    def place_in_order(self) -> int:
        """Give the tables that are left to the L1 entries that are left, both in order; return how many."""
        taken = {offset for offset, _ in self._tables.likely.values()}
        left = [found for found in self.candidates.values() if found.offset not in taken and found.named]
        left = self._without_old([found for found in left if found.may_be_used])
        lost = [
            index
            for index, fate in enumerate(self._tables.fates)
            if fate == Fate.LOST and index not in self._tables.likely
        ]
        if not left or not lost:
            return 0
        if len(left) == len(lost) == 1 and self._would_close(left[0]):
            self._adopt(lost[0], left[0])
            return 1
        left.sort(key=lambda one: one.offset)
        is_ordered = len(left) == len(lost) and self._grew_in_order(left)
        certainty = Certainty.LIKELY if is_ordered else Certainty.GUESS
        for index, found in self._in_order(lost, left):
            self._set_likely(index, found, certainty)
        return min(len(lost), len(left))

    def _grew_in_order(self, left: list[Candidate]) -> bool:
        """Return if the file grew as the disk was written, from its start on: so its tables tell."""
        tables = self._tables
        steps = rising = last = 0
        for candidate in left[:ORDER_SAMPLED]:
            table = tables.source.pread(tables.shape.geometry.cluster_bytes, candidate.offset)
            for found in tables.shape.codec.found(table):
                if found.host:
                    steps += 1
                    rising += found.host > last
                    last = found.host
        return rising >= RISING * steps

    def _in_order(self, lost: list[int], left: list[Candidate]) -> Iterator[tuple[int, Candidate]]:
        """Yield pairs; a table behind those of lower entries has a higher one, if all others have."""
        placed = [
            (self._tables.offsets[index], index)
            for index, fate in enumerate(self._tables.fates)
            if fate in (Fate.WHOLE, Fate.TORN)
        ]
        placed.sort()
        is_grown = all(before[1] < after[1] for before, after in pairwise(placed))
        position = 0
        for number, found in enumerate(left):
            room = len(lost) - (len(left) - number)
            if is_grown and placed:
                below = max((index for offset, index in placed if offset < found.offset), default=-1)
                while position < room and lost[position] < below:
                    position += 1
            if position >= len(lost):
                return
            yield lost[position], found
            position += 1

    def _without_old(self, left: list[Candidate]) -> list[Candidate]:
        """Leave out tables of which another one names the most, too (CT3): those in use, or later, stay."""
        if len(left) > COMPARED_MAX:
            return left
        kept: list[Candidate] = []
        taken: set[int] = set()
        for found in sorted(left, key=lambda one: (one.is_used, one.is_alone, one.offset), reverse=True):
            hosts = set(self._hosts(found.offset, with_compressed=False))
            if len(hosts & taken) * 4 <= len(hosts):
                kept.append(found)
                taken |= hosts
        return kept

    def _would_close(self, found: Candidate) -> bool:
        """Return if with a table every cluster that refcounts count is named: then it is the one."""
        if not (
            found.is_used and found.is_alone and self._copies.are_known and not self._unnamed.uncounted_bytes
        ):
            return False
        hosts = set(self._hosts(found.offset)) | {found.offset >> self._marks.cluster_bits}
        return len(self._unnamed.bits) == len(hosts & set(self._unnamed.bits)) == len(hosts)


def _entries_of(hosts: Iterable[int]) -> set[int]:
    """Return the entries of tables that name clusters."""
    return {entries.l1_entry(host, copied=copied) for host in hosts for copied in (True, False)}


def _count_told(votes: dict[int, dict[int, _Vote]], told: Iterable[Told], geometry: Geometry) -> None:
    """Count what the data of tables tells of them, by table and L1 index."""
    for offset, position, guest, certainty in told:
        own = votes.setdefault(offset, {})
        index, entry = divmod(guest // geometry.cluster_bytes, geometry.l2_entries)
        if entry == position:
            vote = own.setdefault(index, _Vote())
            vote.right += certainty == Certainty.CERTAIN
            vote.likely += certainty == Certainty.LIKELY
        for key, vote in own.items():
            vote.wrong += certainty == Certainty.CERTAIN and (key != index or entry != position)
