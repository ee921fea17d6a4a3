"""The journal read: which frames are live, and what they leave when they are replayed. Nothing here writes.

The writer's rules J1 to J6 (`jqcow.engine.journal`) are what the scan relies on. The checker, the laboratory
and whatever looks at an image file use this module of the engine and no other.

    journal  found           meaning, and what is done
    good     opening record  the root landed, the first record did not: replay gives the header as it was
    good     records         the ordinary crash: replay in order
    good     torn tail       a crash in an append: drop the torn record
    good     torn epoch      a crash at the start of an epoch: replay the epoch before it
    good     two epochs      a checkpoint completed: replay the newer one
    damaged  no frame        media damage
    damaged  gap             acknowledged records are missing
    damaged  cut             the range reaches past the end of the file
    damaged  hostile         not what a writer logs: operations on the journal or cluster 0, no header
    newer    newer           unknown version, encoding, flag or kind: refuse by name
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jqcow.device.base import Reader, hole_end
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk import frame as frames
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import (
    FRAME_ALIGNMENT,
    BlockOperation,
    DoneOperation,
    FrameHeader,
    HeaderOperation,
    IntentOperation,
    Operation,
    ZeroOperation,
)
from jqcow.ondisk.header import CRYPT_NONE, MAGIC, Header, HeaderArea
from jqcow.ondisk.layout import MAX_CLUSTER_BITS, SECTOR_BYTES, Geometry
from jqcow.ondisk.root import JournalRange

DECODED_HALVES_MAX = 16
DECODED_BYTES_MAX = 256 << 20
ZEROED_BYTES_MIN = 64 << 20
TORN_HALVES_MAX = 8
"""Frames whose CRC is wrong may come to so many halves: reading them all again and again takes forever."""
WINDOW_BYTES = 1 << 20
"""Read at once, a multiple of the frames' alignment."""
SERIAL_MAX = 1 << 63
"""Epochs and sequences stay below this: a writer at one a nanosecond needs three centuries."""


def decoded_limit(half_bytes: int) -> int:
    """Return how many bytes the payloads of one epoch may decode to (J5)."""
    return max(half_bytes, min(DECODED_HALVES_MAX * half_bytes, DECODED_BYTES_MAX))


def zeroed_limit(half_bytes: int) -> int:
    """Return how many bytes the zero operations of one epoch may name (J5)."""
    return ZEROED_BYTES_MIN + half_bytes


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


def scan(device: Reader, extent: JournalRange, geometry: Geometry) -> Scan:
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


def _valid_frames(device: Reader, extent: JournalRange, half: int) -> Iterator[_Candidate]:
    """Yield every frame in a half whose salt and CRC are right."""
    start = extent.half_offset(half)
    end = start + extent.half_bytes
    window, window_offset = memoryview(b""), start
    offset, torn_bytes = start, 0
    while offset < end:
        if offset - window_offset >= len(window):
            # A journal of a gigabyte may take no space at all.
            data = hole_end(device, offset, end)
            offset = max(offset, data - data % FRAME_ALIGNMENT)
            window = memoryview(device.pread(min(WINDOW_BYTES, end - offset), offset))
            window_offset = offset
        header = FrameHeader.unpack(window[offset - window_offset :][: frames.FRAME_HEADER_BYTES])
        length = FRAME_ALIGNMENT
        if header is not None and header.salt == extent.salt and header.frame_length <= end - offset:
            if frames.crc_matches(_parts(device, offset, header.frame_length)):
                header.check_supported()
                length = header.frame_length
                yield _Candidate(offset, header)
            else:
                torn_bytes += header.frame_length
                if torn_bytes > TORN_HALVES_MAX * extent.half_bytes:
                    raise CorruptionError("journal", offset, "it holds too many frames that are torn")
        offset += length


def _parts(device: Reader, offset: int, length: int) -> Iterator[bytes]:
    """Yield a range in parts: a half may be larger than memory."""
    for at in range(offset, offset + length, WINDOW_BYTES):
        yield device.pread(min(WINDOW_BYTES, offset + length - at), at)


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
    device: Reader, extent: JournalRange, geometry: Geometry, live: Sequence[_Candidate]
) -> tuple[ScannedFrame, ...]:
    if sum(found.header.decoded_length for found in live) > decoded_limit(extent.half_bytes):
        raise CorruptionError("journal", extent.offset, "the live epoch decodes to more than a writer logs")
    decoded = []
    zeroed_bytes = 0
    for found in live:
        raw = device.pread(found.header.frame_length, found.offset)
        payload = memoryview(raw)[frames.FRAME_HEADER_BYTES :][: found.header.payload_length]
        operations = frames.decode_operations(
            found.header,
            payload,
            geometry,
            extent.half_bytes,
            found.offset,
            zeroed_limit_bytes=zeroed_limit(extent.half_bytes) - zeroed_bytes,
        )
        zeroed_bytes += frames.zeroed_length(operations)
        decoded.append(ScannedFrame(found.offset, found.header, operations, raw))
    first = decoded[0]
    if not first.operations or not isinstance(first.operations[0], HeaderOperation):
        raise CorruptionError("journal frame", first.offset, "an epoch does not start with the header")
    return tuple(decoded)


def _torn_tail(device: Reader, extent: JournalRange, newest: _Candidate) -> TornTail | None:
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


