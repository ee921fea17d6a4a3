"""One image, open: all parts of the engine put together, and the opening of clean and crashed images.

A clean image is its header. A live image is its root, its journal replayed into memory and, when it is
opened for writing, the recovery that `Lifecycle.recover` tells.

What opening and ``jqcow-recover`` do depends on sector 0, the root copy and the journal:

    case  sector 0  root copy            journal  open "r"            open "r+"           jqcow-recover
    A     clean     any                  any      opens               opens               nothing to do
    B     live      no room, same        good     replays             recovers*           recovers*
    C     live      none, torn, other    good     replays             recovers            recovers
    D     live      any                  damaged  Corruption          Corruption          Corruption
    E     live      any                  newer    UnsupportedFeature  UnsupportedFeature  UnsupportedFeature
    F     no magic  no room, none, torn  any      Format              Format              Format
    G     no magic  same, other          good     Corruption          Corruption          recovers*
    H     no magic  same, other          damaged  Corruption          Corruption          Corruption
    I     no magic  same, other          newer    Corruption          Corruption          UnsupportedFeature

Sector 0 is clean (a header in standard layout), live (the root), or has no magic. Clusters up to 4 KiB leave
no room for a root copy; elsewhere there is none, a torn one, or a whole one, of the same journal as sector 0
or of another (a move that did not end).

    replays     into memory
    recovers*   sector 0 is rewritten first, as it was read; in case C that would put it at risk while no
                whole copy of the same journal stands behind it
    Corruption, Format, UnsupportedFeature   that error; nothing is written

    journal  found           meaning, and what is done
    good     opening record  the root landed, the first record did not: replay gives the header as it was
    good     records         the ordinary crash: replay in order
    good     torn tail       a crash in an append: drop the torn record
    good     torn epoch      a crash at the start of an epoch: replay the epoch before it
    good     two epochs      a checkpoint completed: replay the newer one
    damaged  no frame        media damage
    damaged  gap             acknowledged records are missing
    damaged  cut             the range reaches past the end of the file
    damaged  hostile         operations on the journal or on cluster 0
    newer    newer           unknown version, encoding, flag or kind: refuse by name
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from jqcow.device.disk import Disk
from jqcow.engine import repair as repairing
from jqcow.engine import scan
from jqcow.engine.blocks import Blocks
from jqcow.engine.changes import ChangeSet
from jqcow.engine.commit import Commits
from jqcow.engine.guard import Guard
from jqcow.engine.journal import Contents, Journal
from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.log import Log, NewSalt
from jqcow.engine.mapping import L1Table
from jqcow.engine.medium import Medium
from jqcow.engine.packed import PackedWrites
from jqcow.engine.refcounts import Search
from jqcow.engine.repair import RepairReport, What
from jqcow.engine.request import Requests
from jqcow.engine.resizing import Resizing
from jqcow.engine.root import SECTOR_0, Root
from jqcow.engine.scan import Scan, read_header, read_root_copy
from jqcow.engine.space import Space
from jqcow.engine.tables import Tables
from jqcow.engine.write import Writes
from jqcow.engine.zeroing import Zeroing
from jqcow.errors import FormatError
from jqcow.ondisk import features
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import INCOMPATIBLE_DIRTY, MAGIC, HeaderArea
from jqcow.ondisk.layout import SECTOR_BYTES, Geometry, HostOffset


def random_salt() -> bytes:
    """Return a salt that no journal had before."""
    return secrets.token_bytes(roots.SALT_BYTES)


class Guest:
    """What a guest can ask for, through one set of tables."""

    def __init__(self, requests: Requests) -> None:
        self.requests = requests
        self.tables = requests.tables
        self.writes = Writes(requests)
        self.packed = PackedWrites(self.writes)
        self.zeroing = Zeroing(self.writes)
        self.resizing = Resizing(self.zeroing)


class Engine:
    """The metadata of one image, its journal and its free space, clean or live."""

    def __init__(
        self, medium: Medium, area: HeaderArea, *, journal_bytes: int, new_salt: NewSalt = random_salt
    ) -> None:
        """Take an image whose header is ``area``; ``journal_bytes`` is the length of the next journal."""
        self.medium = medium
        self.geometry = area.header.geometry
        self.blocks = Blocks(medium, area)
        self.guard = Guard(medium)
        self.space = Space(medium, self.geometry, self.guard)
        self.search = Search()
        self.public = Tables(self.blocks, self.space, self.search, ChangeSet(self.geometry))
        self.root = Root(medium, self.geometry)
        self.log = Log(self.public, self.root, journal_bytes, new_salt)
        self.commits = Commits(self.log)
        self.lifecycle = Lifecycle(self.commits)

    def guest(
        self,
        enter: Callable[[bool], None],
        backing: Disk | None = None,
        *,
        tables: Tables | None = None,
        alone: bool = False,
        shown: L1Table | None = None,
    ) -> Guest:
        """Return a guest's way in; arguments as `Requests`. ``shown``: the disk of a snapshot."""
        if shown is not None:
            tables = Tables(self.blocks, self.space, self.search, self.public.changes, shown)
        requests = Requests(
            tables or self.public,
            self.lifecycle,
            self.commits,
            self.guard,
            enter,
            backing,
            alone=alone,
        )
        return Guest(requests)


