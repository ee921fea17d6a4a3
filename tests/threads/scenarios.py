"""What an image is doing when something goes wrong, and what must hold afterwards.

A scenario brings a small image into an interesting state, then does one thing. Whatever cuts that short, the
image must be fit for use: each promise is looked at by `Trial.judge`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache

import jqcow
from jqcow.errors import PoisonedError
from jqcow.testing import SectorModel, SimulatedDevice, enumerate_states
from tests.support import inside
from tests.support.beside import Others, is_taken
from tests.support.operations import Discard, PackedWrite, Write, WriteZeroes, apply
from tests.support.patients import check

SECTOR = 512
CLUSTER = 4096
DISK = 48 * CLUSTER
JOURNAL = 65536

Act = Callable[["Trial"], None]


def filled(byte: int, length: int) -> bytes:
    """Return bytes that tell their sector, too: shifted data would be seen."""
    return b"".join(bytes([byte, index % 251]) * (SECTOR // 2) for index in range(-(-length // SECTOR)))[
        :length
    ]


@cache
def prepared_image() -> bytes:
    """Return a clean image with some clusters in use, and one freed in the middle."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, DISK, cluster_size=CLUSTER, journal_size=JOURNAL) as image:
        image.pwrite(filled(1, 12 * CLUSTER), 0)
        image.pwrite(filled(2, 3 * CLUSTER), 20 * CLUSTER)
    with jqcow.open_device(_reopened(device), "r+") as image:
        image.discard(2 * CLUSTER, 4 * CLUSTER)
    return device.content()


def _reopened(device: SimulatedDevice) -> SimulatedDevice:
    device.reopen()
    return device


class Trial:
    """One image on a device, with a model that follows it."""

    def __init__(self, *, live: bool) -> None:
        self.device = SimulatedDevice(prepared_image())
        self.image = jqcow.open_device(self.device, "r+", journal_size=JOURNAL)
        self.model = SectorModel(DISK, self.image.pread(DISK, 0))
        self.outcomes: list[bytes] = []
        """For an atomic change: the contents that the whole disk may have afterwards."""
        self.noted_from: bytes | None = None
        """The disk when a bitmap began to take note of changes."""
        self.may_be_poisoned = True
        """False where the interrupt comes while the device is waited for: that leaves nothing in doubt."""
        self.durable_bytes: int | None = None
        """Size of the disk before a growth that no flush has made durable."""
        if live:
            self.write(3, CLUSTER, 30 * CLUSTER)
            self.flush()
            self.write(4, 2 * CLUSTER, 31 * CLUSTER)

    # What a program does

    def write(self, byte: int, length: int, offset: int) -> None:
        apply(Write(offset, filled(byte, length)), self.image, self.model)

    def write_compressed(self, byte: int, length: int, offset: int) -> None:
        apply(PackedWrite(offset, filled(byte, length)), self.image, self.model)

    def zero(self, length: int, offset: int, *, unmap: bool) -> None:
        apply(WriteZeroes(offset, length, unmap), self.image, self.model)

    def discard(self, length: int, offset: int) -> None:
        apply(Discard(offset, length), self.image, self.model, CLUSTER)

    def flush(self) -> None:
        with self.model.flush():
            self.image.flush()

    def take_note(self) -> None:
        """Have a bitmap take note of what changes from now on."""
        self.flush()
        self.image.bitmaps.add("noted", CLUSTER)
        self.flush()
        self.noted_from = self.image.pread(self.image.size, 0)

    def settle(self) -> None:
        """Wait for what is staged: then an atomic change has two outcomes for the whole disk."""
        self.flush()
        self.outcomes = [self.image.pread(self.image.size, 0)]

    def expect(self, *changes: tuple[int, bytes]) -> None:
        """These writes, all of them, are the other outcome."""
        content = bytearray(self.outcomes[0])
        for offset, data in changes:
            content[offset : offset + len(data)] = data
        self.outcomes.append(bytes(content))

    # What must hold

    def judge(self) -> None:
        """The image works on, or refuses everything; reopened it keeps every promise. No lock is taken."""
        inside.require_free_locks(self.image, is_taken)
        if not self.image.closed and not inside.is_poisoned(self.image):
            try:
                self.judge_open_image()
                with self.model.flush():
                    self.image.close()
            except PoisonedError:
                # What was cut off is found by the first call that meets it.
                assert inside.is_in_doubt(self.image), "an image refused to work, and is not in doubt"
        if not self.image.closed:
            self.judge_refusal()
        self.judge_closed_image()

    def judge_refusal(self) -> None:
        """An image in doubt refuses every call; one that is read-only since a barrier failed can be read."""
        assert self.may_be_poisoned, "the image must work on"
        calls: list[Callable[[], object]] = [
            lambda: self.image.pwrite(b"refused", 0),
            lambda: self.image.discard(CLUSTER, 0),
            self.image.flush,
        ]
        if inside.is_in_doubt(self.image):
            calls += [lambda: self.image.pread(1, 0), self.image.info, self.image.check]
        for call in calls:
            with contextlib.suppress(PoisonedError):
                call()
                raise AssertionError("an image that refuses to work was used")
        self.image.close()

    def judge_open_image(self) -> None:
        report = self.image.check()
        assert not report.counts, report.findings
        self.judge_content()
        self.work_in_another_thread()
        self.durable_bytes = None
        self.judge_crash_states()
        report = self.image.check()
        assert not report.counts, report.findings

    def judge_content(self) -> None:
        """Every sector is as it was or as asked for; the disk of an atomic change is so as a whole."""
        content = self.image.pread(self.image.size, 0)
        if self.outcomes:
            assert content in self.outcomes, "an atomic change happened in part"
            self.model.reset_to(content)
            self.durable_bytes = len(self.outcomes[0])
            self.outcomes = []
        violations = self.model.expect_now(self.image.pread)
        assert not violations, violations[0]
        self.judge_bitmap(self.image)

    def judge_bitmap(self, image: jqcow.Image) -> None:
        """A bitmap calls dirty, at least, what is another than it was."""
        before = self.noted_from
        if before is None:
            return
        dirty = {
            start
            for part in image.bitmaps.dirty_extents("noted")
            for start in range(part.offset, part.end, CLUSTER)
        }
        content = image.pread(image.size, 0)
        for start in range(0, len(content), CLUSTER):
            is_same = content[start : start + CLUSTER] == before[start : start + CLUSTER]
            assert is_same or start in dirty, f"a bitmap took no note of a change at {start:#x}"

    def work_in_another_thread(self) -> None:
        """Others are not blocked; what they flush is durable."""

        def work() -> None:
            self.write(9, 3 * CLUSTER, 8 * CLUSTER + SECTOR)
            self.discard(CLUSTER, 0)
            with self.image.transaction() as transaction:
                apply(Write(20 * CLUSTER, filled(10, 2 * CLUSTER)), transaction, self.model)
            self.write(11, CLUSTER, 2 * CLUSTER)
            self.flush()

        with Others(work):
            pass

    def judge_crash_states(self) -> None:
        """What is acknowledged survives a power cut now, and one a little later."""
        self.judge_crash(SimulatedDevice(self.device.durable_content()), self.model)
        self.write(12, 2 * CLUSTER, 25 * CLUSTER)
        for state in enumerate_states(self.device, seed=1, budget=4):
            self.judge_crash(self.device.crash(state), self.model.copy())

    def judge_crash(self, device: SimulatedDevice, model: SectorModel) -> None:
        with jqcow.open_device(device, "r+") as image:
            if self.outcomes:
                assert image.pread(image.size, 0) in self.outcomes, "an atomic change happened in part"
            else:
                if image.size < model.size_bytes and image.size == self.durable_bytes:
                    model = model.copy()
                    model.resize(image.size)
                violations = model.check(image.pread)
                assert not violations, violations[0]
            self.judge_bitmap(image)
            report = image.check()
            assert not report.counts, report.findings

    def judge_closed_image(self) -> None:
        """The next program finds what was flushed, and leaves a sound image."""
        device = self.device.killed()
        self.judge_crash(device, self.model)
        report = check(device.content())
        assert not report.counts, report.findings


