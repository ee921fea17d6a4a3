"""The journal: appending, finding again, torn tails, gaps, and what a newer jqcow may have written."""

from __future__ import annotations

import errno
import random
from dataclasses import replace
from typing import Any

import pytest

from jqcow.engine import scan as scans
from jqcow.engine.journal import HEADER_FRAME_BYTES, Contents, Journal, dead_parts, write_range
from jqcow.engine.medium import Medium
from jqcow.engine.scan import Scan
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import frame as frames
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.frame import BlockOperation, EncodedPayload, HeaderOperation, Operation, ZeroOperation
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import Geometry
from jqcow.ondisk.root import MIN_JOURNAL_BYTES, JournalRange
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice

GEOMETRY = Geometry(12)
EXTENT = JournalRange(16384, MIN_JOURNAL_BYTES, bytes(range(16)))
HEADER = HeaderOperation(blank_image(1 << 20, Form(12)).parts[0][1])
HALF_FRAMES = EXTENT.half_bytes // 4096


def payload(number: int, *, first: bool = False) -> EncodedPayload:
    operations: list[Operation] = [BlockOperation(4096 + number * 4096, bytes([number % 256]) * 4096)]
    return frames.encode_operations([HEADER, *operations] if first else operations)


def make_journal(epoch: int = 1) -> tuple[Journal, SimulatedDevice]:
    device = SimulatedDevice(bytes(EXTENT.end))
    return Journal(Medium(device), EXTENT, Contents(epoch, 0, (), 0, 0)), device


def fill(journal: Journal, count: int) -> None:
    for number in range(count):
        journal.append(payload(number, first=journal.epoch_is_empty))
        journal.accept()


def scan(device: SimulatedDevice) -> Scan:
    return scans.scan(device, EXTENT, GEOMETRY)


def sequences(found: Scan) -> list[int]:
    return [frame.header.sequence for frame in found.frames]


class TestAppendAndScan:
    @pytest.mark.parametrize("epoch", [1, 2])
    def test_what_was_appended_is_found(self, epoch: int) -> None:
        journal, device = make_journal(epoch)
        fill(journal, 5)
        found = scan(device)
        assert (found.epoch, sequences(found), found.stale_frames) == (epoch, [1, 2, 3, 4, 5], 0)
        assert found.torn_tail is None
        operations = list(found.operations)
        assert operations[0] == HEADER
        assert operations[1:] == [BlockOperation(4096 + n * 4096, bytes([n]) * 4096) for n in range(5)]

    def test_full_half_has_no_room(self) -> None:
        journal, device = make_journal()
        fill(journal, HALF_FRAMES)
        assert not journal.has_room(payload(9))
        assert sequences(scan(device)) == list(range(1, HALF_FRAMES + 1))

    def test_next_epoch_supersedes_the_one_before(self) -> None:
        """J3: the sequence goes on; the older epoch's frames are stale."""
        journal, device = make_journal()
        fill(journal, 4)
        journal.start_epoch()
        fill(journal, 2)
        found = scan(device)
        assert (found.epoch, sequences(found), found.stale_frames) == (2, [5, 6], 4)
        journal.start_epoch()
        fill(journal, 1)
        found = scan(device)
        assert (found.epoch, sequences(found), found.stale_frames) == (3, [7], 5)

    def test_decoded_bytes_of_an_epoch_are_bounded(self) -> None:
        """J5: small frames that unpack to much end the epoch before the half is full."""
        journal, _ = make_journal()
        big = EncodedPayload(1, b"x", EXTENT.half_bytes)
        assert journal.has_room(big)
        full = Contents(1, 0, (), scans.decoded_limit(EXTENT.half_bytes) - 1, 0)
        assert not Journal(journal.medium, EXTENT, full).has_room(payload(1))
        assert not journal.has_room(replace(big, decoded_length=EXTENT.half_bytes + 1))


class TestTornTail:
    @pytest.mark.parametrize("cut", [64, 512, 2048])
    def test_torn_newest_frame_is_told_and_left_out(self, cut: int) -> None:
        journal, device = make_journal()
        fill(journal, 3)
        offset = EXTENT.half_offset(1) + 3 * 4096
        noise = BlockOperation(8192, random.Random(1).randbytes(4096))
        whole = frames.frame_payload(frames.encode_operations([noise]), EXTENT.salt, 1, 4)
        device.pwrite(whole[:cut], offset)
        found = scan(device)
        assert sequences(found) == [1, 2, 3]
        assert found.torn_tail is not None
        assert (found.torn_tail.offset, found.torn_tail.sequence) == (offset, 4)

    def test_torn_first_frame_of_an_epoch_leaves_the_epoch_before(self) -> None:
        """J4: the other half is intact."""
        journal, device = make_journal()
        fill(journal, 3)
        journal.start_epoch()
        journal.append(payload(0, first=True))
        device.pwrite(b"torn", EXTENT.half_offset(2) + 100)
        found = scan(device)
        assert (found.epoch, sequences(found)) == (1, [1, 2, 3])
        assert found.torn_tail is not None and found.torn_tail.epoch == 2

    def test_stale_frame_behind_the_newest_is_no_torn_tail(self) -> None:
        journal, device = make_journal()
        fill(journal, 5)
        journal.start_epoch()
        fill(journal, 5)
        journal.start_epoch()
        fill(journal, 2)
        found = scan(device)
        assert (found.epoch, sequences(found), found.torn_tail) == (3, [11, 12], None)


