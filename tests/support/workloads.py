"""The workloads of the crash campaign: families, each in every cluster size, each with a seed of its own.

A family tells a story that meets certain barriers; the seed fills in what is written where.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from jqcow.testing import SimulatedDevice, Workload
from tests.support import overlays, stories
from tests.support.expectation import Expectation
from tests.support.layouts import GarbageRule
from tests.support.player import Player
from tests.support.starts import STARTS
from tests.support.stories import Story, tell
from tests.support.users import Session

CLUSTER_SIZES = (512, 1024, 4096, 8192, 65536)
LARGE = (8192, 65536)
PACKED = (1024, 4096, 8192, 65536)
"""Cluster sizes in which compression can save a sector."""


@dataclass(frozen=True)
class Family:
    """A story told from a start, in some cluster sizes. ``weight`` scales the states of one interval."""

    name: str
    start: str
    story: Story
    cluster_sizes: tuple[int, ...] = CLUSTER_SIZES
    weight: float = 1.0

    def workload(self, cluster_bytes: int, seed: int) -> Workload[Expectation]:
        """Return the family's workload for a cluster size and a seed: the same on every run."""
        name = f"{self.name}/{cluster_bytes}/{seed}"
        rule = GarbageRule() if cluster_bytes > 4096 else None
        start = functools.cache(lambda: STARTS[self.start](cluster_bytes, Random(f"start {name}")))

        def run(device: SimulatedDevice, expectation: Expectation) -> None:
            if rule is not None:
                rule.follow(device)
            session = Session(device, expectation, written=1 << 16)
            tell(self.story, Player(session, Random(f"story {name}")))

        return Workload(
            name,
            run,
            make_model=lambda: start().expectation(),
            make_device=lambda: start().device(),
            garbage_allowed=rule,
        )


