"""The live root, its copy and the journal extension."""

from __future__ import annotations

import contextlib
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow import _native
from jqcow.errors import CorruptionError, FormatError, JqcowError, UnsupportedFeatureError
from jqcow.ondisk import root as root_module
from jqcow.ondisk.header import INCOMPATIBLE_JOURNAL, Header, HeaderArea
from jqcow.ondisk.root import (
    EXTENSION_JOURNAL,
    FEATURE_NAME,
    JournalRange,
    check_room,
    is_live,
    pack_root,
    pack_root_copy,
    unpack_root,
    unpack_root_copy,
)

JOURNAL = JournalRange(1 << 20, 8 << 20, bytes(range(16)))
RANGES = st.builds(
    JournalRange,
    offset=st.integers(1, 1 << 40).map(lambda number: number * 4096),
    length=st.integers(8, 1 << 17).map(lambda number: number * 8192),
    salt=st.binary(min_size=16, max_size=16),
)


@pytest.fixture
def image(tmp_path: Path) -> bytearray:
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
    return bytearray(path.read_bytes())


@pytest.fixture
def header(image: bytearray) -> Header:
    return Header.unpack(bytes(image))


@given(RANGES)
def test_the_journal_extension_round_trips(journal: JournalRange) -> None:
    packed = journal.pack()
    assert len(packed) == 64
    assert JournalRange.unpack(packed) == journal
    assert journal.half_offset(7) == journal.offset + journal.half_bytes
    assert journal.half_offset(8) + 2 * journal.half_bytes == journal.end


@pytest.mark.parametrize(
    ("place", "layout", "value", "error"),
    [
        (0, ">I", 2, UnsupportedFeatureError),
        (4, ">I", 1, UnsupportedFeatureError),
        (56, ">Q", 1, UnsupportedFeatureError),
        (8, ">Q", 0, CorruptionError),
        (8, ">Q", 4096 + 512, CorruptionError),
        (8, ">Q", (1 << 56) - 4096, CorruptionError),
        (8, ">Q", (1 << 64) - 4096, CorruptionError),
        (16, ">Q", 0, CorruptionError),
        (16, ">Q", 4096, CorruptionError),
        (16, ">Q", (64 << 10) + 4096, CorruptionError),
        (16, ">Q", 2 << 30, CorruptionError),
    ],
)
def test_a_range_that_no_journal_has(place: int, layout: str, value: int, error: type[JqcowError]) -> None:
    data = bytearray(JOURNAL.pack())
    struct.pack_into(layout, data, place, value)
    with pytest.raises(error):
        JournalRange.unpack(bytes(data))


@pytest.mark.parametrize("length", [0, 40, 63, 65])
def test_an_extension_of_another_length(length: int) -> None:
    with pytest.raises(CorruptionError):
        JournalRange.unpack(JOURNAL.pack().ljust(65, b"\0")[:length])


def test_the_root_round_trips(header: Header) -> None:
    sector = pack_root(header, JOURNAL)
    assert len(sector) == 512
    assert is_live(sector)
    assert unpack_root(sector) == (header.cluster_bits, JOURNAL)


def test_a_clean_image_is_not_live(image: bytearray, header: Header) -> None:
    assert not is_live(bytes(image[:512]))
    assert not is_live(b"")
    assert not is_live(bytes(512))
    # In version 2 these bytes are no feature bits.
    live = bytearray(pack_root(header, JOURNAL))
    live[7] = 2
    assert not is_live(bytes(live))


def test_the_root_is_a_header_that_others_understand(header: Header) -> None:
    """Autoclear bits and the backing file are gone; everything else is as it was."""
    rich = replace(
        header,
        autoclear_features=0xFF,
        compatible_features=1,
        backing_file_offset=400,
        backing_file_size=9,
    )
    area = HeaderArea.parse(pack_root(rich, JOURNAL))
    assert area.header == replace(
        header, incompatible_features=INCOMPATIBLE_JOURNAL, compatible_features=1, autoclear_features=0
    )
    assert area.extensions[0].type == EXTENSION_JOURNAL
    assert len(area.data) == header.header_length + 136


