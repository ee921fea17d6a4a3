"""Records of an XFS log: each header says at which block of the log it stands.

Mounting stamps what lies before the log's head with headers of empty records, one in each 512 bytes.
What a record holds are parts of other blocks, cut and changed every 512 bytes: they never pass for a block.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from jqcow import _native
from jqcow.salvage.guest.xfs_ondisk import BASIC_BYTES, Named, Read, Superblock

RECORD_BYTES_MAX = 256 << 10
_CYCLES_BYTES = 32 << 10
_SUMMED_BYTES = 328
_SUMMED_EXTENSION_BYTES = 260


@dataclass(frozen=True)
class Record:
    """Header of a record.

    Byte   0 -   3  magic
           4 -   7  cycle
           8 -  11  version, 2
          12 -  15  length of what follows the headers, in bytes
          16 -  23  cycle and block of the record
          32 -  35  CRC-32C over the headers and what follows, little-endian; 0: none
         300 - 303  byte order, 1 to 3
         304 - 319  UUID
         320 - 323  length of a log buffer: one more header block for each 32 KiB but the first
    """

    cycle: int
    length: int
    block: int
    crc: int
    header_blocks: int

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
        return cls(cycle, length, block, int.from_bytes(crc, "little"), header_blocks)

    def sum_is_right(self, data: bytes) -> bool:
        """Return whether the checksum is that of the record, given from its header on."""
        body = self.header_blocks * BASIC_BYTES
        crc = _native.crc32c(data[:32] + bytes(4) + data[36:_SUMMED_BYTES])
        for start in range(BASIC_BYTES, body, BASIC_BYTES):
            crc = _native.crc32c(data[start : start + _SUMMED_EXTENSION_BYTES], crc)
        return _native.crc32c(data[body : body + self.length], crc) == self.crc


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
