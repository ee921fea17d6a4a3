"""`tools/iotests` on a script of our own: it keeps every state, compares, and finds what has no reason."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.differential import leftovers, scripts
from tests.differential.scripts import Script
from tests.support.figures import ROOT
from tests.support.qemu import done

SCRIPT = """#!/usr/bin/env bash
# group: rw quick
image=$TEST_DIR/t.$IMGFMT
"$QEMU_IMG_PROG" create -f $IMGFMT ${IMGOPTS:+-o "$IMGOPTS"} "$image" 1M
"$QEMU_IO_PROG" $QEMU_IO_OPTIONS -c "write -P 7 0 128k" "$image"
printf 'x' | dd of="$image" bs=1 seek=327680 conv=notrunc
"$QEMU_IMG_PROG" check "$image"
"$QEMU_IMG_PROG" create -f $IMGFMT -b "$image" -F $IMGFMT "$TEST_DIR/upper.$IMGFMT"
"$QEMU_IMG_PROG" snapshot -c one "$TEST_DIR/upper.$IMGFMT"
"$QEMU_PROG" -version || echo "no machine"
rm "$image"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of scripts, and one that is none."""
    made = tmp_path / "tests" / "scripts"
    made.mkdir(parents=True)
    (made / "001").write_text(SCRIPT)
    (made / "common").write_text("# group: none")
    for path in made.iterdir():
        path.chmod(0o755)
    return made


def test_every_state_is_kept(folder: Path, tmp_path: Path) -> None:
    assert [path.name for path in scripts.scripts_in(folder)] == ["001"]
    ended, states = scripts.run(Script(folder / "001", "cluster_size=64k"), folder, tmp_path / "work", 60)
    assert ended == "ended"
    names = [[name for name, _ in state.files] for state in states]
    both = ["t.qcow2", "upper.qcow2"]
    assert names == [["t.qcow2"]] * 3 + [both] * 2 + [["upper.qcow2"]]
    # New, written, damaged by hand: each another content.
    assert len({dict(state.files)["t.qcow2"] for state in states[:3]}) == 3
    states[3].restore(tmp_path / "work" / "scratch")
    done("qemu-img", "info", "--backing-chain", tmp_path / "work" / "scratch" / "upper.qcow2")


def test_a_script_without_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "001"
    path.write_text("#!/bin/sh\n# group: slow\nsleep 100\n")
    path.chmod(0o755)
    assert scripts.run(Script(path), tmp_path, tmp_path / "work", 0.5) == ("cut off", [])


def test_the_tool(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "iotests"), str(folder), "--jobs", "1"]
    run = subprocess.run(
        [*command, "--record", str(tmp_path / "figures.json")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    counts = {
        name: int(count)
        for name, _, count in (line.rpartition("  ") for line in run.stdout.splitlines()[1:])
        for name in [name.strip()]
    }
    assert counts["images"] == 6 and counts["disks read alike"] == 6
    assert (tmp_path / "figures.json").exists()


def test_other_words_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "scratch" / "image.qcow2"
    image.parent.mkdir()
    done("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    assert not leftovers.judge(image, tmp_path, "sound").failures
    monkeypatch.setattr(leftovers, "_our_info", lambda path: (leftovers.Told(0), '{"format": "raw"}'))
    (failure, *_) = leftovers.judge(image, tmp_path, "as if", tmp_path / "kept").failures
    assert "told otherwise" in failure and "as if" in failure
    assert (tmp_path / "kept" / "as_if" / "image.qcow2").exists()
    shutil.rmtree(tmp_path / "kept")
