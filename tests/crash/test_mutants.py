"""The proof of need: without any one barrier, without any one rule, a promise breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import sources
from tests.support.mutants import (
    BARRIER_TRIALS,
    GREEN,
    MUTANTS,
    RED,
    Mutant,
    judge_trial,
    patched_copy,
)

SECONDS_MAX = 120
TRIALS = sorted(
    {trial for trials in BARRIER_TRIALS.values() for trial in trials}
    | {trial for mutant in MUTANTS for trial in mutant.trials}
)


def test_every_barrier_is_placed_once() -> None:
    repeated = [name for name, count in Counter(sources.barrier_names()).items() if count > 1]
    assert not repeated


def test_every_barrier_has_a_trial() -> None:
    assert set(sources.barrier_names()) == set(BARRIER_TRIALS)


def test_every_rule_is_documented() -> None:
    assert sorted(rule for rule, _ in sources.engine_rules()) == sorted(sources.documented_rules())


def test_every_rule_has_a_mutant() -> None:
    rules = {rule for rule, _ in sources.engine_rules()}
    assert rules == {mutant.rule for mutant in MUTANTS}


@pytest.mark.parametrize("trial", TRIALS)
def test_unchanged_jqcow_keeps_its_promises(trial: str) -> None:
    """Otherwise a mutant would prove nothing."""
    assert judge_trial(trial) is None


@pytest.mark.parametrize("name", sorted(BARRIER_TRIALS))
def test_barrier_is_needed(name: str) -> None:
    broken = [judge_trial(trial, drop_barriers=(name,)) for trial in BARRIER_TRIALS[name]]
    assert any(broken), f"without the barrier {name} every promise holds"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule)
def test_rule_is_needed(mutant: Mutant, tmp_path: Path) -> None:
    patched_copy(mutant, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.mutants", *mutant.trials],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{sources.ROOT}"},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode in (RED, GREEN), done.stderr
    assert done.returncode == RED, f"without {mutant.rule} every promise holds"
