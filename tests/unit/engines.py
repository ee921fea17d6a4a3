"""Images and engines on simulated devices, as the unit tests of the engine's modules need them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import jqcow
from jqcow.checker.check import CheckReport, check_structure
from jqcow.disks.making import write_blank
from jqcow.disks.view import FileView
from jqcow.engine.clusters import Run
from jqcow.engine.engine import Engine, make_writable, open_engine
from jqcow.engine.medium import Medium
from jqcow.engine.tables import Tables
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import EXTENSION_BITMAPS
from jqcow.ondisk.l2 import data_entry
from jqcow.ondisk.layout import ClusterIndex, GuestCluster
from jqcow.testing import SimulatedDevice

MIB = 1 << 20
CLUSTER = 4096
JOURNAL = 1 << 16
OLD = random.Random(1).randbytes(8 * CLUSTER)
"""What `written_image` has at its start."""

SECTOR = 512
PER_BLOCK = SECTOR * 8 // 16
"""Clusters that one refcount block counts, with clusters of 512 bytes."""


class Below:
    """A disk in memory; ``closed`` counts how often it was closed."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.closed = 0

    @property
    def size(self) -> int:
        return len(self.content)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        assert offset + len(buffer) <= self.size, "read past the end of the backing disk"
        buffer[:] = self.content[offset : offset + len(buffer)]

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        assert offset + length <= self.size, "asked past the end of the backing disk"
        return not any(self.content[offset : offset + length])

    def close(self) -> None:
        self.closed += 1


def overlay(name: str = "base.raw") -> SimulatedDevice:
    """Return a device with an empty image of 1 MiB that names a backing file."""
    device = SimulatedDevice()
    with (
        jqcow.create_on_device(device, MIB, cluster_size=CLUSTER) as image,
        image.transaction() as transaction,
    ):
        transaction.set_backing_file(name, "raw")
    device.reopen()
    return device


def barriers(device: SimulatedDevice) -> list[str]:
    """Return the names of the barriers from here on."""
    names: list[str] = []
    device.barrier_listeners.append(lambda name, _: names.append(name))
    return names


@contextmanager
def written_image(device: SimulatedDevice) -> Iterator[jqcow.Image]:
    """Open a new image of 1 MiB whose first clusters hold `OLD`, durably; its end meets no fault."""
    with jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=2 * JOURNAL) as image:
        image.pwrite(OLD, 0)
        image.flush()
        yield image
        device.faults = None


def reopened(device: SimulatedDevice) -> jqcow.Image:
    """Open the image on a device again, for writing, after a close or a crash."""
    device.reopen()
    return jqcow.open_device(device, "r+", journal_size=JOURNAL)


def flags_place(content: bytes) -> int:
    """Return where the flags of an image's first bitmap are."""
    at = content.index(struct.pack(">II", EXTENSION_BITMAPS, 24))
    offset: int = struct.unpack_from(">Q", content, at + 24)[0]
    return offset + 12


def admit(change: bool) -> None:
    """Let every request of a guest in: the image's part of that is not here."""


def engine_on(device: SimulatedDevice) -> Engine:
    """Open the image on a device for writing, and let it go live: operations may follow."""
    opened = open_engine(Medium(device), writable=True, journal_bytes=JOURNAL)
    make_writable(opened)
    opened.engine.lifecycle.go_live(lambda: None)
    return opened.engine


def new_engine(size: int = MIB, *, cluster_bytes: int = SECTOR, refcount_order: int = 4) -> Engine:
    """Return the live engine of a new image on a new device. Small clusters: tables fill up soon."""
    device = SimulatedDevice()
    cluster_bits = cluster_bytes.bit_length() - 1
    write_blank(device, blank_image(size, Form(cluster_bits, refcount_order)))
    return engine_on(device)


@contextmanager
def changing(engine: Engine) -> Iterator[Tables]:
    """Make the changes inside in one operation of the public tables."""
    with engine.medium.lock, engine.public.operation():
        yield engine.public


def device_of(engine: Engine) -> SimulatedDevice:
    """Return the device below an engine."""
    device = engine.medium.device
    assert isinstance(device, SimulatedDevice)
    return device


def take_data(engine: Engine, count: int = 1) -> Run:
    """Take data clusters in a row at the end of the file, and give them refcount 1."""
    with changing(engine) as tables:
        run = engine.space.take_at_frontier(count)
        tables.refcounts.count_in(run)
    return run


def counts(engine: Engine, run: Run) -> list[int]:
    """Return the refcounts of clusters in a row."""
    return [engine.public.refcounts.get(ClusterIndex(run.start + at)) for at in range(run.count)]


def map_one(tables: Tables, guest: int = 0) -> ClusterIndex:
    """Map a guest cluster to a new host cluster, and return that."""
    run = tables.refcounts.take(1)
    tables.refcounts.count_in(run)
    host = tables.geometry.offset_of(run.start)
    tables.mapping.set_entries(GuestCluster(guest), [data_entry(host)])
    return run.start


def flush(engine: Engine) -> None:
    """Make what is staged durable."""
    engine.commits.flush(lambda: None)


def check(engine: Engine, tables: Tables | None = None) -> CheckReport:
    """Check refcounts and tables as the public sees them, or a transaction: what is staged included."""
    view, journal = (tables or engine.public).view, engine.log.journal
    extent = None if journal is None else journal.extent
    file = FileView(engine.medium.device, view.area, view.newest(), journal=extent)
    return check_structure(file.read, file.size(), reserved=file.reserved)
