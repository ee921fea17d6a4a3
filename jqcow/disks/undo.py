"""Undo files: written before a repair, and laid back over the image afterwards.

An image may be taken back as long as each sector that the repair changed is as before it or as after it, and
the file ends where it did, or between: nobody has written there since. An undo that was cut off leaves such a
state. Behind the end of a crashed image its journal lay; there the end of what its tables name counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jqcow import _native
from jqcow.device.base import Device, Reader
from jqcow.device.file import FileDevice
from jqcow.device.names import sync_directory
from jqcow.device.trial import TrialDevice
from jqcow.errors import CorruptionError
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.undo import HEADER_BYTES, RUN_BYTES, RUN_SECTORS_MAX, UndoHeader, UndoRun

SUFFIX = ".jqcow-undo"
_RUN_BYTES_MAX = RUN_BYTES + RUN_SECTORS_MAX * (4 + SECTOR_BYTES)


def undo_path(image: str) -> str:
    """Return the path of an image's undo file."""
    return os.path.realpath(image) + SUFFIX


@dataclass(frozen=True)
class UndoReport:
    """What `undo_repair` did: how many bytes it wrote back, and the length of the image in bytes."""

    image: str | None
    written_bytes: int
    file_bytes: int


def _runs(sectors: Iterable[tuple[int, bytes, bytes]]) -> Iterator[UndoRun]:
    start, old, crcs = 0, b"", list[int]()
    for offset, before, after in sectors:
        if crcs and (offset != start + len(old) or len(crcs) == RUN_SECTORS_MAX):
            yield UndoRun(start, old, tuple(crcs))
            old, crcs = b"", []
        start = start if crcs else offset
        old += before
        crcs.append(_native.crc32c(after))
    if crcs:
        yield UndoRun(start, old, tuple(crcs))


def pack_undo(trial: TrialDevice, target: Device) -> None:
    """Write into ``target`` what takes back the changes of a trial."""
    place, count = HEADER_BYTES, 0
    for run in _runs(trial.changed_sectors()):
        target.pwrite(run.pack(), place)
        place, count = place + run.length, count + 1
    target.pwrite(UndoHeader(trial.old_bytes, trial.size(), count).pack(), 0)


def save_undo(trial: TrialDevice, image: str) -> None:
    """Write the undo file of a repair on trial, durably, beside the image.

    Raises:
        FileExistsError: there is one of an earlier repair.
        OSError: the host failed; nothing is left under the name.
    """
    target = FileDevice.create_temporary(undo_path(image))
    try:
        pack_undo(trial, target)
        target.publish(overwrite=False)
    except FileExistsError as error:
        # The same repair again: it was undone, or cut off.
        if same_content(target, undo_path(image)):
            # What cut it off may have come before its name was durable.
            sync_directory(os.path.dirname(undo_path(image)))
            return
        error.add_note("it can take an earlier repair back: apply it with jqcow undo, or remove it")
        raise
    finally:
        target.close()


def same_content(one: Reader, path: str) -> bool:
    """Return True if a file holds the same bytes as another one."""
    other = FileDevice.open(path, writable=False)
    try:
        step, size = 1 << 20, one.size()
        return size == other.size() and all(
            one.pread(step, at) == other.pread(step, at) for at in range(0, size, step)
        )
    finally:
        other.close()


def read_runs(undo: Reader) -> tuple[UndoHeader, Iterator[UndoRun]]:
    """Return the header of an undo file, and its runs, each of them checked as it is read.

    Raises:
        FormatError, CorruptionError: not an undo file, or a damaged one.
    """
    header = UndoHeader.unpack(undo.pread(HEADER_BYTES, 0))

    def runs() -> Iterator[UndoRun]:
        place = HEADER_BYTES
        for _ in range(header.run_count):
            run = UndoRun.unpack(undo.pread(min(_RUN_BYTES_MAX, max(0, undo.size() - place)), place), place)
            yield run
            place += run.length

    return header, runs()


def undo_on(
    device: Device, undo: Reader, *, force: bool = False, used_bytes: int | None = None
) -> UndoReport:
    """Lay an undo file back over an image. It may be cut off at any point, and done again.

    Args:
        device: the image, which is not live.
        undo: the undo file.
        force: also where the image was written since.
        used_bytes: of an image that was live, the end of what its tables name; None: the file's own end.

    Raises:
        CorruptionError: the undo file is damaged, or the image is neither as before nor as after the repair;
            nothing was written.
        OSError: the host failed; it can be done again.
    """
    header, runs = read_runs(undo)
    size, changed_since = device.size(), "it was written since the repair; --force undoes all the same"
    shortest, longest = sorted((header.old_bytes, header.new_bytes))
    end = size if used_bytes is None else used_bytes
    if not force and (size < shortest or end > longest):
        raise CorruptionError("image", size, changed_since)
    # All of it is checked before anything is written.
    for run in runs:
        now = device.pread(len(run.old), run.offset)
        for number, crc in enumerate(run.new_crcs):
            at = number * SECTOR_BYTES
            sector = now[at : at + SECTOR_BYTES]
            if not force and sector != run.old[at : at + SECTOR_BYTES] and _native.crc32c(sector) != crc:
                raise CorruptionError("image", run.offset + at, changed_since)
    if size != header.old_bytes:
        device.truncate(header.old_bytes)
    written = 0
    for run in read_runs(undo)[1]:
        old = run.old[: max(0, header.old_bytes - run.offset)]
        device.pwrite(old, run.offset)
        written += len(old)
    # Durable now: the image as it was. The undo file may be removed.
    device.barrier("undo.image")
    return UndoReport(None, written, header.old_bytes)
