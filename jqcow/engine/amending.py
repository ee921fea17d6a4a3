"""Another version of the format: what it has no place for is put in other words first, inside an operation.

A3. No L2 entry has the zero flag when a record makes the header version 2.
A4. An L2 table that several L1 tables share is changed for all of them at once: each of them counts once for
    what its new entries map, and no more for what the old ones did.
"""

from __future__ import annotations

from collections.abc import Iterator

from jqcow.engine.guestdata import GuestData
from jqcow.engine.tables import Tables
from jqcow.ondisk.header import AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS
from jqcow.ondisk.l2 import NO_ENTRY, L2Entry, data_entry
from jqcow.ondisk.layout import ClusterIndex, HostOffset


class Amending:
    """Changes of the format of one image through one view. What changes it is called inside an operation.

    Attributes:
        converted: how many entries lost their zero flag.
    """

    def __init__(self, tables: Tables, data: GuestData) -> None:
        self._tables = tables
        self._data = data
        self._view = tables.view
        self._mapping = tables.mapping
        self._refcounts = tables.refcounts
        self._geometry = tables.geometry
        self._leaves_one = False
        self.converted = 0

    # Zero flags (A3)

    def l2_tables(self) -> list[HostOffset]:
        """Return all L2 tables, each once, however many L1 tables point to it."""
        l1_tables = self._tables.snapshots.l1_tables()
        return list(dict.fromkeys(table for l1 in l1_tables for _, table in self._mapping.l2_tables(0, l1)))

    def take_zero_flags(self, table: HostOffset) -> None:
        """Give the entries of an L2 table that have the zero flag a meaning without it.

        Without a backing file such a cluster needs no entry; else it gets a host cluster of zeros.

        Raises:
            CorruptionError: an entry is damaged.
            PassphraseError: zeros are to be encrypted, and the image is locked.
            OSError: the host failed.
        """
        for block in range(table, table + self._geometry.cluster_bytes, self._geometry.block_bytes):
            found = list(self._mapping.zero_entries(table, HostOffset(block)))
            if found:
                self._replace(table, found)

    def _replace(self, table: HostOffset, found: list[tuple[int, L2Entry]]) -> None:
        owners = self._refcounts.get(self._geometry.cluster_of(table))
        hides = self._view.area.backing_file_name is not None
        values = self._new_clusters(len(found), owners) if hides else iter([NO_ENTRY] * len(found))
        first, row = found[0][0], list[L2Entry]()
        for (index, old), new in zip(found, values, strict=True):
            if index != first + len(row):
                self._mapping.put_entries(table, first, row)
                first, row = index, []
            row.append(new)
            if old.host:
                self._give_up(self._geometry.cluster_of(old.host), owners)
        self._mapping.put_entries(table, first, row)
        self.converted += len(found)

    def _new_clusters(self, count: int, owners: int) -> Iterator[L2Entry]:
        """Yield entries of so many clusters of zeros, each counted once for every owner of its table (A4)."""
        cluster_bytes = self._geometry.cluster_bytes
        while count:
            run = self._refcounts.take(count)
            self._refcounts.count_in(run)
            if owners > 1:
                self._refcounts.correct(run.start, run.count, 1, owners)
            for cluster in map(ClusterIndex, range(run.start, run.start + run.count)):
                host = self._geometry.offset_of(cluster)
                if self._data.is_encrypted or not run.zero_safe:
                    # A transaction's data is durable before its record (T1).
                    self._data.pwrite(bytes(cluster_bytes), host)
                yield data_entry(host)._replace(copied=owners == 1)
            count -= run.count

    def _give_up(self, cluster: ClusterIndex, owners: int) -> None:
        """Drop the references of a table's owners to a cluster that an entry kept behind its flag (A4)."""
        for _ in range(owners):
            self._leaves_one |= bool(self._refcounts.release(cluster))

    def set_copied_flags(self) -> None:
        """Set COPIED where what was given up has one owner left; last, in the same record."""
        if self._leaves_one:
            self._tables.snapshots.set_copied_flags()
            self._leaves_one = False

    # The header

    def set_version(self, version: int) -> None:
        """Make the header another version's; to 2 only without zero flags (A3).

        Raises:
            FormatError: the first cluster does not hold the header.
        """
        if version == 3:
            # Version 3 demands of each snapshot what those of version 2 need not have.
            self._tables.snapshots.keep_sizes()
        self._view.set_area(self._view.area.with_version(version))

    def give_up_raw(self) -> None:
        """Clear the bit of a raw data file: its bytes need not be the disk's any more."""
        features = self._view.header.autoclear_features & ~AUTOCLEAR_DATA_FILE_RAW
        self._view.set_header(autoclear_features=features)

    def set_lazy_refcounts(self, *, lazy: bool) -> None:
        """Set or clear the bit of lazy refcounts, which version 3 has."""
        features = self._view.header.compatible_features & ~COMPATIBLE_LAZY_REFCOUNTS
        self._view.set_header(compatible_features=features | (COMPATIBLE_LAZY_REFCOUNTS if lazy else 0))
