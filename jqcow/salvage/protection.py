"""The sums that `jqcow protect` left in a damaged file (docs/format, "Protection").

The bitmap directory leads to them where the header names it. Else they are looked for: a directory tells
itself by the names in it, a block of the record by its magic and checksum, and a cluster of sums by the
checksum that the record has of it.

PS1. Sums are current only if it is known which units were written since: a directory names jqcow-changed, it
    is not in use, and no journal is left that may know more. Else what they say is at most LIKELY.
PS2. A cluster of sums counts if the record has its checksum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jqcow import _native
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk import bitmaps as ondisk
from jqcow.ondisk import entries, layout
from jqcow.ondisk.bitmaps import BitmapEntry
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.frame import FRAME_MAGIC
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import Geometry
from jqcow.ondisk.protection import (
    BLOCK_BYTES,
    CHANGED,
    IN_DOUBT,
    MAGIC,
    NAMES,
    RECORD,
    SUM_BYTES,
    SUMS,
    Record,
    RecordBlock,
    Units,
    fault_of,
    unpack_sums,
    zeros_crc,
)
from jqcow.salvage.evidence import BlockSum, Certainty, Orphans
from jqcow.salvage.source import Source

MAX_DIRECTORIES = 1024
MAX_BLOCKS = 1 << 16
"""So many directories and blocks of records are looked at, in files that were made to have more."""
LOST, ZEROS, ONES = -1, 0, 1
"""In the place of a host offset, which is more than these."""
_CHANGED_NAME = CHANGED.encode()


@dataclass
class Protection:
    """Sums of what a disk held, and what was written since.

    Attributes:
        units: how the disk was divided.
        certainty: how surely what has a sum belongs where that is: see PS1.
        clusters: the host offset of each cluster of sums that counts, by its index.
        structures: the host clusters that the protection takes, as far as they are known.
    """

    source: Source
    geometry: Geometry
    units: Units
    certainty: Certainty
    clusters: dict[int, int]
    structures: set[int] = field(default_factory=set)
    _changed: bytes = b""

    def sums(self) -> Iterator[BlockSum]:
        """Yield the sums of units that were not written since; of zeros there are none."""
        units, zeros = self.units, zeros_crc(self.units.unit_bytes)
        for index in sorted(self.clusters):
            first, end = units.sums_of_cluster(index)
            stored = unpack_sums(self.source.pread((end - first) * SUM_BYTES, self.clusters[index]))
            for unit, value in enumerate(stored, first):
                if value and not self.is_changed(unit):
                    yield BlockSum(unit << units.bits, units.unit_bytes, value ^ zeros)

    def is_changed(self, unit: int) -> bool:
        """Return True if a unit is known to have been written since its sum was made."""
        return unit >> 3 < len(self._changed) and bool(self._changed[unit >> 3] >> (unit & 7) & 1)


@dataclass(frozen=True)
class _Found:
    """A directory that names a protection: its bitmaps, and its record."""

    entries: dict[str, BitmapEntry]
    tables: dict[str, tuple[int, ...]]
    record: Record


def find_protection(source: Source, area: HeaderArea, orphans: Orphans) -> Protection | None:
    """Find the sums of a file's disk, None if there are none to be found.

    Args:
        source: the file.
        area: its header, or what was inferred of it.
        orphans: the clusters that no table names; what the header does not lead to is among them.

    Raises:
        OSError: the host failed.
    """
    geometry = area.header.geometry
    named = _named_by_header(source, area)
    if named is not None:
        return _protection(source, geometry, [named], Certainty.CERTAIN)
    scan = _Scan(source, geometry)
    for host, content in orphans:
        scan.look(host, content)
    return scan.result(orphans)


def _named_by_header(source: Source, area: HeaderArea) -> _Found | None:
    directory = ondisk.read_directory(source.pread, area, without_broken=True)
    return _read(source, area.header.geometry, {entry.text: entry for entry in directory.entries})


def _read(source: Source, geometry: Geometry, named: dict[str, BitmapEntry]) -> _Found | None:
    """Return the protection that entries of a directory name, None if they name none that is whole."""
    if any(name not in named for name in NAMES):
        return None
    tables = {name: _table(source, geometry, named[name]) for name in NAMES}
    payload = b"".join(
        source.pread(geometry.cluster_bytes, place) for place in tables[RECORD] if place > ONES
    )
    try:
        record = Record.unpack(payload[: MAX_BLOCKS * BLOCK_BYTES], geometry.cluster_bits)
    except UnsupportedFeatureError:
        return None
    return None if record is None else _Found({name: named[name] for name in NAMES}, tables, record)


def _table(source: Source, geometry: Geometry, entry: BitmapEntry) -> tuple[int, ...]:
    """Return the host offset of each cluster of a bitmap; or ZEROS, ONES, or LOST, where nobody knows."""
    count = min(entry.table_entries, ondisk.MAX_BITMAP_BYTES // geometry.cluster_bytes)
    if entry.table_offset % geometry.cluster_bytes or not 0 < entry.table_offset < source.size():
        return ()
    table, places = source.pread(layout.table_bytes(count), entry.table_offset), [ZEROS] * count
    if source.bad.overlaps(entry.table_offset, len(table)):
        return (LOST,) * count
    for index, value in entries.nonzero_entries(table):
        try:
            offset, all_ones = entries.decode_bitmap_table(value, geometry)
        except DamagedEntry:
            places[index] = LOST
            continue
        places[index] = ONES if all_ones else offset if offset < source.size() else LOST
    return tuple(places)


class _Scan:
    """What tells itself in clusters that nobody names."""

    def __init__(self, source: Source, geometry: Geometry) -> None:
        self._source, self._geometry = source, geometry
        self._blocks: list[RecordBlock] = []
        self._directories: list[dict[str, BitmapEntry]] = []
        self._has_frames = False

    def look(self, host: int, content: bytes) -> None:
        """Look at a cluster."""
        self._has_frames = self._has_frames or content.startswith(FRAME_MAGIC)
        at = content.find(MAGIC)
        while at >= 0 and len(self._blocks) < MAX_BLOCKS:
            if at % BLOCK_BYTES == 0:
                self._take_block(content[at : at + BLOCK_BYTES])
            at = content.find(MAGIC, at + 1)
        if _CHANGED_NAME in content and len(self._directories) < MAX_DIRECTORIES:
            named = {entry.text: entry for entry in _directory_at(self._source, host)}
            if all(name in named for name in NAMES):
                self._directories.append(named)

    def _take_block(self, data: bytes) -> None:
        try:
            block = RecordBlock.unpack(data)
        except UnsupportedFeatureError:
            return
        if block is not None and block.cluster_bits == self._geometry.cluster_bits:
            self._blocks.append(block)

    def result(self, orphans: Orphans) -> Protection | None:
        """Return the newest protection that was found."""
        read = (_read(self._source, self._geometry, named) for named in self._directories)
        found = [one for one in read if one is not None]
        alone = Record.of_blocks(self._blocks, self._geometry.cluster_bits)
        newest = max((one.record.stamp for one in found), default=0)
        if alone is not None and alone.stamp > newest:
            return self._without_directory(alone, orphans)
        if not found:
            return None
        found = [one for one in found if one.record.stamp == newest]
        usable = [one for one in found if _is_usable(one) and not _is_outdated(one, found)]
        certainty = Certainty.CERTAIN if usable and not self._has_frames else Certainty.LIKELY
        return _protection(self._source, self._geometry, usable or found, certainty)

    def _without_directory(self, record: Record, orphans: Orphans) -> Protection | None:
        """Find the clusters of sums by the checksums that the record has of them."""
        lengths: dict[int, dict[int, int]] = {}
        for index, check in enumerate(record.checks):
            first, end = record.units.sums_of_cluster(index)
            if check is not None:
                lengths.setdefault((end - first) * SUM_BYTES, {})[check] = index
        clusters: dict[int, int] = {}
        for host, content in orphans:
            for length, checks in lengths.items():
                found = checks.get(_native.crc32c(content[:length]))
                if found is not None:
                    clusters[found] = host
        if not clusters:
            return None
        structures = set(clusters.values())
        return Protection(self._source, self._geometry, record.units, Certainty.LIKELY, clusters, structures)


def _directory_at(source: Source, host: int) -> Iterator[BitmapEntry]:
    """Yield the entries of the directory that begins at a host offset, as far as they can be entries."""
    directory = source.pread(MAX_DIRECTORY_BYTES, host)
    position = 0
    for _ in range(MAX_ENTRIES):
        name_start = position + ondisk.ENTRY_STRUCT.size
        if name_start > len(directory):
            return
        table, count, flags, kind, bits, name_bytes, extra_bytes = ondisk.ENTRY_STRUCT.unpack_from(
            directory, position
        )
        name_start += extra_bytes
        name = directory[name_start : name_start + name_bytes]
        if not 0 < name_bytes <= ondisk.MAX_NAME_BYTES or len(name) < name_bytes or bits > 63:
            return
        yield BitmapEntry(table, count, flags, kind, bits, name)
        position = layout.round_up(name_start + name_bytes, ondisk.ALIGNMENT_BYTES)


MAX_DIRECTORY_BYTES, MAX_ENTRIES = 1 << 16, 1024
"""So much of a directory that no header names is read."""


def _is_usable(found: _Found) -> bool:
    """Return True if no program was at work when the directory was written."""
    return not fault_of(found.entries, found.record.units)


def _is_outdated(one: _Found, others: Iterable[_Found]) -> bool:
    """Return True if another directory tells that a program was at work with the same bitmaps later.

    QEMU marks the directory that it opens, and writes all anew where nothing was when it closes. So a mark on
    the same table is older, if all else is the same; else jqcow wrote that directory behind this one.
    """
    table = one.entries[CHANGED].table_offset
    return any(
        other.entries[CHANGED].is_in_use
        and other.entries[CHANGED].table_offset == table
        and any(other.entries[name].table_offset != one.entries[name].table_offset for name in NAMES)
        for other in others
    )


def _protection(
    source: Source, geometry: Geometry, found: list[_Found], certainty: Certainty
) -> Protection | None:
    """Put together what directories with one record name; a unit counts as changed if one of them says so."""
    record = found[0].record
    units, clusters, structures, changed = record.units, dict[int, int](), set[int](), b""
    for one in found:
        for name in NAMES:
            tables = geometry.clusters(layout.table_bytes(one.entries[name].table_entries))
            start = one.entries[name].table_offset
            structures.update(range(start, start + tables * geometry.cluster_bytes, geometry.cluster_bytes))
            structures.update(place for place in one.tables[name] if place > ONES)
        clusters |= _sound_clusters(source, one, record)
        if not _is_usable(one):
            certainty = min(certainty, Certainty.LIKELY)
        bits, is_damaged = _bits(source, geometry, one.tables[CHANGED], units.count + 7 >> 3)
        if is_damaged:
            certainty = min(certainty, Certainty.LIKELY)
        joined = int.from_bytes(bits, "little") | int.from_bytes(changed, "little")
        changed = joined.to_bytes(units.count + 7 >> 3, "little")
    if not clusters:
        return None
    return Protection(source, geometry, units, certainty, clusters, structures, changed)


def _sound_clusters(source: Source, one: _Found, record: Record) -> dict[int, int]:
    """Return the clusters of sums that are what the record says (PS2)."""
    clusters = {}
    for index, place in enumerate(one.tables[SUMS][: len(record.checks)]):
        first, end = record.units.sums_of_cluster(index)
        check = record.checks[index]
        if place > ONES and check in _checks_of(source.pread((end - first) * SUM_BYTES, place)):
            clusters[index] = place
    return clusters


def _checks_of(sums: bytes) -> tuple[int, int]:
    """Return what the record may say of a cluster of sums: one in doubt gives no wrong places."""
    check = _native.crc32c(sums)
    return check, check ^ IN_DOUBT


def _bits(source: Source, geometry: Geometry, table: tuple[int, ...], length: int) -> tuple[bytes, bool]:
    """Return the bits of a bitmap, and if some of them are lost.

    Nobody leaves a cluster of them in which all are clear, so one of zeros was damaged.
    """
    parts, is_damaged = [], len(table) < geometry.clusters(length)
    for place in table[: geometry.clusters(length)]:
        if place > ONES:
            parts.append(source.pread(geometry.cluster_bytes, place))
            is_damaged = is_damaged or _native.is_zero(parts[-1])
            is_damaged = is_damaged or source.bad.overlaps(place, geometry.cluster_bytes)
        else:
            parts.append((b"\0" if place == ZEROS else b"\xff") * geometry.cluster_bytes)
            is_damaged = is_damaged or place == LOST
    return b"".join(parts)[:length].ljust(length, b"\xff"), is_damaged
