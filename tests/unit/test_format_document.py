"""docs/format.md and the code say the same: tables, widths, constants."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from jqcow import _native
from jqcow.ondisk import bitmaps, entries, frame, header, l2, layout, luks, root, snapshots, undo

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
ROW = re.compile(r"^\s*(?:(Byte|Bit)\s+)?(\d+)(?:\s*-\s*(\d+))?:\s+(.*\S)\s*$")


class Row(NamedTuple):
    """One line of a table: first and last byte (or bit), and what it says."""

    first: int
    last: int
    text: str


def tables(text: str) -> Iterator[list[Row]]:
    """Yield the tables in a text: each starts with a line that says Byte or Bit."""
    table: list[Row] = []
    for line in text.splitlines():
        found = ROW.match(line)
        if not found:
            continue
        if found[1] and table:
            yield table
            table = []
        table.append(Row(int(found[2]), int(found[3] or found[2]), found[4]))
    if table:
        yield table


def section(title: str) -> str:
    """Return the text under a heading, up to the next heading."""
    match = re.search(rf"^#+ {re.escape(title)}$(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert match, title
    return match[1]


def table_in(title: str, number: int = 0) -> list[Row]:
    return list(tables(section(title)))[number]


def fields_of(layout_string: str) -> list[tuple[int, int]]:
    """Return (first, last) byte of each field of a big-endian struct format."""
    position = 0
    fields = []
    for token in re.findall(r"\d*[a-zA-Z]", layout_string):
        size = struct.calcsize(">" + token)
        fields.append((position, position + size - 1))
        position += size
    return fields


def spans(table: list[Row]) -> list[tuple[int, int]]:
    return [(row.first, row.last) for row in table]


def mask(table: list[Row], words: str) -> int:
    """Return the bits of the rows whose text starts with ``words``."""
    rows = [row for row in table if row.text.startswith(words)]
    assert rows, words
    return sum((1 << row.last + 1) - (1 << row.first) for row in rows)


def number_after(title: str, pattern: str) -> int:
    match = re.search(pattern, section(title))
    assert match, pattern
    return int(match[1], 0)


def test_header() -> None:
    table = table_in("Header")
    assert spans(table[:-1]) == fields_of(header.V3_STRUCT.format)
    assert spans(table[:13]) == fields_of(header.V2_STRUCT.format)
    assert table[-1][:2] == (header.V3_BYTES, header.V3_BYTES)
    assert table[0].text == 'magic, "QFI\\xfb"'
    names = [row.text.split()[0].rstrip(",") for row in table[1:]]
    assert names == list(header.Header.__dataclass_fields__)
    assert number_after("Header", r"headers of (\d+) bytes") == header.CREATED_HEADER_BYTES


def test_header_extensions() -> None:
    assert spans(table_in("Header extensions")) == fields_of(header.EXTENSION_STRUCT.format)
    assert spans(table_in("Header extensions", 1)) == fields_of(root.FEATURE_NAME_STRUCT.format)
    types = {int(value, 16) for value in re.findall(r"^\| (0x\w+)", section("Header extensions"), re.M)}
    known = {
        value
        for name, value in vars(header).items()
        if re.fullmatch(r"EXTENSION_[A-Z_]*", name) and isinstance(value, int)
    }
    assert types == known | {root.EXTENSION_JOURNAL, root.EXTENSION_UNDO}


def test_bitmaps() -> None:
    extension, entry, table = tables(section("Bitmaps"))
    assert spans(extension) == fields_of(bitmaps.EXTENSION_STRUCT.format)
    assert spans(entry) == fields_of(bitmaps.ENTRY_STRUCT.format)
    assert [extension, entry] == list(tables(bitmaps.__doc__ or ""))
    assert table == list(tables(entries.__doc__ or ""))[2]
    assert mask(table, "host offset") == entries.OFFSET_MASK
    assert mask(table, "without a host offset") == entries.ALL_ONES
    assert mask(table, "reserved") == entries.BITMAP_TABLE_RESERVED


def test_mapping_entries() -> None:
    of_l1, of_l2 = tables(section("Mapping: L1 and L2 tables"))
    assert mask(of_l1, "host offset") == mask(of_l2, "host offset") == entries.OFFSET_MASK
    assert mask(of_l1, "COPIED") == mask(of_l2, "COPIED") == entries.COPIED
    assert mask(of_l1, "reserved") == entries.L1_RESERVED
    assert mask(of_l2, "reserved") == l2.L2_RESERVED
    assert mask(of_l2, "the cluster reads as zeros") == l2.ZERO
    assert mask(of_l2, "0 for a standard") == l2.COMPRESSED
    assert mask(of_l1, "") == mask(of_l2, "") == (1 << 64) - 1


def test_extended_l2_entries() -> None:
    (bitmap,) = tables(section("Extended L2 entries"))
    assert mask(bitmap, "allocated") == l2.ALL_SUBCLUSTERS
    assert mask(bitmap, "zeros") == l2.ALL_SUBCLUSTERS << layout.SUBCLUSTERS
    assert (
        number_after("Extended L2 entries", r"at least (\d+) KiB") << 10
        == 1 << layout.MIN_SUBCLUSTER_CLUSTER_BITS
    )
    assert number_after("Extended L2 entries", r"has (\d+)\s") == layout.SUBCLUSTERS


def test_refcount_table_entry() -> None:
    table = table_in("Refcounts")
    assert mask(table, "reserved") == entries.REFCOUNT_TABLE_RESERVED
    assert mask(table, "host offset") == entries.REFCOUNT_TABLE_OFFSET_MASK


def test_compressed_descriptor() -> None:
    text = section("Mapping: L1 and L2 tables")
    assert "x = 62 - (cluster_bits - 8)" in text
    offset_bits, sector_bits = map(int, re.findall(r"offset has (\d+) bits and the number (\d+)", text)[0])
    highest = (1 << offset_bits) - 1
    entry = l2.COMPRESSED | ((1 << sector_bits) - 1) << offset_bits | highest
    assert l2.compressed_extent(entry, 16) == (highest, 255 * layout.SECTOR_BYTES + 1)


def test_snapshot_table() -> None:
    fixed, extra = tables(section("Snapshots"))
    assert spans(fixed) == fields_of(snapshots.FIXED_STRUCT.format)
    assert spans(extra) == fields_of(snapshots.EXTRA_STRUCT.format)
    assert fixed[-1].last + 1 == snapshots.FIXED_BYTES
    assert number_after("Snapshots", r"starts at a multiple of (\d+)") == snapshots.ALIGNMENT_BYTES
    assert number_after("Snapshots", r"more than (\d+) bytes of it") == snapshots.MAX_EXTRA_BYTES
    assert extra[1].last + 1 == snapshots.REQUIRED_EXTRA_BYTES


def test_live_root() -> None:
    bit = header.INCOMPATIBLE_JOURNAL.bit_length() - 1
    assert number_after("The live root", r"feature bit (\d+) set") == bit
    assert number_after("The live root", r"incompatible, bit (\d+)") == bit
    assert f"`{root.FEATURE_NAME.decode()}`" in section("The live root")
    assert number_after("The live root", r"Items 2 to 4 take (\d+)") == root._ADDED_BYTES
    longest = layout.SECTOR_BYTES - root._ADDED_BYTES
    assert number_after("The live root", r"`header_length` of at most (\d+)") == longest
    assert number_after("The live root", r"uses at most (\d+) bytes") == root.MAX_LIVE_HEADER_BYTES


def test_journal_extension() -> None:
    table = table_in("Journal extension")
    assert spans(table) == fields_of(root.JOURNAL_STRUCT.format)
    assert table[0].text == f"version of the journal, {root.JOURNAL_VERSION}"
    assert table[2].text.endswith(f"a multiple of {root.JOURNAL_ALIGNMENT}")
    assert table[3].text.endswith(
        f"a multiple of {2 * root.JOURNAL_ALIGNMENT}, at least {root.MIN_JOURNAL_BYTES}"
    )
    assert table[4].text.startswith(f"salt, {8 * root.SALT_BYTES} random bits")
    assert number_after("Journal extension", r"Type (0x\w+)") == root.EXTENSION_JOURNAL
    assert number_after("Journal extension", r"at most (\d+) GiB") << 30 == root.MAX_JOURNAL_BYTES


def test_root_copy() -> None:
    table = table_in("Root copy")
    assert spans(table[:3]) == fields_of(root.ROOT_COPY_STRUCT.format)
    assert table[3].last + 1 == root.ROOT_COPY_BYTES
    assert table[1].text == f'magic, "{root.ROOT_COPY_MAGIC.decode()}"'
    assert number_after("Root copy", r"at host offset (\d+)") == root.ROOT_COPY_OFFSET


def test_frames() -> None:
    table = table_in("Frames")
    assert spans(table) == fields_of(frame.FRAME_STRUCT.format)
    assert table[-1].last + 1 == frame.FRAME_HEADER_BYTES
    assert table[0].text == f'magic, "{frame.FRAME_MAGIC.decode()}"'
    assert table[1].text == f"version, {frame.FRAME_VERSION}"
    assert (
        f"{frame.ENCODING_PLAIN}: MessagePack, {frame.ENCODING_ZSTD}: MessagePack in one zstd"
        in table[2].text
    )
    assert table[4].first == frame.CRC_OFFSET
    assert number_after("Frames", r"a multiple of (\d+) bytes") == frame.FRAME_ALIGNMENT
    assert number_after("Frames", r"`123456789` is (0x\w+)") == _native.crc32c(b"123456789")
    described = [row.text.split()[0].rstrip(":,") for row in table[1:] if row.first != frame.CRC_OFFSET]
    assert described == list(frame.FrameHeader.__dataclass_fields__)


def test_operations() -> None:
    kinds = {
        name: int(kind) for kind, name in re.findall(r"^\[(\d),.*\]\s+(\w+):", section("Operations"), re.M)
    }
    names = ("block", "zero", "header", "intent", "done")
    assert kinds == {name: getattr(frame, f"KIND_{name.upper()}") for name in names}
    assert sorted(kinds.values()) == list(frame.KINDS)
    assert number_after("Operations", r"min\((\d+), cluster size\)") == layout.BLOCK_BYTES_MAX
    assert number_after("Operations", r"of at most (\d+) bytes") == root.MAX_LIVE_HEADER_BYTES


def test_limits() -> None:
    limits = dict(re.findall(r"^\| (.*?) \| (.*?) \|$", section("Limits"), re.M))
    assert limits["cluster size"] == "512 B to 2 MiB"
    assert (layout.MIN_CLUSTER_BITS, layout.MAX_CLUSTER_BITS) == (9, 21)
    assert limits["host offset"] == f"below 2^{layout.MAX_HOST_OFFSET.bit_length() - 1}"
    assert limits["L1 table"] == f"{layout.MAX_L1_BYTES >> 20} MiB"
    assert limits["refcount table"].startswith(f"{layout.MAX_REFCOUNT_TABLE_BYTES >> 20} MiB")
    assert limits["snapshots"] == (
        f"{snapshots.MAX_SNAPSHOTS}, in a table of {snapshots.MAX_TABLE_BYTES >> 20} MiB; "
        f"an L1 table of {layout.MAX_L1_BYTES >> 20} MiB each"
    )
    assert limits["journal range"] == (
        f"{root.MIN_JOURNAL_BYTES >> 10} KiB to {root.MAX_JOURNAL_BYTES >> 30} GiB, "
        f"{root.DEFAULT_JOURNAL_BYTES >> 20} MiB unless chosen otherwise"
    )


@pytest.mark.parametrize(
    "module", [header, entries, snapshots, root, frame], ids=lambda module: module.__name__
)
def test_module_docstrings_hold_the_same_tables(module: ModuleType) -> None:
    documented = list(tables(DOCUMENT))
    own = list(tables(module.__doc__ or ""))
    assert own
    for table in own:
        assert table in documented


def test_undo_file() -> None:
    fixed, run, mark = tables(section("The undo file"))
    assert spans(fixed) == fields_of(undo.HEADER_STRUCT.format)
    assert spans(run) == fields_of(undo.RUN_STRUCT.format)
    assert spans(mark) == fields_of(undo.MARK_STRUCT.format)
    assert fixed[0].text == f'magic, "{undo.MAGIC.decode()}"'
    assert fixed[1].text == f"version, {undo.VERSION}"
    assert all(f'"{each.value.decode()}"' in mark[0].text for each in undo.Mark)
    assert f"`{root.UNDO_FEATURE_NAME.decode()}`" in section("The undo file")
    assert number_after("The undo file", r"extension (0x\w+)") == root.EXTENSION_UNDO
    assert number_after("The undo file", r"at most (\d+) sectors") == undo.RUN_SECTORS_MAX
    assert number_after("The undo file", r"whole blocks of (\d+) bytes") == undo.BLOCK_BYTES
    assert number_after("The undo file", r"at a multiple of (\d+)") == undo.BLOCK_BYTES


def test_encryption() -> None:
    pointer, fixed, slot = tables(section("Encryption"))
    assert spans(pointer) == fields_of(luks.POINTER_STRUCT.format)
    assert spans(fixed[:-1]) == fields_of(luks.FIXED_STRUCT.format)
    assert fixed[-1][:2] == (luks.FIXED_BYTES, luks.HEADER_BYTES - 1)
    assert spans(slot) == fields_of(luks.SLOT_STRUCT.format)
    documented = list(tables(luks.__doc__ or ""))
    assert documented == [pointer, fixed, slot]
    assert f"{luks.ITERATIONS_MAX:,} iterations" in section("Encryption")
    assert f"{luks.STRIPES} stripes" in section("Encryption").replace("\n", " ")
