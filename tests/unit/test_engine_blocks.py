"""Places of metadata blocks: staged, in flight, log image, clean; who sees what, and what is kept."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from jqcow.engine.medium import Medium
from jqcow.engine.metadata import CLEAN_BLOCKS_MAX, Absent, Blocks, ChangeSet, MemoryView, Staged, View
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import ClusterIndex, Geometry, HostOffset
from jqcow.testing import SimulatedDevice

GEOMETRY = Geometry(13)
CLUSTER = GEOMETRY.cluster_bytes
BLOCK = GEOMETRY.block_bytes
PLACES = [HostOffset(CLUSTER * index + BLOCK * half) for index in range(2, 6) for half in (0, 1)]


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
    for offset, data in blank_image(1 << 20, 13).parts:
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
        metadata.view.set_entry(HostOffset(PLACES[1] + 8), 77)
        metadata.view.zero_cluster(ClusterIndex(PLACES[4] // CLUSTER))
        metadata.staged.changes.release(mark)
        assert metadata.view.entry(HostOffset(PLACES[1] + 8)) == 77
        assert metadata.view.read(PLACES[0], len(PLACES) * BLOCK) == b"".join(metadata.seen())
        assert metadata.view.read(HostOffset(PLACES[4] - 1), 3) == bytes([PLACES[3] // BLOCK]) + bytes(2)
        assert set(metadata.view.newest()) == {PLACES[1], PLACES[4], PLACES[5]}


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
