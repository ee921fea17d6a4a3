"""The bytes of a new, empty image: header, refcount table, refcount blocks and L1 table, in this order."""

from __future__ import annotations

from dataclasses import dataclass

from jqcow import _native
from jqcow.ondisk import layout
from jqcow.ondisk.header import CREATED_HEADER_BYTES, Header
from jqcow.ondisk.layout import ENTRY_BYTES, Geometry


@dataclass(frozen=True)
class BlankImage:
    """What to write for a new image: ``parts`` as (host offset, bytes); all else up to ``length`` is zero."""

    parts: tuple[tuple[int, bytes], ...]
    length: int


def blank_image(size: int, cluster_bits: int) -> BlankImage:
    """Lay out an empty version 3 image of a disk of ``size`` bytes.

    Raises:
        ValueError: the disk needs an L1 table larger than 32 MiB.
    """
    geometry = Geometry(cluster_bits)
    l1_size = geometry.l1_entries_for(size)
    if l1_size * ENTRY_BYTES > layout.MAX_L1_BYTES:
        raise ValueError(f"a disk of {size} bytes needs larger clusters than {geometry.cluster_bytes} bytes")
    l1_clusters = geometry.clusters(l1_size * ENTRY_BYTES)
    table_clusters, block_count = refcount_clusters(geometry, 1 + l1_clusters)
    table = geometry.cluster_bytes
    blocks = table + table_clusters * geometry.cluster_bytes
    l1_table = blocks + block_count * geometry.cluster_bytes
    header = Header(
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=cluster_bits,
        size=size,
        crypt_method=0,
        l1_size=l1_size,
        l1_table_offset=l1_table,
        refcount_table_offset=table,
        refcount_table_clusters=table_clusters,
        nb_snapshots=0,
        snapshots_offset=0,
        header_length=CREATED_HEADER_BYTES,
    )
    used = 1 + table_clusters + block_count + l1_clusters
    offsets = [blocks + index * geometry.cluster_bytes for index in range(block_count)]
    entries = b"".join(offset.to_bytes(ENTRY_BYTES, "big") for offset in offsets)
    parts = ((0, header.pack()), (table, entries), (blocks, _refcounts(geometry, used)))
    return BlankImage(parts, used * geometry.cluster_bytes)


def refcount_clusters(geometry: Geometry, other_clusters: int) -> tuple[int, int]:
    """Return (refcount table clusters, refcount blocks) that count ``other_clusters`` and themselves."""
    table_clusters, blocks = 1, 1
    while True:
        used = other_clusters + table_clusters + blocks
        needed_blocks = -(-used // geometry.refcounts_per_cluster)
        needed_table = geometry.clusters(needed_blocks * ENTRY_BYTES)
        if (needed_table, needed_blocks) == (table_clusters, blocks):
            return table_clusters, blocks
        table_clusters, blocks = max(needed_table, table_clusters), max(needed_blocks, blocks)


def _refcounts(geometry: Geometry, used: int) -> bytes:
    refcounts = bytearray(used << geometry.refcount_order >> 3)
    for cluster in range(used):
        _native.refcount_set(refcounts, cluster, geometry.refcount_order, 1)
    return bytes(refcounts)
