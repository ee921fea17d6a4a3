"""The list of internal snapshots as qemu-img prints it, in text and in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import jqcow
from jqcow.cli import main
from jqcow.offline.info import read_snapshots
from jqcow.ondisk.header import Header
from jqcow.ondisk.snapshots import Snapshot, pack_table, parse_table
from tests.support.qemu import done, qemu_io, run

SIZE = 4 << 20
NAMES = ("first", "zweiter", "a name of more than sixteen characters", "größer")


@pytest.fixture(params=[512, 65536])
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An image with four snapshots, between which its disk changed and one snapshot was deleted."""
    path = tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={request.param}", path, SIZE)
    for number, name in enumerate(("lost", *NAMES)):
        qemu_io(path, f"write -P {number + 1} {number * 65536} 64k")
        done("qemu-img", "snapshot", "-c", name, path)
    done("qemu-img", "snapshot", "-d", "lost", path)
    return path


def ours(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def change_snapshots(path: Path, change: Callable[[int, Snapshot], Snapshot]) -> None:
    """Write a changed snapshot table over that of an image; names must keep their lengths."""
    content = bytearray(path.read_bytes())
    header = Header.unpack(bytes(content[:512]))
    place = header.snapshots_offset

    def read(length: int, offset: int) -> bytes:
        return bytes(content[offset : offset + length]).ljust(length, b"\0")

    found = parse_table(read, place, header.nb_snapshots, header=header).snapshots
    packed = pack_table(change(index, snapshot) for index, snapshot in enumerate(found))
    content[place : place + len(packed)] = packed
    path.write_bytes(content)


def odd_values(index: int, snapshot: Snapshot) -> Snapshot:
    """Return a snapshot as a virtual machine would have made it, with values at the bounds of the columns."""
    return (
        replace(snapshot, vm_state_bytes=3 << 20, vm_clock_nanoseconds=3_723_004_000_000, icount=12345),
        replace(snapshot, vm_state_bytes=(5 << 32) + 1, vm_clock_nanoseconds=(1 << 63) - 1, icount=None),
        replace(snapshot, date_seconds=0, date_nanoseconds=999_999_999, icount=(1 << 63) - 1),
        replace(snapshot, date_seconds=(1 << 31) + 7, vm_clock_nanoseconds=999_999_999, vm_state_bytes=1023),
    )[index]


@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd"])
def test_lists_are_those_of_qemu(image: Path, capsys: pytest.CaptureFixture[str], odd: bool) -> None:
    if odd:
        change_snapshots(image, odd_values)
    before = image.read_bytes()
    assert ours(capsys, "snapshot", "-l", image) == done("qemu-img", "snapshot", "-l", image)
    assert ours(capsys, "info", image) == done("qemu-img", "info", image)
    told = json.loads(done("qemu-img", "info", "--output=json", image))
    assert json.loads(ours(capsys, "info", "--output=json", image)) == told
    assert json.loads(ours(capsys, "snapshot", "-l", "--output=json", image)) == told["snapshots"]
    assert [snapshot["name"] for snapshot in told["snapshots"]] == list(NAMES)
    assert image.read_bytes() == before


def test_the_local_time_zone_is_told(
    image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        assert ours(capsys, "snapshot", "-l", image) == done("qemu-img", "snapshot", "-l", image)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_name_that_is_not_utf_8(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_snapshots(
        image, lambda index, snapshot: replace(snapshot, name="f\udcffrst") if not index else snapshot
    )
    assert read_snapshots(image)[0].name == "f\udcffrst"
    told = json.loads(ours(capsys, "snapshot", "-l", "--output=json", image))
    assert told == json.loads(done("qemu-img", "info", "--output=json", image))["snapshots"]
    assert "f\ufffdrst" in ours(capsys, "snapshot", "-l", image)


def test_a_name_does_not_steer_the_terminal(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_snapshots(
        image, lambda index, snapshot: replace(snapshot, name="\x1b[2J\n") if not index else snapshot
    )
    told = ours(capsys, "snapshot", "-l", image)
    assert "\ufffd[2J\ufffd" in told
    assert told.isprintable() or set(filter(lambda char: not char.isprintable(), told)) == {"\n"}
    assert len(told.splitlines()) == 2 + len(NAMES)


def test_an_image_without_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.qcow2"
    jqcow.create(path, SIZE).close()
    assert ours(capsys, "snapshot", "-l", path) == done("qemu-img", "snapshot", "-l", path) == ""
    assert ours(capsys, "snapshot", "-l", "--output=json", path) == "[]\n"
    assert "snapshots" not in json.loads(ours(capsys, "info", "--output=json", path))
    assert read_snapshots(path) == ()


def test_what_has_no_snapshots_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    assert main.main(["snapshot", "-l", str(path)]) == 1
    assert "not a qcow2 image" in capsys.readouterr().err
    assert main.main(["snapshot", "-l", str(tmp_path / "none")]) == 1


def test_a_damaged_table_is_refused_where_it_matters(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What looks at the disk alone warns; QEMU opens no such image."""
    content = bytearray(image.read_bytes())
    content[64:72] = (512 * 3 + 1).to_bytes(8, "big")
    image.write_bytes(content)
    for command, code in ((["info"], 0), (["map"], 0), (["snapshot", "-l"], 1), (["check"], 1)):
        assert main.main([*command, str(image)]) == code
        assert "snapshot table" in capsys.readouterr().err
    assert run("qemu-img", "info", image).returncode == 1


def test_beside_a_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.qcow2"
    with jqcow.create(path, SIZE):
        assert main.main(["snapshot", "-l", str(path)]) == 4
        assert ours(capsys, "snapshot", "-l", "-U", path) == ""
