"""Does every C kernel say what its Python twin says, and do both say what the specification says?

The tests call each implementation by name, so that they do not depend on which one serves.
"""

from __future__ import annotations

import struct
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow import _native
from jqcow._native import twins
from jqcow.ondisk.entries import COPIED, OFFSET_MASK
from jqcow.ondisk.l2 import COMPRESSED
from jqcow.ondisk.l2 import ZERO as ZERO_FLAG

bindings = pytest.importorskip("jqcow._native.bindings", reason="the C kernels were not built")

IMPLEMENTATIONS = pytest.mark.parametrize("kernels", [bindings, twins], ids=["c", "python"])
ORDERS = range(7)

# Mostly zeros, so that searches run over whole words before they find something.
sparse_bytes = st.lists(st.sampled_from([b"\0" * 9, b"\1", b"\xff", b"\x80", b"\0"]), max_size=40).map(
    b"".join
)
any_bytes = st.binary(max_size=300) | sparse_bytes
full_bytes = st.lists(st.sampled_from([b"\xff" * 9, b"\x55", b"\0", b"\xfe"]), max_size=40).map(b"".join)


@st.composite
def refcount_ranges(draw: st.DrawFn) -> tuple[bytes, int, int, int]:
    """A block, an order, and a range of entries within the block."""
    block = draw(any_bytes | full_bytes)
    order = draw(st.sampled_from(ORDERS))
    entry_count = len(block) * 8 >> order
    start = draw(st.integers(0, entry_count))
    return block, order, start, draw(st.integers(start, entry_count))


@st.composite
def l2_entries(draw: st.DrawFn, cluster_bits: int) -> int:
    """An entry that often continues the one before it: few distinct host clusters, few flags."""
    offset = draw(st.integers(0, 6)) << cluster_bits
    flags = draw(st.sampled_from([0, COPIED, 1, 1 | COPIED, COMPRESSED, COMPRESSED | 0x1234]))
    return offset | flags


def pack_table(entries: list[int]) -> bytes:
    return struct.pack(f">{len(entries)}Q", *entries)


class TestCrc32c:
    @IMPLEMENTATIONS
    def test_check_value(self, kernels: ModuleType) -> None:
        assert kernels.crc32c(b"123456789") == 0xE3069283
        assert kernels.crc32c(b"") == 0
        assert kernels.crc32c(bytes(32)) == 0x8A9136AA

    def test_every_short_length_at_every_alignment(self) -> None:
        pattern = bytes((7 * at + 3) % 256 for at in range(80))
        for start in range(9):
            for length in range(71):
                data = memoryview(pattern)[start : start + length]
                expected = twins.crc32c(data)
                assert bindings.crc32c(data) == expected
                assert bindings.crc32c_portable(data) == expected

    @given(data=st.binary(max_size=5000), value=st.integers(0, 0xFFFF_FFFF))
    def test_equal(self, data: bytes, value: int) -> None:
        expected = twins.crc32c(data, value)
        assert bindings.crc32c(data, value) == expected
        assert bindings.crc32c_portable(data, value) == expected

    @IMPLEMENTATIONS
    @given(first=any_bytes, second=any_bytes)
    def test_chains(self, kernels: ModuleType, first: bytes, second: bytes) -> None:
        assert kernels.crc32c(second, kernels.crc32c(first)) == kernels.crc32c(first + second)


class TestIsZero:
    @IMPLEMENTATIONS
    def test_one_byte_anywhere_is_seen(self, kernels: ModuleType) -> None:
        for length in range(71):
            data = bytearray(length + 3)
            assert kernels.is_zero(memoryview(data)[3:])
            for at in range(length):
                data[3 + at] = 1
                assert not kernels.is_zero(memoryview(data)[3:])
                data[3 + at] = 0

    @IMPLEMENTATIONS
    def test_large_buffers(self, kernels: ModuleType) -> None:
        data = bytearray(200_001)
        assert kernels.is_zero(data)
        data[-1] = 1
        assert not kernels.is_zero(data)

    @given(data=any_bytes)
    def test_equal(self, data: bytes) -> None:
        assert bindings.is_zero(data) == twins.is_zero(data) == (data.count(0) == len(data))


