"""The header: as QEMU writes it, byte for byte; and whatever hostile bytes claim."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow.errors import CorruptionError, FormatError, JqcowError
from jqcow.ondisk import header as header_module
from jqcow.ondisk import layout
from jqcow.ondisk.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_FEATURE_NAMES,
    V2_BYTES,
    V3_BYTES,
    Extension,
    Header,
    HeaderArea,
)

SOUND = Header(
    version=3,
    backing_file_offset=0,
    backing_file_size=0,
    cluster_bits=16,
    size=1 << 30,
    crypt_method=0,
    l1_size=2,
    l1_table_offset=3 << 16,
    refcount_table_offset=1 << 16,
    refcount_table_clusters=1,
    nb_snapshots=0,
    snapshots_offset=0,
    header_length=112,
)

WORD = st.integers(0, (1 << 32) - 1)
LONG = st.integers(0, (1 << 64) - 1)
HEADERS = st.builds(
    Header,
    version=st.just(3),
    backing_file_offset=LONG,
    backing_file_size=WORD,
    cluster_bits=WORD,
    size=LONG,
    crypt_method=WORD,
    l1_size=WORD,
    l1_table_offset=LONG,
    refcount_table_offset=LONG,
    refcount_table_clusters=WORD,
    nb_snapshots=WORD,
    snapshots_offset=LONG,
    incompatible_features=LONG,
    compatible_features=LONG,
    autoclear_features=LONG,
    refcount_order=WORD,
    header_length=st.just(112),
    compression_type=st.integers(0, 255),
)


def qemu_image(path: Path, *options: str) -> bytes:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "1G"], check=True)
    return path.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "extended_l2=on,cluster_size=128k",
    ],
)
def test_what_qemu_writes_is_packed_to_the_same_bytes(tmp_path: Path, options: str) -> None:
    image = qemu_image(tmp_path / "image", "-o", options)
    area = HeaderArea.parse(image)
    assert image.startswith(area.header.pack())
    assert image.startswith(area.data)
    assert area.with_header(area.header) == area
    packed = area.header.pack() + b"".join(extension.pack() for extension in area.extensions)
    assert image.startswith(packed)
    # Behind the used bytes QEMU leaves zeros: nothing was missed.
    assert not any(image[len(area.data) : area.header.geometry.cluster_bytes])


def test_the_fields_mean_what_qemu_means(tmp_path: Path) -> None:
    image = qemu_image(tmp_path / "image", "-o", "cluster_size=4096,refcount_bits=8,compression_type=zstd")
    header = Header.unpack(image)
    assert header.size == 1 << 30
    assert header.geometry == layout.Geometry(12, 3)
    assert header.header_length == 112
    assert header.compression_type == 1
    assert header.incompatible_features == header_module.INCOMPATIBLE_COMPRESSION
    assert header.l1_size == header.geometry.l1_entries_for(header.size)


def test_a_backing_file_name_belongs_to_the_area(tmp_path: Path) -> None:
    qemu_image(tmp_path / "base")
    image = qemu_image(tmp_path / "image", "-b", "base", "-F", "qcow2")
    area = HeaderArea.parse(image)
    assert area.data.endswith(b"base")
    assert area.find(EXTENSION_BACKING_FORMAT) == Extension(EXTENSION_BACKING_FORMAT, b"qcow2")
    assert area.find(EXTENSION_FEATURE_NAMES) is not None
    assert area.find(0x12345678) is None


@given(HEADERS)
def test_pack_and_unpack_are_inverse(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == header.header_length
    assert Header.unpack(packed) == header


def test_unknown_header_bytes_and_extensions_are_kept() -> None:
    unknown = Extension(0x1234, b"seven b").pack()
    data = SOUND.pack() + unknown + bytes(8) + b"more"
    area = HeaderArea.parse(data)
    assert area.extensions == (Extension(0x1234, b"seven b"),)
    larger = area.with_header(replace(SOUND, size=2 << 30))
    assert larger.data == larger.header.pack() + unknown + bytes(8)


def test_a_version_2_header_has_no_features() -> None:
    header = Header.unpack(replace(SOUND, version=2).pack().ljust(512, b"\xff"))
    assert header.header_length == V2_BYTES
    assert header.incompatible_features == 0
    assert header.refcount_order == 4


def test_without_a_compression_field_the_type_is_zlib() -> None:
    header = replace(SOUND, header_length=V3_BYTES)
    assert Header.unpack(header.pack() + b"\1").compression_type == 0


@pytest.mark.parametrize("length", [0, 4, V2_BYTES - 1, V2_BYTES, V3_BYTES - 1])
def test_a_header_cut_short_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        Header.unpack(SOUND.pack()[:length])


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 1), ("version", 4), ("header_length", 96), ("header_length", 108), ("header_length", 0)],
)
def test_a_header_of_another_kind_is_refused(field: str, value: int) -> None:
    data = bytearray(SOUND.pack())
    struct.pack_into(">I", data, {"version": 4, "header_length": 100}[field], value)
    with pytest.raises(FormatError, match=str(value)):
        Header.unpack(bytes(data))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"cluster_bits": 8}, FormatError),
        ({"cluster_bits": 22}, FormatError),
        ({"cluster_bits": 1 << 31}, FormatError),
        ({"refcount_order": 7}, FormatError),
        ({"cluster_bits": 9, "header_length": 520}, FormatError),
        ({"size": 1 << 63}, FormatError),
        ({"l1_size": (4 << 20) + 1}, FormatError),
        ({"l1_table_offset": 0}, CorruptionError),
        ({"l1_table_offset": (3 << 16) + 8}, CorruptionError),
    ],
)
def test_fields_out_of_bounds(changes: dict[str, int], error: type[JqcowError]) -> None:
    with pytest.raises(error):
        replace(SOUND, **changes).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"refcount_table_clusters": 0}, FormatError),
        ({"refcount_table_clusters": 130}, FormatError),
        ({"refcount_table_offset": 0}, CorruptionError),
        ({"refcount_table_offset": 512}, CorruptionError),
        ({"refcount_table_offset": 1 << 56}, CorruptionError),
    ],
)
def test_a_refcount_table_that_cannot_be_there(changes: dict[str, int], error: type[JqcowError]) -> None:
    """Reading goes on without it."""
    damaged = replace(SOUND, **changes)  # type: ignore[arg-type]
    damaged.validate()
    assert SOUND.has_refcount_table and not damaged.has_refcount_table
    with pytest.raises(error):
        damaged.validate_refcount_table()


def test_bounds_themselves_are_fine() -> None:
    SOUND.validate()
    replace(SOUND, l1_size=4 << 20, refcount_table_clusters=128, size=(1 << 63) - 1).validate()
    replace(SOUND, refcount_table_clusters=128).validate_refcount_table()
    replace(SOUND, l1_size=0, l1_table_offset=0).validate()


@pytest.mark.parametrize("length", [17, 1 << 16, (1 << 32) - 1])
def test_an_extension_longer_than_the_header_is_refused(length: int) -> None:
    data = SOUND.pack() + struct.pack(">II", 0x1234, length) + bytes(16)
    with pytest.raises(FormatError, match="exceeds"):
        HeaderArea.parse(data)


def test_extensions_end_at_the_backing_file_name() -> None:
    name_offset = 112 + 16
    header = replace(SOUND, backing_file_offset=name_offset, backing_file_size=4)
    data = header.pack() + Extension(0x1234, b"12345678").pack() + b"base"
    area = HeaderArea.parse(data + b"\xff" * 64)
    assert area.extensions == (Extension(0x1234, b"12345678"),)
    assert area.data == data


@pytest.mark.parametrize(("offset", "size"), [(200, 1024), (65530, 7), (1 << 63, 1), (1 << 16, 1)])
def test_a_backing_file_name_outside_the_header_is_refused(offset: int, size: int) -> None:
    header = replace(SOUND, backing_file_offset=offset, backing_file_size=size)
    with pytest.raises(FormatError, match="backing file name"):
        HeaderArea.parse(header.pack() + bytes(1 << 16))


@given(st.data())
def test_mutated_headers_give_only_errors_of_jqcow(data: st.DataObject) -> None:
    sound = SOUND.pack() + Extension(0x1234, b"data").pack() + bytes(8)
    image = bytearray(sound.ljust(512, b"\0"))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=8)):
        image[place] = value
    with contextlib.suppress(JqcowError):
        area = HeaderArea.parse(bytes(image[: data.draw(st.integers(0, 512))]))
        assert len(area.data) <= area.header.geometry.cluster_bytes


# Another backing file


EXTENSIONS = st.lists(
    st.builds(
        Extension,
        st.integers(1, (1 << 32) - 1).filter(lambda kind: kind != EXTENSION_BACKING_FORMAT),
        st.binary(max_size=70),
    ),
    max_size=6,
)
NAMES = st.binary(min_size=1, max_size=1023)


def area_of(*extensions: Extension, header: Header = SOUND) -> HeaderArea:
    listed = b"".join(extension.pack() for extension in extensions)
    return HeaderArea.parse(header.pack() + listed + bytes(8))


@given(EXTENSIONS, NAMES, st.sampled_from([b"raw", b"qcow2", None]), st.sampled_from([2, 3]))
def test_a_backing_file_is_put_in_and_taken_out(
    extensions: list[Extension], name: bytes, backing_format: bytes | None, version: int
) -> None:
    before = area_of(*extensions, header=Header.unpack(replace(SOUND, version=version).pack()))
    named = before.with_backing_file(name, backing_format)
    again = HeaderArea.parse(named.data)
    assert again == named
    assert again.backing_file_name == name
    found = again.find(EXTENSION_BACKING_FORMAT)
    assert (found and found.data) == backing_format
    kept = [extension for extension in again.extensions if extension.type != EXTENSION_BACKING_FORMAT]
    assert kept == extensions
    assert named.with_backing_file(b"other", b"raw").with_backing_file(name, backing_format) == named
    assert named.with_backing_file(None, None) == before
    assert before.backing_file_name is None


def test_bytes_of_a_longer_header_are_kept() -> None:
    header = replace(SOUND, header_length=128)
    data = header.pack()[:120] + b"unknown!"
    named = HeaderArea.parse(data + bytes(8)).with_backing_file(b"base", b"raw")
    assert named.data[112:128] == bytes(8) + b"unknown!"
    assert named.data.endswith(bytes(8) + b"base")


@pytest.mark.parametrize(("length", "fits"), [(376, True), (377, False)])
def test_a_name_must_fit_in_the_first_cluster(length: int, fits: bool) -> None:
    area = area_of(header=replace(SOUND, cluster_bits=9, l1_size=1))
    if fits:
        assert len(area.with_backing_file(b"x" * length, b"qcow2").data) == 512
        return
    with pytest.raises(FormatError, match="does not fit in a cluster of 512"):
        area.with_backing_file(b"x" * length, b"qcow2")


@pytest.mark.parametrize(
    "options", ["compat=1.1", "compat=0.10", "cluster_size=512", "compression_type=zstd", "cluster_size=2M"]
)
def test_the_layout_is_what_qemu_makes_of_it(tmp_path: Path, options: str) -> None:
    qemu_image(tmp_path / "base")
    plain = qemu_image(tmp_path / "plain", "-o", options)
    named = qemu_image(tmp_path / "named", "-o", options, "-b", "base", "-F", "qcow2")
    cluster_bytes = 1 << Header.unpack(plain).cluster_bits
    ours = HeaderArea.parse(plain).with_backing_file(b"base", b"qcow2")
    assert ours.data.ljust(cluster_bytes, b"\0") == named[:cluster_bytes]
    bare = HeaderArea.parse(named).with_backing_file(None, None)
    assert bare.data.ljust(cluster_bytes, b"\0") == plain[:cluster_bytes]


@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10", "cluster_size=4k", "cluster_size=8k"])
def test_the_names_of_features_are_those_of_qemu(tmp_path: Path, options: str) -> None:
    theirs = HeaderArea.parse(qemu_image(tmp_path / "image", "-o", options))
    bare = theirs.with_extension(Extension(EXTENSION_FEATURE_NAMES, b""), autoclear_features=0)
    assert bare.with_feature_names() == theirs
    assert (theirs == bare) == (options in ("compat=0.10", "cluster_size=4k"))


def test_qemu_reads_back_name_and_format_and_keeps_other_extensions(tmp_path: Path) -> None:
    image = bytearray(qemu_image(tmp_path / "image"))
    foreign = Extension(0x12345678, b"not known to anyone")
    area = HeaderArea.parse(image)
    start = len(area.data) - 8
    image[start : start + len(foreign.pack())] = foreign.pack()
    named = HeaderArea.parse(image).with_backing_file("dir/a näme".encode(), b"raw")
    image[: len(named.data)] = named.data
    (tmp_path / "image").write_bytes(image)
    command = ["qemu-img", "info", "--output=json", str(tmp_path / "image")]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert (told["backing-filename"], told["backing-filename-format"]) == ("dir/a näme", "raw")
    rename = ["qemu-img", "rebase", "-u", "-b", "other", "-F", "qcow2", str(tmp_path / "image")]
    subprocess.run(rename, check=True)
    theirs = HeaderArea.parse((tmp_path / "image").read_bytes())
    assert theirs == named.with_backing_file(b"other", b"qcow2")
    assert theirs.find(0x12345678) == foreign
