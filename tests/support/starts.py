"""What the workloads of the crash laboratory start from: image files, and what may be expected of them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from jqcow.ondisk.header import EXTENSION_FEATURE_NAMES, Extension, Header
from jqcow.ondisk.root import ROOT_COPY_BYTES, ROOT_COPY_OFFSET
from jqcow.testing import SectorModel, SimulatedDevice
from tests.support.expectation import SECTOR_BYTES, AllTaken, Expectation, Windows
from tests.support.images import Session, open_simulated
from tests.support.stories import scribble

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
    snapshots: AllTaken = ()
    damaged: bool = False

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
            snapshots=self.snapshots,
            damaged=self.damaged,
        )


# Made by jqcow


def empty_file(cluster_bytes: int, random: Random) -> Start:
    """Nothing: the image is created by the workload."""
    windows = Windows.of(cluster_bytes)
    return Start(windows, b"", b"", some_size(windows, random))


def used_image(cluster_bytes: int, random: Random) -> Start:
    """An image with data and zero clusters, made and closed by jqcow."""
    windows = Windows.of(cluster_bytes)
    device, session = new_session(windows, cluster_bytes, some_size(windows, random))
    for _ in range(8):
        scribble(session, random)
    session.close()
    return start_of(device, session)


def full_image(cluster_bytes: int, random: Random) -> Start:
    """An image whose first two windows are all allocated."""
    windows = Windows.of(cluster_bytes)
    device, session = new_session(windows, cluster_bytes, windows.disk_bytes)
    for index in range(2):
        session.write(index * windows.window_bytes, windows.window_bytes)
    session.close()
    return start_of(device, session)


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
    device, session = new_session(windows, cluster_bytes, windows.disk_bytes)
    for index in range(3):
        session.write(index * windows.window_bytes, windows.window_bytes)
    for position, length in discards:
        session.discard(position, length)
    session.close()
    return with_old_bytes(start_of(device, session), cluster_bytes, random)


def with_old_bytes(start: Start, cluster_bytes: int, random: Random) -> Start:
    """Fill the free clusters, and what comes behind the used ones."""
    content = bytearray(start.content)
    for cluster in free_clusters(start.content):
        content[cluster * cluster_bytes : (cluster + 1) * cluster_bytes] = GARBAGE * cluster_bytes
    content += GARBAGE * (2 * cluster_bytes + random.choice((0, cluster_bytes // 2)))
    return with_changes(start, content=bytes(content))


def holed_image(cluster_bytes: int, random: Random) -> Start:
    """As `dirty_image`, but some of the free clusters are holes of the host."""
    start = dirty_image(cluster_bytes, random)
    holes = [
        (cluster * cluster_bytes, cluster_bytes)
        for cluster in free_clusters(start.content)
        if random.random() < 0.6 and (cluster + 1) * cluster_bytes <= len(start.content)
    ]
    return with_changes(start, holes=tuple(holes))


def unpunchable_image(cluster_bytes: int, random: Random) -> Start:
    """As `dirty_image`, on a host without holes."""
    return with_changes(dirty_image(cluster_bytes, random), can_punch=False)


def vouched_image(cluster_bytes: int, random: Random) -> Start:
    """An image with an autoclear bit that jqcow does not know: it vouches for the data as it is."""
    start = full_image(cluster_bytes, random)
    content = bytearray(start.content)
    content[88:96] = (1 << 63).to_bytes(8, "big")
    return with_changes(start, content=bytes(content), vouched=True)


def long_header_image(cluster_bytes: int, random: Random) -> Start:
    """An image whose header extensions reach past the first sector."""
    start = used_image(cluster_bytes, random)
    names = Extension(EXTENSION_FEATURE_NAMES, b"".join(_feature_name(bit) for bit in range(12)))
    unknown = Extension(0x12345678, bytes(range(256)) * 2)
    extensions = names.pack() + unknown.pack() + NO_EXTENSIONS
    content = bytearray(start.content)
    content[112 : 112 + len(extensions)] = extensions
    return with_changes(start, content=bytes(content), extensions=extensions)


def snapshots_image(cluster_bytes: int, random: Random) -> Start:
    """An image with two snapshots, compressed clusters, and old bytes in all that is free."""
    windows = Windows.of(cluster_bytes)
    device, session = new_session(windows, cluster_bytes, some_size(windows, random))
    for index in range(2):
        session.write(index * windows.window_bytes, windows.window_bytes // 2)
        session.write_compressed(index * windows.window_bytes + 4 * cluster_bytes, 3 * cluster_bytes)
        session.create_snapshot()
        session.write(cluster_bytes, cluster_bytes + SECTOR_BYTES)
        session.discard(index * windows.window_bytes + 2 * cluster_bytes, cluster_bytes)
        scribble(session, random)
    session.close()
    return with_old_bytes(start_of(device, session), cluster_bytes, random)


def snapshots_unpunchable_image(cluster_bytes: int, random: Random) -> Start:
    """As `snapshots_image`, on a host without holes."""
    return with_changes(snapshots_image(cluster_bytes, random), can_punch=False)


def wide_image(cluster_bytes: int, random: Random) -> Start:
    """An image with so many L2 tables that a change of all is longer than a half of the smallest journal."""
    windows = Windows(12, 2 * cluster_bytes, cluster_bytes * cluster_bytes // 8)
    device, session = new_session(windows, cluster_bytes, windows.disk_bytes)
    for index in range(windows.count):
        session.write(index * windows.window_bytes, random.randint(1, windows.window_bytes))
    session.close()
    return start_of(device, session)


def half_moved_image(cluster_bytes: int, random: Random) -> Start:
    """A crashed image, whose recovery was cut too: the next root copy is there, and not what it names."""
    windows = Windows.of(cluster_bytes)
    device, session = new_session(windows, cluster_bytes, windows.disk_bytes)
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
    return with_changes(start, content=start.content + bytes(padding), holes=((len(start.content), padding),))


def with_changes(start: Start, **changes: object) -> Start:
    return Start(**{**start.__dict__, **changes})


def some_size(windows: Windows, random: Random) -> int:
    """Return the size of a disk that shows three windows, the last one perhaps in part."""
    return 2 * windows.stride_bytes + windows.window_bytes - SECTOR_BYTES * random.choice((0, 1, 3))


def new_session(windows: Windows, cluster_bytes: int, size_bytes: int) -> tuple[SimulatedDevice, Session]:
    device = SimulatedDevice()
    expectation = Expectation(windows, SectorModel(windows.model_bytes), (size_bytes,), exists=False)
    session = Session(device, expectation)
    session.create(cluster_bytes, size_bytes)
    return device, session


def start_of(device: SimulatedDevice, session: Session) -> Start:
    expectation = session.expectation
    return Start(
        expectation.windows,
        device.content(),
        expectation.sectors.current_content(),
        expectation.sizes[-1],
        snapshots=expectation.snapshots,
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
