"""Targets of the guided fuzzer, each for one part of an image file.

An input is bytes; the first say which good image it goes over. What a checksum covers is sealed here, so that
the fuzzer gets past it. docs/damage.md lists the targets.
"""

from __future__ import annotations

import atexit
import io
import os
import tempfile
import zlib
from functools import cache, partial
from pathlib import Path

import zstandard

from jqcow.offline.info import check_file, read_info, read_snapshots
from jqcow.ondisk.compression import COMPRESSION_ZSTD, ZSTD_WINDOW_BYTES_MAX
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.l2 import COMPRESSED, ZERO
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.root import ROOT_COPY_BYTES, ROOT_COPY_OFFSET, pack_root_copy
from tests.fuzz.bases import Base, Form, base_of
from tests.fuzz.drawn import Drawn, patches
from tests.fuzz.exercise import Exercise, exercise, tolerated

PATCHES_MAX = 40
FLAGS = (0, COPIED, COMPRESSED, ZERO)

# Header and extensions

HEADERS = (Form(9), Form(12), Form(13, compression_type=1), Form(9, refcount_order=0), Form(12, snapshots=2))


def header(data: bytes) -> None:
    """The bytes are the first of the file; also given to what describes images that jqcow refuses."""
    base = base_of(HEADERS[data[0] % len(HEADERS)]) if data else base_of(HEADERS[0])
    laid = data[1 : base.cluster_bytes + 1]
    content = laid + base.content[len(laid) :]
    describe(content)
    exercise(content)


def header_seeds() -> list[bytes]:
    """The first bytes of each base, and extensions of every kind behind one."""
    kinds = (0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0x6A71C057)
    extensions = b"".join(kind.to_bytes(4, "big") + b"\0\0\0\x18" + b"raw".ljust(24, b"\0") for kind in kinds)
    seeds = [bytes([number]) + base_of(form).content[:200] for number, form in enumerate(HEADERS)]
    return [*seeds, seeds[0][:113] + extensions]


@cache
def scratch() -> Path:
    """Return a file for what takes paths; of this process alone."""
    folder = tempfile.TemporaryDirectory(prefix="jqcow-fuzz-")
    atexit.register(folder.cleanup)
    return Path(folder.name, "image.qcow2")


def describe(content: bytes) -> None:
    """Say of a file what the commands that only look say of it."""
    path = scratch()
    path.write_bytes(content)
    for look in (read_info, read_snapshots, check_file):
        tolerated(partial(look, os.fspath(path)))


# Tables

TABLES = tuple(
    Form(bits, order, snapshots=0 if order == 0 else snapshots, disk_clusters=disk_clusters)
    for bits, order, snapshots, disk_clusters in (
        (9, 4, 0, 200), (9, 4, 2, 200), (9, 0, 0, 200), (9, 1, 1, 90), (9, 6, 1, 200),
        (12, 4, 1, 600), (16, 4, 0, 30),
    )
)  # fmt: skip


def tables(data: bytes) -> None:
    """Patches of entries of tables and of header fields; see `patched`."""
    base = base_of(TABLES[data[0] % len(TABLES)]) if data else base_of(TABLES[0])
    exercise(patched(base, data[1:]))


