"""`tools/qemu-iotests` on tests of our own: which pass with qemu-img, and what becomes of them with jqcow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.figures import ROOT

CHECK = """\
import os, subprocess, sys
name, image = sys.argv[-1], os.path.join(os.environ["TEST_DIR"], "image")
program = os.environ["QEMU_IMG_PROG"]
made = subprocess.run([program, "create", "-f", "qcow2", image, "1M"], capture_output=True, check=False)
told = subprocess.run([program, "--version"], capture_output=True, check=True).stdout
passes = {"001": True, "002": b"jqcow" not in told, "003": b"jqcow" in told}[name] and not made.returncode
print("+++ the output\\n+other words\\n" if not passes else "")
print(f"{name}   {'pass' if passes else 'fail'}       [10:00:00]")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tests: of all, of QEMU alone, of jqcow alone."""
    made = tmp_path / "qemu-iotests"
    made.mkdir()
    (made / "check").write_text(CHECK)
    for name in ("001", "002", "003"):
        (made / name).touch(0o755)
    return made


def run(folder: Path, *options: str) -> tuple[int, str, dict[str, Any]]:
    record = folder.parent / "record.json"
    command = [
        sys.executable,
        str(ROOT / "tools" / "qemu-iotests"),
        str(folder),
        "--record",
        str(record),
        *options,
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.returncode, found.stdout, json.loads(record.read_text())


def test_what_passes_with_qemu_img_is_tried_with_jqcow(folder: Path) -> None:
    code, told, record = run(folder)
    assert code == 1 and "1 of 2 that pass with qemu-img pass with jqcow" in told and "+other words" in told
    rows = record["tables"]["test"]["rows"]
    assert {name: row[:2] for name, row in rows.items()} == {
        "001": ["pass", "create"],
        "002": ["fail", "create"],
    }
    assert record["tables"]["command"]["rows"] == {"create": [1, 1]}
    assert (record["totals"]["pass with jqcow"], record["totals"]["fail"]) == (1, 1)


def test_the_list_is_kept(folder: Path) -> None:
    run(folder)
    code, told, record = run(folder, "--tests", "001")
    assert code == 0 and "1 of 1" in told
    assert record["totals"]["pass with jqcow"] == 1 and record["totals"]["pass with qemu-img"] == 2
