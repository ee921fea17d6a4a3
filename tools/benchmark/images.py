"""Verbs on whole images by jqcow's commands and by QEMU's, in turn: processor time and memory.

The image is all mapped and has no data: ``preallocation=metadata`` makes it a file of tables and holes. So
the time is that of the tables. Seconds are of the processor, user and system, of whole commands: the start of
the interpreter is among them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

JQCOW = (sys.executable, "-c", "import sys; from jqcow.cli.main import main; sys.exit(main())")
QEMU = ("qemu-img",)
NOTHING = (sys.executable, "-c", "pass")
CONVERTED_BYTES = 16 << 30


@dataclass(frozen=True)
class Verb:
    """One verb: what the rounds took, in seconds of processor time, and the most memory of jqcow in bytes."""

    name: str
    jqcow_seconds: tuple[float, ...]
    qemu_seconds: tuple[float, ...]
    jqcow_bytes: int

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios, jqcow's time to QEMU's: below 1, jqcow is faster."""
        pairs = zip(self.jqcow_seconds, self.qemu_seconds, strict=True)
        return statistics.median(ours / max(theirs, 0.001) for ours, theirs in pairs)


@dataclass(frozen=True)
class Verbs:
    """All verbs of one run, and what an interpreter takes that does nothing."""

    rounds: int
    image_bytes: int
    start_seconds: float
    verbs: tuple[Verb, ...]

    def format_table(self) -> str:
        """Return the medians for people."""
        lines = [
            f"{self.image_bytes >> 30} GiB mapped, medians of {self.rounds} rounds; seconds of processor",
            "",
            f"{'':18}{'jqcow':>8}{'QEMU':>8}{'ratio':>8}{'jqcow MiB':>12}",
        ]
        for verb in self.verbs:
            times = (verb.jqcow_seconds, verb.qemu_seconds)
            row = "".join(f"{statistics.median(seconds):8.2f}" for seconds in times)
            lines.append(f"{verb.name:18}{row}{verb.ratio:8.2f}{verb.jqcow_bytes >> 20:12}")
        return "\n".join([*lines, "", f"a Python that does nothing: {self.start_seconds:.2f}"])


def compare_images(folder: Path, rounds: int, size: int) -> Verbs:
    """Run each verb ``rounds`` times by each program, in turn, on one image of ``size`` bytes."""
    image, empty, target = folder / "mapped.qcow2", folder / "empty.qcow2", folder / "target.raw"
    for path, length in ((image, size), (empty, CONVERTED_BYTES)):
        options = ("-f", "qcow2", "-o", "preallocation=metadata")
        subprocess.run(["qemu-img", "create", "-q", *options, str(path), str(length)], check=True)
    pairs: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
        ("info", ("info", str(image)), ("info", str(image))),
        ("check", ("check", "-q", str(image)), ("check", "-q", str(image))),
        ("map", ("map", "--output=json", str(image)), ("map", "--output=json", str(image))),
        ("snapshot create", ("snapshot", "-c", "one", str(image)), ("snapshot", "-c", "one", str(image))),
        ("snapshot delete", ("snapshot", "-d", "one", str(image)), ("snapshot", "-d", "one", str(image))),
        (
            "convert, empty",
            ("convert", "-q", "-O", "raw", str(empty), str(target)),
            ("convert", "-W", "-m", "16", "-O", "raw", str(empty), str(target)),
        ),
    ]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name, *_ in pairs}
    memory: dict[str, int] = {name: 0 for name, *_ in pairs}
    starts = [_cost(NOTHING)[0] for _ in range(rounds)]
    for _ in range(rounds):
        for place, program in enumerate((JQCOW, QEMU)):
            # Each program with the image as it was: no snapshot of the other one is there.
            for name, *commands in pairs:
                target.unlink(missing_ok=True)
                seconds, peak_bytes = _cost((*program, *commands[place]))
                times[name][place].append(seconds)
                memory[name] = max(memory[name], 0 if place else peak_bytes)
    for path in (image, empty, target):
        path.unlink()
    verbs = [Verb(name, tuple(times[name][0]), tuple(times[name][1]), memory[name]) for name, *_ in pairs]
    return Verbs(rounds, size, statistics.median(starts), tuple(verbs))


def _cost(command: tuple[str, ...]) -> tuple[float, int]:
    """Run a command that must succeed; return its seconds of processor time, and its peak of memory."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10
