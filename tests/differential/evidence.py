"""What jqcow and QEMU read of one image and find wrong in it, gathered to be compared."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from jqcow.checker.check import CheckReport, Kind
from jqcow.cli.main import main as jqcow_command
from jqcow.cli.recover import main as recover_command
from jqcow.errors import JqcowError
from jqcow.offline.info import check_file, read_info
from jqcow.ondisk.header import Header
from jqcow.ondisk.layout import SECTOR_BYTES
from tests.differential.damages import Case
from tests.fuzz.handling import TooSlow, time_bound

DISK_BYTES_MAX = 64 << 20
"""Disks that are larger are checked alone."""

FILE_BYTES_MAX = 1 << 30
"""A recovered file reaches to the last cluster that it counts; if that is far, it is not compared."""

SECONDS_MAX = 120
"""For one command. Other work may keep a machine busy."""

JOURNAL_BIT = 1 << 60
PIECE_BYTES = 64 << 10


@dataclass(frozen=True)
class Told:
    """What a program told: its exit status, None where it did not end, and what it printed as errors."""

    status: int | None
    complaint: str = ""

    @property
    def done(self) -> bool:
        """True where it says that all went well, whatever it warned of."""
        return self.status == 0

    @property
    def reason(self) -> str:
        """The line that tells why it failed: the last one."""
        lines = [line for line in self.complaint.splitlines() if line.strip()]
        return lines[-1] if lines else "no word"


@dataclass(frozen=True)
class Reading:
    """How both read a disk, and what.

    Attributes:
        snapshot: its id, "" for the active disk.
        our_bytes, their_bytes: size of what was read, where both came to an end.
        differing: guest offsets of sectors that both read, but not alike.
    """

    snapshot: str
    ours: Told
    theirs: Told
    our_bytes: int = 0
    their_bytes: int = 0
    differing: tuple[int, ...] = ()

    @property
    def same(self) -> bool:
        """True where both read, and read the same."""
        is_read = self.ours.done and self.theirs.done
        return is_read and self.our_bytes == self.their_bytes and not self.differing


@dataclass(frozen=True)
class Checking:
    """What both checks say: jqcow's report and QEMU's numbers, None where the check was refused."""

    ours: Told
    report: CheckReport | None
    theirs: Told
    corruptions: int | None
    leaks: int = 0
    check_errors: int = 0

    @property
    def our_verdict(self) -> str:
        """jqcow's verdict in one word."""
        if self.report is None:
            return "refused"
        return "errors" if self.report.errors else "leaks" if self.report.leaks else "clean"

    @property
    def their_verdict(self) -> str:
        """QEMU's verdict in one word."""
        if self.corruptions is None:
            return "refused"
        return "errors" if self.corruptions or self.check_errors else "leaks" if self.leaks else "clean"

    @property
    def counts(self) -> dict[Kind, int]:
        """How many of each kind jqcow found."""
        return self.report.counts if self.report is not None else {}


@dataclass
class Evidence:
    """All that was seen of a case. ``content`` is the file as both saw it; of a live one, as recovered.

    ``case`` is None of an image that was not damaged here. ``settled`` is what jqcow finds in a live one
    after recovery.
    """

    case: Case | None
    content: bytes
    recovered: Told | None = None
    settled: CheckReport | None = None
    live_opened_by_qemu: bool = False
    before: Checking | None = None
    readings: list[Reading] = field(default_factory=list)
    checking: Checking | None = None

    def all_told(self) -> list[Told]:
        """Return all that jqcow told."""
        checks = [found.ours for found in (self.before, self.checking) if found is not None]
        recovered = [self.recovered] if self.recovered is not None else []
        return [*checks, *recovered, *(reading.ours for reading in self.readings)]


def is_live(content: bytes) -> bool:
    """Return True if sector 0 says, to every program, that only jqcow can read the image."""
    is_version_3 = content[:8] == b"QFI\xfb\0\0\0\3"
    return is_version_3 and bool(int.from_bytes(content[72:80], "big") & JOURNAL_BIT)


def gather(case: Case, folder: Path) -> Evidence:
    """Let both read and check the image of a case, in a folder that has what it may name."""
    image = folder / "image.qcow2"
    write_sparse(image, case.content)
    evidence = Evidence(case, case.content)
    theirs = image
    if is_live(case.content) or case.live:
        evidence.before = check(image, image)
        evidence.live_opened_by_qemu = is_live(case.content) and evidence.before.corruptions is not None
        theirs = folder / "recovered.qcow2"
        shutil.copyfile(image, theirs)
        evidence.recovered = in_process(recover_command, theirs, "--no-check", "--journal-size", "64k")
        if not evidence.recovered.done:
            return evidence
        if theirs.stat().st_size > FILE_BYTES_MAX:
            return evidence
        evidence.content = theirs.read_bytes()
        evidence.settled = check(theirs, theirs).report
        if not is_live(case.content):
            # Sector 0 is lost: nothing reads the image before it is recovered.
            image = theirs
    if disk_bytes(evidence.content) <= DISK_BYTES_MAX:
        evidence.readings.append(read(image, theirs, "", folder))
        name = snapshot_of(theirs, case.number)
        if name:
            evidence.readings.append(read(image, theirs, name, folder))
    evidence.checking = check(image, theirs)
    return evidence


