"""The workloads of the crash campaign: families, each in every cluster size, each with a seed of its own.

A family tells a story that meets certain barriers; the seed fills in what is written where.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from jqcow.image.entering import SmallWrites
from jqcow.testing import SimulatedDevice, Workload
from tests.crash import amended, overlays, small_writes, stories
from tests.crash.layouts import GarbageRule
from tests.crash.stories import Story, tell
from tests.crash.undone import undone
from tests.support.expectation import Expectation
from tests.support.journals import FAR_JOURNAL
from tests.support.player import Player
from tests.support.starts import STARTS
from tests.support.users import JOURNAL_BYTES, Session

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
    journal_bytes: int = JOURNAL_BYTES
    small_writes: SmallWrites = "in-place"

    def workload(self, cluster_bytes: int, seed: int) -> Workload[Expectation]:
        """Return the family's workload for a cluster size and a seed: the same on every run."""
        name = f"{self.name}/{cluster_bytes}/{seed}"
        rule = GarbageRule() if cluster_bytes > 4096 else None
        start = functools.cache(lambda: STARTS[self.start](cluster_bytes, Random(f"start {name}")))

        def run(device: SimulatedDevice, expectation: Expectation) -> None:
            if rule is not None:
                rule.follow(device)
            session = Session(
                device,
                expectation,
                written=1 << 16,
                journal_bytes=self.journal_bytes,
                small_writes=self.small_writes,
            )
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
    Family("dirty-reuse", "dirty", stories.REUSE),
    Family("holes", "holed", stories.REUSE),
    Family("unpunchable", "unpunchable", stories.REUSE),
    Family("autoclear", "vouched", stories.IN_PLACE),
    Family("autoclear-first", "vouched", stories.REOPENED),
    Family("long-header", "long-header", stories.REOPENED, LARGE),
    Family("long-header-killed", "long-header", stories.KILLED, LARGE),
    Family("half-moved", "half-moved", stories.REOPENED, LARGE),
    Family("half-closed", "half-closed", stories.REOPENED, LARGE),
    Family("in-place", "full", stories.IN_PLACE),
    Family("reuse", "full", stories.REUSE),
    Family("epochs", "used", stories.EPOCHS),
    Family("grow", "used", stories.GROW),
    Family("refcount-table", "table-end", stories.GROW, (512,), weight=0.25),
    Family("move", "used", stories.MOVE),
    Family("move-fails", "used", stories.move_fails),
    Family("move-killed", "used", stories.move_killed, (4096, 8192), weight=0.5),
    Family("reuse-tables", "used", stories.REUSE_TABLES, weight=0.5),
    Family("killed", "used", stories.KILLED),
    Family("host-fails", "full", stories.HOST_FAILS),
    Family("host-fails-dirty", "unpunchable", stories.HOST_FAILS),
    Family("going-live-fails", "used", stories.GOING_LIVE_FAILS),
    Family("root-write-fails", "full", stories.ROOT_WRITE_FAILS),
    Family("barrier-fails", "full", stories.BARRIER_FAILS),
    Family("barrier-fails-shown", "unforgetting", stories.BARRIER_FAILS),
    Family("disk-full", "used", stories.DISK_FULL),
    Family("full-at-opening", "used", stories.FULL_AT_OPENING),
    Family("far-journal", "used", stories.REOPENED, journal_bytes=FAR_JOURNAL),
    Family("far-journal-reuse", "full", stories.REUSE, journal_bytes=FAR_JOURNAL),
    Family("far-journal-killed", "used", stories.KILLED, journal_bytes=FAR_JOURNAL),
    Family("far-journal-fails", "full", stories.HOST_FAILS, journal_bytes=FAR_JOURNAL),
    Family("far-journal-transactions", "full", stories.SAVEPOINTS, journal_bytes=FAR_JOURNAL),
    Family("far-journal-snapshots", "snapshots", stories.BETWEEN_WRITES, journal_bytes=FAR_JOURNAL),
    Family("short-journals", "used", stories.SHORT_JOURNALS, journal_bytes=256 << 10),
)
_OF_TRANSACTIONS = (
    Family("transactions", "used", stories.TRANSACTIONS),
    Family("transactions-dirty", "unpunchable", stories.TRANSACTIONS),
    Family("transactions-first", "vouched", stories.TRANSACTIONS),
    Family("transactions-new", "empty", stories.first_clusters),
    Family("transactions-reuse", "full", stories.REUSE_AFTER_TRANSACTIONS),
    Family("savepoints", "full", stories.SAVEPOINTS),
    Family("rollbacks", "dirty", stories.ROLLBACKS),
    Family("transaction-too-large", "used", stories.TOO_LARGE),
    Family("transaction-too-large-fails", "used", stories.too_large_fails),
    Family("transaction-killed", "full", stories.TRANSACTION_KILLED),
    Family("commits-fail", "full", stories.COMMITS_FAIL),
    Family("commits-fail-dirty", "unpunchable", stories.COMMITS_FAIL),
    Family("commit-fails-first", "unpunchable", stories.COMMIT_FAILS_FIRST),
    Family("move-fails-first", "empty", stories.MOVE_FAILS_FIRST),
    Family("overlapping", "half-free", stories.overlapping),
    Family("resizes", "full", stories.RESIZES),
    Family("resizes-adopted", "qemu", stories.RESIZES),
)
_OF_SNAPSHOTS = (
    Family("snapshots", "snapshots", stories.BETWEEN_WRITES),
    Family("snapshots-unpunchable", "snapshots-unpunchable", stories.BETWEEN_WRITES),
    Family("snapshots-adopted", "qemu-snapshots", stories.BETWEEN_WRITES),
    Family("snapshots-cow", "snapshots-unpunchable", stories.COPY_ON_WRITE),
    Family("snapshots-cow-new", "empty", stories.COPY_ON_WRITE),
    Family("snapshots-several", "used", stories.several),
    Family("snapshots-reuse", "snapshots-unpunchable", stories.several),
    Family("snapshots-transactions", "snapshots", stories.IN_TRANSACTIONS),
    Family("snapshots-sizes", "snapshots", stories.other_sizes),
    Family("snapshots-sizes-adopted", "qemu-snapshots", stories.other_sizes),
    Family("snapshots-killed", "snapshots", stories.SNAPSHOTS_KILLED),
    Family("snapshots-fail", "snapshots", stories.SNAPSHOTS_FAIL),
    Family("snapshots-fail-dirty", "snapshots-unpunchable", stories.SNAPSHOTS_FAIL),
    Family("snapshots-too-large", "wide", stories.LARGE_TABLES, weight=0.5),
    Family("snapshots-narrow", "narrow", stories.NARROW_REFCOUNTS),
    Family("compressed", "snapshots", stories.compressed, PACKED),
    Family("compressed-unpunchable", "snapshots-unpunchable", stories.compressed, PACKED),
    Family("compressed-adopted", "qemu-compressed", stories.compressed),
    Family("compressed-snapshots", "qemu-compressed", stories.BETWEEN_WRITES),
    Family("compressed-new", "empty", stories.COMPRESSED_NEW, PACKED),
    Family("compressed-undone", "snapshots", stories.COMPRESSED_UNDONE, PACKED),
)
_OF_OVERLAYS = (
    Family("overlay", "overlay", stories.REOPENED),
    Family("overlay-reuse", "overlay-unpunchable", stories.REUSE),
    Family("overlay-transactions", "overlay", stories.TRANSACTIONS),
    Family("overlay-resizes", "overlay-unpunchable", stories.RESIZES),
    Family("overlay-snapshots", "overlay", stories.BETWEEN_WRITES),
    Family("overlay-compressed", "overlay-unpunchable", stories.compressed, PACKED),
    Family("overlay-killed", "overlay", stories.KILLED),
    Family("overlay-host-fails", "overlay-unpunchable", stories.HOST_FAILS),
    Family("copy-on-read", "overlay-unpunchable", overlays.COPIED_UP),
    Family("rebase", "overlay", overlays.REBASE),
    Family("rebase-dirty", "overlay-unpunchable", overlays.REBASE),
    Family("commit", "overlay", overlays.EMPTIED),
    Family("commit-base", "unpunchable", overlays.COMMITTED_INTO),
    Family("commit-base-overlay", "overlay", overlays.COMMITTED_INTO),
    Family("shared", "shared", overlays.SHARED),
    Family("shared-unpunchable", "shared-unpunchable", overlays.SHARED),
    Family("shared-transactions", "shared", stories.SAVEPOINTS),
    Family("shared-resizes", "shared", stories.RESIZES),
    Family("shared-fails", "shared-unpunchable", stories.HOST_FAILS),
    Family("shared-killed", "shared", stories.KILLED),
    Family("repair", "dirty-bit", overlays.REPAIRED),
    Family("repair-snapshots", "dirty-bit-snapshots", overlays.REPAIRED),
    Family("repair-killed", "dirty-bit-snapshots", overlays.REPAIR_KILLED),
    Family("rebuilt-table", "lost-table", overlays.REPAIRED),
    Family("rebuilt-table-snapshots", "lost-table-snapshots", overlays.REPAIRED),
    Family("rebuilt-table-killed", "lost-table-snapshots", overlays.REPAIR_KILLED),
    Family("rebuilt-table-fails", "lost-table", overlays.repair_fails),
    Family("repair-fails", "dirty-bit", overlays.repair_fails),
    Family("repair-undone", "dirty-bit", undone),
    Family("repair-undone-snapshots", "dirty-bit-snapshots", undone),
    Family("rebuilt-table-undone", "lost-table-snapshots", undone),
)
WITH_SUBCLUSTERS = (16384, 65536)
SMALL_TABLES = (512, 1024)
"""Cluster sizes in which what L2 tables reach is short enough to be written."""
_OF_FEATURES = (
    Family("preallocated", "full", stories.PREALLOCATED, SMALL_TABLES),
    Family("preallocated-adopted", "qemu", stories.PREALLOCATED, SMALL_TABLES),
    Family("preallocated-old-space", "unpunchable", stories.PREALLOCATED_OLD_SPACE, (1024, 4096)),
    Family("preallocated-snapshots", "snapshots", stories.PREALLOCATED, SMALL_TABLES),
    Family("preallocated-overlay", "overlay-unpunchable", stories.PREALLOCATED, SMALL_TABLES),
    Family("preallocated-fails", "full", stories.PREALLOCATION_FAILS, SMALL_TABLES),
    Family("preallocated-version-2", "version-2-full", stories.PREALLOCATED, (1024,)),
    Family("preallocated-subclusters", "subclusters-overlay", stories.PREALLOCATED_OLD_SPACE, (16384,)),
    *(
        Family(f"subclusters-{name}", f"subclusters{start}", story, WITH_SUBCLUSTERS)
        for name, start, story in (
            ("reopened", "", stories.REOPENED),
            ("in-place", "-full", stories.IN_PLACE),
            ("reuse", "-full", stories.REUSE),
            ("filled", "", stories.FILLED),
            ("reuse-dirty", "-unpunchable", stories.REUSE),
            ("epochs", "", stories.EPOCHS),
            ("killed", "", stories.KILLED),
            ("host-fails", "-unpunchable", stories.HOST_FAILS),
            ("transactions", "-unpunchable", stories.TRANSACTIONS),
            ("savepoints", "-full", stories.SAVEPOINTS),
            ("resizes", "-full", stories.RESIZES),
            ("snapshots", "-snapshots", stories.BETWEEN_WRITES),
            ("snapshots-cow", "-snapshots", stories.COPY_ON_WRITE),
            ("compressed", "-snapshots", stories.compressed),
            ("overlay", "-overlay", stories.REOPENED),
            ("overlay-reuse", "-overlay-unpunchable", stories.REUSE),
            ("overlay-transactions", "-overlay", stories.TRANSACTIONS),
            ("copy-on-read", "-overlay-unpunchable", overlays.COPIED_UP),
            ("rebase", "-overlay", overlays.REBASE),
            ("repair", "-dirty-bit", overlays.REPAIRED),
        )
    ),
    *(
        Family(f"version-2-{name}", f"version-2{start}", story)
        for name, start, story in (
            ("reopened", "", stories.REOPENED),
            ("in-place", "-full", stories.IN_PLACE),
            ("reuse", "-full", stories.REUSE),
            ("move", "", stories.MOVE),
            ("killed", "", stories.KILLED),
            ("going-live-fails", "", stories.GOING_LIVE_FAILS),
            ("root-write-fails", "-full", stories.ROOT_WRITE_FAILS),
            ("transactions", "", stories.TRANSACTIONS),
            ("resizes", "-full", stories.RESIZES),
            ("snapshots", "-snapshots", stories.BETWEEN_WRITES),
            ("overlay", "-overlay", overlays.WITHOUT_ZERO_FLAGS),
        )
    ),
    Family("amend-version", "dirty", amended.VERSIONS),
    Family("amend-version-overlay", "overlay-unpunchable", amended.VERSIONS),
    Family("amend-version-snapshots", "overlay-zeros-snapshots", amended.VERSIONS),
    Family("amend-width", "snapshots", amended.WIDTHS_IN_TURN),
    Family("amend-width-adopted", "qemu", amended.WIDTHS_IN_TURN),
    Family("amend-width-narrow", "narrow", amended.WIDTHS_IN_TURN),
    Family("amend-bitmaps", "version-2", amended.WITH_BITMAPS),
    Family("amend-killed", "unpunchable", amended.ENDED_BY_KILLS),
    Family("amend-killed-version-2", "version-2-overlay", amended.ENDED_BY_KILLS),
    Family("amend-fails", "overlay-zeros-snapshots", amended.FAILING),
    Family("amend-fails-first", "vouched", amended.FAILING),
    Family("amend-disk-full", "snapshots-unpunchable", amended.ON_A_FULL_DISK),
    Family("amend-long-header", "long-header", amended.VERSIONS, LARGE),
)
_OF_BITMAPS = tuple(
    Family(f"bitmaps-{name}", f"bitmaps{start}", story, *sizes)
    for name, start, story, *sizes in (
        ("noted", "", stories.NOTED),
        ("noted-dirty", "-unpunchable", stories.NOTED),
        ("noted-in-place", "-full", stories.NOTED_IN_PLACE),
        ("in-place", "-full", stories.IN_PLACE),
        ("reopened", "", stories.REOPENED),
        ("reuse", "-full", stories.REUSE),
        ("epochs", "", stories.EPOCHS),
        ("killed", "", stories.KILLED),
        ("move", "", stories.MOVE),
        ("host-fails", "-unpunchable", stories.HOST_FAILS),
        ("barrier-fails", "-full", stories.BARRIER_FAILS),
        ("barrier-fails-shown", "-unforgetting", stories.BARRIER_FAILS),
        ("going-live-fails", "", stories.GOING_LIVE_FAILS),
        ("disk-full", "", stories.DISK_FULL),
        ("transactions", "-unpunchable", stories.TRANSACTIONS),
        ("savepoints", "-full", stories.SAVEPOINTS),
        ("commits-fail", "-full", stories.COMMITS_FAIL),
        ("resizes", "-full", stories.RESIZES),
        ("snapshots", "-snapshots", stories.BETWEEN_WRITES),
        ("snapshots-sizes", "-snapshots", stories.other_sizes),
        ("compressed", "-snapshots", stories.compressed),
        ("copy-on-read", "-overlay", overlays.COPIED_UP),
        ("overlay", "-overlay", stories.REOPENED),
        ("rebase", "-overlay", overlays.REBASE),
        ("amend", "-snapshots", amended.WIDTHS_IN_TURN),
        ("amend-fails", "-full", amended.FAILING),
        ("preallocated", "-full", stories.PREALLOCATED, SMALL_TABLES),
        ("repair", "-dirty-bit", overlays.REPAIRED),
        ("rebuilt-table", "-lost-table", overlays.REPAIRED),
        ("encrypted", "-encrypted", stories.REOPENED),
        ("subclusters", "-subclusters", stories.NOTED, (16384,)),
        ("subclusters-overlay", "-subclusters-overlay", stories.RESIZES, (16384,), 0.25),
    )
)
_OF_ENCRYPTION = tuple(
    Family(f"encrypted-{name}", f"encrypted{start}", story, *sizes)
    for name, start, story, *sizes in (
        ("reopened", "", stories.REOPENED),
        ("in-place", "-full", stories.IN_PLACE),
        ("reuse", "-full", stories.REUSE),
        ("reuse-dirty", "-unpunchable", stories.REUSE),
        ("killed", "", stories.KILLED),
        ("host-fails", "-unpunchable", stories.HOST_FAILS),
        ("barrier-fails", "-full", stories.BARRIER_FAILS),
        ("move", "", stories.MOVE),
        ("transactions", "-unpunchable", stories.TRANSACTIONS),
        ("resizes", "-full", stories.RESIZES),
        ("snapshots", "-snapshots", stories.BETWEEN_WRITES),
        ("snapshots-cow", "-snapshots", stories.COPY_ON_WRITE),
        ("overlay", "-overlay", stories.REOPENED),
        ("rebase", "-overlay", overlays.REBASE),
        ("copy-on-read", "-overlay", overlays.COPIED_UP),
        ("repair", "-dirty-bit", overlays.REPAIRED),
        ("subclusters", "-subclusters", stories.REUSE, (16384,)),
        ("subclusters-snapshots", "-subclusters-snapshots", stories.COPY_ON_WRITE, (16384,), 0.25),
        ("version-2", "-version-2", stories.RESIZES, (1024,)),
    )
)
OF_SMALL_DISKS = (512, 1024)
"""Cluster sizes in which a data file, which is as long as the disk, is short."""
_OF_DATA_FILES = tuple(
    Family(f"data-file-{name}", f"data-file{start}", story, OF_SMALL_DISKS)
    for name, start, story in (
        ("reopened", "", stories.REOPENED),
        ("in-place", "-full", stories.IN_PLACE),
        ("reuse", "-full", stories.REUSE),
        ("reuse-dirty", "-unpunchable", stories.REUSE),
        ("epochs", "", stories.EPOCHS),
        ("killed", "", stories.KILLED),
        ("killed-in-place", "-full", stories.KILLED_IN_PLACE),
        ("move", "", stories.MOVE),
        ("host-fails", "-unpunchable", stories.HOST_FAILS),
        ("barrier-fails", "-full", stories.BARRIER_FAILS),
        ("barrier-fails-shown", "-unforgetting", stories.BARRIER_FAILS),
        ("going-live-fails", "", stories.GOING_LIVE_FAILS),
        ("resizes", "-full", stories.RESIZES),
        ("preallocated", "-full", stories.PREALLOCATED),
        ("overlay", "-overlay", stories.REOPENED),
        ("overlay-resizes", "-overlay", stories.RESIZES),
        ("rebase", "-overlay", overlays.REBASE),
        ("copy-on-read", "-overlay", overlays.COPIED_UP),
        ("repair", "-dirty-bit", overlays.REPAIRED),
        ("bitmaps", "-bitmaps", stories.REOPENED),
        ("bitmaps-in-place", "-bitmaps-full", stories.IN_PLACE),
        ("bitmaps-reuse", "-bitmaps-full", stories.REUSE),
        ("raw-reopened", "-raw", stories.REOPENED),
        ("raw-in-place", "-raw-full", stories.IN_PLACE),
        ("raw-reuse", "-raw-full", stories.REUSE),
        ("raw-reuse-dirty", "-raw-unpunchable", stories.REUSE),
        ("raw-zeros", "-raw-zeros", stories.IN_PLACE),
        ("raw-killed", "-raw-zeros", stories.KILLED),
        ("raw-host-fails", "-raw-unpunchable", stories.HOST_FAILS),
        ("raw-barrier-fails", "-raw-full", stories.BARRIER_FAILS),
        ("raw-barrier-fails-shown", "-raw-unforgetting", stories.BARRIER_FAILS),
        ("raw-resizes", "-raw-full", stories.RESIZES),
        ("raw-bitmaps", "-raw-bitmaps", stories.REOPENED),
        ("device", "-device", stories.REUSE),
        ("device-resizes", "-device", stories.RESIZES),
        ("raw-device", "-raw-device", stories.REUSE),
        ("raw-device-resizes", "-raw-device", stories.RESIZES),
        ("raw-device-zeros", "-raw-device-zeros", stories.IN_PLACE),
        ("two-devices", "-two-devices", stories.REUSE),
        ("two-devices-resizes", "-two-devices", stories.RESIZES),
    )
)
_OF_BLOCK_DEVICES = (
    Family("device-unforgetting", "device-unforgetting", stories.BARRIER_FAILS),
    Family("device-refcount-table", "device", stories.GROW, (512,)),
    *(
        Family(f"device-{name}", f"device{start}", story)
        for name, start, story in (
            ("fresh", "-empty", stories.FRESH),
            ("reopened", "", stories.REOPENED),
            ("adopted", "-qemu", stories.REOPENED),
            ("in-place", "-full", stories.IN_PLACE),
            ("reuse", "-full", stories.REUSE),
            ("reuse-dirty", "-dirty", stories.REUSE),
            ("epochs", "", stories.EPOCHS),
            ("grow", "", stories.GROW),
            ("move", "", stories.MOVE),
            ("move-fails", "", stories.move_fails),
            ("reuse-tables", "", stories.REUSE_TABLES),
            ("killed", "", stories.KILLED),
            ("host-fails", "-full", stories.HOST_FAILS),
            ("barrier-fails", "-full", stories.BARRIER_FAILS),
            ("going-live-fails", "", stories.GOING_LIVE_FAILS),
            ("root-write-fails", "-full", stories.ROOT_WRITE_FAILS),
            ("tight", "-tight", stories.ON_A_TIGHT_DEVICE),
            ("tight-full", "-tight-full", stories.ON_A_TIGHT_DEVICE),
            ("tight-killed", "-tight-full", stories.KILLED_ON_A_TIGHT_DEVICE),
            ("transactions", "-dirty", stories.TRANSACTIONS),
            ("savepoints", "-full", stories.SAVEPOINTS),
            ("commits-fail", "-full", stories.COMMITS_FAIL),
            ("resizes", "-full", stories.RESIZES),
            ("snapshots", "-snapshots", stories.BETWEEN_WRITES),
            ("snapshots-cow", "-snapshots", stories.COPY_ON_WRITE),
            ("overlay", "-overlay", stories.REOPENED),
            ("overlay-reuse", "-overlay", stories.REUSE),
            ("copy-on-read", "-overlay", overlays.COPIED_UP),
            ("version-2", "-version-2", stories.REUSE),
            ("bitmaps", "-bitmaps", stories.NOTED),
            ("encrypted", "-encrypted", stories.REUSE),
            ("repair", "-dirty-bit", overlays.REPAIRED),
            ("repair-snapshots", "-dirty-bit-snapshots", overlays.REPAIRED),
            ("repair-killed", "-dirty-bit-snapshots", overlays.REPAIR_KILLED),
            ("rebuilt-table", "-lost-table", overlays.REPAIRED),
            ("amend-width", "-snapshots", amended.WIDTHS_IN_TURN),
            ("amend-version", "-dirty", amended.VERSIONS),
        )
    ),
    Family("device-compressed", "device-snapshots", stories.compressed, PACKED),
    Family("device-subclusters", "device-subclusters", stories.REUSE, WITH_SUBCLUSTERS),
    Family("device-preallocated", "device-full", stories.PREALLOCATED, SMALL_TABLES),
    Family("device-preallocated-old-space", "device-dirty", stories.PREALLOCATED_OLD_SPACE, (1024, 4096)),
)
_STAGED_TOGETHER = {
    "over",
    "mixed",
    "mixed-snapshots",
    "mixed-bitmaps",
    "killed",
    "fails",
    "transactions",
    "reuse",
}
"""These have a longer journal, where many small writes are brought home together."""
_OF_SMALL_WRITES = tuple(
    Family(
        f"intents-{name}",
        start,
        story,
        *sizes,
        small_writes="journal",
        journal_bytes=(8 if name in _STAGED_TOGETHER else 1) * JOURNAL_BYTES,
    )
    for name, start, story, *sizes in (
        ("logged", "used", small_writes.LOGGED),
        ("over", "used", small_writes.OVER_EACH_OTHER),
        ("parts", "snapshots-unpunchable", small_writes.PARTS_OF_SECTORS),
        ("mixed", "unpunchable", small_writes.MIXED),
        ("mixed-overlay", "overlay-unpunchable", small_writes.MIXED),
        ("mixed-snapshots", "snapshots-unpunchable", small_writes.MIXED),
        ("mixed-subclusters", "subclusters-unpunchable", small_writes.MIXED, WITH_SUBCLUSTERS),
        ("mixed-bitmaps", "bitmaps-unpunchable", small_writes.MIXED),
        ("epochs", "used", small_writes.EPOCHS),
        ("killed", "used", small_writes.KILLED),
        ("fails", "unpunchable", small_writes.FAILS),
        ("barrier-fails", "used", small_writes.BARRIER_FAILS),
        ("disk-full", "used", small_writes.DISK_FULL),
        ("moves", "used", small_writes.MOVES),
        ("transactions", "used", small_writes.TRANSACTIONS),
        ("snapshots", "snapshots", stories.BETWEEN_WRITES),
        ("overlay", "overlay", stories.REOPENED),
        ("resizes", "full", stories.RESIZES),
        ("reuse", "full", stories.REUSE),
        ("copy-on-read", "overlay-unpunchable", overlays.COPIED_UP),
        ("compressed", "snapshots-unpunchable", stories.compressed, PACKED),
    )
)
_OF_SMALL_WRITES_BELOW = tuple(
    Family(
        f"intents-{name}",
        start,
        story,
        *sizes,
        small_writes="journal",
        journal_bytes=(8 if name in _STAGED_TOGETHER else 1) * JOURNAL_BYTES,
    )
    for name, start, story, *sizes in (
        ("mixed-bitmaps-overlay", "bitmaps-overlay", small_writes.MIXED),
        ("logged-overlay", "overlay", small_writes.LOGGED),
        ("over-overlay", "overlay", small_writes.OVER_EACH_OTHER),
        ("killed-overlay", "overlay-unpunchable", small_writes.KILLED),
        ("fails-overlay", "overlay-unpunchable", small_writes.FAILS),
        ("mixed-subclusters-overlay", "subclusters-overlay", small_writes.MIXED, WITH_SUBCLUSTERS),
    )
)
"""Over a backing file; the last of all families, so that the others keep their numbers in the sample."""
GROUPS = {
    "plain": _PLAIN,
    "transactions": _OF_TRANSACTIONS,
    "snapshots": _OF_SNAPSHOTS,
    "overlays": _OF_OVERLAYS,
    "small-writes": _OF_SMALL_WRITES,
    "features": (*_OF_FEATURES, *_OF_BITMAPS, *_OF_ENCRYPTION, *_OF_DATA_FILES, *_OF_BLOCK_DEVICES),
    "small-writes-below": _OF_SMALL_WRITES_BELOW,
}
WITH_SMALL_WRITES = "+small-writes"
FAMILIES = {family.name: family for families in GROUPS.values() for family in families}


def names_in(*groups: str) -> Iterator[str]:
    """Yield the names of the families in some groups."""
    for group in groups:
        yield from (family.name for family in GROUPS[group])


def family_named(name: str) -> Family:
    """Return a family, with small writes in the journal if `WITH_SMALL_WRITES` is behind its name."""
    family = FAMILIES[name.removesuffix(WITH_SMALL_WRITES)]
    return replace(family, name=name, small_writes="journal") if name != family.name else family


def workload_named(name: str) -> Workload[Expectation]:
    """Return the workload ``family/cluster size/seed``."""
    family, cluster_bytes, seed = name.split("/")
    return family_named(family).workload(int(cluster_bytes), int(seed))
