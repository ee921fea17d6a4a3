"""Stories of external data files without a power cut, some of them with threads."""

from __future__ import annotations

import errno
from contextlib import suppress
from itertools import product

from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.l2 import ZERO
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice, enumerate_states
from tests.crash.judge import require
from tests.support.beside import HeldUp
from tests.support.patients import Tables
from tests.support.users import beside, create_simulated, open_simulated

CLUSTER_BYTES = 4096
SIZE = 64 * CLUSTER_BYTES
DATA = b"\x33" * CLUSTER_BYTES
NEW = b"\x44" * CLUSTER_BYTES


def image_with_data(*, raw: bool = False) -> SimulatedDevice:
    """Return a closed image whose first guest cluster has data, in a data file."""
    device = SimulatedDevice()
    with create_simulated(device, SIZE, CLUSTER_BYTES, data_file="beside", data_file_raw=raw) as image:
        image.pwrite(DATA, 0)
    device.reopen()
    return device


def with_entry(device: SimulatedDevice, entry: int) -> SimulatedDevice:
    """Return the image with another L2 entry for its first guest cluster, and the same data file."""
    tables = Tables(device.content())
    tables.set_entry(tables.l2, entry)
    changed = SimulatedDevice(bytes(tables.image))
    changed.join(beside(device))
    return changed


def old_bytes_in_a_raw_file() -> None:
    """P1: old bytes where a raw file should have zeros do not show beside what is written."""
    device = with_entry(image_with_data(raw=True), ZERO)
    with open_simulated(device) as image:
        image.pwrite(b"new", 700)
        expected = bytes(700) + b"new" + bytes(CLUSTER_BYTES - 703)
        require(image.pread(CLUSTER_BYTES, 0) == expected, "P1: a write of three bytes changed others")
    require(beside(device).content()[:CLUSTER_BYTES] == expected, "P1: a raw data file shows the disk")


def transaction_over_a_data_file() -> None:
    """P3: a transaction that is given up leaves the disk as it was, in a data file too."""
    for step in ("overwrite", "discard, write", "smaller, larger"):
        device = image_with_data()
        with open_simulated(device) as image:
            with suppress(UnsupportedFeatureError), image.transaction() as transaction:
                if step == "smaller, larger":
                    transaction.resize(512)
                    transaction.resize(SIZE)
                if step == "discard, write":
                    transaction.discard(CLUSTER_BYTES, 0)
                transaction.pwrite(b"new", 0)
                transaction.rollback()
            require(image.pread(CLUSTER_BYTES, 0) == DATA, "P3: a transaction was given up", step)


def grown_again_in_a_transaction() -> None:
    """P3: a disk that shrinks and grows in a transaction that is given up has lost nothing."""
    last = SIZE - CLUSTER_BYTES
    for raw, within in product((False, True), (0, 512)):
        case = f"raw {raw}, within a cluster {within}"
        device = image_with_data(raw=raw)
        with open_simulated(device) as image:
            image.pwrite(DATA, last)
            with suppress(UnsupportedFeatureError), image.transaction() as transaction:
                transaction.resize(last + within)
                transaction.resize(SIZE + CLUSTER_BYTES)
                transaction.rollback()
            require(image.pread(CLUSTER_BYTES, last) == DATA, "P3: a transaction was given up", case)
            with suppress(UnsupportedFeatureError), image.transaction() as transaction:
                transaction.resize(SIZE + CLUSTER_BYTES)
                transaction.pwrite(DATA, SIZE)
                savepoint = transaction.savepoint()
                try:
                    transaction.resize(SIZE)
                    transaction.resize(SIZE + CLUSTER_BYTES)
                finally:
                    savepoint.rollback()
                    found = transaction.pread(CLUSTER_BYTES, SIZE)
                    require(found == DATA, "P3: a savepoint keeps what was written", case)


