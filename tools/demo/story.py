"""The story that the demonstration tells, step by step, and the checks on the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from demo import cuts, filesystem
from demo.cuts import CutPlan
from demo.filesystem import MIB, History, run_tool
from demo.steps import STEP_COUNT, import_disk
from demo.verdict import Tally
from jqcow.testing import LabReport

RECOVERED = 0
# The first kill is told at length, the others are counted.
KILLS_MAX = 8
# Power cuts between two barriers. What shows that something is missing needs fewer.
CUT_BUDGET = 6
CUT_BUDGET_OF_COUNTERPROOF = 3


@dataclass
class Telling:
    """Prints the story, and counts what was checked and what was broken."""

    started: float = field(default_factory=time.monotonic)
    checked: int = 0
    broken: list[str] = field(default_factory=list)

    def chapter(self, title: str) -> None:
        """Begin a part of the story."""
        print(f"\n== {title}", flush=True)

    def say(self, text: str) -> None:
        """Say what happens."""
        print(f"   {text}", flush=True)

    def quote(self, text: str) -> None:
        """Show what a command printed."""
        for line in text.strip().splitlines():
            print(f"   | {line}", flush=True)

    def check(self, holds: bool, promise: str, otherwise: str = "") -> None:
        """Say whether a promise holds, and remember it."""
        self.checked += 1
        if holds:
            self.say(f"[ok] {promise}")
        else:
            self.broken.append(otherwise or promise)
            self.say(f"[BROKEN] {otherwise or promise}")

    @property
    def seconds(self) -> float:
        """How long the story has taken."""
        return time.monotonic() - self.started


@dataclass(frozen=True)
class Stage:
    """What every part of the story starts from."""

    directory: Path
    seed: int
    history: History
    image_path: Path


def tell(directory: Path, disk_bytes: int, seed: int, *, barriers_work: bool) -> Telling:
    """Tell the whole story in ``directory``; what was broken is in the returned telling."""
    telling = Telling()
    stage = set_the_stage(telling, directory, disk_bytes, seed)
    if barriers_work:
        tell_of_the_kills(telling, stage)
        tell_of_the_power_cuts(telling, stage)
        tell_of_the_counterproof(telling, stage)
    else:
        tell_of_idle_barriers(telling, stage)
    sum_up(telling, stage, barriers_work=barriers_work)
    return telling


def set_the_stage(telling: Telling, directory: Path, disk_bytes: int, seed: int) -> Stage:
    """Make the file system, its history and the image that all crashes start from."""
    telling.chapter("A file system of this machine")
    history = filesystem.make_history(directory, disk_bytes, seed)
    telling.say(
        f"{history.file_count} files of this machine, {in_mib(history.file_bytes)}, are now an ext4 file"
        f" system of {in_mib(disk_bytes)}."
    )
    telling.say(
        f"{STEP_COUNT} steps remove {history.removed_count} of them and add {history.added_count} others:"
        f" {history.block_count} blocks of 4 KiB change."
    )
    telling.say("After each step e2fsck -fn finds the file system clean. Within a step it is broken.")
    image_path = directory / "imported.qcow2"
    import_disk(history.first_path, image_path)
    telling.say(f"jqcow imports it: {image_path.name}, {in_mib(image_path.stat().st_size)}.")
    check_image(telling, image_path)
    telling.say("A writer makes the steps in the image: one transaction each, its blocks in random order.")
    telling.say("A step is acknowledged when its transaction is committed.")
    return Stage(directory, seed, history, image_path)


# The writer is killed


def tell_of_the_kills(telling: Telling, stage: Stage) -> None:
    """Kill a writer process and recover, again and again; let the last one finish."""
    telling.chapter("The writer is killed")
    image_path = stage.directory / "killed.qcow2"
    shutil.copyfile(stage.image_path, image_path)
    random, tally = Random(f"{stage.seed}/kills"), Tally()
    done: int | None = 0
    # A writer that is done before the signal comes is not killed, and ends the series.
    while done is not None and tally.crashes < KILLS_MAX:
        first = tally.crashes == 0
        wanted = random.randint(1, 2) if first else random.randint(0, 1)
        killing = cuts.kill_writer(image_path, stage.history.steps_path, done, wanted, random)
        if not killing.was_killed:
            done += killing.acknowledged
            break
        if first:
            telling.say(
                f"SIGKILL amid its work: {killing.acknowledged} of {STEP_COUNT} steps are acknowledged."
            )
            show_refusal(telling, image_path)
            recover(telling, image_path)
        done = look_at_killed(tally, stage, image_path, done + killing.acknowledged)
    telling.say("A new writer goes on from what the image holds, and is killed too; and so on.")
    check_tally(telling, tally, "kill")
    if done is not None:
        finish(telling, stage, image_path, done)


def look_at_killed(tally: Tally, stage: Stage, image_path: Path, acknowledged: int) -> int | None:
    """Recover what a killed writer left, and judge what QEMU reads; return how many steps are there."""
    tally.crashes += 1
    if run_jqcow("recover", image_path.name, directory=image_path.parent).returncode != RECOVERED:
        tally.unrecovered += 1
        return None
    tally.unsound += run_tool("qemu-img", "check", image_path, accept=(0, 1, 2, 3)).returncode != 0
    raw_path = image_path.with_suffix(".raw")
    run_tool("qemu-img", "convert", "-O", "raw", image_path, raw_path)
    steps = tally.note_disk(raw_path.read_bytes(), raw_path, acknowledged, stage.history)
    raw_path.unlink()
    return steps


def show_refusal(telling: Telling, image_path: Path) -> None:
    """Show that QEMU does not misread an image whose journal is live."""
    telling.say(f"$ qemu-img check {image_path.name}")
    result = run_tool("qemu-img", "check", image_path.name, accept=(0, 1, 2, 3), directory=image_path.parent)
    telling.quote(result.stderr or result.stdout)
    telling.check(
        result.returncode == 1 and "jqcow-recover" in result.stderr,
        "QEMU refuses the image and names what to run",
        "QEMU opens an image that is not recovered",
    )


def recover(telling: Telling, image_path: Path) -> None:
    """Run jqcow-recover and show its report."""
    telling.say(f"$ jqcow-recover {image_path.name}")
    result = run_jqcow("recover", image_path.name, directory=image_path.parent)
    telling.quote(result.stdout + result.stderr)
    telling.check(
        result.returncode == RECOVERED,
        "the image is recovered",
        f"recovery ends with status {result.returncode}",
    )


def run_jqcow(module: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of jqcow, as its console script would."""
    code = f"import sys; from jqcow.cli.{module} import main; sys.exit(main())"
    return run_tool(sys.executable, "-c", code, *arguments, accept=tuple(range(128)), directory=directory)


