"""Repairs taken back: the image gets the very bytes that it had before."""

from __future__ import annotations

import errno
import stat
import subprocess
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.main import main
from jqcow.cli.recover import main as recover_main
from jqcow.device import names
from jqcow.device.base import ReadBuffer
from jqcow.device.file import FileDevice
from jqcow.device.trial import TrialDevice
from jqcow.disks.undo import UndoFile, pack_undo, undo_on, undo_path
from jqcow.engine.repair import What
from jqcow.errors import CorruptionError, FormatError, JqcowError
from jqcow.offline.commit import commit
from jqcow.offline.recover import recover_image
from jqcow.offline.undo import undo_repair
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import Header
from jqcow.ondisk.undo import BLOCK_BYTES, HEADER_BYTES, Mark, UndoHeader, UndoRun
from jqcow.testing import SimulatedDevice, enumerate_states
from tests.support.patients import Tables
from tests.support.qemu import done

CLUSTER = 4096
DATA = bytes(range(1, 256)) * 200
Damage = Callable[[Tables], None]


def double_allocation(tables: Tables) -> None:
    tables.set_entry(tables.l2 + 8, tables.entry(tables.l2))


def no_refcount_table(tables: Tables) -> None:
    tables.set_entry(48, 0x7777001)


def no_refcounts(tables: Tables) -> None:
    tables.image[tables.refcount_block : tables.refcount_block + CLUSTER] = bytes(CLUSTER)


def marked_dirty(tables: Tables) -> None:
    no_refcounts(tables)
    tables.image[79] |= 1


def emptied_l2(tables: Tables) -> None:
    tables.image[tables.l2 : tables.l2 + CLUSTER] = bytes(CLUSTER)


def ragged_end(tables: Tables) -> None:
    double_allocation(tables)
    tables.image += b"\xee" * (2 * CLUSTER + 700)


def short_end(tables: Tables) -> None:
    """The last cluster is not whole, as QEMU leaves it."""
    double_allocation(tables)
    end = len(tables.image)
    tables.image += b"\x55" * 2048
    tables.set_entry(tables.l2 + 8 * 30, 1 << 63 | end)
    tables.set_refcount(end, 1)


DAMAGE: dict[str, Damage] = {
    damage.__name__: damage
    for damage in (
        double_allocation,
        no_refcount_table,
        no_refcounts,
        marked_dirty,
        emptied_l2,
        ragged_end,
        short_end,
    )
}


def damaged(name: str) -> bytes:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 1 << 20, cluster_size=CLUSTER) as image:
        image.pwrite(DATA, 0)
    tables = Tables(device.content())
    DAMAGE[name](tables)
    return bytes(tables.image)


@pytest.fixture(params=DAMAGE)
def content(request: pytest.FixtureRequest) -> bytes:
    return damaged(request.param)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(content)
    return path


def repair(path: Path) -> None:
    jqcow.open(path, "r+", repair="all", free_lost=True).close()


def without_mark(path: Path) -> None:
    """Make the undo file of an image what it is before the repair is done."""
    with closing(FileDevice.open(undo_path(str(path)), writable=True)) as undo:
        undo.truncate(UndoFile.read(undo).header.mark_place)


