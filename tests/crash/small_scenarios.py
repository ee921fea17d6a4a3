"""Stories of small writes that wait in the journal, where threads meet or the guest is hostile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jqcow
from jqcow.ondisk import frame as frames
from jqcow.ondisk.frame import FRAME_ALIGNMENT, FRAME_HEADER_BYTES, HeaderOperation, IntentOperation
from jqcow.testing import SimulatedDevice, enumerate_states
from tests.crash.judge import PromiseBroken, require
from tests.support import inside
from tests.support.below import Below
from tests.support.beside import HeldUp
from tests.support.expectation import Windows
from tests.support.users import create_simulated, open_simulated

CLUSTER_BYTES = 4096
SECTOR_BYTES = 512
DISK_BYTES = 16 << 20
LONG_JOURNAL = 512 << 10


def _live_image(journal_bytes: int = 64 << 10) -> tuple[SimulatedDevice, jqcow.Image]:
    """Return a live image whose first clusters hold data, on its device: small writes wait."""
    device = SimulatedDevice()
    create_simulated(device, DISK_BYTES, CLUSTER_BYTES).close()
    image = open_simulated(device, journal_bytes=journal_bytes, small_writes="journal")
    image.pwrite(b"\x33" * (8 * CLUSTER_BYTES), 0)
    image.flush()
    return device, image


def small_write_over_a_longer_one() -> None:
    """P1: a longer write is held up; a small one over it is flushed and read, and brought home."""
    device, image = _live_image()
    # The older one goes in place; the small one reaches into a cluster that has no place yet, and waits.
    offset, small = 8 * CLUSTER_BYTES - SECTOR_BYTES, b"\x55" * (2 * SECTOR_BYTES)
    with HeldUp(device, lambda: image.pwrite(b"\x44" * (SECTOR_BYTES - 1), offset), call="pwrite") as held:
        image.pwrite(small, offset)
        image.flush()
        require(image.pread(len(small), offset) == small, "P1: a small write is not read")
        held.run(image.checkpoint)
    require(image.pread(len(small), offset) == small, "P1: an older write came back")


def small_write_during_a_round() -> None:
    """P1: while others are brought home, which takes several records, a small write comes."""
    device, image = _live_image()
    # Each lies in a metadata block of mapping of its own.
    for number in range(6):
        image.pwrite(bytes([number + 1]) * SECTOR_BYTES, (number + 1) * (2 << 20))
        image.flush() if number == 2 else None
    with HeldUp(device, image.checkpoint, call="pwrite"):
        image.pwrite(b"\x55" * SECTOR_BYTES, 9 * CLUSTER_BYTES)
    require(image.pread(1, 9 * CLUSTER_BYTES) == b"\x55", "P1: a completed write is gone")
    image.flush()
    recovered = open_simulated(device.crash(next(iter(enumerate_states(device, budget=1)))))
    require(recovered.pread(1, 9 * CLUSTER_BYTES) == b"\x55", "P1: a flushed write is gone")


def small_write_beside_one_that_reads() -> None:
    """P1: a small write reads the compressed cluster that it needs; another one comes meanwhile."""
    _come_beside_one_that_reads(9 * CLUSTER_BYTES + SECTOR_BYTES, SECTOR_BYTES)


def whole_cluster_beside_one_that_reads() -> None:
    """P1: the same, and the other one needs nothing of what was in the cluster."""
    _come_beside_one_that_reads(9 * CLUSTER_BYTES, CLUSTER_BYTES)


@contextmanager
def _beside_one_that_reads() -> Iterator[tuple[jqcow.Image, HeldUp]]:
    """Hold up a small write while it reads the compressed cluster that it needs, the tenth."""
    device, image = _live_image()
    first = 9 * CLUSTER_BYTES
    image.pwrite_compressed(b"\x33" * CLUSTER_BYTES, first)
    image.flush()
    with HeldUp(device, lambda: image.pwrite(b"\x44" * SECTOR_BYTES, first), call="pread") as held:
        yield image, held


def _come_beside_one_that_reads(offset: int, length: int) -> None:
    with _beside_one_that_reads() as (image, held):
        held.run(lambda: image.pwrite(b"\x55" * length, offset))
    last = offset + length - SECTOR_BYTES
    require(image.pread(SECTOR_BYTES, last) == b"\x55" * SECTOR_BYTES, "P1: a completed write is not read")
    image.checkpoint()
    require(image.pread(SECTOR_BYTES, last) == b"\x55" * SECTOR_BYTES, "P1: a completed write is gone")


def zeroes_after_one_that_reads() -> None:
    """P1: zeroing waits for a small write that reads the cluster; nothing old comes back with that."""
    first = 9 * CLUSTER_BYTES
    with _beside_one_that_reads() as (image, held):
        held.run(lambda: image.write_zeroes(CLUSTER_BYTES, first))
    image.checkpoint()
    found = image.pread(CLUSTER_BYTES - SECTOR_BYTES, first + SECTOR_BYTES)
    require(not any(found), "P1: completed zeroes are gone")


def small_write_beside_a_compressed_one() -> None:
    """P4: a small write comes where a compressed one is under way; bringing it home needs no stream."""
    device, image = _live_image()
    first = 9 * CLUSTER_BYTES
    with HeldUp(
        device, lambda: image.pwrite_compressed(b"\x33" * CLUSTER_BYTES, first), call="pwrite"
    ) as held:
        held.run(lambda: image.pwrite(b"\x55" * SECTOR_BYTES, first + SECTOR_BYTES))
    image.flush()
    (stream,) = [run.host for run in image._guest.reads.runs(first, CLUSTER_BYTES)]
    device.pwrite(b"\xff" * 32, stream)
    try:
        open_simulated(device.killed()).close()
    except jqcow.CorruptionError as error:
        raise PromiseBroken(f"P4: what waits cannot be brought home: {error}") from error


def unflushed_write_over_a_backing_file() -> None:
    """P1: what was never flushed is brought home; until that is durable the backing file shows through."""
    windows = Windows(1, DISK_BYTES, DISK_BYTES)
    below = Below(windows, b"\x22" * DISK_BYTES, DISK_BYTES)
    device = SimulatedDevice()
    with create_simulated(device, DISK_BYTES, CLUSTER_BYTES) as image, image.transaction() as transaction:
        transaction.set_backing_file("below.raw", "raw")
    image = open_simulated(device, small_writes="journal", backing=lambda _: below)
    image.pwrite(b"\x33" * (8 * CLUSTER_BYTES), 0)
    image.flush()
    place = 9 * CLUSTER_BYTES
    image.pwrite(b"\x55" * SECTOR_BYTES, place)

    def cut(name: str, now: SimulatedDevice) -> None:
        for state in enumerate_states(now, budget=64):
            with open_simulated(now.crash(state), "r", backing=lambda _: below) as crashed:
                found = crashed.pread(SECTOR_BYTES, place + SECTOR_BYTES)
                require(found == b"\x22" * SECTOR_BYTES, "P1: a sector that nobody wrote has changed")

    device.barrier_listeners.append(cut)
    image.checkpoint()


def guest_data_like_a_frame() -> None:
    """P4: the guest writes what looks like a newer record of the journal, and its own record is torn."""
    device, image = _live_image(LONG_JOURNAL)
    journal, place = inside.journal_of(image), 9 * CLUSTER_BYTES
    payload = frames.encode_operations([HeaderOperation(inside.header_of(image).data)])
    forged = frames.frame_payload(payload, journal.extent.salt, journal.epoch + 7, journal.sequence + 9)
    intent = IntentOperation(journal.sequence + 1, place, bytes(3 * FRAME_ALIGNMENT))
    before_data = FRAME_HEADER_BYTES + len(frames.encode_operations([intent]).data) - len(intent.data)
    # Where a frame may start.
    data = (bytes(FRAME_ALIGNMENT - before_data) + forged).ljust(len(intent.data), b"\0")
    crashed: list[SimulatedDevice] = []

    def cut(name: str, device: SimulatedDevice) -> None:
        crashed.extend(device.crash(state) for state in enumerate_states(device, budget=64))

    image.pwrite(data, place)
    device.barrier_listeners.append(cut)
    image.flush()
    for each in crashed:
        open_simulated(each).close()


SMALL_WRITES_SCENARIOS: tuple[Callable[[], None], ...] = (
    small_write_over_a_longer_one,
    small_write_during_a_round,
    small_write_beside_one_that_reads,
    whole_cluster_beside_one_that_reads,
    zeroes_after_one_that_reads,
    small_write_beside_a_compressed_one,
    unflushed_write_over_a_backing_file,
    guest_data_like_a_frame,
)
