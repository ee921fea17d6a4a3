"""The operations of the exhaustive search, by name, and the image that they work on.

An operation works on the place that was changed last, of those that it can do something to. So the
operations of a short sequence meet in the same clusters: what one wrote the next one overwrites, frees, cuts
off or takes back. To add an operation, write a function and name it in `OPERATIONS`.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jqcow.device.base import ReadBuffer
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SectorModel, SimulatedDevice
from tests.support.expectation import SECTOR_BYTES, Expectation, Windows
from tests.support.images import JOURNAL_BYTES, Draft, Session
from tests.support.starts import GARBAGE, Start, free_clusters

DATA, ZERO, FREE, DISCARDED, GONE, PACKED = "data", "zero", "free", "discarded", "gone", "compressed"
PLACE_CLUSTERS = 2
WINDOW_PLACES = 4
WINDOW_COUNT = 3
LAYOUT = (DATA, ZERO, DISCARDED, DATA, PACKED, DISCARDED, FREE, FREE, FREE, FREE, GONE, GONE)
"""The places of the three windows at the start."""
PREFERENCE = (3, 2, 1, 8, 6, 0, 9, 5, 4, 7, 10, 11)
"""The places in the order in which operations take them, before any was changed."""
START_SIZE = 2
"""Index into `disk_sizes`."""
IN_SNAPSHOT = (0, 4)
"""The places that the snapshot of the start has too; of the second one the first cluster is compressed."""
DIRTY_EVERY = 8
"""One free cluster in so many holds old bytes: each one recycled doubles the states of an interval."""


# What every sequence starts from


def windows_of(cluster_bytes: int) -> Windows:
    """Return three windows, each in the reach of an L2 table of its own."""
    window_bytes = WINDOW_PLACES * PLACE_CLUSTERS * cluster_bytes
    return Windows(WINDOW_COUNT, window_bytes, cluster_bytes * cluster_bytes // 8)


def disk_sizes(cluster_bytes: int) -> tuple[int, ...]:
    """Return the sizes between which the disk is resized, ascending.

    The smallest cuts a place of the first window, where possible within a cluster. The next two end in the
    second and in the third window. Each of the last two needs a larger L1 table than the one before.
    """
    stride_bytes = windows_of(cluster_bytes).stride_bytes
    l1_reach_bytes = cluster_bytes // 8 * stride_bytes
    return (
        7 * cluster_bytes - cluster_bytes // 2 // SECTOR_BYTES * SECTOR_BYTES,
        stride_bytes + cluster_bytes,
        2 * stride_bytes + 2 * PLACE_CLUSTERS * cluster_bytes,
        l1_reach_bytes + 2 * stride_bytes,
        2 * l1_reach_bytes + 2 * stride_bytes,
    )


@functools.cache
def start(cluster_bytes: int) -> Start:
    """Return a clean image with data, discarded clusters, and zero entries with and without a cluster.

    A snapshot shares some data and a compressed cluster with the disk. The third window has no L2 table yet.
    Some of the free clusters, and the end of the file, hold old bytes.
    """
    windows, size_bytes = windows_of(cluster_bytes), disk_sizes(cluster_bytes)[START_SIZE]
    place_bytes = PLACE_CLUSTERS * cluster_bytes
    device, expectation = (
        SimulatedDevice(),
        Expectation(windows, SectorModel(windows.model_bytes), (size_bytes,)),
    )
    session = Session(device, expectation)
    session.create(cluster_bytes, size_bytes)
    session.write(0, place_bytes)
    session.write_compressed(IN_SNAPSHOT[1] * place_bytes, cluster_bytes, noise=0)
    session.create_snapshot()
    for place, kind in enumerate(LAYOUT):
        if kind in (DATA, ZERO, DISCARDED) and place not in IN_SNAPSHOT:
            session.write(place * place_bytes, place_bytes)
    for place, kind in enumerate(LAYOUT):
        if kind == DISCARDED:
            session.discard(place * place_bytes, place_bytes)
        elif kind == ZERO:
            session.write_zeroes(place * place_bytes, cluster_bytes, unmap=False)
            session.write_zeroes(place * place_bytes + cluster_bytes, cluster_bytes, unmap=True)
    session.close()
    content = bytearray(device.content())
    for cluster in free_clusters(bytes(content))[::DIRTY_EVERY]:
        content[cluster * cluster_bytes : (cluster + 1) * cluster_bytes] = GARBAGE * cluster_bytes
    content += GARBAGE * (cluster_bytes + SECTOR_BYTES // 2)
    guest = expectation.sectors.current_content()
    return Start(windows, bytes(content), guest, size_bytes, snapshots=expectation.snapshots)


class Places:
    """The disk of a session as places of two clusters, the last changed one first."""

    def __init__(self, session: Session, cluster_bytes: int) -> None:
        """Start with the places as `start` left them."""
        self.session = session
        self.cluster_bytes = cluster_bytes
        self.place_bytes = PLACE_CLUSTERS * cluster_bytes
        self._order = list(PREFERENCE)
        self._discarded = {place for place, kind in enumerate(LAYOUT) if kind == DISCARDED}

    def pick(self, *kinds: str, besides: tuple[int, ...] = ()) -> int:
        """Return the position of the last changed place of one of these kinds.

        If there is none, it is of a kind other than data; if there is none of these either, data.
        ``besides`` are positions that were picked already.
        """
        there = [place for place in self._order if self.kind(place) != GONE]
        unpicked = [place for place in there if place * self.place_bytes not in besides] or there
        fitting = [place for place in unpicked if self.kind(place) in kinds]
        others = [place for place in unpicked if self.kind(place) != DATA]
        return (fitting or others or unpicked)[0] * self.place_bytes

    def kind(self, place: int) -> str:
        """Return the kind of a place, as its first cluster is."""
        windows, image = self.session.expectation.windows, self.session.live
        length = windows.clip(place * self.place_bytes, self.cluster_bytes, image.size)
        if not length:
            return GONE
        kind = next(image.extents(length, windows.guest(place * self.place_bytes))).kind
        if kind == "unallocated":
            return DISCARDED if place in self._discarded else FREE
        return kind

    def changed(self, *positions: int, discarded: bool = False) -> None:
        """These places were changed: what comes next takes them first."""
        for position in positions:
            place = position // self.place_bytes
            self._order.remove(place)
            self._order.insert(0, place)
            if discarded:
                self._discarded.add(place)


# Plain requests


def allocating_write(session: Session, places: Places) -> None:
    """Write one cluster and half of the next where nothing ever was."""
    position = places.pick(FREE)
    session.write(position, places.cluster_bytes + places.cluster_bytes // 2)
    places.changed(position)


def overwrite(session: Session, places: Places) -> None:
    """Overwrite data, two clusters."""
    position = places.pick(DATA)
    session.write(position, places.place_bytes)
    places.changed(position)


def sub_cluster_write(session: Session, places: Places) -> None:
    """Write less than a cluster, across the border of two, on whatever was changed last."""
    position = places.pick(DATA, PACKED, ZERO, FREE, DISCARDED)
    session.write(position + places.cluster_bytes - 200, 300)
    places.changed(position)


def write_over_discarded(session: Session, places: Places) -> None:
    """Write most of two clusters that were discarded."""
    position = places.pick(DISCARDED)
    session.write(position + 100, places.place_bytes - 200)
    places.changed(position)


def discard(session: Session, places: Places) -> None:
    """Discard data, compressed or not."""
    position = places.pick(DATA, PACKED)
    session.discard(position, places.place_bytes)
    places.changed(position, discarded=True)


def zeroes(session: Session, places: Places) -> None:
    """Zero two clusters of data: one is kept, unless it is compressed, the other one freed."""
    position = places.pick(DATA, PACKED)
    session.write_zeroes(position, places.cluster_bytes, unmap=False)
    session.write_zeroes(position + places.cluster_bytes, places.cluster_bytes, unmap=True)
    places.changed(position)


def compressed_write(session: Session, places: Places) -> None:
    """Write two clusters compressed where nothing is mapped: they share a host cluster."""
    position = places.pick(FREE, DISCARDED)
    session.write_compressed(position, places.place_bytes, noise=0)
    places.changed(position)


def overwrite_of_compressed(session: Session, places: Places) -> None:
    """Write to a part of a compressed cluster, and compress the one behind it anew."""
    position = places.pick(PACKED)
    session.write(position + 100, places.cluster_bytes // 2)
    session.write_compressed(position + places.cluster_bytes, places.cluster_bytes, noise=0)
    places.changed(position)


def flush(session: Session, places: Places) -> None:
    """Flush."""
    session.flush()


def checkpoint(session: Session, places: Places) -> None:
    """Bring everything home."""
    session.checkpoint()


def close_and_reopen(session: Session, places: Places) -> None:
    """Leave a clean image, and open it again."""
    session.close()
    session.open()


# The disk's size


def resize_up(session: Session, places: Places) -> None:
    """Grow to the next size."""
    sizes = disk_sizes(places.cluster_bytes)
    larger = [size for size in sizes if size > session.live.size] or [
        session.live.size + sizes[-1] - sizes[-2]
    ]
    session.resize(larger[0])


def resize_down(session: Session, places: Places) -> None:
    """Shrink to the next size; the smallest loses a cluster at a time."""
    smaller = [size for size in disk_sizes(places.cluster_bytes) if size < session.live.size]
    session.resize(smaller[-1] if smaller else session.live.size - places.cluster_bytes)


# Snapshots


def snapshot_create(session: Session, places: Places) -> None:
    """Make a snapshot."""
    session.create_snapshot()


def snapshot_apply(session: Session, places: Places) -> None:
    """Make the disk what the newest snapshot holds."""
    session.apply_snapshot(-1)


def snapshot_delete(session: Session, places: Places) -> None:
    """Give up the newest snapshot."""
    session.delete_snapshot(-1)


# Transactions


def change_much(draft: Draft, places: Places) -> tuple[int, ...]:
    """Overwrite data in part, write where nothing is, discard. Returns the positions."""
    data, free = places.pick(DATA), places.pick(FREE, DISCARDED)
    third = places.pick(ZERO, DATA, besides=(data, free))
    draft.write(data + 100, places.cluster_bytes)
    draft.write(free, places.place_bytes)
    draft.discard(third, places.place_bytes)
    return third, free, data


def transaction_commit(session: Session, places: Places) -> None:
    """Commit a transaction."""
    with session.transaction() as draft:
        positions = change_much(draft, places)
        draft.look()
    places.changed(*positions)


def transaction_rollback(session: Session, places: Places) -> None:
    """Roll a transaction back."""
    with session.transaction() as draft:
        positions = change_much(draft, places)
        draft.rollback()
    places.changed(*positions)


def savepoint_rollback(session: Session, places: Places) -> None:
    """Go back to a savepoint, change something else, and commit."""
    with session.transaction() as draft:
        data = places.pick(DATA)
        draft.write(data, places.cluster_bytes)
        savepoint = draft.savepoint()
        draft.write(data + 100, places.cluster_bytes)
        positions = change_much(draft, places)
        draft.return_to(savepoint)
        draft.look()
        draft.write(data + places.cluster_bytes - 200, 300)
        draft.write_zeroes(positions[1], places.place_bytes, unmap=True)
    places.changed(positions[1], data)


# Errors of the host


def failed_write(session: Session, places: Places) -> None:
    """A write of two clusters fails, where nothing is mapped: one sector is written before the error."""
    position = places.pick(FREE, DISCARDED)
    with failing_write(session, into_journal=False, applied_bytes=SECTOR_BYTES):
        session.write(position, places.place_bytes)
    places.changed(position)


def failed_append(session: Session, places: Places) -> None:
    """The flush of two writes fails in its append: all of the record is written before the error."""
    position = places.pick(FREE, DISCARDED)
    session.write(position, places.cluster_bytes)
    with failing_write(session, into_journal=True, applied_bytes=EVERYTHING):
        # Here, as a write may have to flush what was staged before.
        session.write(position + places.cluster_bytes, places.cluster_bytes)
        session.flush()
    places.changed(position)


@contextmanager
def failing_write(session: Session, *, into_journal: bool, applied_bytes: int) -> Iterator[None]:
    """Let the next write into the live journal fail, or the next one that is neither there nor to sector 0.

    The error ends the body. A journal that is laid meanwhile is written without one.
    """
    device, original = session.device, session.device.pwrite
    live = session.live.info().journal
    journals = [range(live.offset, live.offset + live.length)] if live else []
    armed = False

    def pwrite(buffer: ReadBuffer, offset: int) -> None:
        nonlocal armed
        if len(buffer) >= JOURNAL_BYTES:
            journals.append(range(offset, offset + len(buffer)))
        elif offset and not armed and into_journal == any(offset in extent for extent in journals):
            armed = True
            device.faults = FaultPlan(Fault(errno.EIO, call="pwrite", applied_bytes=applied_bytes))
        original(buffer, offset)

    seen = session.faults_seen
    vars(device)["pwrite"] = pwrite
    try:
        with session.faults(FaultPlan()):
            yield
    finally:
        del vars(device)["pwrite"]
    assert session.faults_seen == seen + 1, "no write failed, or nobody was told"


Operation = Callable[[Session, Places], None]
OPERATIONS: dict[str, Operation] = {
    "allocating-write": allocating_write,
    "overwrite": overwrite,
    "sub-cluster-write": sub_cluster_write,
    "write-over-discarded": write_over_discarded,
    "compressed-write": compressed_write,
    "overwrite-of-compressed": overwrite_of_compressed,
    "discard": discard,
    "zeroes": zeroes,
    "flush": flush,
    "transaction-commit": transaction_commit,
    "transaction-rollback": transaction_rollback,
    "savepoint-rollback": savepoint_rollback,
    "resize-up": resize_up,
    "resize-down": resize_down,
    "snapshot-create": snapshot_create,
    "snapshot-apply": snapshot_apply,
    "snapshot-delete": snapshot_delete,
    "checkpoint": checkpoint,
    "close-and-reopen": close_and_reopen,
    "failed-write": failed_write,
    "failed-append": failed_append,
}
