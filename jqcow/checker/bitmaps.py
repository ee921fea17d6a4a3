"""The persistent bitmaps, as a check walks them."""

from __future__ import annotations

from jqcow.checker.claims import Claims
from jqcow.checker.findings import Kind
from jqcow.errors import CorruptionError
from jqcow.ondisk import bitmaps, entries
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.layout import table_bytes

_STEP_BYTES = 1 << 20


def walk_bitmaps(claims: Claims) -> None:
    """Claim the bitmap directory, the tables of all bitmaps and the clusters of their bits.

    As in QEMU, of a damaged directory nothing but itself counts.
    """
    try:
        place = bitmaps.place_of(claims.area)
        if place is None:
            return
        claims.claim("bitmap directory", place.offset, place.length_bytes, "header", 0)
        directory = bitmaps.read_directory(claims.read, claims.area)
    except CorruptionError as error:
        claims.findings.add(Kind.BITMAPS, error.structure, error.offset, error.detail)
        return
    for entry in directory.entries:
        length = table_bytes(entry.table_entries)
        if claims.claim("bitmap table", entry.table_offset, length, "bitmap directory", place.offset):
            _walk_table(claims, entry.table_offset, length)


def _walk_table(claims: Claims, offset: int, length: int) -> None:
    """Claim the clusters that the table of a bitmap names."""
    for start in range(offset, offset + length, _STEP_BYTES):
        data = claims.read(min(_STEP_BYTES, offset + length - start), start)
        for index, entry in entries.nonzero_entries(data):
            place = start + table_bytes(index)
            try:
                bits, _ = entries.decode_bitmap_table(entry, claims.geometry)
            except DamagedEntry as error:
                claims.findings.add(Kind.BITMAPS, "bitmap table entry", place, str(error))
                continue
            if bits:
                source = "bitmap table entry"
                claims.claim("bits of a bitmap", bits, claims.cluster_bytes, source, place)
