"""Extended L2 entries: what they say, what no image can have, and how a request changes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow.ondisk import l2
from jqcow.ondisk.entries import COPIED, DamagedEntry
from jqcow.ondisk.l2 import (
    ALL_SUBCLUSTERS,
    COMPRESSED_CLUSTER,
    DATA,
    NO_ENTRY,
    UNALLOCATED,
    ZERO_CLUSTER,
    ExtendedL2,
    HostRun,
    L2Entry,
    codec_of,
)
from jqcow.ondisk.layout import DATA_FILE, SUBCLUSTERS, Geometry, HostOffset

BITS = 16
CLUSTER = 1 << BITS
PER_TABLE = CLUSTER // 16
GEOMETRY = Geometry(BITS, has_subclusters=True)
CODEC = ExtendedL2(GEOMETRY)
HOST = HostOffset(5 * CLUSTER)


@st.composite
def entries(draw: st.DrawFn) -> L2Entry:
    """Draw an entry that an image can have."""
    host = HostOffset(draw(st.sampled_from((0, 5, 6, 7))) * CLUSTER)
    if draw(st.integers(0, 7)) == 0:
        return L2Entry(COMPRESSED_CLUSTER, HostOffset(HOST + 512), False, 512)
    zeros = draw(st.sampled_from((0, 1, ALL_SUBCLUSTERS)) | st.integers(0, ALL_SUBCLUSTERS))
    allocated = 0
    if host:
        allocated = draw(st.sampled_from((0, ALL_SUBCLUSTERS)) | st.integers(0, ALL_SUBCLUSTERS)) & ~zeros
    kind = DATA if allocated else ZERO_CLUSTER if zeros else UNALLOCATED
    return L2Entry(kind, host, draw(st.booleans()), 0, allocated, zeros)


def packed(*values: L2Entry) -> bytearray:
    table = bytearray(16 * len(values))
    for index, value in enumerate(values):
        CODEC.encode(table, index, value)
    return table


def kind_at(entry: L2Entry, subcluster: int) -> tuple[int, int]:
    """Return what a subcluster is, and where it is if it is data."""
    if entry.kind == COMPRESSED_CLUSTER:
        return COMPRESSED_CLUSTER, entry.host
    if entry.allocated >> subcluster & 1:
        return DATA, entry.host + subcluster * CODEC.subcluster_bytes
    return ZERO_CLUSTER if entry.zeros >> subcluster & 1 else UNALLOCATED, 0


def test_the_codec_follows_from_the_geometry() -> None:
    assert isinstance(codec_of(GEOMETRY), ExtendedL2)
    assert (CODEC.per_table, CODEC.subclusters, CODEC.subcluster_bytes) == (PER_TABLE, SUBCLUSTERS, 2048)
    assert GEOMETRY.l2_entries == PER_TABLE and GEOMETRY.l1_entries_for(PER_TABLE * CLUSTER + 1) == 2


@given(value=entries())
def test_what_is_written_is_read(value: L2Entry) -> None:
    assert CODEC.decode(packed(value), 0) == value


@given(values=st.lists(entries(), min_size=1, max_size=6), data=st.data())
def test_a_run_is_what_each_subcluster_says(values: list[L2Entry], data: st.DataObject) -> None:
    table = packed(*values)
    position = data.draw(st.integers(0, len(values) * SUBCLUSTERS - 1))
    limit = data.draw(st.integers(1, len(values) * SUBCLUSTERS - position))
    run = CODEC.run(table, position, limit)
    assert 1 <= run.subcluster_count <= limit
    first_kind, first_host = kind_at(values[position // SUBCLUSTERS], position % SUBCLUSTERS)
    assert run.kind == first_kind
    for at in range(run.subcluster_count):
        index, subcluster = divmod(position + at, SUBCLUSTERS)
        kind, host = kind_at(values[index], subcluster)
        expected = first_host + at * CODEC.subcluster_bytes if kind == DATA else first_host
        assert (kind, host) == (run.kind, expected)
        assert kind != DATA or values[index].copied == run.copied


def test_data_goes_on_in_the_next_entry() -> None:
    whole = range(SUBCLUSTERS)
    table = packed(*(CODEC.filled(NO_ENTRY, HostOffset(HOST + at * CLUSTER), whole) for at in range(8)))
    run = CODEC.run(table, 7, 8 * SUBCLUSTERS - 7)
    assert run == (DATA, HOST + 7 * 2048, 8 * SUBCLUSTERS - 7, True, 0)
    assert CODEC.host_run(table, 2, 6) == HostRun(HostOffset(HOST + 2 * CLUSTER), 6, True, 0)


def test_empty_entries_of_a_data_file_are_one_run() -> None:
    """The one that has the data file's first cluster is another, though its word has no offset."""
    codec = ExtendedL2(Geometry(BITS, has_subclusters=True, has_data_file=True))
    first, zeros = (COPIED, 1), (0, 1 << 32)
    table = b"".join(
        l2.EXTENDED.pack(*pair) for pair in ((0, 0), (0, 0), (0, 0), first, (0, 0), zeros, (0, 0))
    )
    runs = [codec.place_run(table, index, 7 - index) for index in (0, 3, 4, 5, 6)]
    assert [(run.host, run.entry_count) for run in runs] == [(0, 3), (DATA_FILE, 1), (0, 1), (0, 1), (0, 1)]
    assert codec.host_run(table, 3, 4).host == 0


