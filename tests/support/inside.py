"""All that tests reach of the engine beside its public names: one place to mend when the engine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import jqcow
from jqcow.engine import tracking
from jqcow.engine.engine import make_writable, open_engine
from jqcow.engine.journal import Journal
from jqcow.engine.medium import Medium
from jqcow.engine.read import Reads
from jqcow.engine.request import Requests
from jqcow.engine.snapshots import Snapshots
from jqcow.engine.tables import Tables
from jqcow.errors import JqcowError
from jqcow.image.transaction import Transaction
from jqcow.ondisk.amendment import Amendment, AmendOptions
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.naming import NamedFile, backing_file_of
from jqcow.ondisk.snapshots import Snapshot
from jqcow.testing import SimulatedDevice
from tests.support.encrypted import PASSPHRASE

if TYPE_CHECKING:
    from tests.support.below import Below

Range = tuple[int, int]


# Small disks have several regions of bitmaps, and more of them than are kept in mind.
tracking.REGION_BITS = 13
tracking.REGIONS_MAX = 6


class Shown:
    """A snapshot of an open image, read beside its disk; in a transaction, as the transaction sees it."""

    def __init__(self, holder: jqcow.Image | Transaction, snapshot: Snapshot) -> None:
        """Take one of the snapshots that ``holder`` lists."""
        guest = holder._guest
        tables, shown = guest.tables, Snapshots.l1_of(snapshot)
        self._tables = Tables(tables.blocks, tables.space, tables.changes, shown)
        self._tables.staged = tables.staged
        engine = guest.requests
        requests = Requests(self._tables, engine.lifecycle, engine.commits, engine.guard, engine.admit)
        self._reads = Reads(requests, guest.reads.data, guest.reads.backing)
        self.size = snapshot.disk_bytes

    def pread(self, length: int, offset: int) -> bytes:
        """Return the bytes of the snapshot's disk."""
        buffer = bytearray(length)
        self._reads.read_into(memoryview(buffer), offset)
        return bytes(buffer)


def is_poisoned(image: jqcow.Image) -> bool:
    """Return True if an open image turned read-only, or refuses everything."""
    return image._medium.poisoned or image._medium.in_doubt


def is_in_doubt(image: jqcow.Image) -> bool:
    """Return True if an open image refuses everything: a call was cut off half-way."""
    return image._medium.in_doubt


def require_free_locks(image: jqcow.Image, is_taken: Callable[..., bool]) -> None:
    """No lock of an image was left taken."""
    assert not is_taken(image._engine.guard.turnstile), "the turnstile was left taken"
    assert not is_taken(image._engine.commits.turn.lock), "the turn was left taken"
    assert not is_taken(image._lock), "the lock was left taken"


def are_zero_safe(image: jqcow.Image, clusters: range) -> bool | None:
    """Return whether free clusters are known to read as zeros: all of them, none, or None for some."""
    space = image._engine.space
    if all(cluster in space.zero_safe for cluster in clusters):
        return True
    return None if any(cluster in space.zero_safe for cluster in clusters) else False


def are_used(image: jqcow.Image, clusters: range) -> bool:
    """Return True if all of these host clusters have a refcount."""
    return all(image._engine.public.refcounts.get(cluster) for cluster in clusters)


def journal_of(image: jqcow.Image) -> Journal:
    """Return the journal of a live image."""
    return image._engine.log.require_journal()


def header_of(image: jqcow.Image) -> HeaderArea:
    """Return the header of a running image, with its extensions."""
    return image._engine.public.view.area


def cannot_hide(image: jqcow.Image, offset: int, length: int) -> bool:
    """Return True if no entry can make a range read as zeros: in version 2, over data below."""
    below = image._guest.reads.backing
    if header_of(image).header.version > 2 or below is None:
        return False
    length = max(0, min(length, below.size - offset))
    return any(extent.kind != "zero" for extent in below.extents(length, offset) if length)


def form_after(header: Header, options: AmendOptions) -> tuple[int, int, bool]:
    """Return what `form_of` an amended header is."""
    amended = Amendment.of(header, options)
    return amended.version, amended.refcount_order, amended.lazy_refcounts


def data_of(image: jqcow.Image) -> bytes:
    """Return what the data file of a running image holds."""
    data_file = image._medium.data_file
    if data_file is None:
        return b""
    return data_file.device.pread(data_file.size, 0)


def copy_on_read(image: jqcow.Image) -> None:
    """Let reads of a running image copy what lies below."""
    image._copy_on_read = True


def show_through(image: jqcow.Image, below: Below | None) -> None:
    """Let a running image show another disk where it has nothing of its own."""
    image._backing = image._guest.reads.backing = below


def staged(image: jqcow.Image) -> tuple[int, int]:
    """Return how many blocks are staged, and how many may be."""
    engine = image._engine
    return len(engine.public.changes.blocks), engine.commits.staged_limit()


def open_by_root_copy(
    device: SimulatedDevice,
    journal_bytes: int,
    new_salt: Callable[[], bytes],
    find_below: Callable[[NamedFile], Below],
) -> jqcow.Image:
    """Open an image whose sector 0 is lost for writing, as `jqcow recover --root-copy` does."""
    opened = open_engine(
        Medium(device), writable=True, journal_bytes=journal_bytes, use_root_copy=True, new_salt=new_salt
    )
    if device.companion is not None:
        opened.engine.attach(device.companion)
    opened.engine.unlock(PASSPHRASE)
    repaired = make_writable(opened)
    named = backing_file_of(opened.engine.blocks.area, "")
    below = None if named is None else find_below(named)
    return jqcow.Image(opened, "r+", below, repaired=repaired)


def metadata_ranges(device: SimulatedDevice) -> list[Range]:
    """Return the clusters of metadata and the journal, as replay of the readable content shows them.

    Without cluster 0, which holds sector 0 in one block and the root copy in another. Nothing where the
    content is no image.
    """
    try:
        engine = open_engine(Medium(device.killed()), writable=False).engine
        clusters = engine.public.snapshots.survey()
    except JqcowError:
        return []
    size = engine.geometry.cluster_bytes
    ranges = [(cluster * size, (cluster + 1) * size) for cluster in clusters - {0}]
    if engine.log.journal is not None:
        ranges.append((engine.log.journal.extent.offset, engine.log.journal.extent.end))
    return ranges


def modules_with_locks() -> list[ModuleType]:
    """Return the engine's modules that make locks, as ``threading`` of theirs."""
    return [module for name, module in sys.modules.items() if _makes_locks(name, module)]


def _makes_locks(name: str, module: ModuleType) -> bool:
    return name.startswith("jqcow.engine.") and hasattr(module, "threading")
