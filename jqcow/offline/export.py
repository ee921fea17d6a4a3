"""A disk as chunks of one length, each under the hash of its content: what two exports share is there once.

A directory holds ``chunks/ab/abcd...``, named by SHA-256, and for each export an index ``NAME.json``: the
size of the disk, the length of chunks, and in order the hash of each, or null for zeros. The last chunk is
as long as what is left of the disk. Chunks start at multiples of their length in the disk, so a change
within a disk changes only the chunks it lies in. Files are plain bytes: any program can read them, and
store them its way.

XP1. A chunk gets its name when it is whole and durable, and the index when all its chunks are: whatever cuts
    an export off, each index in the directory tells of a whole disk.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jqcow import _native
from jqcow.device.disk import Disk, Extent
from jqcow.device.file import FileDevice
from jqcow.device.names import sync_directory
from jqcow.disks.chain import open_disk
from jqcow.disks.files import Source
from jqcow.disks.policy import NOT_FOLLOWING, Following
from jqcow.errors import CorruptionError, FormatError
from jqcow.offline.compare import Progress, windows
from jqcow.offline.losses import refuse_lost_data
from jqcow.ondisk import layout
from jqcow.ondisk.naming import DiskFormat

FORMAT = "jqcow chunks 1"
CHUNK_BYTES = 1 << 20
MIN_CHUNK_BYTES = 4096
MAX_CHUNK_BYTES = 64 << 20
_HASH_LENGTH = 64
_INDEX_BYTES_MAX = 1 << 30


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        index: path of the index.
        virtual_size: of the disk, in bytes.
        chunk_bytes: length of a chunk.
        chunk_count: chunks that are not zeros.
        new_chunk_count: those that were not in the directory before.
        new_bytes: what these take.
    """

    index: str
    virtual_size: int
    chunk_bytes: int
    chunk_count: int
    new_chunk_count: int
    new_bytes: int


@dataclass(frozen=True)
class Index:
    """What an index says; ``chunks`` has the hash of each chunk in hexadecimal digits, None for zeros."""

    virtual_size: int
    chunk_bytes: int
    chunks: tuple[str | None, ...]


def export(
    source: Source,
    directory: str | os.PathLike[str],
    name: str,
    *,
    source_format: DiskFormat | None = None,
    snapshot: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    following: Following = NOT_FOLLOWING,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Write a disk into a directory of chunks, durably.

    Args:
        source: the image or raw file.
        directory: made where it does not exist; it may hold other exports.
        name: of this export, without ``.json``; it must be new.
        source_format: None tells it by the magic.
        snapshot: id or name of an internal snapshot to export instead of the disk.
        chunk_bytes: a power of two from 4 KiB to 64 MiB.
        following: how names inside the image are followed.
        progress: called with the bytes of the disk that are done, and all of them.

    Raises:
        ValueError: another length of chunks, or a name that is no plain name.
        FileExistsError: there is an index of this name.
        JqcowError: the disk cannot be read.
        OSError: the host failed; chunks may be there that no index names.
    """
    if chunk_bytes & chunk_bytes - 1 or not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(f"chunks are of a power of two from 4 KiB to 64 MiB, not of {chunk_bytes} bytes")
    if not name or name.startswith(".") or "/" in name:
        raise ValueError(f"{name!r} is no plain name for an export")
    store = Path(directory)
    (store / "chunks").mkdir(parents=True, exist_ok=True)
    index = store / f"{name}.json"
    if os.path.lexists(index):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(index))
    with closing(open_disk(source, source_format, snapshot=snapshot, following=following)) as chain:
        refuse_lost_data(chain.layers)
        writing = _Writing(store, chunk_bytes)
        chunks = list(writing.chunks(chain, progress))
        size = chain.size
    writing.sync()
    text = json.dumps({"format": FORMAT, "size": size, "chunk-size": chunk_bytes, "chunks": chunks})
    _publish(index, text.encode("ascii"))
    found = [chunk for chunk in chunks if chunk is not None]
    return ExportReport(str(index), size, chunk_bytes, len(found), writing.new_chunk_count, writing.new_bytes)


class _Writing:
    """Writes chunks into their directory."""

    def __init__(self, store: Path, chunk_bytes: int) -> None:
        self._store = store / "chunks"
        self._chunk_bytes = chunk_bytes
        self._touched: set[Path] = set()
        self.new_chunk_count = self.new_bytes = 0

    def chunks(self, disk: Disk, progress: Progress) -> Iterator[str | None]:
        """Yield the name of each chunk, None for zeros, when it is there."""
        buffer = memoryview(bytearray(self._chunk_bytes))
        reached = 0
        progress(0, disk.size)
        for offset, length in windows(disk, self._chunk_bytes, self._chunk_bytes):
            yield from [None] * ((offset - reached) // self._chunk_bytes)
            data = buffer[:length]
            disk.read_into(data, offset)
            yield None if _native.is_zero(data) else self._put(data)
            reached = offset + length
            progress(reached, disk.size)
        yield from [None] * -(-(disk.size - reached) // self._chunk_bytes)
        progress(disk.size, disk.size)

    def _put(self, data: memoryview) -> str:
        name = hashlib.sha256(data).hexdigest()
        path = chunk_path(self._store, name)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            _publish(path, data)
            self.new_chunk_count += 1
            self.new_bytes += len(data)
        return name

    def sync(self) -> None:
        """Make the names of the chunks' directories durable."""
        sync_directory(str(self._store))
        sync_directory(str(self._store.parent))


def chunk_path(chunks: Path, name: str) -> Path:
    """Return where a chunk lies in the directory of all."""
    return chunks / name[:2] / name


def _publish(path: Path, data: bytes | memoryview) -> None:
    """Write a file that gets its name when it is durable (XP1)."""
    with closing(FileDevice.create_temporary(path)) as file:
        file.pwrite(data, 0)
        try:
            file.publish(False)
        except FileExistsError:
            # Another export was faster with the same chunk.
            if path.suffix == ".json":
                raise


def read_index(path: str | os.PathLike[str]) -> Index:
    """Read an index.

    Raises:
        FormatError: it is none, or says what no export writes.
        OSError: the host failed.
    """
    with closing(FileDevice.open(path, writable=False)) as file:
        if file.size() > _INDEX_BYTES_MAX:
            raise FormatError(f"{os.fspath(path)} is too long for an index")
        text = file.pread(file.size(), 0)
    try:
        found = json.loads(text)
        index = _index_of(found)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"{os.fspath(path)} is no index of an export: {error}") from error
    return index


