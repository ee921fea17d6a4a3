"""NTFS on disk: the boot sector, records of the MFT, attributes and their runs, index buffers.

All numbers are little-endian. Structures of several sectors are protected against torn writes by *fixups*:
the last two bytes of each 512 are replaced by a number of the write, and kept in the structure's head. No
checksum covers anything.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

FIXED_BYTES = 512
RECORD_IN_USE = 1
RECORD_IS_DIRECTORY = 2
ATTRIBUTE_STANDARD = 0x10
ATTRIBUTE_LIST = 0x20
ATTRIBUTE_FILE_NAME = 0x30
ATTRIBUTE_DATA = 0x80
ATTRIBUTE_INDEX = 0xA0
_ATTRIBUTE_END = 0xFFFF_FFFF
_FLAGS_COMPRESSED = 0xFF
_UNIX_EPOCH = 116_444_736_000_000_000
_ATTRIBUTES_MAX = 1024


def fixed_up(data: bytes) -> bytes | None:
    """Return a structure with its fixups undone; None if they do not agree."""
    if len(data) < FIXED_BYTES:
        return None
    at, count = struct.unpack_from("<HH", data, 4)
    if count != len(data) // FIXED_BYTES + 1 or at % 2 or at + 2 * count > FIXED_BYTES - 2:
        return None
    number = data[at : at + 2]
    fixed = bytearray(data)
    for index in range(1, count):
        end = index * FIXED_BYTES
        if data[end - 2 : end] != number:
            return None
        fixed[end - 2 : end] = data[at + 2 * index : at + 2 * index + 2]
    return bytes(fixed)


@dataclass(frozen=True)
class Boot:
    """The boot sector, of which the last sector of the volume is a copy.

    Byte   3 -  10  "NTFS    "
          11 -  12  bytes in a sector
          13        sectors in a cluster; from 128 on 2 to the power of what is missing to 256
          28 -  31  sectors before the volume, as far as whoever made it knew
          40 -  47  sectors in the volume, but the last
          48 -  55  cluster of the MFT
          56 -  63  cluster of the copy of the MFT's start
          64        clusters in a record; if negative, 2 to the power of that many bytes
          68        clusters in an index buffer, likewise
          72 -  79  serial number
         510 - 511  0x55 0xAA
    """

    sector_bytes: int
    cluster_bytes: int
    sectors_before: int
    sector_count: int
    mft_cluster: int
    mirror_cluster: int
    record_bytes: int
    index_bytes: int
    serial: int

    STRUCT = struct.Struct("<3x8sHB14xI8xQQQb3xb3xQ")
    MAGIC = b"NTFS    "

    @classmethod
    def unpack(cls, sector: bytes) -> Boot | None:
        """Read a boot sector; None if it is none."""
        if len(sector) < 512 or sector[3:11] != cls.MAGIC or sector[510:512] != b"\x55\xaa":
            return None
        _, sector_bytes, per_cluster, before, count, mft, mirror, record, index, serial = (
            cls.STRUCT.unpack_from(sector)
        )
        if sector_bytes not in (512, 1024, 2048, 4096):
            return None
        if per_cluster > 128:
            per_cluster = 1 << min(256 - per_cluster, 32)
        cluster_bytes = sector_bytes * per_cluster
        if per_cluster & (per_cluster - 1) or not 512 <= cluster_bytes <= 2 << 20:
            return None
        record_bytes = record * cluster_bytes if record > 0 else 1 << min(-record, 32)
        index_bytes = index * cluster_bytes if index > 0 else 1 << min(-index, 32)
        if record_bytes not in (512, 1024, 2048, 4096) or index_bytes not in (
            *(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
        ):
            return None
        boot = cls(
            *(sector_bytes, cluster_bytes, before, count, mft, mirror, record_bytes, index_bytes, serial)
        )
        is_inside = 0 < mft < boot.cluster_count and 0 < mirror < boot.cluster_count and count < 1 << 55
        return boot if is_inside else None

    @property
    def cluster_count(self) -> int:
        """Return how many clusters the volume has."""
        return self.sector_count * self.sector_bytes // self.cluster_bytes

    @property
    def facts(self) -> dict[int, int]:
        """Return what some records say of their volume, by their numbers.

        The MFT and its mirror where they start, the bitmap and the list of bad clusters how long they are.
        """
        bitmap_bytes = -(-self.cluster_count // 64) * 8
        bad_bytes = self.cluster_count * self.cluster_bytes
        return {0: self.mft_cluster, 1: self.mirror_cluster, 6: bitmap_bytes, 8: bad_bytes}

    @property
    def copy_offset(self) -> int:
        """Return where in the volume the copy of the boot sector is."""
        return self.sector_count * self.sector_bytes

    @property
    def length(self) -> int:
        """Return the length of the volume in bytes, the copy included."""
        return self.copy_offset + self.sector_bytes


@dataclass(frozen=True)
class Run:
    """Clusters of an attribute that lie behind each other; without a cluster they are a hole."""

    first: int
    cluster: int | None
    count: int


class Runs:
    """What an attribute occupies."""

    def __init__(self, runs: list[Run], cluster_bytes: int) -> None:
        self.runs = runs
        self._cluster_bytes = cluster_bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Runs) and self.runs == other.runs

    __hash__ = None  # type: ignore[assignment]

    def locate(self, offset: int) -> tuple[int, int] | None:
        """Return where in the volume a byte of the attribute is, and how many follow it there."""
        low, high = 0, len(self.runs)
        while low < high:
            middle = (low + high) // 2
            if (self.runs[middle].first + self.runs[middle].count) * self._cluster_bytes <= offset:
                low = middle + 1
            else:
                high = middle
        if low == len(self.runs) or offset < self.runs[low].first * self._cluster_bytes:
            return None
        run = self.runs[low]
        if run.cluster is None:
            return None
        inside = offset - run.first * self._cluster_bytes
        return run.cluster * self._cluster_bytes + inside, run.count * self._cluster_bytes - inside


def unpacked_runs(data: bytes, first: int, cluster_count: int) -> list[Run] | None:
    """Read mapping pairs: lengths and distances to the run before, in as many bytes as they need.

    Args:
        data: from the first pair on.
        first: cluster of the attribute that the first run starts with.
        cluster_count: of the volume.

    Returns:
        None if they break off, or name clusters outside the volume.
    """
    runs: list[Run] = []
    at, cluster = 0, 0
    while at < len(data) and data[at]:
        length_bytes, offset_bytes = data[at] & 15, data[at] >> 4
        end = at + 1 + length_bytes + offset_bytes
        if not 1 <= length_bytes <= 8 or offset_bytes > 8 or end > len(data):
            return None
        count = int.from_bytes(data[at + 1 : at + 1 + length_bytes], "little", signed=True)
        if not 0 < count < 1 << 55 or first + count > 1 << 60:
            return None
        cluster += int.from_bytes(data[at + 1 + length_bytes : end], "little", signed=True)
        if offset_bytes and not 0 <= cluster <= cluster_count - count:
            return None
        runs.append(Run(first, cluster if offset_bytes else None, count))
        first += count
        at = end
    return runs if at < len(data) else None


@dataclass(frozen=True)
class Attribute:
    """An attribute in a record.

        Byte   0 -   3  type
               4 -   7  length
               8        1: not resident
               9        length of the name in characters
              10 -  11  offset of the name
              12 -  13  flags: compressed, encrypted, sparse
        resident:
              16 -  19  length of the value
              20 -  21  offset of the value
        not resident:
              16 -  31  first and last cluster of the attribute that are here
              32 -  33  offset of the mapping pairs
              48 -  63  size, initialized size; where the first cluster is 0

    Attributes:
        value: of a resident one; None otherwise.
        runs: of one that is not resident; None otherwise.
    """

    type: int
    name: bytes
    is_compressed: bool
    value: bytes | None
    runs: list[Run] | None
    first: int
    size: int
    initialized_size: int

    HEAD = struct.Struct("<IIBBHH")
    RESIDENT = struct.Struct("<IH")
    OUTSIDE = struct.Struct("<QQH14xQQ")

    @classmethod
    def unpack(cls, data: bytes, cluster_count: int) -> Attribute | None:
        """Read an attribute of exactly these bytes; None if it does not hold together."""
        if len(data) < 24:
            return None
        kind, _, outside, name_length, name_at, flags = cls.HEAD.unpack_from(data)
        name = data[name_at : name_at + 2 * name_length]
        is_compressed = bool(flags & _FLAGS_COMPRESSED)
        if not outside:
            length, at = cls.RESIDENT.unpack_from(data, 16)
            if at + length > len(data):
                return None
            return cls(kind, name, is_compressed, data[at : at + length], None, 0, length, length)
        if len(data) < 64:
            return None
        first, last, at, size, initialized = cls.OUTSIDE.unpack_from(data, 16)
        runs = unpacked_runs(data[at:], first, cluster_count) if first < 1 << 59 else None
        if runs is None or (runs and runs[-1].first + runs[-1].count != last + 1):
            return None
        return cls(kind, name, is_compressed, None, runs, first, size, initialized)


@dataclass(frozen=True)
class Record:
    """A record of the MFT.

    Byte   0 -   3  "FILE"
           4 -   7  offset and count of the fixups
           8 -  15  sequence number in the log
          16 -  17  how often the record was used
          20 -  21  offset of the first attribute
          22 -  23  flags: in use, directory
          24 -  31  bytes in use, bytes allocated
          32 -  39  the record that this one belongs to; 0: itself
          44 -  47  number of the record
    """

    lsn: int
    sequence: int
    flags: int
    base: int
    number: int
    body: bytes
    first_attribute: int
    cluster_count: int

    STRUCT = struct.Struct("<4sHHQHxxHHIIQ4xI")
    MAGIC = b"FILE"

    @classmethod
    def unpack(cls, data: bytes, boot: Boot) -> Record | None:
        """Read a record; None if it is none, or is torn."""
        if data[:4] != cls.MAGIC or len(data) != boot.record_bytes or (fixed := fixed_up(data)) is None:
            return None
        _, fixups_at, _, lsn, sequence, first, flags, used, allocated, base, number = cls.STRUCT.unpack_from(
            fixed
        )
        if fixups_at < 48 or not 48 <= first <= used <= allocated == len(data):
            return None
        return cls(lsn, sequence, flags, base, number, fixed[:used], first, boot.cluster_count)

    @property
    def reference(self) -> int:
        """Return how others name it: its number, and in the high bits how often it was used."""
        return self.sequence << 48 | self.number

    @cached_property
    def attributes(self) -> list[Attribute]:
        """The attributes up to the first that does not hold together."""
        found: list[Attribute] = []
        at = self.first_attribute
        while at + 16 <= len(self.body) and len(found) < _ATTRIBUTES_MAX:
            kind, length = struct.unpack_from("<II", self.body, at)
            if kind == _ATTRIBUTE_END or length < 24 or at + length > len(self.body):
                break
            attribute = Attribute.unpack(self.body[at : at + length], self.cluster_count)
            if attribute is None:
                break
            found.append(attribute)
            at += length
        return found

    @property
    def times_ns(self) -> tuple[int, int]:
        """Return when the file was made and when its data changed, in nanoseconds since 1970, or 0."""
        for attribute in self.attributes:
            if attribute.type == ATTRIBUTE_STANDARD and attribute.value and len(attribute.value) >= 16:
                made, changed = struct.unpack_from("<QQ", attribute.value)
                return (made - _UNIX_EPOCH) * 100, (changed - _UNIX_EPOCH) * 100
        return 0, 0

    @property
    def fact(self) -> int | None:
        """Return what `Boot.facts` has for it, if it is one of those records."""
        for attribute in self.attributes:
            if attribute.type != ATTRIBUTE_DATA or not attribute.runs or attribute.first:
                continue
            if self.number in (0, 1) and not attribute.name:
                return attribute.runs[0].cluster
            if (self.number, attribute.name) in ((6, b""), (8, "$Bad".encode("utf-16-le"))):
                return attribute.size
        return None

    @property
    def parents(self) -> set[int]:
        """Return the references of the directories that it is in."""
        return {
            int.from_bytes(attribute.value[:8], "little")
            for attribute in self.attributes
            if attribute.type == ATTRIBUTE_FILE_NAME and attribute.value and len(attribute.value) >= 66
        }


def listed_records(value: bytes) -> Iterator[int]:
    """Yield the references of the records that an attribute list names.

    Byte   0 -   3  type of an attribute
           4 -   5  length of the entry
          16 -  23  record that has it
    """
    at = 0
    while at + 26 <= len(value):
        length = int.from_bytes(value[at + 4 : at + 6], "little")
        if length < 26:
            return
        yield int.from_bytes(value[at + 16 : at + 24], "little")
        at += length


@dataclass(frozen=True)
class IndexBuffer:
    """A buffer of a directory's index.

        Byte   0 -   3  "INDX"
               4 -   7  offset and count of the fixups
               8 -  15  sequence number in the log
              16 -  23  where in the index it is
              24 -  31  offset of the first entry, of the end of entries; both from byte 24
        entry:
               0 -   7  record of the file
               8 -  11  length of the entry, of the key
              12 -  13  flags: 2: last
              16 -  23  record of the directory, the key's start

    Attributes:
        place: where in the index it is, in the index's units.
        directory: the reference that all its keys have.
        files: references of the files.
    """

    lsn: int
    place: int
    directory: int
    files: tuple[int, ...]

    STRUCT = struct.Struct("<4s4xQQII")
    ENTRY = struct.Struct("<QHHHxxQ")
    MAGIC = b"INDX"

    @classmethod
    def unpack(cls, data: bytes) -> IndexBuffer | None:
        """Read a buffer; None if it is none, is torn, has no entries, or is not a directory's."""
        if data[:4] != cls.MAGIC or (fixed := fixed_up(data)) is None:
            return None
        _, lsn, place, first, end = cls.STRUCT.unpack_from(fixed)
        at, end = 24 + first, min(24 + end, len(fixed))
        files: list[int] = []
        directories: set[int] = set()
        while at + 24 <= end:
            file, length, key_length, flags, directory = cls.ENTRY.unpack_from(fixed, at)
            if flags & 2:
                break
            if length < 24 or at + length > end or not 66 <= key_length <= length - 16:
                return None
            files.append(file)
            directories.add(directory)
            at += length
        return cls(lsn, place, directories.pop(), tuple(files)) if len(directories) == 1 else None
