"""What an existing image is to be: which options can be amended, and what a version has no place for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from jqcow.ondisk import bitmaps, layout
from jqcow.ondisk import header as headers
from jqcow.ondisk.form import Compat, flag, refcount_order_of, version_of
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.snapshots import Snapshot

V2_REFCOUNT_ORDER = 4
"""Refcounts of version 2 have 16 bits."""
V2_VM_STATE_BYTES_MAX = (1 << 32) - 1


class AmendOptions(TypedDict, total=False):
    """What an image is to be, each key with qemu-img's name. What is not given stays.

    Attributes:
        compat: ``1.1`` or ``0.10``, which has no lazy refcounts: they are off then, if not given.
        lazy_refcounts: QEMU need not keep refcounts exact while it writes; jqcow does all the same.
        refcount_bits: width of a refcount, a power of two from 1 to 64.
        size: of the disk in bytes.
        data_file: another name of the external data file, for an image that has one; no file is touched.
        data_file_raw: False: the data file need not stay the disk, byte for byte. No image can become one
            that promises it.
    """

    compat: Compat
    lazy_refcounts: bool
    refcount_bits: int
    size: int
    data_file: str
    data_file_raw: bool


@dataclass(frozen=True)
class Amendment:
    """The same as the header's numbers, with what stays."""

    version: int
    lazy_refcounts: bool
    refcount_order: int
    size_bytes: int

    @classmethod
    def of(cls, header: Header, options: AmendOptions) -> Amendment:
        """Return what the image of a header is to be.

        Raises:
            TypeError: an option of another type.
            ValueError: one that no image can have, or two that no image can have together.
        """
        version = version_of(options["compat"]) if "compat" in options else header.version
        is_lazy = version > 2 and bool(header.compatible_features & headers.COMPATIBLE_LAZY_REFCOUNTS)
        bits = options.get("refcount_bits", 1 << header.refcount_order)
        wanted = cls(
            version,
            flag(options.get("lazy_refcounts", is_lazy), "lazy_refcounts"),
            refcount_order_of(bits),
            layout.disk_size(options.get("size", header.size)),
        )
        if version < 3 and wanted.lazy_refcounts:
            raise ValueError("lazy_refcounts needs compat=1.1")
        if version < 3 and wanted.refcount_order != V2_REFCOUNT_ORDER:
            raise ValueError(f"compat=0.10 needs refcount_bits=16, not {bits}")
        return wanted

    def require_place_for(self, area: HeaderArea, snapshots: tuple[Snapshot, ...]) -> None:
        """Raise ValueError if the image has something that the version has no place for."""
        header = area.header
        if self.version > 2 or header.version == 2:
            return
        if header.has_subclusters:
            raise ValueError("compat=0.10 has no extended_l2, which the image has")
        if header.compression_type or header.incompatible_features & headers.INCOMPATIBLE_COMPRESSION:
            raise ValueError("compat=0.10 has compression_type=zlib alone, and the image has another")
        if header.incompatible_features & headers.INCOMPATIBLE_EXTERNAL_DATA:
            raise ValueError("compat=0.10 has no data_file, which the image has")
        if header.incompatible_features:
            features = header.incompatible_features
            raise ValueError(f"compat=0.10 has no incompatible features, and the image has {features:#x}")
        if bitmaps.announced_in(area):
            raise ValueError("compat=0.10 has no bitmaps, which the image has: remove them first")
        for snapshot in snapshots:
            if snapshot.disk_bytes != self.size_bytes:
                found = f"one has {snapshot.disk_bytes} bytes"
                raise ValueError(f"compat=0.10 has snapshots of the disk's size alone, and {found}")
            if snapshot.vm_state_bytes > V2_VM_STATE_BYTES_MAX:
                raise ValueError(f"compat=0.10 has no VM state of {snapshot.vm_state_bytes} bytes")
