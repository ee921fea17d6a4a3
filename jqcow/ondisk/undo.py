"""The undo file of a repair: what the image held where the repair changed it. All numbers are big-endian.

Header of the file (`UndoHeader`):

    Byte  0 -  7:   magic, "JQCOWUND"
          8 - 11:   version, 1
         12 - 15:   CRC-32C of this header, with zeros here
         16 - 23:   length of the image before the repair, in bytes
         24 - 31:   length of the image after it, in bytes
         32 - 39:   number of runs
         40 - 47:   length of all runs, in bytes
         48 - 55:   inode number of the image, 0: unknown
         56 - 63:   when the image's file was made, in nanoseconds since 1970, 0: unknown

Then the runs follow each other (`UndoRun`), in the order of their offsets, each of at most 128 sectors of 512
bytes, in whole blocks of 4096 bytes of the image. What lies behind the old end may be among them:

    Byte  0 -  7:   offset of the first sector in the image, in bytes
          8 - 11:   number of sectors, n
         12 - 15:   CRC-32C of the whole run, with zeros here
         then n CRC-32C of 4 bytes, of each sector after the repair
         then n sectors as they were before it; what lay past the end of the file is zeros

Behind the runs, at a multiple of 4096, a mark (`Mark`) may stand:

    Byte  0 -  7:   magic, "JQCOWEND": the repair is done, and what follows it is not its own
                    or "JQCOWBGN": the image is being taken back
                    or "JQCOWSRV": it was, and this file has served
                    or "JQCOWINP": new tables are being put into it, and sector 0 may be any
          8 - 11:   CRC-32C of the header of the file
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from jqcow import _native
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk.layout import MAX_HOST_OFFSET, SECTOR_BYTES, round_up

MAGIC = b"JQCOWUND"
BLOCK_BYTES = 4096
"""What a power cut may garble where one of its sectors is written in place (docs/crash-consistency)."""
VERSION = 1
RUN_SECTORS_MAX = 128
HEADER_STRUCT = struct.Struct(">8sIIQQQQQQ")
RUN_STRUCT = struct.Struct(">QII")
MARK_STRUCT = struct.Struct(">8sI")
HEADER_BYTES = 64
RUN_BYTES = 16
MARK_BYTES = 12
assert HEADER_STRUCT.size == HEADER_BYTES and RUN_STRUCT.size == RUN_BYTES


class Mark(enum.Enum):
    """What an undo file says of its image. Without a mark a repair may have been cut off."""

    DONE = b"JQCOWEND"
    BEGUN = b"JQCOWBGN"
    SERVED = b"JQCOWSRV"
    IN_PLACE = b"JQCOWINP"


@dataclass(frozen=True)
class UndoHeader:
    """The header: lengths of the image before and after the repair in bytes, and what runs follow.

    ``inode`` and ``born_nanoseconds`` tell the image's file from others of its name, 0 where that is unknown.
    """

    old_bytes: int
    new_bytes: int
    run_count: int
    runs_bytes: int
    inode: int = 0
    born_nanoseconds: int = 0

    def pack(self) -> bytes:
        """Return the header as on disk."""
        lengths = (self.old_bytes, self.new_bytes, self.run_count, self.runs_bytes)
        fields = (*lengths, self.inode, self.born_nanoseconds)
        crc = _native.crc32c(HEADER_STRUCT.pack(MAGIC, VERSION, 0, *fields))
        return HEADER_STRUCT.pack(MAGIC, VERSION, crc, *fields)

    @classmethod
    def unpack(cls, data: bytes) -> UndoHeader:
        """Read the header.

        Raises:
            FormatError: not an undo file, or of another version.
            CorruptionError: it is damaged.
        """
        magic, version, _, *fields = HEADER_STRUCT.unpack_from(data.ljust(HEADER_BYTES, b"\0"))
        if magic != MAGIC or version != VERSION:
            raise FormatError("not an undo file of this version")
        header = cls(*fields)
        if header.pack() != data[:HEADER_BYTES]:
            raise CorruptionError("undo file", 0, "its checksum does not match")
        if max(header.old_bytes, header.new_bytes) > MAX_HOST_OFFSET:
            raise CorruptionError("undo file", 0, "it is of an image of more than 64 PiB")
        if header.runs_bytes > MAX_HOST_OFFSET:
            raise CorruptionError("undo file", 0, f"its runs take {header.runs_bytes} bytes")
        return header

    @property
    def mark_place(self) -> int:
        """Offset of the mark: in a block of its own, which cannot take the runs with it."""
        return round_up(HEADER_BYTES + self.runs_bytes, BLOCK_BYTES)

    def pack_mark(self, mark: Mark) -> bytes:
        """Return a mark of this file, as on disk."""
        return MARK_STRUCT.pack(mark.value, _native.crc32c(self.pack()))

    def unpack_mark(self, data: bytes) -> Mark | None:
        """Return the mark that these bytes are, None where they are none of this file."""
        return next((mark for mark in Mark if data == self.pack_mark(mark)), None)


@dataclass(frozen=True)
class UndoRun:
    """Sectors in a row, from ``offset`` on: as they were, and the checksums of what they became."""

    offset: int
    old: bytes
    new_crcs: tuple[int, ...]

    @property
    def length(self) -> int:
        """Length of the run in the undo file, in bytes."""
        return RUN_BYTES + len(self.new_crcs) * (4 + SECTOR_BYTES)

    def pack(self) -> bytes:
        """Return the run as on disk."""
        count = len(self.new_crcs)
        body = struct.pack(f">{count}I", *self.new_crcs) + self.old
        crc = _native.crc32c(RUN_STRUCT.pack(self.offset, count, 0) + body)
        return RUN_STRUCT.pack(self.offset, count, crc) + body

    @classmethod
    def unpack(cls, data: bytes, place: int) -> UndoRun:
        """Read a run, which stands at ``place`` in the undo file.

        Raises:
            CorruptionError: it is damaged.
        """
        offset, count, _ = RUN_STRUCT.unpack_from(data.ljust(RUN_BYTES, b"\0"))
        end = RUN_BYTES + count * (4 + SECTOR_BYTES)
        is_placed = offset <= MAX_HOST_OFFSET and not offset % BLOCK_BYTES
        if not 0 < count <= RUN_SECTORS_MAX or len(data) < end or not is_placed:
            raise CorruptionError("undo file", place, f"a run of {count} sectors at {offset:#x}")
        crcs = struct.unpack_from(f">{count}I", data, RUN_BYTES)
        run = cls(offset, data[RUN_BYTES + 4 * count : end], crcs)
        if run.pack() != data[:end]:
            raise CorruptionError("undo file", place, "its checksum does not match")
        return run
