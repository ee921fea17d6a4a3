"""Journal frames: one checksummed record of metadata changes, and of guest writes that wait to be done.

A frame is a fixed header, a payload and zero padding up to a multiple of 4096 bytes. Big-endian::

    Byte   0 -   7:   magic, "jqcowFRM"
           8 -   9:   version, 1
                10:   encoding of the payload, 0: MessagePack, 1: MessagePack in one zstd frame
                11:   flags, 0
          12 -  15:   CRC-32C of the whole frame, padding included, with this field zero
          16 -  31:   salt of the journal
          32 -  39:   epoch: one filling of a half
          40 -  47:   sequence, one more than that of the frame before it; never restarts
          48 -  55:   checkpointed_epoch: all records up to this epoch are in their homes; epoch - 1
          56 -  59:   payload_length in bytes, as stored
          60 -  63:   decoded_length in bytes of the payload when decompressed; at most the half's length

The decoded payload is a MessagePack array of operations, applied in order. Each is an array::

    [1, host offset, bytes]   block: the whole metadata block at this offset, min(4096, cluster size) bytes
    [2, host offset, length]  zero: this range of blocks, within one cluster, reads as zeros
    [3, bytes]                header: all used header bytes in standard layout
    [4, sequence, guest offset, bytes]   intent: these sectors were written; sequence of its first record
    [5, sequence]             done: what intents up to this sequence tell is in its place

I6. No frame has the magic of frames in the data of an intent: where a scan looks into a torn frame, or into
    what is left of an older one, no guest's bytes pass for a frame.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jqcow import _native
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk.layout import SECTOR_BYTES, Geometry
from jqcow.ondisk.root import MAX_LIVE_HEADER_BYTES, SALT_BYTES

if TYPE_CHECKING:
    import zstandard

FRAME_STRUCT = struct.Struct(">8sHBBI16sQQQII")
FRAME_HEADER_BYTES = 64
if FRAME_STRUCT.size != FRAME_HEADER_BYTES:
    raise RuntimeError("the frame header does not have its documented size")
FRAME_MAGIC = b"jqcowFRM"
FRAME_VERSION = 1
FRAME_ALIGNMENT = 4096
CRC_OFFSET = 12

ENCODING_PLAIN = 0
ENCODING_ZSTD = 1
ZSTD_LEVEL = 1

KIND_BLOCK = 1
KIND_ZERO = 2
KIND_HEADER = 3
KIND_INTENT = 4
KIND_DONE = 5
KINDS = range(KIND_BLOCK, KIND_DONE + 1)

ITEM_LENGTH_MAX = 4
_MANY = 256
"""A record of more operations is encoded in parts."""
INTENT_BYTES_MAX = 32
"""Bytes that an intent takes in a payload beside its data, at most."""
_SCALAR_BYTES = {*range(0x80), *range(0xC4, 0xC7), *range(0xCC, 0xD4), *range(0xE0, 0x100)}
"""First bytes of numbers and of byte strings (MessagePack specification, "Formats")."""


@dataclass(frozen=True, slots=True)
class BlockOperation:
    """The whole metadata block at ``offset`` (host, bytes) is ``data``."""

    offset: int
    data: bytes | bytearray


@dataclass(frozen=True, slots=True)
class ZeroOperation:
    """The blocks in ``length`` bytes at host ``offset`` read as zeros; within one cluster."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class HeaderOperation:
    """The header in standard layout is ``data``: all its used bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class IntentOperation:
    """The guest wrote ``data``, whole sectors, at ``offset`` (guest, bytes): a later record does the write.

    ``sequence`` is that of the record which was the first to say so: a copy of the intent keeps it.
    """

    sequence: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class DoneOperation:
    """The writes of all intents up to ``sequence`` are done, durably."""

    sequence: int


Operation = BlockOperation | ZeroOperation | HeaderOperation | IntentOperation | DoneOperation
_Damage = Callable[[str], CorruptionError]


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fixed header of a frame, without magic and CRC."""

    version: int
    encoding: int
    flags: int
    salt: bytes
    epoch: int
    sequence: int
    checkpointed_epoch: int
    payload_length: int
    decoded_length: int

    @property
    def frame_length(self) -> int:
        """Bytes that the frame takes in the journal."""
        return layout.round_up(FRAME_HEADER_BYTES + self.payload_length, FRAME_ALIGNMENT)

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> FrameHeader | None:
        """Read a frame header; None where there is no frame magic.

        Nothing else is checked: first the CRC must say that jqcow wrote these bytes.
        """
        if len(data) < FRAME_HEADER_BYTES or bytes(data[:8]) != FRAME_MAGIC:
            return None
        _, version, encoding, flags, _, *rest = FRAME_STRUCT.unpack_from(data)
        return cls(version, encoding, flags, *rest)

    def check_supported(self) -> None:
        """Raise UnsupportedFeatureError for a frame of another version, encoding or with flags."""
        if self.version != FRAME_VERSION or self.flags or self.encoding > ENCODING_ZSTD:
            raise UnsupportedFeatureError(
                f"journal frame version {self.version}, encoding {self.encoding}, flags {self.flags:#x}"
            )

    def pack(self, payload: bytes) -> bytes:
        """Return the whole frame around ``payload``: header, CRC and padding."""
        fixed = FRAME_STRUCT.pack(
            FRAME_MAGIC,
            self.version,
            self.encoding,
            self.flags,
            0,
            self.salt,
            self.epoch,
            self.sequence,
            self.checkpointed_epoch,
            self.payload_length,
            self.decoded_length,
        )
        frame = bytearray(self.frame_length)
        frame[:FRAME_HEADER_BYTES] = fixed
        frame[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + len(payload)] = payload
        frame[CRC_OFFSET : CRC_OFFSET + 4] = _native.crc32c(frame).to_bytes(4, "big")
        return bytes(frame)


