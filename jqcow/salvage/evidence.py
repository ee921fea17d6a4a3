"""What evidence says: which guest range a host range holds, and how surely.

EV1. *Certain* is only what a structure of the file or of the guest says of itself: a table in its place, a
    checksum that covers content and address. What follows from an order, however long, is at most *likely*.
EV2. Evidence never reads what it was not given: a guest's range that nobody placed is None, not zeros.
EV3. Whatever bytes evidence is given, it ends, in time and memory bounded by what it was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol


class Certainty(IntEnum):
    """How surely a guest range has the bytes that it is given."""

    GUESS = 1
    """Somebody has to have them: what was left over, in the order of the file."""
    LIKELY = 2
    """Several facts agree, and none speaks against it."""
    CERTAIN = 3
    """Something says so that knows: see EV1."""


@dataclass(frozen=True)
class Placement:
    """A host range that holds a guest range.

    Attributes:
        guest_offset: of the range on the guest's disk, in bytes.
        host_offset: of the range in the file, in bytes.
        length: of both in bytes.
        certainty: how surely.
        witness: who says so, in words, such as "ext4 inode table".
    """

    guest_offset: int
    host_offset: int
    length: int
    certainty: Certainty
    witness: str


@dataclass(frozen=True)
class FilePiece:
    """A guest range that a file of the guest occupies.

    Attributes:
        guest_offset: of the range on the guest's disk, in bytes; aligned as the file system aligns.
        length: of the range in bytes, whole blocks of the file system.
        valid_bytes: how many of them are before the end of the file; the rest of a last block is zeros.
        written: sorts pieces by when they were written, as far as the file system tells: nanoseconds since
            1970, a number of the file, the piece's offset in the file.
        is_data: False for what the file system itself uses.
        changed_ns: when the file was last written to, if ``written`` tells when it was made; 0: not known.
        is_timed: the time in ``written`` is that of this piece, by what was kept of the file's growth.
    """

    guest_offset: int
    length: int
    valid_bytes: int
    written: tuple[int, int, int]
    is_data: bool = True
    changed_ns: int = 0
    is_timed: bool = False


@dataclass(frozen=True)
class BlockSum:
    """A checksum that the guest keeps of a block, or `jqcow protect` does.

    Attributes:
        guest_offset: of the block on the guest's disk, in bytes.
        length: of the block in bytes.
        crc32c: of its content, as `jqcow._native.crc32c` counts it; that of a protection as
            `jqcow.ondisk.protection.reversed_crc` does.
    """

    guest_offset: int
    length: int
    crc32c: int


class Orphans(Protocol):
    """Host clusters that hold data and that no surviving table names, by host offset.

    They may be read again and again; each time costs the host a read.
    """

    @property
    def cluster_bytes(self) -> int:
        """Return the length of a cluster in bytes."""
        ...

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield (host offset, content) of each; what the host cannot read reads as zeros."""
        ...

    def read(self, host_offset: int) -> bytes:
        """Return the content of the orphan at a host offset, a multiple of the cluster's length.

        Between orphans others may lie that hold zeros, which need no place: these may be read, too.
        """
        ...


class PlacedDisk(Protocol):
    """The guest's disk as far as it is placed with certainty."""

    @property
    def size(self) -> int:
        """Return the size of the disk in bytes, or a bound of it where that is lost."""
        ...

    def read(self, offset: int, length: int) -> bytes | None:
        """Return a guest range; None if a byte of it is not placed with certainty.

        What a table that is whole leaves unallocated reads as zeros, or as the backing disk.
        """
        ...


@dataclass(frozen=True)
class Volume:
    """A guest range that a file system may lie in: the whole disk, or a partition.

    Attributes:
        offset: of the range on the guest's disk, in bytes.
        length: of the range in bytes; 0 where it is not known.
        name: such as "partition 2", for people.
        certainty: how surely there is such a volume: nothing in it is placed more surely.
    """

    offset: int
    length: int
    name: str
    certainty: Certainty = Certainty.CERTAIN


class GuestStructure(Protocol):
    """A file system, or another structure of the guest, that was recognised in a volume.

    All places are guest offsets on the disk, never offsets in the volume.
    """

    @property
    def name(self) -> str:
        """Return what it is and where, for people, such as "ext4 in partition 2"."""
        ...

    def place(self, disk: PlacedDisk, orphans: Orphans) -> Iterator[Placement]:
        """Yield the orphans, or parts of them, that tell where they belong.

        It is asked again after new placements were taken over, for what it can tell by them, until
        nothing new comes; what it yielded before may come again.
        """
        ...

    def pieces(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what the file system has in use, in any order, as far as its metadata is placed."""
        ...

    def deleted(self, disk: PlacedDisk) -> Iterator[FilePiece]:
        """Yield what files had that are there no more, as far as their metadata is left.

        Others may have some of it by now, live or deleted, too.
        """
        ...

    def free(self, disk: PlacedDisk) -> Iterator[tuple[int, int]]:
        """Yield (guest offset, length in bytes) of what the file system knows to be free."""
        ...

    def sums(self, disk: PlacedDisk) -> Iterator[BlockSum]:
        """Yield the checksums that it keeps of file data, as far as they are placed."""
        ...
