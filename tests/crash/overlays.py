"""Steps on overlays over disks that no crash changes, and stories of them and of wrong refcounts."""

from __future__ import annotations

from jqcow.offline.commit import copy_into
from jqcow.offline.rebase import copy_differences
from jqcow.testing import SectorModel
from tests.crash.stories import turns
from tests.support import inside
from tests.support.below import Below, find_below_by_name, name_of
from tests.support.expectation import extensions_of
from tests.support.operations import OPERATIONS, Operation
from tests.support.player import Player
from tests.support.starts import new_overlay, some_disk, some_size


def put_over(player: Player, below: Below) -> None:
    """Rebase, and open again: a running image goes on with the disk that it has."""
    session, name = player.session, name_of(below)
    renamed = inside.header_of(session.live).with_backing_file(name.encode(), b"raw")
    session.expectation.renamed += (extensions_of(renamed),)
    with session.transaction() as draft:
        copy_differences(session.live, draft.transaction, find_below_by_name(name))
        draft.transaction.set_backing_file(name, "raw")
        draft.look()
    player.play("close open")


def disk_of(player: Player) -> Below:
    """Return the disk as it is now, to put something over it."""
    state = player.session.state
    return Below(state.windows, state.sectors.current_content(), state.size_bytes)


def make_empty(player: Player) -> None:
    """What a commit does once the base has all of the overlay: this gives up what is its own."""
    put_over(player, disk_of(player))
    with player.session.transaction() as draft:
        draft.transaction.make_empty()
        draft.look()


def take_in(player: Player, number: int) -> None:
    """Commit an overlay of some size into the image: all of it at once, or nothing of it.

    Whichever of both a crash leaves, an overlay that still has its own reads as before over it.
    """
    windows, before, random = player.windows, disk_of(player), player.random
    size_bytes = random.choice((some_size(windows, random), windows.stride_bytes, windows.disk_bytes))
    overlay = Player(new_overlay(before, size_bytes), random)
    overlay.session.written = number << 24
    overlay.play("change:4:4")
    shown = overlay.session.expectation.sectors.current_content()
    with player.session.transaction() as draft:
        # A commit opens the overlay alone: what it copies is its own.
        inside.show_through(overlay.session.live, None)
        copy_into(overlay.session.live, draft.transaction)
        draft.state.size_bytes = max(draft.state.size_bytes, size_bytes)
        draft.state.sectors = SectorModel(windows.model_bytes, before.seen)
        for start in range(0, windows.model_bytes, windows.window_bytes):
            length = windows.clip(start, windows.window_bytes, size_bytes)
            draft.state.sectors.write(start, shown[start : start + length]).complete()
        draft.look()
    inside.show_through(overlay.session.live, disk_of(player))
    overlay.play("look close")


def copy_up(player: Player, position: int, length: int) -> None:
    """Read such that what lies below is copied into the overlay."""
    session, windows = player.session, player.windows
    inside.copy_on_read(session.live)
    length = windows.clip(position, length, session.live.size)
    if length:
        session.expectation.closed = None
        session.live.pread(length, windows.guest(position))


OPERATIONS |= {
    "rebase": Operation(lambda player: put_over(player, some_disk(player.windows, player.random)), None),
    "empty": Operation(make_empty, None),
    "take-in": Operation(take_in, None),
    "copy-up": Operation(copy_up, None),
}

REBASE = f"{turns(2, 'change:3:2 rebase')} change:3:2"
"""The overlay goes over other disks, longer and shorter ones: what it reads stays."""

EMPTIED = f"{turns(2, 'change:4:2 flush empty')} change:3:2"
"""Overlays give up what is their own once their base has it."""

COMMITTED_INTO = f"{turns(2, 'change:3:2 take-in:{n}', '1', '2')} change:3:2"
"""Overlays of other sizes are committed into the image."""

COPIED_UP = turns(8, "copy-up:4w%s:c|3c {n}", "", "change", "flush")
"""Copy on read: what is read from below is written to the overlay, between changes and flushes."""

WITHOUT_ZERO_FLAGS = "open " + turns(
    3,
    "write:2w%c+s:s zeroes:2w%s:2c flush unmap:2w%c:2c {n} write:2w%s:c",
    "flush",
    "snapshot",
    "grow:3 flush",
)
"""Zeros over a backing file that has data, where no entry can tell them (version 2)."""

SHARED = "open change:6:2 " + turns(3, "write:2w%c+s:s {n}:2w%c:c|2c flush", "discard", "unmap", "zeroes")
"""What guest clusters share without a snapshot is written, zeroed and discarded, one owner after another."""

REPAIRED = "open change:5:2 close open change close"
"""Opening repairs; then the image is used like any other."""

REPAIR_KILLED = "open kill open change:3:2 kill open change close"
"""The process that repaired is killed, before and after a flush."""


def repair_fails(user: Player) -> None:
    """The host fails while the refcounts are made right; the next opening succeeds."""
    for number in user.random.sample(range(1, 12), 3):
        call = user.values.choose("pwrite|pwrite|barrier|allocate")
        at = number if call == "pwrite" else number % 4 + 1
        user.play(f"fail:call={call}:at={at}:applied=0|512|all{{ open }} change kill")
    user.play("open change:3:3 close")
