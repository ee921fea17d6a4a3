"""NTFS: records of the MFT say their number, the MFT's runs say where each number lies.

NT1. No checksum covers anything: a cluster is certain only by several facts that agree. For records: numbers
    that the MFT's runs give their places, and nobody else who claims the place; and two or more of them in
    the cluster, or one that fills it, or one whose directories are placed and used as it says. For a
    directory's buffer: all its entries name one directory, whose placed record has that buffer in its runs,
    and the placed record of every entry names the directory.
NT2. Where the orphans show copies of records, by a store of volume snapshots or a second layout of the MFT,
    records are at most likely. Where they show a second volume, or an image of one in a file, only those are
    certain that it cannot have: with a number past its MFT, or beside a record that tells of its volume what
    is not so of the other.
NT3. Where the volume starts is certain only as `starts` says.

The log tells nothing here: records of other structures lie in it without their own head, and not where a
sector starts. Where it was cleared, one of its clusters is like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from jqcow.salvage.evidence import (
    Certainty,
    FilePiece,
    Orphans,
    PlacedDisk,
    Placement,
    Volume,
)
from jqcow.salvage.guest.filesystem import FileSystem
from jqcow.salvage.guest.ntfs_mft import Mft, Stream, layout_of, placed_first
from jqcow.salvage.guest.ntfs_ondisk import ATTRIBUTE_DATA, RECORD_IN_USE, Boot, Record, Runs
from jqcow.salvage.guest.ntfs_places import Evidence
from jqcow.salvage.guest.ntfs_scan import Scan, boots_in, scanned
from jqcow.salvage.guest.starts import Found, Seen, Start, compatible, room, start_of

_LOG, _BITMAP = 2, 6
_USER_RECORDS = 24
"""Records below are the file system's own."""
_SPARE_RECORDS = range(16, _USER_RECORDS)
_MISSING_MAX = 1 << 20
"""After as many records in a row that are none, no more are looked for."""
_BITS_ALIKE = re.compile(rb"\x00+|[\x01-\xfe]", re.DOTALL)


