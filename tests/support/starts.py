"""What every run in the crash laboratory starts from: image files, and what may be expected of them.

`STARTS` makes them by name, from a cluster size and a source of chance.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Unpack

from jqcow.ondisk.entries import COPIED
from jqcow.ondisk.header import (
    EXTENSION_FEATURE_NAMES,
    INCOMPATIBLE_DIRTY,
    Extension,
    Header,
    HeaderArea,
)
from jqcow.ondisk.l2 import ZERO
from jqcow.ondisk.root import ROOT_COPY_BYTES, ROOT_COPY_OFFSET
from jqcow.testing import SECTOR_BYTES, SectorModel, SimulatedDevice
from jqcow.testing.device import noise
from tests.support.below import Below, name_of
from tests.support.encrypted import without_chance
from tests.support.expectation import (
    AllNoted,
    AllTaken,
    DataFileKind,
    Expectation,
    Kind,
    Noted,
    Taken,
    Windows,
    extensions_of,
)
from tests.support.operations import Request, Write
from tests.support.patients import DIRTY_BYTE, Tables
from tests.support.player import Player
from tests.support.qemu import done, qemu_io
from tests.support.users import JOURNAL_BYTES, Session, open_simulated

NO_EXTENSIONS = bytes(8)
GARBAGE = b"\xee"
REFCOUNT_TABLE_PLACE = 48
"""Of the header's field that names the refcount table."""


@dataclass(frozen=True)
class Start:
    """What a workload starts from: the file, whose windows hold ``guest``, and the sizes of its disk."""

    windows: Windows
    content: bytes
    guest: bytes
    size_bytes: int
    extensions: bytes = NO_EXTENSIONS
    can_punch: bool = True
    can_forget: bool = True
    vouched: bool = False
    holes: tuple[tuple[int, int], ...] = ()
    snapshots: AllTaken = ()
    bitmaps: AllNoted = ()
    damaged: bool = False
    data: bytes | None = None
    has_fixed_size: bool = False
    is_new: bool = False
    data_has_fixed_size: bool = False

    def device(self) -> SimulatedDevice:
        """Return a device that holds the file, durably, and its data file."""
        device = SimulatedDevice(
            self.content,
            can_punch=self.can_punch,
            can_forget=self.can_forget,
            has_fixed_size=self.has_fixed_size,
        )
        if self.data is not None:
            beside = SimulatedDevice(
                self.data,
                name="beside",
                can_punch=self.can_punch,
                can_forget=self.can_forget,
                has_fixed_size=self.data_has_fixed_size,
            )
            device.join(beside)
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
            exists=bool(self.content) and not self.is_new,
            extensions=self.extensions,
            vouched=vouched,
            snapshots=self.snapshots,
            bitmaps=self.bitmaps,
            damaged=self.damaged,
        )


# Made by jqcow


def some_size(windows: Windows, random: Random) -> int:
    """Return the size of a disk that shows three windows, the last one perhaps in part."""
    return 2 * windows.stride_bytes + windows.window_bytes - SECTOR_BYTES * random.choice((0, 1, 3))


def new_session(windows: Windows, size_bytes: int | None = None) -> Session:
    """Return a session on a new image; all windows are on its disk, if no size is given."""
    size_bytes = windows.disk_bytes if size_bytes is None else size_bytes
    sectors = SectorModel(windows.model_bytes)
    expectation = Expectation(windows, sectors, (size_bytes,), exists=False, extensions=NO_EXTENSIONS)
    session = Session(SimulatedDevice(), expectation)
    session.create(size_bytes)
    return session


def start_of(session: Session) -> Start:
    """Return the closed image of a session as a start."""
    expectation = session.expectation
    return Start(
        expectation.windows,
        session.device.content(),
        expectation.sectors.current_content(),
        expectation.sizes[-1],
        snapshots=expectation.snapshots,
        data=None if session.device.companion is None else session.device.companion.content(),
    )


def played(text: str, windows: Windows, random: Random, size_bytes: int | None = None) -> Start:
    """Return an image that is new, and then what the steps of a text make it."""
    session = new_session(windows, size_bytes)
    Player(session, random).play(f"{text} close")
    return start_of(session)


