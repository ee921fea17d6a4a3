"""Layers of metadata blocks: staged, in flight, logged, clean; and what a failed operation restores."""

from __future__ import annotations

import random

import pytest

from jqcow.engine.medium import Medium
from jqcow.engine.metadata import CLEAN_BLOCKS_MAX, Metadata
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.frame import BlockOperation, HeaderOperation, ZeroOperation
from jqcow.ondisk.header import HeaderArea
from jqcow.testing import SimulatedDevice

CLUSTER_BITS = 13
CLUSTER = 1 << CLUSTER_BITS
BLOCK = 4096
PLACES = [CLUSTER * index + BLOCK * half for index in range(2, 6) for half in (0, 1)]


def make_metadata() -> Metadata:
    blank = blank_image(1 << 20, CLUSTER_BITS)
    content = bytearray(16 * CLUSTER)
    for offset, data in blank.parts:
        content[offset : offset + len(data)] = data
    for place in PLACES:
        content[place : place + BLOCK] = bytes([place // BLOCK]) * BLOCK
    return Metadata(Medium(SimulatedDevice(bytes(content))), HeaderArea.parse(bytes(content[:CLUSTER])))


@pytest.fixture
def metadata() -> Metadata:
    return make_metadata()


def seen(metadata: Metadata) -> list[bytes]:
    return [bytes(metadata.block(place)) for place in PLACES]


class Stop(Exception):
    """Ends an operation."""


def fail_operation(metadata: Metadata) -> None:
    """Change everything that an operation can change, then fail."""
    with pytest.raises(Stop), metadata.operation():
        metadata.zero_cluster(PLACES[0])
        metadata.edit(PLACES[0])[:4] = b"gone"
        metadata.edit(PLACES[2])[:4] = b"gone"
        metadata.zero_cluster(PLACES[2])
        metadata.set_entry(PLACES[4] + 8, 77)
        metadata.zero_cluster(PLACES[6])
        metadata.edit(PLACES[7])[:4] = b"gone"
        metadata.set_header(size=512)
        metadata.require_order()
        raise Stop


def stage_something(metadata: Metadata) -> None:
    with metadata.operation():
        metadata.edit(PLACES[0])[:3] = b"one"
        metadata.zero_cluster(PLACES[4])
        metadata.edit(PLACES[5])[:3] = b"two"
        metadata.set_header(size=1 << 21)


class TestRollback:
    def test_to_clean_blocks(self, metadata: Metadata) -> None:
        before = seen(metadata)
        fail_operation(metadata)
        assert seen(metadata) == before
        assert not metadata.has_staged
        assert metadata.header.size == 1 << 20

    def test_to_staged_blocks(self, metadata: Metadata) -> None:
        stage_something(metadata)
        before, record = seen(metadata), metadata.cut().operations()
        metadata.uncut()
        fail_operation(metadata)
        assert seen(metadata) == before
        assert metadata.header.size == 1 << 21
        layer = metadata.cut()
        assert layer.operations() == record and not layer.ordered

    def test_to_blocks_in_flight(self, metadata: Metadata) -> None:
        stage_something(metadata)
        before = seen(metadata)
        metadata.cut()
        fail_operation(metadata)
        assert seen(metadata) == before
        assert not metadata.has_staged and metadata.header.size == 1 << 21

    def test_to_log_images(self, metadata: Metadata) -> None:
        stage_something(metadata)
        metadata.cut()
        metadata.publish()
        before, images = seen(metadata), dict(metadata.images)
        fail_operation(metadata)
        assert seen(metadata) == before and metadata.images == images

    def test_through_all_layers_at_once(self, metadata: Metadata) -> None:
        stage_something(metadata)
        metadata.cut()
        metadata.publish()
        with metadata.operation():
            metadata.edit(PLACES[2])[:3] = b"mid"
        metadata.cut()
        with metadata.operation():
            metadata.edit(PLACES[6])[:3] = b"top"
        before = seen(metadata)
        fail_operation(metadata)
        assert seen(metadata) == before

    def test_operations_do_not_nest_and_staging_needs_one(self, metadata: Metadata) -> None:
        with metadata.operation(), pytest.raises(RuntimeError, match="nest"), metadata.operation():
            pass
        with pytest.raises(RuntimeError, match="inside an operation"):
            metadata.edit(PLACES[0])
        with metadata.operation(), pytest.raises(RuntimeError, match="between operations"):
            metadata.cut()


class TestRecord:
    def test_zeros_come_before_blocks(self, metadata: Metadata) -> None:
        """D4: a new cluster is zeroed as a whole, then its blocks are laid."""
        stage_something(metadata)
        kinds = [type(operation) for operation in metadata.cut().operations()]
        assert kinds == [HeaderOperation, ZeroOperation, BlockOperation, BlockOperation]

    def test_frozen_bytes_are_not_changed_by_later_operations(self, metadata: Metadata) -> None:
        """D2: what is in flight or logged stays as it was cut."""
        stage_something(metadata)
        layer = metadata.cut()
        record = layer.operations()
        with metadata.operation():
            metadata.edit(PLACES[0])[:3] = b"new"
        assert layer.operations() == record
        metadata.publish()
        assert metadata.images[PLACES[0]][:3] == b"one"
        assert metadata.block(PLACES[0])[:3] == b"new"

    def test_failed_record_goes_under_what_came_since(self, metadata: Metadata) -> None:
        stage_something(metadata)
        metadata.cut()
        with metadata.operation():
            metadata.edit(PLACES[0])[:3] = b"new"
            metadata.zero_cluster(PLACES[6])
            metadata.require_order()
        before = seen(metadata)
        metadata.uncut()
        assert seen(metadata) == before
        layer = metadata.cut()
        assert layer.ordered and layer.area is not None
        assert bytes(layer.blocks[PLACES[0]])[:3] == b"new"
        assert set(layer.zeros) == {PLACES[4], PLACES[6]}

    def test_homes_take_log_images_alone(self, metadata: Metadata) -> None:
        """D1: a staged change is not in what a checkpoint writes."""
        stage_something(metadata)
        metadata.cut()
        metadata.publish()
        with metadata.operation():
            metadata.edit(PLACES[0])[:3] = b"new"
        homes = dict(metadata.image_runs())
        assert homes[PLACES[0]][:3] == b"one"
        for offset, data in homes.items():
            metadata.medium.pwrite(data, offset)
        metadata.images_are_home()
        assert not metadata.images
        assert metadata.block(PLACES[0])[:3] == b"new"
        assert metadata.block(PLACES[5])[:3] == b"two"


def test_any_history_equals_replay() -> None:
    """Random operations, failures, records and checkpoints: what is seen is what replay would make."""
    chance = random.Random(4)
    metadata = make_metadata()
    model = dict(zip(PLACES, seen(metadata), strict=True))
    for _ in range(1500):
        attempt = dict(model)
        fails = chance.random() < 0.3
        try:
            with metadata.operation():
                for _ in range(chance.randrange(1, 5)):
                    place = chance.choice(PLACES)
                    if chance.random() < 0.2:
                        cluster = place - place % CLUSTER
                        metadata.zero_cluster(cluster)
                        attempt |= {cluster: bytes(BLOCK), cluster + BLOCK: bytes(BLOCK)}
                    else:
                        data = chance.randbytes(BLOCK)
                        metadata.edit(place)[:] = data
                        attempt[place] = data
                if fails:
                    raise Stop
            model = attempt
        except Stop:
            pass
        assert [bytes(model[place]) for place in PLACES] == seen(metadata)
        if chance.random() < 0.3 and metadata.has_staged:
            metadata.cut()
            if chance.random() < 0.3:
                metadata.uncut()
            else:
                metadata.publish()
        if chance.random() < 0.1:
            for offset, data in metadata.image_runs():
                metadata.medium.pwrite(data, offset)
            metadata.images_are_home()
        assert [bytes(model[place]) for place in PLACES] == seen(metadata)


def test_clean_blocks_are_bounded(metadata: Metadata) -> None:
    for index in range(CLEAN_BLOCKS_MAX + 100):
        metadata.block(index * BLOCK)
    assert len(metadata._clean) <= CLEAN_BLOCKS_MAX
