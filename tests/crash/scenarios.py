"""Stories without a power cut, for promises that hostile or unusual images put to the test, or threads.

Each raises PromiseBroken if the promise does not hold.
"""

from __future__ import annotations

import errno
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from threading import Event
from types import FrameType

import jqcow
from jqcow.checker.check import Kind
from jqcow.device.trial import TrialDevice
from jqcow.disks.undo import mark_done, pack_undo, take_back_cut_off, undo_on
from jqcow.engine.scan import read_root_copy
from jqcow.errors import CorruptionError, FormatError, JqcowError, PoisonedError
from jqcow.offline.commit import copy_into, raw_base
from jqcow.offline.recover import recover_image
from jqcow.offline.undo import undo_repair
from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.header import INCOMPATIBLE_DIRTY, MAGIC
from jqcow.ondisk.root import is_live
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SimulatedDevice, enumerate_states
from tests.crash.anchored import ANCHORED_SCENARIOS
from tests.crash.beside import (
    data_file_out_of_order,
    grown_again_in_a_transaction,
    old_bytes_in_a_raw_file,
    raw_file_of_a_size_given_up,
    read_beside_a_commit,
    transaction_over_a_data_file,
    written_where_a_discard_was,
    written_while_it_is_punched,
)
from tests.crash.certain import CERTAIN_SCENARIOS
from tests.crash.devices import (
    recovery_on_a_used_up_device,
    uncounted_data_on_a_device,
    used_up_device,
    written_anew,
    zeros_of_a_raw_disk,
)
from tests.crash.encrypted import entry_into_luks_header, key_slots, part_of_a_sector
from tests.crash.foreign import (
    bytes_behind_a_bitmap_table,
    link_that_leads_elsewhere,
    two_formats_of_one_file,
)
from tests.crash.judge import PromiseBroken, require
from tests.crash.protected import PROTECTION_SCENARIOS
from tests.crash.replaced import replaced_with_its_data_file
from tests.crash.salvaged import new_tables_in_place, salvage_that_goes_on
from tests.crash.small_scenarios import SMALL_WRITES_SCENARIOS
from tests.crash.snapshot_tables import growth_behind_a_snapshot_table, size_of_an_old_snapshot
from tests.crash.written_into import written_into
from tests.support.beside import HeldUp, Others
from tests.support.expectation import SECTOR_BYTES, Windows
from tests.support.inside import Shown
from tests.support.patients import DIRTY_BYTE, Tables
from tests.support.player import Player
from tests.support.starts import new_session
from tests.support.users import create_simulated, open_simulated

CLUSTER_BYTES = 4096
WITH_ROOT_COPY = 8192
"""A cluster size with room for the root copy."""
FLUSHES = 12
CHANGING_CALLS = {"pwrite", "truncate", "allocate", "punch"}


class Crafted(Tables):
    """A closed image of three data clusters, whose tables are then changed by hand."""

    def __init__(
        self,
        *,
        empty_snapshot: bool = False,
        snapshot: bool = False,
        table_first: bool = False,
        cluster_bytes: int = CLUSTER_BYTES,
    ) -> None:
        """Allocate guest clusters 0 to 2, with a snapshot from before or after that.

        ``table_first``: so that they are the last ones of the file.
        """
        device = SimulatedDevice()
        image = create_simulated(device, 4 << 20, cluster_bytes)
        if table_first:
            image.pwrite(b"\x33", 100 * cluster_bytes)
        if empty_snapshot:
            image.create_snapshot("empty")
        image.pwrite(b"\x33" * (3 * cluster_bytes), 0)
        if snapshot:
            image.create_snapshot("kept")
        image.close()
        super().__init__(device.content())

    def place(self, guest_cluster: int) -> int:
        """Return where the L2 entry of a guest cluster stands."""
        return self.l2 + 8 * guest_cluster

    def device(self) -> SimulatedDevice:
        """Return a device that holds the image."""
        return SimulatedDevice(bytes(self.image))

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
    crafted = Crafted()
    crafted.set_entry(crafted.place(1), crafted.entry(crafted.place(1)) + 512)
    image = crafted.open()
    _must_refuse("P6: another cluster's bytes were read", lambda: image.pread(512, CLUSTER_BYTES))


def entry_into_metadata() -> None:
    """P6: a guest write must not land on the L1 table that an entry leads to."""
    crafted = Crafted()
    crafted.set_entry(crafted.place(1), crafted.header.l1_table_offset | COPIED)
    image = crafted.open()
    _must_refuse("P6: a guest write destroyed the L1 table", lambda: image.pwrite(b"x" * 512, CLUSTER_BYTES))


