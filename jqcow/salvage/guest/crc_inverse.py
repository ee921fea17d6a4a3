"""CRC-32C run backwards and forwards without the bytes: what the register was before, or will be after.

The register after some bytes is the register after as many zero bytes, exclusive-or what these bytes alone
make of an empty one. The first part is linear and has an inverse, so that a stored checksum tells the seed
that it was begun with, and the seed tells the number that went into it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from jqcow import _native

_ONES = 0xFFFF_FFFF


def alone(data: bytes | memoryview) -> int:
    """Return what the register holds after the bytes when it was empty before them."""
    return _native.crc32c(data, _ONES) ^ _ONES


def _map(columns: list[int]) -> Callable[[int], int]:
    """Return the linear map of 32 bits whose columns are given, by tables of bytes."""
    tables = []
    for byte in range(4):
        table = [0]
        for column in columns[8 * byte : 8 * byte + 8]:
            table += [value ^ column for value in table]
        tables.append(table)
    low, second, third, high = tables

    def apply(value: int) -> int:
        return (
            low[value & 255] ^ second[value >> 8 & 255] ^ third[value >> 16 & 255] ^ high[value >> 24 & 255]
        )

    return apply


@lru_cache(maxsize=64)
def _power(length: int, backwards: bool) -> tuple[int, ...]:
    """Return the columns of the map that so many zero bytes make, or of its inverse."""
    if length == 1:
        of_byte = [alone(bytes([byte])) for byte in range(256)]
        if not backwards:
            return tuple((1 << bit) >> 8 ^ of_byte[(1 << bit) & 255] for bit in range(32))
        by_top = {value >> 24: byte for byte, value in enumerate(of_byte)}
        columns = []
        for bit in range(32):
            byte = by_top[(1 << bit) >> 24]
            columns.append((((1 << bit) ^ of_byte[byte]) << 8 | byte) & _ONES)
        return tuple(columns)
    half = _power(length // 2, backwards)
    twice = _map(list(half))
    columns = [twice(column) for column in half]
    if length % 2:
        once = _map(list(_power(1, backwards)))
        columns = [once(column) for column in columns]
    return tuple(columns)


@lru_cache(maxsize=16)
def forward(length: int) -> Callable[[int], int]:
    """Return the map from the register before so many zero bytes, at least one, to that after them."""
    return _map(list(_power(length, False)))


@lru_cache(maxsize=16)
def backward(length: int) -> Callable[[int], int]:
    """Return the map from the register after so many zero bytes, at least one, to that before them."""
    return _map(list(_power(length, True)))
