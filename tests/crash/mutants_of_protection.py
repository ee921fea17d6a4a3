"""Mutants of the rules of protection: each lets a clean unit have another content than that of its sum."""

from __future__ import annotations

from typing import Any

from jqcow.image.protection import ImageProtection
from jqcow.ondisk.protection import CHANGED
from tests.support.mutant import KNOWN_SUMS, PROTECTION, REFRESH, REFRESHING_MODULE, Mutant
from tests.support.patches import before, with_argument, with_result


def clear_bits_first(protection: ImageProtection, *_: Any) -> None:
    """Have nothing called changed, durably, before the sums of it are made."""
    if protection.fault() != "":
        return
    image: Any = protection._image
    changed = list(image.bitmaps.dirty_extents(CHANGED))
    image.bitmaps.clear(CHANGED)
    image.bitmaps.mark(CHANGED, changed)


MUTANTS_OF_PROTECTION = (
    Mutant(
        "Y1-bits-cleared-before-the-sums",
        before(f"{PROTECTION}.refresh", clear_bits_first),
        trials=("scenario:protection-cut-off",),
    ),
    Mutant(
        "Y2-clean-units-are-renewed",
        with_result(f"{KNOWN_SUMS}.changed", lambda packed: b"\xff" * len(packed), during=f"{REFRESH}.run"),
        trials=("scenario:rot-stays-wrong",),
    ),
    Mutant(
        "Y3-sums-of-what-is-below",
        with_argument(f"{REFRESHING_MODULE}:measure", "has_below", lambda _: False),
        trials=("scenario:sums-over-a-backing-file",),
    ),
)
