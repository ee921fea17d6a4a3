"""Runs of real writers under the recorder, and the laboratory's judgement of what was recorded."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jqcow
from jqcow.testing import CrashState, LabOptions, Laboratory, Ledger, SimulatedDevice, Workload
from tests.outside.history import Expectation
from tests.outside.recorder import Event, Message, RecordedDevice, Recording, parse_log, record
from tests.outside.writer import JOURNAL_BYTES
from tests.support.patients import check

ROOT = Path(__file__).resolve().parents[2]
CLUSTER_SIZES = (512, 4096, 65536)
CLUSTERS_ON_DISK = {512: 384, 4096: 96, 65536: 16}


def environment() -> dict[str, str]:
    """Return the environment of a writer: it imports from this checkout, and writes no compiled modules."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def writer_command(image: Path, seed: int, *options: str | int) -> list[str]:
    """Return the command that runs a writer; ``options`` as in writer.py."""
    arguments = [str(image), "--seed", str(seed), *map(str, options)]
    return [sys.executable, "-m", "tests.outside.writer", *arguments]


@dataclass(frozen=True)
class Run:
    """One recorded process. ``found`` is the disk as it found it, None where it made the image."""

    seed: int
    recording: Recording
    status: int
    found: bytes | None


@dataclass(frozen=True)
class Session:
    """Recorded processes on one image, one after the other; ``content`` is the file that they left."""

    name: str
    disk_bytes: int
    runs: tuple[Run, ...]
    content: bytes

    def workload(self) -> Workload[Expectation]:
        """Return the recording as a workload for the laboratory, from the moment the image exists."""
        return Workload(self.name, self._run, lambda: Expectation(self.disk_bytes), self._make_device)

    def replayed_content(self) -> bytes:
        """Return the file as the recorded calls make it, from nothing."""
        device = RecordedDevice()
        for run in self.runs:
            for event in run.recording.events:
                device.take(event)
        return device.content()

    def _make_device(self) -> SimulatedDevice:
        device = RecordedDevice()
        for event in self._events_of_creation():
            device.take(event)
        return device

    def _events_of_creation(self) -> list[Event]:
        """Return the events up to the end of creation: nobody was told of the image before."""
        events = self.runs[0].recording.events
        return events[: events.index(Message({"do": "opened"}))]

    def _run(self, device: SimulatedDevice, expectation: Expectation) -> None:
        if not isinstance(device, RecordedDevice):
            raise TypeError("recorded barriers take a recorded device")
        skipped = len(self._events_of_creation())
        for run in self.runs:
            _play(run, run.recording.events[skipped:], device, expectation)
            skipped = 0


def _play(run: Run, events: Iterable[Event], device: RecordedDevice, expectation: Expectation) -> None:
    """Let the device and the expectation follow the events of one process."""
    label = "open"
    for event in events:
        if not isinstance(event, Message):
            device.take(event, label=label)
            continue
        message = event.content
        if message.get("do") == "opened":
            # Until now recovery ran: the promises were still those of the process before.
            expectation.seed = run.seed
            if run.found is not None:
                expectation.found(run.found)
        expectation.tell(message)
        label = "close" if "done" in message and not expectation.in_transaction else message.get("do", label)


def record_session(
    folder: Path,
    seed: int,
    *,
    cluster_bytes: int | None = None,
    operations: int = 40,
    threads: int = 1,
    runs: int = 2,
    inject: str | None = None,
) -> Session:
    """Record writers on a new image in ``folder``; ``seed`` chooses what they do.

    All but the last run end without closing the image, so that the next one recovers it. The last one closes
    it, for even seeds. ``inject`` applies to the last run; see `record`.
    """
    random = Random(seed)
    cluster_bytes = cluster_bytes or random.choice(CLUSTER_SIZES)
    disk_bytes = cluster_bytes * CLUSTERS_ON_DISK[cluster_bytes]
    image = folder / "image.qcow2"
    recorded: list[Run] = []
    for number in range(runs):
        last = number == runs - 1
        options: list[str | int] = ["--operations", operations, "--threads", threads]
        options += ["--end", "close" if last and seed % 2 == 0 else "exit"]
        found = None
        if number:
            found = read_disk(image)
        else:
            options += ["--create", disk_bytes, "--cluster-size", cluster_bytes]
        log = folder / "calls.log"
        command = writer_command(image, seed + number, *options)
        status = record(command, log, environment=environment(), inject=inject if last else None)
        recorded.append(Run(seed + number, parse_log(log, image), status, found))
        log.unlink()
    name = f"seed {seed}, clusters of {cluster_bytes}, {threads} threads"
    return Session(name, disk_bytes, tuple(recorded), image.read_bytes())


def read_disk(image: Path) -> bytes:
    """Return the whole disk as an opening for reading sees it."""
    with jqcow.open(image, "r") as opened:
        return opened.pread(opened.size, 0)


# Judgement


def recover_and_close(device: SimulatedDevice) -> None:
    """Recover a crashed image, to its clean end."""
    jqcow.open_device(device, "r+", journal_size=JOURNAL_BYTES).close()


def judge(device: SimulatedDevice, expectation: Expectation, state: CrashState) -> None:
    """Raise AssertionError, or what the engine raises, if a crashed image breaks a promise."""
    image = jqcow.open_device(device, "r+", journal_size=JOURNAL_BYTES)
    report = image.check()
    assert report.ok, f"after recovery: {report.findings[:2]}"
    violations = expectation.check(image.pread)
    assert not violations, "; ".join(map(str, violations[:2]))
    image.close()
    content = device.content()
    report = check(content)
    assert report.ok, f"after closing: {report.findings[:2]}"


def crash(
    session: Session,
    ledger: Ledger,
    *,
    budget: int,
    seed: int = 0,
    depth: int = 2,
    drop_barriers: Iterable[str] = (),
) -> None:
    """Cut the power in every interval between the recorded barriers; ``drop_barriers`` never took place.

    Raises:
        CrashFailure: a state breaks a promise.
    """
    options = LabOptions(budget=budget, seed=seed, depth=depth, nested_every=16, nested_budget=4, kill=True)
    laboratory = Laboratory(judge, recover=recover_and_close, options=options, ledger=ledger)
    laboratory.run(session.workload(), drop_barriers=drop_barriers)
