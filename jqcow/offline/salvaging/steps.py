"""What to do next about a diagnosed image: commands in their order, why, and about how long."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import replace

from jqcow.errors import printable
from jqcow.salvage.diagnosis import Diagnosis, Step

WRITE_SHARE = 0.5
"""What is read and written goes about half as fast as what is only read."""


def with_steps(found: Diagnosis, *, is_encrypted: bool = False) -> Diagnosis:
    """Return a diagnosis with what to do next."""
    return replace(found, steps=tuple(_steps(found, is_encrypted=is_encrypted)))


def _steps(found: Diagnosis, *, is_encrypted: bool) -> Iterator[Step]:
    image = found.image or "IMAGE"
    name, root = shlex.quote(printable(image)), os.path.splitext(image)[0]
    copy, target, report = (
        shlex.quote(printable(root + end)) for end in ("-copy.qcow2", "-saved.qcow2", "-saved.json")
    )
    secret = " --passphrase-file FILE" if is_encrypted else ""
    refcounts = any(each.structure.startswith("refcount") for each in found.damages)
    if found.is_damaged or found.may_be_lost:
        disk = found.disks[0]
        orphans = int(found.orphan_bytes * (found.orphans_with_data or 0))
        data = min(found.stored_bytes, disk.certain + disk.likely + disk.guess + min(disk.lost, orphans))
        yield Step(
            f"cp --sparse=always {name} {copy}",
            "keep the file as it is now; work on one of the two",
            _seconds(found, found.stored_bytes, WRITE_SHARE),
        )
        if orphans and not found.is_deep:
            yield Step(
                f"jqcow-recover --diagnose --deep{secret} {name}",
                "try where the data belongs that no table names; nothing is written",
                _seconds(found, 3 * orphans, 1.0),
            )
        yield Step(
            f"jqcow-recover --salvage {target} --report {report}{secret} {name}",
            "have back what can be had, into a new file; the image is not changed",
            _seconds(found, data + 3 * orphans, WRITE_SHARE),
        )
        yield Step(None, "check the file systems in the new file from within a guest", None)
    elif found.has_live_journal:
        yield Step(f"jqcow-recover {name}", "bring the crashed image home", 1.0)
    elif refcounts:
        yield Step(
            f"jqcow check -r all {name}",
            "count the refcounts anew: all data is in its place; jqcow undo takes that back",
            None,
        )
    elif found.orphan_bytes:
        yield Step(f"jqcow check -r leaks {name}", "free what nothing uses, if that is wanted", None)


def _seconds(found: Diagnosis, length: int, share: float) -> float | None:
    if found.read_bytes_per_second is None:
        return None
    return max(1.0, length / (found.read_bytes_per_second * share))