@dataclass(frozen=True, slots=True)
class EncodedPayload:
    """A payload ready to be framed; lengths in bytes. ``zeroed_length`` is what its zero operations name."""

    encoding: int
    data: bytes
    decoded_length: int
    zeroed_length: int = 0

    @property
    def frame_length(self) -> int:
        """Bytes that a frame with this payload takes."""
        return layout.round_up(FRAME_HEADER_BYTES + len(self.data), FRAME_ALIGNMENT)


def crc_matches(parts: Iterable[bytes | memoryview]) -> bool:
    """Return True if the CRC-32C in a frame is right. It comes in parts, the first one with its header."""
    stored = crc = -1
    for part in parts:
        if stored < 0:
            stored = int.from_bytes(part[CRC_OFFSET : CRC_OFFSET + 4], "big")
            crc = _native.crc32c(b"\0\0\0\0", _native.crc32c(part[:CRC_OFFSET]))
            crc = _native.crc32c(part[CRC_OFFSET + 4 :], crc)
        else:
            crc = _native.crc32c(part, crc)
    return crc == stored


def may_be_intent(data: bytes) -> bool:
    """Return True if bytes that a guest wrote may stand in a frame (I6)."""
    return FRAME_MAGIC not in data


def encode_operations(operations: Sequence[Operation]) -> EncodedPayload:
    """Encode operations as a payload, compressed where that is shorter; never where intents are among them.

    What a compressor makes of a guest's bytes nobody chose: it might look like a frame (I6).
    """
    zeroed = zeroed_length(operations)
    if any(isinstance(operation, IntentOperation) for operation in operations):
        plain = b"".join(_packed_parts(operations))
        return EncodedPayload(ENCODING_PLAIN, plain, len(plain), zeroed)
    if len(operations) > _MANY:
        length = decoded_length(operations)
        packed = _compressed_parts(operations, length)
        plain = b"" if len(packed) < length else b"".join(_packed_parts(operations))
    else:
        plain = b"".join(_packed_parts(operations))
        length, packed = len(plain), _compressors.compressor.compress(plain)
    if len(packed) < length:
        return EncodedPayload(ENCODING_ZSTD, packed, length, zeroed)
    return EncodedPayload(ENCODING_PLAIN, plain, length, zeroed)


def decoded_length(operations: Sequence[Operation]) -> int:
    """Return how many bytes the payload with these operations takes before it is compressed."""
    return sum(map(len, _packed_parts(operations)))