def two_owners(*, snapshot: bool = True, flag: int = 0) -> None:
    """P1: two guest clusters have one host cluster, and both are written: each is old or new after a crash.

    The first write leaves the host cluster to the other one, but not durably.
    """
    crafted = Crafted(empty_snapshot=snapshot)
    shared, given_up = crafted.entry(crafted.place(0)) & ~COPIED, crafted.entry(crafted.place(1)) & ~COPIED
    for guest_cluster in (0, 1):
        crafted.set_entry(crafted.place(guest_cluster), shared | flag)
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


def two_owners_without_a_snapshot() -> None:
    """P1: as `two_owners`; the one that is left gets the COPIED flag, and is not written in place yet."""
    two_owners(snapshot=False)


def two_owners_with_wrong_flags() -> None:
    """P1: as `two_owners_without_a_snapshot`, and both entries claim that the cluster is theirs alone."""
    two_owners(snapshot=False, flag=COPIED)


def stale_copied_flag() -> None:
    """P1: a flag says that a cluster belongs to the disk alone, and the refcount that a snapshot has it too.

    So another program leaves it that is cut off between the two.
    """
    crafted = Crafted(snapshot=True)
    crafted.set_entry(crafted.place(0), crafted.entry(crafted.place(0)) | COPIED)
    device = crafted.device()
    with open_simulated(device) as image:
        image.pwrite(b"\x44" * SECTOR_BYTES, 0)
    with open_simulated(device, "r", snapshot="kept") as kept:
        require(kept.pread(CLUSTER_BYTES, 0) == b"\x33" * CLUSTER_BYTES, "P1: the snapshot changed")


def refcount_that_is_too_low() -> None:
    """P5: one is met, and then no cluster is taken or punched that others may be in as well."""
    crafted = Crafted()
    hosts = [crafted.entry(crafted.place(guest_cluster)) & ~COPIED for guest_cluster in (0, 1, 2)]
    for host in hosts:
        crafted.set_refcount(host, 0)
    device = crafted.device()
    before = [device.pread(CLUSTER_BYTES, host) for host in hosts]
    with open_simulated(device) as image:
        with suppress(CorruptionError):
            image.pwrite(b"\x44" * 512, 0)
        for guest_cluster in range(8, 30):
            image.pwrite(b"\x44" * CLUSTER_BYTES, guest_cluster * CLUSTER_BYTES)
            image.flush()
    after = [device.content()[host : host + CLUSTER_BYTES] for host in hosts]
    require(after == before, "P5: what other entries name", "it was written over")


def uncounted_data() -> None:
    """P1: the last clusters of a file have refcount 0, and data of the disk is there: nothing takes it.

    Another program leaves it so; one cluster has two owners. The power may go at any time.
    """
    for cluster_bytes in (CLUSTER_BYTES, WITH_ROOT_COPY):
        device = _uncounted(cluster_bytes)
        states: list[SimulatedDevice] = []

        def cut(_: str, now: SimulatedDevice, states: list[SimulatedDevice] = states) -> None:
            states.extend(now.crash(state) for state in enumerate_states(now, budget=16))

        device.barrier_listeners.append(cut)
        image = open_simulated(device)
        image.pwrite(b"\x44" * cluster_bytes, 8 * cluster_bytes)
        image.flush()
        for cluster in range(9, 30):
            image.pwrite(b"\x44" * cluster_bytes, cluster * cluster_bytes)
        image.checkpoint()
        image.close()
        cut("", device)
        for crashed in states:
            _judge_uncounted(crashed, cluster_bytes)


def _uncounted(cluster_bytes: int) -> SimulatedDevice:
    """Return a device with data in the last clusters, none of them counted, and nothing free before."""
    crafted = Crafted(table_first=True, cluster_bytes=cluster_bytes)
    for cluster in crafted.free_clusters():
        crafted.set_refcount(cluster * cluster_bytes, 1)
    for guest_cluster in (1, 2):
        crafted.set_refcount(crafted.entry(crafted.place(guest_cluster)) & ~COPIED, 0)
    crafted.set_entry(crafted.place(3), crafted.entry(crafted.place(2)))
    return crafted.device()


def _judge_uncounted(crashed: SimulatedDevice, cluster_bytes: int) -> None:
    def look(image: jqcow.Image) -> None:
        for guest_cluster in (1, 2, 3):
            try:
                found = image.pread(cluster_bytes, guest_cluster * cluster_bytes)
            except CorruptionError as error:
                raise PromiseBroken(f"P1: {error}") from error
            require(found == b"\x33" * cluster_bytes, "P1: data that no refcount counts", guest_cluster)

    open_simulated(crashed).close()
    with open_simulated(crashed) as found:
        look(found)
        found.pwrite(b"\x55" * cluster_bytes, 30 * cluster_bytes)
    with open_simulated(crashed) as found:
        look(found)
        kinds = {finding.kind for finding in found.check().findings}
        require(kinds <= {Kind.COPIED_FLAG, Kind.LEAK}, "P2: refcounts of what was not counted", kinds)


