"""Does jqcow-recover keep what was acknowledged, say what it found, and leave alone what it should?"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

import jqcow
from jqcow.cli import recover as command
from jqcow.offline.recover import RecoveryReport, recover_image
from jqcow.ondisk.root import ROOT_COPY_BYTES, ROOT_COPY_OFFSET, unpack_root
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.users import in_place

MIB = 1 << 20
CLUSTER = 65536
JOURNAL = 65536

WRITER = """
import os, signal, sys, jqcow
image = jqcow.create(sys.argv[1], 64 << 20)
for index in range(20):
    image.pwrite(bytes([index + 1]) * 4096, index * 65536)
    image.flush()
    print(index, flush=True)
image.pwrite(b"z" * 70000, 32 << 20)
os.kill(os.getpid(), signal.SIGKILL)
"""


def seeded_salts() -> Callable[[], bytes]:
    numbers = count(1)
    return lambda: struct.pack(">QQ", 0, next(numbers))


def crashed_device(flushes: int = 3, journal_size: int = 8 * MIB) -> SimulatedDevice:
    """Return the device of a writer that was killed after a few flushes of one cluster each."""
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, 64 * MIB, journal_size=journal_size, new_salt=seeded_salts())
    in_place(image)
    for index in range(flushes):
        image.pwrite(bytes([index + 1]) * 4096, index * CLUSTER)
        image.flush()
    return device.killed()


def crashed_file(path: Path, flushes: int = 3, journal_size: int = 8 * MIB) -> Path:
    device = crashed_device(flushes, journal_size)
    path.write_bytes(device.pread(device.size(), 0))
    return path


def assert_acknowledged(image: jqcow.Image, flushes: int) -> None:
    for index in range(flushes):
        assert image.pread(4096, index * CLUSTER) == bytes([index + 1]) * 4096


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    return crashed_file(tmp_path / "disk.qcow2")


def run(*arguments: str | Path) -> int:
    return command.main([str(argument) for argument in arguments])


def test_recovers_and_reports(crashed: Path) -> None:
    report = recover_image(crashed)
    assert report.state == "live"
    assert report.journal is not None
    assert (report.journal.first_sequence, report.journal.last_sequence) == (1, 4)
    assert report.journal.record_count == 4
    assert report.journal.torn_tail is None
    assert report.verification is not None
    verified = report.verification
    assert (verified.errors, verified.leaks, verified.lost) == (0, 0, 0)
    with jqcow.open(crashed) as image:
        assert image.recovered is None
        assert_acknowledged(image, 3)


def test_second_run_changes_nothing_and_says_so(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(crashed) == 0
    once = crashed.read_bytes()
    capsys.readouterr()
    assert run(crashed) == 0
    assert "clean, nothing to do" in capsys.readouterr().out
    assert crashed.read_bytes() == once


def test_dry_run_writes_nothing_and_works_on_a_read_only_file(crashed: Path) -> None:
    before = crashed.read_bytes()
    crashed.chmod(0o444)
    report = recover_image(crashed, dry_run=True)
    assert report.dry_run
    assert report.journal is not None
    assert report.verification is not None
    verified = report.verification
    assert (verified.errors, verified.leaks, verified.lost) == (0, 0, 0)
    assert crashed.read_bytes() == before


def test_dry_run_never_calls_what_changes_a_device() -> None:
    device = crashed_device()
    frozen = SimulatedDevice(device.pread(device.size(), 0), read_only=True)
    assert recover_image(frozen, dry_run=True).journal is not None


def test_dry_run_and_recovery_find_the_same(crashed: Path) -> None:
    planned, done = recover_image(crashed, dry_run=True), recover_image(crashed)
    assert (planned.journal, planned.actions) == (done.journal, done.actions)


def last_frame(path: Path, report: RecoveryReport) -> int:
    """Return the host offset of the newest frame: each of these takes one slot of 4096 bytes."""
    assert report.journal is not None
    half = report.journal.offset + report.journal.epoch % 2 * report.journal.length // 2
    return half + (report.journal.record_count - 1) * 4096


def test_torn_tail_is_dropped_and_explained(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offset = last_frame(crashed, recover_image(crashed, dry_run=True))
    with crashed.open("r+b") as file:
        file.seek(offset + 512)
        file.write(b"\xff" * 512)
    report = recover_image(crashed, dry_run=True)
    assert report.journal is not None
    assert report.journal.torn_tail is not None
    assert (report.journal.torn_tail.sequence, report.journal.torn_tail.offset) == (4, offset)
    assert run(crashed) == 0
    told = capsys.readouterr().out
    assert "record 4" in told
    assert "No flush returned for it" in told
    with jqcow.open(crashed) as image:
        assert_acknowledged(image, 2)


def test_stale_frames_of_earlier_epochs_are_counted(tmp_path: Path) -> None:
    path = crashed_file(tmp_path / "disk.qcow2", flushes=20, journal_size=JOURNAL)
    report = recover_image(path)
    assert report.journal is not None
    assert report.journal.epoch > 1
    assert report.journal.stale_frames > 0
    with jqcow.open(path) as image:
        assert_acknowledged(image, 20)


def test_root_copy_serves_when_sector_0_is_lost(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with crashed.open("r+b") as file:
        file.write(b"\xa5" * 4096)
    with pytest.raises(jqcow.CorruptionError, match="jqcow-recover"):
        jqcow.open(crashed, "r+")
    assert recover_image(crashed, dry_run=True).state == "live by root copy"
    assert run(crashed) == 0
    assert "its copy is whole" in capsys.readouterr().out
    with jqcow.open(crashed) as image:
        assert_acknowledged(image, 3)


def test_a_journal_left_behind_is_told_and_given_back(
    crashed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = crashed.read_bytes()
    recover_image(crashed)
    closed = crashed.read_bytes()
    # As if the close had been cut off before it cleared the root copy and gave the journal's space back.
    copy_end = ROOT_COPY_OFFSET + ROOT_COPY_BYTES
    copy = live[ROOT_COPY_OFFSET:copy_end]
    _, extent = unpack_root(live[:512])
    left = bytearray(closed[:ROOT_COPY_OFFSET] + copy + closed[copy_end:]).ljust(extent.end, b"\0")
    left[extent.offset : extent.end] = live[extent.offset : extent.end]
    crashed.write_bytes(left)
    assert run("--dry-run", crashed) == 0
    assert "a crash left its journal behind, which can be given back" in capsys.readouterr().out
    assert run(crashed) == 0
    assert "which is given back" in capsys.readouterr().out
    assert crashed.read_bytes() == closed
    assert run(crashed) == 0
    assert "clean, nothing to do" in capsys.readouterr().out


def states_inside(recover: Callable[[SimulatedDevice], object]) -> Iterator[tuple[str, SimulatedDevice]]:
    """Yield what a kill at each barrier of a recovery leaves, just before the barrier is complete."""
    device = crashed_device()
    left: list[tuple[str, SimulatedDevice]] = []

    def listen(name: str, now: SimulatedDevice) -> None:
        left.append((name, now.killed()))

    device.barrier_listeners.append(listen)
    recover(device)
    yield from left


def test_a_recovery_killed_at_any_barrier_is_recovered() -> None:
    """The moved frames must carry the salt of the journal that they moved to."""
    names = []
    for name, device in states_inside(lambda device: recover_image(device, new_salt=seeded_salts())):
        names.append(name)
        report = recover_image(device)
        assert report.verification is not None
        verified = report.verification
        assert (verified.errors, verified.leaks, verified.lost) == (0, 0, 0), name
        with jqcow.open_device(device) as image:
            assert_acknowledged(image, 3)
    assert {"open.settle", "recover.root", "move.range", "move.root", "close.clear"} <= set(names)


def set_refcount(path: Path, cluster: int, value: int) -> None:
    with path.open("r+b") as file:
        (table,) = struct.unpack_from(">Q", file.read(104), 48)
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        file.seek(block + 2 * cluster)
        file.write(struct.pack(">H", value))


def mapped_cluster(path: Path) -> int:
    with jqcow.open(path) as image:
        host = next(image.extents()).host_offset
    assert host is not None
    return host // CLUSTER


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[int], Path]:
    """Make a crashed image in which a data cluster had a wrong refcount before the session began."""

    def make(refcount: int) -> Path:
        path = tmp_path / "disk.qcow2"
        with jqcow.create(path, 64 * MIB) as image:
            image.pwrite(b"a" * CLUSTER, 0)
        set_refcount(path, mapped_cluster(path), refcount)
        image = jqcow.open(path, "r+")
        image.pwrite(b"b" * CLUSTER, 8 * MIB)
        image.flush()
        left = path.read_bytes()
        image.close()
        path.write_bytes(left)
        return path

    return make


def test_foreign_corruption_is_reported_after_recovery(
    damaged: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged(0)
    assert run(path) == 2
    told = capsys.readouterr().out
    assert "it is recovered" in told
    assert "damaged in a way that no crash of jqcow leaves" in told
    with jqcow.open(path) as image:
        assert image.recovered is None
        assert image.pread(4, 8 * MIB) == b"bbbb"


def test_leaks_have_an_exit_code_of_their_own(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recover_image(crashed)
    with crashed.open("ab") as file:
        file.truncate(300 * CLUSTER)
    set_refcount(crashed, 290, 1)
    assert run(crashed) == 3
    assert "1 leaked cluster" in capsys.readouterr().out
    assert run("--no-check", crashed) == 0


def test_a_lost_journal_is_not_guessed_at(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = recover_image(crashed, dry_run=True)
    assert report.journal is not None
    with crashed.open("r+b") as file:
        file.seek(report.journal.offset)
        file.write(bytes(report.journal.length))
    before = crashed.read_bytes()
    assert run(crashed) == 1
    told = capsys.readouterr().err
    assert "no valid frame" in told
    assert "copy the image" in told
    assert len(told.splitlines()) == 1
    assert crashed.read_bytes() == before


def test_an_image_in_use_is_refused(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with jqcow.open(crashed):
        assert run(crashed) == 4
    assert "in use" in capsys.readouterr().err


def test_what_is_not_an_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_bytes(b"hello" * 1000)
    assert run(tmp_path / "text") == 1
    assert run(tmp_path / "missing") == 1
    assert run(tmp_path) == 1
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("jqcow-recover: ")
        assert str(tmp_path) in line


@pytest.mark.parametrize("arguments", [[], ["--unknown", "x"], ["--output=xml", "x"], ["x", "y"]])
def test_wrong_arguments_exit_with_1(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == 1


def test_json_has_every_field(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--dry-run", "--output=json", crashed) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "live"
    assert told["dry-run"] is True
    assert told["journal"]["record-count"] == 4
    assert told["verification"]["errors"] == 0
    assert told["image"] == str(crashed)
    assert told["actions"]


def test_a_killed_process_is_recovered(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    killed = subprocess.run(
        [sys.executable, "-c", WRITER, str(path)], capture_output=True, env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    acknowledged = len(killed.stdout.split())
    assert acknowledged == 20
    report = recover_image(path)
    assert report.journal is not None
    assert report.journal.record_count >= acknowledged
    with jqcow.open(path) as image:
        assert_acknowledged(image, acknowledged)


def test_refcounts_that_are_counted_anew_are_told() -> None:
    """A writer that died while it repaired a dirty image leaves the bit set, and a live journal."""
    device = SimulatedDevice()
    with jqcow.create_on_device(device, MIB, cluster_size=CLUSTER) as image:
        image.pwrite(b"data", 0)
    device.reopen()
    device.pwrite(bytes([1]), 79)
    refcounts = int.from_bytes(device.pread(8, int.from_bytes(device.pread(8, 48), "big")), "big")
    device.pwrite((1).to_bytes(2, "big"), refcounts + 2 * 30)
    device.faults = FaultPlan(Fault(KeyboardInterrupt(), call="barrier", barrier_name="flush.record"))
    with pytest.raises(KeyboardInterrupt):
        jqcow.open_device(device, "r+")
    planned = recover_image(device.killed(), dry_run=True)
    crashed = device.killed()
    done = recover_image(crashed)
    assert planned.state == done.state == "live"
    assert planned.actions == done.actions
    assert any("count the refcounts anew" in action for action in done.actions)
    assert planned.verification is not None and planned.verification.leaks == 1
    assert planned.notes == ("what is checked is before the refcounts are counted anew",)
    assert done.notes == ("refcounts were 1 too high, 0 too low, and 0 COPIED flags wrong",)
    assert done.verification is not None and done.verification.leaks == 0
