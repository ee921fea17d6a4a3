"""Reads of a guest: each run from where it is, streams that are kept, and what the backing file shows."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

import jqcow
from jqcow.engine import read
from jqcow.engine.read import Reads
from jqcow.errors import CorruptionError
from jqcow.ondisk.l2 import COMPRESSED_CLUSTER, DATA, UNALLOCATED, ZERO_CLUSTER
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.unit.engines import CLUSTER, MIB, OLD, SECTOR, Below, changing, overlay


def counted_reads(device: SimulatedDevice) -> FaultPlan:
    """Count the calls of the device from here on."""
    device.faults = plan = FaultPlan()
    return plan


class TestRuns:
    @pytest.fixture
    def content(self, image: jqcow.Image) -> bytes:
        """Give the image a cluster of each kind; return what its first clusters read as."""
        image.pwrite_compressed(b"p" * CLUSTER, CLUSTER)
        image.write_zeroes(CLUSTER, 2 * CLUSTER, unmap=False)
        image.discard(CLUSTER, 3 * CLUSTER)
        return OLD[:CLUSTER] + b"p" * CLUSTER + bytes(2 * CLUSTER) + OLD[4 * CLUSTER :]

    def test_every_kind_is_found(self, image: jqcow.Image, content: bytes) -> None:
        runs = list(image._guest.reads.runs(0, 5 * CLUSTER))
        assert [run.kind for run in runs] == [DATA, COMPRESSED_CLUSTER, ZERO_CLUSTER, UNALLOCATED, DATA]
        assert [run.length for run in runs] == [CLUSTER] * 5
        assert image._guest.reads.first_run(3 * CLUSTER, CLUSTER) == runs[3]

    def test_every_kind_is_read(self, image: jqcow.Image, content: bytes) -> None:
        """Any part of them, and over what was in the buffer before."""
        assert image.pread(len(content), 0) == content
        for start, end in ((1, 2), (CLUSTER - 1, 3 * CLUSTER + 1), (CLUSTER + 5, CLUSTER + 9)):
            buffer = bytearray(b"\xff" * (end - start))
            image.pread_into(buffer, start)
            assert buffer == content[start:end]

    @pytest.mark.parametrize("at_once", [1, 2, 1024])
    def test_a_long_read_is_resolved_part_by_part(
        self, image: jqcow.Image, content: bytes, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each part is a request of its own: it bounds what is held, and how long others wait."""
        monkeypatch.setattr(read, "RUNS_AT_ONCE", at_once)
        guard = image._engine.guard
        before = guard.newest
        assert image.pread(len(content), 0) == content
        assert guard.newest - before == -(-5 // at_once)
        assert guard.oldest() == guard.newest + 1

    def test_past_the_end_of_the_disk_there_is_nothing(self, image: jqcow.Image) -> None:
        """A walk may go there, a read may not."""
        runs = list(image._guest.reads.runs(MIB - CLUSTER, 3 * CLUSTER))
        assert sum(run.length for run in runs) == 3 * CLUSTER
        assert {run.kind for run in runs} == {UNALLOCATED}

    def test_a_failed_read_holds_nothing_back(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        """Q3: it has ended, and what it resolved may be used anew."""
        device.faults = FaultPlan(Fault(errno.EIO, call="pread"))
        with pytest.raises(OSError):
            image.pread(CLUSTER, 0)
        guard = image._engine.guard
        assert guard.oldest() == guard.newest + 1

    def test_while_it_runs_its_clusters_stay(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        """Q3: the request is in flight while the device reads."""
        guard = image._engine.guard
        oldest: list[int] = []
        device.faults = FaultPlan(Fault.delay(lambda: oldest.append(guard.oldest()), call="pread"))
        image.pread(CLUSTER, 0)
        assert oldest == [guard.newest]


class TestStreams:
    """The last compressed cluster is kept decompressed, until clusters come back."""

    CONTENT = bytes(range(256)) * (CLUSTER // 256)

    def test_read_piece_by_piece_it_is_decompressed_once(
        self, device: SimulatedDevice, image: jqcow.Image
    ) -> None:
        image.pwrite_compressed(self.CONTENT + b"q" * CLUSTER, MIB // 2)
        plan = counted_reads(device)
        for start in range(0, CLUSTER, SECTOR):
            assert image.pread(SECTOR, MIB // 2 + start) == self.CONTENT[start : start + SECTOR]
        assert plan.calls["pread"] == 1

    def test_another_cluster_is_another_stream(self, image: jqcow.Image) -> None:
        """Also in the same host cluster."""
        image.pwrite_compressed(self.CONTENT + b"q" * CLUSTER, MIB // 2)
        for _ in range(2):
            assert image.pread(CLUSTER, MIB // 2) == self.CONTENT
            assert image.pread(CLUSTER, MIB // 2 + CLUSTER) == b"q" * CLUSTER

    def test_a_host_cluster_that_came_back_is_read_anew(self, image: jqcow.Image) -> None:
        """It was freed, punched and packed into again: the same host offset, another stream."""
        first = MIB // 2 // CLUSTER
        reads = image._guest.reads
        image.pwrite_compressed(self.CONTENT, MIB // 2)
        image.flush()
        host = reads.entry(first).host
        assert image.pread(CLUSTER, MIB // 2) == self.CONTENT
        image.discard(CLUSTER, MIB // 2)
        for _ in range(3):
            image.flush()
            image.pwrite(b"x", 0)
        image.pwrite_compressed(b"n" * CLUSTER, MIB // 2)
        assert reads.entry(first).host == host
        assert image.pread(CLUSTER, MIB // 2) == b"n" * CLUSTER

    def test_after_an_undo_it_is_read_anew(self, device: SimulatedDevice, image: jqcow.Image) -> None:
        """What was undone is packed into again before any record."""
        image.pwrite_compressed(self.CONTENT, MIB // 2)
        image.pread(CLUSTER, MIB // 2)
        with pytest.raises(OSError), changing(image._engine):
            raise OSError(errno.EIO, "undone")
        plan = counted_reads(device)
        image.pread(CLUSTER, MIB // 2)
        assert plan.calls["pread"] == 1

    def test_a_damaged_stream_is_named_and_not_kept(
        self, device: SimulatedDevice, image: jqcow.Image
    ) -> None:
        image.pwrite_compressed(self.CONTENT, MIB // 2)
        host = image._guest.reads.entry(MIB // 2 // CLUSTER).host
        good = device.pread(SECTOR, host)
        device.pwrite(b"\xff" * SECTOR, host)
        with pytest.raises(CorruptionError) as caught:
            image.pread(1, MIB // 2)
        assert (caught.value.structure, caught.value.offset) == ("compressed cluster", host)
        device.pwrite(good, host)
        assert image.pread(CLUSTER, MIB // 2) == self.CONTENT


class TestBelow:
    """Unallocated clusters read from the backing file, as far as that reaches."""

    BELOW = b"b" * CLUSTER + bytes(2 * CLUSTER) + b"b" * (CLUSTER + SECTOR)

    @pytest.fixture
    def reads(self) -> Iterator[Reads]:
        """Show a disk below, data, zeros, and data that ends within a cluster, and over it our own."""
        with jqcow.open_device(overlay(), "r+", backing=Below(self.BELOW)) as image:
            image.pwrite(b"o" * CLUSTER, 8 * CLUSTER)
            image.pwrite_compressed(bytes(CLUSTER), 9 * CLUSTER)
            image.pwrite(b"o" * CLUSTER, 3 * CLUSTER)
            image.write_zeroes(CLUSTER, 3 * CLUSTER)
            yield image._guest.reads

    def read(self, reads: Reads, offset: int, length: int) -> bytes:
        buffer = bytearray(b"\xff" * length)
        reads.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def test_what_it_shows(self, reads: Reads) -> None:
        """Zeros past its end, and where the image hides it."""
        expected = self.BELOW[: 3 * CLUSTER] + bytes(CLUSTER) + b"b" * SECTOR + bytes(4 * CLUSTER - SECTOR)
        assert self.read(reads, 0, 8 * CLUSTER) == expected
        assert self.read(reads, 4 * CLUSTER + SECTOR - 1, 3) == b"b" + bytes(2)
        assert self.read(reads, MIB - 5, 5) == bytes(5)

    @pytest.mark.parametrize(
        ("first", "count", "is_zero"),
        [
            (0, 1, False),
            (1, 2, True),
            (1, 3, True),
            (2, 3, False),
            (4, 1, False),
            (5, 3, True),
            (7, 2, False),
            (9, 1, False),
            (10, 20, True),
        ],
        ids=[
            "data below",
            "zeros below",
            "zeros below and of its own",
            "data below behind them",
            "data up to the end below",
            "past the end below",
            "data of its own",
            "compressed zeros: nobody looks",
            "nothing at all",
        ],
    )
    def test_what_reads_as_zeros(self, reads: Reads, first: int, count: int, is_zero: bool) -> None:
        assert reads.reads_as_zeros(first * CLUSTER, count * CLUSTER) == is_zero
        if is_zero:
            assert not any(self.read(reads, first * CLUSTER, count * CLUSTER))

    def test_what_is_asked_ends_where_the_range_does(self, reads: Reads) -> None:
        assert reads.reads_as_zeros(4 * CLUSTER + SECTOR, CLUSTER)
        assert not reads.reads_as_zeros(4 * CLUSTER + SECTOR - 1, 1)

    def test_what_a_read_takes_from_below(self, reads: Reads) -> None:
        """Neither zeros there nor what the image has of its own."""
        found = [reads.reads_from_below(cluster * CLUSTER, CLUSTER) for cluster in range(10)]
        assert found == [True, False, False, False, True, False, False, False, False, False]
        assert reads.reads_from_below(CLUSTER, 4 * CLUSTER)
        reads.backing = None
        assert not reads.reads_from_below(0, MIB)
        assert self.read(reads, 0, CLUSTER) == bytes(CLUSTER)
