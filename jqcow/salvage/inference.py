"""What the structures of a file say of its header's numbers: cluster size, tables, widths.

What looks like a table is believed by what it names: an L1 table names L2 tables, a refcount table blocks
that count their own cluster. Tables of an image in the image have another file's offsets, and name neither.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from jqcow import _native
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import entries, layout, snapshots
from jqcow.ondisk.compression import COMPRESSION_ZLIB, COMPRESSION_ZSTD
from jqcow.ondisk.header import Header
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, EXTENDED_RESERVED, L2_RESERVED, FoundEntry, codec_of
from jqcow.ondisk.layout import SECTOR_BYTES, Geometry, table_bytes
from jqcow.ondisk.snapshots import TableEntry
from jqcow.salvage.source import Source
from jqcow.salvage.streams import stream_length
from jqcow.salvage.sweep import Sweep, sweep

CLUSTER_BITS = range(layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS + 1)
SAMPLED_TABLES = 16
"""So many tables that an L1 table names tell whether it is one."""
WORK_FACTOR, WORK_BYTES = 16, 1 << 27
"""So often a file is read in all, and so much more, in blocks of 4 KiB: a hostile one could ask for any."""
WORD_BYTES = 1 << 10
"""A word of a table costs as much work as so many bytes."""
SAMPLED_BYTES = 16 << 20
"""So much is read to try a cluster size."""
RIVALS_MAX = 64
RIVAL_TABLES_MAX = 256
"""So many L1 tables are compared, by so many of their L2 tables."""
HOPELESS = 3
"""If the first so many are none, it is none."""
RIGHT = 0.8
"""Of what a table names so much has to be what it should."""
SURE_WEIGHT = 2
"""What a cluster size names that an L1 or refcount table speaks for counts so often."""
CANDIDATES_MAX = 1 << 14
ORDERS = (4, 3, 5, 6, 0, 1, 2)
"""Widths of refcounts, the most frequent first."""

_UNALLOCATED, _ZERO, _DATA, _COMPRESSED, _INVALID = range(5)


@dataclass(frozen=True)
class FoundL1:
    """What may be an L1 table.

    Attributes:
        offset: in the file, in bytes.
        entry_count: up to the last entry in use.
        named: how many entries name something.
        sampled: how many of these were looked at.
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


@dataclass(frozen=True)
class FoundRefcounts:
    """A refcount table: its host offset and length in clusters, and the width of refcounts it leads to."""

    offset: int
    clusters: int
    order: int


