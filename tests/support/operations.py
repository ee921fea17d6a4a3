"""The vocabulary: everything that is done to a disk in tests, each thing written once.

A *request* is one call on an image or a transaction, with bytes and offsets: how to do it there (`on`), what
the disk then holds (`result`), and how QEMU does it (`qemu`).

A *step* is something that a user does, as text: ``write:4096:512``. `OPERATIONS` says how each kind of step
is done by a `Player` (`tests.support.player`), outside of a transaction and inside of one. Where a step makes
no sense it does nothing, so steps can be left out of any list of them. ``AT`` and ``LEN`` are bytes of the
model, see `Windows`:

    write:AT:LEN  fua:AT:LEN  zeroes:AT:LEN  unmap:AT:LEN  discard:AT:LEN
    packed:AT:LEN[:NOISE]       a compressed write of the clusters that the range touches
    resize:WINDOW:INSIDE        to the start of that window, and so many bytes more
    preallocate:WINDOW:INSIDE:HOW   to there, if that is larger; HOW 0, 1, 2: metadata, falloc, full
    grow:TABLES                 by what so many L2 tables reach
    outgrow[:TIMES]             growths whose record exceeds a half of the smallest journal
    snapshot[:MOST]             unless there are so many, 4 if not given
    apply:NUMBER  delete:NUMBER of the snapshots that there are, modulo their count
    bitmap[:MOST]               a new one that takes note of changes, unless there are so many, 3 if not given
    remove:NUMBER  clear:NUMBER  enable:NUMBER  disable:NUMBER  rename:NUMBER  merge:NUMBER
                                of the bitmaps that there are, modulo their count; merge: the next one into it
    flush  checkpoint  look  open  close  kill
    begin  commit  rollback  abort  savepoint  return:NUMBER

Of overlays (`tests.crash.overlays`):

    rebase                      goes over another disk, and reads as before
    empty                       its base gets all of it, and the overlay gives that up
    take-in:NUMBER              an overlay is committed into the image
    copy-up:AT:LEN              a read that copies what lies below

In stories (`tests.support.telling`) a step can be left to chance (`DRAWN`), and a player knows more blocks:

    fail:call=pwrite|barrier:at=1..5:applied=0|512|all:error=ENOSPC{ STEP... }
                                a call of the host fails meanwhile, EIO and nothing applied if not given;
                                an error ends the steps, and their transaction; ``full=3``: the disk is full
    fail:some{ STEP... }        some fault or a full disk
    try{ STEP... }              an error ends the steps alone
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import jqcow
from jqcow.image.transaction import Transaction
from jqcow.ondisk.form import PREALLOCATIONS
from jqcow.testing import SECTOR_BYTES, SectorModel

if TYPE_CHECKING:
    from tests.support.player import Player

Disk = jqcow.Image | Transaction
BITMAPS_MAX = 3
SNAPSHOTS_MAX = 4
"""So many at once: each one is read in every state."""


# Requests


class Request(Protocol):
    """One call that changes what a disk holds."""

    def on(self, disk: Disk) -> None:
        """Do it."""

    def result(self, cluster_bytes: int, size_bytes: int) -> tuple[int, bytes]:
        """Return (offset, bytes): what a disk of that size holds afterwards where it differs."""

    def qemu(self) -> str:
        """Return the command of qemu-io."""


@dataclass(frozen=True)
class Write:
    """A write at any offset; ``fua``: durable on return."""

    offset: int
    data: bytes
    fua: bool = False

    @classmethod
    def pattern(cls, offset: int, length: int, byte: int) -> Write:
        """Return a write of one byte again and again: the only kind that QEMU's command can do."""
        return cls(offset, bytes([byte]) * length)

    def on(self, disk: Disk) -> None:
        if self.fua and isinstance(disk, jqcow.Image):
            disk.pwrite(self.data, self.offset, fua=True)
        else:
            disk.pwrite(self.data, self.offset)

    def result(self, cluster_bytes: int, size_bytes: int) -> tuple[int, bytes]:
        return self.offset, self.data

    def qemu(self) -> str:
        (byte,) = set(self.data)
        return f"write -P {byte} {self.offset} {len(self.data)}"


class PackedWrite(Write):
    """A compressed write of whole clusters."""

    def on(self, disk: Disk) -> None:
        disk.pwrite_compressed(self.data, self.offset)

    def qemu(self) -> str:
        return super().qemu().replace("write", "write -c")


