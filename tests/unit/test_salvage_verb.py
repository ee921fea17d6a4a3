"""The tool around salvage: diagnosis, a new file, new tables in place; cut off anywhere, and gone on with."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.recover import main
from jqcow.device.file import FileDevice
from jqcow.disks.policy import Following
from jqcow.disks.undo import mark_done, pack_undo, undo_on
from jqcow.errors import CorruptionError, FileAccessDenied, FormatError
from jqcow.offline.recover import recover_image
from jqcow.offline.salvage import diagnose, salvage
from jqcow.offline.salvaging import in_place
from jqcow.offline.salvaging.in_place import put_in_place, rebuilt, repair_in_place
from jqcow.offline.salvaging.state import PARTIAL, STATE, SalvageState, read_state
from jqcow.offline.undo import undo_repair
from jqcow.ondisk import entries
from jqcow.ondisk.header import HeaderArea
from jqcow.salvage.mapfile import pack_map, parse_map
from jqcow.testing import SimulatedDevice, enumerate_states
from tests.support.patients import Tables
from tests.support.qemu import done, run

CLUSTER, SECTOR = 4096, 512
SIZE = 8 << 20
COVERS = CLUSTER // 8 * CLUSTER


def content() -> bytes:
    """Return a disk with data here and there, and the last cluster of it cut."""
    drawn, disk = random.Random(7), bytearray(SIZE - 512)
    for start in range(0, SIZE, 5 * CLUSTER):
        disk[start : start + 2 * CLUSTER] = drawn.randbytes(2 * CLUSTER)[: len(disk) - start]
    return bytes(disk)


DISK = content()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "disk.qcow2"
    with jqcow.create(path, len(DISK), cluster_size=CLUSTER) as image:
        for start in range(0, len(DISK), 5 * CLUSTER):
            image.pwrite(DISK[start : start + 2 * CLUSTER], start)
    return path.read_bytes()


def l2_tables(image: bytes | bytearray) -> list[int]:
    header = HeaderArea.parse(bytes(image[:CLUSTER])).header
    table = image[header.l1_table_offset : header.l1_table_offset + 8 * header.l1_size]
    return [entry & entries.OFFSET_MASK for (entry,) in struct.iter_unpack(">Q", table)]


def no_l2(image: bytearray) -> None:
    for table in filter(None, l2_tables(image)[::3]):
        image[table : table + CLUSTER] = random.Random(table).randbytes(CLUSTER)


def no_refcounts(image: bytearray) -> None:
    image[48:56] = bytes(8)


def no_tables(image: bytearray) -> None:
    no_l2(image)
    no_refcounts(image)


def one_table_twice(image: bytearray) -> None:
    header = HeaderArea.parse(bytes(image[:CLUSTER])).header
    place = header.l1_table_offset
    image[place + 8 : place + 16] = image[place : place + 8]


def data_on_a_table(image: bytearray) -> None:
    first, second = l2_tables(image)[:2]
    struct.pack_into(">Q", image, first, 1 << 63 | second)


def twice(image: bytearray) -> None:
    first = l2_tables(image)[0]
    image[first + 8 : first + 16] = image[first : first + 8]


def cut_off(image: bytearray) -> None:
    del image[len(image) * 3 // 4 // 512 * 512 :]


DAMAGES: dict[str, Callable[[bytearray], None]] = {
    damage.__name__: damage
    for damage in (no_l2, no_refcounts, no_tables, one_table_twice, data_on_a_table, twice, cut_off)
}


@pytest.fixture(params=DAMAGES)
def path(request: pytest.FixtureRequest, tmp_path: Path, whole: bytes) -> Path:
    return damaged(tmp_path, whole, request.param)


@pytest.fixture
def torn(tmp_path: Path, whole: bytes) -> Path:
    return damaged(tmp_path, whole, "no_l2")


def damaged(folder: Path, whole: bytes, name: str) -> Path:
    image = bytearray(whole)
    DAMAGES[name](image)
    path = folder / "disk.qcow2"
    path.write_bytes(image)
    return path


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    before = path.read_bytes(), path.stat().st_mtime_ns
    path.chmod(0o400)
    yield
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


class TestDiagnosis:
    def test_numbers(self, torn: Path) -> None:
        with unchanged(torn):
            found = diagnose(torn)
            deep = diagnose(torn, deep=True)
        tables = len(l2_tables(DISK_OF(torn)))
        lost = len(range(0, tables, 3))
        assert found.is_damaged and found.damage_count == lost
        assert [each.guest_offset for each in found.damages] == [index * COVERS * 3 for index in range(lost)]
        disk = found.disks[0]
        assert sum(getattr(disk, name) for name in AMOUNTS) == disk.size == len(DISK)
        assert disk.lost == sum(min(COVERS, len(DISK) - part.offset) for part in disk.ranges)
        assert found.orphan_bytes and found.orphans_with_data == 1.0
        assert deep.disks[0].guess and deep.disks[0].lost + deep.disks[0].guess == disk.lost
        assert [step.command is None for step in found.steps] == [False, False, False, True]

    def test_command(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with unchanged(path):
            codes = {main(["--diagnose", str(path)]), main(["--deep", "--output=json", str(path)])}
        assert codes == {2}
        told = capsys.readouterr().out
        assert "What to do next" in told
        assert json.loads(told[told.index("{\n") :])["damage-count"] >= 0

    def test_a_damaged_image_is_not_recovered(self, torn: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with unchanged(torn):
            assert main([str(torn)]) == 2
            assert main(["--dry-run", str(torn)]) == 2
        assert "it is damaged; nothing was changed" in capsys.readouterr().out

    def test_a_live_damaged_image_stays_live(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        live, path = live_image(), tmp_path / "live.qcow2"
        path.write_bytes(live)
        assert diagnose(path).state == "live" and main(["--diagnose", str(path)]) == 0
        assert path.read_bytes() == live
        tables = Tables(recovered(live))
        damaged_live = bytearray(live)
        # A table that no record changes.
        table = tables.entry(tables.l1 + 8) & entries.OFFSET_MASK
        damaged_live[table : table + CLUSTER] = b"\xee" * CLUSTER
        path.write_bytes(damaged_live)
        with unchanged(path):
            assert main([str(path)]) == 1
        told = capsys.readouterr()
        assert "its journal is live" in told.out and "not recovered" in told.err
        path.chmod(0o600)
        assert main(["--no-check", str(path)]) == 0, "asked for without a look"

    def test_nothing_is_damaged(
        self, tmp_path: Path, whole: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "disk.qcow2"
        path.write_bytes(whole)
        assert main(["--diagnose", str(path)]) == 0
        assert "nothing is damaged" in capsys.readouterr().out
        assert diagnose(path).disks[0].lost == 0

    @pytest.mark.parametrize(
        "words",
        [
            ["--salvage", "t", "--diagnose"],
            ["--certain-only"],
            ["--salvage", "t", "--dry-run"],
            ["--undo", "--report", "r"],
            ["--diagnose", "-O", "raw"],
            ["--force"],
        ],
    )
    def test_options_that_do_not_go_together(self, torn: Path, words: list[str]) -> None:
        assert main([*words, str(torn)]) == 1


AMOUNTS = ("certain", "likely", "guess", "zero", "below", "lost")


def DISK_OF(path: Path) -> bytes:
    return path.read_bytes()


def live_image() -> bytes:
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, SIZE, cluster_size=CLUSTER, journal_size=1 << 16)
    with image:
        image.pwrite(DISK[:CLUSTER] * 8, 0)
        image.pwrite(DISK[:CLUSTER] * 8, COVERS)
    device.reopen()
    image = jqcow.open_device(device, "r+")
    image.pwrite(DISK[:CLUSTER], 64 * CLUSTER)
    image.flush()
    return device.durable_content()


def recovered(live: bytes) -> bytes:
    device = SimulatedDevice(live)
    recover_image(device)
    return device.content()


class TestSalvage:
    @pytest.mark.parametrize("kind", ["raw", "qcow2"])
    def test_what_is_certain_is_right(self, path: Path, kind: str, tmp_path: Path) -> None:
        target, report = tmp_path / "saved", tmp_path / "saved.json"
        with unchanged(path):
            made = salvage(path, target, target_format=kind, report=report)  # type: ignore[arg-type]
        found = disk_of(target, kind)
        assert len(found) == len(DISK)
        told = json.loads(report.read_text())
        reached = 0
        for part in told["ranges"]:
            start, end = part["offset"], part["offset"] + part["length"]
            assert start == reached
            reached = end
            if part["kind"] == "lost":
                assert not any(found[start:end]) and part["reason"]
            elif part["certainty"] == "certain":
                assert found[start:end] == DISK[start:end]
        assert reached == len(DISK)
        assert told["summary"]["lost"] == made.lost
        assert sum(getattr(made, name) for name in AMOUNTS) == len(DISK)
        assert not list(tmp_path.glob("*.jqcow-*"))
        if kind == "qcow2":
            assert not run("qemu-img", "check", target).returncode

    def test_only_what_is_certain(self, torn: Path, tmp_path: Path) -> None:
        made = salvage(torn, tmp_path / "saved", target_format="raw", certain_only=True)
        assert not made.guess and not made.likely and made.lost
        found = disk_of(tmp_path / "saved", "raw")
        assert all(found[at] in (0, DISK[at]) for at in range(0, len(DISK), 101))

    def test_nothing_is_replaced(
        self, torn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        there = tmp_path / "there"
        there.write_bytes(b"mine")
        assert main(["--salvage", str(there), str(torn)]) == 1
        assert main(["--salvage", str(tmp_path / "new"), "--report", str(there), str(torn)]) == 1
        assert main(["--salvage", str(torn), str(torn)]) == 1
        assert there.read_bytes() == b"mine" and not (tmp_path / "new").exists()
        assert "choose another name" in capsys.readouterr().err

    def test_snapshots(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        with jqcow.create(path, len(DISK), cluster_size=CLUSTER) as image:
            image.pwrite(DISK[: 8 * COVERS // 4], 0)
            image.create_snapshot("before")
            image.pwrite(b"\x77" * COVERS, 0)
        image_bytes = bytearray(path.read_bytes())
        table = l2_tables(image_bytes)[0]
        image_bytes[table : table + CLUSTER] = b"\xee" * CLUSTER
        path.write_bytes(image_bytes)
        found = diagnose(path)
        assert [disk.name for disk in found.disks] == ["disk", "snapshot 1"]
        assert found.disks[0].lost and not found.disks[1].lost
        for name in ("1", "before"):
            made = salvage(path, tmp_path / f"saved-{name}", target_format="raw", snapshot=name)
            assert made.is_whole
            assert disk_of(tmp_path / f"saved-{name}", "raw")[:COVERS] == DISK[:COVERS]
        with pytest.raises(jqcow.SnapshotNotFound):
            salvage(path, tmp_path / "none", snapshot="none")

    @pytest.mark.parametrize("extended", [False, True])
    def test_overlays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extended: bool) -> None:
        monkeypatch.chdir(tmp_path)
        cluster = 16384 if extended else CLUSTER
        Path("base.raw").write_bytes(b"\x55" * SIZE)
        with jqcow.create(
            "disk.qcow2",
            SIZE,
            cluster_size=cluster,
            extended_l2=extended,
            backing_file="base.raw",
            backing_format="raw",
            allow_files=True,
        ) as image:
            for start in range(0, SIZE, 7 * cluster):
                image.pwrite(DISK[start : start + 512], start + 1024)
                image.write_zeroes(min(cluster, SIZE - start - cluster), start + cluster)
        expected = disk_of(Path("disk.qcow2"), "qcow2")
        damaged_image = bytearray(Path("disk.qcow2").read_bytes())
        tables = [table for table in l2_tables(damaged_image) if table]
        covers = cluster * cluster // (16 if extended else 8)
        damaged_image[tables[0] : tables[0] + cluster] = b"\xee" * cluster
        Path("disk.qcow2").write_bytes(damaged_image)
        with pytest.raises(FileAccessDenied):
            salvage("disk.qcow2", "saved.raw", target_format="raw")
        thin = salvage("disk.qcow2", "saved.qcow2", certain_only=True)
        assert any("base.raw" in note for note in thin.notes)
        salvage("disk.qcow2", "saved.raw", target_format="raw", allow_files=True, certain_only=True)
        shown = disk_of(Path("saved.qcow2"), "qcow2")
        assert shown == Path("saved.raw").read_bytes()
        assert shown[covers:] == expected[covers:]
        assert not any(shown[:covers]), "what is lost does not show what is below"
        assert Path("saved.qcow2").stat().st_size < SIZE

    def test_compressed(self, tmp_path: Path) -> None:
        raw, path = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
        raw.write_bytes((b"text " * 13108)[: 1 << 16] * 32)
        done("qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", raw, path)
        made = salvage(path, tmp_path / "saved", target_format="raw")
        assert made.is_whole and disk_of(tmp_path / "saved", "raw") == raw.read_bytes()

    def test_encrypted(self, tmp_path: Path) -> None:
        pytest.importorskip("cryptography")
        path, word, full = tmp_path / "disk.qcow2", b"open", random.Random(1).randbytes(3 * COVERS)
        encryption = jqcow.Encryption(word, iter_time=10)
        with jqcow.create(path, len(DISK), cluster_size=CLUSTER, encryption=encryption) as image:
            image.pwrite(full, 0)
        image_bytes = bytearray(path.read_bytes())
        table = l2_tables(image_bytes)[1]
        image_bytes[table : table + CLUSTER] = b"\xee" * CLUSTER
        path.write_bytes(image_bytes)
        with pytest.raises(jqcow.PassphraseError):
            salvage(path, tmp_path / "saved", target_format="raw")
        made = salvage(path, tmp_path / "saved", target_format="raw", passphrase=word)
        found = disk_of(tmp_path / "saved", "raw")
        assert (
            found[:COVERS] == full[:COVERS]
            and found[2 * COVERS : 3 * COVERS] == full[2 * COVERS : 3 * COVERS]
        )
        assert made.orphans == COVERS // CLUSTER
        # In the order of the file, which is that of writing here.
        assert found[COVERS : 2 * COVERS] == full[COVERS : 2 * COVERS]
        assert (
            main(["--in-place", "--passphrase-file", str(written(tmp_path / "word", word)), str(path)]) == 2
        )
        with jqcow.open(path, passphrase=word) as image:
            assert image.pread(3 * COVERS, 0) == full and image.check().ok

    def test_lost_journal(self, tmp_path: Path) -> None:
        live = bytearray(live_image())
        path = written(tmp_path / "live.qcow2", bytes(live))
        journal = recover_image(path, dry_run=True).journal
        assert journal is not None
        live[journal.offset : journal.offset + journal.length] = bytes(journal.length)
        path.write_bytes(live)
        found = diagnose(path)
        assert found.is_damaged and found.damages[0].structure == "journal"
        made = salvage(path, tmp_path / "saved", target_format="raw")
        assert made.certain == 0 and made.likely, "tables may be older than the data"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def disk_of(path: Path, kind: str) -> bytes:
    if kind == "raw":
        return path.read_bytes()
    with jqcow.open(path, allow_files=True) as image:
        return image.pread(image.size, 0)


class _Cut(BaseException):
    """The process ends here."""


class TestGoingOn:
    @pytest.mark.parametrize("kind", ["raw", "qcow2"])
    def test_cut_off_anywhere(
        self, torn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        wanted = self.salvaged(torn, tmp_path / "wanted", kind)
        drawn, cuts, resumed = random.Random(kind), 0, set()
        while True:
            left = drawn.randrange(40, 120)
            self.cut_after(monkeypatch, left)
            try:
                found = self.salvaged(torn, tmp_path / "saved", kind)
            except _Cut:
                cuts += 1
                monkeypatch.undo()
                self.spoil(tmp_path / "saved", drawn)
                with suppress(FormatError):
                    state = read_state(str(tmp_path / "saved"))
                    resumed.add(0 if state is None else state.position)
                continue
            monkeypatch.undo()
            break
        assert cuts > 3 and len(resumed) > 2
        assert found == wanted
        assert sorted(each.name for each in tmp_path.iterdir() if "jqcow-" in each.name) == []

    def salvaged(self, source: Path, target: Path, kind: str) -> tuple[bytes, str]:
        report = target.with_suffix(".json")
        salvage(source, target, target_format=kind, report=report, save_seconds=0)  # type: ignore[arg-type]
        text = report.read_text()
        return target.read_bytes(), text[: text.index('"summary"')]

    def cut_after(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        """Cut a salvage off after so many changes of files."""
        counted = iter(range(left))
        for name in ("pwrite", "truncate", "barrier", "publish"):
            real = getattr(FileDevice, name)

            def counting(*arguments: object, real: Callable[..., object] = real, **named: object) -> object:
                if next(counted, None) is None:
                    raise _Cut
                return real(*arguments, **named)

            monkeypatch.setattr(FileDevice, name, counting)

    def spoil(self, target: Path, drawn: random.Random) -> None:
        """What no state speaks of is whatever a power cut leaves of it."""
        partial = Path(f"{target}{PARTIAL}")
        if not partial.exists():
            return
        state = read_state(str(target)) if Path(f"{target}{STATE}").exists() else None
        with partial.open("r+b") as file:
            size = partial.stat().st_size
            end = 0
            if state is not None:
                end = state.position if state.build is None else state.build.next_cluster * CLUSTER
            for place in range(end, size, 4096):
                if drawn.random() < 0.3:
                    file.seek(place)
                    file.write(drawn.randbytes(min(4096, size - place)))

    def test_an_interrupted_command_says_how_to_go_on(
        self, torn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        words = ["--salvage", str(tmp_path / "saved"), "-O", "raw", str(torn)]
        monkeypatch.setattr("jqcow.offline.salvaging.targets.RawTarget.finish", interrupt)
        assert main(words) == 130
        assert "same command again" in capsys.readouterr().err
        monkeypatch.undo()
        assert main(words) == 2
        assert (tmp_path / "saved").exists()

    def test_only_the_same_salvage_goes_on(
        self, torn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.cut_after(monkeypatch, 8)
        with pytest.raises(_Cut):
            salvage(torn, tmp_path / "saved", target_format="raw", save_seconds=0)
        monkeypatch.undo()
        with pytest.raises(FormatError, match="another salvage"):
            salvage(torn, tmp_path / "saved", target_format="qcow2")
        os.utime(torn)
        with pytest.raises(FormatError, match="was changed since"):
            salvage(torn, tmp_path / "saved", target_format="raw")

    @pytest.mark.parametrize("text", [b"", b"jqcow-salvage 0\n{}", b"x" * 100])
    def test_other_files_for_a_state(self, text: bytes) -> None:
        with pytest.raises((FormatError, CorruptionError)):
            SalvageState.unpack(text)

    def test_states_that_cannot_be(self) -> None:
        state = SalvageState({"a": 1}, 5, [(1, 2)], {"lost": 3}, 4, None, None)
        assert SalvageState.unpack(state.pack()) == state
        body = state.pack().partition(b"\n")[2]
        for wrong in (body.replace(b'"version": 1', b'"version": 2'), b"[]", b"[" * 100_000, b"{}"):
            from jqcow import _native

            with pytest.raises(FormatError):
                SalvageState.unpack(f"jqcow-salvage {_native.crc32c(wrong):08x}\n".encode() + wrong)


class TestUnreadable:
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("kind", ["raw", "qcow2"])
    def test_random_places(
        self, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, seed: int, kind: str
    ) -> None:
        drawn = random.Random(seed)
        path = written(tmp_path / "disk.qcow2", whole)
        # Not the header: nothing tells how to read a file without it, as yet.
        bad = {drawn.randrange(8, len(whole) // 512) for _ in range(20)}
        fail_at(monkeypatch, path, bad)
        made = salvage(
            path,
            tmp_path / "saved",
            target_format=kind,  # type: ignore[arg-type]
            report=tmp_path / "told.json",
            map_file=tmp_path / "map",
        )
        monkeypatch.undo()
        found = disk_of(tmp_path / "saved", kind)
        told = json.loads((tmp_path / "told.json").read_text())["ranges"]
        for part in told:
            start, end = part["offset"], part["offset"] + part["length"]
            if part["certainty"] == "certain":
                assert found[start:end] == DISK[start:end]
            if part["kind"] == "lost":
                assert not any(found[start:end])
        listed = parse_map((tmp_path / "map").read_bytes())
        assert made.unreadable_bytes == sum(length for _, length in listed)
        assert {offset // 512 for offset, _ in listed} <= bad | {at + 1 for at in bad}
        assert path.read_bytes() == whole

    def test_a_map_is_believed(self, tmp_path: Path, whole: bytes) -> None:
        path = written(tmp_path / "disk.qcow2", whole)
        tables = Tables(whole)
        mapped = written(tmp_path / "map", pack_map([(tables.data, 1024)], len(whole)))
        made = salvage(path, tmp_path / "saved", target_format="raw", map_file=mapped)
        assert made.lost == 1024 == made.unreadable_bytes
        found = disk_of(tmp_path / "saved", "raw")
        assert not any(found[:1024]) and found[1024:] == DISK[1024:]
        assert parse_map(mapped.read_bytes()) == [(tables.data, 1024)]
        assert diagnose(path, map_file=mapped).unreadable_bytes == 1024


def fail_at(monkeypatch: pytest.MonkeyPatch, path: Path, bad: set[int]) -> None:
    """Have the host fail to read some sectors of a file."""
    real = FileDevice.pread

    def pread(device: FileDevice, length: int, offset: int) -> bytes:
        touched = range(offset // 512, -(-(offset + length) // 512))
        if device.path == str(path) and (any(at in bad for at in touched) if length else False):
            raise OSError(errno.EIO, os.strerror(errno.EIO), device.path)
        return real(device, length, offset)

    monkeypatch.setattr(FileDevice, "pread", pread)


class TestMaps:
    def test_read_and_written(self) -> None:
        text = b"""# Mapfile. Created by GNU ddrescue
        0x1000     ?               1
        0x00000000  0x00001000  +   # what was read
        0x00001000  512  -
        0x1200  01000  /
        0x1400  0x200  *
        0x1600  0x200  ?
        """
        assert parse_map(text) == [(0x1000, 512), (0x1200, 512), (0x1400, 512), (0x1600, 512)]
        bad = [(512, 512), (4096, 100)]
        assert parse_map(pack_map(bad, 1 << 40)) == bad
        assert parse_map(b"0 +\n") == [], "maps of old versions have no pass"

    @pytest.mark.parametrize(
        "text",
        [b"", b"hello", b"0 + 1\n0 0x", b"0 + 1\n0 512 x", b"0 + 1\n512 512 -\n0 512 -", b"0 + 1\n08 1 -",
         b"9" * 99, b"0 + 1\n0 0x8000000000000000 -"],
    )  # fmt: skip
    def test_others_are_refused(self, text: bytes) -> None:
        with pytest.raises(FormatError):
            parse_map(text)


class TestInPlace:
    def test_sound_and_taken_back(self, path: Path) -> None:
        before = path.read_bytes()
        expected = salvage(path, path.with_name("saved"), target_format="raw")
        report = repair_in_place(str(path))
        assert not run("qemu-img", "check", path).returncode
        # What lies where a table does is shown in a new file, as a guess; here nobody can.
        dropped = report.lost - expected.lost
        assert dropped in (0, CLUSTER)
        assert disk_of(path, "qcow2")[dropped:] == disk_of(path.with_name("saved"), "raw")[dropped:]
        assert not any(disk_of(path, "qcow2")[:dropped])
        assert main(["--undo", str(path)]) == 0
        assert path.read_bytes() == before

    def test_snapshots_stay(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        with jqcow.create(path, len(DISK), cluster_size=CLUSTER) as image:
            image.pwrite(DISK[: 2 * COVERS], 0)
            image.create_snapshot("before")
            image.pwrite(b"\x77" * CLUSTER, 0)
        image_bytes = bytearray(path.read_bytes())
        no_tables(image_bytes)
        path.write_bytes(image_bytes)
        assert main(["--in-place", "--output=json", str(path)]) == 2
        assert not run("qemu-img", "check", path).returncode
        with jqcow.open(path, snapshot="before") as image:
            assert image.pread(2 * COVERS, 0) == DISK[: 2 * COVERS]
        undo_repair(path)
        assert path.read_bytes() == image_bytes

    def test_not_after_it_was_used(self, torn: Path) -> None:
        repair_in_place(str(torn))
        with jqcow.open(torn, "r+") as image:
            image.pwrite(b"\x99" * COVERS, 2 * COVERS)
        after = torn.read_bytes()
        with pytest.raises(CorruptionError, match="written since"):
            undo_repair(torn)
        assert torn.read_bytes() == after

    @pytest.mark.parametrize("name", ["no_tables", "cut_off", "no_header"])
    @pytest.mark.parametrize("garbling", [False, True])
    def test_crashes(self, whole: bytes, name: str, garbling: bool) -> None:
        """Either the old bytes come back, or the new image is whole."""
        image = bytearray(whole)
        if name == "no_header":
            no_l2(image)
            image[:SECTOR] = b"\xee" * SECTOR
        else:
            DAMAGES[name](image)
        device, undo, before = SimulatedDevice(bytes(image)), SimulatedDevice(), bytes(image)
        trial, _ = rebuilt(device, "", (0, 0), Following())
        pack_undo(trial, undo, in_place=True)
        undo.barrier("saved")
        crashed: list[SimulatedDevice] = []

        def cut(name: str, now: SimulatedDevice) -> None:
            rule = (lambda *_: True) if garbling else None
            crashed.extend(
                now.crash(state) for state in enumerate_states(now, budget=16, garbage_allowed=rule)
            )

        device.barrier_listeners.append(cut)
        put_in_place(trial, device)
        cut("end", device)
        after = device.content()
        assert after == trial.pread(trial.size(), 0)
        assert len(crashed) > 16
        for each in crashed:
            undo_on(each, SimulatedDevice(undo.durable_content()))
            assert each.content() == before
        mark_done(undo, device)
        undo_on(device, SimulatedDevice(undo.durable_content()))
        assert device.content() == before

    def test_cut_off_and_done_again(self, torn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = torn.read_bytes()

        def cut(*_: object) -> int:
            raise _Cut

        monkeypatch.setattr(in_place, "put_in_place", cut)
        with pytest.raises(_Cut):
            repair_in_place(str(torn))
        monkeypatch.undo()
        repair_in_place(str(torn))
        assert not run("qemu-img", "check", torn).returncode
        undo_repair(torn)
        assert torn.read_bytes() == before

    def test_an_undo_file_of_another_repair_stays(self, torn: Path) -> None:
        repair_in_place(str(torn))
        with pytest.raises(FileExistsError):
            repair_in_place(str(torn))

    def test_what_cannot_be_made_sound_stays(self, torn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = torn.read_bytes()
        monkeypatch.setattr(in_place, "_count_anew", lambda trial: None)
        with pytest.raises(CorruptionError, match="new file"):
            repair_in_place(str(torn))
        assert torn.read_bytes() == before
