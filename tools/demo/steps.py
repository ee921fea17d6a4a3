"""The steps that change the file system, and how the writer makes them: each is one transaction.

A step is the difference between two states of a disk. Between its first block and its last the file system
is broken: directories name inodes that do not exist, blocks are used and marked free.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jqcow
from tests.support.operations import Disk, Write

BLOCK_BYTES = 4096
STEP_COUNT = 12
# Smaller than usual, so that a step changes many entries of the tables.
CLUSTER_BYTES = 8192

_COUNT = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")


@dataclass(frozen=True)
class Step:
    """The blocks in which two states of a disk differ, as (number, new content), in the order of writing."""

    blocks: tuple[tuple[int, bytes], ...]

    @classmethod
    def between(cls, before: bytes, after: bytes, random: Random) -> Step:
        """Compare two disks of one size; the order of writing is random."""
        pairs = ((n, _block(before, n), _block(after, n)) for n in range(len(after) // BLOCK_BYTES))
        blocks = [(number, new) for number, old, new in pairs if old != new]
        random.shuffle(blocks)
        return cls(tuple(blocks))

    def write(self, disk: Disk) -> None:
        """Write every block."""
        for number, content in self.blocks:
            Write(number * BLOCK_BYTES, content).on(disk)


def _block(disk: bytes, number: int) -> bytes:
    return disk[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]


def write_steps(
    image: jqcow.Image, steps: Sequence[Step], acknowledge: Callable[[], None], *, transactions: bool = True
) -> None:
    """Write the steps, and acknowledge each when it is durable: as a transaction, or block by block."""
    for step in steps:
        if transactions:
            with image.transaction() as transaction:
                step.write(transaction)
        else:
            step.write(image)
            image.flush()
        acknowledge()


def save_steps(steps: Sequence[Step], path: Path) -> None:
    """Write the steps to a file, for the writer process."""
    with path.open("wb") as file:
        for step in steps:
            file.write(_COUNT.pack(len(step.blocks)))
            for number, content in step.blocks:
                file.write(_NUMBER.pack(number) + content)


def load_steps(path: Path) -> list[Step]:
    """Read the steps back."""
    steps = []
    with path.open("rb") as file:
        while head := file.read(_COUNT.size):
            (count,) = _COUNT.unpack(head)
            blocks = []
            for _ in range(count):
                (number,) = _NUMBER.unpack(file.read(_NUMBER.size))
                blocks.append((number, file.read(BLOCK_BYTES)))
            steps.append(Step(tuple(blocks)))
    return steps


def import_disk(disk_path: Path, image_path: Path) -> None:
    """Make an image of a raw disk; clusters of zeros take no space."""
    disk = disk_path.read_bytes()
    with jqcow.create(image_path, len(disk), cluster_size=CLUSTER_BYTES) as image:
        for offset in range(0, len(disk), CLUSTER_BYTES):
            cluster = disk[offset : offset + CLUSTER_BYTES]
            if any(cluster):
                Write(offset, cluster).on(image)