def truncated_file() -> None:
    """P1: the file was cut off, and data is lost: no change makes zeros of it (F3)."""
    content = bytes(Crafted(table_first=True).image)
    image = open_simulated(SimulatedDevice(content[:-CLUSTER_BYTES]))
    _must_refuse(
        "P1: what was cut off became zeros",
        lambda: image.pwrite(b"\x44" * CLUSTER_BYTES, 8 * CLUSTER_BYTES),
    )


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


def lost_frame_on_full_disk() -> None:
    """P4: a cache that never forgets alone has the newest frame, the disk is full, recovery is cut off.

    The frame begins its epoch: the disk may hold the epoch before it, which must not be given up.
    """
    device = Crafted().device()
    image = open_simulated(device)
    image.pwrite(b"\x44" * CLUSTER_BYTES, 4 * CLUSTER_BYTES)
    image.checkpoint()
    device.faults = FaultPlan(Fault(errno.EIO, call="barrier", barrier_name="flush.record"))
    image.write_zeroes(CLUSTER_BYTES, 0)
    with suppress(OSError):
        image.flush()
    found = device.killed()
    found.can_forget = False
    found.faults = FaultPlan(capacity_bytes=found.used_bytes)
    states: list[SimulatedDevice] = []

    def cut(call: str, now: SimulatedDevice) -> None:
        if call != "truncate":
            states.extend(now.crash(state) for state in enumerate_states(now, budget=4))

    found.change_listeners.append(cut)
    found.barrier_listeners.append(cut)
    with open_simulated(found) as recovered:
        require(recovered.recovered is not None, "P4: nothing was recovered")
    for crashed in states:
        try:
            with open_simulated(crashed) as again:
                require(again.pread(1, 4 * CLUSTER_BYTES) == b"\x44", "P1: what was flushed is gone")
        except JqcowError as error:
            raise PromiseBroken(f"P4: {error}") from error


