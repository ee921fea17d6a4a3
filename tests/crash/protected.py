"""Protection made, renewed, taken away and used to heal, cut off at every barrier and by every fault.

The promise in all states: no unit that is called clean has another content than that of its sum.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import jqcow
from jqcow.disks.raw import RawDisk
from jqcow.image import protection, refreshing
from jqcow.image.protection import VerifyReport
from jqcow.testing import Fault, FaultPlan, SimulatedDevice, enumerate_states
from tests.crash.judge import require
from tests.support.users import create_simulated, open_simulated

CLUSTER_BYTES = 16384
DISK_BYTES = (1 << 20) + (256 << 10)
STATES = 6
FAULTS = 4
HEALING_FAULTS = 12


@contextmanager
def small_steps() -> Iterator[None]:
    """Have a refresh, and healing, take several transactions for few units."""
    before = refreshing.STEP_BYTES, protection.HEALED_AT_ONCE_BYTES, refreshing.slices
    slices = before[2]

    def short_slices(units: Any, start: int = 0) -> Iterator[tuple[int, int]]:
        for first, end in slices(units, start):
            for part in range(first, end, 32):
                yield part, min(part + 32, end)

    refreshing.STEP_BYTES = protection.HEALED_AT_ONCE_BYTES = 4 * CLUSTER_BYTES
    refreshing.slices = short_slices
    try:
        yield
    finally:
        refreshing.STEP_BYTES, protection.HEALED_AT_ONCE_BYTES, refreshing.slices = before


def _verified(device: SimulatedDevice) -> VerifyReport:
    """Open what a crash left, as a writer does; its structure is right, and it is verified."""
    with open_simulated(device) as image:
        require(image.check().ok, "P2: the image is not consistent", image.check().findings)
        return image.protection.verify()


def _require_none_wrong(report: VerifyReport) -> None:
    bad = [found for found in report.ranges if found.state != "changed"]
    require(not bad, "Y1: a clean unit has not the content of its sum", bad)


@dataclass
class _Cut:
    """Cuts the power at every barrier of a device, and judges what is left."""

    judge: Callable[[VerifyReport], None]
    failures: list[Exception] = field(default_factory=list)

    def __call__(self, name: str, device: SimulatedDevice) -> None:
        if self.failures:
            return
        for state in enumerate_states(device, budget=STATES):
            try:
                self.judge(_verified(device.crash(state)))
            except Exception as error:
                # Kept back: within a barrier the engine would take it for an error of the host.
                self.failures.append(error)
                return

    def finish(self) -> None:
        if self.failures:
            raise self.failures[0]


def _filled(seed: int) -> SimulatedDevice:
    """Return a closed image with data here and there."""
    device, chance = SimulatedDevice(), Random(seed)
    with create_simulated(device, DISK_BYTES, CLUSTER_BYTES) as image:
        for _ in range(12):
            _write(image, chance)
    return device


def _write(image: jqcow.Image, chance: Random) -> None:
    length = chance.randrange(1, 3 * CLUSTER_BYTES)
    image.pwrite(chance.randbytes(length), chance.randrange(image.size - length))


def _use(image: jqcow.Image, chance: Random) -> None:
    """Do all that a protection lives through."""
    image.protection.refresh()
    for _ in range(3):
        _write(image, chance)
    image.flush()
    image.protection.refresh()
    _write(image, chance)
    image.discard(CLUSTER_BYTES * 4, 0)
    image.create_snapshot("kept")
    _write(image, chance)
    image.resize(DISK_BYTES + 5 * 512)
    image.protection.refresh()
    image.apply_snapshot("kept")
    image.resize(DISK_BYTES - 7 * 512)
    image.protection.refresh()
    image.protection.remove()
    image.protection.refresh()


def protection_cut_off() -> None:
    """Y1: whatever a crash leaves of a refresh, and of writes between, no clean unit has a wrong sum."""
    with small_steps():
        device = _filled(0)
        image = open_simulated(device)
        cut = _Cut(_require_none_wrong)
        device.barrier_listeners.append(cut)
        _use(image, Random(0))
        image.close()
        cut.finish()
        _require_none_wrong(_verified(device))


def protection_on_a_failing_host() -> None:
    """Y1, P5: whichever write or barrier fails, no clean unit has a wrong sum, then and after the crash."""
    with small_steps():
        for call in ("pwrite", "barrier"):
            plan = FaultPlan()
            _use_with(plan)
            total = plan.total if call == "pwrite" else 60
            for at in sorted({1 + total * part // FAULTS for part in range(FAULTS)}):
                device = _use_with(FaultPlan(Fault(errno.EIO, at=at, call=call)))
                device.faults = FaultPlan()
                _require_none_wrong(_verified(device.killed()))


def _use_with(plan: FaultPlan) -> SimulatedDevice:
    device = _filled(3)
    image = open_simulated(device)
    device.faults = plan
    try:
        _use(image, Random(3))
        image.close()
    except (OSError, jqcow.JqcowError):
        if not image.closed:
            with open_simulated(device.killed(), "r") as shown:
                _require_none_wrong(shown.protection.verify())
    return device


def _rotten() -> tuple[SimulatedDevice, bytes, set[int]]:
    """Return a protected image with rot in it, the disk as it was, and the offsets of what is rotten."""
    device = _filled(5)
    with open_simulated(device) as image:
        image.protection.refresh()
        good = image.pread(image.size, 0)
        places = [(extent.offset, extent.host_offset) for extent in image.extents() if extent.kind == "data"]
    content = bytearray(device.content())
    chosen = places[::2]
    for _, host in chosen:
        content[(host or 0) + 100] ^= 1
    return SimulatedDevice(bytes(content)), good, {offset for offset, _ in chosen}


def _require_no_more_wrong(report: VerifyReport, rotten: set[int]) -> None:
    bad = [found for found in report.ranges if found.state != "changed"]
    ends = ((found.offset, found.offset + found.length) for found in bad)
    places = {place for start, end in ends for place in range(start, end, CLUSTER_BYTES)}
    require(places <= rotten, "Y1: what was right before is wrong now", places - rotten)
    require(not report.bytes_of("changed"), "Y1: healing leaves units without a sum")


def healing_on_a_failing_host() -> None:
    """Y2, P5: whichever write or barrier of healing fails, nothing gets worse, and it can be done again."""
    original, good, rotten = _rotten()
    content = original.content()
    with small_steps():
        plan = FaultPlan()
        _heal_with(SimulatedDevice(content), good, plan)
        for at in sorted({1 + plan.total * part // HEALING_FAULTS for part in range(HEALING_FAULTS)}):
            device = SimulatedDevice(content)
            _heal_with(device, good, FaultPlan(Fault(errno.EIO, at=at)))
            device.faults = FaultPlan()
            crashed = device.killed()
            _require_no_more_wrong(_verified(crashed), rotten)
            _heal_with(crashed, good, FaultPlan())
            with open_simulated(crashed) as image:
                require(image.pread(image.size, 0) == good, "P1: the healed disk is another one")


def _heal_with(device: SimulatedDevice, good: bytes, plan: FaultPlan) -> None:
    with suppress(OSError, jqcow.JqcowError), open_simulated(device) as image:
        device.faults = plan
        image.protection.heal(RawDisk(SimulatedDevice(good)))


def healing_cut_off() -> None:
    """Y2: whatever a crash leaves of healing, what was rotten is so still, or right; nothing else changes."""
    device, good, rotten = _rotten()

    def judge(report: VerifyReport) -> None:
        _require_no_more_wrong(report, rotten)

    backup = SimulatedDevice(good)
    with small_steps():
        image = open_simulated(device)
        cut = _Cut(judge)
        device.barrier_listeners.append(cut)
        report = image.protection.heal(RawDisk(backup))
        image.close()
        cut.finish()
    require(not report.left, "healing left something", report.left)
    with open_simulated(device) as image:
        require(image.pread(image.size, 0) == good, "P1: the healed disk is another one")
        require(image.protection.verify().ok, "Y1: what is healed has not its sum")


def rot_stays_wrong() -> None:
    """Y2: a refresh makes no new sums of what is rotten; a backup that is rotten itself heals nothing."""
    device, good, rotten = _rotten()
    with open_simulated(device) as image:
        before = image.protection.verify()
        image.pwrite(b"changed", DISK_BYTES - CLUSTER_BYTES)
        image.protection.refresh()
        after = image.protection.verify()
        require(before.wrong_bytes == after.wrong_bytes, "Y2: a refresh hides rot", after)
        other = bytearray(good)
        for offset in rotten:
            other[offset + 7] ^= 8
        report = image.protection.heal(RawDisk(SimulatedDevice(bytes(other))))
        require(not report.healed_bytes, "Y2: healed by what has not the sum", report)


def sums_over_a_backing_file() -> None:
    """Y3: what is below may change without the image knowing: what is all of it has no sum."""
    chance, device = Random(1), SimulatedDevice()
    base = SimulatedDevice(chance.randbytes(DISK_BYTES))
    # Four clusters are a unit.
    with (
        create_simulated(device, DISK_BYTES, CLUSTER_BYTES // 4) as image,
        image.transaction() as transaction,
    ):
        transaction.set_backing_file("base", "raw")
    device.reopen()
    with jqcow.open_device(device, "r+", backing=RawDisk(base)) as image:
        image.pwrite(b"own", 3 * CLUSTER_BYTES)
        image.protection.refresh()
        report = image.protection.verify()
        require(report.right_bytes == CLUSTER_BYTES, "Y3: a sum of what is below", report)
    device.reopen()
    base = SimulatedDevice(base.content()[: 3 * CLUSTER_BYTES] + bytes(DISK_BYTES - 3 * CLUSTER_BYTES))
    with jqcow.open_device(device, "r", backing=RawDisk(base)) as image:
        report = image.protection.verify()
        require(report.bytes_of("wrong") == CLUSTER_BYTES, "Y3: what shows through is not compared", report)
        require(report.below_bytes == DISK_BYTES - CLUSTER_BYTES, "Y3: what is below has sums", report)


PROTECTION_SCENARIOS = (
    protection_cut_off,
    protection_on_a_failing_host,
    healing_cut_off,
    healing_on_a_failing_host,
    rot_stays_wrong,
    sums_over_a_backing_file,
)
