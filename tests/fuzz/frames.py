"""The target for the journal: frames whose salt and checksum are right, whatever they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import zstandard

from jqcow.engine.scan import Scan
from jqcow.ondisk.frame import ENCODING_PLAIN, ENCODING_ZSTD, FrameHeader, Operation, encode_operations
from tests.fuzz.bases import Base, Form, base_of
from tests.fuzz.drawn import Drawn
from tests.fuzz.exercise import Exercise
from tests.fuzz.hostile import HEADER_FIELDS

LIVE = (Form(9, live=True), Form(12, live=True), Form(12, live=True, snapshots=1), Form(9, 1, live=True))
FRAMES_MAX = 8
ITEMS_MAX = 12
CHANGES_MAX = 3
RAW_BYTES_MAX = 400
TWEAKED = (
    "epoch",
    "sequence",
    "checkpointed_epoch",
    "version",
    "encoding",
    "flags",
    "decoded_length",
    "salt",
)
WIDTHS = {"version": 2, "encoding": 1, "flags": 1, "decoded_length": 4}


def journal(data: bytes) -> None:
    """Frames of the live epoch, or of the next, as `laid_frames` reads them; then all ways to recover."""
    drawn = Drawn(data)
    base = base_of(LIVE[drawn.number(1) % len(LIVE)])
    exercised = Exercise(laid_frames(base, drawn))
    exercised.run()
    exercised.recover()


def laid_frames(base: Base, drawn: Drawn) -> bytes:
    """Return a live image whose journal has been written anew."""
    found = scan_of(base)
    content = bytearray(base.content)
    extent = found.extent
    place, epoch, sequence = extent.half_offset(found.epoch), found.epoch, found.frames[0].header.sequence
    for number in range(FRAMES_MAX):
        if number and drawn.is_spent:
            break
        how, tweak = drawn.number(1), drawn.number(1)
        if how & 0x40:
            epoch += 1
            place = extent.half_offset(epoch)
        payload = drawn_payload(base, drawn, how, opening=number == 0 or bool(how & 0x40))
        frame = framed(payload, FrameHeader(1, 0, 0, extent.salt, epoch, sequence, epoch - 1, 0, 0), how)
        if tweak & 1:
            frame = (tweaked(frame[0], tweak >> 1, drawn), frame[1])
        raw = frame[0].pack(frame[1])
        if place + len(raw) > extent.half_offset(epoch) + extent.half_bytes:
            break
        content[place : place + len(raw)] = raw
        place += len(raw)
        sequence += 1
    return bytes(content)


def scan_of(base: Base) -> Scan:
    """Return what the journal of a live base holds."""
    if base.view.scan is None:
        raise ValueError("the base is not live")
    return base.view.scan


def framed(payload: bytes, header: FrameHeader, how: int) -> tuple[FrameHeader, bytes]:
    """Return a payload as it is stored, and the header that tells the truth about it."""
    packed, encoding = payload, ENCODING_PLAIN
    if how & 8 or len(payload) > 20_000:
        packer = zstandard.ZstdCompressor(level=1, write_content_size=not how & 16)
        packed, encoding = packer.compress(payload), ENCODING_ZSTD
    told = replace(header, encoding=encoding, payload_length=len(packed), decoded_length=len(payload))
    return told, packed


def tweaked(header: FrameHeader, which: int, drawn: Drawn) -> FrameHeader:
    """Return a frame's header with a field that is another number, or a little more or less than it was."""
    name = TWEAKED[which % len(TWEAKED)]
    if name == "salt":
        return replace(header, salt=drawn.take(16).ljust(16, b"\0"))
    width = WIDTHS.get(name, 8)
    value = drawn.number(width) if which & 0x40 else getattr(header, name) + drawn.number(1) - 8
    changes: dict[str, Any] = {name: value & ((1 << 8 * width) - 1)}
    return replace(header, **changes)