# The scenarios


def allocating_write(trial: Trial) -> None:
    trial.write(5, 2 * CLUSTER + SECTOR, 14 * CLUSTER + SECTOR)


def overwrite(trial: Trial) -> None:
    trial.write(6, 3 * CLUSTER, SECTOR)


def write_zeroes(trial: Trial) -> None:
    trial.zero(4 * CLUSTER, SECTOR, unmap=False)


def write_zeroes_unmap(trial: Trial) -> None:
    trial.zero(3 * CLUSTER, 20 * CLUSTER, unmap=True)


def discard(trial: Trial) -> None:
    trial.discard(6 * CLUSTER, 2 * CLUSTER)


def write_over_discarded(trial: Trial) -> None:
    trial.discard(3 * CLUSTER, 0)
    trial.flush()
    trial.write(7, 4 * CLUSTER, 4 * CLUSTER)
    trial.flush()


def flush(trial: Trial) -> None:
    trial.flush()


def flush_nothing(trial: Trial) -> None:
    trial.flush()
    trial.flush()


def checkpoint(trial: Trial) -> None:
    with trial.model.flush():
        trial.image.checkpoint()


def close(trial: Trial) -> None:
    with trial.model.flush():
        trial.image.close()


def read(trial: Trial) -> None:
    trial.image.pread(DISK, 0)
    list(trial.image.extents())
    trial.image.info()


def commit(trial: Trial) -> None:
    trial.settle()
    trial.expect(
        (0, filled(7, 3 * CLUSTER)), (14 * CLUSTER, filled(8, CLUSTER)), (20 * CLUSTER, bytes(CLUSTER))
    )
    with trial.image.transaction() as transaction:
        transaction.pwrite(filled(7, 3 * CLUSTER), 0)
        transaction.pwrite(filled(8, CLUSTER), 14 * CLUSTER)
        transaction.discard(CLUSTER, 20 * CLUSTER)


def commit_nothing(trial: Trial) -> None:
    trial.settle()
    with trial.image.transaction():
        pass


