"""Undo files in the hands of others: crashes in a row, other programs, hostile bytes, full disks, links."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest

import jqcow
from jqcow import _native
from jqcow.cli.main import main
from jqcow.cli.recover import main as recover_main
from jqcow.device.file import FileDevice
from jqcow.device.trial import TrialDevice
from jqcow.disks.undo import UndoFile, settle_undo, undo_path
from jqcow.errors import CorruptionError, FileAccessDenied, FormatError, JqcowError
from jqcow.offline.undo import undo_repair
from jqcow.ondisk.undo import Mark, UndoHeader, UndoRun
from jqcow.testing import SimulatedDevice
from tests.support.patients import Tables, check
from tests.support.qemu import done, qemu_io

CLUSTER = 4096
DATA = bytes(range(1, 256)) * 200


KillAt = Callable[[str, Callable[[], None]], None]


class Killed(BaseException):
    """The process ends here."""


def sound(cluster: int = CLUSTER, size: int = 1 << 20, data: bytes = DATA) -> Tables:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, size, cluster_size=cluster) as image:
        image.pwrite(data, 0)
    return Tables(device.content())


def damaged() -> Tables:
    tables = sound()
    tables.set_refcount(tables.data, 0)
    return tables


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(damaged().image)
    return path


@pytest.fixture
def content(path: Path) -> bytes:
    return path.read_bytes()


def undo_file(path: Path) -> Path:
    return Path(undo_path(str(path)))


def mark_of(path: Path) -> Mark | None:
    return UndoFile.read(SimulatedDevice(undo_file(path).read_bytes())).mark


def repair(path: Path) -> None:
    jqcow.open(path, "r+", repair="all").close()


def unlink_nothing(path: str) -> None:
    """Be killed instead of removing a file."""
    raise Killed


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> KillAt:
    """Return what does something and is killed just behind a barrier."""

    def kill_at(barrier: str, act: Callable[[], None]) -> None:
        syncing = FileDevice.barrier

        def sync(device: FileDevice, name: str) -> None:
            syncing(device, name)
            if name == barrier:
                raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(FileDevice, "barrier", sync)
            act()

    return kill_at


class TestAnotherImage:
    def test_a_disk_put_into_the_file_stays(self, path: Path, content: bytes, kill_at: KillAt) -> None:
        """It has no magic, as a garbled sector 0 has none, and the file is the same one."""
        repair(path)
        kill_at("undo.header", lambda: undo_repair(path) and None)
        assert path.read_bytes() == content and mark_of(path) is Mark.BEGUN
        disk = b"RAW DISK" * (1 << 18)
        path.write_bytes(disk)
        for attempt in (repair, undo_repair):
            with pytest.raises(FormatError):
                attempt(path)
            assert path.read_bytes() == disk

    def test_one_that_was_lost_comes_back(self, path: Path, content: bytes, kill_at: KillAt) -> None:
        repair(path)
        kill_at("undo.header", lambda: undo_repair(path) and None)
        with path.open("r+b") as file:
            file.write(Random(1).randbytes(CLUSTER))
        repair(path)
        assert mark_of(path) is Mark.DONE
        undo_repair(path)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("is_cut_off", [False, True])
    def test_one_of_the_same_name_is_not_taken_back(
        self, path: Path, content: bytes, is_cut_off: bool
    ) -> None:
        """Nor is its undo file told anything: it may be moved back to its image."""
        repair(path)
        with closing(FileDevice.open(undo_path(str(path)), writable=True)) as undo:
            undo.truncate(UndoFile.read(undo).header.mark_place)
        other, grown = path.with_name("other"), path.read_bytes() + bytes(1 << 20) * is_cut_off
        other.write_bytes(grown)
        other.replace(path)
        with closing(FileDevice.open(path, writable=True)) as device:
            settle_undo(device)
        assert mark_of(path) is None
        repair(path)
        assert path.read_bytes()[: len(content)] == grown[: len(content)]


class TestServed:
    @pytest.fixture
    def served(self, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
        """Take a repair back, and be killed before the undo file goes; return that file."""
        repair(path)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(os, "unlink", unlink_nothing)
            undo_repair(path)
        assert mark_of(path) is Mark.SERVED and path.read_bytes() == content
        return undo_file(path).read_bytes()

    def test_one_that_comes_back_takes_nothing_back(self, path: Path, served: bytes) -> None:
        """Its removal was not durable; the image was used since, and is longer than before and after."""
        undo_file(path).unlink()
        qemu_io(path, "write -P 7 256k 512k")
        undo_file(path).write_bytes(served)
        repair(path)
        with jqcow.open(path) as image:
            assert image.pread(512 << 10, 256 << 10) == b"\7" * (512 << 10)

    @pytest.mark.usefixtures("served")
    def test_it_makes_room_for_the_next(self, path: Path, content: bytes) -> None:
        jqcow.open(path, "r+", repair="all", journal_size=1 << 16).close()
        undo_repair(path)
        assert path.read_bytes() == content and not undo_file(path).exists()

    @pytest.mark.usefixtures("served")
    def test_the_next_is_not_for_those_who_could_read_it(self, path: Path) -> None:
        undo_file(path).chmod(0o644)
        path.chmod(0o600)
        repair(path)
        assert undo_file(path).stat().st_mode & 0o777 == 0o600

    def test_its_removal_is_durable(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        repair(path)
        synced = list[int]()
        syncing = os.fsync

        def sync(descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_ino if not undo_file(path).exists() else 0)
            syncing(descriptor)

        monkeypatch.setattr(os, "fsync", sync)
        undo_repair(path)
        assert path.parent.stat().st_ino in synced


class TestOtherPrograms:
    def test_refcounts_behind_the_old_end_are_not_cut_off(self, tmp_path: Path) -> None:
        """QEMU puts a refcount block there, and frees again what needed it."""
        path = tmp_path / "image.qcow2"
        done("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "32M")
        qemu_io(path, *(f"write -q -P 1 {2 * place}M 4k" for place in range(16)), "write -q -P 2 0 9M")
        tables = Tables(path.read_bytes())
        tables.set_refcount(tables.data, 0)
        path.write_bytes(tables.image)
        repair(path)
        odd = range(11, 32, 2)
        qemu_io(
            path,
            *(f"write -q -P 7 {place}M 1M" for place in odd),
            *(f"discard -q {place}M 1M" for place in odd),
            "write -q -P 9 0 512",
        )
        used = path.read_bytes()
        with pytest.raises(CorruptionError, match="written since"):
            undo_repair(path)
        assert path.read_bytes() == used and not check(used).errors

    def test_a_long_file_of_holes_takes_no_time(self, path: Path, content: bytes) -> None:
        """Cut off on trial, it is neither read nor kept in memory."""
        os.truncate(path, 1 << 35)
        repair(path)
        assert path.stat().st_size < 1 << 30
        undo_repair(path)
        assert path.stat().st_size == 1 << 35
        with path.open("rb") as file:
            assert file.read(len(content)) == content
        assert path.stat().st_blocks * 512 < 1 << 30


class TestRefused:
    def test_still_corrupt_after_the_repair(self, tmp_path: Path) -> None:
        """The repair is kept, and so is what takes it back."""
        data = Random(2).randbytes(64 << 16)
        tables = sound(1 << 16, 64 << 20, data)
        tables.image[79] |= 2
        tables.image[tables.l2 : tables.l2 + (1 << 16)] = bytes(1 << 16)
        tables.set_refcount(tables.l1, 0)
        path, content = tmp_path / "lost.qcow2", bytes(tables.image)
        path.write_bytes(content)
        with pytest.raises(CorruptionError, match="still corrupt"):
            repair(path)
        assert path.read_bytes() != content
        undo_repair(path)
        assert path.read_bytes() == content

    def test_an_image_whose_backing_file_may_not_be_opened(self, tmp_path: Path) -> None:
        base, path = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
        base.write_bytes(bytes(1 << 20))
        jqcow.create(path, 1 << 20, backing_file="base.raw", backing_format="raw", allow_files=True).close()
        tables = Tables(path.read_bytes())
        tables.set_refcount(tables.l1, 0)
        path.write_bytes(tables.image)
        with pytest.raises(FileAccessDenied):
            repair(path)
        assert path.read_bytes() == tables.image and not undo_file(path).exists()

    @pytest.mark.parametrize(
        "options",
        [["--undo", "--dry-run"], ["--undo", "--no-check"], ["--undo", "--journal-size", "1M"], ["--force"]],
        ids=" ".join,
    )
    def test_options_that_say_nothing_of_it(
        self, path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        repair(path)
        after = path.read_bytes()
        assert recover_main([*options, str(path)]) == 1
        assert "go" in capsys.readouterr().err
        assert path.read_bytes() == after and undo_file(path).exists()


class TestHostile:
    @pytest.mark.parametrize("header_length", [1 << 30, 600])
    def test_the_header_in_it(self, path: Path, content: bytes, header_length: int) -> None:
        old = bytearray(content[:CLUSTER])
        old[100:104] = header_length.to_bytes(4, "big")
        crcs = tuple(_native.crc32c(content[at : at + 512]) for at in range(0, CLUSTER, 512))
        run = UndoRun(0, bytes(old), crcs)
        header = UndoHeader(len(content), len(content), 1, run.length)
        for at in (0, 512):
            undo_file(path).write_bytes(header.pack() + run.pack())
            os.truncate(path, len(content) + at)
            with pytest.raises(JqcowError):
                undo_repair(path, force=True)
            assert path.read_bytes()[: len(content)] == content and mark_of(path) is None
        with suppress(FileExistsError):
            repair(path)

    def test_a_header_that_was_lost(self, path: Path, content: bytes) -> None:
        old = bytearray(content[:CLUSTER])
        old[100:104] = (8).to_bytes(4, "big")
        crcs = tuple(_native.crc32c(content[at : at + 512]) for at in range(0, CLUSTER, 512))
        run = UndoRun(0, bytes(old), crcs)
        undo_file(path).write_bytes(UndoHeader(len(content), len(content), 1, run.length).pack() + run.pack())
        undo_repair(path, force=True)
        assert path.read_bytes() == bytes(old) + content[CLUSTER:]

    def test_a_link_under_its_name(self, path: Path, content: bytes) -> None:
        elsewhere = path.with_name("elsewhere")
        undo_file(path).symlink_to(elsewhere)
        with pytest.raises((jqcow.ImageInUse, FileExistsError, FileNotFoundError)):
            repair(path)
        assert path.read_bytes() == content and not elsewhere.exists()

    def test_a_directory_under_its_name(self, path: Path, content: bytes) -> None:
        undo_file(path).mkdir()
        with pytest.raises(FileExistsError):
            repair(path)
        assert path.read_bytes() == content
        jqcow.open(path, "r+").close()

    def test_a_link_that_is_switched_meanwhile(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The undo file of another image stays."""
        other, link = path.with_name("other.qcow2"), path.with_name("link.qcow2")
        other.write_bytes(path.read_bytes())
        repair(path)
        repair(other)
        link.symlink_to(path)
        syncing = FileDevice.barrier

        def sync(device: FileDevice, name: str) -> None:
            syncing(device, name)
            if name == "undo.end":
                link.unlink()
                link.symlink_to(other)

        monkeypatch.setattr(FileDevice, "barrier", sync)
        undo_repair(link)
        assert undo_file(other).exists() and not undo_file(path).exists()


