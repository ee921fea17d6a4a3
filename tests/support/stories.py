"""What users do in the crash campaign: stories, each of which meets certain barriers and faults."""

from __future__ import annotations

import errno
from random import Random

from jqcow.testing import EVERYTHING, Fault, FaultPlan
from tests.support.expectation import SECTOR_BYTES
from tests.support.images import Session


def scribble(session: Session, random: Random) -> None:
    """Do one thing to the disk."""
    windows = session.expectation.windows
    cluster_bytes = session.live.info().cluster_size
    position = random.randrange(windows.model_bytes // SECTOR_BYTES) * SECTOR_BYTES
    length = random.choice((1, 2, 3, 8, 2 * cluster_bytes // SECTOR_BYTES)) * SECTOR_BYTES
    cluster = position - position % cluster_bytes
    choice = random.random()
    if choice < 0.5:
        session.write(position, length)
    elif choice < 0.6:
        session.write(cluster, cluster_bytes)
    elif choice < 0.7:
        session.write(position + random.randrange(SECTOR_BYTES), random.randrange(1, length + 1))
    elif choice < 0.85:
        session.write_zeroes(cluster, cluster_bytes * random.randint(1, 3), unmap=random.random() < 0.5)
    else:
        session.discard(cluster, cluster_bytes * random.randint(1, 4))


def scribble_on(session: Session, random: Random, count: int, flush_every: int = 3) -> None:
    """Do many things, with a flush every few."""
    for number in range(count):
        scribble(session, random)
        if number % flush_every == flush_every - 1:
            session.flush()


def fresh(session: Session, random: Random) -> None:
    """Create, use, close."""
    size = session.expectation.sizes[-1]
    session.create(cluster_bytes_of(session), size)
    scribble_on(session, random, 7)
    session.close()


def reopened(session: Session, random: Random) -> None:
    """Two sessions on an image that exists; the second starts with a flush of nothing."""
    session.open()
    scribble_on(session, random, 5)
    session.close()
    session.open()
    session.flush()
    scribble_on(session, random, 4, flush_every=2)
    session.checkpoint()
    scribble(session, random)
    session.close()


def in_place(session: Session, random: Random) -> None:
    """Overwrite what is allocated: the image stays clean; then one change of its mapping."""
    session.open()
    window_bytes = session.expectation.windows.window_bytes
    for _ in range(4):
        session.write(random.randrange(window_bytes // SECTOR_BYTES) * SECTOR_BYTES, 3 * SECTOR_BYTES)
        session.flush()
        session.write(random.randrange(window_bytes // SECTOR_BYTES) * SECTOR_BYTES, SECTOR_BYTES)
    session.close()
    session.open()
    session.write(0, SECTOR_BYTES)
    session.write(3 * window_bytes, 2 * SECTOR_BYTES)
    session.close()


def reuse(session: Session, random: Random) -> None:
    """Free clusters, keep clusters under zeros, and use them again at once, and after flushes."""
    session.open()
    windows, cluster_bytes = session.expectation.windows, session.live.info().cluster_size
    clusters = windows.window_bytes // cluster_bytes
    for turn in range(4):
        victim = random.randrange(2 * clusters) * cluster_bytes
        if turn % 2:
            session.write_zeroes(victim, cluster_bytes, unmap=False)
            if turn == 3:
                session.flush()
            session.write(
                victim + SECTOR_BYTES * random.randrange(cluster_bytes // SECTOR_BYTES), SECTOR_BYTES
            )
        else:
            session.discard(victim, 2 * cluster_bytes)
        session.write((2 * clusters + random.randrange(2 * clusters)) * cluster_bytes, SECTOR_BYTES)
        if turn != 1:
            session.flush()
        session.write((2 * clusters + random.randrange(2 * clusters)) * cluster_bytes, cluster_bytes)
    session.flush()
    session.write(random.randrange(2 * clusters) * cluster_bytes, 2 * SECTOR_BYTES)
    session.close()


def epochs(session: Session, random: Random) -> None:
    """So many flushes that the journal's halves are filled in turn."""
    session.open()
    for _ in range(22):
        scribble(session, random)
        session.flush()
    session.close()


def grow(session: Session, random: Random) -> None:
    """Make the disk larger, and use what was added."""
    session.open()
    scribble_on(session, random, 2)
    windows = session.expectation.windows
    session.resize(windows.disk_bytes)
    session.write(3 * windows.window_bytes, 2 * SECTOR_BYTES)
    session.flush()
    session.resize(windows.disk_bytes * random.choice((2, 70)))
    scribble_on(session, random, 3)
    session.close()


def move(session: Session, random: Random) -> None:
    """Stage more than a half of the journal holds: it moves to a larger range."""
    session.open()
    scribble_on(session, random, 2, flush_every=2)
    reach = session.expectation.windows.stride_bytes
    # Each growth of the L1 table copies one block more into the record.
    for _ in range({512: 70, 1024: 34}.get(session.live.info().cluster_size, 10)):
        session.resize(session.expectation.sizes[-1] + reach)
    session.flush()
    scribble_on(session, random, 4, flush_every=2)
    session.close()


def reuse_tables(session: Session, random: Random) -> None:
    """Outgrow an L1 table that the journal holds, and use its clusters for data, epoch after epoch."""
    session.open()
    windows, size = session.expectation.windows, session.expectation.sizes[-1]
    for turn in range(6):
        session.write(turn % 2 * windows.window_bytes + turn // 2 * SECTOR_BYTES, SECTOR_BYTES)
        scribble(session, random)
        session.flush()
        size += windows.stride_bytes * (session.live.info().cluster_size // 8)
        session.resize(size)
        session.flush()
        session.flush()
        for _ in range(4):
            cluster_bytes = session.live.info().cluster_size
            position = random.randrange(windows.model_bytes // cluster_bytes) * cluster_bytes
            session.write_zeroes(position, cluster_bytes, unmap=True)
            session.write(position, cluster_bytes)
            session.flush()
    session.close()


def move_fails(session: Session, random: Random) -> None:
    """Writes fail while the journal moves, that of sector 0 among them; later the move succeeds."""
    session.open()
    scribble_on(session, random, 2, flush_every=2)
    reach = session.expectation.windows.stride_bytes
    for _ in range({512: 70, 1024: 34}.get(session.live.info().cluster_size, 10)):
        session.resize(session.expectation.sizes[-1] + reach)
    for number in random.sample(range(1, 12), 4):
        applied = random.choice((0, 512, EVERYTHING))
        with session.faults(FaultPlan(Fault(errno.EIO, at=number, call="pwrite", applied_bytes=applied))):
            scribble(session, random)
            session.flush()
    scribble_on(session, random, 2, flush_every=2)
    session.close()


def move_killed(session: Session, random: Random) -> None:
    """A write fails while the journal moves, and then the writer is killed; the next one recovers."""
    for number in random.sample(range(4, 9), 3):
        session.open()
        scribble(session, random)
        session.flush()
        reach = session.expectation.windows.stride_bytes
        for _ in range({512: 70, 1024: 34}.get(session.live.info().cluster_size, 10)):
            session.resize(session.live.size + reach)
        applied = random.choice((0, EVERYTHING))
        with session.faults(FaultPlan(Fault(errno.EIO, at=number, call="pwrite", applied_bytes=applied))):
            session.flush()
        session.kill()
    session.open()
    session.close()


def killed(session: Session, random: Random) -> None:
    """The writer is killed; the next one recovers and goes on; killed once more, before any flush."""
    session.open()
    scribble_on(session, random, 5)
    session.kill()
    session.open()
    scribble_on(session, random, 3, flush_every=2)
    scribble(session, random)
    session.kill()
    session.open()
    session.close()


def host_fails(session: Session, random: Random) -> None:
    """Calls of the host fail, one at a time, whatever they are; work goes on each time."""
    session.open()
    for _ in range(6):
        error = random.choice((errno.EIO, errno.ENOSPC))
        applied = random.choice((0, 512, 4096, EVERYTHING))
        call = random.choice(("pwrite", "pwrite", "allocate", "punch", "truncate"))
        fault = Fault(error, at=random.randint(1, 4), call=call, applied_bytes=applied)
        with session.faults(FaultPlan(fault)):
            scribble_on(session, random, 4, flush_every=2)
            session.checkpoint()
        scribble(session, random)
        session.flush()
    session.close()


def going_live_fails(session: Session, random: Random) -> None:
    """The first writes of a session fail, that of sector 0 among them; the next ones succeed."""
    for number in range(2, 6):
        session.open()
        applied = random.choice((0, EVERYTHING))
        with session.faults(FaultPlan(Fault(errno.EIO, at=number, call="pwrite", applied_bytes=applied))):
            scribble_on(session, random, 2, flush_every=1)
        if number % 2:
            session.close()
            continue
        scribble_on(session, random, 2, flush_every=2)
        with session.faults(FaultPlan(Fault(errno.EIO, at=number - 1, call="pwrite", applied_bytes=applied))):
            session.close()
        if session.image is not None:
            session.close()


def root_write_fails(session: Session, random: Random) -> None:
    """The write of sector 0 fails when the image goes live; before any barrier a change tries again."""
    for turn in range(3):
        session.open()
        position = 2 * session.expectation.windows.window_bytes + turn * 4 * SECTOR_BYTES
        # Zeros of the range, opening frame, root copy, and then sector 0.
        fault = Fault(errno.EIO, at=4, call="pwrite", applied_bytes=random.choice((0, EVERYTHING)))
        with session.faults(FaultPlan(fault)):
            session.discard(0, session.expectation.windows.window_bytes // 2)
        session.write(position, 2 * SECTOR_BYTES)
        session.write_zeroes(0, session.expectation.windows.window_bytes // 4, unmap=True)
        session.flush()
        session.close()
        session.open()
        session.write(session.expectation.windows.window_bytes // 2, SECTOR_BYTES)
        session.write(0, session.expectation.windows.window_bytes // 2)
        session.close()


def barrier_fails(session: Session, random: Random) -> None:
    """Barriers fail, and what was in flight is lost though readable; the next opening recovers."""
    session.open()
    for _ in range(3):
        at = random.randint(1, 5)
        with session.faults(FaultPlan(Fault(errno.EIO, at=at, call="barrier"))):
            scribble_on(session, random, 4, flush_every=1)
            session.checkpoint()
        scribble_on(session, random, 2, flush_every=2)
    session.close()


def disk_full(session: Session, random: Random) -> None:
    """The host's disk is full for a while, and then is not."""
    session.open()
    scribble_on(session, random, 2, flush_every=2)
    with session.faults(FaultPlan(full_from=random.randint(1, 12))):
        scribble_on(session, random, 8, flush_every=2)
    scribble_on(session, random, 3)
    session.close()


def mixed(session: Session) -> None:
    """Touch all that has a call to fail: going live, growth, zeroes, reuse, an epoch's end, a move, close."""
    if session.image is None:
        session.open()
    windows, cluster_bytes = session.expectation.windows, session.live.info().cluster_size
    session.write(0, 3 * SECTOR_BYTES)
    session.flush()
    session.write(2 * windows.window_bytes, cluster_bytes + SECTOR_BYTES)
    session.discard(0, 2 * cluster_bytes)
    session.flush()
    session.write_zeroes(windows.window_bytes, 2 * cluster_bytes, unmap=False)
    session.write(windows.window_bytes + SECTOR_BYTES, SECTOR_BYTES)
    session.checkpoint()
    session.write(3 * windows.window_bytes, SECTOR_BYTES, fua=True)
    for _ in range(10):
        session.resize(session.live.size + windows.stride_bytes)
    session.flush()
    session.write(cluster_bytes, cluster_bytes)
    session.close()


def cluster_bytes_of(session: Session) -> int:
    # A reach is one L2 table of 8-byte entries: cluster size squared, by 8.
    return int((session.expectation.windows.stride_bytes * 8) ** 0.5)
