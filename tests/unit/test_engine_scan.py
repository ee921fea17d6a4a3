"""Replay: what the operations of a journal leave. What the scan finds is tested with the journal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jqcow.engine.scan import replay
from jqcow.errors import CorruptionError, FormatError
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.frame import (
    BlockOperation,
    DoneOperation,
    HeaderOperation,
    IntentOperation,
    Operation,
    ZeroOperation,
)
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import Geometry

GEOMETRY = Geometry(16)
AREA = HeaderArea.parse(blank_image(1 << 20, Form(16)).parts[0][1])
HEADER = HeaderOperation(AREA.data)


def block(letter: bytes) -> bytes:
    return letter * GEOMETRY.block_bytes


def test_the_newest_block_and_the_newest_header_win() -> None:
    grown = AREA.with_header(replace(AREA.header, size=2 << 20))
    operations: list[Operation] = [
        HEADER,
        BlockOperation(65536, block(b"a")),
        BlockOperation(65536, block(b"b")),
        HeaderOperation(grown.data),
    ]
    replayed = replay(operations, GEOMETRY)
    assert replayed.area == grown
    assert replayed.blocks == {65536: block(b"b")}


def test_zeros_cover_every_block_of_their_range_and_blocks_after_them_lie_over() -> None:
    operations: list[Operation] = [
        HEADER,
        BlockOperation(65536, block(b"a")),
        ZeroOperation(65536, 65536),
        BlockOperation(69632, block(b"b")),
    ]
    blocks = replay(operations, GEOMETRY).blocks
    assert sorted(blocks) == list(range(65536, 131072, GEOMETRY.block_bytes))
    assert blocks[69632] == block(b"b")
    assert all(blocks[offset] == bytes(GEOMETRY.block_bytes) for offset in blocks if offset != 69632)


def test_intents_are_left_that_no_record_declares_done() -> None:
    intents = [IntentOperation(sequence, 512, bytes(512)) for sequence in (2, 3, 5)]
    operations: list[Operation] = [HEADER, *intents[:2], DoneOperation(3), DoneOperation(2), intents[2]]
    assert replay(operations, GEOMETRY).intents == (intents[2],)
    assert replay([HEADER, *intents], GEOMETRY).intents == tuple(intents)


@pytest.mark.parametrize(
    "operations",
    [
        [],
        [BlockOperation(65536, bytes(GEOMETRY.block_bytes))],
        [HeaderOperation(blank_image(1 << 20, Form(12)).parts[0][1])],
    ],
    ids=["nothing", "no header", "the cluster size is not the root's"],
)
def test_a_header_that_cannot_be_is_refused(operations: list[BlockOperation | HeaderOperation]) -> None:
    with pytest.raises(CorruptionError):
        replay(operations, GEOMETRY)


def test_a_header_that_breaks_the_specification_is_refused() -> None:
    with pytest.raises(FormatError):
        replay([HeaderOperation(bytes(512))], GEOMETRY)
