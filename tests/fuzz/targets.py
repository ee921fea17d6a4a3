"""The targets of the guided fuzzer by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz import frames, parts, wholes


@dataclass(frozen=True)
class Target:
    """``run`` takes an input and raises for what must not be; ``seeds`` are good inputs to start from."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    length_max: int


TARGETS = {
    "header": Target(parts.header, parts.header_seeds, 4096),
    "tables": Target(parts.tables, parts.tables_seeds, 512),
    "snapshots": Target(parts.snapshots, parts.snapshots_seeds, 4096),
    "compressed": Target(parts.compressed, parts.compressed_seeds, 4096),
    "journal": Target(frames.journal, frames.journal_seeds, 1024),
    "roots": Target(parts.roots, parts.roots_seeds, 1100),
    "images": Target(wholes.images, wholes.images_seeds, 512),
    "recovery": Target(wholes.recovery, wholes.recovery_seeds, 1024),
    "kernels": Target(wholes.kernels, wholes.kernels_seeds, 512),
}
