"""NTFS: records of the MFT say their number, the MFT's runs say where each number lies.

N1. No checksum covers anything: a cluster is certain only by several facts that agree. For records: numbers
    that the MFT's runs give their places, and nobody else who claims the place; and two or more of them in
    the cluster, or one that fills it, or one whose directories are placed and used as it says. For a
    directory's buffer: all its entries name one directory, whose placed record has that buffer in its runs,
    and the placed record of every entry names the directory.
N2. Where the orphans show copies of records, by a store of volume snapshots or a second layout of the MFT,
    records are at most likely. Where they show a second volume, or an image of one in a file, only those are
    certain that it cannot have: with a number past its MFT, or beside a record that tells of its volume what
    is not so of the other.
N3. Where the volume starts is certain only as `starts` says.

The log tells nothing here: records of other structures lie in it without their own head, and not where a
sector starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from jqcow.salvage.evidence import (
    BlockSum,
    Certainty,
    FilePiece,
    Orphans,
    PlacedDisk,
    Placement,
    Volume,
)
from jqcow.salvage.guest.claims import Claims, Word
from jqcow.salvage.guest.ntfs_ondisk import (
    ATTRIBUTE_DATA,
    ATTRIBUTE_INDEX,
    ATTRIBUTE_LIST,
    RECORD_IN_USE,
    RECORD_IS_DIRECTORY,
    Attribute,
    Boot,
    IndexBuffer,
    Record,
    Run,
    Runs,
    listed_records,
)
from jqcow.salvage.guest.ntfs_scan import Scan, Segment, boots_in, scanned
from jqcow.salvage.guest.starts import Found, Seen, Start, compatible, room, start_of

_NUMBER_MASK = (1 << 48) - 1
_MFT, _BITMAP = 0, 6
_USER_RECORDS = 24
"""Records below are the file system's own."""
_SPARE_RECORDS = range(16, _USER_RECORDS)
_DIRECTORY_INDEX = "$I30".encode("utf-16-le")
_LIST_BYTES_MAX = 256 << 10
_MISSING_MAX = 1 << 20
"""After as many records in a row that are none, no more are looked for."""
_CACHED_MAX = 1 << 16
_BITS_ALIKE = re.compile(rb"\x00+|[\x01-\xfe]", re.DOTALL)


@dataclass(frozen=True)
class _Stream:
    """An attribute of a file that is not resident, from all records that have a part of it."""

    type: int
    name: bytes
    is_compressed: bool
    runs: Runs
    size: int
    initialized_size: int


class _Mft:
    """The MFT of a volume, as far as the disk has it."""

    def __init__(self, disk: PlacedDisk, start: int, boot: Boot, layout: _Layout) -> None:
        self._disk = disk
        self._start = start
        self._boot = boot
        self._cache: dict[int, Record | None] = {}
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
        record = self.record(reference & _NUMBER_MASK)
        return record if record and record.flags & RECORD_IN_USE and record.reference == reference else None

    def streams(self, base: Record) -> list[_Stream]:
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
            if value is None and attribute.runs and attribute.size <= _LIST_BYTES_MAX:
                value = self.read(Runs(attribute.runs, self._boot.cluster_bytes), 0, attribute.size)
            for reference in listed_records(value or b""):
                record = self.referred(reference)
                if record is not None and record.base == base.reference:
                    found[record.number] = record
        return list(found.values())


def _joined(attributes: list[Attribute], cluster_bytes: int) -> _Stream:
    attributes.sort(key=lambda attribute: attribute.first)
    first = attributes[0]
    runs = [run for attribute in attributes for run in attribute.runs or ()]
    knows_size = first.first == 0
    return _Stream(
        first.type, first.name, first.is_compressed, Runs(runs, cluster_bytes),
        first.size if knows_size else 0, first.initialized_size if knows_size else 0,
    )  # fmt: skip


