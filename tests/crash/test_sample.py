"""A sample of the crash campaign, the same on every run: each family, and every barrier of the source."""

from __future__ import annotations

import pytest

from jqcow import _native
from jqcow.testing import LabOptions, Laboratory, Ledger
from tests.crash.campaign import quiet_barriers
from tests.crash.judge import Judge, recover_and_close
from tests.crash.mutants import TRIALS
from tests.crash.trials import BUDGET, garble_sector_0
from tests.crash.workloads import (
    FAMILIES,
    Family,
    names_in,
    workload_named,
)

SEED = 7
IS_QUICK = _native.active() == "c"
"""The twins are slow, and do what the kernels do: they get some families, and no recovery is crashed."""
STATES_PER_INTERVAL = 2
OF_FEATURES = frozenset(names_in("features", "small-writes", "small-writes-below"))
WITH_ONE_STATE = OF_FEATURES | frozenset(names_in("snapshots", "overlays"))
"""There are many families of features, and the stories of the others have the most intervals."""
QEMU_EVERY = 40


def workload_in_sample(number: int, family: Family) -> str:
    """Return a workload of a family, by which mutants are judged if there is one.

    The cluster sizes take turns else, so that a short run meets them all.
    """
    cluster_bytes = family.cluster_sizes[number % len(family.cluster_sizes)]
    trials = (trial for trial in TRIALS if trial.startswith(f"{family.name}/"))
    return next(trials, f"{family.name}/{cluster_bytes}/{SEED}")


SAMPLE = [
    pytest.param(number, family, workload_in_sample(number, family), id=name)
    for number, (name, family) in enumerate(FAMILIES.items())
    if IS_QUICK or number % 8 == 0
]
COVERING = (
    "fresh/1024",
    "reuse/4096",
    "killed/8192",
    "in-place/512",
    "autoclear/4096",
    "root-write-fails/8192",
    "move/4096",
    "half-closed/8192",
    "data-file-killed-in-place/1024",
)


def crashing_recoveries(ledger: Ledger | None = None) -> Laboratory:  # type: ignore[type-arg]
    """Return a laboratory that crashes a few recoveries in each interval, which takes most of the time."""
    options = LabOptions(
        budget=2, seed=SEED, depth=2, nested_every=24, nested_budget=2, kill=ledger is not None
    )
    return Laboratory(Judge(QEMU_EVERY), recover=recover_and_close, options=options, ledger=ledger)


@pytest.mark.parametrize(("number", "family", "workload"), SAMPLE)
def test_no_crash_breaks_a_promise(number: int, family: Family, workload: str) -> None:
    laboratory = crashing_recoveries()
    if not IS_QUICK or number % 48:
        states = 1 if family.name in WITH_ONE_STATE or not IS_QUICK else STATES_PER_INTERVAL
        # A mutant that is seen there must be the cause.
        states = BUDGET if IS_QUICK and workload in TRIALS else states
        is_killed = family.name not in OF_FEATURES or number % 2 == 0
        laboratory = Laboratory(
            Judge(QEMU_EVERY), options=LabOptions(budget=states, seed=SEED, kill=is_killed)
        )
    laboratory.run(workload_named(workload))


@pytest.mark.parametrize(
    "name",
    [
        name
        for number, (name, family) in enumerate(FAMILIES.items())
        if 8192 in family.cluster_sizes and number % (8 if name in OF_FEATURES or not IS_QUICK else 1) == 0
    ],
)
def test_garbage_under_sector_0_is_survived(name: str) -> None:
    garble_sector_0(workload_named(f"{name}/8192/{SEED}"))


def test_every_barrier_is_cut() -> None:
    """A barrier that no workload of the campaign meets would be proven by nothing."""
    ledger = Ledger()
    for name in COVERING:
        crashing_recoveries(ledger).run(workload_named(f"{name}/{SEED}"))
    assert not quiet_barriers(ledger.report())
