"""QEMU's tools: run, asked whether an image is sound and what it reads, and made to hold an image."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

WAIT_SECONDS = 20
COMPLAINTS = ("failed", "error", "invalid", "not supported", "does not", "out of range")


def run(*command: object, typed: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its exit status; ``typed`` is its input."""
    words = [str(word) for word in command]
    return subprocess.run(words, input=typed, capture_output=True, text=True, check=False)


def done(*command: object, typed: str | None = None) -> str:
    """Run a command that must succeed; return what it printed."""
    result = run(*command, typed=typed)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def done_in_spite_of_load(*command: object) -> str:
    """Run what makes QEMU measure the time of a hash, which fails on a busy machine now and then."""
    for _ in range(50):
        result = run(*command)
        if "CPU usage" not in result.stderr:
            break
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def complaint(path: Path) -> str:
    """Return what QEMU's check says against an image: errors and leaks; nothing if it is clean."""
    result = run("qemu-img", "check", "-q", "-f", "qcow2", path)
    return "" if result.returncode == 0 else f"status {result.returncode}: {result.stdout}{result.stderr}"


def check_clean(path: Path) -> None:
    """QEMU's check finds no error and no leak."""
    told = complaint(path)
    assert not told, told


def compare(image: Path, raw: Path) -> None:
    """QEMU reads the same from the image as from a raw file."""
    done("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw)


def qemu_io(path: Path | str, *commands: str, kind: str = "qcow2") -> str:
    """Run qemu-io commands on an image; one that it complains of fails the test."""
    output = done("qemu-io", "-f", kind, *(word for command in commands for word in ("-c", command)), path)
    assert not any(word in output.lower() for word in COMPLAINTS), output
    return output


def dirty_by_qemu(folder: Path, image: Sequence[str | Path], bitmap: str) -> list[tuple[int, int]]:
    """Return [start, end) of what QEMU calls dirty in a bitmap, asked through a server in a folder."""
    socket = folder / "dirty.socket"
    socket.unlink(missing_ok=True)
    server = subprocess.Popen(["qemu-nbd", "-r", "-B", bitmap, "-k", socket, *image])
    until = time.monotonic() + WAIT_SECONDS
    while not socket.exists() and server.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    where = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
    lines = json.loads(done("qemu-img", "map", "--image-opts", where, "--output=json"))
    server.wait(timeout=WAIT_SECONDS)
    found: list[tuple[int, int]] = []
    for line in lines:
        start, end = line["start"], line["start"] + line["length"]
        if not line["data"]:
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
    return found


@contextlib.contextmanager
def holding(image: Path, *options: str) -> Iterator[None]:
    """Hold an image of 1 MiB open, and so locked, in a running qemu-io."""
    command = ["qemu-io", *options, "-f", "qcow2", str(image)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        # The answer to a command shows that the image is open.
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "1 MiB" in process.stdout.readline()
        yield
    finally:
        process.communicate("quit\n", timeout=WAIT_SECONDS)
    assert process.returncode == 0
