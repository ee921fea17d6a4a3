"""The qcow2 header and its extensions (qcow2 specification, "Header", "Header extensions").

Header, big-endian::

    Byte   0 -   3:   magic, "QFI\\xfb"
           4 -   7:   version, 2 or 3
           8 -  15:   backing_file_offset, 0: none
          16 -  19:   backing_file_size in bytes
          20 -  23:   cluster_bits
          24 -  31:   size of the virtual disk in bytes
          32 -  35:   crypt_method, 0: none, 1: AES, 2: LUKS
          36 -  39:   l1_size in entries
          40 -  47:   l1_table_offset
          48 -  55:   refcount_table_offset
          56 -  59:   refcount_table_clusters
          60 -  63:   nb_snapshots
          64 -  71:   snapshots_offset
    from here on only in version 3:
          72 -  79:   incompatible_features
          80 -  87:   compatible_features
          88 -  95:   autoclear_features
          96 -  99:   refcount_order
         100 - 103:   header_length in bytes, a multiple of 8
               104:   compression_type, 0: zlib, 1: zstd (where header_length is at least 112)

A header extension is its type (4 bytes), its length (4 bytes) and its data, padded to a multiple of 8;
type 0 ends the list.

K2. Of two extensions of one type the last counts, as in QEMU, for whoever asks what an image needs and for
    whoever opens it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import layout
from jqcow.ondisk.layout import Geometry

MAGIC = b"QFI\xfb"
V2_STRUCT = struct.Struct(">4sIQIIQIIQQIIQ")
V2_BYTES = 72
V3_STRUCT = struct.Struct(">4sIQIIQIIQQIIQQQQII")
V3_BYTES = 104
if V2_STRUCT.size != V2_BYTES or V3_STRUCT.size != V3_BYTES:
    raise RuntimeError("the header layout does not have the size that the specification gives")
CREATED_HEADER_BYTES = 112
EXTENSION_STRUCT = struct.Struct(">II")
MAX_BACKING_NAME_BYTES = 1023
"""The longest backing file name (qcow2 specification, ``backing_file_size``)."""

INCOMPATIBLE_DIRTY = 1 << 0
INCOMPATIBLE_CORRUPT = 1 << 1
INCOMPATIBLE_EXTERNAL_DATA = 1 << 2
INCOMPATIBLE_COMPRESSION = 1 << 3
INCOMPATIBLE_EXTENDED_L2 = 1 << 4
INCOMPATIBLE_KNOWN = 0x1F
INCOMPATIBLE_JOURNAL = 1 << 60
"""jqcow's live journal. Bits 5-63 are free in the specification."""

AUTOCLEAR_DATA_FILE_RAW = 1 << 1
COMPATIBLE_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_KNOWN = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW

EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_ENCRYPTION = 0x0537BE77
EXTENSION_EXTERNAL_DATA = 0x44415441

BITMAPS_STRUCT = struct.Struct(">IIQQ")
"""The bitmaps extension: number of bitmaps, reserved, size and offset of their directory in bytes."""

FEATURE_NAME_STRUCT = struct.Struct(">BB46s")
TYPE_INCOMPATIBLE, TYPE_COMPATIBLE, TYPE_AUTOCLEAR = range(3)
NAMED_FROM_CLUSTER_BITS = 13
"""Smaller clusters have little room for names of features; QEMU leaves them out there, too."""
_FEATURE_NAMES = (
    (TYPE_INCOMPATIBLE, 0, b"dirty bit"),
    (TYPE_INCOMPATIBLE, 1, b"corrupt bit"),
    (TYPE_INCOMPATIBLE, 2, b"external data file"),
    (TYPE_INCOMPATIBLE, 3, b"compression type"),
    (TYPE_INCOMPATIBLE, 4, b"extended L2 entries"),
    (TYPE_COMPATIBLE, 0, b"lazy refcounts"),
    (TYPE_AUTOCLEAR, 0, b"bitmaps"),
    (TYPE_AUTOCLEAR, 1, b"raw external data"),
)
"""Features by type and bit, and QEMU's names for them."""

