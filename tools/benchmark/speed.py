"""Times of the same work by jqcow and by QEMU, in turn: a ratio of neighbours survives a busy machine."""

from __future__ import annotations

import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jqcow

CLUSTER_BYTES = 65536
BLOCK_BYTES = 4096
CHUNK_BYTES = 1 << 20
FLUSHES = 400
READS = 4000

Timed = Callable[[Path, int], float]
"""Does the work on the image at a path, with a size in bytes; returns the seconds that it took."""


@dataclass(frozen=True)
class Pair:
    """One kind of work: seconds of each round, by jqcow and by QEMU."""

    work: str
    unit_count: int
    jqcow_seconds: tuple[float, ...]
    qemu_seconds: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios, jqcow's time to QEMU's: below 1, jqcow is faster."""
        pairs = zip(self.jqcow_seconds, self.qemu_seconds, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


@dataclass(frozen=True)
class Speeds:
    """All pairs of one run."""

    rounds: int
    pairs: tuple[Pair, ...]

    def format_table(self) -> str:
        """Return the medians for people; times in microseconds for each operation."""
        lines = [f"medians of {self.rounds} rounds; microseconds for each operation", ""]
        lines.append(f"{'':38}{'jqcow':>10}{'QEMU':>10}{'ratio':>8}")
        for pair in self.pairs:
            ours, theirs = (
                statistics.median(seconds) / pair.unit_count * 1e6
                for seconds in (pair.jqcow_seconds, pair.qemu_seconds)
            )
            lines.append(f"{pair.work:38}{ours:10.1f}{theirs:10.1f}{pair.ratio:8.2f}")
        return "\n".join(
            [*lines, "", "ratio: jqcow's time to QEMU's, round by round; below 1 jqcow is faster"]
        )


def compare_speed(folder: Path, rounds: int, size: int) -> Speeds:
    """Time each kind of work ``rounds`` times; ``size`` bytes are written in sequence and read from."""
    works: list[tuple[str, int, Timed, Timed, bool]] = [
        ("4 KiB allocating write and flush", FLUSHES, jqcow_flushes, qemu_flushes, False),
        ("1 MiB sequential write", size // CHUNK_BYTES, jqcow_sequence, qemu_sequence, False),
        ("4 KiB random read", READS, jqcow_reads, qemu_reads, True),
    ]
    pairs = []
    for work, unit_count, ours, theirs, filled in works:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for seconds, timed in zip(times, (ours, theirs), strict=True):
                seconds.append(_one(folder / "image.qcow2", size, timed, filled=filled))
        pairs.append(Pair(work, unit_count, tuple(times[0]), tuple(times[1])))
    return Speeds(rounds, tuple(pairs))


def _one(path: Path, size: int, timed: Timed, *, filled: bool) -> float:
    disk = max(size, FLUSHES * CLUSTER_BYTES)
    with jqcow.create(path, disk, overwrite=True) as image:
        for offset in range(0, size if filled else 0, CHUNK_BYTES):
            image.pwrite(b"\x5a" * CHUNK_BYTES, offset)
    seconds = timed(path, size)
    path.unlink()
    return seconds


def _read_offsets(size: int) -> list[int]:
    chance = random.Random(1)
    return [chance.randrange(size // BLOCK_BYTES) * BLOCK_BYTES for _ in range(READS)]


def jqcow_flushes(path: Path, size: int) -> float:
    """Allocating writes, each flushed. The first, which sets the journal up, is not timed."""
    data = b"\xa5" * BLOCK_BYTES
    with jqcow.open(path, "r+") as image:
        image.pwrite(data, 0)
        image.flush()
        start = time.perf_counter()
        for index in range(1, FLUSHES):
            image.pwrite(data, index * CLUSTER_BYTES)
            image.flush()
        return time.perf_counter() - start


def jqcow_sequence(path: Path, size: int) -> float:
    """Large writes in a row, and one flush."""
    data = b"\xa5" * CHUNK_BYTES
    with jqcow.open(path, "r+") as image:
        start = time.perf_counter()
        for offset in range(0, size, CHUNK_BYTES):
            image.pwrite(data, offset)
        image.flush()
        return time.perf_counter() - start


def jqcow_reads(path: Path, size: int) -> float:
    """Small reads anywhere."""
    offsets = _read_offsets(size)
    with jqcow.open(path) as image:
        start = time.perf_counter()
        for offset in offsets:
            image.pread(BLOCK_BYTES, offset)
        return time.perf_counter() - start


def qemu_flushes(path: Path, size: int) -> float:
    """The same writes and flushes, by qemu-io, which times each of its commands."""
    steps = [f"write {index * CLUSTER_BYTES} {BLOCK_BYTES}\nflush\n" for index in range(FLUSHES)]
    return _qemu_io(path, steps)


def qemu_sequence(path: Path, size: int) -> float:
    """The same large writes."""
    steps = [f"write {offset} {CHUNK_BYTES}\n" for offset in range(0, size, CHUNK_BYTES)]
    return _qemu_io(path, [*steps, "flush\n"])


def qemu_reads(path: Path, size: int) -> float:
    """As many reads by qemu-img bench, one at a time, a stride apart: it has no random reads."""
    stride = CLUSTER_BYTES + BLOCK_BYTES
    command = ["qemu-img", "bench", "-f", "qcow2", "-d", "1", "-c", str(READS), "-s", str(BLOCK_BYTES)]
    done = subprocess.run(
        [*command, "-S", str(stride), str(path)], check=True, capture_output=True, text=True
    )
    found = re.search(r"([\d.]+) seconds", done.stdout)
    if found is None:
        raise ValueError(f"qemu-img bench printed {done.stdout!r}")
    return float(found[1])


def _qemu_io(path: Path, steps: list[str]) -> float:
    """Run qemu-io commands; return the seconds without the start and end of the process."""
    command = ["qemu-io", "-t", "writeback", "-f", "qcow2", str(path)]
    times = []
    for script in ("", "".join(steps)):
        start = time.perf_counter()
        subprocess.run(command, input=script, check=True, capture_output=True, text=True)
        times.append(time.perf_counter() - start)
    return times[1] - times[0]
