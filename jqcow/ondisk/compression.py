"""The streams of compressed clusters (qcow2 specification, "compression_type", "Compressed Clusters").

Type 0 is raw deflate (RFC 1951) with a window of 4 KiB, type 1 is Zstandard (RFC 8878). The descriptor knows
the length of a stream in whole sectors only, so other bytes may follow a stream, and nothing but a full
cluster says that it has ended. What QEMU reads is read here, what it refuses is refused:

- A deflate stream is done when the cluster is full, whether it goes on or not.
- Zstandard frames, skippable ones among them, may follow one another until the cluster is full; the frame
  that fills it must end there. A frame need not tell the size of its content.

ISA-L writes deflate where its package is installed (the extra ``fast``) and no level is asked for: four
times as fast, and some per cent larger than zlib's.

The limits on memory and time are jqcow's own: output stops at the size of a cluster, a Zstandard window has
at most the 8 MiB that RFC 8878 asks every decoder to support, and a cluster has at most 4096 frames.
"""

from __future__ import annotations

import threading
import zlib
from functools import cache
from operator import index
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from jqcow.errors import FormatError, UnsupportedFeatureError

if TYPE_CHECKING:
    import zstandard

COMPRESSION_ZLIB = 0
COMPRESSION_ZSTD = 1

CompressionType = Literal["zlib", "zstd"]
COMPRESSION_TYPES: dict[CompressionType, int] = {"zlib": COMPRESSION_ZLIB, "zstd": COMPRESSION_ZSTD}
"""The header's number of each compression type."""

LEVELS = {COMPRESSION_ZLIB: range(1, 10), COMPRESSION_ZSTD: range(1, 23)}
"""The levels that `compress` takes for each compression type."""

DEFLATE_WINDOW_BITS_WRITTEN = 12
# Readers of whole clusters, QEMU among them, never notice a distance beyond 4 KiB, so such streams exist.
DEFLATE_WINDOW_BITS_READ = 15
DEFLATE_MEMORY_LEVEL = 9
ISAL_LEVEL = 3
"""ISA-L's best. Its levels are others than those of zlib."""
ZSTD_DEFAULT_LEVEL = 3
ZSTD_WINDOW_BYTES_MAX = 8 << 20
ZSTD_FRAMES_MAX = 4096

_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_SKIPPABLE_MAGIC = 0x184D2A50
_ZSTD_SKIPPABLE_MASK = 0xFFFF_FFF0
_ZSTD_SKIPPABLE_HEAD_BYTES = 8
_ZSTD_BLOCK_BYTES_MAX = 128 << 10
# Four bytes can expand to a block of 128 KiB: a piece of the stream gives at most 2 MiB.
_ZSTD_PIECE_BYTES = 64


def compression_type_of(name: CompressionType) -> int:
    """Return the header's number of a compression type.

    Raises:
        ValueError: there is no such type.
    """
    if name not in COMPRESSION_TYPES:
        raise ValueError(f"the compression type must be zlib or zstd, not {name}")
    return COMPRESSION_TYPES[name]


class _Contexts(threading.local):
    """Zstandard contexts, which serve one thread each: making one costs more than a small cluster."""

    def __init__(self) -> None:
        self.decompressor: zstandard.ZstdDecompressor | None = None
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}


def _new_decompressor() -> zstandard.ZstdDecompressor:
    # Not at the head, here and below: most images are not compressed, and are open sooner without it.
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)


_contexts = _Contexts()


def decompress(data: bytes | memoryview, cluster_bytes: int, compression_type: int) -> bytes:
    """Return the content of a compressed cluster.

    Args:
        data: from the first byte of the stream to the end of its last sector; anything may follow the stream.
        cluster_bytes: the size of a cluster, all of which the stream must give.
        compression_type: of the header, 0 (zlib) or 1 (zstd).

    Raises:
        FormatError: the stream is damaged, ends before the cluster is full or, in Zstandard, exceeds it; or
            it needs a dictionary, too large a window or too many frames.
        UnsupportedFeatureError: another compression type.
    """
    if compression_type == COMPRESSION_ZLIB:
        return _inflate(data, cluster_bytes)
    if compression_type == COMPRESSION_ZSTD:
        return _decompress_zstd(data, cluster_bytes)
    raise UnsupportedFeatureError(f"compression type {compression_type}")


def compress(data: bytes | memoryview, compression_type: int, level: int | None = None) -> bytes | None:
    """Return the content of a cluster as a stream, or None where that would not be smaller.

    Args:
        data: the whole cluster.
        compression_type: 0 (zlib) or 1 (zstd).
        level: 1 to 9 for zlib, 1 to 22 for zstd, of which more is smaller and slower; None is 6 and 3, or
            ISA-L instead of zlib where it is installed.

    Raises:
        UnsupportedFeatureError: another compression type.
        ValueError: another level.
    """
    check_level(compression_type, level)
    packed = _deflate(data, level) if compression_type == COMPRESSION_ZLIB else _compress_zstd(data, level)
    return packed if len(packed) < len(data) else None


def check_level(compression_type: int, level: int | None) -> None:
    """Raise what `compress` raises for a type or a level that there is not."""
    if compression_type not in LEVELS:
        raise UnsupportedFeatureError(f"compression type {compression_type}")
    levels = LEVELS[compression_type]
    if level is not None and index(level) not in levels:
        raise ValueError(f"the compression level must be from {levels[0]} to {levels[-1]}, not {level}")


# Deflate