def empty_file(cluster_bytes: int, random: Random) -> Start:
    """Nothing: the image is created by the workload."""
    windows = Windows.of(cluster_bytes)
    return Start(windows, b"", b"", some_size(windows, random))


def used_image(cluster_bytes: int, random: Random, **kind: Unpack[Kind]) -> Start:
    """An image with data and zero clusters, made and closed by jqcow."""
    windows = Windows.of(cluster_bytes, **kind)
    return played("change:8", windows, random, some_size(windows, random))


def full_image(cluster_bytes: int, random: Random, **kind: Unpack[Kind]) -> Start:
    """An image whose first two windows are all allocated."""
    return played("write:0:w write:w:w", Windows.of(cluster_bytes, **kind), random)


def dirty_image(
    cluster_bytes: int, random: Random, discards: str = "discard:3w%c:2c " * 4, **kind: Unpack[Kind]
) -> Start:
    """An image with free clusters inside and past the used ones, all full of old bytes; a ragged end."""
    text = f"write:0:w write:w:w write:2w:w {discards}"
    return with_old_bytes(played(text, Windows.of(cluster_bytes, **kind), random), random)


def half_free_image(cluster_bytes: int, random: Random) -> Start:
    """As `dirty_image`; free are the second halves of three windows."""
    half = Windows.of(cluster_bytes).window_bytes // 2 // cluster_bytes
    discards = (f"discard:{index + 1}w-{half}c:{half}c" for index in range(3))
    return dirty_image(cluster_bytes, random, " ".join(discards))


