"""Metadata by age: what a record carries, how marks bring back what was there, and who sees which block."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqcow.engine.clusters import Run
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import (
    CLEAN_BLOCKS_MAX,
    Absent,
    Blocks,
    ChangeSet,
    Mark,
    MemoryView,
    Staged,
    Undone,
    View,
)
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.frame import BlockOperation, HeaderOperation, ZeroOperation
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import ClusterIndex, Geometry, HostOffset
from jqcow.testing import SimulatedDevice

GEOMETRY = Geometry(13)
CLUSTER = GEOMETRY.cluster_bytes
BLOCK = GEOMETRY.block_bytes
AREA = HeaderArea.parse(blank_image(1 << 20, Form(13)).parts[0][1])
CLUSTERS = [ClusterIndex(index) for index in range(2, 6)]
PLACES = [HostOffset(cluster * CLUSTER + half * BLOCK) for cluster in CLUSTERS for half in (0, 1)]

# Change sets


def sized(size: int) -> HeaderArea:
    return AREA.with_header(replace(AREA.header, size=size))


def edit(changes: ChangeSet, offset: HostOffset, letter: bytes) -> None:
    changes.edit(offset, letter * BLOCK)


def run(start: int, count: int = 1) -> Run:
    return Run(ClusterIndex(start), count)


def state(changes: ChangeSet) -> dict[str, Any]:
    """Return a copy of all that a mark restores."""
    names = ("blocks", "area", "ordered", "taken", "freed_data", "freed_metadata", "freed_clusters")
    kept = {name: copy.copy(getattr(changes, name)) for name in names}
    kept["blocks"] = {offset: bytes(block) for offset, block in changes.blocks.items()}
    return kept | {"record": changes.operations(), "zeroed_bytes": changes.zeroed_bytes}


def change_everything(changes: ChangeSet, letter: bytes) -> None:
    """Change all that an operation can change, blocks that are staged already among it."""
    edit(changes, PLACES[0], letter)
    changes.zero_cluster(CLUSTERS[1])
    edit(changes, PLACES[3], letter)
    edit(changes, PLACES[4], letter)
    changes.zero_cluster(CLUSTERS[2])
    changes.area = sized(ord(letter) * 512)
    changes.ordered = True
    changes.taken.append(run(20 + ord(letter)))
    changes.freed_data.append(run(200 + ord(letter), 2))
    changes.freed_metadata.append(run(400 + ord(letter)))
    changes.freed_clusters += 3
    changes.packed_end = ord(letter)


@pytest.fixture
def changes() -> ChangeSet:
    return ChangeSet(GEOMETRY)


class TestMarks:
    def test_returning_restores_everything_and_names_what_was_taken_and_freed(
        self, changes: ChangeSet
    ) -> None:
        """D3."""
        changes.release(staged(changes, b"a"))
        before = state(changes)
        mark = changes.mark()
        change_everything(changes, b"b")
        undone = changes.return_to(mark)
        assert state(changes) == before
        letter = ord("b")
        assert undone == Undone([run(20 + letter)], [run(200 + letter, 2), run(400 + letter)])
        assert changes.packed_end == 0, "what was packed since is gone: nothing goes behind it"

    def test_a_mark_stays_valid(self, changes: ChangeSet) -> None:
        mark = changes.mark()
        before = state(changes)
        for letter in (b"a", b"b"):
            change_everything(changes, letter)
            changes.return_to(mark)
            assert changes.has_mark(mark) and state(changes) == before
        assert changes.is_empty

    def test_marks_nest(self, changes: ChangeSet) -> None:
        outer, at_outer = changes.mark(), state(changes)
        change_everything(changes, b"a")
        inner, at_inner = changes.mark(), state(changes)
        change_everything(changes, b"b")
        changes.return_to(inner)
        assert state(changes) == at_inner
        change_everything(changes, b"c")
        changes.return_to(outer)
        assert state(changes) == at_outer
        assert changes.has_mark(outer) and not changes.has_mark(inner)

    def test_a_released_mark_leaves_its_blocks_to_the_older_one(self, changes: ChangeSet) -> None:
        outer, before = changes.mark(), state(changes)
        edit(changes, PLACES[0], b"a")
        inner = changes.mark()
        change_everything(changes, b"b")
        changes.release(inner)
        edit(changes, PLACES[7], b"c")
        undone = changes.return_to(outer)
        assert state(changes) == before and len(undone.taken) == 1

    def test_marks_are_released_in_the_reverse_order(self, changes: ChangeSet) -> None:
        outer = changes.mark()
        changes.mark()
        with pytest.raises(RuntimeError, match="reverse order"):
            changes.release(outer)

    def test_blocks_are_staged_only_behind_a_mark(self, changes: ChangeSet) -> None:
        with pytest.raises(RuntimeError, match="inside an operation"):
            edit(changes, PLACES[0], b"a")
        with pytest.raises(RuntimeError, match="inside an operation"):
            changes.zero_cluster(CLUSTERS[0])
        assert changes.is_empty

    def test_a_block_is_changed_where_it_is_only_by_who_replaced_it(self, changes: ChangeSet) -> None:
        mark = changes.mark()
        copied = changes.edit(PLACES[0], b"a" * BLOCK)
        assert changes.editable(PLACES[0]) is copied
        inner = changes.mark()
        assert changes.editable(PLACES[0]) is None, "the older mark restores it"
        changes.release(inner)
        assert changes.editable(PLACES[0]) is copied
        changes.release(mark)
        assert changes.editable(PLACES[0]) is None

    def test_zeros_are_never_changed_where_they_are(self, changes: ChangeSet) -> None:
        changes.mark()
        changes.zero_cluster(CLUSTERS[0])
        assert changes.editable(PLACES[0]) is None


def staged(changes: ChangeSet, letter: bytes) -> Mark:
    mark = changes.mark()
    change_everything(changes, letter)
    return mark


class TestPrivateSet:
    def test_its_data_is_ordered_and_its_clusters_are_fresh(self) -> None:
        """T1; outside no cluster is fresh."""
        private = ChangeSet(GEOMETRY, private=True)
        assert private.ordered and private.own == set()
        assert ChangeSet(GEOMETRY).own is None

    def test_fresh_clusters_are_closed_by_a_savepoint(self) -> None:
        """What a savepoint may come back to is not written in place."""
        private = ChangeSet(GEOMETRY, private=True)
        assert private.own is not None
        private.own.add(ClusterIndex(7))
        mark = private.savepoint()
        assert private.own == set()
        private.own.add(ClusterIndex(8))
        private.return_to(mark)
        assert private.own == set() and private.ordered

    def test_an_older_savepoint_drops_the_newer_ones(self) -> None:
        private = ChangeSet(GEOMETRY, private=True)
        older = private.savepoint()
        newer = private.savepoint()
        private.return_to(older)
        assert private.has_mark(older) and not private.has_mark(newer)


class TestRecord:
    def test_header_then_zeros_then_blocks(self, changes: ChangeSet) -> None:
        """D4: a new cluster is zeroed as a whole, then its blocks are laid."""
        staged(changes, b"a")
        record = changes.operations()
        kinds = [type(operation) for operation in record]
        assert kinds == [HeaderOperation, ZeroOperation, ZeroOperation, BlockOperation, BlockOperation]
        assert record[1:3] == [ZeroOperation(PLACES[2], CLUSTER), ZeroOperation(PLACES[4], CLUSTER)]
        assert record[3:] == [
            BlockOperation(PLACES[0], b"a" * BLOCK),
            BlockOperation(PLACES[3], b"a" * BLOCK),
        ]
        assert changes.zeroed_bytes == 2 * CLUSTER

    def test_an_empty_set_has_nothing_to_log(self, changes: ChangeSet) -> None:
        assert changes.is_empty and changes.operations() == []
        changes.area = AREA
        assert not changes.is_empty

    def test_what_was_cut_is_not_changed_by_what_comes_after(self, changes: ChangeSet) -> None:
        """D2: later changes go to another set, whose first edit copies."""
        changes.release(staged(changes, b"a"))
        record = changes.operations()
        newer = ChangeSet(GEOMETRY)
        newer.mark()
        newer.edit(PLACES[0], changes.blocks[PLACES[0]])[:3] = b"new"
        assert changes.operations() == record


class TestFailedRecord:
    def test_it_goes_under_what_came_since(self, changes: ChangeSet) -> None:
        changes.release(staged(changes, b"a"))
        newer = ChangeSet(GEOMETRY, packed_end=3)
        mark = newer.mark()
        edit(newer, PLACES[0], b"n")
        newer.taken.append(run(7))
        newer.freed_data.append(run(8))
        newer.freed_metadata.append(run(9))
        newer.freed_clusters = 2
        newer.release(mark)
        changes.absorb(newer)
        assert bytes(changes.blocks[PLACES[0]]) == b"n" * BLOCK
        assert bytes(changes.blocks[PLACES[3]]) == b"a" * BLOCK
        assert changes.area == sized(ord("a") * 512), "the newer set has no header of its own"
        assert changes.taken[-1] == run(7) and len(changes.taken) == 2
        assert changes.freed_data[-1] == run(8) and changes.freed_metadata[-1] == run(9)
        assert changes.freed_clusters == 5 and changes.packed_end == 3

    def test_the_newer_header_wins(self, changes: ChangeSet) -> None:
        changes.area = sized(512)
        newer = ChangeSet(GEOMETRY)
        newer.area = sized(1024)
        changes.absorb(newer)
        assert changes.area == sized(1024)

    @pytest.mark.parametrize(("older", "newer"), [(True, False), (False, True)])
    def test_it_keeps_its_order(self, changes: ChangeSet, older: bool, newer: bool) -> None:
        """Its data is no more durable than before."""
        after = ChangeSet(GEOMETRY)
        changes.ordered, after.ordered = older, newer
        changes.absorb(after)
        assert changes.ordered

    def test_zeroed_since_hides_what_the_failed_record_had(self, changes: ChangeSet) -> None:
        changes.release(staged(changes, b"a"))
        newer = ChangeSet(GEOMETRY)
        newer.mark()
        newer.zero_cluster(CLUSTERS[0])
        changes.absorb(newer)
        assert changes.zeroed_bytes == 3 * CLUSTER
        assert bytes(changes.blocks[PLACES[0]]) == bytes(BLOCK)

    def test_zeroed_blocks_of_the_newer_set_are_not_spelled_out(self, changes: ChangeSet) -> None:
        newer = ChangeSet(GEOMETRY)
        newer.mark()
        newer.zero_cluster(CLUSTERS[0])
        changes.absorb(newer)
        assert changes.operations() == [ZeroOperation(PLACES[0], CLUSTER)]


@dataclass
class Everything:
    """The model: a mark copies everything."""

    blocks: dict[HostOffset, bytes] = field(default_factory=dict)
    zeroed: set[HostOffset] = field(default_factory=set)
    area: HeaderArea | None = None
    ordered: bool = False
    taken: list[Run] = field(default_factory=list)
    freed: list[Run] = field(default_factory=list)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("edit"), st.sampled_from(PLACES), st.integers(0, 255)),
        st.tuples(st.just("zero"), st.sampled_from(CLUSTERS), st.just(0)),
        st.tuples(st.just("other"), st.just(0), st.integers(1, 255)),
        st.tuples(st.sampled_from(["mark", "release", "return"]), st.integers(0, 9), st.just(0)),
    ),
    max_size=60,
)


def apply(changes: ChangeSet, model: Everything, step: str, place: int, value: int) -> None:
    if step == "edit":
        offset = HostOffset(place)
        block = changes.editable(offset)
        if block is None:
            block = changes.edit(offset, changes.blocks.get(offset, bytes(BLOCK)))
        block[value] = value
        expected = bytearray(model.blocks.get(offset, bytes(BLOCK)))
        expected[value] = value
        model.blocks[offset] = bytes(expected)
    elif step == "zero":
        changes.zero_cluster(ClusterIndex(place))
        start = HostOffset(place * CLUSTER)
        model.blocks |= {start: bytes(BLOCK), HostOffset(start + BLOCK): bytes(BLOCK)}
        model.zeroed.add(start)
    else:
        changes.area = model.area = sized(value * 512)
        changes.ordered = model.ordered = True
        changes.taken.append(run(value))
        model.taken.append(run(value))
        changes.freed_data.append(run(value, 2))
        changes.freed_clusters += 2
        model.freed.append(run(value, 2))


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_marks_equal_copies_of_everything(steps: list[tuple[str, int, int]]) -> None:
    """D3: whichever way marks nest, are released and are returned to."""
    changes, model = ChangeSet(GEOMETRY), Everything()
    marks: list[tuple[Mark, Everything]] = [(changes.mark(), Everything())]
    for step, place, value in steps:
        if step == "mark":
            marks.append((changes.mark(), copy.deepcopy(model)))
        elif step == "release":
            if len(marks) > 1:
                changes.release(marks.pop()[0])
        elif step == "return":
            del marks[place % len(marks) + 1 :]
            mark, kept = marks[-1]
            undone = changes.return_to(mark)
            assert undone == Undone(model.taken[len(kept.taken) :], model.freed[len(kept.freed) :])
            model = copy.deepcopy(kept)
        else:
            apply(changes, model, step, place, value)
        assert {offset: bytes(block) for offset, block in changes.blocks.items()} == model.blocks
        assert (changes.area, changes.ordered, changes.taken) == (model.area, model.ordered, model.taken)
        assert changes.freed_data == model.freed and changes.freed_clusters == 2 * len(model.freed)
        assert changes.zeroed_bytes == len(model.zeroed) * CLUSTER


# Blocks, and views of them


@dataclass
class Metadata:
    """Blocks of a device, and the public view of them."""

    device: SimulatedDevice
    blocks: Blocks
    view: View

    @property
    def staged(self) -> Staged:
        return self.view.staged

    def put(self, place: HostOffset, letters: bytes) -> None:
        """One operation that lays some bytes at the start of a block."""
        mark = self.staged.changes.mark()
        self.view.edit(place)[: len(letters)] = letters
        self.staged.changes.release(mark)

    def cut(self) -> None:
        self.staged.in_flight = self.staged.changes
        self.staged.changes = ChangeSet(GEOMETRY)

    def publish(self) -> None:
        assert self.staged.in_flight is not None
        self.blocks.publish(self.staged.in_flight)
        self.staged.in_flight = None

    def take_back(self) -> None:
        assert self.staged.in_flight is not None
        self.staged.in_flight.absorb(self.staged.changes)
        self.staged.changes, self.staged.in_flight = self.staged.in_flight, None

    def write_homes(self) -> None:
        for offset, data in self.blocks.image_runs():
            self.device.pwrite(data, offset)

    def checkpoint(self) -> None:
        self.write_homes()
        self.blocks.images_are_home()

    def seen(self) -> list[bytes]:
        return [bytes(self.view.block(place)) for place in PLACES]


@pytest.fixture
def metadata() -> Metadata:
    content = bytearray(16 * CLUSTER)
    for offset, data in blank_image(1 << 20, Form(13)).parts:
        content[offset : offset + len(data)] = data
    for place in PLACES:
        content[place : place + BLOCK] = bytes([place // BLOCK]) * BLOCK
    device = SimulatedDevice(bytes(content))
    blocks = Blocks(Medium(device), HeaderArea.parse(bytes(content[:CLUSTER])))
    return Metadata(device, blocks, View(blocks, Staged(ChangeSet(GEOMETRY))))


class TestView:
    def test_the_newest_bytes_lie_on_top(self, metadata: Metadata) -> None:
        place = PLACES[0]
        for letters, move in ((b"log", metadata.publish), (b"fly", lambda: None)):
            metadata.put(place, letters)
            metadata.cut()
            assert metadata.view.block(place)[:3] == letters
            move()
        metadata.put(place, b"new")
        assert metadata.view.block(place)[:3] == b"new"
        metadata.staged.changes = ChangeSet(GEOMETRY)
        assert metadata.view.block(place)[:3] == b"fly"
        metadata.staged.in_flight = None
        assert metadata.view.block(place)[:3] == b"log"
        metadata.blocks.images = {}
        assert metadata.view.block(place) == bytes([place // BLOCK]) * BLOCK

    def test_the_header_through_all_places(self, metadata: Metadata) -> None:
        for size in (512, 1024):
            mark = metadata.staged.changes.mark()
            metadata.view.set_header(size=size)
            metadata.staged.changes.release(mark)
            assert metadata.view.header.size == size
            metadata.cut()
            assert metadata.view.header.size == size and metadata.blocks.area.header.size != size
            metadata.publish()
            assert metadata.view.header.size == size == metadata.blocks.area.header.size

    def test_every_way_of_reading(self, metadata: Metadata) -> None:
        mark = metadata.staged.changes.mark()
        metadata.view.set_entry(PLACES[1], 1, 77)
        metadata.view.zero_cluster(ClusterIndex(PLACES[4] // CLUSTER))
        metadata.staged.changes.release(mark)
        assert metadata.view.entry(PLACES[1], 1) == 77
        assert metadata.view.read(PLACES[0], len(PLACES) * BLOCK) == b"".join(metadata.seen())
        assert metadata.view.read(HostOffset(PLACES[4] - 1), 3) == bytes([PLACES[3] // BLOCK]) + bytes(2)
        assert set(metadata.view.newest()) == {PLACES[1], PLACES[4], PLACES[5]}

    def test_a_row_is_read_at_once_and_what_is_newer_stays(self, metadata: Metadata) -> None:
        place, reads = PLACES[1], []
        metadata.put(place, b"log")
        metadata.cut()
        metadata.publish()
        metadata.put(PLACES[3], b"new")
        pread = metadata.device.pread
        metadata.device.pread = lambda length, offset: reads.append((length, offset)) or pread(length, offset)  # type: ignore[method-assign]
        data = metadata.view.read(PLACES[0], len(PLACES) * BLOCK)
        assert data == b"".join(metadata.seen()) and data[BLOCK : BLOCK + 3] == b"log"
        assert reads == [(len(PLACES) * BLOCK, PLACES[0])]
        metadata.blocks.images_are_home()
        assert metadata.view.block(place)[:3] == b"log"

    def test_who_must_not_wait_reads_no_row(self, metadata: Metadata) -> None:
        view = MemoryView(metadata.blocks, metadata.staged)
        with pytest.raises(Absent):
            view.read(PLACES[0], 2 * BLOCK)


class TestPrivateView:
    """D5: what a transaction stages is seen by itself alone until its record is durable."""

    def test_changes_are_seen_inside_alone(self, metadata: Metadata) -> None:
        metadata.put(PLACES[0], b"log")
        metadata.cut()
        metadata.publish()
        before, size = metadata.seen(), metadata.view.header.size
        private = Metadata(
            metadata.device,
            metadata.blocks,
            View(metadata.blocks, Staged(ChangeSet(GEOMETRY, private=True))),
        )
        assert private.seen() == before
        private.put(PLACES[0], b"mine")
        private.put(PLACES[6], b"mine")
        private.view.set_header(size=512)
        inside = private.seen()
        assert inside != before == metadata.seen()
        assert (private.view.header.size, metadata.view.header.size) == (512, size)
        # A commit that finds the journal full brings the older records home first.
        metadata.checkpoint()
        assert (private.seen(), metadata.seen()) == (inside, before)
        metadata.blocks.publish(private.staged.changes)
        assert metadata.seen() == inside and metadata.view.header.size == 512


class TestLogImages:
    def test_logged_bytes_are_not_changed_by_later_operations(self, metadata: Metadata) -> None:
        """D2."""
        metadata.put(PLACES[0], b"one")
        metadata.cut()
        assert metadata.staged.in_flight is not None
        record = metadata.staged.in_flight.operations()
        metadata.put(PLACES[0], b"new")
        assert metadata.staged.in_flight.operations() == record
        metadata.publish()
        assert metadata.blocks.images[PLACES[0]][:3] == b"one"
        assert metadata.view.block(PLACES[0])[:3] == b"new"

    def test_homes_take_log_images_alone(self, metadata: Metadata) -> None:
        """D1: neither what is staged nor what is in flight is in what a checkpoint writes."""
        metadata.put(PLACES[0], b"one")
        metadata.cut()
        metadata.publish()
        metadata.put(PLACES[0], b"fly")
        metadata.put(PLACES[4], b"fly")
        metadata.cut()
        metadata.put(PLACES[0], b"new")
        before = metadata.seen()
        assert [(offset, data[:3]) for offset, data in metadata.blocks.image_runs()] == [(PLACES[0], b"one")]
        metadata.checkpoint()
        assert not metadata.blocks.images and metadata.seen() == before
        assert metadata.device.pread(3, PLACES[0]) == b"one"
        metadata.publish()
        assert metadata.seen() == before and metadata.blocks.images[PLACES[0]][:3] == b"fly"

    def test_neighbours_are_written_at_once(self, metadata: Metadata) -> None:
        for place in (PLACES[0], PLACES[1], PLACES[2], PLACES[5]):
            metadata.put(place, b"x")
        metadata.cut()
        metadata.publish()
        runs = [(offset, len(data)) for offset, data in metadata.blocks.image_runs()]
        assert runs == [(PLACES[0], 3 * BLOCK), (PLACES[5], BLOCK)]


class TestClean:
    def test_they_are_bounded(self, metadata: Metadata) -> None:
        for index in range(CLEAN_BLOCKS_MAX + 100):
            metadata.view.block(HostOffset(index * BLOCK))
        assert len(metadata.blocks._clean) <= CLEAN_BLOCKS_MAX


class TestWithoutTheLock:
    """D6: what was read meanwhile is kept only if it cannot be older than its home."""

    @pytest.fixture
    def absent(self, metadata: Metadata) -> Absent:
        view = MemoryView(metadata.blocks, metadata.staged)
        with pytest.raises(Absent) as caught:
            view.block(PLACES[0])
        assert caught.value.offset == PLACES[0]
        return caught.value

    def test_it_is_found_then(self, metadata: Metadata, absent: Absent) -> None:
        metadata.blocks.load_unlocked(absent)
        view = MemoryView(metadata.blocks, metadata.staged)
        assert view.block(PLACES[0]) == bytes([PLACES[0] // BLOCK]) * BLOCK

    def test_staged_blocks_are_in_memory(self, metadata: Metadata) -> None:
        metadata.put(PLACES[0], b"new")
        assert MemoryView(metadata.blocks, metadata.staged).block(PLACES[0])[:3] == b"new"

    def test_homes_were_written_meanwhile(self, metadata: Metadata, absent: Absent) -> None:
        old_read = metadata.device.pread

        def pread(length: int, offset: int) -> bytes:
            old = old_read(length, offset)
            metadata.device.pread = old_read  # type: ignore[method-assign]
            metadata.put(PLACES[0], b"new")
            metadata.cut()
            metadata.publish()
            metadata.checkpoint()
            metadata.blocks._clean.clear()
            return old

        metadata.device.pread = pread  # type: ignore[method-assign]
        metadata.blocks.load_unlocked(absent)
        assert metadata.blocks.find(PLACES[0]) is None
        assert metadata.view.block(PLACES[0])[:3] == b"new"

    def test_homes_are_being_written(self, metadata: Metadata, absent: Absent) -> None:
        """The log image may be home or not: it is the log image that counts."""
        metadata.put(PLACES[0], b"new")
        metadata.cut()
        metadata.publish()
        metadata.blocks._clean.clear()
        metadata.blocks.load_unlocked(absent)
        assert PLACES[0] not in metadata.blocks._clean
        assert metadata.view.block(PLACES[0])[:3] == b"new"


def test_any_history_equals_replay(metadata: Metadata) -> None:
    """Random operations, failures, records and checkpoints: what is seen is what replay would make."""
    chance = random.Random(4)
    model = dict(zip(PLACES, metadata.seen(), strict=True))
    for _ in range(1500):
        attempt = dict(model)
        changes = metadata.staged.changes
        mark = changes.mark()
        for _ in range(chance.randrange(1, 5)):
            place = chance.choice(PLACES)
            if chance.random() < 0.2:
                cluster = HostOffset(place - place % CLUSTER)
                metadata.view.zero_cluster(ClusterIndex(cluster // CLUSTER))
                attempt |= {cluster: bytes(BLOCK), HostOffset(cluster + BLOCK): bytes(BLOCK)}
            else:
                attempt[place] = chance.randbytes(BLOCK)
                metadata.view.edit(place)[:] = attempt[place]
        if chance.random() < 0.3:
            changes.return_to(mark)
        else:
            model = attempt
        changes.release(mark)
        assert list(model.values()) == metadata.seen()
        if chance.random() < 0.3 and metadata.staged.in_flight is None:
            metadata.cut()
        elif chance.random() < 0.3 and metadata.staged.in_flight is not None:
            chance.choice((metadata.take_back, metadata.publish))()
        if chance.random() < 0.1:
            metadata.checkpoint()
        assert list(model.values()) == metadata.seen()
