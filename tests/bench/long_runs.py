"""Long runs on real files: does anything grow with the amount written, or with the number of checkpoints?

    python -m tests.bench.long_runs [--scale N] [DIRECTORY]

runs each story N times as long as CI does, and prints its figures. The images are made in DIRECTORY, a
temporary one if not given. The figures stand in docs/figures.md.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jqcow
from jqcow.image import JournalInfo
from tests.support import inside

CLUSTER_BYTES = 4096
SMALLEST_JOURNAL = 64 << 10
L2_TABLE_MAPS = CLUSTER_BYTES // 8 * CLUSTER_BYTES
"""Guest bytes that one L2 table maps with these clusters."""
SECTOR = b"\x5a" * 512
WINDOWS = 4


@dataclass(frozen=True)
class MemoryFigures:
    """A run in equal parts: peak of Python's memory and length of the file in each, both in bytes."""

    changes: int
    records: int
    staged_blocks_max: int
    staged_blocks_limit: int
    memory_peaks: tuple[int, ...]
    file_lengths: tuple[int, ...]


@dataclass(frozen=True)
class CheckpointFigures:
    """A run of checkpoints. ``lengths`` of the file and ``journals`` are those seen, each one once."""

    checkpoints: int
    sequences: range
    epochs: range
    lengths: frozenset[int]
    journals: frozenset[tuple[int, int]]


@dataclass(frozen=True)
class MoveFigures:
    """Transactions of rising size: the journal after each one, and the length of the file, in bytes."""

    journals: tuple[JournalInfo, ...]
    lengths: tuple[int, ...]


def live_journal(image: jqcow.Image) -> JournalInfo:
    """Return the live journal, which must be there."""
    journal = image.info().journal
    assert journal is not None
    return journal


