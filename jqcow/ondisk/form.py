"""What a new image is to be: what its header fixes, and what people call that."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from operator import index
from typing import Literal, TypedDict, get_args

from jqcow.ondisk import layout
from jqcow.ondisk.compression import COMPRESSION_ZLIB, CompressionType, compression_type_of
from jqcow.ondisk.header import (
    AUTOCLEAR_DATA_FILE_RAW,
    COMPATIBLE_LAZY_REFCOUNTS,
    INCOMPATIBLE_COMPRESSION,
    INCOMPATIBLE_EXTENDED_L2,
    INCOMPATIBLE_EXTERNAL_DATA,
)
from jqcow.ondisk.layout import Geometry

DEFAULT_CLUSTER_BYTES = 65536

Compat = Literal["0.10", "1.1"]
"""Versions 2 and 3 of the format, in qemu-img's words."""

Preallocation = Literal["off", "metadata", "falloc", "full"]
"""What is prepared of a disk before it is written to.

``metadata``: tables and refcounts, so that every cluster has its place in the file. ``falloc``: and space on
the host. ``full``: and zeros are written there.
"""
PREALLOCATIONS: tuple[Preallocation, ...] = get_args(Preallocation)

_VERSIONS = {"0.10": 2, "1.1": 3}


class FormOptions(TypedDict, total=False):
    """What a new image is to be, each key with qemu-img's name and default.

    Attributes:
        cluster_size: in bytes, a power of two from 512 to 2 MiB; 64 KiB if not given.
        refcount_bits: width of a refcount, a power of two from 1 to 64; 16 if not given. A refcount of 1 bit
            allows no snapshots.
        compression_type: of clusters that are written compressed, ``zlib`` (the default) or ``zstd``.
        extended_l2: L2 entries have subclusters, with clusters of 16 KiB and more.
        lazy_refcounts: QEMU need not keep refcounts exact while it writes; jqcow does all the same.
        compat: ``1.1`` (the default) or ``0.10``, which knows none of the above but the cluster size.
        data_file: name of an external data file, which is made too, and has the disk's data; it is stored as
            it is, and is relative to the working directory.
        data_file_raw: the bytes of that file are to be those of the disk, for programs that know raw files.
        feature_names: the header has QEMU's names of all features, which programs that lack one can tell;
            version 3, with clusters of 8 KiB and more.
    """

    cluster_size: int
    refcount_bits: int
    compression_type: CompressionType
    extended_l2: bool
    lazy_refcounts: bool
    compat: Compat
    data_file: str | os.PathLike[str]
    data_file_raw: bool
    feature_names: bool


class FileOptions(FormOptions, total=False):
    """What a new file is to be: a `Form`, and how it takes its space on the host.

    Attributes:
        preallocation: ``off`` (the default), ``metadata``, ``falloc`` or ``full``.
        nocow: the host's file system is to write in place, where it knows of anything else (btrfs).
    """

    preallocation: Preallocation
    nocow: bool


@dataclass(frozen=True)
class HostUse:
    """How a new file takes its space on the host."""

    preallocation: Preallocation = "off"
    nocow: bool = False

    @classmethod
    def of(cls, options: FileOptions) -> HostUse:
        """Return what options ask for.

        Raises:
            TypeError: an option of another type.
            ValueError: a preallocation that there is not.
        """
        preallocation = preallocation_of(options.get("preallocation", "off"))
        return cls(preallocation, flag(options.get("nocow", False), "nocow"))


@dataclass(frozen=True)
class Form:
    """The same as the header's numbers."""

    cluster_bits: int = 16
    refcount_order: int = 4
    compression_type: int = COMPRESSION_ZLIB
    has_subclusters: bool = False
    lazy_refcounts: bool = False
    version: int = 3
    data_file: str | None = None
    data_file_raw: bool = False
    feature_names: bool = False

    def __post_init__(self) -> None:
        if self.data_file_raw and self.data_file is None:
            raise ValueError("data_file_raw needs a data_file")
        if self.has_subclusters and self.cluster_bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS:
            raise ValueError("extended_l2 needs clusters of at least 16 KiB")
        if self.version < 3 and replace(self, version=3) != Form(
            self.cluster_bits, feature_names=self.feature_names
        ):
            raise ValueError(
                "compat=0.10 has refcounts of 16 bits and zlib alone, no lazy_refcounts, no extended_l2 and "
                "no data_file"
            )

    @classmethod
    def of(cls, options: FormOptions) -> Form:
        """Return the form that options ask for.

        Raises:
            TypeError: an option of another type.
            ValueError: one that no image can have, or two that no image can have together.
        """
        return cls(
            cluster_bits_of(options.get("cluster_size", DEFAULT_CLUSTER_BYTES)),
            refcount_order_of(options.get("refcount_bits", 16)),
            compression_type_of(options.get("compression_type", "zlib")),
            flag(options.get("extended_l2", False), "extended_l2"),
            flag(options.get("lazy_refcounts", False), "lazy_refcounts"),
            version_of(options.get("compat", "1.1")),
            _name(options.get("data_file")),
            flag(options.get("data_file_raw", False), "data_file_raw"),
            flag(options.get("feature_names", False), "feature_names"),
        )

    @property
    def geometry(self) -> Geometry:
        """The geometry of the image."""
        return Geometry(
            self.cluster_bits,
            self.refcount_order,
            self.has_subclusters,
            self.version > 2,
            self.data_file is not None,
        )

    @property
    def incompatible_features(self) -> int:
        """The incompatible feature bits of the header."""
        # The bit is set where the type is not zlib, and only there (specification, "Incompatible features").
        compression = INCOMPATIBLE_COMPRESSION if self.compression_type != COMPRESSION_ZLIB else 0
        outside = INCOMPATIBLE_EXTERNAL_DATA if self.data_file is not None else 0
        return compression | outside | (INCOMPATIBLE_EXTENDED_L2 if self.has_subclusters else 0)

    @property
    def autoclear_features(self) -> int:
        """The autoclear feature bits of the header."""
        return AUTOCLEAR_DATA_FILE_RAW if self.data_file_raw else 0

    @property
    def compatible_features(self) -> int:
        """The compatible feature bits of the header."""
        return COMPATIBLE_LAZY_REFCOUNTS if self.lazy_refcounts else 0


def _name(value: object) -> str | None:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is not None and not isinstance(value, str):
        raise TypeError(f"the name of a data file is a str, not {type(value).__name__}")
    return value


def version_of(compat: Compat) -> int:
    """Return the version of the format.

    Raises:
        ValueError: a word for none.
    """
    if compat not in _VERSIONS:
        raise ValueError(f"compat is 0.10 or 1.1, not {compat!r}")
    return _VERSIONS[compat]


def preallocation_of(value: Preallocation) -> Preallocation:
    """Return a preallocation.

    Raises:
        ValueError: there is no such.
    """
    if value not in PREALLOCATIONS:
        raise ValueError(f"preallocation is {', '.join(PREALLOCATIONS[:-1])} or full, not {value!r}")
    return value


def flag(value: object, name: str) -> bool:
    """Return a flag.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r}")
    return value


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
