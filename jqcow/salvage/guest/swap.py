"""Swap space of Linux: its header tells how long it is; what it holds is worth nothing after a shutdown.

The last ten bytes of its first page are "SWAPSPACE2". After 1024 bytes, in the guest's byte order::

    Byte   0 -   3:   version, 1
           4 -   7:   last page
           8 -  11:   number of bad pages
          12 -  27:   UUID
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from jqcow.salvage.evidence import Certainty, GuestStructure, Orphans, PlacedDisk, Volume
from jqcow.salvage.guest.opaque import Opaque, Part
from jqcow.salvage.guest.signs import SECTOR_BYTES, Sign, sightings

MAGIC = b"SWAPSPACE2"
PAGE_SIZES = (4096, 16 << 10, 64 << 10)
HEADER_OFFSET = 1024
HEADER_STRUCTS = (struct.Struct("<III"), struct.Struct(">III"))
VERSION = 1
LAST_SECTOR_OFFSET = SECTOR_BYTES - len(MAGIC)
SWAP_SIGN = Sign(MAGIC, LAST_SECTOR_OFFSET, SECTOR_BYTES)


def length_bytes(page: bytes) -> int:
    """Return the length of the swap space that begins with this page; 0 if it is none."""
    if len(page) not in PAGE_SIZES or not page.endswith(MAGIC):
        return 0
    for header in HEADER_STRUCTS:
        version, last_page, bad_pages = header.unpack_from(page, HEADER_OFFSET)
        if version == VERSION and last_page > 0 and bad_pages <= last_page:
            return (int(last_page) + 1) * len(page)
    return 0


def find(volumes: list[Volume], disk: PlacedDisk, orphans: Orphans) -> Iterator[GuestStructure]:
    """Yield the swap space of every volume that is as long as its header says.

    It is likely at most: nothing covers its content, and a swap file may be as long as the volume.
    """
    for volume in volumes:
        part = _on_disk(volume, disk) or _among(volume, orphans)
        if part is not None:
            yield Opaque("swap", volume.name, [part], [])


def _on_disk(volume: Volume, disk: PlacedDisk) -> Part | None:
    for page_bytes in PAGE_SIZES:
        page = disk.read(volume.offset, page_bytes)
        if page is not None and length_bytes(page):
            return Part(volume.offset, page_bytes, None, volume.certainty)
    return None


def _among(volume: Volume, orphans: Orphans) -> Part | None:
    found = []
    for sighting in sightings(orphans, SWAP_SIGN):
        for page_bytes in PAGE_SIZES:
            start = SECTOR_BYTES - page_bytes
            swap_bytes = length_bytes(sighting.read(orphans, start, page_bytes))
            begun = sighting.moved(start)
            fits = (volume.offset - begun.start) % orphans.cluster_bytes == 0
            if swap_bytes and fits and 0 <= volume.length - swap_bytes < page_bytes:
                certainty = min(volume.certainty, Certainty.LIKELY)
                found.append(Part(volume.offset, page_bytes, begun, certainty))
    return found[0] if len(found) == 1 else None
