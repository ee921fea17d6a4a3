"""What LVM2 writes on a physical volume. Numbers are little-endian; see `checksum` for the checksums.

The label, in one of the first four sectors::

    Byte   0 -   7:   "LABELONE"
           8 -  15:   number of the sector that it is in
          16 -  19:   checksum of bytes 20 - 511
          20 -  23:   offset of the physical volume's header in the sector
          24 -  31:   "LVM2 001"

The physical volume's header: an id of 32 characters, the size of the device (8 bytes), then pairs of offset
and length (8 bytes each) in two lists that a pair of zeros ends: data areas, metadata areas.

A metadata area begins with a sector::

    Byte   0 -   3:   checksum of bytes 4 - 511
           4 -  19:   " LVM2 x[5A%r0N*>"
          20 -  23:   version, 1
          24 -  31:   offset of the area on the physical volume
          32 -  39:   length of the area
          40 -  63:   offset in the area, length and checksum of the text (8, 8 and 4 bytes), flags (4 bytes)

The text is in a ring: what would be behind the area's end goes on in its second sector.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

SECTOR_BYTES = 512
LABEL_MAGIC = b"LABELONE"
LABEL_STRUCT = struct.Struct("<8sQII8s")
LABEL_TYPE = b"LVM2 001"
LABEL_SECTORS = 4
LABEL_CHECKED_OFFSET = 20
HEADER_STRUCT = struct.Struct("<32sQ")
AREA_STRUCT = struct.Struct("<QQ")
AREAS_MAX = 16
METADATA_MAGIC = b" LVM2 x[5A%r0N*>"
METADATA_MAGIC_OFFSET = 4
METADATA_STRUCT = struct.Struct("<I16sIQQQQII")
METADATA_CHECKED_OFFSET = 4
TEXT_BYTES_MAX = 4 << 20
CHECKSUM_START = 0xF597A6CF

TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|([A-Za-z0-9_.+-]+)|([{}=\[\],])|#[^\n]*|\s+')
DEPTH_MAX = 16

Value = str | int | list["str | int"]
Section = dict[str, "Value | Section"]


def checksum(data: bytes) -> int:
    """Return LVM's checksum: a CRC-32 with a start of its own, and not inverted at the end."""
    return zlib.crc32(data, CHECKSUM_START ^ 0xFFFF_FFFF) ^ 0xFFFF_FFFF


@dataclass(frozen=True)
class Label:
    """The label of a physical volume, whose checksum is right.

    Attributes:
        sector: that it is in.
        id: of the physical volume.
        device_bytes: how long it is.
        metadata_areas: offset on it and length of each, in bytes.
    """

    sector: int
    id: str
    device_bytes: int
    metadata_areas: tuple[tuple[int, int], ...]

    @classmethod
    def unpack(cls, data: bytes) -> Label | None:
        """Read a label from its sector; None if it is none."""
        if len(data) < SECTOR_BYTES or not data.startswith(LABEL_MAGIC):
            return None
        _, sector, crc, offset, kind = LABEL_STRUCT.unpack_from(data)
        sane = kind == LABEL_TYPE and sector < LABEL_SECTORS and offset <= SECTOR_BYTES - HEADER_STRUCT.size
        if not sane or checksum(data[LABEL_CHECKED_OFFSET:SECTOR_BYTES]) != crc:
            return None
        own_id, device_bytes = HEADER_STRUCT.unpack_from(data, offset)
        lists: list[list[tuple[int, int]]] = [[]]
        for place in range(
            offset + HEADER_STRUCT.size, SECTOR_BYTES - AREA_STRUCT.size + 1, AREA_STRUCT.size
        ):
            area = AREA_STRUCT.unpack_from(data, place)
            if area[0]:
                lists[-1].append(area)
            elif len(lists) == 2:
                break
            else:
                lists.append([])
        areas = tuple(lists[1][:AREAS_MAX]) if len(lists) == 2 else ()
        return cls(sector, own_id.decode("ascii", "replace"), device_bytes, areas)


@dataclass(frozen=True)
class MetadataArea:
    """The begin of a metadata area, whose checksum is right; see the module's text."""

    start: int
    length: int
    text_offset: int
    text_length: int
    text_checksum: int

    @classmethod
    def unpack(cls, data: bytes) -> MetadataArea | None:
        """Read it from its sector; None if it is none, or the area has no text."""
        if len(data) < SECTOR_BYTES:
            return None
        crc, magic, version, start, length, offset, text_length, text_crc, _ = METADATA_STRUCT.unpack_from(
            data
        )
        sane = version == 1 and SECTOR_BYTES <= offset < length and 0 < text_length <= TEXT_BYTES_MAX
        if magic != METADATA_MAGIC or not sane or text_length > length - SECTOR_BYTES:
            return None
        if checksum(data[METADATA_CHECKED_OFFSET:SECTOR_BYTES]) != crc:
            return None
        return cls(start, length, offset, text_length, text_crc)

    def text_ranges(self) -> list[tuple[int, int]]:
        """Return (offset on the physical volume, length) of the text: two, where it goes round."""
        first = min(self.text_length, self.length - self.text_offset)
        ranges = [(self.start + self.text_offset, first)]
        if first < self.text_length:
            ranges.append((self.start + SECTOR_BYTES, self.text_length - first))
        return ranges


