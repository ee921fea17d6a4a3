"""Stories of devices of fixed size: written anew, used up, with data that no refcount counts."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress
from random import Random

from jqcow.device.targets import NewContent
from jqcow.disks.making import write_blank
from jqcow.errors import CorruptionError, FormatError, JqcowError
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import FileOptions, Form
from jqcow.testing import SimulatedDevice, enumerate_states
from jqcow.testing.device import noise
from tests.crash.judge import PromiseBroken, recover, require
from tests.support.patients import Tables
from tests.support.users import JOURNAL_BYTES, create_simulated, open_simulated

CLUSTERS = (1024, 4096, 8192)
OLD = b"\x33"
DISK_BYTES = 1 << 20


def a_device(size_bytes: int, content: bytes = b"") -> SimulatedDevice:
    """Return a device that was in use before, and now begins with ``content``."""
    return SimulatedDevice(content + noise(len(content), size_bytes - len(content)), has_fixed_size=True)


def _with_live_image(cluster_bytes: int) -> SimulatedDevice:
    device = a_device(DISK_BYTES)
    image = create_simulated(device, DISK_BYTES // 4, cluster_bytes)
    for cluster in range(6):
        image.pwrite(OLD * cluster_bytes, cluster * cluster_bytes)
        image.flush()
    return SimulatedDevice(device.durable_content(), has_fixed_size=True)


def written_anew(drop_barriers: tuple[str, ...]) -> None:
    """Until a new image is whole, a device has the old one as it was, or none."""
    for cluster_bytes in CLUSTERS:
        for new_bytes in CLUSTERS:
            device = _with_live_image(cluster_bytes)
            device.drop_barriers.update(drop_barriers)
            left: list[SimulatedDevice] = []

            def cut(_: str, now: SimulatedDevice, left: list[SimulatedDevice] = left) -> None:
                left.extend(now.crash(state) for state in enumerate_states(now, budget=12))

            device.barrier_listeners.append(cut)
            content = NewContent(device)
            form = Form.of(FileOptions(cluster_size=new_bytes))
            write_blank(content, blank_image(DISK_BYTES // 4, form))
            content.publish()
            for crashed in left:
                _judge_anew(crashed, cluster_bytes)
            _judge_new(SimulatedDevice(device.durable_content(), has_fixed_size=True))


def _judge_anew(crashed: SimulatedDevice, cluster_bytes: int) -> None:
    try:
        image = recover(crashed)
    except FormatError:
        return
    except JqcowError as error:
        raise PromiseBroken(f"P4: neither the old image nor the new one, nor none: {error}") from error
    old = OLD * (6 * cluster_bytes)
    with image:
        found = image.pread(len(old), 0)
        require(found in (old, bytes(len(old))), "P4: an image of old and new parts", cluster_bytes)
        require(not image.check().errors, "P2: an image of old and new parts", cluster_bytes)


def _judge_new(device: SimulatedDevice) -> None:
    try:
        with open_simulated(device) as image:
            require(image.pread(DISK_BYTES // 4, 0) == bytes(DISK_BYTES // 4), "P1: a new disk is zeros")
    except JqcowError as error:
        raise PromiseBroken(f"P1: the new image is not durable: {error}") from error


def zeros_of_a_raw_disk() -> None:
    """What a raw disk has no data for is zeros on a device, also in the midst of a sector."""
    device = a_device(DISK_BYTES)
    content, expected = NewContent(device), bytearray(300_000)
    content.truncate(len(expected))
    for offset, length in ((100_000, 5000), (700, 80), (200_000, 1)):
        content.pwrite(OLD * length, offset)
        expected[offset : offset + length] = OLD * length
    require(content.pread(len(expected), 0) == expected, "P1: the content before it is durable")
    content.publish()
    require(device.durable_content()[: len(expected)] == expected, "P1: old bytes show in a raw disk")


def uncounted_data_on_a_device() -> None:
    """P1: data behind all that refcounts count is found, and nothing takes its place."""
    cluster_bytes = 4096
    device = a_device(DISK_BYTES)
    with create_simulated(device, DISK_BYTES, cluster_bytes) as image:
        for cluster in range(20):
            image.pwrite(OLD * cluster_bytes, cluster * cluster_bytes)
    tables = Tables(device.content())
    for guest_cluster in range(14, 20):
        tables.set_refcount(tables.entry(tables.l2 + 8 * guest_cluster) & ~(1 << 63), 0)
    device = SimulatedDevice(bytes(tables.image), has_fixed_size=True)
    with open_simulated(device) as image:
        for cluster in range(30, 40):
            image.pwrite(b"\x44" * cluster_bytes, cluster * cluster_bytes)
            image.flush()
    with open_simulated(device) as image:
        found = image.pread(20 * cluster_bytes, 0)
        require(found == OLD * (20 * cluster_bytes), "P1: data that no refcount counts was written over")
        require(not image.check().errors, "P2: refcounts of what was not counted")


def used_up_device() -> None:
    """P5: a device is full: what has no room fails, what was flushed stays, and freed clusters are of use."""
    for cluster_bytes in (512, 4096):
        device = a_device(JOURNAL_BYTES + 60 * cluster_bytes + 40_000)
        image = create_simulated(device, 200 * cluster_bytes, cluster_bytes)
        written = 0
        for cluster in range(200):
            try:
                image.pwrite(bytes([cluster % 250 + 1]) * cluster_bytes, cluster * cluster_bytes)
            except OSError as error:
                require(error.errno == errno.ENOSPC, "P5: a full device", error)
                break
            written += 1
        require(20 < written < 200, "P5: the device was used", written)
        image.flush()
        image.checkpoint()
        _go_on_on_full_device(device.killed(), cluster_bytes, written)
        image.close()
        _go_on_on_full_device(device, cluster_bytes, written)


def _go_on_on_full_device(device: SimulatedDevice, cluster_bytes: int, written: int) -> None:
    device.reopen()
    try:
        with open_simulated(device) as image:
            image.discard(8 * cluster_bytes, 0)
            for cluster in range(100, 106):
                image.pwrite(b"\x55" * cluster_bytes, cluster * cluster_bytes)
            image.flush()
            for cluster in range(8, written):
                expected = bytes([cluster % 250 + 1]) * cluster_bytes
                if not 100 <= cluster < 106:
                    found = image.pread(cluster_bytes, cluster * cluster_bytes)
                    require(found == expected, "P1: a full device lost data", cluster)
            require(not image.check().errors, "P2: a full device")
    except OSError as error:
        raise PromiseBroken(f"P5: freed clusters of a full device are of no use: {error}") from error


def recovery_on_a_used_up_device() -> None:
    """P4: recovery finds no room for another journal, has freed metadata, and is cut off again and again."""
    for seed in range(2):
        for crashed in _cut_off(_killed_when_full(seed)):
            for again in [crashed, *_cut_off(crashed)]:
                with open_simulated(again) as image:
                    require(not image.check().errors, "P2: a recovery without room")
                    require(image.pread(512, 0) == b"\x66" * 512, "P1: what was flushed")


def _killed_when_full(seed: int) -> SimulatedDevice:
    """Return a full device whose live epoch has freed tables, and much free space below its end."""
    cluster_bytes, random = 512, Random(seed)
    device = a_device(2 * JOURNAL_BYTES + 400 * cluster_bytes)
    reach = cluster_bytes // 8 * cluster_bytes
    image = create_simulated(device, 60 * reach, cluster_bytes)
    with suppress(OSError):
        for position in range(60):
            image.pwrite(b"\x77" * (7 * cluster_bytes), position * reach)
    image.checkpoint()
    for position in random.sample(range(1, 50), 40):
        image.discard(reach, position * reach)
    image.pwrite(b"\x66" * 512, 0)
    image.resize(10 * reach)
    with suppress(OSError):
        for _ in range(4):
            image.pwrite(b"\x66" * 512, 0)
            image.flush()
    return SimulatedDevice(device.durable_content(), has_fixed_size=True)


def _cut_off(device: SimulatedDevice) -> Iterator[SimulatedDevice]:
    """Yield what power cuts in a recovery leave of a device."""
    left: list[SimulatedDevice] = []
    running = SimulatedDevice(device.durable_content(), has_fixed_size=True)

    def cut(_: str, now: SimulatedDevice) -> None:
        left.extend(now.crash(state) for state in enumerate_states(now, budget=3))

    running.barrier_listeners.append(cut)
    try:
        open_simulated(running).close()
    except (CorruptionError, OSError) as error:
        raise PromiseBroken(f"P4: {error}") from error
    yield from left[:: max(1, len(left) // 6)]
