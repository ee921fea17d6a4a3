"""Leaf kernels over buffers: checksums, zero detection, refcount arrays, walks over tables, XTS.

Every kernel exists twice, in C (kernels.c) and as a Python twin (twins.py), with equal results. Importing
the package takes C where it was built. Call a kernel through the package, ``_native.crc32c(data)``: a name
imported by itself would not follow :func:`select`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

from jqcow._native import twins
from jqcow._native.sectors import (
    SECTOR_ALIGNMENT,
    SECTOR_COUNTS,
    SECTOR_PACKED,
    SECTOR_PAIRS,
    SECTOR_POINTERS,
    SECTOR_SNAPSHOT,
    SECTOR_ZERO,
)
from jqcow._native.table_twins import CountedFile, EntryCounts
from jqcow._native.twins import (
    COMPRESSED,
    DATA,
    JUDGED,
    MARK_MANY,
    MARK_ORDER,
    MARK_STRUCTURE,
    UNALLOCATED,
    ZERO,
    count_entries,
    crc32c,
    find_unmarked,
    first_difference,
    is_zero,
    l2_judge,
    l2_run,
    l2_shared,
    refcount_add,
    refcount_decode,
    refcount_find_used,
    refcount_find_zero,
    refcount_get,
    refcount_last_used,
    refcount_run,
    refcount_set,
    sector_kinds,
    set_copied,
    subcluster_run,
    xts_whiten,
    zero_run,
)

KERNELS = (
    "count_entries",
    "crc32c",
    "find_unmarked",
    "first_difference",
    "is_zero",
    "l2_judge",
    "l2_run",
    "l2_shared",
    "refcount_add",
    "refcount_decode",
    "refcount_find_used",
    "refcount_find_zero",
    "refcount_get",
    "refcount_last_used",
    "refcount_run",
    "refcount_set",
    "sector_kinds",
    "set_copied",
    "subcluster_run",
    "xts_whiten",
    "zero_run",
)

__all__ = [
    "COMPRESSED",
    "DATA",
    "JUDGED",
    "KERNELS",
    "MARK_MANY",
    "MARK_ORDER",
    "MARK_STRUCTURE",
    "SECTOR_ALIGNMENT",
    "SECTOR_COUNTS",
    "SECTOR_PACKED",
    "SECTOR_PAIRS",
    "SECTOR_POINTERS",
    "SECTOR_SNAPSHOT",
    "SECTOR_ZERO",
    "UNALLOCATED",
    "ZERO",
    "CountedFile",
    "EntryCounts",
    "active",
    "build_info",
    "count_entries",
    "crc32c",
    "find_unmarked",
    "first_difference",
    "is_zero",
    "l2_judge",
    "l2_run",
    "l2_shared",
    "refcount_add",
    "refcount_decode",
    "refcount_find_used",
    "refcount_find_zero",
    "refcount_get",
    "refcount_last_used",
    "refcount_run",
    "refcount_set",
    "sector_kinds",
    "select",
    "set_copied",
    "subcluster_run",
    "xts_whiten",
    "zero_run",
]

_serving: ModuleType = twins


def select(kind: Literal["auto", "c", "python"]) -> None:
    """Choose which kernels serve from now on, in every thread; ``auto`` takes C where it was built.

    Raises ImportError for ``c`` when the C kernels were not built, and ValueError for an unknown name.
    """
    global _serving  # noqa: PLW0603
    if kind not in ("auto", "c", "python"):
        raise ValueError(f"kernels are 'auto', 'c' or 'python', not {kind!r}")
    _serving = twins if kind == "python" else _bindings(required=kind == "c")
    globals().update({name: getattr(_serving, name) for name in KERNELS})


def active() -> Literal["c", "python"]:
    """Return which kernels serve now."""
    return "python" if _serving is twins else "c"


def build_info() -> str:
    """Return which kernels serve now, in words for ``jqcow --version``."""
    if active() == "python":
        return "Python twins"
    from jqcow._native import _kernels

    return "C kernels (abi3)" if str(_kernels.__file__).endswith(".abi3.so") else "C kernels"


def _bindings(required: bool) -> ModuleType:
    try:
        from jqcow._native import bindings
    except ImportError as error:
        if required:
            raise ImportError("the C kernels of jqcow were not built") from error
        return twins
    return bindings


select("auto")
