"""Times of the same work by jqcow, by QEMU and on a raw file, in turn: a ratio survives a busy machine.

Both images start as copies of one. Opening and closing without work is taken off; what closing has to do for
the work, such as bringing home what waits in the journal, is in the time.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jqcow
from jqcow.image.entering import SmallWrites

CLUSTER_BYTES = 65536
BLOCK_BYTES = 4096
CHUNK_BYTES = 1 << 20
EMPTY_BYTES = 4 << 30
FILLED_BYTES = 128 << 20
READERS = 8
DEPTH = 32
READS = 4000


@dataclass(frozen=True)
class Work:
    """One kind of work: writes of a length, so many of them before each flush.

    Attributes:
        make: makes the image, before anything is timed.
        is_filled: the image is full of data; the raw file beside it, too.
        has_raw: a raw file can do the same.
        flush_after: so many writes; 0 for one flush at the end.
        is_transaction: jqcow makes a transaction of what is flushed together.
    """

    name: str
    make: Callable[[Path], None]
    count: int
    is_filled: bool = False
    has_raw: bool = True
    is_sequential: bool = False
    length_bytes: int = BLOCK_BYTES
    flush_after: int = 1
    is_transaction: bool = False

    def offsets(self) -> list[int]:
        """Return where it writes: each place once, in sequence or anywhere."""
        if self.is_sequential:
            return [index * self.length_bytes for index in range(self.count)]
        size = FILLED_BYTES if self.is_filled else EMPTY_BYTES
        places = random.Random(1).sample(range(size // self.length_bytes), self.count)
        return [place * self.length_bytes for place in places]

    def groups(self) -> Iterator[list[int]]:
        """Yield the offsets of the writes between two flushes."""
        offsets, step = self.offsets(), self.flush_after or max(1, self.count)
        for start in range(0, self.count, step):
            yield offsets[start : start + step]


@dataclass(frozen=True)
class Row:
    """One kind of work: seconds of each round, of ``unit_count`` operations; of what cannot do it none.

    ``jqcow`` writes in place; ``journal`` is jqcow with small writes in the journal.
    """

    work: str
    unit_count: int
    jqcow: tuple[float, ...]
    journal: tuple[float, ...]
    qemu: tuple[float, ...]
    raw: tuple[float, ...]

    def line(self) -> str:
        """Return the medians for people, in microseconds for each operation, and jqcow's ratios to others."""
        columns = [f"{self.work:42}"]
        for seconds in (self.jqcow, self.journal, self.qemu, self.raw):
            each = f"{statistics.median(seconds) / self.unit_count * 1e6:,.1f}" if seconds else "-"
            columns.append(f"{each:>9}")
        for ours in (self.jqcow, self.journal):
            for others in (self.qemu, self.raw):
                ratio = f"{ratio_of(ours, others):.2f}" if ours and others else "-"
                columns.append(f"{ratio:>9}")
        return "".join(columns)


def ratio_of(ours: tuple[float, ...], others: tuple[float, ...]) -> float:
    """Return the median of the rounds' ratios: below 1, the first is faster."""
    return statistics.median(one / other for one, other in zip(ours, others, strict=True))


@dataclass(frozen=True)
class Speeds:
    """All rows of one run."""

    rounds: int
    rows: tuple[Row, ...]

    def format_table(self) -> str:
        """Return the rows for people."""
        heads = ("jqcow", "journal", "QEMU", "raw", "to QEMU", "to raw", "to QEMU", "to raw")
        return "\n".join(
            [
                f"medians of {self.rounds} rounds; microseconds for each operation",
                "",
                f"{'':42}" + "".join(f"{head:>9}" for head in heads),
                *(row.line() for row in self.rows),
                "",
                "journal: small writes wait there. Then the times of both to the others', round by round.",
            ]
        )


# The images.


def make_empty(path: Path) -> None:
    """Make an image of which nothing is allocated."""
    jqcow.create(path, EMPTY_BYTES).close()


def make_filled(path: Path) -> None:
    """Make an image that is full of noise."""
    with jqcow.create(path, FILLED_BYTES) as image:
        for offset, noise in filling():
            image.pwrite(noise, offset)


