"""What a disk holds after a crash, block by block: old, new, or something that was never written."""

from __future__ import annotations

from dataclasses import dataclass

from demo.plan import BLOCK_BYTES, Plan, block_of

SECTOR_BYTES = 512


@dataclass(frozen=True)
class Verdict:
    """Blocks of a disk by what they hold. ``lost``: acknowledged, and not new. ``foreign``: neither."""

    acknowledged: int
    lost: int
    new: int
    old: int
    mixed: int
    foreign: int

    @property
    def holds(self) -> bool:
        """True if every acknowledged block is new, and every sector of the others old or new."""
        return not self.lost and not self.foreign


def judge(disk: bytes, plan: Plan, acknowledged: set[int]) -> Verdict:
    """Compare a disk with its two versions.

    An acknowledged block must be new. Of every other block, written or not, each sector must be old or new:
    a disk promises whole sectors only, so a block that was cut off may hold both.
    """
    counts = dict.fromkeys(("lost", "new", "old", "mixed", "foreign"), 0)
    written = {block for batch in plan.batches for block in batch}
    for number in range(len(plan.new) // BLOCK_BYTES):
        found, old, new = (block_of(version, number) for version in (disk, plan.old, plan.new))
        if number in acknowledged:
            counts["lost"] += found != new
        elif number in written or found != old:
            counts[_nature(found, old, new)] += 1
    if len(disk) != len(plan.new):
        counts["foreign"] += 1
    return Verdict(acknowledged=len(acknowledged), **counts)


def _nature(found: bytes, old: bytes, new: bytes) -> str:
    if found == new:
        return "new"
    if found == old:
        return "old"
    for start in range(0, BLOCK_BYTES, SECTOR_BYTES):
        sector = slice(start, start + SECTOR_BYTES)
        if found[sector] not in (old[sector], new[sector]):
            return "foreign"
    return "mixed"
