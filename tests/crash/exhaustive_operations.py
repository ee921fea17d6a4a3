"""The operations of the exhaustive search, by name, and the image that they work on.

An operation works on the place that was changed last, of those that it can do something to. So the
operations of a short sequence meet in the same clusters: what one wrote the next one overwrites, frees, cuts
off or takes back. To add an operation, name it in `OPERATIONS`: by its steps, or by a function.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random

from jqcow.device.base import ReadBuffer
from jqcow.testing import EVERYTHING, SECTOR_BYTES, Fault, FaultPlan
from tests.crash.amended import amend_to
from tests.support.expectation import Windows
from tests.support.inside import header_of
from tests.support.patients import Tables
from tests.support.player import Player
from tests.support.starts import GARBAGE, Start, played
from tests.support.users import JOURNAL_BYTES, Session

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
    steps = ["write:0:2c", f"packed:{2 * IN_SNAPSHOT[1]}c:c:0", "snapshot"]
    steps += [
        f"write:{2 * place}c:2c"
        for place, kind in enumerate(LAYOUT)
        if kind in (DATA, ZERO, DISCARDED) and place not in IN_SNAPSHOT
    ]
    emptying = {DISCARDED: "discard:{0}c:2c", ZERO: "zeroes:{0}c:c unmap:{0}c+c:c"}
    steps += [emptying[kind].format(2 * place) for place, kind in enumerate(LAYOUT) if kind in emptying]
    size_bytes = disk_sizes(cluster_bytes)[START_SIZE]
    made = played(" ".join(steps), windows_of(cluster_bytes), Random(0), size_bytes)
    content = bytearray(made.content)
    for cluster in Tables(made.content).free_clusters()[::DIRTY_EVERY]:
        content[cluster * cluster_bytes : (cluster + 1) * cluster_bytes] = GARBAGE * cluster_bytes
    content += GARBAGE * (cluster_bytes + SECTOR_BYTES // 2)
    return replace(made, content=bytes(content))


class Places:
    """The disk of a session as places of two clusters, the last changed one first."""

    def __init__(self, session: Session) -> None:
        """Start with the places as `start` left them."""
        self.player = Player(session, Random(0))
        self.cluster_bytes = self.player.cluster_bytes
        self.place_bytes = PLACE_CLUSTERS * self.cluster_bytes
        self._order = list(PREFERENCE)
        self._discarded = {place for place, kind in enumerate(LAYOUT) if kind == DISCARDED}

    @property
    def session(self) -> Session:
        """Whose disk it is."""
        return self.player.session

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
        windows, image = self.session.windows, self.session.live
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


# The operations


@dataclass(frozen=True)
class At:
    """Steps at the place of one of some kinds that was changed last; its position is ``@`` in them."""

    kinds: tuple[str, ...]
    steps: str

    def __call__(self, places: Places) -> None:
        position = places.pick(*self.kinds)
        places.player.play(self.steps.replace("@", str(position)))
        places.changed(position, discarded=self.steps.startswith("discard"))


def steps(text: str) -> Callable[[Places], None]:
    """Return an operation that has no place."""
    return lambda places: places.player.play(text)


def resize_up(places: Places) -> None:
    """Grow to the next size."""
    sizes, size = disk_sizes(places.cluster_bytes), places.session.live.size
    places.session.resize(next((larger for larger in sizes if larger > size), size + sizes[-1] - sizes[-2]))


def resize_down(places: Places) -> None:
    """Shrink to the next size; the smallest loses a cluster at a time."""
    size = places.session.live.size
    smaller = [smaller for smaller in disk_sizes(places.cluster_bytes) if smaller < size]
    places.session.resize(smaller[-1] if smaller else size - places.cluster_bytes)


def preallocated_growth(places: Places) -> None:
    """Grow by two clusters that have their place in the file."""
    places.session.preallocate(places.session.live.size + 2 * places.cluster_bytes, "metadata")


def amend_width(places: Places) -> None:
    """Give the refcounts another width, 16 bits or 32."""
    is_16 = header_of(places.session.live).header.refcount_order == 4
    amend_to(places.player, {"compat": "1.1", "refcount_bits": 32 if is_16 else 16})
    places.player.play("open")


def amend_version(places: Places) -> None:
    """Go to version 2, or come back."""
    is_3 = header_of(places.session.live).header.version == 3
    amend_to(places.player, {"compat": "0.10", "refcount_bits": 16} if is_3 else {"compat": "1.1"})
    places.player.play("open")


def change_much(places: Places) -> tuple[int, int, int]:
    """Overwrite data in part, write where nothing is, discard. Returns the positions."""
    data, free = places.pick(DATA), places.pick(FREE, DISCARDED)
    third = places.pick(ZERO, DATA, besides=(data, free))
    places.player.play(f"write:{data}+100:c write:{free}:2c discard:{third}:2c")
    return third, free, data


def transaction(end: str) -> Callable[[Places], None]:
    """Return a transaction that ends so."""

    def transact(places: Places) -> None:
        places.player.play("begin")
        positions = change_much(places)
        places.player.play(end)
        places.changed(*positions)

    return transact


def savepoint_rollback(places: Places) -> None:
    """Go back to a savepoint, change something else, and commit."""
    places.player.play("begin")
    data = places.pick(DATA)
    places.player.play(f"write:{data}:c savepoint write:{data}+100:c")
    _, free, _ = change_much(places)
    places.player.play(f"return:0 look write:{data}+c-200:300 unmap:{free}:2c commit")
    places.changed(free, data)


def failed_write(places: Places) -> None:
    """A write of two clusters fails, where nothing is mapped: one sector is written before the error."""
    position = places.pick(FREE, DISCARDED)
    with failing_write(places.session, into_journal=False, applied_bytes=SECTOR_BYTES):
        places.player.play(f"write:{position}:2c")
    places.changed(position)


def failed_append(places: Places) -> None:
    """The flush of two writes fails in its append: all of the record is written before the error."""
    position = places.pick(FREE, DISCARDED)
    places.player.play(f"write:{position}:c")
    with failing_write(places.session, into_journal=True, applied_bytes=EVERYTHING):
        # Here, as a write may have to flush what was staged before.
        places.player.play(f"write:{position}+c:c flush")
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


OPERATIONS: dict[str, Callable[[Places], None]] = {
    # Where nothing ever was; two clusters of data; across a border, whatever is there; most of two clusters.
    "allocating-write": At((FREE,), "write:@:c+c/2"),
    "overwrite": At((DATA,), "write:@:2c"),
    "sub-cluster-write": At((DATA, PACKED, ZERO, FREE, DISCARDED), "write:@+c-200:300"),
    "write-over-discarded": At((DISCARDED,), "write:@+100:2c-200"),
    # The two clusters share a host cluster; later a part of one is overwritten, the other compressed anew.
    "compressed-write": At((FREE, DISCARDED), "packed:@:2c:0"),
    "overwrite-of-compressed": At((PACKED,), "write:@+100:c/2 packed:@+c:c:0"),
    "discard": At((DATA, PACKED), "discard:@:2c"),
    # One cluster is kept, unless it is compressed, the other one freed.
    "zeroes": At((DATA, PACKED), "zeroes:@:c unmap:@+c:c"),
    "flush": steps("flush"),
    "transaction-commit": transaction("look commit"),
    "transaction-rollback": transaction("rollback"),
    "savepoint-rollback": savepoint_rollback,
    "resize-up": resize_up,
    "resize-down": resize_down,
    "snapshot-create": steps("snapshot:9"),
    "snapshot-apply": steps("apply:-1"),
    "snapshot-delete": steps("delete:-1"),
    "checkpoint": steps("checkpoint"),
    "close-and-reopen": steps("close open"),
    "failed-write": failed_write,
    "failed-append": failed_append,
    "bitmap-add": steps("bitmap:2"),
    "bitmap-clear": steps("clear:0"),
    "bitmap-remove": steps("remove:0"),
    "preallocated-growth": preallocated_growth,
    "amend-width": amend_width,
    "amend-version": amend_version,
}
