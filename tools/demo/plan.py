"""What the writer writes, in which order, and how it writes it.

The plan is made once, from the seed, so that every run and every process agrees on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jqcow

BLOCK_BYTES = 4096
BATCH_BLOCKS_MAX = 12
# Smaller than usual, so that nearly every flush has to log where its blocks went.
CLUSTER_BYTES = 8192


@dataclass(frozen=True)
class Plan:
    """The blocks to be written, in batches; a flush follows each. ``new`` is the disk when all is written."""

    old: bytes
    new: bytes
    batches: tuple[tuple[int, ...], ...]

    @classmethod
    def between(cls, old_path: Path, new_path: Path, seed: int) -> Plan:
        """Plan to write every block in which two disks of one size differ, in the order of the seed."""
        old, new = old_path.read_bytes(), new_path.read_bytes()
        random = Random(f"{seed}/plan")
        blocks = [n for n in range(len(old) // BLOCK_BYTES) if block_of(old, n) != block_of(new, n)]
        random.shuffle(blocks)
        batches = []
        while blocks:
            count = random.randint(1, BATCH_BLOCKS_MAX)
            batches.append(tuple(blocks[:count]))
            del blocks[:count]
        return cls(old, new, tuple(batches))

    @property
    def block_count(self) -> int:
        """How many blocks are to be written."""
        return sum(map(len, self.batches))

    def acknowledged_blocks(self, batch_count: int) -> set[int]:
        """Return the blocks of the first batches: all that was acknowledged after so many flushes."""
        return {block for batch in self.batches[:batch_count] for block in batch}


def block_of(disk: bytes, number: int) -> bytes:
    """Return a block of a disk."""
    return disk[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]


def write_batches(image: jqcow.Image, plan: Plan, first_batch: int, acknowledge: Callable[[], None]) -> None:
    """Write the batches from ``first_batch`` on; acknowledge each when its flush has returned."""
    for batch in plan.batches[first_batch:]:
        for block in batch:
            image.pwrite(block_of(plan.new, block), block * BLOCK_BYTES)
        image.flush()
        acknowledge()


def import_disk(disk_path: Path, image_path: Path) -> None:
    """Make an image of a raw disk; clusters of zeros take no space."""
    disk = disk_path.read_bytes()
    with jqcow.create(image_path, len(disk), cluster_size=CLUSTER_BYTES) as image:
        for offset in range(0, len(disk), CLUSTER_BYTES):
            cluster = disk[offset : offset + CLUSTER_BYTES]
            if cluster.count(0) != len(cluster):
                image.pwrite(cluster, offset)
