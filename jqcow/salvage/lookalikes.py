"""What looks like an L1 or an L2 table, and is believed by what it names.

An L1 table names L2 tables. Those of an image in the image have another file's offsets, and name none.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from jqcow import _native
from jqcow.ondisk import entries, layout
from jqcow.ondisk.l2 import reserved_bits
from jqcow.ondisk.layout import SECTOR_BYTES, Geometry, table_bytes
from jqcow.salvage.source import Source
from jqcow.salvage.sweep import Sweep, sweep

SAMPLED_TABLES = 16
"""So many tables that an L1 table names tell whether it is one."""
EMPTY_TABLES = 64
"""So many are looked at to find these, if some are all zeros."""
WORK_FACTOR, WORK_BYTES = 16, 1 << 27
"""So often a file is read in all, and so much more: a hostile one could ask for any."""
LOOK_BYTES_MIN = 1 << 10
"""A look at less costs as much."""
WORD_BYTES = 1 << 10
"""A word of a table costs as much work as so many bytes."""
RIVALS_MAX = 64
RIVAL_TABLES_MAX = 256
"""So many L1 tables are compared, by so many of their L2 tables."""
HOPELESS = 3
"""If the first so many are none, it is none."""
GAP_BYTES = 32 << 10
"""So much of an L1 table in a row may name nothing that tells."""
RIGHT = 0.8
"""Of what a table names so much has to be what it should."""
CANDIDATES_MAX = 1 << 14

_ZERO, INVALID = 1, 4
"""Places in what `l2_judge` counts."""


@dataclass(frozen=True)
class FoundL1:
    """What may be an L1 table.

    Attributes:
        offset: in the file, in bytes.
        entry_count: up to the last entry in use.
        named: how many entries name something.
        sampled: how many of these were looked at, but for those that are all zeros.
        right: how many of them name an L2 table.
        newest: the highest host offset that it names.
    """

    offset: int
    entry_count: int
    named: int
    sampled: int
    right: int
    newest: int

    @property
    def is_sure(self) -> bool:
        """True if it names what an L1 table does."""
        return self.right >= RIGHT * self.sampled


class Lookalikes:
    """Looks for tables in a file."""

    def __init__(self, source: Source) -> None:
        """Look in ``source``."""
        self._source = source
        self._left = WORK_FACTOR * source.size() + WORK_BYTES

    def _pread(self, length: int, offset: int) -> bytes:
        """Read, and count the work that a look costs."""
        self._left -= max(length, LOOK_BYTES_MIN)
        return self._source.pread(length, offset)

    @property
    def _is_tired(self) -> bool:
        """True if so much was looked at that no honest file needs it: then nothing more is found."""
        return self._left < 0

    @cached_property
    def seen(self) -> Sweep:
        """What a pass over the whole file sees; done when it is first asked for."""
        return sweep(self._source)

    # L2 tables

    def judge(self, table: bytes, cluster_bits: int, *, extended: bool) -> tuple[int, ...]:
        """Count what the entries of a table are: see `_native.l2_judge`."""
        reserved = reserved_bits(Geometry(cluster_bits, has_subclusters=extended))
        return _native.l2_judge(table, 16 if extended else 8, cluster_bits, reserved, self._source.size())

    def is_l2(self, offset: int, cluster_bits: int, *, extended: bool) -> bool:
        """Return True if an L2 table with entries may lie at a host offset."""
        if offset % (1 << cluster_bits) or not 0 < offset < self._source.size() or self._is_tired:
            return False
        counts = self.judge(self._pread(1 << cluster_bits, offset), cluster_bits, extended=extended)
        return not counts[INVALID] and any(counts[_ZERO:INVALID])

    def _is_l2_of_any_kind(self, offset: int, cluster_bytes: int) -> bool:
        bits = cluster_bytes.bit_length() - 1
        if self.is_l2(offset, bits, extended=False):
            return True
        return bits >= layout.MIN_SUBCLUSTER_CLUSTER_BITS and self.is_l2(offset, bits, extended=True)

    def _name_l2(self, places: list[int], cluster_bytes: int) -> bool | None:
        """Return if each place has an L2 table, or had one and is all zeros; None if none of them has one."""
        found = [self._is_l2_of_any_kind(place, cluster_bytes) for place in places]
        empty = [_native.is_zero(self._pread(cluster_bytes, place)) for place in places]
        if not all(one or other for one, other in zip(found, empty, strict=True)):
            return False
        return True if any(found) else None

    def count_l2(self, cluster_bits: int) -> int:
        """Return how many clusters look like L2 tables."""
        return sum(
            self._is_l2_of_any_kind(offset, 1 << cluster_bits) for offset in self._candidates(cluster_bits)
        )

    # L1 tables

    def l1_at(self, offset: int, cluster_bits: int, entry_count: int | None = None) -> FoundL1 | None:
        """Return what is known of an L1 table at a host offset; None if there can be none.

        Args:
            offset: of its first entry.
            cluster_bits: of the image.
            entry_count: its length; None where that is not known: it goes on as long as it can.
        """
        cluster_bytes = 1 << cluster_bits
        if offset % cluster_bytes or not 0 < offset < self._source.size() or self._is_tired:
            return None
        if entry_count is None and not self._may_begin_l1(offset, cluster_bytes):
            return None
        table = self._l1_bytes(offset, cluster_bytes, entry_count, GAP_BYTES)
        found = self._as_l1(table, offset, cluster_bytes)
        if found is None and entry_count is None and len(table) > cluster_bytes:
            # Behind a gap another table may begin.
            table = self._l1_bytes(offset, cluster_bytes, entry_count, 0)
            found = self._as_l1(table, offset, cluster_bytes)
        return found

    def _as_l1(self, table: bytes, offset: int, cluster_bytes: int) -> FoundL1 | None:
        named = self._take_words(table)
        good = [(index, found) for index, word in named if (found := self._l2_offset(word, cluster_bytes))]
        if not good or len(good) < RIGHT * len(named) or len({found for _, found in good}) < len(good):
            return None
        sampled = good[:: max(1, len(good) // EMPTY_TABLES)]
        right = empty = tried = 0
        for tried, (_, place) in enumerate(sampled, 1):
            is_right = self._is_l2_of_any_kind(place, cluster_bytes)
            right += is_right
            empty += not is_right and _native.is_zero(self._pread(cluster_bytes, place))
            if right == SAMPLED_TABLES or (tried == HOPELESS and not right + empty):
                break
        if right + empty < RIGHT * tried:
            return None
        newest = max(found for _, found in good)
        # Tables that are all zeros speak neither for it nor against it, unless all are.
        return FoundL1(offset, named[-1][0] + 1, len(good), max(1, tried - empty), right, newest)

    def _may_begin_l1(self, offset: int, cluster_bytes: int) -> bool:
        """Return False if what a cluster names first is no L2 table, and was none."""
        places = [
            self._l2_offset(word, cluster_bytes)
            for _, word in islice(entries.nonzero_entries(self._pread(cluster_bytes, offset)), HOPELESS)
        ]
        return any(places) and any(
            self._is_l2_of_any_kind(place, cluster_bytes)
            or _native.is_zero(self._pread(cluster_bytes, place))
            for place in places
            if place
        )

    def _l1_bytes(self, offset: int, cluster_bytes: int, entry_count: int | None, gap_bytes: int) -> bytes:
        if entry_count is not None:
            return self._pread(min(table_bytes(entry_count), layout.MAX_L1_BYTES), offset)
        table = pending = b""
        while len(table) + len(pending) < layout.MAX_L1_BYTES and not self._is_tired:
            part = self._pread(cluster_bytes, offset + len(table) + len(pending))
            if not self._looks_like_table(part):
                break
            places = [self._l2_offset(word, cluster_bytes) for _, word in self._take_words(part)]
            if not all(places) or not (places or table):
                break
            # An L2 table may lie behind it, and what names nothing, or zeros alone, is a part if one follows.
            sampled = places[:: max(1, len(places) // HOPELESS)]
            names = self._name_l2(sampled, cluster_bytes) if table else True
            if names:
                table, pending = table + pending + part, b""
            elif names is None and len(pending) + cluster_bytes <= gap_bytes:
                pending += part
            else:
                break
        return table

    def _l2_offset(self, word: int, cluster_bytes: int) -> int:
        """Return what an L1 entry names, 0 if it is none that an image can have."""
        offset, _, has_reserved = entries.split_l1(word)
        if has_reserved or offset % cluster_bytes or offset >= self._source.size():
            return 0
        return offset

    def find_l1(self, cluster_bits: int) -> list[FoundL1]:
        """Return the L1 tables of the file, those that name most first."""
        found: list[FoundL1] = []
        end = 0
        for offset in self._candidates(cluster_bits):
            if offset < end or self._is_tired:
                continue
            table = self.l1_at(offset, cluster_bits)
            if table is not None and 2 * table.right >= table.sampled:
                found.append(table)
                # The second cluster of a long table is no table of its own.
                end = offset + table_bytes(table.entry_count)
        found.sort(key=lambda table: (not table.is_sure, -table.named, table.offset))
        return self._without_data(found[:RIVALS_MAX], cluster_bits)

    def _without_data(self, found: list[FoundL1], cluster_bits: int) -> list[FoundL1]:
        """Leave out what the tables of another one name as data: it is of an image in the image."""
        wanted = {
            entries.l1_entry(table.offset, copied=copied) for table in found for copied in (True, False)
        }
        names: dict[int, set[int]] = {}
        for table in found if len(found) > 1 else ():
            places = self._l2_places(cluster_bits, table)[:RIVAL_TABLES_MAX]
            words: set[int] = set()
            for place in places:
                words |= wanted & words_of(self._pread(1 << cluster_bits, place))
            names[table.offset] = {entries.split_l1(word)[0] for word in words}
        return [
            table
            for table in found
            if not any(
                table.offset in named and other not in names[table.offset] and other != table.offset
                for other, named in names.items()
            )
        ]

    def usual_l1(self, cluster_bits: int) -> FoundL1 | None:
        """Return an L1 table where new images have it, by its entries alone: its L2 tables may be lost."""
        offset = 3 << cluster_bits
        words = list(entries.nonzero_entries(self._pread(1 << cluster_bits, offset)))
        places = [self._l2_offset(word, 1 << cluster_bits) for _, word in words]
        if not places or min(places) <= offset or len(set(places)) < len(places):
            return None
        return FoundL1(offset, words[-1][0] + 1, len(places), 0, 0, max(places))

    def _candidates(self, cluster_bits: int, of: str = "pointers") -> list[int]:
        offsets = list(self.seen.clusters(1 << cluster_bits, of=of))
        return offsets[:: max(1, -(-len(offsets) // CANDIDATES_MAX))]

    def _looks_like_table(self, data: bytes) -> bool:
        """Return False if sectors of other things are too many for a table, a damaged one, too."""
        strange = len(_native.sector_kinds(data, self._source.size()).translate(None, _TABLE_KINDS))
        return strange <= (1 - RIGHT) * len(data) / SECTOR_BYTES

    def _take_words(self, table: bytes) -> list[tuple[int, int]]:
        """Return (index, word) of what is not zero in a table, and count the work."""
        words = list(entries.nonzero_entries(table))
        self._left -= WORD_BYTES * len(words)
        return words

    def unexplained(self, cluster_bits: int, tables: list[FoundL1]) -> set[int] | None:
        """Return the clusters that look like L2 tables, and that L1 tables name neither as such nor as data.

        None: there are too many to tell.
        """
        likely = {
            offset
            for offset in self._candidates(cluster_bits)
            if self._is_l2_of_any_kind(offset, 1 << cluster_bits)
        }
        likely -= {
            place
            for table in tables
            for place in range(table.offset, table.offset + table_bytes(table.entry_count), 1 << cluster_bits)
        }
        places = {place for table in tables for place in self._l2_places(cluster_bits, table)}
        likely -= places
        if len(places) > CANDIDATES_MAX or self._is_tired:
            return None
        wanted = {entries.l1_entry(offset, copied=copied) for offset in likely for copied in (True, False)}
        for place in places if likely else ():
            named = wanted & words_of(self._pread(1 << cluster_bits, place))
            likely -= {entries.split_l1(word)[0] for word in named}
        return likely

    def is_of_bitmap(self, offset: int, cluster_bits: int, refcount: Callable[[int], int | None]) -> bool:
        """Return if a table has no COPIED flag for clusters that have one user: an L2 table would."""
        words = self._take_words(self._pread(1 << cluster_bits, offset))
        sampled = words[:: max(1, len(words) // SAMPLED_TABLES)]
        named = [entries.split_l1(word)[:2] for _, word in sampled]
        return all(not is_copied and refcount(place) == 1 for place, is_copied in named)

    def _l2_places(self, cluster_bits: int, l1: FoundL1 | None) -> list[int]:
        if l1 is None:
            return self._candidates(cluster_bits)
        table = self._pread(table_bytes(l1.entry_count), l1.offset)
        return [entries.split_l1(word)[0] for _, word in entries.nonzero_entries(table)]


def words_of(table: bytes) -> set[int]:
    """Return the words of a table."""
    words = array("Q", table)
    if sys.byteorder == "little":
        words.byteswap()
    return set(words)


_TABLE_KINDS = bytes(
    kind for kind in range(256) if kind == _native.SECTOR_ZERO or kind & 0xC0 == _native.SECTOR_POINTERS
)
