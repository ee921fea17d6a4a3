"""Does every C kernel over whole tables say what its Python twin says, and do both say what is true?"""

from __future__ import annotations

import struct
from array import array
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow._native import CountedFile, twins
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.l2 import COMPRESSED, EXTENDED_RESERVED, L2_RESERVED, ZERO, compressed_entry
from jqcow.ondisk.layout import DATA_FILE

bindings = pytest.importorskip("jqcow._native.bindings", reason="the C kernels were not built")

IMPLEMENTATIONS = pytest.mark.parametrize("kernels", [bindings, twins], ids=["c", "python"])
CODES = st.sampled_from("BHIQ")
BITS = 16
CLUSTERS = 12


def view(code: str, values: list[int]) -> memoryview:
    return memoryview(array(code, values))


class TestFirstDifference:
    @given(first=CODES, second=CODES, values=st.lists(st.integers(0, 3), max_size=40), data=st.data())
    def test_equal(self, first: str, second: str, values: list[int], data: st.DataObject) -> None:
        others = list(values)
        for index in data.draw(st.lists(st.integers(0, len(values) - 1), max_size=2)) if values else ():
            others[index] = 200
        start = data.draw(st.integers(0, len(values)))
        stop = data.draw(st.integers(start, len(values)))
        expected = next((at for at in range(start, stop) if values[at] != others[at]), -1)
        arrays = view(first, values), view(second, others)
        assert bindings.first_difference(*arrays, start, stop) == expected
        assert twins.first_difference(*arrays, start, stop) == expected

    @IMPLEMENTATIONS
    def test_windows_and_wide_values(self, kernels: ModuleType) -> None:
        # What a narrower load would not tell apart, far into the arrays.
        values = [5] * 20_000
        others = [*values[:-1], 5 + (1 << 32)]
        assert kernels.first_difference(view("Q", values), view("Q", others), 1, 20_000) == 19_999
        assert kernels.first_difference(view("Q", values), view("Q", others), 1, 19_999) == -1
        assert kernels.first_difference(view("H", values), view("I", values), 0, 20_000) == -1

    @IMPLEMENTATIONS
    @pytest.mark.parametrize("bounds", [(-1, 1), (0, 4), (2, 1)])
    def test_ranges_outside_are_refused(self, kernels: ModuleType, bounds: tuple[int, int]) -> None:
        with pytest.raises(IndexError):
            kernels.first_difference(view("B", [0] * 3), view("B", [0] * 5), *bounds)


class TestRefcountDecode:
    @given(block=st.binary(max_size=64), order=st.integers(0, 6))
    def test_equal(self, block: bytes, order: int) -> None:
        expected = [twins.refcount_get(block, index, order) for index in range(len(block) * 8 >> order)]
        for kernels in (bindings, twins):
            found = kernels.refcount_decode(block, order)
            assert found.tolist() == expected
            assert found.itemsize == max(1, 1 << order >> 3)

    @IMPLEMENTATIONS
    def test_unknown_widths_are_refused(self, kernels: ModuleType) -> None:
        with pytest.raises(ValueError, match="order 7"):
            kernels.refcount_decode(bytes(8), 7)


class TestZeroRun:
    @given(units=st.lists(st.booleans(), min_size=1, max_size=20), size=st.integers(1, 70), data=st.data())
    def test_equal(self, units: list[bool], size: int, data: st.DataObject) -> None:
        whole = b"".join(bytes(size) if zero else bytes(size - 1) + b"\1" for zero in units)
        start = data.draw(st.integers(0, len(units) - 1))
        stop = data.draw(st.integers(start + 1, len(units)))
        count = next((at for at in range(start, stop) if units[at] != units[start]), stop) - start
        for kernels in (bindings, twins):
            assert kernels.zero_run(whole, start, stop, size) == (units[start], count)

    @IMPLEMENTATIONS
    @pytest.mark.parametrize("bounds", [(0, 0, 4), (0, 3, 4), (-1, 1, 4), (0, 1, 0)])
    def test_ranges_outside_are_refused(self, kernels: ModuleType, bounds: tuple[int, int, int]) -> None:
        with pytest.raises(IndexError):
            kernels.zero_run(bytes(11), *bounds)


def a_file(
    *,
    extended: bool = False,
    outside: bool = False,
    codes: tuple[str, str] = ("I", "H"),
    references: list[int] | None = None,
    refcount_max: int = 3,
) -> CountedFile:
    """A file of 12 clusters of 64 KiB: metadata in the first two, refcount 2 in the last two, else 1."""
    return CountedFile(
        references=view(codes[0], references or [0] * CLUSTERS),
        refcounts=view(codes[1], [1] * (CLUSTERS - 2) + [2] * 2),
        owners=view("B", [1, 2] + [0] * (CLUSTERS - 2)),
        cluster_bits=BITS,
        entry_bytes=16 if extended else 8,
        reserved_bits=EXTENDED_RESERVED if extended else L2_RESERVED,
        refcount_max=refcount_max,
        avoided=(5, 7),
        outside=DATA_FILE if outside else 0,
    )