def rollback(trial: Trial) -> None:
    trial.settle()
    with trial.image.transaction() as transaction:
        transaction.pwrite(filled(7, 3 * CLUSTER), CLUSTER)
        transaction.rollback()


def leave_by_exception(trial: Trial) -> None:
    trial.settle()
    try:
        with trial.image.transaction() as transaction:
            transaction.pwrite(filled(7, 3 * CLUSTER), CLUSTER)
            transaction.write_zeroes(CLUSTER, 20 * CLUSTER)
            raise KeyError
    except KeyError:
        pass


def savepoint(trial: Trial) -> None:
    trial.settle()
    trial.expect((0, filled(7, CLUSTER)), (16 * CLUSTER, filled(8, CLUSTER)))
    with trial.image.transaction() as transaction:
        transaction.pwrite(filled(7, CLUSTER), 0)
        point = transaction.savepoint()
        transaction.pwrite(filled(13, 2 * CLUSTER), 0)
        transaction.discard(CLUSTER, 20 * CLUSTER)
        point.rollback()
        transaction.pwrite(filled(8, CLUSTER), 16 * CLUSTER)


def grow(trial: Trial) -> None:
    trial.settle()
    trial.outcomes.append(trial.outcomes[0] + bytes(700 * CLUSTER))
    trial.image.resize(DISK + 700 * CLUSTER)


def shrink(trial: Trial) -> None:
    trial.settle()
    trial.outcomes.append(trial.outcomes[0][: 31 * CLUSTER])
    trial.image.resize(31 * CLUSTER)


def snapshot_create(trial: Trial) -> None:
    trial.settle()
    trial.image.create_snapshot("kept")


def snapshot_apply(trial: Trial) -> None:
    """Back to a snapshot, and again: what was written in between is never seen."""
    trial.settle()
    trial.image.create_snapshot("kept")
    with trial.image.transaction() as transaction:
        transaction.apply_snapshot("kept")
        transaction.pwrite(filled(7, CLUSTER), CLUSTER)
        transaction.apply_snapshot("kept")


def snapshot_delete(trial: Trial) -> None:
    trial.settle()
    trial.image.create_snapshot("kept")
    trial.expect((0, filled(7, 3 * CLUSTER)))
    with trial.image.transaction() as transaction:
        transaction.pwrite(filled(7, 3 * CLUSTER), 0)
        transaction.delete_snapshot("kept")


def write_over_shared(trial: Trial) -> None:
    """Data and a table that a snapshot has too: written, zeroed, discarded."""
    trial.flush()
    trial.image.create_snapshot("kept")
    trial.write(7, 2 * CLUSTER, SECTOR)
    trial.zero(2 * CLUSTER, 4 * CLUSTER, unmap=False)
    trial.discard(2 * CLUSTER, 20 * CLUSTER)
    trial.flush()


def compressed(trial: Trial) -> None:
    """Packed side by side, over data and over each other, and then written to."""
    trial.write_compressed(7, 3 * CLUSTER, CLUSTER)
    trial.write_compressed(8, 2 * CLUSTER, 2 * CLUSTER)
    trial.write(9, SECTOR, 2 * CLUSTER + SECTOR)
    trial.flush()
    trial.discard(2 * CLUSTER, CLUSTER)


def move(trial: Trial) -> None:
    """A transaction whose record is larger than a half of the journal, which therefore moves."""
    trial.settle()
    trial.expect((0, filled(7, CLUSTER)))
    table_reach = CLUSTER // 8 * CLUSTER
    with trial.image.transaction() as transaction:
        transaction.resize(DISK + 11 * table_reach)
        for number in range(1, 11):
            transaction.pwrite(filled(8, SECTOR), number * table_reach)
        transaction.pwrite(filled(7, CLUSTER), 0)
        transaction.resize(DISK)


def noted_writes(trial: Trial) -> None:
    """In place, into new clusters, in a cluster that is dirty already; zeroed and discarded."""
    trial.take_note()
    trial.write(7, 2 * CLUSTER, SECTOR)
    trial.write(8, SECTOR, 2 * SECTOR)
    trial.write(8, CLUSTER, 40 * CLUSTER)
    trial.zero(CLUSTER, 20 * CLUSTER, unmap=False)
    trial.discard(CLUSTER, 9 * CLUSTER)
    trial.flush()
    trial.write(9, SECTOR, 11 * CLUSTER)


def noted_commit(trial: Trial) -> None:
    trial.take_note()
    trial.settle()
    trial.expect((SECTOR, filled(7, 2 * CLUSTER)))
    with trial.image.transaction() as transaction:
        transaction.pwrite(filled(7, 2 * CLUSTER), SECTOR)


SCENARIOS: tuple[Act, ...] = (
    allocating_write, overwrite, write_zeroes, write_zeroes_unmap, discard, write_over_discarded, flush,
    flush_nothing, checkpoint, close, read, commit, commit_nothing, rollback, leave_by_exception, savepoint,
    grow, shrink, snapshot_create, snapshot_apply, snapshot_delete, write_over_shared, compressed, move,
    noted_writes, noted_commit,
)  # fmt: skip
