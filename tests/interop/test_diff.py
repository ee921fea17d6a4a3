"""jqcow diff: every range that differs is told, and where tables say that ranges are equal none is."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

import jqcow
from jqcow.cli.main import main
from tests.interop.commands import Capture
from tests.support.qemu import done

MIB = 1 << 20
UNIT = 4096


def told(capsys: Capture, *words: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["diff", *map(str, words)]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def disk_of(path: Path, folder: Path, *options: object) -> bytes:
    raw = folder / "read.raw"
    done("qemu-img", "convert", "-O", "raw", *options, path, raw)
    return raw.read_bytes()


def require_all_told(before: bytes, after: bytes, found: list[dict[str, Any]]) -> None:
    """Every unit that differs lies in a range that is told; zeros are zeros."""
    changed = set()
    for extent in found:
        start, end = extent["start"], extent["start"] + extent["length"]
        changed |= set(range(start // UNIT, -(-end // UNIT)))
        assert extent["zero"] != extent["data"]
        assert not extent["zero"] or not any(after[start:end])
    size = max(len(before), len(after))
    before, after = before.ljust(size, b"\0"), after.ljust(size, b"\0")
    differing = {at for at in range(size // UNIT) if before[at * UNIT :][:UNIT] != after[at * UNIT :][:UNIT]}
    assert differing <= changed


@pytest.mark.parametrize("seed", range(4))
def test_snapshots_and_overlays(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = Random(seed)
    path, top = tmp_path / "a.qcow2", tmp_path / "top.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "2M")

    def change(name: Path) -> None:
        for _ in range(6):
            place, length = random.randrange(480) * UNIT, random.randrange(1, 12) * UNIT
            command = random.choice([f"write -P {random.randrange(1, 255)}", "write -z"])
            done("qemu-io", "-c", f"{command} {place} {length}", name)

    change(path)
    done("qemu-img", "snapshot", "-c", "first", path)
    before = disk_of(path, tmp_path)
    change(path)
    done("qemu-img", "snapshot", "-c", "second", path)
    middle = disk_of(path, tmp_path)
    change(path)
    after = disk_of(path, tmp_path)
    require_all_told(before, after, told(capsys, "--from", "first", path))
    require_all_told(before, middle, told(capsys, "--from", "first", "-l", "second", path))
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "qcow2", top)
    assert told(capsys, "--allow-files", path, top) == []
    change(top)
    require_all_told(after, disk_of(top, tmp_path), told(capsys, "--allow-files", path, top))


def test_what_is_shared_is_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.qcow2"
    with jqcow.create(path, 64 * MIB) as image:
        image.pwrite(b"\x11" * MIB, 0)
        image.create_snapshot("before")
        image.pwrite(b"\x22" * 65536, 131072)
        image.write_zeroes(65536, 0)
        image.resize(65 * MIB)
    assert told(capsys, "--from", "before", path) == [
        {"start": 0, "length": 65536, "zero": True, "data": False},
        {"start": 131072, "length": 65536, "zero": False, "data": True},
    ]
    assert told(capsys, "-l", "before", path, path)
    assert main(["diff", str(path)]) == 1
    other = tmp_path / "b.raw"
    with other.open("wb") as file:
        file.truncate(MIB)
    assert [found["start"] for found in told(capsys, "-F", "raw", other, path)] == [65536]
