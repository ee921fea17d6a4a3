"""The MFT of a volume as the placed disk has it."""

from __future__ import annotations

from dataclasses import dataclass

from jqcow.salvage.evidence import PlacedDisk
from jqcow.salvage.guest.ntfs_ondisk import (
    ATTRIBUTE_DATA,
    ATTRIBUTE_LIST,
    RECORD_IN_USE,
    Attribute,
    Boot,
    Record,
    Run,
    Runs,
    listed_records,
)

MFT_NUMBER = 0
NUMBER_MASK = (1 << 48) - 1
_LIST_BYTES_MAX = 256 << 10
_LISTS_BYTES_MAX = 64 << 20
"""Of all attribute lists together: many records may name one long list."""
_CACHED_MAX = 1 << 16


def placed_first(disk: PlacedDisk, start: int, boot: Boot) -> Record | None:
    """Return the MFT's own record, if it is placed and is where the boot sector says."""
    data = disk.read(start + boot.mft_cluster * boot.cluster_bytes, boot.record_bytes)
    record = Record.unpack(data, boot) if data else None
    return record if record and record.number == MFT_NUMBER else None


@dataclass(frozen=True)
class Layout:
    """Where the MFT is: its runs, and how many bytes of them have records."""

    runs: tuple[Run, ...]
    initialized_size: int


def layout_of(first: Record, extensions: list[Record]) -> Layout | None:
    """Join the runs of the MFT from its records, as far as they go on without a gap."""
    parts = [
        attribute
        for record in (first, *extensions)
        for attribute in record.attributes
        if attribute.type == ATTRIBUTE_DATA and not attribute.name and attribute.runs
    ]
    parts.sort(key=lambda attribute: attribute.first)
    runs: list[Run] = []
    for part in parts:
        if part.first != (runs[-1].first + runs[-1].count if runs else 0):
            break
        runs += part.runs or ()
    return Layout(tuple(runs), parts[0].initialized_size) if runs else None


@dataclass(frozen=True)
class Stream:
    """An attribute of a file that is not resident, from all records that have a part of it."""

    type: int
    name: bytes
    is_compressed: bool
    runs: Runs
    size: int
    initialized_size: int


class Mft:
    """The MFT of a volume, as far as the disk has it."""

    def __init__(self, disk: PlacedDisk, start: int, boot: Boot, layout: Layout) -> None:
        self._disk = disk
        self._start = start
        self._boot = boot
        self._cache: dict[int, Record | None] = {}
        self._list_bytes_left = _LISTS_BYTES_MAX
        self.runs = Runs(list(layout.runs), boot.cluster_bytes)
        self.record_count = layout.initialized_size // boot.record_bytes

    def read(self, runs: Runs, offset: int, length: int) -> bytes | None:
        """Return bytes of an attribute."""
        parts: list[bytes] = []
        while length > 0:
            if (found := runs.locate(offset)) is None:
                return None
            where, following = found
            part = self._disk.read(self._start + where, min(length, following))
            if part is None:
                return None
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def has(self, runs: Runs, length: int) -> bool:
        """Return whether so many bytes of an attribute can all be read."""
        steps = range(0, length, self._boot.cluster_bytes)
        return all(self.read(runs, offset, min(512, length - offset)) is not None for offset in steps)

    def record(self, number: int) -> Record | None:
        """Return a record that is in its place."""
        if number not in self._cache:
            if len(self._cache) >= _CACHED_MAX:
                self._cache.clear()
            record_bytes = self._boot.record_bytes
            data = self.read(self.runs, number * record_bytes, record_bytes)
            record = Record.unpack(data, self._boot) if data else None
            self._cache[number] = record if record and record.number == number else None
        return self._cache[number]

    def is_empty(self, number: int) -> bool:
        """Return whether a record's place was never used."""
        head = self.read(self.runs, number * self._boot.record_bytes, 4)
        return head is not None and head not in (Record.MAGIC, b"BAAD")

    def referred(self, reference: int) -> Record | None:
        """Return the record that a reference names, if it is still used as it was then."""
        record = self.record(reference & NUMBER_MASK)
        return record if record and record.flags & RECORD_IN_USE and record.reference == reference else None

    def streams(self, base: Record) -> list[Stream]:
        """Return what a file has outside of its records."""
        parts: dict[tuple[int, bytes], list[Attribute]] = {}
        for record in [base, *self.extensions(base)]:
            for attribute in record.attributes:
                if attribute.runs is not None:
                    parts.setdefault((attribute.type, attribute.name), []).append(attribute)
        return [_joined(attributes, self._boot.cluster_bytes) for attributes in parts.values()]

    def extensions(self, base: Record) -> list[Record]:
        """Return the other records of a file."""
        found: dict[int, Record] = {}
        for attribute in base.attributes:
            if attribute.type != ATTRIBUTE_LIST:
                continue
            value = attribute.value
            if (
                value is None
                and attribute.runs
                and attribute.size <= min(_LIST_BYTES_MAX, self._list_bytes_left)
            ):
                self._list_bytes_left -= attribute.size
                value = self.read(Runs(attribute.runs, self._boot.cluster_bytes), 0, attribute.size)
            for reference in listed_records(value or b""):
                record = self.referred(reference)
                if record is not None and record.base == base.reference:
                    found[record.number] = record
        return list(found.values())


def _joined(attributes: list[Attribute], cluster_bytes: int) -> Stream:
    attributes.sort(key=lambda attribute: attribute.first)
    first = attributes[0]
    runs = [run for attribute in attributes for run in attribute.runs or ()]
    knows_size = first.first == 0
    return Stream(
        first.type, first.name, first.is_compressed, Runs(runs, cluster_bytes),
        first.size if knows_size else 0, first.initialized_size if knows_size else 0,
    )  # fmt: skip
