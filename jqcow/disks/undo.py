"""Undo files: written before a repair, and laid back over the image afterwards.

An image may be taken back as long as each sector that the repair changed is as before it or as after it, and
nothing but refcounts lies behind the old end of the file: nobody has written there since. Its journal may lie
behind the end of both, where the repair was cut off.

Once that is known a mark in the undo file says so, and sector 0 is one that every program refuses, until the
image is as it was. What an undo does depends on both:

    mark    sector 0                what the undo does
    any     of an undo              lays the file over the image, and ends
    begun   no magic: lost          the same, without a look at the image, which a power cut may have garbled
    any     another                 recovers the image, refuses one that was written since, and begins

U1. What follows a repair is never taken back unasked: a mark in the undo file says that the repair is done,
    durably, before anybody may write to the image. Only what has no mark is a repair that was cut off.
U2. An undo file is of one file, whatever comes to lie under its name: by force alone it goes over another.
U3. Nobody opens an image that is half taken back: sector 0 is the first of it that changes, and the last.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

from jqcow import _native
from jqcow.device.base import Device, Reader
from jqcow.device.file import FileDevice, birth_of
from jqcow.device.names import sync_directory
from jqcow.device.trial import TrialDevice
from jqcow.engine.engine import open_engine, random_salt
from jqcow.engine.medium import Medium
from jqcow.engine.scan import read_header
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import MAGIC, Header
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.undo import (
    BLOCK_BYTES,
    HEADER_BYTES,
    MARK_BYTES,
    RUN_BYTES,
    RUN_SECTORS_MAX,
    Mark,
    UndoHeader,
    UndoRun,
)

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


def _runs(blocks: Iterable[tuple[int, bytes, bytes]]) -> Iterator[UndoRun]:
    start, old, crcs = 0, b"", list[int]()
    for offset, before, after in blocks:
        if crcs and (offset != start + len(old) or len(crcs) == RUN_SECTORS_MAX):
            yield UndoRun(start, old, tuple(crcs))
            old, crcs = b"", []
        start = start if crcs else offset
        old += before
        crcs += (_native.crc32c(after[at : at + SECTOR_BYTES]) for at in range(0, len(after), SECTOR_BYTES))
    if crcs:
        yield UndoRun(start, old, tuple(crcs))


def _roots_end(header: Header) -> int:
    """Return the offset behind all that a root or its copy changes, and a power cut garbles with them."""
    has_copy = roots.has_room_for_copy(header.cluster_bits)
    return roots.ROOT_COPY_OFFSET + roots.ROOT_COPY_BYTES if has_copy else SECTOR_BYTES


def _birth_of(device: Device) -> tuple[int, int]:
    return birth_of(device) if isinstance(device, FileDevice) else (0, 0)


def pack_undo(trial: TrialDevice, target: Device) -> None:
    """Write into ``target`` what takes back the changes of a trial."""
    place, count = HEADER_BYTES, 0
    roots_end = _roots_end(read_header(trial).header)
    for run in _runs(trial.changed(BLOCK_BYTES, also=range(roots_end))):
        target.pwrite(run.pack(), place)
        place, count = place + run.length, count + 1
    header = UndoHeader(trial.old_bytes, trial.size(), count, *_birth_of(trial.below))
    target.pwrite(header.pack(), 0)


def save_undo(trial: TrialDevice, image: FileDevice) -> None:
    """Write the undo file of a repair on trial, durably, beside the image; who may read that may read it.

    Raises:
        FileExistsError: there is one of an earlier repair.
        OSError: the host failed; nothing is left under the name.
    """
    path = undo_path(image.path)
    target = FileDevice.create_temporary(path)
    try:
        target.take_attributes_of(image)
        pack_undo(trial, target)
        target.publish(overwrite=False)
    except FileExistsError as error:
        # The same repair again: it was undone, or cut off.
        if same_content(target, path):
            # What cut it off may have come before its name was durable.
            sync_directory(os.path.dirname(path))
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


@dataclass(frozen=True)
class UndoFile:
    """An undo file that is there. ``runs_end`` is where its mark may stand."""

    reader: Reader
    header: UndoHeader
    runs_end: int

    @classmethod
    def read(cls, reader: Reader) -> UndoFile:
        """Read an undo file and check all of it.

        Raises:
            FormatError, CorruptionError: not an undo file, or a damaged one.
        """
        undo = cls(reader, UndoHeader.unpack(reader.pread(HEADER_BYTES, 0)), HEADER_BYTES)
        return cls(reader, undo.header, HEADER_BYTES + sum(run.length for run in undo.runs()))

    def runs(self) -> Iterator[UndoRun]:
        """Yield the runs, each of them checked as it is read."""
        place = HEADER_BYTES
        for _ in range(self.header.run_count):
            length = min(_RUN_BYTES_MAX, max(0, self.reader.size() - place))
            run = UndoRun.unpack(self.reader.pread(length, place), place)
            yield run
            place += run.length

    @property
    def mark_place(self) -> int:
        """Offset of the mark: in a block of its own, which cannot take the runs with it."""
        return layout.round_up(self.runs_end, BLOCK_BYTES)

    @property
    def mark(self) -> Mark | None:
        """What the file says of its image."""
        return self.header.unpack_mark(self.reader.pread(MARK_BYTES, self.mark_place))

    def old_sector_0(self) -> bytes:
        """Return sector 0 of the image before the repair.

        Raises:
            CorruptionError: the file lacks it.
        """
        first = next(self.runs(), None)
        if first is None or first.offset:
            raise CorruptionError("undo file", HEADER_BYTES, "it lacks sector 0")
        return first.old[:SECTOR_BYTES]

    def is_laid_on(self, image: Reader) -> bool:
        """Return True if an undo has begun to change the image (U3)."""
        sector = image.pread(SECTOR_BYTES, 0)
        return roots.is_being_undone(sector) or (self.mark is Mark.BEGUN and sector[: len(MAGIC)] != MAGIC)

    def is_of(self, image: Device) -> bool:
        """Return True unless the image is another file than the one that was repaired (U2)."""
        birth, found = (self.header.inode, self.header.born_nanoseconds), _birth_of(image)
        return not (all(birth) and all(found)) or birth == found

    def is_of_cut_off_repair(self, image_bytes: int) -> bool:
        """Return True if an image of this length has the space of a journal behind its end."""
        return image_bytes > max(self.header.old_bytes, self.header.new_bytes)


def settle_undo(image: FileDevice) -> None:
    """Before anybody writes to an opened image: mark an undo file beside it that has no mark yet (U1).

    Its repair is done, or somebody goes on from where it was cut off.

    Raises:
        OSError: there is an undo file that cannot be read, or marked.
    """
    path = undo_path(image.path)
    try:
        with closing(FileDevice.open(path, writable=False)) as undo:
            file = UndoFile.read(undo)
            is_settled = file.mark is Mark.DONE or not file.is_of(image)
        if not is_settled:
            with closing(FileDevice.open(path, writable=True)) as undo:
                mark_done(undo)
    except (FileNotFoundError, FormatError, CorruptionError, UnsupportedFeatureError):
        # There is none, or another file of that name, which does not concern the image.
        return
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            error.add_note(f"what is beside {image.path} must be told first that its repair is done")
            raise


def mark_done(undo: Device) -> None:
    """Say in an undo file that its repair is done (U1).

    Raises:
        FormatError, CorruptionError: not an undo file, or a damaged one.
        OSError: the host failed.
    """
    file = UndoFile.read(undo)
    undo.pwrite(file.header.pack_mark(Mark.DONE), file.mark_place)
    # Durable now: the mark. The image may be written, and no repair takes that back unasked.
    undo.barrier("undo.done")


def take_back_cut_off(device: Device, undo: Device, *, new_salt: Callable[[], bytes] = random_salt) -> bool:
    """Take back a repair, or end an undo, that was cut off, before another repair; False if none was.

    Raises:
        FormatError, CorruptionError: not an undo file, a damaged one, or one of another repair.
        OSError: the host failed; it can be done again.
    """
    file = UndoFile.read(undo)
    if not file.is_of(device):
        return False
    if not file.is_laid_on(device):
        if file.mark is Mark.DONE:
            return False
        is_cut_off = bring_home(device, new_salt=new_salt) or file.is_of_cut_off_repair(device.size())
        if not is_cut_off:
            return False
    undo_on(device, undo, new_salt=new_salt)
    return True


def remove_undo(image: str) -> None:
    """Remove an undo file that has served: the image is as it was, durably."""
    os.unlink(undo_path(image))
    sync_directory(os.path.dirname(undo_path(image)))


def bring_home(device: Device, *, new_salt: Callable[[], bytes] = random_salt) -> bool:
    """Recover a crashed image whose refcounts may be wrong; they stay, and so does the file's length.

    Where sector 0 is lost the root copy stands in for it. Returns False if the image was not live.

    Raises:
        JqcowError: the image, its journal, or a table that is needed is damaged.
        OSError: the host failed; it can be done again.
    """
    opened = open_engine(Medium(device), writable=True, use_root_copy=True, new_salt=new_salt, repair="all")
    if opened.root is None or opened.scan is None:
        return False
    lifecycle = opened.engine.lifecycle
    lifecycle.kept_bytes = device.size()
    lifecycle.recover(opened.root, opened.scan, "all")
    opened.engine.closing.clean()
    return True


def undo_on(
    device: Device, undo: Device, *, force: bool = False, new_salt: Callable[[], bytes] = random_salt
) -> UndoReport:
    """Give an image the bytes that it had before a repair. It may be cut off at any point, and done again.

    Args:
        device: the image. A crashed one is recovered first.
        undo: the undo file, which is marked meanwhile.
        force: also where the image was written since.
        new_salt: makes the salt of a journal, should recovery need one.

    Raises:
        CorruptionError: the undo file is damaged or of another file, or the image is neither as before nor as
            after the repair; neither is changed, save by recovery.
        JqcowError: the image cannot be recovered.
        OSError: the host failed; it can be done again.
    """
    file = UndoFile.read(undo)
    if not force and not file.is_of(device):
        raise CorruptionError("undo file", 0, "it is of another file, which was replaced: see --force")
    old_sector_0 = file.old_sector_0()
    if not file.is_laid_on(device):
        bring_home(device, new_salt=new_salt)
        if not force:
            _refuse_later_writes(device, file)
        _require_space(device, file)
        undo.pwrite(file.header.pack_mark(Mark.BEGUN), file.mark_place)
        # Durable now: the mark. Sector 0 is changed next, and may be lost but for the undo file.
        undo.barrier("undo.begin")
        device.pwrite(roots.pack_undo_root(Header.unpack(old_sector_0)), 0)
        # Durable now: sector 0, which every program refuses. The rest of the image is changed next (U3).
        device.barrier("undo.root")
    written = _lay(device, file)
    # Durable now: the image as it was, but for sector 0, which lets others at it from here on (U3).
    device.barrier("undo.image")
    device.pwrite(old_sector_0, 0)
    # Durable now: sector 0. The mark, which stands in for one that is lost, may go.
    device.barrier("undo.header")
    undo.truncate(file.runs_end)
    # Durable now: no mark. Whatever becomes of the image, another undo looks at it first.
    undo.barrier("undo.end")
    return UndoReport(None, written, file.header.old_bytes)


def _lay(device: Device, file: UndoFile) -> int:
    """Write everything back but sector 0; return how many bytes there are in all."""
    header, written = file.header, 0
    if device.size() != header.old_bytes:
        device.truncate(header.old_bytes)
    for run in file.runs():
        old = run.old[: max(0, header.old_bytes - run.offset)]
        skipped = 0 if run.offset else SECTOR_BYTES
        device.pwrite(old[skipped:], run.offset + skipped)
        written += len(old)
    return written


def _refuse_later_writes(device: Device, file: UndoFile) -> None:
    changed_since = "it was written since the repair; --force undoes all the same"
    size, old_bytes = device.size(), file.header.old_bytes
    if size < min(old_bytes, file.header.new_bytes):
        raise CorruptionError("image", size, changed_since)
    # A repair takes space for refcounts alone.
    if size > old_bytes and _end_of_named(device) > old_bytes:
        raise CorruptionError("image", old_bytes, changed_since)
    area = read_header(device)
    # Between the header and the end of the root copy nobody keeps anything.
    unused = range(len(area.data), _roots_end(area.header))
    for run in file.runs():
        now = device.pread(len(run.old), run.offset)
        for number, crc in enumerate(run.new_crcs):
            at = number * SECTOR_BYTES
            sector = now[at : at + SECTOR_BYTES]
            is_as_before = sector == run.old[at : at + SECTOR_BYTES] or run.offset + at in unused
            if not is_as_before and _native.crc32c(sector) != crc:
                raise CorruptionError("image", run.offset + at, changed_since)


def _end_of_named(device: Device) -> int:
    """Return the end in bytes of all that an image names but refcounts; where it is damaged the file's."""
    tables = open_engine(Medium(device), writable=False, repair="all").engine.public
    try:
        return tables.snapshots.named_end() * tables.geometry.cluster_bytes
    except CorruptionError:
        return device.size()


def _require_space(device: Device, file: UndoFile) -> None:
    """Take the space of what will be laid before the image is changed: a full disk is found out now."""
    end = min(device.size(), file.header.old_bytes)
    for run in file.runs():
        length = min(len(run.old), end - run.offset)
        if length > 0:
            device.allocate(run.offset, length)
