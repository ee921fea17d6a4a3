"""The directory of persistent bitmaps (qcow2 specification, "Bitmaps"), as far as it says which there are.

Bitmaps header extension::

    Byte  0 -  3:   number of bitmaps
          4 -  7:   reserved (0)
          8 - 15:   size of the bitmap directory in bytes
         16 - 23:   host offset of the bitmap directory

Bitmap directory entry, padded to a multiple of 8 bytes::

    Byte  0 -  7:   host offset of the bitmap table
          8 - 11:   entries in the bitmap table
         12 - 15:   flags: bit 0 in use, bit 1 auto, bit 2 extra data may be ignored
              16:   type, 1: dirty tracking
              17:   granularity, as a power of two in bytes
         18 - 19:   size of the name in bytes
         20 - 23:   size of the extra data in bytes
    variable:       extra data, then the name
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from jqcow.errors import CorruptionError
from jqcow.ondisk import layout
from jqcow.ondisk.header import AUTOCLEAR_BITMAPS, EXTENSION_BITMAPS, HeaderArea

EXTENSION_STRUCT = struct.Struct(">IIQQ")
ENTRY_STRUCT = struct.Struct(">QIIBBHI")

MAX_BITMAPS = 65535
MAX_DIRECTORY_BYTES = 64 << 20
"""QEMU's limits. They bound memory as well."""

_MAX_GRANULARITY_BITS = 63
_FLAGS = ((1, "in-use"), (2, "auto"))


@dataclass(frozen=True)
class Bitmap:
    """A persistent bitmap. ``granularity`` is what one bit stands for, in bytes.

    ``flags`` are ``in-use`` (whoever had it open did not close it, so it may be wrong) and ``auto``.
    """

    flags: tuple[str, ...]
    name: str
    granularity: int


def read_bitmaps(read: Callable[[int, int], bytes], area: HeaderArea) -> tuple[Bitmap, ...]:
    """Return the bitmaps of an image that are marked valid.

    Args:
        read: reads (length, host offset) in bytes.
        area: the header of the image.

    Raises:
        CorruptionError: the directory is not one that an image can have.
    """
    extension = area.find(EXTENSION_BITMAPS)
    if extension is None or not area.header.autoclear_features & AUTOCLEAR_BITMAPS:
        return ()
    if len(extension.data) < EXTENSION_STRUCT.size:
        raise CorruptionError("bitmaps extension", 0, f"it has {len(extension.data)} bytes")
    count, _, length, offset = EXTENSION_STRUCT.unpack_from(extension.data)
    if offset % (1 << area.header.cluster_bits) or not 0 < offset < layout.MAX_HOST_OFFSET:
        raise CorruptionError("bitmap directory", offset, "not a cluster-aligned host offset")
    # Before it is read: the number says how much an entry can take at least.
    if not count * ENTRY_STRUCT.size <= length <= MAX_DIRECTORY_BYTES or not 0 < count <= MAX_BITMAPS:
        raise CorruptionError("bitmap directory", offset, f"{count} bitmaps in {length} bytes")
    return _parse(read(length, offset), count, offset)


def _parse(directory: bytes, count: int, offset: int) -> tuple[Bitmap, ...]:
    bitmaps: list[Bitmap] = []
    position = 0
    for _ in range(count):
        start = position
        name_start = start + ENTRY_STRUCT.size
        if name_start > len(directory):
            raise CorruptionError("bitmap directory", offset + start, "it ends within an entry")
        _, _, flags, _, bits, name_bytes, extra_bytes = ENTRY_STRUCT.unpack_from(directory, start)
        name_start += extra_bytes
        position = layout.round_up(name_start + name_bytes, 8)
        if name_start + name_bytes > len(directory) or bits > _MAX_GRANULARITY_BITS:
            raise CorruptionError("bitmap directory", offset + start, "an entry that no bitmap has")
        name = directory[name_start : name_start + name_bytes].decode("utf-8", "surrogateescape")
        bitmaps.append(Bitmap(tuple(word for bit, word in _FLAGS if flags & bit), name, 1 << bits))
    return tuple(bitmaps)
