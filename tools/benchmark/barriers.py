"""How many sync-like system calls a flush costs: counted by strace on the real process.

The work: ``flushes`` times one allocating 4 KiB write, each into a guest cluster of its own, and a flush.
Between two checkpoints jqcow promises exactly one sync-like call for each flush; with the checkpoints, and
with what brings writes home that wait in the journal, at most 1.02. QEMU does the same writes and flushes
with cache=writeback, its default.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CLUSTER_BYTES = 65536
WRITE_BYTES = 4096
AMORTISED_MAX = 1.02
SYNC_CALLS = ("fsync", "fdatasync", "syncfs", "sync_file_range", "msync", "sync")
TRACED = f"{','.join(SYNC_CALLS)},pwritev2,openat,open,lseek"
NOT_SYNCS = ("mark", "synchronous open")
FLUSH_MARK = 1 << 60
"""The writer seeks /dev/null here after every flush: a mark in the trace that syncs nothing."""

_CALL = re.compile(r"^\d+ +(?:<\.\.\. )?(\w+)(?:\(| resumed)(.*)$")


@dataclass(frozen=True)
class Counts:
    """Sync-like calls of one program during its flushes; opens with O_SYNC or O_DSYNC in all its life."""

    program: str
    flushes: int
    sync_calls: dict[str, int]
    synchronous_opens: int

    @property
    def amortised(self) -> float:
        """Sync-like calls for each flush, checkpoints included."""
        return sum(self.sync_calls.values()) / self.flushes


@dataclass(frozen=True)
class Spread:
    """Of jqcow's flushes, how many made how many calls: of those between checkpoints, and of those with one.

    As one with a checkpoint counts a flush that brought home what waited in the journal, or followed that.

    ``first`` is the number of calls up to the end of the first flush, which sets the journal up.
    """

    first: int
    between: dict[int, int]
    with_checkpoint: dict[int, int]

    @property
    def between_checkpoints(self) -> float:
        """Sync-like calls for each flush between checkpoints."""
        calls = sum(calls * count for calls, count in self.between.items())
        return calls / max(1, sum(self.between.values()))


@dataclass(frozen=True)
class Comparison:
    """jqcow's counts beside QEMU's."""

    jqcow: Counts
    qemu: Counts
    spread: Spread

    @property
    def kept(self) -> bool:
        """True if jqcow keeps its promise: exactly 1 between checkpoints, at most 1.02 with them."""
        return (
            set(self.spread.between) == {1}
            and self.jqcow.amortised <= AMORTISED_MAX
            and not self.jqcow.synchronous_opens
        )

    def format_table(self) -> str:
        """Return the counts for people."""
        lines = [f"{self.jqcow.flushes} flushes, each after one allocating write of {WRITE_BYTES} bytes", ""]
        lines.append(f"{'':34}{'jqcow':>10}{'QEMU':>10}")
        pair = (self.jqcow, self.qemu)
        for call in (*SYNC_CALLS, "pwritev2+RWF_DSYNC"):
            if any(counts.sync_calls.get(call) for counts in pair):
                lines.append(_row(call, *(str(counts.sync_calls.get(call, 0)) for counts in pair)))
        lines.append(_row("files opened with O_SYNC, O_DSYNC", *(str(c.synchronous_opens) for c in pair)))
        lines.append(_row("per flush, amortised", *(f"{counts.amortised:.4f}" for counts in pair)))
        lines.append(_row("per flush, between checkpoints", f"{self.spread.between_checkpoints:.2f}", "-"))
        between = sum(self.spread.between.values())
        checkpoints = sum(self.spread.with_checkpoint.values())
        lines += ["", f"jqcow: {between} flushes between checkpoints, by calls: {_told(self.spread.between)}"]
        told = _told(self.spread.with_checkpoint)
        lines.append(f"       {checkpoints} flushes with a checkpoint, or after writes came home: {told}")
        lines.append(f"       the first flush, which sets the journal up: {self.spread.first} calls")
        lines.append("The promise is kept." if self.kept else "THE PROMISE IS BROKEN.")
        return "\n".join(lines)


def _row(name: str, *cells: str) -> str:
    return f"{name:34}" + "".join(f"{cell:>10}" for cell in cells)


def _told(counts: dict[int, int]) -> str:
    return ", ".join(f"{count} made {calls}" for calls, count in sorted(counts.items())) or "none"


def compare_barriers(folder: Path, flushes: int) -> Comparison:
    """Do the work by jqcow and by QEMU, under strace, in ``folder``; count.

    Raises:
        subprocess.CalledProcessError: strace, or what it traced, failed.
    """
    ours, spread = count_jqcow(folder, flushes)
    return Comparison(ours, count_qemu(folder, flushes), spread)


def count_jqcow(folder: Path, flushes: int) -> tuple[Counts, Spread]:
    """Count jqcow's calls, flush by flush, without those of creating and closing."""
    image, trace = folder / "jqcow.qcow2", folder / "jqcow.trace"
    done = run_traced(trace, [sys.executable, "-m", "tools.benchmark.writer", str(image), str(flushes)])
    calls = list(read_trace(trace))
    trace.unlink()
    image.unlink()
    # The first mark stands after the creation, the others each after a flush; closing comes behind them.
    marks = [position for position, call in enumerate(calls) if call == "mark"]
    per_flush = [
        sum(call not in NOT_SYNCS for call in calls[start:stop]) for start, stop in itertools.pairwise(marks)
    ]
    ended_epoch = {int(number) for number in done.stdout.split()}
    with_checkpoint = Counter(per_flush[number] for number in sorted(ended_epoch))
    between = Counter(count for number, count in enumerate(per_flush) if number and number not in ended_epoch)
    spread = Spread(per_flush[0], dict(between), dict(with_checkpoint))
    return _counts("jqcow", flushes, calls[marks[0] : marks[-1]], calls), spread


