"""The bytes of a new, empty image: header, refcount table, refcount blocks and L1 table, in this order."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index

from jqcow import _native
from jqcow.ondisk import layout
from jqcow.ondisk.compression import COMPRESSION_ZLIB
from jqcow.ondisk.entries import pack_refcount_table
from jqcow.ondisk.header import CREATED_HEADER_BYTES, INCOMPATIBLE_COMPRESSION, Header, HeaderArea
from jqcow.ondisk.layout import Geometry
from jqcow.ondisk.naming import name_backing_file

DEFAULT_CLUSTER_BYTES = 65536


@dataclass(frozen=True)
class BlankImage:
    """What to write for a new image: ``parts`` as (host offset, bytes); all else up to ``length`` is zero."""

    parts: tuple[tuple[int, bytes], ...]
    length: int


def blank_image(
    size: int,
    cluster_bits: int,
    *,
    refcount_order: int = 4,
    compression_type: int = COMPRESSION_ZLIB,
    backing_file: str | None = None,
    backing_format: str | None = None,
) -> BlankImage:
    """Lay out an empty version 3 image.

    Args:
        size: of the disk in bytes.
        cluster_bits: binary logarithm of the cluster size in bytes.
        refcount_order: binary logarithm of the refcount width in bits.
        compression_type: of clusters that will be compressed: 0 zlib, 1 zstd.
        backing_file: name to be stored, relative to the directory of the image; None for no backing file.
        backing_format: ``raw`` or ``qcow2``, with a backing file.

    Raises:
        ValueError: the disk needs an L1 table larger than 32 MiB, or `name_backing_file` refuses the name.
    """
    geometry = Geometry(cluster_bits, refcount_order)
    l1_size = new_l1_size(geometry, size)
    l1_clusters = geometry.clusters(layout.table_bytes(l1_size))
    table_clusters, block_count = refcount_clusters(geometry, 1 + l1_clusters)
    table = geometry.cluster_bytes
    blocks = table + table_clusters * geometry.cluster_bytes
    l1_table = blocks + block_count * geometry.cluster_bytes
    header = new_header(
        geometry,
        size,
        l1_table_offset=l1_table,
        refcount_table_offset=table,
        refcount_table_clusters=table_clusters,
        compression_type=compression_type,
    )
    area = HeaderArea(header, (), header.pack())
    if backing_file is not None or backing_format is not None:
        area = name_backing_file(area, backing_file, backing_format)
    used = 1 + table_clusters + block_count + l1_clusters
    refcount_table = pack_refcount_table(geometry, blocks, block_count)
    parts = ((0, area.data), (table, refcount_table), (blocks, _refcounts(geometry, used)))
    return BlankImage(parts, used * geometry.cluster_bytes)


def new_l1_size(geometry: Geometry, size: int) -> int:
    """Return how many L1 entries a new image of a disk of ``size`` bytes has.

    Raises:
        ValueError: the disk needs an L1 table larger than 32 MiB.
    """
    l1_size = geometry.l1_entries_for(size)
    if l1_size > layout.MAX_L1_ENTRIES:
        raise ValueError(f"a disk of {size} bytes needs larger clusters than {geometry.cluster_bytes} bytes")
    return l1_size


def new_header(
    geometry: Geometry,
    size: int,
    *,
    l1_table_offset: int,
    refcount_table_offset: int,
    refcount_table_clusters: int,
    compression_type: int,
) -> Header:
    """Return the header of a new version 3 image of a disk of ``size`` bytes."""
    return Header(
        version=3,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=geometry.cluster_bits,
        size=size,
        crypt_method=0,
        l1_size=geometry.l1_entries_for(size),
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        nb_snapshots=0,
        snapshots_offset=0,
        # The bit is set where the type is not zlib, and only there (specification, "Incompatible features").
        incompatible_features=INCOMPATIBLE_COMPRESSION if compression_type != COMPRESSION_ZLIB else 0,
        refcount_order=geometry.refcount_order,
        header_length=CREATED_HEADER_BYTES,
        compression_type=compression_type,
    )


def cluster_bits_of(cluster_size: int) -> int:
    """Return the binary logarithm of a cluster size in bytes.

    Raises:
        TypeError: not a whole number.
        ValueError: not a power of two from 512 bytes to 2 MiB.
    """
    cluster_size = index(cluster_size)
    bits = cluster_size.bit_length() - 1
    if cluster_size <= 0 or 1 << bits != cluster_size:
        raise ValueError(f"the cluster size must be a power of two, not {cluster_size}")
    if not layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS:
        raise ValueError(f"the cluster size must be from 512 to 2 MiB, not {cluster_size}")
    return bits


def refcount_order_of(refcount_bits: int) -> int:
    """Return the binary logarithm of the width of a refcount in bits.

    Raises:
        TypeError: not a whole number.
        ValueError: not a power of two from 1 to 64.
    """
    refcount_bits = index(refcount_bits)
    order = refcount_bits.bit_length() - 1
    if refcount_bits <= 0 or 1 << order != refcount_bits or order > layout.MAX_REFCOUNT_ORDER:
        raise ValueError(f"a refcount has 1, 2, 4, 8, 16, 32 or 64 bits, not {refcount_bits}")
    return order


def refcount_clusters(geometry: Geometry, other_clusters: int) -> tuple[int, int]:
    """Return (refcount table clusters, refcount blocks) that count ``other_clusters`` and themselves."""
    table_clusters, blocks = 1, 1
    while True:
        used = other_clusters + table_clusters + blocks
        needed_blocks = -(-used // geometry.refcounts_per_cluster)
        needed_table = geometry.clusters(layout.table_bytes(needed_blocks))
        if (needed_table, needed_blocks) == (table_clusters, blocks):
            return table_clusters, blocks
        table_clusters, blocks = max(needed_table, table_clusters), max(needed_blocks, blocks)


def _refcounts(geometry: Geometry, used: int) -> bytes:
    # Narrow refcounts end within a byte.
    refcounts = bytearray(((used << geometry.refcount_order) + 7) >> 3)
    for cluster in range(used):
        _native.refcount_set(refcounts, cluster, geometry.refcount_order, 1)
    return bytes(refcounts)