class TestFullDisks:
    def test_what_was_cut_off_needs_space(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with path.open("ab") as file:
            file.write(Random(3).randbytes(3 << 20))
        content = path.read_bytes()
        repair(path)
        after = path.read_bytes()
        assert len(after) < len(content)
        allocating = FileDevice.allocate

        def allocate(device: FileDevice, offset: int, length: int) -> None:
            if offset > 2 << 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allocating(device, offset, length)

        with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
            full.setattr(FileDevice, "allocate", allocate)
            undo_repair(path)
        assert path.read_bytes() == after
        undo_repair(path)
        assert path.read_bytes() == content

    def test_a_disk_that_fills_up_behind_the_trial(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shorter journal would put the new refcount table elsewhere."""
        tables, path = sound(), tmp_path / "image.qcow2"
        tables.set_entry(48, 0x7777001)
        path.write_bytes(tables.image)
        answers = iter([1 << 40])
        with monkeypatch.context() as full:
            full.setattr(FileDevice, "free_bytes", lambda device: next(answers, 2 << 20))
            with suppress(OSError):
                repair(path)
        undo_repair(path)
        assert path.read_bytes() == tables.image


class TestTrial:
    """The device that a repair is tried on, against a plain byte array."""

    @pytest.mark.parametrize("seed", range(30))
    def test_it_reads_as_what_was_done_to_it(self, seed: int) -> None:
        chance, block = Random(seed), 1 << 16
        below = SimulatedDevice(chance.randbytes(5 * block + chance.randrange(block)))
        before = below.content()
        trial, wanted = TrialDevice(below), bytearray(before)
        for _ in range(40):
            place, length = chance.randrange(8 * block), chance.choice((1, 512, 5000, block, 3 * block))
            match chance.randrange(4):
                case 0:
                    trial.pwrite(chance.randbytes(length), place)
                    end = max(len(wanted), place + length)
                    wanted.extend(bytes(end - len(wanted)))
                    wanted[place : place + length] = trial.pread(length, place)
                case 1:
                    place = min(place, len(wanted))
                    length = min(length, len(wanted) - place)
                    trial.punch(place, length)
                    wanted[place : place + length] = bytes(length)
                case 2:
                    trial.truncate(place)
                    wanted = wanted[:place].ljust(place, b"\0")
                case 3:
                    trial.allocate(place, length)
                    wanted.extend(bytes(max(0, place + length - len(wanted))))
            assert trial.size() == len(wanted)
            assert trial.pread(len(wanted), 0) == bytes(wanted)
        after = bytes(wanted).ljust(len(before), b"\0")
        units = [
            at
            for at in range(0, len(before), 512)
            if before[at : at + 512] != after[at : at + 512][: len(before) - at]
        ]
        assert [offset for offset, *_ in trial.changed()] == units
        assert below.content() == before

    def test_what_is_kept_of_a_long_hole(self) -> None:
        """Nothing: a terabyte is cut off, and comes back."""
        below = SimulatedDevice(DATA)
        trial = TrialDevice(below)
        for _ in range(3):
            trial.truncate(1 << 40)
            trial.punch(1 << 20, 1 << 39)
            trial.truncate(0)
        assert [offset for offset, *_ in trial.changed(4096)] == list(range(0, len(DATA), 4096))


def test_bytes_are_a_path(path: Path, content: bytes) -> None:
    repair(path)
    jqcow.open(os.fsencode(path), "r+").close()  # type: ignore[arg-type]
    assert main(["undo", str(path)]) == 0
    assert path.read_bytes() == content


def test_an_undo_of_a_repair_without_a_mark_needs_no_word(path: Path, content: bytes) -> None:
    """One that was cut off before its journal went: the image has that space behind its end."""
    repair(path)
    with closing(FileDevice.open(undo_path(str(path)), writable=True)) as undo:
        undo.truncate(UndoFile.read(undo).header.mark_place)
    os.truncate(path, path.stat().st_size + (1 << 20))
    jqcow.open(path, "r+", repair="all", journal_size=1 << 16).close()
    undo_repair(path)
    assert path.read_bytes() == content


def test_what_lies_behind_a_crashed_image_comes_back(tmp_path: Path) -> None:
    """Recovery before a repair trusts no refcount: it cuts nothing off that the undo file would lack."""
    device, path = SimulatedDevice(), tmp_path / "crashed.qcow2"
    image = jqcow.create_on_device(device, 1 << 20, cluster_size=CLUSTER)
    image.pwrite(DATA, 0)
    image.flush()
    lost = Random(4).randbytes(1 << 20)
    path.write_bytes(device.content() + lost)
    repair(path)
    if undo_file(path).exists():
        undo_repair(path)
    assert lost in path.read_bytes()


@pytest.mark.parametrize(
    "options", [{"compat": "0.10"}, {"extended_l2": True, "cluster_size": 1 << 14}], ids=str
)
def test_images_of_other_forms_come_back(path: Path, options: dict[str, Any], kill_at: KillAt) -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 1 << 20, **{"cluster_size": CLUSTER, **options}) as image:
        image.pwrite(DATA, 0)
    tables = Tables(device.content())
    tables.set_refcount(tables.data, 0)
    content = bytes(tables.image)
    path.write_bytes(content)
    for barrier in ("undo.begin", "undo.root", "undo.image", "undo.header"):
        repair(path)
        assert path.read_bytes() != content
        kill_at(barrier, lambda: undo_repair(path) and None)
        if barrier in ("undo.root", "undo.image"):
            told = subprocess.run(["qemu-img", "info", path], capture_output=True, text=True, check=False)
            assert told.returncode, "QEMU opens an image that is half taken back"
        undo_repair(path)
        assert path.read_bytes() == content
