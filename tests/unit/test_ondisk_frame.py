"""Journal frames: what is packed comes back, and nothing else passes for it."""

from __future__ import annotations

import contextlib
import tracemalloc
from dataclasses import replace
from random import Random

import msgpack
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from jqcow import _native
from jqcow.errors import CorruptionError, JqcowError, UnsupportedFeatureError
from jqcow.ondisk import frame as frame_module
from jqcow.ondisk.frame import (
    ENCODING_PLAIN,
    ENCODING_ZSTD,
    FRAME_HEADER_BYTES,
    BlockOperation,
    DoneOperation,
    EncodedPayload,
    FrameHeader,
    HeaderOperation,
    IntentOperation,
    Operation,
    ZeroOperation,
    crc_matches,
    decode_operations,
    decoded_length,
    encode_operations,
    frame_payload,
    reframe,
)
from jqcow.ondisk.layout import Geometry

SALT = bytes(range(16))
MANY = 200_000
LIMIT_BYTES = 4 << 20
SMALL = Geometry(9)
LARGE = Geometry(16)


def operations_of(geometry: Geometry) -> st.SearchStrategy[list[Operation]]:
    """Lists of operations that jqcow might write for an image of this geometry."""
    blocks_per_cluster = geometry.cluster_bytes // geometry.block_bytes
    cluster = st.integers(1, 1 << 34)
    block = st.integers(0, blocks_per_cluster - 1)
    place = st.builds(lambda c, b: c * geometry.cluster_bytes + b * geometry.block_bytes, cluster, block)
    # Repeated patterns compress, random bytes do not: both encodings occur.
    random_block = st.binary(min_size=geometry.block_bytes, max_size=geometry.block_bytes)
    even_block = st.integers(0, 255).map(lambda value: bytes([value]) * geometry.block_bytes)
    zero = st.builds(
        lambda c, blocks: ZeroOperation(c * geometry.cluster_bytes, blocks * geometry.block_bytes),
        cluster,
        st.integers(1, blocks_per_cluster),
    )
    header = st.builds(HeaderOperation, st.binary(max_size=4096))
    sectors = st.binary(min_size=512, max_size=512).map(lambda data: data * 2)
    intent = st.builds(
        lambda sequence, sector, data: IntentOperation(sequence, sector * 512, data),
        st.integers(1, 9),
        st.integers(0, 1 << 50),
        sectors,
    )
    promise = intent | st.builds(DoneOperation, st.integers(1, 8))
    blocks = st.lists(
        st.builds(BlockOperation, place, random_block | even_block) | zero | promise, max_size=4
    )
    return st.builds(lambda headers, others: headers + others, st.lists(header, max_size=1), blocks)


def take_apart(frame: bytes) -> tuple[FrameHeader, bytes]:
    header = FrameHeader.unpack(frame)
    assert header is not None
    return header, frame[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + header.payload_length]


def decode(header: FrameHeader, payload: bytes, geometry: Geometry = LARGE) -> tuple[Operation, ...]:
    return decode_operations(header, payload, geometry, LIMIT_BYTES, 0x10000, zeroed_limit_bytes=LIMIT_BYTES)


def header_of(encoding: int, payload: bytes, decoded_length: int) -> FrameHeader:
    frame = frame_payload(EncodedPayload(encoding, payload, decoded_length), SALT, 5, 9)
    return take_apart(frame)[0]


def decode_plain(plain: bytes, geometry: Geometry = LARGE) -> tuple[Operation, ...]:
    return decode(header_of(ENCODING_PLAIN, plain, len(plain)), plain, geometry)


