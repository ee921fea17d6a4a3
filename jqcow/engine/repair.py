"""Refcounts made right: every reference counted anew, and what differs changed, in one transaction.

Leaks, refcounts that are too low, COPIED flags: these follow from the tables, so they can be made right. A
table that is itself damaged, or used twice, is not touched, and raises before anything is changed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from jqcow import _native
from jqcow.checker.lost import Holes, LostData
from jqcow.checker.tables import zeroed
from jqcow.engine.broken_bitmaps import BrokenBitmaps
from jqcow.engine.closing import Closing
from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.medium import EXPECTED
from jqcow.engine.tables import Tables
from jqcow.engine.transaction import PrivateChanges
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk.bitmaps import Directory
from jqcow.ondisk.header import AUTOCLEAR_KNOWN, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY
from jqcow.ondisk.layout import ClusterIndex, HostOffset

What = Literal["leaks", "all", "bitmaps"]
"""``"bitmaps"``: all, and bitmaps that are damaged are given up."""
Difference = tuple[int, int, int, int]
"""(start, count, refcount, references) of clusters in a row."""

MAX_CLUSTERS = 1 << 28
"""The largest file, in clusters, whose references are counted: 16 TiB with clusters of 64 KiB."""
_COUNTER_ORDER = 5
_COUNTER_BYTES = 4


@dataclass(frozen=True)
class RepairReport:
    """What was wrong, in clusters, and is now right.

    Attributes:
        leaks: their refcounts were higher than the references to them.
        too_low: their refcounts were lower.
        copied_flags: COPIED flags that said something else than the refcount.
        refcount_table: it was lost, and is new.
        lost: leaked clusters that look like lost data; they were left as they are.
        bitmaps: damaged bitmaps that were given up.
    """

    leaks: int = 0
    too_low: int = 0
    copied_flags: int = 0
    refcount_table: bool = False
    lost: int = 0
    bitmaps: int = 0

    @property
    def changed(self) -> bool:
        """True if anything was wrong."""
        return bool(self.leaks or self.too_low or self.copied_flags or self.bitmaps)


class References:
    """How many references there are to each cluster of an image, counted from its tables alone."""

    def __init__(self, tables: Tables, file_clusters: int) -> None:
        """Count, up to the end of the file or of the refcounts.

        Raises:
            CorruptionError: a table is damaged or used twice, or something lies past the end of the file.
            UnsupportedFeatureError: a file of more than MAX_CLUSTERS clusters.
        """
        self._tables = tables
        self._cluster_bytes = tables.geometry.cluster_bytes
        self.file_clusters = file_clusters
        length = max(file_clusters, tables.refcounts.used_end())
        if length > MAX_CLUSTERS:
            raise UnsupportedFeatureError(f"counting the references to {length} clusters")
        # Untouched pages take no memory: an image is often much smaller than its file is long.
        self._length = length
        self._counts = zeroed("B", max(1, length) * _COUNTER_BYTES)
        self.metadata = tables.snapshots.find_metadata()
        self._metadata_in_order = sorted(self.metadata)
        for cluster, users in self.metadata.items():
            self._count("metadata", cluster, 1, users)
        self._count_data()

    def _count_data(self) -> None:
        """Walk every L2 table once, however many L1 tables point to it."""
        users: Counter[HostOffset] = Counter()
        for l1 in self._tables.snapshots.l1_tables():
            users.update(table for _, table in self._tables.mapping.l2_tables(0, l1))
        for table, count in users.items():
            for start, length in self._tables.mapping.references(table):
                self._check_holds_data(table, start, length)
                self._count("L2 table", start, length, count)

    def _check_holds_data(self, table: int, start: int, length: int) -> None:
        place = bisect_left(self._metadata_in_order, start)
        if place < len(self._metadata_in_order) and self._metadata_in_order[place] < start + length:
            offset = self._metadata_in_order[place] * self._cluster_bytes
            raise CorruptionError("L2 table", table, f"it maps metadata at {offset:#x}")

    def _count(self, structure: str, start: int, length: int, count: int) -> None:
        offset = start * self._cluster_bytes
        if start + length > self.file_clusters:
            raise CorruptionError(structure, offset, "it lies past the end of the file")
        if _native.refcount_add(self._counts, _COUNTER_ORDER, start, start + length, count) >= 0:
            raise CorruptionError(structure, offset, "it has more than 2**32 references")

    def differences(self) -> Iterator[Difference]:
        """Yield the clusters whose refcount is not the number of references to them."""
        position = 0
        for start, count, refcount in self._tables.refcounts.runs(0, self._length):
            while position < start + count:
                end = start + count
                references, equal = _native.refcount_run(self._counts, _COUNTER_ORDER, position, end)
                if references != refcount:
                    yield position, equal, refcount, references
                position += equal

    def end(self) -> int:
        """Return the index behind the last cluster with a reference."""
        return _native.refcount_last_used(self._counts, _COUNTER_ORDER) + 1

    def is_leaked(self, cluster: int) -> bool:
        """Return True for a cluster with a refcount and no reference."""
        return self.is_counted(cluster) and not _native.refcount_get(self._counts, cluster, _COUNTER_ORDER)

    def is_counted(self, cluster: int) -> bool:
        """Return True for a cluster of the file with a refcount."""
        return cluster < self._length and self._tables.refcounts.get(ClusterIndex(cluster)) > 0


def repair(closing: Closing, what: What, *, free_lost: bool = False) -> RepairReport:
    """Make an image's refcounts right, in a transaction of its own, and clear the dirty bit.

    Called with no other user of the image, as it is opened. ``"leaks"`` only takes away what is too much.
    Leaked clusters that look like lost data stay, unless ``free_lost`` gives them up too.

    Raises:
        CorruptionError: a table is damaged, or used twice; nothing is changed.
        UnsupportedFeatureError: a cluster has more references than its refcount's width counts.
        OSError: nothing is changed.
    """
    lifecycle = closing.lifecycle
    public, geometry = lifecycle.public, lifecycle.geometry
    if what == "bitmaps":
        give_up_broken_bitmaps(public)
    lifecycle.prepare_to_repair(may_rebuild=what != "leaks")
    view_bytes = max(lifecycle.medium.size(), geometry.offset_of(public.refcounts.used_end()))
    references = References(public, geometry.clusters(view_bytes))
    dirty = public.view.header.incompatible_features & INCOMPATIBLE_DIRTY
    differences, lost = list(references.differences()), 0
    if not free_lost:
        differences, lost = _without_lost(public, references, differences)
    given_up = public.space.given_up_bitmaps
    # Of them nobody knows whether they hold: going live clears them, as QEMU does when it opens to repair.
    unknown = public.view.header.autoclear_features & ~AUTOCLEAR_KNOWN
    is_wrong = given_up or dirty or unknown or differences
    if not (is_wrong or public.snapshots.set_copied_flags(change=False)):
        lifecycle.start_search()
        return RepairReport(lost=lost)
    file_bytes = lifecycle.medium.size()
    lifecycle.go_live(lifecycle.medium.require_healthy)
    private = PrivateChanges(lifecycle)
    try:
        with lifecycle.medium.lock, private.tables.operation():
            report, is_sound = _stage(private.tables, references, differences, what)
            _clear_features(private.tables, dirty)
            BrokenBitmaps(private.tables.bitmaps).stage()
        private.commit()
        public.space.sound_bitmaps = None
    except BaseException as error:
        private.give_up()
        if isinstance(error, EXPECTED) and not lifecycle.medium.poisoned:
            # Other programs may be able to do more: no journal stays behind.
            lifecycle.kept_bytes = file_bytes
            _clean_after(error, closing)
        raise
    if is_sound:
        lifecycle.start_search()
    else:
        lifecycle.kept_bytes = references.file_clusters * geometry.cluster_bytes
    return replace(report, lost=lost, bitmaps=given_up)


def give_up_broken_bitmaps(tables: Tables) -> None:
    """Forget the bitmaps that are damaged, or lie over other metadata, before anything is counted."""
    space = tables.space
    others: set[ClusterIndex] = set()
    space.sound_bitmaps = Directory()
    # Where other metadata is damaged, the repair finds that.
    with suppress(CorruptionError, FormatError, UnsupportedFeatureError):
        others = set(tables.snapshots.find_metadata())
    space.sound_bitmaps = None
    BrokenBitmaps(tables.bitmaps).give_up(others)


def _clean_after(error: BaseException, closing: Closing) -> None:
    try:
        closing.clean()
    except EXPECTED as second:
        error.add_note(f"the image could not be closed either: {second}")


def _without_lost(
    tables: Tables, references: References, differences: list[Difference]
) -> tuple[list[Difference], int]:
    """Return the differences without those of leaked clusters that look like lost data, and their number."""
    geometry, medium = tables.geometry, tables.blocks.medium

    def read(cluster: int) -> bytes:
        return medium.pread(geometry.cluster_bytes, geometry.offset_of(ClusterIndex(cluster)))

    abandoned = tables.space.abandoned
    leaks = [found for found in differences if not found[3]]
    if not leaks:
        return differences, 0
    bits, codec = tables.view.header.cluster_bits, tables.mapping.codec
    lost = LostData(references.is_leaked, references.is_counted, read, codec, bits, _holes_in(tables))
    lost.look_at(at for start, count, *_ in leaks for at in range(start, start + count))
    kept, number = [found for found in differences if found[3]], 0
    for start, count, refcount, counted in leaks:
        found = groupby(range(start, start + count), lambda at: at not in abandoned and lost.is_lost(at))
        for is_lost, group in found:
            clusters = list(group)
            if is_lost:
                number += len(clusters)
            else:
                kept.append((clusters[0], len(clusters), refcount, counted))
    return kept, number


def _holes_in(tables: Tables) -> Holes:
    """Return the holes of the tables in use, where lost data may have been mapped."""
    geometry, mapping = tables.geometry, tables.mapping
    holes = Holes(geometry.clusters(mapping.disk_bytes) * mapping.codec.entry_bytes)
    for l1 in tables.snapshots.l1_tables():
        found = list(mapping.l2_tables(0, l1))
        if l1.entry_count:
            holes.see_l1_table(index for index, _ in found)
        for _, table in found:
            holes.see_l2_table(tables.view.read(table, geometry.cluster_bytes))
    return holes


def clear_corrupt_bit(lifecycle: Lifecycle) -> None:
    """Declare the image sound, durably: whoever calls this has checked it.

    Raises:
        OSError: the bit stays.
    """
    lifecycle.go_live(lifecycle.medium.require_healthy)
    with lifecycle.medium.lock, lifecycle.public.operation():
        _clear_features(lifecycle.public, INCOMPATIBLE_CORRUPT)
    lifecycle.commits.flush(lifecycle.medium.require_healthy)


def _clear_features(tables: Tables, bits: int) -> None:
    if bits:
        features = tables.view.header.incompatible_features & ~bits
        tables.view.set_header(incompatible_features=features)


def _stage(
    tables: Tables, references: References, differences: list[Difference], what: What
) -> tuple[RepairReport, bool]:
    """Stage the right refcounts and COPIED flags; return what was wrong, and whether nothing is any more."""
    header = tables.view.header
    first = end = 0
    if not tables.refcounts.is_lost:
        first = tables.geometry.cluster_of(HostOffset(header.refcount_table_offset))
        end = first + header.refcount_table_clusters

    def urgency(found: Difference) -> tuple[bool, bool]:
        # The table's own clusters first: it may have to be moved for the others.
        return not (found[0] < end and first < found[0] + found[1]), found[0] not in references.metadata

    differences.sort(key=urgency)
    # The first refcount that is made right then makes a new table.
    is_lost = tables.refcounts.is_lost
    leaks = too_low = 0
    for start, count, refcount, counted in differences:
        if refcount > counted:
            leaks += count
        else:
            too_low += count
            if what == "leaks":
                continue
        tables.refcounts.correct(ClusterIndex(start), count, refcount, counted)
    if what == "leaks" and too_low:
        # By refcounts that are still too low, COPIED would allow writing where others read.
        return RepairReport(leaks), False
    return RepairReport(leaks, too_low, tables.snapshots.set_copied_flags(), is_lost), True
