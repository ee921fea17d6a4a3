"""What an image file is: its header's facts, its snapshots and what it takes on the host."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from jqcow.device.base import Device
from jqcow.offline.check import CheckReport, check_structure
from jqcow.offline.records import View, open_to_look
from jqcow.ondisk import header as headers
from jqcow.ondisk import layout, snapshots
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import MAGIC
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.snapshots import Snapshot

Format = Literal["qcow2", "raw"]
STAT_BLOCK_BYTES = 512
"""The unit of st_blocks, whatever the file system's block size."""


@dataclass(frozen=True)
class LiveJournal:
    """The journal of an image that was not closed. Offset and lengths in bytes."""

    offset: int
    length: int
    epoch: int
    record_count: int
    torn_tail: bool


@dataclass(frozen=True)
class Qcow2Facts:
    """What only a qcow2 image has."""

    cluster_size: int
    version: int
    compression_type: Literal["zlib", "zstd"]
    lazy_refcounts: bool
    refcount_bits: int
    dirty: bool
    corrupt: bool
    extended_l2: bool
    backing_file: str | None
    backing_format: str | None
    snapshots: tuple[Snapshot, ...]
    journal: LiveJournal | None


@dataclass(frozen=True)
class ImageFacts:
    """What a file is. ``virtual_size`` of the disk, ``actual_size`` what it takes on the host, in bytes."""

    filename: str
    format: Format
    virtual_size: int
    actual_size: int
    qcow2: Qcow2Facts | None


def probe_format(device: Device) -> Format:
    """Tell the format by its magic; a crashed jqcow image that lost sector 0 counts as qcow2."""
    if device.pread(len(MAGIC), 0) == MAGIC:
        return "qcow2"
    copy = device.pread(roots.ROOT_COPY_BYTES, roots.ROOT_COPY_OFFSET)
    return "raw" if roots.unpack_root_copy(copy) is None else "qcow2"


def raw_size(device: Device) -> int:
    """Return the size of the disk that a raw file holds: whole sectors, the last one padded with zeros."""
    return layout.round_up(device.size(), SECTOR_BYTES)


def read_info(
    path: str | os.PathLike[str], image_format: Format | None = None, *, force_share: bool = False
) -> ImageFacts:
    """Return the facts about an image file; a live journal is read, not replayed into the file.

    Args:
        path: the file.
        image_format: None tells it by the magic.
        force_share: look also while another program writes, unless its journal is live.

    Raises:
        JqcowError: not an image of this format, damaged, or in use by a writer.
        OSError: the host failed.
    """
    device = open_to_look(path, force_share=force_share)
    try:
        known = image_format or probe_format(device)
        view = View(device) if known == "qcow2" else None
        size = raw_size(device) if view is None else view.header.size
        facts = None if view is None else _qcow2_facts(view)
        return ImageFacts(os.fspath(path), known, size, os.stat(path).st_blocks * STAT_BLOCK_BYTES, facts)
    finally:
        device.close()


def _qcow2_facts(view: View) -> Qcow2Facts:
    header = view.header
    incompatible = header.incompatible_features
    backing_format = view.area.find(headers.EXTENSION_BACKING_FORMAT)
    name = view.area.data[header.backing_file_offset :][: header.backing_file_size]
    return Qcow2Facts(
        cluster_size=1 << header.cluster_bits,
        version=header.version,
        compression_type="zstd" if header.compression_type else "zlib",
        lazy_refcounts=bool(header.compatible_features & headers.COMPATIBLE_LAZY_REFCOUNTS),
        refcount_bits=1 << header.refcount_order,
        dirty=bool(incompatible & headers.INCOMPATIBLE_DIRTY),
        corrupt=bool(incompatible & headers.INCOMPATIBLE_CORRUPT),
        extended_l2=bool(incompatible & headers.INCOMPATIBLE_EXTENDED_L2),
        backing_file=name.decode("utf-8", "replace") if header.backing_file_offset else None,
        backing_format=backing_format.data.decode("utf-8", "replace") if backing_format else None,
        snapshots=_snapshots(view),
        journal=_live_journal(view),
    )


def _snapshots(view: View) -> tuple[Snapshot, ...]:
    header = view.header
    table = snapshots.parse_table(view.read, header.snapshots_offset, header.nb_snapshots, header=header)
    return table.snapshots


def read_snapshots(path: str | os.PathLike[str], *, force_share: bool = False) -> tuple[Snapshot, ...]:
    """Return the internal snapshots of an image file in the order of its table; a live image's as replayed.

    ``force_share`` looks also while another program writes, unless its journal is live.

    Raises:
        JqcowError: not a qcow2 image, a damaged snapshot table, or an image in use by a writer.
        OSError: the host failed.
    """
    device = open_to_look(path, force_share=force_share)
    try:
        return _snapshots(View(device))
    finally:
        device.close()


def _live_journal(view: View) -> LiveJournal | None:
    scan = view.scan
    if scan is None:
        return None
    extent = scan.extent
    torn = scan.torn_tail is not None
    return LiveJournal(extent.offset, extent.length, scan.epoch, len(scan.frames), torn)


def check_file(path: str | os.PathLike[str], *, force_share: bool = False) -> CheckReport:
    """Check the refcounts and tables of an image file; a live image is checked as replayed. Writes nothing.

    ``force_share`` looks also while another program writes, unless its journal is live.

    Raises:
        JqcowError: the metadata cannot be walked, or the image is in use by a writer.
        OSError: the host failed.
    """
    device = open_to_look(path, force_share=force_share)
    try:
        view = View(device)
        return check_structure(view.read, view.size(), reserved=view.reserved)
    finally:
        device.close()