class Ntfs(FileSystem):
    """An NTFS volume on the guest's disk."""

    kind = "NTFS"

    def __init__(self, start: int, boot: Boot, certainty: Certainty, place: str) -> None:
        super().__init__(start, boot.length, certainty, place)
        self._boot = boot
        self._scan: Scan | None = None
        self._cleared: list[Placement] = []

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield boot sectors and records of the MFT, and the directories of those that are placed."""
        if self._scan is None:
            self._scan = scanned(orphans, self.start, self._boot)
        evidence = Evidence(disk, orphans, self.start, self._boot, self._scan)
        layouts = evidence.layouts()
        evidence.claim_boots()
        if layouts:
            evidence.claim_records(layouts[0])
            evidence.claim_buffers(layouts[0])
        is_single = len(layouts) == 1 and not self._scan.has_snapshots
        at_most = Certainty.CERTAIN if is_single else Certainty.LIKELY
        yield from evidence.claims.placements(disk, min(at_most, self._certainty))
        if not self._cleared:
            self._cleared = list(self._cleared_log(disk, self._scan.cleared, orphans.cluster_bytes))
        yield from self._cleared

    def _cleared_log(self, disk: PlacedDisk, hosts: list[int], cluster_bytes: int) -> Iterator[Placement]:
        """Yield a place in the log for clusters whose bits are all set, in the order of the file."""
        mft = self._placed_mft(disk) if hosts else None
        record = mft.record(_LOG) if mft else None
        streams = mft.streams(record) if mft and record else []
        places = (
            place
            for stream in streams
            for run in stream.runs.runs
            if stream.type == ATTRIBUTE_DATA and run.cluster is not None
            for place in self._whole(run.cluster, run.count, cluster_bytes)
            if place + cluster_bytes <= disk.size and disk.read(place, 1) is None
        )
        for host, place in zip(hosts, places, strict=False):
            yield Placement(place, host, cluster_bytes, Certainty.LIKELY, f"{self.kind} log, cleared")

    def _whole(self, cluster: int, count: int, cluster_bytes: int) -> range:
        """Return where clusters of the image begin that lie as a whole in a run."""
        start = self.start + cluster * self._boot.cluster_bytes
        first = -(-start // cluster_bytes) * cluster_bytes
        return range(first, start + count * self._boot.cluster_bytes - cluster_bytes + 1, cluster_bytes)

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what files have outside of their records, as far as it was ever written.

        What lies behind the initialized size was not; of a compressed file all clusters count as valid.
        """
        if (mft := self._placed_mft(disk)) is None:
            return
        for record in self._records(mft):
            if record.flags & RECORD_IN_USE and not record.base:
                for stream in mft.streams(record):
                    yield from self._of_stream(record, stream)

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what records have that are not in use: NTFS leaves them as they were."""
        if (mft := self._placed_mft(disk)) is None:
            return
        for record in self._records(mft):
            if not record.flags & RECORD_IN_USE and not record.base:
                for stream in mft.streams(record):
                    yield from self._of_stream(record, stream)

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        """Yield what the bitmap says is free; where it is not placed, what no record has, if all are."""
        mft = self._placed_mft(disk)
        record = mft.record(_BITMAP) if mft else None
        if mft is None or record is None:
            return
        bitmap = [stream.runs for stream in mft.streams(record) if stream.type == ATTRIBUTE_DATA]
        bitmap_bytes = -(-self._boot.cluster_count // 8)
        if bitmap and mft.has(bitmap[0], bitmap_bytes):
            yield from self._clear(mft, bitmap[0], bitmap_bytes)
        elif (used := self._used(mft)) is not None:
            yield from self._between(used)
        elif bitmap:
            yield from self._clear(mft, bitmap[0], bitmap_bytes)

    def _clear(self, mft: Mft, runs: Runs, bitmap_bytes: int) -> Iterator[tuple[int, int]]:
        missing = 0
        for offset in range(0, bitmap_bytes, self._boot.cluster_bytes):
            bits = mft.read(runs, offset, self._boot.cluster_bytes)
            missing = 0 if bits else missing + 1
            if missing > _MISSING_MAX:
                return
            yield from self._unset(bits or b"", offset * 8)

    def _used(self, mft: Mft) -> list[tuple[int, int]] | None:
        """Return clusters (first, count) that records have; None if one is missing."""
        used: list[tuple[int, int]] = []
        for number in range(mft.record_count):
            record = mft.record(number)
            if record is None and not mft.is_empty(number) and number not in _SPARE_RECORDS:
                return None
            if record and record.flags & RECORD_IN_USE and not record.base:
                runs = [run for stream in mft.streams(record) for run in stream.runs.runs]
                used += [(run.cluster, run.count) for run in runs if run.cluster is not None]
        return sorted(used)

    def _between(self, used: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        cluster_bytes, at = self._boot.cluster_bytes, 0
        for cluster, count in [*used, (self._boot.cluster_count, 0)]:
            if cluster > at:
                yield self.start + at * cluster_bytes, (cluster - at) * cluster_bytes
            at = max(at, cluster + count)

    def _unset(self, bits: bytes, first: int) -> Iterator[tuple[int, int]]:
        """Yield guest ranges of clear bits, the first of which is a cluster's number."""
        cluster_bytes, end = self._boot.cluster_bytes, self._boot.cluster_count
        for match in _BITS_ALIKE.finditer(bits):
            at = first + match.start() * 8
            if match[0][0] == 0:
                count = min(len(match[0]) * 8, end - at)
                if count > 0:
                    yield self.start + at * cluster_bytes, count * cluster_bytes
            else:
                for bit in range(at, min(at + 8, end)):
                    if not match[0][0] >> (bit - at) & 1:
                        yield self.start + bit * cluster_bytes, cluster_bytes

    def _placed_mft(self, disk: PlacedDisk) -> Mft | None:
        if (first := placed_first(disk, self.start, self._boot)) is None:
            return None
        layout = layout_of(first, [])
        if layout is None:
            return None
        mft = Mft(disk, self.start, self._boot, layout)
        longer = layout_of(first, mft.extensions(first))
        return Mft(disk, self.start, self._boot, longer or layout)

    def _records(self, mft: Mft) -> Iterator[Record]:
        missing = 0
        for number in range(mft.record_count):
            record = mft.record(number)
            missing = 0 if record else missing + 1
            if missing > _MISSING_MAX:
                return
            if record:
                yield record

    def _of_stream(self, record: Record, stream: Stream) -> Iterator[FilePiece]:
        """Yield pieces; the first was written when the file was made, what was appended when it changed."""
        cluster_bytes, number = self._boot.cluster_bytes, record.number
        made_ns, changed_ns = record.times_ns
        is_data = stream.type == ATTRIBUTE_DATA and number >= _USER_RECORDS
        written_bytes = min(stream.size, stream.initialized_size)
        for run in stream.runs.runs:
            if run.cluster is None:
                continue
            at, length = run.first * cluster_bytes, run.count * cluster_bytes
            valid = length if stream.is_compressed else min(length, written_bytes - at)
            if valid > 0:
                length = -(-valid // cluster_bytes) * cluster_bytes
                offset = self.start + run.cluster * cluster_bytes
                written_ns = changed_ns if at else made_ns
                yield FilePiece(offset, length, valid, (written_ns, number, at), is_data, changed_ns)


def find(volumes: Sequence[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[Ntfs]:
    """Yield the NTFS volumes, from the placed disk and from boot sectors in orphans.

    Args:
        volumes: where file systems may lie; the whole disk where none is known.
        disk: as far as it is placed.
        orphans: looked through once.
    """
    volumes = volumes or [Volume(0, disk.size, "the disk")]
    found: list[Found[Boot]] = []
    for volume in volumes:
        if boot := _placed_boot(disk, volume):
            start = Start(volume.offset, Certainty.CERTAIN, volume.name)
            found.append(Found(boot, boot.length, start))
    done = {one.geometry for one in found}
    sights: dict[Boot, set[int]] = {}
    for _, content in orphans:
        for at, boot in boots_in(content):
            if boot not in done:
                sights.setdefault(boot, set()).add(at)
    for boot, insides in sights.items():
        if best := _start(boot, insides, volumes, disk, orphans.cluster_bytes):
            found.append(Found(boot, boot.length, best))
    for one in compatible(found):
        yield Ntfs(one.start.offset, one.geometry, one.start.certainty, one.start.name)


def _placed_boot(disk: PlacedDisk, volume: Volume) -> Boot | None:
    """Return the boot sector at a volume's start, or the copy in its last sector."""
    size = room(volume, disk)
    for offset in (0, size - 512, size - 4096):
        sector = disk.read(volume.offset + offset, 512) if offset >= 0 else None
        boot = Boot.unpack(sector) if sector else None
        if boot and boot.length <= size and offset in (0, boot.copy_offset):
            return boot
    return None


def _start(
    boot: Boot, insides: set[int], volumes: Sequence[Volume], disk: PlacedDisk, cluster_bytes: int
) -> Start | None:
    def agrees(start: int) -> bool:
        places = {start % cluster_bytes, (start + boot.copy_offset) % cluster_bytes}
        return bool(insides & places) and boot.sectors_before in (0, start // boot.sector_bytes)

    def is_confirmed(start: int) -> bool:
        first = placed_first(disk, start, boot)
        layout = layout_of(first, []) if first else None
        return layout is not None and layout.runs[0].cluster == boot.mft_cluster

    facts = Seen(boot.length, boot.cluster_bytes, agrees, is_confirmed)
    before = boot.sectors_before * boot.sector_bytes
    if before and before + boot.length <= disk.size and before not in {volume.offset for volume in volumes}:
        told = Volume(before, boot.length, "a partition that its boot sector tells")
        volumes = [*volumes, told]
    start = start_of(facts, volumes, disk, cluster_bytes)
    if start and start.offset == before and before and start.name.startswith("a partition that"):
        return Start(start.offset, min(start.certainty, Certainty.LIKELY), start.name)
    return start