@dataclass(frozen=True)
class LiveRoot:
    """The root of an image with a live journal: sector 0, or what its copy holds in place of a lost one."""

    sector: bytes
    is_copy: bool = False


def find_live_root(reader: Reader, *, use_root_copy: bool = False) -> LiveRoot | None:
    """Return the root of a live image, None where no journal is live.

    ``use_root_copy``: where sector 0 has no valid magic, take the root from its copy.
    """
    sector = reader.pread(SECTOR_BYTES, 0)
    if roots.is_live(sector):
        return LiveRoot(sector)
    copy = read_root_copy(reader) if use_root_copy and sector[: len(MAGIC)] != MAGIC else None
    return None if copy is None else LiveRoot(copy, is_copy=True)


def read_journal(reader: Reader, root: LiveRoot) -> tuple[Scan, Replayed]:
    """Return what the journal that ``root`` names holds, and what it leaves.

    Raises:
        FormatError: a root or header that breaks the specification.
        CorruptionError: the journal is damaged, or not one that a writer leaves.
        UnsupportedFeatureError: a newer jqcow wrote it, or the header leaves no room for a root.
    """
    cluster_bits, extent = roots.unpack_root(root.sector)
    found = scan(reader, extent, Geometry(cluster_bits))
    replayed = replay(found.operations, Geometry(cluster_bits))
    roots.check_room(replayed.area.header, len(replayed.area.data))
    for offset in replayed.blocks:
        if extent.offset <= offset < extent.end:
            raise CorruptionError("journal", extent.offset, f"it would write into itself at {offset:#x}")
    _check_intents(extent, replayed)
    return found, replayed


def _check_intents(extent: JournalRange, replayed: Replayed) -> None:
    """Raise CorruptionError for guest writes that no writer leaves to be done."""
    header = replayed.area.header
    if not replayed.intents:
        return
    if header.crypt_method != CRYPT_NONE or header.has_data_file:
        raise CorruptionError(
            "journal", extent.offset, "it holds writes of a guest for another kind of image"
        )
    if sum(len(intent.data) for intent in replayed.intents) > extent.half_bytes:
        raise CorruptionError("journal", extent.offset, "more writes of a guest wait than a half can hold")
    for intent in replayed.intents:
        if intent.offset + len(intent.data) > header.size:
            detail = f"a write of the guest at {intent.offset:#x} lies past the end of the disk"
            raise CorruptionError("journal", extent.offset, detail)


def read_root_copy(reader: Reader) -> bytes | None:
    """Return the root that the root copy holds, or None where there is no valid copy."""
    return roots.unpack_root_copy(reader.pread(roots.ROOT_COPY_BYTES, roots.ROOT_COPY_OFFSET))


def read_header(reader: Reader) -> HeaderArea:
    """Read the header of a clean image.

    Raises:
        FormatError: not a qcow2 image.
        CorruptionError: sector 0 is damaged, and a root copy tells that a journal is live.
    """
    sector = reader.pread(SECTOR_BYTES, 0)
    if sector[: len(MAGIC)] != MAGIC and read_root_copy(reader) is not None:
        raise CorruptionError("header", 0, "sector 0 is damaged, the root copy is not: run jqcow-recover")
    header = Header.unpack(sector)
    if header.cluster_bits > MAX_CLUSTER_BITS:
        raise FormatError(f"cluster_bits {header.cluster_bits} is not in 9-21")
    return HeaderArea.parse(reader.pread(1 << header.cluster_bits, 0))


@dataclass(frozen=True)
class Replayed:
    """What the operations of a journal leave: the newest header, and the newest blocks by host offset.

    ``intents`` are the guest's writes that are not done, in their order.
    """

    area: HeaderArea
    blocks: dict[int, bytes]
    intents: tuple[IntentOperation, ...] = ()


def replay(operations: Iterable[Operation], geometry: Geometry) -> Replayed:
    """Apply operations in order, in memory.

    Args:
        operations: of the live epoch; the first one is a header (J4).
        geometry: of the image, as its root tells it.

    Raises:
        FormatError: a header that breaks the specification.
        CorruptionError: a header is damaged, missing, or of an image of another kind.
    """
    area: HeaderArea | None = None
    blocks: dict[int, bytes] = {}
    intents: list[IntentOperation] = []
    done = 0
    zeros = bytes(geometry.block_bytes)
    for operation in operations:
        match operation:
            case IntentOperation():
                intents.append(operation)
            case DoneOperation(sequence):
                done = max(done, sequence)
            case HeaderOperation(data):
                area = _next_area(area, HeaderArea.parse(data), geometry)
            case ZeroOperation(start, length):
                for offset in range(start, start + length, geometry.block_bytes):
                    blocks[offset] = zeros
            case BlockOperation(offset, data):
                blocks[offset] = bytes(data)
    if area is None:
        raise CorruptionError("journal", 0, "it holds no header")
    return Replayed(area, blocks, tuple(intent for intent in intents if intent.sequence > done))


def _next_area(before: HeaderArea | None, area: HeaderArea, geometry: Geometry) -> HeaderArea:
    """Return the next header that the journal holds: version and width of refcounts alone may change."""
    header = area.header
    if header.cluster_bits != geometry.cluster_bits:
        raise CorruptionError("journal", 0, "its header has another cluster size than the root")
    if before is not None and header.has_subclusters != before.header.has_subclusters:
        raise CorruptionError("journal", 0, "its headers differ in the kind of L2 entries")
    return area
