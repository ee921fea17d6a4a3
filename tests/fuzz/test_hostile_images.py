"""Hostile images are refused or used, in bounded time and memory, and never end in another traceback."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import jqcow
from tests.fuzz.handling import TooSlow, handle, time_bound
from tests.fuzz.hostile import ATTACKS, CLEAN_ATTACKS, make_case, samples
from tests.fuzz.sparse import SparseDevice

ROOT = Path(__file__).resolve().parents[2]
BATCHES = 12
CASES_PER_BATCH = 100
MEMORY_MIB = 1024
CASES_IN_BOUNDED_MEMORY = 60


@pytest.mark.parametrize("batch", range(BATCHES))
def test_hostile_images_are_refused_or_used(batch: int) -> None:
    outcomes: Counter[str] = Counter()
    for number in range(batch * CASES_PER_BATCH, (batch + 1) * CASES_PER_BATCH):
        seen, _ = handle(make_case(number))
        outcomes += seen
    assert outcomes["open r+: done"] and outcomes["write: done"], "nothing got past the opening"
    assert outcomes["open r: CorruptionError"] and outcomes["open r: FormatError"]


@pytest.mark.parametrize("first", [50_000, 60_000])
def test_hostile_images_take_bounded_memory(first: int) -> None:
    """A process with little memory handles them too: no MemoryError, no killed worker."""
    command = [sys.executable, "-m", "tests.fuzz.campaign", "--memory", str(MEMORY_MIB)]
    done = subprocess.run(
        [*command, "--first", str(first), "--count", str(CASES_IN_BOUNDED_MEMORY)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_attack_is_used() -> None:
    told = " ".join(" ".join(make_case(number).story) for number in range(400))
    assert not [attack.__name__ for attack in {*ATTACKS, *CLEAN_ATTACKS} if attack.__name__ not in told]


def test_cases_replay() -> None:
    assert [make_case(number) for number in range(20)] == [make_case(number) for number in range(20)]


def test_samples_are_good_images() -> None:
    """What the attacks start from has nothing wrong."""
    for sample in samples():
        with jqcow.open_device(SparseDevice(sample.content), "r+") as image:
            assert image.check().ok
            assert (image.recovered is not None) == sample.live


def test_watchdog_bites() -> None:
    with pytest.raises(TooSlow), time_bound(0.01):
        while True:
            pass
