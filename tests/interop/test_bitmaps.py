"""Persistent bitmaps, in turn with QEMU: it tells the same of them, and goes on where jqcow ended."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

import jqcow
from jqcow.cli.main import main
from tests.support.qemu import dirty_by_qemu, done, qemu_io, run

SIZE = (64 << 20) + 512


def told_by_qemu(path: Path, name: str) -> list[tuple[int, int]]:
    return dirty_by_qemu(path.parent, ["-f", "qcow2", path], name)


def told(path: Path, name: str) -> list[tuple[int, int]]:
    with jqcow.open(path) as image:
        return [(part.offset, part.end) for part in image.bitmaps.dirty_extents(name)]


@pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536, 2 << 20])
@pytest.mark.parametrize("seed", range(2))
def test_both_take_note_in_turn(tmp_path: Path, cluster_bytes: int, seed: int) -> None:
    random, path = Random(f"{cluster_bytes} {seed}"), tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_bytes}", path, SIZE)
    written: list[tuple[int, int]] = []
    granularities = random.sample((512, 4096, 65536, 1 << 20, 1 << 26), 2)
    done("qemu-img", "bitmap", "--add", "-g", granularities[0], path, "0")
    assert main(["bitmap", "--add", "-g", str(granularities[1]), str(path), "1"]) == 0
    for _ in range(2):
        offset, length = random.randrange(SIZE - 99999) // 512 * 512, random.randrange(1, 99) * 512
        qemu_io(path, f"write -q {offset} {length}")
        written.append((offset, offset + length))
        with jqcow.open(path, "r+") as image:
            for _ in range(12):
                offset, length = random.randrange(SIZE - 99999), random.randrange(1, 99999)
                image.pwrite(b"x" * length, offset)
                written.append((offset, offset + length))
        done("qemu-img", "check", "-q", path)
    for name, granularity in enumerate(granularities):
        noted = {at for start, end in written for at in range(start // granularity, -(-end // granularity))}
        found = told(path, str(name))
        assert found == told_by_qemu(path, str(name))
        ranges = (range(start // granularity, -(-end // granularity)) for start, end in found)
        assert {at for one in ranges for at in one} == noted


def test_the_command_does_what_qemu_does(tmp_path: Path) -> None:
    """Every action, on two images that are the same."""
    paths = [tmp_path / name for name in ("ours.qcow2", "theirs.qcow2")]
    for path in paths:
        done("qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
        for name in ("a", "b", "gone"):
            done("qemu-img", "bitmap", "--add", path, name)
        qemu_io(path, "write -q 1M 64k")
        done("qemu-img", "bitmap", "--clear", path, "b")
        qemu_io(path, "write -q 3M 64k")
    for arguments in (
        ["--add", "--disable", "-g", "128k", "IMAGE", "new"], ["--remove", "IMAGE", "gone"],
        ["--disable", "--merge", "a", "IMAGE", "b"], ["--enable", "IMAGE", "new"], ["--clear", "IMAGE", "a"],
        ["--merge", "b", "-b", str(paths[1]), "-F", "qcow2", "IMAGE", "new"],
    ):  # fmt: skip
        ours, theirs = ([str(path) if word == "IMAGE" else word for word in arguments] for path in paths)
        if str(paths[1]) in theirs[:-2]:
            theirs = [word for word in theirs if word not in ("-b", "-F", "qcow2", str(paths[1]))]
            theirs.insert(-1, str(paths[1]))
        assert main(["bitmap", *ours]) == 0
        done("qemu-img", "bitmap", *theirs)
    infos = [json.loads(done("qemu-img", "info", "--output=json", path)) for path in paths]
    first, second = (info["format-specific"]["data"]["bitmaps"] for info in infos)
    assert first == second
    for name in ("a", "b", "new"):
        assert told(paths[0], name) == told(paths[1], name) == told_by_qemu(paths[0], name)
    assert run("qemu-img", "check", "-q", paths[0]).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["IMAGE", "a"], ["--add", "IMAGE"], ["--add", "--remove", "IMAGE", "b"],
        ["-g", "64k", "--clear", "IMAGE", "a"],
        ["--add", "IMAGE", "a"], ["--remove", "IMAGE", "b"], ["--add", "-g", "100", "IMAGE", "b"],
        ["--dirty", "--add", "IMAGE", "a"], ["--remove-broken", "IMAGE", "a"],
        ["-b", "x", "--clear", "IMAGE", "a"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_the_command_refuses(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
    done("qemu-img", "bitmap", "--add", path, "a")
    before = done("qemu-img", "info", "--output=json", path)
    assert main(["bitmap", *(str(path) if word == "IMAGE" else word for word in arguments)]) == 1
    assert (
        json.loads(done("qemu-img", "info", "--output=json", path))["format-specific"]
        == json.loads(before)["format-specific"]
    )


def test_dirty_ranges_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "image.qcow2")
    with jqcow.create(path, 10 << 20) as image:
        image.bitmaps.add("a", 4096)
        image.pwrite(b"x", 8192)
    assert main(["bitmap", "--dirty", "--output=json", path, "a"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"start": 8192, "length": 4096}]
    assert main(["bitmap", "--dirty", path, "a"]) == 0
    assert capsys.readouterr().out == "0x2000 0x1000\n"


def test_a_damaged_directory_is_one_command_away_from_an_image_that_opens(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
    for name in ("bad", "good"):
        done("qemu-img", "bitmap", "--add", path, name)
    qemu_io(path, "write -q -P 7 0 64k")
    content = bytearray(path.read_bytes())
    extension = content.index((0x23852875).to_bytes(4, "big"))
    directory = int.from_bytes(content[extension + 24 : extension + 32], "big")
    content[directory : directory + 8] = bytes(8)
    path.write_bytes(content)
    refused = run("qemu-io", "-c", "read -q 0 512", path)
    assert "doesn't satisfy the constraints" in refused.stdout + refused.stderr
    assert main(["check", "-q", str(path)]) == 2
    assert main(["bitmap", "--remove-broken", str(path)]) == 0
    qemu_io(path, "read -q -P 7 0 64k", "write -q 1M 64k")
    assert told(path, "good") == [(0, 65536), (1 << 20, (1 << 20) + 65536)]
    # Written since: by force alone.
    assert main(["undo", str(path)]) == 1
    path.write_bytes(content)
    (tmp_path / "image.qcow2.jqcow-undo").unlink()
    assert main(["bitmap", "--remove-broken", str(path)]) == 0
    assert main(["undo", str(path)]) == 0
    assert path.read_bytes() == content