def _packed_parts(operations: Sequence[Operation]) -> Iterator[bytes]:
    """Yield a payload in parts. A change of all tables is too large to be in memory once more as a whole."""
    import msgpack

    if len(operations) <= _MANY:
        yield msgpack.packb([_as_list(operation) for operation in operations], use_bin_type=True)
        return
    packer = msgpack.Packer(use_bin_type=True)
    yield packer.pack_array_header(len(operations))
    for operation in operations:
        yield packer.pack(_as_list(operation))


def _compressed_parts(operations: Sequence[Operation], length: int) -> bytes:
    stream = _compressors.compressor.compressobj(size=length)
    parts = [packed for part in _packed_parts(operations) if (packed := stream.compress(part))]
    return b"".join([*parts, stream.flush()])


class _Compressors(threading.local):
    """A compressor is not for two threads at a time, and costs more to make than most records to compress."""

    def __init__(self) -> None:
        self.made: zstandard.ZstdCompressor | None = None

    @property
    def compressor(self) -> zstandard.ZstdCompressor:
        if self.made is None:
            # Not at the head, here and below: a clean image that is only read has no frames.
            import zstandard

            self.made = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True)
        return self.made


_compressors = _Compressors()


def zeroed_length(operations: Sequence[Operation]) -> int:
    """Return how many bytes the zero operations among these name."""
    return sum(operation.length for operation in operations if isinstance(operation, ZeroOperation))


def _as_list(operation: Operation) -> list[int | bytes | bytearray]:
    match operation:
        case BlockOperation(offset, data):
            return [KIND_BLOCK, offset, data]
        case ZeroOperation(offset, length):
            return [KIND_ZERO, offset, length]
        case HeaderOperation(data):
            return [KIND_HEADER, data]
        case IntentOperation(sequence, offset, data):
            return [KIND_INTENT, sequence, offset, data]
        case DoneOperation(sequence):
            return [KIND_DONE, sequence]


def frame_payload(payload: EncodedPayload, salt: bytes, epoch: int, sequence: int) -> bytes:
    """Return the whole frame, ready to be written."""
    header = FrameHeader(
        version=FRAME_VERSION,
        encoding=payload.encoding,
        flags=0,
        salt=salt,
        epoch=epoch,
        sequence=sequence,
        checkpointed_epoch=epoch - 1,
        payload_length=len(payload.data),
        decoded_length=payload.decoded_length,
    )
    return header.pack(payload.data)


def reframe(frame: bytes, salt: bytes) -> bytes:
    """Return a valid frame's copy under another salt, for a journal that moves."""
    copy = bytearray(frame)
    copy[16 : 16 + SALT_BYTES] = salt
    copy[CRC_OFFSET : CRC_OFFSET + 4] = bytes(4)
    copy[CRC_OFFSET : CRC_OFFSET + 4] = _native.crc32c(copy).to_bytes(4, "big")
    return bytes(copy)


def decode_operations(
    header: FrameHeader,
    payload: bytes | memoryview,
    geometry: Geometry,
    limit_bytes: int,
    offset: int,
    *,
    zeroed_limit_bytes: int,
) -> tuple[Operation, ...]:
    """Decode the payload of a frame whose CRC was right.

    Args:
        header: the frame's header.
        payload: ``payload_length`` bytes.
        geometry: of the image; blocks must have its block size.
        limit_bytes: the most that a decoded payload may take (the half's length).
        offset: host offset of the frame, for error messages.
        zeroed_limit_bytes: the most that its zero operations may name.

    Raises:
        CorruptionError: the payload is not a list of operations that jqcow would write.
        UnsupportedFeatureError: an operation of an unknown kind.
    """

    def damaged(detail: str) -> CorruptionError:
        return CorruptionError("journal frame", offset, detail)

    if header.decoded_length > limit_bytes:
        raise damaged(f"a payload of {header.decoded_length} bytes exceeds the half")
    plain = _decompress(payload, header.decoded_length, damaged) if header.encoding else payload
    if len(plain) != header.decoded_length:
        raise damaged("the payload's length is not the declared one")
    operations: list[Operation] = []
    header_count = zeroed_bytes = 0
    for item in _items(plain, damaged):
        operation = _as_operation(item, geometry, header, damaged)
        header_count += isinstance(operation, HeaderOperation)
        zeroed_bytes += operation.length if isinstance(operation, ZeroOperation) else 0
        if header_count > 1 or zeroed_bytes > zeroed_limit_bytes:
            raise damaged("it has more headers, or zeroes more, than a writer logs")
        operations.append(operation)
    return tuple(operations)