def _index_of(found: Any) -> Index:
    if found["format"] != FORMAT:
        raise ValueError(f"the format is {found['format']!r}")
    size, chunk_bytes, chunks = found["size"], found["chunk-size"], found["chunks"]
    if type(size) is not int or size < 0 or size % layout.SECTOR_BYTES:
        raise ValueError(f"the size is {size!r}")
    if type(chunk_bytes) is not int or not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise ValueError(f"the length of chunks is {chunk_bytes!r}")
    if type(chunks) is not list or len(chunks) != -(-size // chunk_bytes):
        raise ValueError("the chunks are not those of the disk")
    for chunk in chunks:
        if chunk is not None and not (len(chunk) == _HASH_LENGTH and set(chunk) <= set("0123456789abcdef")):
            raise ValueError(f"{chunk!r} is no hash")
    return Index(size, chunk_bytes, tuple(chunks))


class ExportedDisk(Disk):
    """The disk of an export, read from its chunks, whose hashes are checked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the index at ``path``; its chunks lie beside it.

        Raises:
            FormatError, OSError: as `read_index`.
        """
        self._index = read_index(path)
        self._chunks = Path(path).parent / "chunks"

    @property
    def size(self) -> int:
        """Size of the disk."""
        return self._index.virtual_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``.

        Raises:
            CorruptionError: a chunk is not what its name says.
            OSError: a chunk is not there, or the host failed.
        """
        done = 0
        while done < len(buffer):
            index, within = divmod(offset + done, self._index.chunk_bytes)
            data = self._chunk(index)[within : within + len(buffer) - done]
            buffer[done : done + len(data)] = data
            done += len(data)

    def _chunk(self, index: int) -> bytes:
        start = index * self._index.chunk_bytes
        length = min(self._index.chunk_bytes, self.size - start)
        name = self._index.chunks[index]
        if name is None:
            return bytes(length)
        with closing(FileDevice.open(chunk_path(self._chunks, name), writable=False)) as file:
            data = file.pread(length, 0)
            if file.size() != length or hashlib.sha256(data).hexdigest() != name:
                raise CorruptionError("chunk", 0, f"{name} does not hold what its name says")
        return data

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield chunks and zeros."""
        position, end = offset, offset + length
        while position < end:
            index = position // self._index.chunk_bytes
            stop = min(end, (index + 1) * self._index.chunk_bytes)
            is_zero = self._index.chunks[index] is None
            yield Extent(position, stop - position, "zero" if is_zero else "data", None)
            position = stop

    def close(self) -> None:
        """Nothing is open between two reads."""
