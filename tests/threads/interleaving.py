"""Four requests in flight at all times, in interleavings drawn from seeds, and crashes in their midst.

    python -m tests.threads.interleaving [--states N] [--seed S] [--jobs J] [--record FILE]
    python -m tests.threads.interleaving --replay SEED

Each seed is one interleaving of reads, writes in place, allocating and compressed writes, discards, zeroing,
flushes, snapshots and transactions (scheduler.py). What reads return must be linearisable, and so must what
a crash leaves (crossing.py); the recovered image has no error and no leak. The campaign ends when so many
distinct crash states have been judged. A failing seed is printed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from errno import EIO, ENOSPC
from functools import cache
from hashlib import blake2b
from pathlib import Path
from random import Random

import jqcow
from jqcow.testing import EVERYTHING, CrashState, Fault, SimulatedDevice, enumerate_states
from tests.support import figures, inside, runs
from tests.support.patients import check
from tests.support.users import create_simulated, open_simulated
from tests.threads.crossing import SECTOR, ZERO, Broken, Judgement, Record, filled
from tests.threads.scheduler import ScheduledDevice, Scheduler, Worker, scheduled_locks

CLUSTER = 1024
PER_CLUSTER = CLUSTER // SECTOR
SECTORS = 20 * PER_CLUSTER
DISK = SECTORS * SECTOR
IN_FLIGHT = 4
REQUESTS = 28
DATE = datetime(2020, 1, 1, tzinfo=UTC)
BUDGET = 12
"""States of one crash."""
USUAL = ("write", "read", "discard", "zero", "packed", "flush", "checkpoint", "commit", "forget")
WEIGHTS = (40, 22, 10, 6, 4, 10, 2, 6, 2)
FAILING = 0.3
"""How many interleavings meet failures of the host."""
AT_BARRIERS, ELSEWHERE = 0.3, 0.02
"""How often the power is cut at a point."""


@dataclass
class Outcome(runs.Outcome):
    """What came of one interleaving, or of many. ``states`` and ``situations`` are digests."""

    states: set[bytes] = field(default_factory=set)
    situations: set[bytes] = field(default_factory=set)

    def add(self, other: runs.Outcome) -> None:
        """Take another in."""
        super().add(other)
        assert isinstance(other, Outcome)
        self.states |= other.states
        self.situations |= other.situations

    def __str__(self) -> str:
        return (
            f"{self.counts['interleavings']:,} interleavings, {self.counts['requests']:,} requests, "
            f"{self.counts['points']:,} points, {self.counts['switches']:,} switches of thread, "
            f"{len(self.situations):,} distinct situations, {self.counts['crashes']:,} crashes, "
            f"{self.counts['states']:,} states judged, {len(self.states):,} distinct; "
            f"{len(self.failures)} failures"
        )


@cache
def prepared_image() -> bytes:
    """Return an empty image."""
    device = SimulatedDevice()
    create_simulated(device, DISK, CLUSTER).close()
    return device.content()


class Interleaving:
    """One image, four threads, and the requests that they share."""

    def __init__(self, seed: int) -> None:
        self.random = Random(f"interleaving {seed}")
        # Of their own: the threads go the same way however many crashes are looked at.
        self.crashes = Random(f"crashes {seed}")
        self.outcome = Outcome(Counter(interleavings=1))
        self.record = Record()
        self.scheduler = Scheduler(self.random, self._at_point)
        self.device = ScheduledDevice(self.scheduler, prepared_image())
        self.in_flight = 0
        self._written = 0
        self._names = itertools.count(1)
        self._requests = iter(self._drawn_requests())
        self.trace = blake2b(digest_size=16)

    def _drawn_requests(self) -> list[str]:
        drawn = self.random.choices(USUAL, WEIGHTS, k=REQUESTS - 3)
        drawn += ["snapshot", "commit", "flush"]
        self.random.shuffle(drawn)
        return drawn

    def run(self) -> Outcome:
        """Run it to its end, and judge that too."""
        with scheduled_locks(self.scheduler):
            self.image = open_simulated(self.device)
            self._prepare()
            if self.random.random() < FAILING:
                self.device.fail(*self._drawn_faults())
            self.scheduler.run(*[self._work] * IN_FLIGHT)
            self.device.fail()
            self._judge_end()
        self.outcome.counts["points"] = self.scheduler.points
        self.outcome.counts["switches"] = self.scheduler.switches
        return self.outcome

    def _prepare(self) -> None:
        """Some clusters are mapped, so that they can be written in place."""
        for first in range(0, SECTORS // 2, 2 * PER_CLUSTER):
            self._write(range(first, first + PER_CLUSTER))
        if self.random.random() < 0.7:
            self.flush()

    def _drawn_faults(self) -> Iterator[Fault]:
        """Yield one or two failures of the host; after that of a barrier the image can only be read."""
        for _ in range(self.random.randint(1, 2)):
            error, applied = self.random.choice((EIO, ENOSPC)), self.random.choice((0, SECTOR, EVERYTHING))
            yield Fault(error, self.random.randint(1, 120), applied_bytes=applied)

    # The requests

    def _work(self, worker: Worker) -> None:
        for name in self._requests:
            worker.doing = name
            self.outcome.counts["requests"] += 1
            self.in_flight += 1
            try:
                getattr(self, name)()
            except OSError:
                # The host failed this call, or a barrier before: it may have happened or not.
                if not self.device.has_failed:
                    raise
                self.outcome.counts["requests that failed"] += 1
            self.in_flight -= 1

    def _sectors(self, most: int) -> range:
        count = self.random.randint(1, most)
        first = self.random.randrange(SECTORS - count + 1)
        return range(first, first + count)

    def _clusters(self, most: int) -> range:
        count = self.random.randint(1, most)
        first = self.random.randrange(SECTORS // PER_CLUSTER - count + 1)
        return range(first * PER_CLUSTER, (first + count) * PER_CLUSTER)

    def _new_value(self) -> bytes:
        self._written += 1
        return b"%08d" % self._written

    def _write(self, sectors: range) -> None:
        value = self._new_value()
        with self.record.changing(dict.fromkeys(sectors, value)):
            self.image.pwrite(filled(value, len(sectors)), sectors[0] * SECTOR)

    def write(self) -> None:
        self._write(self._sectors(6))

    def read(self) -> None:
        sectors, began = self._sectors(8), self.record.now()
        data = self.image.pread(len(sectors) * SECTOR, sectors[0] * SECTOR)
        self.record.was_read(sectors[0], data, began)

    def discard(self) -> None:
        sectors = self._clusters(3)
        with self.record.changing(dict.fromkeys(sectors, ZERO)):
            self.image.discard(len(sectors) * SECTOR, sectors[0] * SECTOR)

    def zero(self) -> None:
        sectors, unmap = self._sectors(8), self.random.random() < 0.5
        with self.record.changing(dict.fromkeys(sectors, ZERO)):
            self.image.write_zeroes(len(sectors) * SECTOR, sectors[0] * SECTOR, unmap=unmap)

    def packed(self) -> None:
        sectors, value = self._clusters(2), self._new_value()
        with self.record.changing(dict.fromkeys(sectors, value)):
            self.image.pwrite_compressed(filled(value, len(sectors)), sectors[0] * SECTOR)

    def flush(self) -> None:
        with self.record.flushing():
            self.image.flush()

    def checkpoint(self) -> None:
        with self.record.flushing():
            self.image.checkpoint()

    def commit(self) -> None:
        first, second, gone = self._sectors(5), self._sectors(5), self._clusters(2)
        one, other = self._new_value(), self._new_value()
        values = dict.fromkeys(gone, ZERO) | dict.fromkeys(first, one) | dict.fromkeys(second, other)
        with self.record.changing(values, whole=True), self.image.transaction() as transaction:
            transaction.discard(len(gone) * SECTOR, gone[0] * SECTOR)
            transaction.pwrite(filled(one, len(first)), first[0] * SECTOR)
            transaction.pwrite(filled(other, len(second)), second[0] * SECTOR)

    def snapshot(self) -> None:
        name = f"taken {next(self._names)}"
        with self.record.taking(name):
            self.image.create_snapshot(name, DATE)

    def forget(self) -> None:
        """Delete a snapshot, if there is one that nobody deletes yet."""
        takings = self.record.takings
        names = [name for name, taking in takings.items() if taking.returned and not taking.is_leaving]
        if names:
            with self.record.deleting(names[0]):
                self.image.delete_snapshot(names[0])

    # Judgement

    def _at_point(self, where: str) -> None:
        self.trace.update(repr(self.scheduler.situation).encode())
        if self.in_flight < IN_FLIGHT:
            return
        situation = repr(self.scheduler.situation).encode()
        self.outcome.situations.add(blake2b(situation, digest_size=8).digest())
        chance = AT_BARRIERS if "." in where or where == "in barrier" else ELSEWHERE
        if self.crashes.random() < chance:
            self._crash(where)

    def _crash(self, where: str) -> None:
        self.outcome.counts["crashes"] += 1
        judgement, seed = Judgement(self.record), self.crashes.randrange(1 << 32)
        for state in enumerate_states(self.device, budget=BUDGET, seed=seed):
            if state.digest not in self.outcome.states:
                self.outcome.states.add(state.digest)
                self.outcome.counts["states"] += 1
                try:
                    self._judge_state(judgement, state)
                except Exception as error:
                    error.add_note(f"crash {self.outcome.counts['crashes']}, at {where}, state {state.spec}")
                    raise

    def _judge_state(self, judgement: Judgement, state: CrashState) -> None:
        self._judge_opened(judgement, self.device.crash(state))

    def _judge_opened(self, judgement: Judgement, crashed: SimulatedDevice) -> None:
        image = open_simulated(crashed)
        report = image.check()
        if report.counts:
            raise Broken(f"after recovery: {report.findings[:2]}")
        judgement.judge_disk(image.pread(DISK, 0), crashed=True)
        judgement.judge_snapshots(snapshots_of(image))
        image.close()
        require_sound(crashed)

    def _judge_end(self) -> None:
        judgement = Judgement(self.record)
        self.record.judge_reads(range(SECTORS))
        if inside.is_in_doubt(self.image):
            raise Broken("a failure of the host left the image in doubt")
        if inside.is_poisoned(self.image):
            self.image.close()
            self.outcome.counts["left read-only"] += 1
            self._judge_opened(judgement, self.device.killed())
            return
        disk, snapshots = self.image.pread(DISK, 0), snapshots_of(self.image)
        judgement.judge_disk(disk, crashed=False)
        judgement.judge_snapshots(snapshots)
        report = self.image.check()
        if report.counts:
            raise Broken(f"at the end: {report.findings[:2]}")
        self.image.close()
        require_sound(self.device)
        with open_simulated(self.device, "r") as image:
            if (image.pread(DISK, 0), snapshots_of(image)) != (disk, snapshots):
                raise Broken("closing changed the disk")


def snapshots_of(image: jqcow.Image) -> dict[str, bytes]:
    """Return what the snapshots of an image hold, by their names."""
    return {taken.name: inside.Shown(image, taken).pread(DISK, 0) for taken in image.snapshots()}


def require_sound(device: SimulatedDevice) -> None:
    """A closed image has no error and no leak."""
    report = check(device.content())
    if report.counts:
        raise Broken(f"after closing: {report.findings[:2]}")


def try_seed(seed: int) -> Outcome:
    """Run one interleaving; a failure is told in the outcome."""
    interleaving = Interleaving(seed)
    try:
        interleaving.run()
    except Exception as error:
        story = "".join(traceback.format_exception(error)[-16:])
        interleaving.outcome.failures.append(f"{story}  replay: --replay {seed}")
    return interleaving.outcome


def run_campaign(states: int, seed: int, jobs: int) -> Iterator[Outcome]:
    """Run seed after seed until so many distinct states are judged; yield the total after each."""
    return runs.run_parts(
        try_seed, itertools.count(seed), jobs, lambda total: len(total.states) >= states, Outcome
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--states", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=1, help="the first one")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--replay", type=int, metavar="SEED")
    options = parser.parse_args()
    if options.replay is not None:
        print(Interleaving(options.replay).run())
        return 0
    total = runs.show(run_campaign(options.states, options.seed, options.jobs), str)
    print(f"{total}; first seed {options.seed}, {total.seconds:.0f} s")
    if options.record is not None:
        totals: dict[str, float | str] = {
            **total.counts,
            "seed": options.seed,
            "distinct states": len(total.states),
            "distinct situations": len(total.situations),
            "failures": len(total.failures),
        }
        figures.record(options.record, totals, program="python -m tests.threads.interleaving")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
