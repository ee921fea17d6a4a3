"""The workloads of the crash campaign: families, each in every cluster size, each with a seed of its own.

A family tells a story that meets certain barriers; the seed fills in what is written where.
"""

from __future__ import annotations

import errno
import functools
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from jqcow.ondisk.header import EXTENSION_FEATURE_NAMES, Extension, Header, HeaderArea
from jqcow.ondisk.root import ROOT_COPY_BYTES, ROOT_COPY_OFFSET
from jqcow.testing import EVERYTHING, Fault, FaultPlan, SectorModel, SimulatedDevice, Workload
from tests.support.images import SECTOR_BYTES, Expectation, Session, Windows, open_simulated
from tests.support.layouts import GarbageRule

CLUSTER_SIZES = (512, 1024, 4096, 8192, 65536)
Story = Callable[[Session, Random], None]
Prepare = Callable[[int, Random], "Start"]
NO_EXTENSIONS = bytes(8)
GARBAGE = b"\xee"


@dataclass(frozen=True)
class Start:
    """What a workload starts from: the file, whose windows hold ``guest``, and the sizes of its disk."""

    windows: Windows
    content: bytes
    guest: bytes
    size_bytes: int
    extensions: bytes = NO_EXTENSIONS
    can_punch: bool = True
    vouched: bool = False
    holes: tuple[tuple[int, int], ...] = ()

    def device(self) -> SimulatedDevice:
        """Return a device that holds the file, durably."""
        device = SimulatedDevice(self.content, can_punch=self.can_punch)
        for offset, length in self.holes:
            device.punch(offset, length)
        if self.holes:
            device.barrier("prepared")
        return device

    def expectation(self) -> Expectation:
        """Return what may be expected of the file as it is."""
        sectors = SectorModel(self.windows.model_bytes, self.guest)
        vouched = self.guest.ljust(self.windows.model_bytes, b"\0") if self.vouched else None
        return Expectation(
            self.windows,
            sectors,
            (self.size_bytes,),
            exists=bool(self.content),
            extensions=self.extensions,
            vouched=vouched,
        )


# What a workload may start from


def empty_file(cluster_bytes: int, random: Random) -> Start:
    """Nothing: the image is created by the workload."""
    windows = Windows.of(cluster_bytes)
    return Start(windows, b"", b"", _some_size(windows, random))


def used_image(cluster_bytes: int, random: Random) -> Start:
    """An image with data and zero clusters, made and closed by jqcow."""
    windows = Windows.of(cluster_bytes)
    device, session = _new_session(windows, cluster_bytes, _some_size(windows, random))
    for _ in range(8):
        scribble(session, random)
    session.close()
    return _start_of(device, session)


def full_image(cluster_bytes: int, random: Random) -> Start:
    """An image whose first two windows are all allocated."""
    windows = Windows.of(cluster_bytes)
    device, session = _new_session(windows, cluster_bytes, windows.disk_bytes)
    for index in range(2):
        session.write(index * windows.window_bytes, windows.window_bytes)
    session.close()
    return _start_of(device, session)


