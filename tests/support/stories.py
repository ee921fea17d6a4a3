"""What users do in the crash campaign: stories, each of which meets certain barriers and faults.

A story is a text of steps for a `Player`, or a function that plays several. Chance fills in what they leave
open; numbers are read as `Values` says.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random

from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice
from tests.support.player import Player

Story = str | Callable[[Player], None]


def tell(story: Story, player: Player) -> None:
    """Let a player do all that a story tells."""
    if isinstance(story, str):
        player.play(story)
    else:
        story(player)


def fault(call: str, at: int, applied_bytes: int = 0, error: int = errno.EIO) -> FaultPlan:
    """Return a plan by which one call of a kind fails."""
    return FaultPlan(Fault(error, at=at, call=call, applied_bytes=applied_bytes))


FRESH = "open change:7:3 close"
"""Create, use, close."""

REOPENED = "open change:5:3 close open flush change:4:2 checkpoint change close"
"""Two sessions on an image that exists; the second starts with a flush of nothing."""

IN_PLACE = f"open {'write:w%s:3s flush write:w%s:s ' * 4} close open write:0:s write:3w:2s close"
"""Overwrite what is allocated: the image stays clean; then one change of its mapping."""

EPOCHS = f"open {'change flush ' * 22} close"
"""So many flushes that the journal's halves are filled in turn."""

MOVE = "open change:2:2 outgrow:10 flush change:4:2 close"
"""Stage more than a half of the journal holds: it moves to a larger range."""

KILLED = "open change:5:3 kill open change:3:2 change kill open close"
"""The writer is killed; the next one recovers and goes on; killed once more, before any flush."""

MIXED = (
    "open write:0:3s flush write:2w:c+s discard:0:2c flush zeroes:w:2c write:w+s:s checkpoint fua:3w:s"
    " grow:10 flush write:c:c close"
)
"""All that has a call to fail: going live, growth, zeroes, reuse, an epoch's end, a move, close."""


def reuse(user: Player) -> None:
    """Free clusters, keep clusters under zeros, and use them again at once, and after flushes."""
    user.play("open")
    for turn in range(4):
        victim = user.value("2w%c")
        if turn % 2:
            user.play(f"zeroes:{victim}:c {'flush' if turn == 3 else ''} write:{victim}+c%s:s")
        else:
            user.play(f"discard:{victim}:2c")
        user.play(f"write:2w+2w%c:s {'' if turn == 1 else 'flush'} write:2w+2w%c:c")
    user.play("flush write:2w%c:2s close")


def grow(user: Player) -> None:
    """Make the disk larger, and use what was added."""
    user.play("open change:2 resize:4:0 write:3w:2s flush")
    user.play(f"resize:{4 * user.random.choice((2, 70))}:0 change:3:3 close")


def reuse_tables(user: Player) -> None:
    """Outgrow an L1 table that the journal holds, and use its clusters for data, epoch after epoch."""
    user.play("open")
    for turn in range(6):
        user.play(f"write:{turn % 2}w+{turn // 2}s:s change flush grow:{user.cluster_bytes // 8} flush flush")
        for _ in range(4):
            place = user.value("4w%c")
            user.play(f"unmap:{place}:c write:{place}:c flush")
    user.play("close")


def move_fails(user: Player) -> None:
    """Writes fail while the journal moves, that of sector 0 among them; later the move succeeds."""
    user.play("open change:2:2 outgrow:10")
    for number in user.random.sample(range(1, 12), 4):
        with user.faults(fault("pwrite", number, user.random.choice((0, 512, EVERYTHING)))):
            user.play("change flush")
    user.play("change:2:2 close")


def move_killed(user: Player) -> None:
    """A write fails while the journal moves, and then the writer is killed; the next one recovers."""
    for number in user.random.sample(range(4, 9), 3):
        user.play("open change flush outgrow:10")
        with user.faults(fault("pwrite", number, user.random.choice((0, EVERYTHING)))):
            user.play("flush")
        user.play("kill")
    user.play("open close")


def host_fails(user: Player) -> None:
    """Calls of the host fail, one at a time, whatever they are; work goes on each time."""
    user.play("open")
    chance = user.random
    for _ in range(6):
        error = chance.choice((errno.EIO, errno.ENOSPC))
        applied = chance.choice((0, 512, 4096, EVERYTHING))
        call = chance.choice(("pwrite", "pwrite", "allocate", "punch", "truncate"))
        with user.faults(fault(call, chance.randint(1, 4), applied, error)):
            user.play("change:4:2 checkpoint")
        user.play("change flush")
    user.play("close")


