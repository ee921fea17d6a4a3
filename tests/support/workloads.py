"""The workloads of the crash campaign: families, each in every cluster size, each with a seed of its own.

A family tells a story that meets certain barriers; the seed fills in what is written where.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from jqcow.testing import SimulatedDevice, Workload
from tests.support import overlays, qemu_starts, snapshots, starts, stories, transactions
from tests.support.expectation import Expectation
from tests.support.images import Session
from tests.support.layouts import GarbageRule
from tests.support.starts import Start

CLUSTER_SIZES = (512, 1024, 4096, 8192, 65536)
Story = Callable[[Session, Random], None]
Prepare = Callable[[int, Random], Start]


@dataclass(frozen=True)
class Family:
    """A story told from a start, in some cluster sizes. ``weight`` scales the states of one interval."""

    name: str
    prepare: Prepare
    story: Story
    cluster_sizes: tuple[int, ...] = CLUSTER_SIZES
    weight: float = 1.0

    def workload(self, cluster_bytes: int, seed: int) -> Workload[Expectation]:
        """Return the family's workload for a cluster size and a seed: the same on every run."""
        name = f"{self.name}/{cluster_bytes}/{seed}"
        rule = GarbageRule() if cluster_bytes > 4096 else None
        start = functools.cache(lambda: self.prepare(cluster_bytes, Random(f"start {name}")))

        def run(device: SimulatedDevice, expectation: Expectation) -> None:
            if rule is not None:
                rule.follow(device)
            self.story(Session(device, expectation, written=1 << 16), Random(f"story {name}"))

        return Workload(
            name,
            run,
            make_model=lambda: start().expectation(),
            make_device=lambda: start().device(),
            garbage_allowed=rule,
        )


LARGE = (8192, 65536)
_OF_TRANSACTIONS = (
    ("transactions", starts.used_image, transactions.transactions),
    ("transactions-dirty", starts.unpunchable_image, transactions.transactions),
    ("transactions-first", starts.vouched_image, transactions.transactions),
    ("transactions-new", starts.empty_file, transactions.first_clusters),
    ("transactions-reuse", starts.full_image, transactions.reuse_after_transactions),
    ("savepoints", starts.full_image, transactions.savepoints),
    ("rollbacks", starts.dirty_image, transactions.rollbacks),
    ("transaction-too-large", starts.used_image, transactions.too_large),
    ("transaction-too-large-fails", starts.used_image, transactions.too_large_fails),
    ("transaction-killed", starts.full_image, transactions.transaction_killed),
    ("commits-fail", starts.full_image, transactions.commits_fail),
    ("commits-fail-dirty", starts.unpunchable_image, transactions.commits_fail),
    ("commit-fails-first", starts.unpunchable_image, transactions.commit_fails_first),
    ("move-fails-first", starts.empty_file, transactions.move_fails_first),
    ("overlapping", starts.half_free_image, transactions.overlapping),
    ("resizes", starts.full_image, transactions.resizes),
    ("resizes-adopted", qemu_starts.qemu_image, transactions.resizes),
)
PACKED = (1024, 4096, 8192, 65536)
"""Cluster sizes in which compression can save a sector."""

