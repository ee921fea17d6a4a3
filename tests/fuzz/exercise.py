"""What the guided fuzzer does with an image file, and what must hold whatever it is made of.

O1. Nothing but a JqcowError is raised, or the EFBIG of a file system whose files end at 16 TiB.
O2. What was readable reads the same after recovery, changes elsewhere and a clean close, unless a refcount is
    too low, be it that it cannot be higher, or metadata lies in a cluster of data: a cluster that no change
    met until then may be allocated, or hold what a change writes.
O3. An image without errors and leaks has none after recovery, changes and a clean close.
O4. After a repair no refcount is too low or, but for what looks like lost data, too high.
O5. A second recovery finds nothing to do.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import jqcow
from jqcow.checker.check import CheckReport, Kind
from jqcow.disks.view import FileView
from jqcow.offline.records import list_journal
from jqcow.offline.recover import recover_image
from jqcow.ondisk.header import MAGIC
from tests.fuzz.sparse import SparseDevice

JOURNAL_BYTES = 64 << 10
PIECE_BYTES = 64 << 10
PATTERN = b"guest bytes of the fuzzer ".ljust(64, b".")
SALT = bytes(range(16))
WHEN = datetime(2020, 2, 20, tzinfo=UTC)
MENDED = (Kind.LEAK, Kind.LEAK_PAST_END, Kind.REFCOUNT_TOO_LOW, Kind.COPIED_FLAG)
"""What a repair of all leaves none of."""
UNCOUNTED = (Kind.REFCOUNT_TOO_LOW, Kind.TOO_MANY_REFERENCES, Kind.OVERLAP)
"""Where a check finds these, a cluster may have more uses than anything else can know."""

Result = TypeVar("Result")


def tolerated(action: Callable[[], Result]) -> Result | None:
    """Do something; return None where it is refused (O1)."""
    try:
        return action()
    except jqcow.JqcowError as error:
        # The text is part of it: it must not fail either.
        str(error)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
    return None


@dataclass(frozen=True)
class Seen:
    """What an image showed: pieces of its disk by their offset, what a check found, its snapshots' names."""

    pieces: dict[int, bytes]
    report: CheckReport | None
    snapshots: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """True for an image without errors and leaks."""
        return self.report is not None and self.report.errors == 0 and self.report.leaks == 0

    @property
    def counted(self) -> bool:
        """True for an image of which no refcount is known to be too low, and no cluster to have two uses."""
        return self.report is None or self.report.counts.keys().isdisjoint(UNCOUNTED)


