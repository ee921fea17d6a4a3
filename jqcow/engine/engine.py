"""One image, open: all parts of the engine put together, and the opening of clean and crashed images.

A clean image is its header. A live image is its root, its journal replayed into memory and, when it is
opened for writing, the recovery that `Lifecycle.recover` tells.

What opening and ``jqcow-recover`` do depends on sector 0, the root copy and the journal:

    case  sector 0   root copy             journal  open "r"            open "r+"           jqcow-recover
    A     clean      no room, none, torn   any      opens               opens               nothing to do
    J     clean      same, other           any      opens               finishes            finishes
    B     live       no room, same         good     replays             recovers*           recovers*
    C     live       none, torn, other     good     replays             recovers            recovers
    D     live       any                   damaged  Corruption          Corruption          Corruption
    E     live       any                   newer    UnsupportedFeature  UnsupportedFeature  UnsupportedFeature
    F     no magic   no room, none, torn   any      Format              Format              Format
    G     no magic   same, other           good     Corruption          Corruption          recovers*
    H     no magic   same, other           damaged  Corruption          Corruption          Corruption
    I     no magic   same, other           newer    Corruption          Corruption          UnsupportedFeature

    decided in  scan.find_live_root (sector 0), Root.may_be_rewritten (B or C), scan.read_header (F to I),
                scan.scan (the journal)

Sector 0 is clean (a header in standard layout), live (the root), or has no magic. Clusters up to 4 KiB leave
no room for a root copy; elsewhere there is none, a torn one, or a whole one, of the same journal as sector 0
or of another (a move that did not end). Where sector 0 has no magic that is the journal which it named.

    replays     into memory
    finishes    what a crash cut off, going live or closing: the root copy is cleared, the journal's space
                given back
    recovers*   sector 0 is rewritten first, as it was read; in case C that would put it at risk while no
                whole copy of the same journal stands behind it
    Corruption, Format, UnsupportedFeature   that error; nothing is written
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from jqcow.device.base import Device
from jqcow.device.disk import Disk
from jqcow.engine import repair as repairs
from jqcow.engine import scan
from jqcow.engine.closing import Closing
from jqcow.engine.commit import Commits
from jqcow.engine.copying import Copying
from jqcow.engine.datafile import DataFile
from jqcow.engine.destaging import Destaging, SmallWrites
from jqcow.engine.guestdata import GuestData, data_on, unlocked_data
from jqcow.engine.journal import Contents, Journal
from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.log import Log, NewSalt
from jqcow.engine.mapping import L1Table
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import Blocks, ChangeSet
from jqcow.engine.packed import PackedWrites
from jqcow.engine.read import Reads
from jqcow.engine.repair import RepairReport, What
from jqcow.engine.request import Guard, Requests
from jqcow.engine.resizing import Resizing
from jqcow.engine.root import Root
from jqcow.engine.scan import LiveRoot, Scan
from jqcow.engine.space import Space
from jqcow.engine.tables import Tables
from jqcow.engine.vacated import VacatedPlaces
from jqcow.engine.write import Writes
from jqcow.engine.zeroing import Zeroing
from jqcow.errors import FormatError
from jqcow.ondisk import features
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import IntentOperation
from jqcow.ondisk.header import INCOMPATIBLE_DIRTY, HeaderArea
from jqcow.ondisk.keys import Passphrase
from jqcow.ondisk.layout import HostOffset


def random_salt() -> bytes:
    """Return a salt that no journal had before."""
    return secrets.token_bytes(roots.SALT_BYTES)


class Guest:
    """What a guest can ask for, through one set of tables."""

    def __init__(self, requests: Requests, data: GuestData, backing: Disk | None) -> None:
        self.requests = requests
        self.tables = requests.tables
        self.reads = Reads(requests, data, backing)
        self.writes = Writes(self.reads)
        self.copying = Copying(self.writes)
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
        if self.geometry.has_data_file:
            self.space.vacated = VacatedPlaces(medium, self.geometry, self.guard)
        self.public = Tables(self.blocks, self.space, ChangeSet(self.geometry))
        self.root = Root(medium, self.geometry)
        self.log = Log(self.public, self.root, journal_bytes, new_salt)
        self.commits = Commits(self.log)
        self.lifecycle = Lifecycle(self.commits)
        self.closing = Closing(self.lifecycle)
        self.data = data_on(medium, self.public.view)
        self.journals_small_writes = False
        self.commits.destage = self._destage

    def _destage(self) -> None:
        """Do all that is pending; the turn is taken. It needs no backing file (destaging.py, I7)."""
        if not self.log.pending.is_empty:
            requests = Requests(
                self.public,
                self.lifecycle,
                self.commits,
                self.guard,
                self._admit_destaging,
                alone=True,
                destages=True,
            )
            Destaging(Guest(requests, self.data, None).writes, self.commits).run()

    def _admit_destaging(self, changing: bool) -> None:
        self.medium.require_known()
        if changing:
            self.medium.require_healthy()

    @property
    def _may_journal(self) -> bool:
        """True if small writes may wait in the journal of this image."""
        is_plain = not self.data.is_encrypted and not self.geometry.has_data_file
        return self.journals_small_writes and is_plain and not self.medium.has_fixed_size

    @property
    def _has_plain_clusters(self) -> bool:
        """True if a cluster of data is where its entry says, whole and as it is (known.py, Q4)."""
        geometry = self.geometry
        return not (self.data.is_encrypted or geometry.has_data_file or geometry.has_subclusters)

    def attach(self, data_file: Device) -> None:
        """Give an image with an external data file that file; before anything is asked of the guest's data.

        Raises:
            OSError: the host failed.
        """
        found = DataFile(data_file)
        if not data_file.read_only:
            found.settle()
        self.medium.data_file = found
        self.data = data_on(self.medium, self.public.view)

    def unlock(self, passphrase: Passphrase | None) -> None:
        """Make the guest's data of an encrypted image readable; any other image needs nothing.

        Raises:
            PassphraseError: there is none, or it opens no key slot.
            MissingPackageError: cryptography is not installed.
            JqcowError: the LUKS header is damaged, or not one that jqcow reads.
        """
        self.data = unlocked_data(self.medium, self.public.view, passphrase)

    def guest(
        self,
        admit: Callable[[bool], None],
        backing: Disk | None = None,
        *,
        tables: Tables | None = None,
        alone: bool = False,
        shown: L1Table | None = None,
    ) -> Guest:
        """Return a guest's way in; arguments as `Requests` and `Reads`. ``shown``: the disk of a snapshot."""
        if shown is not None:
            tables = Tables(self.blocks, self.space, self.public.changes, shown)
        requests = Requests(
            tables or self.public, self.lifecycle, self.commits, self.guard, admit, alone=alone
        )
        guest = Guest(requests, self.data, backing)
        if tables is None and not alone and self._has_plain_clusters:
            guest.reads.known = self.blocks.known
        if self._may_journal and tables is None and not alone:
            guest.writes.small = SmallWrites(guest.writes)
        return guest