@contextmanager
def traced() -> Iterator[None]:
    """Trace Python's memory."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def create(path: Path, disk_bytes: int, journal_bytes: int = SMALLEST_JOURNAL) -> jqcow.Image:
    """Create an image of small clusters."""
    return jqcow.create(path, disk_bytes, cluster_size=CLUSTER_BYTES, journal_size=journal_bytes)


# Unflushed writing


def write_unflushed(path: Path, changes: int) -> MemoryFigures:
    """Write and discard the same clusters again and again, at random under 64 L2 tables, and never flush."""
    chance = random.Random(1)
    places = [table * L2_TABLE_MAPS + cluster * CLUSTER_BYTES for table in range(64) for cluster in range(8)]
    with create(path, 64 * L2_TABLE_MAPS, 8 * SMALLEST_JOURNAL) as image:
        for place in places:
            image.pwrite(SECTOR, place)

        def change() -> None:
            place = chance.choice(places)
            image.discard(CLUSTER_BYTES, place)
            image.pwrite(SECTOR, place)

        return _measure(image, changes, change)


def spread_unflushed(path: Path, tables: int) -> MemoryFigures:
    """Write one sector under each of many L2 tables, more than are kept in memory, and never flush."""
    with create(path, tables * L2_TABLE_MAPS, 2 * SMALLEST_JOURNAL) as image:
        places = iter(range(0, tables * L2_TABLE_MAPS, L2_TABLE_MAPS))
        return _measure(image, tables, lambda: image.pwrite(SECTOR, next(places)))


def _measure(image: jqcow.Image, changes: int, change: Callable[[], object]) -> MemoryFigures:
    image.pwrite(SECTOR, 0)
    image.flush()
    _, limit = inside.staged(image)
    first, staged_max = live_journal(image).sequence, 0
    peaks, lengths = [], []
    with traced():
        for _ in range(WINDOWS):
            tracemalloc.reset_peak()
            for _ in range(changes // WINDOWS):
                change()
                staged_max = max(staged_max, inside.staged(image)[0])
            peaks.append(tracemalloc.get_traced_memory()[1])
            lengths.append(image.info().file_size)
    assert image.check().ok
    records = live_journal(image).sequence - first
    return MemoryFigures(changes, records, staged_max, limit, tuple(peaks), tuple(lengths))


# Checkpoints


def checkpoint_often(path: Path, checkpoints: int) -> CheckpointFigures:
    """Move a cluster of data in every checkpoint: each has a record and homes to write."""
    lengths, journals = set(), set()
    with create(path, 1 << 20) as image:
        _move_data(image, 0)
        image.checkpoint()
        before = live_journal(image)
        for number in range(checkpoints):
            _move_data(image, number)
            image.checkpoint()
            now = live_journal(image)
            if number >= checkpoints // 10:
                # By then a few freed clusters are on their way to be used again.
                lengths.add(image.info().file_size)
            journals.add((now.offset, now.length))
        assert image.check().ok
    return CheckpointFigures(
        checkpoints,
        range(before.sequence, now.sequence),
        range(before.epoch, now.epoch),
        frozenset(lengths),
        frozenset(journals),
    )


def _move_data(image: jqcow.Image, number: int) -> None:
    place = number % 16 * CLUSTER_BYTES
    image.discard(CLUSTER_BYTES, place)
    image.pwrite(bytes([number % 255 + 1]) * CLUSTER_BYTES, place)


# Moves of the journal


def outgrow_journal(path: Path, table_counts: list[int]) -> MoveFigures:
    """Commit transactions that change so many L2 tables each, most of them too many for the journal."""
    journals, lengths = [], []
    with create(path, max(table_counts) * L2_TABLE_MAPS) as image:
        for number, count in enumerate(table_counts):
            with image.transaction() as transaction:
                for table in range(count):
                    transaction.pwrite(bytes([number + 1]) * len(SECTOR), table * L2_TABLE_MAPS)
            journals.append(live_journal(image))
            lengths.append(image.info().file_size)
            assert image.pread(1, (count - 1) * L2_TABLE_MAPS) == bytes([number + 1])
        assert image.check().ok
    return MoveFigures(tuple(journals), tuple(lengths))


def exceed_largest_journal(path: Path) -> str:
    """Change more in one transaction than a journal of 1 GiB takes; return the refusal.

    New tables are the cheapest way: each of 2 MiB clusters is zeroed whole in the record.
    """
    cluster_bytes = 2 << 20
    table_maps = cluster_bytes // 8 * cluster_bytes
    # Half a journal holds this many, and one is there already.
    count = (512 << 20) // cluster_bytes + 2
    with jqcow.create(path, count * table_maps, cluster_size=cluster_bytes) as image:
        image.pwrite(SECTOR, 0, fua=True)
        refusal = "none"
        try:
            with image.transaction() as transaction:
                for table in range(count):
                    transaction.pwrite(bytes(len(SECTOR) - 1) + b"x", table * table_maps)
        except jqcow.UnsupportedFeatureError as error:
            refusal = str(error)
        assert image.pread(len(SECTOR), 0) == SECTOR
        assert [extent.kind for extent in image.extents()] == ["data", "unallocated"]
        assert image.check().ok
        image.pwrite(SECTOR, table_maps, fua=True)
    return refusal


# The command


def main() -> None:
    """Run all stories and print their figures."""
    parser = argparse.ArgumentParser(description="Long runs, with figures.")
    parser.add_argument("--scale", type=int, default=20, help="how many times as long as in CI (default: 20)")
    parser.add_argument("directory", nargs="?", help="where the images are made")
    arguments = parser.parse_args()
    scale: int = arguments.scale
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        stories: dict[str, Callable[[Path], object]] = {
            "unflushed": lambda path: write_unflushed(path, 4_000 * scale),
            "spread": lambda path: spread_unflushed(path, 1_600 * scale),
            "checkpoints": lambda path: checkpoint_often(path, 300 * scale),
            "moves": lambda path: outgrow_journal(path, [4, 40, 400 * scale, 40, 400 * scale, 4]),
            "too large": exceed_largest_journal,
        }
        for title, story in stories.items():
            start = time.monotonic()
            figures = story(Path(name) / f"{title}.qcow2")
            print(f"{title}: {figures}, {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