class Ntfs:
    """An NTFS volume on the guest's disk."""

    def __init__(self, start: int, boot: Boot, certainty: Certainty, place: str) -> None:
        self._start = start
        self._boot = boot
        self._certainty = certainty
        self._place = place
        self._scan: Scan | None = None

    @property
    def name(self) -> str:
        """Return what it is and where."""
        return f"NTFS in {self._place}"

    @property
    def start(self) -> int:
        """Return where it starts on the guest's disk, in bytes."""
        return self._start

    @property
    def length(self) -> int:
        """Return its length in bytes."""
        return self._boot.length

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield boot sectors and records of the MFT, and the directories of those that are placed."""
        if self._scan is None:
            self._scan = scanned(orphans, self._start, self._boot)
        evidence = _Evidence(disk, orphans, self._start, self._boot, self._scan)
        layouts = evidence.layouts()
        evidence.claim_boots()
        if layouts:
            evidence.claim_records(layouts[0])
            evidence.claim_buffers(layouts[0])
        is_single = len(layouts) == 1 and not self._scan.has_snapshots
        at_most = Certainty.CERTAIN if is_single else Certainty.LIKELY
        yield from evidence.claims.placements(disk, min(at_most, self._certainty))

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

    def _clear(self, mft: _Mft, runs: Runs, bitmap_bytes: int) -> Iterator[tuple[int, int]]:
        missing = 0
        for offset in range(0, bitmap_bytes, self._boot.cluster_bytes):
            bits = mft.read(runs, offset, self._boot.cluster_bytes)
            missing = 0 if bits else missing + 1
            if missing > _MISSING_MAX:
                return
            yield from self._unset(bits or b"", offset * 8)

    def _used(self, mft: _Mft) -> list[tuple[int, int]] | None:
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
                yield self._start + at * cluster_bytes, (cluster - at) * cluster_bytes
            at = max(at, cluster + count)

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        """Yield nothing: NTFS keeps no checksums."""
        return iter(())

    def _unset(self, bits: bytes, first: int) -> Iterator[tuple[int, int]]:
        """Yield guest ranges of clear bits, the first of which is a cluster's number."""
        cluster_bytes, end = self._boot.cluster_bytes, self._boot.cluster_count
        for match in _BITS_ALIKE.finditer(bits):
            at = first + match.start() * 8
            if match[0][0] == 0:
                count = min(len(match[0]) * 8, end - at)
                if count > 0:
                    yield self._start + at * cluster_bytes, count * cluster_bytes
            else:
                for bit in range(at, min(at + 8, end)):
                    if not match[0][0] >> (bit - at) & 1:
                        yield self._start + bit * cluster_bytes, cluster_bytes

    def _placed_mft(self, disk: PlacedDisk) -> _Mft | None:
        if (first := _placed_first(disk, self._start, self._boot)) is None:
            return None
        layout = _layout(first, [])
        if layout is None:
            return None
        mft = _Mft(disk, self._start, self._boot, layout)
        longer = _layout(first, mft.extensions(first))
        return _Mft(disk, self._start, self._boot, longer or layout)

    def _records(self, mft: _Mft) -> Iterator[Record]:
        missing = 0
        for number in range(mft.record_count):
            record = mft.record(number)
            missing = 0 if record else missing + 1
            if missing > _MISSING_MAX:
                return
            if record:
                yield record

    def _of_stream(self, record: Record, stream: _Stream) -> Iterator[FilePiece]:
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
                offset = self._start + run.cluster * cluster_bytes
                written_ns = changed_ns if at else made_ns
                yield FilePiece(offset, length, valid, (written_ns, number, at), is_data)


def _placed_first(disk: PlacedDisk, start: int, boot: Boot) -> Record | None:
    """Return the MFT's own record, if it is placed and is where the boot sector says."""
    data = disk.read(start + boot.mft_cluster * boot.cluster_bytes, boot.record_bytes)
    record = Record.unpack(data, boot) if data else None
    return record if record and record.number == _MFT else None


@dataclass(frozen=True)
class _Layout:
    """Where the MFT is: its runs, and how many bytes of them have records."""

    runs: tuple[Run, ...]
    initialized_size: int


def _layout(first: Record, extensions: list[Record]) -> _Layout | None:
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
    return _Layout(tuple(runs), parts[0].initialized_size) if runs else None


