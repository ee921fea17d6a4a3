"""Damaged images, read and checked by jqcow and by qemu-img, and compared.

    python -m tests.fuzz.differential [--count N] [--first NUMBER] [--jobs J] [--record FILE]
    python -m tests.fuzz.differential --replay NUMBER

A case is named by its number, as in `tests.fuzz.hostile`. Where both read it without complaint the bytes must
be the same. Where one of them refuses, or their checks do not agree, the difference is listed: nobody has
told yet which of them are right. Exit status 1 where there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jqcow.cli.main import main as jqcow_command
from jqcow.errors import JqcowError
from jqcow.ondisk.header import Header
from tests.fuzz.hostile import Case, make_clean_case
from tests.support import figures, runs

DISK_BYTES_MAX = 64 << 20
"""Disks that are larger are checked alone."""
CASES_AT_ONCE = 50
QEMU_SECONDS_MAX = 20


@dataclass(frozen=True)
class Reading:
    """What a program reads of an image: ``data``, or why it refuses."""

    data: bytes | None
    refusal: str = ""


@dataclass(frozen=True)
class Checking:
    """What a program's check counts, or why it could not check."""

    errors: int = 0
    leaks: int = 0
    refusal: str = ""

    @property
    def verdict(self) -> str:
        """The verdict in one word, by which the two are compared."""
        return "refused" if self.refusal else "errors" if self.errors else "leaks" if self.leaks else "clean"


@dataclass
class Comparison(runs.Outcome):
    """The outcome of many cases; ``unexplained`` are the numbers of cases for each difference."""

    unexplained: dict[str, list[int]] = field(default_factory=dict)

    def add(self, other: runs.Outcome) -> None:
        super().add(other)
        if isinstance(other, Comparison):
            for difference, numbers in other.unexplained.items():
                self.unexplained.setdefault(difference, []).extend(numbers)


def read_by_qemu(image: Path, raw: Path) -> Reading:
    """Convert the disk to a raw file with qemu-img."""
    raw.unlink(missing_ok=True)
    done = run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    if done is None:
        return Reading(None, "no end in sight")
    if done.returncode:
        return Reading(None, first_line(done.stderr, image))
    return Reading(raw.read_bytes())


def read_by_jqcow(image: Path, raw: Path) -> Reading:
    """The same with the command of jqcow."""
    raw.unlink(missing_ok=True)
    status, _, told = command("convert", "-q", "-f", "qcow2", "-O", "raw", image, raw)
    if status:
        return Reading(None, first_line(told, image))
    return Reading(raw.read_bytes())


def check_by_qemu(image: Path) -> Checking:
    """Check with qemu-img."""
    done = run("qemu-img", "check", "-f", "qcow2", "--output=json", image)
    if done is None:
        return Checking(refusal="no end in sight")
    try:
        told = json.loads(done.stdout)
    except ValueError:
        return Checking(refusal=first_line(done.stderr, image))
    return Checking(told.get("corruptions", 0) + told.get("check-errors", 0), told.get("leaks", 0))


def check_by_jqcow(image: Path) -> Checking:
    """The same with the command of jqcow."""
    _, out, told = command("check", "-f", "qcow2", "--output=json", image)
    try:
        report = json.loads(out)
    except ValueError:
        return Checking(refusal=first_line(told, image))
    return Checking(report.get("corruptions", 0) + report.get("check-errors", 0), report.get("leaks", 0))


def run(*words: object) -> subprocess.CompletedProcess[str] | None:
    """Run a program; None where it does not end in time."""
    try:
        return subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            check=False,
            timeout=QEMU_SECONDS_MAX,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return None


def command(*words: object) -> tuple[int, str, str]:
    """Run a command of jqcow in this process: its exit status, and what it printed on either stream."""
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        try:
            status = jqcow_command([str(word) for word in words])
        except SystemExit as left:
            status = int(left.code or 0)
    return status, out.getvalue(), told.getvalue()


