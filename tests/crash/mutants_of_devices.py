"""Mutants of the rules for devices of fixed size: see `tests.crash.mutants`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jqcow.engine.clusters import Run
from tests.crash.trials import SCENARIO
from tests.support.mutant import (
    FRONTIER,
    LIFECYCLE,
    LOG,
    MEDIUM,
    NEW_CONTENT,
    SPACE,
    Mutant,
    seeds,
)
from tests.support.patches import Function, replacing, skipping, with_argument


def call_zero_safe(original: Function, space: Any, count: int) -> Run:
    """Take for zeros what lies behind the frontier, whatever the device shows there."""
    return replace(original(space, count), zero_safe=True)


def begin_with_sector_0(original: Function, content: Any) -> None:
    """Write sector 0 before all else."""
    content.begin()
    content.below.pwrite(content._sector, 0)
    original(content)


def give_up_nothing(original: Function, content: Any) -> None:
    """Leave the old sector 0 until the new one is written."""
    content._is_begun = True


def leave_tables_alone(original: Function, lifecycle: Any) -> Any:
    """Look for what refcounts count alone."""
    return iter([1])


def leave_images_alone(original: Function, lifecycle: Any) -> Any:
    """Forget where replay may write."""
    return list(original(lifecycle))[:-1]


def as_asked_for(original: Function, medium: Any, offset: int, length: int, preallocation: str) -> None:
    """Write zeros only where it was asked for."""
    medium.require_healthy()
    if preallocation == "full":
        original(medium, offset, length, preallocation)


def find_the_first(_: Function, area: Any, extension_type: int) -> Any:
    """Take the first extension of a type, where QEMU takes the last."""
    return next((found for found in area.extensions if found.type == extension_type), None)


MUTANTS_OF_DEVICES = (
    Mutant(
        "S3-old-bytes-for-zeros",
        replacing(f"{SPACE}.take_at_frontier", call_zero_safe),
        trials=("device-fresh/4096/0",),
    ),
    Mutant(
        "S7-past-the-end-of-the-device",
        skipping(f"{FRONTIER}.require_room"),
        trials=(SCENARIO + "used-up-device",),
    ),
    Mutant(
        "S2-journal-where-replay-writes",
        with_argument(f"{LOG}.lay", "is_home", lambda _: True),
        trials=(SCENARIO + "recovery-on-a-used-up-device",),
    ),
    Mutant(
        "F5-what-no-refcount-counts",
        replacing(f"{LIFECYCLE}._ends_of_what_is_known", leave_tables_alone),
        trials=(SCENARIO + "uncounted-data-on-a-device",),
    ),
    Mutant(
        "F5-where-replay-writes",
        replacing(f"{LIFECYCLE}._ends_of_what_is_known", leave_images_alone),
        trials=(SCENARIO + "recovery-on-a-used-up-device",),
    ),
    Mutant(
        "H2-old-bytes-preallocated",
        replacing(f"{MEDIUM}.take_space", as_asked_for),
        trials=seeds("device-preallocated-old-space/4096", 2),
    ),
    Mutant(
        "V1-old-header-over-new-content",
        replacing(f"{NEW_CONTENT}.begin", give_up_nothing),
        trials=("dropping:written-anew",),
    ),
    Mutant(
        "V2-header-first",
        replacing(f"{NEW_CONTENT}.publish", begin_with_sector_0),
        trials=("dropping:written-anew",),
    ),
    Mutant(
        "V3-old-bytes-for-zeros",
        skipping(f"{NEW_CONTENT}._fill"),
        trials=(SCENARIO + "zeros-of-a-raw-disk",),
    ),
    Mutant(
        "K1-another-file-than-was-allowed",
        with_argument("jqcow.device.file:FileDevice.open", "real_path", lambda _: None),
        trials=(SCENARIO + "link-that-leads-elsewhere",),
    ),
    Mutant(
        "K2-the-first-of-two-extensions",
        replacing("jqcow.ondisk.header:HeaderArea.find", find_the_first),
        trials=(SCENARIO + "two-formats-of-one-file",),
    ),
    Mutant(
        "V4-old-image-over-new-data",
        skipping("jqcow.device.targets:_NewFile.give_up_old"),
        trials=(SCENARIO + "replaced-with-its-data-file",),
    ),
    Mutant(
        "V4-old-image-over-data-in-place",
        skipping("jqcow.disks.making:give_up_before"),
        trials=(SCENARIO + "replaced-with-its-data-file",),
    ),
)
