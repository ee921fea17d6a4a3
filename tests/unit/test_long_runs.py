"""Does anything grow with the amount written, or with the number of checkpoints, moves and crashes?

The stories are those of tests/bench/long_runs, which runs them longer.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

import jqcow
from jqcow.engine import log, metadata
from jqcow.offline.info import STAT_BLOCK_BYTES
from jqcow.testing import SimulatedDevice
from tests.bench import long_runs
from tests.bench.long_runs import CLUSTER_BYTES, L2_TABLE_MAPS, SECTOR, SMALLEST_JOURNAL, live_journal

MEMORY_VARIES = 1.25
"""What the parts of a run may differ by."""
DISK_VARIES_BYTES = 256 << 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


def create_on(device: SimulatedDevice, disk_bytes: int) -> jqcow.Image:
    return jqcow.create_on_device(
        device, disk_bytes, cluster_size=CLUSTER_BYTES, journal_size=SMALLEST_JOURNAL
    )


def require_level(figures: long_runs.MemoryFigures) -> None:
    """Records were made though nobody flushed. Memory is level after the first part, which fills caches."""
    assert figures.records > 50
    assert figures.staged_blocks_max <= figures.staged_blocks_limit
    assert max(figures.memory_peaks) <= figures.memory_peaks[1] * MEMORY_VARIES, figures


def test_unflushed_changes_of_the_same_clusters(path: Path) -> None:
    figures = long_runs.write_unflushed(path, 2_000)
    require_level(figures)
    # What is freed is used again, without a flush.
    assert figures.file_lengths[1] == figures.file_lengths[-1]


def test_unflushed_changes_of_more_tables_than_fit_in_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "CLEAN_BLOCKS_MAX", 128)
    require_level(long_runs.spread_unflushed(path, 1_600))


def test_checkpoints_leave_the_file_and_the_journal_where_they_are(path: Path) -> None:
    figures = long_runs.checkpoint_often(path, 300)
    # One record and one epoch each; the journal stays, and the file does not grow.
    assert len(figures.sequences) == len(figures.epochs) == 300
    assert len(figures.journals) == 1
    assert len(figures.lengths) == 1, figures


def test_sessions_leave_no_journal_on_the_disk(path: Path) -> None:
    """Each lays a journal. Closing gives its space back, also where data that was written lies behind it."""
    sessions, held = 50, []
    long_runs.create(path, 1 << 20).close()
    for number in range(sessions):
        with jqcow.open(path, "r+", journal_size=SMALLEST_JOURNAL) as image:
            image.discard(CLUSTER_BYTES, 0)
            image.pwrite(bytes([number + 1]) * CLUSTER_BYTES, 0)
        with jqcow.open(path) as image:
            assert image.pread(1, 0) == bytes([number + 1])
            assert image.info().journal is None
        held.append(path.stat().st_blocks * STAT_BLOCK_BYTES)
    assert max(held) <= held[0] + DISK_VARIES_BYTES < sessions * SMALLEST_JOURNAL
    # The holes that are left are free space, and not more than the journals were.
    assert path.stat().st_size < sessions * (SMALLEST_JOURNAL + 4 * CLUSTER_BYTES)


def test_sessions_that_add_to_the_disk_use_the_place_of_earlier_journals(path: Path) -> None:
    """Otherwise each would leave the file longer by a journal."""
    sessions = 40
    long_runs.create(path, 1 << 20).close()
    for number in range(sessions):
        with jqcow.open(path, "r+", journal_size=SMALLEST_JOURNAL) as image:
            image.pwrite(bytes([number + 1]) * CLUSTER_BYTES, number * CLUSTER_BYTES)
    assert path.stat().st_size < sessions * CLUSTER_BYTES + 4 * SMALLEST_JOURNAL


def test_crashes_without_a_clean_close() -> None:
    """Recovery lays each journal past the end of the file. The old ones are holes from then on."""
    device = SimulatedDevice()
    image = create_on(device, 1 << 20)
    sequences, held = [], []
    for number in range(40):
        image.discard(CLUSTER_BYTES, 0)
        image.pwrite(bytes([number + 1]) * CLUSTER_BYTES, 0)
        image.flush()
        sequences.append(live_journal(image).sequence)
        held.append(device.used_bytes)
        device = device.killed()
        image = jqcow.open_device(device, "r+")
        assert image.pread(1, 0) == bytes([number + 1])
    assert all(before < after for before, after in pairwise(sequences))
    assert max(held) <= held[0] + DISK_VARIES_BYTES < 40 * SMALLEST_JOURNAL
    assert image.check().ok
    image.close()
    assert device.used_bytes < DISK_VARIES_BYTES


class TestMoves:
    def test_a_transaction_makes_the_journal_larger(self, path: Path) -> None:
        """It grows where it has to and stays there afterwards; sequences and epochs go on."""
        figures = long_runs.outgrow_journal(path, [4, 40, 400, 400, 40, 4])
        journals = figures.journals
        assert [journal.length == SMALLEST_JOURNAL for journal in journals] == [True] + [False] * 5
        assert journals[0].length < journals[1].length < journals[2].length
        assert len({(journal.offset, journal.length) for journal in journals[2:]}) == 1
        assert all(before.sequence < after.sequence for before, after in pairwise(journals))
        assert all(before.epoch <= after.epoch for before, after in pairwise(journals))

    def test_the_place_of_the_old_journal_is_used_again(self, path: Path) -> None:
        with long_runs.create(path, 400 * L2_TABLE_MAPS) as image:
            image.pwrite(SECTOR, 0, fua=True)
            old = live_journal(image)
            with image.transaction() as transaction:
                for table in range(100):
                    transaction.pwrite(SECTOR, table * L2_TABLE_MAPS)
            assert live_journal(image).offset > old.offset
            # It is given back to the host after the commit, and known to be so after the next barrier.
            image.pwrite(SECTOR, 0, fua=True)
            length = image.info().file_size
            image.pwrite(b"x" * old.length, L2_TABLE_MAPS // 2)
            extents = image.extents(old.length, L2_TABLE_MAPS // 2)
            places = {extent.host_offset for extent in extents if extent.host_offset is not None}
            assert any(old.offset <= place < old.offset + old.length for place in places), (places, old)
            assert image.info().file_size == length
            assert image.check().ok

    def test_a_larger_journal_is_kept_by_recovery(self) -> None:
        device = SimulatedDevice()
        image = create_on(device, 200 * L2_TABLE_MAPS)
        with image.transaction() as transaction:
            for table in range(200):
                transaction.pwrite(SECTOR, table * L2_TABLE_MAPS)
        grown = live_journal(image)
        with jqcow.open_device(device.killed(), "r+") as recovered:
            assert live_journal(recovered).length == grown.length > SMALLEST_JOURNAL
            assert recovered.pread(512, 199 * L2_TABLE_MAPS) == SECTOR


class TestTooLarge:
    """A transaction that no journal can hold. The largest one is made small here: 1 GiB takes too long."""

    @pytest.fixture(autouse=True)
    def small_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(log, "MAX_JOURNAL_BYTES", 256 << 10)

    def test_it_is_refused_by_name_and_changes_nothing(self, path: Path) -> None:
        with long_runs.create(path, 100 * L2_TABLE_MAPS) as image:
            image.pwrite(SECTOR, 0, fua=True)
            before = live_journal(image)
            with pytest.raises(jqcow.UnsupportedFeatureError, match="the change is too large"):
                self.change_many_tables(image, 100)
            self.require_unchanged(image)
            assert live_journal(image).offset == before.offset
            # The image goes on: a smaller one fits.
            self.change_many_tables(image, 10)
            assert image.pread(1, 9 * L2_TABLE_MAPS) == b"y"
            assert image.check().ok
        assert path.stat().st_size < before.offset + (1 << 20)

    def test_a_crash_afterwards_finds_the_image_as_it_was(self) -> None:
        device = SimulatedDevice()
        image = create_on(device, 100 * L2_TABLE_MAPS)
        image.pwrite(SECTOR, 0, fua=True)
        with pytest.raises(jqcow.UnsupportedFeatureError, match="the change is too large"):
            self.change_many_tables(image, 100)
        with jqcow.open_device(device.killed(), "r+") as recovered:
            self.require_unchanged(recovered)

    @staticmethod
    def change_many_tables(image: jqcow.Image, count: int) -> None:
        with image.transaction() as transaction:
            for table in range(count):
                transaction.pwrite(b"y" * 512, table * L2_TABLE_MAPS)

    @staticmethod
    def require_unchanged(image: jqcow.Image) -> None:
        assert image.pread(512, 0) == SECTOR
        assert sum(extent.length for extent in image.extents() if extent.kind == "data") == CLUSTER_BYTES
        assert image.check().ok
