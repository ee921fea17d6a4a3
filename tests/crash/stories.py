"""What users do in the crash campaign: stories, each of which meets certain barriers and faults.

A story is a text of steps for a `Player`, or a function that plays several. Chance fills in what they leave
open: see `tests.support.operations`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jqcow.testing import SimulatedDevice
from tests.support.player import Player

Story = str | Callable[[Player], None]


def tell(story: Story, player: Player) -> None:
    """Let a player do all that a story tells. At its end the image is closed."""
    if isinstance(story, str):
        player.play(story)
    else:
        story(player)
    player.play("close")


def turns(count: int, steps: str, *others: str) -> str:
    """Return steps again and again; ``{t}`` is the turn, ``{n}`` what of ``others`` has its turn."""
    others = others or ("",)
    return " ".join(steps.format(t=turn, n=others[turn % len(others)]) for turn in range(count))


FRESH = "open change:7:3 close"
"""Create, use, close."""

REOPENED = "open change:5:3 close open flush change:4:2 checkpoint change close"
"""Two sessions on an image that exists; the second starts with a flush of nothing."""

IN_PLACE = f"open {turns(4, 'write:w%s:3s flush write:w%s:s')} close open write:0:s write:3w:2s close"
"""Overwrite what is allocated: the image stays clean; then one change of its mapping."""

EPOCHS = f"open {turns(22, 'change flush')} close"
"""So many flushes that the journal's halves are filled in turn."""

KILLED = "open change:5:3 kill open change:3:2 change kill open close"
"""The writer is killed; the next one recovers and goes on; killed once more, before any flush."""

KILLED_IN_PLACE = f"{turns(4, 'open write:w%s:3s write:0:s kill open look write:w:s')} flush close"
"""The writer of a clean image is killed before any flush; the next one relies on what it reads."""

MIXED = """open write:0:3s flush write:2w:c+s discard:0:2c flush zeroes:w:2c write:w+s:s checkpoint fua:3w:s
    grow:10 flush write:c:c close"""
"""All that has a call to fail: going live, growth, zeroes, reuse, an epoch's end, a move, close."""

REUSE = """open v=2w%c discard:v:2c write:2w+2w%c:s flush write:2w+2w%c:c
    v=2w%c zeroes:v:c write:v+c%s:s write:2w+2w%c:s write:2w+2w%c:c
    v=2w%c discard:v:2c write:2w+2w%c:s flush write:2w+2w%c:c
    v=2w%c zeroes:v:c flush write:v+c%s:s write:2w+2w%c:s flush write:2w+2w%c:c
    flush write:2w%c:2s close"""
"""Free clusters, keep clusters under zeros, and use them again at once, and after flushes."""

FILLED = turns(
    3,
    """open v=2w%c write:v:s flush write:v+s:2s flush zeroes:v:2s flush write:v:s write:v+4s:s flush
    write:v+s:s zeroes:v+4s:s write:v+4s:s flush write:v+2s:3s 0.5{{ close }}""",
)
"""Write into one cluster, piece by piece, and where zeros lie over old bytes."""

GROW = "open change:2 resize:4:0 write:3w:2s flush resize:8|280:0 change:3:3 close"
"""Make the disk larger, and use what was added."""

REUSE_TABLES = " ".join(
    f"write:{turn % 2}w+{turn // 2}s:s change flush grow:c/8 flush flush"
    f" {turns(4, 'v=4w%c unmap:v:c write:v:c flush')}"
    for turn in range(6)
)
"""Outgrow an L1 table that the journal holds, and use its clusters for data, epoch after epoch."""

MOVE = "open change:2:2 outgrow:10 flush change:4:2 close"
"""Stage more than a half of the journal holds: it moves to a larger range."""


def move_fails(user: Player) -> None:
    """Writes fail while the journal moves, that of sector 0 among them; later the move succeeds."""
    user.play("open change:2:2 outgrow:10")
    for number in user.random.sample(range(1, 12), 4):
        user.play(f"fail:at={number}:applied=0|512|all{{ change flush }}")
    user.play("change:2:2 close")


def move_killed(user: Player) -> None:
    """A write fails while the journal moves, and then the writer is killed; the next one recovers."""
    for number in user.random.sample(range(4, 9), 3):
        user.play(f"open change flush outgrow:10 fail:at={number}:applied=0|all{{ flush }} kill")
    user.play("open close")


HOST_FAILS = turns(
    6,
    "fail:error=EIO|ENOSPC:applied=0|512|4096|all:call=pwrite|pwrite|allocate|punch|truncate:at=1..4{{"
    " change:4:2 checkpoint }} change flush",
)
"""Calls of the host fail, one at a time, whatever they are; work goes on each time."""