def settle(medium: Medium) -> None:
    """Make what an earlier process left durable, and have reads show nothing else (M7). Once for each medium.

    Raises:
        OSError: the host failed; it may have lost something, and opening can be tried again.
    """
    if not medium.barriers_started:
        # Durable now: what a killed writer left in the page cache, a root copy in flight among it. All that
        # follows relies on what is read.
        medium.barrier("open.settle")
        medium.forget_cached()


@dataclass(frozen=True)
class Opened:
    """An opened image, of which nothing was written yet: its engine, and what its live journal holds.

    ``intents``: writes of the guest among that which the tables do not show.
    """

    engine: Engine
    root: LiveRoot | None = None
    scan: Scan | None = None
    intents: tuple[IntentOperation, ...] = ()


def open_engine(
    medium: Medium,
    *,
    writable: bool,
    journal_bytes: int = 0,
    use_root_copy: bool = False,
    new_salt: NewSalt = random_salt,
    repair: What | None = None,
) -> Opened:
    """Open the image on ``medium``, and replay a live journal into memory. Not one byte is changed.

    Args:
        medium: the device.
        writable: the image is to be written; `make_writable` comes before the first change.
        journal_bytes: length of the next journal, 0 for the default; that of a live image is what it has.
        use_root_copy: where sector 0 has no valid magic, take the root from its copy.
        new_salt: makes the salt of each new journal; a seeded one makes a simulation replayable.
        repair: what is to be repaired, with all but "leaks" also an image marked corrupt.

    Raises:
        FormatError: not a qcow2 image, or one that breaks the specification.
        UnsupportedFeatureError: a feature that jqcow refuses by name.
        CorruptionError: the root, the journal or a table is damaged.
        OSError: the host failed.
    """
    if writable:
        settle(medium)
    root = scan.find_live_root(medium.device, use_root_copy=use_root_copy)
    if root is not None:
        opened = _open_live(medium, root, journal_bytes, new_salt)
    else:
        length = journal_bytes or roots.DEFAULT_JOURNAL_BYTES
        area = scan.read_header(medium.device)
        opened = Opened(Engine(medium, area, journal_bytes=length, new_salt=new_salt))
    header = opened.engine.blocks.area.header
    counts_anew = repair in ("all", "bitmaps") or bool(header.incompatible_features & INCOMPATIBLE_DIRTY)
    _check_usable(opened.engine.blocks.area, writable=writable, may_be_corrupt=repair in ("all", "bitmaps"))
    if writable and not counts_anew:
        header.validate_refcount_table()
        if opened.scan is not None:
            opened.engine.lifecycle.check_journal_is_free(opened.scan.extent)
    return opened


