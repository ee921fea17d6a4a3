"""The bytes of a new, empty image: header, refcount table and blocks, L1 table, LUKS header, in order.

Behind these a preallocated image has its L2 tables, and the clusters of the disk in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from jqcow import _native
from jqcow.ondisk import layout
from jqcow.ondisk.entries import pack_refcount_table, put_l1
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import CREATED_HEADER_BYTES, V2_BYTES, Header, HeaderArea
from jqcow.ondisk.l2 import codec_of
from jqcow.ondisk.layout import Geometry, HostOffset
from jqcow.ondisk.naming import name_backing_file, name_data_file
from jqcow.ondisk.preallocated import MappedRow, PreallocatedDisk, entries_for

if TYPE_CHECKING:
    from jqcow.ondisk.encryption import NewLuks


@dataclass(frozen=True)
class BlankImage:
    """What to write for a new image: ``parts`` as (host offset, bytes); all else up to ``length`` is zero.

    Attributes:
        parts: the header is the first of them.
        length: of the file, in whole clusters.
        shortest: where the last table ends; the file may end there, as QEMU's does.
        disk: the rest of a preallocated image; its refcount blocks are not among ``parts``.
    """

    parts: tuple[tuple[int, bytes], ...]
    length: int
    shortest: int
    disk: PreallocatedDisk | None = None


def blank_image(
    size: int,
    form: Form,
    *,
    backing_file: str | None = None,
    backing_format: str | None = None,
    foreign: bool = False,
    preallocated: bool = False,
    luks: NewLuks | None = None,
) -> BlankImage:
    """Lay out an empty image.

    Args:
        size: of the disk in bytes.
        form: of the image.
        backing_file: name to be stored, relative to the directory of the image; None for no backing file.
        backing_format: ``raw`` or ``qcow2``, with a backing file.
        foreign: the backing file may be one that other programs know, as `name_backing_file` says.
        preallocated: every cluster of the disk has a host cluster, which reads as zeros.
        luks: the LUKS header of an encrypted image.

    Raises:
        ValueError: the disk needs an L1 table larger than 32 MiB, or a refcount table larger than 8 MiB;
            `name_backing_file` refuses the name; it is preallocated over a backing file, without subclusters.
    """
    geometry = form.geometry
    l1_size = new_l1_size(geometry, size)
    l1_clusters = geometry.clusters(layout.table_bytes(l1_size))
    # The tables of a raw data file map all of it: it must show whatever is written there.
    preallocated = preallocated or form.data_file_raw
    l2_tables, disk_clusters = (l1_size, geometry.clusters(size)) if preallocated else (0, 0)
    data_clusters = 0 if geometry.has_data_file else disk_clusters
    if preallocated:
        _require_zeros(form, has_backing=backing_file is not None, is_encrypted=luks is not None)
    luks_clusters = 0 if luks is None else geometry.clusters(luks.length)
    others = 1 + l1_clusters + luks_clusters + l2_tables + data_clusters
    table_clusters, block_count = refcount_clusters(geometry, others)
    if table_clusters * geometry.cluster_bytes > layout.MAX_REFCOUNT_TABLE_BYTES:
        raise ValueError(f"a disk of {size} bytes cannot be preallocated in clusters of this size")
    table = geometry.cluster_bytes
    blocks = table + table_clusters * geometry.cluster_bytes
    l1_table = blocks + block_count * geometry.cluster_bytes
    luks_offset = l1_table + l1_clusters * geometry.cluster_bytes
    places = {"l1_table_offset": l1_table, "refcount_table_offset": table}
    header = new_header(form, size, **places, refcount_table_clusters=table_clusters)
    area = new_area(form, header, luks, luks_offset)
    if backing_file is not None or backing_format is not None:
        area = name_backing_file(area, backing_file, backing_format, foreign=foreign, elsewhere=foreign)
    used = others + table_clusters + block_count
    length = used * geometry.cluster_bytes
    parts = [(0, area.data), (table, pack_refcount_table(geometry, blocks, block_count))]
    parts += [] if luks is None else [(luks_offset + at, data) for at, data in luks.parts]
    if not preallocated:
        parts.append((blocks, pack_ones(geometry, used)))
        return BlankImage(tuple(parts), length, length if luks else l1_table + layout.table_bytes(l1_size))
    tables = HostOffset(luks_offset + luks_clusters * geometry.cluster_bytes)
    row = _preallocated_row(form, tables, l2_tables, disk_clusters, is_encrypted=luks is not None)
    disk = PreallocatedDisk(row, tables, HostOffset(blocks), used)
    parts.append((l1_table, _pack_l1(geometry, tables, l2_tables)))
    return BlankImage(tuple(parts), length, length, disk)


def _preallocated_row(
    form: Form, tables: HostOffset, l2_tables: int, disk_clusters: int, *, is_encrypted: bool
) -> MappedRow:
    """Return the clusters of a preallocated disk: behind its L2 tables, or in the data file."""
    codec = codec_of(form.geometry)
    host = HostOffset(tables + l2_tables * form.geometry.cluster_bytes)
    if form.data_file is not None:
        host = HostOffset(layout.DATA_FILE)
    entry_for = entries_for(codec, is_encrypted=is_encrypted)
    if form.data_file_raw:
        entry_for = partial(codec.preallocated_zeros, as_data=True)
    return MappedRow(codec, 0, disk_clusters, host, entry_for)


def _require_zeros(form: Form, *, has_backing: bool, is_encrypted: bool) -> None:
    """Raise ValueError unless what is preallocated, and not written, reads as zeros or as what is below."""
    if form.data_file_raw and has_backing:
        raise ValueError("a raw data file cannot show a backing file: leave data_file_raw out")
    if form.data_file_raw and is_encrypted:
        raise ValueError("an encrypted disk cannot be read in a raw data file: leave data_file_raw out")
    if has_backing and not form.has_subclusters:
        raise ValueError("preallocation over a backing file would hide it, but with extended_l2")


def _pack_l1(geometry: Geometry, first_table: int, table_count: int) -> bytes:
    """Return an L1 table whose L2 tables lie in a row."""
    table = bytearray(layout.table_bytes(table_count))
    for index in range(table_count):
        put_l1(table, index, first_table + index * geometry.cluster_bytes)
    return bytes(table)


def new_l1_size(geometry: Geometry, size: int) -> int:
    """Return how many L1 entries a new image of a disk of ``size`` bytes has.

    Raises:
        ValueError: the disk needs an L1 table larger than 32 MiB.
    """
    l1_size = geometry.l1_entries_for(size)
    if l1_size > layout.MAX_L1_ENTRIES:
        raise ValueError(f"a disk of {size} bytes needs larger clusters than {geometry.cluster_bytes} bytes")
    return l1_size


def new_area(form: Form, header: Header, luks: NewLuks | None = None, luks_offset: int = 0) -> HeaderArea:
    """Return the header area of a new image, perhaps with a LUKS header at a host offset."""
    area = HeaderArea(header, (), header.pack())
    if luks is not None:
        header = replace(header, crypt_method=luks.crypt_method)
        area = HeaderArea(header, (luks.extension(luks_offset),), header.pack()).with_backing_file(None, None)
    if form.data_file is not None:
        area = name_data_file(area, form.data_file)
    return area.with_feature_names() if form.feature_names else area


def new_header(
    form: Form,
    size: int,
    *,
    l1_table_offset: int,
    refcount_table_offset: int,
    refcount_table_clusters: int,
) -> Header:
    """Return the header of a new image of a disk of ``size`` bytes."""
    return Header(
        version=form.version,
        backing_file_offset=0,
        backing_file_size=0,
        cluster_bits=form.cluster_bits,
        size=size,
        crypt_method=0,
        l1_size=form.geometry.l1_entries_for(size),
        l1_table_offset=l1_table_offset,
        refcount_table_offset=refcount_table_offset,
        refcount_table_clusters=refcount_table_clusters,
        nb_snapshots=0,
        snapshots_offset=0,
        incompatible_features=form.incompatible_features,
        compatible_features=form.compatible_features,
        autoclear_features=form.autoclear_features,
        refcount_order=form.refcount_order,
        header_length=CREATED_HEADER_BYTES if form.version > 2 else V2_BYTES,
        compression_type=form.compression_type,
    )


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


def pack_ones(geometry: Geometry, count: int) -> bytes:
    """Return the refcounts of ``count`` clusters that have one user each, as a refcount block begins."""
    # Narrow refcounts end within a byte.
    refcounts = bytearray(((count << geometry.refcount_order) + 7) >> 3)
    _native.refcount_add(refcounts, geometry.refcount_order, 0, count, 1)
    return bytes(refcounts)
