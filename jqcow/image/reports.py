"""What an open image says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jqcow.engine.journal import Journal
from jqcow.engine.scan import Scan
from jqcow.ondisk import header as headers
from jqcow.ondisk.bitmaps import Bitmap
from jqcow.ondisk.header import Header


@dataclass(frozen=True)
class JournalInfo:
    """The live journal: its place and length in bytes, the running epoch and the newest sequence."""

    offset: int
    length: int
    epoch: int
    sequence: int


@dataclass(frozen=True)
class ImageInfo:
    """What the header says; sizes in bytes. ``journal`` is None while the image is clean.

    Of an image that was opened to read a snapshot, ``virtual_size`` is the snapshot's.
    ``encrypted`` means by LUKS.
    """

    virtual_size: int
    cluster_size: int
    file_size: int
    version: int
    refcount_bits: int
    lazy_refcounts: bool
    extended_l2: bool
    encrypted: bool
    dirty: bool
    corrupt: bool
    compression_type: Literal["zlib", "zstd"]
    snapshot_count: int
    journal: JournalInfo | None
    bitmaps: tuple[Bitmap, ...]


def image_info(
    header: Header, *, virtual_size: int, file_size: int, journal: Journal | None, bitmaps: tuple[Bitmap, ...]
) -> ImageInfo:
    """Return what a header says, with what it does not know."""
    live = None
    if journal is not None:
        extent = journal.extent
        live = JournalInfo(extent.offset, extent.length, journal.epoch, journal.sequence)
    return ImageInfo(
        virtual_size=virtual_size,
        cluster_size=1 << header.cluster_bits,
        file_size=file_size,
        version=header.version,
        refcount_bits=1 << header.refcount_order,
        lazy_refcounts=bool(header.compatible_features & headers.COMPATIBLE_LAZY_REFCOUNTS),
        extended_l2=header.has_subclusters,
        encrypted=header.crypt_method != headers.CRYPT_NONE,
        dirty=bool(header.incompatible_features & headers.INCOMPATIBLE_DIRTY),
        corrupt=bool(header.incompatible_features & headers.INCOMPATIBLE_CORRUPT),
        compression_type="zstd" if header.compression_type else "zlib",
        snapshot_count=header.nb_snapshots,
        journal=live,
        bitmaps=bitmaps,
    )


@dataclass(frozen=True)
class Recovered:
    """What opening found in a live journal: records applied, and whether a torn one was dropped."""

    epoch: int
    first_sequence: int
    last_sequence: int
    torn_tail: bool

    @classmethod
    def from_scan(cls, scan: Scan) -> Recovered:
        """Summarise a scan."""
        first = scan.frames[0].header.sequence
        return cls(scan.epoch, first, scan.sequence, scan.torn_tail is not None)
