"""Records of an XFS log: each header says at which block of the log it stands.

Mounting stamps what lies before the log's head with headers of empty records, one in each 512 bytes.
What a record holds are parts of other blocks, cut and changed every 512 bytes: they never pass for a block.
Among them are inodes as they were at that time.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jqcow import _native
from jqcow.salvage.guest.xfs_ondisk import BASIC_BYTES, Named, Read, Superblock, nanoseconds

RECORD_BYTES_MAX = 256 << 10
_CYCLES_BYTES = 32 << 10
_SUMMED_BYTES = 328
_SUMMED_EXTENSION_BYTES = 260
_CYCLES_AT, _CYCLES_AT_IN_EXTENSION = 44, 4
_CYCLES_PER_BLOCK = 64
LOG_BYTES_MAX, READ_BYTES = 256 << 20, 64 << 10
"""So much of a log is looked through for old inodes, and so much at a time."""


@dataclass(frozen=True)
class Record:
    """Header of a record.

    Byte   0 -   3  magic
           4 -   7  cycle
           8 -  11  version, 2
          12 -  15  length of what follows the headers, in bytes
          16 -  23  cycle and block of the record
          32 -  35  CRC-32C over the headers and what follows, little-endian; 0: none
          44 - 299  the first 4 bytes of each 512 of what follows: there the cycle stands
         300 - 303  byte order of what follows, 1 for little-endian, 2 and 3
         304 - 319  UUID
         320 - 323  length of a log buffer: one more header block for each 32 KiB but the first
    """

    cycle: int
    length: int
    block: int
    crc: int
    header_blocks: int
    order: Literal["little", "big"]

    STRUCT = struct.Struct(">IIIIQ8x4s264xI16sI")
    MAGIC = b"\xfe\xed\xba\xbe"

    @classmethod
    def unpack(cls, data: bytes, superblock: Superblock) -> Record | None:
        """Read a header; None if it is none of this file system's log."""
        if data[:4] != cls.MAGIC or len(data) < _SUMMED_BYTES:
            return None
        _, cycle, version, length, lsn, crc, order, uuid, buffer_bytes = cls.STRUCT.unpack_from(data)
        if version != 2 or uuid != superblock.uuid or not 1 <= order <= 3 or lsn >> 32 != cycle:
            return None
        block, log_bytes = lsn & 0xFFFF_FFFF, superblock.log_blocks * superblock.block_bytes
        if block >= log_bytes // BASIC_BYTES or length > RECORD_BYTES_MAX or buffer_bytes > RECORD_BYTES_MAX:
            return None
        header_blocks = max(1, -(-buffer_bytes // _CYCLES_BYTES))
        written: Literal["little", "big"] = "little" if order == 1 else "big"
        return cls(cycle, length, block, int.from_bytes(crc, "little"), header_blocks, written)

    def sum_is_right(self, data: bytes) -> bool:
        """Return whether the checksum is that of the record, given from its header on."""
        body = self.header_blocks * BASIC_BYTES
        crc = _native.crc32c(data[:32] + bytes(4) + data[36:_SUMMED_BYTES])
        for start in range(BASIC_BYTES, body, BASIC_BYTES):
            crc = _native.crc32c(data[start : start + _SUMMED_EXTENSION_BYTES], crc)
        return _native.crc32c(data[body : body + self.length], crc) == self.crc

    def body(self, data: bytes) -> bytes:
        """Return what the record holds, given from its header on, as it was before it was cut."""
        cycles = b""
        for block in range(self.header_blocks):
            at = block * BASIC_BYTES + (_CYCLES_AT_IN_EXTENSION if block else _CYCLES_AT)
            cycles += data[at : at + 4 * _CYCLES_PER_BLOCK]
        start = self.header_blocks * BASIC_BYTES
        body = bytearray(data[start : start + self.length])
        for byte in range(4):
            count = len(range(byte, len(body), BASIC_BYTES))
            body[byte::BASIC_BYTES] = cycles[byte : 4 * count : 4].ljust(count, b"\0")
        return bytes(body)


@dataclass(frozen=True)
class LoggedInode:
    """An inode as a record has it: as on the disk, in the byte order of the record, without a checksum.

    Byte   0 -   1  magic, "IN"
           2 -   3  mode
           4        version, 3
          48 -  55  time of the last change of the inode
          56 -  63  size
         120 - 127  more flags
         152 - 159  number
         160 - 175  UUID
    """

    number: int
    size: int
    changed_ns: int

    BYTES = 176
    UUID_AT = 160

    @classmethod
    def unpack(cls, data: bytes, order: Literal["little", "big"]) -> LoggedInode | None:
        """Read a regular file's inode; None if it is none."""
        if len(data) < cls.BYTES or data[4] != 3:
            return None
        magic, mode, stamp, size, flags2, number = (
            int.from_bytes(data[at : at + length], order)
            for at, length in ((0, 2), (2, 2), (48, 8), (56, 8), (120, 8), (152, 8))
        )
        if magic != 0x494E or not stat.S_ISREG(mode):
            return None
        is_big = bool(flags2 & 1 << 3)
        if not is_big:
            seconds, rest = (int.from_bytes(data[at : at + 4], order) for at in (48, 52))
            stamp = seconds << 32 | rest
        return cls(number, size, nanoseconds(stamp, is_big))


def logged_inodes(read: Read, superblock: Superblock) -> Iterator[LoggedInode]:
    """Yield the inodes of files that records have whose checksums are right, the oldest first.

    ``read`` returns a range of the file system; None if it is not placed.
    """
    log = superblock.block_offset(superblock.log_block) if superblock.log_block else None
    if log is None:
        return
    end = log + superblock.log_blocks * superblock.block_bytes
    found: list[tuple[int, int, int]] = []
    for start in range(log, min(end, log + LOG_BYTES_MAX), READ_BYTES):
        data = read(start, min(READ_BYTES, end - start)) or b""
        at = data.find(Record.MAGIC)
        while at >= 0:
            header = data[at : at + BASIC_BYTES]
            if at % BASIC_BYTES == 0 and (record := Record.unpack(header, superblock)) and record.length:
                found.append((record.cycle, record.block, start + at))
            at = data.find(Record.MAGIC, at + 4)
    for _, _, at in sorted(found):
        record = Record.unpack(read(at, BASIC_BYTES) or b"", superblock)
        whole = read(at, record.header_blocks * BASIC_BYTES + record.length) if record else None
        if record is not None and whole is not None and record.crc and record.sum_is_right(whole):
            yield from _inodes_in(record.body(whole), record.order, superblock)


def _inodes_in(body: bytes, order: Literal["little", "big"], superblock: Superblock) -> Iterator[LoggedInode]:
    at = body.find(superblock.uuid)
    while at >= 0:
        start = at - LoggedInode.UUID_AT
        inode = LoggedInode.unpack(body[start : start + LoggedInode.BYTES], order) if start >= 0 else None
        if inode is not None:
            yield inode
        at = body.find(superblock.uuid, at + 1)


def named_in_log(content: bytes, read: Read, superblock: Superblock) -> Iterator[Named]:
    """Yield the records that start in a cluster; a checksum proves them, or a block of stamps that agree."""
    log = superblock.block_offset(superblock.log_block) if superblock.log_block else None
    if log is None:
        return
    stamped: dict[int, int] = {}
    at = content.find(Record.MAGIC)
    while at >= 0:
        record = Record.unpack(content[at : at + BASIC_BYTES], superblock)
        if record is None:
            at = content.find(Record.MAGIC, at + 4)
            continue
        length = record.header_blocks * BASIC_BYTES + record.length
        address = log + record.block * BASIC_BYTES
        data = read(at, length) if record.crc else None
        if data is not None and record.sum_is_right(data):
            yield Named(at, length, address, 0, "XFS log")
        else:
            stamped[address - at] = stamped.get(address - at, 0) + 1
            is_proved = stamped[address - at] >= superblock.block_bytes // BASIC_BYTES
            yield Named(at, BASIC_BYTES, address, 0, "XFS log", is_proved)
        at = content.find(Record.MAGIC, at + BASIC_BYTES)
