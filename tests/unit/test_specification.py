"""Parts of the qcow2 specification that no other file asks for, and the table that names all of them."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

import jqcow
from jqcow.checker.check import Kind
from jqcow.ondisk import header
from jqcow.ondisk.entries import COPIED, OFFSET_MASK
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.naming import backing_file_of
from tests.support.patients import Tables
from tests.support.qemu import check_clean, done, qemu_io, run
from tests.unit.test_format_document import DOCUMENT, section

TESTS = Path(__file__).resolve().parents[1]
TITLE = "The specification, part by part"
AUTOCLEAR = 88


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    with jqcow.create(path, 1 << 20) as image:
        image.pwrite(b"data" * 16384, 0)
    return path


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def add_extensions(path: Path, *found: tuple[int, bytes]) -> None:
    """Put extensions where the list ends."""
    content = path.read_bytes()
    area = HeaderArea.parse(content[:65536])
    end = area.header.header_length + sum(len(extension.pack()) for extension in area.extensions)
    listed = b"".join(struct.pack(">II", kind, len(data)) + data.ljust(8, b"\0") for kind, data in found)
    patch(path, end, listed)


def rows() -> list[tuple[str, str, str]]:
    lines = [line.strip("| ").split(" | ") for line in section(TITLE).splitlines() if line.startswith("| ")]
    return [(part, does, test) for part, does, test in lines if test != "test"]


def test_every_test_of_the_table_is_there() -> None:
    for part, _, named in rows():
        file, _, name = named.partition(": ")
        path = TESTS / f"{file}.py"
        assert path.is_file(), part
        assert not name or re.search(rf"^\s*def {name}\(", path.read_text(), re.M), f"{part}: {named}"


def test_the_table_has_every_part_that_this_page_describes() -> None:
    told = " ".join(part for part, _, _ in rows())
    for field in Header.__dataclass_fields__:
        words = field.removesuffix("_features") if field == "features" else field
        assert words in told, field
    bits = [int(bit) for bit, _ in re.findall(r"^\| (?:\w+_features )?(\d+)( - 63)?,", section(TITLE), re.M)]
    # Incompatible, compatible, autoclear: each up to the reserved ones.
    assert bits == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2]
    assert DOCUMENT.count(f"## {TITLE}") == 1


def test_unknown_autoclear_bits_go_before_the_first_change(path: Path) -> None:
    patch(path, AUTOCLEAR, (1 << 63 | 1 << 5).to_bytes(8, "big"))
    with jqcow.open(path) as image:
        image.pread(1, 0)
    assert path.read_bytes()[AUTOCLEAR] == 0x80
    with jqcow.open(path, "r+") as image:
        image.write_zeroes(65536, 0)
        image.flush()
        assert not any(path.read_bytes()[AUTOCLEAR : AUTOCLEAR + 8])
    assert not any(path.read_bytes()[AUTOCLEAR : AUTOCLEAR + 8])


def test_a_raw_data_file_needs_a_data_file(path: Path) -> None:
    patch(path, AUTOCLEAR, (2).to_bytes(8, "big"))
    with jqcow.open(path) as image:
        assert image.check().errors == 1
        assert image.pread(4, 0) == b"data"


def test_the_name_of_a_data_file_alone_means_nothing(path: Path) -> None:
    add_extensions(path, (header.EXTENSION_EXTERNAL_DATA, b"data.raw"))
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"here", 0)
        assert image.check().ok
    assert b"data.raw" in path.read_bytes()
    assert not (path.parent / "data.raw").exists()


def test_the_last_of_two_extensions_counts_as_in_qemu(path: Path) -> None:
    (path.parent / "base").write_bytes(bytes(1 << 20))
    kind = header.EXTENSION_BACKING_FORMAT
    add_extensions(path, (kind, b"qcow2"), (kind, b"raw"))
    patch(path, 8, struct.pack(">QI", 4096, 4))
    patch(path, 4096, b"base")
    named = backing_file_of(HeaderArea.parse(path.read_bytes()[:65536]), str(path))
    assert named is not None and named.format == "raw"
    told = subprocess.run(["qemu-img", "info", path], capture_output=True, text=True, check=True).stdout
    assert "backing file format: raw" in told


def test_an_encryption_header_is_for_encryption(path: Path) -> None:
    add_extensions(path, (header.EXTENSION_ENCRYPTION, struct.pack(">QQ", 1 << 16, 4096)))
    with jqcow.open(path) as image:
        assert image.pread(4, 0) == b"data"
        assert image.check().errors == 1
    assert "only expected with LUKS" in run("qemu-img", "info", path).stderr


@pytest.mark.parametrize("options", ["cluster_size=64k", "extended_l2=on"])
def test_what_lies_in_a_data_file_has_one_user(
    path: Path, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, second = in_a_data_file(path, options, monkeypatch)
    tables.set_entry(second, tables.entry(second) & ~COPIED)
    path.write_bytes(tables.image)
    with jqcow.open(path, allow_files=True) as image:
        assert image.check().counts == {Kind.COPIED_FLAG: 1}
    assert "ERROR OFLAG_COPIED" in run("qemu-img", "check", path).stderr
    jqcow.open(path, "r+", repair="all", allow_files=True).close()
    check_clean(path)


@pytest.mark.parametrize("options", ["cluster_size=64k", "extended_l2=on"])
def test_a_data_file_out_of_order_is_read(path: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables, second = in_a_data_file(path, options, monkeypatch)
    tables.set_entry(second, 0x20000 | COPIED)
    path.write_bytes(tables.image)
    with jqcow.open(path, allow_files=True) as image:
        assert image.pread(65536, 0x10000) == b"\x07" * 65536
    with (
        jqcow.open(path, "r+", allow_files=True) as image,
        pytest.raises(jqcow.UnsupportedFeatureError, match="out of order"),
    ):
        image.pwrite(b"x", 0)


def in_a_data_file(path: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tables, int]:
    """Return an image with data in another file, and the place of its second L2 entry."""
    monkeypatch.chdir(path.parent)
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file=data,{options}", path, "1M")
    qemu_io(path, "write 0 128k", "write -P 7 128k 64k")
    tables = Tables(bytearray(path.read_bytes()))
    return tables, tables.l2 + (16 if "extended" in options else 8)


def test_the_state_of_a_machine_is_kept(path: Path) -> None:
    """It lies behind the end of the disk, and belongs to its snapshot alone."""
    state, at = b"state" * 4000, 6 << 20
    with jqcow.open(path, "r+") as image:
        image.resize(8 << 20)
        image.pwrite(state, at)
        image.create_snapshot("one")
        image.resize(1 << 20)
    entry = int.from_bytes(path.read_bytes()[64:72], "big")
    patch(path, entry + 40, struct.pack(">QQ", len(state), 1 << 20))
    with jqcow.open(path, "r+") as image:
        assert [found.vm_state_bytes for found in image.snapshots()] == [len(state)]
        image.apply_snapshot("one")
        image.create_snapshot("two")
        image.resize(8 << 20)
        assert image.pread(len(state), at) == bytes(len(state))
        image.pwrite(b"disk" * 4000, at)
        image.apply_snapshot("one")
        image.delete_snapshot("two")
        assert image.check().ok
    check_clean(path)
    content = path.read_bytes()
    entry = int.from_bytes(content[64:72], "big")
    assert int.from_bytes(content[entry + 40 : entry + 48], "big") == len(state)
    place = int.from_bytes(content[entry : entry + 8], "big")
    for index in (0, at >> 16):
        place = int.from_bytes(content[place + 8 * index :][:8], "big") & OFFSET_MASK
    assert content[place : place + len(state)] == state


def test_bits_behind_the_end_of_the_disk_are_passed_over(path: Path) -> None:
    with jqcow.open(path, "r+") as image:
        image.bitmaps.add("noted", 65536)
        image.pwrite(b"x", 0)
    content = path.read_bytes()
    extension = content.index(header.EXTENSION_BITMAPS.to_bytes(4, "big"))
    place = int.from_bytes(content[extension + 24 : extension + 32], "big")
    table = int.from_bytes(content[place : place + 8], "big")
    bits = int.from_bytes(content[table : table + 8], "big")
    patch(path, bits + 2, b"\xff" * 100)
    with jqcow.open(path, "r+") as image:
        assert [(part.offset, part.end) for part in image.bitmaps.dirty_extents("noted")] == [(0, 65536)]
        image.pwrite(b"x", 0)
        assert image.check().ok