def going_live_fails(user: Player) -> None:
    """The first writes of a session fail, that of sector 0 among them; the next ones succeed."""
    for number in range(2, 6):
        user.play("open")
        applied = user.random.choice((0, EVERYTHING))
        with user.faults(fault("pwrite", number, applied)):
            user.play("change:2:1")
        if number % 2 == 0:
            user.play("change:2:2")
            with user.faults(fault("pwrite", number - 1, applied)):
                user.play("close")
        user.play("close")


def root_write_fails(user: Player) -> None:
    """The write of sector 0 fails when the image goes live; before any barrier a change tries again."""
    for turn in range(3):
        user.play("open")
        # Zeros of the range, opening frame, root copy, and then sector 0.
        with user.faults(fault("pwrite", 4, user.random.choice((0, EVERYTHING)))):
            user.play("discard:0:w/2")
        user.play(f"write:2w+{4 * turn}s:2s unmap:0:w/4 flush close open write:w/2:s write:0:w/2 close")


def barrier_fails(user: Player) -> None:
    """Barriers fail, and what was in flight is lost though readable; the next opening recovers."""
    user.play("open")
    for _ in range(3):
        with user.faults(fault("barrier", user.random.randint(1, 5))):
            user.play("change:4:1 checkpoint")
        user.play("change:2:2")
    user.play("close")


def disk_full(user: Player) -> None:
    """The host's disk is full for a while, and then is not."""
    user.play("open change:2:2")
    with user.faults(FaultPlan(full_from=user.random.randint(1, 12))):
        user.play("change:8:2")
    user.play("change:3:3 close")


# Transactions

TOO_LARGE = "open change:2:2 begin change:2 outgrow change:2 commit change:4:2 begin change:3 commit close"
"""A transaction that no half of the journal holds: the journal moves to a larger range first."""


def transactions(user: Player) -> None:
    """Transactions one after another, with writes and flushes of others in between."""
    user.play("open")
    for turn in range(4):
        user.play(f"begin change:1..4 {'look' if turn == 1 else ''} commit change")
        if turn % 2:
            user.play("flush change")
    user.play("close")


