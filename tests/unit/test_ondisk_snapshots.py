"""The snapshot table: what qemu-img wrote is understood, what is packed comes back, all else is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow.errors import CorruptionError, FormatError, JqcowError
from jqcow.ondisk.header import Header
from jqcow.ondisk.layout import MAX_HOST_OFFSET
from jqcow.ondisk.snapshots import (
    FIXED_STRUCT,
    MAX_EXTRA_BYTES,
    MAX_SNAPSHOTS,
    MAX_TABLE_BYTES,
    Snapshot,
    SnapshotTable,
    pack_table,
    parse_table,
)
from tests.support.patients import make_image
from tests.support.qemu import done

DISK_BYTES = 8 << 20
HEADER = Header(
    version=3,
    backing_file_offset=0,
    backing_file_size=0,
    cluster_bits=16,
    size=DISK_BYTES,
    crypt_method=0,
    l1_size=1,
    l1_table_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
    nb_snapshots=0,
    snapshots_offset=0,
)
SNAPSHOT = Snapshot(
    l1_table_offset=0x50000,
    l1_size=1,
    id="1",
    name="before the update",
    date_seconds=1_700_000_000,
    date_nanoseconds=5,
    vm_clock_nanoseconds=77,
    vm_state_bytes=0,
    disk_bytes=DISK_BYTES,
    icount=None,
)
PLACE = 0x40000


def reader(table: bytes, place: int = PLACE) -> Callable[[int, int], bytes]:
    """Return a function that reads a file of zeros, but for the table at ``place``."""

    def read(length: int, offset: int) -> bytes:
        return table[offset - place : offset - place + length].ljust(length, b"\0")

    return read


def parse(table: bytes, count: int, header: Header = HEADER) -> SnapshotTable:
    return parse_table(reader(table), PLACE, count, header=header)


def packed(
    extra: bytes, *, vm_state_bytes: int = 0, l1_table_offset: int = 0x50000, l1_size: int = 1
) -> bytes:
    """Return an entry with any extra data, id ``7`` and name ``old``."""
    fixed = FIXED_STRUCT.pack(l1_table_offset, l1_size, 1, 3, 0, 0, 0, vm_state_bytes, len(extra))
    entry = fixed + extra + b"7old"
    return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.binary(max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape")),
)
snapshots = st.builds(
    Snapshot,
    l1_table_offset=st.integers(1, (MAX_HOST_OFFSET >> 16) - 600).map(lambda cluster: cluster << 16),
    l1_size=st.integers(0, 4 << 20),
    id=names,
    name=names,
    date_seconds=st.integers(0, (1 << 32) - 1),
    date_nanoseconds=st.integers(0, (1 << 32) - 1),
    vm_clock_nanoseconds=st.integers(0, (1 << 64) - 1),
    vm_state_bytes=st.integers(0, (1 << 64) - 1),
    disk_bytes=st.integers(0, (1 << 64) - 1),
    icount=st.none() | st.integers(0, (1 << 64) - 2),
    unknown_extra=st.binary(max_size=MAX_EXTRA_BYTES - 24),
)


@given(st.lists(snapshots, max_size=5))
def test_what_is_packed_comes_back(several: list[Snapshot]) -> None:
    table = pack_table(several)
    assert len(table) % 8 == 0
    assert parse(table + b"\xff" * 99, len(several)) == SnapshotTable(tuple(several), len(table))


@pytest.mark.parametrize("cluster_bytes", [512, 65536])
def test_a_table_of_qemu(tmp_path: Path, cluster_bytes: int) -> None:
    """Read as qemu-img tells it, and packed again to the very bytes that qemu-img wrote."""
    path = tmp_path / "image"
    make_image(path, "write 0 64k", options=f"cluster_size={cluster_bytes}")
    given_names = ["first", "zweiter: größer", "x" * 200, ""]
    for name in given_names:
        done("qemu-img", "snapshot", "-c", name, path)
    done("qemu-img", "snapshot", "-d", "first", path)
    done("qemu-img", "resize", "-f", "qcow2", path, "9M")
    done("qemu-img", "snapshot", "-c", "larger", path)
    image = path.read_bytes()
    header = Header.unpack(image)
    place = header.snapshots_offset
    table = parse_table(reader(image, 0), place, header.nb_snapshots, header=header)
    told = json.loads(done("qemu-img", "info", "--output=json", path))
    assert [snapshot.name for snapshot in table.snapshots] == [*given_names[1:], "larger"]
    for ours, theirs in zip(table.snapshots, told["snapshots"], strict=True):
        assert (ours.id, ours.name) == (theirs["id"], theirs["name"])
        assert (ours.date_seconds, ours.date_nanoseconds) == (theirs["date-sec"], theirs["date-nsec"])
        assert (ours.vm_state_bytes, ours.icount) == (theirs["vm-state-size"], theirs["icount"])
    assert [snapshot.disk_bytes for snapshot in table.snapshots] == [8 << 20] * 3 + [9 << 20]
    # The file may end with the last name, without the padding.
    assert pack_table(table.snapshots) == image[place:].ljust(table.length_bytes, b"\0")[: table.length_bytes]


class TestExtraData:
    def test_none_at_all(self) -> None:
        (snapshot,) = parse(packed(b"", vm_state_bytes=4096), 1).snapshots
        assert (snapshot.vm_state_bytes, snapshot.disk_bytes, snapshot.icount) == (4096, DISK_BYTES, None)
        assert (snapshot.id, snapshot.name, snapshot.unknown_extra) == ("7", "old", b"")

    def test_the_large_size_of_the_vm_state_counts(self) -> None:
        (snapshot,) = parse(packed(struct.pack(">Q", 1 << 40), vm_state_bytes=4096), 1).snapshots
        assert (snapshot.vm_state_bytes, snapshot.disk_bytes) == (1 << 40, DISK_BYTES)

    def test_a_disk_of_another_size(self) -> None:
        (snapshot,) = parse(packed(struct.pack(">QQ", 0, 1 << 30), vm_state_bytes=4096), 1).snapshots
        assert (snapshot.vm_state_bytes, snapshot.disk_bytes, snapshot.icount) == (0, 1 << 30, None)

    @pytest.mark.parametrize(("stored", "icount"), [(0, 0), (7, 7), ((1 << 64) - 1, None)])
    def test_the_instruction_count(self, stored: int, icount: int | None) -> None:
        (snapshot,) = parse(packed(struct.pack(">QQQ", 0, 0, stored)), 1).snapshots
        assert snapshot.icount == icount

    def test_what_is_unknown_is_kept(self) -> None:
        extra = struct.pack(">QQQ", 0, DISK_BYTES, 0) + b"from the future"
        (snapshot,) = parse(packed(extra), 1).snapshots
        assert snapshot.unknown_extra == b"from the future"
        assert snapshot.pack() == packed(extra)

    @pytest.mark.parametrize("length", [1, 7, 9, 15, 17, 23])
    def test_cut_short(self, length: int) -> None:
        with pytest.raises(CorruptionError, match=f"{length} bytes of extra data"):
            parse(packed(bytes(length)), 1)

    def test_too_much(self) -> None:
        parse(packed(bytes(MAX_EXTRA_BYTES)), 1)
        with pytest.raises(FormatError, match="1025 bytes of extra data"):
            parse(packed(bytes(MAX_EXTRA_BYTES + 1)), 1)

    def test_a_large_vm_state_is_not_cut_to_32_bits(self) -> None:
        entry = replace(SNAPSHOT, vm_state_bytes=(1 << 32) + 5).pack()
        assert int.from_bytes(entry[32:36], "big") == 0
        assert parse(entry, 1).snapshots[0].vm_state_bytes == (1 << 32) + 5


class TestL1Tables:
    @pytest.mark.parametrize("offset", [512, 0, MAX_HOST_OFFSET, MAX_HOST_OFFSET - 65536 + 1, 1 << 63])
    def test_where_none_can_be(self, offset: int) -> None:
        with pytest.raises(CorruptionError, match="L1 table") as caught:
            parse(SNAPSHOT.pack() + replace(SNAPSHOT, l1_table_offset=offset).pack(), 2)
        assert caught.value.offset == PLACE + len(SNAPSHOT.pack())
        assert caught.value.structure == "snapshot table entry"

    def test_one_that_ends_past_the_last_offset(self) -> None:
        at_end = MAX_HOST_OFFSET - 65536
        parse(replace(SNAPSHOT, l1_table_offset=at_end, l1_size=8192).pack(), 1)
        with pytest.raises(CorruptionError, match="L1 table"):
            parse(replace(SNAPSHOT, l1_table_offset=at_end, l1_size=8193).pack(), 1)

    def test_the_largest(self) -> None:
        parse(replace(SNAPSHOT, l1_size=4 << 20).pack(), 1)
        with pytest.raises(CorruptionError, match="too large"):
            parse(replace(SNAPSHOT, l1_size=(4 << 20) + 1).pack(), 1)

    def test_an_empty_one_lies_nowhere(self) -> None:
        empty = replace(SNAPSHOT, l1_table_offset=0, l1_size=0)
        assert parse(empty.pack(), 1).snapshots == (empty,)

    def test_snapshots_of_an_empty_disk_by_qemu(self, tmp_path: Path) -> None:
        image = make_image(tmp_path / "image", size="0")
        done("qemu-img", "snapshot", "-c", "nothing", tmp_path / "image")
        image = bytearray((tmp_path / "image").read_bytes())
        header = Header.unpack(bytes(image))
        table = parse_table(reader(bytes(image), 0), header.snapshots_offset, 1, header=header)
        assert [(each.l1_size, each.disk_bytes) for each in table.snapshots] == [(0, 0)]


class TestBounds:
    def test_no_snapshots(self) -> None:
        assert parse_table(reader(b""), 0, 0, header=HEADER) == SnapshotTable((), 0)
        assert pack_table([]) == b""

    @pytest.mark.parametrize("offset", [0, 512, MAX_HOST_OFFSET])
    def test_a_table_where_none_can_be(self, offset: int) -> None:
        with pytest.raises(CorruptionError, match="snapshot table"):
            parse_table(reader(b""), offset, 1, header=HEADER)

    def test_the_most_snapshots(self) -> None:
        table = pack_table([SNAPSHOT] * MAX_SNAPSHOTS)
        assert len(parse(table, MAX_SNAPSHOTS).snapshots) == MAX_SNAPSHOTS
        with pytest.raises(FormatError, match="65537 snapshots"):
            parse(table, MAX_SNAPSHOTS + 1)
        with pytest.raises(ValueError, match="exceed"):
            pack_table([SNAPSHOT] * (MAX_SNAPSHOTS + 1))

    def test_the_longest_table(self) -> None:
        long = replace(SNAPSHOT, id="i" * 65535, name="n" * 65535)
        fit = MAX_TABLE_BYTES // len(long.pack())
        table = pack_table([long] * fit)
        assert parse(table, fit).snapshots[-1] == long
        with pytest.raises(FormatError, match="exceeds"):
            parse(table + long.pack(), fit + 1)
        with pytest.raises(ValueError, match="exceed"):
            pack_table([long] * (fit + 1))

    def test_a_table_that_never_ends_is_read_in_steps(self) -> None:
        """65,536 entries that are as long as can be: no more is read than a table may have."""
        read_bytes, largest = 0, 0
        entry = FIXED_STRUCT.pack(0x50000, 1, 0xFFFF, 0xFFFF, 0, 0, 0, 0, MAX_EXTRA_BYTES)
        length = -(-(40 + MAX_EXTRA_BYTES + 2 * 0xFFFF) // 8) * 8
        table = entry.ljust(length, b"x")

        def read(length: int, offset: int) -> bytes:
            nonlocal read_bytes, largest
            read_bytes, largest = read_bytes + length, max(largest, length)
            within = (offset - PLACE) % len(table)
            return (table[within:] + table * 2)[:length]

        with pytest.raises(FormatError, match="exceeds"):
            parse_table(read, PLACE, MAX_SNAPSHOTS, header=HEADER)
        assert read_bytes < MAX_TABLE_BYTES + (1 << 20)
        assert largest < 1 << 20

    @pytest.mark.parametrize(
        "changes",
        [
            {"id": "x" * 65536},
            {"name": "ü" * 32768},
            {"unknown_extra": bytes(MAX_EXTRA_BYTES - 23)},
            {"l1_size": 1 << 32},
            {"date_seconds": -1},
            {"disk_bytes": 1 << 64},
            {"icount": 1 << 64},
        ],
    )
    def test_what_does_not_fit_is_not_packed(self, changes: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="snapshot"):
            replace(SNAPSHOT, **changes).pack()  # type: ignore[arg-type]


@given(st.binary(max_size=400), st.integers(0, 1 << 20))
def test_any_bytes_give_a_table_or_an_error_of_jqcow(data: bytes, count: int) -> None:
    with contextlib.suppress(JqcowError):
        parse(data, count)


@given(st.lists(snapshots, min_size=1, max_size=3), st.data())
def test_mutated_tables_give_a_table_or_an_error_of_jqcow(
    several: list[Snapshot], data: st.DataObject
) -> None:
    table = bytearray(pack_table(several))
    for _ in range(data.draw(st.integers(1, 8))):
        table[data.draw(st.integers(0, min(len(table), 64) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(JqcowError):
        parse(bytes(table), len(several))
