"""Two ways to end a writer before its time: SIGKILL, and a power cut on a simulated disk."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jqcow
from demo.filesystem import ToolError, Versions
from demo.plan import Plan, write_batches
from jqcow.testing import CrashSpace, CrashState, InFlight, SimulatedDevice, Write

STATES_LOOKED_AT = 64


@dataclass(frozen=True)
class Fate:
    """What a power cut did to the writes in flight: how many reached the disk whole, not at all, in part."""

    landed: int
    dropped: int
    torn: int

    @property
    def is_telling(self) -> bool:
        """True if some write was dropped and another one torn."""
        return self.dropped > 0 and self.torn > 0


@dataclass(frozen=True)
class PowerCut:
    """The disk after a power cut, and how many batches were acknowledged before it."""

    content: bytes
    acknowledged_batches: int
    fate: Fate


class _PowerFails(Exception):
    """The moment of the power cut."""


def start_writer(
    image_path: Path, versions: Versions, seed: int, first_batch: int = 0
) -> subprocess.Popen[bytes]:
    """Start the writer as a process; it tells on its standard output which batches are acknowledged."""
    disks = (image_path, versions.old_path, versions.new_path)
    arguments = [*map(str, disks), str(seed), str(first_batch)]
    return subprocess.Popen([sys.executable, "-m", "demo.writer", *arguments], stdout=subprocess.PIPE)


def kill_writer(image_path: Path, versions: Versions, plan: Plan, seed: int) -> int:
    """Run the writer, kill it somewhere in the middle, and return how many batches it acknowledged."""
    random = Random(f"{seed}/kill")
    wanted = random.randrange(len(plan.batches) * 3 // 10, len(plan.batches) * 6 // 10)
    with start_writer(image_path, versions, seed) as writer:
        assert writer.stdout is not None
        acknowledged = sum(1 for _ in zip(range(wanted), writer.stdout, strict=False))
        time.sleep(random.uniform(0, 0.002))
        writer.kill()
        # What it acknowledged between the line that was waited for and the signal counts too.
        acknowledged += len(writer.stdout.readlines())
    if acknowledged == len(plan.batches) or writer.returncode >= 0:
        raise ToolError(f"the writer was not killed: it ended with status {writer.returncode}")
    return acknowledged


def finish_writing(image_path: Path, versions: Versions, seed: int, first_batch: int) -> int:
    """Let a new writer process go on from a batch to the end; return how many batches it acknowledged."""
    with start_writer(image_path, versions, seed, first_batch) as writer:
        assert writer.stdout is not None
        acknowledged = len(writer.stdout.readlines())
    if writer.returncode:
        raise ToolError(f"the writer ended with status {writer.returncode}")
    return acknowledged


def cut_power(image: bytes, plan: Plan, seed: int, *, barriers_work: bool) -> PowerCut:
    """Run the writer on a simulated disk and cut the power at a point that the seed gives."""
    random = Random(f"{seed}/power")
    cut_after = random.randrange(len(plan.batches) * 3 // 10, len(plan.batches) * 6 // 10)
    in_flight_wanted = random.randint(3, 9)
    # A record is in flight when its barrier begins: two of three cuts come then, the others amid the data.
    at_barrier = random.randrange(3) < 2
    device = SimulatedDevice(image)
    acknowledged: list[None] = []
    moments: list[InFlight] = []

    def watch(name: str, device: SimulatedDevice) -> None:
        if len(acknowledged) >= cut_after and len(device.changes) >= in_flight_wanted:
            moments.append(device.in_flight())
            raise _PowerFails

    def disable(name: str, device: SimulatedDevice) -> None:
        device.drop_barriers.add(name)

    if not barriers_work:
        device.barrier_listeners.append(disable)
    (device.barrier_listeners if at_barrier else device.change_listeners).append(watch)
    try:
        opened = jqcow.open_device(device, "r+", new_salt=lambda: random.randbytes(16))
        write_batches(opened, plan, 0, lambda: acknowledged.append(None))
    except _PowerFails:
        pass
    # The first moment counts: what the engine did to roll back, it did after the power was gone.
    moment = moments[0]
    state, fate = _telling_state(moment, random.getrandbits(32))
    return PowerCut(state.content(), len(acknowledged), fate)


def _telling_state(moment: InFlight, seed: int) -> tuple[CrashState, Fate]:
    """Choose a random outcome of the cut, one with dropped and torn writes if there is any."""
    space = CrashSpace(moment, seed=seed)
    first: tuple[CrashState, Fate] | None = None
    for index in range(STATES_LOOKED_AT):
        state = space.state(f"changes:{index}:{seed}")
        fate = _fate_of(moment, state.content())
        first = first or (state, fate)
        if fate.is_telling:
            return state, fate
    if first is None:
        raise ToolError("nothing was in flight when the power was cut")
    return first


def _fate_of(moment: InFlight, content: bytes) -> Fate:
    counts = {True: 0, False: 0, None: 0}
    for change in moment.changes:
        if isinstance(change, Write):
            counts[_has_landed(change, content, moment.sector_bytes)] += 1
    return Fate(landed=counts[True], dropped=counts[False], torn=counts[None])


def _has_landed(write: Write, content: bytes, sector_bytes: int) -> bool | None:
    """Return True if a write is on the disk, False if not, None if a part of it is."""
    landed = {
        content[write.offset + start : write.offset + start + sector_bytes]
        == write.data[start : start + sector_bytes]
        for start in range(0, len(write.data), sector_bytes)
    }
    return None if len(landed) == 2 else landed.pop()