CRYPT_NONE, CRYPT_AES, CRYPT_LUKS = range(3)


@dataclass(frozen=True)
class Header:
    """The fixed fields of the header, one attribute a field, in the specification's names."""

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = V2_BYTES
    compression_type: int = 0

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Read the fixed fields from the first bytes of an image.

        Raises:
            FormatError: no qcow2 magic, an unknown version, or a header that is cut short.
        """
        if len(data) < V2_BYTES or data[:4] != MAGIC:
            raise FormatError("not a qcow2 image: the magic is missing")
        version = int.from_bytes(data[4:8], "big")
        if version == 2:
            return cls(*V2_STRUCT.unpack_from(data)[1:])
        if version != 3:
            raise FormatError(f"unknown qcow2 version {version}")
        if len(data) < V3_BYTES:
            raise FormatError("the qcow2 header is cut short")
        header = cls(*V3_STRUCT.unpack_from(data)[1:])
        if header.header_length < V3_BYTES or header.header_length % 8:
            raise FormatError(f"header_length {header.header_length} is not valid")
        if header.header_length > V3_BYTES and len(data) > V3_BYTES:
            header = replace(header, compression_type=data[V3_BYTES])
        return header

    def pack(self) -> bytes:
        """Return the fixed fields as on disk, ``header_length`` bytes (72 in version 2)."""
        fields = (
            self.version,
            self.backing_file_offset,
            self.backing_file_size,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        if self.version == 2:
            return V2_STRUCT.pack(MAGIC, *fields)
        features = (
            self.incompatible_features,
            self.compatible_features,
            self.autoclear_features,
            self.refcount_order,
            self.header_length,
        )
        fixed = V3_STRUCT.pack(MAGIC, *fields, *features)
        if self.header_length > V3_BYTES:
            fixed += bytes([self.compression_type])
        return fixed.ljust(self.header_length, b"\0")

    @property
    def geometry(self) -> Geometry:
        """The geometry that follows from the cluster size, the refcount width and the kind of L2 entries."""
        return Geometry(
            self.cluster_bits, self.refcount_order, self.has_subclusters, self.version > 2, self.has_data_file
        )

    @property
    def has_subclusters(self) -> bool:
        """True if L2 entries are extended."""
        return bool(self.incompatible_features & INCOMPATIBLE_EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """True if the guest's data lies in an external data file."""
        return bool(self.incompatible_features & INCOMPATIBLE_EXTERNAL_DATA)

    @property
    def is_raw_outside(self) -> bool:
        """True if the bytes of the data file are those of the disk, and can be: nothing else shows there."""
        return (
            self.has_data_file
            and bool(self.autoclear_features & AUTOCLEAR_DATA_FILE_RAW)
            and self.crypt_method == CRYPT_NONE
            and not self.backing_file_offset
        )

    @property
    def raw_bit(self) -> int:
        """The autoclear bit of a raw data file, where it is right, else 0."""
        return AUTOCLEAR_DATA_FILE_RAW if self.is_raw_outside else 0

    def validate(self) -> None:
        """Check the fields that reading needs against the specification's bounds and QEMU's limits.

        Raises:
            FormatError: a field is out of bounds.
            CorruptionError: a table is not cluster-aligned, or overlaps the header.
        """
        if not layout.MIN_CLUSTER_BITS <= self.cluster_bits <= layout.MAX_CLUSTER_BITS:
            raise FormatError(f"cluster_bits {self.cluster_bits} is not in 9-21")
        if self.has_subclusters and self.cluster_bits < layout.MIN_SUBCLUSTER_CLUSTER_BITS:
            raise FormatError(f"subclusters with cluster_bits {self.cluster_bits}, which is below 14")
        if self.refcount_order > 6:
            raise FormatError(f"refcount_order {self.refcount_order} is above 6")
        cluster_bytes = 1 << self.cluster_bits
        if self.header_length > cluster_bytes:
            raise FormatError(f"header_length {self.header_length} exceeds the first cluster")
        if self.size >= 1 << 63:
            raise FormatError(f"a disk of {self.size} bytes is too large")
        if self.l1_size > layout.MAX_L1_ENTRIES:
            raise FormatError(f"an L1 table of {self.l1_size} entries is too large")
        if self.l1_size:
            self._check_place("L1 table", self.l1_table_offset)

    def validate_refcount_table(self) -> None:
        """Check where the refcount table is said to be. Reading the disk does not need it.

        Raises:
            FormatError: a length that no table has.
            CorruptionError: it is not cluster-aligned, or overlaps the header.
        """
        most = layout.MAX_REFCOUNT_TABLE_BYTES // (1 << self.cluster_bits) + 1
        if not 0 < self.refcount_table_clusters <= most:
            raise FormatError(f"refcount_table_clusters {self.refcount_table_clusters} is out of bounds")
        self._check_place("refcount table", self.refcount_table_offset)

    @property
    def has_refcount_table(self) -> bool:
        """True if there can be a refcount table where the header says."""
        try:
            self.validate_refcount_table()
        except (FormatError, CorruptionError):
            return False
        return True

    def _check_place(self, table: str, offset: int) -> None:
        if offset % (1 << self.cluster_bits) or not 0 < offset < layout.MAX_HOST_OFFSET:
            raise CorruptionError(table, offset, "not a cluster-aligned host offset")


