"""An image that is mapped in all, of which one L2 table in ten is lost: what a diagnosis of it takes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

from tests.salvage.anatomy import Anatomy
from tests.salvage.columns import Ran, copied, ran
from tests.salvage.damages import Victim
from tests.salvage.foreign import run
from tests.support import figures
from tests.support.runs import table

LOST_EVERY = 10
RECOVER = (
    "import sys; sys.path.insert(0, sys.argv[1]); from jqcow.cli.recover import main; main(sys.argv[2:])"
)
COLUMNS = ("", "seconds", "ratio", "MiB")


@dataclass(frozen=True)
class Taken:
    """What a command took: medians of CPU seconds, and of the most memory in bytes."""

    name: str
    cpu_seconds: float
    peak_bytes: float


def measure(folder: Path, tib: int, seed: int, rounds: int) -> list[Taken]:
    """Make an image of so many TiB, and return what looking at it takes: QEMU first, of the whole one."""
    whole, damaged = folder / "whole.qcow2", folder / "damaged.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", whole, f"{tib}T")
    copied(whole, damaged)
    anatomy, chance = Anatomy.of(damaged), Random(seed)
    victim = Victim(damaged, anatomy, chance, whole, [])
    victim.garble(chance.sample(anatomy.l2, len(anatomy.l2) // LOST_EVERY))
    victim.close()
    recover = [sys.executable, "-c", RECOVER, figures.ROOT]
    commands = {
        "qemu-img check, undamaged": ["qemu-img", "check", whole],
        "jqcow-recover, undamaged": [*recover, whole],
        "jqcow-recover --diagnose, damaged": [*recover, "--diagnose", damaged],
    }
    taken: dict[str, list[Ran]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, words in commands.items():
            taken[name].append(ran(words, folder))
    return [
        Taken(name, median(one.cpu_seconds for one in found), median(one.peak_bytes for one in found))
        for name, found in taken.items()
    ]


def lines(taken: Sequence[Taken]) -> list[str]:
    """Return a table, with the ratio to the first."""
    rows = [
        (
            one.name,
            f"{one.cpu_seconds:.2f}",
            f"{one.cpu_seconds / taken[0].cpu_seconds:.2f}",
            f"{one.peak_bytes / (1 << 20):.0f}",
        )
        for one in taken
    ]
    return list(table(COLUMNS, rows))
