"""Real signals at random moments: what Ctrl-C does to a program with threads."""

from __future__ import annotations

import gc
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

import jqcow
from jqcow.errors import PoisonedError
from jqcow.testing import SectorModel
from tests.threads.interrupts import TRACED, TRACED_TOO, Interrupted

CLUSTER = 4096
DISK = 64 * CLUSTER
INTERRUPTS = 150
OTHERS = 48 * CLUSTER
"""From here on the disk belongs to the other thread."""


class Alarm:
    """Raises `Interrupted` a random time after it was set, but only out of jqcow's own code.

    Python itself drops an exception that comes in a finaliser or in a callback of the collector, which may
    run below any call. Such an alarm goes off again; one that is lost in any other way fails the test.
    """

    def __init__(self) -> None:
        self.armed = False
        self.delivered = 0
        self.dropped = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self.armed:
            return
        if self._is_inside(frame):
            self.armed = False
            self.delivered += 1
            raise Interrupted
        signal.setitimer(signal.ITIMER_REAL, 0.0001)

    def _is_inside(self, frame: FrameType | None) -> bool:
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(TRACED) or name in TRACED_TOO:
                return True
            frame = frame.f_back
        return False

    def set(self, seconds: float) -> None:
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def clear(self) -> None:
        self.armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def hear_of_dropped(self, dropped: sys.UnraisableHookArgs) -> None:
        """Serve as ``sys.unraisablehook``."""
        if isinstance(dropped.exc_value, Interrupted):
            self.dropped += 1
            self.delivered -= 1
        else:
            sys.__unraisablehook__(dropped)


