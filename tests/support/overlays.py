"""What users do with overlays over disks that no crash changes, and with wrong refcounts: more stories."""

from __future__ import annotations

from jqcow.offline.commit import copy_into
from jqcow.offline.rebase import copy_differences
from jqcow.testing import SectorModel
from tests.support import inside
from tests.support.below import Below, find_below_by_name, name_of
from tests.support.player import Player
from tests.support.starts import new_overlay, some_disk, some_size

REPAIRED = "open change:5:2 close open change close"
"""Opening repairs; then the image is used like any other."""

REPAIR_KILLED = "open kill open change:3:2 kill open change close"
"""The process that repaired is killed, before and after a flush."""


def rebase(user: Player) -> None:
    """The overlay goes over other disks, longer and shorter ones: what it reads stays."""
    user.play("open")
    for _ in range(2):
        user.play("change:3:2")
        put_over(user, some_disk(user.windows, user.random))
    user.play("change:3:2 close")


def put_over(user: Player, below: Below) -> None:
    """Rebase, and open again: a running image goes on with the disk that it has."""
    session, name = user.session, name_of(below)
    renamed = inside.header_of(session.live).with_backing_file(name.encode(), b"raw")
    session.expectation.renamed += (renamed.data[renamed.header.header_length :],)
    with session.transaction() as draft:
        copy_differences(session.live, draft.transaction, find_below_by_name(name))
        draft.transaction.set_backing_file(name, "raw")
        draft.look()
    user.play("close open")


def disk_of(user: Player) -> Below:
    """Return the disk as it is now, to put something over it."""
    session = user.session
    return Below(user.windows, session.expectation.sectors.current_content(), session.live.size)


def emptied(user: Player) -> None:
    """What a commit does once the base has all of it: the overlay gives up what is its own."""
    user.play("open")
    for _ in range(2):
        user.play("change:4:2 flush")
        put_over(user, disk_of(user))
        with user.session.transaction() as draft:
            draft.transaction.make_empty()
            draft.look()
    user.play("change:3:2 close")


def committed_into(user: Player) -> None:
    """Overlays of other sizes are committed into the image: all of an overlay at once, or nothing of it.

    Whichever of both a crash leaves, an overlay that still has its own reads as before over it.
    """
    user.play("open")
    windows = user.windows
    for number in range(2):
        user.play("change:3:2")
        before, random = disk_of(user), user.random
        size_bytes = random.choice((some_size(windows, random), windows.stride_bytes, windows.disk_bytes))
        overlay = Player(new_overlay(before, size_bytes), random)
        overlay.session.written = 1 + number << 24
        overlay.play("change:4:4")
        shown = overlay.session.expectation.sectors.current_content()
        with user.session.transaction() as draft:
            # A commit opens the overlay alone: what it copies is its own.
            inside.show_through(overlay.session.live, None)
            copy_into(overlay.session.live, draft.transaction)
            draft.state.size_bytes = max(draft.state.size_bytes, size_bytes)
            draft.state.sectors = SectorModel(windows.model_bytes, before.seen)
            for start in range(0, windows.model_bytes, windows.window_bytes):
                length = windows.clip(start, windows.window_bytes, size_bytes)
                draft.state.sectors.write(start, shown[start : start + length]).complete()
            draft.look()
        inside.show_through(overlay.session.live, disk_of(user))
        overlay.play("look close")
    user.play("change:3:2 close")


def copied_up(user: Player) -> None:
    """Copy on read: what is read from below is written to the overlay, between changes and flushes."""
    user.play("open")
    windows, session = user.windows, user.session
    inside.copy_on_read(session.live)
    for number in range(8):
        position = user.values.read("4w%s")
        length = windows.clip(position, user.random.choice((1, 3)) * user.cluster_bytes, session.live.size)
        if length:
            session.expectation.closed = None
            session.live.pread(length, windows.guest(position))
        user.play(("", "change", "flush")[number % 3])
    user.play("close")


def repair_fails(user: Player) -> None:
    """The host fails while the refcounts are made right; the next opening succeeds."""
    for number in user.random.sample(range(1, 12), 3):
        call = user.values.choose("pwrite|pwrite|barrier|allocate")
        at = number if call == "pwrite" else number % 4 + 1
        user.play(f"fail:call={call}:at={at}:applied=0|512|all{{ open }} change kill")
    user.play("open change:3:3 close")
