"""LUKS, versions 1 and 2: where the encrypted part of a volume begins. What is in there is noise.

Both versions begin with the magic "LUKS" 0xba 0xbe and a version of two bytes; numbers are big-endian.
Version 1 has at byte 104 the payload's offset in sectors (4 bytes), at 108 the length of the key, at 168 the
UUID. Version 2 has a second header, whose magic is "SKUL" 0xba 0xbe::

    Byte   8 -  15:   length of the header with its JSON area
          16 -  23:   sequence number
          72 - 103:   name of the checksum's algorithm
         168 - 207:   UUID
         256 - 263:   offset of this header in the volume
         448 - 511:   checksum of header and JSON area, with zeros here
              4096:   JSON area

The JSON's segments name the payload's offset and, unless it is "dynamic", its length.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from jqcow.salvage.evidence import Certainty, GuestStructure, Orphans, PlacedDisk, Volume
from jqcow.salvage.guest.opaque import Opaque, Part
from jqcow.salvage.guest.signs import SECTOR_BYTES, Sighting, Sign, sightings

MAGIC = b"LUKS\xba\xbe"
SECOND_MAGIC = b"SKUL\xba\xbe"
VERSION_STRUCT = struct.Struct(">6sH")
FIRST_STRUCT = struct.Struct(">104xII56x40s")
FIRST_BYTES = 592
KEY_BYTES_MAX = 64
SECOND_STRUCT = struct.Struct(">8xQQ48x32s64x40s48xQ")
CHECKSUM_OFFSET, CHECKSUM_END = 448, 512
BINARY_BYTES = 4096
HEADER_BYTES_MAX = 4 << 20
ALGORITHMS = ("sha256", "sha512", "sha1")
JSON_BYTES_USUAL = 16 << 10
SIGNS = (Sign(MAGIC, 0, JSON_BYTES_USUAL), Sign(SECOND_MAGIC, 0, JSON_BYTES_USUAL))


@dataclass(frozen=True)
class LuksHeader:
    """What a header says.

    Attributes:
        version: 1 or 2.
        uuid: of the encrypted volume.
        offset: of this header in the volume, in bytes.
        header_bytes: how long it is.
        sequence: the higher, the newer.
        payload_offset: of what is encrypted, in bytes from the volume's begin.
        is_checked: a checksum covers it.
    """

    version: int
    uuid: bytes
    offset: int
    header_bytes: int
    sequence: int
    payload_offset: int
    is_checked: bool


def header_length(data: bytes) -> int:
    """Return how many bytes of a header must be read, by its first sector; 0 if it is none."""
    if len(data) < SECTOR_BYTES or data[: len(MAGIC)] not in (MAGIC, SECOND_MAGIC):
        return 0
    _, version = VERSION_STRUCT.unpack_from(data)
    if version == 1:
        return FIRST_BYTES
    length = SECOND_STRUCT.unpack_from(data)[0]
    return int(length) if version == 2 and BINARY_BYTES < length <= HEADER_BYTES_MAX else 0


def unpack(data: bytes) -> LuksHeader | None:
    """Read a header of `header_length` bytes; None if it is none, or its checksum is wrong."""
    if len(data) < FIRST_BYTES or len(data) < header_length(data):
        return None
    _, version = VERSION_STRUCT.unpack_from(data)
    if version == 1:
        sectors, key_bytes, uuid = FIRST_STRUCT.unpack_from(data)
        is_first = data.startswith(MAGIC) and 0 < key_bytes <= KEY_BYTES_MAX
        return LuksHeader(1, uuid, 0, FIRST_BYTES, 0, sectors * SECTOR_BYTES, False) if is_first else None
    length, sequence, algorithm, uuid, offset = SECOND_STRUCT.unpack_from(data)
    if not _checksum_is_right(data, algorithm.rstrip(b"\0")):
        return None
    payload_offset = _payload_offset(data[BINARY_BYTES:])
    return LuksHeader(2, uuid, offset, length, sequence, payload_offset, True)


def _checksum_is_right(data: bytes, algorithm: bytes) -> bool:
    name = algorithm.decode("ascii", "replace")
    if name not in ALGORITHMS:
        return False
    cleared = data[:CHECKSUM_OFFSET] + bytes(CHECKSUM_END - CHECKSUM_OFFSET) + data[CHECKSUM_END:]
    digest = hashlib.new(name, cleared, usedforsecurity=False).digest()
    return data[CHECKSUM_OFFSET : CHECKSUM_OFFSET + len(digest)] == digest


def _payload_offset(area: bytes) -> int:
    """Return where the first segment begins, as the JSON area says; 0 if it does not say."""
    try:
        segments = json.loads(area.rstrip(b"\0"))["segments"]
        return max(min(int(segment["offset"]) for segment in segments.values()), 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return 0


def find(volumes: list[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[GuestStructure]:
    """Yield the LUKS headers of volumes, and of those among the orphans the ones that say where they belong.

    No header says how long its volume is. So one among the orphans belongs to a volume for sure only if the
    volume's other header is on the disk.
    """
    seen = [(header, sighting) for sign in SIGNS for header, sighting in _seen(sign, orphans)]
    for volume in volumes:
        on_disk = _on_disk(volume, disk)
        if on_disk is not None:
            yield _structure(volume, on_disk, seen, volume.certainty, orphans.cluster_bytes)
    homeless = {header.uuid: header for header, _ in seen}
    if len(homeless) == 1 and len(volumes) == 1 and _on_disk(volumes[0], disk) is None:
        certainty = min(volumes[0].certainty, Certainty.LIKELY)
        header = next(iter(homeless.values()))
        yield _structure(volumes[0], header, seen, certainty, orphans.cluster_bytes)


def _seen(sign: Sign, orphans: Orphans) -> Iterator[tuple[LuksHeader, Sighting]]:
    for seen in sightings(orphans, sign):
        length = header_length(seen.read(orphans, 0, SECTOR_BYTES))
        for sighting in (seen.in_file(orphans.cluster_bytes), seen) if length else ():
            header = unpack(sighting.read(orphans, 0, length))
            if header is not None:
                yield header, sighting
                break


def _on_disk(volume: Volume, disk: PlacedDisk) -> LuksHeader | None:
    data = disk.read(volume.offset, SECTOR_BYTES)
    length = 0 if data is None else header_length(data)
    data = disk.read(volume.offset, length) if length else None
    return None if data is None else unpack(data)


def _structure(
    volume: Volume,
    known: LuksHeader,
    seen: list[tuple[LuksHeader, Sighting]],
    certainty: Certainty,
    cluster_bytes: int,
) -> GuestStructure:
    own = [pair for pair in seen if pair[0].uuid == known.uuid]
    newest = max(own, key=lambda pair: pair[0].sequence)[0] if own else known
    parts = []
    for header, sighting in own:
        place = volume.offset + header.offset
        rivals = sum(other.offset == header.offset for other, _ in own)
        if (place - sighting.start) % cluster_bytes == 0 and rivals == 1:
            sure = certainty if header.is_checked else min(certainty, Certainty.LIKELY)
            parts.append(Part(place, header.header_bytes, sighting, sure))
    if not any(part.offset == volume.offset + known.offset for part in parts):
        parts.append(Part(volume.offset + known.offset, known.header_bytes, None, certainty))
    start = newest.payload_offset or known.payload_offset
    payload = [(volume.offset + start, volume.length - start)] if 0 < start < volume.length else []
    return Opaque(f"LUKS{known.version}", volume.name, parts, payload)
