"""What a crash may leave of an image: its disk, its snapshots, and what a commit in doubt adds.

The disk is seen through *windows*: ranges that lie an L2 table's reach apart, so that a small model meets
many tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, Unpack

import jqcow
from jqcow.image.transaction import Transaction
from jqcow.ondisk.form import Compat, FormOptions
from jqcow.ondisk.header import (
    COMPATIBLE_LAZY_REFCOUNTS,
    EXTENSION_BITMAPS,
    V2_BYTES,
    Extension,
    Header,
    HeaderArea,
)
from jqcow.ondisk.layout import SUBCLUSTERS
from jqcow.testing import SECTOR_BYTES, SectorModel, Violation
from jqcow.testing.model import ReadFunction
from tests.support.inside import Shown

WINDOW_CLUSTERS = {512: 16, 1024: 16, 4096: 8, 8192: 8, 16384: 6, 65536: 3}


DataFileKind = Literal["", "plain", "raw"]
"""Whether an image has an external data file, and of which kind: a device that crashes with the image's."""


class Kind(TypedDict, total=False):
    """What kind of image it is."""

    extended_l2: bool
    compat: Compat
    encrypted: bool
    data_file: DataFileKind


@dataclass(frozen=True)
class Windows:
    """The parts of a disk that are used: ``count`` ranges of ``window_bytes``, one every ``stride_bytes``.

    ``extended_l2``, ``compat``, ``encrypted``, ``data_file``: what the image is to be.
    """

    count: int
    window_bytes: int
    stride_bytes: int
    extended_l2: bool = False
    compat: Compat = "1.1"
    encrypted: bool = False
    data_file: DataFileKind = ""

    @classmethod
    def of(cls, cluster_bytes: int, count: int = 4, **kind: Unpack[Kind]) -> Windows:
        """Return windows that start where L2 tables do."""
        window_bytes = WINDOW_CLUSTERS[cluster_bytes] * cluster_bytes
        entry_bytes = 16 if kind.get("extended_l2") else 8
        return cls(count, window_bytes, cluster_bytes * cluster_bytes // entry_bytes, **kind)

    @property
    def options(self) -> FormOptions:
        """What the image is to be."""
        options: FormOptions = {
            "cluster_size": self.cluster_bytes,
            "extended_l2": self.extended_l2,
            "compat": self.compat,
        }
        if self.data_file:
            options |= {"data_file": "beside", "data_file_raw": self.data_file == "raw"}
        return options

    @property
    def model_bytes(self) -> int:
        """Bytes in all windows."""
        return self.count * self.window_bytes

    @property
    def disk_bytes(self) -> int:
        """Size of a disk that shows all windows."""
        return self.count * self.stride_bytes

    @property
    def cluster_bytes(self) -> int:
        """The cluster size, of which the reach of an L2 table is the square by the length of an entry."""
        return math.isqrt(self.stride_bytes * (16 if self.extended_l2 else 8))

    @property
    def unit_bytes(self) -> int:
        """What a discard frees at least: a cluster, or a subcluster."""
        return self.cluster_bytes // SUBCLUSTERS if self.extended_l2 else self.cluster_bytes

    def guest(self, position: int) -> int:
        """Return the guest offset of a position in the model."""
        index, within = divmod(position, self.window_bytes)
        return index * self.stride_bytes + within

    def reader(self, image: jqcow.Image | Transaction | Shown) -> Callable[[int, int], bytes]:
        """Return a function that reads (length, position) in the model; past the disk's end are zeros."""

        def read(length: int, position: int) -> bytes:
            parts = []
            end = position + length
            while position < end:
                step = min(end - position, self.window_bytes - position % self.window_bytes)
                guest = self.guest(position)
                there = self.clip(position, step, image.size)
                parts.append((image.pread(there, guest) if there else b"") + bytes(step - there))
                position += step
            return b"".join(parts)

        return read

    def clip(self, position: int, length: int, size_bytes: int) -> int:
        """Return how much of a range lies in its window, and on a disk of ``size_bytes``."""
        length = min(length, self.window_bytes - position % self.window_bytes)
        return max(0, min(length, size_bytes - self.guest(position)))

    def cut_off(self, sectors: SectorModel, size_bytes: int) -> None:
        """The disk ends at ``size_bytes`` now: what lies behind reads as zeros, should it come back."""
        for start in range(0, self.model_bytes, self.window_bytes):
            kept = self.clip(start, self.window_bytes, size_bytes)
            sectors.zero(start + kept, self.window_bytes - kept).complete()


@dataclass(frozen=True, eq=False)
class Taken:
    """A snapshot that must be there: its name, what its disk holds, and the size of that disk in bytes.

    ``sectors`` are settled, and never changed. Only where an operation failed before the snapshot was made a
    sector has more than one version.
    """

    name: str
    sectors: SectorModel
    size_bytes: int

    def compare(self, windows: Windows, shown: Shown) -> list[str]:
        """Return what is wrong with the snapshot as an image shows it."""
        if shown.size != self.size_bytes:
            return [f"snapshot {self.name} has {shown.size} bytes, not {self.size_bytes}"]
        return [f"snapshot {self.name}: {found}" for found in self.sectors.check(windows.reader(shown))]


AllTaken = tuple[Taken, ...]
"""The snapshots of an image, in the order of its table."""


@dataclass(frozen=True, eq=False)
class Noted:
    """A persistent bitmap that must be there: its name, and whether it takes note of changes.

    ``sectors`` is what the disk held when it was last clear: what differs must be dirty. None: no promise.
    """

    name: str
    is_enabled: bool
    sectors: SectorModel | None

    def compare(self, windows: Windows, holder: jqcow.Image | Transaction) -> list[str]:
        """Return what an image shows that differs, and that the bitmap does not call dirty."""
        if self.sectors is None:
            return []
        dirty = list(holder.bitmaps.dirty_extents(self.name))
        changed = self.sectors.check(windows.reader(holder), limit=self.sectors.size_bytes)
        places = (windows.guest(found.offset) for found in changed)
        return [
            f"bitmap {self.name} calls {place:#x} clean, which changed"
            for place in places
            if place < holder.size and not any(part.offset <= place < part.end for part in dirty)
        ]


AllNoted = tuple[Noted, ...]
"""The bitmaps of an image, in the order of its directory."""


def compare_bitmaps(holder: jqcow.Image | Transaction, windows: Windows, noted: AllNoted) -> list[str]:
    """Return what is wrong with the bitmaps of an image."""
    there = [(found.name, found.is_enabled) for found in holder.bitmaps]
    expected = [(one.name, one.is_enabled) for one in noted]
    if there != expected:
        return [f"the bitmaps are {there}, not {expected}"]
    return [wrong for one in noted for wrong in one.compare(windows, holder)]


@dataclass(frozen=True)
class Found:
    """What the windows of a disk show, and those of each of its snapshots: (name, size, bytes)."""

    disk: bytes
    snapshots: tuple[tuple[str, int, bytes], ...]


def read_all(image: jqcow.Image, windows: Windows) -> Found:
    """Read a disk and its snapshots."""
    shown = [(taken.name, Shown(image, taken)) for taken in image.snapshots()]
    length = windows.model_bytes
    return Found(
        windows.reader(image)(length, 0),
        tuple((name, snapshot.size, windows.reader(snapshot)(length, 0)) for name, snapshot in shown),
    )


def compare_snapshots(holder: jqcow.Image | Transaction, windows: Windows, snapshots: AllTaken) -> list[str]:
    """Return what is wrong with the snapshots of an image, their order and sizes included."""
    there = holder.snapshots()
    names, expected = [found.name for found in there], [taken.name for taken in snapshots]
    if names != expected:
        return [f"the snapshots are {names}, not {expected}"]
    wrong = []
    for found, taken in zip(there, snapshots, strict=True):
        wrong += taken.compare(windows, Shown(holder, found))
    return wrong


@dataclass(eq=False)
class State:
    """A disk with its snapshots, as it must be, and what changes all of it at once."""

    windows: Windows
    sectors: SectorModel
    size_bytes: int
    snapshots: AllTaken = ()
    bitmaps: AllNoted = ()

    def copy(self) -> State:
        """Return an independent copy."""
        return replace(self, sectors=self.sectors.copy())

    def settled(self) -> State:
        """Return a copy in which all is durable."""
        return replace(self, sectors=settled(self.sectors))

    def resize(self, size_bytes: int) -> None:
        """The disk has another size."""
        self.windows.cut_off(self.sectors, size_bytes)
        self.size_bytes = size_bytes

    def add_bitmap(self, name: str) -> None:
        """There is a bitmap in which nothing is dirty."""
        self.bitmaps += (Noted(name, True, settled(self.sectors)),)

    def change_bitmap(self, noted: Noted, new: Noted | None) -> None:
        """A bitmap is another one, or gone."""
        kept = (new if one is noted else one for one in self.bitmaps)
        self.bitmaps = tuple(one for one in kept if one is not None)

    def keep(self, name: str) -> None:
        """There is a snapshot of the disk."""
        self.snapshots += (Taken(name, settled(self.sectors), self.size_bytes),)

    def go_back(self, taken: Taken) -> None:
        """The disk is what a snapshot holds."""
        self.sectors, self.size_bytes = taken.sectors.copy(), taken.size_bytes

    def give_up(self, taken: Taken) -> None:
        """A snapshot is no longer there."""
        self.snapshots = tuple(kept for kept in self.snapshots if kept is not taken)

    def expect_now(self, holder: jqcow.Image | Transaction) -> list[str]:
        """Return what a running image or transaction shows otherwise: size, disk, and snapshots."""
        return self._compare(holder, (self.size_bytes,), self.sectors.expect_now)

    def check(self, image: jqcow.Image, *sizes: int) -> list[str]:
        """Return what a recovered image shows otherwise; its size may be one of those, if any is given."""
        return self._compare(image, sizes or (self.size_bytes,), self.sectors.check)

    def _compare(
        self,
        holder: jqcow.Image | Transaction,
        sizes: tuple[int, ...],
        check: Callable[[ReadFunction], list[Violation]],
    ) -> list[str]:
        if holder.size not in sizes:
            return [f"the disk has {holder.size} bytes, not {' or '.join(map(str, sizes))}"]
        wrong = list(map(str, check(self.windows.reader(holder))))
        wrong += compare_snapshots(holder, self.windows, self.snapshots)
        return wrong + compare_bitmaps(holder, self.windows, self.bitmaps)


Form = tuple[int, int, bool]
"""Version, width of refcounts as a power of two, lazy refcounts."""


def form_of(header: Header) -> Form:
    """Return what an amendment may change of a header."""
    return header.version, header.refcount_order, bool(header.compatible_features & COMPATIBLE_LAZY_REFCOUNTS)


def extensions_of(area: HeaderArea) -> bytes:
    """Return what follows a header's fixed fields, but for the bitmaps' own extension.

    That says where their directory is: each change of a bitmap moves it, and the checker looks there.
    """
    area = area.with_extension(Extension(EXTENSION_BITMAPS, b""), autoclear_features=0)
    return area.data[V2_BYTES if area.header.version < 3 else area.header.header_length :]


@dataclass
class Expectation:
    """What a crash may leave. ``copy`` makes it a model for the laboratory.

    ``sizes``       sizes that the disk may have; the last is the current one
    ``exists``      False until the image was created: nobody was told of it
    ``closed``      the file's bytes since a clean close, while nothing was asked of the image: exactly these
    ``lost``        True since a barrier failed: what is free may hold anything, ``closed`` is not promised
    ``vouched``     the guest's bytes that autoclear bits vouch for: with the bits set, exactly these
    ``extensions``  the header extensions, which no crash may change
    ``rival``       where a commit did not return, or failed: the disk with all of the transaction (P3)
    ``snapshots``   the internal snapshots
    ``bitmaps``     the persistent bitmaps
    ``damaged``     True until an opening has repaired the refcounts: reading alone does not
    ``renamed``     what the header may have instead of ``extensions``: it was to name another backing file
    ``forms``       what `form_of` the header may be, anything if empty: it was to be amended
    """

    windows: Windows
    sectors: SectorModel
    sizes: tuple[int, ...]
    exists: bool = True
    closed: bytes | None = None
    lost: bool = False
    vouched: bytes | None = None
    extensions: bytes = b""
    rival: State | None = None
    snapshots: AllTaken = ()
    bitmaps: AllNoted = ()
    damaged: bool = False
    renamed: tuple[bytes, ...] = ()
    forms: tuple[Form, ...] = ()

    def copy(self) -> Expectation:
        """Return an independent copy."""
        rival = None if self.rival is None else self.rival.copy()
        return replace(self, sectors=self.sectors.copy(), rival=rival)

    @property
    def state(self) -> State:
        """What there is now: with the newest size."""
        return State(self.windows, self.sectors, self.sizes[-1], self.snapshots, self.bitmaps)

    def check(self, image: jqcow.Image) -> list[str]:
        """Return what is wrong with a recovered image: nothing, if one of the disks that may be is there."""
        wrong = self.state.check(image, *self.sizes)
        if wrong and self.rival is not None:
            rival = self.rival.check(image)
            return [*wrong, "and with the transaction", *rival] if rival else []
        return wrong

    def expect_now(self, image: jqcow.Image) -> list[str]:
        """Return what the running image shows otherwise than it was asked for."""
        return self.state.expect_now(image)

    def adopt_rival(self) -> None:
        """The transaction is there, and durable."""
        if self.rival is not None:
            self._take(self.rival)
            self.rival = None

    def _take(self, rival: State) -> None:
        self.sectors, self.sizes, self.snapshots = rival.sectors, (rival.size_bytes,), rival.snapshots
        self.bitmaps = rival.bitmaps

    def adopt(self, image: jqcow.Image) -> None:
        """After a crash: what was found is all that there is, durably."""
        found = read_all(image, self.windows)
        if self.rival is not None and self.state.check(image, *self.sizes):
            self.bitmaps = self.rival.bitmaps
        self.sectors.reset_to(found.disk)
        self.snapshots = tuple(
            Taken(name, SectorModel(len(content), content), size) for name, size, content in found.snapshots
        )
        self.sizes, self.rival, self.closed = (image.size,), None, None

    @contextmanager
    def change(self, position: int, data: bytes, *, durable: bool = False) -> Iterator[None]:
        """Wrap a change of a range: afterwards it reads as ``data``, if nothing is raised.

        On a disk to which a failed commit came back, the change may be there or not.
        """
        if self.rival is not None:
            length = self.windows.clip(position, len(data), self.rival.size_bytes)
            self.rival.sectors.write(position, data[:length])
        with self.sectors.write(position, data, durable=durable):
            yield

    def observe(self, image: jqcow.Image) -> None:
        """A process was killed, and the next one reads what is there: that is the current version now.

        It is no more durable than before: all older versions stay possible until a flush. But recovery
        has made durable which transactions there are.
        """
        if self.rival is not None and self.state.check(image, *self.sizes):
            self._take(self.rival)
        self.rival = None
        if self.lost:
            # What a failed barrier lost still reads as if it were there.
            self.forget_order()
            self.sizes = (*self.sizes, image.size)
            return
        read = self.windows.reader(image)
        for offset in range(0, self.sectors.size_bytes, SECTOR_BYTES):
            if len(self.sectors.versions(offset)) > 1:
                self.sectors.write(offset, read(SECTOR_BYTES, offset)).complete()
        self.sizes = (*self.sizes, image.size)

    def hold_to(self, image: jqcow.Image) -> None:
        """What a writer reads when it has opened the image is durable: from now on there is nothing else."""
        read = self.windows.reader(image)
        for offset in range(0, self.sectors.size_bytes, SECTOR_BYTES):
            if len(self.sectors.versions(offset)) > 1:
                self.sectors.write(offset, read(SECTOR_BYTES, offset), durable=True).complete()
        self.sizes = (image.size,)

    def forget_order(self) -> None:
        """A barrier failed: what it should have kept may come or go until it is written again."""
        self.lost = True
        for sectors in (self.sectors, *([self.rival.sectors] if self.rival else [])):
            for offset in range(0, sectors.size_bytes, SECTOR_BYTES):
                versions = sectors.versions(offset)
                if len(versions) > 1:
                    for version in versions:
                        # An operation that never completes leaves old and new possible, also after a flush.
                        sectors.write(offset, version)


def settled(sectors: SectorModel) -> SectorModel:
    """Return a copy in which all is durable: of each sector there is what a read may return now."""
    copy = sectors.copy()
    copy.flush_end(copy.flush_begin())
    return copy
