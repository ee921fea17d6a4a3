"""The LUKS header: what it says, and what of it is not believed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import luks
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import EXTENSION_ENCRYPTION, Extension, HeaderArea
from jqcow.ondisk.luks import ACTIVE, INACTIVE, ITERATIONS_MAX, KeySlot, LuksHeader

STARTS, LENGTH = luks.slot_places(64, luks.STRIPES)
SLOTS = tuple(KeySlot(INACTIVE, 0, bytes(32), start, luks.STRIPES) for start in STARTS)
USED = replace(SLOTS[0], state=ACTIVE, iterations=1000)
HEADER = LuksHeader(
    "aes",
    "xts-plain64",
    "sha256",
    LENGTH // 512,
    64,
    b"d" * 20,
    b"s" * 32,
    1000,
    "a-uuid",
    (USED, *SLOTS[1:]),
)
PLAIN = HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1])


def announcing(offset: int, length: int, cut: int = 16) -> HeaderArea:
    data = luks.POINTER_STRUCT.pack(offset, length)[:cut]
    header = replace(PLAIN.header, crypt_method=2)
    return replace(PLAIN, header=header, extensions=(Extension(EXTENSION_ENCRYPTION, data),))


def with_all_slots(iterations: int) -> LuksHeader:
    slots = tuple(replace(slot, state=ACTIVE, iterations=iterations) for slot in SLOTS)
    return replace(HEADER, slots=slots)


def test_eight_slots_as_programs_make_them_are_read() -> None:
    # Two seconds for each slot, and an eighth of that for a digest, at five million a second.
    replace(with_all_slots(5_000_000), digest_iterations=1_250_000).validate(LENGTH)


def test_a_header_is_read_as_it_was_written() -> None:
    packed = HEADER.pack()
    assert len(packed) == luks.HEADER_BYTES == 592
    assert LuksHeader.unpack(packed + bytes(9)) == HEADER
    HEADER.validate(LENGTH)
    assert HEADER.active_slots() == (0,)


def test_the_layout_is_that_of_qemu() -> None:
    assert [start * 512 for start in STARTS[:3]] == [4096, 262144, 520192]
    assert LENGTH == 2068480


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (replace(HEADER, key_bytes=0), FormatError),
        (replace(HEADER, key_bytes=65), FormatError),
        (replace(HEADER, digest_iterations=0), FormatError),
        (replace(HEADER, digest_iterations=ITERATIONS_MAX), UnsupportedFeatureError),
        (
            HEADER.with_slot(3, replace(USED, material_sector=STARTS[3], iterations=1 << 31)),
            UnsupportedFeatureError,
        ),
        # Each slot that is tried costs a digest, and each piece of a long key all iterations once more.
        (replace(with_all_slots(1000), digest_iterations=ITERATIONS_MAX // 8), UnsupportedFeatureError),
        (HEADER.with_slot(0, replace(USED, iterations=ITERATIONS_MAX // 2)), UnsupportedFeatureError),
        (
            replace(HEADER.with_slot(0, replace(USED, iterations=ITERATIONS_MAX // 4)), hash="sha1"),
            UnsupportedFeatureError,
        ),
        (HEADER.with_slot(1, replace(SLOTS[1], state=7)), FormatError),
        (HEADER.with_slot(1, replace(USED, material_sector=STARTS[0] + 1)), FormatError),
        (HEADER.with_slot(0, replace(USED, material_sector=1)), FormatError),
        (HEADER.with_slot(0, replace(USED, material_sector=1 << 31)), FormatError),
        (HEADER.with_slot(0, replace(USED, stripes=luks.STRIPES + 1)), FormatError),
        (HEADER.with_slot(0, replace(USED, stripes=0)), FormatError),
        (HEADER.with_slot(0, replace(USED, iterations=0)), FormatError),
    ],
)
def test_what_is_out_of_bounds_is_refused(changed: LuksHeader, error: type[Exception]) -> None:
    with pytest.raises(error):
        changed.validate(LENGTH)


@pytest.mark.parametrize("data", [b"", b"LUKS\xba\xbe", b"X" * 592])
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        LuksHeader.unpack(data)


def test_another_version_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedFeatureError, match="LUKS version 2"):
        LuksHeader.unpack(luks.MAGIC + b"\0\2" + bytes(600))


def test_the_pointer() -> None:
    assert luks.pointer_of(PLAIN) is None
    pointer = luks.pointer_of(announcing(0x40000, LENGTH))
    assert pointer is not None and (pointer.offset, pointer.length) == (0x40000, LENGTH)
    assert luks.clusters_of(pointer, PLAIN.header.geometry) == range(4, 36)


@pytest.mark.parametrize(
    ("area", "error"),
    [
        (replace(PLAIN, header=replace(PLAIN.header, crypt_method=2)), FormatError),
        (announcing(0x40000, LENGTH, cut=8), FormatError),
        (announcing(0x40000, 100), FormatError),
        (announcing(0x40000, 1 << 40), FormatError),
        (announcing(0x40200, LENGTH), CorruptionError),
        (announcing(0, LENGTH), CorruptionError),
        (announcing(1 << 60, LENGTH), CorruptionError),
    ],
)
def test_a_pointer_that_leads_nowhere_is_refused(area: HeaderArea, error: type[Exception]) -> None:
    with pytest.raises(error):
        luks.pointer_of(area)
