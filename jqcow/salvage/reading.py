"""The bytes of a piece of a guest's disk, from the file, a compressed stream, or the disk below."""

from __future__ import annotations

from collections.abc import Callable

from jqcow.errors import FormatError, UnsupportedFeatureError
from jqcow.ondisk.compression import decompress
from jqcow.salvage.decrypting import DecryptedSource
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guestmap import GuestMap, Piece
from jqcow.salvage.ranges import Ranges
from jqcow.salvage.shape import Shape
from jqcow.salvage.source import Source

Below = Callable[[int, int], bytes]
"""Reads (length, guest offset) of the backing disk; zeros behind its end."""


class PieceReader:
    """Reads pieces of one disk.

    Attributes:
        source: the file.
        has_below: the image names a backing file.
    """

    def __init__(self, source: Source, shape: Shape, below: Below | None = None) -> None:
        """Read from ``source``, and from ``below`` what an image's tables leave to its backing disk."""
        self.source = source
        self.has_below = bool(shape.area.header.backing_file_offset)
        self._below = below
        self._cluster_bytes = shape.geometry.cluster_bytes
        self._compression_type = shape.area.header.compression_type
        self._cached: tuple[int, bytes | None] = (-1, None)

    @property
    def reads_below(self) -> bool:
        """True if the backing disk is open."""
        return self._below is not None

    def read(self, piece: Piece) -> bytes | None:
        """Return the bytes of a piece; None if they are lost, wholly or in part."""
        match piece.kind:
            case "zero":
                return bytes(piece.length)
            case "below":
                return self._read_below(piece)
            case "data":
                content = self.source.pread(piece.length, piece.host_offset)
                return None if self.source.bad.overlaps(piece.host_offset, piece.length) else content
            case "compressed":
                cluster = self.read_compressed(piece.host_offset, piece.stored_bytes)
                first = piece.guest_offset % self._cluster_bytes
                return None if cluster is None else cluster[first : first + piece.length]
        return None

    def _read_below(self, piece: Piece) -> bytes | None:
        if self._below is not None:
            return self._below(piece.length, piece.guest_offset)
        return None if self.has_below else bytes(piece.length)

    def read_compressed(self, host_offset: int, stored_bytes: int) -> bytes | None:
        """Return the cluster whose compressed data begins at a host offset; None if it is damaged."""
        if self._cached[0] != host_offset:
            # Compressed data is not encrypted.
            plain = self.source.plain if isinstance(self.source, DecryptedSource) else self.source
            length = min(stored_bytes, 2 * self._cluster_bytes)
            stored = plain.pread(length, host_offset)
            try:
                content = decompress(stored, self._cluster_bytes, self._compression_type)
            except (FormatError, UnsupportedFeatureError):
                self._cached = host_offset, None
            else:
                self._cached = host_offset, content
        return self._cached[1]


class MappedDisk:
    """The guest's disk as far as it is placed surely enough: see `evidence.PlacedDisk`.

    Attributes:
        reader: of its pieces.
        parts: guest ranges that told their place themselves, of clusters that as a whole are less sure.
    """

    def __init__(
        self, guest_map: GuestMap, reader: PieceReader, least: Certainty = Certainty.CERTAIN
    ) -> None:
        """Show what ``guest_map`` is so sure of, or surer."""
        self._map, self.reader, self._least = guest_map, reader, least
        self.parts = Ranges()

    @property
    def size(self) -> int:
        """Return the size of the disk in bytes."""
        return self._map.size

    def trusting(self, least: Certainty) -> MappedDisk:
        """Return the same disk as far as it is placed so surely."""
        disk = MappedDisk(self._map, self.reader, least)
        disk.parts = self.parts
        return disk

    def read(self, offset: int, length: int) -> bytes | None:
        """Return a guest range; None if a byte of it is not placed with certainty."""
        if offset < 0 or length < 0 or offset + length > self.size:
            return None
        found = bytearray()
        for piece in self._map.pieces(offset, length):
            is_sure = piece.certainty >= self._least or self.parts.has(piece.guest_offset, piece.length)
            content = self.reader.read(piece) if is_sure else None
            if content is None:
                return None
            found += content
        return bytes(found)
