"""A full disk: it is said, nothing is lost, and the work goes on once there is room again."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import jqcow
from jqcow.testing import SectorModel
from tests.outside import hosts
from tests.outside.history import data_of
from tests.outside.sessions import environment, read_disk, writer_command
from tests.support import qemu

MIB = 1 << 20
HOST_BYTES = 12 * MIB
DISK_BYTES = 16 * MIB
STEP_BYTES = 192 << 10
JOURNAL_BYTES = 64 << 10

FullHost = Callable[[Path, int], AbstractContextManager[Path]]


@pytest.fixture(params=[hosts.tmpfs, hosts.ext4], ids=["tmpfs", "ext4"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, with a file on it that can be removed to make room."""
    make: FullHost = request.param
    with make(tmp_path / "host", HOST_BYTES) as mounted:
        (mounted / "ballast").write_bytes(b"\1" * (3 * MIB))
        yield mounted


class User:
    """A user of an image, with a model of what the disk must hold."""

    def __init__(self, path: Path, cluster_bytes: int) -> None:
        self.path = path
        self.image = jqcow.create(path, DISK_BYTES, cluster_size=cluster_bytes, journal_size=JOURNAL_BYTES)
        self.model = SectorModel(DISK_BYTES)
        self._number = 0

    def write(self, offset: int, length: int = STEP_BYTES) -> None:
        """Write fresh data to the image."""
        self._number += 1
        data = data_of(0, self._number, length)
        with self.model.write(offset, data):
            self.image.pwrite(data, offset)

    def flush(self) -> None:
        """Flush; from then on it is promised."""
        with self.model.flush():
            self.image.flush()

    def fill(self, start: int = 0) -> int:
        """Write on and on, with a flush now and then, until the disk is full; return where that was."""
        for offset in range(start, DISK_BYTES, STEP_BYTES):
            try:
                self.write(offset)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                return offset
            if offset // STEP_BYTES % 4 == 3:
                self.flush()
        raise AssertionError("the host never got full")

    def look(self) -> None:
        """The running image is consistent and reads as it must."""
        report = self.image.check()
        assert report.ok, report.findings[:2]
        violations = self.model.expect_now(self.image.pread)
        assert not violations, violations[0]

    def close(self) -> None:
        """Close the image; QEMU finds it clean, and it holds what it must."""
        self.image.close()
        complaint = qemu.complaint(self.path)
        assert not complaint, complaint
        content = read_disk(self.path)
        violations = self.model.expect_now(lambda length, offset: content[offset : offset + length])
        assert not violations, violations[0]


def judge_copy(user: User, folder: Path) -> None:
    """As the file is now, were the process killed: it is recovered elsewhere and holds what was promised."""
    copy = folder / "copy.qcow2"
    shutil.copyfile(user.path, copy)
    with jqcow.open(copy, "r+") as image:
        report = image.check()
        assert report.ok, report.findings[:2]
        violations = user.model.check(image.pread)
        assert not violations, violations[0]
    complaint = qemu.complaint(copy)
    assert not complaint, complaint
    copy.unlink()


@pytest.mark.parametrize("cluster_bytes", [4096, 65536])
def test_work_goes_on_after_a_full_disk(host: Path, tmp_path: Path, cluster_bytes: int) -> None:
    user = User(host / "image.qcow2", cluster_bytes)
    stopped_at = user.fill()
    user.look()

    # What the host has room for already can be overwritten, and made durable.
    user.write(0)
    user.flush()
    user.look()
    judge_copy(user, tmp_path)

    with pytest.raises(OSError, match="No space left") as caught:
        user.write(stopped_at)
    assert caught.value.errno == errno.ENOSPC
    user.look()

    (host / "ballast").unlink()
    user.write(stopped_at)
    user.flush()
    user.look()
    judge_copy(user, tmp_path)
    user.close()


