"""One flush, one barrier: counted on a real process, with a real file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.benchmark import speed
from tools.benchmark.__main__ import main
from tools.benchmark.barriers import AMORTISED_MAX, Comparison, Counts, Spread, compare_barriers
from tools.benchmark.compress import compare_compression
from tools.benchmark.speed import compare_speed
from tools.benchmark.threads import count_shared

FLUSHES = 600


def test_a_flush_is_one_barrier(tmp_path: Path) -> None:
    counts = compare_barriers(tmp_path, FLUSHES)
    assert counts.kept, counts.format_table()
    assert sum(counts.spread.between.values()) >= FLUSHES - 10
    assert counts.jqcow.sync_calls.keys() == {"fdatasync"}
    assert counts.jqcow.amortised <= AMORTISED_MAX
    # What QEMU needs shows that the trace sees such calls.
    assert counts.qemu.amortised > 1.5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ours", "spread"),
    [
        (Counts("jqcow", 600, {"fdatasync": 602}, 1), Spread(2, {1: 599}, {})),
        (Counts("jqcow", 600, {"fdatasync": 603}, 0), Spread(2, {1: 598, 2: 1}, {})),
        (Counts("jqcow", 600, {"fdatasync": 640}, 0), Spread(2, {1: 560}, {2: 39})),
    ],
    ids=["opened with O_SYNC", "two in one flush", "too many checkpoints"],
)
def test_a_broken_promise_is_told(ours: Counts, spread: Spread) -> None:
    comparison = Comparison(ours, Counts("QEMU", 600, {"fdatasync": 1203}, 0), spread)
    assert not comparison.kept
    assert "BROKEN" in comparison.format_table()


def test_speed_is_measured_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, to show that the command works; a time is no promise, so none is asserted."""
    monkeypatch.setattr(speed, "FILLED_BYTES", 4 << 20)
    speeds = compare_speed(tmp_path, rounds=1, share=0.02)
    assert len(speeds.rows) == 12
    assert all(len(row.jqcow) == len(row.qemu) == 1 for row in speeds.rows)
    assert speeds.format_table().count("\n") == 16


def test_compression_is_measured_in_pairs(tmp_path: Path) -> None:
    """The size is a promise: a stream takes at most a sector more than QEMU's."""
    works = compare_compression(tmp_path, rounds=1, size=8 << 20)
    assert [work.compression_type for work in works.works] == ["zlib", "zstd"]
    assert all(work.ratio > 0 and work.size_ratio < 1.02 for work in works.works)
    assert works.format_table().count("\n") == 6
    assert not list(tmp_path.iterdir())


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["barriers", "--flushes", "20", "--directory", str(tmp_path), "--output", "json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["spread"]["between"] == {"1": 19}


def test_threads_share_barriers(tmp_path: Path) -> None:
    """How many depends on the host's disk; tests/threads keeps the promise on a device of known speed."""
    share = count_shared(tmp_path, threads=8, flushes=400)
    assert share.flushes == 400
    assert 400 / 8 <= share.sync_calls < 400
    assert not list(tmp_path.iterdir())
