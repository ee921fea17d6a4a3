"""The commands on snapshots, chains and repair, beside those of qemu-img."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.main import main
from tests.interop.test_backing import MIB, make_chain
from tests.support.qemu import check_clean, compare, done, qemu_io, run

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, 4 * MIB)
    qemu_io(path, "write -P 1 0 1M")
    return path


class TestSnapshot:
    def test_made_applied_and_deleted(self, image: Path, capsys: Captured) -> None:
        assert main(["snapshot", "-c", "before", str(image)]) == 0
        qemu_io(image, "write -P 2 0 1M")
        assert main(["snapshot", "-c", "after", str(image)]) == 0
        assert main(["snapshot", "-a", "before", str(image)]) == 0
        check_clean(image)
        qemu_io(image, "read -P 1 0 1M")
        assert main(["snapshot", "-a", "2", str(image)]) == 0
        qemu_io(image, "read -P 2 0 1M")
        assert main(["snapshot", "-d", "after", str(image)]) == 0
        assert capsys.readouterr().out == ""
        assert main(["snapshot", "-l", str(image)]) == 0
        assert capsys.readouterr().out == done("qemu-img", "snapshot", "-l", image)
        check_clean(image)

    def test_a_backing_file_stays_closed(self, tmp_path: Path) -> None:
        rounds = make_chain(tmp_path, "qcow2", [MIB, MIB], [65536, 65536], seed=1)
        shutil.move(tmp_path / "0.qcow2", tmp_path / "away")
        assert main(["snapshot", "-c", "kept", str(rounds.image)]) == 0
        shutil.move(tmp_path / "away", tmp_path / "0.qcow2")
        rounds.judge()

    def test_errors(self, image: Path, capsys: Captured) -> None:
        for option in ("-a", "-d"):
            assert main(["snapshot", option, "none", str(image)]) == 1
            assert "no snapshot with the id or name 'none'" in capsys.readouterr().err
        assert main(["snapshot", "-c", "", str(image)]) == 1
        assert main(["snapshot", "-U", "-c", "name", str(image)]) == 1
        assert main(["snapshot", "--output=json", "-d", "name", str(image)]) == 1
        with jqcow.open(image):
            assert main(["snapshot", "-c", "name", str(image)]) == 4
        capsys.readouterr()
        assert done("qemu-img", "snapshot", "-l", image) == ""

    def test_a_crashed_image_is_recovered_and_it_is_said(self, image: Path, capsys: Captured) -> None:
        with jqcow.open(image, "r+") as opened:
            opened.pwrite(b"x" * 100_000, 2 * MIB)
            opened.flush()
            shutil.copyfile(image, image.with_name("crashed.qcow2"))
        assert main(["snapshot", "-c", "kept", str(image.with_name("crashed.qcow2"))]) == 0
        assert "recovered first" in capsys.readouterr().err
        check_clean(image.with_name("crashed.qcow2"))


class TestCommitAndRebase:
    def test_commit(self, tmp_path: Path, capsys: Captured) -> None:
        rounds = make_chain(tmp_path, "qcow2", [4 * MIB, 4 * MIB], [65536, 4096], seed=2)
        assert main(["commit", str(rounds.image)]) == 1
        assert "--allow-files" in capsys.readouterr().err
        assert main(["commit", "-d", "-q", "--allow-files", str(rounds.image)]) == 0
        compare(tmp_path / "0.qcow2", rounds.model.path)
        assert main(["commit", "--output=json", "--allow-files", str(rounds.image)]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["emptied"] and report["base"] == str(tmp_path / "0.qcow2")
        rounds.judge()
        assert main(["commit", "--allow-files", str(rounds.image)]) == 0
        assert capsys.readouterr().out.startswith("Image committed.\n")

    def test_rebase(self, tmp_path: Path, capsys: Captured) -> None:
        rounds = make_chain(tmp_path, "raw", [4 * MIB, 4 * MIB], [0, 4096], seed=3)
        done("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "new.qcow2", 5 * MIB)
        command = ["rebase", "-b", "new.qcow2", "-F", "qcow2", str(rounds.image)]
        assert main(command) == 1
        assert "--allow-files" in capsys.readouterr().err
        assert main([*command[:-1], "--allow-files", command[-1]]) == 0
        assert "copied into" in capsys.readouterr().err
        rounds.judge()
        shutil.move(tmp_path / "new.qcow2", tmp_path / "moved.qcow2")
        assert main(["rebase", "-u", "-b", "moved.qcow2", "-F", "qcow2", str(rounds.image)]) == 0
        rounds.judge()
        assert main(["rebase", "--output=json", "-b", "", "--allow-files", str(rounds.image)]) == 0
        assert json.loads(capsys.readouterr().out)["copied-bytes"] == 0
        (tmp_path / "moved.qcow2").unlink()
        rounds.judge()

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["-b", "x.raw"], "needs its format"),
            (["-b", "nbd:host", "-F", "raw", "-u"], "protocol"),
        ],
    )
    def test_refusals(self, image: Path, capsys: Captured, options: list[str], words: str) -> None:
        assert main(["rebase", *options, str(image)]) in (1, 63)
        assert words in capsys.readouterr().err

    def test_snapshots_are_in_the_way(self, tmp_path: Path, capsys: Captured) -> None:
        rounds = make_chain(tmp_path, "qcow2", [MIB, MIB], [65536, 65536], seed=4)
        done("qemu-img", "snapshot", "-c", "kept", rounds.image)
        assert main(["commit", "--allow-files", str(rounds.image)]) == 63
        assert main(["rebase", "-b", "", "--allow-files", str(rounds.image)]) == 63
        assert "snapshots" in capsys.readouterr().err
        rounds.judge()

    def test_resizing_over_a_base(self, tmp_path: Path, capsys: Captured) -> None:
        rounds = make_chain(tmp_path, "raw", [8 * MIB, 4 * MIB], [0, 65536], seed=5)
        assert main(["resize", str(rounds.image), "8M"]) == 1
        assert "--allow-files" in capsys.readouterr().err
        assert main(["resize", "-q", "--allow-files", str(rounds.image), "8M"]) == 0
        rounds.model.resize(8 * MIB)
        rounds.judge()


class TestRepair:
    def damage(self, image: Path) -> None:
        """Too low by one cluster, too high by another."""
        content = bytearray(image.read_bytes())
        table = int.from_bytes(content[48:56], "big")
        block = int.from_bytes(content[table : table + 8], "big")
        content[block + 10 : block + 14] = bytes((0, 0, 0, 3))
        image.write_bytes(content)

    def test_as_qemu_img_says_it(self, image: Path, capsys: Captured) -> None:
        self.damage(image)
        theirs = image.with_name("theirs.qcow2")
        shutil.copyfile(image, theirs)
        assert main(["check", "-r", "all", str(image)]) == 0
        told = capsys.readouterr().out.splitlines()
        # QEMU moves the tables, so the file ends elsewhere; and a wrong flag is no corruption that it fixes.
        expected = done("qemu-img", "check", "-r", "all", theirs).splitlines()
        assert [line for line in told[:-1] if "corruptions" not in line] == [
            line for line in expected[:-1] if "corruptions" not in line
        ]
        check_clean(image)
        qemu_io(image, "read -P 1 0 1M")

    def test_json(self, image: Path, capsys: Captured) -> None:
        self.damage(image)
        assert main(["check", "--output=json", "-r", "leaks", str(image)]) == 2
        report = json.loads(capsys.readouterr().out)
        assert report["leaks-fixed"] == 1 and "corruptions-fixed" not in report and report["corruptions"] > 0
        assert main(["check", "--output=json", "-r", "all", str(image)]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["corruptions-fixed"] > 0 and "leaks-fixed" not in report
        assert main(["check", "--output=json", "-r", "all", str(image)]) == 0
        assert "corruptions-fixed" not in json.loads(capsys.readouterr().out)

    def test_refusals(self, image: Path, tmp_path: Path, capsys: Captured) -> None:
        assert main(["check", "-U", "-r", "all", str(image)]) == 1
        (tmp_path / "disk.raw").write_bytes(bytes(MIB))
        assert main(["check", "-f", "raw", "-r", "all", str(tmp_path / "disk.raw")]) != 0
        with jqcow.open(image):
            assert main(["check", "-r", "all", str(image)]) == 4
        capsys.readouterr()
        assert run("qemu-img", "check", image).returncode == 0