def first_clusters(user: Player) -> None:
    """Transactions that only bring new clusters: where nothing was, a crash could show half of them."""
    user.play("open")
    for turn in range(user.windows.window_bytes // user.cluster_bytes - 1):
        user.play("begin")
        for index in range(user.windows.count):
            user.play(f"write:{index}w+{turn}c:1..{user.cluster_bytes}")
        user.play("commit")
    user.play("close")


def savepoints(user: Player) -> None:
    """Going back to savepoints, inner and outer ones, and on from there."""
    user.play("open")
    for turn in range(3):
        user.play("change begin change:2 savepoint change:2 savepoint change return:1 look change")
        user.play(f"{'return:0 change:2 return:0' if turn else ''} change commit")
    user.play("close")


def rollbacks(user: Player) -> None:
    """Transactions that are undone, by asking or by an exception; others use their clusters at once."""
    user.play("open")
    for turn in range(5):
        user.play(f"begin change:3 {'commit' if turn % 3 else 'rollback'}")
        if turn % 3 == 1:
            user.play("begin change:3 abort")
        user.play("change:3:2")
    user.play("close")


def too_large_fails(user: Player) -> None:
    """Writes and barriers fail while the journal moves for a transaction; the next one succeeds."""
    user.play("open")
    for number in user.random.sample(range(1, 14), 2):
        applied = user.random.choice((0, 512, EVERYTHING))
        call = user.random.choice(("pwrite", "pwrite", "pwrite", "barrier"))
        with user.faults(fault(call, number if call == "pwrite" else number % 5 + 1, applied)):
            user.play("begin outgrow change commit")
        user.play("change")
    user.play("begin change:2 commit close")


def resizes(user: Player) -> None:
    """The disk shrinks and grows, and is used where it was cut off."""
    user.play("open")
    for _ in range(4):
        user.play("change:2")
        start, inside = user.value("1..3"), user.value("w%s")
        user.play(f"resize:{start}:{inside} change resize:4:0")
        if user.random.random() < 0.5:
            user.play("flush")
        user.play(f"write:0..3w+{inside}:2s")
    user.play("close")


def commits_fail(user: Player) -> None:
    """Calls of the host fail within transactions and their commits; work goes on each time."""
    user.play("open")
    chance = user.random
    for _ in range(5):
        call = chance.choice(("pwrite", "pwrite", "barrier", "allocate", "punch"))
        applied = chance.choice((0, 512, 4096, EVERYTHING))
        with user.faults(fault(call, chance.randint(1, 5), applied)):
            user.play("change begin change:3 savepoint")
            with suppress(OSError):
                user.play("change:2")
            user.play(f"{'return:0' if chance.random() < 0.3 else ''} commit")
        user.play("change:2:2")
    user.play("close")


def transaction_killed(user: Player) -> None:
    """The writer is killed within a transaction, or after one; the next one recovers and goes on."""
    for turn in range(3):
        user.play(f"open change:2 begin change:3 {'' if turn == 1 else 'commit change'} kill")
    user.play("open close")


def reuse_after_transactions(user: Player) -> None:
    """Overwrite and free within transactions what others use at once; epochs end in between."""
    user.play("open")
    for turn in range(5):
        victim, zeroes = user.value("2w%c"), "unmap" if turn % 2 else "zeroes"
        user.play(f"begin write:{victim}:2c discard:2w%c:2c write:{victim}+s:s {zeroes}:{victim}:c commit")
        user.play(f"write:2w%c:c write:2w+2w%c:c {'checkpoint' if turn == 2 else ''} write:2w%c+s:s")
    user.play("close")


def commit_fails_first(user: Player) -> None:
    """A transaction's record is written, and then the host reports an error: what was revoked stays away."""
    user.play("open")
    for turn in range(4):
        user.play(f"write:{turn}s:s write:3w+{turn}c:s flush")
        # The data of the transaction, then its record.
        with user.faults(fault("pwrite", 2, EVERYTHING)):
            user.play(f"begin write:w+{turn}c:c commit")
        user.play(f"{'write:0..2w+s:c' if turn % 2 else ''} flush")
    user.play("close")


def move_fails_first(user: Player) -> None:
    """The journal cannot be moved for a transaction; others then use the place where it was to go."""
    user.play("open")
    for turn in range(2 * user.windows.count):
        user.play(f"write:{turn // 2}w:s flush")
        if user.random.random() < 0.5:
            user.play("checkpoint")
        # Two runs of homes, the zeros of the new range, its first frame; later it may be other writes.
        with user.faults(fault("pwrite", user.random.randint(2, 5) if turn else 4, EVERYTHING)):
            user.play("begin outgrow commit")
        user.play(f"write:{turn // 2}w+{turn % 2}w/2:w/2 flush")
    user.play("close")


def overlapping(user: Player) -> None:
    """Another thread changes the image while a barrier runs, which does not cover the change."""
    user.play("open")
    start = user.value("0..2w")
    # Going live readies some of the free clusters, and leaves others as they are.
    user.play(f"write:{start}+w-s:s flush write:{start}:s")
    # Its L2 table is there: it stages so little that nobody has to commit, and to wait for the barrier.
    while_barrier_runs(user.session.device, "flush.data", lambda: user.play(f"write:{start}+w-s-c:s"))
    user.play("flush write:3w:w-c+s flush change:2 close")


def while_barrier_runs(device: SimulatedDevice, name: str, action: Callable[[], None]) -> None:
    """Let another thread do something once, within the next barrier of that name: behind what it covers.

    The barrier ends when that is done, so it must not wait for the thread that placed the barrier.
    """
    original = device.barrier

    def barrier(called: str) -> None:
        original(called)
        if called == name:
            vars(device).pop("barrier", None)
            with ThreadPoolExecutor(1) as other:
                other.submit(action).result()

    vars(device)["barrier"] = barrier


# Snapshots

EACH_ONCE = (
    "open packed:0:2c snapshot write:w+s:s write:s:s packed:c:c flush"
    " begin snapshot write:w:c apply:0 packed:2c:2c commit"
    " apply:-1 zeroes:0:2c delete:0 delete:0 delete:0 delete:0 write:w:c close"
)
"""All that has a call to fail: each operation on snapshots, copies of data and tables, packing."""

NARROW_REFCOUNTS = (
    "open snapshot:9 mix:2:2"
    f" {'snapshot:9 mix:2 apply:0..3 mix:2:2 delete:0..3 ' * 4} close"
)  # fmt: skip
"""What refcounts of one or two bits cannot count is refused; the rest works."""


def some_flushes(random: Random) -> str:
    """Return two changes, with or without a flush after them."""
    return f"mix:2:{random.choice((0, 2))}"


def between_writes(user: Player) -> None:
    """Snapshots made, applied and deleted between writes, with and without a flush before and after."""
    user.play("open")
    for turn in range(6):
        user.play(f"{some_flushes(user.random)} snap {('', '', 'checkpoint', '', 'close open', '')[turn]}")
    user.play("mix close")


def copy_on_write(user: Player) -> None:
    """Less than a cluster is written to what a snapshot shares: the rest of it is copied."""
    user.play("open")
    for turn in range(3):
        user.play(f"write:{turn}c:2c packed:{turn + 4}c:c snapshot:9")
        user.play(f"write:{turn}c+c%s:s write:{turn + 4}c+c%s:s flush")
        # Now the cluster is the disk's alone.
        zeroes = "unmap" if turn % 2 else "zeroes"
        user.play(f"write:{turn}c:s {zeroes}:{turn + 1}c:c discard:{turn + 4}c:c")
    user.play("close")


def several(user: Player) -> None:
    """Several snapshots at once, deleted in another order; what they held is used again at once."""
    user.play("open")
    for turn in range(3):
        user.play(f"write:{turn}c:3c snapshot:9 mix")
    user.play("delete:1 write:w:3c apply:0 write:2w:2c mix:2:2 write:c:s")
    while user.user.snapshots:
        user.play("delete:0..3 write:w%c:c flush")
    user.play("write:0:w close")


def in_transactions(user: Player) -> None:
    """Snapshots within transactions, with writes before and after them, savepoints and rollbacks."""
    user.play("open")
    for turn in range(4):
        user.play("mix begin mix snap mix:2 savepoint snap mix look")
        user.play(f"{'return:0 mix snap' if turn % 2 else ''} {'rollback' if turn == 3 else 'commit'}")
        user.play(some_flushes(user.random))
    user.play("close")


def other_sizes(user: Player) -> None:
    """Snapshots of disks of other sizes: cut off, grown past them, and applied again."""
    user.play("open")
    for _ in range(3):
        start, inside = user.value("1..3"), user.value("w%s")
        user.play(f"snapshot:9 resize:{start}:{inside} mix")
        user.play(f"resize:{4 * user.random.choice((1, 2, 20))}:0 mix snapshot:9 apply:0..3")
        user.play(some_flushes(user.random))
        if len(user.user.snapshots) > 2:
            user.play("delete:0..3")
    user.play("close")


SNAPSHOTS_KILLED = (
    "open mix:2 snap mix:2 kill open mix:2 begin snap mix:2 kill open mix:2 snap mix:2 kill open close"
)
"""The writer is killed after a snapshot, before any flush, and within a transaction with one."""


def some_fault(chance: Random) -> FaultPlan:
    """Return a plan by which a call of the host fails, or its disk is full."""
    if chance.random() < 0.15:
        return FaultPlan(full_from=chance.randint(1, 8))
    call = chance.choice(("pwrite", "pwrite", "pwrite", "barrier", "allocate", "punch"))
    applied = chance.choice((0, 512, 4096, EVERYTHING))
    return fault(call, chance.randint(1, 3 if call == "barrier" else 6), applied)


def fails(user: Player) -> None:
    """Calls of the host fail while snapshots are made, applied and deleted; work goes on each time."""
    user.play("open")
    for turn in range(5):
        with user.faults(some_fault(user.random)):
            user.play("mix snap mix:2:2")
        if turn % 2:
            with user.faults(some_fault(user.random)):
                user.play("begin mix")
                with suppress(OSError):
                    user.play("snap")
                user.play("mix commit")
        user.play("snap mix")
    user.play("close")


def large_tables(user: Player) -> None:
    """A snapshot changes more than a half of the journal holds: the journal moves to a larger range."""
    user.play("open snapshot:9")
    for index in range(user.windows.count):
        user.play(f"write:{index}w:s")
    user.play("begin outgrow snapshot:9 mix commit")
    with user.faults(some_fault(user.random)):
        user.play("apply:0")
    user.play("apply:0 mix delete:0 close")


# Compressed clusters


def compressed(user: Player) -> None:
    """Compressed writes over flushes, overwritten, zeroed and discarded; what is freed is used again."""
    user.play("open")
    for turn in range(6):
        user.play(f"packed:w%c:2c {'flush' if turn % 2 else ''} pack")
        victim, choice = user.value("w%c"), user.random.random()
        if choice < 0.4:
            user.play(f"write:{victim}+s:s")
        elif choice < 0.6:
            user.play(f"{'unmap' if user.random.random() < 0.5 else 'zeroes'}:{victim}:2c")
        elif choice < 0.8:
            user.play(f"discard:{victim}:2c")
        user.play(f"write:w+w%c:c {'checkpoint' if turn == 3 else ''}")
    user.play("close")


def compressed_new(user: Player) -> None:
    """Compressed writes to a new image, where nothing was: a descriptor must not land before its data."""
    user.play("open")
    for turn in range(4):
        user.play(f"packed:{turn}c:c packed:w+{2 * turn}c:2c flush pack")
    user.play("close")


def compressed_undone(user: Player) -> None:
    """Compressed writes that fail or are rolled back, and those that follow them, which pack anew."""
    user.play("open")
    for turn in range(5):
        user.play("pack")
        if turn % 2:
            end = "rollback" if turn == 3 else "commit"
            user.play(f"begin pack savepoint pack return:0 pack {end}")
        else:
            with user.faults(some_fault(user.random)):
                user.play("pack pack flush")
        user.play("pack mix:2:2")
    user.play("close")
