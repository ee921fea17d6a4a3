"""What users do with transactions in the crash campaign: stories, as in `tests.support.stories`."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random

from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice
from tests.support.expectation import SECTOR_BYTES
from tests.support.images import Draft, Session
from tests.support.stories import cluster_bytes_of, scribble, scribble_on

OUTGROWING_RESIZES = {512: 70, 1024: 34}
"""Growths of the L1 table of which one record exceeds a half of the smallest journal, by cluster size."""


def draft_one(draft: Draft, random: Random) -> None:
    """Do one thing to the disk of a transaction."""
    windows = draft.windows
    cluster_bytes = draft.session.live.info().cluster_size
    position = random.randrange(windows.model_bytes // SECTOR_BYTES) * SECTOR_BYTES
    length = random.choice((1, 2, 3, 8, 3 * cluster_bytes // SECTOR_BYTES)) * SECTOR_BYTES
    cluster = position - position % cluster_bytes
    choice = random.random()
    if choice < 0.55:
        draft.write(position, length)
    elif choice < 0.65:
        draft.write(position + random.randrange(SECTOR_BYTES), random.randrange(1, length + 1))
    elif choice < 0.8:
        draft.write_zeroes(cluster, cluster_bytes * random.randint(1, 3), unmap=random.random() < 0.5)
    elif choice < 0.9:
        draft.discard(cluster, cluster_bytes * random.randint(1, 4))
    else:
        draft.resize(some_size(draft, random))


def some_size(draft: Draft, random: Random) -> int:
    """Return a size of the disk that cuts a window, ends between windows, or shows them all."""
    windows = draft.windows
    inside = random.randrange(windows.window_bytes // SECTOR_BYTES) * SECTOR_BYTES
    start = random.randint(1, windows.count - 1) * windows.stride_bytes
    return random.choice((start + inside, start, windows.disk_bytes, windows.disk_bytes * 2))


def draft_on(draft: Draft, random: Random, count: int) -> None:
    """Do many things in a transaction."""
    for _ in range(count):
        draft_one(draft, random)


def outgrow(draft: Draft) -> None:
    """Stage more than a half of the journal holds: each growth of the L1 table is in the record."""
    reach = draft.windows.stride_bytes
    for _ in range(OUTGROWING_RESIZES.get(draft.session.live.info().cluster_size, 12)):
        draft.resize(draft.size_bytes + reach)


def transactions(session: Session, random: Random) -> None:
    """Transactions one after another, with writes and flushes of others in between."""
    session.open()
    for turn in range(4):
        with session.transaction() as draft:
            draft_on(draft, random, random.randint(1, 4))
            if turn == 1:
                draft.look()
        scribble(session, random)
        if turn % 2:
            session.flush()
            scribble(session, random)
    session.close()


def first_clusters(session: Session, random: Random) -> None:
    """Transactions that only bring new clusters: where nothing was, a crash could show half of them."""
    session.create(cluster_bytes_of(session), session.expectation.sizes[-1])
    windows, cluster_bytes = session.expectation.windows, session.live.info().cluster_size
    for turn in range(windows.window_bytes // cluster_bytes - 1):
        with session.transaction() as draft:
            for index in range(windows.count):
                draft.write(
                    index * windows.window_bytes + turn * cluster_bytes, random.randint(1, cluster_bytes)
                )
    session.close()


def savepoints(session: Session, random: Random) -> None:
    """Going back to savepoints, inner and outer ones, and on from there."""
    session.open()
    for turn in range(3):
        scribble(session, random)
        with session.transaction() as draft:
            draft_on(draft, random, 2)
            outer = draft.savepoint()
            draft_on(draft, random, 2)
            inner = draft.savepoint()
            draft_on(draft, random, 1)
            draft.return_to(inner)
            draft.look()
            draft_one(draft, random)
            if turn:
                draft.return_to(outer)
                draft_on(draft, random, 2)
                draft.return_to(outer)
            draft_one(draft, random)
    session.close()


def rollbacks(session: Session, random: Random) -> None:
    """Transactions that are undone, by asking or by an exception; others use their clusters at once."""
    session.open()
    for turn in range(5):
        with session.transaction() as draft:
            draft_on(draft, random, 3)
            if turn % 3 == 0:
                draft.rollback()
        if turn % 3 == 1:
            with suppress(_SomeError), session.transaction() as draft:
                draft_on(draft, random, 3)
                raise _SomeError
        scribble_on(session, random, 3, flush_every=2)
    session.close()


class _SomeError(Exception):
    pass


def too_large(session: Session, random: Random) -> None:
    """A transaction that no half of the journal holds: the journal moves to a larger range first."""
    session.open()
    scribble_on(session, random, 2, flush_every=2)
    with session.transaction() as draft:
        draft_on(draft, random, 2)
        outgrow(draft)
        draft_on(draft, random, 2)
    scribble_on(session, random, 4, flush_every=2)
    with session.transaction() as draft:
        draft_on(draft, random, 3)
    session.close()


def too_large_fails(session: Session, random: Random) -> None:
    """Writes and barriers fail while the journal moves for a transaction; the next one succeeds."""
    session.open()
    for number in random.sample(range(1, 14), 2):
        applied = random.choice((0, 512, EVERYTHING))
        call = random.choice(("pwrite", "pwrite", "pwrite", "barrier"))
        at = number if call == "pwrite" else number % 5 + 1
        fault = Fault(errno.EIO, at=at, call=call, applied_bytes=applied)
        with session.faults(FaultPlan(fault)), session.transaction() as draft:
            outgrow(draft)
            draft_one(draft, random)
        scribble(session, random)
    with session.transaction() as draft:
        draft_on(draft, random, 2)
    session.close()


def resizes(session: Session, random: Random) -> None:
    """The disk shrinks and grows, and is used where it was cut off."""
    session.open()
    windows = session.expectation.windows
    for _ in range(4):
        scribble_on(session, random, 2)
        start = random.randint(1, windows.count - 1) * windows.stride_bytes
        inside = random.randrange(windows.window_bytes // SECTOR_BYTES) * SECTOR_BYTES
        session.resize(start + inside)
        scribble(session, random)
        session.resize(windows.disk_bytes)
        if random.random() < 0.5:
            session.flush()
        session.write(random.randrange(windows.count) * windows.window_bytes + inside, 2 * SECTOR_BYTES)
    session.close()


def commits_fail(session: Session, random: Random) -> None:
    """Calls of the host fail within transactions and their commits; work goes on each time."""
    session.open()
    for _ in range(5):
        call = random.choice(("pwrite", "pwrite", "barrier", "allocate", "punch"))
        applied = random.choice((0, 512, 4096, EVERYTHING))
        fault = Fault(errno.EIO, at=random.randint(1, 5), call=call, applied_bytes=applied)
        with session.faults(FaultPlan(fault)):
            scribble(session, random)
            with session.transaction() as draft:
                draft_on(draft, random, 3)
                savepoint = draft.savepoint()
                with suppress(OSError):
                    draft_on(draft, random, 2)
                if random.random() < 0.3:
                    draft.return_to(savepoint)
        scribble_on(session, random, 2, flush_every=2)
    session.close()


def transaction_killed(session: Session, random: Random) -> None:
    """The writer is killed within a transaction, or after one; the next one recovers and goes on."""
    for turn in range(3):
        session.open()
        scribble_on(session, random, 2)
        with session.transaction() as draft:
            draft_on(draft, random, 3)
            if turn == 1:
                session.kill()
        if turn != 1:
            scribble(session, random)
            session.kill()
    session.open()
    session.close()


def reuse_after_transactions(session: Session, random: Random) -> None:
    """Overwrite and free within transactions what others use at once; epochs end in between."""
    session.open()
    windows, cluster_bytes = session.expectation.windows, session.live.info().cluster_size
    clusters = 2 * windows.window_bytes // cluster_bytes
    for turn in range(5):
        with session.transaction() as draft:
            victim = random.randrange(clusters) * cluster_bytes
            draft.write(victim, 2 * cluster_bytes)
            draft.discard(random.randrange(clusters) * cluster_bytes, 2 * cluster_bytes)
            draft.write(victim + SECTOR_BYTES, SECTOR_BYTES)
            draft.write_zeroes(victim, cluster_bytes, unmap=bool(turn % 2))
        session.write(random.randrange(clusters) * cluster_bytes, cluster_bytes)
        session.write((clusters + random.randrange(clusters)) * cluster_bytes, cluster_bytes)
        if turn == 2:
            session.checkpoint()
        session.write(random.randrange(clusters) * cluster_bytes + SECTOR_BYTES, SECTOR_BYTES)
    session.close()


def commit_fails_first(session: Session, random: Random) -> None:
    """A transaction's record is written, and then the host reports an error: what was revoked stays away."""
    session.open()
    windows, cluster_bytes = session.expectation.windows, session.live.info().cluster_size
    for turn in range(4):
        session.write(turn * SECTOR_BYTES, SECTOR_BYTES)
        session.write((windows.count - 1) * windows.window_bytes + turn * cluster_bytes, SECTOR_BYTES)
        session.flush()
        # The data of the transaction, then its record.
        fault = Fault(errno.EIO, at=2, call="pwrite", applied_bytes=EVERYTHING)
        with session.faults(FaultPlan(fault)), session.transaction() as draft:
            draft.write(windows.window_bytes + turn * cluster_bytes, cluster_bytes)
        if turn % 2:
            session.write(random.randrange(3) * windows.window_bytes + SECTOR_BYTES, cluster_bytes)
        session.flush()
    session.close()


