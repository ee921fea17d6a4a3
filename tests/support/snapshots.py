"""What users do with snapshots and compressed clusters in the crash campaign: more stories."""

from __future__ import annotations

import errno
from contextlib import suppress
from random import Random

from jqcow.testing import EVERYTHING, Fault, FaultPlan
from tests.support.expectation import SECTOR_BYTES
from tests.support.images import Draft, Session
from tests.support.stories import cluster_bytes_of, scribble
from tests.support.transactions import draft_one, outgrow

SNAPSHOTS_MAX = 4
"""So many at once: each one is read in every state."""

Place = tuple[int, int]


def some_clusters(user: Session | Draft, random: Random) -> Place:
    """Return position and length of a few whole clusters, most of them in the first window."""
    session = user.session if isinstance(user, Draft) else user
    windows, cluster_bytes = session.expectation.windows, cluster_bytes_of(session)
    clusters = random.choice((windows.window_bytes, windows.model_bytes)) // cluster_bytes
    return random.randrange(clusters) * cluster_bytes, random.randint(1, 3) * cluster_bytes


def change(session: Session, random: Random, count: int = 1, *, flush_every: int = 0) -> None:
    """Change the disk: as in other stories, and by compressed writes."""
    for number in range(1, count + 1):
        if random.random() < 0.35:
            session.write_compressed(*some_clusters(session, random))
        else:
            scribble(session, random)
        if flush_every and number % flush_every == 0:
            session.flush()


def change_draft(draft: Draft, random: Random, count: int = 1) -> None:
    """Change the disk of a transaction."""
    for _ in range(count):
        if random.random() < 0.35:
            draft.write_compressed(*some_clusters(draft, random))
        else:
            draft_one(draft, random)


def change_snapshots(user: Session | Draft, random: Random) -> None:
    """Make, apply or delete a snapshot."""
    there = len(user.snapshots if isinstance(user, Draft) else user.expectation.snapshots)
    choice = random.random()
    if not there or (choice < 0.45 and there < SNAPSHOTS_MAX):
        user.create_snapshot()
    elif choice < 0.7:
        user.apply_snapshot(random.randrange(there))
    else:
        user.delete_snapshot(random.randrange(there))


def between_writes(session: Session, random: Random) -> None:
    """Snapshots made, applied and deleted between writes, with and without a flush before and after."""
    session.open()
    for turn in range(6):
        change(session, random, 2, flush_every=random.choice((0, 2)))
        change_snapshots(session, random)
        if turn == 2:
            session.checkpoint()
        if turn == 4:
            session.close()
            session.open()
    change(session, random)
    session.close()


