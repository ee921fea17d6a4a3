"""The write-ahead journal: appending frames. `jqcow.engine.scan` finds them again.

The range has two halves, used in turn; an epoch is one filling of a half. Whoever calls `append` places
the barrier that makes the frame durable, then calls `accept`, or `revoke` where anything failed: until
then the frame is pending.

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
J7. No part of a live range is given back that a crash state may replay (`dead_parts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jqcow.engine.medium import Medium
from jqcow.engine.scan import DECODED_HALVES_MAX, ZEROED_BYTES_MIN, Scan, decoded_limit, zeroed_limit
from jqcow.ondisk import frame as frames
from jqcow.ondisk import layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import (
    FRAME_ALIGNMENT,
    FRAME_HEADER_BYTES,
    EncodedPayload,
    FrameHeader,
    HeaderOperation,
    IntentOperation,
)
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import HostOffset
from jqcow.ondisk.root import MIN_JOURNAL_BYTES, SALT_BYTES, JournalRange

ZERO_CHUNK_BYTES = 1 << 20
HEADER_FRAME_BYTES = roots.MAX_LIVE_HEADER_BYTES + FRAME_ALIGNMENT
"""Space for a frame of the header alone: closing begins an epoch with one."""


@dataclass(frozen=True)
class Contents:
    """The frames of one epoch, in order, and what they come to; ``sequence`` is that of the newest."""

    epoch: int
    sequence: int
    frames: tuple[bytes, ...]
    decoded_bytes: int
    zeroed_bytes: int

    @classmethod
    def opening(
        cls, area: HeaderArea, epoch: int, sequence: int, carried: Sequence[IntentOperation] = ()
    ) -> Contents:
        """Return an opening frame behind the record ``sequence``: the header, and what is not done."""
        payload = frames.encode_operations([HeaderOperation(area.data), *carried])
        frame = frames.frame_payload(payload, bytes(SALT_BYTES), epoch, sequence + 1)
        return cls(epoch, sequence + 1, (frame,), payload.decoded_length, 0)

    @classmethod
    def of_scan(cls, scan: Scan) -> Contents:
        """Return the live epoch that a scan found."""
        zeroed_bytes = frames.zeroed_length(tuple(scan.operations))
        live = tuple(frame.raw for frame in scan.frames)
        return cls(scan.epoch, scan.sequence, live, scan.decoded_bytes, zeroed_bytes)

    @property
    def used_bytes(self) -> int:
        """Length of the frames."""
        return sum(len(frame) for frame in self.frames)

    def smallest_length(self) -> int:
        """Return the length of the shortest range that holds the frames, within the bounds of a scan (J5)."""
        found = (FrameHeader.unpack(frame[:FRAME_HEADER_BYTES]) for frame in self.frames)
        largest = max((header.decoded_length for header in found if header is not None), default=0)
        half_bytes = max(
            MIN_JOURNAL_BYTES // 2, self.used_bytes, largest, self.zeroed_bytes - ZEROED_BYTES_MIN
        )
        if self.decoded_bytes > decoded_limit(half_bytes):
            half_bytes = max(half_bytes, -(-self.decoded_bytes // DECODED_HALVES_MAX))
        if self.decoded_bytes > decoded_limit(half_bytes):
            half_bytes = self.decoded_bytes
        return 2 * layout.round_up(half_bytes, FRAME_ALIGNMENT)


@dataclass(frozen=True)
class Append:
    """A frame that is being written, or not yet known to be durable. ``offset`` is a host offset."""

    offset: HostOffset
    length: int
    sequence: int
    payload: EncodedPayload


class Journal:
    """The journal of a live image, for appending. See the module's invariants."""

    def __init__(self, medium: Medium, extent: JournalRange, contents: Contents) -> None:
        """Go on behind ``contents``, which ``extent`` holds."""
        self.medium = medium
        self.extent = extent
        self.epoch = contents.epoch
        self.sequence = contents.sequence
        self._position = sum(len(frame) for frame in contents.frames)
        self._decoded_bytes = contents.decoded_bytes
        self._zeroed_bytes = contents.zeroed_bytes
        self._pending: Append | None = None

    @property
    def epoch_is_empty(self) -> bool:
        """True until the first frame of the running epoch was accepted: it starts with the header (J4)."""
        return self._position == 0

    @property
    def is_pending(self) -> bool:
        """True from the beginning of an append until its frame was accepted or revoked."""
        return self._pending is not None

    @property
    def room_bytes(self) -> int:
        """Length of what is left of the running half."""
        return self.extent.half_bytes - self._position

    def has_room(self, payload: EncodedPayload) -> bool:
        """Return True if a frame with this payload fits behind the last one (J5)."""
        half_bytes = self.extent.half_bytes
        return (
            self._position + payload.frame_length <= half_bytes
            and payload.decoded_length <= half_bytes
            and self._decoded_bytes + payload.decoded_length <= decoded_limit(half_bytes)
            and self._zeroed_bytes + payload.zeroed_length <= zeroed_limit(half_bytes)
        )

    def append(self, payload: EncodedPayload) -> None:
        """Write a frame behind the last one. Durable only after the caller's barrier (J1, J2, J3).

        Raises:
            OSError: the write failed; the frame is to be revoked.
        """
        if self._pending is not None:
            raise RuntimeError("the frame before was neither accepted nor revoked")
        if not self.has_room(payload):
            raise RuntimeError("the half has no room for the frame")
        frame = frames.frame_payload(payload, self.extent.salt, self.epoch, self.sequence + 1)
        offset = HostOffset(self.extent.half_offset(self.epoch) + self._position)
        self._pending = Append(offset, len(frame), self.sequence + 1, payload)
        self.medium.pwrite(frame, offset)

    def accept(self) -> None:
        """The pending frame is durable: the next one goes behind it."""
        append = self._pending
        if append is None:
            raise RuntimeError("no frame is pending")
        self.sequence = append.sequence
        self._position += append.length
        self._decoded_bytes += append.payload.decoded_length
        self._zeroed_bytes += append.payload.zeroed_length
        self._pending = None

    def revoke(self) -> None:
        """Overwrite the start of a pending frame that failed, so that it cannot come back to life (J6).

        Where even that fails nobody can tell what replay would find: the image turns read-only.
        """
        if self._pending is not None and not self.medium.poisoned:
            try:
                self.medium.pwrite(bytes(FRAME_ALIGNMENT), self._pending.offset)
            except OSError:
                self.medium.poisoned = True
                self._pending = None
                raise
        self._pending = None

    def drop_epoch_before(self) -> None:
        """Overwrite the start of the epoch before, which is home: should this one be lost, nothing is found.

        Raises:
            OSError: the write failed; this epoch, which is durable, stays.
        """
        self.medium.pwrite(bytes(FRAME_ALIGNMENT), HostOffset(self.extent.half_offset(self.epoch - 1)))

    def start_epoch(self) -> None:
        """The running epoch is in its homes: go on in the other half, which is chosen by the epoch's parity.

        An empty epoch goes on: the other half is that of the newest frames.
        """
        if self.epoch_is_empty:
            return
        self.epoch += 1
        self._position = self._decoded_bytes = self._zeroed_bytes = 0


