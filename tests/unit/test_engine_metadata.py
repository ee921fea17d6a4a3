"""Layers of metadata blocks: staged, in flight, logged, clean; what failures restore; who sees what."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def seen_by(metadata: Metadata, *, private: bool) -> tuple[list[bytes], int]:
    """Return what the transaction, or everyone else, sees: all blocks, and the disk's size."""
    metadata.select_view(private=private)
    return seen(metadata), metadata.header.size


class Stop(Exception):
    """Ends an operation."""


@contextmanager
def operation(metadata: Metadata) -> Iterator[None]:
    """All or nothing, and in a transaction with its view selected, as the store does it."""
    metadata.select_view(private=metadata.in_transaction)
    metadata.begin()
    try:
        yield
    except BaseException:
        metadata.roll_back()
        raise
    metadata.finish()


def change_everything(metadata: Metadata) -> None:
    """Change, inside an operation, everything that an operation can change."""
    metadata.zero_cluster(PLACES[0])
    metadata.edit(PLACES[0])[:4] = b"gone"
    metadata.edit(PLACES[2])[:4] = b"gone"
    metadata.zero_cluster(PLACES[2])
    metadata.set_entry(PLACES[4] + 8, 77)
    metadata.zero_cluster(PLACES[6])
    metadata.edit(PLACES[7])[:4] = b"gone"
    metadata.set_header(size=512)
    metadata.require_order()


def fail_operation(metadata: Metadata) -> None:
    """Change everything, then fail."""
    with pytest.raises(Stop), operation(metadata):
        change_everything(metadata)
        raise Stop


def stage_something(metadata: Metadata) -> None:
    with operation(metadata):
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
        with operation(metadata):
            metadata.edit(PLACES[2])[:3] = b"mid"
        metadata.cut()
        with operation(metadata):
            metadata.edit(PLACES[6])[:3] = b"top"
        before = seen(metadata)
        fail_operation(metadata)
        assert seen(metadata) == before

    def test_operations_do_not_nest_and_staging_needs_one(self, metadata: Metadata) -> None:
        with operation(metadata), pytest.raises(RuntimeError, match="nest"):
            metadata.begin()
        stagings: list[Callable[[], object]] = [
            lambda: metadata.edit(PLACES[0]),
            lambda: metadata.zero_cluster(PLACES[0]),
            lambda: metadata.set_header(size=512),
            metadata.require_order,
        ]
        for stage in stagings:
            with pytest.raises(RuntimeError, match="inside an operation"):
                stage()
        assert not metadata.has_staged
        with operation(metadata), pytest.raises(RuntimeError, match="between operations"):
            metadata.cut()

    def test_refused_beginning_leaves_the_operation_as_it_was(self, metadata: Metadata) -> None:
        before = seen(metadata)
        metadata.begin()
        metadata.edit(PLACES[0])[:3] = b"one"
        with pytest.raises(RuntimeError, match="nest"):
            metadata.begin()
        assert metadata.in_operation
        metadata.roll_back()
        assert not metadata.in_operation and seen(metadata) == before

    def test_rolling_back_without_an_operation(self, metadata: Metadata) -> None:
        stage_something(metadata)
        before = seen(metadata)
        metadata.roll_back()
        assert seen(metadata) == before and metadata.has_staged


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
        with operation(metadata):
            metadata.edit(PLACES[0])[:3] = b"new"
        assert layer.operations() == record
        metadata.publish()
        assert metadata.images[PLACES[0]][:3] == b"one"
        assert metadata.block(PLACES[0])[:3] == b"new"

    def test_failed_record_goes_under_what_came_since(self, metadata: Metadata) -> None:
        stage_something(metadata)
        metadata.cut()
        with operation(metadata):
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

    def test_one_record_at_a_time(self, metadata: Metadata) -> None:
        stage_something(metadata)
        metadata.cut()
        with pytest.raises(RuntimeError, match="one record is in flight"):
            metadata.cut()

    def test_ending_a_record_twice(self, metadata: Metadata) -> None:
        """Whoever was cut off in publishing, or in taking back, does it again."""
        stage_something(metadata)
        before = seen(metadata)
        record = metadata.cut().operations()
        metadata.uncut()
        metadata.uncut()
        layer = metadata.cut()
        assert layer.operations() == record
        metadata.publish()
        images = dict(metadata.images)
        metadata.publish()
        metadata.uncut()
        assert metadata.images == images and seen(metadata) == before
        assert not metadata.has_staged

    @pytest.mark.parametrize("ordered_by", ["the failed record", "what came since"])
    def test_failed_record_keeps_its_order(self, metadata: Metadata, ordered_by: str) -> None:
        """Its data is no more durable than before."""
        for part in ("the failed record", "what came since"):
            with operation(metadata):
                metadata.edit(PLACES[0])[:3] = b"new"
                if part == ordered_by:
                    metadata.require_order()
            if part == "the failed record":
                metadata.cut()
        metadata.uncut()
        assert metadata.cut().ordered

    def test_end_of_an_epoch_under_a_record_in_flight(self, metadata: Metadata) -> None:
        """A record that finds the journal full sends the older ones home; it stays the newest."""
        stage_something(metadata)
        metadata.cut()
        metadata.publish()
        with operation(metadata):
            metadata.edit(PLACES[0])[:3] = b"new"
            metadata.zero_cluster(PLACES[4])
        metadata.cut()
        before = seen(metadata)
        for offset, data in metadata.image_runs():
            metadata.medium.pwrite(data, offset)
        metadata.images_are_home()
        assert seen(metadata) == before
        metadata.publish()
        assert seen(metadata) == before and metadata.images[PLACES[0]][:3] == b"new"

    def test_homes_take_log_images_alone(self, metadata: Metadata) -> None:
        """D1: a staged change is not in what a checkpoint writes."""
        stage_something(metadata)
        metadata.cut()
        metadata.publish()
        with operation(metadata):
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
            with operation(metadata):
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


