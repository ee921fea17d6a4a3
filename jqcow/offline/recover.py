"""Recovery as a command: bring a crashed image home, and say what was found.

The work is the engine's, the same as when an image is opened for writing; this module adds the clean close,
the check afterwards, and the report. A crash during any of it leaves an image that can be recovered again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jqcow.checker.check import check_structure
from jqcow.device.base import Device, check_device
from jqcow.device.file import FileDevice
from jqcow.disks.undo import settle_undo
from jqcow.disks.view import FileView
from jqcow.engine.closing import Leftover
from jqcow.engine.engine import make_writable, open_engine, random_salt, settle
from jqcow.engine.medium import Medium
from jqcow.engine.repair import RepairReport
from jqcow.engine.scan import Scan, find_live_root, read_root_copy
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import header as headers
from jqcow.ondisk.frame import BlockOperation, IntentOperation, ZeroOperation
from jqcow.ondisk.header import Header
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.root import journal_length

State = Literal["clean", "clean, journal left behind", "live", "live by root copy"]


@dataclass(frozen=True)
class TornRecord:
    """The record that was being written when the image crashed. No flush ever returned for it."""

    sequence: int
    epoch: int
    offset: int
    reason: str


@dataclass(frozen=True)
class JournalFound:
    """What the journal held. Offsets and lengths in bytes.

    Attributes:
        offset: host offset of the journal range.
        length: of the range.
        epoch: the live epoch: all earlier ones are in their homes.
        record_count: valid records of the live epoch.
        first_sequence: of the oldest of them.
        last_sequence: of the newest of them.
        blocks_applied: metadata blocks that the records change, each counted once.
        bytes_applied: their length.
        stale_frames: valid records of earlier epochs; they are in their homes and not needed.
        torn_tail: a record that was cut off, or None.
        pending_writes: small writes of the guest that the records hold, and that no table shows yet.
        pending_bytes: their length.
    """

    offset: int
    length: int
    epoch: int
    record_count: int
    first_sequence: int
    last_sequence: int
    blocks_applied: int
    bytes_applied: int
    stale_frames: int
    torn_tail: TornRecord | None
    pending_writes: int = 0
    pending_bytes: int = 0


@dataclass(frozen=True)
class Verification:
    """Refcounts and tables, checked after replay.

    ``lost`` counts leaked clusters that look like lost data; they are among neither ``errors`` nor ``leaks``.
    ``refused`` tells why the check could not be done; the numbers are 0 then. ``findings`` are the first of
    all, in words.
    """

    errors: int
    leaks: int
    lost: int
    findings: tuple[str, ...]
    refused: str | None
    seconds: float


@dataclass(frozen=True)
class RecoveryReport:
    """What `recover_image` found and did.

    Attributes:
        image: name of the file, or None for a device.
        state: in which the image was found.
        dry_run: True if nothing was written; ``actions`` are then what a recovery would do.
        virtual_size: of the disk in bytes.
        journal: what the journal held, None on a clean image.
        actions: what was done, in order, in words.
        notes: what else the user should know.
        verification: of the recovered image, None if it was not asked for.
        replay_seconds: time to find, replay and bring home what the journal held.
    """

    image: str | None
    state: State
    dry_run: bool
    virtual_size: int
    journal: JournalFound | None
    actions: tuple[str, ...]
    notes: tuple[str, ...]
    verification: Verification | None
    replay_seconds: float


def recover_image(
    image: str | os.PathLike[str] | Device,
    *,
    dry_run: bool = False,
    verify: bool = True,
    journal_size: int | None = None,
    new_salt: Callable[[], bytes] = random_salt,
) -> RecoveryReport:
    """Make a crashed image standard qcow2 again. A clean image is left as it is, without what a crash left.

    Args:
        image: a file, or a device, which stays open.
        dry_run: write nothing; open a file read-only and replay in memory.
        verify: check refcounts and tables afterwards.
        journal_size: in bytes, of the journal that recovery moves to, as in `jqcow.open`.
        new_salt: makes its salt.

    Raises:
        ValueError: a journal size that no journal can have.
        FormatError: not a qcow2 image; UnsupportedFeatureError where jqcow refuses it by name.
        CorruptionError: the root, the journal or a table is damaged; nothing was changed by a guess.
        ImageInUse: another process uses the image.
        OSError: the host failed; recovery can be tried again.
    """
    how = _How(dry_run, verify, 0 if journal_size is None else journal_length(journal_size), new_salt)
    if not isinstance(image, str | os.PathLike):
        check_device(image)
        return _recover(image, None, how)
    device = FileDevice.open(image, writable=not dry_run)
    try:
        report = _recover(device, os.fspath(image), how)
        if not dry_run:
            settle_undo(device)
        return report
    finally:
        device.close()


@dataclass(frozen=True)
class _How:
    """How an image is recovered: see `recover_image`."""

    dry_run: bool
    verify: bool
    journal_bytes: int
    new_salt: Callable[[], bytes]


def _recover(device: Device, name: str | None, how: _How) -> RecoveryReport:
    dry_run, verify = how.dry_run, how.verify
    started = time.perf_counter()
    medium = Medium(device)
    if not dry_run:
        settle(medium)
    root = find_live_root(device, use_root_copy=True)
    if root is None:
        leftover = _finish(medium, dry_run=dry_run)
        return _report_clean(device, name, leftover, dry_run=dry_run, verify=verify)
    opened = open_engine(
        medium,
        writable=not dry_run,
        journal_bytes=how.journal_bytes,
        use_root_copy=True,
        new_salt=how.new_salt,
    )
    if opened.scan is None:
        raise RuntimeError("a live image was opened without its journal")
    header = opened.engine.blocks.area.header
    is_dirty = bool(header.incompatible_features & headers.INCOMPATIBLE_DIRTY)
    repaired = None
    if not dry_run:
        repaired = make_writable(opened)
        opened.engine.closing.clean()
    seconds = time.perf_counter() - started
    found = _describe_journal(opened.scan, opened.engine.geometry.block_bytes, opened.intents)
    state: State = "live by root copy" if root.is_copy else "live"
    return RecoveryReport(
        image=name,
        state=state,
        dry_run=dry_run,
        virtual_size=header.size,
        journal=found,
        actions=_actions(state, found, is_dirty=is_dirty),
        notes=_recount_notes(repaired, is_dirty=is_dirty),
        verification=_verify(device) if verify else None,
        replay_seconds=seconds,
    )


def _recount_notes(repaired: RepairReport | None, *, is_dirty: bool) -> tuple[str, ...]:
    """Tell what counting anew found, or that a dry run checks what it would still make right."""
    if repaired is not None:
        wrong = (repaired.leaks, repaired.too_low, repaired.copied_flags)
        return ("refcounts were {} too high, {} too low, and {} COPIED flags wrong".format(*wrong),)
    return ("what is checked is before the refcounts are counted anew",) if is_dirty else ()


def _finish(medium: Medium, *, dry_run: bool) -> Leftover | None:
    """Finish what a crash cut off on a clean image, and return what it left; in a dry run only look."""
    if read_root_copy(medium.device) is None:
        return None
    try:
        opened = open_engine(medium, writable=not dry_run)
    except UnsupportedFeatureError:
        # Another program has made it what jqcow does not write.
        return None
    header = opened.engine.blocks.area.header
    is_dirty = bool(header.incompatible_features & headers.INCOMPATIBLE_DIRTY)
    leftover = opened.engine.closing.find_leftover(repairing=is_dirty)
    if leftover is not None and not dry_run:
        opened.engine.closing.finish_closing(leftover)
    return leftover


def _report_clean(
    device: Device, name: str | None, leftover: Leftover | None, *, dry_run: bool, verify: bool
) -> RecoveryReport:
    header = Header.unpack(device.pread(SECTOR_BYTES, 0))
    actions = []
    if leftover is not None:
        actions.append("clear the root copy")
        if leftover.is_unused:
            actions.append(f"give back the journal's {leftover.extent.length} bytes")
    return RecoveryReport(
        image=name,
        state="clean" if leftover is None else "clean, journal left behind",
        dry_run=dry_run,
        virtual_size=header.size,
        journal=None,
        actions=tuple(actions),
        notes=_foreign_notes(header),
        verification=_verify(device) if verify else None,
        replay_seconds=0.0,
    )


def _foreign_notes(header: Header) -> tuple[str, ...]:
    """Name what another program left behind, which no journal of jqcow can mend."""
    notes = []
    if header.incompatible_features & headers.INCOMPATIBLE_DIRTY:
        notes.append("QEMU marked the image dirty (lazy refcounts): its refcounts must be rebuilt")
    if header.incompatible_features & headers.INCOMPATIBLE_CORRUPT:
        notes.append("the image is marked corrupt by the program that wrote it last")
    return tuple(notes)


def _describe_journal(scan: Scan, block_bytes: int, intents: tuple[IntentOperation, ...]) -> JournalFound:
    blocks: set[int] = set()
    for operation in scan.operations:
        match operation:
            case BlockOperation(offset, _):
                blocks.add(offset)
            case ZeroOperation(offset, length):
                blocks.update(range(offset, offset + length, block_bytes))
    torn = scan.torn_tail
    return JournalFound(
        offset=scan.extent.offset,
        length=scan.extent.length,
        epoch=scan.epoch,
        record_count=len(scan.frames),
        first_sequence=scan.frames[0].header.sequence,
        last_sequence=scan.sequence,
        blocks_applied=len(blocks),
        bytes_applied=len(blocks) * block_bytes,
        stale_frames=scan.stale_frames,
        torn_tail=None if torn is None else TornRecord(torn.sequence, torn.epoch, torn.offset, torn.reason),
        pending_writes=len(intents),
        pending_bytes=sum(len(intent.data) for intent in intents),
    )


def _actions(state: State, found: JournalFound, *, is_dirty: bool) -> tuple[str, ...]:
    actions = []
    if state == "live by root copy":
        actions.append("take the root from its copy, and write sector 0 anew")
    if found.torn_tail is not None:
        actions.append(f"drop the torn record {found.torn_tail.sequence}")
    actions += [
        f"copy the {found.record_count} live records to a new place, and make them durable there",
        f"write {found.blocks_applied} metadata blocks to their homes",
        *_pending(found),
        *(["count the refcounts anew, as the dirty bit asks"] if is_dirty else []),
        "write the header in standard layout, without the journal's feature bit",
        f"give back the journal's {found.length} bytes",
    ]
    return tuple(actions)


def _pending(found: JournalFound) -> list[str]:
    if not found.pending_writes:
        return []
    return [f"do {found.pending_writes} small writes of the guest, of {found.pending_bytes} bytes in all"]


def _verify(device: Device) -> Verification:
    """Check the image as it is, or as replayed in memory where its journal is still live."""
    started = time.perf_counter()
    errors = leaks = lost = 0
    findings: tuple[str, ...] = ()
    refused = None
    try:
        view = FileView.of_file(device, use_root_copy=True)
        report = check_structure(view.read, view.size(), reserved=view.reserved)
        errors, leaks, lost = report.errors - report.lost, report.leaks, report.lost
        findings = tuple(map(str, report.findings))
    except UnsupportedFeatureError as error:
        refused = str(error)
    except (CorruptionError, FormatError) as error:
        errors, findings = 1, (str(error),)
    return Verification(errors, leaks, lost, findings, refused, time.perf_counter() - started)
