"""Runs test scripts like QEMU's own, and gathers the images that their commands leave behind.

The scripts find QEMU's programs by variables: stand-ins, which keep the state of the script's folder before
and after each command, with `tests.differential.capture`. What a script finds right or wrong does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CAPTURE = Path(__file__).with_name("capture.py")
PROGRAMS = {
    "QEMU_IMG_PROG": "qemu-img",
    "QEMU_IO_PROG": "qemu-io",
    "QEMU_NBD_PROG": "qemu-nbd",
    "QEMU_PROG": "qemu-system-x86_64",
    "QSD_PROG": "qemu-storage-daemon",
}
STAND_IN = """#!/bin/sh
{python} -I -S {capture} {folder} {store}
{program} "$@"
status=$?
{python} -I -S {capture} {folder} {store}
exit $status
"""
STAYS = """#!/bin/sh
{python} -I -S {capture} {folder} {store}
exec {program} "$@"
"""
"""For programs that scripts start beside them, and end by the number of the process."""

MISSING = """#!/bin/sh
echo "{program} is not installed" >&2
exit 1
"""


@dataclass(frozen=True)
class Script:
    """A test script, and the options with which its images are to be made."""

    path: Path
    options: str = ""

    @property
    def name(self) -> str:
        return f"{self.path.name} {self.options}".strip()


@dataclass(frozen=True)
class State:
    """The files that a folder held at one time: their names, and those of their contents in the store."""

    files: tuple[tuple[str, str], ...]
    store: Path

    def restore(self, folder: Path) -> None:
        """Make the folder hold these files, and no others: links to the store, not to be written to."""
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        for name, kept in self.files:
            os.link(self.store / kept, folder / name)


def scripts_in(folder: Path) -> list[Path]:
    """Return the test scripts in a folder and in ``tests`` below it: they name their groups."""
    found = []
    for path in sorted([*folder.iterdir(), *folder.glob("tests/*")]):
        if path.is_file() and path.suffix == "":
            with path.open("rb") as file:
                first = file.read(200)
            if first.startswith(b"#!") and b"\n# group:" in first:
                found.append(path)
    return found


def run(script: Script, folder: Path, work: Path, seconds: float) -> tuple[str, list[State]]:
    """Run a script in a working folder; return how it ended and the states that it left, each once.

    One that does not run says why.
    """
    scratch, sockets, programs, store = (work / name for name in ("scratch", "s", "bin", "store"))
    for path in (scratch, sockets, programs, store):
        path.mkdir(parents=True)
    environment = _environment(script, folder, scratch, sockets)
    for variable, program in PROGRAMS.items():
        environment[variable] = str(programs / program)
        _write_stand_in(programs / program, scratch, store)
    command = [str(script.path)]
    if b"python" in script.path.read_bytes().partition(b"\n")[0]:
        command.insert(0, sys.executable)
    ended = _run_to_its_end(command, script.path.parent, environment, seconds)
    _unmount(scratch)
    subprocess.run([sys.executable, str(CAPTURE), str(scratch), str(store)], check=False)
    reason = scratch / f"{script.path.name}.notrun"
    if reason.exists():
        ended = f"not run: {reason.read_text(errors='replace').strip()}"
    return ended, list(_states(store))


def _environment(script: Script, folder: Path, scratch: Path, sockets: Path) -> dict[str, str]:
    """Return the variables that QEMU's scripts need, for images of its own format in plain files."""
    paths = [str(folder), str(folder.parents[1] / "python")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHON": sys.executable,
        "TEST_DIR": str(scratch),
        "SOCK_DIR": str(sockets),
        "SAMPLE_IMG_DIR": str(folder / "sample_images"),
        "IMGFMT": "qcow2",
        "IMGFMT_GENERIC": "true",
        "IMGOPTS": script.options,
        "IMGOPTSSYNTAX": "false",
        "IMGPROTO": "file",
        "AIOMODE": "threads",
        "CACHEMODE": "writeback",
        "CACHEMODE_IS_DEFAULT": "true",
        "QEMU_DEFAULT_MACHINE": "pc",
        "QEMU_OPTIONS": "-nodefaults -display none -accel qtest",
        "QEMU_IO_OPTIONS": "--cache writeback --aio threads -f qcow2",
        "QEMU_IO_OPTIONS_NO_FMT": "--cache writeback --aio threads",
    }


def _write_stand_in(path: Path, scratch: Path, store: Path) -> None:
    program = shutil.which(path.name)
    text = MISSING if program is None else STAND_IN if path.name in ("qemu-img", "qemu-io") else STAYS
    words = {"python": sys.executable, "capture": CAPTURE, "folder": scratch, "store": store}
    path.write_text(text.format(program=program or path.name, **words))
    path.chmod(0o755)


def _run_to_its_end(command: list[str], folder: Path, environment: dict[str, str], seconds: float) -> str:
    process = subprocess.Popen(
        command, cwd=folder, env=environment, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "cut off"
    finally:
        # The script's own session: servers that it left behind, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "ended" if status == 0 else "failed"


def _unmount(scratch: Path) -> None:
    """End what a script's server exported as a file: with the server gone, nobody can look at it."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = Path(line.split(" ")[1])
        if scratch in place.parents:
            subprocess.run(["umount", "-l", str(place)], check=False)


def _states(store: Path) -> Iterator[State]:
    listed = store / "states"
    lines = listed.read_text().splitlines() if listed.exists() else []
    for line in dict.fromkeys(lines):
        yield State(tuple(json.loads(line).items()), store)