GOING_LIVE_FAILS = """
    open a=0|all fail:at=2:applied=a{ change:2:1 } change:2:2 fail:at=1:applied=a{ close } close
    open a=0|all fail:at=3:applied=a{ change:2:1 } close
    open a=0|all fail:at=4:applied=a{ change:2:1 } change:2:2 fail:at=3:applied=a{ close } close
    open a=0|all fail:at=5:applied=a{ change:2:1 } close"""
"""The first writes of a session fail, that of sector 0 among them; the next ones succeed."""

# Of the writes that go live: zeros of the range, opening frame, root copy, and then sector 0.
ROOT_WRITE_FAILS = turns(
    3,
    "open fail:at=4:applied=0|all{{ discard:0:w/2 }} write:2w+{n}:2s unmap:0:w/4 flush close"
    " open write:w/2:s write:0:w/2 close",
    "0", "4s", "8s",
)  # fmt: skip
"""The write of sector 0 fails when the image goes live; before any barrier a change tries again."""

BARRIER_FAILS = f"open {turns(3, 'fail:call=barrier:at=1..5{{ change:4:1 checkpoint }} change:2:2')} close"
"""Barriers fail, and what was in flight is lost though readable; the next opening recovers."""

DISK_FULL = "open change:2:2 fail:full=1..12{ change:8:2 } change:3:3 close"
"""The host's disk is full for a while, and then is not."""

FULL_AT_OPENING = turns(
    4,
    "open one{{ change:2:1 | change:9:1 checkpoint change:1:1 | change:3:1 checkpoint }} kill"
    " fail:room=0|0|4096|20480{{ open one{{ close | change:2:1 flush | kill open }} }}",
)
"""The disk is full when a crashed image is opened: it is recovered into what is dead in its journal."""

_OWN_ENDS = "fail:room=9999999999"
"""No fault: what fails for want of room is the device's own doing."""

ON_A_TIGHT_DEVICE = turns(
    4,
    f"{_OWN_ENDS}{{{{ open change:6:2 }}}} {_OWN_ENDS}{{{{ checkpoint }}}}"
    f" {_OWN_ENDS}{{{{ discard:2w%c:2c flush change:2:2 }}}} {{n}}",
    "close",
    "kill",
)
"""Use a device up, again and again: what there is no room for fails, and all else goes on."""

KILLED_ON_A_TIGHT_DEVICE = turns(3, f"{_OWN_ENDS}{{{{ open change:5:3 flush change:3:2 }}}} kill") + " open"
"""The writer is killed where there may be no room for another journal."""

SHORT_JOURNALS = turns(
    3,
    "fail:room=4096|40960|81920|204800{{ open change:3:1 one{{ close | outgrow:10 flush }} }}"
    " change:2:2 close",
)
"""The host has no room for the whole journal: a session begins with a shorter one, or is refused."""


# Bitmaps

NOTED = turns(
    3,
    "change:2 note flush begin change note change note commit write:0:s write:w%s:s {n}",
    "close open",
    "",
    "kill",
)
"""Bitmaps are added, cleared, removed, renamed and merged, between writes and together with them."""

NOTED_IN_PLACE = (
    f"open {turns(6, 'write:2w%s:s write:2w%s:s {n}', 'flush', '', 'clear:0', 'close open')} close"
)
"""Overwrite what is allocated, here and there, with bitmaps that have to know of it first."""

# Transactions

TRANSACTIONS = turns(
    2, "begin change:1..4 commit change begin change:1..4 {n} commit change flush change", "look", ""
)
"""Transactions one after another, with writes and flushes of others in between."""

SAVEPOINTS = turns(
    3,
    "change begin change:2 savepoint change:2 savepoint change return:1 look change {n} change commit",
    "", "return:0 change:2 return:0", "return:0 change:2 return:0",
)  # fmt: skip
"""Going back to savepoints, inner and outer ones, and on from there."""

ROLLBACKS = turns(5, "begin change:3 {n} change:3:2", "rollback", "commit begin change:3 abort", "commit")
"""Transactions that are undone, by asking or by an exception; others use their clusters at once."""

TOO_LARGE = "open change:2:2 begin change:2 outgrow change:2 commit change:4:2 begin change:3 commit close"
"""A transaction that no half of the journal holds: the journal moves to a larger range first."""