class TestTransaction:
    """D5: what a transaction stages is seen by itself alone until its record is durable."""

    @pytest.fixture
    def metadata(self) -> Metadata:
        """Blocks in every layer but the staged one, and an open transaction."""
        metadata = make_metadata()
        stage_something(metadata)
        metadata.cut()
        metadata.publish()
        metadata.begin_transaction()
        return metadata

    def test_changes_are_seen_inside_alone(self, metadata: Metadata) -> None:
        before = seen_by(metadata, private=False)
        assert seen_by(metadata, private=True) == before
        with operation(metadata):
            change_everything(metadata)
        inside = seen_by(metadata, private=True)
        assert inside != before and inside[1] == 512
        assert inside[0][0].startswith(b"gone") and not any(inside[0][2])
        assert seen_by(metadata, private=False) == before

    @pytest.mark.parametrize("private", [True, False])
    def test_every_way_of_reading_follows_the_view(self, metadata: Metadata, private: bool) -> None:
        with operation(metadata):
            metadata.set_entry(PLACES[0] + 8, 77)
        metadata.select_view(private=private)
        laid = bytearray(metadata.medium.pread(len(PLACES) * BLOCK, PLACES[0]))
        metadata.overlay(laid, PLACES[0])
        assert bytes(laid) == b"".join(seen(metadata))
        assert (metadata.entry(PLACES[0] + 8) == 77) is private

    def test_in_flight_is_not_durable(self, metadata: Metadata) -> None:
        """Others see the changes when the commit has ended, not when its record is written."""
        before = seen_by(metadata, private=False)
        with operation(metadata):
            change_everything(metadata)
        inside = seen_by(metadata, private=True)
        metadata.cut()
        assert seen_by(metadata, private=False) == before
        metadata.publish()
        metadata.end_transaction()
        assert not metadata.in_transaction
        assert seen_by(metadata, private=False) == inside == seen_by(metadata, private=True)

    def test_end_of_an_epoch_changes_no_view(self, metadata: Metadata) -> None:
        """A commit that finds the journal full brings the older records home first."""
        before = seen_by(metadata, private=False)
        with operation(metadata):
            metadata.edit(PLACES[0])[:4] = b"mine"
            metadata.edit(PLACES[6])[:4] = b"mine"
        inside = seen_by(metadata, private=True)
        metadata.cut()
        for offset, data in metadata.image_runs():
            metadata.medium.pwrite(data, offset)
        metadata.images_are_home()
        assert seen_by(metadata, private=False) == before
        assert seen_by(metadata, private=True) == inside
        metadata.publish()
        metadata.end_transaction()
        assert seen_by(metadata, private=False) == inside

    def test_failed_operation_inside(self, metadata: Metadata) -> None:
        others = seen_by(metadata, private=False)
        with operation(metadata):
            metadata.edit(PLACES[0])[:4] = b"mine"
            metadata.set_header(size=1 << 22)
        before = seen_by(metadata, private=True)
        fail_operation(metadata)
        assert seen_by(metadata, private=True) == before
        assert seen_by(metadata, private=False) == others

    def test_operation_cut_off_is_rolled_back_by_whoever_comes_next(self, metadata: Metadata) -> None:
        """The next holder of the lock may see another view: the blocks go back where they came from."""
        others, inside = seen_by(metadata, private=False), seen_by(metadata, private=True)
        metadata.begin()
        change_everything(metadata)
        metadata.select_view(private=False)
        metadata.roll_back()
        assert seen_by(metadata, private=False) == others
        assert seen_by(metadata, private=True) == inside

    def test_abandoned(self, metadata: Metadata) -> None:
        """Nothing of it is left, and the next transaction starts from the committed state."""
        before = seen_by(metadata, private=False)
        with operation(metadata):
            change_everything(metadata)
        metadata.cut()
        with operation(metadata):
            metadata.edit(PLACES[1])[:4] = b"more"
        metadata.abandon_transaction()
        metadata.abandon_transaction()
        assert not metadata.in_transaction and not metadata.has_staged
        assert seen_by(metadata, private=False) == before == seen_by(metadata, private=True)
        metadata.publish()
        metadata.uncut()
        metadata.begin_transaction()
        assert seen_by(metadata, private=True) == before
        assert metadata.cut().is_empty

    def test_outside_a_transaction_there_is_nothing_to_abandon(self) -> None:
        metadata = make_metadata()
        stage_something(metadata)
        before = seen(metadata)
        metadata.abandon_transaction()
        assert metadata.has_staged and seen(metadata) == before

    def test_starts_with_nothing_staged_and_alone(self, metadata: Metadata) -> None:
        with pytest.raises(RuntimeError, match="nothing staged"):
            metadata.begin_transaction()
        metadata.end_transaction()
        stage_something(metadata)
        with pytest.raises(RuntimeError, match="nothing staged"):
            metadata.begin_transaction()
        with pytest.raises(RuntimeError, match="no transaction"):
            metadata.mark()


