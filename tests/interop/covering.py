"""Runs through covering arrays: every row of them, in processes."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.interop import turns
from tests.interop.commands import capturing
from tests.interop.kinds import FACTORS, array_of
from tests.interop.pairwise import pairs_of
from tests.support import runs
from tests.support.runs import Outcome


def names_of(factor: str) -> list[str]:
    """Return the names under which the levels of a factor are counted."""
    return [f"{factor} {level}" for level in FACTORS[factor]]


def judge_row(numbers: tuple[int, int]) -> Outcome:
    """Judge a row: (seed of its array, its number)."""
    seed, number = numbers
    row = array_of(seed).rows[number]
    found = Outcome(Counter(rows=1))
    found.counts.update(f"{factor} {level}" for factor, level in row.items())
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="jqcow-covering-") as folder:
        try:
            # Names with a protocol start at the working directory.
            os.chdir(folder)
            with capturing() as capture:
                turns.judge(row, Path(folder), capture)
        except (Exception, pytest.skip.Exception):
            told = traceback.format_exc(limit=-4).replace(folder, "")
            found.failures.append(
                f"FAILED {row}\n{told}  replay: tools/covering --seed {seed} --row {number}"
            )
        finally:
            os.chdir(before)
    return found


def run(seeds: Sequence[int], row: int | None, jobs: int) -> Iterator[Outcome]:
    """Judge the rows of arrays; yield the total after each."""
    parts = [
        (seed, number)
        for seed in seeds
        for number in (range(len(array_of(seed).rows)) if row is None else [row])
    ]
    pairs = set().union(*(pairs_of(array_of(seed).rows[number], FACTORS) for seed, number in parts))
    for total in runs.run_parts(judge_row, parts, jobs):
        total.counts["pairs"] = len(pairs)
        yield total
