"""A guest boots from a disk that jqcow serves, and is killed with the server; the campaign does so often."""

from __future__ import annotations

from pathlib import Path

from tests.outside.guest import kill_guests


def test_killed_guests_lose_nothing_that_was_synced(tmp_path: Path) -> None:
    report = kill_guests(tmp_path, seed=1, kills=3)
    assert report.kills == 3 and report.acknowledged and report.recovered