def filling() -> Iterator[tuple[int, bytes]]:
    """Yield noise that fills a disk, each part with its offset."""
    for offset in range(0, FILLED_BYTES, CHUNK_BYTES):
        yield offset, random.Random(offset).randbytes(CHUNK_BYTES)


def make_overlay(path: Path) -> None:
    """Make an empty image over a full one."""
    below = path.with_name("below.qcow2")
    if not below.exists():
        make_filled(below)
    jqcow.create(path, FILLED_BYTES, backing_file=below.name, backing_format="qcow2").close()


def make_with_snapshot(path: Path) -> None:
    """Make a full image of which a snapshot has every cluster."""
    make_filled(path)
    with jqcow.open(path, "r+") as image:
        image.create_snapshot("one")


def make_recycled(path: Path) -> None:
    """Make an image whose clusters are free, all but the last, and still hold what was in them."""
    make_filled(path)
    run_qemu("qemu-img", "snapshot", "-c", "one", path)
    with jqcow.open(path, "r+") as image:
        image.discard(FILLED_BYTES - CLUSTER_BYTES, 0)
        image.pwrite(b"\x5a" * CLUSTER_BYTES, FILLED_BYTES - CLUSTER_BYTES)
    # As a rule QEMU leaves the bytes of what it frees.
    run_qemu("qemu-img", "snapshot", "-d", "one", path)


def make_raw(path: Path, work: Work) -> None:
    """Make the raw file beside it."""
    with path.open("wb") as file:
        if work.is_filled:
            for _, noise in filling():
                file.write(noise)
        else:
            file.truncate(EMPTY_BYTES)
        file.flush()
        os.fsync(file.fileno())


WORKS = (
    Work("4 KiB allocating anywhere, flush", make_empty, 400),
    Work("4 KiB allocating in sequence, flush", make_empty, 400, is_sequential=True),
    Work("4 KiB over a backing file, flush", make_overlay, 300, is_filled=True, has_raw=False),
    Work("4 KiB after a snapshot, flush", make_with_snapshot, 300, is_filled=True, has_raw=False),
    Work("4 KiB into recycled clusters, flush", make_recycled, 300, is_filled=True, has_raw=False),
    Work("4 KiB overwritten, flush", make_filled, 400, is_filled=True),
    Work("4 writes of 4 KiB as a transaction", make_empty, 400, flush_after=4, is_transaction=True),
    Work("4 KiB allocating anywhere", make_empty, 2000, flush_after=0),
    Work("4 KiB overwritten", make_filled, 4000, is_filled=True, flush_after=0),
    Work("1 MiB in sequence", make_empty, 128, length_bytes=CHUNK_BYTES, is_sequential=True, flush_after=0),
)
"""What is written, in the order in which it is shown."""


# The work.


def write_by_jqcow(path: Path, work: Work, small_writes: SmallWrites = "in-place") -> None:
    """Open, work, close."""
    data = os.urandom(work.length_bytes)
    with jqcow.open(path, "r+", allow_files=True, small_writes=small_writes) as image:
        for offsets in work.groups():
            if work.is_transaction:
                with image.transaction() as opened:
                    for offset in offsets:
                        opened.pwrite(data, offset)
            else:
                for offset in offsets:
                    image.pwrite(data, offset)
            image.flush()


def write_by_qemu(path: Path, work: Work) -> None:
    """The same by qemu-io."""
    steps = [
        f"write {offset} {work.length_bytes}\n" + "flush\n" * last
        for offset, last in _with_last(work.groups())
    ]
    command = ["qemu-io", "-t", "writeback", "-f", "qcow2", str(path)]
    subprocess.run(command, input="".join(steps), check=True, capture_output=True, text=True)


def write_raw(path: Path, work: Work) -> None:
    """The same by system calls on a raw file."""
    descriptor = os.open(path, os.O_RDWR)
    data = os.urandom(work.length_bytes)
    for offset, last in _with_last(work.groups()):
        os.pwrite(descriptor, data, offset)
        if last:
            os.fdatasync(descriptor)
    os.close(descriptor)


