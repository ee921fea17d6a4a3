"""What an existing image can be asked to be, and headers laid out in the other version."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jqcow.errors import FormatError
from jqcow.ondisk.amendment import Amendment
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import (
    EXTENSION_BITMAPS,
    EXTENSION_FEATURE_NAMES,
    INCOMPATIBLE_COMPRESSION,
    Extension,
    HeaderArea,
)
from jqcow.ondisk.snapshots import Snapshot

MIB = 1 << 20
UNKNOWN = Extension(0x12345678, b"somebody's")
SNAPSHOT = Snapshot(
    l1_table_offset=65536,
    l1_size=1,
    id="1",
    name="one",
    date_seconds=0,
    date_nanoseconds=0,
    vm_clock_nanoseconds=0,
    vm_state_bytes=0,
    disk_bytes=MIB,
    icount=None,
)


def area_of(form: Form = Form(), *extensions: Extension) -> HeaderArea:  # noqa: B008
    (_, data), *_ = blank_image(MIB, form).parts
    return HeaderArea.parse(bytes(data))._laid_out(
        HeaderArea.parse(bytes(data)).header, extensions, None, b""
    )


def wanted(area: HeaderArea, **options: Any) -> Amendment:
    return Amendment.of(area.header, options)  # type: ignore[arg-type]


def test_what_is_not_given_stays() -> None:
    area = area_of(Form(refcount_order=3, lazy_refcounts=True))
    assert wanted(area) == Amendment(3, True, 3, MIB)
    assert wanted(area, size=2 * MIB) == Amendment(3, True, 3, 2 * MIB)


def test_version_2_has_no_lazy_refcounts_and_those_that_are_on_go() -> None:
    area = area_of(Form(lazy_refcounts=True))
    assert wanted(area, compat="0.10") == Amendment(2, False, 4, MIB)
    with pytest.raises(ValueError, match=r"lazy_refcounts needs compat=1\.1"):
        wanted(area, compat="0.10", lazy_refcounts=True)
    with pytest.raises(ValueError, match="needs compat"):
        wanted(area_of(Form(version=2)), lazy_refcounts=True)


def test_version_2_has_refcounts_of_16_bits() -> None:
    area = area_of(Form(refcount_order=3))
    with pytest.raises(ValueError, match="needs refcount_bits=16, not 8"):
        wanted(area, compat="0.10")
    assert wanted(area, compat="0.10", refcount_bits=16).refcount_order == 4
    with pytest.raises(ValueError, match="not 32"):
        wanted(area_of(Form(version=2)), refcount_bits=32)
    assert wanted(area_of(Form(version=2)), compat="1.1", refcount_bits=32).refcount_order == 5


@pytest.mark.parametrize(
    "options",
    [{"compat": "0.11"}, {"refcount_bits": 3}, {"refcount_bits": 128}, {"size": 100}, {"size": -512}],
)
def test_what_no_image_can_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        wanted(area_of(), **options)


def test_a_flag_is_a_flag() -> None:
    with pytest.raises(TypeError):
        wanted(area_of(), lazy_refcounts="on")


@pytest.mark.parametrize(
    ("area", "what"),
    [
        (area_of(Form(has_subclusters=True)), "extended_l2"),
        (area_of(Form(compression_type=1)), "compression_type"),
        (area_of().with_extension(Extension(EXTENSION_BITMAPS, bytes(24)), autoclear_features=1), "bitmaps"),
        (area_of().with_header(replace(area_of().header, incompatible_features=1 << 2)), "data_file"),
        (area_of().with_header(replace(area_of().header, incompatible_features=1 << 9)), "0x200"),
    ],
)
def test_what_version_2_has_no_place_for(area: HeaderArea, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        wanted(area, compat="0.10").require_place_for(area, ())
    wanted(area, compat="1.1", lazy_refcounts=True).require_place_for(area, ())


def test_snapshots_of_another_size_keep_version_3() -> None:
    area = area_of()
    wanted(area, compat="0.10").require_place_for(area, (SNAPSHOT,))
    with pytest.raises(ValueError, match="1048576 bytes"):
        wanted(area, compat="0.10", size=2 * MIB).require_place_for(area, (SNAPSHOT,))
    with pytest.raises(ValueError, match="VM state"):
        large = replace(SNAPSHOT, vm_state_bytes=1 << 32)
        wanted(area, compat="0.10").require_place_for(area, (large,))


# The header


def test_a_header_in_the_other_version_keeps_what_it_can() -> None:
    names = Extension(EXTENSION_FEATURE_NAMES, bytes(48))
    area = area_of(Form(lazy_refcounts=True), names, UNKNOWN).with_backing_file(b"base.raw", b"raw")
    older = area.with_version(2)
    assert older == HeaderArea.parse(older.data)
    assert (older.header.version, older.header.header_length) == (2, 72)
    assert older.header.compatible_features == 0
    assert older.backing_file_name == b"base.raw"
    assert older.find(UNKNOWN.type) == UNKNOWN
    assert older.find(EXTENSION_FEATURE_NAMES) is None
    newer = older.with_version(3)
    assert newer == HeaderArea.parse(newer.data)
    assert (newer.header.version, newer.header.header_length) == (3, 112)
    assert newer == replace(newer, extensions=newer.extensions[:-1]).with_feature_names()
    assert newer.extensions[:-1] == older.extensions
    assert newer.backing_file_name == b"base.raw"
    assert newer.with_version(3) is newer


def test_a_header_that_does_not_fit_is_refused() -> None:
    area = area_of(Form(cluster_bits=9, version=2)).with_backing_file(b"x" * 390, b"raw")
    with pytest.raises(FormatError, match="does not fit"):
        area.with_version(3)


def test_a_longer_header_loses_unknown_fields_in_version_2() -> None:
    header = replace(area_of(Form(compression_type=1)).header, header_length=120)
    assert header.incompatible_features == INCOMPATIBLE_COMPRESSION
    area = area_of()._laid_out(header, (), None, bytes(112) + b"\7" * 8)
    assert area.data[112:120] == b"\7" * 8
    assert area.with_version(2).header.compression_type == 0
