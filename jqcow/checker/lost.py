"""Leaked clusters that look like lost data: their refcount and content say that somebody needed them.

A leak is harmless where nothing can miss it. Where the tables have a hole that such a cluster may have been
mapped in, freeing it may destroy the only copy. There is a hole where

- an L2 table that an L1 table names is all zeros, or
- an L1 table is all zeros, or has an entry of 0 before one that is not, or
- a leaked cluster is itself an L2 table: all that it maps is leaked, too.

Then every leaked cluster without any reference, and with content that is not all zeros, counts as lost. A
guest that discards leaves holes like that, and a crash of another program leaks beside them: it is a
question, and only people can answer it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from jqcow import _native
from jqcow.ondisk.entries import COMPRESSED_CLUSTER, StandardL2

MAX_READ = 1 << 16
"""So many leaked clusters are read; where there is a hole all further ones count as lost. It bounds time."""


@dataclass
class LostData:
    """Which leaked clusters of an image look like lost data.

    Attributes:
        is_leaked: tells whether a cluster has a refcount and no reference.
        read: returns a whole host cluster of an index.
        codec: of the image's L2 tables.
        cluster_bits: of the image.
        has_holes: a table in use has a hole.
    """

    is_leaked: Callable[[int], bool]
    read: Callable[[int], bytes]
    codec: StandardL2
    cluster_bits: int
    has_holes: bool
    _read_count: int = 0

    def look_for_tables(self, leaked: Iterable[int]) -> None:
        """Note a hole if one of the leaked clusters is an L2 table."""
        if not self.has_holes:
            self.has_holes = any(self.is_table(self.read(at)) for at in islice(leaked, MAX_READ))

    def is_lost(self, cluster: int) -> bool:
        """Return True if a leaked cluster looks like lost data."""
        if not self.has_holes:
            return False
        self._read_count += 1
        return self._read_count > MAX_READ or not _native.is_zero(self.read(cluster))

    def is_table(self, data: bytes) -> bool:
        """Return True if a cluster's bytes are an L2 table that maps leaked clusters, and nothing else."""
        maps_any, bits = False, self.cluster_bits
        for _, _, kind, host, _, length, has_reserved in self.codec.found(data):
            last = host + (length if kind == COMPRESSED_CLUSTER else bool(host)) - 1
            if kind != COMPRESSED_CLUSTER and (has_reserved or host % (1 << bits)):
                return False
            hosts = range(host >> bits, (last >> bits) + 1)
            if not all(map(self.is_leaked, hosts)):
                return False
            maps_any |= bool(hosts)
        return maps_any


def has_hole(present: Iterable[int]) -> bool:
    """Return True if an L1 table with these entries, in their order, has a hole before the last of them."""
    following = 0
    for index in present:
        if index != following:
            return True
        following = index + 1
    return not following
