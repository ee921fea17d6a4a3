"""Images of every kind in which two features meet: made by QEMU, read, written here, and given back to QEMU.

The kinds are the rows of a covering array: every two levels of two factors that may be together are, in some
row. `test_the_rows_cover_every_pair` prints the array; `tools/covering` goes through others.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.interop import turns
from tests.interop.kinds import FACTORS, allowed, array_of
from tests.interop.pairwise import pairs_of, table_of

ARRAY = array_of(20)
ROW_EVERY = 2
"""Every second row is judged here: `tools/covering` judges all, of many arrays."""


def test_the_rows_cover_every_pair(capsys: pytest.CaptureFixture[str]) -> None:
    """Held to the pairs of many rows drawn at random, which need no cleverness to be allowed."""
    with capsys.disabled():
        print(f"\n{len(ARRAY.pairs)} pairs in {len(ARRAY.rows)} rows\n{table_of(ARRAY.rows)}")
    assert all(allowed(row) for row in ARRAY.rows)
    covered = set().union(*(pairs_of(row, FACTORS) for row in ARRAY.rows))
    chance = random.Random(1)
    drawn = ({factor: chance.choice(levels) for factor, levels in FACTORS.items()} for _ in range(200_000))
    seen = set().union(*(pairs_of(row, FACTORS) for row in drawn if allowed(row)))
    assert seen <= covered == ARRAY.pairs
    assert len(seen) > 0.9 * len(covered)


@pytest.mark.parametrize("index", range(0, len(ARRAY.rows), ROW_EVERY))
def test_a_row(
    index: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = ARRAY.rows[index]
    if row["encryption"] != "none":
        pytest.importorskip("cryptography")
    print(f"row {index}: {row}")
    turns.judge(row, tmp_path, capsys)