def copy_on_write(session: Session, random: Random) -> None:
    """Less than a cluster is written to what a snapshot shares: the rest of it is copied."""
    if session.expectation.exists:
        session.open()
    else:
        session.create(cluster_bytes_of(session), session.expectation.sizes[-1])
    cluster_bytes = cluster_bytes_of(session)
    for turn in range(3):
        session.write(turn * cluster_bytes, 2 * cluster_bytes)
        session.write_compressed((turn + 4) * cluster_bytes, cluster_bytes)
        session.create_snapshot()
        for first in (turn, turn + 4):
            within = random.randrange(cluster_bytes // SECTOR_BYTES) * SECTOR_BYTES
            session.write(first * cluster_bytes + within, SECTOR_BYTES)
        session.flush()
        # Now the cluster is the disk's alone.
        session.write(turn * cluster_bytes, SECTOR_BYTES)
        session.write_zeroes((turn + 1) * cluster_bytes, cluster_bytes, unmap=bool(turn % 2))
        session.discard((turn + 4) * cluster_bytes, cluster_bytes)
    session.close()


def several(session: Session, random: Random) -> None:
    """Several snapshots at once, deleted in another order; what they held is used again at once."""
    session.open()
    windows, cluster_bytes = session.expectation.windows, cluster_bytes_of(session)
    for turn in range(3):
        session.write(turn * cluster_bytes, 3 * cluster_bytes)
        session.create_snapshot()
        change(session, random)
    session.delete_snapshot(1)
    session.write(windows.window_bytes, 3 * cluster_bytes)
    session.apply_snapshot(0)
    session.write(2 * windows.window_bytes, 2 * cluster_bytes)
    change(session, random, 2, flush_every=2)
    session.write(cluster_bytes, SECTOR_BYTES)
    while session.expectation.snapshots:
        session.delete_snapshot(random.randrange(4))
        session.write(random.randrange(windows.window_bytes // cluster_bytes) * cluster_bytes, cluster_bytes)
        session.flush()
    session.write(0, windows.window_bytes)
    session.close()


def in_transactions(session: Session, random: Random) -> None:
    """Snapshots within transactions, with writes before and after them, savepoints and rollbacks."""
    session.open()
    for turn in range(4):
        change(session, random)
        with session.transaction() as draft:
            change_draft(draft, random)
            change_snapshots(draft, random)
            change_draft(draft, random, 2)
            point = draft.savepoint()
            change_snapshots(draft, random)
            change_draft(draft, random)
            draft.look()
            if turn % 2:
                draft.return_to(point)
                change_draft(draft, random)
                change_snapshots(draft, random)
            if turn == 3:
                draft.rollback()
        change(session, random, 2, flush_every=random.choice((0, 2)))
    session.close()


def other_sizes(session: Session, random: Random) -> None:
    """Snapshots of disks of other sizes: cut off, grown past them, and applied again."""
    session.open()
    windows = session.expectation.windows
    for _ in range(3):
        start = random.randint(1, windows.count - 1) * windows.stride_bytes
        inside = random.randrange(windows.window_bytes // SECTOR_BYTES) * SECTOR_BYTES
        session.create_snapshot()
        session.resize(start + inside)
        change(session, random)
        session.resize(windows.disk_bytes * random.choice((1, 2, 20)))
        change(session, random)
        session.create_snapshot()
        session.apply_snapshot(random.randrange(4))
        change(session, random, 2, flush_every=random.choice((0, 2)))
        if len(session.expectation.snapshots) > 2:
            session.delete_snapshot(random.randrange(4))
    session.close()


def killed(session: Session, random: Random) -> None:
    """The writer is killed after a snapshot, before any flush, and within a transaction with one."""
    for turn in range(3):
        session.open()
        change(session, random, 2)
        if turn != 1:
            change_snapshots(session, random)
            change(session, random, 2)
            session.kill()
            continue
        with session.transaction() as draft:
            change_snapshots(draft, random)
            change_draft(draft, random, 2)
            session.kill()
    session.open()
    session.close()


def some_fault(random: Random) -> FaultPlan:
    """Return a plan by which a call of the host fails, or its disk is full."""
    if random.random() < 0.15:
        return FaultPlan(full_from=random.randint(1, 8))
    call = random.choice(("pwrite", "pwrite", "pwrite", "barrier", "allocate", "punch"))
    applied = random.choice((0, 512, 4096, EVERYTHING))
    at = random.randint(1, 3 if call == "barrier" else 6)
    return FaultPlan(Fault(errno.EIO, at=at, call=call, applied_bytes=applied))


def fails(session: Session, random: Random) -> None:
    """Calls of the host fail while snapshots are made, applied and deleted; work goes on each time."""
    session.open()
    for turn in range(5):
        with session.faults(some_fault(random)):
            change(session, random)
            change_snapshots(session, random)
            change(session, random, 2, flush_every=2)
        if turn % 2:
            with session.faults(some_fault(random)), session.transaction() as draft:
                change_draft(draft, random)
                with suppress(OSError):
                    change_snapshots(draft, random)
                change_draft(draft, random)
        change_snapshots(session, random)
        change(session, random)
    session.close()


def large_tables(session: Session, random: Random) -> None:
    """A snapshot changes more than a half of the journal holds: the journal moves to a larger range."""
    session.open()
    windows = session.expectation.windows
    session.create_snapshot()
    for index in range(windows.count):
        session.write(index * windows.window_bytes, SECTOR_BYTES)
    with session.transaction() as draft:
        outgrow(draft)
        draft.create_snapshot()
        change_draft(draft, random)
    with session.faults(some_fault(random)):
        session.apply_snapshot(0)
    session.apply_snapshot(0)
    change(session, random)
    session.delete_snapshot(0)
    session.close()


def compressed(session: Session, random: Random) -> None:
    """Compressed writes over flushes, overwritten, zeroed and discarded; what is freed is used again."""
    session.open()
    windows, cluster_bytes = session.expectation.windows, cluster_bytes_of(session)
    clusters = windows.window_bytes // cluster_bytes
    for turn in range(6):
        session.write_compressed(random.randrange(clusters) * cluster_bytes, 2 * cluster_bytes)
        if turn % 2:
            session.flush()
        session.write_compressed(*some_clusters(session, random))
        victim = random.randrange(clusters) * cluster_bytes
        choice = random.random()
        if choice < 0.4:
            session.write(victim + SECTOR_BYTES, SECTOR_BYTES)
        elif choice < 0.6:
            session.write_zeroes(victim, 2 * cluster_bytes, unmap=random.random() < 0.5)
        elif choice < 0.8:
            session.discard(victim, 2 * cluster_bytes)
        session.write((clusters + random.randrange(clusters)) * cluster_bytes, cluster_bytes)
        if turn == 3:
            session.checkpoint()
    session.close()


def compressed_new(session: Session, random: Random) -> None:
    """Compressed writes to a new image, where nothing was: a descriptor must not land before its data."""
    session.create(cluster_bytes_of(session), session.expectation.sizes[-1])
    windows, cluster_bytes = session.expectation.windows, cluster_bytes_of(session)
    for turn in range(4):
        session.write_compressed(turn * cluster_bytes, cluster_bytes)
        session.write_compressed(windows.window_bytes + turn * 2 * cluster_bytes, 2 * cluster_bytes)
        session.flush()
        session.write_compressed(*some_clusters(session, random))
    session.close()


def compressed_undone(session: Session, random: Random) -> None:
    """Compressed writes that fail or are rolled back, and those that follow them, which pack anew."""
    session.open()
    for turn in range(5):
        session.write_compressed(*some_clusters(session, random))
        if turn % 2:
            with session.transaction() as draft:
                draft.write_compressed(*some_clusters(draft, random))
                point = draft.savepoint()
                draft.write_compressed(*some_clusters(draft, random))
                draft.return_to(point)
                draft.write_compressed(*some_clusters(draft, random))
                if turn == 3:
                    draft.rollback()
        else:
            with session.faults(some_fault(random)):
                session.write_compressed(*some_clusters(session, random))
                session.write_compressed(*some_clusters(session, random))
                session.flush()
        session.write_compressed(*some_clusters(session, random))
        change(session, random, 2, flush_every=2)
    session.close()


def narrow_refcounts(session: Session, random: Random) -> None:
    """What refcounts of one or two bits cannot count is refused; the rest works."""
    session.open()
    session.create_snapshot()
    change(session, random, 2, flush_every=2)
    for _ in range(4):
        session.create_snapshot()
        change(session, random, 2)
        session.apply_snapshot(random.randrange(4))
        change(session, random, 2, flush_every=2)
        session.delete_snapshot(random.randrange(4))
    session.close()


def each_once(session: Session) -> None:
    """Touch all that has a call to fail: each operation on snapshots, copies of data and tables, packing."""
    if session.image is None:
        session.open()
    windows, cluster_bytes = session.expectation.windows, cluster_bytes_of(session)
    session.write_compressed(0, 2 * cluster_bytes)
    session.create_snapshot()
    session.write(windows.window_bytes + SECTOR_BYTES, SECTOR_BYTES)
    session.write(SECTOR_BYTES, SECTOR_BYTES)
    session.write_compressed(cluster_bytes, cluster_bytes)
    session.flush()
    with session.transaction() as draft:
        draft.create_snapshot()
        draft.write(windows.window_bytes, cluster_bytes)
        draft.apply_snapshot(0)
        draft.write_compressed(2 * cluster_bytes, 2 * cluster_bytes)
    session.apply_snapshot(-1)
    session.write_zeroes(0, 2 * cluster_bytes, unmap=False)
    while session.expectation.snapshots:
        session.delete_snapshot(0)
    session.write(windows.window_bytes, cluster_bytes)
    session.close()