def check_image(telling: Telling, image_path: Path) -> None:
    """Let QEMU check the image: no error, no leak."""
    result = run_tool("qemu-img", "check", image_path, accept=(0, 1, 2, 3))
    telling.check(
        result.returncode == 0,
        "qemu-img check: no errors, no leaks",
        f"qemu-img check: {(result.stdout + result.stderr).strip()}",
    )


def finish(telling: Telling, stage: Stage, image_path: Path, done: int) -> None:
    """Let a writer finish on the recovered image, and compare every file with what it must be."""
    rest = cuts.finish_writing(image_path, stage.history.steps_path, done)
    telling.say(f"The last writer makes the {rest} steps that are left, and closes the image.")
    check_image(telling, image_path)
    raw_path = image_path.with_suffix(".raw")
    result = run_jqcow(
        "main", "convert", "-O", "raw", image_path.name, raw_path.name, directory=stage.directory
    )
    if result.returncode:
        telling.check(False, "", f"jqcow convert: {result.stderr.strip()}")
        return
    compared = run_tool(
        "qemu-img", "compare", "-f", "qcow2", "-F", "raw", image_path, raw_path, accept=(0, 1)
    )
    telling.check(compared.returncode == 0, "qemu-img compare: QEMU and jqcow read the same disk")
    telling.check(filesystem.is_clean(raw_path), "e2fsck -fn: the file system is clean")
    hashes = filesystem.hash_disk_files(raw_path, stage.directory / "files")
    expected = stage.history.last_hashes
    telling.check(hashes == expected, f"all {len(expected)} files have their SHA-256")


# The power is cut


def tell_of_the_power_cuts(telling: Telling, stage: Stage) -> None:
    """Cut the power of a simulated disk between all barriers, and judge what is left each time."""
    telling.chapter("The power is cut")
    telling.say("The same steps, on a simulated disk that knows which of its writes are durable.")
    telling.say("The power fails between any two barriers. Of the writes in flight, each may be there, be")
    telling.say("gone, or be torn between sectors, and the file's size may be old or new.")
    plan = CutPlan(stage.image_path, stage.history, stage.seed, CUT_BUDGET)
    tally, report = cuts.cut_power(plan, stage.directory)
    say_cuts(telling, tally, report)
    check_tally(telling, tally, "cut")


