"""Table entries: what QEMU writes is understood, what is packed comes back, and nothing found is refused."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow.ondisk import entries, l2
from jqcow.ondisk.entries import COPIED, ENTRY, DamagedEntry
from jqcow.ondisk.l2 import COMPRESSED, FoundEntry, codec_of, compressed_entry, compressed_extent
from jqcow.ondisk.layout import MAX_CLUSTER_BITS, MAX_HOST_OFFSET, MIN_CLUSTER_BITS, Geometry
from tests.support.patients import Patient, make_image

CLUSTER_BITS = st.integers(MIN_CLUSTER_BITS, MAX_CLUSTER_BITS)


@pytest.mark.parametrize(
    ("entry", "cluster_bits", "extent"),
    [
        # 64 KiB: the offset has 54 bits, the sectors 8.
        (COMPRESSED | 0x50000, 16, (0x50000, 512)),
        (COMPRESSED | 1 << 54 | 0x50001, 16, (0x50001, 1023)),
        (COMPRESSED | 0xFF << 54 | 0x501FF, 16, (0x501FF, 255 * 512 + 1)),
        # 512 bytes: 61 bits and one.
        (COMPRESSED | 1 << 61 | 0x1200, 9, (0x1200, 1024)),
        # 2 MiB: 49 bits and 13.
        (COMPRESSED | 0x1FFF << 49 | 0x1FFFFFFFFFFFF, 21, (0x1FFFFFFFFFFFF, 0x1FFF * 512 + 1)),
    ],
)
def test_extent_of_an_entry(entry: int, cluster_bits: int, extent: tuple[int, int]) -> None:
    assert compressed_extent(entry, cluster_bits) == extent
    assert compressed_extent(entry | COPIED, cluster_bits) == extent
    assert compressed_entry(*extent, cluster_bits) == entry


@given(cluster_bits=CLUSTER_BITS, data=st.data())
def test_an_entry_reaches_to_the_end_of_the_last_sector(cluster_bits: int, data: st.DataObject) -> None:
    limit = min(1 << 70 - cluster_bits, MAX_HOST_OFFSET)
    offset = data.draw(st.integers(0, limit - 1))
    length = data.draw(st.integers(1, (1 << cluster_bits) - 1))
    entry = compressed_entry(offset, length, cluster_bits)
    assert entry & (COMPRESSED | COPIED) == COMPRESSED
    host, reach = compressed_extent(entry, cluster_bits)
    assert host == offset
    assert length <= reach < length + 512
    assert (host + reach) % 512 == 0
    assert compressed_entry(host, reach, cluster_bits) == entry


@pytest.mark.parametrize("cluster_bits", range(MIN_CLUSTER_BITS, MAX_CLUSTER_BITS + 1))
def test_what_does_not_fit_is_refused(cluster_bits: int) -> None:
    highest = min(1 << 70 - cluster_bits, MAX_HOST_OFFSET)
    most = (1 << cluster_bits - 8) * 512
    compressed_entry(highest - 1, 1, cluster_bits)
    compressed_entry(0, most, cluster_bits)
    for offset, length in ((highest, 1), (-1, 1), (0, 0), (0, -5), (0, most + 1), (511, most)):
        with pytest.raises(ValueError, match="bytes at"):
            compressed_entry(offset, length, cluster_bits)


@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536, 2 << 20])
def test_entries_that_qemu_wrote(tmp_path: Path, cluster_bytes: int) -> None:
    """The sectors of an entry hold a deflate stream, and QEMU packs one cluster's data behind the other's."""
    path = tmp_path / "image"
    commands = [f"write -c {index * cluster_bytes} {cluster_bytes}" for index in range(3)]
    make_image(path, *commands, options=f"cluster_size={cluster_bytes}")
    patient = Patient(path)
    last_end = 0
    for index in range(3):
        entry = patient.entry(patient.l2 + 8 * index)
        offset, length = compressed_extent(entry, patient.header.cluster_bits)
        assert entry & COMPRESSED
        inflated = zlib.decompressobj(wbits=-12).decompress(patient.image[offset : offset + length])
        assert inflated == b"\xcd" * cluster_bytes
        assert last_end - 512 < offset
        last_end = offset + length
        assert compressed_entry(offset, length, patient.header.cluster_bits) == entry


# As they stand


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (COPIED | 0x50000, FoundEntry(3, COPIED | 0x50000, l2.DATA, 0x50000, True, 0, False)),
        (0x50200, FoundEntry(3, 0x50200, l2.DATA, 0x50200, False, 0, False)),
        (1 << 60 | 0x50000, FoundEntry(3, 1 << 60 | 0x50000, l2.DATA, 0x50000, False, 0, True)),
        (0x50001, FoundEntry(3, 0x50001, l2.ZERO_CLUSTER, 0x50000, False, 0, False)),
        (1, FoundEntry(3, 1, l2.ZERO_CLUSTER, 0, False, 0, False)),
        (COPIED | 2, FoundEntry(3, COPIED | 2, l2.UNALLOCATED, 0, True, 0, True)),
        (
            COPIED | COMPRESSED | 0x50001,
            FoundEntry(3, COPIED | COMPRESSED | 0x50001, l2.COMPRESSED_CLUSTER, 0x50001, True, 511, False),
        ),
    ],
)
def test_an_l2_entry_is_told_whatever_it_says(raw: int, found: FoundEntry) -> None:
    table = b"".join(map(ENTRY.pack, (0, 0, 0, raw, *[0] * 8188)))
    assert list(codec_of(Geometry(16)).found(table)) == [found]


@given(raw=st.integers(1, 2**64 - 1), cluster_bits=CLUSTER_BITS)
def test_what_is_found_is_what_is_decoded(raw: int, cluster_bits: int) -> None:
    codec = codec_of(Geometry(cluster_bits))
    (found,) = codec.found(ENTRY.pack(raw))
    assert (found.position, found.raw) == (0, raw)
    try:
        decoded = codec.decode(ENTRY.pack(raw), 0)
    except DamagedEntry:
        assert found.has_reserved or (found.copied and found.kind == l2.COMPRESSED_CLUSTER)
    else:
        assert not found.has_reserved
        assert (found.kind, found.host, found.copied, found.length, 0, 0) == decoded


@given(raw=st.integers(0, 2**64 - 1))
def test_what_a_pointer_says_is_what_is_decoded(raw: int) -> None:
    host, copied, has_reserved = entries.split_l1(raw)
    try:
        assert entries.decode_l1(raw) == (host, copied)
    except DamagedEntry:
        assert has_reserved or (copied and not host)
    geometry = Geometry(MIN_CLUSTER_BITS)
    host, has_reserved = entries.split_refcount_table(raw)
    try:
        assert entries.decode_refcount_table(raw, geometry) == host
    except DamagedEntry:
        assert has_reserved or host >= MAX_HOST_OFFSET


@pytest.mark.parametrize("length", [0, 1, 3, 64, 65, 200])
def test_entries_that_are_not_zero(length: int) -> None:
    words = [index % 3 and index + 1 for index in range(length)]
    words[64:128] = [0] * len(words[64:128])
    table = b"".join(map(ENTRY.pack, words))
    assert list(entries.nonzero_entries(table)) == [(at, word) for at, word in enumerate(words) if word]
    assert [entries.entry_at(table, index) for index in range(length)] == words
