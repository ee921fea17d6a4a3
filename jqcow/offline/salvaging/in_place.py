"""New tables for a damaged image, in its own file: behind the undo file, behind the end, and the header last.

Data stays where it is. All new tables lie behind the old end of the file, so nothing that may still be wanted
is written over but the header and the flags in tables that stay.

Z3. Until the undo file is durable nothing of the image is changed; it tells of all that is (disks/undo.py).
Z4. Sector 0 is written last, when all that it names is durable: before that the image is the damaged one.
Z5. What is put into the file was checked before, on trial: no error and no leak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace

from jqcow import _native
from jqcow.checker.check import check_structure
from jqcow.device.base import Device, has_fixed_size
from jqcow.device.file import FileDevice, remove_file
from jqcow.device.trial import TrialDevice
from jqcow.disks.policy import FilePolicy, Following
from jqcow.disks.undo import mark_done, save_undo, take_back_cut_off, undo_path
from jqcow.disks.view import FileView
from jqcow.engine.engine import make_writable, open_engine, random_salt
from jqcow.engine.medium import Medium
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.offline.salvaging.patient import Patient, patient_on
from jqcow.ondisk import entries
from jqcow.ondisk.header import (
    AUTOCLEAR_BITMAPS,
    EXTENSION_BITMAPS,
    INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY,
    INCOMPATIBLE_JOURNAL,
    Extension,
    HeaderArea,
)
from jqcow.ondisk.keys import Passphrase, hidden
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, NO_ENTRY, L2Entry, data_entry
from jqcow.ondisk.layout import SECTOR_BYTES, HostOffset, round_up, table_bytes
from jqcow.ondisk.root import MIN_JOURNAL_BYTES
from jqcow.ondisk.snapshots import pack_table
from jqcow.ondisk.undo import BLOCK_BYTES
from jqcow.salvage.amounts import Amounts
from jqcow.salvage.diagnosis import OVERLAP, GuestRange
from jqcow.salvage.guestmap import GuestMap, PlacedEntries
from jqcow.salvage.marks import STRUCTURE
from jqcow.salvage.survey import Survey
from jqcow.salvage.tables import DiskTables, Fate

SPARE_BYTES, DATA_PER_TABLE = 64 << 20, 16
"""New tables take so many bytes at most, and one more for so many bytes of data."""


@dataclass(frozen=True)
class InPlaceReport:
    """What `repair_in_place` did; numbers as in `jqcow.offline.salvage.SalvageReport`.

    Attributes:
        image: name of the file.
        undo_file: what gives the old bytes back.
        size: of the disk in bytes.
        certain: bytes of data whose place is certain.
        likely: bytes that several facts put there.
        guess: bytes that were left over for the place.
        zero: bytes that read as zeros.
        below: bytes that show the backing disk, zeros without one.
        lost: bytes that read as zeros now, for want of anything that says what was there.
        lost_ranges: the first of those, by offset.
        lost_range_count: how many ranges they are.
        written_bytes: what was changed in the file, or added to it.
    """

    image: str
    undo_file: str
    size: int
    certain: int
    likely: int
    guess: int
    zero: int
    below: int
    lost: int
    lost_ranges: tuple[GuestRange, ...]
    lost_range_count: int
    written_bytes: int


def repair_in_place(
    image: str,
    *,
    allow_files: FilePolicy = False,
    probe: bool = False,
    passphrase: Passphrase | None = None,
) -> InPlaceReport:
    """Give a damaged image new tables, so that it opens and a check finds nothing.

    An undo file is written first; `undo_repair` gives the very bytes back, also where this is cut off.

    Args:
        image: the file.
        allow_files: whether backing files may be opened to place data, as in `jqcow.open`.
        probe: tell formats of backing files that are not stored by their magic.
        passphrase: of an encrypted image, and of encrypted files below it.

    Raises:
        FileExistsError: there is an undo file of an earlier repair.
        FormatError: nothing tells how to read the file as an image.
        UnsupportedFeatureError: a block device, which has no place for an undo file, or a feature.
        CorruptionError: what could be had back would still not be sound; nothing was changed.
        ImageInUse: another process uses the file.
        OSError: the host failed; undo, or do it again.
    """
    following = Following(allow_files, probe, passphrase=hidden(passphrase))
    with closing(FileDevice.open(image, writable=True)) as device:
        if has_fixed_size(device):
            raise UnsupportedFeatureError(
                "repair in place on a block device", "there is no place for an undo file"
            )
        _take_back(device)
        trial, report = rebuilt(device, image, device.identity(), following)
        save_undo(trial, device, in_place=True)
        written = put_in_place(trial, device)
        with closing(FileDevice.open(undo_path(image), writable=True)) as undo:
            mark_done(undo, device)
        return replace(report, undo_file=undo_path(image), written_bytes=written)


def _take_back(device: FileDevice) -> None:
    """Take back a repair that was cut off, before another begins."""
    try:
        with closing(FileDevice.open(undo_path(device.path), writable=True)) as undo:
            if take_back_cut_off(device, undo):
                remove_file(undo)
    except (FileNotFoundError, FormatError, CorruptionError):
        # There is none, or it is of no repair of this image: `save_undo` does not replace it.
        return


def rebuilt(
    device: Device, path: str, identity: tuple[int, int], following: Following
) -> tuple[TrialDevice, InPlaceReport]:
    """Return what a device is to become, on trial, and what that has back; errors as `repair_in_place`."""
    trial, patient = TrialDevice(device), patient_on(device, path, identity)
    for offset, block in patient.source.laid.items():
        trial.pwrite(block, offset)
    found = patient.survey()
    if found.intents:
        raise UnsupportedFeatureError(
            "repair in place while the journal has writes of the guest", "have it back into a new file"
        )
    found.unlock(patient.cipher(following.passphrase))
    if following.allow is False:
        found.place()
    else:
        with patient.below(following) as below:
            found.place(below)
    diagnosis = patient.diagnose(found)
    rebuilding = _Rebuilding(trial, found, patient, SPARE_BYTES + diagnosis.stored_bytes // DATA_PER_TABLE)
    rebuilding.run()
    _count_anew(trial)
    _require_sound(trial)
    disk = diagnosis.disks[0]
    lost = [each for each in disk.ranges if each.kind == "lost"]
    amounts = {name: getattr(disk, name) for name in asdict(Amounts())}
    amounts["guess"] -= rebuilding.dropped_bytes
    amounts["lost"] += rebuilding.dropped_bytes
    report = InPlaceReport(
        path, "", disk.size, **amounts, lost_ranges=tuple(lost), lost_range_count=len(lost), written_bytes=0
    )
    return trial, report


class _Rebuilding:
    """Writes new tables on trial."""

    def __init__(self, trial: TrialDevice, found: Survey, patient: Patient, bytes_max: int) -> None:
        self._trial, self._found = trial, found
        self._geometry, self._codec = found.shape.geometry, found.shape.codec
        self._has_backing = patient.shape.area.backing_file_name is not None
        self._left_bytes = bytes_max
        self._next = round_up(max(trial.size(), found.source.size()), self._geometry.cluster_bytes)
        self.dropped_bytes = 0
        """Of the disk, which was to lie where a structure does."""

    def run(self) -> None:
        """Write L1 and L2 tables, the snapshot table, and the header; refcounts are counted afterwards."""
        l1_offset, l1_size = self._disk(self._found.tables, self._found.guest_map)
        header = self._found.shape.area.header
        snapshots = []
        for snapshot, tables in zip(self._found.others.snapshots, self._found.snapshot_tables, strict=True):
            place, count = self._disk(tables, GuestMap(tables, self._found.guest_map.marks))
            snapshots.append(replace(snapshot, l1_table_offset=place, l1_size=count))
        table = pack_table(snapshots)
        snapshots_offset = self._put(table) if snapshots else 0
        not_clean = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_JOURNAL
        header = replace(
            header,
            size=self._found.guest_map.size if self._found.is_active else header.size,
            l1_table_offset=l1_offset,
            l1_size=l1_size,
            nb_snapshots=len(snapshots),
            snapshots_offset=snapshots_offset,
            # There is none any more: all clusters are counted anew.
            refcount_table_offset=0,
            refcount_table_clusters=0,
            incompatible_features=header.incompatible_features & ~not_clean,
        )
        self._put_header(self._found.shape.area.with_header(header))

    def _put_header(self, area: HeaderArea) -> None:
        if any(each.structure.startswith("bitmap") for each in self._found.others.damages):
            kept = area.header.autoclear_features & ~AUTOCLEAR_BITMAPS
            area = area.with_extension(Extension(EXTENSION_BITMAPS, b""), autoclear_features=kept)
        # What was behind a shorter header, a root copy among it, says nothing any more.
        self._trial.pwrite(area.data.ljust(self._geometry.cluster_bytes, b"\0"), 0)

    def _put(self, data: bytes | bytearray) -> int:
        """Write a structure behind all others, in clusters of its own; return where.

        Raises:
            CorruptionError: more of them than the file's data can need; it bounds memory.
        """
        place, length = self._next, round_up(len(data), self._geometry.cluster_bytes)
        self._left_bytes -= length
        if self._left_bytes < 0:
            raise CorruptionError("image", 0, "it names more tables than its data needs; salvage it instead")
        self._trial.pwrite(bytes(data).ljust(length, b"\0"), place)
        self._next += length
        return place

    def _disk(self, tables: DiskTables, guest_map: GuestMap) -> tuple[int, int]:
        """Write the tables of a disk; return where its L1 table lies, and its length in entries."""
        l1_table = bytearray(table_bytes(len(tables.fates)))
        crowded = {each.host_offset for each in tables.damages if each.meaning == OVERLAP}
        seen: set[int] = set()
        for index, fate in enumerate(tables.fates):
            if fate == Fate.ABSENT:
                continue
            offset = tables.offsets[index]
            stays = fate in (Fate.WHOLE, Fate.EMPTY) and offset not in seen and offset not in crowded
            if stays and index not in guest_map.placed and not self._names_structures(tables, index):
                seen.add(offset)
            else:
                offset = self._put(self._table(tables, guest_map, index))
            entries.put_l1(l1_table, index, offset)
        return (self._put(l1_table) if l1_table else 0), len(tables.fates)

    def _names_structures(self, tables: DiskTables, index: int) -> bool:
        marks = self._found.guest_map.marks
        return bool(
            _native.l2_shared(tables.read(index), self._codec.entry_bytes, marks.cluster_bits, marks.data)[1]
        )

    def _table(self, tables: DiskTables, guest_map: GuestMap, index: int) -> bytearray:
        """Return an L2 table with what is known of it; what is lost reads as zeros."""
        table, marks = bytearray(tables.read(index)), self._found.guest_map.marks
        for entry in self._codec.found(bytes(table)):
            names_data = entry.kind != COMPRESSED_CLUSTER and entry.host
            if names_data and marks.of(entry.host >> marks.cluster_bits) == STRUCTURE:
                self._codec.encode(table, entry.position, self._zeros())
                if tables is self._found.tables:
                    self.dropped_bytes += self._geometry.cluster_bytes
        placed = guest_map.placed.get(index)
        lost = tables.lost_entries(index)
        if placed is not None and tables.fates[index] == Fate.EMPTY:
            lost = [(0, self._codec.per_table)]
        for first, count in lost:
            for entry_index in range(first, first + count):
                self._codec.encode(table, entry_index, self._entry(placed, entry_index, tables.fates[index]))
        return table

    def _entry(self, placed: PlacedEntries | None, index: int, fate: int) -> L2Entry:
        if placed is None or not placed.certainties[index]:
            return NO_ENTRY if fate == Fate.EMPTY else self._zeros()
        host, stored = HostOffset(placed.hosts[index]), placed.stored[index]
        if stored:
            return L2Entry(COMPRESSED_CLUSTER, host, length=round_up(stored, SECTOR_BYTES))
        return self._codec.filled(data_entry(host), host, range(self._codec.subclusters))

    def _zeros(self) -> L2Entry:
        """Return the entry of what is lost: it must not show what lies below."""
        needs_flag = self._has_backing and self._geometry.has_zero_flag
        return self._codec.zero_entry if needs_flag else NO_ENTRY


def _count_anew(trial: TrialDevice, new_salt: Callable[[], bytes] = random_salt) -> None:
    """Count all refcounts of an image without any, and set its flags right."""
    opened = open_engine(
        Medium(trial), writable=True, journal_bytes=MIN_JOURNAL_BYTES, new_salt=new_salt, repair="bitmaps"
    )
    make_writable(opened, "bitmaps", free_lost=True)
    opened.engine.closing.clean()


def _require_sound(trial: TrialDevice) -> None:
    view = FileView.of_file(trial)
    report = check_structure(view.read, view.size())
    if report.errors or report.leaks:
        first = next(iter(report.findings), None)
        raise CorruptionError(
            "image", 0, f"it cannot be made sound in place ({first}); have it back into a new file"
        )


def put_in_place(trial: TrialDevice, device: Device) -> int:
    """Write what a trial changed; return how many bytes. The undo file is durable, and marked as of this.

    Raises:
        OSError: the host failed; the undo file gives the old bytes back.
    """
    first, written = b"", 0
    if trial.size() > device.size():
        device.truncate(trial.size())
    for offset, new in _changes(trial):
        data, skipped = new, 0
        if not offset:
            first, skipped = new[:SECTOR_BYTES], SECTOR_BYTES
        device.pwrite(data[skipped:], offset + skipped)
        written += len(data)
    # Durable now: all that the new header names (Z4).
    device.barrier("in-place.tables")
    device.pwrite(first or trial.pread(SECTOR_BYTES, 0), 0)
    # Durable now: the header. The undo file is told that this is done, and others may write.
    device.barrier("in-place.header")
    return written


def _changes(trial: TrialDevice) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, new bytes) of all blocks that are not as they were."""
    for offset, _, new in trial.changed(BLOCK_BYTES):
        yield offset, new[: max(0, trial.size() - offset)]
    yield from trial.behind(BLOCK_BYTES)