@pytest.mark.parametrize("geometry", [SMALL, LARGE], ids=["512", "65536"])
@given(data=st.data())
def test_frames_round_trip(geometry: Geometry, data: st.DataObject) -> None:
    operations = data.draw(operations_of(geometry))
    epoch = data.draw(st.integers(1, (1 << 64) - 1))
    sequence = data.draw(st.integers(9, (1 << 64) - 1))
    payload = encode_operations(operations)
    frame = frame_payload(payload, SALT, epoch, sequence)
    assert len(frame) == payload.frame_length
    assert len(frame) % 4096 == 0
    assert crc_matches([frame])
    header, stored = take_apart(frame)
    header.check_supported()
    assert (header.salt, header.epoch, header.sequence) == (SALT, epoch, sequence)
    assert header.checkpointed_epoch == epoch - 1
    assert header.frame_length == len(frame)
    assert list(decode(header, stored, geometry)) == operations
    assert not any(frame[FRAME_HEADER_BYTES + header.payload_length :])


@pytest.mark.parametrize("is_noise", [False, True])
def test_a_record_of_all_tables_is_encoded_in_parts(is_noise: bool) -> None:
    """As one that is packed as a whole, without being in memory once more."""
    chance = Random(4)
    operations = [
        BlockOperation((256 + at) * 4096, bytearray(chance.randbytes(4096) if is_noise else bytes(4096)))
        for at in range(1000)
    ]
    length = len(msgpack.packb([[1, each.offset, each.data] for each in operations]))
    tracemalloc.start()
    try:
        payload = encode_operations(operations)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert payload.decoded_length == decoded_length(operations) == length
    assert payload.encoding == (ENCODING_PLAIN if is_noise else ENCODING_ZSTD)
    assert is_noise or peak_bytes < length // 2
    header = header_of(payload.encoding, payload.data, length)
    assert (
        list(decode_operations(header, payload.data, LARGE, 1 << 30, 0, zeroed_limit_bytes=0)) == operations
    )


def test_both_encodings_are_used() -> None:
    assert encode_operations([BlockOperation(1 << 16, bytes(4096))]).encoding == ENCODING_ZSTD
    assert encode_operations([ZeroOperation(1 << 16, 4096)]).encoding == ENCODING_PLAIN


@given(place=st.integers(0, 4095), flipped=st.integers(1, 255))
def test_every_byte_is_under_the_crc(place: int, flipped: int) -> None:
    frame = bytearray(frame_payload(encode_operations([ZeroOperation(1 << 16, 4096)]), SALT, 1, 1))
    frame[place] ^= flipped
    assert not crc_matches([frame])


