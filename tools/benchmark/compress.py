"""The same disk compressed by jqcow's command and by qemu-img, in turn: time and size as ratios."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 1 << 20
VOCABULARY = 4000
NOISE_EVERY = 8
KINDS = ("zlib", "zstd")
JQCOW = (
    sys.executable,
    "-c",
    "import sys; from jqcow.cli.main import main; sys.exit(main())",
    "convert",
    "-q",
)
# Without -t qemu-img does not flush, and its image might not outlive a power cut.
QEMU = ("qemu-img", "convert", "-t", "writeback")
QEMU_UNORDERED = (*QEMU, "-W")


@dataclass(frozen=True)
class Work:
    """One compression type: seconds of each round, and bytes of the image."""

    compression_type: str
    jqcow_seconds: tuple[float, ...]
    qemu_seconds: tuple[float, ...]
    qemu_unordered_seconds: tuple[float, ...]
    jqcow_bytes: int
    qemu_bytes: int

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios, jqcow's time to QEMU's: below 1, jqcow is faster."""
        return _median_ratio(self.jqcow_seconds, self.qemu_seconds)

    @property
    def unordered_ratio(self) -> float:
        """The same beside ``qemu-img convert -W``, which compresses several clusters at once."""
        return _median_ratio(self.jqcow_seconds, self.qemu_unordered_seconds)

    @property
    def size_ratio(self) -> float:
        """jqcow's image to QEMU's: below 1, jqcow's is smaller."""
        return self.jqcow_bytes / self.qemu_bytes


@dataclass(frozen=True)
class Compressions:
    """All types of one run."""

    rounds: int
    disk_bytes: int
    works: tuple[Work, ...]

    def format_table(self) -> str:
        """Return the medians for people."""
        head = f"{'':6}{'jqcow':>9}{'QEMU':>9}{'QEMU -W':>9}{'ratio':>8}{'to -W':>8}{'size ratio':>12}"
        lines = [f"{self.disk_bytes >> 20} MiB, medians of {self.rounds} rounds; seconds", "", head]
        for work in self.works:
            times = (work.jqcow_seconds, work.qemu_seconds, work.qemu_unordered_seconds)
            row = "".join(f"{statistics.median(seconds):9.2f}" for seconds in times)
            row += f"{work.ratio:8.2f}{work.unordered_ratio:8.2f}{work.size_ratio:12.3f}"
            lines.append(f"{work.compression_type:6}{row}")
        return "\n".join([*lines, "", "ratio: jqcow's to QEMU's, round by round; below 1 jqcow is better"])


def compare_compression(folder: Path, rounds: int, size: int) -> Compressions:
    """Compress a disk of ``size`` bytes ``rounds`` times with each type, by each program in turn."""
    disk = folder / "disk.raw"
    write_disk(disk, size)
    works = tuple(_work(disk, kind, rounds) for kind in KINDS)
    disk.unlink()
    return Compressions(rounds, size, works)


def write_disk(path: Path, size: int) -> None:
    """Write a disk of words, which shrinks to about a third, with noise in an eighth of it."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(3, 12)) for _ in range(VOCABULARY)]
    with path.open("wb") as file:
        for index in range(size // CHUNK_BYTES):
            if index % NOISE_EVERY == NOISE_EVERY - 1:
                file.write(chance.randbytes(CHUNK_BYTES))
            else:
                file.write(b"".join(chance.choices(words, k=CHUNK_BYTES // 3))[:CHUNK_BYTES])


def _work(disk: Path, kind: str, rounds: int) -> Work:
    commands = (JQCOW, QEMU, QEMU_UNORDERED)
    targets = [disk.with_name(f"{index}.qcow2") for index in range(len(commands))]
    times: list[list[float]] = [[] for _ in commands]
    for _ in range(rounds):
        for command, target, seconds in zip(commands, targets, times, strict=True):
            target.unlink(missing_ok=True)
            seconds.append(_one(command, disk, target, kind))
    for target in targets:
        subprocess.run(["qemu-img", "compare", "-q", "-F", "raw", str(target), str(disk)], check=True)
    sizes = [target.stat().st_size for target in targets]
    for target in targets:
        target.unlink()
    return Work(kind, tuple(times[0]), tuple(times[1]), tuple(times[2]), sizes[0], sizes[1])


def _one(command: tuple[str, ...], disk: Path, target: Path, kind: str) -> float:
    options = ["-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}"]
    # What an earlier command left to be written is not this one's to wait for.
    os.sync()
    start = time.perf_counter()
    subprocess.run([*command, *options, str(disk), str(target)], check=True, capture_output=True)
    return time.perf_counter() - start


def _median_ratio(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))
