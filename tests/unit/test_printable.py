"""Names inside images are shown so that they neither steer a terminal nor end a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jqcow.cli.main import main
from jqcow.cli.recover import main as recover_main
from jqcow.errors import CorruptionError, FileAccessDenied, SnapshotNotFound, printable

EVIL = "a\x1b[2Jb\nbacking file: /safe\r\x9b1m\u202e\x07"


def test_what_can_be_printed_stays() -> None:
    assert printable("grün (1).qcow2") == "grün (1).qcow2"


@pytest.mark.parametrize("text", [EVIL, "\udcff\udc1b", "\0", "\u2028", "\x7f", "\ud800"])
def test_what_cannot_is_replaced(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) == 1
    shown.encode()


def test_every_command_shows_a_backing_name_harmlessly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = str(tmp_path / "image"), str(tmp_path / "target")
    assert main(["create", "-q", "-u", "-b", "x" * len(EVIL.encode()), "-F", "raw", path, "1M"]) == 0
    data = Path(path).read_bytes().replace(b"x" * len(EVIL.encode()), EVIL.encode(), 1)
    Path(path).write_bytes(data)
    allowed = ["--allow-files"]
    for command in (
        ["info", path],
        ["info", "--backing-chain", path],
        ["info", "--backing-chain", *allowed, path],
        ["map", path],
        ["map", *allowed, path],
        ["check", path],
        ["convert", path, target],
        ["convert", *allowed, path, target],
        ["commit", *allowed, path],
        ["rebase", "-b", "", *allowed, path],
        ["resize", *allowed, path, "2M"],
    ):
        main(command)
        told = capsys.readouterr()
        for line in (told.out + told.err).split("\n"):
            assert not line or line.isprintable(), command
            assert not line.startswith("backing file: /safe"), command
    assert main(["info", "--output=json", path]) == 0
    assert json.loads(capsys.readouterr().out)["backing-filename"] == EVIL


def test_every_command_shows_the_name_of_the_file_harmlessly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be another user's, found in a directory."""
    path = str(tmp_path / EVIL.replace("/", ""))
    assert main(["create", path, "1M"]) == 0
    assert main(["resize", path, "2M"]) == 0
    told = ""
    for damage in (b"", bytes(8)):
        with open(path, "r+b") as file:
            file.seek(48)
            file.write(damage)
        for command in (
            ["info"],
            ["map"],
            ["check"],
            ["journal"],
            ["snapshot", "-l"],
            ["check", "-r", "all"],
        ):
            main([*command, path])
        recover_main([path])
        recover_main(["--dry-run", path])
        main(["undo", path])
        output = capsys.readouterr()
        told += output.out + output.err
    assert "as before the repair" in told and "no live journal" in told and "warning" in told
    for line in told.split("\n"):
        assert not line or line.isprintable()


def test_errors_of_the_library_are_harmless_too() -> None:
    error = FileAccessDenied(EVIL, "backing", EVIL, EVIL)
    error.add_note(EVIL)
    assert str(error).isprintable()
    assert error.__notes__[0].isprintable()
    assert str(SnapshotNotFound(EVIL)).isprintable()
    damage = CorruptionError("L2 table", 512, EVIL)
    damage.guest_range = 0, 512
    assert str(damage).isprintable()