def _with_last(groups: Iterable[list[int]]) -> Iterator[tuple[int, bool]]:
    for offsets in groups:
        yield from ((offset, offset == offsets[-1]) for offset in offsets)


def read_by_jqcow(path: Path, count: int, *, threads: int) -> float:
    """Read anywhere, in one thread or several; return the seconds. Every cluster was read before."""
    chance = random.Random(1)
    offsets = [chance.randrange(FILLED_BYTES // BLOCK_BYTES) * BLOCK_BYTES for _ in range(count)]

    def read(share: list[int]) -> None:
        for offset in share:
            image.pread(BLOCK_BYTES, offset)

    with jqcow.open(path) as image, ThreadPoolExecutor(threads) as pool:
        read(list(range(0, FILLED_BYTES, CLUSTER_BYTES)))
        started = time.perf_counter()
        list(pool.map(read, [offsets[first::threads] for first in range(threads)]))
        return time.perf_counter() - started


def read_by_qemu(path: Path, count: int, *, depth: int) -> float:
    """As many reads by qemu-img bench, a stride apart: it has no random reads."""
    words = ("-f", "qcow2", "-d", depth, "-c", count, "-s", BLOCK_BYTES, "-S", CLUSTER_BYTES + BLOCK_BYTES)
    found = re.search(r"([\d.]+) seconds", run_qemu("qemu-img", "bench", *words, path))
    if found is None:
        raise ValueError("qemu-img bench printed no time")
    return float(found[1])


def run_qemu(*words: object) -> str:
    """Run one of QEMU's programs, and return what it prints."""
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


# The comparison.


def compare_speed(folder: Path, rounds: int, share: float = 1.0) -> Speeds:
    """Time each kind of work ``rounds`` times; of a ``share`` of the operations."""
    rows = []
    for work in WORKS:
        count = max(4, int(work.count * share)) // 4 * 4
        rows.append(_compare(folder, replace(work, count=count), rounds))
    count = max(4, int(READS * share))
    path = folder / "filled.qcow2"
    make_filled(path)
    pairs: tuple[tuple[str, Callable[[], float], Callable[[], float]], ...] = (
        (
            "4 KiB read, one at a time",
            partial(read_by_jqcow, path, count, threads=1),
            partial(read_by_qemu, path, count, depth=1),
        ),
        (
            f"4 KiB read, {READERS} threads; QEMU: depth {DEPTH}",
            partial(read_by_jqcow, path, count, threads=READERS),
            partial(read_by_qemu, path, count, depth=DEPTH),
        ),
    )
    for name, ours, theirs in pairs:
        ours_seconds, theirs_seconds = zip(*((ours(), theirs()) for _ in range(rounds)), strict=True)
        rows.append(Row(name, count, ours_seconds, (), theirs_seconds, ()))
    return Speeds(rounds, tuple(rows))


def _compare(folder: Path, work: Work, rounds: int) -> Row:
    made, raw = folder / "made.qcow2", folder / "made.raw"
    for path in (made, raw):
        path.unlink(missing_ok=True)
    work.make(made)
    if work.has_raw:
        make_raw(raw, work)
    writers = [
        (write_by_jqcow, made),
        (partial(write_by_jqcow, small_writes="journal"), made),
        (write_by_qemu, made),
        (write_raw, raw),
    ]
    nothing = replace(work, count=0)
    times: list[list[float]] = [[] for _ in writers]
    for _ in range(rounds):
        for seconds, (writer, start) in zip(times, writers, strict=True):
            if start.exists():
                path = folder / f"disk{start.suffix}"
                run_qemu("cp", "--sparse=always", start, path)
                os.sync()
                idle = _seconds(writer, path, nothing)
                seconds.append(_seconds(writer, path, work) - idle)
                path.unlink()
    return Row(work.name, work.count, *(tuple(seconds) for seconds in times))


def _seconds(writer: Callable[[Path, Work], None], path: Path, work: Work) -> float:
    started = time.perf_counter()
    writer(path, work)
    return time.perf_counter() - started