class TestRefcountEntries:
    @IMPLEMENTATIONS
    @pytest.mark.parametrize(
        ("order", "index", "expected"),
        [
            (0, 0, 1),
            (0, 1, 0),
            (0, 9, 1),
            (1, 0, 1),
            (1, 3, 2),
            (2, 0, 1),
            (2, 1, 8),
            (3, 1, 2),
            (4, 0, 0x8102),
            (5, 1, 0x05060708),
            (6, 0, 0x8102030405060708),
        ],
    )
    def test_bit_order_of_the_specification(
        self, kernels: ModuleType, order: int, index: int, expected: int
    ) -> None:
        block = bytes([0x81, 2, 3, 4, 5, 6, 7, 8])
        assert kernels.refcount_get(block, index, order) == expected

    @IMPLEMENTATIONS
    @given(block=st.binary(min_size=8, max_size=80), order=st.sampled_from(ORDERS), data=st.data())
    def test_setting_changes_one_entry(
        self, kernels: ModuleType, block: bytes, order: int, data: st.DataObject
    ) -> None:
        entry_count = len(block) * 8 >> order
        index = data.draw(st.integers(0, entry_count - 1))
        value = data.draw(st.integers(0, (1 << (1 << order)) - 1))
        expected = [kernels.refcount_get(block, at, order) for at in range(entry_count)]
        expected[index] = value
        changed = bytearray(block)
        kernels.refcount_set(changed, index, order, value)
        assert [kernels.refcount_get(changed, at, order) for at in range(entry_count)] == expected

    @given(block=st.binary(min_size=8, max_size=80), order=st.sampled_from(ORDERS), data=st.data())
    def test_equal(self, block: bytes, order: int, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, (len(block) * 8 >> order) - 1))
        value = data.draw(st.integers(0, (1 << (1 << order)) - 1))
        assert bindings.refcount_get(block, index, order) == twins.refcount_get(block, index, order)
        by_c, by_twin = bytearray(block), bytearray(block)
        bindings.refcount_set(by_c, index, order, value)
        twins.refcount_set(by_twin, index, order, value)
        assert by_c == by_twin

    @IMPLEMENTATIONS
    def test_refusals(self, kernels: ModuleType) -> None:
        block = bytearray(8)
        for index, order in ((4, 4), (-1, 4), (64, 0), (1, 6)):
            with pytest.raises(IndexError):
                kernels.refcount_get(block, index, order)
            with pytest.raises(IndexError):
                kernels.refcount_set(block, index, order, 0)
        for order, value in ((0, 2), (4, 65536), (6, 1 << 64), (4, -1)):
            with pytest.raises(OverflowError):
                kernels.refcount_set(block, 0, order, value)
        for order in (-1, 7):
            with pytest.raises(ValueError, match="order"):
                kernels.refcount_get(block, 0, order)
        for start, stop in ((3, 2), (0, 5), (-1, 2)):
            with pytest.raises(IndexError):
                kernels.refcount_find_zero(block, 4, start, stop)
            with pytest.raises(IndexError):
                kernels.refcount_find_used(block, 4, start, stop)


class TestRefcountSearches:
    @IMPLEMENTATIONS
    @given(case=refcount_ranges())
    def test_found_where_reading_every_entry_finds(
        self, kernels: ModuleType, case: tuple[bytes, int, int, int]
    ) -> None:
        block, order, start, stop = case
        refcounts = [twins.refcount_get(block, index, order) for index in range(len(block) * 8 >> order)]
        zeros = [index for index in range(start, stop) if refcounts[index] == 0]
        used = [index for index in range(start, stop) if refcounts[index] != 0]
        all_used = [index for index, refcount in enumerate(refcounts) if refcount]
        assert kernels.refcount_find_zero(block, order, start, stop) == (zeros[0] if zeros else -1)
        assert kernels.refcount_find_used(block, order, start, stop) == (used[0] if used else -1)
        assert kernels.refcount_last_used(block, order) == (all_used[-1] if all_used else -1)

    @IMPLEMENTATIONS
    @pytest.mark.parametrize("order", ORDERS)
    def test_one_entry_that_differs_is_found_anywhere(self, kernels: ModuleType, order: int) -> None:
        """Every position in whole words, where the C kernel looks at a word at a time."""
        entry_count = 32 * 8 >> order
        for index in range(entry_count):
            block = bytearray(32)
            kernels.refcount_set(block, index, order, 1)
            assert kernels.refcount_find_used(block, order, 0, entry_count) == index
            assert kernels.refcount_last_used(block, order) == index
            full = bytearray(b"\xff" * 32)
            kernels.refcount_set(full, index, order, 0)
            assert kernels.refcount_find_zero(full, order, 0, entry_count) == index


