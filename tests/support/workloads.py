"""The workloads of the crash campaign: families, each in every cluster size, each with a seed of its own.

A family tells a story that meets certain barriers; the seed fills in what is written where.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from jqcow.ondisk.header import EXTENSION_FEATURE_NAMES, Extension, Header, HeaderArea
from jqcow.ondisk.root import ROOT_COPY_BYTES, ROOT_COPY_OFFSET
from jqcow.testing import SectorModel, SimulatedDevice, Workload
from tests.support import stories, transactions
from tests.support.images import SECTOR_BYTES, Expectation, Session, Windows, open_simulated
from tests.support.layouts import GarbageRule
from tests.support.stories import scribble

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
    discards = []
    for _ in range(4):
        cluster = random.randrange(3 * windows.window_bytes // cluster_bytes)
        discards.append((cluster * cluster_bytes, 2 * cluster_bytes))
    return _full_of_old_bytes(cluster_bytes, discards, random)


def half_free_image(cluster_bytes: int, random: Random) -> Start:
    """As `dirty_image`; free are the second halves of three windows."""
    window_bytes = Windows.of(cluster_bytes).window_bytes
    half = window_bytes // 2 // cluster_bytes * cluster_bytes
    discards = [(index * window_bytes + window_bytes - half, half) for index in range(3)]
    return _full_of_old_bytes(cluster_bytes, discards, random)


def _full_of_old_bytes(cluster_bytes: int, discards: list[tuple[int, int]], random: Random) -> Start:
    windows = Windows.of(cluster_bytes)
    device, session = _new_session(windows, cluster_bytes, windows.disk_bytes)
    for index in range(3):
        session.write(index * windows.window_bytes, windows.window_bytes)
    for position, length in discards:
        session.discard(position, length)
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
_OF_TRANSACTIONS = (
    ("transactions", used_image, transactions.transactions),
    ("transactions-dirty", unpunchable_image, transactions.transactions),
    ("transactions-first", vouched_image, transactions.transactions),
    ("transactions-new", empty_file, transactions.first_clusters),
    ("transactions-reuse", full_image, transactions.reuse_after_transactions),
    ("savepoints", full_image, transactions.savepoints),
    ("rollbacks", dirty_image, transactions.rollbacks),
    ("transaction-too-large", used_image, transactions.too_large),
    ("transaction-too-large-fails", used_image, transactions.too_large_fails),
    ("transaction-killed", full_image, transactions.transaction_killed),
    ("commits-fail", full_image, transactions.commits_fail),
    ("commits-fail-dirty", unpunchable_image, transactions.commits_fail),
    ("commit-fails-first", unpunchable_image, transactions.commit_fails_first),
    ("move-fails-first", empty_file, transactions.move_fails_first),
    ("overlapping", half_free_image, transactions.overlapping),
    ("resizes", full_image, transactions.resizes),
    ("resizes-adopted", qemu_image, transactions.resizes),
)
FAMILIES = {
    family.name: family
    for family in (
        Family("fresh", empty_file, stories.fresh),
        Family("reopened", used_image, stories.reopened),
        Family("adopted", qemu_image, stories.reopened),
        Family("adopted-in-place", qemu_image, stories.in_place),
        Family("dirty", dirty_image, stories.reopened),
        Family("dirty-reuse", dirty_image, stories.reuse),
        Family("holes", holed_image, stories.reuse),
        Family("unpunchable", unpunchable_image, stories.reuse),
        Family("autoclear", vouched_image, stories.in_place),
        Family("autoclear-first", vouched_image, stories.reopened),
        Family("long-header", long_header_image, stories.reopened, LARGE),
        Family("long-header-killed", long_header_image, stories.killed, LARGE),
        Family("half-moved", half_moved_image, stories.reopened, LARGE),
        Family("in-place", full_image, stories.in_place),
        Family("reuse", full_image, stories.reuse),
        Family("epochs", used_image, stories.epochs),
        Family("grow", used_image, stories.grow),
        Family("refcount-table", table_end_image, stories.grow, (512,), weight=0.25),
        Family("move", used_image, stories.move),
        Family("move-fails", used_image, stories.move_fails),
        Family("move-killed", used_image, stories.move_killed, (4096, 8192), weight=0.5),
        Family("reuse-tables", used_image, stories.reuse_tables, weight=0.5),
        Family("killed", used_image, stories.killed),
        Family("host-fails", full_image, stories.host_fails),
        Family("host-fails-dirty", unpunchable_image, stories.host_fails),
        Family("going-live-fails", used_image, stories.going_live_fails),
        Family("root-write-fails", full_image, stories.root_write_fails),
        Family("barrier-fails", full_image, stories.barrier_fails),
        Family("disk-full", used_image, stories.disk_full),
        *(Family(name, start, story) for name, start, story in _OF_TRANSACTIONS),
    )
}

TRANSACTION_FAMILIES = tuple(name for name, _, _ in _OF_TRANSACTIONS)


def workload_named(name: str) -> Workload[Expectation]:
    """Return the workload ``family/cluster size/seed``."""
    family, cluster_bytes, seed = name.split("/")
    return FAMILIES[family].workload(int(cluster_bytes), int(seed))
