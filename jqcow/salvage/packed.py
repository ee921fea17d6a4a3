"""Orphans of both kinds: clusters, and the streams of compressed clusters, which have no aligned offset.

A stream is shown at a place of its own behind the end of the file, one cluster after the other in the order
of the streams: so everybody who places clusters places streams, too. Who takes a placement over asks which
stream is meant.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from jqcow.ondisk.layout import round_up
from jqcow.salvage.marks import Bits
from jqcow.salvage.orphans import OrphanClusters
from jqcow.salvage.source import Source
from jqcow.salvage.streams import Stream, StreamOrphans


class PackedPlaces:
    """Where streams are shown."""

    def __init__(self, streams: list[Stream], cluster_bytes: int, file_bytes: int) -> None:
        """Show ``streams`` behind the end of a file of ``file_bytes``."""
        self._streams, self._cluster_bytes = streams, cluster_bytes
        self.start = round_up(file_bytes, cluster_bytes)

    def __iter__(self) -> Iterator[tuple[int, Stream]]:
        """Yield (place, stream) of each."""
        for index, stream in enumerate(self._streams):
            yield self.start + index * self._cluster_bytes, stream

    def at(self, place: int) -> Stream | None:
        """Return the stream that is shown at a place; None where none is."""
        index = (place - self.start) // self._cluster_bytes
        return self._streams[index] if 0 <= index < len(self._streams) else None


class MixedOrphans(OrphanClusters):
    """Clusters and streams that nobody names.

    Attributes:
        packed: where the streams are shown.
    """

    def __init__(
        self, source: Source, cluster_bits: int, bits: Bits, streams: StreamOrphans, file_bytes: int
    ) -> None:
        """Take the clusters in ``bits`` but for those in which streams lie."""
        super().__init__(source, cluster_bits, bits)
        self._contents = streams
        self.packed = PackedPlaces(streams.streams, self.cluster_bytes, file_bytes)
        for stream in streams.streams:
            last = stream.offset + stream.length - 1
            bits.discard_range(stream.offset >> cluster_bits, (last >> cluster_bits) + 1)

    def __len__(self) -> int:
        """Return how many there are."""
        return super().__len__() + len(self._contents)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield (host offset, content) of each that has content; of streams where they are shown."""
        yield from super().__iter__()
        for place, stream in self.packed:
            yield place, self._contents.read(stream.offset)

    def in_file_order(self) -> Iterator[tuple[int, bytes]]:
        """Yield the same by where it lies in the file."""
        streams = ((place, self._contents.read(stream.offset)) for place, stream in self.packed)
        return heapq.merge(super().__iter__(), streams, key=lambda one: self.offset_of(one[0]))

    def offset_of(self, host_offset: int) -> int:
        """Return where in the file what is shown at a host offset begins."""
        stream = self.packed.at(host_offset) if host_offset >= self.packed.start else None
        return host_offset if stream is None else stream.offset

    def read(self, host_offset: int) -> bytes:
        """Return the content of a cluster, or of what is shown there."""
        if host_offset < self.packed.start:
            return super().read(host_offset)
        stream = self.packed.at(host_offset)
        return bytes(self.cluster_bytes) if stream is None else self._contents.read(stream.offset)
