"""File systems of our own to fill up and to break: made as root, gone when the test is over."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Debian keeps mke2fs and its kin where an ordinary user does not look.
_ENVIRONMENT = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
_CHUNK_BYTES = 4096


def run(*command: str | Path, good_statuses: tuple[int, ...] = (0,)) -> None:
    """Run a command; where it fails, raise with what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, env=_ENVIRONMENT, check=False)
    if done.returncode not in good_statuses:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")


@contextmanager
def _mounted(target: Path, *arguments: str | Path) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    run("mount", *arguments, target)
    try:
        yield target
    finally:
        _unmount(target)


def _unmount(target: Path) -> None:
    try:
        run("umount", target)
    except RuntimeError:
        # A test that failed left a file open. Nothing of it may outlive the test all the same.
        run("umount", "--lazy", target)
        raise


@contextmanager
def tmpfs(target: Path, size_bytes: int) -> Iterator[Path]:
    """Mount an empty file system in memory that holds ``size_bytes``."""
    with _mounted(target, "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs") as mounted:
        yield mounted


def make_ext4(device_file: Path, size_bytes: int, *, journal: bool = True) -> None:
    """Make an ext4 file system in a sparse file. Its own structures are written, so that they have room.

    With a ``journal`` it turns read-only where that cannot be written.
    """
    with device_file.open("xb") as file:
        file.truncate(size_bytes)
    extended = "nodiscard,lazy_itable_init=0,lazy_journal_init=0"
    features = "has_journal" if journal else "^has_journal"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-O", features, "-E", extended, device_file)


def repair_ext4(device_file: Path) -> None:
    """Replay the journal of a file system whose device failed, and repair it, as an administrator would."""
    run("e2fsck", "-f", "-y", device_file, good_statuses=(0, 1))


@contextmanager
def loop_mounted(device_file: Path, target: Path) -> Iterator[Path]:
    """Mount the file system in a file by way of a loop device."""
    with _mounted(target, "-o", "loop", device_file) as mounted:
        yield mounted


@contextmanager
def ext4(target: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a new ext4 file system of ``size_bytes`` on a loop device."""
    device_file = target.with_name(f"{target.name}.ext4")
    make_ext4(device_file, size_bytes)
    with loop_mounted(device_file, target) as mounted:
        yield mounted
    device_file.unlink()


def fill_up(ballast: Path) -> None:
    """Write a file until the file system is full, to the last block."""
    with ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(b"\1" * _CHUNK_BYTES)
        except OSError:
            os.fsync(file.fileno())
