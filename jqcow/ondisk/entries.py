"""Table entries: L1, L2 and refcount table (qcow2 specification, "Cluster mapping", "Refcounts").

L1 table entry::

    Bit   0 -  8:   reserved (0)
          9 - 55:   host offset of the L2 table, cluster-aligned; 0: not allocated
         56 - 62:   reserved (0)
              63:   COPIED: the refcount of the L2 table is exactly 1

L2 table entry (standard cluster)::

    Bit        0:   the cluster reads as zeros (version 3)
          1 -  8:   reserved (0)
          9 - 55:   host offset of the data, cluster-aligned; 0: not allocated
         56 - 61:   reserved (0)
              62:   0 for a standard, 1 for a compressed cluster
              63:   COPIED: the refcount of the data cluster is exactly 1

L2 table entry (compressed cluster), with x = 62 - (cluster_bits - 8)::

    Bits  0 to x-1  host offset of the first byte of the data, not aligned
          x to 61   how many 512-byte sectors the data may reach into after the one of its first byte
          62        1 for a compressed cluster
          63        0: COPIED is never set

Refcount table entry::

    Bit   0 -  8:   reserved (0)
          9 - 63:   host offset of the refcount block, cluster-aligned; 0: all refcounts it covers are 0
"""

from __future__ import annotations

import struct

from jqcow.ondisk.layout import MAX_HOST_OFFSET, SECTOR_BYTES

ENTRY = struct.Struct(">Q")

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
REFCOUNT_TABLE_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE
REFCOUNT_TABLE_RESERVED = 0x1FF


def l1_entry(l2_table_offset: int, *, copied: bool = True) -> int:
    """Return the L1 entry that points to the L2 table at ``l2_table_offset`` bytes."""
    return l2_table_offset | (COPIED if copied else 0)


def l2_entry(host_offset: int, *, copied: bool = True, zero: bool = False) -> int:
    """Return the L2 entry of a standard cluster; ``zero`` makes it read as zeros."""
    return host_offset | (COPIED if copied else 0) | (ZERO if zero else 0)


def compressed_extent(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return where the data of a compressed cluster may lie: (host offset, length in bytes).

    From the specification's descriptor of compressed clusters: the length runs to the end of the last sector
    that the data may reach into. How long the data is the descriptor does not tell.
    """
    offset_bits = _compressed_offset_bits(cluster_bits)
    descriptor = entry & (COMPRESSED - 1)
    offset = descriptor & (1 << offset_bits) - 1
    sectors = (descriptor >> offset_bits) + 1
    return offset, sectors * SECTOR_BYTES - offset % SECTOR_BYTES


def compressed_entry(host_offset: int, length_bytes: int, cluster_bits: int) -> int:
    """Return the L2 entry of a compressed cluster: the inverse of `compressed_extent`.

    Args:
        host_offset: where the compressed data starts, in bytes; it need not be aligned.
        length_bytes: length of the data. The entry rounds its end up to a whole sector.
        cluster_bits: the cluster size as a power of two.

    Raises:
        ValueError: no data, or more sectors or a higher offset than the descriptor has bits for.
    """
    offset_bits = _compressed_offset_bits(cluster_bits)
    if length_bytes < 1 or not 0 <= host_offset < min(1 << offset_bits, MAX_HOST_OFFSET):
        raise ValueError(f"{length_bytes} bytes at {host_offset:#x} are no compressed cluster")
    further_sectors = (host_offset + length_bytes - 1) // SECTOR_BYTES - host_offset // SECTOR_BYTES
    descriptor = further_sectors << offset_bits | host_offset
    if descriptor >= COMPRESSED:
        raise ValueError(f"{length_bytes} bytes at {host_offset:#x} reach into too many sectors")
    return COMPRESSED | descriptor


def _compressed_offset_bits(cluster_bits: int) -> int:
    """Return how many bits of the descriptor are the host offset; the rest counts sectors."""
    return 62 - (cluster_bits - 8)
