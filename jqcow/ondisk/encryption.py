"""What the encryption of a new image is to be, and the LUKS header that makes it so."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, field

from jqcow.ondisk import block_ciphers, keys
from jqcow.ondisk.header import CRYPT_LUKS, EXTENSION_ENCRYPTION, Extension
from jqcow.ondisk.keys import Secret
from jqcow.ondisk.layout import SECTOR_BYTES, HostOffset
from jqcow.ondisk.luks import (
    DIGEST_BYTES,
    INACTIVE,
    SALT_BYTES,
    SLOT_COUNT,
    STRIPES,
    KeySlot,
    LuksHeader,
    Pointer,
    slot_places,
)
from jqcow.ondisk.sectors import CipherForm, SectorCipher

CIPHERS = {
    f"{name}-{8 * key_bytes}": (name, key_bytes)
    for name, found in block_ciphers.CIPHERS.items()
    for key_bytes in found
}
"""QEMU's names: LUKS's name of the cipher, and the length of its key in bytes."""
_DIGEST_SHARE = 8
"""A wrong key is told from a right one in this part of the time that a passphrase takes."""


@dataclass(frozen=True)
class Encryption:
    """How a new image is to be encrypted, with LUKS; names and defaults are qemu-img's.

    Attributes:
        passphrase: of the first key slot; UTF-8, as QEMU wants it.
        cipher: ``aes-``, ``serpent-`` or ``twofish-``, with 128, 192 or 256 bits; ``cast5-128``.
        mode: ``xts``, ``cbc``, ``ctr`` or ``ecb``.
        ivgen: what the IV of a sector is made from: ``plain64``, ``plain`` or ``essiv``.
        ivgen_hash: ``sha256`` or ``md5``, with ``essiv``.
        hash: of PBKDF2.
        iter_time: in milliseconds, what a try of a passphrase is to cost on this machine.
    """

    passphrase: Secret | bytes = field(repr=False)
    cipher: str = "aes-256"
    mode: str = "xts"
    ivgen: str = "plain64"
    ivgen_hash: str | None = None
    hash: str = "sha256"
    iter_time: int = 2000
    _stripes: int = field(default=STRIPES, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "passphrase", keys.new_secret(self.passphrase))
        if self.cipher not in CIPHERS:
            raise ValueError(f"cipher is one of {', '.join(CIPHERS)}, not {self.cipher!r}")
        if self.ivgen == "essiv" and self.ivgen_hash is None:
            object.__setattr__(self, "ivgen_hash", "sha256")
        if self.hash not in keys.HASHES:
            raise ValueError(f"hash is one of {', '.join(keys.HASHES)}, not {self.hash!r}")
        if not isinstance(self.iter_time, int) or self.iter_time < 1:
            raise ValueError(f"iter_time is in milliseconds, at least 1, not {self.iter_time!r}")
        if self.ivgen != "essiv" and self.ivgen_hash is not None:
            raise ValueError("ivgen_hash is of ivgen='essiv' alone")
        if self.cipher.endswith("-192") and self.form().mode != "xts":
            raise ValueError(f"QEMU cannot open an image with {self.cipher} in another mode than xts")
        self.form()

    @property
    def header_bytes(self) -> int:
        """Length of the LUKS header."""
        return slot_places(self.form().key_bytes, self._stripes)[1]

    def form(self) -> CipherForm:
        """Return how the sectors are encrypted.

        Raises:
            ValueError: a mode or generator that there is not (as `UnsupportedFeatureError`).
        """
        mode = f"{self.mode}-{self.ivgen}" + (f":{self.ivgen_hash}" if self.ivgen_hash else "")
        name, key_bytes = CIPHERS[self.cipher]
        return CipherForm.parse(name, mode, key_bytes * (2 if self.mode == "xts" else 1))


@dataclass(frozen=True)
class NewLuks:
    """A LUKS header for a new image: ``parts`` as (offset in it, bytes), all else is zeros.

    ``cipher`` is that of the image's data.
    """

    parts: tuple[tuple[int, bytes], ...]
    length: int
    cipher: SectorCipher
    crypt_method: int = CRYPT_LUKS

    def extension(self, offset: int) -> Extension:
        """Return the header extension that says that it lies at this host offset."""
        return Extension(EXTENSION_ENCRYPTION, Pointer(HostOffset(offset), self.length).pack())


def new_luks(encryption: Encryption) -> NewLuks:
    """Make a new master key, and its header with one passphrase.

    Raises:
        MissingPackageError: what does its cipher is not installed.
        UnsupportedFeatureError: Python has no such hash.
    """
    form, stripes = encryption.form(), encryption._stripes
    form.require_installed()
    key = Secret(secrets.token_bytes(form.key_bytes))
    starts, length = slot_places(form.key_bytes, stripes)
    iterations = keys.iterations_for(encryption.hash, encryption.iter_time, form.key_bytes)
    digest_iterations = max(keys.ITERATIONS_MIN, iterations // _DIGEST_SHARE)
    salt = secrets.token_bytes(SALT_BYTES)
    header = LuksHeader(
        cipher=form.cipher,
        mode=form.luks_mode,
        hash=encryption.hash,
        payload_sector=length // SECTOR_BYTES,
        key_bytes=form.key_bytes,
        digest=keys.pbkdf2(encryption.hash, key, salt, digest_iterations, DIGEST_BYTES),
        digest_salt=salt,
        digest_iterations=digest_iterations,
        uuid=str(uuid.uuid4()),
        slots=tuple(KeySlot(INACTIVE, 0, bytes(SALT_BYTES), start, stripes) for start in starts),
    )
    if len(header.slots) != SLOT_COUNT:
        raise RuntimeError("a LUKS header has eight slots")
    slot, material = keys.lock(header, 0, key, Secret(encryption.passphrase), iterations)
    parts = ((0, header.with_slot(0, slot).pack()), (slot.material_offset, material))
    return NewLuks(parts, length, SectorCipher(form, key.reveal()))