@dataclass(frozen=True)
class Extension:
    """One header extension: its type and its data, without the padding."""

    type: int
    data: bytes

    def pack(self) -> bytes:
        """Return the extension as on disk, padded to a multiple of 8 bytes."""
        head = EXTENSION_STRUCT.pack(self.type, len(self.data))
        return head + self.data.ljust(layout.round_up(len(self.data), 8), b"\0")


@dataclass(frozen=True)
class HeaderArea:
    """All used bytes of the header in standard layout: fixed fields, extensions, backing file name.

    ``data`` keeps the bytes as they were read, so that extensions which jqcow does not know survive.
    """

    header: Header
    extensions: tuple[Extension, ...]
    data: bytes

    @classmethod
    def parse(cls, data: bytes) -> HeaderArea:
        """Parse the header from the first bytes of the first cluster (all of it, or all that is used).

        Raises:
            FormatError: the header breaks the specification.
            CorruptionError: a table offset that no image can have.
        """
        header = Header.unpack(data)
        header.validate()
        area = data[: 1 << header.cluster_bits]
        start = V2_BYTES if header.version == 2 else header.header_length
        if 0 < header.backing_file_offset < start:
            raise FormatError("the backing file name lies in the header's fixed fields")
        extensions, used = _parse_extensions(area, start, header.backing_file_offset)
        if header.backing_file_offset:
            end = header.backing_file_offset + header.backing_file_size
            if header.backing_file_size > MAX_BACKING_NAME_BYTES or end > 1 << header.cluster_bits:
                raise FormatError("the backing file name is too long or outside the first cluster")
            used = max(used, end)
        return cls(header, extensions, bytes(area[:used]).ljust(used, b"\0"))

    def with_header(self, header: Header) -> HeaderArea:
        """Return the same area with other fixed fields (of the same length)."""
        # Fields behind the known ones are kept: a longer header is valid, and they are not jqcow's to clear.
        known = header.pack()[: V3_BYTES + 1]
        return HeaderArea(header, self.extensions, known + self.data[len(known) :])

    @property
    def backing_file_name(self) -> bytes | None:
        """The name of the backing file as stored; None without one."""
        start = self.header.backing_file_offset
        return self.data[start : start + self.header.backing_file_size] if start else None

    def with_backing_file(self, name: bytes | None, backing_format: bytes | None) -> HeaderArea:
        """Return the area with another backing file name and format, or with none.

        The layout is QEMU's: fixed fields, the format of the backing file, the other extensions in their
        order and with their data, the end of the list, the name.

        Raises:
            FormatError: the first cluster does not hold it.
        """
        kept = tuple(found for found in self.extensions if found.type != EXTENSION_BACKING_FORMAT)
        if backing_format is not None:
            kept = (Extension(EXTENSION_BACKING_FORMAT, backing_format), *kept)
        return self._laid_out(self.header, kept, name, self.data)

    def with_extension(self, extension: Extension, *, autoclear_features: int) -> HeaderArea:
        """Return the area with an extension in the place of the one of its type; without data, without it.

        Raises:
            FormatError: the first cluster does not hold it.
        """
        kept = [found for found in self.extensions if found.type != extension.type]
        if extension.data:
            kept.append(extension)
        header = replace(self.header, autoclear_features=autoclear_features)
        return self._laid_out(header, tuple(kept), self.backing_file_name, self.data)

    def with_feature_names(self) -> HeaderArea:
        """Return the area with the names of the features that the specification has, where there is room."""
        header = self.header
        if header.version < 3 or header.cluster_bits < NAMED_FROM_CLUSTER_BITS:
            return self
        data = b"".join(FEATURE_NAME_STRUCT.pack(*feature) for feature in _FEATURE_NAMES)
        names = Extension(EXTENSION_FEATURE_NAMES, data)
        return self.with_extension(names, autoclear_features=header.autoclear_features)

    def with_version(self, version: int) -> HeaderArea:
        """Return the area in another version; what version 2 has no place for is at its default, or gone.

        Gone are feature bits, the names of features, bitmaps, and fields behind those that jqcow knows.
        Version 3 has the names.

        Raises:
            FormatError: the first cluster does not hold it.
        """
        kept, name = self.extensions, self.backing_file_name
        if version == self.header.version:
            return self
        header = replace(self.header, version=3, header_length=CREATED_HEADER_BYTES)
        if version == 2:
            # Bitmaps count by an autoclear bit alone.
            gone = (EXTENSION_FEATURE_NAMES, EXTENSION_BITMAPS)
            kept = tuple(found for found in kept if found.type not in gone)
            header = Header.unpack(replace(self.header, version=2).pack())
        return self._laid_out(header, kept, name, b"").with_feature_names()

    def _laid_out(
        self, header: Header, extensions: tuple[Extension, ...], name: bytes | None, fixed: bytes
    ) -> HeaderArea:
        """Return the area with another header, extensions and name; ``fixed``: what unknown fields hold."""
        fixed_bytes = V2_BYTES if header.version == 2 else header.header_length
        listed = b"".join(extension.pack() for extension in (*extensions, Extension(EXTENSION_END, b"")))
        name_offset = fixed_bytes + len(listed) if name is not None else 0
        header = replace(header, backing_file_offset=name_offset, backing_file_size=len(name or b""))
        known = header.pack()[: V3_BYTES + 1]
        data = (known + fixed[len(known) : fixed_bytes]).ljust(fixed_bytes, b"\0") + listed + (name or b"")
        if len(data) > 1 << header.cluster_bits:
            raise FormatError(
                f"a header of {len(data)} bytes does not fit in a cluster of {1 << header.cluster_bits} bytes"
            )
        return HeaderArea(header, extensions, data)

    def find(self, extension_type: int) -> Extension | None:
        """Return the extension of this type, or None; the last one of several, as in QEMU."""
        return next((found for found in reversed(self.extensions) if found.type == extension_type), None)


def _parse_extensions(area: bytes, start: int, backing_offset: int) -> tuple[tuple[Extension, ...], int]:
    """Return the extensions and the offset behind the last used byte of their list."""
    limit = min(len(area), backing_offset) if backing_offset else len(area)
    extensions: list[Extension] = []
    position = start
    while position + EXTENSION_STRUCT.size <= limit:
        kind, length = EXTENSION_STRUCT.unpack_from(area, position)
        position += EXTENSION_STRUCT.size
        if kind == EXTENSION_END:
            return tuple(extensions), position
        if length > limit - position:
            raise FormatError(f"header extension {kind:#x} of {length} bytes exceeds the header")
        extensions.append(Extension(kind, bytes(area[position : position + length])))
        position += layout.round_up(length, 8)
    return tuple(extensions), min(position, limit)
