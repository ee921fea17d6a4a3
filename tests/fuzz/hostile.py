"""Hostile images: good ones, clean and live, in which one or a few things were made wrong on purpose.

A case is named by a number. The number chooses the image and what is done to it, so it replays the case.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgpack
import zstandard

import jqcow
from jqcow.engine import scan as scans
from jqcow.ondisk import entries, l2
from jqcow.ondisk.frame import (
    ENCODING_PLAIN,
    ENCODING_ZSTD,
    FRAME_ALIGNMENT,
    BlockOperation,
    FrameHeader,
    Operation,
    ZeroOperation,
)
from jqcow.ondisk.header import EXTENSION_STRUCT, V3_STRUCT, Header
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.root import JOURNAL_STRUCT, JournalRange, pack_root_copy, unpack_root
from jqcow.ondisk.snapshots import FIXED_BYTES
from jqcow.testing import SimulatedDevice
from tests.fuzz.sparse import SparseDevice

JOURNAL_BYTES = 64 << 10
CLUSTER_BYTES = (512, 4096, 65536)
DISK_CLUSTERS = {512: 600, 4096: 1100, 65536: 40}

HEADER_FIELDS = {
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}
"""Offset and length in bytes of what a hostile hand would turn."""

SNAPSHOT_FIELDS = {
    "l1_table_offset": (0, 8),
    "l1_size": (8, 4),
    "id_size": (12, 2),
    "name_size": (14, 2),
    "vm_state_size": (32, 4),
    "extra_data_size": (36, 4),
    "vm_state_size_large": (40, 8),
    "disk_size": (48, 8),
    "icount": (56, 8),
    "id": (64, 8),
}
"""The same of an entry of the snapshot table."""


@dataclass(frozen=True)
class Sample:
    """A good image: its bytes, its cluster size, whether its journal is live, where its snapshot table is.

    ``snapshots_offset`` is a host offset in bytes, 0: no snapshots.
    """

    content: bytes
    cluster_bytes: int
    live: bool
    snapshots_offset: int = 0


@dataclass(frozen=True)
class Case:
    """A hostile image and what was done to it."""

    number: int
    content: bytes
    live: bool
    story: tuple[str, ...]

    def __str__(self) -> str:
        kind = "live" if self.live else "clean"
        return f"case {self.number}: {kind} image of {len(self.content)} bytes; " + "; ".join(self.story)


@functools.cache
def samples() -> tuple[Sample, ...]:
    """Return the good images that cases start from."""
    made = []
    for cluster_bytes in CLUSTER_BYTES:
        for flushes in (1, 5, 12):
            made += _make_samples(cluster_bytes, flushes)
            made += _make_samples(cluster_bytes, flushes, with_snapshots=True)
    return tuple(made)


def _make_samples(cluster_bytes: int, flushes: int, *, with_snapshots: bool = False) -> list[Sample]:
    chance = random.Random(cluster_bytes + flushes)
    device = SimulatedDevice()
    size = DISK_CLUSTERS[cluster_bytes] * cluster_bytes
    image = jqcow.create_on_device(
        device,
        size,
        cluster_size=cluster_bytes,
        journal_size=JOURNAL_BYTES,
        new_salt=lambda: chance.randbytes(16),
    )
    for _ in range(flushes):
        offset = chance.randrange(size - 3 * cluster_bytes)
        image.pwrite(chance.randbytes(2 * cluster_bytes), offset)
        image.write_zeroes(
            cluster_bytes, offset // cluster_bytes * cluster_bytes, unmap=chance.random() < 0.5
        )
        if with_snapshots:
            _add_snapshots(image, chance, offset // cluster_bytes * cluster_bytes, cluster_bytes)
        image.flush()
    table = image._engine.public.view.header.snapshots_offset
    live = Sample(device.content(), cluster_bytes, live=True, snapshots_offset=table)
    image.close()
    return [live, Sample(device.content(), cluster_bytes, live=False, snapshots_offset=table)]


def _add_snapshots(image: jqcow.Image, chance: random.Random, offset: int, cluster_bytes: int) -> None:
    """Make snapshots and compressed clusters that they share, a few of each."""
    data = b"".join(chance.randbytes(cluster_bytes // 3).ljust(cluster_bytes, b"c") for _ in range(2))
    image.pwrite_compressed(data, offset)
    if len(image.snapshots()) == 3:
        image.delete_snapshot(image.snapshots()[1].id)
    image.create_snapshot(f"snapshot at {offset:#x}")
    image.pwrite(chance.randbytes(700), offset)


def make_case(number: int) -> Case:
    """Make the hostile image of this number."""
    return _make_case(number, samples())


def make_clean_case(number: int) -> Case:
    """Make the hostile image of this number, of those that any program can read."""
    return _make_case(number, tuple(sample for sample in samples() if not sample.live))


def _make_case(number: int, bases: tuple[Sample, ...]) -> Case:
    chance = random.Random(number)
    sample = chance.choice(bases)
    content, story = _attacked(sample, chance)
    return Case(number, content, sample.live, story)


def drawn_content(chance: random.Random) -> bytes:
    """Return the hostile image that chance makes."""
    return _attacked(chance.choice(samples()), chance)[0]


def _attacked(sample: Sample, chance: random.Random) -> tuple[bytes, tuple[str, ...]]:
    content = bytearray(sample.content)
    attacks = list(ATTACKS if sample.live else CLEAN_ATTACKS)
    story = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        attack = chance.choice(attacks)
        told = attack(content, sample, chance)
        story.append(f"{attack.__name__} {told}")
    return bytes(content), tuple(story)


# Values that break things


def nasty(chance: random.Random, sample: Sample, file_bytes: int) -> int:
    """Return a number that hostile software would try."""
    cluster = sample.cluster_bytes
    edges = [0, 1, 7, SECTOR_BYTES, 4096, cluster, file_bytes, 1 << 31, 1 << 32, 1 << 40, 1 << 48]
    edges += [1 << 55, 1 << 56, (1 << 56) - cluster, 1 << 61, 1 << 62, 1 << 63, (1 << 64) - 1]
    match chance.randrange(4):
        case 0:
            value = chance.choice(edges)
        case 1:
            value = chance.choice(edges) + chance.choice(
                (-cluster, -SECTOR_BYTES, -1, 1, SECTOR_BYTES, cluster)
            )
        case 2:
            value = chance.randrange(file_bytes // cluster + 2) * cluster
        case _:
            value = chance.getrandbits(chance.choice((3, 8, 16, 32, 64)))
    return value & ((1 << 64) - 1)


def _put(content: bytearray, offset: int, value: int, length: int) -> None:
    if offset + length <= len(content):
        content[offset : offset + length] = (value & ((1 << 8 * length) - 1)).to_bytes(length, "big")


# Attacks on any image; each returns what it did


def truncate(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Cut the file short, or leave a long tail of nothing."""
    length = chance.choice((chance.randrange(len(content)), chance.randrange(1200)))
    del content[min(length, len(content)) :]
    return f"to {len(content)} bytes"


