"""Loop devices: block devices for tests, where the kernel lets us make them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

SECTOR_SIZES = (512, 4096)
"""Logical sector sizes of disks."""


@contextmanager
def loop_device(path: Path, size_bytes: int, sector_bytes: int = 512) -> Iterator[str]:
    """Attach a file full of noise as a block device. Skips the test where that is not allowed."""
    noise = Random(size_bytes).randbytes(1 << 20)
    with path.open("wb") as file:
        for start in range(0, size_bytes, len(noise)):
            file.write(noise[: size_bytes - start])
    command = ("losetup", "--find", "--show", "--sector-size", str(sector_bytes), str(path))
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("NO BLOCK DEVICE TESTED: there is no losetup")
    if done.returncode:
        pytest.skip(f"NO BLOCK DEVICE TESTED: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(("losetup", "--detach", device), check=True)
