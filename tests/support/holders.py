"""Programs of QEMU that hold an image open, and so locked."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

WAIT_SECONDS = 20


@contextlib.contextmanager
def qemu_io(image: Path, *options: str) -> Iterator[None]:
    """Hold an image of 1 MiB open in a running qemu-io."""
    command = ["qemu-io", *options, "-f", "qcow2", str(image)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    try:
        # The answer to a command shows that the image is open, and so locked.
        process.stdin.write("length\n")
        process.stdin.flush()
        assert "1 MiB" in process.stdout.readline()
        yield
    finally:
        process.communicate("quit\n", timeout=WAIT_SECONDS)
    assert process.returncode == 0