def drawn_payload(base: Base, drawn: Drawn, how: int, *, opening: bool) -> bytes:
    """Return a payload: items that are mostly well formed, a writer's own frame, or any bytes."""
    match how & 7:
        case 7:
            return drawn.take(drawn.number(2) % RAW_BYTES_MAX)
        case 6:
            frames = scan_of(base).frames
            return plain(list(frames[drawn.number(1) % len(frames)].operations))
    items = [msgpack.packb([3, base.view.area.data], use_bin_type=True)] if opening and how & 7 != 5 else []
    items += drawn_items(base, drawn)
    count = drawn.number(4) if how & 0x80 else len(items)
    return msgpack.Packer().pack_array_header(count) + b"".join(items)


def plain(operations: list[Operation]) -> bytes:
    """Return operations as a payload that is not compressed."""
    encoded = encode_operations(operations)
    return zstandard.decompress(encoded.data) if encoded.encoding == ENCODING_ZSTD else encoded.data


def drawn_items(base: Base, drawn: Drawn) -> Iterator[bytes]:
    """Yield operations: of blocks with changed entries, of zeros, of headers; and bytes that may be none."""
    for _ in range(drawn.number(1) % ITEMS_MAX):
        kind = drawn.number(1)
        match kind & 7:
            case 0 | 1 | 2:
                yield block_item(base, drawn)
            case 3:
                unit = base.view.geometry.block_bytes
                yield msgpack.packb([2, place_of(base, drawn), drawn.number(1) * unit], use_bin_type=True)
            case 4:
                yield header_item(base, drawn)
            case 5:
                size = drawn.number(1) * (kind >> 3)
                yield msgpack.packb([kind >> 6, drawn.number(8), bytes(size)], use_bin_type=True)
            case _:
                yield drawn.take(drawn.number(1))


def place_of(base: Base, drawn: Drawn) -> int:
    """Return a host offset: of a table, of any cluster, or any at all."""
    which = drawn.number(1)
    match which & 3:
        case 0 | 1:
            return base.all_places[(which >> 2) % len(base.all_places)]
        case 2:
            return drawn.number(2) * base.view.geometry.block_bytes
    return drawn.number(8)


def block_item(base: Base, drawn: Drawn) -> bytes:
    """Return the block at a place, with some of its bytes changed."""
    unit, place = base.view.geometry.block_bytes, place_of(base, drawn)
    block = bytearray(unit)
    if place < len(base.content):
        block[:] = base.view.read(unit, place)
    for _ in range(drawn.number(1) % (CHANGES_MAX + 1)):
        where, how = drawn.number(2), drawn.number(1)
        value = drawn.number(8) if how & 1 else place_of(base, drawn) | (how & 6) << 61 | (how >> 3 & 1)
        at = where % (unit // 8) * 8
        width = 2 if how & 0x80 else 8
        block[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "big")
    return bytes(msgpack.packb([1, place, bytes(block)], use_bin_type=True))


def header_item(base: Base, drawn: Drawn) -> bytes:
    """Return the header with a field changed, and perhaps other bytes behind its fixed fields."""
    data = bytearray(base.view.area.data)
    names = sorted(HEADER_FIELDS)
    place, width = HEADER_FIELDS[names[drawn.number(1) % len(names)]]
    data[place : place + width] = drawn.take(width).ljust(width, b"\0")
    behind = drawn.take(drawn.number(1))
    data[112 : 112 + len(behind)] = behind
    return bytes(msgpack.packb([3, bytes(data)], use_bin_type=True))


def journal_seeds() -> list[bytes]:
    """A frame or a few of every kind, over each base."""
    seeds = []
    for number in range(len(LIVE)):
        for how in (6, 6 | 8, 0, 8, 24, 5, 7):
            # Its own frames, or three items: a block with a changed entry, zeros, a header.
            items = bytes([3, 0, 8, 1, 0, 1, 8, 0, 3, 0, 1, 4, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0])
            body = bytes([0]) if how & 7 == 6 else items
            frame = bytes([how, 0]) + body
            seeds.append(bytes([number]) + frame)
            seeds.append(bytes([number]) + frame + bytes([6, 0, 1]) + bytes([0x46, 0, 0]))
    return seeds