def test_qemu_refuses_the_live_image_and_says_what_to_do(tmp_path: Path, image: bytearray) -> None:
    path = tmp_path / "live"
    image[:512] = pack_root(Header.unpack(bytes(image)), JOURNAL)
    path.write_bytes(image)
    answer = subprocess.run(["qemu-img", "info", str(path)], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert FEATURE_NAME.decode() in answer.stderr


def test_only_a_header_with_room_can_go_live(header: Header) -> None:
    check_room(replace(header, header_length=376), 4096)
    pack_root(replace(header, header_length=376), JOURNAL)
    with pytest.raises(UnsupportedFeatureError, match="header_length"):
        check_room(replace(header, header_length=384), 4096)
    with pytest.raises(UnsupportedFeatureError, match="4096 used bytes"):
        check_room(header, 4097)


def test_a_root_without_its_extension_is_damaged(header: Header) -> None:
    sector = bytearray(pack_root(header, JOURNAL))
    sector[header.header_length] ^= 1
    with pytest.raises(CorruptionError, match="missing"):
        unpack_root(bytes(sector))


@pytest.mark.parametrize("length", [504, 1024, (1 << 32) - 8])
def test_a_root_with_a_hostile_header_length(header: Header, length: int) -> None:
    sector = bytearray(pack_root(header, JOURNAL))
    struct.pack_into(">I", sector, 100, length)
    with pytest.raises(CorruptionError):
        unpack_root(bytes(sector))


@pytest.mark.parametrize("bits", [0, 8, 22, 1 << 31])
def test_a_root_with_hostile_cluster_bits(header: Header, bits: int) -> None:
    sector = bytearray(pack_root(header, JOURNAL))
    struct.pack_into(">I", sector, 20, bits)
    with pytest.raises(FormatError):
        unpack_root(bytes(sector))


@given(st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=10))
def test_mutated_roots_give_only_errors_of_jqcow(changes: list[tuple[int, int]]) -> None:
    sound = Header(3, 0, 0, 16, 1 << 30, 0, 2, 3 << 16, 1 << 16, 1, 0, 0, header_length=112)
    sector = bytearray(pack_root(sound, JOURNAL))
    for place, value in changes:
        sector[place] = value
    with contextlib.suppress(JqcowError):
        _, journal = unpack_root(bytes(sector))
        assert journal.length <= root_module.MAX_JOURNAL_BYTES


def test_the_root_copy_round_trips(header: Header) -> None:
    sector = pack_root(header, JOURNAL)
    copy = pack_root_copy(sector)
    assert len(copy) == 1024
    assert copy[:512] == sector
    assert int.from_bytes(copy[520:524], "big") == _native.crc32c(copy[:520])
    assert unpack_root_copy(copy) == sector
    assert unpack_root_copy(copy[:524]) == sector


@pytest.mark.parametrize("length", [0, 512, 523])
def test_a_root_copy_cut_short_is_none(header: Header, length: int) -> None:
    assert unpack_root_copy(pack_root_copy(pack_root(header, JOURNAL))[:length]) is None


@given(place=st.integers(0, 523), flipped=st.integers(1, 255))
def test_no_changed_byte_of_a_root_copy_is_accepted(place: int, flipped: int) -> None:
    sound = Header(3, 0, 0, 16, 1 << 30, 0, 2, 3 << 16, 1 << 16, 1, 0, 0, header_length=112)
    copy = bytearray(pack_root_copy(pack_root(sound, JOURNAL)))
    copy[place] ^= flipped
    assert unpack_root_copy(bytes(copy)) is None


def test_a_copy_of_a_clean_sector_is_none(image: bytearray) -> None:
    assert unpack_root_copy(pack_root_copy(bytes(image[:512]))) is None