def raw_file_of_a_size_given_up() -> None:
    """P3: a raw file is as long as its disk, and long enough for a record that comes back to life."""
    device = image_with_data(raw=True)
    image = open_simulated(device)
    with image.transaction() as transaction:
        transaction.resize(2 * SIZE)
        transaction.rollback()
    require(beside(device).size() == SIZE, "P3: a growth that was given up is over in a raw file too")
    with image.transaction() as transaction:
        savepoint = transaction.savepoint()
        transaction.resize(2 * SIZE)
        savepoint.rollback()
        transaction.bitmaps.add("one", 4096)
    require(beside(device).size() == SIZE, "P3: a savepoint's growth is over in a raw file too")
    device.faults = FaultPlan(
        Fault(errno.EIO, call="barrier", barrier_name="flush.record", applied_bytes=EVERYTHING)
    )
    with suppress(OSError), image.transaction() as transaction:
        transaction.resize(2 * SIZE)
    with suppress(OSError), image.transaction() as transaction:
        transaction.resize(3 * SIZE)
        transaction.rollback()
    for state in enumerate_states(device, budget=64):
        found = open_simulated(device.crash(state))
        content = found.pread(found.size, 0)
        require(content.rstrip(b"\0") == DATA, "P1: a larger disk is there whole")


def data_file_out_of_order() -> None:
    """P1: a write must not land on another guest cluster, which lies where this one would."""
    device = with_entry(image_with_data(), CLUSTER_BYTES | COPIED)
    beside(device).pwrite(DATA, CLUSTER_BYTES)
    with open_simulated(device) as image:
        require(image.pread(CLUSTER_BYTES, 0) == DATA, "P1: data elsewhere in the data file is read")
        with suppress(UnsupportedFeatureError):
            image.pwrite(b"new", CLUSTER_BYTES)
        require(image.pread(CLUSTER_BYTES, 0) == DATA, "P1: a write changed another cluster")


def written_where_a_discard_was() -> None:
    """P1: what is discarded and written again, in one record or in two, is not given back to the host."""
    device = image_with_data()
    with open_simulated(device) as image:
        for flushes in (False, True):
            image.discard(CLUSTER_BYTES, 0)
            held_up = HeldUp(beside(device), lambda: image.pread(512, CLUSTER_BYTES), call="pread")
            if flushes:
                image.pwrite(DATA, CLUSTER_BYTES)
                with held_up:
                    image.flush()
                    image.pwrite(NEW, 0)
                    image.flush()
            else:
                image.pwrite(NEW, 0)
            image.flush()
            require(image.pread(CLUSTER_BYTES, 0) == NEW, "P1: what was flushed", flushes)
            image.pwrite(b"more", 8 * CLUSTER_BYTES)
            image.flush()
            require(image.pread(CLUSTER_BYTES, 0) == NEW, "P1: what was flushed before", flushes)


class _Below:
    size = SIZE

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = NEW[:1] * len(buffer)

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        return False

    def close(self) -> None:
        """There is nothing to release."""


def read_beside_a_commit() -> None:
    """P1: a read is held up while a transaction gives up its cluster, under which a backing file shows."""
    device = image_with_data()
    with open_simulated(device) as image, image.transaction() as transaction:
        transaction.set_backing_file("below", "raw")
    image = open_simulated(device, backing=lambda _: _Below())
    found: list[bytes] = []
    with HeldUp(beside(device), lambda: found.append(image.pread(CLUSTER_BYTES, 0)), call="pread"):
        with image.transaction() as transaction:
            transaction.make_empty()
        image.pwrite(b"more", 8 * CLUSTER_BYTES)
        image.flush()
    require(found[0] in (DATA, NEW), "P1: a read shows what no disk was", found[0][:1])
    require(image.pread(CLUSTER_BYTES, 0) == NEW, "P1: what lies below an empty image")
    image.close()


def written_while_it_is_punched() -> None:
    """P1: a cluster is written while its place is being given back."""
    device = image_with_data()
    with open_simulated(device) as image:
        image.discard(CLUSTER_BYTES, 0)
        with HeldUp(beside(device), image.flush, call="punch") as others:
            others.run(lambda: image.pwrite(NEW, 0))
        require(image.pread(CLUSTER_BYTES, 0) == NEW, "P1: a write that completed")
