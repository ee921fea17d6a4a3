"""What partition tables look like on a disk. All numbers are little-endian.

A boot record (MBR, and EBR for each logical partition), the last 66 bytes of a sector of 512::

    Byte 446 - 509:   four entries
         510 - 511:   0x55, 0xaa

An entry, all zeros where it is not used::

    Byte        0:   status: 0x80 is bootable, else 0
                4:   type: 0x05, 0x0f and 0x85 are extended partitions, 0xee protects a GPT
           8 - 11:   start, in sectors; in an EBR from there or, of the next EBR, from the extended partition
          12 - 15:   length in sectors

A GPT header, at the begin of its sector (UEFI specification)::

    Byte   0 -   7:   "EFI PART"
           8 -  11:   revision, 0x00010000
          12 -  15:   length of the header in bytes
          16 -  19:   CRC-32 of the header, with zeros here
          24 -  31:   own LBA
          32 -  39:   LBA of the other header
          40 -  55:   first and last LBA that partitions may use
          56 -  71:   GUID of the disk
          72 -  79:   LBA of the entries
          80 -  87:   number and length of the entries
          88 -  91:   CRC-32 of all entries

A GPT entry::

    Byte   0 -  15:   type; zeros where it is not used
          32 -  47:   first and last LBA
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

SECTOR_BYTES = 512
SECTOR_SIZES = (512, 4096)
BOOT_MAGIC = b"\x55\xaa"
BOOT_MAGIC_OFFSET = 510
BOOT_ENTRIES_OFFSET = 446
BOOT_ENTRY_STRUCT = struct.Struct("<B3xB3xII")
BOOTABLE = (0, 0x80)
EXTENDED = (0x05, 0x0F, 0x85)
PROTECTIVE = 0xEE
FIRST_LOGICAL = 5
"""Logical partitions have numbers from here on."""
LOGICAL_MAX = 128

GPT_MAGIC = b"EFI PART\0\0\1\0"
GPT_STRUCT = struct.Struct("<8sIII4xQQQQ16sQIII")
GPT_CRC_OFFSET = 16
GPT_ENTRY_STRUCT = struct.Struct("<16s16xQQ")
GPT_ENTRIES_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class BootEntry:
    """An entry of a boot record; see the module's text."""

    number: int
    type: int
    start_sector: int
    sector_count: int

    @property
    def is_extended(self) -> bool:
        """True if boot records of logical partitions are in it."""
        return self.type in EXTENDED

    @property
    def end_sector(self) -> int:
        """The first sector after it."""
        return self.start_sector + self.sector_count


def unpack_boot_record(sector: bytes) -> tuple[BootEntry, ...]:
    """Return the entries in use of a boot record; none if it is none, or an entry makes no sense."""
    if len(sector) < SECTOR_BYTES or sector[BOOT_MAGIC_OFFSET:SECTOR_BYTES] != BOOT_MAGIC:
        return ()
    entries = []
    fields = BOOT_ENTRY_STRUCT.iter_unpack(sector[BOOT_ENTRIES_OFFSET:BOOT_MAGIC_OFFSET])
    for number, (status, kind, start, count) in enumerate(fields, 1):
        if status not in BOOTABLE or (kind == 0) != (count == 0) or (kind and not start):
            return ()
        if kind:
            entries.append(BootEntry(number, kind, start, count))
    return tuple(entries)


def overlap(entries: tuple[BootEntry, ...]) -> bool:
    """Return True if two entries of the first boot record share a sector."""
    by_start = sorted(entries, key=lambda entry: entry.start_sector)
    return any(one.end_sector > other.start_sector for one, other in pairwise(by_start))


@dataclass(frozen=True)
class GptHeader:
    """A GPT header whose checksum is right; see the module's text."""

    lba: int
    other_lba: int
    first_lba: int
    last_lba: int
    guid: bytes
    entries_lba: int
    entry_count: int
    entry_bytes: int
    entries_crc: int

    @classmethod
    def unpack(cls, sector: bytes) -> GptHeader | None:
        """Read a header from its sector; None if it is none."""
        if len(sector) < SECTOR_BYTES or not sector.startswith(GPT_MAGIC):
            return None
        _, _, header_bytes, crc, *fields = GPT_STRUCT.unpack_from(sector)
        if not GPT_STRUCT.size <= header_bytes <= SECTOR_BYTES:
            return None
        cleared = sector[:GPT_CRC_OFFSET] + bytes(4) + sector[GPT_CRC_OFFSET + 4 : header_bytes]
        header = cls(*fields)
        sane = header.entry_bytes >= GPT_ENTRY_STRUCT.size and header.lba != header.other_lba
        in_bounds = max(header.lba, header.other_lba, header.last_lba) < 1 << 52
        if zlib.crc32(cleared) != crc or not sane or not in_bounds:
            return None
        return header if header.entry_count * header.entry_bytes <= GPT_ENTRIES_MAX_BYTES else None

    @property
    def is_primary(self) -> bool:
        """True if it is the one at the begin of the disk."""
        return self.lba == 1

    @property
    def entries_length(self) -> int:
        """Length of all entries in bytes."""
        return self.entry_count * self.entry_bytes

    def disk_bytes(self, sector_bytes: int) -> int:
        """Return the size of the disk: one of the two headers is in its last sector."""
        return (max(self.lba, self.other_lba) + 1) * sector_bytes

    def partitions(self, entries: bytes) -> Iterator[tuple[int, int, int]]:
        """Yield (number, first LBA, last LBA) of the entries in use; of none, if their checksum is wrong."""
        if len(entries) != self.entries_length or zlib.crc32(entries) != self.entries_crc:
            return
        for number in range(self.entry_count):
            kind, first, last = GPT_ENTRY_STRUCT.unpack_from(entries, number * self.entry_bytes)
            if any(kind) and self.first_lba <= first <= last <= self.last_lba:
                yield number + 1, first, last
