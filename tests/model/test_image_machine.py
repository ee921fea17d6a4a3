"""The image against a model, under any sequence of requests, reopenings and crashes that Hypothesis finds."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

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
from jqcow.image.transaction import Savepoint, Transaction
from jqcow.testing import SECTOR_BYTES, CrashSpace, SectorModel, SimulatedDevice
from tests.support.operations import Discard, Disk, Request, Write, WriteZeroes, apply

JOURNAL_BYTES = 64 << 10
CLUSTERS_MAX = 40
GROWTH_SECTORS_MAX = 64
CRASH_STATES_TRIED = 12

fractions = st.floats(min_value=0, max_value=1, exclude_max=True)
seeds = st.integers(min_value=0, max_value=2**32 - 1)
Step = tuple[str, float, float, int]
steps = st.tuples(
    st.sampled_from(("write", "write", "zeroes", "discard", "resize", "savepoint", "return")),
    fractions,
    fractions,
    seeds,
)


class Undone(Exception):
    """Leaves a transaction."""


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
        size = part_of(CLUSTERS_MAX * self.cluster_bytes, share)
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
        apply(random_write(self.image, start, length, seed), self.image, self.model)
        if fua:
            self.image.pwrite(b"", 0, fua=True)
            self.promise_everything()

    @rule(start=fractions, length=fractions, unmap=st.booleans())
    def write_zeroes(self, start: float, length: float, unmap: bool) -> None:
        """Zero any range."""
        apply(WriteZeroes(*range_of(self.image.size, start, length), unmap), self.image, self.model)

    @rule(start=fractions, length=fractions)
    def discard(self, start: float, length: float) -> None:
        """Discard any range: the clusters that it covers whole read as zeros."""
        request = Discard(*range_of(self.image.size, start, length))
        apply(request, self.image, self.model, self.cluster_bytes)

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

    @rule(share=fractions)
    def shrink(self, share: float) -> None:
        """Cut the disk off anywhere; that is durable on return."""
        size = part_of(self.image.size, share)
        if size < self.image.size:
            self.image.resize(size)
            self.model.resize(size)
            self.promise_everything()

    @rule(script=st.lists(steps, max_size=8), ending=st.sampled_from(("commit", "rollback", "exception")))
    def transaction(self, script: list[Step], ending: Literal["commit", "rollback", "exception"]) -> None:
        """All of it is there, and durable, or nothing is; meanwhile nobody else sees it."""
        self.run_transaction(script, ending)

    def run_transaction(self, script: list[Step], ending: str) -> None:
        with suppress(Undone), self.image.transaction() as transaction:
            # Entering commits what was staged.
            self.promise_everything()
            draft = self.new_draft(transaction)
            for step in script:
                draft.take(step)
                self.reads_as_asked_for()
            if ending == "rollback":
                transaction.rollback()
            elif ending == "exception":
                raise Undone
        if ending == "commit":
            assert transaction.receipt is not None
            self.adopt(draft)
            self.promise_everything()

    def new_draft(self, transaction: Transaction) -> Draft:
        """Return what follows a transaction."""
        return Draft(transaction, self.model.copy(), self.cluster_bytes)

    def adopt(self, draft: Draft) -> None:
        """The transaction is committed: what it holds is there."""
        self.model = draft.model

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
        """Extents cover the disk without a gap; what they call data is there, what they call zero is zero."""
        position = 0
        for extent in self.image.extents():
            assert extent.offset == position and extent.length > 0
            position += extent.length
            content = self.image.pread(extent.length, extent.offset)
            if extent.kind == "data" and extent.depth == 0:
                assert extent.host_offset is not None
                assert self.device.pread(extent.length, extent.host_offset) == content
            elif extent.kind in ("zero", "unallocated"):
                assert extent.depth or extent.host_offset is None
                assert not any(content), f"{extent} does not read as zeros"
        assert position == self.image.size
        if self.image.reads_as_zeros(position, 0):
            assert not any(self.image.pread(position, 0))

    # What happens between requests

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


class Draft:
    """An open transaction beside what its own reads must return."""

    def __init__(self, transaction: Transaction, model: SectorModel, cluster_bytes: int) -> None:
        self.transaction = transaction
        self.model = model
        self.cluster_bytes = cluster_bytes
        self.savepoints: list[tuple[Savepoint, SectorModel]] = []

    def apply(self, request: Request) -> None:
        """Do a request."""
        apply(request, self.transaction, self.model, self.cluster_bytes)

    def take(self, step: Step) -> None:
        """Do one thing inside; what is read is right afterwards."""
        kind, start, length, seed = step
        place = range_of(self.transaction.size, start, length)
        if kind == "write":
            self.apply(random_write(self.transaction, start, length, seed))
        elif kind == "zeroes":
            self.apply(WriteZeroes(*place, bool(seed % 2)))
        elif kind == "discard":
            self.apply(Discard(*place))
        elif kind == "resize":
            size = part_of(CLUSTERS_MAX * self.cluster_bytes, start)
            self.transaction.resize(size)
            self.model.resize(size)
        elif kind == "savepoint":
            self.savepoints.append((self.transaction.savepoint(), self.model.copy()))
        elif self.savepoints:
            savepoint, model = self.savepoints[seed % len(self.savepoints)]
            savepoint.rollback()
            self.model = model.copy()
            del self.savepoints[seed % len(self.savepoints) + 1 :]
        assert self.transaction.size == self.model.size_bytes
        violations = self.model.expect_now(self.transaction.pread)
        assert not violations, str(violations[0])


def range_of(size: int, start: float, length: float) -> tuple[int, int]:
    """Return (offset, length) in bytes within a disk of ``size``; half of the ranges reach its end."""
    offset = int(start * (size + 1))
    return offset, min(size - offset, int(length * 2 * (size - offset + 1)))


def part_of(size: int, share: float) -> int:
    """Return a share of a size, in whole sectors."""
    return int(share * size / SECTOR_BYTES) * SECTOR_BYTES


def random_write(disk: Disk, start: float, length: float, seed: int) -> Write:
    """Return a write of random bytes."""
    offset, length_bytes = range_of(disk.size, start, length)
    return Write(offset, random.Random(seed).randbytes(length_bytes))


SETTINGS = settings(
    # The twins are some times slower; what they are asked is the same.
    max_examples=40 if _native.active() == "c" else 20,
    deadline=None,
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