_PLAIN = (
    Family("fresh", "empty", stories.FRESH),
    Family("reopened", "used", stories.REOPENED),
    Family("adopted", "qemu", stories.REOPENED),
    Family("adopted-in-place", "qemu", stories.IN_PLACE),
    Family("dirty", "dirty", stories.REOPENED),
    Family("dirty-reuse", "dirty", stories.reuse),
    Family("holes", "holed", stories.reuse),
    Family("unpunchable", "unpunchable", stories.reuse),
    Family("autoclear", "vouched", stories.IN_PLACE),
    Family("autoclear-first", "vouched", stories.REOPENED),
    Family("long-header", "long-header", stories.REOPENED, LARGE),
    Family("long-header-killed", "long-header", stories.KILLED, LARGE),
    Family("half-moved", "half-moved", stories.REOPENED, LARGE),
    Family("in-place", "full", stories.IN_PLACE),
    Family("reuse", "full", stories.reuse),
    Family("epochs", "used", stories.EPOCHS),
    Family("grow", "used", stories.grow),
    Family("refcount-table", "table-end", stories.grow, (512,), weight=0.25),
    Family("move", "used", stories.MOVE),
    Family("move-fails", "used", stories.move_fails),
    Family("move-killed", "used", stories.move_killed, (4096, 8192), weight=0.5),
    Family("reuse-tables", "used", stories.reuse_tables, weight=0.5),
    Family("killed", "used", stories.KILLED),
    Family("host-fails", "full", stories.host_fails),
    Family("host-fails-dirty", "unpunchable", stories.host_fails),
    Family("going-live-fails", "used", stories.going_live_fails),
    Family("root-write-fails", "full", stories.root_write_fails),
    Family("barrier-fails", "full", stories.barrier_fails),
    Family("disk-full", "used", stories.disk_full),
)
_OF_TRANSACTIONS = (
    Family("transactions", "used", stories.transactions),
    Family("transactions-dirty", "unpunchable", stories.transactions),
    Family("transactions-first", "vouched", stories.transactions),
    Family("transactions-new", "empty", stories.first_clusters),
    Family("transactions-reuse", "full", stories.reuse_after_transactions),
    Family("savepoints", "full", stories.savepoints),
    Family("rollbacks", "dirty", stories.rollbacks),
    Family("transaction-too-large", "used", stories.TOO_LARGE),
    Family("transaction-too-large-fails", "used", stories.too_large_fails),
    Family("transaction-killed", "full", stories.transaction_killed),
    Family("commits-fail", "full", stories.commits_fail),
    Family("commits-fail-dirty", "unpunchable", stories.commits_fail),
    Family("commit-fails-first", "unpunchable", stories.commit_fails_first),
    Family("move-fails-first", "empty", stories.move_fails_first),
    Family("overlapping", "half-free", stories.overlapping),
    Family("resizes", "full", stories.resizes),
    Family("resizes-adopted", "qemu", stories.resizes),
)
_OF_SNAPSHOTS = (
    Family("snapshots", "snapshots", stories.between_writes),
    Family("snapshots-unpunchable", "snapshots-unpunchable", stories.between_writes),
    Family("snapshots-adopted", "qemu-snapshots", stories.between_writes),
    Family("snapshots-cow", "snapshots-unpunchable", stories.copy_on_write),
    Family("snapshots-cow-new", "empty", stories.copy_on_write),
    Family("snapshots-several", "used", stories.several),
    Family("snapshots-reuse", "snapshots-unpunchable", stories.several),
    Family("snapshots-transactions", "snapshots", stories.in_transactions),
    Family("snapshots-sizes", "snapshots", stories.other_sizes),
    Family("snapshots-sizes-adopted", "qemu-snapshots", stories.other_sizes),
    Family("snapshots-killed", "snapshots", stories.SNAPSHOTS_KILLED),
    Family("snapshots-fail", "snapshots", stories.fails),
    Family("snapshots-fail-dirty", "snapshots-unpunchable", stories.fails),
    Family("snapshots-too-large", "wide", stories.large_tables, weight=0.5),
    Family("snapshots-narrow", "narrow", stories.NARROW_REFCOUNTS),
    Family("compressed", "snapshots", stories.compressed, PACKED),
    Family("compressed-unpunchable", "snapshots-unpunchable", stories.compressed, PACKED),
    Family("compressed-adopted", "qemu-compressed", stories.compressed),
    Family("compressed-snapshots", "qemu-compressed", stories.between_writes),
    Family("compressed-new", "empty", stories.compressed_new, PACKED),
    Family("compressed-undone", "snapshots", stories.compressed_undone, PACKED),
)
_OF_OVERLAYS = (
    Family("overlay", "overlay", stories.REOPENED),
    Family("overlay-reuse", "overlay-unpunchable", stories.reuse),
    Family("overlay-transactions", "overlay", stories.transactions),
    Family("overlay-resizes", "overlay-unpunchable", stories.resizes),
    Family("overlay-snapshots", "overlay", stories.between_writes),
    Family("overlay-compressed", "overlay-unpunchable", stories.compressed, PACKED),
    Family("overlay-killed", "overlay", stories.KILLED),
    Family("overlay-host-fails", "overlay-unpunchable", stories.host_fails),
    Family("copy-on-read", "overlay-unpunchable", overlays.copied_up),
    Family("rebase", "overlay", overlays.rebase),
    Family("rebase-dirty", "overlay-unpunchable", overlays.rebase),
    Family("commit", "overlay", overlays.emptied),
    Family("commit-base", "unpunchable", overlays.committed_into),
    Family("commit-base-overlay", "overlay", overlays.committed_into),
    Family("repair", "dirty-bit", overlays.REPAIRED),
    Family("repair-snapshots", "dirty-bit-snapshots", overlays.REPAIRED),
    Family("repair-killed", "dirty-bit-snapshots", overlays.REPAIR_KILLED),
    Family("repair-fails", "dirty-bit", overlays.repair_fails),
)
GROUPS = {
    "plain": _PLAIN,
    "transactions": _OF_TRANSACTIONS,
    "snapshots": _OF_SNAPSHOTS,
    "overlays": _OF_OVERLAYS,
}
FAMILIES = {family.name: family for families in GROUPS.values() for family in families}


def names_in(*groups: str) -> Iterator[str]:
    """Yield the names of the families in some groups."""
    for group in groups:
        yield from (family.name for family in GROUPS[group])


def workload_named(name: str) -> Workload[Expectation]:
    """Return the workload ``family/cluster size/seed``."""
    family, cluster_bytes, seed = name.split("/")
    return FAMILIES[family].workload(int(cluster_bytes), int(seed))
