"""Compressed clusters for an image under construction, made by a few threads.

zlib and Zstandard work without the interpreter's lock. The clusters reach the image in the order in which
they came, whatever thread is done first, so the number of threads changes no byte of the file.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jqcow.offline.build import ImageBuilder
from jqcow.ondisk.compression import CompressionType, check_level, compress, compression_type_of
from jqcow.ondisk.layout import SECTOR_BYTES, round_up

if TYPE_CHECKING:
    from concurrent.futures import Future

BATCH_BYTES = 256 << 10
THREADS_MAX = 8
BATCHES_PER_THREAD = 2
"""Done or being done: enough that no thread waits while the image is written, and the bound of memory."""


@dataclass(frozen=True)
class Compression:
    """How clusters are compressed; ``level`` None is the library's default.

    Raises:
        ValueError: there is no such type, or it has no such level.
    """

    type: CompressionType = "zlib"
    level: int | None = None

    def __post_init__(self) -> None:
        """Check the values, which may come from a command line."""
        check_level(self.number, self.level)

    @property
    def number(self) -> int:
        """The header's ``compression_type``."""
        return compression_type_of(self.type)


@dataclass(frozen=True)
class _Batch:
    """Clusters in a row, and the streams that are to come of them: None where one saves no sector."""

    offset: int
    data: bytes
    streams: Future[list[bytes | None]]


class CompressingWriter:
    """Writes clusters into an `ImageBuilder`, compressed where that saves space.

    Attributes:
        compressed_bytes: of the disk, in clusters that were stored compressed.
        packed_bytes: what these take in the file.
    """

    def __init__(
        self, builder: ImageBuilder, compression: Compression, thread_count: int | None = None
    ) -> None:
        """Start the threads; by default as many as there are processors to run on, and at most 8."""
        count = min(len(os.sched_getaffinity(0)), THREADS_MAX) if thread_count is None else thread_count
        self.compressed_bytes = 0
        self.packed_bytes = 0
        self._builder = builder
        self._compression = compression
        from concurrent.futures import ThreadPoolExecutor

        self._threads = ThreadPoolExecutor(count, thread_name_prefix="jqcow-compress")
        self._batches_max = BATCHES_PER_THREAD * count
        self._batches: deque[_Batch] = deque()

    def write(self, data: memoryview, offset: int) -> None:
        """Take whole clusters from ``offset`` on, as `ImageBuilder.write` does; they are copied."""
        step = max(BATCH_BYTES, self._builder.cluster_bytes)
        for start in range(0, len(data), step):
            while len(self._batches) >= self._batches_max:
                self._write_oldest()
            batch = bytes(data[start : start + step])
            streams = self._threads.submit(_streams, batch, self._builder.cluster_bytes, self._compression)
            self._batches.append(_Batch(offset + start, batch, streams))

    def flush(self) -> None:
        """Wait for all clusters, and give them to the builder."""
        while self._batches:
            self._write_oldest()

    def close(self) -> None:
        """End the threads; what was not flushed is dropped."""
        self._threads.shutdown(cancel_futures=True)

    def _write_oldest(self) -> None:
        batch = self._batches.popleft()
        content, cluster_bytes = memoryview(batch.data), self._builder.cluster_bytes
        for index, stream in enumerate(batch.streams.result()):
            cluster = content[index * cluster_bytes : (index + 1) * cluster_bytes]
            offset = batch.offset + index * cluster_bytes
            if stream is None:
                self._builder.write(cluster, offset)
            else:
                self._builder.write_compressed(stream, offset)
                self.compressed_bytes += len(cluster)
                self.packed_bytes += round_up(len(stream), SECTOR_BYTES)


def _streams(data: bytes, cluster_bytes: int, compression: Compression) -> list[bytes | None]:
    """Return the stream of each cluster, None where it would take no fewer sectors than the cluster."""
    streams: list[bytes | None] = []
    for start in range(0, len(data), cluster_bytes):
        # A stream gives a whole cluster, also of the disk's last one, which may be shorter.
        cluster = data[start : start + cluster_bytes].ljust(cluster_bytes, b"\0")
        stream = compress(cluster, compression.number, compression.level)
        is_worth_it = stream is not None and round_up(len(stream), SECTOR_BYTES) < cluster_bytes
        streams.append(stream if is_worth_it else None)
    return streams
