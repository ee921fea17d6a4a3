"""P6: whatever an image of 1 MiB says, no command takes more than 256 MiB of memory or 5 seconds.

The seconds are of CPU time, and a slow machine gets four times as many.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import zstandard

import jqcow
from jqcow.ondisk.frame import FrameHeader, HeaderOperation, encode_operations, frame_payload
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.root import JournalRange, pack_root
from jqcow.ondisk.snapshots import Snapshot, pack_table
from tests.support.measured import measure

FILE_BYTES_MAX = 1 << 20
PEAK_BYTES_MAX = 256 << 20
CPU_SECONDS_MAX = 5 * 4
COPIED = 1 << 63
FAR = 1 << 40
"""A host offset past the end of any file here."""


def blank(path: Path, cluster: int) -> bytearray:
    jqcow.create(path, 1 << 20, cluster_size=cluster).close()
    return bytearray(path.read_bytes())


def put(content: bytearray, offset: int, *values: int) -> None:
    """Write 64-bit numbers, making the file longer where needed."""
    data = struct.pack(f">{len(values)}Q", *values)
    content.extend(bytes(max(0, offset + len(data) - len(content))))
    content[offset : offset + len(data)] = data


def put_l1(content: bytearray, cluster: int, values: list[int]) -> None:
    """Place an L1 table behind all else, for a disk as large as it can map."""
    offset = -(-len(content) // cluster) * cluster
    put(content, offset, *values)
    struct.pack_into(">I", content, 36, len(values))
    put(content, 40, offset)
    put(content, 24, len(values) * (cluster // 8) * cluster)


def place_of_table(content: bytearray, cluster: int) -> int:
    """Make room for a table behind all else, and return where."""
    offset = -(-len(content) // cluster) * cluster
    content.extend(bytes(offset + cluster - len(content)))
    return offset


def one_l2_table_for_all(path: Path) -> bytearray:
    """100,000 L1 entries that name one L2 table, whose clusters come in no order."""
    cluster = 64 << 10
    content = blank(path, cluster)
    table = place_of_table(content, cluster)
    put(content, table, *(0 if at % 2 else cluster | COPIED for at in range(cluster // 8)))
    put_l1(content, cluster, [table | COPIED] * 80_000)
    return content


def l2_tables_in_no_file(path: Path) -> bytearray:
    cluster = 64 << 10
    content = blank(path, cluster)
    put_l1(content, cluster, [FAR + at * cluster | COPIED for at in range(90_000)])
    return content


def l1_table_in_no_file(path: Path) -> bytearray:
    content = blank(path, 512)
    struct.pack_into(">I", content, 36, 4 << 20)
    put(content, 40, FAR)
    put(content, 24, (4 << 20) * 64 * 512)
    return content


def refcount_blocks_in_no_file(path: Path) -> bytearray:
    """A refcount table with 100,000 entries, of which the first one alone is good."""
    cluster = 64 << 10
    content = blank(path, cluster)
    old = int.from_bytes(content[48:56], "big")
    first = int.from_bytes(content[old : old + 8], "big")
    table = place_of_table(content, cluster)
    put(content, table, first, *(FAR + at * cluster for at in range(90_000)))
    put(content, 48, table)
    struct.pack_into(">I", content, 56, 90_000 * 8 // cluster + 1)
    return content


def snapshots(content: bytearray, cluster: int, count: int, l1_offset: Callable[[int], int]) -> bytearray:
    table = place_of_table(content, cluster)
    entries = [
        Snapshot(l1_offset(at), 4 << 20, str(at), "s", 0, 0, 0, 0, 1 << 20, None) for at in range(count)
    ]
    data = pack_table(entries)
    content[table:] = data
    struct.pack_into(">IQ", content, 60, count, table)
    return content


def snapshots_in_no_file(path: Path) -> bytearray:
    """8,000 snapshots with L1 tables of 32 MiB each."""
    cluster = 64 << 10
    return snapshots(blank(path, cluster), cluster, 8000, lambda at: FAR + (at << 25))


def snapshots_of_one_table(path: Path) -> bytearray:
    cluster = 64 << 10
    return snapshots(blank(path, cluster), cluster, 8000, lambda at: 3 * cluster)


def many_snapshots_in_a_hole(path: Path) -> bytearray:
    """As many snapshots as there can be, whose table is in no file: names without an end."""
    content = blank(path, 1 << 16)
    struct.pack_into(">IQ", content, 60, 65536, FAR)
    return content


def header_of_extensions(path: Path) -> bytearray:
    """A header cluster full of the shortest extensions."""
    content = blank(path, 1 << 18)
    length = struct.unpack_from(">I", content, 100)[0]
    content[length : 1 << 18] = struct.pack(">II", 1, 0) * (((1 << 18) - length) // 8)
    return content


def refcount_table_in_no_file(path: Path) -> bytearray:
    content = blank(path, 512)
    put(content, 48, FAR)
    struct.pack_into(">I", content, 56, (8 << 20) // 512)
    return content


def compressed_clusters_in_no_file(path: Path) -> bytearray:
    """L2 tables full of one descriptor."""
    cluster = 64 << 10
    content = blank(path, cluster)
    tables = []
    for _ in range(10):
        tables.append(place_of_table(content, cluster))
        put(content, tables[-1], *([1 << 62 | 1 << 54 | FAR] * (cluster // 8)))
    put_l1(content, cluster, [table | COPIED for table in tables])
    return content


def journal(path: Path, payload: bytes, frames: int = 1) -> bytearray:
    """A live image with frames of a payload, which is compressed, in the largest journal that fits."""
    content = blank(path, 4096)
    start = -(-len(content) // 8192) * 8192
    extent = JournalRange(start, (FILE_BYTES_MAX - start) // 8192 * 8192, bytes(range(16)))
    root = pack_root(Header.unpack(bytes(content[:112])), extent)
    content.extend(bytes(extent.end - len(content)))
    content[:512] = root
    data = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(payload)
    place = extent.half_offset(2)
    for number in range(frames):
        frame = FrameHeader(1, 1, 0, extent.salt, 2, number + 9, 1, len(data), len(payload)).pack(data)
        if place + len(frame) > extent.half_offset(2) + extent.half_bytes:
            break
        content[place : place + len(frame)] = frame
        place += len(frame)
    return content


def journal_of_empty_arrays(path: Path) -> bytearray:
    count = 400_000
    return journal(path, b"\xdd" + struct.pack(">I", count) + b"\x90" * count)


def journal_of_zeros(path: Path) -> bytearray:
    """As many operations as there is room for, each of which names a block."""
    area = blank(path.with_name("area"), 4096)[:112] + bytes(8)
    zeros = [[2, FAR + at * 4096, 4096] for at in range(20_000)]
    return journal(path, msgpack.packb([[3, bytes(area)], *zeros], use_bin_type=True), frames=100)


def sparse_snapshot_tables(path: Path) -> bytearray:
    """128 snapshots with L1 tables of 32 MiB each, which are holes of the file."""
    cluster = 64 << 10
    return snapshots(blank(path, cluster), cluster, 128, lambda at: SPARSE_BYTES - ((128 - at) << 25))


def sparse_journal(path: Path) -> bytearray:
    """A journal of 1 GiB, of which nothing but the opening frame is there."""
    content = blank(path, 4096)
    start = -(-len(content) // 8192) * 8192
    extent = JournalRange(start, 1 << 30, bytes(range(16)))
    area = HeaderArea.parse(bytes(content[:4096]))
    content[:512] = pack_root(area.header, extent)
    frame = frame_payload(encode_operations([HeaderOperation(area.data)]), extent.salt, 2, 1)
    content.extend(bytes(extent.half_offset(2) - len(content)))
    return content + frame


SPARSE_BYTES = 8 << 30
"""Length of the files of those attacks that consist of holes."""
SPARSE_ATTACKS = [sparse_snapshot_tables, sparse_journal]

ATTACKS = [
    *SPARSE_ATTACKS,
    many_snapshots_in_a_hole,
    header_of_extensions,
    refcount_table_in_no_file,
    compressed_clusters_in_no_file,
    journal_of_empty_arrays,
    journal_of_zeros,
    one_l2_table_for_all,
    l2_tables_in_no_file,
    l1_table_in_no_file,
    refcount_blocks_in_no_file,
    snapshots_in_no_file,
    snapshots_of_one_table,
]

ALWAYS = ("check", "convert")
"""They meet all attacks."""
COMMANDS = {
    "info": ("jqcow", "info", "IMAGE"),
    "check": ("jqcow", "check", "IMAGE"),
    "repair": ("jqcow", "check", "-r", "all", "IMAGE"),
    "map": ("jqcow", "map", "IMAGE"),
    "convert": ("jqcow", "convert", "-O", "qcow2", "IMAGE", "TARGET"),
    "journal": ("jqcow", "journal", "IMAGE"),
    "list": ("jqcow", "snapshot", "-l", "IMAGE"),
    "snapshot": ("jqcow", "snapshot", "-c", "new", "IMAGE"),
    "resize": ("jqcow", "resize", "IMAGE", "+1M"),
    "recover": ("jqcow-recover", "IMAGE"),
    "diagnose": ("jqcow-recover", "--deep", "--picture", "PICTURE", "IMAGE"),
}


def commands_for(attack: Callable[[Path], bytearray]) -> list[str]:
    """Return which commands meet an attack: half of them, so that each meets half of the attacks."""
    number = ATTACKS.index(attack)
    return [name for place, name in enumerate(COMMANDS) if (place + number) % 2 == 0 or name in ALWAYS]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_every_command_is_bounded(attack: Callable[[Path], bytearray], tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    content = attack(path)
    assert len(content) <= FILE_BYTES_MAX
    for name in commands_for(attack):
        command = COMMANDS[name]
        path.write_bytes(content)
        if attack in SPARSE_ATTACKS:
            os.truncate(path, SPARSE_BYTES)
        paths = {
            "IMAGE": str(path),
            "TARGET": str(tmp_path / f"{name}.raw"),
            "PICTURE": str(tmp_path / "p.svg"),
        }
        took = measure(*(paths.get(word, word) for word in command))
        assert took.cpu_seconds < CPU_SECONDS_MAX, f"{name} took {took}"
        assert took.peak_bytes < PEAK_BYTES_MAX, f"{name} took {took}"
        assert "Traceback" not in took.errors, took.errors