def move_fails_first(session: Session, random: Random) -> None:
    """The journal cannot be moved for a transaction; others then use the place where it was to go."""
    session.create(cluster_bytes_of(session), session.expectation.sizes[-1])
    windows = session.expectation.windows
    half_window = windows.window_bytes // 2
    for turn in range(2 * windows.count):
        session.write(turn // 2 * windows.window_bytes, SECTOR_BYTES)
        session.flush()
        if random.random() < 0.5:
            session.checkpoint()
        # Two runs of homes, the zeros of the new range, its first frame; later it may be other writes.
        at = random.randint(2, 5) if turn else 4
        fault = Fault(errno.EIO, at=at, call="pwrite", applied_bytes=EVERYTHING)
        with session.faults(FaultPlan(fault)), session.transaction() as draft:
            outgrow(draft)
        session.write(turn // 2 * windows.window_bytes + turn % 2 * half_window, half_window)
        session.flush()
    session.close()


def overlapping(session: Session, random: Random) -> None:
    """Another thread changes the image while a barrier runs, which does not cover the change."""
    session.open()
    window_bytes, cluster_bytes = session.expectation.windows.window_bytes, cluster_bytes_of(session)
    start = random.randrange(3) * window_bytes
    # Going live readies some of the free clusters, and leaves others as they are.
    session.write(start + window_bytes - SECTOR_BYTES, SECTOR_BYTES)
    session.flush()
    session.write(start, SECTOR_BYTES)
    # Its L2 table is there: it stages so little that nobody has to commit, and to wait for the barrier.
    unused = start + window_bytes - SECTOR_BYTES - cluster_bytes
    while_barrier_runs(session.device, "flush.data", lambda: session.write(unused, SECTOR_BYTES))
    session.flush()
    session.write(3 * window_bytes, window_bytes - cluster_bytes + SECTOR_BYTES)
    session.flush()
    scribble_on(session, random, 2)
    session.close()


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
