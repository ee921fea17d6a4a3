"""Encrypted sectors: as the package's own modes say, sector by sector."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import pytest

from jqcow.errors import MissingPackageError, UnsupportedFeatureError
from jqcow.ondisk import block_ciphers
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.sectors import RUN_SECTORS, CipherForm, SectorCipher

KEY = bytes(range(64))
DATA = bytes(at * 7 % 256 for at in range((RUN_SECTORS + 3) * SECTOR_BYTES))


def ciphers() -> Any:
    return pytest.importorskip("cryptography.hazmat.primitives.ciphers")


def expected(form: CipherForm, key: bytes, data: bytes, first: int) -> bytes:
    """Encrypt by the modes of the package, a context for each sector."""
    package, found = ciphers(), []
    modes = package.modes
    for number in range(len(data) // SECTOR_BYTES):
        sector = first + number
        iv = (sector & 0xFFFF_FFFF if form.generator == "plain" else sector).to_bytes(16, "little")
        if form.generator == "essiv":
            essiv = package.algorithms.AES(hashlib.new(form.generator_hash or "", key).digest())
            iv = package.Cipher(essiv, package.modes.ECB()).encryptor().update(iv)
        mode = modes.ECB() if form.mode == "ecb" else getattr(modes, form.mode.upper())(iv)
        context = package.Cipher(package.algorithms.AES(key), mode).encryptor()
        found.append(context.update(data[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]))
    return b"".join(found)


@pytest.mark.parametrize("first", [0, 77, (1 << 32) - 1])
@pytest.mark.parametrize(
    ("mode", "key_bytes"),
    [
        ("xts-plain64", 64),
        ("xts-plain", 32),
        ("xts-essiv:sha256", 64),
        ("cbc-plain64", 16),
        ("cbc-plain", 24),
        ("cbc-essiv:sha256", 32),
        ("cbc-essiv:md5", 24),
        ("ctr-plain64", 32),
        ("ecb-plain64", 16),
    ],
)
def test_runs_are_encrypted_as_each_sector_by_itself(mode: str, key_bytes: int, first: int) -> None:
    ciphers()
    form = CipherForm.parse("aes", mode, key_bytes)
    cipher = SectorCipher(form, KEY[:key_bytes])
    encrypted = cipher.encrypt(DATA, first)
    if form.mode != "xts" or form.cipher_key_bytes != 24:
        assert encrypted == expected(form, KEY[:key_bytes], DATA, first)
    cipher.decrypt(memoryview(encrypted), first)
    assert encrypted == DATA


@pytest.mark.parametrize(
    ("cipher", "mode", "key_bytes"),
    [
        ("camellia", "xts-plain64", 64),
        ("cast5", "xts-plain64", 32),
        ("cast5", "cbc-essiv:sha256", 16),
        ("cast5", "cbc-plain64", 32),
        ("aes", "xts-plain64", 40),
        ("aes", "gcm-plain64", 32),
        ("aes", "cbc-essiv:sha1", 16),
        ("aes", "cbc-benbi", 16),
        ("aes", "", 16),
        ("aes\n", "xts-plain64", 64),
    ],
)
def test_others_are_refused_by_name(cipher: str, mode: str, key_bytes: int) -> None:
    with pytest.raises(UnsupportedFeatureError, match="encryption with"):
        CipherForm.parse(cipher, mode, key_bytes)


def test_the_key_shows_nowhere() -> None:
    ciphers()
    cipher = SectorCipher(CipherForm.parse("aes", "xts-plain64", 64), KEY)
    assert repr(cipher) == "<SectorCipher xts-plain64>"


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MissingPackageError, match=r"jqcow\[encryption\]"):
        SectorCipher(CipherForm.parse("aes", "xts-plain64", 64), KEY)


@pytest.mark.parametrize("libraries", [(), ("libc.so.6",)])
def test_without_the_library_the_error_says_what_to_install(
    libraries: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_ciphers, "LIBRARIES", libraries)
    block_ciphers._nettle.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match="nettle"):
            CipherForm.parse("serpent", "xts-plain64", 64).require_installed()
    finally:
        block_ciphers._nettle.cache_clear()


@pytest.mark.parametrize(
    ("name", "key", "plain", "encrypted"),
    [
        # Of the submissions to the contest for AES: an all-zero key and block. CAST-128: RFC 2144, B.1.
        ("serpent", bytes(16), bytes(16), "3620b17ae6a993d09618b8768266bae9"),
        ("twofish", bytes(16), bytes(16), "9f589f5cf6122c32b6bfec2f2ae8c35a"),
        (
            "cast5",
            bytes.fromhex("0123456712345678234567893456789a"),
            bytes.fromhex("0123456789abcdef"),
            "238b4fe5847e44b2",
        ),
    ],
    ids=["serpent", "twofish", "cast5"],
)
def test_other_ciphers_give_what_was_published(name: str, key: bytes, plain: bytes, encrypted: str) -> None:
    cipher = block_ciphers.new_cipher(name, key)
    assert cipher.blocks(plain, encrypting=True).hex() == encrypted
    assert cipher.blocks(bytes.fromhex(encrypted), encrypting=False) == plain
    assert key.hex() not in repr(cipher)
