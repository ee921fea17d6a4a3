"""Compressed clusters as other programs see them: streams found in an image, and images of given streams."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from jqcow.device.file import FileDevice
from jqcow.offline.build import ImageBuilder
from jqcow.ondisk.entries import OFFSET_MASK
from jqcow.ondisk.form import Form
from jqcow.ondisk.l2 import COMPRESSED
from tests.support.patients import Tables

SECTOR_BYTES = 512


def streams_of(image: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (guest offset, host offset, bytes to the end of the last sector) of each compressed cluster."""
    tables = Tables(image)
    bits = tables.header.cluster_bits
    per_table, width = (1 << bits) // 8, 62 - (bits - 8)
    for number in range(tables.header.l1_size * per_table):
        index, within = divmod(number, per_table)
        l2 = tables.entry(tables.l1 + 8 * index) & OFFSET_MASK
        entry = tables.entry(l2 + 8 * within) if l2 else 0
        if entry & COMPRESSED:
            host = entry & ((1 << width) - 1)
            sectors = ((entry & (COMPRESSED - 1)) >> width) + 1
            yield number << bits, host, sectors * SECTOR_BYTES - host % SECTOR_BYTES


def plant(path: Path, streams: list[bytes], cluster_bits: int, compression_type: int) -> None:
    """Make an image whose clusters are these streams, whatever they are."""
    device = FileDevice.create_temporary(path)
    try:
        builder = ImageBuilder(
            device, len(streams) << cluster_bits, Form(cluster_bits, compression_type=compression_type)
        )
        for index, stream in enumerate(streams):
            builder.write_compressed(stream, index << cluster_bits)
        builder.finish()
        device.publish(overwrite=True)
    finally:
        device.close()


def padded(stream: bytes) -> bytes:
    """Return a stream as a reader gets it: to the end of its last sector."""
    return stream.ljust(-(-len(stream) // SECTOR_BYTES) * SECTOR_BYTES, b"\0")


def compressible(length: int, seed: int) -> bytes:
    """Return bytes that shrink to about a third: words of a small vocabulary."""
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randrange(2, 9)) for _ in range(200)]
    return b"".join(chance.choices(words, k=length // 2 + 1))[:length]


def mixed_disk(length: int, seed: int) -> bytes:
    """Return a disk of stretches that shrink well, shrink not at all, or are zero; its end shrinks."""
    chance = random.Random(seed)
    disk = bytearray()
    while len(disk) < length:
        step = chance.choice((512, 4096, 70_000, 200_000))
        kinds = (compressible(step, chance.randrange(1 << 30)), chance.randbytes(step), bytes(step))
        disk += chance.choices(kinds, weights=(3, 1, 1))[0]
    disk[length - 512 : length] = b"the end." * 64
    return bytes(disk[:length])