class Program:
    """The main thread's work: random calls, each told to a model first."""

    def __init__(self, image: jqcow.Image, model: SectorModel, seed: int) -> None:
        self.image = image
        self.model = model
        self.random = random.Random(seed)
        self.count = seed << 16
        self.transaction: dict[int, bytes] = {}
        """The sectors of the newest change, if that is a transaction: bytes by guest offset."""

    def step(self) -> None:
        self.transaction = {}
        self.random.choice((self.write, self.write, self.zero, self.discard, self.flush, self.commit))()

    def part(self, alignment: int) -> tuple[int, int]:
        start = self.random.randrange(OTHERS // alignment)
        length = self.random.randint(1, min(5 * CLUSTER, OTHERS - start * alignment) // alignment)
        return length * alignment, start * alignment

    def data(self, length: int) -> bytes:
        self.count += 1
        return self.count.to_bytes(4, "big") * (length // 4)

    def write(self) -> None:
        length, offset = self.part(512)
        data = self.data(length)
        with self.model.write(offset, data):
            self.image.pwrite(data, offset)

    def zero(self) -> None:
        length, offset = self.part(512)
        unmap = self.random.random() < 0.5
        with self.model.zero(offset, length):
            self.image.write_zeroes(length, offset, unmap=unmap)

    def discard(self) -> None:
        length, offset = self.part(CLUSTER)
        with self.model.discard(offset, length):
            self.image.discard(length, offset)

    def flush(self) -> None:
        mark = self.model.flush_begin()
        self.image.flush()
        self.model.flush_end(mark)

    def commit(self) -> None:
        """Two writes that are there together or not at all."""
        (length, offset), (length2, offset2) = self.part(512), self.part(512)
        first, second = self.data(length), self.data(length2)
        self.transaction = sectors_of(offset, first) | sectors_of(offset2, second)
        with (
            self.model.write(offset, first),
            self.model.write(offset2, second),
            self.image.transaction() as transaction,
        ):
            transaction.pwrite(first, offset)
            point = transaction.savepoint()
            transaction.pwrite(second[: length // 2], offset)
            point.rollback()
            transaction.pwrite(second, offset2)
        # What the two have in common holds the second.
        with self.model.write(offset2, second):
            pass

    def judge_reopened(self) -> None:
        """Nothing that was acknowledged is lost, and of the newest transaction all is there or nothing.

        Nothing else is written while a transaction is the newest change, so none of it can be written over.
        """
        content = self.image.pread(self.model.size_bytes, 0)
        violations = self.model.check(lambda length, offset: content[offset : offset + length])
        assert not violations, violations[0]
        found = {content[offset : offset + 512] == data for offset, data in self.transaction.items()}
        assert len(found) < 2, "a part of a transaction is there"
        self.model.reset_to(content)


def sectors_of(offset: int, data: bytes) -> dict[int, bytes]:
    """Return the sectors of a write: bytes by guest offset."""
    return {offset + at: data[at : at + 512] for at in range(0, len(data), 512)}


class Sitting:
    """An image under interrupts: what is open is replaced when it refuses to work."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = SectorModel(OTHERS)
        self.image = jqcow.create(path, DISK, cluster_size=CLUSTER, journal_size=65536)
        self.other = OtherThread(self.image)
        self.other.start()
        self.reopened = 0
        self.interrupted = False
        """True if the image that is open met an interrupt."""

    def interrupt(self, alarm: Alarm, seed: int) -> None:
        """Interrupt the program once, and judge what is left of the image."""
        program = Program(self.image, self.model, seed)
        try:
            run_until_interrupted(alarm, program.step, seed)
            self.interrupted = True
            self.judge_running()
        except PoisonedError:
            # What the last interrupt cut off may be found by a call of this one.
            assert not alarm.armed or self.interrupted, "the image refused to work before any interrupt"
            self.reopen()
            program.image = self.image
            program.judge_reopened()
            self.judge_running()

    def judge_running(self) -> None:
        violations = self.model.expect_now(self.image.pread)
        assert not violations, violations[0]
        report = self.image.check()
        assert not report.counts, report.findings
        self.other.require_progress()

    def reopen(self) -> None:
        """Leave the image as it is, and recover it. The model has not been told of the outcome yet."""
        self.other.require_end()
        self.image.close()
        self.image = jqcow.open(self.path, "r+", journal_size=65536)
        self.other = self.other.successor(self.image)
        self.other.start()
        self.reopened += 1
        self.interrupted = False

    def end(self) -> None:
        self.other.stop.set()
        self.other.join(20)
        assert not self.other.is_alive()


@pytest.mark.parametrize("collector", ["quiet", "busy"])
def test_interrupted_by_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collector: str) -> None:
    """Most interrupts come while something is waited for, and leave the image at work."""
    sitting = Sitting(tmp_path / "disk.qcow2")
    alarm = Alarm()
    monkeypatch.setattr(sys, "unraisablehook", alarm.hear_of_dropped)
    before = signal.signal(signal.SIGALRM, alarm.handle)
    thresholds = gc.get_threshold()
    if collector == "busy":
        gc.callbacks.append(dawdle)
        gc.set_threshold(20)
    try:
        for seed in range(INTERRUPTS):
            try:
                sitting.interrupt(alarm, seed)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
    finally:
        alarm.clear()
        signal.signal(signal.SIGALRM, before)
        gc.set_threshold(*thresholds)
        if collector == "busy":
            gc.callbacks.remove(dawdle)
        sitting.end()
    # An iteration that finds what the one before it left may end before its own interrupt.
    assert alarm.delivered > INTERRUPTS * 9 // 10
    assert alarm.dropped > 0 or collector == "quiet"
    assert sitting.reopened < INTERRUPTS * 3 // 4
    sitting.image.close()
    subprocess.run(["qemu-img", "check", "-q", sitting.path], check=True)
    with jqcow.open(sitting.path) as found:
        assert not sitting.model.expect_now(found.pread)


def dawdle(phase: str, _information: dict[str, int]) -> None:
    """Be a callback of the collector that takes long enough to be interrupted."""
    for _ in range(200):
        pass


def run_until_interrupted(alarm: Alarm, step: Callable[[], None], seed: int) -> None:
    waits = random.Random(f"alarm {seed}")
    alarm.set(waits.uniform(0.00001, 0.003))
    try:
        while True:
            dropped = alarm.dropped
            step()
            if not alarm.armed:
                assert alarm.dropped > dropped, f"seed {seed}: an interrupt was swallowed"
                alarm.set(waits.uniform(0.00001, 0.003))
    except Interrupted:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class OtherThread(threading.Thread):
    """Writes and flushes in its own part; nobody's interrupt stops it, unless the image refuses to work."""

    def __init__(self, image: jqcow.Image) -> None:
        super().__init__(daemon=True)
        self.image = image
        self.model = SectorModel(DISK - OTHERS)
        self.stop = threading.Event()
        self.rounds = 1
        self.moved_on = threading.Condition()
        self.error: BaseException | None = None

    def successor(self, image: jqcow.Image) -> OtherThread:
        """Return who goes on with the image opened again; what was flushed must be in it."""
        content = image.pread(self.model.size_bytes, OTHERS)
        violations = self.model.check(lambda length, offset: content[offset : offset + length])
        assert not violations, f"the other thread's: {violations[0]}"
        other = OtherThread(image)
        other.model.reset_to(content)
        other.rounds = self.rounds
        return other

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                self.step()
                with self.moved_on:
                    self.rounds += 1
                    self.moved_on.notify_all()
        except BaseException as error:
            with self.moved_on:
                self.error = error
                self.moved_on.notify_all()

    def step(self) -> None:
        data, offset = self.rounds.to_bytes(4, "big") * 512, self.rounds % 7 * 2048
        with self.model.write(offset, data):
            self.image.pwrite(data, OTHERS + offset)
        with self.model.flush():
            self.image.flush()
        assert self.image.pread(2048, OTHERS + offset) == data

    def require_progress(self) -> None:
        with self.moved_on:
            rounds = self.rounds
            assert self.moved_on.wait_for(lambda: self.rounds > rounds or self.error, 20), "blocked"
        if self.error is not None:
            raise self.error

    def require_end(self) -> None:
        """The image is in doubt: the thread must find that out by itself."""
        self.join(20)
        assert not self.is_alive(), "blocked"
        if not isinstance(self.error, PoisonedError):
            raise AssertionError("the image refuses one thread, and not the other") from self.error
