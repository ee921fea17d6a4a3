"""Damaged images of which the truth is known: what salvage calls certain must be right.

The promise in all of them: no byte that is called certain is another one than the guest's.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from random import Random

from jqcow.offline.salvaging.parts import Parts
from jqcow.offline.salvaging.patient import patient_on
from jqcow.salvage.evidence import Certainty
from jqcow.testing import SimulatedDevice
from tests.crash.judge import require
from tests.support.patients import Tables
from tests.support.users import create_simulated, open_simulated

CLUSTER_BYTES = 4096
DISK_BYTES = 4 << 20
SECTOR_BYTES = 512
SUBCLUSTER_CLUSTER_BYTES = 16384
"""The smallest clusters that may have subclusters."""


class Failing:
    """A file of which some bytes cannot be read."""

    def __init__(self, content: bytes, bad: range = range(0)) -> None:
        self._content, self._bad = content, bad

    def size(self) -> int:
        return len(self._content)

    def pread(self, length: int, offset: int) -> bytes:
        if max(offset, self._bad.start) < min(offset + length, self._bad.stop):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._content[offset : offset + length].ljust(length, b"\0")


def made(cluster_bytes: int = CLUSTER_BYTES, every: int = 2) -> tuple[bytes, bytes]:
    """Return an image of which every second cluster holds data, or so, and its disk."""
    device, drawn = SimulatedDevice(), Random(5)
    with create_simulated(device, DISK_BYTES, cluster_bytes) as image:
        for start in range(0, DISK_BYTES, every * cluster_bytes):
            image.pwrite(drawn.randbytes(cluster_bytes), start)
        disk = image.pread(DISK_BYTES, 0)
    return device.content(), disk


def require_truth(content: bytes, disk: bytes, bad: range = range(0)) -> None:
    """Salvage a file, and hold what is certain against the disk."""
    found = patient_on(Failing(content, bad), "", (0, 0)).survey()
    found.place()
    certain = 0
    for part in Parts(found, found.reader(), Certainty.GUESS).from_offset(0):
        if part.certainty == Certainty.CERTAIN:
            shown = part.content or bytes(part.length)
            require(shown == disk[part.offset : part.end], "EV1: what is certain is right", part.offset)
            certain += part.length
    require(certain, "EV1: something is certain")


def sectors_of_zeros_in_tables() -> None:
    """GM1: what a wiped part of a table says is not certain as long as there is data without a place."""
    content, disk = made()
    tables = Tables(content)
    tables.image[tables.l2 + SECTOR_BYTES : tables.l2 + 2 * SECTOR_BYTES] = bytes(SECTOR_BYTES)
    require_truth(bytes(tables.image), disk)


def one_cluster_for_two() -> None:
    """GM2: a cluster that two guest clusters have is certain in neither."""
    content, disk = made()
    tables = Tables(content)
    tables.set_entry(tables.l2, tables.entry(tables.l2 + 16))
    require_truth(bytes(tables.image), disk)


def end_that_is_cut_off() -> None:
    """TB2: what lies behind the end of the file is lost, and not zeros."""
    content, disk = made()
    tables = Tables(content)
    last = max(tables.entry(tables.l2 + place) & (1 << 56) - SECTOR_BYTES for place in range(0, 4096, 8))
    tables.set_entry(tables.l2, len(content) + CLUSTER_BYTES | 1 << 63)
    require(last < len(content), "the file has its data")
    require_truth(bytes(tables.image), disk)


def end_behind_an_odd_entry() -> None:
    """HD1: one entry that cannot be tells nothing of all others, which could be pairs as well."""
    content, disk = made(SUBCLUSTER_CLUSTER_BYTES, 1)
    tables = Tables(content)
    tables.set_entry(tables.l2 + 8, len(content) + SUBCLUSTER_CLUSTER_BYTES | 1 << 63)
    require_truth(bytes(tables.image), disk)


def sectors_that_the_host_cannot_read() -> None:
    """RD1: what cannot be read is lost, and not zeros."""
    content, disk = made()
    tables = Tables(content)
    place = tables.entry(tables.l2) & (1 << 56) - SECTOR_BYTES
    require_truth(content, disk, range(place + SECTOR_BYTES, place + 2 * SECTOR_BYTES))


def data_of_a_snapshot() -> None:
    """SV1: what a snapshot names is no orphan."""
    device = SimulatedDevice()
    with create_simulated(device, DISK_BYTES, CLUSTER_BYTES) as image:
        image.pwrite(b"old" * 5000, 0)
        image.create_snapshot("before")
        image.pwrite(b"new" * 5000, 0)
    found = patient_on(Failing(device.content()), "", (0, 0)).survey()
    require(not len(found.unnamed.bits), "SV1: data of a snapshot has a name", list(found.unnamed.bits))


def journal_that_is_lost() -> None:
    """SV2: tables that may be older than the data make nothing certain."""
    device = SimulatedDevice()
    with create_simulated(device, DISK_BYTES, CLUSTER_BYTES) as image:
        image.pwrite(b"old" * 5000, 0)
    image = open_simulated(device)
    image.pwrite(b"new" * 5000, 1 << 20)
    image.flush()
    content = bytearray(device.durable_content())
    root = content.find(b"jqcowFRM")
    require(root > 0, "there is a frame")
    while root >= 0:
        content[root : root + SECTOR_BYTES] = bytes(SECTOR_BYTES)
        root = content.find(b"jqcowFRM")
    found = patient_on(Failing(bytes(content)), "", (0, 0)).survey()
    found.place()
    parts = Parts(found, found.reader(), Certainty.GUESS).from_offset(0)
    certain = [part.offset for part in parts if part.certainty == Certainty.CERTAIN]
    require(not certain, "SV2: nothing is certain without the journal", certain)


CERTAIN_SCENARIOS: tuple[Callable[[], None], ...] = (
    sectors_of_zeros_in_tables,
    one_cluster_for_two,
    end_that_is_cut_off,
    end_behind_an_odd_entry,
    sectors_that_the_host_cannot_read,
    data_of_a_snapshot,
    journal_that_is_lost,
)
