"""Block ciphers for the sectors of LUKS: AES by `cryptography`, the others by the host's library nettle.

Both take microseconds to set up, and less for a sector of 512 bytes: so whole runs go through one call.
"""

from __future__ import annotations

import ctypes
from functools import cache
from types import ModuleType
from typing import Any, Protocol

from jqcow.errors import MissingPackageError

CIPHERS = {
    "aes": {16: "aes128", 24: "aes192", 32: "aes256"},
    "serpent": {16: "serpent128", 24: "serpent192", 32: "serpent256"},
    "twofish": {16: "twofish128", 24: "twofish192", 32: "twofish256"},
    "cast5": {16: "cast128"},
}
"""nettle's names, by LUKS's and by the length of a key in bytes."""
SHORT_BLOCK_BYTES = {"cast5": 8}
"""Of ciphers whose blocks are not of 16 bytes."""
BLOCK_BYTES = 16

LIBRARIES = ("libnettle.so.8", "libnettle.so", "libnettle.dylib")
_SCHEDULE_BYTES_MAX = 1 << 16


class BlockCipher(Protocol):
    """A cipher with its key. Threads may share it. Its key shows nowhere."""

    def blocks(self, data: bytes | memoryview, *, encrypting: bool) -> bytes:
        """Return whole blocks encrypted, or decrypted, each by itself."""
        ...

    def sector(self, mode: str, iv: bytes, data: memoryview) -> bytes:
        """Return a sector encrypted in the mode ``cbc``, or with ``ctr`` in either direction."""
        ...


def new_cipher(name: str, key: bytes) -> BlockCipher:
    """Return a cipher of LUKS by its name, with a key of a length that `CIPHERS` has.

    Raises:
        MissingPackageError: what does it is not installed.
    """
    return Aes(key) if name == "aes" else OfNettle(CIPHERS[name][len(key)], key)


def require_installed(name: str, key_bytes: int) -> None:
    """Before what takes time: raise what `new_cipher` would."""
    new_cipher(name, bytes(key_bytes))


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


class Aes:
    """AES, by `cryptography`."""

    def __init__(self, key: bytes) -> None:
        """Take a key; errors as `require_cryptography`."""
        ciphers = require_cryptography()
        self._new_cipher = ciphers.Cipher
        self._modes = ciphers.modes
        self._aes = ciphers.algorithms.AES(key)

    def __repr__(self) -> str:
        return "<Aes>"

    def blocks(self, data: bytes | memoryview, *, encrypting: bool) -> bytes:
        """As `BlockCipher`."""
        cipher = self._new_cipher(self._aes, self._modes.ECB())
        context = cipher.encryptor() if encrypting else cipher.decryptor()
        return context.update(data)  # type: ignore[no-any-return]

    def sector(self, mode: str, iv: bytes, data: memoryview) -> bytes:
        """As `BlockCipher`."""
        new_mode = self._modes.CBC if mode == "cbc" else self._modes.CTR
        return self._new_cipher(self._aes, new_mode(iv)).encryptor().update(data)  # type: ignore[no-any-return]


class _NettleCipher(ctypes.Structure):
    """What nettle tells of a cipher (nettle manual, "nettle_cipher abstraction")."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("context_size", ctypes.c_uint),
        ("block_size", ctypes.c_uint),
        ("key_size", ctypes.c_uint),
        ("set_encrypt_key", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)),
        ("set_decrypt_key", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p)),
        ("encrypt", ctypes.c_void_p),
        ("decrypt", ctypes.c_void_p),
    )


@cache
def _nettle() -> Any:
    """Return the library, or None where the host has none."""
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
            library.nettle_get_ciphers.restype = ctypes.POINTER(ctypes.POINTER(_NettleCipher))
        except (OSError, AttributeError):
            continue
        return library
    return None


def _described(name: str) -> _NettleCipher | None:
    library = _nettle()
    found = library.nettle_get_ciphers() if library is not None else None
    number = 0
    while found and found[number]:
        if found[number].contents.name == name.encode():
            return found[number].contents  # type: ignore[no-any-return]
        number += 1
    return None


_ON_BLOCKS = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p)


class OfNettle:
    """A cipher of the library nettle, which QEMU uses too."""

    def __init__(self, name: str, key: bytes) -> None:
        """Take the name that nettle has, and a key of the length that belongs to it.

        Raises:
            MissingPackageError: the host has no such library, or it has no such cipher.
        """
        described = _described(name)
        if described is None or not 0 < described.context_size <= _SCHEDULE_BYTES_MAX:
            raise MissingPackageError(f"encryption with {name} needs the library nettle (Debian: libnettle8)")
        self._library = _nettle()
        self._block_bytes = described.block_size
        self._encrypting = ctypes.create_string_buffer(described.context_size)
        self._decrypting = ctypes.create_string_buffer(described.context_size)
        described.set_encrypt_key(self._encrypting, key)
        described.set_decrypt_key(self._decrypting, key)
        self._encrypt_function = ctypes.c_void_p(described.encrypt)
        self._encrypt, self._decrypt = _ON_BLOCKS(described.encrypt), _ON_BLOCKS(described.decrypt)

    def __repr__(self) -> str:
        return "<OfNettle>"

    def blocks(self, data: bytes | memoryview, *, encrypting: bool) -> bytes:
        """As `BlockCipher`."""
        source, target = bytes(data), ctypes.create_string_buffer(len(data))
        if encrypting:
            self._encrypt(self._encrypting, len(source), target, source)
        else:
            self._decrypt(self._decrypting, len(source), target, source)
        return target.raw

    def sector(self, mode: str, iv: bytes, data: memoryview) -> bytes:
        """As `BlockCipher`."""
        source, target = bytes(data), ctypes.create_string_buffer(len(data))
        function = self._library.nettle_cbc_encrypt if mode == "cbc" else self._library.nettle_ctr_crypt
        function(
            self._encrypting,
            self._encrypt_function,
            ctypes.c_size_t(self._block_bytes),
            ctypes.create_string_buffer(iv, len(iv)),
            ctypes.c_size_t(len(source)),
            target,
            source,
        )
        return target.raw
