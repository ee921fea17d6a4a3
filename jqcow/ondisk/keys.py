"""Passphrases and keys: what opens a LUKS key slot, and how one is made.

A passphrase becomes a key by PBKDF2; that decrypts the key material of a slot, which is the master key split
into many stripes, so that no single lost sector of it keeps the key (LUKS specification, "Anti-forensic
splitting"). The digest in the header tells a right master key from a wrong one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import NoReturn, overload

from jqcow.errors import UnsupportedFeatureError, WrongPassphrase, printable
from jqcow.ondisk import layout
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.luks import (
    ACTIVE,
    DIGEST_BYTES,
    HASH_BYTES,
    INACTIVE,
    ITERATIONS_MAX,
    SALT_BYTES,
    SLOT_COUNT,
    KeySlot,
    LuksHeader,
    pieces_of,
)
from jqcow.ondisk.sectors import CipherForm, SectorCipher

ITERATIONS_MIN = 1000
"""The fewest that the specification allows a writer."""

PASSPHRASE_BYTES_MAX = 1 << 20
HASHES = tuple(HASH_BYTES)
_TRIAL_ITERATIONS = 1 << 16

ReadMaterial = Callable[[int, int], bytes]
"""Reads (length, offset) in bytes from the LUKS header."""


class Secret:
    """A passphrase or a key that shows nowhere: not in a repr, a text, a pickle or an error."""

    __slots__ = ("_passphrase",)

    def __init__(self, passphrase: bytes | bytearray | Secret) -> None:
        """Take the bytes of a passphrase.

        Raises:
            TypeError: something else than bytes.
            ValueError: more than a mebibyte.
        """
        if isinstance(passphrase, Secret):
            self._passphrase: bytes = passphrase.reveal()
            return
        if not isinstance(passphrase, bytes | bytearray):
            # Not the value: it may be a passphrase of another type.
            raise TypeError(f"a passphrase is bytes, not {type(passphrase).__name__}")
        if len(passphrase) > PASSPHRASE_BYTES_MAX:
            raise ValueError(f"a passphrase has at most {PASSPHRASE_BYTES_MAX} bytes")
        self._passphrase = bytes(passphrase)

    def reveal(self) -> bytes:
        """Return the passphrase."""
        return self._passphrase

    def __repr__(self) -> str:
        return "<Secret>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


Passphrase = bytes | Secret | Callable[[str], "bytes | Secret"]
"""A passphrase, or what asks for that of the image at a path."""


@overload
def hidden(passphrase: Passphrase) -> Passphrase: ...


@overload
def hidden(passphrase: None) -> None: ...


def hidden(passphrase: Passphrase | None) -> Passphrase | None:
    """Return a passphrase that no traceback shows, even one that has the variables of each function.

    Raises:
        TypeError, ValueError: as `Secret`.
    """
    return passphrase if passphrase is None or callable(passphrase) else Secret(passphrase)


def new_secret(passphrase: bytes | Secret) -> Secret:
    """Return a passphrase that an image is to have.

    Raises:
        TypeError, ValueError: as `Secret`, or QEMU takes no such passphrase.
    """
    secret = Secret(passphrase)
    if not _is_text(secret):
        raise ValueError("a new passphrase is UTF-8 without NUL bytes: QEMU takes no other")
    return secret


def _is_text(secret: Secret) -> bool:
    # A function of its own: the error has the passphrase, and would be the context of what is raised.
    try:
        secret.reveal().decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in secret.reveal()


def secret_for(passphrase: Passphrase, image: str) -> Secret:
    """Return the passphrase for the image at a path."""
    return Secret(passphrase(image) if callable(passphrase) else passphrase)


def pbkdf2(hash_name: str, secret: Secret, salt: bytes, iterations: int, length: int) -> bytes:
    """Derive a key.

    Raises:
        UnsupportedFeatureError: Python has no such hash.
    """
    try:
        if hash_name not in HASHES:
            raise ValueError
        return hashlib.pbkdf2_hmac(hash_name, secret.reveal(), salt, iterations, length)
    except ValueError:
        raise UnsupportedFeatureError(f"the hash {printable(hash_name)} of LUKS") from None


def iterations_for(hash_name: str, milliseconds: int, key_bytes: int) -> int:
    """Return how many iterations take so long on this machine for such a key, within what jqcow reads."""
    # Of this thread: a busy machine must not make passphrases cheaper to guess.
    started = time.thread_time()
    pbkdf2(hash_name, Secret(b"passphrase"), bytes(SALT_BYTES), _TRIAL_ITERATIONS, key_bytes)
    elapsed = max(time.thread_time() - started, 1e-6)
    # All slots of an image that is made so can be read again.
    most = ITERATIONS_MAX // (2 * SLOT_COUNT * pieces_of(key_bytes, hash_name))
    return max(ITERATIONS_MIN, min(most, int(_TRIAL_ITERATIONS * milliseconds / 1000 / elapsed)))


# Anti-forensic splitting


def _diffuse(block: bytes, hash_name: str) -> bytes:
    step = hashlib.new(hash_name).digest_size
    parts = []
    for number, start in enumerate(range(0, len(block), step)):
        part = block[start : start + step]
        parts.append(hashlib.new(hash_name, number.to_bytes(4, "big") + part).digest()[: len(part)])
    return b"".join(parts)


def _xor(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


def _folded(stripes: bytes, key_bytes: int, hash_name: str) -> bytes:
    """Return what the stripes but the last come to."""
    folded = bytes(key_bytes)
    for start in range(0, len(stripes), key_bytes):
        folded = _diffuse(_xor(folded, stripes[start : start + key_bytes]), hash_name)
    return folded


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """Split a key into stripes of its length; all of them are needed to merge it."""
    others = secrets.token_bytes(len(key) * (stripes - 1))
    return others + _xor(_folded(others, len(key), hash_name), key)


def merge(material: bytes, key_bytes: int, hash_name: str) -> bytes:
    """Return the key that was split."""
    last = len(material) - key_bytes
    return _xor(_folded(material[:last], key_bytes, hash_name), material[last:])


# Slots


def form_of(header: LuksHeader) -> CipherForm:
    """Return how the sectors are encrypted.

    Raises:
        UnsupportedFeatureError: jqcow has no such cipher, or hash.
    """
    form = CipherForm.parse(header.cipher, header.mode, header.key_bytes)
    pbkdf2(header.hash, Secret(b""), bytes(SALT_BYTES), 1, 1)
    return form


def unlock(header: LuksHeader, read: ReadMaterial, secret: Secret, image: str = "") -> tuple[int, Secret]:
    """Return the slot that a passphrase opens, and the master key.

    Raises:
        WrongPassphrase: it opens none.
        UnsupportedFeatureError: jqcow has no such cipher, or hash.
        MissingPackageError: what does its cipher is not installed.
    """
    form = form_of(header)
    # Before what takes seconds.
    form.require_installed()
    for number in header.active_slots():
        key = _key_in(header, header.slots[number], form, read, secret)
        digest = pbkdf2(header.hash, key, header.digest_salt, header.digest_iterations, DIGEST_BYTES)
        if hmac.compare_digest(digest, header.digest):
            return number, key
    raise WrongPassphrase("the passphrase opens no key slot", image)


def _key_in(
    header: LuksHeader, slot: KeySlot, form: CipherForm, read: ReadMaterial, secret: Secret
) -> Secret:
    material = bytearray(read(header.material_bytes(slot), slot.material_offset))
    slot_key = Secret(pbkdf2(header.hash, secret, slot.salt, slot.iterations, header.key_bytes))
    SectorCipher(form, slot_key.reveal()).decrypt(memoryview(material), 0)
    return Secret(merge(bytes(material[: header.key_bytes * slot.stripes]), header.key_bytes, header.hash))


def lock(
    header: LuksHeader, number: int, key: Secret, secret: Secret, iterations: int
) -> tuple[KeySlot, bytes]:
    """Return a slot that a passphrase opens, in the place of one that is not active, and its key material."""
    old = header.slots[number]
    slot = KeySlot(ACTIVE, iterations, secrets.token_bytes(SALT_BYTES), old.material_sector, old.stripes)
    slot_key = Secret(pbkdf2(header.hash, secret, slot.salt, iterations, header.key_bytes))
    cipher = SectorCipher(form_of(header), slot_key.reveal())
    split_key = split(key.reveal(), slot.stripes, header.hash)
    whole = split_key.ljust(layout.round_up(len(split_key), SECTOR_BYTES), b"\0")
    return slot, bytes(cipher.encrypt(whole, 0))


def emptied(slot: KeySlot) -> KeySlot:
    """Return a slot that has no passphrase any more."""
    return KeySlot(INACTIVE, 0, bytes(SALT_BYTES), slot.material_sector, slot.stripes)
