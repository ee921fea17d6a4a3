"""Compressed clusters as other programs see them: streams found in an image, and images of given streams."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

from jqcow.device.file import FileDevice
from jqcow.offline.build import ImageBuilder

SECTOR_BYTES = 512
OFFSETS = (1 << 56) - 512
COMPRESSED = 1 << 62


def streams_of(image: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (guest offset, host offset, bytes to the end of the last sector) of each compressed cluster."""
    (cluster_bits,) = struct.unpack_from(">I", image, 20)
    l1_size, l1_offset = struct.unpack_from(">IQ", image, 36)
    l2_size = (1 << cluster_bits) // 8
    width = 62 - (cluster_bits - 8)
    for index, l1_entry in enumerate(struct.unpack_from(f">{l1_size}Q", image, l1_offset)):
        l2_offset = l1_entry & OFFSETS
        entries = struct.unpack_from(f">{l2_size}Q", image, l2_offset) if l2_offset else ()
        for within, entry in enumerate(entries):
            if entry & COMPRESSED:
                host = entry & ((1 << width) - 1)
                sectors = ((entry & (COMPRESSED - 1)) >> width) + 1
                length = sectors * SECTOR_BYTES - host % SECTOR_BYTES
                yield (index * l2_size + within) << cluster_bits, host, length


def plant(path: Path, streams: list[bytes], cluster_bits: int, compression_type: int) -> None:
    """Make an image whose clusters are these streams, whatever they are."""
    device = FileDevice.create_temporary(path)
    try:
        builder = ImageBuilder(device, len(streams) << cluster_bits, cluster_bits, compression_type)
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