class TestSubclusterRun:
    """What it means `tests/unit/test_ondisk_l2.py` holds to the entries."""

    @given(
        words=st.lists(
            st.tuples(
                st.sampled_from((0, 0x10000, 0x20000, 0x30000, COPIED | 0x20000, COMPRESSED | 0x12345)),
                st.sampled_from((0, 0xFFFF_FFFF, 0xFFFF_FFFF << 32)) | st.integers(0, (1 << 64) - 1),
            ),
            min_size=1,
            max_size=6,
        ),
        data=st.data(),
    )
    def test_equal(self, words: list[tuple[int, int]], data: st.DataObject) -> None:
        table = pack_table([half for word in words for half in word])
        index = data.draw(st.integers(0, 32 * len(words) - 1))
        limit = data.draw(st.integers(1, 250))
        args = (table, index, limit, 16)
        assert bindings.subcluster_run(*args) == twins.subcluster_run(*args)

    @IMPLEMENTATIONS
    def test_refusals(self, kernels: ModuleType) -> None:
        for index, limit in ((64, 1), (-1, 1), (0, 0)):
            with pytest.raises(IndexError):
                kernels.subcluster_run(bytes(32), index, limit, 16)


class TestL2Run:
    @given(entries=st.lists(l2_entries(16), min_size=2, max_size=30), limit=st.integers(1, 20))
    def test_of_longer_entries_the_first_words_count(self, entries: list[int], limit: int) -> None:
        spread = pack_table([half for entry in entries for half in (entry, 0xABCD)])
        for kernels in (bindings, twins):
            assert kernels.l2_run(spread, 1, limit, 16, 16) == twins.l2_run(pack_table(entries), 1, limit, 16)
            for table, wide in ((bytearray(spread), 16), (bytearray(pack_table(entries)), 8)):
                kernels.set_copied(table, 1, 2, True, wide)
                assert table[wide] >> 7 == 1

    @given(entries=st.lists(l2_entries(16), min_size=1, max_size=30), data=st.data())
    def test_equal(self, entries: list[int], data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(entries) - 1))
        limit = data.draw(st.integers(1, 40))
        table = pack_table(entries)
        assert bindings.l2_run(table, index, limit, 16) == twins.l2_run(table, index, limit, 16)

    @given(entries=st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=8))
    def test_equal_on_any_bits(self, entries: list[int]) -> None:
        table = pack_table(entries)
        for index in range(len(entries)):
            assert bindings.l2_run(table, index, 8, 9) == twins.l2_run(table, index, 8, 9)

    @IMPLEMENTATIONS
    @pytest.mark.parametrize(
        ("entries", "expected"),
        [
            ([0, 0, COPIED, 0x10000], (_native.UNALLOCATED, 0, 3)),
            ([1, 0x10001, 0x50001 | COPIED, 0], (_native.ZERO, 0, 3)),
            ([0x30000 | COPIED, 0x40000 | COPIED, 0x50000, 0x60000], (_native.DATA, 0x30000, 2)),
            ([0x30000, 0x40000, 0x50000, 0x70000], (_native.DATA, 0x30000, 3)),
            ([0x30000, 0x30000], (_native.DATA, 0x30000, 1)),
            ([0x30000, 0x40001], (_native.DATA, 0x30000, 1)),
            ([COMPRESSED | 0x12345, COMPRESSED | 0x12345], (_native.COMPRESSED, 0x12345, 1)),
        ],
    )
    def test_kinds(self, kernels: ModuleType, entries: list[int], expected: tuple[int, int, int]) -> None:
        table = pack_table(entries)
        assert kernels.l2_run(table, 0, len(entries), 16) == expected
        assert kernels.l2_run(table, 0, 2, 16) == (*expected[:2], min(expected[2], 2))

    @IMPLEMENTATIONS
    @pytest.mark.parametrize("bit", range(64))
    def test_every_bit_means_what_the_format_says(self, kernels: ModuleType, bit: int) -> None:
        entry = 1 << bit
        if entry == COMPRESSED:
            expected = (_native.COMPRESSED, 0, 1)
        elif entry == ZERO_FLAG:
            expected = (_native.ZERO, 0, 1)
        elif entry & OFFSET_MASK:
            expected = (_native.DATA, entry, 1)
        else:
            expected = (_native.UNALLOCATED, 0, 1)
        assert kernels.l2_run(pack_table([entry]), 0, 1, 9) == expected

    @IMPLEMENTATIONS
    @pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
    def test_a_whole_table_is_one_run(self, kernels: ModuleType, cluster_bits: int) -> None:
        table = pack_table([(at + 5) << cluster_bits for at in range(100)])
        assert kernels.l2_run(table, 3, 1000, cluster_bits) == (_native.DATA, 8 << cluster_bits, 97)

    @IMPLEMENTATIONS
    def test_refusals(self, kernels: ModuleType) -> None:
        for index, limit in ((2, 1), (-1, 1), (0, 0)):
            with pytest.raises(IndexError):
                kernels.l2_run(bytes(16), index, limit, 16)