def _items(plain: bytes | memoryview, damaged: _Damage) -> Iterator[list[int | bytes]]:
    """Yield the arrays of a payload one by one: a hostile one must not become millions of objects.

    A writer's items have numbers and bytes in them, and nothing that could hold more.
    """
    import msgpack

    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(plain)))
    unpacker.feed(plain)
    try:
        for _ in range(unpacker.read_array_header()):
            item: list[int | bytes] = []
            for _ in range(unpacker.read_array_header()):
                if not _is_scalar(plain[unpacker.tell() : unpacker.tell() + 1]):
                    raise damaged("an operation of the wrong shape")
                item.append(unpacker.unpack())
                if item[0] not in KINDS or len(item) > ITEM_LENGTH_MAX:
                    break
            yield item
    except (ValueError, msgpack.UnpackException) as error:
        raise damaged(f"the payload is not a list of operations in MessagePack: {error}") from error
    if unpacker.tell() != len(plain):
        raise damaged("the payload goes on behind its operations")


def _is_scalar(first_byte: bytes | memoryview) -> bool:
    """Return True if a number, or bytes, begin with this byte."""
    return bool(first_byte) and first_byte[0] in _SCALAR_BYTES


def _decompress(payload: bytes | memoryview, length: int, damaged: _Damage) -> bytes:
    """Decompress into at most ``length`` bytes, whatever the zstd frame claims."""
    import zstandard

    try:
        parameters = zstandard.get_frame_parameters(payload)
        if parameters.content_size != length:
            raise damaged("the zstd frame's content size is not the declared one")
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=length)
    except zstandard.ZstdError as error:
        raise damaged(f"the payload does not decompress: {error}") from error


def _as_operation(item: object, geometry: Geometry, header: FrameHeader, damaged: _Damage) -> Operation:
    match item:
        case [4, int(), int(), bytes()] | [5, int()]:
            return _as_promise(item, header, damaged)
        case [1, int(offset), bytes(data)]:
            aligned = offset % geometry.block_bytes == 0 and len(data) == geometry.block_bytes
            if not aligned or not geometry.cluster_bytes <= offset < layout.MAX_HOST_OFFSET:
                raise damaged(f"a block operation at {offset:#x} of {len(data)} bytes")
            return BlockOperation(offset, data)
        case [2, int(offset), int(length)]:
            aligned = offset % geometry.block_bytes == 0 and length % geometry.block_bytes == 0
            inside = 0 < length <= geometry.cluster_bytes - offset % geometry.cluster_bytes
            if not aligned or not inside or not geometry.cluster_bytes <= offset < layout.MAX_HOST_OFFSET:
                raise damaged(f"a zero operation at {offset:#x} of {length} bytes")
            return ZeroOperation(offset, length)
        case [3, bytes(data)]:
            if len(data) > MAX_LIVE_HEADER_BYTES:
                raise damaged(f"a header of {len(data)} bytes")
            return HeaderOperation(data)
        case [int(kind), *_] if kind not in KINDS:
            raise UnsupportedFeatureError(f"journal operation of kind {kind}")
    raise damaged("an operation of the wrong shape")


def _as_promise(item: object, header: FrameHeader, damaged: _Damage) -> IntentOperation | DoneOperation:
    """Return what a record says of guest writes."""
    match item:
        case [4, int(sequence), int(offset), bytes(data)]:
            is_plain = header.encoding == ENCODING_PLAIN and may_be_intent(data)
            aligned = offset >= 0 and offset % SECTOR_BYTES == 0 and len(data) % SECTOR_BYTES == 0
            if not aligned or not data or not is_plain or not 0 < sequence <= header.sequence:
                raise damaged(f"an intent of {len(data)} bytes at {offset:#x}")
            return IntentOperation(sequence, offset, data)
        case [5, int(sequence)]:
            if not 0 < sequence < header.sequence:
                raise damaged(f"intents up to record {sequence} are done in record {header.sequence}")
            return DoneOperation(sequence)
    raise damaged("an operation of the wrong shape")
