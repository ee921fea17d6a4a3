"""The record of a protection, and how a disk is divided: exact and bounded."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow import _native
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk.protection import (
    BLOCK_BYTES,
    CHECKS_MAX,
    MAGIC,
    Record,
    RecordBlock,
    Units,
    pack_sums,
    sum_of,
    unpack_sums,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("cluster_bits", "unit_bytes", "granularity"),
    [(9, 16384, 512), (12, 16384, 512), (14, 16384, 512), (16, 65536, 2048), (21, 2 << 20, 65536)],
)
def test_a_unit_is_a_cluster_or_16_kib(cluster_bits: int, unit_bytes: int, granularity: int) -> None:
    units = Units(GIB, cluster_bits)
    assert (units.unit_bytes, 1 << units.sums_bits) == (unit_bytes, granularity)
    assert granularity * 32 == unit_bytes


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
@pytest.mark.parametrize("size", [1 << 20, 10 << 20, GIB, 1000 * GIB, 1 << 42])
def test_a_record_has_room_however_the_disk_grows(cluster_bits: int, size: int) -> None:
    bits = Units(size, cluster_bits).record_bits
    for factor in (1, 1.0001, 1.5, 1.99, 2, 2.01, 3, 100):
        grown = Units(int(size * factor) // 512 * 512, cluster_bits)
        assert grown.room(bits) >= grown.record_bytes


def test_the_bytes_of_a_block() -> None:
    block = RecordBlock(0x0102030405060708, 3 << 20, 16, 0, (0xAABBCCDD,)).pack()
    assert block[:16] == b"jqcow-protection"
    assert struct.unpack_from(">I", block, 16) == (1,)
    assert struct.unpack_from(">QQIIII", block, 24) == (0x0102030405060708, 3 << 20, 16, 16, 0, 1)
    assert block[56:] == b"\xaa\xbb\xcc\xdd"
    assert struct.unpack_from(">I", block, 20)[0] == _native.crc32c(block[:20] + bytes(4) + block[24:])


def test_a_record_is_read_as_it_was_written() -> None:
    units = Units(5000 * 128 * 16384, 9)
    checks = tuple(range(1, units.sum_clusters + 1))
    record = Record(7, units, checks)
    blocks = list(record.blocks())
    assert len(blocks) == -(-units.sum_clusters // CHECKS_MAX)
    payload = b"".join(block.ljust(BLOCK_BYTES, b"\0") for block in blocks)
    assert Record.unpack(payload, 9) == record
    assert Record.unpack(payload, 12) is None
    # A block that is damaged leaves its part unknown.
    broken = bytearray(payload)
    broken[BLOCK_BYTES + 60] ^= 1
    found = Record.unpack(bytes(broken), 9)
    assert found is not None
    assert set(found.checks[CHECKS_MAX : 2 * CHECKS_MAX]) == {None}
    assert found.checks[:CHECKS_MAX] == checks[:CHECKS_MAX]


def test_the_newer_block_counts_and_the_newest_size() -> None:
    old, new = RecordBlock(1, GIB, 16, 0, (1,)), RecordBlock(2, GIB, 16, 0, (2,))
    record = Record.of_blocks([new, old], 16)
    assert record is not None
    assert record.checks == (2,)
    record = Record.of_blocks([RecordBlock(3, GIB // 2, 16, 0, (3,)), new], 16)
    assert record is not None
    assert (record.units.disk_bytes, record.checks) == (GIB // 2, (3,))


def test_a_newer_version_is_refused() -> None:
    block = bytearray(RecordBlock(1, GIB, 16, 0, (1,)).pack())
    block[19] = 2
    block[20:24] = bytes(4)
    block[20:24] = _native.crc32c(bytes(block)).to_bytes(4, "big")
    with pytest.raises(UnsupportedFeatureError):
        RecordBlock.unpack(bytes(block))


@given(st.binary(max_size=600))
def test_other_bytes_are_no_block(data: bytes) -> None:
    assert RecordBlock.unpack(data) is None
    assert RecordBlock.unpack(MAGIC + data) is None


@given(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 40),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, CHECKS_MAX),
)
def test_numbers_that_no_image_has_are_no_block(size: int, bits: int, first: int, count: int) -> None:
    """With a right checksum: what is taken is bounded, whatever a block says."""
    block = bytearray(struct.pack(">16sIIQQIIII", MAGIC, 1, 0, 1, size, bits, max(bits, 14), first, count))
    block += bytes(4 * count)
    block[20:24] = _native.crc32c(bytes(block)).to_bytes(4, "big")
    found = RecordBlock.unpack(bytes(block))
    if found is not None:
        assert found.units.count * 4 <= 512 << 20
        record = Record.of_blocks([found], bits)
        assert record is not None
        assert len(record.checks) <= 1 << 20


def test_sums_are_of_bytes_from_last_to_first() -> None:
    """Else blocks that end with their own CRC-32C, as superblocks of ext4, would have one sum."""
    one, other = (body + _native.crc32c(body).to_bytes(4, "little") for body in (b"old" * 100, b"new" * 100))
    assert _native.crc32c(one) == _native.crc32c(other)
    assert sum_of(one, 16384) != sum_of(other, 16384)
    assert sum_of(bytes(16384), 16384) == sum_of(b"", 16384) == 0
    assert sum_of(b"ab", 16384) == _native.crc32c(bytes(16382) + b"ba") ^ _native.crc32c(bytes(16384))
    assert list(unpack_sums(pack_sums([1, 0xFFFFFFFF]))) == [1, 0xFFFFFFFF]
