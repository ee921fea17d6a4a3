"""Refcounts made right: every reference counted anew, and what differs changed, in one transaction.

Leaks, refcounts that are too low, COPIED flags: these follow from the tables, so they can be made right. A
table that is itself damaged, or used twice, is not touched, and raises before anything is changed.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jqcow import _native
from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.tables import Tables
from jqcow.engine.transaction import PrivateChanges
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk.header import INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DIRTY
from jqcow.ondisk.layout import ClusterIndex, HostOffset

What = Literal["leaks", "all"]

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
    """

    leaks: int = 0
    too_low: int = 0
    copied_flags: int = 0

    @property
    def changed(self) -> bool:
        """True if anything was wrong."""
        return bool(self.leaks or self.too_low or self.copied_flags)


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
        self._counts = memoryview(mmap.mmap(-1, max(1, length) * _COUNTER_BYTES))
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

    def differences(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield (start, count, refcount, references) of clusters in a row where the two differ."""
        position = 0
        for start, count, refcount in self._tables.refcounts.runs(0, self._length):
            while position < start + count:
                end = start + count
                references, equal = _native.refcount_run(self._counts, _COUNTER_ORDER, position, end)
                if references != refcount:
                    yield position, equal, refcount, references
                position += equal


def repair(lifecycle: Lifecycle, what: What) -> RepairReport:
    """Make an image's refcounts right, in a transaction of its own, and clear the dirty bit.

    Called with no other user of the image, as it is opened. ``"leaks"`` only takes away what is too much.

    Raises:
        CorruptionError: a table is damaged, or used twice; nothing is changed.
        UnsupportedFeatureError: a cluster has more references than its refcount's width counts.
        OSError: nothing is changed.
    """
    public, geometry = lifecycle.public, lifecycle.geometry
    lifecycle.prepare_to_repair()
    view_bytes = max(lifecycle.medium.size(), geometry.offset_of(public.refcounts.used_end()))
    references = References(public, geometry.clusters(view_bytes))
    dirty = public.view.header.incompatible_features & INCOMPATIBLE_DIRTY
    differs = next(references.differences(), None) is not None
    if not dirty and not differs and not public.snapshots.set_copied_flags(change=False):
        lifecycle.start_search()
        return RepairReport()
    lifecycle.go_live(lifecycle.medium.require_healthy)
    private = PrivateChanges(lifecycle)
    try:
        with lifecycle.medium.lock, private.tables.operation():
            report, is_sound = _stage(private.tables, references, what)
            _clear_features(private.tables, dirty)
        private.commit()
    except BaseException:
        private.give_up()
        raise
    if is_sound:
        lifecycle.start_search()
    else:
        lifecycle.kept_bytes = references.file_clusters * geometry.cluster_bytes
    return report


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


def _stage(tables: Tables, references: References, what: What) -> tuple[RepairReport, bool]:
    """Stage the right refcounts and COPIED flags; return what was wrong, and whether nothing is any more."""
    header = tables.view.header
    first = tables.geometry.cluster_of(HostOffset(header.refcount_table_offset))
    end = first + header.refcount_table_clusters

    def urgency(found: tuple[int, int, int, int]) -> tuple[bool, bool]:
        # The table's own clusters first: it may have to be moved for the others.
        return not (found[0] < end and first < found[0] + found[1]), found[0] not in references.metadata

    differences = sorted(references.differences(), key=urgency)
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
    return RepairReport(leaks, too_low, tables.snapshots.set_copied_flags()), True