@pytest.mark.parametrize("cluster_bytes", [4096, 65536])
def test_a_transaction_too_large_for_the_disk_never_happened(
    host: Path, tmp_path: Path, cluster_bytes: int
) -> None:
    user = User(host / "image.qcow2", cluster_bytes)
    user.write(0, 2 * MIB)
    user.flush()
    with pytest.raises(OSError, match="No space left"), user.image.transaction() as transaction:
        for offset in range(0, DISK_BYTES, STEP_BYTES):
            length = min(STEP_BYTES, DISK_BYTES - offset)
            transaction.pwrite(b"\2" * length, offset)
    user.look()
    judge_copy(user, tmp_path)

    # A flush gives its clusters back to the host: the same room serves another one, of a size that fits.
    user.flush()
    data = data_of(1, 1, 2 * MIB)
    with user.model.write(0, data, durable=True), user.image.transaction() as transaction:
        transaction.pwrite(data, 0)
    user.look()
    judge_copy(user, tmp_path)
    user.close()


def test_closing_needs_no_room(host: Path) -> None:
    user = User(host / "image.qcow2", 65536)
    user.fill()
    hosts.fill_up(host / "more")
    user.close()


def test_discarding_makes_room(host: Path) -> None:
    user = User(host / "image.qcow2", 65536)
    stopped_at = user.fill()
    user.flush()
    with user.model.discard(0, 4 * MIB):
        user.image.discard(4 * MIB, 0)
    user.flush()
    user.flush()
    user.write(stopped_at)
    user.flush()
    user.look()
    user.close()


def test_recovery_needs_no_room(host: Path, tmp_path: Path) -> None:
    """It takes the space of what is dead in the journal (J7)."""
    path = host / "image.qcow2"
    options = ("--operations", 60, "--create", MIB, "--cluster-size", 65536, "--end", "exit")
    subprocess.run(
        writer_command(path, 5, *options), env=environment(), stdout=subprocess.DEVNULL, check=True
    )
    hosts.fill_up(host / "more")
    found = read_disk(path)
    copy = tmp_path / "copy.qcow2"
    shutil.copyfile(path, copy)
    with jqcow.open(path, "r+") as image:
        assert image.recovered is not None
        assert image.pread(image.size, 0) == found
        # The old journal's space serves what comes next.
        image.pwrite(b"n" * 65536, image.size - 65536)
        image.flush()
    assert not qemu.complaint(path)
    with jqcow.open(copy, "r+") as image:
        assert image.pread(image.size, 0) == found


def test_discarding_begins_with_little_room(tmp_path: Path) -> None:
    """Less than the default journal takes is free, and freeing needs one."""
    with hosts.tmpfs(tmp_path / "host", HOST_BYTES) as mounted:
        path = mounted / "image.qcow2"
        with jqcow.create(path, DISK_BYTES, journal_size=JOURNAL_BYTES) as image:
            image.pwrite(b"a" * (8 * MIB), 0)
            image.create_snapshot("a")
            image.pwrite(b"b" * (2 * MIB), 0)
        with jqcow.open(path, "r+") as image:
            image.discard(2 * MIB, 0)
            journal = image.info().journal
            assert journal is not None and JOURNAL_BYTES <= journal.length < MIB
            image.delete_snapshot("a")
        assert not qemu.complaint(path)


def test_no_room_for_any_journal(tmp_path: Path) -> None:
    """The error says what is needed, and what there is."""
    with hosts.tmpfs(tmp_path / "host", HOST_BYTES) as mounted:
        path = mounted / "image.qcow2"
        with jqcow.create(path, DISK_BYTES) as image:
            image.pwrite(b"a", 0)
        hosts.fill_up(mounted / "more")
        with (
            jqcow.open(path, "r+") as image,
            pytest.raises(OSError, match="journal needs 65536 bytes, 0 bytes are free") as caught,
        ):
            image.discard(DISK_BYTES, 0)
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
        assert not qemu.complaint(path)


def test_no_room_for_an_image_leaves_nothing(host: Path) -> None:
    hosts.fill_up(host / "more")
    with pytest.raises(OSError, match="No space left"):
        jqcow.create(host / "image.qcow2", MIB)
    assert sorted(path.name for path in host.iterdir() if path.is_file()) == ["ballast", "more"]
