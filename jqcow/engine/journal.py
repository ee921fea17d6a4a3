"""The write-ahead journal: appending frames, and finding them again.

The range has two halves, used in turn; an epoch is one filling of a half. Whoever calls `append` places
the barrier that makes the frame durable, then calls `accept`, or `revoke` where anything failed: until
then the frame is ``pending``.

J1. A frame starts at a multiple of 4096 bytes behind the frame before it: no append rewrites a block
    that holds an earlier frame.
J2. An append starts only after the previous frame was accepted (durable) or revoked: only the newest
    frame can be torn.
J3. Sequence numbers never restart; an epoch's frames join without a gap.
J4. The first frame of an epoch starts with the header and declares the epoch before it checkpointed.
J5. What an epoch decodes to, and what it zeroes, is bounded (`decoded_limit`, `zeroed_limit`): so are the
    memory and the time of replay. The writer keeps to the same bounds as the scan.
J6. A revoked frame's first block is overwritten before the next append or barrier: it cannot come back to
    life once a barrier has completed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jqcow.device.base import Device
from jqcow.engine.medium import Medium
from jqcow.errors import CorruptionError
from jqcow.ondisk import frame as frames
from jqcow.ondisk.frame import (
    FRAME_ALIGNMENT,
    EncodedPayload,
    FrameHeader,
    HeaderOperation,
    Operation,
)
from jqcow.ondisk.layout import Geometry
from jqcow.ondisk.root import JournalRange

DECODED_HALVES_MAX = 16
DECODED_BYTES_MAX = 256 << 20
ZEROED_BYTES_MIN = 64 << 20
CHECKED_HALVES_MAX = 8
"""Frames whose CRC is wrong are few in an honest journal; reading them all again and again takes forever."""
SERIAL_MAX = 1 << 63
"""Epochs and sequences stay below this: a writer at one a nanosecond needs three centuries."""
ZERO_CHUNK_BYTES = 1 << 20


def decoded_limit(half_bytes: int) -> int:
    """Return how many bytes the payloads of one epoch may decode to (J5)."""
    return max(half_bytes, min(DECODED_HALVES_MAX * half_bytes, DECODED_BYTES_MAX))


def zeroed_limit(half_bytes: int) -> int:
    """Return how many bytes the zero operations of one epoch may name (J5)."""
    return ZEROED_BYTES_MIN + half_bytes


@dataclass(frozen=True)
class Append:
    """A frame that is being written, or not yet known to be durable. ``offset`` is a host offset."""

    offset: int
    length: int
    sequence: int
    payload: EncodedPayload


class Journal:
    """The journal of a live image, for appending. See the module's invariants."""

    def __init__(self, medium: Medium, extent: JournalRange, epoch: int, sequence: int) -> None:
        """Start with nothing in ``epoch``; ``sequence`` is that of the newest frame before it."""
        self.medium = medium
        self.extent = extent
        self.epoch = epoch
        self.sequence = sequence
        self.position = 0
        self.decoded_bytes = 0
        self.zeroed_bytes = 0
        self.pending: Append | None = None

    @property
    def epoch_is_empty(self) -> bool:
        """True until the first frame of the running epoch was accepted."""
        return self.position == 0

    def has_room(self, payload: EncodedPayload) -> bool:
        """Return True if a frame with this payload fits behind the last one."""
        half_bytes = self.extent.half_bytes
        return (
            self.position + payload.frame_length <= half_bytes
            and payload.decoded_length <= half_bytes
            and self.decoded_bytes + payload.decoded_length <= decoded_limit(half_bytes)
            and self.zeroed_bytes + payload.zeroed_length <= zeroed_limit(half_bytes)
        )

    def append(self, payload: EncodedPayload) -> Append:
        """Write a frame behind the last one. Durable only after the caller's barrier.

        Raises:
            OSError: the write failed; the frame is to be revoked.
        """
        if self.pending is not None:
            raise RuntimeError("the frame before was neither accepted nor revoked")
        frame = frames.frame_payload(payload, self.extent.salt, self.epoch, self.sequence + 1)
        offset = self.extent.half_offset(self.epoch) + self.position
        append = self.pending = Append(offset, len(frame), self.sequence + 1, payload)
        self.medium.pwrite(frame, offset)
        return append

    def accept(self, append: Append) -> None:
        """The frame is durable: the next one goes behind it."""
        position = self.position + append.length
        decoded_bytes = self.decoded_bytes + append.payload.decoded_length
        zeroed_bytes = self.zeroed_bytes + append.payload.zeroed_length
        # No call in between: an exception that comes at any time finds all of this done, or nothing.
        self.sequence, self.position, self.pending = append.sequence, position, None
        self.decoded_bytes, self.zeroed_bytes = decoded_bytes, zeroed_bytes

    def revoke(self, append: Append) -> None:
        """Overwrite the start of a frame that failed, so that it cannot come back to life (J6).

        Where even that fails nobody can tell what replay would find: the image turns read-only.
        """
        if not self.medium.poisoned:
            try:
                self.medium.pwrite(bytes(FRAME_ALIGNMENT), append.offset)
            except OSError:
                self.medium.poisoned = True
                raise
        self.pending = None

    def start_epoch(self) -> None:
        """The running epoch is in its homes: go on in the other half."""
        self.epoch += 1
        self.position = 0
        self.decoded_bytes = 0
        self.zeroed_bytes = 0


