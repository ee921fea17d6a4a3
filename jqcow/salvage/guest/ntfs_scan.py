"""What orphans show of an NTFS volume, in one pass over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jqcow.salvage.evidence import Orphans
from jqcow.salvage.guest.claims import Window, windows
from jqcow.salvage.guest.ntfs_ondisk import ATTRIBUTE_DATA, ATTRIBUTE_LIST, Boot, IndexBuffer, Record

_SNAPSHOT_STORE = bytes.fromhex("6b87083876c1484eb7ae04046e6cc752")
"""Starts each block of a store of volume snapshots: copies of what the volume had before."""


@dataclass(frozen=True)
class Segment:
    """Records of the MFT in an orphan, one behind the other with ascending numbers.

    Attributes:
        host_offset: of the first in the file.
        number: of the first.
        count: of records.
        lsn: the highest of them.
        facts: what they say of their volume, see `Boot.facts`.
        relatives: of one alone, the references of its directories, or of the record that it belongs to.
    """

    host_offset: int
    number: int
    count: int
    lsn: int
    relatives: frozenset[int]
    facts: frozenset[tuple[int, int]]

    def fits(self, boot: Boot) -> bool:
        """Return whether its records say of their volume what is so of that one."""
        return all(boot.facts[number] == value for number, value in self.facts)


@dataclass
class Scan:
    """What was seen.

    Attributes:
        segments: of records.
        buffers: of directories, with their offsets in the file.
        boot_offsets: of copies of the volume's own boot sector in the file.
        boots: boot sectors of whatever volumes.
        cleared: the offsets of orphans whose bits are all set, as a log is cleared.
        has_snapshots: whether a store of volume snapshots was seen.
    """

    segments: list[Segment] = field(default_factory=list)
    buffers: list[tuple[int, IndexBuffer]] = field(default_factory=list)
    boot_offsets: list[int] = field(default_factory=list)
    boots: set[Boot] = field(default_factory=set)
    cleared: list[int] = field(default_factory=list)
    has_snapshots: bool = False

    def hosts_of(self, number: int, boot: Boot) -> list[int]:
        """Return the offsets in the file of the records of a number that may be a volume's."""
        return [
            segment.host_offset + (number - segment.number) * boot.record_bytes
            for segment in self.segments
            if segment.number <= number < segment.number + segment.count and segment.fits(boot)
        ]


def boots_in(content: bytes) -> Iterator[tuple[int, Boot]]:
    """Yield the boot sectors in a cluster, and where in it they are."""
    at = content.find(Boot.MAGIC)
    while at >= 0:
        start = at - 3
        if start >= 0 and start % 512 == 0 and (boot := Boot.unpack(content[start : start + 512])):
            yield start, boot
        at = content.find(Boot.MAGIC, at + 1)


def scanned(orphans: Orphans, start: int, boot: Boot) -> Scan:
    """Look through the orphans for what a volume that starts there has."""
    scan = Scan()
    for window in windows(orphans, max(boot.record_bytes, boot.index_bytes)):
        content = window.content
        for at, other in boots_in(content):
            scan.boots.add(other)
            if other == boot:
                scan.boot_offsets.append(window.host_offset + at)
        if Record.MAGIC in content:
            scan.segments += _segments(window, start, boot)
        if IndexBuffer.MAGIC in content:
            step = min(boot.cluster_bytes, boot.index_bytes)
            for at in _places(window, IndexBuffer.MAGIC, start, step):
                data = window.read(at, boot.index_bytes)
                if data and (buffer := IndexBuffer.unpack(data)):
                    scan.buffers.append((window.host_offset + at, buffer))
        if content.count(0xFF) == len(content):
            scan.cleared.append(window.host_offset)
        scan.has_snapshots = scan.has_snapshots or _SNAPSHOT_STORE in content
    return scan


def _places(window: Window, magic: bytes, start: int, step: int) -> Iterator[int]:
    """Yield where in a cluster a structure with a magic can start, if the volume starts there."""
    first = start % step if len(window.content) >= step else 0
    for at in range(first, len(window.content), step):
        if window.content.startswith(magic, at):
            yield at


def _segments(window: Window, start: int, boot: Boot) -> list[Segment]:
    segments: list[Segment] = []
    for at in _places(window, Record.MAGIC, start, boot.record_bytes):
        data = window.read(at, boot.record_bytes)
        record = Record.unpack(data, boot) if data else None
        if record is None or not _knows_its_number(record):
            continue
        host_offset = window.host_offset + at
        facts = frozenset() if (fact := record.fact) is None else frozenset({(record.number, fact)})
        last = segments[-1] if segments else None
        if (
            last is not None
            and last.number + last.count == record.number
            and last.host_offset + last.count * boot.record_bytes == host_offset
        ):
            segments[-1] = Segment(
                last.host_offset, last.number, last.count + 1, max(last.lsn, record.lsn), frozenset(),
                last.facts | facts,
            )  # fmt: skip
        else:
            relatives = frozenset({record.base} if record.base else record.parents)
            segments.append(Segment(host_offset, record.number, 1, record.lsn, relatives, facts))
    return segments


def _knows_its_number(record: Record) -> bool:
    """Return False for a spare record as mkntfs makes it: it has the number of the MFT's own."""
    return record.number > 0 or any(
        attribute.type in (ATTRIBUTE_DATA, ATTRIBUTE_LIST) for attribute in record.attributes
    )