@dataclass(frozen=True)
class Opened:
    """An opened image: its engine, what the journal held if there was a live one, and what was repaired."""

    engine: Engine
    scan: Scan | None
    repaired: RepairReport | None = None


def open_engine(
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
    sector = medium.pread(SECTOR_0, SECTOR_BYTES)
    if use_root_copy and sector[: len(MAGIC)] != MAGIC:
        sector = read_root_copy(medium.device) or sector
    if roots.is_live(sector):
        engine, found = _open_live(medium, sector, journal_bytes, new_salt)
        _check_usable(engine.blocks.area, writable=writable, repairing=repair == "all")
        if writable:
            engine.lifecycle.recover(sector, found, repairing=repair is not None)
        return Opened(engine, found, _repair(engine, repair) if writable else None)
    area = read_header(medium.device)
    _check_usable(area, writable=writable, repairing=repair == "all")
    length = journal_bytes or roots.DEFAULT_JOURNAL_BYTES
    engine = Engine(medium, area, journal_bytes=length, new_salt=new_salt)
    return Opened(engine, None, _repair(engine, repair) if writable else None)


def _open_live(medium: Medium, sector: bytes, journal_bytes: int, new_salt: NewSalt) -> tuple[Engine, Scan]:
    """Read an image with a live journal: scan, and replay into memory. Not one byte is written."""
    cluster_bits, extent = roots.unpack_root(sector)
    found = scan.scan(medium.device, extent, Geometry(cluster_bits))
    replayed = scan.replay(found.operations, Geometry(cluster_bits))
    length = max(journal_bytes, extent.length)
    engine = Engine(medium, replayed.area, journal_bytes=length, new_salt=new_salt)
    engine.blocks.images = {HostOffset(offset): block for offset, block in replayed.blocks.items()}
    engine.lifecycle.check_replayed(cluster_bits, extent)
    engine.space.reserve(HostOffset(extent.offset), extent.length)
    engine.log.journal = Journal(medium, extent, Contents.of_scan(found))
    return engine, found


def _repair(engine: Engine, what: What | None) -> RepairReport | None:
    if engine.blocks.area.header.incompatible_features & INCOMPATIBLE_DIRTY:
        # What is too low must not stay: the bit is cleared, and the next opening would trust the refcounts.
        what = "all"
    return None if what is None else repairing.repair(engine.lifecycle, what)


def _check_usable(area: HeaderArea, *, writable: bool, repairing: bool) -> None:
    features.refuse(area, "read" if not writable else "repair" if repairing else "write")
    header = area.header
    if header.l1_size < header.geometry.l1_entries_for(header.size):
        # Otherwise a few bytes could announce a disk that takes years to walk.
        raise FormatError(f"an L1 table of {header.l1_size} entries is too small for {header.size} bytes")
