"""What an open image says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jqcow.engine.scan import Scan
from jqcow.ondisk.bitmaps import Bitmap


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
    """

    virtual_size: int
    cluster_size: int
    file_size: int
    version: int
    refcount_bits: int
    lazy_refcounts: bool
    dirty: bool
    corrupt: bool
    compression_type: Literal["zlib", "zstd"]
    snapshot_count: int
    journal: JournalInfo | None
    bitmaps: tuple[Bitmap, ...]


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
