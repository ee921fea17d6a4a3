"""Real processes killed at random moments; the campaign kills many more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.outside.kills import kill_writers


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_writers_keep_their_promises(tmp_path: Path, seed: int) -> None:
    report = kill_writers(tmp_path, seed, kills=8)
    assert report.writers_killed == 8
    assert report.live_images_recovered > 0
    assert report.acknowledgements > 0