def write_range(medium: Medium, extent: JournalRange, epoch: int, live: Sequence[bytes]) -> None:
    """Fill a new range with zeros, then with the live frames of ``epoch`` from the start of its half.

    Zeros are written, not allocated: an append into unwritten extents would make the host's file system
    commit its own journal at every flush.
    """
    zeros = bytes(min(ZERO_CHUNK_BYTES, extent.length))
    for offset in range(extent.offset, extent.end, len(zeros)):
        medium.pwrite(zeros[: extent.end - offset], offset)
    position = extent.half_offset(epoch)
    for frame in live:
        medium.pwrite(frame, position)
        position += len(frame)


@dataclass(frozen=True)
class ScannedFrame:
    """A valid frame of the live epoch. ``offset`` is its host offset; ``raw`` the whole frame."""

    offset: int
    header: FrameHeader
    operations: tuple[Operation, ...]
    raw: bytes


@dataclass(frozen=True)
class TornTail:
    """A frame that was begun and is not whole: it was never acknowledged."""

    offset: int
    epoch: int
    sequence: int
    reason: str


@dataclass(frozen=True)
class Scan:
    """What the journal holds: the frames of the live epoch in order, and what was left out."""

    extent: JournalRange
    epoch: int
    frames: tuple[ScannedFrame, ...]
    stale_frames: int
    torn_tail: TornTail | None

    @property
    def sequence(self) -> int:
        """Sequence of the newest valid frame."""
        return self.frames[-1].header.sequence

    @property
    def decoded_bytes(self) -> int:
        """Length of all payloads of the live epoch, decoded."""
        return sum(frame.header.decoded_length for frame in self.frames)

    @property
    def operations(self) -> Iterator[Operation]:
        """All operations of the live epoch, in the order in which replay applies them."""
        return (operation for frame in self.frames for operation in frame.operations)


@dataclass(frozen=True)
class _Candidate:
    offset: int
    header: FrameHeader


def scan(device: Device | Medium, extent: JournalRange, geometry: Geometry) -> Scan:
    """Find the live epoch: that of the valid frame with the highest (epoch, sequence).

    Args:
        device: only read.
        extent: the journal range that the root names.
        geometry: of the image.

    Raises:
        CorruptionError: no valid frame, or frames of the live epoch that do not join without a gap:
            media damage, where guessing could lose acknowledged data.
        UnsupportedFeatureError: a frame or operation that a newer jqcow wrote.
    """
    if extent.end > device.size():
        raise CorruptionError("journal", extent.offset, "the range lies past the end of the file")
    candidates = [found for half in (0, 1) for found in _valid_frames(device, extent, half)]
    if not candidates:
        raise CorruptionError("journal", extent.offset, "the feature bit is set and there is no valid frame")
    newest = max(candidates, key=lambda found: (found.header.epoch, found.header.sequence))
    epoch = newest.header.epoch
    live = [found for found in candidates if found.header.epoch == epoch]
    _check_joined(extent, epoch, live)
    decoded = _decode(device, extent, geometry, live)
    return Scan(extent, epoch, decoded, len(candidates) - len(live), _torn_tail(device, extent, newest))


