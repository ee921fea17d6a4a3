"""Change sets: what a record carries, and how marks bring back what was there before."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqcow.engine.clusters import Run
from jqcow.engine.metadata import ChangeSet, Mark, Undone
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.frame import BlockOperation, HeaderOperation, ZeroOperation
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import ClusterIndex, Geometry, HostOffset

GEOMETRY = Geometry(13)
CLUSTER = GEOMETRY.cluster_bytes
BLOCK = GEOMETRY.block_bytes
AREA = HeaderArea.parse(blank_image(1 << 20, 13).parts[0][1])
CLUSTERS = [ClusterIndex(index) for index in range(2, 6)]
PLACES = [HostOffset(cluster * CLUSTER + half * BLOCK) for cluster in CLUSTERS for half in (0, 1)]


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


class TestTransaction:
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