@pytest.mark.parametrize("kept", range(0, 4608, 512))
def test_a_torn_frame_has_a_wrong_crc(kept: int) -> None:
    noise = b"".join(_native.crc32c(bytes([i % 256, i // 256])).to_bytes(4, "big") for i in range(1024))
    frame = frame_payload(encode_operations([BlockOperation(1 << 16, noise)]), SALT, 1, 1)
    # Behind that is only padding: a tear there loses nothing.
    assert len(frame.rstrip(b"\0")) > 4096
    assert not crc_matches([frame[:kept] + bytes(8192 - kept)])
    assert not crc_matches([bytes(kept + 512) + frame[kept + 512 :]])


def test_a_moved_frame_differs_in_salt_and_crc_only() -> None:
    frame = frame_payload(encode_operations([ZeroOperation(1 << 16, 4096)]), SALT, 3, 4)
    moved = reframe(frame, b"x" * 16)
    assert crc_matches([moved])
    assert moved == frame_payload(encode_operations([ZeroOperation(1 << 16, 4096)]), b"x" * 16, 3, 4)


@pytest.mark.parametrize(
    "data", [b"", b"jqcowFRM", bytes(64), b"jqcowFRX" + bytes(56), b"jqcowFRM" + bytes(55)]
)
def test_what_is_no_frame(data: bytes) -> None:
    assert FrameHeader.unpack(data) is None


@pytest.mark.parametrize("field", ["version", "encoding", "flags"])
def test_an_unknown_version_encoding_or_flag_is_refused_by_name(field: str) -> None:
    header = header_of(ENCODING_PLAIN, b"\x90", 1)
    header.check_supported()
    with pytest.raises(UnsupportedFeatureError, match=f"{field}s? "):
        replace(header, **{field: 2}).check_supported()  # type: ignore[arg-type]


class TestHostilePayloads:
    """The CRC of these frames is right, so someone meant them."""

    def test_a_zstd_bomb_is_not_decompressed(self) -> None:
        bomb = zstandard.compress(bytes(1 << 30))
        for claimed in (1 << 30, LIMIT_BYTES + 1):
            with pytest.raises(CorruptionError, match="exceeds the half"):
                decode(header_of(ENCODING_ZSTD, bomb, claimed), bomb)
        with pytest.raises(CorruptionError, match="content size"):
            decode(header_of(ENCODING_ZSTD, bomb, 4096), bomb)

    def test_a_zstd_frame_that_lies_about_its_content_size(self) -> None:
        bomb = bytearray(zstandard.compress(bytes(1 << 20)))
        parameters = zstandard.get_frame_parameters(bytes(bomb))
        assert parameters.content_size == 1 << 20
        place = bytes(bomb).index((1 << 20).to_bytes(4, "little"))
        bomb[place : place + 4] = (4096).to_bytes(4, "little")
        with pytest.raises(CorruptionError):
            decode(header_of(ENCODING_ZSTD, bytes(bomb), 4096), bytes(bomb))

    def test_a_zstd_frame_without_content_size(self) -> None:
        unsized = zstandard.ZstdCompressor(write_content_size=False).compress(b"\x90")
        with pytest.raises(CorruptionError, match="content size"):
            decode(header_of(ENCODING_ZSTD, unsized, 1), unsized)

    @pytest.mark.parametrize(
        "items",
        [b"\x90" * MANY, b"\x91" * MANY, b"\x93\x02\x90" + b"\x90" * MANY, b"\x92\x03\xc4\x00" * MANY,
         b"\x93\x02\xce\x00\x01\x00\x00\xcd\x10\x00" * MANY],
        ids=["empty arrays", "arrays in arrays", "an array for a number", "headers", "zeros"],
    )  # fmt: skip
    def test_a_small_frame_does_not_become_millions_of_objects(self, items: bytes) -> None:
        plain = b"\xdd" + MANY.to_bytes(4, "big") + items
        packed = zstandard.compress(plain)
        header = header_of(ENCODING_ZSTD, packed, len(plain))
        tracemalloc.start()
        try:
            with pytest.raises(CorruptionError):
                decode_operations(header, packed, LARGE, 1 << 30, 0x10000, zeroed_limit_bytes=1 << 20)
            assert tracemalloc.get_traced_memory()[1] < 3 * len(plain) + (1 << 20)
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("payload", [b"", b"\x28\xb5\x2f\xfd", b"no zstd at all", bytes(100)])
    def test_no_zstd(self, payload: bytes) -> None:
        with pytest.raises(CorruptionError):
            decode(header_of(ENCODING_ZSTD, payload, 10), payload)

    def test_a_wrong_decoded_length(self) -> None:
        with pytest.raises(CorruptionError, match="declared"):
            decode(header_of(ENCODING_PLAIN, b"\x90", 2), b"\x90")

    @pytest.mark.parametrize(
        "plain",
        [
            b"",
            b"\xc1",  # never used by MessagePack
            b"\x90\x90",  # two documents
            b"\x91",  # an array that ends too early
            b"\xdd\xff\xff\xff\xff",  # four billion elements
            b"\xc6\xff\xff\xff\xff",  # four gigabytes of bytes
            b"\x91" * 5000,  # nested too deeply
            b"\x91\xa1\xff",  # text that is not UTF-8
            b"\x81\x90\x90",  # a map with a list as key
            b"\xc7\x01\xff\x00",  # a timestamp of a wrong length
        ],
    )
    def test_wrong_message_pack(self, plain: bytes) -> None:
        with pytest.raises(CorruptionError):
            decode_plain(plain)

    @pytest.mark.parametrize(
        "items",
        [
            None,
            7,
            {"a": 1},
            [7],
            [[]],
            [None],
            ["block"],
            [[1]],
            [[1, 65536]],
            [[1, 65536, "text"]],
            [[1, 65536, bytes(4096), 0]],
            [[1, 65536, bytes(4095)]],
            [[1, 65536, bytes(8192)]],
            [[1, 65536 + 512, bytes(4096)]],
            [[1, -65536, bytes(4096)]],
            [[1, 0, bytes(4096)]],  # never the header cluster
            [[1, 32768, bytes(4096)]],
            [[1, 1 << 56, bytes(4096)]],
            [[2, 65536, 0]],
            [[2, 65536, -4096]],
            [[2, 65536, 512]],
            [[2, 65536 + 4096, 65536]],  # into the next cluster
            [[2, 65536, 131072]],
            [[2, 0, 4096]],
            [[2, 65536, 4096.0]],
            [[3, bytes(4097)]],
            [[3, "text"]],
            [[3]],
        ],
        ids=repr,
    )
    def test_operations_that_jqcow_never_writes(self, items: object) -> None:
        with pytest.raises(CorruptionError):
            decode_plain(msgpack.packb(items))

    @pytest.mark.parametrize("kind", [0, 6, 255, -1])
    def test_an_unknown_kind_is_refused_by_name(self, kind: int) -> None:
        with pytest.raises(UnsupportedFeatureError, match=f"kind {kind}"):
            decode_plain(msgpack.packb([[kind, 65536, b""]]))

    @pytest.mark.parametrize(
        "item",
        [
            [4, 0, 512, bytes(512)],
            [4, 10, 512, bytes(512)],
            [4, 9, 511, bytes(512)],
            [4, 9, -512, bytes(512)],
            [4, 9, 512, bytes(511)],
            [4, 9, 512, b""],
            [4, 9, 512, b"jqcowFRM" * 64],
            [4, 9, bytes(512)],
            [5, 9],
            [5, 0],
            [5, 1, 1],
        ],
    )
    def test_promises_that_no_writer_makes(self, item: list[object]) -> None:
        with pytest.raises(CorruptionError):
            decode_plain(msgpack.packb([item]))

    def test_an_intent_is_never_compressed(self) -> None:
        operations = [HeaderOperation(bytes(4096)), IntentOperation(9, 512, bytes(512))]
        payload = encode_operations(operations)
        assert payload.encoding == ENCODING_PLAIN
        assert decode_plain(payload.data) == tuple(operations)
        packed = zstandard.ZstdCompressor().compress(payload.data)
        with pytest.raises(CorruptionError):
            decode(header_of(ENCODING_ZSTD, packed, payload.decoded_length), packed)

    def test_one_bad_operation_spoils_the_frame(self) -> None:
        with pytest.raises(CorruptionError):
            decode_plain(msgpack.packb([[2, 65536, 4096], [2, 65536, 1]]))

    @given(st.binary(max_size=200))
    def test_any_bytes_give_only_errors_of_jqcow(self, payload: bytes) -> None:
        for encoding in (ENCODING_PLAIN, ENCODING_ZSTD):
            with contextlib.suppress(JqcowError):
                decode(header_of(encoding, payload, len(payload)), payload, SMALL)

    def test_the_offset_of_the_frame_is_in_the_error(self) -> None:
        with pytest.raises(CorruptionError) as caught:
            decode_plain(b"\xc1")
        assert caught.value.offset == 0x10000
        assert caught.value.structure == "journal frame"


def test_the_crc_is_that_of_the_frame_with_its_field_zero() -> None:
    frame = bytearray(frame_payload(encode_operations([]), SALT, 1, 1))
    place = slice(frame_module.CRC_OFFSET, frame_module.CRC_OFFSET + 4)
    stored = int.from_bytes(frame[place], "big")
    frame[place] = bytes(4)
    assert _native.crc32c(frame) == stored
