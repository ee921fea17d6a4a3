"""The data that L2 tables name which have no place yet, shown as orphans: each table tells the order of it.

A structure of the guest that is longer than a cluster lies anywhere in the file, in parts; a table that names
it has its parts side by side. So it tells where the table belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jqcow import _native
from jqcow.salvage.candidates import Told
from jqcow.salvage.evidence import Placement
from jqcow.salvage.reading import PieceReader
from jqcow.salvage.tables import DiskTables


class NamedData:
    """What tables name, as `evidence.Orphans` has them: one table behind the other, each with all its range.

    A host offset is the number of the table, times what a table covers, and the place in its range.
    """

    def __init__(self, tables: DiskTables, offsets: Iterable[int], reader: PieceReader) -> None:
        """Show what the tables at host offsets name, read by ``reader``."""
        self._tables, self._offsets, self._reader = tables, sorted(offsets), reader
        self._current: tuple[int, dict[int, tuple[int, int]]] = (-1, {})

    @property
    def cluster_bytes(self) -> int:
        """Return the length of a cluster in bytes."""
        return self._tables.shape.geometry.cluster_bytes

    def __len__(self) -> int:
        """Return how many there may be."""
        return len(self._offsets) * self._tables.shape.geometry.l2_entries

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield (place, content) of each cluster that is named and holds something."""
        for number in range(len(self._offsets)):
            start = number * self._tables.table_covers
            for position in self._entries(number):
                place = start + position * self.cluster_bytes
                content = self.read(place)
                if not _native.is_zero(content):
                    yield place, content

    def read(self, host_offset: int) -> bytes:
        """Return the content of the cluster that is shown at a place; zeros where none is."""
        number, within = divmod(host_offset, self._tables.table_covers)
        if not 0 <= number < len(self._offsets):
            return bytes(self.cluster_bytes)
        host, length = self._entries(number).get(within // self.cluster_bytes, (0, 0))
        if length:
            return self._reader.read_compressed(host, length) or bytes(self.cluster_bytes)
        return self._reader.source.pread(self.cluster_bytes, host) if host else bytes(self.cluster_bytes)

    def _entries(self, number: int) -> dict[int, tuple[int, int]]:
        """Return (host offset, compressed length) of what a table names, by position."""
        if self._current[0] != number:
            table = self._tables.source.pread(self.cluster_bytes, self._offsets[number])
            found = self._tables.shape.codec.found(table)
            self._current = number, {one.position: (one.host, one.length) for one in found if one.host}
        return self._current[1]

    def told_by(self, placement: Placement) -> Told | None:
        """Return what a placement of something that is shown tells of a table; None for nothing."""
        place, within = divmod(placement.host_offset, self.cluster_bytes)
        guest = placement.guest_offset - within
        number, position = divmod(place, self._tables.shape.geometry.l2_entries)
        if guest < 0 or guest % self.cluster_bytes or not 0 <= number < len(self._offsets):
            return None
        return Told(self._offsets[number], position, guest, placement.certainty)