class TestRefcountRuns:
    @given(
        values=st.lists(
            st.sampled_from([0, 1, 1, 2, 3, 255, 65535, 2**63, 2**64 - 1]), min_size=8, max_size=64
        ),
        order=st.sampled_from(ORDERS),
        delta=st.sampled_from([-2, -1, 1, 3, 2**63, 2**64 - 1, -(2**63) - 1, 1 - 2**64]),
        data=st.data(),
    )
    def test_equal(self, values: list[int], order: int, delta: int, data: st.DataObject) -> None:
        largest = (1 << (1 << order)) - 1
        block = bytearray(len(values) * 8)
        for index, value in enumerate(values):
            twins.refcount_set(block, index, order, min(value, largest))
        start = data.draw(st.integers(0, len(values) - 1))
        stop = data.draw(st.integers(start + 1, len(values)))
        assert bindings.refcount_run(block, order, start, stop) == twins.refcount_run(
            block, order, start, stop
        )
        by_c, by_twin = bytearray(block), bytearray(block)
        failed_at = bindings.refcount_add(by_c, order, start, stop, delta)
        assert failed_at == twins.refcount_add(by_twin, order, start, stop, delta)
        assert by_c == by_twin
        assert failed_at < 0 or by_c == block

    @IMPLEMENTATIONS
    @pytest.mark.parametrize("order", ORDERS)
    def test_a_run_ends_where_the_value_changes(self, kernels: ModuleType, order: int) -> None:
        block = bytearray(128)
        for index in range(3, 9):
            kernels.refcount_set(block, index, order, 1)
        assert kernels.refcount_run(block, order, 0, 16) == (0, 3)
        assert kernels.refcount_run(block, order, 3, 16) == (1, 6)
        assert kernels.refcount_run(block, order, 4, 7) == (1, 3)

    @IMPLEMENTATIONS
    @pytest.mark.parametrize("order", ORDERS)
    def test_adding_stays_within_bounds_or_changes_nothing(self, kernels: ModuleType, order: int) -> None:
        block = bytearray(64)
        assert kernels.refcount_add(block, order, 1, 5, 1) == -1
        assert [kernels.refcount_get(block, index, order) for index in range(6)] == [0, 1, 1, 1, 1, 0]
        before = bytes(block)
        assert kernels.refcount_add(block, order, 1, 6, -1) == 5
        kernels.refcount_set(block, 3, order, (1 << (1 << order)) - 1)
        full = bytes(block)
        assert kernels.refcount_add(block, order, 1, 5, 1) == (1 if order == 0 else 3)
        assert block == full
        kernels.refcount_set(block, 3, order, 1)
        assert block == before
        assert kernels.refcount_add(block, order, 1, 5, -1) == -1
        assert not any(block)

    @IMPLEMENTATIONS
    def test_refusals(self, kernels: ModuleType) -> None:
        for start, stop in ((4, 5), (-1, 2), (2, 2)):
            with pytest.raises(IndexError):
                kernels.refcount_run(bytes(8), 4, start, stop)
        with pytest.raises(IndexError):
            kernels.refcount_add(bytearray(8), 4, 0, 5, 1)


