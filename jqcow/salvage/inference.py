"""What the structures of a file say of its header's numbers: cluster size, tables, widths.

What looks like a table is believed by what it names: an L1 table names L2 tables, a refcount table blocks
that count their own cluster. Tables of an image in the image have another file's offsets, and name neither.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from jqcow import _native
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import entries, layout, luks, snapshots
from jqcow.ondisk.compression import COMPRESSION_ZLIB, COMPRESSION_ZSTD
from jqcow.ondisk.header import Header
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, FoundEntry, codec_of, reserved_bits
from jqcow.ondisk.layout import Geometry, HostOffset, table_bytes
from jqcow.ondisk.snapshots import TableEntry
from jqcow.salvage.lookalikes import (
    CANDIDATES_MAX,
    HOPELESS,
    INVALID,
    RIGHT,
    SAMPLED_TABLES,
    FoundL1,
    Lookalikes,
    words_of,
)
from jqcow.salvage.streams import stream_length
from jqcow.salvage.tables import COMPRESSED, DATA, LONGEST_BYTES

CLUSTER_BITS = range(layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS + 1)
SAMPLED_BYTES = 16 << 20
"""So much is read to try a cluster size."""
FEW = 0.125
"""Tables that name less of a file tell less than an L1 table in its usual place."""
CHANCE = 1 / 256
"""Short tables that name less of a file are tables by chance."""
LONG_TABLE_BITS = 12
"""A table of so large a cluster is not short."""
ENCRYPTION_WITHIN = 64 << 20
"""So far from its start a file has the header of its encryption: it comes with the first structures."""
SURE_WEIGHT = 2
"""What a cluster size names that an L1 or refcount table speaks for counts so often."""
ORDERS = (4, 3, 5, 6, 0, 1, 2)
"""Widths of refcounts, the most frequent first."""
NARROW_ORDER_MAX = 2
"""Up to this width the bits of anything may be refcounts, so they must count what holds data."""
TRIED_CLUSTERS = 4096
"""So many are looked at for that."""


@dataclass(frozen=True)
class FoundRefcounts:
    """A refcount table: its host offset and length in clusters, and the width of refcounts it leads to."""

    offset: int
    clusters: int
    order: int


class Structures(Lookalikes):
    """Looks for the structures of an image in a file."""

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
        is_narrow = geometry.refcount_order <= NARROW_ORDER_MAX
        is_usual = table == geometry.cluster_bytes and not is_narrow
        if last is None:
            wrong += 1
        elif cluster_count % per_block:
            block = read.get(last) or self._pread(geometry.cluster_bytes, last)
            order = geometry.refcount_order
            past = _native.refcount_find_used(block, order, cluster_count % per_block, per_block)
            if past >= 0 and not is_usual:
                return False
            wrong += past >= 0
        is_likely = right >= RIGHT * (right + wrong) or (is_usual and right > len(used) and wrong == 1)
        return right >= 2 and is_likely and (not is_narrow or self._counts_data(blocks, geometry))

    def _counts_data(self, blocks: dict[int, int], geometry: Geometry) -> bool:
        """Return if the first refcount block counts what holds data in its part of the file."""
        if 0 not in blocks:
            return False
        block = self._pread(geometry.cluster_bytes, blocks[0])
        order, counted, total = geometry.refcount_order, 0, 0
        tried = min(TRIED_CLUSTERS, geometry.refcounts_per_cluster)
        own_bytes = min(self._source.size(), tried * geometry.cluster_bytes)
        for start, length in self._source.data_extents(0, own_bytes):
            stop = geometry.clusters(start + length)
            cluster = start >> geometry.cluster_bits
            while cluster < stop:
                value, count = _native.refcount_run(block, order, cluster, stop)
                counted, total, cluster = counted + count * bool(value), total + count, cluster + count
        return counted >= RIGHT * total

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

    def find_cluster_bits(self, *, by_chance: bool = False) -> tuple[int | None, bool]:
        """Return the cluster size as a power of two, None where nothing tells; and whether it is sure.

        ``by_chance``: tables that name nearly nothing of the file tell, too.
        """
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
        # A table of 64 entries may be one by chance, one of 512 is not.
        is_long = best is not None and best[1] >= LONG_TABLE_BITS
        least = FEW if usual is not None else 0 if by_chance or is_long else CHANCE
        if best is None or not best[0] or best[0] < least * data_bytes:
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
            is_extended = bool(self.judge(table, cluster_bits, extended=False)[INVALID])
            if is_extended and (
                cluster_bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS
                or self.judge(table, cluster_bits, extended=True)[INVALID]
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

    # Encryption

    def find_encryption(self, cluster_bits: int, l1: FoundL1 | None) -> luks.Pointer | None:
        """Return where a LUKS header lies that is the image's: no L2 table names it, and there are such.

        One that a table names is the guest's; without any table nothing tells whose it is.
        """
        places = self._l2_places(cluster_bits, l1)
        for offset in range(0, min(self._source.size(), ENCRYPTION_WITHIN), 1 << cluster_bits):
            start = self._pread(luks.HEADER_BYTES, offset)
            if not places or not start.startswith(luks.MAGIC):
                continue
            with suppress(FormatError, UnsupportedFeatureError, CorruptionError):
                header = luks.LuksHeader.unpack(start)
                length = header.payload_sector * layout.SECTOR_BYTES
                header.validate(length)
                names = (entries.l1_entry(offset, copied=copied) for copied in (True, False))
                if length <= luks.HEADER_BYTES_MAX and not self._is_named(set(names), cluster_bits, places):
                    return luks.Pointer(HostOffset(offset), length)
        return None

    def _is_named(self, words: set[int], cluster_bits: int, places: list[int]) -> bool:
        tables = (self._pread(1 << cluster_bits, place) for place in places[:CANDIDATES_MAX])
        return any(not words.isdisjoint(words_of(table)) for table in tables)

    # Kinds of entries

    def first_table_fits(self, l1: FoundL1, cluster_bits: int, *, extended: bool) -> bool:
        """Return False if the first L2 table that tells of which kind its entries are has the other kind."""
        for place in self._l2_places(cluster_bits, l1)[:SAMPLED_TABLES]:
            kind = self._has_pairs(self._pread(1 << cluster_bits, place), cluster_bits)
            if kind is not None:
                return kind == extended
        return True

    def _has_pairs(self, table: bytes, cluster_bits: int) -> bool | None:
        """Return if the entries of a table are extended: every other word is a bitmap; None: nothing tells.

        More of these words could be entries that name something, or could be none. A few that cannot be, of a
        table that noise hit or of a file that was cut off, change nothing.
        """
        second = array("Q", table)[1::2].tobytes()
        reserved = reserved_bits(Geometry(cluster_bits))
        counts = _native.l2_judge(second, layout.table_bytes(1), cluster_bits, reserved, LONGEST_BYTES)
        named, strange = counts[DATA] + counts[COMPRESSED], counts[INVALID]
        return None if named == strange else strange > named

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

    def has_subclusters(self, cluster_bits: int, l1: FoundL1 | None) -> bool:
        """Return True if L2 tables have extended entries: those of an L1 table, or all that are seen."""
        if cluster_bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS:
            return False
        places = self._l2_places(cluster_bits, l1)
        votes = [0, 0]
        for place in places[:: max(1, len(places) // SAMPLED_TABLES)][: 4 * SAMPLED_TABLES]:
            table = self._pread(1 << cluster_bits, place)
            kind = self._has_pairs(table, cluster_bits)
            if kind is not None and (l1 is not None or self._is_l2_of_any_kind(place, 1 << cluster_bits)):
                votes[kind] += 1
        return votes[1] > votes[0]