def dirty_image(cluster_bytes: int, random: Random) -> Start:
    """An image with free clusters inside and past the used ones, all full of old bytes; a ragged end."""
    windows = Windows.of(cluster_bytes)
    device, session = _new_session(windows, cluster_bytes, windows.disk_bytes)
    for index in range(3):
        session.write(index * windows.window_bytes, windows.window_bytes)
    for _ in range(4):
        cluster = random.randrange(3 * windows.window_bytes // cluster_bytes)
        session.discard(cluster * cluster_bytes, 2 * cluster_bytes)
    session.close()
    start = _start_of(device, session)
    content = bytearray(start.content)
    for cluster in free_clusters(start.content):
        content[cluster * cluster_bytes : (cluster + 1) * cluster_bytes] = GARBAGE * cluster_bytes
    content += GARBAGE * (2 * cluster_bytes + random.choice((0, cluster_bytes // 2)))
    return _with(start, content=bytes(content))


def holed_image(cluster_bytes: int, random: Random) -> Start:
    """As `dirty_image`, but some of the free clusters are holes of the host."""
    start = dirty_image(cluster_bytes, random)
    holes = [
        (cluster * cluster_bytes, cluster_bytes)
        for cluster in free_clusters(start.content)
        if random.random() < 0.6 and (cluster + 1) * cluster_bytes <= len(start.content)
    ]
    return _with(start, holes=tuple(holes))


def unpunchable_image(cluster_bytes: int, random: Random) -> Start:
    """As `dirty_image`, on a host without holes."""
    return _with(dirty_image(cluster_bytes, random), can_punch=False)


def vouched_image(cluster_bytes: int, random: Random) -> Start:
    """An image with an autoclear bit that jqcow does not know: it vouches for the data as it is."""
    start = full_image(cluster_bytes, random)
    content = bytearray(start.content)
    content[88:96] = (1 << 63).to_bytes(8, "big")
    return _with(start, content=bytes(content), vouched=True)


def long_header_image(cluster_bytes: int, random: Random) -> Start:
    """An image whose header extensions reach past the first sector."""
    start = used_image(cluster_bytes, random)
    names = Extension(EXTENSION_FEATURE_NAMES, b"".join(_feature_name(bit) for bit in range(12)))
    unknown = Extension(0x12345678, bytes(range(256)) * 2)
    extensions = names.pack() + unknown.pack() + NO_EXTENSIONS
    content = bytearray(start.content)
    content[112 : 112 + len(extensions)] = extensions
    return _with(start, content=bytes(content), extensions=extensions)


def qemu_image(cluster_bytes: int, random: Random) -> Start:
    """An image made and filled by QEMU: its header fills the first sector, its L1 table stands elsewhere."""
    windows = Windows.of(cluster_bytes)
    content = _made_by_qemu(cluster_bytes, windows.disk_bytes, windows.stride_bytes, windows.window_bytes)
    area = HeaderArea.parse(content[:cluster_bytes])
    guest = bytearray(windows.model_bytes)
    guest[: windows.window_bytes // 2] = b"\x11" * (windows.window_bytes // 2)
    second = windows.window_bytes
    guest[second : second + windows.window_bytes] = b"\x22" * windows.window_bytes
    extensions = area.data[area.header.header_length :]
    return Start(windows, content, bytes(guest), windows.disk_bytes, extensions=extensions)


def half_moved_image(cluster_bytes: int, random: Random) -> Start:
    """A crashed image, whose recovery was cut too: the next root copy is there, and not what it names."""
    windows = Windows.of(cluster_bytes)
    device, session = _new_session(windows, cluster_bytes, windows.disk_bytes)
    for _ in range(6):
        scribble(session, random)
    session.flush()
    crashed = SimulatedDevice(device.durable_content())
    halves: list[bytes] = []

    def cut(name: str, device: SimulatedDevice) -> None:
        if name == "move.range":
            durable, copy = (
                device.durable_content(),
                slice(ROOT_COPY_OFFSET, ROOT_COPY_OFFSET + ROOT_COPY_BYTES),
            )
            halves.append(durable[: copy.start] + device.content()[copy] + durable[copy.stop :])

    crashed.barrier_listeners.append(cut)
    open_simulated(crashed)
    guest = session.expectation.sectors.current_content()
    return Start(windows, halves[0], guest, windows.disk_bytes)


def table_end_image(cluster_bytes: int, random: Random) -> Start:
    """An image of 512-byte clusters whose file ends just where its refcount table does."""
    start = used_image(cluster_bytes, random)
    reach = cluster_bytes // 8 * cluster_bytes // 2 * cluster_bytes
    padding = reach - 6 * cluster_bytes - len(start.content)
    return _with(start, content=start.content + bytes(padding), holes=((len(start.content), padding),))


def _with(start: Start, **changes: object) -> Start:
    return Start(**{**start.__dict__, **changes})


def _some_size(windows: Windows, random: Random) -> int:
    """Return the size of a disk that shows three windows, the last one perhaps in part."""
    return 2 * windows.stride_bytes + windows.window_bytes - SECTOR_BYTES * random.choice((0, 1, 3))


def _new_session(windows: Windows, cluster_bytes: int, size_bytes: int) -> tuple[SimulatedDevice, Session]:
    device = SimulatedDevice()
    expectation = Expectation(windows, SectorModel(windows.model_bytes), (size_bytes,), exists=False)
    session = Session(device, expectation)
    session.create(cluster_bytes, size_bytes)
    return device, session


def _start_of(device: SimulatedDevice, session: Session) -> Start:
    expectation = session.expectation
    return Start(
        expectation.windows,
        device.content(),
        expectation.sectors.current_content(),
        expectation.sizes[-1],
    )


def free_clusters(content: bytes) -> list[int]:
    """Return the clusters of a clean image's file that have refcount 0."""
    header = Header.unpack(content[:SECTOR_BYTES])
    size = header.geometry.cluster_bytes
    per_block = header.geometry.refcounts_per_cluster
    free = []
    for cluster in range(len(content) // size):
        entry = header.refcount_table_offset + cluster // per_block * 8
        block = int.from_bytes(content[entry : entry + 8], "big")
        place = block + cluster % per_block * 2
        if not block or not any(content[place : place + 2]):
            free.append(cluster)
    return free


def _feature_name(bit: int) -> bytes:
    return bytes([1, 20 + bit]) + f"feature number {bit} of somebody".encode().ljust(46, b"\0")


@functools.cache
def _made_by_qemu(cluster_bytes: int, size_bytes: int, stride_bytes: int, window_bytes: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="jqcow-crash-") as folder:
        path = Path(folder, "made.qcow2")
        options = f"cluster_size={cluster_bytes}"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(path), str(size_bytes)]
        subprocess.run(create, check=True)
        writes = [f"write -P 0x11 0 {window_bytes // 2}", f"write -P 0x22 {stride_bytes} {window_bytes}"]
        arguments = [part for write in writes for part in ("-c", write)]
        subprocess.run(["qemu-io", "-f", "qcow2", *arguments, str(path)], check=True, capture_output=True)
        return path.read_bytes()


# What a user does


def scribble(session: Session, random: Random) -> None:
    """Do one thing to the disk."""
    windows = session.expectation.windows
    cluster_bytes = session.live.info().cluster_size
    position = random.randrange(windows.model_bytes // SECTOR_BYTES) * SECTOR_BYTES
    length = random.choice((1, 2, 3, 8, 2 * cluster_bytes // SECTOR_BYTES)) * SECTOR_BYTES
    cluster = position - position % cluster_bytes
    choice = random.random()
    if choice < 0.5:
        session.write(position, length)
    elif choice < 0.6:
        session.write(cluster, cluster_bytes)
    elif choice < 0.7:
        session.write(position + random.randrange(SECTOR_BYTES), random.randrange(1, length + 1))
    elif choice < 0.85:
        session.write_zeroes(cluster, cluster_bytes * random.randint(1, 3), unmap=random.random() < 0.5)
    else:
        session.discard(cluster, cluster_bytes * random.randint(1, 4))


def scribble_on(session: Session, random: Random, count: int, flush_every: int = 3) -> None:
    """Do many things, with a flush every few."""
    for number in range(count):
        scribble(session, random)
        if number % flush_every == flush_every - 1:
            session.flush()


def fresh(session: Session, random: Random) -> None:
    """Create, use, close."""
    size = session.expectation.sizes[-1]
    session.create(_cluster_bytes_of(session), size)
    scribble_on(session, random, 7)
    session.close()


def reopened(session: Session, random: Random) -> None:
    """Two sessions on an image that exists; the second starts with a flush of nothing."""
    session.open()
    scribble_on(session, random, 5)
    session.close()
    session.open()
    session.flush()
    scribble_on(session, random, 4, flush_every=2)
    session.checkpoint()
    scribble(session, random)
    session.close()


def in_place(session: Session, random: Random) -> None:
    """Overwrite what is allocated: the image stays clean; then one change of its mapping."""
    session.open()
    window_bytes = session.expectation.windows.window_bytes
    for _ in range(4):
        session.write(random.randrange(window_bytes // SECTOR_BYTES) * SECTOR_BYTES, 3 * SECTOR_BYTES)
        session.flush()
        session.write(random.randrange(window_bytes // SECTOR_BYTES) * SECTOR_BYTES, SECTOR_BYTES)
    session.close()
    session.open()
    session.write(0, SECTOR_BYTES)
    session.write(3 * window_bytes, 2 * SECTOR_BYTES)
    session.close()


def reuse(session: Session, random: Random) -> None:
    """Free clusters, keep clusters under zeros, and use them again at once, and after flushes."""
    session.open()
    windows, cluster_bytes = session.expectation.windows, session.live.info().cluster_size
    clusters = windows.window_bytes // cluster_bytes
    for turn in range(4):
        victim = random.randrange(2 * clusters) * cluster_bytes
        if turn % 2:
            session.write_zeroes(victim, cluster_bytes, unmap=False)
            if turn == 3:
                session.flush()
            session.write(
                victim + SECTOR_BYTES * random.randrange(cluster_bytes // SECTOR_BYTES), SECTOR_BYTES
            )
        else:
            session.discard(victim, 2 * cluster_bytes)
        session.write((2 * clusters + random.randrange(2 * clusters)) * cluster_bytes, SECTOR_BYTES)
        if turn != 1:
            session.flush()
        session.write((2 * clusters + random.randrange(2 * clusters)) * cluster_bytes, cluster_bytes)
    session.flush()
    session.write(random.randrange(2 * clusters) * cluster_bytes, 2 * SECTOR_BYTES)
    session.close()


def epochs(session: Session, random: Random) -> None:
    """So many flushes that the journal's halves are filled in turn."""
    session.open()
    for _ in range(22):
        scribble(session, random)
        session.flush()
    session.close()


def grow(session: Session, random: Random) -> None:
    """Make the disk larger, and use what was added."""
    session.open()
    scribble_on(session, random, 2)
    windows = session.expectation.windows
    session.resize(windows.disk_bytes)
    session.write(3 * windows.window_bytes, 2 * SECTOR_BYTES)
    session.flush()
    session.resize(windows.disk_bytes * random.choice((2, 70)))
    scribble_on(session, random, 3)
    session.close()


def move(session: Session, random: Random) -> None:
    """Stage more than a half of the journal holds: it moves to a larger range."""
    session.open()
    scribble_on(session, random, 2, flush_every=2)
    reach = session.expectation.windows.stride_bytes
    # Each growth of the L1 table copies one block more into the record.
    for _ in range({512: 70, 1024: 34}.get(session.live.info().cluster_size, 10)):
        session.resize(session.expectation.sizes[-1] + reach)
    session.flush()
    scribble_on(session, random, 4, flush_every=2)
    session.close()


def reuse_tables(session: Session, random: Random) -> None:
    """Outgrow an L1 table that the journal holds, and use its clusters for data, epoch after epoch."""
    session.open()
    windows, size = session.expectation.windows, session.expectation.sizes[-1]
    for turn in range(6):
        session.write(turn % 2 * windows.window_bytes + turn // 2 * SECTOR_BYTES, SECTOR_BYTES)
        scribble(session, random)
        session.flush()
        size += windows.stride_bytes * (session.live.info().cluster_size // 8)
        session.resize(size)
        session.flush()
        session.flush()
        for _ in range(4):
            cluster_bytes = session.live.info().cluster_size
            position = random.randrange(windows.model_bytes // cluster_bytes) * cluster_bytes
            session.write_zeroes(position, cluster_bytes, unmap=True)
            session.write(position, cluster_bytes)
            session.flush()
    session.close()


def move_fails(session: Session, random: Random) -> None:
    """Writes fail while the journal moves, that of sector 0 among them; later the move succeeds."""
    session.open()
    scribble_on(session, random, 2, flush_every=2)
    reach = session.expectation.windows.stride_bytes
    for _ in range({512: 70, 1024: 34}.get(session.live.info().cluster_size, 10)):
        session.resize(session.expectation.sizes[-1] + reach)
    for number in random.sample(range(1, 12), 4):
        applied = random.choice((0, 512, EVERYTHING))
        with session.faults(FaultPlan(Fault(errno.EIO, at=number, call="pwrite", applied_bytes=applied))):
            scribble(session, random)
            session.flush()
    scribble_on(session, random, 2, flush_every=2)
    session.close()


def move_killed(session: Session, random: Random) -> None:
    """A write fails while the journal moves, and then the writer is killed; the next one recovers."""
    for number in random.sample(range(4, 9), 3):
        session.open()
        scribble(session, random)
        session.flush()
        reach = session.expectation.windows.stride_bytes
        for _ in range({512: 70, 1024: 34}.get(session.live.info().cluster_size, 10)):
            session.resize(session.live.size + reach)
        applied = random.choice((0, EVERYTHING))
        with session.faults(FaultPlan(Fault(errno.EIO, at=number, call="pwrite", applied_bytes=applied))):
            session.flush()
        session.kill()
    session.open()
    session.close()


def killed(session: Session, random: Random) -> None:
    """The writer is killed; the next one recovers and goes on; killed once more, before any flush."""
    session.open()
    scribble_on(session, random, 5)
    session.kill()
    session.open()
    scribble_on(session, random, 3, flush_every=2)
    scribble(session, random)
    session.kill()
    session.open()
    session.close()


def host_fails(session: Session, random: Random) -> None:
    """Calls of the host fail, one at a time, whatever they are; work goes on each time."""
    session.open()
    for _ in range(6):
        error = random.choice((errno.EIO, errno.ENOSPC))
        applied = random.choice((0, 512, 4096, EVERYTHING))
        call = random.choice(("pwrite", "pwrite", "allocate", "punch", "truncate"))
        fault = Fault(error, at=random.randint(1, 4), call=call, applied_bytes=applied)
        with session.faults(FaultPlan(fault)):
            scribble_on(session, random, 4, flush_every=2)
            session.checkpoint()
        scribble(session, random)
        session.flush()
    session.close()


def going_live_fails(session: Session, random: Random) -> None:
    """The first writes of a session fail, that of sector 0 among them; the next ones succeed."""
    for number in range(2, 6):
        session.open()
        applied = random.choice((0, EVERYTHING))
        with session.faults(FaultPlan(Fault(errno.EIO, at=number, call="pwrite", applied_bytes=applied))):
            scribble_on(session, random, 2, flush_every=1)
        if number % 2:
            session.close()
            continue
        scribble_on(session, random, 2, flush_every=2)
        with session.faults(FaultPlan(Fault(errno.EIO, at=number - 1, call="pwrite", applied_bytes=applied))):
            session.close()
        if session.image is not None:
            session.close()


def root_write_fails(session: Session, random: Random) -> None:
    """The write of sector 0 fails when the image goes live; before any barrier a change tries again."""
    for turn in range(3):
        session.open()
        position = 2 * session.expectation.windows.window_bytes + turn * 4 * SECTOR_BYTES
        # Zeros of the range, opening frame, root copy, and then sector 0.
        fault = Fault(errno.EIO, at=4, call="pwrite", applied_bytes=random.choice((0, EVERYTHING)))
        with session.faults(FaultPlan(fault)):
            session.discard(0, session.expectation.windows.window_bytes // 2)
        session.write(position, 2 * SECTOR_BYTES)
        session.write_zeroes(0, session.expectation.windows.window_bytes // 4, unmap=True)
        session.flush()
        session.close()
        session.open()
        session.write(session.expectation.windows.window_bytes // 2, SECTOR_BYTES)
        session.write(0, session.expectation.windows.window_bytes // 2)
        session.close()


def barrier_fails(session: Session, random: Random) -> None:
    """Barriers fail, and what was in flight is lost though readable; the next opening recovers."""
    session.open()
    for _ in range(3):
        at = random.randint(1, 5)
        with session.faults(FaultPlan(Fault(errno.EIO, at=at, call="barrier"))):
            scribble_on(session, random, 4, flush_every=1)
            session.checkpoint()
        scribble_on(session, random, 2, flush_every=2)
    session.close()


def disk_full(session: Session, random: Random) -> None:
    """The host's disk is full for a while, and then is not."""
    session.open()
    scribble_on(session, random, 2, flush_every=2)
    with session.faults(FaultPlan(full_from=random.randint(1, 12))):
        scribble_on(session, random, 8, flush_every=2)
    scribble_on(session, random, 3)
    session.close()


def mixed(session: Session) -> None:
    """Touch all that has a call to fail: going live, growth, zeroes, reuse, an epoch's end, a move, close."""
    if session.image is None:
        session.open()
    windows, cluster_bytes = session.expectation.windows, session.live.info().cluster_size
    session.write(0, 3 * SECTOR_BYTES)
    session.flush()
    session.write(2 * windows.window_bytes, cluster_bytes + SECTOR_BYTES)
    session.discard(0, 2 * cluster_bytes)
    session.flush()
    session.write_zeroes(windows.window_bytes, 2 * cluster_bytes, unmap=False)
    session.write(windows.window_bytes + SECTOR_BYTES, SECTOR_BYTES)
    session.checkpoint()
    session.write(3 * windows.window_bytes, SECTOR_BYTES, fua=True)
    for _ in range(10):
        session.resize(session.live.size + windows.stride_bytes)
    session.flush()
    session.write(cluster_bytes, cluster_bytes)
    session.close()


def _cluster_bytes_of(session: Session) -> int:
    # A reach is one L2 table of 8-byte entries: cluster size squared, by 8.
    return int((session.expectation.windows.stride_bytes * 8) ** 0.5)


@dataclass(frozen=True)
class Family:
    """A story told from a start, in some cluster sizes. ``weight`` scales the states of one interval."""

    name: str
    prepare: Prepare
    story: Story
    cluster_sizes: tuple[int, ...] = CLUSTER_SIZES
    weight: float = 1.0

    def workload(self, cluster_bytes: int, seed: int) -> Workload[Expectation]:
        """Return the family's workload for a cluster size and a seed: the same on every run."""
        name = f"{self.name}/{cluster_bytes}/{seed}"
        rule = GarbageRule() if cluster_bytes > 4096 else None
        start = functools.cache(lambda: self.prepare(cluster_bytes, Random(f"start {name}")))

        def run(device: SimulatedDevice, expectation: Expectation) -> None:
            if rule is not None:
                rule.follow(device)
            self.story(Session(device, expectation, written=1 << 16), Random(f"story {name}"))

        return Workload(
            name,
            run,
            make_model=lambda: start().expectation(),
            make_device=lambda: start().device(),
            garbage_allowed=rule,
        )


LARGE = (8192, 65536)
FAMILIES = {
    family.name: family
    for family in (
        Family("fresh", empty_file, fresh),
        Family("reopened", used_image, reopened),
        Family("adopted", qemu_image, reopened),
        Family("adopted-in-place", qemu_image, in_place),
        Family("dirty", dirty_image, reopened),
        Family("dirty-reuse", dirty_image, reuse),
        Family("holes", holed_image, reuse),
        Family("unpunchable", unpunchable_image, reuse),
        Family("autoclear", vouched_image, in_place),
        Family("autoclear-first", vouched_image, reopened),
        Family("long-header", long_header_image, reopened, LARGE),
        Family("long-header-killed", long_header_image, killed, LARGE),
        Family("half-moved", half_moved_image, reopened, LARGE),
        Family("in-place", full_image, in_place),
        Family("reuse", full_image, reuse),
        Family("epochs", used_image, epochs),
        Family("grow", used_image, grow),
        Family("refcount-table", table_end_image, grow, (512,), weight=0.25),
        Family("move", used_image, move),
        Family("move-fails", used_image, move_fails),
        Family("move-killed", used_image, move_killed, (4096, 8192), weight=0.5),
        Family("reuse-tables", used_image, reuse_tables, weight=0.5),
        Family("killed", used_image, killed),
        Family("host-fails", full_image, host_fails),
        Family("host-fails-dirty", unpunchable_image, host_fails),
        Family("going-live-fails", used_image, going_live_fails),
        Family("root-write-fails", full_image, root_write_fails),
        Family("barrier-fails", full_image, barrier_fails),
        Family("disk-full", used_image, disk_full),
    )
}


def workload_named(name: str) -> Workload[Expectation]:
    """Return the workload ``family/cluster size/seed``."""
    family, cluster_bytes, seed = name.split("/")
    return FAMILIES[family].workload(int(cluster_bytes), int(seed))
