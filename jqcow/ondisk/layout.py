"""Geometry of an image: the numbers that follow from its cluster size.

From the qcow2 specification: a cluster is the unit of allocation; an L2 table fills one cluster with
entries of 8 or 16 bytes; a refcount block fills one cluster with refcounts of ``1 << refcount_order`` bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import NewType

GuestOffset = NewType("GuestOffset", int)
"""An offset in the guest's disk, in bytes."""

HostOffset = NewType("HostOffset", int)
"""An offset in the image file, in bytes."""

ClusterIndex = NewType("ClusterIndex", int)
"""A host cluster: its host offset divided by the cluster size."""

GuestCluster = NewType("GuestCluster", int)
"""A guest cluster: its guest offset divided by the cluster size."""

SECTOR_BYTES = 512
"""The unit that a device writes whole: sector 0 is one such write (fault model)."""

BLOCK_BYTES_MAX = 4096
"""Metadata is logged in whole blocks of this size, or of the cluster size where that is smaller."""

ENTRY_BYTES = 8
"""An L1, L2 or refcount table entry."""

SUBCLUSTERS = 32
"""So many a cluster has where L2 entries are extended (qcow2 specification, "Extended L2 Entries")."""

MIN_SUBCLUSTER_CLUSTER_BITS = 14
"""Then a cluster has at least 16 KiB."""

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_HOST_OFFSET = 1 << 56
"""Host offsets end at bit 55 (qcow2 specification, L2 table entry)."""

DATA_FILE = 1 << 56
"""Added to the offsets in an external data file: so they are told from those in the image, and none is 0."""

MAX_L1_BYTES = 32 << 20
MAX_L1_ENTRIES = MAX_L1_BYTES // ENTRY_BYTES
MAX_REFCOUNT_ORDER = 6
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
"""The largest tables that QEMU opens; jqcow keeps to the same limits (they also bound memory)."""


def round_up(value: int, unit: int) -> int:
    """Return the smallest multiple of ``unit`` that is at least ``value``."""
    return -(-value // unit) * unit


def entry_place(table: HostOffset, index: int) -> HostOffset:
    """Return the host offset of an entry of the L1 table or the refcount table at ``table``."""
    return HostOffset(table + index * ENTRY_BYTES)


def table_bytes(entry_count: int) -> int:
    """Return the bytes that ``entry_count`` entries of an L1 or refcount table take."""
    return entry_count * ENTRY_BYTES


def table_entries(length_bytes: int) -> int:
    """Return how many whole entries of an L1 or refcount table ``length_bytes`` hold."""
    return length_bytes // ENTRY_BYTES


@dataclass(frozen=True)
class Geometry:
    """Sizes and shifts derived from the header.

    ``has_subclusters``: L2 entries are extended ones of 16 bytes, else standard ones of 8. ``has_zero_flag``:
    they can say that a cluster reads as zeros; those of version 2 cannot. ``has_data_file``: the guest's data
    lies in an external data file, at host offsets from `DATA_FILE` on.
    """

    cluster_bits: int
    refcount_order: int = 4
    has_subclusters: bool = False
    has_zero_flag: bool = True
    has_data_file: bool = False

    @cached_property
    def cluster_bytes(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @cached_property
    def block_bytes(self) -> int:
        """Bytes in a metadata block, the unit of logging."""
        return min(BLOCK_BYTES_MAX, self.cluster_bytes)

    @cached_property
    def l2_entries(self) -> int:
        """Entries in an L2 table, which fills one cluster."""
        return self.cluster_bytes // (2 * ENTRY_BYTES if self.has_subclusters else ENTRY_BYTES)

    @cached_property
    def entries_per_block(self) -> int:
        """8-byte entries of the L1 table or the refcount table in one metadata block."""
        return self.block_bytes // ENTRY_BYTES

    @cached_property
    def refcounts_per_cluster(self) -> int:
        """Refcounts in a refcount block (which fills one cluster)."""
        return (self.cluster_bytes * 8) >> self.refcount_order

    @cached_property
    def refcounts_per_block(self) -> int:
        """Refcounts in one metadata block."""
        return (self.block_bytes * 8) >> self.refcount_order

    def offset_of(self, cluster: ClusterIndex) -> HostOffset:
        """Return the host offset of a host cluster."""
        return HostOffset(cluster * self.cluster_bytes)

    def cluster_of(self, offset: HostOffset) -> ClusterIndex:
        """Return the host cluster that a host offset falls into."""
        return ClusterIndex(offset // self.cluster_bytes)

    def clusters(self, length_bytes: int) -> int:
        """Return how many clusters hold ``length_bytes``."""
        return -(-length_bytes // self.cluster_bytes)

    def l1_entries_for(self, disk_bytes: int) -> int:
        """Return how many L1 entries a disk of ``disk_bytes`` needs."""
        return -(-disk_bytes // (self.cluster_bytes * self.l2_entries))


def disk_size(size: int) -> int:
    """Return a size that a disk can have, in bytes.

    Raises:
        TypeError: not a whole number.
        ValueError: not a whole number of sectors.
    """
    size = index(size)
    if size < 0 or size % SECTOR_BYTES:
        raise ValueError(f"the size of a disk is a multiple of 512 bytes, not {size}")
    return size