class Structures:
    """Looks for the structures of an image in a file."""

    def __init__(self, source: Source) -> None:
        """Look in ``source``."""
        self._source = source
        self._left = WORK_FACTOR * source.size() + WORK_BYTES

    def _pread(self, length: int, offset: int) -> bytes:
        """Read, and count the work that a look costs."""
        self._left -= max(length, layout.BLOCK_BYTES_MAX)
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
        reserved = EXTENDED_RESERVED if extended else L2_RESERVED
        return _native.l2_judge(table, 16 if extended else 8, cluster_bits, reserved, self._source.size())

    def is_l2(self, offset: int, cluster_bits: int, *, extended: bool) -> bool:
        """Return True if an L2 table with entries may lie at a host offset."""
        if offset % (1 << cluster_bits) or not 0 < offset < self._source.size() or self._is_tired:
            return False
        counts = self.judge(self._pread(1 << cluster_bits, offset), cluster_bits, extended=extended)
        return not counts[_INVALID] and any(counts[_ZERO:_INVALID])

    def _is_l2_of_any_kind(self, offset: int, cluster_bytes: int) -> bool:
        bits = cluster_bytes.bit_length() - 1
        if self.is_l2(offset, bits, extended=False):
            return True
        return bits >= layout.MIN_SUBCLUSTER_CLUSTER_BITS and self.is_l2(offset, bits, extended=True)

    def _name_l2(self, places: list[int], cluster_bytes: int) -> bool:
        """Return True if each place has an L2 table, or had one and is all zeros; one of them has."""
        found = [self._is_l2_of_any_kind(place, cluster_bytes) for place in places]
        empty = [_native.is_zero(self._pread(cluster_bytes, place)) for place in places]
        return any(found) and all(one or other for one, other in zip(found, empty, strict=True))

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
        table = self._l1_bytes(offset, cluster_bytes, entry_count)
        named = self._take_words(table)
        good = [(index, found) for index, word in named if (found := self._l2_offset(word, cluster_bytes))]
        if not good or len(good) < RIGHT * len(named) or len({found for _, found in good}) < len(good):
            return None
        sampled = good[:: max(1, len(good) // SAMPLED_TABLES)][:SAMPLED_TABLES]
        right = tables = 0
        for tried, (_, place) in enumerate(sampled):
            if tried == HOPELESS and not tables:
                return None
            found = self._is_l2_of_any_kind(place, cluster_bytes)
            right += found
            tables += found or _native.is_zero(self._pread(cluster_bytes, place))
        if tables < RIGHT * len(sampled):
            return None
        newest = max(found for _, found in good)
        return FoundL1(offset, named[-1][0] + 1, len(good), len(sampled), right, newest)

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

    def _l1_bytes(self, offset: int, cluster_bytes: int, entry_count: int | None) -> bytes:
        if entry_count is not None:
            return self._pread(min(table_bytes(entry_count), layout.MAX_L1_BYTES), offset)
        table = b""
        while len(table) < layout.MAX_L1_BYTES and not self._is_tired:
            part = self._pread(cluster_bytes, offset + len(table))
            words = self._take_words(part) if self._looks_like_table(part) else []
            places = [self._l2_offset(word, cluster_bytes) for _, word in words]
            if not places or not all(places):
                break
            # An L2 table may lie behind it.
            if table and not self._name_l2(places[:HOPELESS], cluster_bytes):
                break
            table += part
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
                words |= wanted & _words(self._pread(1 << cluster_bits, place))
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

    # Refcounts

    def refcounts_at(
        self, offset: int, cluster_bits: int, clusters: int = 1, orders: Sequence[int] = ORDERS
    ) -> FoundRefcounts | None:
        """Return the refcount table at a host offset, if its blocks count what they must.

        Args:
            offset: of the table.
            cluster_bits: of the image.
            clusters: length of the table.
            orders: widths of refcounts to try.
        """
        cluster_bytes = 1 << cluster_bits
        if offset % cluster_bytes or not 0 < offset < self._source.size() or self._is_tired:
            return None
        clusters = max(1, min(clusters, layout.MAX_REFCOUNT_TABLE_BYTES // cluster_bytes + 1))
        blocks = self._blocks(self._pread(clusters * cluster_bytes, offset), cluster_bytes)
        if not blocks or len(set(blocks.values())) < len(blocks):
            return None
        for order in orders:
            if self._counts(offset, blocks, Geometry(cluster_bits, order)):
                return FoundRefcounts(offset, clusters, order)
        return None

    def _looks_like_table(self, data: bytes) -> bool:
        """Return False if sectors of other things are too many for a table, a damaged one, too."""
        strange = len(_native.sector_kinds(data, self._source.size()).translate(None, _TABLE_KINDS))
        return strange <= (1 - RIGHT) * len(data) / SECTOR_BYTES

    def _take_words(self, table: bytes) -> list[tuple[int, int]]:
        """Return (index, word) of what is not zero in a table, and count the work."""
        words = list(entries.nonzero_entries(table))
        self._left -= WORD_BYTES * len(words)
        return words

    def _blocks(self, table: bytes, cluster_bytes: int) -> dict[int, int]:
        """Return the offset of each refcount block, by its index; {} if most entries cannot be."""
        if not self._looks_like_table(table):
            return {}
        named = self._take_words(table)
        found = {}
        for index, word in named:
            block, has_reserved = entries.split_refcount_table(word)
            if not has_reserved and not block % cluster_bytes and block < self._source.size():
                found[index] = block
        return found if len(found) >= RIGHT * len(named) else {}

    def _counts(self, table: int, blocks: dict[int, int], geometry: Geometry) -> bool:
        """Return if refcount blocks count the header, the table, themselves, and nothing past the end."""
        per_block = geometry.refcounts_per_cluster
        cluster_count = geometry.clusters(self._source.size())
        read: dict[int, bytes] = {}
        right = wrong = 0
        used = [0, *(block >> geometry.cluster_bits for block in list(blocks.values())[:SAMPLED_TABLES])]
        for cluster in [table >> geometry.cluster_bits, *used]:
            place = blocks.get(cluster // per_block)
            if place is None:
                wrong += 1
                continue
            if place not in read:
                read[place] = self._pread(geometry.cluster_bytes, place)
            count = _native.refcount_get(read[place], cluster % per_block, geometry.refcount_order)
            right += count == 1
            wrong += count != 1
        last = blocks.get((cluster_count - 1) // per_block)
        if last is None:
            wrong += 1
        elif cluster_count % per_block:
            block = read.get(last) or self._pread(geometry.cluster_bytes, last)
            order = geometry.refcount_order
            past = _native.refcount_find_used(block, order, cluster_count % per_block, per_block)
            if past >= 0 and table != geometry.cluster_bytes:
                return False
            wrong += past >= 0
        is_usual = table == geometry.cluster_bytes and right >= len(used) + 1
        return right >= 2 and (right >= RIGHT * (right + wrong) or (is_usual and wrong == 1))

    def find_refcounts(self, cluster_bits: int) -> FoundRefcounts | None:
        """Return the refcount table; where new images have it, or else where something looks like one."""
        found = self.refcounts_at(1 << cluster_bits, cluster_bits)
        if found is None:
            for offset in self._candidates(cluster_bits):
                found = self.refcounts_at(offset, cluster_bits)
                if found is not None:
                    break
        return found and self._whole_table(found, cluster_bits)

    def _whole_table(self, found: FoundRefcounts, cluster_bits: int) -> FoundRefcounts:
        """Return a refcount table with as many clusters as the file needs."""
        geometry = Geometry(cluster_bits, found.order)
        blocks = -(-geometry.clusters(self._source.size()) // geometry.refcounts_per_cluster)
        clusters = max(1, geometry.clusters(table_bytes(blocks)))
        return FoundRefcounts(found.offset, clusters, found.order)

    # The cluster size

    def find_cluster_bits(self) -> tuple[int | None, bool]:
        """Return the cluster size as a power of two, None where nothing tells; and whether it is sure."""
        for bits in CLUSTER_BITS:
            if self.refcounts_at(1 << bits, bits) is not None:
                return bits, True
        best: tuple[int, int, bool] | None = None
        data_bytes = sum(length for _, length in self._source.data_extents(0, self._source.size()))
        for bits in CLUSTER_BITS:
            l1 = self.find_l1(bits)
            has_l1, has_refcounts = bool(l1 and l1[0].is_sure), self.find_refcounts(bits) is not None
            named = self._named_bytes(bits, has_witness=has_l1 or has_refcounts)
            # The L1 table of an image in the image may name tables by chance, but not most of the file.
            is_sure = has_refcounts or (has_l1 and 2 * named >= data_bytes)
            weight = SURE_WEIGHT if has_l1 or has_refcounts else 1
            best = max(best or (0, 0, False), (named * weight, bits, is_sure))
        if best is not None and best[0] and best[2]:
            return best[1], True
        usual = self._bits_of_usual_l1()
        if best is None or not best[0] or (usual is not None and best[0] < data_bytes // 8):
            return usual, False
        return best[1], False

    def _bits_of_usual_l1(self) -> int | None:
        """Return the cluster size by an L1 table where new images have it, whose L2 tables are gone."""
        for bits in CLUSTER_BITS:
            starts_there = any(run.offset == 3 << bits for run in self.seen.pointers[:SAMPLED_TABLES])
            if starts_there and self.usual_l1(bits) is not None:
                return bits
        return None

    def _named_bytes(self, cluster_bits: int, *, has_witness: bool) -> int:
        """Return how much of the file the tables of a cluster size name."""
        offsets = list(self.seen.clusters(1 << cluster_bits))
        sampled = max(4, SAMPLED_BYTES >> cluster_bits)
        step = max(1, -(-len(offsets) // sampled))
        named: dict[int, int] = {}
        own: set[int] = set()
        for offset in offsets[::step]:
            if not offset or self._is_tired:
                continue
            table = self._pread(1 << cluster_bits, offset)
            is_extended = bool(self.judge(table, cluster_bits, extended=False)[_INVALID])
            if is_extended and (
                cluster_bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS
                or self.judge(table, cluster_bits, extended=True)[_INVALID]
            ):
                continue
            codec = codec_of(Geometry(cluster_bits, has_subclusters=is_extended))
            entries_found = [found for found in codec.found(table) if found.host]
            packed = [found for found in entries_found if found.kind == COMPRESSED_CLUSTER]
            if packed and not any(self._unpacks(found, cluster_bits) for found in packed[:HOPELESS]):
                continue
            own.add(offset)
            for found in entries_found:
                named[found.host] = found.length or 1 << cluster_bits
        lengths = [length for host, length in named.items() if host not in own]
        if len(lengths) < SAMPLED_TABLES and not has_witness:
            # Two entries are aligned by chance.
            lengths = [min(length, layout.BLOCK_BYTES_MAX) for length in lengths]
        return step * sum(lengths)

    # Snapshots

    def snapshots_at(self, offset: int, count: int, header: Header) -> list[TableEntry]:
        """Return the entries of a snapshot table, at most ``count``, as far as they can be."""
        found: list[TableEntry] = []
        try:
            for entry in snapshots.read_entries(self._source.pread, offset, count, header=header):
                entry.validate(header)
                snapshot = entry.snapshot
                is_inside = 0 < snapshot.l1_table_offset < self._source.size() and snapshot.l1_size
                if not is_inside or not snapshot.id or entry.offset >= self._source.size():
                    break
                found.append(entry)
        except (FormatError, CorruptionError):
            pass
        return found

    def find_snapshots(self, header: Header) -> tuple[int, list[TableEntry]]:
        """Return where the snapshot table seems to be, and its entries; the longest of those that fit."""
        best: tuple[int, list[TableEntry]] = (0, [])
        end = 0
        cluster_bytes = 1 << header.cluster_bits
        for offset in [place for place in self.seen.snapshots if place % cluster_bytes == 0][:CANDIDATES_MAX]:
            if self._is_tired or offset < end:
                continue
            found = self.snapshots_at(offset, snapshots.MAX_SNAPSHOTS, header)
            end = found[-1].offset + found[-1].length if found else 0
            l1 = [self.l1_at(entry.snapshot.l1_table_offset, header.cluster_bits) for entry in found[:8]]
            if offset and len(found) > len(best[1]) and any(table is not None for table in l1):
                best = offset, found
        return best

    # Kinds of entries

    def first_table_fits(self, l1: FoundL1, cluster_bits: int, *, extended: bool) -> bool:
        """Return False if the first L2 table that has entries has none of this kind, but of the other."""
        for place in self._l2_places(cluster_bits, l1)[:SAMPLED_TABLES]:
            table = self._pread(1 << cluster_bits, place)
            if not _native.is_zero(table):
                fits = not self.judge(table, cluster_bits, extended=extended)[_INVALID]
                return fits or bool(self.judge(table, cluster_bits, extended=not extended)[_INVALID])
        return True

    def mapped_bytes(self, l1: FoundL1, geometry: Geometry) -> int:
        """Return where the last guest cluster ends that the tables of an L1 table map."""
        table = self._pread(table_bytes(l1.entry_count), l1.offset)
        last = entries.last_present(table)
        if last < 0:
            return 0
        l2_table = self._pread(geometry.cluster_bytes, entries.split_l1(entries.entry_at(table, last))[0])
        position = max((found.position for found in codec_of(geometry).found(l2_table)), default=0)
        return (last * geometry.l2_entries + position + 1) * geometry.cluster_bytes

    def compression_type(self, cluster_bits: int, l1: FoundL1 | None) -> int | None:
        """Return the type of the compressed clusters that L2 tables name; None where there are none."""
        places = self._l2_places(cluster_bits, l1)
        votes = [0, 0]
        codec = codec_of(Geometry(cluster_bits))
        for place in places[:: max(1, len(places) // SAMPLED_TABLES)][: 4 * SAMPLED_TABLES]:
            table = self._pread(1 << cluster_bits, place)
            packed = (found for found in codec.found(table) if found.kind == COMPRESSED_CLUSTER)
            for found in islice(packed, SAMPLED_TABLES):
                for kind in self._unpacks(found, cluster_bits):
                    votes[kind] += 1
        return votes.index(max(votes)) if any(votes) else None

    def _unpacks(self, found: FoundEntry, cluster_bits: int) -> list[int]:
        """Return the compression types by which the data that an entry names gives a cluster."""
        stored = memoryview(self._pread(min(found.length, 2 << cluster_bits), found.host))
        kinds = (COMPRESSION_ZLIB, COMPRESSION_ZSTD)
        return [kind for kind in kinds if stream_length(stored, 1 << cluster_bits, kind)]

    def _l2_places(self, cluster_bits: int, l1: FoundL1 | None) -> list[int]:
        if l1 is None:
            return self._candidates(cluster_bits)
        table = self._pread(table_bytes(l1.entry_count), l1.offset)
        return [entries.split_l1(word)[0] for _, word in entries.nonzero_entries(table)]

    def has_subclusters(self, cluster_bits: int, l1: FoundL1 | None) -> bool:
        """Return True if L2 tables have extended entries: those of an L1 table, or all that are seen."""
        if cluster_bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS:
            return False
        places = self._l2_places(cluster_bits, l1)
        votes = [0, 0]
        for place in places[:: max(1, len(places) // SAMPLED_TABLES)][: 4 * SAMPLED_TABLES]:
            table = self._pread(1 << cluster_bits, place)
            fits = [
                not self.judge(table, cluster_bits, extended=extended)[_INVALID] for extended in (False, True)
            ]
            if fits[0] != fits[1]:
                votes[fits[1]] += 1
            elif fits[0] and _native.sector_kinds(table, self._source.size()).translate(None, _NO_PAIRS):
                votes[1] += 1
        return votes[1] > votes[0]


def _words(table: bytes) -> set[int]:
    """Return the words of a table."""
    words = array("Q", table)
    if sys.byteorder == "little":
        words.byteswap()
    return set(words)


_TABLE_KINDS = bytes(
    kind for kind in range(256) if kind == _native.SECTOR_ZERO or kind & 0xC0 == _native.SECTOR_POINTERS
)
_NO_PAIRS = bytes(kind for kind in range(256) if kind & 0xC0 != _native.SECTOR_PAIRS)
