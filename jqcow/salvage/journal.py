"""What journals of jqcow in a file say: the live one, and those that were left behind.

Frames are believed by their checksum alone, so each can be read without the others. Those of a live journal
are replayed as far as they are whole; what older ones say was true once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import frame as frames
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import (
    FRAME_ALIGNMENT,
    BlockOperation,
    DoneOperation,
    FrameHeader,
    HeaderOperation,
    IntentOperation,
    ZeroOperation,
)
from jqcow.ondisk.layout import Geometry
from jqcow.ondisk.root import JournalRange
from jqcow.salvage.source import LOOK_BYTES, Source

FRAMES_MAX = 1 << 16
DECODED_BYTES_MAX = 64 << 20
"""So much the payloads of all frames may decode to."""
ZEROED_BYTES_MAX = 64 << 20


@dataclass(frozen=True)
class FoundFrame:
    """A frame whose checksum is right, at a host offset."""

    offset: int
    header: FrameHeader

    @property
    def order(self) -> tuple[int, int]:
        """Sorts frames of one journal by when they were written."""
        return self.header.epoch, self.header.sequence


@dataclass
class Replayed:
    """What frames leave when they are applied in order.

    Attributes:
        blocks: the metadata blocks, by host offset.
        area: the newest header, b"" for none.
        faults: what could not be read, in words.
        intents: the writes of the guest that are not done, in their order.
    """

    blocks: dict[int, bytes] = field(default_factory=dict)
    area: bytes = b""
    faults: list[str] = field(default_factory=list)
    intents: list[IntentOperation] = field(default_factory=list)


def frame_at(source: Source, offset: int) -> FoundFrame | None:
    """Return the frame at a host offset; None where there is none whose checksum is right."""
    header = FrameHeader.unpack(source.pread(frames.FRAME_HEADER_BYTES, offset))
    if header is None or header.frame_length > source.size() - offset:
        return None
    end = offset + header.frame_length
    parts = (source.pread(min(LOOK_BYTES, end - at), at) for at in range(offset, end, LOOK_BYTES))
    return FoundFrame(offset, header) if frames.crc_matches(parts) else None


def find_frames(source: Source, offsets: Iterable[int]) -> list[FoundFrame]:
    """Return the frames at some of ``offsets``, oldest first; bounded in what is read for wrong ones."""
    found: list[FoundFrame] = []
    left = source.size() + (64 << 20)
    for offset in offsets:
        if left < 0 or len(found) >= FRAMES_MAX:
            break
        header = FrameHeader.unpack(source.pread(frames.FRAME_HEADER_BYTES, offset))
        left -= header.frame_length if header is not None else 0
        frame = frame_at(source, offset) if header is not None else None
        if frame is not None:
            found.append(frame)
    return sorted(found, key=lambda frame: frame.order)


def live_frames(source: Source, journal: JournalRange) -> list[FoundFrame]:
    """Return the frames of the live epoch of a journal, in order, as far as they can be read."""
    step = FRAME_ALIGNMENT
    places = (
        place
        for start, length in source.data_extents(journal.offset, journal.length)
        for place in range(start - start % step, start + length, step)
    )
    found = [frame for frame in find_frames(source, places) if frame.header.salt == journal.salt]
    return [frame for frame in found if frame.header.epoch == found[-1].header.epoch]


def replay(source: Source, found: Iterable[FoundFrame], geometry: Geometry) -> Replayed:
    """Apply frames in their order; one that cannot be decoded is a fault, and left out."""
    replayed = Replayed()
    left, zeroed_left, done = DECODED_BYTES_MAX, ZEROED_BYTES_MAX, 0
    for frame in found:
        left -= frame.header.decoded_length
        if left < 0:
            replayed.faults.append("the journal decodes to more than a writer logs")
            break
        try:
            operations = list(_operations(source, frame, geometry, zeroed_left))
        except (CorruptionError, UnsupportedFeatureError) as error:
            replayed.faults.append(str(error))
            continue
        zeroed_left -= frames.zeroed_length(operations)
        for operation in operations:
            match operation:
                case BlockOperation(offset, data):
                    replayed.blocks[offset] = bytes(data)
                case ZeroOperation(offset, length):
                    zeros = bytes(geometry.block_bytes)
                    places = range(offset, offset + length, geometry.block_bytes)
                    replayed.blocks.update(dict.fromkeys(places, zeros))
                case HeaderOperation(data):
                    replayed.area = data
                case IntentOperation():
                    replayed.intents.append(operation)
                case DoneOperation(sequence):
                    done = max(done, sequence)
    replayed.intents = [intent for intent in replayed.intents if intent.sequence > done]
    limit = source.size() + ZEROED_BYTES_MAX
    replayed.blocks = {place: data for place, data in replayed.blocks.items() if place < limit}
    return replayed


def _operations(
    source: Source, frame: FoundFrame, geometry: Geometry, zeroed_limit_bytes: int
) -> Iterator[frames.Operation]:
    header = frame.header
    header.check_supported()
    start = frame.offset + frames.FRAME_HEADER_BYTES
    payload = source.pread(min(header.payload_length, header.frame_length), start)
    yield from frames.decode_operations(
        header,
        payload,
        geometry,
        min(DECODED_BYTES_MAX, roots.MAX_JOURNAL_BYTES // 2),
        frame.offset,
        zeroed_limit_bytes=max(0, zeroed_limit_bytes),
    )
