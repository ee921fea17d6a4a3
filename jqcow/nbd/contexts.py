"""Metadata contexts: what a client can ask about the blocks of an export, and the answers.

``base:allocation`` is of the NBD protocol, ``qemu:allocation-depth`` and ``qemu:dirty-bitmap:NAME`` are as
QEMU has them (docs/interop/nbd.rst in its source).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from jqcow.image import Image
from jqcow.nbd.protocol import ALLOCATION, BITMAP_PREFIX, DEPTH, STATE_DIRTY, STATE_HOLE, STATE_ZERO

EXTENTS_MAX = 8192
"""Of one answer: it may tell less than was asked for, and the client asks on."""
STEPS_MAX = 65536
"""Extents that are looked at for one answer: many of one status may be joined."""

Status = Iterator[tuple[int, int]]
"""(length in bytes, flags) of ranges that follow each other."""


@dataclass(frozen=True)
class Context:
    """A metadata context: its name, its number on the connection, and what tells of (offset, length)."""

    name: str
    number: int
    find: Callable[[int, int], Status]


def names_of(image: Image) -> tuple[str, ...]:
    """Return the names of all contexts that an image has now."""
    usable = (bitmap for bitmap in image.bitmaps if bitmap.is_consistent)
    return (ALLOCATION, DEPTH, *(f"{BITMAP_PREFIX}{bitmap.name}" for bitmap in usable))


def matching(image: Image, query: str, *, listing: bool) -> tuple[str, ...]:
    """Return the contexts that a query asks for; when ``listing`` it may name a whole namespace."""
    known = names_of(image)
    if query in known:
        return (query,)
    if not listing:
        return ()
    wanted = {"base:": (ALLOCATION,), "qemu:": known[1:], BITMAP_PREFIX: known[2:]}
    return wanted.get(query, ())


def context_of(image: Image, name: str, number: int) -> Context:
    """Return the context of a name that `names_of` gave."""
    if name == ALLOCATION:
        return Context(name, number, lambda offset, length: _allocation(image, offset, length))
    if name == DEPTH:
        return Context(name, number, lambda offset, length: _depth(image, offset, length))
    bitmap = name.removeprefix(BITMAP_PREFIX)
    return Context(name, number, lambda offset, length: _dirty(image, bitmap, offset, length))


def _allocation(image: Image, offset: int, length: int) -> Status:
    for extent in image.extents(length, offset):
        yield extent.length, 0 if extent.holds_data else STATE_HOLE | STATE_ZERO


def _depth(image: Image, offset: int, length: int) -> Status:
    for extent in image.extents(length, offset):
        yield extent.length, 0 if extent.kind == "unallocated" else extent.depth + 1


def _dirty(image: Image, bitmap: str, offset: int, length: int) -> Status:
    position = offset
    for extent in image.bitmaps.dirty_extents(bitmap, length, offset):
        if extent.offset > position:
            yield extent.offset - position, 0
        yield extent.length, STATE_DIRTY
        position = extent.end
    if position < offset + length:
        yield offset + length - position, 0


def found_status(context: Context, offset: int, length: int, *, one: bool) -> list[tuple[int, int]]:
    """Return the status of a range, from its start on, neighbours of one status joined.

    Args:
        context: of which the status is.
        offset, length: of the range in bytes, not empty.
        one: its first part alone.
    """
    found: list[tuple[int, int]] = []
    most = 1 if one else EXTENTS_MAX
    for part, flags in islice(context.find(offset, length), STEPS_MAX):
        if found and found[-1][1] == flags:
            found[-1] = found[-1][0] + part, flags
        elif len(found) == most:
            break
        else:
            found.append((part, flags))
    return found
