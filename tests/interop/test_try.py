"""The demonstration: it ends well; without barriers, and without transactions, it does not."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jqcow.testing import SimulatedDevice

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
# Debian keeps mke2fs and its kin where an ordinary user does not look.
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def run_demonstration(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": SYSTEM_PATH,
        "PYTHONPATH": f"{ROOT}:{TOOLS}",
        "PYTHONSAFEPATH": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "demo", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def number_in(pattern: str, text: str) -> int:
    """Return the number that a pattern captures; the text must match it."""
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in:\n{text}"
    return int(found[1])


def chapters_of(output: str) -> dict[str, str]:
    """Return what the story says, by the titles of its chapters."""
    _, *parts = output.split("\n== ")
    return {title: text for title, _, text in (part.partition("\n") for part in parts)}


def test_the_file_system_is_whole_after_every_crash(tmp_path: Path) -> None:
    result = run_demonstration("--seed", "1", "--keep", str(tmp_path / "kept"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "BROKEN" not in result.stdout
    chapters = chapters_of(result.stdout)
    kills, cuts = chapters["The writer is killed"], chapters["The power is cut"]
    assert "[ok] QEMU refuses the image and names what to run" in kills
    assert "[ok] qemu-img compare: QEMU and jqcow read the same disk" in kills
    assert "have their SHA-256" in kills
    assert number_in(r"e2fsck -fn after each of (\d+) kills: the file system is clean", kills) > 1
    cut_count = number_in(r"e2fsck -fn after each of (\d+) cuts: the file system is clean", cuts)
    state_count = number_in(r"left (\d+) distinct states", cuts)
    assert cut_count >= state_count >= 150
    assert number_in(r"every acknowledged step is there after each of (\d+) cuts", cuts) == cut_count
    assert number_in(r"in flight was whole after (\d+)", cuts) > 0
    assert "killed.qcow2" in {path.name for path in (tmp_path / "kept").iterdir()}
    # The same cuts of plain writes: without transactions the demonstration would not end well.
    counterproof = chapters["The power is cut, without transactions"]
    assert number_in(r"as expected, (\d+) cuts leave a part of a step", counterproof) > 0
    assert number_in(r"e2fsck finds (\d+) file systems broken", counterproof) > 0


def test_without_barriers_acknowledged_steps_are_lost_and_the_run_repeats() -> None:
    first, second = (run_demonstration("--seed", "7", "--no-barrier") for _ in range(2))
    assert first.returncode == 1, first.stdout + first.stderr
    lost = r"BROKEN: acknowledged steps are lost after (\d+) cuts"
    assert number_in(lost, first.stdout) > 0
    for pattern in (lost, r"(\d+) cuts around", r"left (\d+) distinct states"):
        assert number_in(pattern, first.stdout) == number_in(pattern, second.stdout)


def test_what_was_not_looked_at_is_not_praised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image that does not come back, and a series without a crash: broken, and no word of the rest."""
    monkeypatch.syspath_prepend(str(TOOLS))
    story, verdict = importlib.import_module("demo.story"), importlib.import_module("demo.verdict")
    judge = verdict.Judge(None, tmp_path)
    judge.judge(SimulatedDevice(b"no image" * 512), acknowledged=1)
    for tally, complaint in (
        (judge.tally, "1 images cannot be recovered"),
        (verdict.Tally(), "there was no cut"),
    ):
        telling = story.Telling()
        story.check_tally(telling, tally, "cut")
        output = capsys.readouterr().out
        assert "[ok]" not in output
        assert complaint in output
        assert len(telling.broken) == 1


def test_a_disk_too_far_ahead_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk two steps ahead is in a state that the writer cannot have reached; it is not 'in flight' too."""
    monkeypatch.syspath_prepend(str(TOOLS))
    verdict, filesystem = (importlib.import_module(f"demo.{name}") for name in ("verdict", "filesystem"))
    disks = [bytes([number]) * 4096 for number in range(3)]
    digests = tuple(map(filesystem.disk_digest, disks))
    history = filesystem.History(tmp_path, tmp_path, digests, 0, 0, 0, 0, 0, {})
    monkeypatch.setenv("PATH", SYSTEM_PATH)
    disk_path = tmp_path / "disk.raw"
    disk_path.write_bytes(disks[2])
    found = {}
    for acknowledged in (0, 1, 2):
        tally = verdict.Tally(crashes=1)
        steps = tally.note_disk(disks[2], disk_path, acknowledged, history)
        found[acknowledged] = (steps, tally.partial, tally.ahead, tally.lost)
        assert tally.unclean == 1, "e2fsck takes no such disk"
    assert found == {0: (None, 1, 0, 0), 1: (2, 0, 1, 0), 2: (2, 0, 0, 0)}


def test_a_wrong_option_is_refused() -> None:
    result = run_demonstration("--size", "1")
    assert result.returncode == 2
    assert "--size" in result.stderr


def test_help_names_every_option() -> None:
    result = subprocess.run([TOOLS / "try", "--help"], capture_output=True, text=True, check=True)
    program = (TOOLS / "demo" / "__main__.py").read_text()
    missing = [option for option in re.findall(r'"(--[\w-]+)"', program) if option not in result.stdout]
    assert missing == []
