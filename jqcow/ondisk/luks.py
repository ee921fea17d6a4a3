"""LUKS version 1 as qcow2 embeds it: where its header lies, what it says, and how much of it is believed.

The header is in clusters of the image (qcow2 specification, "Full disk encryption header pointer")::

    Byte   0 -   7:   host offset of the LUKS header, cluster-aligned
           8 -  15:   length of it in bytes, with all key material

The LUKS header ("LUKS On-Disk Format Specification", version 1.2.3)::

    Byte   0 -   5:   magic, "LUKS\\xba\\xbe"
           6 -   7:   version, 1
           8 -  39:   cipher, padded with zeros
          40 -  71:   mode and IV generator, padded with zeros
          72 - 103:   hash, padded with zeros
         104 - 107:   payload_offset in sectors of 512 bytes
         108 - 111:   key_bytes of the master key
         112 - 131:   digest of the master key
         132 - 163:   digest_salt
         164 - 167:   digest_iterations
         168 - 207:   uuid, padded with zeros
         208 - 591:   8 key slots

A key slot::

    Byte   0 -   3:   state, 0x00ac71f3: active, 0x0000dead: not active
           4 -   7:   iterations
           8 -  39:   salt
          40 -  43:   material_sector: where the key material begins, in sectors from the header's start
          44 -  47:   stripes: the key material is so many times as long as the key

Iterations, stripes and lengths are numbers of whoever made the image: what they cost has bounds.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import pairwise

from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk.header import CRYPT_LUKS, EXTENSION_ENCRYPTION, HeaderArea
from jqcow.ondisk.layout import SECTOR_BYTES, Geometry, HostOffset

POINTER_STRUCT = struct.Struct(">QQ")
POINTER_BYTES = 16
MAGIC = b"LUKS\xba\xbe"
FIXED_STRUCT = struct.Struct(">6sH32s32s32sII20s32sI40s")
FIXED_BYTES = 208
SLOT_STRUCT = struct.Struct(">II32sII")
SLOT_BYTES = 48
SLOT_COUNT = 8
HEADER_BYTES = FIXED_BYTES + SLOT_COUNT * SLOT_BYTES
if (POINTER_STRUCT.size, FIXED_STRUCT.size, SLOT_STRUCT.size) != (POINTER_BYTES, FIXED_BYTES, SLOT_BYTES):
    raise RuntimeError("the LUKS layout does not have the size that its specification gives")

ACTIVE, INACTIVE = 0x00AC71F3, 0x0000DEAD
DIGEST_BYTES = 20
SALT_BYTES = 32
STRIPES = 4000
"""What every program writes (specification, LUKS_STRIPES), and the most that is read."""

HEADER_BYTES_MAX = 16 << 20
ITERATIONS_MAX = 1 << 27
"""What a passphrase that is wrong costs at most, see `LuksHeader.wrong_passphrase_iterations`: about 40 s."""

HASH_BYTES = {
    "sha256": 32,
    "sha512": 64,
    "sha384": 48,
    "sha224": 28,
    "sha1": 20,
    "ripemd160": 20,
    "md5": 16,
}
"""The hashes of PBKDF2, with the length of what they make: a longer key takes all iterations once more."""

MATERIAL_ALIGN_BYTES = 4096
KEY_BYTES_MAX = 64


@dataclass(frozen=True)
class Pointer:
    """Where the LUKS header is: host offset and length in bytes."""

    offset: HostOffset
    length: int

    def pack(self) -> bytes:
        """Return the data of the header extension."""
        return POINTER_STRUCT.pack(self.offset, self.length)


@dataclass(frozen=True)
class KeySlot:
    """A key slot: the master key, encrypted by a passphrase; see the module's text."""

    state: int
    iterations: int
    salt: bytes
    material_sector: int
    stripes: int

    @property
    def is_active(self) -> bool:
        """True if the slot has a passphrase."""
        return self.state == ACTIVE

    @property
    def material_offset(self) -> int:
        """Where the key material begins, in bytes from the header's start."""
        return self.material_sector * SECTOR_BYTES


