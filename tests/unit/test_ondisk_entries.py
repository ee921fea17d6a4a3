"""The compressed cluster descriptor: what QEMU writes is understood, and what is packed comes back."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow.ondisk.entries import COMPRESSED, COPIED, compressed_entry, compressed_extent
from jqcow.ondisk.layout import MAX_CLUSTER_BITS, MAX_HOST_OFFSET, MIN_CLUSTER_BITS
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
