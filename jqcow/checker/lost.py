"""Leaked clusters that look like lost data: their refcount and content say that somebody needed them.

A leak is harmless where nothing can miss it. Where the tables have a hole that such a cluster may have been
mapped in, freeing it may destroy the only copy. There is a hole where

- an L2 table that an L1 table names is all zeros, or
- an L1 table is all zeros, or has an entry of 0 before one that is not, or
- a leaked cluster is itself an L2 table: what it maps is leaked, too, save for what snapshots share, or
- a sector of an L2 table is all zeros, and MANY leaked clusters hold data: few of them are what a crash of
  another program leaves beside such sectors, which most images have.

Then every leaked cluster without any reference, and with content that is not all zeros, counts as lost. So do
zeros that a leaked L2 table maps: used again, they would be other data there. A guest that discards leaves
holes like that, and a crash of another program leaks beside them: it is a question, and only people can
answer it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from jqcow import _native
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, L2Codec
from jqcow.ondisk.layout import DATA_FILE, SECTOR_BYTES

MAX_READ = 1 << 16
"""So many leaked clusters are read; where there is a hole all further ones count as lost. It bounds time."""

MAX_ENTRIES = 1 << 21
"""So many entries of what may be leaked tables are read, then all count as lost. It bounds time and space."""

MANY = 32
"""Half of what a sector of an L2 table maps."""
MANY_BYTES = 16 << 20
"""Of large clusters fewer are many."""


class Holes:
    """Where lost data may have been mapped, as a walk of all tables in use meets it.

    Attributes:
        tables: a whole L2 table, or the entry of one, is zeros.
        sectors: a sector of an L2 table is.
    """

    def __init__(self, used_bytes: int) -> None:
        """Begin with none. No L2 table maps anything behind its first ``used_bytes``."""
        self.tables = False
        self.sectors = False
        self._used_bytes = used_bytes

    def see_l1_table(self, present: Iterable[int]) -> None:
        """Take an L1 table, which has these entries, in their order."""
        following = 0
        for index in present:
            self.tables |= index != following
            following = index + 1
        self.tables |= not following

    def see_l2_table(self, data: bytes) -> None:
        """Take an L2 table."""
        if _native.is_zero(data):
            self.tables = True
        elif not self.sectors:
            count = -(-min(len(data), self._used_bytes) // SECTOR_BYTES)
            if count:
                first_is_zero, length = _native.zero_run(data, 0, count, SECTOR_BYTES)
                self.sectors = first_is_zero or length < count


@dataclass
class LostData:
    """Which leaked clusters of an image look like lost data.

    Attributes:
        is_leaked: tells whether a cluster has a refcount and no reference.
        is_counted: tells whether a cluster has a refcount.
        read: returns a whole host cluster of an index.
        codec: of the image's L2 tables.
        cluster_bits: of the image.
        holes: of the tables in use.
    """

    is_leaked: Callable[[int], bool]
    is_counted: Callable[[int], bool]
    read: Callable[[int], bytes]
    codec: L2Codec
    cluster_bits: int
    holes: Holes
    _harmless: set[int] = field(default_factory=set)
    _entry_count: int = 0

    def look_at(self, leaked: Iterable[int]) -> None:
        """Read the leaked clusters, for holes that only they tell of; before `is_lost` is asked."""
        with_data, many = 0, min(MANY, MANY_BYTES >> self.cluster_bits)
        mapped: set[int] = set()
        for cluster in islice(leaked, MAX_READ):
            data = self.read(cluster)
            if _native.is_zero(data):
                self._harmless.add(cluster)
                continue
            with_data += 1
            leaked_there = self.mapped_by(data)
            self.holes.tables |= leaked_there is not None or (self.holes.sectors and with_data == many)
            if leaked_there:
                mapped |= leaked_there
            if self._entry_count > MAX_ENTRIES:
                self.holes.tables = True
                self._harmless.clear()
                return
        self._harmless -= mapped

    def is_lost(self, cluster: int) -> bool:
        """Return True if a leaked cluster looks like lost data."""
        return self.holes.tables and cluster not in self._harmless

    def mapped_by(self, data: bytes) -> set[int] | None:
        """Return the leaked clusters that a cluster's bytes map as an L2 table, None if they are none.

        A table maps counted clusters, and a leaked one among them. One of an image with a data file maps
        guest clusters in a row to their own places there.
        """
        if self.codec.geometry.has_data_file:
            return set() if self._is_table_of_data_file(data) else None
        leaked: set[int] = set()
        bits = self.cluster_bits
        for _, _, kind, host, _, length, has_reserved, fault in self.codec.found(data):
            self._entry_count += 1
            last = host + (length if kind == COMPRESSED_CLUSTER else bool(host)) - 1
            if kind != COMPRESSED_CLUSTER and (has_reserved or fault or host % (1 << bits)):
                return None
            hosts = range(host >> bits, (last >> bits) + 1)
            if not all(map(self.is_counted, hosts)):
                return None
            leaked.update(filter(self.is_leaked, hosts))
        return leaked or None

    def _is_table_of_data_file(self, data: bytes) -> bool:
        starts: set[int] = set()
        for position, _, kind, host, copied, _, has_reserved, fault in self.codec.found(data):
            self._entry_count += 1
            if kind == COMPRESSED_CLUSTER or has_reserved or fault or bool(host) != copied:
                return False
            if host:
                starts.add(host - DATA_FILE - (position << self.cluster_bits))
        reach = self.codec.per_table << self.cluster_bits
        return len(starts) == 1 and not any(start < 0 or start % reach for start in starts)
