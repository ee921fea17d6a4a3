"""COPIED flags that a repair of refcounts makes wrong: what was right beside a wrong refcount."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from jqcow.checker.claims import Read
from jqcow.checker.findings import Finding, Kind
from jqcow.ondisk import entries
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, codec_of
from jqcow.ondisk.layout import table_bytes


def wrong_copied_flags(read: Read, area: HeaderArea, refcounts: Mapping[int, int]) -> Iterator[Finding]:
    """Yield the entries of the active tables whose COPIED flag does not go with a refcount that is to come.

    Args:
        read: (length, offset) of the file, of an image that `check_structure` could walk.
        area: its header.
        refcounts: what clusters are to have, by their indices on the host; others are not looked at.
    """
    geometry, codec = area.header.geometry, codec_of(area.header.geometry)
    bits = geometry.cluster_bits
    l1_bytes, l1_place = table_bytes(area.header.l1_size), area.header.l1_table_offset
    tables: list[int] = []
    for index, entry in entries.nonzero_entries(read(l1_bytes, l1_place)):
        table, copied, _ = entries.split_l1(entry)
        if not table or table % geometry.cluster_bytes:
            continue
        tables.append(table)
        refcount = refcounts.get(table >> bits)
        if refcount is not None and (refcount == 1) != copied:
            yield _finding("L1 entry", l1_place + table_bytes(index), entry, refcount)
    for table in tables:
        for found in codec.found(read(geometry.cluster_bytes, table)):
            refcount = refcounts.get(found.host >> bits)
            if found.kind == COMPRESSED_CLUSTER or not found.host or refcount is None:
                continue
            if (refcount == 1) != found.copied:
                yield _finding("L2 entry", table + found.position * codec.entry_bytes, found.raw, refcount)


def _finding(structure: str, place: int, entry: int, refcount: int) -> Finding:
    return Finding(Kind.COPIED_FLAG, structure, place, f"{entry:#018x}, refcount {refcount}")
