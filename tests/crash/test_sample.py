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
STATES_PER_INTERVAL, SNAPSHOT_STATES_PER_INTERVAL = (6, 3) if IS_QUICK else (2, 1)
"""The stories of snapshots have more intervals than others."""
QEMU_EVERY = 40
SAMPLE = [
    # The cluster sizes take turns, so that a short run meets them all.
    pytest.param(family, family.cluster_sizes[number % len(family.cluster_sizes)], id=name)
    for number, (name, family) in enumerate(FAMILIES.items())
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
    options = LabOptions(budget=states, seed=SEED, depth=2, nested_every=12, nested_budget=3, kill=True)
    return Laboratory(Judge(qemu_every), recover=recover_and_close, options=options, ledger=ledger)


def laboratory_for(family: Family) -> Laboratory:  # type: ignore[type-arg]
    """Return one that crashes the recoveries of every second family too: they take most of the time."""
    of_snapshots = family.name in names_in("snapshots", "overlays")
    if IS_QUICK and not of_snapshots and list(FAMILIES).index(family.name) % 2:
        return laboratory(STATES_PER_INTERVAL, QEMU_EVERY)
    states = SNAPSHOT_STATES_PER_INTERVAL if of_snapshots else STATES_PER_INTERVAL
    return Laboratory(Judge(QEMU_EVERY), options=LabOptions(budget=states, seed=SEED, kill=True))


@pytest.mark.parametrize(("family", "cluster_bytes"), SAMPLE)
def test_no_crash_breaks_a_promise(family: Family, cluster_bytes: int) -> None:
    laboratory_for(family).run(family.workload(cluster_bytes, SEED))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if 8192 in family.cluster_sizes])
def test_garbage_under_sector_0_is_survived(name: str) -> None:
    garble_sector_0(workload_named(f"{name}/8192/{SEED}"))


def test_every_barrier_is_cut() -> None:
    """A barrier that no workload of the campaign meets would be proven by nothing."""
    ledger = Ledger()
    for name in COVERING:
        laboratory(2, 0, ledger).run(workload_named(f"{name}/{SEED}"))
    assert not quiet_barriers(ledger.report())