def write_sparse(path: Path, content: bytes) -> None:
    """Write a file, with holes where there are zeros."""
    with path.open("wb") as file:
        for start in range(0, len(content), PIECE_BYTES):
            piece = content[start : start + PIECE_BYTES]
            if piece.count(0) < len(piece):
                file.seek(start)
                file.write(piece)
        file.truncate(len(content))


def disk_bytes(content: bytes) -> int:
    """Return the size of the disk that the header announces, 0 where there is no header."""
    try:
        return Header.unpack(content[:512]).size
    except JqcowError:
        return 0


def snapshot_of(image: Path, number: int) -> str:
    """Return the id of a snapshot that both can be asked for, "" for none."""
    try:
        facts = read_info(image, "qcow2").qcow2
    except (JqcowError, OSError):
        return ""
    names = [taken.id for taken in facts.snapshots] if facts else []
    names = [name for name in names if name.isascii() and name.isalnum() and names.count(name) == 1]
    return names[number % len(names)] if names else ""


def read(ours: Path, theirs: Path, snapshot: str, folder: Path) -> Reading:
    """Let both convert a disk to a raw file."""
    our_raw, their_raw = folder / "ours.raw", folder / "theirs.raw"
    for raw in (our_raw, their_raw):
        raw.unlink(missing_ok=True)
    chosen = ("-l", snapshot) if snapshot else ()
    we = in_process(
        jqcow_command,
        "convert",
        "-q",
        "--allow-files",
        "--probe",
        "-f",
        "qcow2",
        "-O",
        "raw",
        *chosen,
        ours,
        our_raw,
    )
    they, _ = run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *chosen, theirs, their_raw)
    if not (we.done and they.done):
        return Reading(snapshot, we, they)
    sizes = our_raw.stat().st_size, their_raw.stat().st_size
    return Reading(snapshot, we, they, *sizes, tuple(differing_sectors(our_raw, their_raw)))


def differing_sectors(one: Path, other: Path) -> Iterator[int]:
    """Yield the offsets of sectors that differ in two files, as far as both go; common holes are not read."""
    common = min(one.stat().st_size, other.stat().st_size)
    with one.open("rb") as first, other.open("rb") as second:
        at = 0
        while at < common:
            at = min(_data_from(file, at, common) for file in (first, second)) // PIECE_BYTES * PIECE_BYTES
            length = min(PIECE_BYTES, common - at)
            ours, theirs = (os.pread(file.fileno(), max(0, length), at) for file in (first, second))
            if ours != theirs:
                places = range(0, length, SECTOR_BYTES)
                yield from (at + place for place in places if ours[place:][:512] != theirs[place:][:512])
            at += PIECE_BYTES


def _data_from(file: IO[bytes], at: int, end: int) -> int:
    try:
        return os.lseek(file.fileno(), at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end


def check(ours: Path, theirs: Path) -> Checking:
    """Let both check an image."""
    we = in_process(jqcow_command, "check", "-q", "-f", "qcow2", ours)
    report: CheckReport | None = None
    with contextlib.suppress(JqcowError, OSError):
        report = check_file(ours)
    they, printed = run("qemu-img", "check", "-f", "qcow2", "--output=json", theirs)
    try:
        told = json.loads(printed)
    except ValueError:
        return Checking(we, report, they, None)
    numbers = (told.get("corruptions", 0), told.get("leaks", 0), told.get("check-errors", 0))
    return Checking(we, report, they, *numbers)


def run(*words: object) -> tuple[Told, str]:
    """Run a program of QEMU's; return what it told, and what it printed on the standard output."""
    try:
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True, text=True, check=False, timeout=SECONDS_MAX, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Told(None, "no end in sight"), ""
    return Told(done.returncode, done.stderr), done.stdout


def in_process(command: Callable[[list[str]], int], *words: object) -> Told:
    """Run a command of jqcow in this process."""
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        try:
            with time_bound(SECONDS_MAX):
                status: int | None = command([str(word) for word in words])
        except SystemExit as left:
            status = int(left.code or 0)
        except TooSlow:
            return Told(None, "no end in sight")
    return Told(status, told.getvalue())
