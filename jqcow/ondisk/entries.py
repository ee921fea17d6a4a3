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

Refcount table entry::

    Bit   0 -  8:   reserved (0)
          9 - 63:   host offset of the refcount block, cluster-aligned; 0: all refcounts it covers are 0
"""

from __future__ import annotations

import struct

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