ENTRIES = st.sampled_from(
    [
        *(COPIED | cluster << BITS for cluster in range(2, 5)),
        *(COPIED | cluster << BITS for cluster in (0, 1, 5, 7, 8, 9, 10, 11, 12, 1 << 30)),
        *(cluster << BITS for cluster in (2, 10, 11)),
        *(ZERO, ZERO | COPIED | 3 << BITS, ZERO | COPIED, COPIED, 0, 0, 0),
        *(1 << 60, 1 << 5, COPIED | 3 << BITS | 512),
        *(compressed_entry(offset, 5000, BITS) for offset in (0x21234, 0x2F000, 0x4F000, 0xBF000)),
        COPIED | COMPRESSED | 0x30000,
        compressed_entry(0xBF000, 512, BITS),
    ]
)
BITMAPS = st.sampled_from([0, 0, 1, 0xFF, 1 << 32, 1 | 1 << 33, 1 | 1 << 32, 0xFFFF_FFFF])


class TestCountEntries:
    @given(
        words=st.lists(ENTRIES, max_size=12),
        bitmaps=st.lists(BITMAPS, min_size=12, max_size=12),
        extended=st.booleans(),
        outside=st.booleans(),
        codes=st.sampled_from([("I", "H"), ("I", "B"), ("I", "I"), ("Q", "Q")]),
        is_active=st.booleans(),
        repeats=st.integers(1, 2),
    )
    def test_equal(
        self,
        words: list[int],
        bitmaps: list[int],
        extended: bool,
        outside: bool,
        codes: tuple[str, str],
        is_active: bool,
        repeats: int,
    ) -> None:
        pairs = zip(words, bitmaps, strict=False)
        table = b"".join(
            struct.pack(">QQ", *pair) if extended else struct.pack(">Q", pair[0]) for pair in pairs
        )
        by_c, by_twin = (a_file(extended=extended, outside=outside, codes=codes) for _ in range(2))
        start = 0
        while start < len(words):
            found = [
                kernels.count_entries(file, table, start, len(words), 3 << BITS, is_active, repeats)
                for kernels, file in ((bindings, by_c), (twins, by_twin))
            ]
            assert found[0] == found[1]
            assert by_c.references.tolist() == by_twin.references.tolist()
            start = found[0].stop + 1

    @IMPLEMENTATIONS
    def test_what_is_right_is_counted_up_to_what_is_not(self, kernels: ModuleType) -> None:
        good = [COPIED | 2 << BITS, COPIED | 3 << BITS, 0, ZERO, 10 << BITS, ZERO | COPIED | 8 << BITS]
        file = a_file()
        table = struct.pack(">8Q", *good, compressed_entry(0x4E000, 0x1800, BITS), COPIED | 11 << BITS)
        found = kernels.count_entries(file, table, 0, 8, 0, True, 1)
        assert found == (7, 9 << BITS, 5, 3, 1, 2)
        assert file.references.tolist() == [0, 0, 1, 1, 1, 0, 0, 0, 1, 0, 1, 0]

    @IMPLEMENTATIONS
    def test_data_that_reaches_where_nothing_may_is_not_counted_at_all(self, kernels: ModuleType) -> None:
        # The second cluster of the compressed data is one that no entry may name.
        file = a_file()
        table = struct.pack(">Q", compressed_entry(0x4F800, 0x1800, BITS))
        assert kernels.count_entries(file, table, 0, 1, 0, True, 1) == (0, 0, 0, 0, 0, 0)
        assert not any(file.references)

    @IMPLEMENTATIONS
    def test_flags_count_in_tables_of_the_disk_alone(self, kernels: ModuleType) -> None:
        table = struct.pack(">Q", 3 << BITS)
        assert kernels.count_entries(a_file(), table, 0, 1, 0, True, 1).stop == 0
        assert kernels.count_entries(a_file(), table, 0, 1, 0, False, 1).stop == 1

    @IMPLEMENTATIONS
    def test_no_more_references_than_count(self, kernels: ModuleType) -> None:
        largest = (1 << 64) - 1
        file = a_file(codes=("Q", "Q"), references=[largest - 1] * CLUSTERS, refcount_max=largest)
        table = struct.pack(">2Q", COPIED | 3 << BITS, COPIED | 3 << BITS)
        assert kernels.count_entries(file, table, 0, 2, 0, True, 1).stop == 1
        assert file.references[3] == largest

    @IMPLEMENTATIONS
    def test_a_data_file_has_a_cluster_at_offset_0(self, kernels: ModuleType) -> None:
        table = struct.pack(">3Q", COPIED, COPIED | 1 << BITS, 1 << BITS)
        file = a_file(outside=True)
        assert kernels.count_entries(file, table, 0, 3, 0, True, 1) == (
            2,
            DATA_FILE + (2 << BITS),
            2,
            0,
            0,
            0,
        )
        assert not any(file.references)

    @IMPLEMENTATIONS
    def test_what_c_cannot_refuse_is_refused(self, kernels: ModuleType) -> None:
        with pytest.raises(IndexError):
            kernels.count_entries(a_file(), bytes(16), 0, 3, 0, True, 1)
        with pytest.raises(IndexError):
            kernels.count_entries(a_file(references=[0] * 9), bytes(16), 0, 1, 0, True, 1)
        with pytest.raises(ValueError, match="at most"):
            kernels.count_entries(a_file(refcount_max=1 << 40), bytes(16), 0, 1, 0, True, 1)
        with pytest.raises(ValueError, match="at most"):
            kernels.count_entries(a_file(), bytes(16), 0, 1, 0, True, -1)