def count_qemu(folder: Path, flushes: int) -> Counts:
    """Count qemu-io's calls on the same writes and flushes, without those of opening and closing."""
    calls: list[list[str]] = []
    for count in (0, flushes):
        image, trace, script = folder / "qemu.qcow2", folder / "qemu.trace", folder / "qemu.script"
        size = (count + 1) * CLUSTER_BYTES
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)], check=True)
        steps = (f"write {index * CLUSTER_BYTES} {WRITE_BYTES}\nflush\n" for index in range(count))
        script.write_text("".join(steps))
        with script.open() as commands:
            run_traced(trace, ["qemu-io", "-t", "writeback", "-f", "qcow2", str(image)], commands.fileno())
        calls.append(list(read_trace(trace)))
        for path in (image, trace, script):
            path.unlink()
    idle, busy = (Counter(found) for found in calls)
    return _counts("QEMU", flushes, (busy - idle).elements(), calls[1])


def run_traced(trace: Path, command: list[str], stdin: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command under strace, which writes the calls that count, and the marks, to ``trace``."""
    strace = ["strace", "-f", "-qq", "-e", f"trace={TRACED}", "-e", "signal=none", "-o", str(trace)]
    return subprocess.run([*strace, *command], check=True, text=True, stdin=stdin, capture_output=True)


def read_trace(trace: Path) -> Iterator[str]:
    """Yield the name of each sync-like call, ``mark`` for a mark, ``synchronous open`` for such an open."""
    with trace.open(errors="replace") as file:
        for line in file:
            found = _CALL.match(line)
            if found is None or " resumed" in line:
                continue
            name, rest = found.groups()
            if name in SYNC_CALLS:
                yield name
            elif name == "pwritev2" and "SYNC" in rest:
                yield "pwritev2+RWF_DSYNC"
            elif name in ("open", "openat") and re.search(r"\bO_D?SYNC\b", rest):
                yield "synchronous open"
            elif name == "lseek" and str(FLUSH_MARK) in rest:
                yield "mark"


def _counts(program: str, flushes: int, within: Iterable[str], everything: list[str]) -> Counts:
    syncs = Counter(call for call in within if call not in NOT_SYNCS)
    return Counts(program, flushes, dict(syncs), everything.count("synchronous open"))
