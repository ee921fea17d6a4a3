"""Sectors of 512 bytes, encrypted each by its place: in the modes, and with the IVs, that LUKS names.

Whole runs of sectors go through the block cipher at once. Of XTS that leaves the XOR with the tweaks, a
kernel, and of decrypting CBC the XOR with the blocks before. CBC encrypts, and CTR goes, sector by sector.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from jqcow import _native
from jqcow.errors import UnsupportedFeatureError, printable
from jqcow.ondisk.block_ciphers import (
    BLOCK_BYTES,
    CIPHERS,
    SHORT_BLOCK_BYTES,
    BlockCipher,
    new_cipher,
    require_installed,
)
from jqcow.ondisk.layout import SECTOR_BYTES

RUN_SECTORS = 512
"""So many sectors go through a context at once: they stay in the processor's cache."""

MODES = ("xts", "cbc", "ctr", "ecb")
GENERATORS = ("plain64", "plain", "essiv")
_ESSIV_HASHES = ("sha256", "md5")
"""Those that give a key of the ciphers whose blocks are of 16 bytes."""
_LOW_HALF = 0xFFFF_FFFF


@dataclass(frozen=True)
class CipherForm:
    """How sectors are encrypted: the cipher, the mode, the IV generator and its hash.

    ``cipher_key_bytes`` is the length of one key of the cipher.
    """

    cipher: str
    mode: str
    generator: str
    generator_hash: str | None
    cipher_key_bytes: int

    @classmethod
    def parse(cls, cipher: str, mode: str, key_bytes: int) -> CipherForm:
        """Read what a LUKS header says.

        Raises:
            UnsupportedFeatureError: a cipher or mode that jqcow has not.
        """
        name, _, generator = mode.partition("-")
        generator, _, generator_hash = generator.partition(":")
        one_key_bytes = key_bytes // 2 if name == "xts" else key_bytes
        form = cls(cipher, name, generator, generator_hash or None, one_key_bytes)
        known = one_key_bytes in CIPHERS.get(cipher, ()) and name in MODES and generator in GENERATORS
        if generator == "essiv":
            known = known and generator_hash in _ESSIV_HASHES
        if name == "xts" or generator == "essiv":
            # XTS is defined for blocks of 16 bytes; QEMU has no ESSIV with others.
            known = known and cipher not in SHORT_BLOCK_BYTES
        if not known or form.key_bytes != key_bytes:
            what = printable(f"{cipher}-{mode}")
            raise UnsupportedFeatureError(f"encryption with {what} and a key of {key_bytes} bytes")
        return form

    @property
    def key_bytes(self) -> int:
        """Length of the whole key: XTS has two of the cipher."""
        return self.cipher_key_bytes * (2 if self.mode == "xts" else 1)

    @property
    def block_bytes(self) -> int:
        """Length of a block of the cipher, and of an IV."""
        return SHORT_BLOCK_BYTES.get(self.cipher, BLOCK_BYTES)

    def require_installed(self) -> None:
        """Raise `MissingPackageError` if what does the cipher is not installed."""
        require_installed(self.cipher, self.cipher_key_bytes)

    @property
    def luks_mode(self) -> str:
        """What a LUKS header has as the mode."""
        return f"{self.mode}-{self.generator}" + (f":{self.generator_hash}" if self.generator_hash else "")