_OF_SNAPSHOTS = (
    Family("snapshots", starts.snapshots_image, snapshots.between_writes),
    Family("snapshots-unpunchable", starts.snapshots_unpunchable_image, snapshots.between_writes),
    Family("snapshots-adopted", qemu_starts.qemu_snapshots_image, snapshots.between_writes),
    Family("snapshots-cow", starts.snapshots_unpunchable_image, snapshots.copy_on_write),
    Family("snapshots-cow-new", starts.empty_file, snapshots.copy_on_write),
    Family("snapshots-several", starts.used_image, snapshots.several),
    Family("snapshots-reuse", starts.snapshots_unpunchable_image, snapshots.several),
    Family("snapshots-transactions", starts.snapshots_image, snapshots.in_transactions),
    Family("snapshots-sizes", starts.snapshots_image, snapshots.other_sizes),
    Family("snapshots-sizes-adopted", qemu_starts.qemu_snapshots_image, snapshots.other_sizes),
    Family("snapshots-killed", starts.snapshots_image, snapshots.killed),
    Family("snapshots-fail", starts.snapshots_image, snapshots.fails),
    Family("snapshots-fail-dirty", starts.snapshots_unpunchable_image, snapshots.fails),
    Family("snapshots-too-large", starts.wide_image, snapshots.large_tables, weight=0.5),
    Family("snapshots-narrow", qemu_starts.narrow_image, snapshots.narrow_refcounts),
    Family("compressed", starts.snapshots_image, snapshots.compressed, PACKED),
    Family("compressed-unpunchable", starts.snapshots_unpunchable_image, snapshots.compressed, PACKED),
    Family("compressed-adopted", qemu_starts.qemu_compressed_image, snapshots.compressed),
    Family("compressed-snapshots", qemu_starts.qemu_compressed_image, snapshots.between_writes),
    Family("compressed-new", starts.empty_file, snapshots.compressed_new, PACKED),
    Family("compressed-undone", starts.snapshots_image, snapshots.compressed_undone, PACKED),
)
_OF_OVERLAYS = (
    Family("overlay", overlays.overlay_image, stories.reopened),
    Family("overlay-reuse", overlays.overlay_with_old_bytes, stories.reuse),
    Family("overlay-transactions", overlays.overlay_image, transactions.transactions),
    Family("overlay-resizes", overlays.overlay_with_old_bytes, transactions.resizes),
    Family("overlay-snapshots", overlays.overlay_image, snapshots.between_writes),
    Family("overlay-compressed", overlays.overlay_with_old_bytes, snapshots.compressed, PACKED),
    Family("overlay-killed", overlays.overlay_image, stories.killed),
    Family("overlay-host-fails", overlays.overlay_with_old_bytes, stories.host_fails),
    Family("copy-on-read", overlays.overlay_with_old_bytes, overlays.copied_up),
    Family("rebase", overlays.overlay_image, overlays.rebase),
    Family("rebase-dirty", overlays.overlay_with_old_bytes, overlays.rebase),
    Family("commit", overlays.overlay_image, overlays.emptied),
    Family("commit-base", starts.unpunchable_image, overlays.committed_into),
    Family("commit-base-overlay", overlays.overlay_image, overlays.committed_into),
    Family("repair", overlays.dirty_bit_image, overlays.repaired),
    Family("repair-snapshots", overlays.dirty_bit_snapshots_image, overlays.repaired),
    Family("repair-killed", overlays.dirty_bit_snapshots_image, overlays.repair_killed),
    Family("repair-fails", overlays.dirty_bit_image, overlays.repair_fails),
)
FAMILIES = {
    family.name: family
    for family in (
        Family("fresh", starts.empty_file, stories.fresh),
        Family("reopened", starts.used_image, stories.reopened),
        Family("adopted", qemu_starts.qemu_image, stories.reopened),
        Family("adopted-in-place", qemu_starts.qemu_image, stories.in_place),
        Family("dirty", starts.dirty_image, stories.reopened),
        Family("dirty-reuse", starts.dirty_image, stories.reuse),
        Family("holes", starts.holed_image, stories.reuse),
        Family("unpunchable", starts.unpunchable_image, stories.reuse),
        Family("autoclear", starts.vouched_image, stories.in_place),
        Family("autoclear-first", starts.vouched_image, stories.reopened),
        Family("long-header", starts.long_header_image, stories.reopened, LARGE),
        Family("long-header-killed", starts.long_header_image, stories.killed, LARGE),
        Family("half-moved", starts.half_moved_image, stories.reopened, LARGE),
        Family("in-place", starts.full_image, stories.in_place),
        Family("reuse", starts.full_image, stories.reuse),
        Family("epochs", starts.used_image, stories.epochs),
        Family("grow", starts.used_image, stories.grow),
        Family("refcount-table", starts.table_end_image, stories.grow, (512,), weight=0.25),
        Family("move", starts.used_image, stories.move),
        Family("move-fails", starts.used_image, stories.move_fails),
        Family("move-killed", starts.used_image, stories.move_killed, (4096, 8192), weight=0.5),
        Family("reuse-tables", starts.used_image, stories.reuse_tables, weight=0.5),
        Family("killed", starts.used_image, stories.killed),
        Family("host-fails", starts.full_image, stories.host_fails),
        Family("host-fails-dirty", starts.unpunchable_image, stories.host_fails),
        Family("going-live-fails", starts.used_image, stories.going_live_fails),
        Family("root-write-fails", starts.full_image, stories.root_write_fails),
        Family("barrier-fails", starts.full_image, stories.barrier_fails),
        Family("disk-full", starts.used_image, stories.disk_full),
        *(Family(name, start, story) for name, start, story in _OF_TRANSACTIONS),
        *_OF_SNAPSHOTS,
        *_OF_OVERLAYS,
    )
}

TRANSACTION_FAMILIES = tuple(name for name, _, _ in _OF_TRANSACTIONS)
SNAPSHOT_FAMILIES = tuple(family.name for family in _OF_SNAPSHOTS)
OVERLAY_FAMILIES = tuple(family.name for family in _OF_OVERLAYS)


def workload_named(name: str) -> Workload[Expectation]:
    """Return the workload ``family/cluster size/seed``."""
    family, cluster_bytes, seed = name.split("/")
    return FAMILIES[family].workload(int(cluster_bytes), int(seed))
