"""What orphans of an NTFS volume claim, by what they and the placed disk show; the rules are in `ntfs`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jqcow.salvage.evidence import Certainty, Orphans, PlacedDisk
from jqcow.salvage.guest.claims import Claims, Word
from jqcow.salvage.guest.ntfs_mft import MFT_NUMBER, NUMBER_MASK, Layout, Mft, layout_of, placed_first
from jqcow.salvage.guest.ntfs_ondisk import (
    ATTRIBUTE_INDEX,
    ATTRIBUTE_LIST,
    RECORD_IS_DIRECTORY,
    Boot,
    IndexBuffer,
    Record,
    listed_records,
)
from jqcow.salvage.guest.ntfs_scan import Scan, Segment

_RIVALS_MAX = 64
_DIRECTORY_INDEX = "$I30".encode("utf-16-le")


@dataclass(frozen=True)
class _Copy:
    """One of two things that look alike."""

    host_offset: int
    length: int
    word: Word


class Evidence:
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

    def layouts(self) -> list[Layout]:
        """Return where the MFT may be, the newest first: what is placed decides alone."""
        placed = placed_first(self._disk, self._start, self._boot)
        firsts = [placed] if placed else self._sighted(MFT_NUMBER, self._boot)
        firsts.sort(key=lambda record: record.lsn, reverse=True)
        found: list[Layout] = []
        for first in firsts:
            layout = layout_of(first, self._extensions(first))
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
        if len(self._rivals) > _RIVALS_MAX:
            return None
        for rival in self._rivals:
            layouts = [layout_of(first, []) for first in self._sighted(MFT_NUMBER, rival)]
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
        if len(self._rivals) > _RIVALS_MAX:
            return False
        if segment.facts and segment.fits(self._boot):
            return not any(segment.fits(rival) for rival in self._rivals)
        return self._rival_records is not None and segment.number >= self._rival_records

    def _extensions(self, first: Record) -> list[Record]:
        """Return the other records of the MFT's own record; the newest of each number."""
        numbers = {
            reference & NUMBER_MASK
            for attribute in first.attributes
            if attribute.type == ATTRIBUTE_LIST and attribute.value
            for reference in listed_records(attribute.value)
        } - {MFT_NUMBER}
        found: list[Record] = []
        for number in numbers:
            sighted = [
                record for record in self._sighted(number, self._boot) if record.base == first.reference
            ]
            if sighted:
                found.append(max(sighted, key=lambda record: record.lsn))
        if (layout := layout_of(first, [])) and numbers:
            found += Mft(self._disk, self._start, self._boot, layout).extensions(first)
        return found

    def _may_own(self, buffer: IndexBuffer) -> bool:
        """Return whether a buffer names a file that no other volume can have; roots are all alike."""
        most = self._rival_records
        return most is not None and (
            not self._rivals or any(file & NUMBER_MASK >= most for file in buffer.files)
        )

    def claim_boots(self) -> None:
        """Claim the first and the last sector of the volume."""
        word = Word(Certainty.CERTAIN, "NTFS boot sector")
        copies = [_Copy(host_offset, 512, word) for host_offset in self._scan.boot_offsets]
        self._claim_copies(copies, [self._start, self._start + self._boot.copy_offset])

    def claim_records(self, layout: Layout) -> None:
        """Claim clusters with records; the first of the MFT have a copy of their own."""
        record_bytes, cluster_bytes = self._boot.record_bytes, self._boot.cluster_bytes
        mirrored = max(4, cluster_bytes // record_bytes)
        mft = Mft(self._disk, self._start, self._boot, layout)
        copies: dict[int, list[_Copy]] = {}
        for segment in self._scan.segments:
            rivals = self._rivals[:_RIVALS_MAX]
            if not segment.fits(self._boot) and any(segment.fits(rival) for rival in rivals):
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

    def _word_of(self, segment: Segment, count: int, mft: Mft) -> Word:
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

    def claim_buffers(self, layout: Layout) -> None:
        """Claim clusters with buffers of directories that are placed."""
        boot = self._boot
        mft = Mft(self._disk, self._start, boot, layout)
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
