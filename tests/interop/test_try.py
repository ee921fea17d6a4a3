"""The demonstration, on a small disk: it ends well, and without barriers it does not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
# Debian keeps mke2fs and its kin where an ordinary user does not look.
SYSTEM_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def run_demonstration(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": SYSTEM_PATH,
        "PYTHONPATH": f"{ROOT}:{TOOLS}",
        "PYTHONSAFEPATH": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "demo", "--size", "16", *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def moment_of_the_cut(output: str) -> str:
    found = re.search(r"The power fails .*", output)
    assert found, output
    return found[0]


def test_the_file_system_survives_both_crashes(tmp_path: Path) -> None:
    result = run_demonstration("--seed", "1", "--keep", str(tmp_path / "kept"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "BROKEN" not in result.stdout
    assert result.stdout.count("[ok] QEMU refuses the image and names what to run") == 2
    assert result.stdout.count("have their SHA-256") == 2
    assert {"killed.qcow2", "power-cut.qcow2"} <= {path.name for path in (tmp_path / "kept").iterdir()}


def test_without_barriers_acknowledged_blocks_are_lost_and_the_run_repeats() -> None:
    first, second = (run_demonstration("--seed", "7", "--no-barrier") for _ in range(2))
    assert first.returncode == 1, first.stdout + first.stderr
    assert re.search(r"BROKEN: .*acknowledged blocks are lost", first.stdout)
    assert moment_of_the_cut(first.stdout) == moment_of_the_cut(second.stdout)


def test_a_wrong_option_is_refused() -> None:
    result = run_demonstration("--size", "1")
    assert result.returncode == 2
    assert "--size" in result.stderr


def test_help_names_every_option() -> None:
    result = subprocess.run([TOOLS / "try", "--help"], capture_output=True, text=True, check=True)
    program = (TOOLS / "demo" / "__main__.py").read_text()
    missing = [option for option in re.findall(r'"(--[\w-]+)"', program) if option not in result.stdout]
    assert missing == []