@dataclass(frozen=True)
class Segment:
    """Extents of a logical volume that follow each other on one physical volume.

    Attributes:
        start: in the logical volume, in bytes.
        length: in bytes.
        volume_id: of the physical volume.
        place: on it, in bytes.
    """

    start: int
    length: int
    volume_id: str
    place: int


@dataclass(frozen=True)
class LogicalVolume:
    """A logical volume that is linear; its segments are sorted, and leave nothing out."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """Return its length in bytes."""
        return sum(segment.length for segment in self.segments)


def parse(text: str) -> Section:
    """Read a text of LVM's form: sections in braces, and values.

    Raises:
        ValueError: it is not of that form.
    """
    root: Section = {}
    stack = [root]
    tokens = list(_tokens(text))
    index = 0
    while index < len(tokens):
        word = tokens[index]
        after = tokens[index + 1] if index + 1 < len(tokens) else ("", "")
        if word == ("mark", "}") and len(stack) > 1:
            stack.pop()
            index += 1
        elif word[0] == "word" and after == ("mark", "{") and len(stack) < DEPTH_MAX:
            section: Section = {}
            stack[-1][word[1]] = section
            stack.append(section)
            index += 2
        elif word[0] == "word" and after == ("mark", "="):
            value, index = _value(tokens, index + 2)
            stack[-1][word[1]] = value
        else:
            raise ValueError("a text of LVM is not of its form")
    if len(stack) > 1:
        raise ValueError("a text of LVM ends in a section")
    return root


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    end = 0
    for match in TOKEN.finditer(text):
        if match.start() != end:
            break
        end = match.end()
        if match[1] is not None:
            yield "text", match[1]
        elif match[2] is not None:
            yield "word", match[2]
        elif match[3] is not None:
            yield "mark", match[3]
    if end != len(text):
        raise ValueError("a text of LVM has a letter that it cannot have")


def _value(tokens: list[tuple[str, str]], index: int) -> tuple[Value, int]:
    if tokens[index : index + 1] != [("mark", "[")]:
        return _single(tokens, index), index + 1
    values: list[str | int] = []
    index += 1
    while tokens[index : index + 1] != [("mark", "]")]:
        if tokens[index : index + 1] != [("mark", ",")]:
            values.append(_single(tokens, index))
        index += 1
    return values, index + 1


def _single(tokens: list[tuple[str, str]], index: int) -> str | int:
    kind, text = tokens[index] if index < len(tokens) else ("", "")
    if kind == "text":
        return text
    if kind != "word":
        raise ValueError("a text of LVM has no value where one must be")
    try:
        return int(text)
    except ValueError:
        return text


def logical_volumes(text: str) -> Iterator[LogicalVolume]:
    """Yield the linear volumes of a volume group; those of another kind are left out.

    Raises:
        ValueError: the text is not of LVM's form.
    """
    for group_name, group in parse(text).items():
        if not isinstance(group, dict):
            continue
        physical = group.get("physical_volumes")
        logical = group.get("logical_volumes")
        extent_sectors = group.get("extent_size")
        if isinstance(physical, dict) and isinstance(logical, dict) and isinstance(extent_sectors, int):
            for name, volume in logical.items():
                segments = _segments(volume, physical, extent_sectors) if isinstance(volume, dict) else ()
                if segments:
                    yield LogicalVolume(f"{group_name}/{name}", segments)


def _segments(volume: Section, physical: Section, extent_sectors: int) -> tuple[Segment, ...]:
    """Return the segments of a logical volume; none if it is not linear, or hidden."""
    status = volume.get("status")
    if not isinstance(status, list) or "VISIBLE" not in status:
        return ()
    segments = []
    for value in volume.values():
        if isinstance(value, dict) and "start_extent" in value:
            segment = _segment(value, physical, extent_sectors)
            if segment is None:
                return ()
            segments.append(segment)
    segments.sort(key=lambda segment: segment.start)
    end = 0
    for segment in segments:
        if segment.start != end:
            return ()
        end += segment.length
    return tuple(segments)


def _segment(value: Section, physical: Section, extent_sectors: int) -> Segment | None:
    stripes = value.get("stripes")
    if value.get("type") != "striped" or not isinstance(stripes, list) or len(stripes) != 2:
        return None
    source = physical.get(str(stripes[0]))
    if not isinstance(source, dict):
        return None
    numbers = (value.get("start_extent"), value.get("extent_count"), stripes[1], source.get("pe_start"))
    start, count, place, first_sector = (n if isinstance(n, int) and n >= 0 else -1 for n in numbers)
    if min(start, place, first_sector, extent_sectors - 1) < 0 or count <= 0:
        return None
    extent_bytes = extent_sectors * SECTOR_BYTES
    volume_id = str(source.get("id", "")).replace("-", "")
    place_bytes = first_sector * SECTOR_BYTES + place * extent_bytes
    return Segment(start * extent_bytes, count * extent_bytes, volume_id, place_bytes)
