"""A walk over a whole disk, run by run, that costs no more than the tables in the file are long.

An L1 table that names one L2 table again and again, or tables that are in no file, makes a few bytes into a
disk that takes years to walk. No writer leaves such a table; a read of a few clusters need not look for it.
"""

from __future__ import annotations

from jqcow.engine.mapping import Mapping
from jqcow.engine.space import Space
from jqcow.errors import CorruptionError
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.layout import DATA_FILE, HostOffset, entry_place


class Walk:
    """The L2 tables that a walk has met, each with the L1 entry that names it."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._reuses = space.reuses
        self._met: dict[HostOffset, int] = {}
        self._l1_index = -1

    def meet(self, mapping: Mapping, offset: int) -> None:
        """The walk has resolved guest ``offset`` through ``mapping``; the lock is held.

        Raises:
            CorruptionError: the L2 table there maps another guest range too, or is in no file.
        """
        reach = mapping.codec.per_table * mapping.geometry.cluster_bytes
        l1_index = offset // reach
        if l1_index == self._l1_index:
            return
        if self._reuses != self._space.reuses:
            # What was an L2 table may have been freed, and have become another one meanwhile.
            self._reuses = self._space.reuses
            self._met.clear()
        table = mapping.l2_table(l1_index)
        if table:
            place = entry_place(mapping.l1.offset, l1_index)
            first = self._met.setdefault(table, l1_index)
            if first != l1_index:
                ranges = " and ".join(f"{at * reach:#x} to {(at + 1) * reach:#x}" for at in (first, l1_index))
                detail = f"the L2 table at {table:#x} maps two guest ranges: {ranges}"
                raise CorruptionError("L1 table", place, detail)
            if not mapping.view.holds(table):
                raise CorruptionError(
                    "L1 table", place, f"the L2 table at {table:#x} is past the end of the file"
                )
        self._l1_index = l1_index


def mapped_elsewhere(mapping: Mapping) -> HostOffset:
    """Return the place of an L2 entry that maps a cluster to another offset of a data file; 0 for none.

    Raises:
        CorruptionError: a table is damaged.
    """
    codec, view, cluster_bytes = mapping.codec, mapping.view, mapping.geometry.cluster_bytes
    for l1_index, table in mapping.l2_tables(0):
        end = table + cluster_bytes
        if view.hole_end(table, end) == end:
            continue
        for block in map(HostOffset, range(table, end, mapping.geometry.block_bytes)):
            first = l1_index * codec.per_table + (block - table) // codec.entry_bytes
            index = 0
            while index < codec.per_block:
                place = HostOffset(block + index * codec.entry_bytes)
                try:
                    run = codec.place_run(view.block(block), index, codec.per_block - index)
                except DamagedEntry as error:
                    raise CorruptionError("L2 table", place, str(error)) from error
                if run.host and run.host != DATA_FILE + (first + index) * cluster_bytes:
                    return place
                index += run.entry_count
    return HostOffset(0)
