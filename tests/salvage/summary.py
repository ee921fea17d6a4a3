"""What cells of the damage matrix come to, by kind of damage and by base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.salvage.matrix import QEMU, Cell, share
from tests.support.runs import table

NAMES = ("cells", "present", "QEMU", "plain", "jqcow", "certain", "files", "files QEMU", "seconds")


def by(cells: Sequence[Cell], attribute: str) -> list[str]:
    """Return a table, a row for each value of an attribute: shares in per cent, the longest time."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(getattr(cell, attribute), []).append(cell)
    rows = [(name, *_row(found)) for name, found in groups.items()]
    return list(table((attribute, *NAMES), [*rows, ("all", *_row(cells))]))


def _row(cells: Sequence[Cell]) -> tuple[str, ...]:
    data, files = sum(cell.data for cell in cells), sum(cell.file_data for cell in cells)
    return (
        f"{len(cells)}",
        share(sum(cell.present for cell in cells), data),
        share(sum(_best(cell.right, QEMU) for cell in cells), data),
        share(sum(cell.right.get("plain", 0) for cell in cells), data),
        share(sum(cell.right.get("jqcow", 0) for cell in cells), data),
        share(sum(cell.certain for cell in cells), data),
        share(sum(cell.file_right.get("jqcow", 0) for cell in cells), files),
        share(sum(_best(cell.file_right, QEMU) for cell in cells), files),
        f"{max((cell.seconds for cell in cells), default=0):.1f}",
    )


def _best(found: dict[str, int], names: Iterable[str]) -> int:
    """Return what the best of several ways had back, chosen anew in each cell by who knows the truth."""
    return max((found.get(name, 0) for name in names), default=0)


def totals(cells: Sequence[Cell]) -> dict[str, float | str]:
    """Return the sums over all cells."""
    data, tables = sum(cell.data for cell in cells), sum(cell.tables for cell in cells)
    # Where no error stops QEMU, there is nothing for its salvage to go on from.
    right = {
        name: sum(cell.right.get(name, cell.right.get(name.removesuffix(", --salvage"), 0)) for cell in cells)
        for name in (*QEMU, "plain", "jqcow")
    }
    return {
        "cells": len(cells),
        "present": share(sum(cell.present for cell in cells), data),
        "qemu-img convert": share(right["qemu"], data),
        "convert --salvage": share(right["qemu, --salvage"], data),
        "check -r all": share(right["qemu, repaired"], data),
        "check -r all, convert --salvage": share(right["qemu, repaired, --salvage"], data),
        "jqcow": share(right["jqcow"], data),
        "right and certain where tables are whole": share(sum(cell.tables_right for cell in cells), tables),
        "certain and wrong, in bytes": sum(cell.wrong_certain for cell in cells),
    }
