"""What a sector may be a part of, as the twin of `sector_kinds` tells it."""

from __future__ import annotations

import struct

SECTOR_BYTES = 512
SECTOR_OTHER = 0
SECTOR_ZERO = 1
SECTOR_SNAPSHOT = 2
SECTOR_COUNTS = 0x10
SECTOR_POINTERS = 0x40
SECTOR_PAIRS = 0x80
SECTOR_PACKED = 0xC0
SECTOR_ALIGNMENT = 0x3F
"""What a sector may be a part of: see `twins.sector_kinds`."""

_LOW_HALF = 0xFFFF_FFFF
_ENTRY_COMPRESSED = 1 << 62
_ENTRY_ZERO = 1
_ENTRY_OFFSET = 0x00FF_FFFF_FFFF_FE00
_POINTER_RESERVED = 0x7F00_0000_0000_01FE
_PACKED_OFFSET = (1 << 49) - 1
_NO_ALIGNMENT = 63
_COUNT_MASKS = (
    (6, 0xFFFF_FFFF_FFFF_FF00),
    (5, 0xFFFF_FF00_FFFF_FF00),
    (4, 0xFF00_FF00_FF00_FF00),
    (3, 0xF0F0_F0F0_F0F0_F0F0),
)
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_SECTOR = struct.Struct(">64Q")


def sector_kind(sector: memoryview, host_bytes: int) -> int:
    """Return what one sector may be a part of."""
    words = _SECTOR.unpack(sector)
    if not any(words):
        return SECTOR_ZERO
    packed = [word for word in words if _is_packed(word, host_bytes)]
    pointers = [word for word in words if _is_pointer(word, host_bytes)]
    odd_offsets = [word for word in words[1::2] if _is_pointer(word, host_bytes) and word & _ENTRY_OFFSET]
    are_pointers = len(packed) + len(pointers) == len(words)
    if all(_is_pair(*pair, host_bytes) for pair in zip(words[::2], words[1::2], strict=True)) and (
        not are_pointers or (any(words[1::2]) and not odd_offsets)
    ):
        return SECTOR_PAIRS | _alignment([word for word in words[::2] if not word & _ENTRY_COMPRESSED])
    if are_pointers:
        return (SECTOR_PACKED if packed else SECTOR_POINTERS) | _alignment(pointers)
    for order, mask in _COUNT_MASKS:
        if not any(word & mask for word in words):
            return SECTOR_COUNTS + order
    return SECTOR_SNAPSHOT if _looks_like_snapshot(sector, host_bytes) else SECTOR_OTHER


def _is_pointer(word: int, host_bytes: int) -> bool:
    offset = word & _ENTRY_OFFSET
    return not word & _POINTER_RESERVED and offset < host_bytes and bool(offset or not word >> 63)


def _is_packed(word: int, host_bytes: int) -> bool:
    return word >> 62 == 1 and SECTOR_BYTES <= word & _PACKED_OFFSET < host_bytes


def _is_pair(word: int, bitmap: int, host_bytes: int) -> bool:
    if _is_packed(word, host_bytes):
        return not bitmap
    if not _is_pointer(word, host_bytes) or word & _ENTRY_ZERO or bitmap & bitmap >> 32:
        return False
    return bool(word & _ENTRY_OFFSET) or not bitmap & _LOW_HALF


def _alignment(pointers: list[int]) -> int:
    merged = 0
    for word in pointers:
        merged |= word & _ENTRY_OFFSET
    return (merged & -merged).bit_length() - 1 if merged else _NO_ALIGNMENT


def _looks_like_snapshot(sector: memoryview, host_bytes: int) -> bool:
    table, l1_size, id_bytes, name_bytes, _, nanoseconds, _, _, extra_bytes = _SNAPSHOT.unpack_from(sector)
    if not 0 < table < host_bytes or table % SECTOR_BYTES or not 0 < l1_size <= 1 << 22:
        return False
    if not 0 < id_bytes < 256 or name_bytes >= 1024 or nanoseconds >= 1_000_000_000:
        return False
    return bool(extra_bytes <= 1024 and extra_bytes % 8 == 0)