class TestSetCopied:
    @given(entries=st.lists(l2_entries(16), min_size=1, max_size=30), copied=st.booleans(), data=st.data())
    def test_equal(self, entries: list[int], copied: bool, data: st.DataObject) -> None:
        start = data.draw(st.integers(0, len(entries)))
        stop = data.draw(st.integers(start, len(entries)))
        by_c, by_twin = bytearray(pack_table(entries)), bytearray(pack_table(entries))
        bindings.set_copied(by_c, start, stop, copied)
        twins.set_copied(by_twin, start, stop, copied)
        flag = COPIED if copied else 0
        expected = [
            entry & ~COPIED | flag if start <= at < stop else entry for at, entry in enumerate(entries)
        ]
        assert by_c == by_twin == pack_table(expected)

    @IMPLEMENTATIONS
    def test_refusals(self, kernels: ModuleType) -> None:
        for start, stop in ((0, 3), (-1, 1), (2, 1)):
            with pytest.raises(IndexError):
                kernels.set_copied(bytearray(16), start, stop, True)


@IMPLEMENTATIONS
def test_every_kind_of_buffer_is_taken(kernels: ModuleType) -> None:
    for buffer in (b"\0\1" * 8, bytearray(b"\0\1" * 8), memoryview(b"x" + b"\0\1" * 8)[1:]):
        assert kernels.crc32c(buffer) == kernels.crc32c(b"\0\1" * 8)
        assert not kernels.is_zero(buffer)
        assert kernels.refcount_get(buffer, 7, 4) == 1
        assert kernels.refcount_last_used(buffer, 4) == 7
    with pytest.raises((TypeError, BufferError)):
        kernels.refcount_set(b"\0\0", 0, 4, 1)


class TestXtsWhiten:
    @given(sectors=st.integers(0, 5), blocks=st.integers(1, 33), data=st.data())
    def test_equal(self, sectors: int, blocks: int, data: st.DataObject) -> None:
        length = sectors * blocks * 16
        content = data.draw(st.binary(min_size=length, max_size=length))
        tweaks = data.draw(st.binary(min_size=sectors * 16, max_size=sectors * 16))
        by_c, by_twin = bytearray(content), bytearray(content)
        bindings.xts_whiten(by_c, tweaks, blocks * 16)
        twins.xts_whiten(by_twin, tweaks, blocks * 16)
        assert by_c == by_twin

    @IMPLEMENTATIONS
    def test_a_tweak_is_doubled_from_block_to_block(self, kernels: ModuleType) -> None:
        data = bytearray(48)
        kernels.xts_whiten(data, bytes(15) + b"\xc0", 48)
        assert data == bytes(15) + b"\xc0" + b"\x87" + bytes(14) + b"\x80" + b"\x89\x01" + bytes(14)

    @IMPLEMENTATIONS
    @pytest.mark.parametrize(("length", "tweaks", "sector"), [(512, 15, 512), (500, 16, 512), (24, 16, 24)])
    def test_lengths_that_do_not_fit(
        self, kernels: ModuleType, length: int, tweaks: int, sector: int
    ) -> None:
        with pytest.raises(ValueError):
            kernels.xts_whiten(bytearray(length), bytes(tweaks), sector)