def patched(base: Base, data: bytes) -> bytes:
    """Return a base with patches: 12 bytes each, which say where, and what an entry there becomes.

    An entry may become any number, a cluster of the file with flags, or what another place holds.
    """
    content = bytearray(base.content)
    places = base.all_places
    for which, where, how, what in patches(data, PATCHES_MAX):
        place = places[which % len(places)] + where % max(1, base.cluster_bytes // 8) * 8
        width = 8
        match how & 7:
            case 0 | 1 | 2:
                value = what % (len(content) // base.cluster_bytes + 2) * base.cluster_bytes
            case 3:
                value = places[what % len(places)]
            case 4:
                value, width = what & 0xFFFF, 2
            case 5:
                value, width = what & 0xFF, 1
            case _:
                value = what
        if width == 8 and how & 7 < 4:
            value |= FLAGS[how >> 3 & 3] | FLAGS[how >> 5 & 3]
        if width < 8:
            place += (how >> 3) % 8
        if place + width <= len(content):
            content[place : place + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")
    return bytes(content)


def tables_seeds() -> list[bytes]:
    """A patch of each kind, over each base."""
    some = b"".join(bytes([kind, 0, kind, kind << 3 | kind]) + bytes(7) + bytes([kind]) for kind in range(8))
    return [bytes([number]) + some[: 12 * number] for number in range(len(TABLES))]


# Snapshot table

SNAPSHOTS = (Form(9, snapshots=6), Form(12, snapshots=3), Form(9, refcount_order=3, snapshots=4))


def snapshots(data: bytes) -> None:
    """How many there are, and the bytes of their table; then they are used."""
    drawn = Drawn(data)
    base = base_of(SNAPSHOTS[drawn.number(1) % len(SNAPSHOTS)])
    count, choice = drawn.number(2), drawn.number(1)
    table = base.header.snapshots_offset
    laid = drawn.take(3 * base.cluster_bytes)
    content = bytearray(base.content)
    content[60:64] = count.to_bytes(4, "big")
    content[table : table + len(laid)] = laid
    exercise(bytes(content))
    use_snapshots(bytes(content), choice)


def use_snapshots(content: bytes, choice: int) -> None:
    """Apply, delete and make snapshots; what was sound stays so."""
    exercised = Exercise(content)
    seen = exercised.look()
    image = exercised.open("r+")
    if image is None:
        return
    for step in range(3):
        names = tolerated(lambda: [taken.id for taken in image.snapshots()]) or ["none"]
        name = names[(choice >> 2 * step) % len(names)]
        apply = choice >> step & 1
        tolerated(partial(image.apply_snapshot if apply else image.delete_snapshot, name))
        if not image.closed:
            tolerated(partial(image.pwrite, b"after"[: image.size], min(600 * step, max(0, image.size - 5))))
    tolerated(image.close)
    again = exercised.look()
    if seen is not None and seen.sound:
        assert again is not None and again.sound, "a sound image has errors after its snapshots were used"


def snapshots_seeds() -> list[bytes]:
    """The tables as they are."""
    seeds = []
    for number, form in enumerate(SNAPSHOTS):
        base = base_of(form)
        table = base.header.snapshots_offset
        laid = base.content[table : table + 300 * form.snapshots]
        seeds.append(bytes([number, 0, form.snapshots, 27 * number]) + laid)
    return seeds


# Compressed clusters

COMPRESSED_FORMS = tuple(Form(bits, compression_type=kind) for bits in (9, 12, 16) for kind in (0, 1))


def compressed(data: bytes) -> None:
    """Where a stream starts, how many sectors it has, and its bytes; read, and written over in part."""
    drawn = Drawn(data)
    form = COMPRESSED_FORMS[drawn.number(1) % len(COMPRESSED_FORMS)]
    base = base_of(form)
    start, sectors = drawn.number(2), drawn.number(1)
    content, stream = with_stream(base, start, sectors, drawn.take(3 * base.cluster_bytes))
    exercised = Exercise(content)
    image = exercised.open("r")
    if image is None:
        return
    with image:
        offset = 10 * base.cluster_bytes
        read = tolerated(partial(image.pread, base.cluster_bytes, offset))
        tolerated(partial(image.pread, 4 * base.cluster_bytes, offset))
    if read is not None:
        assert read == decoded(stream, base), "a compressed cluster reads as something else than its stream"
    image = exercised.open("r+")
    if image is not None:
        for at in range(4):
            tolerated(partial(image.pwrite, b"over", offset + at * base.cluster_bytes + 100))
        tolerated(partial(image.pwrite_compressed, bytes(base.cluster_bytes), offset))
        tolerated(image.close)


def with_stream(base: Base, start: int, sectors: int, stream: bytes) -> tuple[bytes, bytes]:
    """Lay a stream over that of the first compressed cluster; return the file, and all that it may reach."""
    content = bytearray(base.content)
    entry = base.places["L2 table"][0] + 10 * 8
    width = 62 - (base.form.cluster_bits - 8)
    before = int.from_bytes(content[entry : entry + 8], "big") & (COMPRESSED - 1)
    host = (before & ((1 << width) - 1)) + start % SECTOR_BYTES
    sectors = sectors % (1 << 62 - width) if sectors else before >> width
    content[entry : entry + 8] = (COMPRESSED | sectors << width | host).to_bytes(8, "big")
    content[host : host + len(stream)] = stream
    end = (host // SECTOR_BYTES + 1 + sectors) * SECTOR_BYTES
    return bytes(content), bytes(content[host:end]).ljust(end - host, b"\0")


def decoded(stream: bytes, base: Base) -> bytes:
    """Return what the first cluster of a stream holds, as another reader of the same libraries has it."""
    if base.form.compression_type == COMPRESSION_ZSTD:
        reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX).stream_reader(
            io.BytesIO(stream), read_across_frames=True
        )
        return reader.read(base.cluster_bytes)
    return zlib.decompressobj(-15).decompress(stream, base.cluster_bytes)


def compressed_seeds() -> list[bytes]:
    """Good streams: one frame, several, a skippable one among them, one without the size of its content."""
    seeds = []
    for number, form in enumerate(COMPRESSED_FORMS):
        cluster = 1 << form.cluster_bits
        content = b"some guest data, again and again" * (cluster // 32)
        head = bytes([number, 0, 0, 0])
        if form.compression_type == COMPRESSION_ZSTD:
            one = zstandard.ZstdCompressor()
            unsized = zstandard.ZstdCompressor(write_content_size=False, write_checksum=True)
            half = one.compress(content[: cluster // 2])
            skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
            seeds += [
                head + one.compress(content),
                head + half + skipped + half,
                head + unsized.compress(content),
            ]
        else:
            packer = zlib.compressobj(9, zlib.DEFLATED, -12)
            seeds.append(head + packer.compress(content) + packer.flush())
    return seeds


# Roots

ROOTS = (Form(13, live=True), Form(13, live=True, snapshots=1), Form(12, live=True))


def roots(data: bytes) -> None:
    """Bytes over sector 0 and over the root in its copy, whose CRC is made right; then recovery."""
    drawn = Drawn(data)
    base = base_of(ROOTS[drawn.number(1) % len(ROOTS)])
    how, sector_bytes = drawn.number(1), drawn.number(2) % (SECTOR_BYTES + 1)
    good = base.content[:SECTOR_BYTES]
    laid = drawn.take(sector_bytes)
    sector = laid + good[len(laid) :]
    if how & 1:
        sector = bytes(4) + sector[4:]
    elif how & 2:
        # Clean: the header as the journal has it, over tables that may be older.
        sector = base.header.pack().ljust(SECTOR_BYTES, b"\0")
    content = bytearray(sector + base.content[SECTOR_BYTES:])
    rest = drawn.take(SECTOR_BYTES)
    copy = pack_root_copy(rest + good[len(rest) :])
    match how >> 2 & 3:
        case 0:
            copy = bytes(ROOT_COPY_BYTES)
        case 1:
            copy = rest.ljust(ROOT_COPY_BYTES, b"\0")
    if base.cluster_bytes > ROOT_COPY_OFFSET:
        content[ROOT_COPY_OFFSET : ROOT_COPY_OFFSET + ROOT_COPY_BYTES] = copy
    exercised = Exercise(bytes(content))
    exercised.run()
    exercised.recover()


def roots_seeds() -> list[bytes]:
    """Each way to lose a root, over each base; one with the whole root spelt out."""
    seeds = [bytes([number, how]) for number in range(len(ROOTS)) for how in (0, 1, 2, 4, 8, 9, 10, 5)]
    for number, form in enumerate(ROOTS):
        good = base_of(form).content[:260]
        seeds += [bytes([number, 0, 1, 4]) + good, bytes([number, 9, 1, 4]) + good + good]
    return seeds