def flip_bytes(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Change a few bytes anywhere, mostly near the start of a cluster."""
    if not content:
        return "nothing"
    places = []
    for _ in range(chance.choice((1, 3, 30))):
        place = chance.randrange(len(content))
        if chance.random() < 0.7:
            place = min(len(content) - 1, place - place % sample.cluster_bytes + chance.randrange(128))
        content[place] = chance.randrange(256)
        places.append(place)
    return f"at {places[:5]}"


def header_field(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Put a nasty value into a field of sector 0."""
    name = chance.choice(sorted(HEADER_FIELDS))
    offset, length = HEADER_FIELDS[name]
    value = nasty(chance, sample, len(content))
    if chance.random() < 0.3:
        value = 1 << chance.randrange(8 * length)
    _put(content, offset, value, length)
    return f"{name} = {value:#x}"


def extension(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Put extensions of any type and length behind the fixed fields."""
    position = 112
    if len(content) < position:
        return "nothing"
    kinds = [0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x6A71C057, chance.getrandbits(32)]
    told = []
    for _ in range(chance.choice((1, 2, 60))):
        kind = chance.choice(kinds)
        length = chance.choice((0, 1, 8, 64, 400, 5000, 2**31, 2**32 - 1))
        if position + 8 > len(content):
            break
        content[position : position + 8] = EXTENSION_STRUCT.pack(kind, length)
        told.append(f"{kind:#x}:{length}")
        position += 8 + -(-min(length, 512) // 8) * 8
    return " ".join(told[:4])


def table_entry(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Put a nasty value into an entry of the refcount table, a refcount block, the L1 or an L2 table."""
    table, base = chance.choice(_tables(content, sample))
    index = chance.choice((0, 0, 1, chance.randrange(sample.cluster_bytes // 8)))
    value = nasty(chance, sample, len(content))
    for flag in (entries.COPIED, l2.COMPRESSED, l2.ZERO):
        if chance.random() < 0.2:
            value |= flag
    _put(content, base + index * 8, value, 8)
    return f"{table}[{index}] = {value:#x}"


def same_cluster_twice(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Point one entry where another structure lies: the header, a table, or the journal."""
    tables = _tables(content, sample)
    table, base = chance.choice(tables)
    victim, offset = chance.choice([*tables, ("header", 0), ("journal", len(content) - JOURNAL_BYTES)])
    index = chance.randrange(min(8, sample.cluster_bytes // 8))
    flags = chance.choice((0, entries.COPIED))
    _put(content, base + index * 8, offset | flags, 8)
    return f"{table}[{index}] -> {victim}"


def _tables(content: bytearray, sample: Sample) -> list[tuple[str, int]]:
    """Return the tables that the header in sector 0 leads to: (name, host offset)."""
    if len(content) < SECTOR_BYTES:
        return [("nothing", 0)]
    fields = V3_STRUCT.unpack_from(content)
    l1, refcount_table = fields[8], fields[9]
    found = [("L1", l1), ("refcount table", refcount_table)]
    for name, table in (("L2", l1), ("refcount block", refcount_table)):
        for index in range(4):
            entry = int.from_bytes(content[table + index * 8 : table + index * 8 + 8], "big")
            if entry:
                found.append((name, entry & entries.OFFSET_MASK))
    return [(name, offset) for name, offset in found if offset < len(content)] or [("nothing", 0)]


# Attacks on snapshots and compressed clusters


def snapshot_entry(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Put a nasty value into a field of the snapshot table, in any of its entries."""
    table = sample.snapshots_offset
    if not table or table + FIXED_BYTES > len(content):
        return "nothing"
    name = chance.choice(sorted(SNAPSHOT_FIELDS))
    field, length = SNAPSHOT_FIELDS[name]
    # The entries follow each other; most are about as long.
    place = table + chance.choice((0, 0, 0, 88, 96)) + field
    value = nasty(chance, sample, len(content))
    _put(content, place, value, length)
    return f"{name} = {value:#x}"


def snapshot_mapping(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Put a nasty value, or another table, into the L1 table of a snapshot or an L2 table below it."""
    table = sample.snapshots_offset
    l1 = int.from_bytes(content[table : table + 8], "big")
    if not table or l1 + SECTOR_BYTES > len(content):
        return "nothing"
    found = [l1]
    for index in range(4):
        entry = int.from_bytes(content[l1 + index * 8 : l1 + index * 8 + 8], "big") & entries.OFFSET_MASK
        if entry and entry < len(content):
            found.append(entry)
    base = chance.choice(found)
    index = chance.choice((0, 0, 1, chance.randrange(sample.cluster_bytes // 8)))
    value = chance.choice(
        (nasty(chance, sample, len(content)), *(place for _, place in _tables(content, sample)))
    )
    value |= chance.choice((0, entries.COPIED))
    _put(content, base + index * 8, value, 8)
    return f"{base:#x}[{index}] = {value:#x}"


def _compressed_entries(content: bytearray, sample: Sample) -> list[int]:
    """Return where the descriptors of compressed clusters lie, in the file."""
    found = []
    for name, table in _tables(content, sample):
        if name == "L2":
            for place in range(table, min(table + sample.cluster_bytes, len(content) - 7), 8):
                if content[place] & (l2.COMPRESSED >> 56):
                    found.append(place)
    return found


def compressed_descriptor(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Let a compressed cluster lie elsewhere: in metadata, past the end, over another one, or be long."""
    found = _compressed_entries(content, sample)
    if not found:
        return "nothing"
    place = chance.choice(found)
    width = 62 - (sample.cluster_bytes.bit_length() - 1 - 8)
    old = int.from_bytes(content[place : place + 8], "big") & (l2.COMPRESSED - 1)
    host, sectors = old & ((1 << width) - 1), old >> width
    match chance.randrange(4):
        case 0:
            host = nasty(chance, sample, len(content))
        case 1:
            host = chance.choice(_tables(content, sample))[1] + chance.randrange(sample.cluster_bytes)
        case 2:
            host += chance.choice((-SECTOR_BYTES, -1, 1, 100, SECTOR_BYTES, sample.cluster_bytes))
        case _:
            sectors = chance.getrandbits(62 - width)
    value = l2.COMPRESSED | (sectors << width & (l2.COMPRESSED - 1)) | (host & ((1 << width) - 1))
    _put(content, place, value | chance.choice((0, 0, entries.COPIED)), 8)
    return f"at {place:#x}: {value:#x}"


def compressed_stream(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Replace a stream by one that gives too much, too little, or nothing at all."""
    found = _compressed_entries(content, sample)
    if not found:
        return "nothing"
    width = 62 - (sample.cluster_bytes.bit_length() - 1 - 8)
    place = chance.choice(found)
    host = int.from_bytes(content[place : place + 8], "big") & ((1 << width) - 1)
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = packer.compress(bytes(1 << 24)) + packer.flush()
    streams = (bomb, bomb[:300], b"", chance.randbytes(700), b"\xff" * 600, b"\x00\x00\x00\xff\xff" * 100)
    stream = chance.choice(streams)[: max(0, len(content) - host)]
    content[host : host + len(stream)] = stream
    return f"{len(stream)} bytes at {host:#x}"


# Attacks on a live image


def root_journal(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Put nasty values into the journal extension of the root, and sometimes into its copy."""
    place = bytes(content[:SECTOR_BYTES]).find(b"\x6a\x71\xc0\x57")
    if place < 0 or place + 8 + JOURNAL_STRUCT.size > len(content):
        return "nothing"
    place += 8
    fields = list(JOURNAL_STRUCT.unpack_from(content, place))
    which = chance.choice((0, 1, 2, 2, 3, 3, 4))
    if which == 4:
        fields[4] = chance.randbytes(16)
    else:
        fields[which] = nasty(chance, sample, len(content))
        if which >= 2 and chance.random() < 0.6:
            fields[which] &= ~8191
        if which < 2:
            fields[which] &= 0xFFFFFFFF
    JOURNAL_STRUCT.pack_into(content, place, *fields)
    if chance.random() < 0.3 and sample.cluster_bytes > 4096 and len(content) >= 8192:
        content[4096:5120] = pack_root_copy(bytes(content[:SECTOR_BYTES]))
    if chance.random() < 0.2:
        content[:4] = bytes(4)
    return f"fields {fields}"


def frame_bytes(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Damage frames without mending their checksums."""
    extent = _extent(content)
    if extent is None:
        return "nothing"
    place = extent.half_offset(chance.randrange(2)) + chance.randrange(8) * FRAME_ALIGNMENT
    length = chance.choice((1, 8, 64, FRAME_ALIGNMENT))
    if place + length <= len(content):
        content[place : place + length] = chance.choice((bytes(length), chance.randbytes(length)))
    return f"{length} bytes at {place:#x}"


def frame_fields(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Change a field of a frame header and mend the checksum."""
    told = []

    def change(header: FrameHeader, items: Any) -> FrameHeader:
        name = chance.choice(
            ("epoch", "sequence", "checkpointed_epoch", "version", "encoding", "flags", "decoded_length")
        )
        width = {"version": 16, "encoding": 8, "flags": 8, "decoded_length": 32}.get(name, 64)
        value = nasty(chance, sample, len(content)) & ((1 << width) - 1)
        told.append(f"{name} = {value:#x}")
        changes: dict[str, Any] = {name: value}
        return replace(header, **changes)

    return _rewrite(content, sample, chance, lambda items: items, change) + " ".join(told)


def frame_operations(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Change operations of a frame: valid checksum, hostile content."""
    return _rewrite(
        content, sample, chance, lambda items: _hostile_items(items, content, sample, chance), _same
    )


def frame_header_operation(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Give the journal a header with a nasty field."""

    def change(items: Any) -> Any:
        for item in items:
            if item[0] == 3:
                data = bytearray(item[1])
                header_field(data, sample, chance)
                item[1] = bytes(data)
        return items

    return _rewrite(content, sample, chance, change, _same, first=True)


def frame_payload(content: bytearray, sample: Sample, chance: random.Random) -> str:
    """Give a frame a payload that is no list of operations at all, or unpacks without end."""
    return _rewrite(content, sample, chance, lambda items: _odd_payload(chance), _same)


def _same(header: FrameHeader, items: Any) -> FrameHeader:
    return header


def _odd_payload(chance: random.Random) -> Any:
    odd: list[Any] = [
        None,
        7,
        "text",
        b"",
        {},
        {1: 2},
        [[]],
        [7],
        [[1]],
        [[1, "x", b""]],
        [[True, 4096, b""]],
    ]
    odd += [[[3, b""]], [[3, bytes(5000)]], [[2, 1 << 63, 1 << 63]], [[2, -4096, 4096]], [[1, 1.5, b""]]]
    odd += [
        [[4]],
        [["kind"]],
        [msgpack.Timestamp(1, 2)],
        [msgpack.ExtType(5, b"x")],
        [[3, b"QFI\xfb" + bytes(200)]],
    ]
    odd += [
        bytes(1 << 20),
        b"\xdd\xff\xff\xff\xff",
        b"\xc1",
        b"",
        b"\x91" * 4000,
        b"\x91" * 4000 + b"\x90",
        [[3, "text"]],
    ]
    return chance.choice(odd)


def _hostile_items(items: Any, content: bytearray, sample: Sample, chance: random.Random) -> Any:
    """Move operations elsewhere, change their bytes, repeat or drop them."""
    for _ in range(chance.choice((1, 2))):
        if not items:
            break
        item = chance.choice(items)
        match chance.randrange(5):
            case 0 if item[0] in (1, 2):
                item[1] = nasty(chance, sample, len(content)) & ~(min(4096, sample.cluster_bytes) - 1)
            case 1 if item[0] == 2:
                item[2] = nasty(chance, sample, len(content))
            case 2 if item[0] == 1:
                data = bytearray(item[2])
                place = chance.choice((0, 8, chance.randrange(len(data) // 8) * 8))
                _put(data, place, nasty(chance, sample, len(content)), chance.choice((2, 8)))
                item[2] = bytes(data)
            case 3:
                items.append(list(item))
            case _:
                items.remove(item)
    return items


def _extent(content: bytearray) -> JournalRange | None:
    try:
        return unpack_root(bytes(content[:SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0"))[1]
    except jqcow.JqcowError:
        return None


def _rewrite(
    content: bytearray,
    sample: Sample,
    chance: random.Random,
    change_items: Callable[[Any], Any],
    change_header: Callable[[FrameHeader, Any], FrameHeader],
    *,
    first: bool = False,
) -> str:
    """Lay the live epoch anew, with one frame's operations or header changed, all checksums right."""
    extent = _extent(content)
    if extent is None:
        return "nothing "
    try:
        geometry = Header.unpack(bytes(content[:SECTOR_BYTES])).geometry
        scan = scans.scan(SparseDevice(bytes(content)), extent, geometry)
    except jqcow.JqcowError:
        return "nothing "
    chosen = 0 if first else chance.randrange(len(scan.frames))
    position = extent.half_offset(scan.epoch)
    for index, frame in enumerate(scan.frames):
        raw = frame.raw
        if index == chosen:
            items = change_items([_as_item(operation) for operation in frame.operations])
            raw = _frame(change_header(frame.header, items), items, chance)
        if position + len(raw) <= extent.half_offset(scan.epoch) + extent.half_bytes:
            content[position : position + len(raw)] = raw
        position += len(raw)
    return f"frame {chosen} of {len(scan.frames)} "


def _as_item(operation: Operation) -> list[Any]:
    if isinstance(operation, BlockOperation):
        return [1, operation.offset, operation.data]
    if isinstance(operation, ZeroOperation):
        return [2, operation.offset, operation.length]
    return [3, operation.data]


def _frame(header: FrameHeader, items: Any, chance: random.Random) -> bytes:
    plain = items if isinstance(items, bytes) else msgpack.packb(items, use_bin_type=True)
    packed, encoding = plain, ENCODING_PLAIN
    if chance.random() < 0.5 or len(plain) > 20_000:
        named = chance.random() < 0.8
        packed = zstandard.ZstdCompressor(level=1, write_content_size=named).compress(plain)
        encoding = ENCODING_ZSTD
    # A changed field stays changed: only what still fits the old payload is brought up to date.
    length_was_right = header.decoded_length < 1 << 20
    return replace(
        header,
        encoding=encoding if header.encoding <= 1 else header.encoding,
        payload_length=len(packed),
        decoded_length=len(plain) if length_was_right else header.decoded_length,
    ).pack(packed)


CLEAN_ATTACKS = (
    truncate,
    flip_bytes,
    header_field,
    header_field,
    extension,
    table_entry,
    table_entry,
    same_cluster_twice,
    snapshot_entry,
    snapshot_entry,
    snapshot_mapping,
    compressed_descriptor,
    compressed_stream,
)
ATTACKS = (
    truncate,
    flip_bytes,
    header_field,
    extension,
    table_entry,
    same_cluster_twice,
    snapshot_entry,
    snapshot_mapping,
    compressed_descriptor,
    compressed_stream,
    root_journal,
    root_journal,
    frame_bytes,
    frame_fields,
    frame_operations,
    frame_operations,
    frame_operations,
    frame_header_operation,
    frame_header_operation,
    frame_payload,
)
