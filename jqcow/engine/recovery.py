"""Opening an image: the one path for clean and crashed ones.

A clean image is its header. A live image is its root, its journal replayed into memory and, when it is
opened for writing, the recovery that `Store.recover` tells.
"""

from __future__ import annotations

from dataclasses import dataclass

from jqcow.engine import repair as repairing
from jqcow.engine.medium import Medium
from jqcow.engine.repair import RepairReport, What
from jqcow.engine.scan import Scan, read_header, read_root_copy
from jqcow.engine.store import NewSalt, Store, random_salt
from jqcow.errors import FormatError
from jqcow.ondisk import features
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import INCOMPATIBLE_DIRTY, MAGIC, HeaderArea
from jqcow.ondisk.layout import SECTOR_BYTES


@dataclass(frozen=True)
class Opened:
    """An opened image: its store, what the journal held if there was a live one, and what was repaired."""

    store: Store
    scan: Scan | None
    repaired: RepairReport | None = None


def open_store(
    medium: Medium,
    *,
    writable: bool,
    journal_bytes: int = 0,
    use_root_copy: bool = False,
    new_salt: NewSalt = random_salt,
    repair: What | None = None,
) -> Opened:
    """Open the image on ``medium``; a live one is recovered first where it is opened for writing.

    Then the refcounts are made right where that was asked for, or where the dirty bit says that they may
    be wrong.

    Args:
        medium: the device.
        writable: False never writes one byte.
        journal_bytes: length of the next journal, 0 for the default (or what the live image has).
        use_root_copy: where sector 0 has no valid magic, take the root from its copy.
        new_salt: makes the salt of each new journal; a seeded one makes a simulation replayable.
        repair: what to repair, with "all" also an image marked corrupt; None: what the dirty bit asks for.

    Raises:
        FormatError: not a qcow2 image, or one that breaks the specification.
        UnsupportedFeatureError: a feature that jqcow refuses by name.
        CorruptionError: the root, the journal or a table is damaged.
        OSError: the host failed; recovery can be tried again.
    """
    sector = medium.pread(SECTOR_BYTES, 0)
    if use_root_copy and sector[: len(MAGIC)] != MAGIC:
        sector = read_root_copy(medium) or sector
    if roots.is_live(sector):
        store, scan = Store.open_live(medium, sector, journal_bytes=journal_bytes, new_salt=new_salt)
        _check_usable(store.metadata.area, writable=writable, repairing=repair == "all")
        if writable:
            store.recover(sector, scan, repairing=repair is not None)
        return Opened(store, scan, _repair(store, repair) if writable else None)
    area = read_header(medium)
    _check_usable(area, writable=writable, repairing=repair == "all")
    length = journal_bytes or roots.DEFAULT_JOURNAL_BYTES
    store = Store(medium, area, journal_bytes=length, new_salt=new_salt)
    return Opened(store, None, _repair(store, repair) if writable else None)


def _repair(store: Store, what: What | None) -> RepairReport | None:
    if store.metadata.header.incompatible_features & INCOMPATIBLE_DIRTY:
        # What is too low must not stay: the bit is cleared, and the next opening would trust the refcounts.
        what = "all"
    return None if what is None else repairing.repair(store, what)


def _check_usable(area: HeaderArea, *, writable: bool, repairing: bool) -> None:
    features.refuse(area, "read" if not writable else "repair" if repairing else "write")
    header = area.header
    if header.l1_size < header.geometry.l1_entries_for(header.size):
        # Otherwise a few bytes could announce a disk that takes years to walk.
        raise FormatError(f"an L1 table of {header.l1_size} entries is too small for {header.size} bytes")
