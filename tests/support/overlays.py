"""Overlays over disks that no crash changes, and images with wrong refcounts: starts, and what users do."""

from __future__ import annotations

import errno
from random import Random

from jqcow.offline.commit import copy_into
from jqcow.offline.rebase import copy_differences
from jqcow.ondisk.header import INCOMPATIBLE_DIRTY, Header, HeaderArea
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SectorModel, SimulatedDevice
from tests.support import starts
from tests.support.below import Below, find_below_by_name, name_of
from tests.support.expectation import SECTOR_BYTES, Windows
from tests.support.images import Session
from tests.support.starts import Start, new_session, some_size, start_of, with_changes
from tests.support.stories import scribble, scribble_on

DIRTY_BYTE = 79
"""The last byte of the incompatible features."""


# Overlays


def some_disk(windows: Windows, cluster_bytes: int, random: Random) -> Below:
    """Return a disk that has data in most of its windows: shorter than an overlay of them all, or longer."""
    content = bytearray(windows.model_bytes)
    mark = random.randrange(1, 256)
    for start in range(0, windows.model_bytes, cluster_bytes // 2):
        if random.random() < 0.7:
            for sector in range(start, start + cluster_bytes // 2, SECTOR_BYTES):
                content[sector : sector + SECTOR_BYTES] = bytes([mark, sector // SECTOR_BYTES % 251]) * 256
    inside = random.randrange(1, windows.window_bytes // SECTOR_BYTES) * SECTOR_BYTES
    size = random.choice((windows.stride_bytes + inside, windows.disk_bytes, 2 * windows.disk_bytes))
    return Below(windows, bytes(content), size)


def overlay_image(cluster_bytes: int, random: Random) -> Start:
    """An image over another disk, with data, zeros and nothing of its own."""
    windows = Windows.of(cluster_bytes)
    below = some_disk(windows, cluster_bytes, random)
    device, session = new_overlay(below, cluster_bytes, some_size(windows, random))
    for _ in range(5):
        scribble(session, random)
    session.close()
    return with_changes(start_of(device, session), extensions=extensions_in(device.content()))


def new_overlay(below: Below, cluster_bytes: int, size_bytes: int) -> tuple[SimulatedDevice, Session]:
    """Make an overlay that has nothing of its own yet, and open it."""
    windows = below.windows
    device, session = new_session(windows, cluster_bytes, size_bytes)
    with session.live.transaction() as transaction:
        transaction.set_backing_file(name_of(below), "raw")
    session.close()
    session.expectation.sectors = SectorModel(windows.model_bytes, below.seen)
    windows.cut_off(session.expectation.sectors, size_bytes)
    session.open()
    return device, session


def overlay_with_old_bytes(cluster_bytes: int, random: Random) -> Start:
    """As `overlay_image`, with old bytes in all that is free, on a host without holes."""
    start = starts.with_old_bytes(overlay_image(cluster_bytes, random), cluster_bytes, random)
    return with_changes(start, can_punch=False)


def extensions_in(content: bytes) -> bytes:
    """Return what follows the fixed fields of a header: the extensions, and the backing file's name."""
    header = Header.unpack(content[:SECTOR_BYTES])
    area = HeaderArea.parse(content[: 1 << header.cluster_bits])
    return area.data[area.header.header_length :]


def rebase(session: Session, random: Random) -> None:
    """The overlay goes over other disks, longer and shorter ones: what it reads stays."""
    session.open()
    for _ in range(2):
        scribble_on(session, random, 3, flush_every=2)
        _put_over(session, some_disk(session.expectation.windows, _cluster_bytes(session), random))
    scribble_on(session, random, 3, flush_every=2)
    session.close()


def _put_over(session: Session, below: Below) -> None:
    """Rebase, and open again: a running image goes on with the disk that it has."""
    name = name_of(below)
    area = session.live._store.metadata.area
    session.expectation.renamed += (_renamed(area, name),)
    with session.transaction() as draft:
        copy_differences(session.live, draft.transaction, find_below_by_name(name))
        draft.transaction.set_backing_file(name, "raw")
        draft.look()
    session.close()
    session.open()


def _renamed(area: HeaderArea, name: str) -> bytes:
    return area.with_backing_file(name.encode(), b"raw").data[area.header.header_length :]


def emptied(session: Session, random: Random) -> None:
    """What a commit does once the base has all of it: the overlay gives up what is its own."""
    session.open()
    windows = session.expectation.windows
    for _ in range(2):
        scribble_on(session, random, 4, flush_every=2)
        session.flush()
        content = session.expectation.sectors.current_content()
        _put_over(session, Below(windows, content, session.live.size))
        with session.transaction() as draft:
            draft.transaction.make_empty()
            draft.look()
    scribble_on(session, random, 3, flush_every=2)
    session.close()


def committed_into(session: Session, random: Random) -> None:
    """Overlays of other sizes are committed into the image: all of an overlay at once, or nothing of it.

    Whichever of both a crash leaves, an overlay that still has its own reads as before over it.
    """
    session.open()
    windows = session.expectation.windows
    for number in range(2):
        scribble_on(session, random, 3, flush_every=2)
        before = Below(windows, session.expectation.sectors.current_content(), session.live.size)
        size_bytes = random.choice((some_size(windows, random), windows.stride_bytes, windows.disk_bytes))
        _, overlay = new_overlay(before, _cluster_bytes(session), size_bytes)
        overlay.written = 1 + number << 24
        scribble_on(overlay, random, 4, flush_every=4)
        shown = overlay.expectation.sectors.current_content()
        with session.transaction() as draft:
            # A commit opens the overlay alone: what it copies is its own.
            _show_through(overlay, None)
            copy_into(overlay.live, draft.transaction)
            draft.size_bytes = max(draft.size_bytes, size_bytes)
            draft.sectors = SectorModel(windows.model_bytes, before.seen)
            for start in range(0, windows.model_bytes, windows.window_bytes):
                length = windows.clip(start, windows.window_bytes, size_bytes)
                draft.sectors.write(start, shown[start : start + length]).complete()
            draft.look()
        after = Below(windows, session.expectation.sectors.current_content(), session.live.size)
        _show_through(overlay, after)
        overlay.look()
        overlay.close()
    scribble_on(session, random, 3, flush_every=2)
    session.close()


def _show_through(overlay: Session, below: Below | None) -> None:
    """Let an open overlay show another disk where it has nothing of its own."""
    overlay.live._backing = overlay.live._data.backing = below


def copied_up(session: Session, random: Random) -> None:
    """Copy on read: what is read from below is written to the overlay, between changes and flushes."""
    session.open()
    windows, cluster_bytes = session.expectation.windows, _cluster_bytes(session)
    session.live._copy_on_read = True
    for number in range(8):
        position = random.randrange(windows.model_bytes // SECTOR_BYTES) * SECTOR_BYTES
        length = windows.clip(position, random.choice((1, 3)) * cluster_bytes, session.live.size)
        if length:
            session.expectation.closed = None
            session.live.pread(length, windows.guest(position))
        if number % 3 == 1:
            scribble(session, random)
        if number % 3 == 2:
            session.flush()
    session.close()


def _cluster_bytes(session: Session) -> int:
    return session.live.info().cluster_size


# Refcounts that are wrong


def dirty_bit_image(cluster_bytes: int, random: Random) -> Start:
    """An image whose dirty bit says that its refcounts may be wrong; many are."""
    return _damaged(starts.full_image(cluster_bytes, random), random)


def dirty_bit_snapshots_image(cluster_bytes: int, random: Random) -> Start:
    """As `dirty_bit_image`, with snapshots and compressed clusters."""
    return _damaged(starts.snapshots_image(cluster_bytes, random), random)


def _damaged(start: Start, random: Random) -> Start:
    content = bytearray(start.content)
    header = Header.unpack(start.content[:SECTOR_BYTES])
    cluster_bytes, per_block = header.geometry.cluster_bytes, header.geometry.refcounts_per_cluster
    for cluster in range(len(content) // cluster_bytes):
        entry = header.refcount_table_offset + cluster // per_block * 8
        block = int.from_bytes(content[entry : entry + 8], "big")
        if block and random.random() < 0.6:
            place = block + cluster % per_block * 2
            content[place : place + 2] = random.choice((0, 0, 0, 1, 2, 5)).to_bytes(2, "big")
    content[DIRTY_BYTE] |= INCOMPATIBLE_DIRTY
    return with_changes(start, content=bytes(content), damaged=True)


def repaired(session: Session, random: Random) -> None:
    """Opening repairs; then the image is used like any other."""
    session.open()
    scribble_on(session, random, 5, flush_every=2)
    session.close()
    session.open()
    scribble(session, random)
    session.close()


def repair_killed(session: Session, random: Random) -> None:
    """The process that repaired is killed, before and after a flush."""
    session.open()
    session.kill()
    session.open()
    scribble_on(session, random, 3, flush_every=2)
    session.kill()
    session.open()
    scribble(session, random)
    session.close()


def repair_fails(session: Session, random: Random) -> None:
    """The host fails while the refcounts are made right; the next opening succeeds."""
    for number in random.sample(range(1, 12), 3):
        call = random.choice(("pwrite", "pwrite", "barrier", "allocate"))
        at = number if call == "pwrite" else number % 4 + 1
        fault = Fault(errno.EIO, at=at, call=call, applied_bytes=random.choice((0, SECTOR_BYTES, EVERYTHING)))
        if session.image is None:
            with session.faults(FaultPlan(fault)):
                session.open()
        scribble(session, random)
        session.kill()
    session.open()
    scribble_on(session, random, 3)
    session.close()
