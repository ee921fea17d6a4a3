"""Attacks that once got through, or that chance would hardly find; each is small and named."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

import jqcow
from jqcow.ondisk import frame as frames
from jqcow.ondisk.frame import BlockOperation, HeaderOperation
from jqcow.ondisk.header import Header
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.root import JournalRange, pack_root
from tests.fuzz.handling import time_bound
from tests.fuzz.sparse import SparseDevice

CLUSTER = 4096
DISK_BYTES = 64 * CLUSTER


def good_image() -> bytearray:
    """A closed image whose first two guest clusters hold data."""
    device = SparseDevice()
    with jqcow.create_on_device(device, DISK_BYTES, cluster_size=CLUSTER, journal_size=64 << 10) as image:
        image.pwrite(b"a" * (2 * CLUSTER), 0)
    device.reopen(read_only=True)
    return bytearray(device.pread(device.size(), 0))


def put(content: bytearray, offset: int, value: int) -> None:
    content[offset : offset + 8] = value.to_bytes(8, "big")


def get(content: bytearray, offset: int) -> int:
    return int.from_bytes(content[offset : offset + 8], "big")


def opened(content: bytearray, mode: jqcow.image.Mode = "r+") -> jqcow.Image:
    return jqcow.open_device(SparseDevice(bytes(content)), mode, journal_size=64 << 10)


def l2_offset(content: bytearray) -> int:
    header = Header.unpack(bytes(content[:SECTOR_BYTES]))
    return get(content, header.l1_table_offset) & ((1 << 56) - SECTOR_BYTES)


def metadata_offsets(content: bytearray) -> dict[str, int]:
    header = Header.unpack(bytes(content[:SECTOR_BYTES]))
    return {
        "L1 table": header.l1_table_offset,
        "refcount table": header.refcount_table_offset,
        "refcount block": get(content, header.refcount_table_offset),
        "L2 table": l2_offset(content),
    }


def test_disk_that_no_table_maps_is_refused() -> None:
    """A size of many exabytes with a small L1 table would take years to walk."""
    content = good_image()
    put(content, 24, 1 << 62)
    for mode in ("r", "r+"):
        with pytest.raises(jqcow.FormatError, match=r"L1 table of .* too small"):
            opened(content, mode)


@pytest.mark.parametrize("victim", ["L1 table", "refcount table", "refcount block", "L2 table"])
@pytest.mark.parametrize("flags", [1 << 63, 1 << 63 | 1], ids=["data", "zero"])
@pytest.mark.parametrize("request_name", ["write", "zero", "unmap", "discard"])
def test_guest_cluster_on_metadata_changes_nothing(victim: str, flags: int, request_name: str) -> None:
    """Neither written in place, nor zeroed, nor freed and handed out again."""
    content = good_image()
    put(content, l2_offset(content), metadata_offsets(content)[victim] | flags)
    device = SparseDevice(bytes(content))
    image = jqcow.open_device(device, "r+", journal_size=64 << 10)
    requests: dict[str, Callable[[], object]] = {
        "write": lambda: image.pwrite(b"x" * CLUSTER, 0),
        "zero": lambda: image.write_zeroes(CLUSTER, 0, unmap=False),
        "unmap": lambda: image.write_zeroes(CLUSTER, 0),
        "discard": lambda: image.discard(CLUSTER, 0),
    }
    with pytest.raises(jqcow.CorruptionError, match="metadata"):
        requests[request_name]()
    offset = metadata_offsets(content)[victim]
    assert device.pread(CLUSTER, offset) == content[offset : offset + CLUSTER]
    image.close()
    device.reopen(read_only=True)
    assert device.pread(4, 0) == b"QFI\xfb"


@pytest.mark.parametrize("refcount", [0, 2, 0xFFFF])
def test_wrong_refcount_of_a_guest_cluster(refcount: int) -> None:
    """A cluster that nobody counts is not written, and not freed; one that seems to be shared is copied."""
    content = good_image()
    host = get(content, l2_offset(content)) & ((1 << 56) - SECTOR_BYTES)
    block = metadata_offsets(content)["refcount block"]
    struct.pack_into(">H", content, block + host // CLUSTER * 2, refcount)
    device = SparseDevice(bytes(content))
    with jqcow.open_device(device, "r+", journal_size=64 << 10) as image:
        for request in (
            lambda: image.pwrite(b"x" * CLUSTER, 0),
            lambda: image.write_zeroes(CLUSTER, 0),
            lambda: image.discard(CLUSTER, 0),
        ):
            if refcount:
                request()
            else:
                with pytest.raises(jqcow.CorruptionError, match="refcount"):
                    request()
        assert device.pread(CLUSTER, host) == b"a" * CLUSTER


@pytest.mark.parametrize("table", ["L1 table", "L2 table", "refcount block"])
def test_metadata_with_refcount_0_is_never_handed_out(table: str) -> None:
    """An allocator that finds a live table free destroys the image: the first change is refused."""
    content = good_image()
    offsets = metadata_offsets(content)
    struct.pack_into(">H", content, offsets["refcount block"] + offsets[table] // CLUSTER * 2, 0)
    image = opened(content)
    with pytest.raises(jqcow.CorruptionError, match="refcount is 0"):
        image.pwrite(b"x", 0)
    assert image.pread(1, 0) == b"a"
    image.close()


def live_image(
    *operations: frames.Operation, journal_at: int | None = None, length: int = 64 << 10
) -> bytearray:
    """A live image whose one record holds the header and ``operations``."""
    content = good_image()
    area = bytes(content[:112]) + bytes(8)
    header = Header.unpack(bytes(content[:SECTOR_BYTES]))
    extent = JournalRange(len(content) if journal_at is None else journal_at, length, bytes(range(16)))
    content[:SECTOR_BYTES] = pack_root(header, extent)
    frame = frames.frame_payload(
        frames.encode_operations([HeaderOperation(area), *operations]), extent.salt, epoch=2, sequence=9
    )
    content.extend(bytes(max(0, extent.end - len(content))))
    content[extent.half_offset(2) : extent.half_offset(2) + len(frame)] = frame
    return content


def test_made_up_live_image_is_good() -> None:
    """The attacks below fail for what is wrong with them, not for how they are made."""
    with opened(live_image()) as image:
        assert image.recovered is not None and image.recovered.last_sequence == 9
        assert image.pread(1, 0) == b"a"
        assert image.check().ok


def test_record_that_writes_into_the_journal_is_refused() -> None:
    journal = len(good_image())
    for mode in ("r", "r+"):
        with pytest.raises(jqcow.CorruptionError, match="write into itself"):
            opened(live_image(BlockOperation(journal + 8192, bytes(4096))), mode)


def test_record_that_replaces_the_root_is_refused() -> None:
    for mode in ("r", "r+"):
        with pytest.raises(jqcow.CorruptionError, match="block operation at 0x0"):
            opened(live_image(BlockOperation(0, bytes(4096))), mode)


def test_journal_in_the_middle_of_the_image_is_refused() -> None:
    """Its clusters have refcounts: they belong to the guest, or to a table."""
    with pytest.raises(jqcow.JqcowError):
        opened(live_image(journal_at=CLUSTER))


def test_journal_past_the_end_of_the_file_is_refused() -> None:
    content = live_image(length=128 << 10)
    with pytest.raises(jqcow.CorruptionError, match="past the end"):
        opened(content[: len(content) - 4096])


@pytest.mark.parametrize("length", [1 << 30, (1 << 30) + 8192, 1 << 40])
def test_huge_journal_takes_bounded_time(length: int) -> None:
    """A sparse file can claim a journal of any length; up to 1 GiB it is read, in bounded time."""
    content = live_image()
    device = SparseDevice(bytes(content))
    header = Header.unpack(bytes(content[:SECTOR_BYTES]))
    extent = JournalRange(len(good_image()), length, bytes(range(16)))
    device.pwrite(pack_root(header, extent), 0)
    device.truncate(extent.end)
    device.reopen(read_only=True)
    with time_bound(30):
        if length > 1 << 30:
            with pytest.raises(jqcow.CorruptionError, match="a journal of"):
                jqcow.open_device(device, "r")
        else:
            with jqcow.open_device(device, "r") as image:
                assert image.pread(1, 0) == b"a"


def test_largest_tables_take_bounded_time() -> None:
    """Tables as large as the limits allow, in a sparse file: opened, walked and changed in bounded time."""
    content = good_image()
    struct.pack_into(">I", content, 36, 4 << 20)
    put(content, 40, 1 << 40)
    put(content, 24, (4 << 20) * 512 * CLUSTER)
    device = SparseDevice(bytes(content))
    device.truncate((1 << 40) + (64 << 20))
    with time_bound(60):
        image = jqcow.open_device(device, "r+", journal_size=64 << 10)
        assert [extent.kind for extent in image.extents()] == ["unallocated"]
        with pytest.raises(jqcow.CorruptionError):
            image.pwrite(b"x", 0)
        image.close()