def with_old_bytes(start: Start, random: Random) -> Start:
    """Fill the free clusters, and what comes behind the used ones."""
    content, cluster_bytes = bytearray(start.content), start.windows.cluster_bytes
    for cluster in Tables(start.content).free_clusters():
        content[cluster * cluster_bytes : (cluster + 1) * cluster_bytes] = GARBAGE * cluster_bytes
    content += GARBAGE * (2 * cluster_bytes + random.choice((0, cluster_bytes // 2)))
    return replace(start, content=bytes(content))


def holed_image(cluster_bytes: int, random: Random) -> Start:
    """As `dirty_image`, but some of the free clusters are holes of the host."""
    start = dirty_image(cluster_bytes, random)
    holes = [
        (cluster * cluster_bytes, cluster_bytes)
        for cluster in Tables(start.content).free_clusters()
        if random.random() < 0.6 and (cluster + 1) * cluster_bytes <= len(start.content)
    ]
    return replace(start, holes=tuple(holes))


def vouched_image(cluster_bytes: int, random: Random) -> Start:
    """An image with an autoclear bit that jqcow does not know: it vouches for the data as it is."""
    start = full_image(cluster_bytes, random)
    content = bytearray(start.content)
    content[88:96] = (1 << 63).to_bytes(8, "big")
    return replace(start, content=bytes(content), vouched=True)


def long_header_image(cluster_bytes: int, random: Random) -> Start:
    """An image whose header extensions reach past the first sector."""

    def feature_name(bit: int) -> bytes:
        return bytes([1, 20 + bit]) + f"feature number {bit} of somebody".encode().ljust(46, b"\0")

    start = used_image(cluster_bytes, random)
    names = Extension(EXTENSION_FEATURE_NAMES, b"".join(map(feature_name, range(12))))
    unknown = Extension(0x12345678, bytes(range(256)) * 2)
    extensions = names.pack() + unknown.pack() + NO_EXTENSIONS
    content = bytearray(start.content)
    content[112 : 112 + len(extensions)] = extensions
    return replace(start, content=bytes(content), extensions=extensions)


def snapshots_image(cluster_bytes: int, random: Random, **kind: Unpack[Kind]) -> Start:
    """An image with two snapshots, compressed clusters, and old bytes in all that is free."""
    windows = Windows.of(cluster_bytes, **kind)
    size_bytes = some_size(windows, random)
    text = " ".join(
        f"write:{index}w:w/2 packed:{index}w+4c:3c snapshot write:c:c+s discard:{index}w+2c:c change"
        for index in range(2)
    )
    return with_old_bytes(played(text, windows, random, size_bytes), random)


def wide_image(cluster_bytes: int, random: Random) -> Start:
    """An image with so many L2 tables that a change of all is longer than a half of the smallest journal."""
    windows = Windows(12, 2 * cluster_bytes, cluster_bytes * cluster_bytes // 8)
    writes = (f"write:{index}w:1..{windows.window_bytes}" for index in range(windows.count))
    return played(" ".join(writes), windows, random)


def half_moved_image(cluster_bytes: int, random: Random) -> Start:
    """A crashed image, whose recovery was cut too: the next root copy is there, and not what it names."""
    windows = Windows.of(cluster_bytes)
    session = new_session(windows)
    Player(session, random).play("change:6 flush")
    crashed = SimulatedDevice(session.device.durable_content())
    halves: list[bytes] = []

    def cut(name: str, device: SimulatedDevice) -> None:
        if name == "move.range":
            durable = bytearray(device.durable_content())
            copy = slice(ROOT_COPY_OFFSET, ROOT_COPY_OFFSET + ROOT_COPY_BYTES)
            durable[copy] = device.content()[copy]
            halves.append(bytes(durable))

    crashed.barrier_listeners.append(cut)
    open_simulated(crashed)
    return replace(start_of(session), content=halves[0])


def half_closed_image(cluster_bytes: int, random: Random) -> Start:
    """A clean image whose close was cut: sector 0 is there, and the epoch before the last one still is."""
    windows = Windows.of(cluster_bytes)
    session = new_session(windows)
    cut: list[bytes] = []

    def keep(name: str, device: SimulatedDevice) -> None:
        if name == "close.clear":
            cut.append(device.content()[:SECTOR_BYTES] + device.durable_content()[SECTOR_BYTES:])

    session.device.barrier_listeners.append(keep)
    Player(session, random).play("write:0:w change:6 flush close")
    return replace(start_of(session), content=cut[0])


def table_end_image(cluster_bytes: int, random: Random) -> Start:
    """An image of 512-byte clusters whose file ends just where its refcount table does."""
    start = used_image(cluster_bytes, random)
    reach = cluster_bytes // 8 * cluster_bytes // 2 * cluster_bytes
    padding = reach - 6 * cluster_bytes - len(start.content)
    return replace(start, content=start.content + bytes(padding), holes=((len(start.content), padding),))


def shared_image(cluster_bytes: int, random: Random) -> Start:
    """An image in which guest clusters share host clusters, as a repair leaves double allocations."""
    start = full_image(cluster_bytes, random)
    tables, guest = Tables(start.content), bytearray(start.guest)
    positions = random.sample(range(0, 2 * start.windows.window_bytes, cluster_bytes), 6)
    owners = (positions[:2], positions[2:4], positions[4:]) if random.random() < 0.5 else (positions[:5],)
    for first, *others in owners:
        place = tables.place_of(start.windows.guest(first))
        shared = tables.entry(place) & ~COPIED
        tables.set_entry(place, shared)
        tables.set_refcount(shared, 1 + len(others))
        for position in others:
            place = tables.place_of(start.windows.guest(position))
            tables.set_refcount(tables.entry(place) & ~COPIED, 0)
            tables.set_entry(place, shared)
            guest[position : position + cluster_bytes] = guest[first : first + cluster_bytes]
    return replace(start, content=bytes(tables.image), guest=bytes(guest))


def damaged(prepare: Prepare) -> Prepare:
    """Return what makes the same image with a dirty bit: its refcounts may be wrong, and many are."""

    def prepare_damaged(cluster_bytes: int, random: Random) -> Start:
        start = prepare(cluster_bytes, random)
        tables = Tables(start.content)
        tables.spoil_refcounts(random, 0.6, (0, 0, 0, 1, 2, 5))
        tables.image[DIRTY_BYTE] |= INCOMPATIBLE_DIRTY
        return replace(start, content=bytes(tables.image), damaged=True)

    return prepare_damaged


def without_table(prepare: Prepare) -> Prepare:
    """Return what makes the same image with a dirty bit, whose header names a refcount table nowhere."""

    def prepare_lost(cluster_bytes: int, random: Random) -> Start:
        start = prepare(cluster_bytes, random)
        tables = Tables(start.content)
        table, end = tables.header.refcount_table_offset, len(start.content)
        nowhere = (0, table + 8, tables.data, tables.l2, end - end % cluster_bytes + 4 * cluster_bytes)
        tables.set_entry(REFCOUNT_TABLE_PLACE, random.choice(nowhere))
        tables.image[DIRTY_BYTE] |= INCOMPATIBLE_DIRTY
        return replace(start, content=bytes(tables.image), damaged=True)

    return prepare_lost


def with_bitmaps(prepare: Prepare) -> Prepare:
    """Return what makes the same image with up to three bitmaps that take note of changes."""

    def prepare_noted(cluster_bytes: int, random: Random) -> Start:
        start = prepare(cluster_bytes, random)
        device = start.device()
        sectors = SectorModel(start.windows.model_bytes, start.guest)
        granularities = random.sample((512, 4096, 65536), random.randint(1, 3))
        with open_simulated(device) as image, image.transaction() as transaction:
            for granularity in granularities:
                transaction.bitmaps.add(f"of {granularity}", granularity)
        noted = tuple(Noted(f"of {granularity}", True, sectors) for granularity in granularities)
        return replace(start, content=device.content(), bitmaps=noted)

    return prepare_noted


def without_holes(prepare: Prepare) -> Prepare:
    """Return what makes the same image, on a host without holes."""
    return lambda cluster_bytes, random: replace(prepare(cluster_bytes, random), can_punch=False)


def without_forgetting(prepare: Prepare) -> Prepare:
    """Return what makes the same image, on a host that shows what a failed barrier lost for ever."""
    return lambda cluster_bytes, random: replace(prepare(cluster_bytes, random), can_forget=False)


# Overlays


def some_disk(windows: Windows, random: Random) -> Below:
    """Return a disk that has data in most of its windows: shorter than an overlay of them all, or longer."""
    content, half = bytearray(windows.model_bytes), windows.cluster_bytes // 2
    mark = random.randrange(1, 256)
    for start in range(0, windows.model_bytes, half):
        if random.random() < 0.7:
            for sector in range(start, start + half, SECTOR_BYTES):
                content[sector : sector + SECTOR_BYTES] = bytes([mark, sector // SECTOR_BYTES % 251]) * 256
    inside = random.randrange(1, windows.window_bytes // SECTOR_BYTES) * SECTOR_BYTES
    size = random.choice((windows.stride_bytes + inside, windows.disk_bytes, 2 * windows.disk_bytes))
    return Below(windows, bytes(content), size)


def new_overlay(below: Below, size_bytes: int) -> Session:
    """Make an overlay that has nothing of its own yet, and open it."""
    windows = below.windows
    session = new_session(windows, size_bytes)
    with session.live.transaction() as transaction:
        transaction.set_backing_file(name_of(below), "raw")
    session.close()
    session.expectation.sectors = SectorModel(windows.model_bytes, below.seen)
    windows.cut_off(session.expectation.sectors, size_bytes)
    session.open()
    return session


def overlay_image(cluster_bytes: int, random: Random, **kind: Unpack[Kind]) -> Start:
    """An image over another disk, with data, zeros and nothing of its own."""
    windows = Windows.of(cluster_bytes, **kind)
    below = some_disk(windows, random)
    session = new_overlay(below, some_size(windows, random))
    Player(session, random).play("change:5 close")
    return replace(start_of(session), extensions=extensions_in(session.device.content()))


def zeros_in_snapshots_image(cluster_bytes: int, random: Random) -> Start:
    """An overlay whose snapshots share tables with zero flags, and clusters that are kept behind flags."""
    windows = Windows.of(cluster_bytes)
    below = some_disk(windows, random)
    session = new_overlay(below, windows.disk_bytes)
    steps = "write:2w%c:3c zeroes:2w%c:3c unmap:2w%c:2c"
    text = f"write:0:w zeroes:0:2c {steps} snapshot zeroes:0:w/2 {steps} snapshot apply:0 write:w:c delete:0"
    text += " snapshot snapshot"
    Player(session, random).play(f"{text} close")
    return replace(start_of(session), extensions=extensions_in(session.device.content()))


def overlay_with_old_bytes(cluster_bytes: int, random: Random, **kind: Unpack[Kind]) -> Start:
    """As `overlay_image`, with old bytes in all that is free, on a host without holes."""
    return replace(with_old_bytes(overlay_image(cluster_bytes, random, **kind), random), can_punch=False)


def extensions_in(content: bytes) -> bytes:
    """Return what follows the fixed fields of a header: the extensions, and the backing file's name."""
    return extensions_of(
        HeaderArea.parse(content[: Header.unpack(content[:SECTOR_BYTES]).geometry.cluster_bytes])
    )


# Made by QEMU

ENTRY_BYTES, DATE_AT = 40, 16
LENGTHS_AT = ((12, 2), (14, 2), (36, 4))
"""Of an entry of the snapshot table: its fixed part, the date, and the widths of id, name and extra data."""

Layer = tuple[tuple[int, int, int], ...]
"""Writes of a pattern: (position, length, byte)."""


@dataclass(frozen=True)
class Recipe:
    """How QEMU is to make an image: its options, what it holds, and a snapshot of each layer but the last.

    ``compressed``: the first layer is converted, not written.
    """

    options: str
    windows: Windows
    layers: tuple[Layer, ...]
    compressed: bool = False

    def start(self) -> Start:
        """Return the image."""
        content, guest, taken = made(self), bytearray(self.windows.model_bytes), []
        for number, layer in enumerate(self.layers):
            for position, length, byte in layer:
                guest[position : position + length] = bytes([byte]) * length
            sectors = SectorModel(self.windows.model_bytes, bytes(guest))
            taken.append(Taken(_name(number), sectors, self.windows.disk_bytes))
        return Start(
            self.windows,
            content,
            bytes(guest),
            self.windows.disk_bytes,
            extensions=extensions_in(content),
            snapshots=tuple(taken[:-1]),
        )

    def requests(self, layer: int) -> list[Request]:
        """Return what is asked of the disk in a layer."""
        guest = self.windows.guest
        return [Write.pattern(guest(position), length, byte) for position, length, byte in self.layers[layer]]


def _name(layer: int) -> str:
    return f"by-qemu-{layer}"


@functools.cache
def made(recipe: Recipe) -> bytes:
    """Return the file that QEMU makes."""
    with tempfile.TemporaryDirectory(prefix="jqcow-crash-") as folder:
        path, raw = Path(folder, "made.qcow2"), Path(folder, "first.raw")
        size = str(recipe.windows.disk_bytes)
        if recipe.compressed:
            done("qemu-img", "create", "-q", "-f", "raw", raw, size)
            _write(raw, "raw", recipe.requests(0))
            done("qemu-img", "convert", "-c", "-O", "qcow2", "-o", recipe.options, raw, path)
        else:
            done("qemu-img", "create", "-q", "-f", "qcow2", "-o", recipe.options, path, size)
            _write(path, "qcow2", recipe.requests(0))
        for layer in range(1, len(recipe.layers)):
            done("qemu-img", "snapshot", "-c", _name(layer - 1), path)
            _write(path, "qcow2", recipe.requests(layer))
        return without_dates(path.read_bytes())


def without_dates(content: bytes) -> bytes:
    """Return an image whose snapshots are dated 1970: a run is the same every time."""
    header, dated = Header.unpack(content[:512]), bytearray(content)
    position = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        lengths = [int.from_bytes(dated[position + at :][:width], "big") for at, width in LENGTHS_AT]
        dated[position + DATE_AT : position + DATE_AT + 8] = bytes(8)
        position += ENTRY_BYTES + sum(lengths) + -(ENTRY_BYTES + sum(lengths)) % 8
    return bytes(dated)


def _write(path: Path, kind: str, requests: list[Request]) -> None:
    if requests:
        qemu_io(path, *(request.qemu() for request in requests), kind=kind)


def by_qemu(cluster_bytes: int, options: str, layers: int, **choices: Any) -> Start:
    """Return an image with so many layers: data and, over snapshots of it, other data."""
    windows, cluster = Windows.of(cluster_bytes), cluster_bytes
    window = windows.window_bytes
    all_layers: tuple[Layer, ...] = (
        ((0, window // 2, 0x11), (window, window, 0x22)),
        ((cluster, cluster, 0x33), (2 * window, 512, 0x44)),
        ((cluster - 512, 1024, 0x55), (window, cluster, 0x66)),
    )
    kept = all_layers[:layers] or ((),)
    return Recipe(f"cluster_size={cluster_bytes}{options}", windows, kept, **choices).start()


def of_kind(prepare: Callable[..., Start], **kind: Unpack[Kind]) -> Prepare:
    """Return what makes an image of another kind."""
    return lambda cluster_bytes, random: prepare(cluster_bytes, random, **kind)


def qemu_image(cluster_bytes: int, random: Random) -> Start:
    """An image made and filled by QEMU: its header fills the first sector, its L1 table stands elsewhere."""
    return by_qemu(cluster_bytes, "", 1)


def qemu_snapshots_image(cluster_bytes: int, random: Random) -> Start:
    """An image by QEMU with two snapshots, in refcounts of some width."""
    return by_qemu(cluster_bytes, f",refcount_bits={random.choice((4, 8, 16, 64))}", 3)


def qemu_compressed_image(cluster_bytes: int, random: Random) -> Start:
    """An image that QEMU compressed, packed to the byte, with a snapshot of all that."""
    options = f",refcount_bits=16,compression_type={random.choice(('zlib', 'zstd'))}"
    return by_qemu(cluster_bytes, options, 2, compressed=True)


def narrow_image(cluster_bytes: int, random: Random) -> Start:
    """An empty image by QEMU, whose refcounts have one bit or two."""
    return by_qemu(cluster_bytes, f",refcount_bits={random.choice((1, 2))}", 0)


def with_data_file(prepare: Callable[..., Start], kind: DataFileKind = "plain") -> Prepare:
    """Return what makes the same image with an external data file, full of old bytes unless it is raw."""

    def prepare_beside(cluster_bytes: int, random: Random) -> Start:
        start = prepare(cluster_bytes, random, data_file=kind)
        start = replace(start, extensions=extensions_in(start.content))
        if kind == "raw":
            return start
        data, device = bytearray(start.data or b""), start.device()
        with open_simulated(device, "r") as image:
            for extent in image.extents():
                if extent.kind != "data":
                    stop = min(extent.end, len(data))
                    data[extent.offset : stop] = GARBAGE * max(0, stop - extent.offset)
        return replace(start, data=bytes(data))

    return prepare_beside


def with_zero_clusters(prepare: Prepare) -> Prepare:
    """Return what makes the same image, some of whose clusters are no data, as QEMU leaves them."""

    def prepare_zeroed(cluster_bytes: int, random: Random) -> Start:
        start = prepare(cluster_bytes, random)
        tables, data, guest = Tables(start.content), bytearray(start.data or b""), bytearray(start.guest)
        for position in range(0, 2 * start.windows.window_bytes, cluster_bytes):
            if random.random() < 0.6:
                offset = start.windows.guest(position)
                tables.set_entry(tables.place_of(offset), ZERO)
                data[offset : offset + cluster_bytes] = bytes(cluster_bytes)
                guest[position : position + cluster_bytes] = bytes(cluster_bytes)
        return replace(start, content=bytes(tables.image), data=bytes(data), guest=bytes(guest))

    return prepare_zeroed


def encrypted(prepare: Callable[..., Start]) -> Prepare:
    """Return what makes the same image, encrypted by keys that are the same on every run."""

    def prepare_encrypted(cluster_bytes: int, random: Random) -> Start:
        with without_chance():
            start = prepare(cluster_bytes, random, encrypted=True)
        return replace(start, extensions=extensions_in(start.content))

    return prepare_encrypted


Prepare = Callable[[int, Random], Start]


@functools.lru_cache(maxsize=16)
def _earlier_life(cluster_bytes: int) -> bytes:
    """Return what another image left on a device: a live one, with frames in both halves of its journal."""
    session = new_session(Windows.of(cluster_bytes))
    steps = f"{'change:3 flush ' * 8} checkpoint change:2 flush"
    Player(session, Random(f"earlier {cluster_bytes}")).play(steps)
    return session.device.content()


def on_a_device(prepare: Prepare, room_clusters: int = 0, *, can_punch: bool = True) -> Prepare:
    """Return what makes the same image, on a device that was in use before.

    ``room_clusters``: so much is free on it behind the image and a journal, else a lot.
    """

    def prepare_on_device(cluster_bytes: int, random: Random) -> Start:
        start = prepare(cluster_bytes, random)
        room_bytes = JOURNAL_BYTES + room_clusters * cluster_bytes
        if not room_clusters:
            room_bytes = max(1 << 20, 6 * JOURNAL_BYTES + 40 * cluster_bytes)
        used = start.content + bytes(-len(start.content) % cluster_bytes)
        old = _earlier_life(cluster_bytes)
        old += noise(0, -len(old) % cluster_bytes)
        behind = (old * (room_bytes // len(old) + 1))[:room_bytes]
        is_new = not start.content
        return replace(start, content=used + behind, has_fixed_size=True, can_punch=can_punch, is_new=is_new)

    return prepare_on_device


def with_data_on_a_device(prepare: Prepare) -> Prepare:
    """Return what makes the same image, whose data lies on a device that was in use before."""

    def prepare_on_device(cluster_bytes: int, random: Random) -> Start:
        start = prepare(cluster_bytes, random)
        data = start.data or b""
        reach = max(start.windows.disk_bytes, len(data)) + 8 * cluster_bytes
        return replace(start, data=data + noise(len(data), reach - len(data)), data_has_fixed_size=True)

    return prepare_on_device


STARTS: dict[str, Prepare] = {
    "empty": empty_file,
    "used": used_image,
    "full": full_image,
    "dirty": dirty_image,
    "holed": holed_image,
    "unpunchable": without_holes(dirty_image),
    "vouched": vouched_image,
    "long-header": long_header_image,
    "half-moved": half_moved_image,
    "qemu": qemu_image,
    "snapshots": snapshots_image,
    "snapshots-unpunchable": without_holes(snapshots_image),
    "qemu-snapshots": qemu_snapshots_image,
    "qemu-compressed": qemu_compressed_image,
    "narrow": narrow_image,
    "half-free": half_free_image,
    "table-end": table_end_image,
    "wide": wide_image,
    "overlay": overlay_image,
    "overlay-unpunchable": overlay_with_old_bytes,
    "overlay-zeros-snapshots": zeros_in_snapshots_image,
    "shared": shared_image,
    "shared-unpunchable": without_holes(shared_image),
    "dirty-bit": damaged(full_image),
    "lost-table": without_table(full_image),
    "lost-table-snapshots": without_table(snapshots_image),
    "dirty-bit-snapshots": damaged(snapshots_image),
    "unforgetting": without_forgetting(full_image),
    "subclusters": of_kind(used_image, extended_l2=True),
    "subclusters-full": of_kind(full_image, extended_l2=True),
    "subclusters-unpunchable": without_holes(of_kind(dirty_image, extended_l2=True)),
    "subclusters-snapshots": of_kind(snapshots_image, extended_l2=True),
    "subclusters-overlay": of_kind(overlay_image, extended_l2=True),
    "subclusters-overlay-unpunchable": of_kind(overlay_with_old_bytes, extended_l2=True),
    "subclusters-dirty-bit": damaged(of_kind(snapshots_image, extended_l2=True)),
    "version-2": of_kind(used_image, compat="0.10"),
    "version-2-full": of_kind(full_image, compat="0.10"),
    "version-2-snapshots": of_kind(snapshots_image, compat="0.10"),
    "version-2-overlay": of_kind(overlay_image, compat="0.10"),
    "half-closed": half_closed_image,
    "bitmaps": with_bitmaps(used_image),
    "bitmaps-full": with_bitmaps(full_image),
    "bitmaps-unpunchable": without_holes(with_bitmaps(dirty_image)),
    "bitmaps-snapshots": with_bitmaps(snapshots_image),
    "bitmaps-overlay": with_bitmaps(overlay_image),
    "bitmaps-dirty-bit": damaged(with_bitmaps(snapshots_image)),
    "bitmaps-lost-table": without_table(with_bitmaps(full_image)),
    "bitmaps-encrypted": with_bitmaps(encrypted(used_image)),
    "bitmaps-unforgetting": without_forgetting(with_bitmaps(full_image)),
    "bitmaps-subclusters": without_holes(with_bitmaps(of_kind(dirty_image, extended_l2=True))),
    "bitmaps-subclusters-overlay": with_bitmaps(of_kind(overlay_image, extended_l2=True)),
    "encrypted": encrypted(used_image),
    "encrypted-full": encrypted(full_image),
    "encrypted-unpunchable": without_holes(encrypted(dirty_image)),
    "encrypted-snapshots": encrypted(snapshots_image),
    "encrypted-overlay": encrypted(overlay_image),
    "encrypted-dirty-bit": damaged(encrypted(snapshots_image)),
    "encrypted-subclusters": without_holes(encrypted(functools.partial(dirty_image, extended_l2=True))),
    "encrypted-subclusters-snapshots": encrypted(functools.partial(snapshots_image, extended_l2=True)),
    "encrypted-version-2": encrypted(functools.partial(overlay_image, compat="0.10")),
    "data-file": with_data_file(used_image),
    "data-file-full": with_data_file(full_image),
    "data-file-unpunchable": without_holes(with_data_file(dirty_image)),
    "data-file-unforgetting": without_forgetting(with_data_file(full_image)),
    "data-file-overlay": with_data_file(overlay_image),
    "data-file-bitmaps": with_bitmaps(with_data_file(used_image)),
    "data-file-bitmaps-full": with_bitmaps(with_data_file(full_image)),
    "data-file-dirty-bit": damaged(with_data_file(full_image)),
    "data-file-raw": with_data_file(used_image, "raw"),
    "data-file-raw-full": with_data_file(full_image, "raw"),
    "data-file-raw-unpunchable": without_holes(with_data_file(dirty_image, "raw")),
    "data-file-raw-unforgetting": without_forgetting(with_data_file(full_image, "raw")),
    "data-file-raw-bitmaps": with_bitmaps(with_data_file(full_image, "raw")),
    "data-file-raw-zeros": with_zero_clusters(with_data_file(full_image, "raw")),
    "data-file-device": with_data_on_a_device(with_data_file(dirty_image)),
    "data-file-raw-device": with_data_on_a_device(with_data_file(full_image, "raw")),
    "data-file-raw-device-zeros": with_data_on_a_device(
        with_zero_clusters(with_data_file(full_image, "raw"))
    ),
    "data-file-two-devices": on_a_device(with_data_on_a_device(with_data_file(full_image))),
    "device-empty": on_a_device(empty_file),
    "device": on_a_device(used_image),
    "device-full": on_a_device(full_image),
    "device-dirty": on_a_device(dirty_image, can_punch=False),
    "device-tight": on_a_device(dirty_image, 12),
    "device-tight-full": on_a_device(full_image, 6),
    "device-qemu": on_a_device(qemu_image),
    "device-snapshots": on_a_device(snapshots_image),
    "device-overlay": on_a_device(overlay_with_old_bytes),
    "device-subclusters": on_a_device(of_kind(full_image, extended_l2=True)),
    "device-version-2": on_a_device(of_kind(full_image, compat="0.10")),
    "device-bitmaps": on_a_device(with_bitmaps(full_image)),
    "device-encrypted": on_a_device(encrypted(full_image)),
    "device-unforgetting": without_forgetting(on_a_device(full_image)),
    "device-dirty-bit": on_a_device(damaged(full_image)),
    "device-dirty-bit-snapshots": on_a_device(damaged(snapshots_image)),
    "device-lost-table": on_a_device(without_table(full_image)),
}
SIMULATED = tuple(STARTS)[:15]
"""Those of the simulation: it opens images with nothing below."""