def first_clusters(user: Player) -> None:
    """Transactions that only bring new clusters: where nothing was, a crash could show half of them."""
    for turn in range(user.windows.window_bytes // user.cluster_bytes - 1):
        writes = turns(user.windows.count, f"write:{{t}}w+{turn}c:1..{user.cluster_bytes}")
        user.play(f"open begin {writes} commit")
    user.play("close")


def too_large_fails(user: Player) -> None:
    """Writes and barriers fail while the journal moves for a transaction; the next one succeeds."""
    user.play("open")
    for number in user.random.sample(range(1, 14), 2):
        applied, call = user.values.read("0|512|all"), user.values.choose("pwrite|pwrite|pwrite|barrier")
        at = number if call == "pwrite" else number % 5 + 1
        user.play(f"fail:call={call}:at={at}:applied={applied}{{ begin outgrow change commit }} change")
    user.play("begin change:2 commit close")


RESIZES = turns(4, "change:2 v=1..3 i=w%s resize:v:i change resize:4:0 0.5{{ flush }} write:0..3w+i:2s")
"""The disk shrinks and grows, and is used where it was cut off."""

PREALLOCATED = turns(
    3,
    "change:2 v=1..3 i=w%s resize:v:i change 0.5{{ flush }} preallocate:4:0:0..2 write:0..3w+i:2s change",
    "begin change resize:v:i savepoint preallocate:4:0:0..2 change:2 0.5{{ return:0 }} change commit",
)
"""The disk shrinks, and grows with clusters that are there before anybody writes to them."""

PREALLOCATED_OLD_SPACE = turns(
    4, "change:2 v=1..3 resize:v:0 flush preallocate:v:3c:0..1 write:0..3w+i:2s change 0.5{{ flush }}"
).replace("+i", "")
"""What is added is a few clusters, while there are free ones with old bytes in them."""

PREALLOCATION_FAILS = turns(
    3, "change:2 v=1..3 i=w%s resize:v:i flush fail:some{{ preallocate:4:0:0..2 }} change try{{ flush }}"
)

COMMITS_FAIL = turns(
    5,
    "fail:call=pwrite|pwrite|barrier|allocate|punch:applied=0|512|4096|all:at=1..5{{ change"
    " begin change:3 savepoint try{{ change:2 }} 0.3{{ return:0 }} commit }} change:2:2",
)
"""Calls of the host fail within transactions and their commits; work goes on each time."""

TRANSACTION_KILLED = """open change:2 begin change:3 commit change kill open change:2 begin change:3 kill
    open change:2 begin change:3 commit change kill open close"""
"""The writer is killed within a transaction, or after one; the next one recovers and goes on."""

REUSE_AFTER_TRANSACTIONS = turns(
    5,
    "begin v=2w%c write:v:2c discard:2w%c:2c write:v+s:s {n} write:2w%c+s:s",
    "zeroes:v:c commit write:2w%c:c write:2w+2w%c:c",
    "unmap:v:c commit write:2w%c:c write:2w+2w%c:c",
    "zeroes:v:c commit write:2w%c:c write:2w+2w%c:c checkpoint",
    "unmap:v:c commit write:2w%c:c write:2w+2w%c:c",
    "zeroes:v:c commit write:2w%c:c write:2w+2w%c:c",
)
"""Overwrite and free within transactions what others use at once; epochs end in between."""

COMMIT_FAILS_FIRST = turns(
    4,
    # The data of the transaction, then its record.
    "write:{t}s:s write:3w+{t}c:s flush fail:at=2:applied=all{{ begin write:w+{t}c:c commit }} {n} flush",
    "", "write:0..2w+s:c",
)  # fmt: skip
"""A transaction's record is written, and then the host reports an error: what was revoked stays away."""

# Two runs of homes, the zeros of the new range, its first frame; later it may be other writes.
MOVE_FAILS_FIRST = " ".join(
    f"write:{turn // 2}w:s flush 0.5{{ checkpoint }}"
    f" fail:at={'2..5' if turn else 4}:applied=all{{ begin outgrow commit }}"
    f" write:{turn // 2}w+{turn % 2}w/2:w/2 flush"
    for turn in range(8)
)
"""The journal cannot be moved for a transaction; others then use the place where it was to go."""


def overlapping(user: Player) -> None:
    """Another thread changes the image while a barrier runs, which does not cover the change."""
    # Going live readies some of the free clusters, and leaves others as they are.
    user.play("open v=0..2w write:v+w-s:s flush write:v:s")
    # Its L2 table is there: it stages so little that nobody has to commit, and to wait for the barrier.
    while_barrier_runs(user.session.device, "flush.data", lambda: user.play("write:v+w-s-c:s"))
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

EACH_ONCE = """open packed:0:2c snapshot write:w+s:s write:s:s packed:c:c flush
    begin snapshot write:w:c apply:0 packed:2c:2c commit
    apply:-1 zeroes:0:2c delete:0 delete:0 delete:0 delete:0 write:w:c close"""
"""All that has a call to fail: each operation on snapshots, copies of data and tables, packing."""

NARROW_REFCOUNTS = (
    f"open snapshot:9 mix:2:2 {turns(4, 'snapshot:9 mix:2 apply:0..3 mix:2:2 delete:0..3')} close"
)
"""What refcounts of one or two bits cannot count is refused; the rest works."""

BETWEEN_WRITES = f"{turns(6, 'mix:2:0|2 snap {n}', '', '', 'checkpoint', '', 'close', '')} mix close"
"""Snapshots made, applied and deleted between writes, with and without a flush before and after."""

COPY_ON_WRITE = turns(
    3,
    "write:{t}c:2c packed:{t}c+4c:c snapshot:9 write:{t}c+c%s:s write:{t}c+4c+c%s:s flush"
    # Now the cluster is the disk's alone.
    " write:{t}c:s {n}:{t}c+c:c discard:{t}c+4c:c",
    "zeroes", "unmap",
)  # fmt: skip
"""Less than a cluster is written to what a snapshot shares: the rest of it is copied."""


def several(user: Player) -> None:
    """Several snapshots at once, deleted in another order; what they held is used again at once."""
    user.play(turns(3, "write:{t}c:3c snapshot:9 mix"))
    user.play("delete:1 write:w:3c apply:0 write:2w:2c mix:2:2 write:c:s")
    while user.user.snapshots:
        user.play("delete:0..3 write:w%c:c flush")
    user.play("write:0:w close")


IN_TRANSACTIONS = turns(
    4,
    "mix begin mix snap mix:2 savepoint snap mix look {n} mix:2:0|2",
    "commit", "return:0 mix snap commit", "commit", "return:0 mix snap rollback",
)  # fmt: skip
"""Snapshots within transactions, with writes before and after them, savepoints and rollbacks."""


def other_sizes(user: Player) -> None:
    """Snapshots of disks of other sizes: cut off, grown past them, and applied again."""
    for _ in range(3):
        user.play("v=1..3 i=w%s snapshot:9 resize:v:i mix resize:4|8|80:0 mix snapshot:9")
        user.play("apply:0..3 mix:2:0|2")
        if len(user.user.snapshots) > 2:
            user.play("delete:0..3")
    user.play("close")


SNAPSHOTS_KILLED = """open mix:2 snap mix:2 kill open mix:2 begin snap mix:2 kill
    open mix:2 snap mix:2 kill open close"""
"""The writer is killed after a snapshot, before any flush, and within a transaction with one."""

SNAPSHOTS_FAIL = turns(
    5,
    "fail:some{{ mix snap mix:2:2 }} {n} snap mix",
    "", "fail:some{ begin mix try{ snap } mix commit }", "", "fail:some{ begin mix try{ snap } mix commit }",
)  # fmt: skip
"""Calls of the host fail while snapshots are made, applied and deleted; work goes on each time."""

LARGE_TABLES = f"""open snapshot:9 {turns(12, "write:{t}w:s")} begin outgrow snapshot:9 mix commit
    fail:some{{ apply:0 }} apply:0 mix delete:0 close"""
"""A snapshot changes more than a half of the journal holds: the journal moves to a larger range."""


# Compressed clusters


def compressed(user: Player) -> None:
    """Compressed writes over flushes, overwritten, zeroed and discarded; what is freed is used again."""
    for turn in range(6):
        user.play(f"open packed:w%c:2c {'flush' if turn % 2 else ''} pack v=w%c")
        choice = user.random.random()
        if choice < 0.4:
            user.play("write:v+s:s")
        elif choice < 0.6:
            user.play(f"{'unmap' if user.random.random() < 0.5 else 'zeroes'}:v:2c")
        elif choice < 0.8:
            user.play("discard:v:2c")
        user.play(f"write:w+w%c:c {'checkpoint' if turn == 3 else ''}")
    user.play("close")


COMPRESSED_NEW = turns(4, "packed:{t}c:c packed:w+{n}:2c flush pack", "0c", "2c", "4c", "6c")
"""Compressed writes to a new image, where nothing was: a descriptor must not land before its data."""

COMPRESSED_UNDONE = turns(
    5,
    "pack {n} pack mix:2:2",
    "fail:some{ pack pack flush }", "begin pack savepoint pack return:0 pack commit",
    "fail:some{ pack pack flush }", "begin pack savepoint pack return:0 pack rollback",
)  # fmt: skip
"""Compressed writes that fail or are rolled back, and those that follow them, which pack anew."""