@pytest.mark.parametrize(
    ("word", "bitmap", "words"),
    [
        (HOST | 1, 1, "reserved bits"),
        (HOST | 1 << 60, 1, "reserved bits"),
        (HOST + 512, 1, "not a cluster's"),
        (HOST, 1 | 1 << 32, "data and zeros"),
        (0, 1, "data without a cluster"),
        (l2.COMPRESSED | HOST, 1, "compressed and has subclusters"),
        (COPIED | l2.COMPRESSED | HOST, 0, "compressed and COPIED"),
    ],
)
def test_what_no_image_has_is_refused(word: int, bitmap: int, words: str) -> None:
    table = bytearray(32)
    l2.EXTENDED.pack_into(table, 16, word, bitmap)
    for look in (CODEC.decode, lambda buffer, index: CODEC.run(buffer, index * SUBCLUSTERS, 1)):
        with pytest.raises(DamagedEntry, match=words):
            look(table, 1)
    # It ends the run of the entry before it.
    assert CODEC.run(table, 0, 64).subcluster_count == SUBCLUSTERS
    (found,) = CODEC.found(bytes(table))
    faulty = found.has_reserved or found.bitmap_fault or found.host % CLUSTER or found.copied
    assert found.position == 1 and found.raw == word and faulty


@given(values=st.lists(entries(), min_size=1, max_size=6))
def test_what_is_found_is_what_is_decoded(values: list[L2Entry]) -> None:
    table = packed(*values)
    found = {entry.position: entry for entry in CODEC.found(bytes(table))}
    for index in range(len(values)):
        value = CODEC.decode(table, index)
        if index not in found:
            assert value == NO_ENTRY
            continue
        entry = found[index]
        assert (entry.kind, entry.host, entry.copied, entry.length) == value[:4]
        assert not entry.has_reserved and not entry.bitmap_fault


@given(value=entries(), first=st.integers(0, 31), count=st.integers(1, 32))
def test_a_request_changes_its_part_alone(value: L2Entry, first: int, count: int) -> None:
    part = range(first, min(SUBCLUSTERS, first + count))
    if value.kind == COMPRESSED_CLUSTER:
        part = range(SUBCLUSTERS)
    in_place = CODEC.filled(value, value.host or HOST, part)
    zeroed = CODEC.zeroed(value, part, unmap=True)
    kept = CODEC.zeroed(value, part, unmap=False)
    emptied = CODEC.emptied(value, part)
    for subcluster in range(SUBCLUSTERS):
        before = kind_at(value, subcluster)[0]
        inside = subcluster in part
        if value.kind != COMPRESSED_CLUSTER:
            assert kind_at(in_place, subcluster)[0] == (DATA if inside else before)
        for changed in (zeroed, kept):
            assert kind_at(changed, subcluster)[0] == (ZERO_CLUSTER if inside else before)
        assert kind_at(emptied, subcluster)[0] == (UNALLOCATED if inside else before)
    if value.kind != COMPRESSED_CLUSTER:
        assert kept.host == value.host
    for changed in (zeroed, emptied):
        assert bool(changed.host) == bool(changed.allocated) and CODEC.decode(packed(changed), 0) == changed


def test_in_another_host_cluster_all_other_data_is_gone() -> None:
    value = L2Entry(DATA, HOST, True, 0, 0b1110, 0b1)
    moved = CODEC.filled(value, HostOffset(2 * HOST), range(1, 2))
    assert moved == L2Entry(DATA, HostOffset(2 * HOST), True, 0, 0b10, 0b1)


@pytest.mark.parametrize(
    ("start", "end", "part"),
    [
        (0, CLUSTER, range(32)),
        (CLUSTER, CLUSTER + 1, range(1)),
        (CLUSTER + 2047, CLUSTER + 2049, range(2)),
        (0, 4 * CLUSTER, range(32)),
        (2 * CLUSTER - 1, 3 * CLUSTER, range(31, 32)),
    ],
)
def test_the_part_that_a_range_touches(start: int, end: int, part: range) -> None:
    assert CODEC.part(start // CLUSTER, start, end) == part


def test_the_copied_flags_of_a_range() -> None:
    table = packed(*(L2Entry(DATA, HOST, False, 0, 1) for _ in range(4)))
    CODEC.set_copied(table, 1, 3, copied=True)
    assert [CODEC.decode(table, index).copied for index in range(4)] == [False, True, True, False]