def first_line(text: str, image: Path) -> str:
    """Return the first line of a complaint, without the name of the image and with no numbers."""
    line = next((line for line in text.splitlines() if line.strip()), "no word")
    line = line.replace(str(image), "IMAGE")
    return "".join("#" if letter.isdigit() else letter for letter in line)


def disk_bytes(content: bytes) -> int:
    """Return the size of the disk that the header announces, 0 where there is no header."""
    try:
        return Header.unpack(content[:512]).size
    except (JqcowError, ValueError):
        return 0


def compare_case(number: int) -> Comparison:
    """Compare what the two read of one image, and what they find wrong in it."""
    found = Comparison(Counter(images=1))
    case = make_clean_case(number)
    with tempfile.TemporaryDirectory(prefix="jqcow-differential-") as folder:
        image, raw = Path(folder, "image.qcow2"), Path(folder, "disk.raw")
        image.write_bytes(case.content)
        for difference in (*differences_in_reading(case, image, raw, found), *difference_in_checking(image)):
            found.unexplained.setdefault(difference, []).append(number)
    return found


def differences_in_reading(case: Case, image: Path, raw: Path, found: Comparison) -> Iterator[str]:
    """Yield how the two differ in what they read; count how they agree."""
    if disk_bytes(case.content) > DISK_BYTES_MAX:
        found.counts["disks too large to read"] += 1
        return
    ours, theirs = read_by_jqcow(image, raw), read_by_qemu(image, raw)
    if ours.data is not None and theirs.data is not None:
        if ours.data == theirs.data:
            found.counts["the same bytes"] += 1
        else:
            yield "other bytes"
    elif ours.data is None and theirs.data is None:
        found.counts["both refuse to read"] += 1
    elif ours.data is None:
        yield f"only QEMU reads: {ours.refusal}"
    else:
        yield f"only jqcow reads: {theirs.refusal}"


def difference_in_checking(image: Path) -> Iterator[str]:
    """Yield how the verdicts of the two checks differ, if they do; then how their counts do."""
    ours, theirs = check_by_jqcow(image), check_by_qemu(image)
    if ours.verdict != theirs.verdict:
        yield f"checks: {ours.verdict}, QEMU {theirs.verdict}: {ours.refusal or theirs.refusal}"
    elif (ours.errors, ours.leaks) != (theirs.errors, theirs.leaks):
        yield f"checks: both {ours.verdict}, other counts"


def compare_cases(numbers: range) -> Comparison:
    """Compare some cases, one after the other."""
    found = Comparison()
    for number in numbers:
        found.add(compare_case(number))
    return found


def run_differential(first: int, count: int, jobs: int) -> Iterator[Comparison]:
    """Compare cases; yield the total after each part."""
    parts = (
        range(start, min(start + CASES_AT_ONCE, first + count))
        for start in range(first, first + count, CASES_AT_ONCE)
    )
    return runs.run_parts(compare_cases, parts, jobs, new_total=Comparison)


def describe(total: Comparison) -> str:
    """Return a line about a run as it goes on."""
    return f"{total.counts['images']:,} images, {sum(map(len, total.unexplained.values())):,} unexplained"


def main(arguments: list[str] | None = None) -> int:
    """Compare cases by number, and print how they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=1, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--replay", type=int, metavar="NUMBER")
    options = parser.parse_args(arguments)
    if options.replay is not None:
        print(make_clean_case(options.replay))
        total = compare_case(options.replay)
    else:
        total = runs.show(run_differential(options.first, options.count, options.jobs), describe)
    counts = total.counts + Counter({name: len(numbers) for name, numbers in total.unexplained.items()})
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"{count:8,}  {name}")
    for difference, numbers in total.unexplained.items():
        print(f"unexplained: {difference}: {numbers[:8]}")
    if options.record is not None:
        unexplained = sum(map(len, total.unexplained.values()))
        totals: dict[str, float | str] = {**counts, "unexplained": unexplained}
        figures.record(options.record, totals, program="python -m tests.fuzz.differential")
    return 1 if total.unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
