"""The figures of the guided fuzzer: what is read from libFuzzer, and what is written for the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz import guiding
from tests.fuzz.guiding import Run
from tests.support import figures

TOLD = """
#2      INITED cov: 5 ft: 6 corp: 1/1b exec/s: 0 rss: 63Mb
#9      NEW    cov: 1421 ft: 1497 corp: 2/2b lim: 4 exec/s: 0 rss: 63Mb L: 1/1 MS: 1 ChangeBit-
stat::number_of_executed_units: 2688
stat::peak_rss_mb:              92
"""


def test_figures_are_read() -> None:
    assert guiding.run_of(TOLD, 15, found=False) == Run(2688, 15, 1421, 1497, 92, 0)
    assert guiding.run_of("it did not start", 1, found=True) == Run(cpu_seconds=1, findings=1)


def test_pieces_of_a_long_run_add_up() -> None:
    assert Run(10, 5, 7, 9, 80, 0) + Run(20, 6, 6, 11, 70, 1) == Run(30, 11, 7, 11, 80, 1)


def test_figures_are_recorded_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tools/fuzz", "--seed", "3"])
    file = tmp_path / "fuzzing.json"
    runs = {"tables": Run(4000, 7200, 2400, 8000, 90, 0), "header": Run(9000, 3600, 2500, 8100, 80, 0)}
    assert guiding.recorded(str(file)) == {}
    guiding.record(str(file), runs)
    assert guiding.recorded(str(file)) == runs
    assert json.loads(file.read_text())["totals"] == {"executions": 13000, "CPU hours": 3.0, "findings": 0}
    page = figures.render(tmp_path)
    assert "executions **13,000**, CPU hours **3.0**, findings **0**." in page
    assert page.index("header") < page.index("tables")