def _open_live(medium: Medium, root: LiveRoot, journal_bytes: int, new_salt: NewSalt) -> Opened:
    found, replayed = scan.read_journal(medium.device, root)
    extent = found.extent
    engine = Engine(medium, replayed.area, journal_bytes=journal_bytes or extent.length, new_salt=new_salt)
    engine.blocks.images = {HostOffset(offset): block for offset, block in replayed.blocks.items()}
    engine.space.reserve(HostOffset(extent.offset), extent.length)
    engine.space.find_used_end = engine.public.refcounts.used_end
    engine.log.journal = Journal(medium, extent, Contents.of_scan(found))
    engine.log.pending.load(replayed.intents)
    return Opened(engine, root, found, replayed.intents)


def make_writable(
    opened: Opened, repair: What | None = None, *, free_lost: bool = False
) -> RepairReport | None:
    """Recover a live image, or finish what a crash cut off on a clean one; and make refcounts right.

    That happens where ``repair`` asks for it, or the dirty bit does.

    Raises:
        CorruptionError: a table is damaged.
        OSError: the host failed; opening again can try anew.
    """
    engine = opened.engine
    if engine.blocks.area.header.incompatible_features & INCOMPATIBLE_DIRTY:
        # What is too low must not stay: the bit is cleared, and the next opening would trust the refcounts.
        repair = "bitmaps" if repair == "bitmaps" else "all"
    if opened.root is not None and opened.scan is not None:
        if repair == "bitmaps":
            repairs.give_up_broken_bitmaps(engine.public)
        engine.lifecycle.recover(opened.root, opened.scan, repair)
    elif (leftover := engine.closing.find_leftover(repairing=repair is not None)) is not None:
        engine.closing.finish_closing(leftover)
    return None if repair is None else repairs.repair(engine.closing, repair, free_lost=free_lost)


def _check_usable(area: HeaderArea, *, writable: bool, may_be_corrupt: bool) -> None:
    features.refuse(area, "read" if not writable else "repair" if may_be_corrupt else "write")
    header = area.header
    if header.l1_size < header.geometry.l1_entries_for(header.size):
        # Otherwise a few bytes could announce a disk that takes years to walk.
        raise FormatError(f"an L1 table of {header.l1_size} entries is too small for {header.size} bytes")