def _valid_frames(device: Device | Medium, extent: JournalRange, half: int) -> Iterator[_Candidate]:
    """Yield every frame in a half whose salt and CRC are right."""
    start = extent.half_offset(half)
    content = memoryview(device.pread(extent.half_bytes, start))
    position = torn_bytes = 0
    while position < extent.half_bytes:
        header = FrameHeader.unpack(content[position : position + frames.FRAME_HEADER_BYTES])
        length = FRAME_ALIGNMENT
        if (
            header is not None
            and header.salt == extent.salt
            and header.frame_length <= len(content) - position
        ):
            if frames.crc_matches(content[position : position + header.frame_length]):
                header.check_supported()
                length = header.frame_length
                yield _Candidate(start + position, header)
            else:
                torn_bytes += header.frame_length
                if torn_bytes > CHECKED_HALVES_MAX * extent.half_bytes:
                    raise CorruptionError(
                        "journal", start + position, "it holds too many frames that are torn"
                    )
        position += length


def _check_joined(extent: JournalRange, epoch: int, live: Sequence[_Candidate]) -> None:
    expected_offset = extent.half_offset(epoch)
    expected_sequence = live[0].header.sequence
    for found in live:
        header = found.header
        if (found.offset, header.sequence) != (expected_offset, expected_sequence):
            raise CorruptionError(
                "journal", found.offset, f"epoch {epoch} has a gap before sequence {header.sequence}"
            )
        if header.sequence >= SERIAL_MAX or epoch >= SERIAL_MAX:
            raise CorruptionError("journal frame", found.offset, "its epoch or sequence cannot be counted on")
        if header.checkpointed_epoch != epoch - 1:
            raise CorruptionError("journal frame", found.offset, "checkpointed_epoch is not epoch - 1")
        expected_offset += header.frame_length
        expected_sequence += 1


def _decode(
    device: Device | Medium, extent: JournalRange, geometry: Geometry, live: Sequence[_Candidate]
) -> tuple[ScannedFrame, ...]:
    if sum(found.header.decoded_length for found in live) > decoded_limit(extent.half_bytes):
        raise CorruptionError("journal", extent.offset, "the live epoch decodes to more than a writer logs")
    decoded = []
    zeroed_bytes = 0
    for found in live:
        raw = device.pread(found.header.frame_length, found.offset)
        payload = raw[frames.FRAME_HEADER_BYTES :][: found.header.payload_length]
        operations = frames.decode_operations(
            found.header, payload, geometry, extent.half_bytes, found.offset
        )
        zeroed_bytes += frames.zeroed_length(operations)
        if zeroed_bytes > zeroed_limit(extent.half_bytes):
            raise CorruptionError("journal", extent.offset, "the live epoch zeroes more than a writer logs")
        decoded.append(ScannedFrame(found.offset, found.header, operations, raw))
    first = decoded[0]
    if not first.operations or not isinstance(first.operations[0], HeaderOperation):
        raise CorruptionError("journal frame", first.offset, "an epoch does not start with the header")
    return tuple(decoded)


def _torn_tail(device: Device | Medium, extent: JournalRange, newest: _Candidate) -> TornTail | None:
    """Look where the next frame would start: behind the newest one, or at the start of the other half."""
    epoch, sequence = newest.header.epoch, newest.header.sequence
    behind = newest.offset + newest.header.frame_length
    places = [(extent.half_offset(epoch + 1), epoch + 1)]
    if behind < extent.half_offset(epoch) + extent.half_bytes:
        places.insert(0, (behind, epoch))
    for offset, expected_epoch in places:
        header = FrameHeader.unpack(device.pread(frames.FRAME_HEADER_BYTES, offset))
        if header is None or header.salt != extent.salt:
            continue
        if (header.epoch, header.sequence) == (expected_epoch, sequence + 1):
            reason = "its checksum does not match: the write was cut off"
            return TornTail(offset, header.epoch, header.sequence, reason)
    return None