def recovery_on_full_disk() -> None:
    """P4: recovery on a full disk needs no space, however often the power goes in it.

    What it gives back others may take at once.
    """
    for cluster_bytes, is_shared in ((512, True), (CLUSTER_BYTES, False), (WITH_ROOT_COPY, True)):
        crashed = [_killed_after_flushes(cluster_bytes)]
        capacity_bytes = crashed[0].used_bytes
        for _ in range(3):
            left: list[SimulatedDevice] = []
            for device in crashed:
                device.faults = FaultPlan(capacity_bytes=capacity_bytes)
                left += _recovered_on_full_disk(device, cluster_bytes, is_shared=is_shared)
            crashed = left[:: max(1, len(left) // 12)]


def _killed_after_flushes(cluster_bytes: int) -> SimulatedDevice:
    device = SimulatedDevice()
    image = create_simulated(device, 4 << 20, cluster_bytes)
    for number in range(FLUSHES):
        image.pwrite(bytes([number + 1]) * SECTOR_BYTES, number * 7 * WITH_ROOT_COPY)
        image.flush()
    return device.killed()


def _recovered_on_full_disk(
    device: SimulatedDevice, cluster_bytes: int, *, is_shared: bool
) -> list[SimulatedDevice]:
    """Recover and close, judge that, and return what power cuts on the way would leave."""
    left: list[SimulatedDevice] = []

    def cut(call: str, now: SimulatedDevice) -> None:
        if is_shared and now.faults is not None:
            now.faults.capacity_bytes = now.used_bytes
        if call not in CHANGING_CALLS:
            left.extend(now.crash(state) for state in enumerate_states(now, budget=4))

    device.change_listeners.append(cut)
    device.barrier_listeners.append(cut)
    try:
        with open_simulated(device) as image:
            for number in range(FLUSHES):
                found = image.pread(SECTOR_BYTES, number * 7 * WITH_ROOT_COPY)
                require(found == bytes([number + 1]) * SECTOR_BYTES, "P1: what was flushed is gone", number)
            _require_sound(image)
    except OSError as error:
        raise PromiseBroken(f"P4: with clusters of {cluster_bytes} bytes: {error}") from error
    return left


# Threads


def _live_image() -> tuple[SimulatedDevice, jqcow.Image]:
    """Return a live image of four data clusters, and its device. What it maps is in memory."""
    device = Crafted().device()
    image = open_simulated(device)
    image.pwrite(b"\x33" * CLUSTER_BYTES, 3 * CLUSTER_BYTES)
    image.flush()
    return device, image


def _image_to_grow() -> tuple[SimulatedDevice, jqcow.Image]:
    """Return a live image that ends within its last cluster, and has no free cluster before that."""
    device, image = _live_image()
    cluster = 20
    while device.size() % CLUSTER_BYTES == 0:
        image.flush()
        image.pwrite(b"\x33" * SECTOR_BYTES, cluster * CLUSTER_BYTES)
        cluster += 1
    return device, image


def _require_sound(image: jqcow.Image) -> None:
    report = image.check()
    require(report.ok, "P2: after what threads did", report.findings[:1])


def _require_durable(device: SimulatedDevice, data: bytes, offset: int) -> None:
    crashed = open_simulated(SimulatedDevice(device.durable_content()))
    require(crashed.pread(len(data), offset) == data, "P1: what a flush acknowledged", "not durable")


def writers_of_one_cluster() -> None:
    """P1: two threads write the halves of a cluster that is not there yet; both are there then."""
    device, image = _live_image()
    half, offset = CLUSTER_BYTES // 2, 10 * CLUSTER_BYTES
    with HeldUp(device, lambda: image.pwrite(b"\x44" * half, offset), call="pwrite") as held:
        held.run(lambda: image.pwrite(b"\x55" * half, offset + half))
    found = image.pread(CLUSTER_BYTES, offset)
    require(found == b"\x44" * half + b"\x55" * half, "P1: of two writes", "one is lost")
    _require_sound(image)


def snapshot_beside_a_write() -> None:
    """P1: a snapshot is made while a cluster is written in place: it keeps what it showed at first."""
    device, image = _live_image()
    found: list[bytes] = []

    def look() -> None:
        found.append(Shown(image, image.snapshots()[0]).pread(CLUSTER_BYTES, 0))

    def snapshot() -> None:
        image.create_snapshot("kept")
        look()

    with HeldUp(device, lambda: image.pwrite(b"\x44" * CLUSTER_BYTES, 0), call="pwrite") as held:
        held.run(snapshot)
    look()
    require(found[0] == found[1], "P1: the snapshot changed", found[1][:1])


def write_beside_a_transaction() -> None:
    """P1: a transaction and, while it is open, another thread write clusters of one L2 table."""
    _, image = _live_image()
    with Others() as others, image.transaction() as transaction:
        transaction.pwrite(b"\x44" * SECTOR_BYTES, 10 * CLUSTER_BYTES)
        others.run(lambda: image.pwrite(b"\x55" * SECTOR_BYTES, 11 * CLUSTER_BYTES))
    for value, cluster in ((0x44, 10), (0x55, 11)):
        require(image.pread(1, cluster * CLUSTER_BYTES)[0] == value, "P1: a completed write is gone", cluster)
    _require_sound(image)


def read_beside_a_discard() -> None:
    """P1: a read is held up while its cluster is discarded, durably, and given to another guest cluster."""
    device, image = _image_to_grow()
    found: list[bytes] = []
    with HeldUp(device, lambda: found.append(image.pread(CLUSTER_BYTES, 0)), call="pread"):
        image.discard(CLUSTER_BYTES, 0)
        # The second one's barrier covers the punching.
        for cluster in (10, 11, 12):
            image.flush()
            image.pwrite(b"\x44" * CLUSTER_BYTES, cluster * CLUSTER_BYTES)
    require(set(found[0]) in ({0x33}, {0}), "P1: a read returned another cluster's bytes", found[0][:1])


def packing_beside_a_discard() -> None:
    """P1: a cluster is packed behind another one, which is discarded meanwhile."""
    device, image = _live_image()
    image.pwrite_compressed(b"\x44" * CLUSTER_BYTES, 10 * CLUSTER_BYTES)
    packed = b"\x55" * CLUSTER_BYTES
    with HeldUp(device, lambda: image.pwrite_compressed(packed, 11 * CLUSTER_BYTES), call="pwrite"):
        image.discard(CLUSTER_BYTES, 10 * CLUSTER_BYTES)
    require(image.pread(CLUSTER_BYTES, 11 * CLUSTER_BYTES) == packed, "P1: a completed write is gone")
    _require_sound(image)


def block_read_beside_a_checkpoint() -> None:
    """P1: a table is read, and before it is kept its home is rewritten."""
    crafted = Crafted()
    device = crafted.device()
    image = open_simulated(device)
    begun, go_on = Event(), Event()
    original = device.pread

    def pread(length: int, offset: int) -> bytes:
        data = original(length, offset)
        if offset == crafted.l2 and not begun.is_set():
            begun.set()
            go_on.wait()
        return data

    vars(device)["pread"] = pread
    with Others() as others:
        others.start(lambda: image.pread(SECTOR_BYTES, 0))
        begun.wait()
        image.pwrite(b"\x44" * SECTOR_BYTES, 10 * CLUSTER_BYTES)
        image.checkpoint()
        go_on.set()
    require(image.pread(1, 10 * CLUSTER_BYTES) == b"\x44", "P1: a completed write is gone")


def write_beside_a_growth() -> None:
    """P1: a checkpoint makes the file longer; meanwhile another thread writes past its new end."""
    device, image = _image_to_grow()
    with HeldUp(device, image.checkpoint, call="truncate") as held:
        held.run(lambda: image.pwrite(b"\x44" * SECTOR_BYTES, 11 * CLUSTER_BYTES))
    require(image.pread(1, 11 * CLUSTER_BYTES) == b"\x44", "P1: a completed write is gone")


def growth_beside_a_write() -> None:
    """P1: a write past the end has its cluster when a checkpoint begins to make the file longer."""
    device, image = _image_to_grow()
    write = HeldUp(device, lambda: image.pwrite(b"\x44" * SECTOR_BYTES, 11 * CLUSTER_BYTES), call="pwrite")
    with write, HeldUp(device, image.checkpoint, call="truncate"):
        write.let_go()
    require(image.pread(1, 11 * CLUSTER_BYTES) == b"\x44", "P1: a completed write is gone")


def checkpoint_while_flushing() -> None:
    """P1: a checkpoint is asked for while a flush writes its record; flushes before and after it hold."""
    device, image = _live_image()
    image.pwrite(b"\x44" * SECTOR_BYTES, 10 * CLUSTER_BYTES)
    with HeldUp(device, image.flush, call="pwrite") as held:
        held.run(image.checkpoint)
    image.pwrite(b"\x55" * SECTOR_BYTES, 11 * CLUSTER_BYTES)
    image.flush()
    for value, cluster in ((0x44, 10), (0x55, 11)):
        _require_durable(device, bytes([value]) * SECTOR_BYTES, cluster * CLUSTER_BYTES)


def flush_during_a_flush() -> None:
    """P1: what is written while another thread's flush waits for the device is flushed anew."""
    device, image = _live_image()
    image.pwrite(b"\x44" * SECTOR_BYTES, 10 * CLUSTER_BYTES)
    with HeldUp(device, image.flush, barrier_name="flush.record") as held:
        image.pwrite(b"\x55" * SECTOR_BYTES, 11 * CLUSTER_BYTES)
        held.run(image.flush)
    _require_durable(device, b"\x55" * SECTOR_BYTES, 11 * CLUSTER_BYTES)


def write_during_a_barrier() -> None:
    """P1: what is written in place while a barrier runs is not durable by that."""
    device, image = _live_image()
    image.pwrite(b"\x44" * SECTOR_BYTES, 10 * CLUSTER_BYTES)
    with HeldUp(device, image.flush, barrier_name="flush.record"):
        image.pwrite(b"\x55" * SECTOR_BYTES, 0)
    image.flush()
    _require_durable(device, b"\x55" * SECTOR_BYTES, 0)


def close_behind_a_failed_flush() -> None:
    """P1: a barrier fails, the host tells that once, and the next one reports success."""
    device = Crafted().device()
    image = open_simulated(device)
    image.pwrite(b"\x44" * SECTOR_BYTES, 0)

    def close() -> None:
        with suppress(OSError):
            image.close()
            _require_durable(device, b"\x44" * SECTOR_BYTES, 0)

    def flush() -> None:
        with suppress(OSError):
            image.flush()

    with HeldUp(device, flush, error=errno.EIO, barrier_name="flush.data") as held:
        held.run(close)


# Cut off


def interrupted_operation() -> None:
    """P2: an operation is cut off between its changes; what follows must not make half of it durable."""
    device, image = _live_image()
    device.faults = FaultPlan(Fault(KeyboardInterrupt(), call="allocate"))
    with suppress(KeyboardInterrupt):
        # It needs an L2 table.
        image.pwrite(b"\x44" * SECTOR_BYTES, 3 << 20)
    require(device.faults.fired, "the write was not cut off")
    with suppress(PoisonedError):
        image.flush()
        _require_sound(image)
    _require_sound(open_simulated(device.killed()))


@contextmanager
def _interrupt_at(name: str) -> Iterator[None]:
    """Raise KeyboardInterrupt where a function is entered, as a signal at that moment would."""
    is_done = False

    def trace(frame: FrameType, event: str, argument: object) -> None:
        nonlocal is_done
        if frame.f_code.co_qualname == name and not is_done:
            is_done = True
            raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    require(is_done, f"{name} was not entered")


def _commit_that_is_not_taken_back() -> FaultPlan:
    """The record is written, and the host reports an error; an interrupt comes while it is taken back."""
    return FaultPlan(
        Fault(errno.EIO, call="pwrite", applied_bytes=EVERYTHING),
        Fault(KeyboardInterrupt(), at=2, call="pwrite"),
    )


def flush_cut_off() -> None:
    """P1: a failed flush is cut off before it is taken back; the next one must not lose what it carried."""
    device, image = _live_image()
    image.pwrite(b"\x44" * SECTOR_BYTES, 10 * CLUSTER_BYTES)
    device.faults = _commit_that_is_not_taken_back()
    with _interrupt_at("Commits._leave_in_doubt_if_undecided"):
        image.flush()
    with suppress(PoisonedError):
        image.flush()
        require(image.pread(1, 10 * CLUSTER_BYTES) == b"\x44", "P1: what a flush acknowledged is gone")


def transaction_cut_off() -> None:
    """P3: a transaction whose record may be durable, or may not, is not shown as undone."""
    device, image = _live_image()
    plan = _commit_that_is_not_taken_back()
    with suppress(KeyboardInterrupt), image.transaction() as transaction:
        transaction.pwrite(b"\x44" * SECTOR_BYTES, 10 * CLUSTER_BYTES)
        device.faults = plan
    require(len(plan.fired) == 2, "the commit was not cut off")
    with suppress(PoisonedError):
        shown = image.pread(1, 10 * CLUSTER_BYTES)
        opened = open_simulated(device.killed())
        require(shown == opened.pread(1, 10 * CLUSTER_BYTES), "P3: shown as undone, and there after opening")


def commit_into_a_raw_base(drop_barriers: tuple[str, ...]) -> None:
    """The overlay is emptied when the base has all of it, durably: a power cut then takes nothing away."""
    base = SimulatedDevice(bytes(1 << 20))
    base.drop_barriers = set(drop_barriers)
    top = SimulatedDevice()
    image = create_simulated(top, 1 << 20, CLUSTER_BYTES)
    image.pwrite(b"\x44" * 10_000, 5000)
    with raw_base(base) as raw:
        copy_into(image, raw)
    with image.transaction() as transaction:
        transaction.make_empty()
    found = base.durable_content()
    require(found[5000:15_000] == b"\x44" * 10_000, "P1: what the overlay had", "not durable in the base")


def _cut_off_close() -> tuple[SimulatedDevice, int]:
    """Return an image of which the close was cut off in its last step, and the space that it should take."""
    device = SimulatedDevice()
    left: list[bytes] = []
    image = create_simulated(device, 4 << 20, WITH_ROOT_COPY)
    image.pwrite(b"\x33" * WITH_ROOT_COPY, 3 * WITH_ROOT_COPY)

    def keep(name: str, device: SimulatedDevice) -> None:
        if name == "close.release":
            left.append(device.durable_content())

    device.barrier_listeners.append(keep)
    image.close()
    device.reopen()
    return SimulatedDevice(left[0]), device.used_bytes


def unfinished_close(drop_barriers: tuple[str, ...]) -> None:
    """P4: a crash cuts a close off, and another one what finishes it: the space comes back."""
    cut, used_bytes = _cut_off_close()
    cut.drop_barriers = set(drop_barriers)
    again: list[SimulatedDevice] = []

    def keep(_: str, device: SimulatedDevice) -> None:
        again.extend(device.crash(state) for state in enumerate_states(device, budget=16))

    cut.barrier_listeners.append(keep)
    recover_image(cut)
    for device in again:
        recover_image(device)
        require(device.used_bytes <= used_bytes, "P4: the journal's space", "it stays behind")


def stale_root_copy(drop_barriers: tuple[str, ...]) -> None:
    """P1: a crash cuts off going live or closing, another program goes on, and then sector 0 is lost.

    Another crash may have cut off what finishes the close. The root copy is still there. What it names must
    not bring older tables back.
    """
    device = SimulatedDevice()
    with create_simulated(device, 4 << 20, WITH_ROOT_COPY) as image:
        image.pwrite(b"\x33" * WITH_ROOT_COPY, 3 * WITH_ROOT_COPY)
    device.reopen()
    left: list[SimulatedDevice] = []

    def cut(_: str, now: SimulatedDevice) -> None:
        states = (now.crash(state) for state in enumerate_states(now, budget=32))
        left.extend(crashed for crashed in states if _has_stale_copy(crashed))

    device.barrier_listeners.append(cut)
    device.drop_barriers = set(drop_barriers)
    with open_simulated(device) as image:
        image.pwrite(b"\x44" * WITH_ROOT_COPY, 8 * WITH_ROOT_COPY)
    require(left, "no crash leaves a root copy")
    once, left[:] = tuple(left), []
    for crashed in once:
        _judge_stale_copy(crashed)
        crashed.barrier_listeners.append(cut)
        crashed.drop_barriers = set(drop_barriers)
        recover_image(crashed)
    for crashed in left:
        _judge_stale_copy(crashed)


def _has_stale_copy(crashed: SimulatedDevice) -> bool:
    sector = crashed.pread(SECTOR_BYTES, 0)
    return sector[: len(MAGIC)] == MAGIC and not is_live(sector) and read_root_copy(crashed) is not None


def _judge_stale_copy(crashed: SimulatedDevice) -> None:
    """Move a mapped cluster, as another program may, lose sector 0, and recover what the root copy tells."""
    tables = Tables(crashed.content())
    entry, moved = tables.l2 + 8 * 3, tables.l2 + 8 * 5
    tables.image[moved : moved + 8] = tables.image[entry : entry + 8]
    tables.image[entry : entry + 8] = bytes(8)
    tables.image[:SECTOR_BYTES] = b"\xee" * SECTOR_BYTES
    after = SimulatedDevice(bytes(tables.image))
    try:
        recover_image(after)
    except CorruptionError:
        return
    with open_simulated(after) as recovered:
        found = recovered.pread(WITH_ROOT_COPY, 5 * WITH_ROOT_COPY)
        require(found == b"\x33" * WITH_ROOT_COPY, "P1: what another program wrote", "older tables came back")
        _require_sound(recovered)


def _damaged_and_repaired() -> tuple[SimulatedDevice, bytes, SimulatedDevice]:
    """Return a repaired image, its bytes before, and the undo file of that, durable."""
    device, undo = SimulatedDevice(), SimulatedDevice()
    with create_simulated(device, 8 << 20, WITH_ROOT_COPY) as image:
        image.pwrite(b"\x33" * (3 * WITH_ROOT_COPY), 0)
    tables = Tables(device.content())
    tables.set_entry(tables.l2 + 8, tables.entry(tables.l2))
    tables.image[DIRTY_BYTE] |= INCOMPATIBLE_DIRTY
    device, before = SimulatedDevice(bytes(tables.image)), bytes(tables.image)
    trial = TrialDevice(device)
    jqcow.open_device(trial, "r+", repair="all").close()
    pack_undo(trial, undo)
    undo.barrier("saved")
    open_simulated(device).close()
    require(device.content() != before, "the repair changed nothing")
    device.reopen()
    return device, before, undo


class _Killed(Exception):
    """The process ends here."""


def _killed_at(barrier: str, device: SimulatedDevice, act: Callable[[], object]) -> SimulatedDevice:
    """Do something, and be killed at a barrier; return what the next process finds of a device."""

    def kill(name: str, _: SimulatedDevice) -> None:
        if name == barrier:
            raise _Killed

    device.barrier_listeners.append(kill)
    with suppress(_Killed):
        act()
    return device.killed()


def undo_of_a_repair(drop_barriers: tuple[str, ...]) -> None:
    """P5: the image is as before its repair, durably, whatever cuts the undo off; then it may be written."""
    device, before, undo = _damaged_and_repaired()
    cut_off: list[tuple[SimulatedDevice, SimulatedDevice]] = []

    def cut(name: str, device: SimulatedDevice) -> None:
        states = enumerate_states(device, budget=64, garbage_allowed=lambda *_: True)
        cut_off.extend((device.crash(state), SimulatedDevice(undo.durable_content())) for state in states)

    device.barrier_listeners.append(cut)
    device.drop_barriers = undo.drop_barriers = set(drop_barriers)
    undo_on(device, undo)
    require(device.content() == before, "P5: the image before its repair", "other bytes")
    cut("", device)
    for crashed, found in cut_off:
        try:
            undo_on(crashed, found)
        except JqcowError as error:
            raise PromiseBroken(f"P5: an undo that was cut off cannot be done again: {error}") from error
        require(crashed.content() == before, "P5: the image before its repair", "other bytes")
    grown = Tables(device.content())
    with open_simulated(device) as image:
        image.pwrite(b"\x44" * WITH_ROOT_COPY, 9 * WITH_ROOT_COPY)
    device.reopen()
    # By another program, where the repair changed nothing near; then sector 0 was lost.
    grown.image += bytes((16 << 20) - len(grown.image))
    grown.set_entry(grown.l2 + 8 * 600, COPIED | len(grown.image))
    grown.set_refcount(len(grown.image), 1)
    lost = b"\xee" * SECTOR_BYTES + grown.image[SECTOR_BYTES:] + b"\x44" * WITH_ROOT_COPY
    for later in (device, SimulatedDevice(lost)):
        with suppress(CorruptionError, FormatError):
            undo_on(later, SimulatedDevice(undo.durable_content()))
            raise PromiseBroken("P1: an undo that nobody asked for took later writes away")


def repair_that_is_done(drop_barriers: tuple[str, ...]) -> None:
    """P2: a later crash is no reason to take a repair back that was done."""
    for is_killed in (False, True):
        device, _, undo = _damaged_and_repaired()
        undo.drop_barriers = set(drop_barriers)
        if is_killed:
            # The mark is in the page cache alone when the next process looks for it.
            undo = _killed_at("undo.done", undo, partial(mark_done, undo, device))
        mark_done(undo, device)
        image = open_simulated(device)
        image.pwrite(b"\x44" * WITH_ROOT_COPY, 9 * WITH_ROOT_COPY)
        is_back = take_back_cut_off(device.killed(), SimulatedDevice(undo.durable_content()))
        require(not is_back, "P2: the refcounts that were right", "a repair that was done is taken back")


def image_half_taken_back(drop_barriers: tuple[str, ...]) -> None:
    """P1: nobody opens an image that is half taken back, and what nobody writes there is not lost."""
    for killed_at in (None, "undo.begin", "undo.root"):
        device, before, undo = _damaged_and_repaired()
        device.drop_barriers = set(drop_barriers)
        after, states = device.content(), list[SimulatedDevice]()
        if killed_at is not None:
            # The new sector 0 is in the page cache alone when it is undone again.
            device, undo = _undo_killed_at(killed_at, device, undo)

        def cut(name: str, now: SimulatedDevice, states: list[SimulatedDevice] = states) -> None:
            states.extend(now.crash(state) for state in enumerate_states(now, budget=64))

        device.barrier_listeners.append(cut)
        undo_on(device, undo)
        for crashed in states:
            found = crashed.content()
            if found not in (before, after):
                with suppress(CorruptionError, FormatError):
                    open_simulated(crashed)
                    raise PromiseBroken("P1: an image that is half taken back can be opened")


def _undo_killed_at(
    barrier: str, device: SimulatedDevice, undo: SimulatedDevice
) -> tuple[SimulatedDevice, SimulatedDevice]:
    """Return an image and its undo file as the next process finds them."""
    watched = undo if barrier == "undo.begin" else device
    left = _killed_at(barrier, watched, partial(undo_on, device, undo))
    return (device.killed(), left) if watched is undo else (left, undo.killed())


def undo_of_another_file() -> None:
    """P5: an image is replaced by another one, which its undo file fits: it is not for that one."""
    with tempfile.TemporaryDirectory(prefix="jqcow-undo-") as folder:
        path, other = Path(folder, "disk.qcow2"), Path(folder, "other.qcow2")
        path.write_bytes(_damaged_and_repaired()[1])
        jqcow.open(path, "r+", repair="all").close()
        other.write_bytes(path.read_bytes())
        other.replace(path)
        content = path.read_bytes()
        with suppress(CorruptionError):
            undo_repair(path)
        require(
            path.read_bytes() == content, "P5: another image", "a repair of its forerunner was taken back"
        )


DROPPING_SCENARIOS: dict[str, Callable[[tuple[str, ...]], None]] = {
    "repair-done": repair_that_is_done,
    "half-taken-back": image_half_taken_back,
    "commit": commit_into_a_raw_base,
    "unfinished-close": unfinished_close,
    "stale-root-copy": stale_root_copy,
    "undo": undo_of_a_repair,
    "key-slots": key_slots,
    "written-anew": written_anew,
    "salvage": salvage_that_goes_on,
    "in-place": new_tables_in_place,
    "written-into": written_into,
}
"""Those that show the need of a barrier: they are told which ones do nothing."""

SCENARIOS: dict[str, Callable[[], None]] = {
    scenario.__name__.replace("_", "-"): scenario
    for scenario in (
        unaligned_entry,
        entry_into_metadata,
        two_owners,
        two_owners_without_a_snapshot,
        two_owners_with_wrong_flags,
        stale_copied_flag,
        refcount_that_is_too_low,
        uncounted_data,
        truncated_file,
        undo_of_another_file,
        checkpoint_on_full_disk,
        lost_frame_on_full_disk,
        recovery_on_full_disk,
        writers_of_one_cluster,
        snapshot_beside_a_write,
        write_beside_a_transaction,
        read_beside_a_discard,
        packing_beside_a_discard,
        block_read_beside_a_checkpoint,
        write_beside_a_growth,
        growth_beside_a_write,
        checkpoint_while_flushing,
        flush_during_a_flush,
        write_during_a_barrier,
        close_behind_a_failed_flush,
        interrupted_operation,
        flush_cut_off,
        transaction_cut_off,
        part_of_a_sector,
        entry_into_luks_header,
        old_bytes_in_a_raw_file,
        transaction_over_a_data_file,
        written_where_a_discard_was,
        written_while_it_is_punched,
        read_beside_a_commit,
        grown_again_in_a_transaction,
        raw_file_of_a_size_given_up,
        data_file_out_of_order,
        zeros_of_a_raw_disk,
        uncounted_data_on_a_device,
        used_up_device,
        recovery_on_a_used_up_device,
        replaced_with_its_data_file,
        link_that_leads_elsewhere,
        two_formats_of_one_file,
        bytes_behind_a_bitmap_table,
        size_of_an_old_snapshot,
        growth_behind_a_snapshot_table,
        *PROTECTION_SCENARIOS,
        *CERTAIN_SCENARIOS,
        *ANCHORED_SCENARIOS,
        *SMALL_WRITES_SCENARIOS,
    )
}