class TestMark:
    """Savepoints: a state of the transaction to come back to, any number of times."""

    @pytest.fixture
    def metadata(self) -> Metadata:
        metadata = make_metadata()
        metadata.begin_transaction()
        return metadata

    def test_return_to_the_beginning(self, metadata: Metadata) -> None:
        before = seen_by(metadata, private=True)
        mark = metadata.mark()
        with operation(metadata):
            change_everything(metadata)
        metadata.return_to(mark)
        assert seen_by(metadata, private=True) == before
        assert not metadata.has_staged and not metadata.cut().ordered

    def test_return_as_often_as_wanted(self, metadata: Metadata) -> None:
        stage_something(metadata)
        with operation(metadata):
            metadata.require_order()
        marked, mark = seen_by(metadata, private=True), metadata.mark()
        for _ in range(3):
            # The same blocks: a marked one must not be edited where it is.
            with operation(metadata):
                change_everything(metadata)
                metadata.edit(PLACES[5])[:4] = b"more"
            assert seen_by(metadata, private=True) != marked
            metadata.return_to(mark)
            assert seen_by(metadata, private=True) == marked
        layer = metadata.cut()
        assert layer.ordered and set(layer.zeros) == {PLACES[4]}
        assert {offset: bytes(data[:3]) for offset, data in layer.blocks.items()} == {
            PLACES[0]: b"one",
            PLACES[5]: b"two",
        }

    def test_back_over_several(self, metadata: Metadata) -> None:
        states, marks = [], []
        for number in range(4):
            states.append(seen_by(metadata, private=True))
            marks.append(metadata.mark())
            with operation(metadata):
                metadata.edit(PLACES[0])[number] = 255
                metadata.edit(PLACES[number])[:4] = b"gone"
                metadata.set_header(size=512 * (number + 1))
        for number in (2, 3, 1, 0):
            metadata.return_to(marks[number])
            assert seen_by(metadata, private=True) == states[number]

    def test_failed_operation_after_a_mark(self, metadata: Metadata) -> None:
        stage_something(metadata)
        mark = metadata.mark()
        marked = seen_by(metadata, private=True)
        fail_operation(metadata)
        assert seen_by(metadata, private=True) == marked
        metadata.return_to(mark)
        assert seen_by(metadata, private=True) == marked


def test_any_transaction_equals_replay() -> None:
    """Random operations, failures, savepoints, commits: both views are right, and so is what is logged."""
    chance = random.Random(5)
    metadata = make_metadata()
    metadata.select_view(private=False)
    committed = dict(zip(PLACES, seen(metadata), strict=True))

    def look(inside: dict[int, bytes]) -> None:
        assert seen_by(metadata, private=False)[0] == [committed[place] for place in PLACES]
        assert seen_by(metadata, private=True)[0] == [inside[place] for place in PLACES]

    for _ in range(150):
        metadata.begin_transaction()
        inside = dict(committed)
        marks = [(metadata.mark(), inside)]
        for _ in range(chance.randrange(8)):
            metadata.select_view(private=True)
            attempt, fails = dict(inside), chance.random() < 0.3
            metadata.begin()
            for _ in range(chance.randrange(1, 4)):
                place = chance.choice(PLACES)
                if chance.random() < 0.2:
                    cluster = place - place % CLUSTER
                    metadata.zero_cluster(cluster)
                    attempt |= {cluster: bytes(BLOCK), cluster + BLOCK: bytes(BLOCK)}
                else:
                    data = chance.randbytes(BLOCK)
                    metadata.edit(place)[:] = data
                    attempt[place] = data
            metadata.select_view(private=chance.random() < 0.5)
            if fails:
                metadata.roll_back()
            else:
                metadata.finish()
                inside = attempt
            look(inside)
            if chance.random() < 0.3:
                marks.append((metadata.mark(), inside))
            elif chance.random() < 0.3:
                mark, inside = chance.choice(marks)
                metadata.return_to(mark)
                look(inside)
        metadata.cut()
        if chance.random() < 0.3:
            for offset, block in metadata.image_runs():
                metadata.medium.pwrite(block, offset)
            metadata.images_are_home()
            look(inside)
        if chance.random() < 0.3:
            metadata.abandon_transaction()
        else:
            metadata.publish()
            metadata.end_transaction()
            committed = inside
        look(committed)
        assert all(committed[offset] == image for offset, image in metadata.images.items())
