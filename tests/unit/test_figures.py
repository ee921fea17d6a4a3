"""Is docs/figures.md what the recorded figures make, and does a tool record what the page can show?"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support import figures


def test_the_page_is_what_the_files_make() -> None:
    assert figures.PAGE.read_text(encoding="utf-8") == figures.render(), "run tools/figures"


def test_the_readme_claims_no_more_than_was_judged() -> None:
    claimed = re.search(
        r"more\s+than\s+([\d,]+)\s+distinct\s+crash\s+states", (figures.ROOT / "README.md").read_text()
    )
    assert claimed is not None
    runs = [json.loads(path.read_text()) for path in figures.FOLDER.glob("*.json")]
    assert sum(run["totals"].get("distinct states", 0) for run in runs) > int(claimed[1].replace(",", ""))
    assert all(run["totals"].get("broken", 0) == 0 for run in runs)


def test_a_recorded_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "campaign-new.json"
    file.write_text(json.dumps({"title": "A new campaign", "note": "On a quiet machine."}))
    monkeypatch.setattr("sys.argv", ["tools/campaign", "--seed", "9", "--record", str(file)])
    barriers = ["barrier  calls  before  after", "flush.record  1,000  20  3,000"]
    operations = ["last operation  giving states  states", "flush  4  5,000"]
    figures.record(
        file, {"distinct states": 5000}, {"barrier": barriers, "last operation": operations}, text="a  1"
    )
    assert json.loads(file.read_text())["tables"]["last operation"]["rows"] == {"flush": [4, 5000]}
    page = figures.render(tmp_path)
    assert "## A new campaign\n\n`tools/campaign --seed 9`\n\ndistinct states **5,000**.\n" in page
    assert "On a quiet machine." in page
    assert "```\na  1\n```" in page
    assert re.search(r"flush\.record +20/3,000", page)


def test_a_run_in_pieces_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tools/campaign"])
    file = tmp_path / "campaign-new.json"
    assert figures.recorded(file) == {}
    for barrier in ("flush.record", "flush.data"):
        rows = ["barrier  calls  before", f"{barrier}  1  2,000", "close.clear  1  2"]
        figures.record(file, {"workloads": 2, "share": "1%", barrier: 1}, {"barrier": rows}, adds=True)
    assert figures.recorded(file) == {"workloads": 4, "share": "1%", "flush.record": 1, "flush.data": 1}
    rows = json.loads(file.read_text())["tables"]["barrier"]["rows"]
    assert rows == {"flush.record": [1, 2000], "flush.data": [1, 2000], "close.clear": [2, 4]}


def test_nothing_is_recorded_without_a_file() -> None:
    figures.record("", {"seeds": 1})