@dataclass(frozen=True)
class LuksHeader:
    """The LUKS header; texts are decoded and without padding."""

    cipher: str
    mode: str
    hash: str
    payload_sector: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @classmethod
    def unpack(cls, data: bytes) -> LuksHeader:
        """Read the header from its first bytes.

        Raises:
            FormatError: it has no LUKS magic, or is cut short.
            UnsupportedFeatureError: another version of LUKS.
        """
        if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
            raise FormatError("the encryption header has no LUKS magic")
        _, version, cipher, mode, hash_name, payload, key_bytes, digest, salt, iterations, uuid = (
            FIXED_STRUCT.unpack_from(data)
        )
        if version != 1:
            raise UnsupportedFeatureError(f"LUKS version {version}")
        slots = tuple(KeySlot(*fields) for fields in SLOT_STRUCT.iter_unpack(data[FIXED_BYTES:HEADER_BYTES]))
        texts = (_text(cipher), _text(mode), _text(hash_name))
        return cls(*texts, payload, key_bytes, digest, salt, iterations, _text(uuid), slots)

    def pack(self) -> bytes:
        """Return the header as on disk, 592 bytes."""
        fixed = FIXED_STRUCT.pack(
            MAGIC,
            1,
            self.cipher.encode(),
            self.mode.encode(),
            self.hash.encode(),
            self.payload_sector,
            self.key_bytes,
            self.digest,
            self.digest_salt,
            self.digest_iterations,
            self.uuid.encode(),
        )
        slots = (
            SLOT_STRUCT.pack(slot.state, slot.iterations, slot.salt, slot.material_sector, slot.stripes)
            for slot in self.slots
        )
        return fixed + b"".join(slots)

    @property
    def cipher_bits(self) -> int:
        """Length of the cipher's key in bits: XTS has two."""
        return self.key_bytes * 8 // (2 if self.mode.startswith("xts") else 1)

    def material_bytes(self, slot: KeySlot) -> int:
        """Return the length of a slot's key material, in whole sectors."""
        return layout.round_up(self.key_bytes * slot.stripes, SECTOR_BYTES)

    def active_slots(self) -> tuple[int, ...]:
        """Return the numbers of the slots that have a passphrase."""
        return tuple(number for number, slot in enumerate(self.slots) if slot.is_active)

    def with_slot(self, number: int, slot: KeySlot) -> LuksHeader:
        """Return the header with another slot of a number."""
        return replace(self, slots=(*self.slots[:number], slot, *self.slots[number + 1 :]))

    def validate(self, length_bytes: int) -> None:
        """Check all that costs a reader time or memory, or leads it elsewhere.

        Args:
            length_bytes: of the header with all key material.

        Raises:
            FormatError: a field is out of bounds.
            UnsupportedFeatureError: more iterations than jqcow counts.
        """
        if self.key_bytes not in range(1, KEY_BYTES_MAX + 1):
            raise FormatError(f"a LUKS master key of {self.key_bytes} bytes")
        if not self.digest_iterations:
            raise FormatError("a LUKS digest of no iterations")
        places: list[tuple[int, int]] = [(0, HEADER_BYTES)]
        for number, slot in enumerate(self.slots):
            if slot.state not in (ACTIVE, INACTIVE):
                raise FormatError(f"LUKS key slot {number} is neither active nor not: {slot.state:#010x}")
            if slot.is_active:
                places.append(self._material_of(number, length_bytes))
        places.sort()
        if any(end > start for (_, end), (start, _) in pairwise(places)):
            raise FormatError("LUKS key slots overlap")
        iterations = self.wrong_passphrase_iterations()
        if iterations > ITERATIONS_MAX:
            detail = f"a wrong passphrase takes {iterations}, at most {ITERATIONS_MAX} are counted"
            raise UnsupportedFeatureError("so many PBKDF2 iterations", detail)

    def wrong_passphrase_iterations(self) -> int:
        """Return how many iterations a wrong passphrase takes: it is tried in each active slot.

        Each try makes a key, in pieces of what the hash makes, and then the digest of what that decrypts.
        """
        active = [slot for slot in self.slots if slot.is_active]
        pieces = pieces_of(self.key_bytes, self.hash)
        digests = len(active) * self.digest_iterations * pieces_of(DIGEST_BYTES, self.hash)
        return digests + pieces * sum(slot.iterations for slot in active)

    def _material_of(self, number: int, length_bytes: int) -> tuple[int, int]:
        slot = self.slots[number]
        if not slot.iterations:
            raise FormatError(f"LUKS key slot {number} has no iterations")
        return self.place_of(number, length_bytes)

    def place_of(self, number: int, length_bytes: int) -> tuple[int, int]:
        """Return [start, end) of a slot's key material, in bytes from the header's start.

        Raises:
            FormatError: it does not lie behind the header and within ``length_bytes``.
        """
        slot = self.slots[number]
        if not 0 < slot.stripes <= STRIPES:
            raise FormatError(f"LUKS key slot {number} has {slot.stripes} stripes")
        start, end = slot.material_offset, slot.material_offset + self.material_bytes(slot)
        if start < HEADER_BYTES or end > length_bytes:
            raise FormatError(f"the key material of LUKS key slot {number} lies outside the header")
        return start, end


def pieces_of(length: int, hash_name: str) -> int:
    """Return how many times PBKDF2 goes through all iterations for a key of this length."""
    return -(-length // HASH_BYTES.get(hash_name, DIGEST_BYTES))


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("ascii", "replace")


def pointer_of(area: HeaderArea) -> Pointer | None:
    """Return where an image says that its LUKS header is; None without LUKS.

    Raises:
        FormatError: it does not say, or a length that no header has.
        CorruptionError: a place where no header can be.
    """
    if area.header.crypt_method != CRYPT_LUKS:
        return None
    extension = area.find(EXTENSION_ENCRYPTION)
    if extension is None:
        raise FormatError("encryption with LUKS, and no header extension that says where its header is")
    if len(extension.data) != POINTER_BYTES:
        raise FormatError(f"an encryption header pointer of {len(extension.data)} bytes")
    offset, length = POINTER_STRUCT.unpack(extension.data)
    if not HEADER_BYTES <= length <= HEADER_BYTES_MAX:
        raise FormatError(f"a LUKS header of {length} bytes")
    if offset % area.header.geometry.cluster_bytes or not 0 < offset < layout.MAX_HOST_OFFSET:
        raise CorruptionError("encryption header", offset, "not a cluster-aligned host offset")
    return Pointer(HostOffset(offset), length)


def clusters_of(pointer: Pointer, geometry: Geometry) -> range:
    """Return the host clusters that a LUKS header takes."""
    first = geometry.cluster_of(pointer.offset)
    return range(first, first + geometry.clusters(pointer.length))


def slot_places(key_bytes: int, stripes: int) -> tuple[tuple[int, ...], int]:
    """Return where the key material of each slot of a new header begins, in sectors, and the whole length."""
    first, step = MATERIAL_ALIGN_BYTES, layout.round_up(key_bytes * stripes, MATERIAL_ALIGN_BYTES)
    starts = tuple((first + number * step) // SECTOR_BYTES for number in range(SLOT_COUNT))
    return starts, first + SLOT_COUNT * step
