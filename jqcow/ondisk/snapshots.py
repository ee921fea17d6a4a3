"""The snapshot table (qcow2 specification, "Snapshots").

The header says where the table starts (``snapshots_offset``, cluster-aligned) and how many entries it has
(``nb_snapshots``). The clusters of the table are contiguous, and the entries follow each other, each starting
at a multiple of 8 bytes. An entry, big-endian::

    Byte   0 -   7:   l1_table_offset, cluster-aligned
           8 -  11:   l1_size in entries
          12 -  13:   length of the id in bytes
          14 -  15:   length of the name in bytes
          16 -  19:   date in seconds since the epoch
          20 -  23:   the rest of the date in nanoseconds
          24 -  31:   time for which the guest had run, in nanoseconds
          32 -  35:   size of the VM state in bytes, 0: none
          36 -  39:   size of the extra data in bytes

and then the extra data, the id, the name (both without a terminating zero) and padding. The extra data::

    Byte   0 -   7:   size of the VM state in bytes; the 32-bit field above is then ignored
           8 -  15:   size of the disk in bytes
          16 -  23:   instruction count of the guest, all ones: none
    Byte  24 -     :   unknown to jqcow, and kept

Each field of the extra data may be missing, with all that follow it; version 3 demands the first two.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import layout
from jqcow.ondisk.header import Header
from jqcow.ondisk.layout import ENTRY_BYTES

FIXED_STRUCT = struct.Struct(">QIHHIIQII")
FIXED_BYTES = 40
EXTRA_STRUCT = struct.Struct(">QQQ")
EXTRA_BYTES = 24
if FIXED_STRUCT.size != FIXED_BYTES or EXTRA_STRUCT.size != EXTRA_BYTES:
    raise RuntimeError("a snapshot table entry does not have the size that the specification gives")
ALIGNMENT_BYTES = 8

REQUIRED_EXTRA_BYTES = 16
"""The extra data that version 3 demands: both 64-bit sizes."""

MAX_SNAPSHOTS = 65536
MAX_TABLE_BYTES = 64 << 20
MAX_EXTRA_BYTES = 1024
"""The bounds within which QEMU opens a snapshot table; jqcow keeps to the same."""
MAX_SNAPSHOT_L1_BYTES = 1 << 32
"""The most that the L1 tables of all snapshots may take: else a few snapshots bind a check for hours."""

_NO_ICOUNT = (1 << 64) - 1
_VM_STATE_32_MAX = (1 << 32) - 1
_EXTRA_FIELD_BYTES = 8
_TEXT_MAX_BYTES = (1 << 16) - 1
_CHUNK_BYTES = 64 << 10

Read = Callable[[int, int], bytes]
"""Reads (length, host offset) in bytes; what lies past the end of the file reads as zeros."""


@dataclass(frozen=True)
class Snapshot:
    """One entry of the snapshot table.

    Attributes:
        l1_table_offset: host offset in bytes of the snapshot's L1 table.
        l1_size: its length in entries; those behind the disk map the VM state.
        id: what identifies the snapshot, by custom a decimal number.
        name: what people call it. In id and name, bytes that are not UTF-8 are kept as lone surrogates.
        date_seconds: when it was taken, in seconds since the epoch.
        date_nanoseconds: the rest of the date.
        vm_clock_nanoseconds: how long the guest had run.
        vm_state_bytes: size of the saved VM state, 0 for none.
        disk_bytes: size of the disk when the snapshot was taken.
        icount: instruction count of the guest, or None.
        unknown_extra: extra data behind the fields of the specification, as it was read.
    """

    l1_table_offset: int
    l1_size: int
    id: str
    name: str
    date_seconds: int
    date_nanoseconds: int
    vm_clock_nanoseconds: int
    vm_state_bytes: int
    disk_bytes: int
    icount: int | None
    unknown_extra: bytes = b""

    def pack(self) -> bytes:
        """Return the entry as on disk, with all extra data of version 3, padded to a multiple of 8 bytes.

        Raises:
            ValueError: the id or the name exceeds 65,535 bytes, the extra data 1024, or a number its field.
        """
        identifier, name = _encode(self.id), _encode(self.name)
        extra_bytes = EXTRA_BYTES + len(self.unknown_extra)
        if max(len(identifier), len(name)) > _TEXT_MAX_BYTES or extra_bytes > MAX_EXTRA_BYTES:
            raise ValueError("the id, the name or the extra data of a snapshot is too long")
        icount = _NO_ICOUNT if self.icount is None else self.icount
        try:
            fixed = FIXED_STRUCT.pack(
                self.l1_table_offset,
                self.l1_size,
                len(identifier),
                len(name),
                self.date_seconds,
                self.date_nanoseconds,
                self.vm_clock_nanoseconds,
                # Only the 64-bit field counts, but a program of version 2 times may look here.
                self.vm_state_bytes if self.vm_state_bytes <= _VM_STATE_32_MAX else 0,
                extra_bytes,
            )
            extra = EXTRA_STRUCT.pack(self.vm_state_bytes, self.disk_bytes, icount)
        except struct.error as error:
            raise ValueError(f"a number of snapshot {self.id!r} does not fit its field: {error}") from error
        entry = fixed + extra + self.unknown_extra + identifier + name
        return entry.ljust(layout.round_up(len(entry), ALIGNMENT_BYTES), b"\0")


@dataclass(frozen=True)
class SnapshotTable:
    """All snapshots, and the length in bytes that their entries take on disk, padding included."""

    snapshots: tuple[Snapshot, ...]
    length_bytes: int


@dataclass(frozen=True)
class TableEntry:
    """A snapshot with its place: ``offset`` and ``length`` on the host, in bytes, padding included.

    ``extra_bytes`` is the size of the extra data as read, which may be less than what `Snapshot.pack` writes.
    """

    snapshot: Snapshot
    offset: int
    length: int
    extra_bytes: int

    def validate(self, header: Header) -> None:
        """Check what a reader of this snapshot relies on: its L1 table's place and whole extra data fields.

        Raises:
            CorruptionError: the L1 table is unaligned, too large or out of range, or a field is cut short.
        """
        snapshot, cluster_bytes = self.snapshot, 1 << header.cluster_bits
        length = snapshot.l1_size * ENTRY_BYTES
        if length > layout.MAX_L1_BYTES:
            raise self._corruption(f"an L1 table of {snapshot.l1_size} entries is too large")
        lowest = cluster_bytes if length else 0
        is_inside = lowest <= snapshot.l1_table_offset <= layout.MAX_HOST_OFFSET - length
        if snapshot.l1_table_offset % cluster_bytes or not is_inside:
            place = f"{snapshot.l1_table_offset:#x}"
            raise self._corruption(f"its L1 table at {place} is not at a cluster-aligned host offset")
        if self.extra_bytes < EXTRA_BYTES and self.extra_bytes % _EXTRA_FIELD_BYTES:
            raise self._corruption(f"{self.extra_bytes} bytes of extra data cut a field short")

    def _corruption(self, detail: str) -> CorruptionError:
        return CorruptionError("snapshot table entry", self.offset, detail)


def parse_table(read: Read, offset: int, count: int, *, header: Header) -> SnapshotTable:
    """Read the snapshot table and check every entry of it.

    A snapshot whose extra data has no disk size has that of the header; one without the 64-bit size of its
    VM state has the 32-bit one.

    Args:
        read: reads (length, host offset) in bytes.
        offset: host offset of the table in bytes.
        count: how many snapshots the table has.
        header: the header of the image.

    Raises:
        FormatError: more snapshots, a longer table or more extra data than QEMU opens.
        CorruptionError: the table, or the L1 table of a snapshot, is not where one can be; extra data that
            ends within a field.
    """
    snapshots: list[Snapshot] = []
    end = offset
    for entry in read_entries(read, offset, count, header=header):
        entry.validate(header)
        snapshots.append(entry.snapshot)
        end = entry.offset + entry.length
    return SnapshotTable(tuple(snapshots), end - offset)


def read_entries(read: Read, offset: int, count: int, *, header: Header) -> Iterator[TableEntry]:
    """Yield the entries of the snapshot table as they are, for those who judge each of them.

    Arguments and errors are those of `parse_table`, but no entry is validated: only what the table itself
    needs to be walked in bounded time and memory.
    """
    if count > MAX_SNAPSHOTS:
        raise FormatError(f"{count} snapshots are more than {MAX_SNAPSHOTS}")
    if count and (offset % (1 << header.cluster_bits) or not 0 < offset < layout.MAX_HOST_OFFSET):
        raise CorruptionError("snapshot table", offset, "not a cluster-aligned host offset")
    cursor = _Cursor(read, offset)
    for _ in range(count):
        yield _next_entry(cursor, header)


def pack_table(snapshots: Iterable[Snapshot]) -> bytes:
    """Return the snapshot table as on disk.

    Raises:
        ValueError: a snapshot does not fit its entry, or all of them the bounds of a table.
    """
    entries = [snapshot.pack() for snapshot in snapshots]
    table = b"".join(entries)
    if len(entries) > MAX_SNAPSHOTS or len(table) > MAX_TABLE_BYTES:
        raise ValueError(
            f"{len(entries)} snapshots in {len(table)} bytes exceed the bounds of a snapshot table"
        )
    return table


class _Cursor:
    """Reads a table of unknown length from its start, in chunks, up to the bound of a table."""

    def __init__(self, read: Read, start: int) -> None:
        self._read = read
        self._start = start
        self._buffer = b""
        self._buffer_offset = start
        self.offset = start

    def take(self, length: int) -> bytes:
        """Return the next ``length`` bytes. Raises FormatError where the table would exceed its bound."""
        if self.offset + length - self._start > MAX_TABLE_BYTES:
            raise FormatError(f"the snapshot table at {self._start:#x} exceeds {MAX_TABLE_BYTES} bytes")
        within = self.offset - self._buffer_offset
        if within + length > len(self._buffer):
            rest = self._buffer[within:]
            wanted = max(_CHUNK_BYTES, length) - len(rest)
            self._buffer = rest + self._read(wanted, self.offset + len(rest))
            self._buffer_offset, within = self.offset, 0
        self.offset += length
        return self._buffer[within : within + length]


def _next_entry(cursor: _Cursor, header: Header) -> TableEntry:
    start = cursor.offset
    (
        l1_table_offset,
        l1_size,
        id_bytes,
        name_bytes,
        date_seconds,
        date_nanoseconds,
        vm_clock_nanoseconds,
        vm_state_bytes,
        extra_bytes,
    ) = FIXED_STRUCT.unpack(cursor.take(FIXED_BYTES))
    if extra_bytes > MAX_EXTRA_BYTES:
        raise FormatError(f"the snapshot table entry at {start:#x} has {extra_bytes} bytes of extra data")
    extra = cursor.take(extra_bytes)
    disk_bytes, icount = header.size, None
    if extra_bytes >= 8:
        vm_state_bytes = int.from_bytes(extra[:8], "big")
    if extra_bytes >= 16:
        disk_bytes = int.from_bytes(extra[8:16], "big")
    if extra_bytes >= EXTRA_BYTES:
        stored = int.from_bytes(extra[16:EXTRA_BYTES], "big")
        icount = None if stored == _NO_ICOUNT else stored
    snapshot = Snapshot(
        l1_table_offset=l1_table_offset,
        l1_size=l1_size,
        id=_decode(cursor.take(id_bytes)),
        name=_decode(cursor.take(name_bytes)),
        date_seconds=date_seconds,
        date_nanoseconds=date_nanoseconds,
        vm_clock_nanoseconds=vm_clock_nanoseconds,
        vm_state_bytes=vm_state_bytes,
        disk_bytes=disk_bytes,
        icount=icount,
        unknown_extra=extra[EXTRA_BYTES:],
    )
    cursor.take(-(cursor.offset - start) % ALIGNMENT_BYTES)
    return TableEntry(snapshot, start, cursor.offset - start, extra_bytes)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
