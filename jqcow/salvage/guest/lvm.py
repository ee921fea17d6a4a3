"""LVM2: which parts of the disk its logical volumes are, where these are linear.

LV1. A label among the orphans belongs to a volume for sure only if it gives that volume's length, as
    partition tables must agree with the disk (PT1). The text is taken only with its checksum right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jqcow.salvage.evidence import Certainty, Orphans, PlacedDisk, Volume
from jqcow.salvage.guest.lvm_layout import (
    LABEL_MAGIC,
    LABEL_SECTORS,
    METADATA_MAGIC,
    METADATA_MAGIC_OFFSET,
    SECTOR_BYTES,
    Label,
    LogicalVolume,
    MetadataArea,
    checksum,
    logical_volumes,
)
from jqcow.salvage.guest.opaque import Opaque, Part
from jqcow.salvage.guest.signs import Sighting, Sign, sightings, windows

LABEL_SIGN = Sign(LABEL_MAGIC, 0, SECTOR_BYTES)
AREA_SIGN = Sign(METADATA_MAGIC, METADATA_MAGIC_OFFSET, SECTOR_BYTES)
SIGNS = (LABEL_SIGN, AREA_SIGN)
VOLUMES_MAX = 1 << 10
TEXT_SIGN = b' {\nid = "'
NAME_BYTES_MAX = 128


@dataclass(frozen=True)
class Segment:
    """A part of a logical volume: where it begins there, where on the guest's disk, and how long it is."""

    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Assembled:
    """A logical volume on the guest's disk.

    Attributes:
        name: of the group and of it.
        segments: in ascending order.
        certainty: how surely it is there.
    """

    name: str
    segments: tuple[Segment, ...]
    certainty: Certainty


class PhysicalVolumes(Opaque):
    """The physical volumes of a disk.

    Attributes:
        logical: what they make up, as far as all of it is on this disk.
        bases: the volumes that they are.
    """

    def __init__(self, parts: list[Part], logical: list[Assembled], bases: list[Volume]) -> None:
        super().__init__("LVM", ", ".join(volume.name for volume in bases), parts, [])
        self.logical = logical
        self.bases = bases


@dataclass(frozen=True)
class _Labelled:
    """A volume with its label."""

    volume: Volume
    label: Label
    part: Part