class SectorCipher:
    """Encrypts and decrypts whole sectors. Sector numbers count from where the caller counts.

    Threads may share it: every call has contexts of its own. Its key shows nowhere.
    """

    def __init__(self, form: CipherForm, key: bytes) -> None:
        """Take a key of ``form.key_bytes``.

        Raises:
            MissingPackageError: what does the cipher is not installed.
        """
        # First: a traceback with the variables of a function shows this one, too.
        self._form = form
        self._cipher = new_cipher(form.cipher, key[: form.cipher_key_bytes])
        self._tweaks: BlockCipher | None = None
        if form.mode == "xts":
            self._tweaks = new_cipher(form.cipher, key[form.cipher_key_bytes :])
        self._essiv: BlockCipher | None = None
        if form.generator_hash is not None and form.generator == "essiv":
            self._essiv = new_cipher(form.cipher, hashlib.new(form.generator_hash, key).digest())

    def __repr__(self) -> str:
        return f"<SectorCipher {self._form.luks_mode}>"

    def encrypt(self, data: bytes | bytearray | memoryview, first_sector: int) -> bytearray:
        """Return whole sectors encrypted; the first has the number ``first_sector``."""
        encrypted = bytearray(data)
        self._run(memoryview(encrypted), first_sector, encrypting=True)
        return encrypted

    def decrypt(self, buffer: memoryview, first_sector: int) -> None:
        """Decrypt whole sectors where they are."""
        self._run(buffer, first_sector, encrypting=False)

    def _run(self, whole: memoryview, first_sector: int, *, encrypting: bool) -> None:
        step = RUN_SECTORS * SECTOR_BYTES
        with whole.cast("B") as view:
            for position in range(0, len(view), step):
                part = view[position : position + step]
                numbers = self._ivs(first_sector + position // SECTOR_BYTES, len(part) // SECTOR_BYTES)
                self._run_part(part, numbers, encrypting=encrypting)

    def _run_part(self, part: memoryview, ivs: bytes, *, encrypting: bool) -> None:
        mode, cipher = self._form.mode, self._cipher
        if self._tweaks is not None:
            tweaks = self._tweaks.blocks(ivs, encrypting=True)
            _native.xts_whiten(part, tweaks, SECTOR_BYTES)
            part[:] = cipher.blocks(part, encrypting=encrypting)
            _native.xts_whiten(part, tweaks, SECTOR_BYTES)
        elif mode == "ecb":
            part[:] = cipher.blocks(part, encrypting=encrypting)
        elif mode == "cbc" and not encrypting:
            before = _blocks_before(part, ivs, self._form.block_bytes)
            decrypted = int.from_bytes(cipher.blocks(part, encrypting=False), "little")
            part[:] = (decrypted ^ int.from_bytes(before, "little")).to_bytes(len(part), "little")
        else:
            for sector, iv in _sectors(part, ivs, self._form.block_bytes):
                sector[:] = cipher.sector(mode, iv, sector)

    def _ivs(self, first_sector: int, count: int) -> bytes:
        """Return the IVs of sectors in a row, one behind the other."""
        words = self._form.block_bytes // 8
        numbers = array("Q", bytes(8 * words * count))
        if self._form.generator == "plain":
            numbers[::words] = array(
                "Q", (number & _LOW_HALF for number in range(first_sector, first_sector + count))
            )
        else:
            numbers[::words] = array("Q", range(first_sector, first_sector + count))
        if sys.byteorder == "big":
            numbers.byteswap()
        plain = numbers.tobytes()
        return plain if self._essiv is None else self._essiv.blocks(plain, encrypting=True)


def _sectors(part: memoryview, ivs: bytes, block_bytes: int) -> Iterator[tuple[memoryview, bytes]]:
    """Yield each sector with its IV."""
    for number in range(len(part) // SECTOR_BYTES):
        sector = part[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
        yield sector, ivs[number * block_bytes : (number + 1) * block_bytes]


def _blocks_before(part: memoryview, ivs: bytes, block_bytes: int) -> bytearray:
    """Return, for each block, the one before it in its sector; the IV for the first."""
    before = bytearray(len(part))
    before[block_bytes:] = part[:-block_bytes]
    words, of_ivs, count = memoryview(before).cast("Q"), memoryview(ivs).cast("Q"), block_bytes // 8
    for at in range(count):
        words[at :: SECTOR_BYTES // 8] = of_ivs[at::count]
    return before
