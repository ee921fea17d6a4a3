"""The table of recovery cases, tried with every combination of its inputs, in real bytes.

The inputs are sector 0, the root copy, the journal and the size of the clusters. The table stands in the
docstrings of the modules that decide; every combination must fit exactly one row, and do what that row says.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from itertools import count, product
from typing import NamedTuple

import pytest

import jqcow
from jqcow import _native
from jqcow.engine import engine, scan
from jqcow.offline.recover import RecoveryReport, recover_image
from jqcow.ondisk import frame as frames
from jqcow.ondisk import header as headers
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import BlockOperation, FrameHeader
from jqcow.ondisk.root import JournalRange
from jqcow.testing import SimulatedDevice

TABLE = engine.__doc__ or ""
ROW = re.compile(r"^ +([A-Z] {2}.*)$", re.MULTILINE)
JOURNAL_ROW = re.compile(r"^ +(good|damaged|newer) {2,}(\w+(?: \w+)?) {2}", re.MULTILINE)

DISK_BYTES = 1 << 20
JOURNAL_BYTES = 64 << 10
RECORDS = 3
SECTOR_BYTES = 512


class Row(NamedTuple):
    """One case of the table: for which inputs it holds, and what becomes of the image."""

    name: str
    sector: str
    copies: str
    journals: str
    reading: str
    writing: str
    recovering: str


ROWS = [Row(*re.split(r" {2,}", cells)) for cells in ROW.findall(TABLE)]
JOURNALS = {found: kind for kind, found in JOURNAL_ROW.findall(scan.__doc__ or "")}


class Crashed(NamedTuple):
    """The bytes of an image whose writer died. ``clean_sector`` is sector 0 as it was before it went live."""

    content: bytearray
    clean_sector: bytes
    cluster_bytes: int
    extent: JournalRange

    def write(self, data: bytes, offset: int) -> None:
        self.content[offset : offset + len(data)] = data

    def frames(self) -> list[tuple[int, bytes]]:
        """Return the host offset and the bytes of each frame of the newest epoch."""
        found = []
        position = self.extent.half_offset(self.epoch())
        while (header := FrameHeader.unpack(self.content[position : position + 64])) is not None:
            found.append((position, bytes(self.content[position : position + header.frame_length])))
            position += header.frame_length
        return found

    def epoch(self) -> int:
        starts = (self.content[offset : offset + 64] for offset in map(self.extent.half_offset, (0, 1)))
        return max(header.epoch for start in starts if (header := FrameHeader.unpack(start)) is not None)


def seeded_salts() -> Callable[[], bytes]:
    numbers = count(1)
    return lambda: struct.pack(">QQ", 0, next(numbers))


def device_of(content: bytes | bytearray) -> SimulatedDevice:
    return SimulatedDevice(bytes(content))


def offset_of(number: int, cluster_bytes: int) -> int:
    return number * cluster_bytes


def crash(cluster_bytes: int, *, checkpoint: bool) -> Crashed:
    """Return an image whose writer died after some records, each of one write."""
    device = SimulatedDevice()
    jqcow.create_on_device(device, DISK_BYTES, cluster_size=cluster_bytes, journal_size=JOURNAL_BYTES).close()
    device.reopen()
    clean_sector = device.pread(SECTOR_BYTES, 0)
    image = jqcow.open_device(device, "r+", journal_size=JOURNAL_BYTES, new_salt=seeded_salts())
    for number in range(RECORDS):
        if checkpoint and number == 1:
            image.checkpoint()
        image.pwrite(bytes([number + 1]) * SECTOR_BYTES, offset_of(number, cluster_bytes))
        image.flush()
    content = bytearray(device.killed().content())
    _, extent = roots.unpack_root(content[:SECTOR_BYTES])
    return Crashed(content, clean_sector, cluster_bytes, extent)


def frame_with_version(raw: bytes, version: int) -> bytes:
    changed = bytearray(raw)
    changed[8:10] = version.to_bytes(2, "big")
    changed[frames.CRC_OFFSET : frames.CRC_OFFSET + 4] = bytes(4)
    changed[frames.CRC_OFFSET : frames.CRC_OFFSET + 4] = _native.crc32c(changed).to_bytes(4, "big")
    return bytes(changed)


def torn(raw: bytes) -> bytes:
    return raw[:-SECTOR_BYTES] + bytes(byte ^ 0xEE for byte in raw[-SECTOR_BYTES:])


def with_journal(state: str, cluster_bytes: int) -> tuple[Crashed, int]:
    """Return an image with its journal in a state, and how many of its writes a replay keeps."""
    image = crash(cluster_bytes, checkpoint=state == "two epochs")
    written = image.frames()
    (first_offset, first), (last_offset, last) = written[0], written[-1]
    epoch, sequence = image.epoch(), len(written)
    block = min(4096, cluster_bytes)
    match state:
        case "records" | "two epochs":
            return image, RECORDS
        case "opening record":
            for offset, raw in written[1:]:
                image.write(bytes(len(raw)), offset)
            return image, 0
        case "torn tail":
            image.write(torn(last), last_offset)
            return image, RECORDS - 1
        case "torn epoch":
            operations = frames.decode_operations(
                header_of(first),
                payload_of(first),
                headers_geometry(image),
                image.extent.half_bytes,
                first_offset,
                zeroed_limit_bytes=0,
            )
            begun = frames.frame_payload(
                frames.encode_operations(operations), image.extent.salt, epoch + 1, sequence + 1
            )
            image.write(torn(begun), image.extent.half_offset(epoch + 1))
            return image, RECORDS
        case "no frame":
            image.write(bytes(image.extent.length), image.extent.offset)
        case "gap":
            image.write(bytes(len(written[1][1])), written[1][0])
        case "cut":
            pass  # once the root copy names its range
        case "hostile":
            payload = frames.encode_operations([BlockOperation(0, bytes(block))])
            image.write(frames.frame_payload(payload, image.extent.salt, epoch, sequence), last_offset)
        case "newer":
            image.write(frame_with_version(last, 2), last_offset)
        case _:
            raise AssertionError(f"a journal that nobody makes: {state}")
    return image, 0


def header_of(raw: bytes) -> FrameHeader:
    header = FrameHeader.unpack(raw)
    assert header is not None
    return header


def payload_of(raw: bytes) -> bytes:
    return raw[frames.FRAME_HEADER_BYTES :][: header_of(raw).payload_length]


def headers_geometry(image: Crashed) -> frames.Geometry:
    return headers.Header.unpack(image.clean_sector).geometry


def put_root_copy(image: Crashed, state: str) -> None:
    """Put the root copy into a state; that of another journal names a second range with the same frames."""
    root = bytes(image.content[:SECTOR_BYTES])
    if state == "none":
        image.write(bytes(roots.ROOT_COPY_BYTES), roots.ROOT_COPY_OFFSET)
    elif state == "torn":
        image.write(b"\xee" * SECTOR_BYTES, roots.ROOT_COPY_OFFSET)
    elif state == "same":
        image.write(roots.pack_root_copy(root), roots.ROOT_COPY_OFFSET)
    elif state == "other":
        other = move_journal(image)
        copy = roots.pack_root(headers.Header.unpack(image.clean_sector), other)
        image.write(roots.pack_root_copy(copy), roots.ROOT_COPY_OFFSET)


def move_journal(image: Crashed) -> JournalRange:
    """Copy the journal behind the end of the file under another salt, as a move does."""
    start = -(-len(image.content) // image.cluster_bytes) * image.cluster_bytes
    other = JournalRange(start, image.extent.length, b"another journal!")
    journal = bytearray(image.content[image.extent.offset :][: image.extent.length])
    for position in range(0, len(journal), frames.FRAME_ALIGNMENT):
        header = FrameHeader.unpack(journal[position : position + 64])
        if header is not None:
            raw = bytes(journal[position : position + header.frame_length])
            moved = frames.reframe(raw, other.salt)
            journal[position : position + len(moved)] = moved if frames.crc_matches([raw]) else torn(moved)
    image.content.extend(bytes(start - len(image.content)) + journal)
    return other


def matching_row(sector: str, copy: str, journal: str) -> Row:
    def fits(cell: str, *values: str) -> bool:
        return cell == "any" or any(value in cell.split(", ") for value in values)

    found = [
        row
        for row in ROWS
        if fits(row.sector, sector) and fits(row.copies, copy) and fits(row.journals, JOURNALS[journal])
    ]
    assert len(found) == 1, found
    return found[0]


def assert_disk(image: jqcow.Image, cluster_bytes: int, kept: int) -> None:
    for number in range(RECORDS):
        expected = bytes([number + 1] if number < kept else [0]) * SECTOR_BYTES
        assert image.pread(SECTOR_BYTES, offset_of(number, cluster_bytes)) == expected


def refused(outcome: str, device: SimulatedDevice, action: Callable[[], object]) -> bool:
    """Return True if the outcome is an error; then ``action`` raises it and writes nothing."""
    error = getattr(jqcow, f"{outcome}Error", None)
    if error is None:
        return False
    before = device.content()
    with pytest.raises(jqcow.JqcowError) as raised:
        action()
    assert type(raised.value) is error
    assert device.content() == before
    return True


def check_reading(row: Row, content: bytes, cluster_bytes: int, kept: int) -> None:
    device = device_of(content)
    if refused(row.reading, device, lambda: jqcow.open_device(device)):
        return
    with jqcow.open_device(device) as image:
        assert (image.recovered is not None) == (row.reading == "replays")
        assert_disk(image, cluster_bytes, kept)
        assert image.check().ok
    assert device.content() == content


def check_writing(row: Row, content: bytes, cluster_bytes: int, kept: int) -> None:
    device = device_of(content)
    if refused(row.writing, device, lambda: jqcow.open_device(device, "r+")):
        return
    with jqcow.open_device(device, "r+") as image:
        assert (image.recovered is not None) == (row.writing not in ("opens", "finishes"))
        assert_disk(image, cluster_bytes, kept)
        assert image.check().ok
    assert_root_rewritten(device, row.writing)
    assert_clean(device, cluster_bytes, kept)


def check_recovering(row: Row, content: bytes, cluster_bytes: int, kept: int) -> None:
    device = device_of(content)
    if refused(row.recovering, device, lambda: recover_image(device)):
        refused(row.recovering, device, lambda: recover_image(device, dry_run=True))
        return
    would = recover_image(device, dry_run=True)
    assert device.content() == content
    report = recover_image(device)
    states = {
        "A": "clean",
        "J": "clean, journal left behind",
        "B": "live",
        "C": "live",
        "G": "live by root copy",
    }
    assert would.state == report.state == states[row.name]
    assert would.actions == report.actions
    assert_verified(would)
    assert_verified(report)
    assert_root_rewritten(device, row.recovering)
    if row.recovering == "nothing to do":
        assert device.content() == content
    else:
        assert_clean(device, cluster_bytes, kept)


def assert_verified(report: RecoveryReport) -> None:
    assert report.verification is not None
    verified = report.verification
    assert (verified.errors, verified.leaks, verified.lost) == (0, 0, 0)


def assert_root_rewritten(device: SimulatedDevice, outcome: str) -> None:
    assert (device.barriers["recover.root"] > 0) == (outcome == "recovers*")


def assert_clean(device: SimulatedDevice, cluster_bytes: int, kept: int) -> None:
    """The file is standard qcow2: no journal, no root copy; recovering again changes nothing."""
    content = device.content()
    assert not roots.is_live(content[:SECTOR_BYTES])
    assert roots.unpack_root_copy(content[roots.ROOT_COPY_OFFSET :]) is None
    again = device_of(content)
    assert recover_image(again).state == "clean"
    assert again.content() == content
    with jqcow.open_device(again) as image:
        assert_disk(image, cluster_bytes, kept)


LARGE = list(
    product(("clean", "live", "no magic"), ("none", "torn", "same", "other"), sorted(JOURNALS), (65536,))
)
SMALL = list(product(("clean", "live", "no magic"), ("no room",), sorted(JOURNALS), (512, 4096)))


@pytest.mark.parametrize(("sector", "copy", "journal", "cluster_bytes"), LARGE + SMALL)
def test_every_combination_does_what_its_row_says(
    sector: str, copy: str, journal: str, cluster_bytes: int
) -> None:
    row = matching_row(sector, copy, journal)
    image, kept = with_journal(journal, cluster_bytes)
    put_root_copy(image, copy)
    if journal == "cut":
        del image.content[image.extent.end - 1 :]
    if sector == "clean":
        image.write(image.clean_sector, 0)
        kept = 1 if journal == "two epochs" else 0  # what a checkpoint brought home
    elif sector == "no magic":
        image.write(b"\xee" * SECTOR_BYTES, 0)
    content = bytes(image.content)
    check_reading(row, content, cluster_bytes, kept)
    check_writing(row, content, cluster_bytes, kept)
    check_recovering(row, content, cluster_bytes, kept)


def test_every_row_is_met() -> None:
    met = {matching_row(sector, copy, journal).name for sector, copy, journal, _ in LARGE + SMALL}
    assert met == {row.name for row in ROWS}


def test_every_word_of_the_journals_is_met() -> None:
    assert set(JOURNALS.values()) == {"good", "damaged", "newer"}
    assert len(JOURNALS) == 10


def test_guest_data_is_never_taken_for_a_root_copy() -> None:
    """In small clusters host offset 4096 may be a data cluster, whose bytes the guest chooses."""
    image, _ = with_journal("records", 512)
    image.write(roots.pack_root_copy(bytes(image.content[:SECTOR_BYTES])), roots.ROOT_COPY_OFFSET)
    image.write(b"\xee" * SECTOR_BYTES, 0)
    with pytest.raises(jqcow.FormatError):
        recover_image(device_of(image.content))