class TestRevoke:
    def test_failed_write_is_revoked(self) -> None:
        """Although all of it reached the device, the frame does not come back to life."""
        journal, device = make_journal()
        fill(journal, 2)
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", applied_bytes=EVERYTHING))
        with pytest.raises(OSError):
            journal.append(payload(7))
        device.faults = None
        journal.revoke()
        assert sequences(scan(device)) == [1, 2]
        assert not journal.medium.poisoned
        fill(journal, 1)
        assert sequences(scan(device)) == [1, 2, 3]

    def test_failed_revocation_turns_read_only(self) -> None:
        journal, device = make_journal()
        fill(journal, 2)
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", repeats=True))
        with pytest.raises(OSError):
            journal.append(payload(7))
        assert not journal.medium.poisoned
        with pytest.raises(OSError):
            journal.revoke()
        assert journal.medium.poisoned

    def test_nothing_is_written_after_a_failed_barrier(self) -> None:
        """M1; the next opening decides by what the disk holds, and nobody appends any more."""
        journal, device = make_journal()
        fill(journal, 2)
        journal.append(payload(7))
        device.faults = FaultPlan(Fault(errno.EIO, call="barrier"))
        with pytest.raises(OSError):
            journal.medium.barrier("test")
        before = device.content()
        journal.revoke()
        assert device.content() == before

    def test_revoked_frame_is_not_found(self) -> None:
        journal, device = make_journal()
        fill(journal, 2)
        journal.append(payload(7))
        journal.revoke()
        assert sequences(scan(device)) == [1, 2] and journal.sequence == 2
        fill(journal, 1)
        assert sequences(scan(device)) == [1, 2, 3]

    def test_one_frame_is_pending_at_a_time(self) -> None:
        """J2: the next append waits until the one before is durable, or revoked."""
        journal, device = make_journal()
        with pytest.raises(RuntimeError, match="no frame is pending"):
            journal.accept()
        journal.append(payload(0, first=True))
        assert journal.epoch_is_empty
        with pytest.raises(RuntimeError, match="neither accepted nor revoked"):
            journal.append(payload(1))
        journal.accept()
        assert not journal.epoch_is_empty
        fill(journal, 1)
        assert sequences(scan(device)) == [1, 2]

    def test_failed_write_is_pending(self) -> None:
        """J2: whoever goes on after the error cannot append over a frame that may be there."""
        journal, device = make_journal()
        fill(journal, 1)
        device.faults = FaultPlan(Fault(errno.EIO, call="pwrite"))
        with pytest.raises(OSError):
            journal.append(payload(7))
        with pytest.raises(RuntimeError, match="neither accepted nor revoked"):
            journal.append(payload(8))
        journal.revoke()
        fill(journal, 1)
        assert sequences(scan(device)) == [1, 2]


def put_frame(device: SimulatedDevice, slot: int, **changes: Any) -> None:
    """Write a valid frame into a slot of epoch 1's half, with some fields of its header changed."""
    encoded = payload(slot, first=slot == 0)
    raw = frames.frame_payload(encoded, EXTENT.salt, 1, slot + 1)
    header = frames.FrameHeader.unpack(raw)
    assert header is not None
    device.pwrite(replace(header, **changes).pack(encoded.data), EXTENT.half_offset(1) + slot * 4096)


class TestDamage:
    def test_nothing_at_all(self) -> None:
        with pytest.raises(CorruptionError, match="no valid frame"):
            scan(make_journal()[1])

    def test_frames_of_another_journal_are_ignored(self) -> None:
        journal, device = make_journal()
        fill(journal, 3)
        with pytest.raises(CorruptionError, match="no valid frame"):
            scans.scan(device, replace(EXTENT, salt=bytes(16)), GEOMETRY)

    def test_range_past_the_end_of_the_file(self) -> None:
        journal, device = make_journal()
        fill(journal, 1)
        device.truncate(EXTENT.end - 1)
        with pytest.raises(CorruptionError, match="past the end"):
            scan(device)

    @pytest.mark.parametrize("lost", [0, 1, 2])
    def test_lost_frame_within_the_epoch_is_a_gap(self, lost: int) -> None:
        """Only the newest frame may be torn: anything else is media damage, where guessing loses data."""
        journal, device = make_journal()
        fill(journal, 4)
        device.pwrite(b"rot", EXTENT.half_offset(1) + lost * 4096 + 30)
        with pytest.raises(CorruptionError, match="gap before sequence"):
            scan(device)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"sequence": 9}, "gap"),
            ({"sequence": 2}, "gap"),
            ({"checkpointed_epoch": 1}, "checkpointed_epoch"),
            ({"epoch": 3}, "gap|checkpointed_epoch"),
            ({"decoded_length": 1}, "declared"),
            ({"decoded_length": 1 << 31}, "decodes to more than|exceeds"),
        ],
    )
    def test_valid_frame_that_does_not_fit(self, changes: dict[str, int], words: str) -> None:
        _, device = make_journal()
        for slot in range(2):
            put_frame(device, slot)
        put_frame(device, 2, **changes)
        with pytest.raises(CorruptionError, match=words):
            scan(device)

    @pytest.mark.parametrize("changes", [{"version": 2}, {"encoding": 2}, {"flags": 1}])
    def test_frame_of_a_newer_jqcow_is_refused_by_name(self, changes: dict[str, int]) -> None:
        _, device = make_journal()
        put_frame(device, 0)
        put_frame(device, 1, **changes)
        with pytest.raises(UnsupportedFeatureError, match="journal frame version"):
            scan(device)

    def test_epoch_without_the_header(self) -> None:
        _, device = make_journal()
        raw = frames.frame_payload(payload(3), EXTENT.salt, 1, 1)
        device.pwrite(raw, EXTENT.half_offset(1))
        with pytest.raises(CorruptionError, match="does not start with the header"):
            scan(device)