class Exercise:
    """Everything that a user would do with one image."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.device = SparseDevice(content)

    def run(self) -> None:
        """Look, list the journal, use, recover and repair."""
        seen = self.look()
        tolerated(self.list_journal)
        self.use(seen)
        self.repair()

    def open(self, mode: jqcow.image.Mode, **options: str) -> jqcow.Image | None:
        """Open the image, or be refused."""
        self.device.reopen(read_only=mode == "r")
        length = JOURNAL_BYTES if mode == "r+" else None
        return tolerated(
            lambda: jqcow.open_device(
                self.device,
                mode,
                journal_size=length,
                new_salt=lambda: SALT,
                **options,  # type: ignore[arg-type]
            )
        )

    def look(self) -> Seen | None:
        """Read what can be read. The device takes no change meanwhile."""
        image = self.open("r")
        if image is None:
            return None
        with image:
            tolerated(image.info)
            tolerated(lambda: sum(1 for _ in image.extents()))
            names = tolerated(lambda: tuple(taken.id for taken in image.snapshots()))
            seen = Seen(pieces_of(image), tolerated(image.check), names or ())
        for name in seen.snapshots[:2]:
            shown = self.open("r", snapshot=name)
            if shown is not None:
                with shown:
                    pieces_of(shown)
        return seen

    def list_journal(self) -> None:
        """Read the journal as the command of that name does."""
        self.device.reopen(read_only=True)
        list_journal(FileView.of_file(self.device))

    def use(self, seen: Seen | None) -> None:
        """Recover, change and close the image, and look at it again (O2, O3)."""
        image = self.open("r+")
        if image is None:
            return
        changed = self.change(image)
        # Where closing fails the image stays as recoverable as it was.
        tolerated(image.close)
        self.compare(seen, changed)

    def change(self, image: jqcow.Image) -> list[range]:
        """Make changes here and there; return the guest ranges that may read otherwise now."""
        changed = [range(0, 700), range(PIECE_BYTES, PIECE_BYTES + 5000)]
        for place in changed:
            data = (PATTERN * 80)[: len(place)]
            if place.stop <= image.size:
                tolerated(partial(image.pwrite, data, place.start))
        end = image.size - min(image.size, 3000)
        changed.append(range(end, image.size))
        tolerated(partial(image.discard, image.size - end, end))
        tolerated(image.flush)
        tolerated(partial(image.create_snapshot, "made by the fuzzer", WHEN))
        tolerated(partial(image.pwrite, PATTERN[:8], 8) if image.size > 16 else image.flush)
        tolerated(image.check)
        return changed

    def compare(self, seen: Seen | None, changed: list[range]) -> None:
        """Look again at a closed image: all as before, but for what was changed."""
        again = self.look()
        assert again is not None or seen is None, "an image that was open cannot be opened again"
        self.device.reopen(read_only=True)
        assert self.device.pread(len(MAGIC), 0) == MAGIC, "the header was overwritten"
        if seen is None or again is None:
            return
        assert again.sound or not seen.sound, "an image without errors has some now"
        for offset, before in seen.pieces.items() if seen.counted else ():
            assert offset in again.pieces, f"what was readable at {offset:#x} is not"
            assert blanked(before, offset, changed) == blanked(again.pieces[offset], offset, changed), (
                f"what was read at {offset:#x} has changed"
            )

    def recover(self) -> None:
        """Recover as jqcow-recover does, first without writing; a second time there is nothing to do (O5)."""
        self.device = SparseDevice(self.content)
        seen = self.look()
        self.device.reopen(read_only=True)
        recover = partial(recover_image, self.device, journal_size=JOURNAL_BYTES, new_salt=lambda: SALT)
        planned = tolerated(partial(recover, dry_run=True))
        self.device.reopen(read_only=False)
        report = tolerated(recover)
        if report is None:
            return
        assert planned is not None and planned.state == report.state, "a dry run says something else"
        again = recover()
        assert again.state == "clean", f"recovered twice, the image is {again.state}"
        if seen is not None:
            self.compare(seen, [])

    def repair(self) -> None:
        """Repair, and count again (O4)."""
        self.device = SparseDevice(self.content)
        image = self.open("r+", repair="all")
        if image is None:
            return
        report = tolerated(image.check)
        if report is not None:
            left = {kind: report.counts[kind] for kind in MENDED if report.counts.get(kind)}
            if Kind.PAST_END in report.counts:
                # What a table names past the end of the file keeps its refcount.
                left.pop(Kind.LEAK_PAST_END, None)
            assert not left, f"the repair leaves {left}: {report.findings[0]}"
        tolerated(image.close)


def pieces_of(image: jqcow.Image) -> dict[int, bytes]:
    """Return pieces at the start and at the end of a disk, by offset: those that can be read."""
    size = image.size
    pieces = {}
    for offset in {0, min(PIECE_BYTES, size), max(0, size - PIECE_BYTES)}:
        data = tolerated(partial(image.pread, min(PIECE_BYTES, size - offset), offset))
        if data is not None:
            pieces[offset] = data
    return pieces


def blanked(data: bytes, offset: int, changed: list[range]) -> bytes:
    """Return what was read at an offset, with zeros for what has changed."""
    left = bytearray(data)
    for place in changed:
        first, last = max(place.start - offset, 0), min(place.stop - offset, len(data))
        if first < last:
            left[first:last] = bytes(last - first)
    return bytes(left)


def exercise(content: bytes) -> None:
    """Do all of it with an image file."""
    Exercise(content).run()