@dataclass(frozen=True)
class WriteZeroes:
    """A range that reads as zeros afterwards; ``unmap``: its clusters may be freed."""

    offset: int
    length: int
    unmap: bool = False

    def on(self, disk: Disk) -> None:
        disk.write_zeroes(self.length, self.offset, unmap=self.unmap)

    def result(self, cluster_bytes: int, size_bytes: int) -> tuple[int, bytes]:
        return self.offset, bytes(self.length)

    def qemu(self) -> str:
        return f"write -z{' -u' if self.unmap else ''} {self.offset} {self.length}"


@dataclass(frozen=True)
class Discard:
    """A discard: the clusters that the range covers whole read as zeros, the rest is as it was."""

    offset: int
    length: int

    def on(self, disk: Disk) -> None:
        disk.discard(self.length, self.offset)

    def result(self, cluster_bytes: int, size_bytes: int) -> tuple[int, bytes]:
        head, end = -(-self.offset // cluster_bytes) * cluster_bytes, self.offset + self.length
        tail = end if end == size_bytes else end - end % cluster_bytes
        return min(head, tail), bytes(max(0, tail - head))

    def qemu(self) -> str:
        return f"discard {self.offset} {self.length}"


def apply(request: Request, disk: Disk, model: SectorModel, cluster_bytes: int = 1) -> None:
    """Do a request on a disk, and tell its model."""
    offset, data = request.result(cluster_bytes, disk.size)
    with model.write(offset, data):
        request.on(disk)


# Steps


class Step(NamedTuple):
    """Something that a user does."""

    kind: str
    arguments: tuple[int | str, ...] = ()

    def __str__(self) -> str:
        return ":".join(map(str, (self.kind, *self.arguments)))

    @classmethod
    def parse(cls, text: str) -> Step:
        """Read a step back."""
        kind, *arguments = text.split(":")
        return cls(kind, tuple(int(word) if word.isdecimal() else word for word in arguments))


# How steps are done

Act = Callable[..., None]


@dataclass(frozen=True)
class Operation:
    """How a player does a step, with its arguments; None: it does nothing there."""

    outside: Act | None
    inside: Act | None


def _both(act: Act) -> Operation:
    return Operation(act, act)


def _grow(player: Player, tables: int) -> None:
    player.user.resize(player.user.state.size_bytes + tables * player.windows.stride_bytes)


OUTGROWING = {512: 70, 1024: 34}
"""Growths of the L1 table of which one record exceeds a half of the smallest journal, by cluster size."""


def _outgrow(player: Player, times: int = 12) -> None:
    # Each growth of the L1 table copies one block more into the record.
    for _ in range(OUTGROWING.get(player.cluster_bytes, times)):
        _grow(player, 1)


def _resize(player: Player, window: int, inside: int) -> None:
    windows = player.windows
    within = inside % windows.window_bytes // SECTOR_BYTES * SECTOR_BYTES
    player.user.resize(window * windows.stride_bytes + within)


def _bitmap(player: Player, most: int = BITMAPS_MAX) -> None:
    if len(player.user.bitmaps) < most:
        player.user.add_bitmap(1 << player.random.choice((9, 12, 16)))


def _preallocate(player: Player, window: int, inside: int, how: int) -> None:
    size_bytes = window * player.windows.stride_bytes + inside // SECTOR_BYTES * SECTOR_BYTES
    player.user.preallocate(size_bytes, PREALLOCATIONS[1 + how % 3])


def _snapshot(player: Player, most: int = SNAPSHOTS_MAX) -> None:
    if len(player.user.snapshots) < most:
        player.user.create_snapshot()


def _rollback(player: Player) -> None:
    player.drafted.rollback()
    player.commit()


def _kill_inside(player: Player) -> None:
    player.session.kill()
    player.commit()


class Abort(BaseException):
    """What ends a transaction that is aborted."""


OPERATIONS: dict[str, Operation] = {
    "write": _both(lambda player, *place: player.user.write(*place)),
    "fua": Operation(
        lambda player, *place: player.session.write(*place, fua=True),
        lambda player, *place: player.user.write(*place),
    ),
    "zeroes": _both(lambda player, *place: player.user.write_zeroes(*place, unmap=False)),
    "unmap": _both(lambda player, *place: player.user.write_zeroes(*place, unmap=True)),
    "discard": _both(lambda player, *place: player.user.discard(*place)),
    "packed": _both(lambda player, *place: player.user.write_compressed(*place)),
    "resize": _both(_resize),
    "preallocate": _both(_preallocate),
    "grow": _both(_grow),
    "outgrow": _both(_outgrow),
    "bitmap": _both(_bitmap),
    "remove": _both(lambda player, number: player.user.remove_bitmap(number)),
    "clear": _both(lambda player, number: player.user.clear_bitmap(number)),
    "enable": _both(lambda player, number: player.user.enable_bitmap(number, enabled=True)),
    "disable": _both(lambda player, number: player.user.enable_bitmap(number, enabled=False)),
    "rename": _both(lambda player, number: player.user.rename_bitmap(number)),
    "merge": _both(lambda player, number: player.user.merge_bitmap(number)),
    "snapshot": _both(_snapshot),
    "apply": _both(lambda player, number: player.user.apply_snapshot(number)),
    "delete": _both(lambda player, number: player.user.delete_snapshot(number)),
    "flush": _both(lambda player: player.session.flush()),
    "checkpoint": Operation(lambda player: player.session.checkpoint(), None),
    "look": _both(lambda player: player.look()),
    "open": Operation(lambda player: None, None),
    "close": Operation(lambda player: player.session.close(), None),
    "kill": Operation(lambda player: player.session.kill(), _kill_inside),
    "begin": Operation(lambda player: player.begin(), None),
    "commit": Operation(None, lambda player: player.commit()),
    "rollback": Operation(None, _rollback),
    "abort": Operation(None, lambda player: player.leave(Abort())),
    "savepoint": Operation(None, lambda player: player.savepoints.append(player.drafted.savepoint())),
    "return": Operation(None, lambda player, number: player.return_to(number)),
}
LEAVING = ("close", "kill")
"""Steps that do nothing where no image is open; for all others it is opened, or created."""


# How steps are drawn


def draw_change(player: Player) -> Step:
    """Return some change of the disk; in a transaction perhaps a resize."""
    random, windows, cluster_bytes = player.random, player.windows, player.cluster_bytes
    inside = player.draft is not None
    position = random.randrange(windows.model_bytes // SECTOR_BYTES) * SECTOR_BYTES
    most = (3 if inside else 2) * cluster_bytes // SECTOR_BYTES
    length = random.choice((1, 2, 3, 8, most)) * SECTOR_BYTES
    cluster = position - position % cluster_bytes
    choice = random.random()
    some, whole, odd, zeroes, discard = (0.55, 0.55, 0.65, 0.8, 0.9) if inside else (0.5, 0.6, 0.7, 0.85, 1)
    if choice < some:
        return Step("write", (position, length))
    if choice < whole:
        return Step("write", (cluster, cluster_bytes))
    if choice < odd:
        return Step("write", (position + random.randrange(SECTOR_BYTES), random.randrange(1, length + 1)))
    if choice < zeroes:
        length = cluster_bytes * random.randint(1, 3)
        return Step("unmap" if random.random() < 0.5 else "zeroes", (cluster, length))
    if choice < discard:
        return Step("discard", (cluster, cluster_bytes * random.randint(1, 4)))
    return draw_resize(player)


def draw_resize(player: Player) -> Step:
    """Return a resize that cuts a window, ends between windows, or shows them all."""
    random, windows = player.random, player.windows
    inside = random.randrange(windows.window_bytes // SECTOR_BYTES) * SECTOR_BYTES
    start = random.randint(1, windows.count - 1)
    return Step(
        "resize", random.choice(((start, inside), (start, 0), (windows.count, 0), (2 * windows.count, 0)))
    )


def draw_packed(player: Player) -> Step:
    """Return a compressed write of a few whole clusters, in most cases in the first window."""
    random, windows, cluster_bytes = player.random, player.windows, player.cluster_bytes
    clusters = random.choice((windows.window_bytes, windows.model_bytes)) // cluster_bytes
    return Step("packed", (random.randrange(clusters) * cluster_bytes, random.randint(1, 3) * cluster_bytes))


def draw_mixed(player: Player) -> Step:
    """Return a change, perhaps a compressed write."""
    return draw_packed(player) if player.random.random() < 0.35 else draw_change(player)


def draw_snapshot(player: Player) -> Step:
    """Return a step that makes, applies or deletes a snapshot."""
    there, choice = len(player.user.snapshots), player.random.random()
    if not there or (choice < 0.45 and there < SNAPSHOTS_MAX):
        return Step("snapshot")
    return Step("apply" if choice < 0.7 else "delete", (player.random.randrange(there),))


def draw_bitmap(player: Player) -> Step:
    """Return a step that changes which bitmaps there are, or what they say."""
    kinds = ("bitmap", "clear", "clear", "remove", "enable", "disable", "rename", "merge")
    kind = player.random.choice(kinds)
    return Step(kind, () if kind == "bitmap" else (player.random.randrange(BITMAPS_MAX),))


DRAWN: dict[str, Callable[[Player], Step]] = {
    "change": draw_change,
    "mix": draw_mixed,
    "pack": draw_packed,
    "snap": draw_snapshot,
    "note": draw_bitmap,
}
"""Steps that are drawn when they are done. ``change:5:2``: five of them, with a flush after every two."""