class TestFiles:
    def test_the_very_bytes_come_back(self, path: Path, content: bytes) -> None:
        for _ in range(2):
            repair(path)
            assert path.read_bytes() != content
            undo_repair(path)
            assert path.read_bytes() == content, "and again"
            assert not Path(undo_path(str(path))).exists()
        repair(path)
        with jqcow.open(path) as image:
            assert image.check().ok

    @pytest.mark.parametrize("command", ["undo", "--undo"])
    def test_commands(self, path: Path, content: bytes, command: str) -> None:
        assert main(["check", "-q", "-r", "all", "--free-lost-data", str(path)]) == 0
        run = main if command == "undo" else recover_main
        assert run([command, str(path)]) == 0
        assert path.read_bytes() == content

    def test_not_where_it_was_written_since(self, path: Path) -> None:
        repair(path)
        with jqcow.open(path, "r+") as image:
            image.pwrite(DATA, 1 << 19)
        after = path.read_bytes()
        with pytest.raises(CorruptionError, match="written since"):
            undo_repair(path)
        assert path.read_bytes() == after

    def test_by_force(self, path: Path, content: bytes) -> None:
        repair(path)
        file = UndoFile.read(SimulatedDevice(Path(undo_path(str(path))).read_bytes()))
        *_, last = file.runs()
        with path.open("r+b") as image:
            image.seek(last.offset + len(last.old) - 512)
            image.write(b"\x77" * 512)
        with pytest.raises(CorruptionError, match="written since"):
            undo_repair(path)
        undo_repair(path, force=True)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("way", ["undo", "repair"])
    def test_an_old_undo_file_costs_nothing_flushed(self, tmp_path: Path, way: str) -> None:
        """The image was used for long, and crashed: its file is longer for more than a journal."""
        device = SimulatedDevice()
        with jqcow.create_on_device(device, 1 << 20, cluster_size=512) as image:
            image.pwrite(DATA * 3, 0)
        tables = Tables(device.content())
        # One sector of refcounts is changed by the repair, and is full.
        tables.set_refcount(tables.data, 0)
        path, new = tmp_path / "old.qcow2", b"since" * 50_000
        path.write_bytes(tables.image)
        repair(path)
        device = SimulatedDevice(path.read_bytes())
        with jqcow.open_device(device, "r+", journal_size=1 << 16) as image:
            image.pwrite(new, 1 << 19)
            image.flush()
            path.write_bytes(device.content())
        if way == "undo":
            with pytest.raises(CorruptionError, match="written since"):
                undo_repair(path)
        else:
            jqcow.open(path, "r+", repair="leaks").close()
        with jqcow.open(path) as image:
            assert image.pread(len(new), 1 << 19) == new and image.check().ok

    @pytest.mark.parametrize("free_bytes", [None, 1 << 20, 12 << 20, 40 << 20])
    def test_whatever_length_its_journal_has(
        self, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, free_bytes: int | None
    ) -> None:
        """A new refcount table lies behind it. The undo file takes space, too."""
        if free_bytes is None:
            jqcow.open(path, "r+", repair="all", free_lost=True, journal_size=1 << 16).close()
        else:
            left = iter(range(free_bytes, 0, -65536))
            monkeypatch.setattr(FileDevice, "free_bytes", lambda device: next(left))
            repair(path)
        undo_repair(path)
        assert path.read_bytes() == content

    def test_it_is_durable_before_the_repair(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where the one of a repair that was cut off is there already."""
        content, calls = path.read_bytes(), list[str]()
        repair(path)
        path.write_bytes(content)
        without_mark(path)
        syncing, writing = names.sync_directory, FileDevice.pwrite

        def sync(directory: str) -> None:
            calls.append(directory)
            syncing(directory)

        def write(device: FileDevice, buffer: ReadBuffer, offset: int) -> None:
            if device.path == str(path):
                calls.append("write")
            writing(device, buffer, offset)

        monkeypatch.setattr(names, "sync_directory", sync)
        monkeypatch.setattr(FileDevice, "pwrite", write)
        repair(path)
        assert calls[0] == str(path.parent) and "write" in calls

    def test_a_half_undone_image_is_not_opened(self, path: Path, content: bytes) -> None:
        """By nobody: what is written there would be lost when the undo is done again."""
        repair(path)
        with closing(FileDevice.open(undo_path(str(path)), writable=True)) as undo:
            file = UndoFile.read(undo)
            file.put_mark(undo, Mark.BEGUN)
        with path.open("r+b") as image:
            image.write(roots.pack_undo_root(Header.unpack(content[:512])))
        for mode in ("r", "r+"):
            with pytest.raises(CorruptionError, match="cut off") as caught:
                jqcow.open(path, mode)
            assert caught.value.__notes__ == ["run jqcow undo again"]
        told = subprocess.run(["qemu-img", "info", path], capture_output=True, text=True, check=False)
        assert "jqcow undo was cut off: run jqcow undo" in told.stderr
        undo_repair(path)
        assert path.read_bytes() == content

    def test_the_next_repair_ends_an_undo_that_was_cut_off(self, path: Path, content: bytes) -> None:
        """A repair with another journal has other bytes, and an undo file of its own."""
        repair(path)
        with path.open("r+b") as image:
            image.write(roots.pack_undo_root(Header.unpack(content[:512])))
        jqcow.open(path, "r+", repair="all", free_lost=True, journal_size=1 << 16).close()
        with jqcow.open(path) as image:
            assert image.check().ok
        undo_repair(path)
        assert path.read_bytes() == content

    def test_what_another_program_wrote_since_stays(self, path: Path, content: bytes) -> None:
        """The journal of the repair left a hole behind the old end: there, too, others may allocate."""
        repair(path)
        done("qemu-io", "-c", f"write -P 7 {1 << 18} {1 << 18}", path)
        with jqcow.open(path) as image:
            extents = [extent.host_offset or 0 for extent in image.extents(1 << 18, 1 << 18)]
        if max(extents) >= len(content):
            with pytest.raises(CorruptionError, match="written since"):
                undo_repair(path)
        else:
            with suppress(CorruptionError):
                undo_repair(path)
        with jqcow.open(path) as image:
            assert image.pread(1 << 18, 1 << 18) == b"\7" * (1 << 18)

    @pytest.mark.parametrize("what", ["leaks", "all"])
    def test_a_repair_that_was_done_stays(self, path: Path, what: What) -> None:
        """Though a later session crashed, whatever it did."""
        repair(path)
        device = SimulatedDevice(path.read_bytes())
        with jqcow.open_device(device, "r+", journal_size=1 << 16) as image:
            image.pwrite(b"in place", 0)
            image.flush()
            image.pwrite(b"elsewhere", 1 << 19)
            path.write_bytes(device.content())
        jqcow.open(path, "r+", repair=what).close()
        with jqcow.open(path) as image:
            assert image.pread(8, 0) == b"in place" and image.check().ok

    @pytest.mark.parametrize("way", ["open", "base", "recover"])
    def test_whoever_opens_it_says_that_the_repair_is_done(self, path: Path, way: str) -> None:
        """Also where the repair was cut off before it could say so (U1)."""
        repair(path)
        without_mark(path)
        if way == "open":
            jqcow.open(path, "r+").close()
        elif way == "recover":
            recover_image(path)
        else:
            top = path.with_name("top.qcow2")
            with jqcow.create(top, 1 << 20, backing_file=path.name, backing_format="qcow2") as image:
                image.pwrite(b"committed", 1 << 19)
            commit(top, allow_files=True)
        undo = Path(undo_path(str(path))).read_bytes()
        assert UndoFile.read(SimulatedDevice(undo)).mark is Mark.DONE

    def test_one_of_another_file(self, path: Path, content: bytes) -> None:
        """Another image came to lie under the name: not that one was repaired (U2)."""
        repair(path)
        other = path.with_name("other.qcow2")
        other.write_bytes(path.read_bytes())
        other.replace(path)
        after = path.read_bytes()
        with pytest.raises(CorruptionError, match="another file"):
            undo_repair(path)
        jqcow.open(path, "r+").close()
        assert path.read_bytes() == after
        undo_repair(path, force=True)
        assert path.read_bytes() == content

    def test_who_may_read_it(self, path: Path) -> None:
        """It holds what the image held."""
        path.chmod(0o640)
        repair(path)
        assert stat.S_IMODE(Path(undo_path(str(path))).stat().st_mode) == 0o640

    def test_a_full_disk_changes_nothing(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        repair(path)
        after = path.read_bytes()

        def full(device: FileDevice, offset: int, length: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(FileDevice, "allocate", full)
        with pytest.raises(OSError, match="No space"):
            undo_repair(path)
        assert path.read_bytes() == after

    def test_an_undo_file_of_another_repair_stays(self, path: Path, content: bytes) -> None:
        """Nothing is repaired meanwhile."""
        Path(undo_path(str(path))).write_bytes(b"another")
        with pytest.raises(FileExistsError):
            repair(path)
        assert path.read_bytes() == content
        with pytest.raises(FormatError):
            undo_repair(path)

    def test_a_damaged_undo_file(self, path: Path) -> None:
        repair(path)
        after, undo = path.read_bytes(), Path(undo_path(str(path)))
        runs_bytes = UndoFile.read(SimulatedDevice(undo.read_bytes())).header.runs_bytes
        whole = undo.read_bytes()[: HEADER_BYTES + runs_bytes]
        for at in {12, 20, 40, 63, len(whole) // 2, len(whole) - 1}:
            undo.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(JqcowError):
                undo_repair(path)
        undo.write_bytes(whole[:-1])
        with pytest.raises(JqcowError):
            undo_repair(path)
        assert path.read_bytes() == after


def test_harmless_leaks_need_none(tmp_path: Path) -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 1 << 20, cluster_size=CLUSTER) as image:
        image.pwrite(DATA, 0)
    tables = Tables(device.content())
    leaked = len(tables.image)
    tables.image += bytes(CLUSTER)
    tables.set_refcount(leaked, 1)
    path = tmp_path / "leaks.qcow2"
    path.write_bytes(tables.image)
    jqcow.open(path, "r+", repair="leaks").close()
    assert list(tmp_path.iterdir()) == [path]


class TestCrashes:
    def undo_of(self, content: bytes) -> SimulatedDevice:
        trial, undo = TrialDevice(SimulatedDevice(content)), SimulatedDevice()
        jqcow.open_device(trial, "r+", repair="all", free_lost=True, journal_size=1 << 16).close()
        pack_undo(trial, undo)
        return undo

    def repaired(self, content: bytes) -> SimulatedDevice:
        device = SimulatedDevice(content)
        jqcow.open_device(device, "r+", repair="all", free_lost=True, journal_size=1 << 16).close()
        device.reopen()
        return device

    def test_an_undo_that_was_cut_off_can_be_done_again(self, content: bytes) -> None:
        undo, device = self.undo_of(content), SimulatedDevice(self.repaired(content).content())
        undo_on(device, undo)
        assert device.content() == content
        for state in enumerate_states(device, budget=60):
            crashed = device.crash(state)
            undo_on(crashed, undo)
            assert crashed.durable_content() == content

    def test_a_repair_that_was_cut_off_can_be_taken_back(self, content: bytes) -> None:
        undo, device = self.undo_of(content), SimulatedDevice(content)
        jqcow.open_device(device, "r+", repair="all", free_lost=True, journal_size=1 << 16).close()
        for state in enumerate_states(device, budget=60):
            crashed = device.crash(state)
            undo_on(crashed, undo)
            assert crashed.durable_content() == content


@pytest.mark.parametrize(
    "undo",
    [
        UndoHeader(1 << 62, 512, 0, 0).pack(),
        UndoHeader(512, 512, 0, 0).pack(),
        UndoHeader(512, 1 << 63, 0, 0).pack(),
        UndoHeader(512, 512, 1, 532).pack() + UndoRun(1 << 63, bytes(512), (0,)).pack(),
        UndoHeader(9000, 512, 1, 532).pack() + UndoRun(512, bytes(512), (0,)).pack(),
        UndoHeader(512, 512, 1, 532).pack() + UndoRun(4096, bytes(512), (0,)).pack(),
        UndoHeader(512, 512, 2, 1064).pack() + 2 * UndoRun(0, bytes(512), (0,)).pack(),
        UndoHeader(512, 512, 1 << 62, 0).pack(),
        UndoHeader(512, 512, 1, 1 << 63).pack(),
        UndoHeader(512, 512, 1, 0).pack() + UndoRun(0, bytes(512), (0,)).pack(),
    ],
    ids=[
        "old length", "no sector 0", "new length", "offset", "unaligned", "behind the end", "order",
        "number of runs", "length of runs", "another length of runs",
    ],
)  # fmt: skip
def test_a_hostile_undo_file_is_refused(undo: bytes) -> None:
    with pytest.raises(CorruptionError, match="undo file"):
        undo_on(SimulatedDevice(bytes(512)), SimulatedDevice(undo), force=True)


@pytest.mark.parametrize("name", ["n" * 244, "n" * 245, "n" * 255, "\N{PILE OF POO}" * 61, "x" + "ä" * 127])
def test_a_name_that_leaves_no_room_for_one(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / name, damaged("double_allocation")
    path.write_bytes(content)
    repair(path)
    assert len(list(tmp_path.iterdir())) == 2
    undo_repair(path)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_long_names_that_begin_alike_have_files_of_their_own() -> None:
    assert undo_path("/" + "n" * 254 + "a") != undo_path("/" + "n" * 254 + "b")


def test_a_dirty_image_that_is_opened_has_none(tmp_path: Path) -> None:
    path = tmp_path / "dirty.qcow2"
    path.write_bytes(damaged("marked_dirty"))
    with jqcow.open(path, "r+") as image:
        assert image.repaired is not None and image.repaired.too_low
    assert not Path(undo_path(str(path))).exists()


def test_a_repair_that_there_is_not_recovers_nothing(tmp_path: Path) -> None:
    device, path = SimulatedDevice(), tmp_path / "crashed.qcow2"
    with jqcow.create_on_device(device, 1 << 20, cluster_size=CLUSTER) as image:
        image.pwrite(DATA, 0)
        image.flush()
        path.write_bytes(device.content())
    content = path.read_bytes()
    with pytest.raises(ValueError, match="repair is 'leaks', 'all' or"):
        jqcow.open(path, "r+", repair="everything")  # type: ignore[arg-type]
    assert path.read_bytes() == content


def test_nobody_is_told_to_overwrite_an_undo_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "damaged.qcow2"
    path.write_bytes(damaged("double_allocation"))
    Path(undo_path(str(path))).write_bytes(b"another")
    assert main(["check", "-r", "all", str(path)]) == 1
    told = capsys.readouterr().err
    assert "apply it with jqcow undo" in told and "--overwrite" not in told


def test_on_disk_structures() -> None:
    header, run = UndoHeader(5, 6, 7, 8, 9, 10), UndoRun(4096, bytes(range(256)) * 4, (1, 2))
    assert UndoHeader.unpack(header.pack()) == header
    assert [header.unpack_mark(header.pack_mark(mark)) for mark in Mark] == list(Mark)
    assert header.unpack_mark(UndoHeader(5, 6, 7, 9).pack_mark(Mark.DONE)) is None
    # A block of its own: garbled in a power cut, it takes no run with it.
    assert [UndoHeader(5, 6, 7, length).mark_place // BLOCK_BYTES for length in (0, 4032, 4033)] == [1, 1, 2]
    assert UndoRun.unpack(run.pack() + b"more", 40) == run and len(run.pack()) == run.length
