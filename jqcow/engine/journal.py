"""The write-ahead journal: appending frames. `jqcow.engine.scan` finds them again.

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

from collections.abc import Sequence
from dataclasses import dataclass

from jqcow.engine.medium import Medium
from jqcow.engine.scan import decoded_limit, zeroed_limit
from jqcow.ondisk import frame as frames
from jqcow.ondisk.frame import FRAME_ALIGNMENT, EncodedPayload
from jqcow.ondisk.root import JournalRange

ZERO_CHUNK_BYTES = 1 << 20


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
