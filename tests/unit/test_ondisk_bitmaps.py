"""The bitmap directory: what an image can have, and what is refused before it costs anything."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from jqcow.errors import CorruptionError
from jqcow.ondisk import bitmaps, entries, header
from jqcow.ondisk.bitmaps import AUTO, EXTRA_DATA_COMPATIBLE, IN_USE, BitmapEntry, Place
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.entries import DamagedEntry
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import AUTOCLEAR_BITMAPS, HeaderArea

AREA = HeaderArea.parse(blank_image(64 << 20, Form()).parts[0][1])
OFFSET = 1 << 20
ENTRY = BitmapEntry(2 << 20, 1, AUTO, bitmaps.DIRTY_TRACKING, 16, b"name")


def announced(*found: BitmapEntry, count: int | None = None) -> tuple[HeaderArea, bytes]:
    data = bitmaps.pack_directory(found)
    place = Place(len(found) if count is None else count, len(data), OFFSET)
    return AREA.with_extension(place.pack(), autoclear_features=AUTOCLEAR_BITMAPS), data


def read_back(*found: BitmapEntry, without_broken: bool = False) -> tuple[BitmapEntry, ...]:
    area, data = announced(*found)
    reader = lambda length, offset: data[offset - OFFSET :][:length]  # noqa: E731
    return bitmaps.read_directory(reader, area, without_broken=without_broken).entries


def test_entries_come_back() -> None:
    others = replace(ENTRY, name=b"n", flags=IN_USE), replace(ENTRY, name="ü".encode(), flags=0)
    assert read_back(ENTRY, *others) == (ENTRY, *others)


def test_extra_data_is_kept() -> None:
    entry = replace(ENTRY, extra=b"12345", flags=AUTO | EXTRA_DATA_COMPATIBLE)
    assert read_back(entry) == (entry,) and entry.is_enabled


def test_what_a_bitmap_of_an_unknown_kind_is_good_for() -> None:
    for entry in (replace(ENTRY, type=2), replace(ENTRY, extra=b"x")):
        assert not entry.is_usable and not entry.is_kept
        assert replace(entry, flags=0).is_kept and replace(entry, flags=AUTO | IN_USE).is_kept


@pytest.mark.parametrize(
    "change",
    [
        {"table_offset": 0}, {"table_offset": 512}, {"table_offset": 1 << 56}, {"table_entries": 0},
        {"table_entries": 2}, {"table_entries": 1 << 31}, {"flags": 8}, {"granularity_bits": 8},
        {"granularity_bits": 32}, {"name": b""}, {"name": bytes(1024)},
    ],
    ids=str,
)  # fmt: skip
def test_what_no_bitmap_has(change: dict[str, int]) -> None:
    broken = replace(ENTRY, **{"name": b"broken", **change})  # type: ignore[arg-type]
    with pytest.raises(CorruptionError, match="bitmap directory"):
        read_back(ENTRY, broken)
    assert read_back(ENTRY, broken, without_broken=True) == (ENTRY,)


def test_names_differ() -> None:
    with pytest.raises(CorruptionError, match="another"):
        read_back(ENTRY, ENTRY)


def test_one_in_use_may_be_of_another_size() -> None:
    entry = replace(ENTRY, table_entries=7, flags=AUTO | IN_USE)
    assert read_back(entry) == (entry,) and not entry.bitmap().is_consistent


def test_tables_are_bounded_in_all() -> None:
    many = [replace(ENTRY, name=b"%d" % at, table_entries=8192, flags=IN_USE) for at in range(1025)]
    with pytest.raises(CorruptionError, match="in all"):
        read_back(*many)


@pytest.mark.parametrize("count", [0, 2, 65536])
def test_a_directory_too_short_for_its_bitmaps(count: int) -> None:
    area, data = announced(ENTRY)
    extension = struct.pack(">IIQQ", count, 0, len(data), OFFSET)
    found = replace(area.extensions[-1], data=extension)
    area = area.with_extension(found, autoclear_features=AUTOCLEAR_BITMAPS)
    with pytest.raises(CorruptionError):
        bitmaps.read_directory(lambda length, offset: data, area)


def test_the_reserved_field_of_the_extension() -> None:
    """QEMU opens no image where it is set."""
    area, _ = announced(ENTRY)
    found = area.find(header.EXTENSION_BITMAPS)
    assert found is not None
    data = found.data[:4] + b"\0\0\0\1" + found.data[8:]
    area = area.with_extension(replace(found, data=data), autoclear_features=AUTOCLEAR_BITMAPS)
    with pytest.raises(CorruptionError, match="reserved field is 0x1"):
        bitmaps.place_of(area)


def test_without_the_autoclear_bit_nothing_counts() -> None:
    area, _ = announced(ENTRY)
    area = area.with_header(replace(area.header, autoclear_features=0))
    assert bitmaps.place_of(area) is None and bitmaps.announced_in(area) == 0


@pytest.mark.parametrize("entry", [2, 1 << 8, 1 << 56, 0x10001, 0x200, (1 << 63) | 0x10000])
def test_table_entries_that_no_bitmap_has(entry: int) -> None:
    with pytest.raises(DamagedEntry):
        entries.decode_bitmap_table(entry, AREA.header.geometry)


def test_table_entries() -> None:
    decode, geometry = entries.decode_bitmap_table, AREA.header.geometry
    assert [decode(entry, geometry) for entry in (0, 1, 0x10000)] == [(0, False), (0, True), (0x10000, False)]
