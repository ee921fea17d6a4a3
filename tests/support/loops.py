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


def has_device_mapper() -> bool:
    """Return True if the kernel has the device mapper. Each run of the tests says so where it has not."""
    return "device-mapper" in Path("/proc/misc").read_text()


class MappedDevice:
    """A block device of the device mapper over another one, whose table can be replaced."""

    def __init__(self, name: str, below: str, sectors: int) -> None:
        """Take the name and the device below, and its length in sectors of 512 bytes."""
        self.name = name
        self.path = f"/dev/mapper/{name}"
        self._linear = f"0 {sectors} linear {below} 0"
        self._error = f"0 {sectors} error"

    def fail(self) -> None:
        """From here on every access fails."""
        self._reload(self._error)

    def mend(self) -> None:
        """From here on accesses reach the device below."""
        self._reload(self._linear)

    def _reload(self, table: str) -> None:
        for command in (("suspend", "--noflush"), ("load", "--table", table), ("resume",)):
            action, *options = command
            subprocess.run(("dmsetup", action, self.name, *options), check=True)


@contextmanager
def mapped_device(below: str, size_bytes: int) -> Iterator[MappedDevice]:
    """Map a block device through the device mapper."""
    device = MappedDevice(f"jqcow-{below.rpartition('/')[2]}", below, size_bytes // 512)
    subprocess.run(("dmsetup", "create", device.name, "--table", device._linear), check=True)
    try:
        yield device
    finally:
        subprocess.run(("dmsetup", "remove", "--retry", device.name), check=True)
