"""The data of an encrypted image, as the guest reads it. Tables and compressed data are not encrypted."""

from __future__ import annotations

from collections.abc import Iterator

from jqcow import _native
from jqcow.ondisk.layout import SECTOR_BYTES, round_up
from jqcow.ondisk.sectors import SectorCipher
from jqcow.salvage.source import Source


class DecryptedSource(Source):
    """A source that is decrypted, by sectors numbered from host offset 0.

    Attributes:
        plain: the source as it is stored.
    """

    def __init__(self, plain: Source, cipher: SectorCipher, *, keeps_zeros: bool = False) -> None:
        """Decrypt ``plain``; with ``keeps_zeros`` sectors of zeros stay zeros: nobody has written them."""
        self.plain, self._cipher, self._keeps_zeros = plain, cipher, keeps_zeros
        self._size = plain.size()
        self.bad = plain.bad

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes from ``offset``; what is bad reads as whatever zeros decrypt to."""
        start, end = offset - offset % SECTOR_BYTES, round_up(offset + length, SECTOR_BYTES)
        stored = self.plain.pread(end - start, start)
        found = bytearray(stored)
        self._cipher.decrypt(memoryview(found), start // SECTOR_BYTES)
        if self._keeps_zeros:
            for at in range(0, len(stored), SECTOR_BYTES):
                if _native.is_zero(memoryview(stored)[at : at + SECTOR_BYTES]):
                    found[at : at + SECTOR_BYTES] = bytes(SECTOR_BYTES)
        return bytes(found[offset - start : offset - start + length])

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield (offset, length) of what may hold data in a range, by offset."""
        return self.plain.data_extents(offset, length)
