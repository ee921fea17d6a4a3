"""Kills real writers at random moments, and holds the image that they leave to what they were promised."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO

import jqcow
from tests.outside.history import Expectation, MessageContent
from tests.outside.sessions import CLUSTER_SIZES, CLUSTERS_ON_DISK, environment, writer_command
from tests.outside.writer import JOURNAL_BYTES
from tests.support import qemu

KILLS_OF_ONE_IMAGE = 50
LONGEST_LIFE_SECONDS = 0.15
LONGEST_RECOVERY_SECONDS = 0.015
ENDLESS = 1_000_000


@dataclass
class KillReport:
    """What the kills met. All but the seconds are counts."""

    writers_killed: int = 0
    recoveries_killed: int = 0
    images: int = 0
    live_images_recovered: int = 0
    acknowledgements: int = 0
    transactions_committed: int = 0
    transactions_cut: int = 0
    operations: int = 0
    seconds: float = 0

    def add(self, other: KillReport) -> None:
        """Add the counts of another report."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class _Process:
    """A running writer and the messages that it sent."""

    def __init__(self, command: list[str]) -> None:
        self.messages: list[MessageContent] = []
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
        self._rest = b""

    @property
    def _pipe(self) -> IO[bytes]:
        if self._process.stdout is None:
            raise RuntimeError("the writer has no pipe")
        return self._process.stdout

    def read_until(self, deadline: float) -> bool:
        """Read what comes until a moment of the monotonic clock; return False at the end of the stream."""
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._pipe], [], [], left)[0] and not self._read():
                return False
        return True

    def wait_for(self, kind: str) -> None:
        """Read until a message says that this begins, or the process ends."""
        while not any(message.get("do") == kind for message in self.messages):
            if not self._read():
                return

    def kill(self) -> int:
        """Send SIGKILL, read what is left in the pipe, and return the exit status."""
        self._process.send_signal(signal.SIGKILL)
        while self._read():
            pass
        self._pipe.close()
        return self._process.wait()

    def _read(self) -> bool:
        data = os.read(self._pipe.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.messages += [json.loads(line) for line in lines]
        return bool(data)


@dataclass
class Victim:
    """An image whose writers are killed, again and again; what it holds goes on from one to the next."""

    image: Path
    seed: int
    report: KillReport = field(default_factory=KillReport)

    def __post_init__(self) -> None:
        self._random = Random(f"kills/{self.seed}")
        cluster_bytes = CLUSTER_SIZES[self.seed % len(CLUSTER_SIZES)]
        disk_bytes = CLUSTERS_ON_DISK[cluster_bytes] * cluster_bytes
        jqcow.create(self.image, disk_bytes, cluster_size=cluster_bytes, journal_size=JOURNAL_BYTES).close()
        self._expectation = Expectation(disk_bytes)
        self._writers = 0
        self.report.images = 1

    def kill_writer(self) -> None:
        """Start a writer, kill it, perhaps kill recoveries too; then recover the image and judge it."""
        self._writers += 1
        seed = self.seed * 1000 + self._writers
        process = _Process(writer_command(self.image, seed, "--operations", ENDLESS))
        process.wait_for("opening" if self._random.random() < 0.15 else "opened")
        process.read_until(time.monotonic() + self._random.random() * LONGEST_LIFE_SECONDS)
        assert process.kill() == -signal.SIGKILL, "the writer ended by itself"
        self.report.writers_killed += 1
        self._follow(seed, process.messages)
        while self._random.random() < 0.3:
            self._kill_recovery(seed)
        self._judge()

    def _follow(self, seed: int, messages: list[MessageContent]) -> None:
        self._expectation.seed = seed
        for message in messages:
            self._expectation.tell(message)
        self.report.operations += sum("id" in message for message in messages)
        self.report.transactions_cut += self._expectation.in_transaction

    def _kill_recovery(self, seed: int) -> None:
        """Kill a process that recovers the image and closes it."""
        process = _Process(writer_command(self.image, seed, "--operations", 0))
        process.wait_for("opening")
        process.read_until(time.monotonic() + self._random.random() * LONGEST_RECOVERY_SECONDS)
        status = process.kill()
        assert status in (0, -signal.SIGKILL), f"the recovery ended with status {status}"
        self.report.recoveries_killed += status != 0

    def _judge(self) -> None:
        """Recover the image; raise AssertionError if a promise is broken."""
        where = f"seed {self.seed}, writer {self._writers}"
        with jqcow.open(self.image, "r+", journal_size=JOURNAL_BYTES) as image:
            self.report.live_images_recovered += image.recovered is not None
            report = image.check()
            assert report.ok, f"{where}: {report.findings[:2]}"
            violations = self._expectation.check(image.pread)
            assert not violations, f"{where}: {'; '.join(map(str, violations[:2]))}"
            content = image.pread(image.size, 0)
        complaint = qemu.complaint(self.image)
        assert not complaint, f"{where}: {complaint}"
        self.report.acknowledgements += self._expectation.acknowledged
        self.report.transactions_committed += self._expectation.transactions_committed
        self._expectation = Expectation(len(content))
        self._expectation.found(content)


def kill_writers(folder: Path, seed: int, kills: int) -> KillReport:
    """Kill ``kills`` writers, on as many images as it takes; raise AssertionError if a promise is broken."""
    total, start = KillReport(), time.monotonic()
    while total.writers_killed < kills:
        victim = Victim(folder / f"victim-{total.images}.qcow2", seed + total.images)
        for _ in range(min(KILLS_OF_ONE_IMAGE, kills - total.writers_killed)):
            victim.kill_writer()
        total.add(victim.report)
    total.seconds = time.monotonic() - start
    return total
