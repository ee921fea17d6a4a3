"""Two ways to end a writer before its time: SIGKILL, and power cuts of a simulated disk."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jqcow
from demo.filesystem import History
from demo.steps import Step, load_steps, write_steps
from demo.verdict import Judge, Tally
from jqcow.testing import (
    CrashState,
    LabOptions,
    Laboratory,
    LabReport,
    Ledger,
    SimulatedDevice,
    Workload,
)

# The smallest one: it is filled several times during the run, so cuts come amid checkpoints too.
JOURNAL_BYTES = 64 << 10
# Each process cuts the writer during a part of the steps.
PROCESSES = 2
LONGEST_LAST_MOMENT_SECONDS = 0.02


class WriterError(Exception):
    """A writer process failed by itself: jqcow broke a promise, the machine lacks nothing."""


@dataclass(frozen=True)
class Killing:
    """A writer's end: how many steps it acknowledged, and whether the signal came before it was done."""

    acknowledged: int
    was_killed: bool


def kill_writer(image_path: Path, steps_path: Path, first: int, wanted: int, random: Random) -> Killing:
    """Start a writer at a step, and kill it soon after it has acknowledged ``wanted`` steps."""
    with _start_writer(image_path, steps_path, first) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()  # it has begun
        acknowledged = sum(1 for _ in zip(range(wanted), writer.stdout, strict=False))
        time.sleep(random.uniform(0, LONGEST_LAST_MOMENT_SECONDS))
        writer.kill()
        # What it acknowledged between the line that was waited for and the signal counts too.
        acknowledged += len(writer.stdout.readlines())
    if writer.returncode > 0:
        raise WriterError(f"the writer ended with status {writer.returncode}")
    return Killing(acknowledged, writer.returncode < 0)


def finish_writing(image_path: Path, steps_path: Path, first: int) -> int:
    """Let a new writer process go on from a step to the end; return how many steps it acknowledged."""
    with _start_writer(image_path, steps_path, first) as writer:
        assert writer.stdout is not None
        acknowledged = len(writer.stdout.readlines()) - 1
    if writer.returncode:
        raise WriterError(f"the writer ended with status {writer.returncode}")
    return acknowledged


def _start_writer(image_path: Path, steps_path: Path, first: int) -> subprocess.Popen[bytes]:
    """Start the writer as a process; it tells that it has begun, and of each acknowledged step."""
    arguments = [str(image_path), str(steps_path), str(first)]
    return subprocess.Popen([sys.executable, "-m", "demo.writer", *arguments], stdout=subprocess.PIPE)


@dataclass(frozen=True)
class CutPlan:
    """How to cut: with what image, how often between two barriers, and what to take from the writer."""

    image_path: Path
    history: History
    seed: int
    budget: int
    transactions: bool = True
    barriers_work: bool = True


@dataclass
class _Progress:
    """The laboratory's model: how many steps are acknowledged."""

    acknowledged: int = 0

    def copy(self) -> _Progress:
        return _Progress(self.acknowledged)

    def acknowledge(self) -> None:
        self.acknowledged += 1


def cut_power(plan: CutPlan, directory: Path) -> tuple[Tally, LabReport]:
    """Run the writer and cut its power between all barriers; return what was left, and the states."""
    tally, ledger = Tally(), Ledger()
    folders = [directory / f"cuts-{part}" for part in range(PROCESSES)]
    with ProcessPoolExecutor(PROCESSES) as pool:
        for part_tally, part_ledger in pool.map(_cut_part, [plan] * PROCESSES, folders, range(PROCESSES)):
            tally.add(part_tally)
            ledger.merge(part_ledger)
    return tally, ledger.report()


def _cut_part(plan: CutPlan, directory: Path, part: int) -> tuple[Tally, Ledger]:
    """Cut the power during one part of the steps; the disk begins with the parts before."""
    directory.mkdir(exist_ok=True)
    judge = Judge(plan.history, directory)
    steps = load_steps(plan.history.steps_path)
    first, end = (len(steps) * number // PROCESSES for number in (part, part + 1))
    earlier = SimulatedDevice(plan.image_path.read_bytes())
    _run_writer(plan, earlier, steps[:first], _Progress())
    content = earlier.content()

    def run(device: SimulatedDevice, progress: _Progress) -> None:
        if not plan.barriers_work:
            device.barrier_listeners.append(_disable)
        _run_writer(plan, device, steps[first:end], progress)

    def look(device: SimulatedDevice, progress: _Progress, state: CrashState) -> None:
        judge.judge(device, progress.acknowledged)

    laboratory = Laboratory(look, options=LabOptions(budget=plan.budget, seed=plan.seed))
    laboratory.run(
        Workload(f"part {part}", run, lambda: _Progress(first), make_device=lambda: SimulatedDevice(content))
    )
    return judge.tally, laboratory.ledger


def _run_writer(plan: CutPlan, device: SimulatedDevice, steps: Sequence[Step], progress: _Progress) -> None:
    salts = Random(f"{plan.seed}/salts")
    with jqcow.open_device(
        device, "r+", journal_size=JOURNAL_BYTES, new_salt=lambda: salts.randbytes(16)
    ) as image:
        write_steps(image, steps, progress.acknowledge, transactions=plan.transactions)


def _disable(name: str, device: SimulatedDevice) -> None:
    """Make a barrier do nothing, just before it would."""
    device.drop_barriers.add(name)