class TestContents:
    def test_what_a_scan_found_counts_towards_the_limits(self) -> None:
        """J5: an epoch that goes on after opening is no larger than one that was never interrupted."""
        journal, device = make_journal()
        zeros = frames.encode_operations([HEADER, ZeroOperation(8192, 4096)])
        journal.append(zeros)
        journal.accept()
        contents = Contents.of_scan(scan(device))
        assert (contents.epoch, contents.sequence, contents.zeroed_bytes) == (1, 1, 4096)
        assert contents.decoded_bytes == zeros.decoded_length
        again = Journal(journal.medium, EXTENT, contents)
        assert not again.epoch_is_empty
        fill(again, 1)
        assert sequences(scan(device)) == [1, 2]

    @pytest.mark.parametrize("epoch", [1, 2])
    def test_a_new_range_holds_them_under_its_own_salt(self, epoch: int) -> None:
        journal, device = make_journal(epoch)
        fill(journal, 3)
        contents = Contents.of_scan(scan(device))
        moved = JournalRange(EXTENT.end, EXTENT.length, bytes(reversed(EXTENT.salt)))
        device.pwrite(b"x" * moved.length, moved.offset)
        write_range(journal.medium, moved, contents)
        found = scans.scan(device, moved, GEOMETRY)
        assert (found.epoch, sequences(found), found.stale_frames) == (epoch, [1, 2, 3], 0)
        assert tuple(found.operations) == tuple(scan(device).operations)

    def test_an_opening_frame_is_the_header_alone(self) -> None:
        """J4: it follows the record before it."""
        device = SimulatedDevice(bytes(EXTENT.end))
        area = HeaderArea.parse(HEADER.data)
        write_range(Medium(device), EXTENT, Contents.opening(area, epoch=3, sequence=8))
        found = scan(device)
        assert (found.epoch, sequences(found), list(found.operations)) == (3, [9], [HEADER])

    def test_zeroed_bytes_of_an_epoch_are_bounded(self) -> None:
        journal, _ = make_journal()
        limit = scans.zeroed_limit(EXTENT.half_bytes)
        full = Journal(journal.medium, EXTENT, Contents(1, 0, (), 0, limit))
        assert full.has_room(payload(1))
        assert not full.has_room(frames.encode_operations([ZeroOperation(8192, 4096)]))


class TestShortestRange:
    """`Contents.smallest_length`: what it says a scan accepts."""

    def contents(self, frame_bytes: int, count: int, decoded: int, zeroed: int = 0) -> Contents:
        payload = frames.EncodedPayload(0, bytes(frame_bytes - frames.FRAME_HEADER_BYTES), decoded)
        frame = frames.frame_payload(payload, bytes(16), 1, 1)
        assert len(frame) == frame_bytes
        return Contents(1, count, (frame,) * count, count * decoded, zeroed)

    @pytest.mark.parametrize(
        ("frame_bytes", "count", "decoded", "zeroed", "half"),
        [
            (4096, 1, 100, 0, 32 << 10),
            (4096, 9, 100, 0, 36 << 10),
            (4096, 1, 40 << 10, 0, 40 << 10),
            (4096, 8, 32 << 20, 0, 32 << 20),
            (4096, 300, 1 << 20, 0, 300 << 20),
            (4096, 1, 100, 65 << 20, 1 << 20),
        ],
    )
    def test_half(self, frame_bytes: int, count: int, decoded: int, zeroed: int, half: int) -> None:
        contents = self.contents(frame_bytes, count, decoded, zeroed)
        assert contents.smallest_length() == 2 * half


def test_dead_parts_of_a_range() -> None:
    """J7."""
    one = Contents(2, 1, (bytes(4096),), 0, 0)
    half = EXTENT.half_bytes
    assert dead_parts(EXTENT, one) == [(EXTENT.offset + 4096, half - 4096)]
    two = Contents(2, 2, (bytes(half - 4096), bytes(4096)), 0, 0)
    kept = HEADER_FRAME_BYTES
    assert dead_parts(EXTENT, two) == [(EXTENT.offset + half + kept, half - kept)]