class _Evidence:
    """What the orphans claim by what they and the disk show."""

    def __init__(self, disk: PlacedDisk, orphans: Orphans, start: int, boot: Boot, scan: Scan) -> None:
        self._disk = disk
        self._orphans = orphans
        self._start = start
        self._boot = boot
        self._scan = scan
        self._rivals = [
            other for other in scan.boots if other != boot and other.record_bytes == boot.record_bytes
        ]
        self.claims = Claims(orphans.cluster_bytes)

    def layouts(self) -> list[_Layout]:
        """Return where the MFT may be, the newest first: what is placed decides alone."""
        placed = _placed_first(self._disk, self._start, self._boot)
        firsts = [placed] if placed else self._sighted(_MFT, self._boot)
        firsts.sort(key=lambda record: record.lsn, reverse=True)
        found: list[_Layout] = []
        for first in firsts:
            layout = _layout(first, self._extensions(first))
            if layout and layout.runs[0].cluster == self._boot.mft_cluster and layout not in found:
                found.append(layout)
        return found

    def _sighted(self, number: int, boot: Boot) -> list[Record]:
        """Return the records of a number that orphans hold, read as those of a volume."""
        record_bytes, cluster_bytes = boot.record_bytes, self._orphans.cluster_bytes
        found: list[Record] = []
        for host_offset in self._scan.hosts_of(number, boot):
            inside = host_offset % cluster_bytes
            clusters = range(host_offset - inside, host_offset + record_bytes, cluster_bytes)
            data = b"".join(map(self._orphans.read, clusters))[inside : inside + record_bytes]
            if record := Record.unpack(data, boot):
                found.append(record)
        return found

    @cached_property
    def _rival_records(self) -> int | None:
        """How many records another volume has at most; None if that of one is not known."""
        most = 0
        for rival in self._rivals:
            layouts = [_layout(first, []) for first in self._sighted(_MFT, rival)]
            sizes = [
                layout.initialized_size
                for layout in layouts
                if layout and layout.runs[0].cluster == rival.mft_cluster
            ]
            if not sizes:
                return None
            most = max(most, max(sizes) // rival.record_bytes)
        return most

    def _is_own(self, segment: Segment) -> bool:
        """Return whether no other volume can have the records."""
        if not self._rivals:
            return True
        if segment.facts and segment.fits(self._boot):
            return not any(segment.fits(rival) for rival in self._rivals)
        return self._rival_records is not None and segment.number >= self._rival_records

    def _extensions(self, first: Record) -> list[Record]:
        """Return the other records of the MFT's own record; the newest of each number."""
        numbers = {
            reference & _NUMBER_MASK
            for attribute in first.attributes
            if attribute.type == ATTRIBUTE_LIST and attribute.value
            for reference in listed_records(attribute.value)
        } - {_MFT}
        found: list[Record] = []
        for number in numbers:
            sighted = [
                record for record in self._sighted(number, self._boot) if record.base == first.reference
            ]
            if sighted:
                found.append(max(sighted, key=lambda record: record.lsn))
        if (layout := _layout(first, [])) and numbers:
            found += _Mft(self._disk, self._start, self._boot, layout).extensions(first)
        return found

    def _may_own(self, buffer: IndexBuffer) -> bool:
        """Return whether a buffer names a file that no other volume can have; roots are all alike."""
        most = self._rival_records
        return most is not None and (
            not self._rivals or any(file & _NUMBER_MASK >= most for file in buffer.files)
        )

    def claim_boots(self) -> None:
        """Claim the first and the last sector of the volume."""
        word = Word(Certainty.CERTAIN, "NTFS boot sector")
        copies = [_Copy(host_offset, 512, word) for host_offset in self._scan.boot_offsets]
        self._claim_copies(copies, [self._start, self._start + self._boot.copy_offset])

    def claim_records(self, layout: _Layout) -> None:
        """Claim clusters with records; the first of the MFT have a copy of their own."""
        record_bytes, cluster_bytes = self._boot.record_bytes, self._boot.cluster_bytes
        mirrored = max(4, cluster_bytes // record_bytes)
        mft = _Mft(self._disk, self._start, self._boot, layout)
        copies: dict[int, list[_Copy]] = {}
        for segment in self._scan.segments:
            if not segment.fits(self._boot) and any(segment.fits(rival) for rival in self._rivals):
                continue
            if segment.number + segment.count <= mirrored:
                word = self._word_of(segment, segment.count, mft)
                copies.setdefault(segment.number, []).append(
                    _Copy(segment.host_offset, segment.count * record_bytes, word)
                )
                continue
            at, end = 0, segment.count * record_bytes
            while at < end and (found := mft.runs.locate(segment.number * record_bytes + at)):
                where, length = found[0], min(found[1], end - at)
                word = self._word_of(segment, length // record_bytes, mft)
                self.claims.say(segment.host_offset + at, self._start + where, length, word)
                at += length
        for number, sights in copies.items():
            places = [
                self._start + cluster * cluster_bytes + number * record_bytes
                for cluster in (self._boot.mft_cluster, self._boot.mirror_cluster)
            ]
            self._claim_copies(sights, places)

    def _word_of(self, segment: Segment, count: int, mft: _Mft) -> Word:
        known = [mft.referred(reference) for reference in segment.relatives]
        is_enough = self._is_own(segment) and (
            count >= 2
            or count * self._boot.record_bytes >= self._orphans.cluster_bytes
            or (bool(known) and all(known))
        )
        return Word(Certainty.CERTAIN if is_enough else Certainty.LIKELY, "NTFS records", segment.lsn)

    def _claim_copies(self, copies: list[_Copy], places: list[int]) -> None:
        """Claim two places for what both have; where in its cluster it is mostly tells which is which."""
        cluster_bytes = self._orphans.cluster_bytes
        places = [place for place in places if self._disk.read(place, 512) is None]
        unclear: list[_Copy] = []
        for copy in copies:
            fitting = [place for place in places if (place - copy.host_offset) % cluster_bytes == 0]
            if len(fitting) == 1:
                self.claims.say(copy.host_offset, fitting[0], copy.length, copy.word)
            elif fitting:
                unclear.append(copy)
        unclear.sort(key=lambda copy: (copy.length, copy.word.age), reverse=True)
        contents = {
            self._orphans.read(copy.host_offset - copy.host_offset % cluster_bytes) for copy in unclear[:3]
        }
        are_same = len(unclear) == len(places) and len(contents) == 1
        for copy, place in zip(unclear, places, strict=False):
            certainty = copy.word.certainty if are_same else Certainty.LIKELY
            word = Word(certainty, copy.word.witness, copy.word.age)
            self.claims.say(copy.host_offset, place, copy.length, word)

    def claim_buffers(self, layout: _Layout) -> None:
        """Claim clusters with buffers of directories that are placed."""
        boot = self._boot
        mft = _Mft(self._disk, self._start, boot, layout)
        unit = boot.cluster_bytes if boot.cluster_bytes <= boot.index_bytes else 512
        for host_offset, buffer in self._scan.buffers:
            directory = mft.referred(buffer.directory)
            if directory is None or not directory.flags & RECORD_IS_DIRECTORY:
                continue
            files = [mft.referred(file) for file in buffer.files]
            agree = self._may_own(buffer) and all(
                file is not None and directory.reference in file.parents for file in files
            )
            word = Word(Certainty.CERTAIN if agree else Certainty.LIKELY, "NTFS directory", buffer.lsn)
            for stream in mft.streams(directory):
                if stream.type != ATTRIBUTE_INDEX or stream.name != _DIRECTORY_INDEX:
                    continue
                found = stream.runs.locate(buffer.place * unit)
                if found and found[1] >= boot.index_bytes:
                    self.claims.say(host_offset, self._start + found[0], boot.index_bytes, word)


@dataclass(frozen=True)
class _Copy:
    """One of two things that look alike."""

    host_offset: int
    length: int
    word: Word


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
        first = _placed_first(disk, start, boot)
        layout = _layout(first, []) if first else None
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
