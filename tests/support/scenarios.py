"""Stories without a power cut, for promises that hostile or unusual images put to the test.

Each raises PromiseBroken if the promise does not hold.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from threading import Event, Thread, current_thread

import jqcow
from jqcow.errors import JqcowError
from jqcow.offline.commit import copy_into, raw_base
from jqcow.ondisk.header import Header
from jqcow.testing import Fault, FaultPlan, SimulatedDevice, enumerate_states
from tests.support.expectation import SECTOR_BYTES, Windows
from tests.support.judge import Judge, PromiseBroken, require
from tests.support.player import Player
from tests.support.starts import new_session
from tests.support.users import JOURNAL_BYTES, open_simulated

CLUSTER_BYTES = 4096
COPIED = 1 << 63


@dataclass
class Crafted:
    """A closed image of three data clusters, whose tables are then changed by hand."""

    content: bytearray
    header: Header
    l2_table: int

    @classmethod
    def new(cls, *, empty_snapshot: bool = False, snapshot: bool = False) -> Crafted:
        """Return an image with guest clusters 0 to 2 allocated, and a snapshot from before or after that."""
        device = SimulatedDevice()
        image = jqcow.create_on_device(
            device, 1 << 20, cluster_size=CLUSTER_BYTES, journal_size=JOURNAL_BYTES
        )
        if empty_snapshot:
            image.create_snapshot("empty")
        image.pwrite(b"\x33" * (3 * CLUSTER_BYTES), 0)
        if snapshot:
            image.create_snapshot("kept")
        image.close()
        content = bytearray(device.content())
        header = Header.unpack(bytes(content[:512]))
        entry = int.from_bytes(content[header.l1_table_offset :][:8], "big")
        return cls(content, header, entry & ~COPIED)

    def entry(self, guest_cluster: int) -> int:
        """Return an L2 entry."""
        place = self.l2_table + 8 * guest_cluster
        return int.from_bytes(self.content[place : place + 8], "big")

    def set_entry(self, guest_cluster: int, value: int) -> None:
        """Change an L2 entry."""
        place = self.l2_table + 8 * guest_cluster
        self.content[place : place + 8] = value.to_bytes(8, "big")

    def set_refcount(self, host_offset: int, value: int) -> None:
        """Change the refcount of a host cluster (they are all in the first block)."""
        place = self.header.refcount_table_offset
        block = int.from_bytes(self.content[place : place + 8], "big")
        place = block + host_offset // CLUSTER_BYTES * 2
        self.content[place : place + 2] = value.to_bytes(2, "big")

    def device(self) -> SimulatedDevice:
        """Return a device that holds the image."""
        return SimulatedDevice(bytes(self.content))

    def open(self) -> jqcow.Image:
        """Open the image for writing."""
        return open_simulated(self.device())


def _must_refuse(promise: str, action: Callable[[], object]) -> None:
    try:
        action()
    except JqcowError:
        return
    raise PromiseBroken(promise)


def unaligned_entry() -> None:
    """P6: an entry into the middle of a cluster is refused, not read."""
    crafted = Crafted.new()
    crafted.set_entry(1, crafted.entry(1) + 512)
    image = crafted.open()
    _must_refuse("P6: another cluster's bytes were read", lambda: image.pread(512, CLUSTER_BYTES))


def entry_into_metadata() -> None:
    """P6: a guest write must not land on the L1 table that an entry leads to."""
    crafted = Crafted.new()
    crafted.set_entry(1, crafted.header.l1_table_offset | COPIED)
    image = crafted.open()
    _must_refuse("P6: a guest write destroyed the L1 table", lambda: image.pwrite(b"x" * 512, CLUSTER_BYTES))


def two_owners() -> None:
    """P1: two guest clusters have one host cluster, and both are written: each is old or new after a crash.

    The first write leaves the host cluster to the other one, but not durably.
    """
    crafted = Crafted.new(empty_snapshot=True)
    shared, given_up = crafted.entry(0) & ~COPIED, crafted.entry(1) & ~COPIED
    for guest_cluster in (0, 1):
        crafted.set_entry(guest_cluster, shared)
    crafted.set_refcount(shared, 2)
    crafted.set_refcount(given_up, 0)
    device = crafted.device()
    image = open_simulated(device)
    for guest_cluster in (0, 1):
        image.pwrite(bytes([0x44 + guest_cluster]) * SECTOR_BYTES, guest_cluster * CLUSTER_BYTES)
    for state in enumerate_states(device, budget=64):
        with open_simulated(device.crash(state)) as crashed:
            for guest_cluster in (0, 1):
                found = crashed.pread(1, guest_cluster * CLUSTER_BYTES)[0]
                require(found in (0x33, 0x44 + guest_cluster), "P1: another guest cluster changed", found)


def stale_copied_flag() -> None:
    """P1: a flag says that a cluster belongs to the disk alone, and the refcount that a snapshot has it too.

    So another program leaves it that is cut off between the two.
    """
    crafted = Crafted.new(snapshot=True)
    crafted.set_entry(0, crafted.entry(0) | COPIED)
    device = crafted.device()
    with open_simulated(device) as image:
        image.pwrite(b"\x44" * SECTOR_BYTES, 0)
    with open_simulated(device, "r", snapshot="kept") as kept:
        require(kept.pread(CLUSTER_BYTES, 0) == b"\x33" * CLUSTER_BYTES, "P1: the snapshot changed")


def checkpoint_on_full_disk() -> None:
    """P5: what was accepted before the disk was full can be brought home while it is."""
    session = new_session(Windows.of(CLUSTER_BYTES))
    Player(session, Random(0)).play("write:0:c write:w:c write:2w:c write:3w:c")
    session.device.faults = FaultPlan(full_from=1)
    try:
        session.checkpoint()
    except OSError as error:
        require(error.errno != errno.ENOSPC, "P5: the checkpoint found the disk full")
        raise
    session.look()


def checkpoint_while_flushing() -> None:
    """P1: what a flush acknowledged is there, whatever others ask for while it waits for the device."""
    session = new_session(Windows.of(CLUSTER_BYTES))
    device, expectation = session.device, session.expectation
    session.write(0, CLUSTER_BYTES)
    session.flush()
    acknowledged = Event()
    other = Thread(target=session.live.checkpoint)
    original = device.barrier

    def barrier(name: str) -> None:
        if current_thread() is other:
            acknowledged.wait()
            original(name)
            return
        original(name)
        if name == "flush.record" and other.ident is None:
            other.start()
            # It should wait for the flush; one that does not needs only a moment to do harm.
            other.join(timeout=0.2)

    session.write(CLUSTER_BYTES, CLUSTER_BYTES)
    vars(device)["barrier"] = barrier
    session.flush()
    try:
        for state in enumerate_states(device, budget=64):
            Judge()(device.crash(state), expectation.copy(), state)
    finally:
        acknowledged.set()
        other.join()
    session.close()


def flush_beside_a_failed_barrier() -> None:
    """P1: of two barriers that overlap one fails; the host tells that to one of them alone."""
    session = new_session(Windows.of(CLUSTER_BYTES))
    device, expectation = session.device, session.expectation
    Player(session, Random(0)).play("write:0:c close open write:0:s")
    started, go_on = Event(), Event()

    def wait() -> None:
        started.set()
        go_on.wait()

    delayed, failing = (
        Fault.delay(wait, barrier_name="flush.data"),
        Fault(errno.EIO, barrier_name="root.settle"),
    )
    device.faults = FaultPlan(delayed, failing)
    flush = Thread(target=session.flush)
    flush.start()
    started.wait()

    def go_live() -> None:
        with suppress(OSError):
            session.live.pwrite(b"x" * SECTOR_BYTES, CLUSTER_BYTES)

    other = Thread(target=go_live)
    other.start()
    # It should wait for the flush; one that does not needs only a moment to do harm.
    other.join(timeout=0.2)
    go_on.set()
    flush.join()
    other.join()
    # The session took part in the flush: where it returned, its sectors have one version.
    crashed = open_simulated(SimulatedDevice(device.durable_content()))
    require(not expectation.check(crashed), "P1: a flush was acknowledged", expectation.check(crashed)[:1])


def commit_into_a_raw_base(drop_barriers: tuple[str, ...]) -> None:
    """The overlay is emptied when the base has all of it, durably: a power cut then takes nothing away."""
    base = SimulatedDevice(bytes(1 << 20))
    base.drop_barriers = set(drop_barriers)
    top = SimulatedDevice()
    image = jqcow.create_on_device(top, 1 << 20, cluster_size=CLUSTER_BYTES, journal_size=JOURNAL_BYTES)
    image.pwrite(b"\x44" * 10_000, 5000)
    with raw_base(base) as raw:
        copy_into(image, raw)
    with image.transaction() as transaction:
        transaction.make_empty()
    found = base.durable_content()
    require(found[5000:15_000] == b"\x44" * 10_000, "P1: what the overlay had", "not durable in the base")


DROPPING_SCENARIOS: dict[str, Callable[[tuple[str, ...]], None]] = {"commit": commit_into_a_raw_base}
"""Those that show the need of a barrier: they are told which ones do nothing."""

SCENARIOS: dict[str, Callable[[], None]] = {
    "unaligned-entry": unaligned_entry,
    "entry-into-metadata": entry_into_metadata,
    "two-owners": two_owners,
    "stale-copied-flag": stale_copied_flag,
    "checkpoint-on-full-disk": checkpoint_on_full_disk,
    "checkpoint-while-flushing": checkpoint_while_flushing,
    "flush-beside-a-failed-barrier": flush_beside_a_failed_barrier,
}
