"""What changes a device in memory, and what of it a crash may lose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Write:
    """``data`` was written at ``offset``."""

    number: int
    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """The offset after the last byte written."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True)
class Punch:
    """A range was given back to the host."""

    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """The size was set."""

    number: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Allocate:
    """Host space was reserved for a range, and the device grew to its end where needed."""

    number: int
    offset: int
    length: int


Change = Write | Punch | Truncate | Allocate


class Version(NamedTuple):
    """A value that a sector had. ``change`` is the number of the change that gave it, 0 if durable."""

    change: int
    value: bytes
    is_data: bool


class Sight(NamedTuple):
    """What sectors were at one moment: bytes, as far as the buffer went, and which of them held data."""

    content: bytes
    data_sectors: set[int]


class Noted(NamedTuple):
    """A change of sectors, by its number, that is in no history yet."""

    number: int
    sectors: range
    before: Sight
    after: Sight


@dataclass(frozen=True)
class InFlight:
    """All that a crash at this moment may or may not leave behind: a snapshot, safe to keep.

    ``durable`` is the old content, padded with zeros past every touched sector. ``sizes`` pairs change
    numbers with sizes in bytes, the durable one first. ``histories`` and ``data_sectors`` are keyed by
    sector index; a sector in ``data_sectors`` holds data now.
    """

    sector_bytes: int
    durable: bytes
    sizes: tuple[tuple[int, int], ...]
    changes: tuple[Change, ...]
    histories: dict[int, tuple[Version, ...]]
    data_sectors: frozenset[int]
