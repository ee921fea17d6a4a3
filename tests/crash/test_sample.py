"""A sample of the crash campaign, the same on every run: each family, and every barrier of the source."""

from __future__ import annotations

import pytest

from jqcow import _native
from jqcow.testing import LabOptions, Laboratory, Ledger
from tests.crash.campaign import quiet_barriers
from tests.crash.judge import Judge, recover_and_close
from tests.crash.trials import garble_sector_0
from tests.crash.workloads import (
    FAMILIES,
    Family,
    names_in,
    workload_named,
)

SEED = 7
IS_QUICK = _native.active() == "c"
"""The twins are slow: they get fewer states, and no recovery is crashed."""
STATES_PER_INTERVAL, SNAPSHOT_STATES_PER_INTERVAL = (4, 2) if IS_QUICK else (2, 1)
"""The stories of snapshots have more intervals than others; of features there are many families."""
OF_FEATURES = frozenset(names_in("features", "small-writes"))
QEMU_EVERY = 40
SAMPLE = [
    # The cluster sizes take turns, so that a short run meets them all.
    pytest.param(family, family.cluster_sizes[number % len(family.cluster_sizes)], id=name)
    for number, (name, family) in enumerate(FAMILIES.items())
    # The twins do what the kernels do in every family; of features they see some.
    if IS_QUICK or name not in OF_FEATURES or number % 8 == 0
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


def laboratory(states: int, qemu_every: int, ledger: Ledger | None = None) -> Laboratory:  # type: ignore[type-arg]
    options = LabOptions(budget=states, seed=SEED, depth=2, nested_every=24, nested_budget=3, kill=True)
    return Laboratory(Judge(qemu_every), recover=recover_and_close, options=options, ledger=ledger)


def laboratory_for(family: Family) -> Laboratory:  # type: ignore[type-arg]
    """Return one that crashes the recoveries of some families too: they take most of the time."""
    if family.name in names_in("small-writes"):
        # They flush again and again, and so have the most intervals.
        return Laboratory(Judge(QEMU_EVERY), options=LabOptions(budget=1, seed=SEED, kill=True))
    of_snapshots, number = family.name in names_in("snapshots", "overlays"), list(FAMILIES).index(family.name)
    if IS_QUICK and family.name in OF_FEATURES and number % 8 == 1 and "snapshots" not in family.name:
        return laboratory(SNAPSHOT_STATES_PER_INTERVAL, QEMU_EVERY)
    if IS_QUICK and not of_snapshots and family.name not in OF_FEATURES and number % 2:
        return laboratory(STATES_PER_INTERVAL, QEMU_EVERY)
    is_small = of_snapshots or family.name in OF_FEATURES
    states = SNAPSHOT_STATES_PER_INTERVAL if is_small else STATES_PER_INTERVAL
    return Laboratory(Judge(QEMU_EVERY), options=LabOptions(budget=states, seed=SEED, kill=True))


@pytest.mark.parametrize(("family", "cluster_bytes"), SAMPLE)
def test_no_crash_breaks_a_promise(family: Family, cluster_bytes: int) -> None:
    laboratory_for(family).run(family.workload(cluster_bytes, SEED))


@pytest.mark.parametrize(
    "name",
    [
        name
        for number, (name, family) in enumerate(FAMILIES.items())
        if 8192 in family.cluster_sizes and (name not in OF_FEATURES or number % 8 == 0)
    ],
)
def test_garbage_under_sector_0_is_survived(name: str) -> None:
    garble_sector_0(workload_named(f"{name}/8192/{SEED}"))


def test_every_barrier_is_cut() -> None:
    """A barrier that no workload of the campaign meets would be proven by nothing."""
    ledger = Ledger()
    for name in COVERING:
        laboratory(2, 0, ledger).run(workload_named(f"{name}/{SEED}"))
    assert not quiet_barriers(ledger.report())