def write_range(medium: Medium, extent: JournalRange, contents: Contents, *, sparse: bool = False) -> None:
    """Fill a new range with zeros, then with frames under its salt from the start of their half.

    Zeros are written, not allocated: an append into unwritten extents would make the host's file system
    commit its own journal at every flush. ``sparse`` leaves them out, where there is no space for them, but
    for what closing needs.
    """
    zeros = bytes(min(ZERO_CHUNK_BYTES, extent.length))
    for offset in range(extent.offset, extent.end, len(zeros)) if not sparse else ():
        medium.pwrite(zeros[: extent.end - offset], HostOffset(offset))
    if sparse:
        medium.pwrite(bytes(HEADER_FRAME_BYTES), HostOffset(extent.half_offset(contents.epoch + 1)))
    position = extent.half_offset(contents.epoch)
    for frame in contents.frames:
        medium.pwrite(frames.reframe(frame, extent.salt), HostOffset(position))
        position += len(frame)


def dead_parts(extent: JournalRange, contents: Contents) -> list[tuple[HostOffset, int]]:
    """Return the (offset, length) in bytes of a range that no crash state replays, whatever is durable (J7).

    ``contents`` is what a scan of the range found; its newest frame may be in the page cache alone.

    - Behind the newest frame, in its half: a frame there was torn or revoked, or is of an epoch before the
      one in the other half.
    - The other half, if the epoch has a second frame. That was begun only when the first one was durable
      (J2), or both were copied here before the root named the range. So every crash state has this epoch. Of
      one frame alone nobody knows that: the epoch before it may be what the disk holds. What closing needs at
      the start of that half is kept.
    """
    half, used_bytes = extent.half_offset(contents.epoch), contents.used_bytes
    parts = [(HostOffset(half + used_bytes), extent.half_bytes - used_bytes)]
    if len(contents.frames) > 1:
        other = extent.half_offset(contents.epoch + 1)
        parts.append((HostOffset(other + HEADER_FRAME_BYTES), extent.half_bytes - HEADER_FRAME_BYTES))
    return [(offset, length) for offset, length in parts if length]
