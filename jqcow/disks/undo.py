"""Undo files: written before a repair, and laid back over the image afterwards.

An image may be taken back as long as each sector that the repair changed is as before it or as after it, and
nothing but the repair's own refcounts lies behind the old end of the file: nobody has written there since. A
journal may lie behind the end of both, where the repair was cut off.

Once that is known a mark in the undo file says so, and sector 0 is one that every program refuses, until the
image is as it was. What an undo does depends on both:

    mark    sector 0                what the undo does
    any     of an undo              lays the file over the image, and ends
    begun   no magic: lost          the same, if all else is as before or after the repair: a power cut did it
    begun, served: all as before    the same: it had ended, and may have been no image that can be opened
    inplace any                     begins, unless something else lies behind the old end: it may be no image
    any     another                 recovers the image, refuses one that was written since, and begins

A last mark says that the file has served: should it come back after its removal, another repair replaces it.
What a killed process left in the page cache is made durable, or dropped, before any of this is believed.

U1. What follows a repair is never taken back unasked: a mark in the undo file says that the repair is done,
    durably, before anybody may write to the image. Only what has no mark is a repair that was cut off.
    (By another hard link of the image the undo file is not found.)
U2. An undo file is of one file, whatever comes to lie under its name: by force alone it goes over another.
U3. Nobody opens an image that is half taken back: sector 0 is the first of it that changes, and the last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain

from jqcow import _native
from jqcow.device.base import Device, Reader
from jqcow.device.file import FileDevice, birth_of, remove_file
from jqcow.device.trial import Ranges, TrialDevice, data_extents_of
from jqcow.engine.engine import open_engine, random_salt, settle
from jqcow.engine.medium import Medium
from jqcow.engine.scan import read_header
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import MAGIC, V3_BYTES, Header
from jqcow.ondisk.layout import SECTOR_BYTES, HostOffset, entry_place
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
_NAME_BYTES_MAX = 255
"""Of a name in a directory."""
_LOOK_BYTES = 1 << 20
_RUN_BYTES_MAX = RUN_BYTES + RUN_SECTORS_MAX * (4 + SECTOR_BYTES)


def undo_path(image: str) -> str:
    """Return the path of an image's undo file: the image's, and a suffix.

    Where that is too long for a name a hash stands for the end of the image's.
    """
    folder, name = os.path.split(os.path.realpath(image))
    if len(os.fsencode(name + SUFFIX)) > _NAME_BYTES_MAX:
        whole = os.fsencode(name)
        tail = "-" + hashlib.blake2b(whole, digest_size=8).hexdigest() + SUFFIX
        name = os.fsdecode(whole[: _NAME_BYTES_MAX - len(tail)])
        return os.path.join(folder, name + tail)
    return os.path.join(folder, name + SUFFIX)


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


def _header_in(sector: bytes) -> Header:
    """Return the header in sector 0; where it is lost, one that says nothing and whose root has its copy."""
    try:
        return Header.unpack(sector)
    except FormatError:
        return Header(3, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, header_length=V3_BYTES)


def _birth_of(device: Device) -> tuple[int, int]:
    return birth_of(device) if isinstance(device, FileDevice) else (0, 0)


def pack_undo(trial: TrialDevice, target: Device, *, in_place: bool = False) -> None:
    """Write into ``target`` what takes back the changes of a trial.

    With ``in_place`` they are written as they are, without a journal. Then the file tells of all of them,
    also behind the old end, and takes them back in whatever state the image is.
    """
    place, count = HEADER_BYTES, 0
    roots_end = _roots_end(read_header(trial).header)
    changes = trial.changed(BLOCK_BYTES, also=range(roots_end))
    if in_place:
        behind = (
            (at, bytes(BLOCK_BYTES), new.ljust(BLOCK_BYTES, b"\0")) for at, new in trial.behind(BLOCK_BYTES)
        )
        changes = chain(changes, behind)
    for run in _runs(changes):
        target.pwrite(run.pack(), place)
        place, count = place + run.length, count + 1
    runs_bytes = place - HEADER_BYTES
    header = UndoHeader(trial.old_bytes, trial.size(), count, runs_bytes, *_birth_of(trial.below))
    target.pwrite(header.pack(), 0)
    if in_place:
        UndoFile(target, header).put_mark(target, Mark.IN_PLACE)


def save_undo(trial: TrialDevice, image: FileDevice, *, in_place: bool = False) -> None:
    """Write the undo file of a repair on trial, durably, beside the image; who may read that may read it.

    ``in_place`` as in `pack_undo`.

    Raises:
        FileExistsError: there is one of an earlier repair.
        OSError: the host failed; nothing is left under the name.
    """
    path = undo_path(image.path)
    with closing(FileDevice.create_temporary(path, follow_links=False)) as target:
        target.take_attributes_of(image)
        pack_undo(trial, target, in_place=in_place)
        try:
            target.publish(overwrite=False)
        except FileExistsError as error:
            if not _make_room(target, path):
                error.add_note("it can take an earlier repair back: apply it with jqcow undo, or remove it")
                raise
            # Not over the old one: that would hand down who may read it.
            target.publish(overwrite=False)


def _make_room(target: FileDevice, path: str) -> bool:
    """Remove an undo file that has the name of a new one, if it has served or is of the same repair.

    Until the new one has the name there is none, and nothing of the image is changed.
    """
    with (
        suppress(FormatError, CorruptionError, UnsupportedFeatureError, IsADirectoryError),
        closing(FileDevice.open(path, writable=True)) as found,
    ):
        _settle(found)
        file = UndoFile.read(found)
        if file.mark is Mark.SERVED or (file.mark is None and _begins_alike(target, found)):
            remove_file(found)
            return True
    return False


def _begins_alike(one: Reader, other: Reader) -> bool:
    """Return True if a file begins with all that another one holds."""
    step, size = 1 << 20, one.size()
    return all(
        one.pread(length, at) == other.pread(length, at)
        for at in range(0, size, step)
        for length in [min(step, size - at)]
    )


def _settle(undo: Device) -> None:
    """Make what an earlier process left of an undo file durable, and have reads show nothing else."""
    medium = Medium(undo)
    # Durable now: a mark that a killed process left in the page cache. Who reads it next relies on it (U1).
    medium.barrier("undo.settle")
    medium.forget_cached()


@dataclass(frozen=True)
class UndoFile:
    """An undo file that is there."""

    reader: Reader
    header: UndoHeader

    @classmethod
    def of(cls, reader: Reader) -> UndoFile:
        """Read the header of an undo file.

        Raises:
            FormatError, CorruptionError: not an undo file, or a damaged one.
        """
        return cls(reader, UndoHeader.unpack(reader.pread(HEADER_BYTES, 0)))

    @classmethod
    def read(cls, reader: Reader) -> UndoFile:
        """Read an undo file and check all of it.

        Raises:
            FormatError, CorruptionError: not an undo file, or a damaged one.
        """
        undo = cls.of(reader)
        for _ in undo.runs():
            pass
        return undo

    def runs(self) -> Iterator[UndoRun]:
        """Yield the runs, each of them checked as it is read.

        Raises:
            CorruptionError: one is damaged, or they are not in order.
        """
        place, end = HEADER_BYTES, 0
        for _ in range(self.header.run_count):
            length = min(_RUN_BYTES_MAX, max(0, self.reader.size() - place))
            run = UndoRun.unpack(self.reader.pread(length, place), place)
            if not end <= run.offset < max(self.header.old_bytes, self.header.new_bytes):
                raise CorruptionError("undo file", place, f"a run at {run.offset:#x}, out of order")
            yield run
            place, end = place + run.length, run.offset + len(run.old)
        if place != HEADER_BYTES + self.header.runs_bytes:
            raise CorruptionError("undo file", place, "its runs have another length")

    @property
    def mark(self) -> Mark | None:
        """What the file says of its image."""
        return self.header.unpack_mark(self.reader.pread(MARK_BYTES, self.header.mark_place))

    @property
    def tells_behind(self) -> bool:
        """True if the file tells of all that the repair wrote behind the old end, too.

        The block in which that end lies is in the file of a repair with a journal as well.
        """
        return self.mark is Mark.IN_PLACE or any(run.offset >= self.header.old_bytes for run in self.runs())

    def put_mark(self, undo: Device, mark: Mark) -> None:
        """Write a mark into the file, which the device holds; a barrier follows."""
        undo.pwrite(self.header.pack_mark(mark), self.header.mark_place)

    def old_sector_0(self) -> bytes:
        """Return sector 0 of the image before the repair.

        Raises:
            CorruptionError: the file lacks it.
        """
        first = next(self.runs(), None)
        if first is None or first.offset:
            raise CorruptionError("undo file", HEADER_BYTES, "it lacks sector 0")
        return first.old[:SECTOR_BYTES]

    def is_laid_on(self, image: Reader, *, asked: bool, force: bool = False) -> bool:
        """Return True if an undo has begun to change the image (U3).

        Where sector 0 is lost the rest of the image tells whether a power cut did that, or somebody put
        something else into the file. Where the rest tells nothing it is enough to be ``asked``; ``force``
        spares the look at it.
        """
        sector = image.pread(SECTOR_BYTES, 0)
        if roots.is_being_undone(sector):
            return True
        if sector[: len(MAGIC)] == MAGIC:
            is_ended = self.mark is Mark.BEGUN or (asked and self.mark is Mark.SERVED)
            return is_ended and self._is_as_before(image)
        if self.mark is not Mark.BEGUN:
            return False
        garbled_end = max(BLOCK_BYTES, _roots_end(_header_in(self.old_sector_0())))
        kept = self._sectors_behind(image, garbled_end)
        return force or (all(kept) and (asked or bool(kept)))

    def _is_as_before(self, image: Reader) -> bool:
        old_bytes = self.header.old_bytes
        return image.size() == old_bytes and all(
            image.pread(len(old), run.offset) == old
            for run in self.runs()
            if (old := run.old[: max(0, old_bytes - run.offset)])
        )

    def _sectors_behind(self, image: Reader, start: int) -> list[bool]:
        """Tell of each run that reaches behind ``start`` whether all its sectors are before's or after's."""
        return [
            self.first_stranger(run, image, range(start)) is None
            for run in self.runs()
            if run.offset + len(run.old) > start
        ]

    def first_stranger(self, run: UndoRun, image: Reader, unused: range) -> int | None:
        """Return the offset of the first sector that is neither as before nor as after the repair.

        Those at the offsets ``unused`` count for nothing.
        """
        now = image.pread(len(run.old), run.offset)
        for number, crc in enumerate(run.new_crcs):
            at = number * SECTOR_BYTES
            sector = now[at : at + SECTOR_BYTES]
            is_as_before = sector == run.old[at : at + SECTOR_BYTES] or run.offset + at in unused
            if not is_as_before and _native.crc32c(sector) != crc:
                return run.offset + at
        return None

    def has_new_sector_0(self, image: Reader) -> bool:
        """Return True if sector 0 is as after the repair."""
        first = next(self.runs())
        return _native.crc32c(image.pread(SECTOR_BYTES, 0)) == first.new_crcs[0]

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
    try:
        with closing(FileDevice.open(undo_path(image.path), writable=True)) as undo:
            mark_done(undo, image)
    except (FileNotFoundError, IsADirectoryError, FormatError, CorruptionError, UnsupportedFeatureError):
        # There is none, or another file of that name, which does not concern the image.
        return
    except OSError as error:
        error.add_note(f"what is beside {image.path} must be told first that its repair is done")
        raise


def mark_done(undo: Device, image: Device) -> None:
    """Say in an undo file, if it is of this image, that its repair is done (U1).

    Raises:
        FormatError, CorruptionError: not an undo file, or a damaged one.
        OSError: the host failed.
    """
    _settle(undo)
    file = UndoFile.of(undo)
    if file.mark in (Mark.DONE, Mark.SERVED) or not file.is_of(image):
        return
    file.put_mark(undo, Mark.DONE)
    # Durable now: the mark. The image may be written, and no repair takes that back unasked.
    undo.barrier("undo.done")


def take_back_cut_off(device: Device, undo: Device, *, new_salt: Callable[[], bytes] = random_salt) -> bool:
    """Take back a repair, or end an undo, that was cut off, before another repair; False if none was.

    Raises:
        FormatError, CorruptionError: not an undo file, a damaged one, or one of another repair.
        OSError: the host failed; it can be done again.
    """
    settle(Medium(device))
    _settle(undo)
    file = UndoFile.read(undo)
    if not file.is_of(device):
        return False
    if file.mark is not Mark.IN_PLACE and not file.is_laid_on(device, asked=False):
        if file.mark in (Mark.DONE, Mark.SERVED):
            return False
        is_cut_off = bring_home(device, new_salt=new_salt) or file.is_of_cut_off_repair(device.size())
        if not is_cut_off:
            return False
    undo_on(device, undo, new_salt=new_salt)
    return True


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
    settle(Medium(device))
    _settle(undo)
    file = UndoFile.read(undo)
    if not force and not file.is_of(device):
        raise CorruptionError("undo file", 0, "it is of another file, which was replaced: see --force")
    old_sector_0 = file.old_sector_0()
    undo_root = roots.pack_undo_root(_header_in(old_sector_0))
    if not file.is_laid_on(device, asked=True, force=force):
        if file.mark is not Mark.IN_PLACE:
            bring_home(device, new_salt=new_salt)
        if not force:
            _refuse_later_writes(device, file)
        _require_space(device, file)
        if file.mark is not Mark.IN_PLACE:
            file.put_mark(undo, Mark.BEGUN)
            # Durable now: the mark. Sector 0 is changed next, and may be lost but for the undo file.
            undo.barrier("undo.begin")
        device.pwrite(undo_root, 0)
        # Durable now: sector 0, which every program refuses. The rest of the image is changed next (U3).
        device.barrier("undo.root")
    written = _lay(device, file)
    # Durable now: the image as it was, but for sector 0, which lets others at it from here on (U3).
    device.barrier("undo.image")
    device.pwrite(old_sector_0, 0)
    # Durable now: sector 0. The mark, which stands in for one that is lost, may go.
    device.barrier("undo.header")
    file.put_mark(undo, Mark.SERVED)
    # Durable now: that the file has served. Whatever becomes of the image, another undo looks at it first,
    # and no repair takes anything back unasked, should the file's name come back in a crash (U1).
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
        if old:
            device.pwrite(old[skipped:], run.offset + skipped)
        written += len(old)
    return written


def _refuse_later_writes(device: Device, file: UndoFile) -> None:
    changed_since = "it was written since the repair; --force undoes all the same"
    size, old_bytes = device.size(), file.header.old_bytes
    if size < min(old_bytes, file.header.new_bytes):
        raise CorruptionError("image", size, changed_since)
    is_more = _is_strange_behind if file.tells_behind else _is_more_behind
    if size > old_bytes and is_more(device, file):
        raise CorruptionError("image", old_bytes, changed_since)
    if file.mark is Mark.IN_PLACE:
        # A power cut may have garbled any block that was being written, and all of these are in the file.
        return
    area = read_header(device)
    # Between the header and the end of the root copy nobody keeps anything.
    unused = range(len(area.data), _roots_end(area.header))
    for run in file.runs():
        stranger = file.first_stranger(run, device, unused)
        if stranger is not None:
            raise CorruptionError("image", stranger, changed_since)


def _is_more_behind(device: Device, file: UndoFile) -> bool:
    """Return True if an image names more behind the old end of the file than refcounts of the repair."""
    tables = open_engine(Medium(device), writable=False, repair="all").engine.public
    old_end = tables.geometry.clusters(file.header.old_bytes)
    try:
        if tables.snapshots.named_end() > old_end:
            return True
        table = HostOffset(tables.view.header.refcount_table_offset)
        # Of a table that the repair wrote nothing stays, whoever extended it; one that it gave up is noise.
        is_noted = table < file.header.old_bytes and file.has_new_sector_0(device)
        blocks = tables.refcounts.blocks_from_top() if is_noted else ()
        new = [index for index, block in blocks if tables.geometry.cluster_of(block) >= old_end]
    except CorruptionError:
        return True
    repaired = Ranges()
    for run in file.runs():
        repaired.add(run.offset, run.offset + len(run.old))
    return any(entry_place(table, index) not in repaired for index in new)


def _is_strange_behind(device: Device, file: UndoFile) -> bool:
    """Return True if behind the old end lies something else than zeros and what the undo file tells of."""
    reached = file.header.old_bytes
    ends = [(run.offset, run.offset + len(run.old)) for run in file.runs()]
    for start, end in (*ends, (device.size(), device.size())):
        for offset, length in data_extents_of(device, reached, max(0, start - reached)):
            for at in range(offset, offset + length, _LOOK_BYTES):
                if not _native.is_zero(device.pread(min(_LOOK_BYTES, offset + length - at), at)):
                    return True
        reached = max(reached, end)
    return False


def _require_space(device: Device, file: UndoFile) -> None:
    """Take the space of what will be laid before the image is changed: a full disk is found out now."""
    size = device.size()
    try:
        for run in file.runs():
            length = min(len(run.old), file.header.old_bytes - run.offset)
            if length > 0:
                device.allocate(run.offset, length)
    except OSError:
        if device.size() > size:
            device.truncate(size)
        raise
