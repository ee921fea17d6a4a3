"""Preallocation beside QEMU: the same disk, the same map, the same space on the host; written by both."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import jqcow
from jqcow.cli import main
from tests.support.qemu import check_clean, done, qemu_io

MIB = 1 << 20
MODES = ("off", "metadata", "falloc", "full")
OPTIONS = (
    "cluster_size=64k",
    "extended_l2=on",
    "compat=0.10,cluster_size=4k",
    "cluster_size=512,refcount_bits=1",
)
SLACK_BYTES = 300_000
"""QEMU pads some tables with written zeros, jqcow leaves them out."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(path: str) -> list[dict[str, object]]:
    """Return what qemu-img maps, without host offsets, neighbours joined."""
    joined: list[dict[str, object]] = []
    for found in json.loads(done("qemu-img", "map", "--output=json", path)):
        start, length = found.pop("start"), found.pop("length")
        found.pop("offset", None)
        if joined and {**joined[-1], "start": 0, "end": 0} == {**found, "start": 0, "end": 0}:
            joined[-1]["end"] = start + length
        else:
            joined.append({**found, "start": start, "end": start + length})
    return joined


def require_alike(ours: str, theirs: str) -> None:
    check_clean(Path(ours))
    assert main.main(["check", "-q", ours]) == 0
    done("qemu-img", "compare", ours, theirs)
    with jqcow.open(ours, allow_files=True) as image:
        # In smaller clusters QEMU's tables lie among the data, and share blocks of the host with it.
        if image.info().cluster_size >= 4096:
            assert shown(ours) == shown(theirs)
    space = [os.stat(path).st_blocks * 512 for path in (ours, theirs)]
    assert abs(space[0] - space[1]) <= SLACK_BYTES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
def test_new_images_are_alike(options: str, mode: str) -> None:
    words = f"{options},preallocation={mode}"
    assert main.main(["create", "-q", "-o", words, "ours", "2M"]) == 0
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, "theirs", "2M")
    require_alike("ours", "theirs")
    qemu_io(Path("ours"), "write -P 7 100k 100k", "write -z 1M 64k", "discard 0 64k")
    check_clean(Path("ours"))
    with jqcow.open("ours", "r+") as image:
        image.pwrite(b"x" * 5000, MIB + 512)
        assert image.check().ok
    check_clean(Path("ours"))


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("options", OPTIONS[:3])
@pytest.mark.parametrize("below", [False, True])
def test_grown_images_are_alike(options: str, mode: str, below: bool) -> None:
    base = []
    if below:
        done("qemu-img", "create", "-q", "-f", "qcow2", "base", "4M")
        qemu_io(Path("base"), "write -P 7 0 4M")
        base = ["-b", "base", "-F", "qcow2"]
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *base, "ours", "2M")
    qemu_io(Path("ours"), "write -P 9 1M 64k")
    if not below:
        done("qemu-img", "snapshot", "-c", "kept", "ours")
    shutil.copy("ours", "theirs")
    words = ["resize", "-q", "--allow-files", f"--preallocation={mode}", "ours", "6M"]
    assert main.main(words) == 0
    check_clean(Path("ours"))
    if options.startswith("compat"):
        # Version 2 has no zero flag, and a snapshot keeps QEMU from growing such an image.
        return
    done("qemu-img", "resize", "-q", f"--preallocation={mode}", "theirs", "6M")
    require_alike("ours", "theirs")


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("options", OPTIONS[:2])
def test_targets_are_alike(options: str, mode: str) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", "source", "2M")
    qemu_io(Path("source"), "write -P 9 1M 64k", "write -P 8 0 64k")
    words = f"{options},preallocation={mode}"
    assert main.main(["convert", "-q", "-O", "qcow2", "-o", words, "source", "ours"]) == 0
    done("qemu-img", "convert", "-O", "qcow2", "-o", words, "source", "theirs")
    check_clean(Path("ours"))
    done("qemu-img", "compare", "ours", "theirs")
    assert os.stat("ours").st_size == os.stat("theirs").st_size


@pytest.mark.parametrize("mode", MODES)
def test_raw_files_are_alike(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main.main(["create", "-q", "-f", "raw", "-o", f"preallocation={mode},nocow=on", "ours", "1M"])
    assert code == (1 if mode == "metadata" else 0)
    if mode == "metadata":
        assert "no metadata" in capsys.readouterr().err
        return
    done("qemu-img", "create", "-q", "-f", "raw", "-o", f"preallocation={mode},nocow=on", "theirs", "1M")
    spaces = [os.stat(path).st_blocks * 512 >= MIB for path in ("ours", "theirs")]
    assert spaces == [mode != "off"] * 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["create", "-o", "preallocation=some", "x", "1M"], "preallocation is off"),
        (["create", "-o", "nocow=maybe", "x", "1M"], "nocow must be on or off"),
        (["create", "-o", "preallocation=full", "-b", "base", "-F", "qcow2", "x"], "extended_l2"),
        (["convert", "-c", "-O", "qcow2", "-o", "preallocation=full", "base", "x"], "compressed"),
        (["resize", "--shrink", "--preallocation=full", "base", "512k"], "grows by"),
        (["resize", "--preallocation=full", "base", "1M"], "grows by"),
    ],
)
def test_what_is_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    jqcow.create("base", MIB).close()
    assert main.main(words) == 1
    assert told in capsys.readouterr().err
    assert not os.path.exists("x")
