"""What a crash left: judged by recovering it, by QEMU's check, by e2fsck, and by comparing the whole disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jqcow
from demo.filesystem import History, disk_digest, is_clean, run_tool
from jqcow.testing import SimulatedDevice

CHUNK_BYTES = 1 << 16


@dataclass
class Tally:
    """Counts of crashes by what they left.

    ``unrecovered``  jqcow could not open the image again
    ``unsound``      qemu-img check found errors or leaks
    ``unclean``      e2fsck found a broken file system
    ``lost``         an acknowledged step was not there
    ``partial``      the disk was in no state that the steps could have led to by then
    ``ahead``        the step in flight was there, whole, though it was not acknowledged
    """

    crashes: int = 0
    unrecovered: int = 0
    unsound: int = 0
    unclean: int = 0
    lost: int = 0
    partial: int = 0
    ahead: int = 0

    @property
    def recovered(self) -> int:
        """How many crashes left an image that could be judged further."""
        return self.crashes - self.unrecovered

    def add(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def note_disk(self, disk: bytes, disk_path: Path, acknowledged: int, history: History) -> int | None:
        """Count a recovered disk, which is also in a file; return the steps it has, None if partial."""
        digest = disk_digest(disk)
        steps = history.digests.index(digest) if digest in history.digests else None
        self.unclean += not is_clean(disk_path)
        # No writer is more than one step ahead of what it has told.
        if steps is None or steps > acknowledged + 1:
            self.partial += 1
            return None
        self.lost += steps < acknowledged
        self.ahead += steps > acknowledged
        return steps


class Judge:
    """Recovers what crashes of a simulated disk have left, and counts what is there."""

    def __init__(self, history: History, directory: Path) -> None:
        """Keep the scratch files in ``directory``."""
        self._history = history
        self._image = _Mirror(directory / "image.qcow2")
        self._disk = _Mirror(directory / "disk.raw")
        self.tally = Tally()

    def judge(self, device: SimulatedDevice, acknowledged: int) -> None:
        """Recover the device and count what it holds; ``acknowledged`` steps must be there."""
        self.tally.crashes += 1
        try:
            with jqcow.open_device(device, "r+") as image:
                disk = image.pread(image.size, 0)
        except jqcow.JqcowError:
            self.tally.unrecovered += 1
            return
        self._image.show(device.content())
        check = run_tool("qemu-img", "check", "-q", self._image.path, accept=(0, 1, 2, 3))
        self.tally.unsound += check.returncode != 0
        self._disk.show(disk)
        self.tally.note_disk(disk, self._disk.path, acknowledged, self._history)


class _Mirror:
    """A file for tools to look at. Only what differs from the last content is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = b""

    def show(self, content: bytes) -> None:
        """Make the file hold ``content``."""
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            file.truncate(len(content))
            for start in range(0, len(content), CHUNK_BYTES):
                chunk = content[start : start + CHUNK_BYTES]
                before = self._content[start : start + CHUNK_BYTES].ljust(len(chunk), b"\0")
                if chunk != before:
                    file.seek(start)
                    file.write(chunk)
        self._content = content
