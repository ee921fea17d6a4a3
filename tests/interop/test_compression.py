"""Compressed clusters and QEMU: each reads what the other writes, and they agree on what is no cluster."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from jqcow.errors import FormatError
from jqcow.offline.convert import convert
from jqcow.ondisk.compression import (
    COMPRESSION_TYPES,
    COMPRESSION_ZLIB,
    COMPRESSION_ZSTD,
    CompressionType,
    decompress,
)
from tests.support.compressed import compressible, mixed_disk, padded, plant, streams_of
from tests.support.qemu import check_clean, compare, done, run
from tests.unit.test_ondisk_compression import BAD_DEFLATE, BAD_FRAMES, CONTENT, GOOD_FRAMES, deflated, frame

MIB = 1 << 20
BITS = 14
CLUSTER_BYTES = 1 << BITS
BOTH = pytest.mark.parametrize("kind", ["zlib", "zstd"])


def readable(image: Path, count: int, bits: int) -> set[int]:
    """Return which of the first clusters QEMU can read."""
    words = [word for index in range(count) for word in ("-c", f"read {index << bits} {1 << bits}")]
    output = run("qemu-io", "-r", "-f", "qcow2", *words, image).stdout
    found = re.findall(r"^read (\d+)/\1 bytes at offset (\d+)$", output, re.MULTILINE)
    assert len(found) + output.count("read failed: Input/output error") == count, output
    return {int(offset) >> bits for _, offset in found}


def agree(folder: Path, streams: list[bytes], bits: int, kind: int) -> int:
    """Hold the codec to QEMU, stream by stream; return how many both could read."""
    image, raw = folder / "planted.qcow2", folder / "expected.raw"
    plant(image, streams, bits, kind)
    by_qemu = readable(image, len(streams), bits)
    contents = {}
    for index, stream in enumerate(streams):
        try:
            contents[index] = decompress(padded(stream), 1 << bits, kind)
        except FormatError as error:
            # QEMU allows windows up to 128 MiB.
            assert index not in by_qemu or "window" in str(error), f"stream {index}: {error}"
    assert contents.keys() <= by_qemu
    plant(image, [streams[index] for index in contents], bits, kind)
    raw.write_bytes(b"".join(contents.values()))
    compare(image, raw)
    return len(contents)


def damaged(stream: bytes, chance: random.Random) -> bytes:
    """Return a stream with a bit flipped, cut, or as it was."""
    changed = bytearray(stream)
    match chance.randrange(4):
        case 0:
            del changed[chance.randrange(1, len(changed)) :]
        case 1:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        case 2:
            changed[chance.randrange(12)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def test_damaged_deflate_is_judged_as_by_qemu(tmp_path: Path) -> None:
    chance = random.Random(1)
    streams = []
    for seed in range(150):
        content = compressible(CLUSTER_BYTES + chance.choice((-1, 0, 0, 5000)), seed)
        streams.append(damaged(deflated(content, chance.choice((9, 12, 15))), chance))
    streams += [chance.randbytes(length) for length in range(1, 600, 20)]
    assert 30 < agree(tmp_path, streams, BITS, COMPRESSION_ZLIB) < 150


def test_damaged_zstd_is_judged_as_by_qemu(tmp_path: Path) -> None:
    """With checksums: without one, releases of the library differ in what they make of damaged bytes."""
    chance = random.Random(2)
    streams = []
    for seed in range(150):
        content = compressible(CLUSTER_BYTES + chance.choice((-1, 0, 0, 0, 1)), seed)
        cut = chance.choice((0, 0, chance.randrange(CLUSTER_BYTES)))
        parts = (content[:cut], content[cut:])
        frames = (frame(part, size=chance.random() < 0.5, checksum=True) for part in parts)
        streams.append(damaged(b"".join(frames), chance))
    streams += [chance.randbytes(length) for length in range(1, 600, 20)]
    assert 15 < agree(tmp_path, streams, BITS, COMPRESSION_ZSTD) < 150


def test_all_arrangements_of_frames_are_read_by_qemu(tmp_path: Path) -> None:
    assert agree(tmp_path, list(GOOD_FRAMES.values()), 16, COMPRESSION_ZSTD) == len(GOOD_FRAMES)


def test_what_is_no_cluster_is_refused_by_qemu_too(tmp_path: Path) -> None:
    streams = [stream for stream, _ in BAD_FRAMES.values() if 0 < len(stream) <= 65536]
    assert len(streams) > len(BAD_FRAMES) - 4
    assert agree(tmp_path, [*streams, GOOD_FRAMES["two"]], 16, COMPRESSION_ZSTD) == 1
    # The zeros behind a stream that was cut may decode to what it lacks.
    streams = [stream for name, (stream, _) in BAD_DEFLATE.items() if stream and name != "cut"]
    assert agree(tmp_path, [*streams, deflated(CONTENT)], 16, COMPRESSION_ZLIB) == 1


def test_deflate_with_a_larger_window_is_read_by_qemu(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(30_000) * 3
    streams = [deflated(content[:65536], window_bits=15), deflated(content, window_bits=15)]
    assert agree(tmp_path, streams, 16, COMPRESSION_ZLIB) == 2


@BOTH
@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536, 2 * MIB])
def test_streams_of_qemu_are_read(tmp_path: Path, kind: CompressionType, cluster_size: int) -> None:
    raw, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
    disk = mixed_disk(MIB if cluster_size < 4096 else 5 * MIB, seed=cluster_size)
    raw.write_bytes(disk)
    options = f"cluster_size={cluster_size},compression_type={kind}"
    done("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    file = image.read_bytes()
    file += bytes(-len(file) % cluster_size)
    count = 0
    for guest, host, length in streams_of(file):
        found = decompress(memoryview(file)[host : host + length], cluster_size, COMPRESSION_TYPES[kind])
        assert found == disk[guest : guest + cluster_size].ljust(cluster_size, b"\0")
        count += 1
    assert count > len(disk) // cluster_size // 4


@BOTH
@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("seed", [1, 2])
def test_compressed_images_are_read_by_qemu(
    tmp_path: Path, kind: CompressionType, cluster_size: int, seed: int
) -> None:
    raw, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(mixed_disk(5 * MIB + 1536, seed))
    report = convert(
        raw, image, source_format="raw", cluster_size=cluster_size, compressed=True, compression_type=kind
    )
    check_clean(image)
    compare(image, raw)
    streams = list(streams_of(image.read_bytes()))
    # A cluster of one sector cannot take less.
    assert bool(streams) == (cluster_size > 512)
    size = report.virtual_size
    assert report.compressed_bytes == sum(min(cluster_size, size - guest) for guest, *_ in streams)
    assert report.packed_bytes == sum(length for *_, length in streams)
    about = json.loads(done("qemu-img", "info", "--output=json", image))
    assert about["format-specific"]["data"]["compression-type"] == kind


@BOTH
def test_qemu_writes_into_a_compressed_image(tmp_path: Path, kind: CompressionType) -> None:
    """Its refcounts let QEMU free and share: overwriting, and compressing more into the same file."""
    raw, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
    disk = bytearray(mixed_disk(3 * MIB, seed=5))
    raw.write_bytes(disk)
    convert(raw, image, cluster_size=4096, compressed=True, compression_type=kind)
    chance = random.Random(1)
    words = []
    for _ in range(60):
        offset, byte = chance.randrange(3 * MIB >> 12) << 12, chance.randrange(1, 256)
        # QEMU compresses into unallocated clusters only.
        option = "" if any(disk[offset : offset + 4096]) else "-c "
        words += ["-c", f"write {option}-P {byte} {offset} 4096"]
        disk[offset : offset + 4096] = bytes([byte]) * 4096
    output = done("qemu-io", "-f", "qcow2", *words, image)
    assert output.count("wrote 4096/4096") == 60
    assert any("-c -P" in word for word in words)
    raw.write_bytes(disk)
    check_clean(image)
    compare(image, raw)


def test_the_streams_are_as_small_as_those_of_qemu(tmp_path: Path) -> None:
    """With sectors for granularity a cluster may take one more; QEMU packs to the byte."""
    raw = tmp_path / "a.raw"
    raw.write_bytes(compressible(8 * MIB, seed=9))
    for kind in COMPRESSION_TYPES:
        options = f"compression_type={kind}"
        done("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, tmp_path / "q")
        # Without a level ISA-L may serve, for speed.
        level = 6 if kind == "zlib" else None
        form: dict[str, Any] = {"compression_type": kind, "compression_level": level}
        convert(raw, tmp_path / "j", compressed=True, overwrite=True, **form)
        ours, theirs = (
            sum(length for *_, length in streams_of((tmp_path / name).read_bytes())) for name in "jq"
        )
        assert ours < theirs * 1.02
