"""How large a file, or a block device, has to be for a disk: before it is made, converted or written to.

The numbers are bounds: no conversion by jqcow comes to more than ``required``, and no image of the disk,
fully written, to more than ``fully_allocated``. While jqcow writes to it an image has a journal too: with
``journal`` bytes on top a block device is always large enough. Snapshots, bitmaps and what a transaction
changes take space of their own.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from typing import Unpack

from jqcow.disks.chain import open_disk
from jqcow.disks.image import ImageDisk
from jqcow.disks.policy import FilePolicy, Following
from jqcow.offline.compare import windows
from jqcow.ondisk import layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.bitmaps import BitmapEntry
from jqcow.ondisk.blank import new_l1_size, refcount_clusters
from jqcow.ondisk.encryption import Encryption
from jqcow.ondisk.form import FileOptions, Form, HostUse
from jqcow.ondisk.layout import Geometry
from jqcow.ondisk.naming import DiskFormat, check_format

_GROWTHS_OF_A_TABLE = 3
"""A refcount table that grows by halves leaves tables behind that come to less than so many of the last."""
_WINDOW_BYTES = 1 << 30


@dataclass(frozen=True)
class Measurement:
    """Sizes in bytes.

    Attributes:
        required: what a conversion takes at most.
        fully_allocated: what the image takes when all of its disk is written.
        bitmaps: what the bitmaps of a qcow2 source would take, None where there can be none.
        journal: what jqcow needs on top while it writes to the image; of a raw disk nothing.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None
    journal: int


def measure(
    source: str | os.PathLike[str],
    *,
    source_format: DiskFormat | None = None,
    snapshot: str | None = None,
    allow_files: FilePolicy = False,
    probe: bool = False,
    force_share: bool = False,
    target_format: DiskFormat = "qcow2",
    encryption: Encryption | None = None,
    journal_size: int = roots.DEFAULT_JOURNAL_BYTES,
    **options: Unpack[FileOptions],
) -> Measurement:
    """Return what a conversion of a disk would take. Only its tables are read.

    Args:
        source: the file to convert; the other arguments as those of `convert`, and
        force_share: look also while another program writes.
        journal_size: in bytes, of the journal that writing will use.

    Raises:
        ValueError: options that the target cannot have, or a snapshot of a raw file.
        FileAccessDenied: the source names a backing file, and that is not allowed.
        JqcowError: the source cannot be read.
        OSError: the host failed.
    """
    form, use = Form.of(options), HostUse.of(options)
    unit = form.geometry.cluster_bytes
    following = Following(allow_files, probe, share_writers=force_share, reads_data=False)
    with closing(open_disk(source, source_format, snapshot=snapshot, following=following)) as chain:
        top = chain.layers[0]
        bitmaps = None
        if isinstance(top, ImageDisk) and target_format == "qcow2" and form.version > 2:
            bitmaps = _bitmap_bytes(form.geometry, chain.size, top.bitmaps.directory.entries)
        limit = max(unit, _WINDOW_BYTES)
        found = sum(layout.round_up(length, unit) for _, length in windows(chain, unit, limit, holes=False))
        data_bytes = found if use.preallocation == "off" else chain.size
        return _measured(chain.size, data_bytes, target_format, form, encryption, journal_size, bitmaps)


def measure_size(
    size: int,
    *,
    target_format: DiskFormat = "qcow2",
    encryption: Encryption | None = None,
    journal_size: int = roots.DEFAULT_JOURNAL_BYTES,
    **options: Unpack[FileOptions],
) -> Measurement:
    """Return what a new disk of ``size`` bytes takes; arguments and errors as `measure`."""
    form, use = Form.of(options), HostUse.of(options)
    size = layout.round_up(size, layout.SECTOR_BYTES)
    data_bytes = 0 if use.preallocation == "off" else size
    return _measured(size, data_bytes, target_format, form, encryption, journal_size, None)


def _measured(
    size: int,
    data_bytes: int,
    target_format: DiskFormat,
    form: Form,
    encryption: Encryption | None,
    journal_size: int,
    bitmaps: int | None,
) -> Measurement:
    check_format(target_format)
    journal_size = roots.journal_length(journal_size)
    if target_format == "raw":
        return Measurement(size, size, None, 0)
    geometry = form.geometry
    l1_size = new_l1_size(geometry, size)
    disk_clusters = geometry.clusters(size)
    others = 1 + geometry.clusters(layout.table_bytes(l1_size)) + l1_size + disk_clusters
    if encryption is not None:
        others += geometry.clusters(encryption.header_bytes)
    used = others + sum(refcount_clusters(geometry, others))
    missing = disk_clusters - min(disk_clusters, geometry.clusters(data_bytes))
    whole = used * geometry.cluster_bytes
    return Measurement(
        whole - missing * geometry.cluster_bytes, whole, bitmaps, _journal_bytes(geometry, used, journal_size)
    )


def _journal_bytes(geometry: Geometry, used: int, journal_size: int) -> int:
    """Return what a live image needs behind ``used`` clusters: its journal, and refcounts for that."""
    alignment = max(geometry.cluster_bytes, roots.JOURNAL_ALIGNMENT)
    journal = geometry.clusters(layout.round_up(journal_size, alignment) + alignment)
    table, blocks = refcount_clusters(geometry, used + journal)
    table_before, blocks_before = refcount_clusters(geometry, used)
    more = blocks - blocks_before + 1 + table - table_before
    # One that is a single cluster from the start does not grow.
    more += _GROWTHS_OF_A_TABLE * table if table > 1 else 0
    return (journal + more) * geometry.cluster_bytes


def _bitmap_bytes(geometry: Geometry, size: int, entries: tuple[BitmapEntry, ...]) -> int:
    """Return what bitmaps take in an image: bits, tables and their directory."""
    clusters = geometry.clusters(sum(len(entry.pack()) for entry in entries))
    for entry in entries:
        of_bits = geometry.clusters(entry.bits_for(size) + 7 >> 3)
        clusters += of_bits + geometry.clusters(layout.table_bytes(of_bits))
    return clusters * geometry.cluster_bytes
