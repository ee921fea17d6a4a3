"""Does every cluster survive its stream, and does every other stream give a FormatError in little memory?"""

from __future__ import annotations

import random
import struct
import threading
import tracemalloc
import zlib

import pytest
import zstandard

from jqcow.errors import FormatError, UnsupportedFeatureError
from jqcow.ondisk import compression
from jqcow.ondisk.compression import COMPRESSION_ZLIB, COMPRESSION_ZSTD, compress, decompress
from tests.support.compressed import compressible, padded

CLUSTER_BYTES = 65536
BOTH = pytest.mark.parametrize("kind", [COMPRESSION_ZLIB, COMPRESSION_ZSTD], ids=["zlib", "zstd"])
CONTENT = compressible(CLUSTER_BYTES, seed=1)
HALF = CLUSTER_BYTES // 2


def frame(data: bytes, *, size: bool = False, checksum: bool = False) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=size, write_checksum=checksum).compress(data)


def streamed(data: bytes, window_bits: int) -> bytes:
    """Return a frame whose header asks for a window of this size, whatever the size of its content."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=window_bits, write_content_size=False
    )
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


def skippable(length: int, kind: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + kind, length) + b"?" * length


def deflated(data: bytes, window_bits: int = 12) -> bytes:
    stream = zlib.compressobj(6, zlib.DEFLATED, -window_bits)
    return stream.compress(data) + stream.flush()


@BOTH
@pytest.mark.parametrize("bits", range(9, 22))
def test_every_cluster_size_comes_back(kind: int, bits: int) -> None:
    for content in (compressible(1 << bits, seed=bits), bytes(1 << bits), b"ab" * (1 << bits >> 1)):
        stream = compress(content, kind)
        assert stream is not None
        assert len(stream) < len(content)
        assert decompress(stream, 1 << bits, kind) == content
        assert decompress(memoryview(stream + b"\xa5" * 700), 1 << bits, kind) == content


@BOTH
def test_every_level_comes_back(kind: int) -> None:
    lengths = []
    for level in (None, *compression.LEVELS[kind]):
        stream = compress(memoryview(CONTENT), kind, level)
        assert stream is not None
        assert decompress(stream, CLUSTER_BYTES, kind) == CONTENT
        lengths.append(len(stream))
    assert min(lengths) < lengths[1]


@BOTH
@pytest.mark.parametrize("level", [0, -1, 23, 100])
def test_other_levels_are_refused(kind: int, level: int) -> None:
    with pytest.raises(ValueError, match="compression level must be from 1 to"):
        compress(CONTENT, kind, level)


@BOTH
def test_noise_is_not_compressed(kind: int) -> None:
    assert compress(random.Random(1).randbytes(CLUSTER_BYTES), kind) is None
    assert compress(b"ab", kind) is None


def test_deflate_keeps_to_a_window_of_4_kib() -> None:
    """What repeats farther back is not found: other readers keep no more than that."""
    near, far = random.Random(1).randbytes(4000), random.Random(1).randbytes(5000)
    assert len(compress(near * 2, COMPRESSION_ZLIB) or b"") < 4400
    assert compress(far * 2, COMPRESSION_ZLIB) is None


def by_small_steps(stream: bytes) -> bytes:
    """Return what a deflate stream holds, read so that no distance beyond 4 KiB goes unseen."""
    reader = zlib.decompressobj(-compression.DEFLATE_WINDOW_BITS_WRITTEN)
    content = piece = reader.decompress(stream, 256)
    while piece:
        piece = reader.decompress(reader.unconsumed_tail, 256)
        content += piece
    return content


@pytest.mark.parametrize("is_there", [True, False], ids=["isal", "zlib"])
def test_deflate_by_isa_l_or_without_it(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    if not is_there:
        monkeypatch.setattr(compression, "_isal", lambda: None)
    assert (compression._isal() is not None) is is_there
    chance = random.Random(4)
    # Repeated at distances around 4096 bytes.
    repeated = [(chance.randbytes(period) * 20)[:CLUSTER_BYTES] for period in (4095, 4096, 4097, 5000)]
    for content in (*repeated, bytes(512), chance.randbytes(100) * 6, CONTENT):
        stream = compress(content, COMPRESSION_ZLIB)
        if stream is not None:
            assert by_small_steps(stream) == content
            assert decompress(padded(stream), len(content), COMPRESSION_ZLIB) == content
    # A level that is asked for is one of zlib's.
    levels = [compress(CONTENT, COMPRESSION_ZLIB, level) for level in (6, None)]
    assert (levels[0] == levels[1]) is not is_there


def test_a_larger_window_would_be_seen() -> None:
    stream = zlib.compressobj(6, zlib.DEFLATED, -15)
    data = random.Random(5).randbytes(5000) * 5
    with pytest.raises(zlib.error, match="too far back"):
        by_small_steps(stream.compress(data) + stream.flush())


def test_deflate_with_a_larger_window_is_read() -> None:
    content = random.Random(1).randbytes(HALF - 500)
    content = (content * 3)[:CLUSTER_BYTES]
    stream = deflated(content, window_bits=15)
    assert len(stream) < CLUSTER_BYTES * 3 // 4
    assert decompress(stream, CLUSTER_BYTES, COMPRESSION_ZLIB) == content


GOOD_FRAMES = {
    "size unknown": frame(CONTENT),
    "size and checksum": frame(CONTENT, size=True, checksum=True),
    "two": frame(CONTENT[:HALF]) + frame(CONTENT[HALF:]),
    "two of known size": frame(CONTENT[:HALF], size=True) + frame(CONTENT[HALF:], size=True),
    "one byte each": b"".join(frame(CONTENT[at : at + 1]) for at in range(300)) + frame(CONTENT[300:]),
    "empty before": frame(b"") + frame(CONTENT),
    "skippable before": skippable(3) + frame(CONTENT),
    "skippable between": frame(CONTENT[:HALF]) + skippable(0, 15) + frame(CONTENT[HALF:]),
    "skippable after": frame(CONTENT) + skippable(9),
    "more after": frame(CONTENT) + frame(b"not of this cluster"),
    "noise after": frame(CONTENT) + b"noise, not a frame",
    "window of 8 MiB": streamed(CONTENT, window_bits=23),
}


@pytest.mark.parametrize("stream", GOOD_FRAMES.values(), ids=GOOD_FRAMES.keys())
def test_frames_that_fill_a_cluster_are_read(stream: bytes) -> None:
    assert decompress(stream, CLUSTER_BYTES, COMPRESSION_ZSTD) == CONTENT
    assert decompress(padded(stream), CLUSTER_BYTES, COMPRESSION_ZSTD) == CONTENT


def with_dictionary() -> bytes:
    samples = [compressible(400, seed) for seed in range(200)]
    dictionary = zstandard.train_dictionary(4096, samples)
    return zstandard.ZstdCompressor(dict_data=dictionary).compress(CONTENT)


BAD_FRAMES = {
    "nothing": (b"", "ends early: 0 bytes"),
    "zeros": (bytes(512), "damaged"),
    "no magic": (frame(CONTENT)[4:], "damaged"),
    "one byte short": (frame(CONTENT[:-1]), "ends early: 65535 bytes"),
    "one byte short, padded": (frame(CONTENT[:-1]) + bytes(99), "damaged"),
    "one byte long": (frame(CONTENT + b"x"), "damaged"),
    "one byte long, size known": (frame(CONTENT + b"x", size=True), "exceeds"),
    "second too long": (frame(CONTENT[:HALF]) + frame(CONTENT), "exceeds"),
    "second too long, size known": (frame(CONTENT[:HALF]) + frame(CONTENT, size=True), "exceeds"),
    "cut": (frame(CONTENT)[:-1], "damaged"),
    "second cut": ((frame(CONTENT[:HALF]) + frame(CONTENT[HALF:]))[:-1], "ends early, inside"),
    "checksum cut": (frame(CONTENT, checksum=True)[:-4], "damaged"),
    "checksum wrong": (frame(CONTENT, checksum=True)[:-4] + b"0000", "damaged"),
    "skippable past the end": (skippable(9)[:-1], "ends early"),
    "skippable cut in its head": (skippable(9)[:6], "ends early"),
    "window of 16 MiB": (streamed(CONTENT, window_bits=24), "window of 16777216 bytes"),
    "window of 2 GiB": (streamed(b"", window_bits=10)[:5] + b"\xa8", "window"),
    "dictionary": (with_dictionary(), "dictionary"),
    "only skippable": (skippable(0) * 500_000, "more than 4096 Zstandard frames"),
    "only empty": (frame(b"") * 100_000, "more than 4096 Zstandard frames"),
    "bomb": (frame(bytes(1 << 28)), "damaged"),
    "bomb, size known": (frame(bytes(1 << 28), size=True), "exceeds"),
    "bomb in the second": (frame(b"x") + frame(bytes(1 << 28)), "exceeds"),
}


@pytest.mark.parametrize(("stream", "reason"), BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_other_frames_are_refused_in_little_memory(stream: bytes, reason: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=reason):
            decompress(stream, CLUSTER_BYTES, COMPRESSION_ZSTD)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_deflate_stream_may_go_on_behind_the_cluster() -> None:
    """As in QEMU, which has no more room to look."""
    for stream in (deflated(CONTENT + b"more"), deflated(CONTENT)[:-1], deflated(CONTENT + bytes(1 << 24))):
        assert decompress(stream, CLUSTER_BYTES, COMPRESSION_ZLIB) == CONTENT


BAD_DEFLATE = {
    "nothing": (b"", "ends early: 0 bytes"),
    "one byte short": (deflated(CONTENT[:-1]), "ends early: 65535 bytes"),
    "cut": (deflated(CONTENT)[:-100], "ends early"),
    "noise": (b"\xff" * 512, "damaged: .*invalid block type"),
    "with a head of zlib": (zlib.compress(CONTENT), "damaged|ends early"),
    "before its start": (b"\x03\x02\x00", "damaged: .*distance"),
}


@pytest.mark.parametrize(("stream", "reason"), BAD_DEFLATE.values(), ids=BAD_DEFLATE.keys())
def test_damaged_deflate_is_refused(stream: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        decompress(stream, CLUSTER_BYTES, COMPRESSION_ZLIB)


@BOTH
@pytest.mark.parametrize("seed", range(4))
def test_any_bytes_give_a_cluster_or_a_format_error(kind: int, seed: int) -> None:
    chance = random.Random(seed)
    good = [deflated(CONTENT)] if kind == COMPRESSION_ZLIB else [*GOOD_FRAMES.values()]
    refused = 0
    for _ in range(300):
        stream = bytearray(chance.choice(good))
        match chance.randrange(4):
            case 0:
                stream = bytearray(chance.randbytes(chance.randrange(2000)))
            case 1:
                del stream[chance.randrange(len(stream)) :]
            case 2:
                stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
            case _:
                stream[chance.randrange(20)] = chance.randrange(256)
        try:
            assert len(decompress(padded(bytes(stream)), CLUSTER_BYTES, kind)) == CLUSTER_BYTES
        except FormatError as error:
            refused += 1
            assert "cluster" in str(error)
    assert refused > 100


@pytest.mark.parametrize("kind", [2, 255])
def test_other_types_are_refused_by_name(kind: int) -> None:
    with pytest.raises(UnsupportedFeatureError, match=f"compression type {kind}"):
        decompress(b"", CLUSTER_BYTES, kind)
    with pytest.raises(UnsupportedFeatureError, match=f"compression type {kind}"):
        compress(CONTENT, kind)


def test_threads_have_contexts_of_their_own() -> None:
    failures: list[int] = []

    def work(seed: int) -> None:
        content = compressible(CLUSTER_BYTES, seed)
        for _ in range(100):
            stream = compress(content, COMPRESSION_ZSTD)
            if stream is None or decompress(stream, CLUSTER_BYTES, COMPRESSION_ZSTD) != content:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
