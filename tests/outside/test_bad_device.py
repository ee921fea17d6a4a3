"""A device that goes bad: the error is raised, the image turns read-only, the next opening recovers it."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow.testing import Fault, FaultPlan, Ledger, SimulatedDevice
from tests.outside import hosts
from tests.outside.history import Expectation
from tests.outside.recorder import BarrierEnded, CallFailed, Message
from tests.outside.sessions import Session, crash, read_disk, record_session
from tests.outside.test_full_disk import JOURNAL_BYTES, MIB, STEP_BYTES, User
from tests.support import qemu

DEVICE_BYTES = 64 * MIB
BACKING_BYTES = 16 * MIB


@pytest.fixture
def backing(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that is smaller than the device whose sectors lie on it."""
    with hosts.tmpfs(tmp_path / "backing", BACKING_BYTES) as mounted:
        yield mounted


@pytest.mark.parametrize("cluster_bytes", [4096, 65536])
def test_a_device_that_loses_what_it_took(tmp_path: Path, backing: Path, cluster_bytes: int) -> None:
    """The file system takes the writes, the device below it cannot keep them: only the barrier says so."""
    device_file = backing / "device"
    hosts.make_ext4(device_file, DEVICE_BYTES)
    folder = tmp_path / "host"
    with hosts.loop_mounted(device_file, folder):
        user = User(folder / "image.qcow2", cluster_bytes)
        for step in range(4):
            user.write(step * STEP_BYTES)
            user.flush()
        with user.model.write(0, bytes(MIB), durable=True), user.image.transaction() as transaction:
            transaction.pwrite(bytes(MIB), 0)
        hosts.fill_up(backing / "ballast")

        with pytest.raises(OSError, match=r"image\.qcow2") as caught:
            # With small clusters the fifth write or so commits by itself, to bound memory.
            for step in range(8):
                user.write(2 * MIB + step * STEP_BYTES)
            user.flush()
        # Newer kernels hand on why the loop device failed.
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)
        for change in (
            lambda: user.image.pwrite(b"\3", 0),
            user.image.flush,
            user.image.checkpoint,
            lambda: user.image.discard(MIB, 0),
        ):
            with pytest.raises(jqcow.PoisonedError):
                change()
        size = user.path.stat().st_size
        user.image.close()
        assert user.path.stat().st_size == size

    # The cache is gone with the mount: what is read now is what the device really holds.
    (backing / "ballast").unlink()
    hosts.repair_ext4(device_file)
    with hosts.loop_mounted(device_file, folder):
        with jqcow.open(user.path, "r+") as image:
            assert image.recovered is not None
            report = image.check()
            assert report.ok, report.findings[:2]
            violations = user.model.check(image.pread)
            assert not violations, violations[0]
            image.pwrite(b"\4" * STEP_BYTES, 0)
        assert not qemu.complaint(user.path)
        assert read_disk(user.path)[:STEP_BYTES] == b"\4" * STEP_BYTES


@pytest.mark.parametrize("cluster_bytes", [4096, 65536])
def test_what_a_device_lost_is_not_promised_by_the_next_writer(
    tmp_path: Path, backing: Path, cluster_bytes: int
) -> None:
    """The page cache shows what the barrier lost, and a snapshot of it would be a promise."""
    device_file = backing / "device"
    hosts.make_ext4(device_file, DEVICE_BYTES, journal=False)
    folder = tmp_path / "host"
    with hosts.loop_mounted(device_file, folder):
        user = User(folder / "image.qcow2", cluster_bytes)
        user.write(0)
        user.flush()
        hosts.fill_up(backing / "ballast")
        with pytest.raises(OSError):
            for step in range(8):
                user.write(2 * MIB + step * STEP_BYTES)
            user.flush()
        shown = user.image.pread(DEVICE_BYTES // 16, 2 * MIB)
        user.image.close()
        (backing / "ballast").unlink()
        with jqcow.open(user.path, "r+") as image:
            read = image.pread(image.size, 0)
            image.create_snapshot("promised")
        assert read[2 * MIB :][: len(shown)] != shown, "the device lost nothing"

    hosts.repair_ext4(device_file)
    with hosts.loop_mounted(device_file, folder):
        assert read_disk(user.path) == read
        with jqcow.open(user.path, snapshot="promised") as image:
            assert image.pread(image.size, 0) == read
        assert not qemu.complaint(user.path)


# One call of a real process fails, in the kernel's place: which kind, with what, at which one of its kind.
INJECTIONS = [
    f"{call}:error={error}:when={when}"
    for call, error, whens in (
        ("fdatasync", "EIO", (2, 7, 10, 14)),
        ("pwrite64", "EIO", (3, 12, 20, 30)),
        ("pwrite64", "ENOSPC", (8, 17, 24)),
        ("fallocate", "ENOSPC", (1, 2)),
    )
    for when in whens
]


def failures_in(session: Session) -> Counter[str]:
    """Return how often each kind of call failed in the last process."""
    failed: Counter[str] = Counter()
    for event in session.runs[-1].recording.events:
        if isinstance(event, CallFailed) or (isinstance(event, BarrierEnded) and event.failed):
            failed[event.call] += 1
    return failed


def judge_file(session: Session, image: Path) -> None:
    """The file as the process left it is recovered, and holds what the process was promised."""
    expectation = Expectation(session.disk_bytes)
    for run in session.runs:
        if run.found is not None:
            expectation.found(run.found)
        expectation.seed = run.seed
        for event in run.recording.events:
            if isinstance(event, Message):
                expectation.tell(event.content)
    with jqcow.open(image, "r+") as opened:
        report = opened.check()
        assert report.ok, report.findings[:2]
        violations = expectation.check(opened.pread)
        assert not violations, violations[0]
    complaint = qemu.complaint(image)
    assert not complaint, complaint


@pytest.mark.parametrize("injection", INJECTIONS)
def test_a_call_that_fails(tmp_path: Path, injection: str) -> None:
    seed = INJECTIONS.index(injection) * 2
    session = record_session(tmp_path, seed, operations=25, inject=injection)
    assert session.replayed_content() == session.content
    call = injection.partition(":")[0]
    failures = failures_in(session)
    if failures != {"punch": 1}:
        # A punch only gives room back: it may fail without a word, the rest may not.
        assert failures == {call: 1}
        assert session.runs[-1].status != 0, "the error was not raised"
    crash(session, Ledger(), budget=4, depth=1)
    judge_file(session, tmp_path / "image.qcow2")


def test_a_failed_punch_does_not_deny_a_durable_commit() -> None:
    """The commit comes first, then the punch. An error of the punch once read as if nothing had happened."""
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, 4 * 65536, journal_size=JOURNAL_BYTES)
    image.pwrite(b"old" * 512, 0)
    image.flush()
    device.faults = FaultPlan(Fault(errno.ENOSPC, call="punch"))
    with image.transaction() as transaction:
        transaction.pwrite(b"new" * 512, 0)
    assert transaction.receipt is not None
    assert device.faults.calls["punch"] == 1
    assert image.pread(3, 0) == b"new"
    assert image.check().ok
    device.faults = None
    with image.transaction() as transaction:
        transaction.pwrite(b"later" * 512, 2 * 65536)
    image.close()
    device.reopen()
    again = jqcow.open_device(device, "r")
    assert (again.pread(3, 0), again.pread(5, 2 * 65536)) == (b"new", b"later")
    assert again.check().ok