def tell_of_the_counterproof(telling: Telling, stage: Stage) -> None:
    """Show that the steps need transactions: plain writes, cut in the same way."""
    telling.chapter("The power is cut, without transactions")
    telling.say("The same steps as plain writes, with a flush after each step.")
    plan = CutPlan(
        stage.image_path, stage.history, stage.seed, CUT_BUDGET_OF_COUNTERPROOF, transactions=False
    )
    tally, report = cuts.cut_power(plan, stage.directory)
    say_cuts(telling, tally, report)
    check_sound(telling, tally, "cut")
    telling.check(
        tally.partial > 0 and tally.unclean > 0,
        f"as expected, {tally.partial} cuts leave a part of a step, and e2fsck finds {tally.unclean} file"
        " systems broken",
        "no cut came in the middle of a step: this run shows nothing",
    )


def tell_of_idle_barriers(telling: Telling, stage: Stage) -> None:
    """Show what barriers are for: transactions on a disk whose barriers do nothing."""
    telling.chapter("The power is cut, and barriers do nothing")
    telling.say("The same steps, on a simulated disk. A barrier returns at once and makes nothing durable,")
    telling.say("as with a cache that lies.")
    plan = CutPlan(
        stage.image_path, stage.history, stage.seed, CUT_BUDGET_OF_COUNTERPROOF, barriers_work=False
    )
    tally, report = cuts.cut_power(plan, stage.directory)
    say_cuts(telling, tally, report)
    check_tally(telling, tally, "cut")


def say_cuts(telling: Telling, tally: Tally, report: LabReport) -> None:
    """Say how often the power was cut, and how many different disks that left."""
    barriers = sum(count for _, count in report.barriers)
    telling.say(
        f"{tally.crashes} cuts around {barriers} barriers left {report.distinct_states} distinct states"
        " of the disk with writes in flight."
    )


# What both crashes must leave


def check_tally(telling: Telling, tally: Tally, crash: str) -> None:
    """Check that crashes with transactions left what they must."""
    check_sound(telling, tally, crash)
    if not tally.recovered:
        return
    telling.check(
        not tally.unclean,
        f"e2fsck -fn after {each(tally, crash)}: the file system is clean",
        f"e2fsck -fn finds {tally.unclean} file systems broken",
    )
    telling.check(
        not tally.lost,
        f"every acknowledged step is there after {each(tally, crash)}",
        f"acknowledged steps are lost after {tally.lost} {crash}s",
    )
    telling.check(
        not tally.partial,
        f"no step is there in part: the step in flight was whole after {tally.ahead}, and not there after"
        f" {tally.recovered - tally.ahead - tally.lost}",
        f"{tally.partial} disks hold a state that no step leads to",
    )


def check_sound(telling: Telling, tally: Tally, crash: str) -> None:
    """Check that there were crashes, and that the image itself came back from every one."""
    telling.check(
        tally.crashes > 0 and not tally.unrecovered,
        f"jqcow recovers the image after {each(tally, crash)}",
        f"{tally.unrecovered} images cannot be recovered: what was acknowledged is lost with them"
        if tally.crashes
        else f"there was no {crash}: this run shows nothing",
    )
    # Nothing more can be said of an image that did not come back.
    if not tally.recovered:
        return
    telling.check(
        not tally.unsound,
        f"qemu-img check after {each(tally, crash)}: no errors, no leaks",
        f"qemu-img check finds fault with {tally.unsound} images",
    )


def each(tally: Tally, crash: str) -> str:
    """Name all crashes of a tally whose image came back."""
    return f"the {crash}" if tally.recovered == 1 else f"each of {tally.recovered} {crash}s"


def sum_up(telling: Telling, stage: Stage, *, barriers_work: bool) -> None:
    """End with what was shown."""
    telling.chapter("Summary")
    telling.say(f"{telling.checked} checks in {telling.seconds:.0f} s, seed {stage.seed}.")
    for promise in telling.broken:
        telling.say(f"BROKEN: {promise}.")
    if not telling.broken:
        telling.say("Nothing acknowledged was lost, nothing was half there, nothing leaked, and QEMU agrees.")
        if not barriers_work:
            telling.say("That was luck: barriers did nothing in this run.")
    elif not barriers_work:
        telling.say("This is what barriers are for: without them an acknowledgement is worth nothing.")


def in_mib(length_bytes: int) -> str:
    """Write a length in MiB."""
    return f"{length_bytes / MIB:.1f} MiB"
