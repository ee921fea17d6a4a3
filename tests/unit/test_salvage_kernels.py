"""The kernels that salvage asks: C and twin agree, and what they count is right."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow import _native
from jqcow._native import MARK_MANY, MARK_ORDER, MARK_STRUCTURE, twins
from jqcow.ondisk.l2 import EXTENDED_RESERVED, L2_RESERVED

HOST_CLUSTERS = 24
OFFSETS = st.integers(0, HOST_CLUSTERS + 2).map(lambda cluster: cluster << 16)
STANDARD = st.builds(
    lambda offset, flags: offset | flags, OFFSETS, st.sampled_from([0, 1, 1 << 63, 1 << 60, 4])
)
COMPRESSED = st.builds(
    lambda offset, sectors: 1 << 62 | sectors << 54 | offset,
    st.integers(0, (HOST_CLUSTERS + 1) << 16),
    st.integers(0, 255),
)
ENTRIES = st.lists(st.one_of(STANDARD, COMPRESSED, st.integers(0, (1 << 64) - 1), st.just(0)), max_size=64)


@given(ENTRIES, st.booleans(), st.integers(0, 65_535))
def test_judging(entries: list[int], extended: bool, missing_bytes: int) -> None:
    entries = entries[: len(entries) // 2 * 2]
    table = struct.pack(f">{len(entries)}Q", *entries)
    host_bytes = (HOST_CLUSTERS << 16) - missing_bytes
    results = []
    for kernels in (_native, twins):
        marks = bytearray(HOST_CLUSTERS // 4)
        twins.refcount_set(marks, 3, MARK_ORDER, MARK_STRUCTURE)
        how = (16, 16, EXTENDED_RESERVED) if extended else (8, 16, L2_RESERVED)
        counts = kernels.l2_judge(table, *how, host_bytes, marks)
        assert counts == kernels.l2_judge(table, *how, host_bytes)[:5] + counts[5:]
        results.append((counts, marks))
    assert results[0] == results[1]
    assert sum(results[0][0][:5]) == len(entries) // (2 if extended else 1)


def test_what_is_judged() -> None:
    cluster = 1 << 16
    entries = [
        0,
        1,
        cluster | 1 << 63,
        cluster,
        2 * cluster | 1,
        3 * cluster,
        1 << 62 | 5 * cluster + 100,
        7,
        9 * cluster,
        1 << 63,
    ]
    marks = bytearray(2)
    twins.refcount_set(marks, 3, MARK_ORDER, MARK_STRUCTURE)
    counts = _native.l2_judge(struct.pack(">10Q", *entries), 8, 16, L2_RESERVED, 8 * cluster, marks)
    assert counts == (1, 1, 4, 1, 3, 1, 1)
    assert [twins.refcount_get(marks, index, MARK_ORDER) for index in range(8)] == [
        *(0, MARK_MANY, 1, MARK_STRUCTURE),
        *(0, 1, 0, 0),
    ]


def test_marks_must_cover_the_file() -> None:
    for kernels in (_native, twins):
        with pytest.raises(IndexError):
            kernels.l2_judge(bytes(8), 8, 16, L2_RESERVED, 5 << 16, bytearray(1))
        with pytest.raises(IndexError):
            kernels.find_unmarked(bytes(512), 4, 0, 5, bytearray(1), 0, bytearray(1))


@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 65_535]), min_size=16, max_size=256),
    st.binary(min_size=64, max_size=64),
    st.integers(0, 15),
)
def test_unmarked(refcounts: list[int], marks: bytes, first: int) -> None:
    block = struct.pack(f">{len(refcounts)}H", *refcounts)
    stop = min(len(refcounts), 256 - first)
    found = []
    for kernels in (_native, twins):
        bits = bytearray(32)
        count = kernels.find_unmarked(block, 4, 0, stop, marks, first, bits)
        assert count == int.from_bytes(bits, "little").bit_count()
        found.append(bits)
    assert found[0] == found[1]
    for index in range(stop):
        is_found = bool(refcounts[index] and not twins.refcount_get(marks, first + index, MARK_ORDER))
        assert bool(found[0][first + index >> 3] >> (first + index & 7) & 1) is is_found


@given(ENTRIES, st.booleans(), st.binary(min_size=6, max_size=6))
def test_shared(entries: list[int], extended: bool, marks: bytes) -> None:
    entries = entries[: len(entries) // 2 * 2]
    table = struct.pack(f">{len(entries)}Q", *entries)
    entry_bytes = 16 if extended else 8
    counts = _native.l2_shared(table, entry_bytes, 16, marks)
    assert counts == twins.l2_shared(table, entry_bytes, 16, marks)
    assert sum(counts) <= len(entries)


def test_what_is_shared() -> None:
    cluster, marks = 1 << 16, bytearray(2)
    for index, mark in enumerate((MARK_STRUCTURE, 0, 1, MARK_MANY, MARK_MANY, MARK_STRUCTURE)):
        twins.refcount_set(marks, index, MARK_ORDER, mark)
    entries = [
        0,
        2 * cluster,
        3 * cluster | 1 << 63,
        4 * cluster,
        1 << 62 | 4 * cluster,
        5 * cluster,
        9 * cluster,
    ]
    assert _native.l2_shared(struct.pack(">7Q", *entries), 8, 16, marks) == (2, 1)