def _deflate(data: bytes | memoryview, level: int | None) -> bytes:
    form = zlib.DEFLATED, -DEFLATE_WINDOW_BITS_WRITTEN, DEFLATE_MEMORY_LEVEL
    isal = _isal() if level is None else None
    stream: Any
    if isal is not None:
        stream = isal.compressobj(ISAL_LEVEL, *form)
    else:
        stream = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION if level is None else level, *form)
    packed: bytes = stream.compress(data) + stream.flush()
    return packed


@cache
def _isal() -> ModuleType | None:
    """Return ISA-L's deflate where it is installed."""
    try:
        from isal import isal_zlib
    except ImportError:
        return None
    found: ModuleType = isal_zlib
    return found


def _inflate(data: bytes | memoryview, cluster_bytes: int) -> bytes:
    stream = zlib.decompressobj(-DEFLATE_WINDOW_BITS_READ)
    try:
        content = stream.decompress(data, cluster_bytes)
    except zlib.error as error:
        raise FormatError(f"a compressed cluster is damaged: {error}") from error
    if len(content) < cluster_bytes:
        raise _too_short(len(content), cluster_bytes)
    return content


def _too_short(length: int, cluster_bytes: int) -> FormatError:
    return FormatError(
        f"the stream of a compressed cluster ends early: {length} bytes instead of {cluster_bytes}"
    )


# Zstandard


def _compress_zstd(data: bytes | memoryview, level: int | None) -> bytes:
    level = ZSTD_DEFAULT_LEVEL if level is None else level
    compressor = _contexts.compressors.get(level)
    if compressor is None:
        import zstandard

        compressor = _contexts.compressors[level] = zstandard.ZstdCompressor(level=level)
    return compressor.compress(data)


def _decompress_zstd(data: bytes | memoryview, cluster_bytes: int) -> bytes:
    import zstandard

    data = memoryview(data)
    try:
        content = _whole_frame(data, cluster_bytes)
        return content if content is not None else _joined_frames(data, cluster_bytes)
    except zstandard.ZstdError as error:
        raise FormatError(f"a compressed cluster is damaged: {error}") from error


def _whole_frame(data: memoryview, cluster_bytes: int) -> bytes | None:
    """Return the content of the first frame if it is a cluster; None if more frames must join it."""
    if int.from_bytes(data[:4], "little") != _ZSTD_MAGIC:
        return None
    known_bytes = _checked_content_bytes(data, cluster_bytes)
    if known_bytes is not None and known_bytes < cluster_bytes:
        return None
    content = _decompressed_at_once(data, cluster_bytes)
    return content if len(content) == cluster_bytes else None


def _decompressed_at_once(data: memoryview, room_bytes: int) -> bytes:
    """Return the content of the first frame, which fits."""
    if _contexts.decompressor is None:
        _contexts.decompressor = _new_decompressor()
    return _contexts.decompressor.decompress(data, max_output_size=room_bytes, allow_extra_data=True)


def _checked_content_bytes(data: memoryview, room_bytes: int) -> int | None:
    """Return the size that the frame's header tells, or None; refuse what no cluster needs."""
    import zstandard

    parameters = zstandard.get_frame_parameters(data)
    if parameters.dict_id:
        raise FormatError(f"a compressed cluster needs the Zstandard dictionary {parameters.dict_id}")
    if parameters.window_size > ZSTD_WINDOW_BYTES_MAX:
        raise FormatError(
            f"a compressed cluster needs a Zstandard window of {parameters.window_size} bytes, "
            f"more than {ZSTD_WINDOW_BYTES_MAX}"
        )
    if parameters.content_size == zstandard.CONTENTSIZE_UNKNOWN:
        return None
    if parameters.content_size > room_bytes:
        raise _too_long()
    return int(parameters.content_size)


def _too_long() -> FormatError:
    return FormatError("a Zstandard frame exceeds the cluster that it is the content of")


def _joined_frames(data: memoryview, cluster_bytes: int) -> bytes:
    """Return a cluster of several frames."""
    content = bytearray()
    for _ in range(ZSTD_FRAMES_MAX):
        if len(content) == cluster_bytes:
            return bytes(content)
        if not data:
            raise _too_short(len(content), cluster_bytes)
        magic = int.from_bytes(data[:4], "little")
        if magic & _ZSTD_SKIPPABLE_MASK == _ZSTD_SKIPPABLE_MAGIC:
            data = data[_ZSTD_SKIPPABLE_HEAD_BYTES + int.from_bytes(data[4:8], "little") :]
        else:
            frame, data = _frame_by_pieces(data, cluster_bytes - len(content))
            content += frame
    raise FormatError(f"a compressed cluster is cut into more than {ZSTD_FRAMES_MAX} Zstandard frames")


def _frame_by_pieces(data: memoryview, room_bytes: int) -> tuple[bytes, memoryview]:
    """Return the content of the first frame, and what follows the frame."""
    known_bytes = _checked_content_bytes(data, room_bytes)
    if known_bytes:
        # Where a frame tells its size QEMU's library decodes it at once, and refuses more than in pieces:
        # compressed blocks of no bytes.
        _decompressed_at_once(data, known_bytes)
    frame = _new_decompressor().decompressobj(write_size=min(room_bytes, _ZSTD_BLOCK_BYTES_MAX))
    content = bytearray()
    for start in range(0, len(data), _ZSTD_PIECE_BYTES):
        end = min(start + _ZSTD_PIECE_BYTES, len(data))
        content += frame.decompress(data[start:end])
        if len(content) > room_bytes:
            raise _too_long()
        if frame.eof:
            return bytes(content), data[end - len(frame.unused_data) :]
    raise FormatError("the stream of a compressed cluster ends early, inside a Zstandard frame")
