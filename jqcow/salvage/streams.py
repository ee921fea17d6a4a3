"""Compressed clusters that no table names: their streams lie in the file one behind the other.

A stream begins where the one before it ended, at the next sector, or at the start of a cluster, and gives
exactly a cluster: so it tells where it ends, and where the next begins. Behind a damaged one the search goes
on byte by byte, as far as the budget goes.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import zstandard

from jqcow import _native
from jqcow.errors import FormatError, UnsupportedFeatureError
from jqcow.ondisk.compression import COMPRESSION_ZSTD, DEFLATE_WINDOW_BITS_READ, decompress
from jqcow.ondisk.layout import SECTOR_BYTES, round_up
from jqcow.salvage.marks import Bits
from jqcow.salvage.shape import Shape
from jqcow.salvage.source import Source

STREAMS_MAX = 1 << 22
TRIES_MAX = 1 << 17
"""So many places are tried, all in all, that are no start of a cluster or a sector behind a stream."""
CACHE_BYTES = 32 << 20
MIN_STREAM_BYTES = 4
_WINDOW_CLUSTERS = 16
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_RESYNC_MIN_BITS = 12
"""In smaller clusters noise may look like a stream."""


class Stream(NamedTuple):
    """The data of a compressed cluster: ``offset`` in the file and ``length``, in bytes."""

    offset: int
    length: int


def stream_length(data: memoryview, cluster_bytes: int, compression_type: int) -> int:
    """Return how long the stream at the start of ``data`` is, 0 if there is none that gives a cluster."""
    if compression_type == COMPRESSION_ZSTD:
        return _zstd_length(data, cluster_bytes)
    inflating = zlib.decompressobj(-DEFLATE_WINDOW_BITS_READ)
    try:
        content = inflating.decompress(data, cluster_bytes)
        # The end of a stream may come after its last byte of content.
        while not inflating.eof and inflating.unconsumed_tail and len(content) == cluster_bytes:
            left = len(inflating.unconsumed_tail)
            if inflating.decompress(inflating.unconsumed_tail, 1):
                return 0
            if len(inflating.unconsumed_tail) == left:
                return 0
    except zlib.error:
        return 0
    if len(content) != cluster_bytes or not inflating.eof:
        return 0
    return len(data) - len(inflating.unused_data)


def _zstd_length(data: memoryview, cluster_bytes: int) -> int:
    if bytes(data[:4]) != _ZSTD_MAGIC:
        return 0
    try:
        decompress(data, cluster_bytes, COMPRESSION_ZSTD)
        frame = zstandard.ZstdDecompressor().decompressobj()
        content = frame.decompress(data[: 2 * cluster_bytes])
    except (FormatError, UnsupportedFeatureError, zstandard.ZstdError):
        return 0
    # Several frames may give a cluster together; those that are known to write images write one.
    return len(data) - len(frame.unused_data) if frame.eof and len(content) == cluster_bytes else 0


def find_streams(source: Source, shape: Shape, clusters: Bits) -> list[Stream]:
    """Return the streams that begin in some clusters, by offset.

    Args:
        source: the file.
        shape: of it.
        clusters: what nobody names.

    Raises:
        OSError: the host failed, other than by what it cannot read.
    """
    search = _Search(source, shape)
    bits = shape.geometry.cluster_bits
    for first, count in clusters.runs():
        for start, length in source.data_extents(first << bits, count << bits):
            search.look(start - start % shape.geometry.cluster_bytes, start + length)
    return search.found


class _Search:
    """Follows chains of streams."""

    def __init__(self, source: Source, shape: Shape) -> None:
        self._source = source
        self._cluster_bytes = shape.geometry.cluster_bytes
        self._type = shape.area.header.compression_type
        self._tries = TRIES_MAX
        self._window: tuple[int, bytes] = (0, b"")
        self._may_resync = shape.geometry.cluster_bits >= _RESYNC_MIN_BITS
        self.found: list[Stream] = []

    def look(self, start: int, end: int) -> None:
        """Look for streams that begin in [start, end)."""
        if self.found:
            start = max(start, self.found[-1].offset + self.found[-1].length)
        place, is_behind = start, False
        while place < end and len(self.found) < STREAMS_MAX:
            length = self._length_at(place)
            if not length and is_behind:
                length = self._length_at(round_up(place, SECTOR_BYTES))
                place = round_up(place, SECTOR_BYTES) if length else place
            if length:
                self.found.append(Stream(place, length))
                place, is_behind = place + length, True
                continue
            boundary = (place // self._cluster_bytes + 1) * self._cluster_bytes
            limit = min(end, boundary)
            resumed = self._resumed(place + 1, limit) if is_behind and self._may_resync else limit
            is_behind = is_behind and (resumed < limit or self._tries > 0)
            place = resumed

    def _resumed(self, place: int, end: int) -> int:
        """Return where the next stream begins behind a damaged one, or behind the last of a chain."""
        while place < end and self._tries > 0:
            self._tries -= 1
            if self._type == COMPRESSION_ZSTD:
                position = self._bytes_at(place, end - place).find(_ZSTD_MAGIC)
                if position < 0:
                    return end
                place += position
            if self._length_at(place):
                return place
            place += 1
        return end

    def _length_at(self, place: int) -> int:
        data = memoryview(self._bytes_at(place, 2 * self._cluster_bytes))
        if len(data) < MIN_STREAM_BYTES or _native.is_zero(data[:16]):
            return 0
        return stream_length(data, self._cluster_bytes, self._type)

    def _bytes_at(self, place: int, length: int) -> bytes:
        """Return bytes of the file; a window of it is kept, since chains are read in order."""
        length = min(length, self._source.size() - place)
        if length <= 0:
            return b""
        start, data = self._window
        if not start <= place <= place + length <= start + len(data):
            count = max(length, min(_WINDOW_CLUSTERS * self._cluster_bytes, self._source.size() - place))
            self._window = start, data = place, self._source.pread(count, place)
        return data[place - start : place - start + length]


class StreamOrphans:
    """Compressed clusters without a table, as `evidence.Orphans` has clusters; offsets are not aligned."""

    def __init__(self, source: Source, shape: Shape, streams: list[Stream]) -> None:
        """Show ``streams``, which are in the order of their offsets."""
        self._source = source
        self._cluster_bytes = shape.geometry.cluster_bytes
        self._type = shape.area.header.compression_type
        self.streams = streams
        self._offsets = [stream.offset for stream in streams]
        self._cache: OrderedDict[int, bytes] = OrderedDict()

    @property
    def cluster_bytes(self) -> int:
        """Return the length of a cluster in bytes."""
        return self._cluster_bytes

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.streams)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield (host offset, content) of each."""
        for stream in self.streams:
            yield stream.offset, self.read(stream.offset)

    def stored_bytes(self, host_offset: int) -> int:
        """Return how long the data at a host offset is; 0 if no stream begins there."""
        index = bisect_left(self._offsets, host_offset)
        if index == len(self._offsets) or self._offsets[index] != host_offset:
            return 0
        return self.streams[index].length

    def read(self, host_offset: int) -> bytes:
        """Return the cluster whose data begins at a host offset; zeros if it is damaged."""
        content = self._cache.get(host_offset)
        if content is None:
            stored = self._source.pread(self.stored_bytes(host_offset), host_offset)
            try:
                content = decompress(stored, self._cluster_bytes, self._type)
            except (FormatError, UnsupportedFeatureError):
                content = bytes(self._cluster_bytes)
            self._cache[host_offset] = content
            while len(self._cache) * self._cluster_bytes > CACHE_BYTES:
                self._cache.popitem(last=False)
        return content
