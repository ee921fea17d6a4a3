"""The image against a model, under any sequence of requests, reopenings and crashes that Hypothesis finds."""

from __future__ import annotations

import random
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import jqcow
from jqcow import _native
from jqcow.testing import CrashSpace, SectorModel, SimulatedDevice

SECTOR_BYTES = 512
JOURNAL_BYTES = 64 << 10
CLUSTERS_MAX = 40
GROWTH_SECTORS_MAX = 64
CRASH_STATES_TRIED = 12

fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
seeds = st.integers(min_value=0, max_value=2**32 - 1)


def counted_salts() -> Callable[[], bytes]:
    """Return a maker of salts that never repeats and needs no clock, so that a failure replays."""
    source = random.Random(0)
    return lambda: source.randbytes(16)


class ImageMachine(RuleBasedStateMachine):
    """One disk, one model. Positions are fractions of the disk, so that shrinking keeps them valid."""

    cluster_bytes = 4096
    dropped_barriers: frozenset[str] = frozenset()

    @initialize(share=st.floats(min_value=0, max_value=1), can_punch=st.booleans())
    def create(self, share: float, can_punch: bool) -> None:
        """Start with an empty image of any size."""
        self.new_salt = counted_salts()
        size = int(share * CLUSTERS_MAX * self.cluster_bytes / SECTOR_BYTES) * SECTOR_BYTES
        self.device = SimulatedDevice(can_punch=can_punch)
        self.device.drop_barriers.update(self.dropped_barriers)
        self.model = SectorModel(size)
        self.flushed_size = size
        self.image = jqcow.create_on_device(
            self.device,
            size,
            cluster_size=self.cluster_bytes,
            journal_size=JOURNAL_BYTES,
            new_salt=self.new_salt,
        )

    # Requests

    @rule(start=fractions, length=fractions, seed=seeds, fua=st.booleans())
    def pwrite(self, start: float, length: float, seed: int, fua: bool) -> None:
        """Write at any byte, any length."""
        offset, length_bytes = self.range_of(start, length)
        data = random.Random(seed).randbytes(length_bytes)
        with self.model.write(offset, data, durable=False):
            self.image.pwrite(data, offset)
        if fua:
            self.image.pwrite(b"", 0, fua=True)
            self.promise_everything()

    @rule(start=fractions, length=fractions, unmap=st.booleans())
    def write_zeroes(self, start: float, length: float, unmap: bool) -> None:
        """Zero any range."""
        offset, length_bytes = self.range_of(start, length)
        with self.model.zero(offset, length_bytes):
            self.image.write_zeroes(length_bytes, offset, unmap=unmap)

    @rule(start=fractions, length=fractions)
    def discard(self, start: float, length: float) -> None:
        """Discard any range: the clusters that it covers whole read as zeros."""
        offset, length_bytes = self.range_of(start, length)
        head = -(-offset // self.cluster_bytes) * self.cluster_bytes
        end = offset + length_bytes
        tail = end if end == self.image.size else end - end % self.cluster_bytes
        with self.model.discard(min(head, tail), max(0, tail - head)):
            self.image.discard(length_bytes, offset)

    @rule()
    def flush(self) -> None:
        """Flush: what was asked for is promised."""
        self.image.flush()
        self.promise_everything()

    @rule(count=st.integers(min_value=2, max_value=12), seed=seeds)
    def write_and_flush_often(self, count: int, seed: int) -> None:
        """Fill an epoch: the journal's other half is used, and the first one again."""
        chance = random.Random(seed)
        for _ in range(count):
            self.pwrite(chance.random(), chance.random() / 8, chance.randrange(2**32), fua=True)

    @rule()
    def checkpoint(self) -> None:
        """Bring everything home."""
        self.image.checkpoint()
        self.promise_everything()

    @precondition(lambda self: self.image.size < 2 * CLUSTERS_MAX * self.cluster_bytes)
    @rule(sectors=st.integers(min_value=0, max_value=GROWTH_SECTORS_MAX))
    def resize(self, sectors: int) -> None:
        """Grow the disk."""
        size = self.image.size + sectors * SECTOR_BYTES
        self.image.resize(size)
        self.model.resize(size)

    @rule()
    def reopen(self) -> None:
        """Close cleanly and open again."""
        self.image.close()
        assert self.image.recovered is None or self.image.closed
        self.promise_everything()
        self.open()
        assert self.image.recovered is None

    @rule(seed=seeds, pick=st.integers(min_value=0, max_value=CRASH_STATES_TRIED - 1))
    def crash(self, seed: int, pick: int) -> None:
        """Cut the power; go on with what recovery brings back."""
        states = list(CrashSpace(self.device.in_flight(), seed=seed).states(CRASH_STATES_TRIED))
        self.device = self.device.crash(states[pick % len(states)])
        self.come_back()

    @rule()
    def kill(self) -> None:
        """Kill the process: all that it wrote can be read, nothing more is durable."""
        self.device = self.device.killed()
        self.come_back()

    # Judgement

    @invariant()
    def reads_as_asked_for(self) -> None:
        """The running image is the model, and its refcounts are exact."""
        violations = self.model.expect_now(self.image.pread)
        assert not violations, str(violations[0])
        report = self.image.check()
        assert report.ok, str(report.findings[0])

    @invariant()
    def extents_tell_the_truth(self) -> None:
        """Extents cover the disk without a gap, and what they call zero reads as zeros."""
        position = 0
        for extent in self.image.extents():
            assert extent.offset == position and extent.length > 0
            position += extent.length
            content = self.image.pread(extent.length, extent.offset)
            if extent.kind == "data":
                assert extent.host_offset is not None
                assert self.device.pread(extent.length, extent.host_offset) == content
            else:
                assert extent.host_offset is None
                assert not any(content), f"{extent} does not read as zeros"
        assert position == self.image.size

    # What happens between requests

    def range_of(self, start: float, length: float) -> tuple[int, int]:
        """Return (offset, length) in bytes within the disk; half of the ranges reach its end."""
        offset = int(start * (self.image.size + 1))
        return offset, min(self.image.size - offset, int(length * 2 * (self.image.size - offset + 1)))

    def promise_everything(self) -> None:
        """All that has completed is durable."""
        with self.model.flush():
            self.flushed_size = self.image.size

    def open(self) -> None:
        """Open for writing."""
        self.device.reopen()
        self.image = jqcow.open_device(self.device, "r+", journal_size=JOURNAL_BYTES, new_salt=self.new_salt)

    def come_back(self) -> None:
        """Recover, judge, and take what is there as the truth."""
        size_before = self.image.size
        self.open()
        size = self.image.size
        assert self.flushed_size <= size <= size_before, f"the disk holds {size} bytes after a crash"
        violations = self.model.check(self.read_padded)
        assert not violations, str(violations[0])
        self.model.reset_to(self.image.pread(size, 0))
        self.flushed_size = size

    def read_padded(self, length: int, offset: int) -> bytes:
        """Read; what a crash cut off a disk that had grown reads as zeros."""
        there = max(0, min(length, self.image.size - offset))
        return self.image.pread(there, offset if there else 0) + bytes(length - there)


SETTINGS = settings(
    # The twins are some times slower; what they are asked is the same.
    max_examples=200 if _native.active() == "c" else 60,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("cluster_bytes", [512, 1024, 4096, 8192])
def test_image_is_its_model(cluster_bytes: int) -> None:
    machine = type("SizedMachine", (ImageMachine,), {"cluster_bytes": cluster_bytes})
    run_state_machine_as_test(machine, settings=SETTINGS)


@pytest.mark.parametrize("barrier", ["flush.record", "flush.data"])
def test_machine_notices_a_barrier_that_does_nothing(barrier: str) -> None:
    """The model has teeth: without a barrier that it should need, some example fails."""
    machine = type("CarelessMachine", (ImageMachine,), {"dropped_barriers": frozenset({barrier})})
    only_generate = settings(
        SETTINGS, max_examples=1000, phases=[Phase.generate], database=None, derandomize=True
    )
    with pytest.raises(Exception, match=r"holds|journal|refcount|L2 table"):
        run_state_machine_as_test(machine, settings=only_generate)
