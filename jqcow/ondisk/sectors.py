"""Sectors of 512 bytes, encrypted each by its place: AES in the modes, and with the IVs, that LUKS names.

`cryptography` does the AES. It takes microseconds to set up, a sector of 512 bytes less than one: so whole
runs of sectors go through one context. Of XTS that leaves the XOR with the tweaks, which is a kernel, and of
decrypting CBC the XOR with the blocks before. Encrypting CBC, and CTR, need a context for each sector.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from jqcow import _native
from jqcow.errors import MissingPackageError, UnsupportedFeatureError, printable
from jqcow.ondisk.layout import SECTOR_BYTES

BLOCK_BYTES = 16
RUN_SECTORS = 512
"""So many sectors go through a context at once: they stay in the processor's cache."""

MODES = ("xts", "cbc", "ctr", "ecb")
GENERATORS = ("plain64", "plain", "essiv")
KEY_BYTES = (16, 24, 32)
_ESSIV_HASHES = ("sha256", "md5")
"""Those that give a key of AES."""
_LOW_HALF = 0xFFFF_FFFF


def require_cryptography() -> ModuleType:
    """Return what ``cryptography`` has of symmetric ciphers.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        from cryptography.hazmat.primitives import ciphers
        from cryptography.hazmat.primitives.ciphers import algorithms, modes  # noqa: F401
    except ImportError:
        raise MissingPackageError(
            "encryption needs the package cryptography: pip install 'jqcow[encryption]'"
        ) from None
    return ciphers


@dataclass(frozen=True)
class CipherForm:
    """How sectors are encrypted: the mode, the IV generator and its hash, and the length of an AES key."""

    mode: str
    generator: str
    generator_hash: str | None
    aes_key_bytes: int

    @classmethod
    def parse(cls, cipher: str, mode: str, key_bytes: int) -> CipherForm:
        """Read what a LUKS header says.

        Raises:
            UnsupportedFeatureError: something else than AES, in the modes that jqcow has.
        """
        name, _, generator = mode.partition("-")
        generator, _, generator_hash = generator.partition(":")
        form = cls(name, generator, generator_hash or None, key_bytes // 2 if name == "xts" else key_bytes)
        known = cipher == "aes" and name in MODES and generator in GENERATORS
        if generator == "essiv":
            known = known and generator_hash in _ESSIV_HASHES
        if not known or form.key_bytes != key_bytes or form.aes_key_bytes not in KEY_BYTES:
            what = printable(f"{cipher}-{mode}")
            raise UnsupportedFeatureError(f"encryption with {what} and a key of {key_bytes} bytes")
        return form

    @property
    def key_bytes(self) -> int:
        """Length of the whole key: XTS has two of AES."""
        return self.aes_key_bytes * (2 if self.mode == "xts" else 1)

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
            MissingPackageError: cryptography is not installed.
        """
        # First: a traceback with the variables of a function shows this one, too.
        self._form = form
        ciphers = require_cryptography()
        self._new_cipher = ciphers.Cipher
        self._modes = ciphers.modes
        self._aes = ciphers.algorithms.AES(key[: form.aes_key_bytes])
        self._tweak_aes = ciphers.algorithms.AES(key[form.aes_key_bytes :]) if form.mode == "xts" else None
        self._essiv_aes = None
        if form.generator_hash is not None and form.generator == "essiv":
            self._essiv_aes = ciphers.algorithms.AES(hashlib.new(form.generator_hash, key).digest())

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
        mode = self._form.mode
        if mode == "xts":
            tweaks = self._ecb(self._tweak_aes, ivs, encrypting=True)
            _native.xts_whiten(part, tweaks, SECTOR_BYTES)
            part[:] = self._ecb(self._aes, part, encrypting=encrypting)
            _native.xts_whiten(part, tweaks, SECTOR_BYTES)
        elif mode == "ecb":
            part[:] = self._ecb(self._aes, part, encrypting=encrypting)
        elif mode == "cbc" and not encrypting:
            before = _blocks_before(part, ivs)
            decrypted = int.from_bytes(self._ecb(self._aes, part, encrypting=False), "little")
            part[:] = (decrypted ^ int.from_bytes(before, "little")).to_bytes(len(part), "little")
        else:
            new_mode = self._modes.CBC if mode == "cbc" else self._modes.CTR
            for sector, iv in _sectors(part, ivs):
                sector[:] = self._new_cipher(self._aes, new_mode(iv)).encryptor().update(sector)

    def _ecb(self, aes: Any, data: bytes | memoryview, *, encrypting: bool) -> bytes:
        cipher = self._new_cipher(aes, self._modes.ECB())
        context = cipher.encryptor() if encrypting else cipher.decryptor()
        return context.update(data)  # type: ignore[no-any-return]

    def _ivs(self, first_sector: int, count: int) -> bytes:
        """Return the IVs of sectors in a row, one behind the other."""
        numbers = array("Q", bytes(2 * 8 * count))
        if self._form.generator == "plain":
            numbers[::2] = array(
                "Q", (number & _LOW_HALF for number in range(first_sector, first_sector + count))
            )
        else:
            numbers[::2] = array("Q", range(first_sector, first_sector + count))
        if sys.byteorder == "big":
            numbers.byteswap()
        plain = numbers.tobytes()
        return plain if self._essiv_aes is None else self._ecb(self._essiv_aes, plain, encrypting=True)


def _sectors(part: memoryview, ivs: bytes) -> Iterator[tuple[memoryview, bytes]]:
    """Yield each sector with its IV."""
    for number in range(len(part) // SECTOR_BYTES):
        sector = part[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]
        yield sector, ivs[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]


def _blocks_before(part: memoryview, ivs: bytes) -> bytearray:
    """Return, for each block, the one before it in its sector; the IV for the first."""
    before = bytearray(len(part))
    before[BLOCK_BYTES:] = part[:-BLOCK_BYTES]
    words, of_ivs = memoryview(before).cast("Q"), memoryview(ivs).cast("Q")
    for half in range(2):
        words[half :: SECTOR_BYTES // 8] = of_ivs[half::2]
    return before