def find(volumes: list[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[PhysicalVolumes]:
    """Yield the physical volumes among some volumes, all in one; nothing if there are none."""
    labelled = [found for volume in volumes if (found := _label(volume, disk, orphans)) is not None]
    if not labelled:
        return
    parts = [found.part for found in labelled]
    texts: list[tuple[str, Certainty]] = []
    for found in labelled:
        for start, _ in found.label.metadata_areas:
            area_part, text_parts, text = _area(found, start, disk, orphans)
            parts += [*area_part, *text_parts]
            if text:
                texts.append((text, found.volume.certainty))
    bases = {found.label.id: found.volume for found in labelled}
    yield PhysicalVolumes(parts, list(_assembled(texts, bases)), [found.volume for found in labelled])


def _label(volume: Volume, disk: PlacedDisk, orphans: Orphans) -> _Labelled | None:
    for sector in range(LABEL_SECTORS):
        place = volume.offset + sector * SECTOR_BYTES
        data = disk.read(place, SECTOR_BYTES)
        label = None if data is None else Label.unpack(data)
        if label is not None and label.sector == sector:
            return _Labelled(volume, label, Part(place, SECTOR_BYTES, None, volume.certainty))
    found: list[_Labelled] = []
    for sighting in sightings(orphans, LABEL_SIGN):
        label = Label.unpack(sighting.read(orphans, 0, SECTOR_BYTES))
        if label is None or not 0 <= volume.length - label.device_bytes < SECTOR_BYTES:
            continue
        place = volume.offset + label.sector * SECTOR_BYTES
        if (place - sighting.start) % orphans.cluster_bytes == 0:
            found.append(_Labelled(volume, label, Part(place, SECTOR_BYTES, sighting, volume.certainty)))
    return found[0] if len(found) == 1 else None


def _area(
    found: _Labelled, start: int, disk: PlacedDisk, orphans: Orphans
) -> tuple[list[Part], list[Part], str]:
    """Return the begin of a metadata area, the parts of its text, and the text."""
    volume = found.volume
    place = volume.offset + start
    data = disk.read(place, SECTOR_BYTES)
    area = None if data is None else MetadataArea.unpack(data)
    part = Part(place, SECTOR_BYTES, None, volume.certainty)
    if area is None and data is None:
        seen = [
            (candidate, sighting)
            for sighting in sightings(orphans, AREA_SIGN)
            if (place - sighting.start) % orphans.cluster_bytes == 0
            and (candidate := MetadataArea.unpack(sighting.read(orphans, 0, SECTOR_BYTES))) is not None
            and candidate.start == start
        ]
        if len(seen) != 1:
            return [], [], ""
        area, sighting = seen[0]
        part = Part(place, SECTOR_BYTES, sighting, volume.certainty)
    if area is None or area.start != start:
        return [], [], ""
    text = _text_on_disk(area, volume, disk)
    if text:
        return [part], [], text
    text_parts, text = _text_among(area, volume, orphans)
    return [part], text_parts, text


def _text_on_disk(area: MetadataArea, volume: Volume, disk: PlacedDisk) -> str:
    pieces = [disk.read(volume.offset + offset, length) for offset, length in area.text_ranges()]
    text = b"".join(piece for piece in pieces if piece is not None)
    return _decoded(text) if _is_text(area, text) else ""


def _text_among(area: MetadataArea, volume: Volume, orphans: Orphans) -> tuple[list[Part], str]:
    """Return where the text of an area is, and the text, by a pass of its own; not if it goes round."""
    ranges = area.text_ranges()
    place = volume.offset + ranges[0][0]
    start = place % orphans.cluster_bytes
    for clusters, contents in windows(orphans, area.text_length) if len(ranges) == 1 else ():
        head = contents[0][start : start + NAME_BYTES_MAX + len(TEXT_SIGN)]
        if TEXT_SIGN not in head:
            continue
        count = -(-(start + area.text_length) // orphans.cluster_bytes)
        text = b"".join(contents[:count])[start : start + area.text_length]
        if _is_text(area, text):
            sighting = Sighting(clusters[:count], start)
            return [Part(place, area.text_length, sighting, volume.certainty)], _decoded(text)
    return [], ""


def _is_text(area: MetadataArea, text: bytes) -> bool:
    return len(text) == area.text_length and checksum(text) == area.text_checksum


def _decoded(text: bytes) -> str:
    return text.rstrip(b"\0").decode("utf-8", "replace")


def _assembled(texts: list[tuple[str, Certainty]], bases: dict[str, Volume]) -> Iterator[Assembled]:
    """Yield the logical volumes whose segments are all on this disk, each once."""
    seen: set[str] = set()
    for text, certainty in texts:
        try:
            logical = list(logical_volumes(text))
        except ValueError:
            continue
        for volume in logical:
            segments = _on_bases(volume, bases)
            if segments and volume.name not in seen and len(seen) < VOLUMES_MAX:
                seen.add(volume.name)
                limits = [bases[segment.volume_id].certainty for segment in volume.segments]
                yield Assembled(volume.name, _merged(segments), min(certainty, *limits))


def _on_bases(volume: LogicalVolume, bases: dict[str, Volume]) -> list[Segment]:
    segments = []
    for segment in volume.segments:
        base = bases.get(segment.volume_id)
        if base is None or segment.place + segment.length > base.length:
            return []
        segments.append(Segment(segment.start, base.offset + segment.place, segment.length))
    return segments


def _merged(segments: list[Segment]) -> tuple[Segment, ...]:
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        if last is not None and last.offset + last.length == segment.offset:
            merged[-1] = Segment(last.start, last.offset, last.length + segment.length)
        else:
            merged.append(segment)
    return tuple(merged)
