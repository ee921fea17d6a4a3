"""The story that the demonstration tells, step by step, and the checks on the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from demo import cuts, filesystem
from demo.filesystem import MIB, Versions, run_tool
from demo.plan import Plan, import_disk
from demo.verdict import Verdict, judge

RECOVERED = 0


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
    versions: Versions
    plan: Plan
    image_path: Path


def tell(directory: Path, disk_bytes: int, seed: int, *, barriers_work: bool) -> Telling:
    """Tell the whole story in ``directory``; what was broken is in the returned telling."""
    telling = Telling()
    stage = set_the_stage(telling, directory, disk_bytes, seed)
    if barriers_work:
        tell_of_the_kill(telling, stage)
    tell_of_the_power_cut(telling, stage, barriers_work=barriers_work)
    sum_up(telling, stage, barriers_work=barriers_work)
    return telling


def set_the_stage(telling: Telling, directory: Path, disk_bytes: int, seed: int) -> Stage:
    """Make the file system and the image that both crashes start from."""
    telling.chapter("A file system of this machine")
    versions = filesystem.make_versions(directory, disk_bytes, seed)
    telling.say(
        f"{versions.old_count} files of this machine, {in_mib(versions.old_bytes)}, are now an ext4 file"
        f" system of {in_mib(disk_bytes)}."
    )
    for path in (versions.old_path, versions.new_path):
        run_tool("e2fsck", "-fn", path)
    plan = Plan.between(versions.old_path, versions.new_path, seed)
    telling.say(
        f"Its second version has {versions.removed_count} files fewer and {versions.added_count} new ones:"
        f" {plan.block_count} blocks of 4 KiB differ."
    )
    image_path = directory / "imported.qcow2"
    import_disk(versions.old_path, image_path)
    telling.say(f"jqcow imports the first version: {image_path.name}, {in_mib(image_path.stat().st_size)}.")
    check_image(telling, image_path)
    telling.say(
        f"A writer will turn it into the second version, in random order, in {len(plan.batches)} batches."
    )
    telling.say("It flushes after each batch. When the flush has returned, the batch is acknowledged.")
    return Stage(directory, seed, versions, plan, image_path)


def tell_of_the_kill(telling: Telling, stage: Stage) -> None:
    """Kill a writer process, recover, and let another one finish."""
    telling.chapter("The writer is killed")
    image_path = stage.directory / "killed.qcow2"
    shutil.copyfile(stage.image_path, image_path)
    batches = cuts.kill_writer(image_path, stage.versions, stage.plan, stage.seed)
    telling.say(
        f"SIGKILL in the middle of its work: {batches} of {len(stage.plan.batches)} batches are acknowledged."
    )
    show_refusal(telling, image_path)
    if recover(telling, image_path):
        check_blocks(telling, stage, image_path, batches)
        finish(telling, stage, image_path, batches)


def tell_of_the_power_cut(telling: Telling, stage: Stage, *, barriers_work: bool) -> None:
    """Cut the power of a simulated disk, recover what is left of it, and let the writer finish."""
    telling.chapter("The power is cut" if barriers_work else "The power is cut, and barriers do nothing")
    telling.say("The same run, on a simulated disk that knows which of its writes are durable.")
    if not barriers_work:
        telling.say("A barrier returns at once and makes nothing durable, as with a cache that lies.")
    cut = cuts.cut_power(stage.image_path.read_bytes(), stage.plan, stage.seed, barriers_work=barriers_work)
    fate = cut.fate
    telling.say(
        f"The power fails after {cut.acknowledged_batches} acknowledged batches."
        f" Writes in flight: {fate.landed} reached the disk, {fate.dropped} dropped, {fate.torn} torn."
    )
    image_path = stage.directory / "power-cut.qcow2"
    image_path.write_bytes(cut.content)
    if barriers_work:
        show_refusal(telling, image_path)
    if recover(telling, image_path):
        verdict = check_blocks(telling, stage, image_path, cut.acknowledged_batches)
        if verdict.holds:
            finish(telling, stage, image_path, cut.acknowledged_batches)
    else:
        lost = len(stage.plan.acknowledged_blocks(cut.acknowledged_batches))
        telling.check(False, "", f"{lost} acknowledged blocks are lost with the image")


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


def recover(telling: Telling, image_path: Path) -> bool:
    """Run jqcow-recover, show its report, and return True if the image can be used again."""
    telling.say(f"$ jqcow-recover {image_path.name}")
    result = run_jqcow("recover", image_path.name, directory=image_path.parent)
    telling.quote(result.stdout + result.stderr)
    recovered = result.returncode == RECOVERED
    telling.check(recovered, "the image is recovered", f"recovery ends with status {result.returncode}")
    if recovered:
        check_image(telling, image_path)
    return recovered


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


def check_blocks(telling: Telling, stage: Stage, image_path: Path, batches: int) -> Verdict:
    """Compare the disk, as QEMU reads it, with both versions."""
    raw_path = image_path.with_suffix(".raw")
    run_tool("qemu-img", "convert", "-O", "raw", image_path, raw_path)
    verdict = judge(raw_path.read_bytes(), stage.plan, stage.plan.acknowledged_blocks(batches))
    raw_path.unlink()
    telling.check(
        not verdict.lost,
        f"all {verdict.acknowledged} acknowledged blocks are new",
        f"{verdict.lost} of {verdict.acknowledged} acknowledged blocks are lost",
    )
    mixed = f", {verdict.mixed} torn between sectors" if verdict.mixed else ""
    telling.check(
        not verdict.foreign,
        f"of the {verdict.old + verdict.new + verdict.mixed} others that it had to write,"
        f" {verdict.new} new, {verdict.old} old{mixed}; no other block has changed",
        f"{verdict.foreign} blocks hold what was never written there",
    )
    return verdict


def finish(telling: Telling, stage: Stage, image_path: Path, batches: int) -> None:
    """Let a writer finish on the recovered image, and compare every file with what it must be."""
    rest = cuts.finish_writing(image_path, stage.versions, stage.seed, batches)
    telling.say(f"A new writer goes on with the {rest} batches that are left, and closes the image.")
    check_image(telling, image_path)
    raw_path = image_path.with_suffix(".raw")
    result = run_jqcow(
        "main", "convert", "-O", "raw", image_path.name, raw_path.name, directory=stage.directory
    )
    if result.returncode:
        telling.check(False, "", f"jqcow convert: {result.stderr.strip()}")
        return
    run_tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image_path, raw_path)
    telling.check(
        raw_path.read_bytes() == stage.plan.new, "jqcow convert: the disk equals the second version"
    )
    fsck = run_tool("e2fsck", "-fn", raw_path, accept=(0, 4, 8))
    telling.check(fsck.returncode == 0, "e2fsck -fn: the file system is clean")
    hashes = filesystem.hash_disk_files(raw_path, stage.directory / "files")
    expected = stage.versions.new_hashes
    telling.check(hashes == expected, f"all {len(expected)} files have their SHA-256")


def sum_up(telling: Telling, stage: Stage, *, barriers_work: bool) -> None:
    """End with what was shown."""
    telling.chapter("Summary")
    telling.say(f"{telling.checked} checks in {telling.seconds:.0f} s, seed {stage.seed}.")
    for promise in telling.broken:
        telling.say(f"BROKEN: {promise}.")
    if not telling.broken:
        telling.say("Nothing acknowledged was lost, nothing leaked, and QEMU agrees.")
        if not barriers_work:
            telling.say("That was luck: barriers did nothing in this run.")
    elif not barriers_work:
        telling.say("This is what barriers are for: without them an acknowledgement is worth nothing.")


def in_mib(length_bytes: int) -> str:
    """Write a length in MiB."""
    return f"{length_bytes / MIB:.1f} MiB"
