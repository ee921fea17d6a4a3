"""From clean to live: going live, and recovery. The way back is `jqcow.engine.closing`.

Recovery, from top to bottom: the live records, durable as they were read (M7), are copied under a new salt
into a new range, and the root names that; every home is written; the image goes on. Nothing is written into
the range that was read: a durable frame must not be put at risk by rewriting it.

F1. While refcounts may be too low, and when one turned out to be, nothing below the end of everything is
    allocated, or punched.
F2. Data behind the last counted cluster that a table maps gets its refcount in the first record that follows
    opening; nothing there is allocated, punched or cut off before.
F3. A clean file grows only while nothing mapped lies past its end.
F5. The length of a device of fixed size tells nothing. There the frontier lies behind all that refcounts
    count, tables name and log images target; where that cannot be told, behind the end of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace

from jqcow.engine.commit import Commits
from jqcow.engine.journal import Contents
from jqcow.engine.medium import EXPECTED
from jqcow.engine.root import SECTOR_0
from jqcow.engine.scan import LiveRoot, Scan
from jqcow.engine.walk import mapped_elsewhere
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import AUTOCLEAR_BITMAPS
from jqcow.ondisk.layout import SECTOR_BYTES, ClusterIndex, Geometry
from jqcow.ondisk.root import JournalRange


class Lifecycle:
    """What happens to one image before its first change, and after a crash.

    ``kept_bytes``: the file is never cut below this. Wrong refcounts do not tell its end.
    """

    def __init__(self, commits: Commits) -> None:
        self.commits = commits
        self.log = commits.log
        self.root = commits.log.root
        self.public = commits.public
        self.medium = commits.medium
        self.blocks = commits.public.blocks
        self.space = commits.public.space
        self.geometry = commits.public.geometry
        self.kept_bytes = 0
        self._is_surveyed = False
        self._has_own_offsets = False
        self._reached = ClusterIndex(0)
        """The cluster behind all that may hold something (`_find_reached`)."""
        self._uncounted: list[tuple[ClusterIndex, int]] = []
        """Clusters behind the last counted one that tables map, and by how many references (F2)."""

    # Before the first change

    def prepare_to_change(self) -> None:
        """Check, once, that the image may be changed: no metadata cluster is used twice or uncounted.

        The lock is held: nobody changes what is walked.

        Raises:
            CorruptionError: changing this image would destroy it.
        """
        if not self._is_surveyed:
            self._refuse_truncated()
            self.space.metadata = self.public.snapshots.survey()
            self.public.bitmaps.require_kept()
            self._find_reached(may_be_damaged=self.log.journal is not None)
            self._find_frontier()
            self.start_search()
            self._find_uncounted()
            self._is_surveyed = True

    def require_own_offsets(self) -> None:
        """Check, once, that guest clusters lie at their own offsets of the data file (datafile.py, X5).

        Raises:
            UnsupportedFeatureError: one does not.
            CorruptionError: a table is damaged.
        """
        if not self._has_own_offsets:
            place = mapped_elsewhere(self.public.mapping)
            if place:
                raise UnsupportedFeatureError(
                    "writing to a data file that is out of order",
                    f"the L2 entry at {place:#x} maps a guest cluster to another offset than its own",
                )
            self._has_own_offsets = True

    def _find_uncounted(self) -> None:
        """Look for data behind the last counted cluster; only if the file reaches there (F2)."""
        used_end = self.public.refcounts.used_end()
        start, end = int(used_end), int(self._reached)
        journal = self.log.journal
        if journal is not None:
            # Who left it saw to F2 before its first record, but refcounts may have been damaged since.
            start, end = _without(journal.extent, self.geometry, start, end)
        if start >= end:
            return
        try:
            found = self.public.snapshots.data_within(start, end)
        except (CorruptionError, UnsupportedFeatureError):
            if journal is None:
                raise
            # What is mapped cannot be told. A crashed image is brought home all the same.
            self.space.search_end, self.kept_bytes = used_end, self.medium.size()
            return
        self._uncounted = sorted(found.items())
        if found:
            self.space.search_end = used_end

    def data_end(self) -> ClusterIndex:
        """Return the index behind the last cluster in use, counted or not (F2). The lock is held."""
        ends = (ClusterIndex(cluster + 1) for cluster, _ in self._uncounted)
        return max(self.public.refcounts.used_end(), *ends, ClusterIndex(0))

    def end_offset(self) -> int:
        """Return the host offset behind all that is in use, the journal included. The lock is held.

        It only rises until the image is closed.
        """
        return self.geometry.offset_of(max(self.space.frontier, self.data_end()))

    def _count_uncounted(self) -> None:
        with self.medium.lock, self.public.operation():
            for cluster, references in self._uncounted:
                self.public.refcounts.correct(cluster, 1, 0, references)
        self._uncounted = []

    @property
    def is_live(self) -> bool:
        """True if metadata may be changed: there is a journal, and F2 is kept."""
        return self.log.journal is not None and not self._uncounted

    def _refuse_truncated(self) -> None:
        """Raise CorruptionError if what is mapped lies past the end of the file: it is about to grow (F3)."""
        file_end = self.geometry.clusters(self.medium.size())
        # That of a live image may be shorter: its checkpoint makes it longer. The walk is for few images.
        if self.log.journal is not None or self.public.refcounts.used_end() <= file_end:
            return
        try:
            self.public.snapshots.check_all_mapped()
        except CorruptionError as error:
            error.add_note(
                "the file was cut off, and a change would turn what is lost into zeros: find a whole copy, "
                "or save what is left with jqcow convert --salvage"
            )
            raise

    def prepare_to_repair(self, *, may_rebuild: bool = False) -> None:
        """As `prepare_to_change`, where refcounts may be wrong: nothing below the frontier is free (F1).

        With ``may_rebuild`` a refcount table that is nowhere, damaged or in use for something else counts as
        lost, if all other metadata is sound.

        Raises:
            CorruptionError: a metadata cluster is used twice.
        """
        if not self._is_surveyed:
            self.space.metadata = set(self._metadata_to_repair(may_rebuild=may_rebuild))
            self._find_reached(may_be_damaged=True)
            self._find_frontier()
            self._is_surveyed = True

    def _metadata_to_repair(self, *, may_rebuild: bool) -> Iterable[ClusterIndex]:
        header, find = self.public.view.header, self.public.snapshots.find_metadata
        try:
            header.validate_refcount_table()
            return find()
        except (CorruptionError, FormatError):
            if not may_rebuild:
                raise
            self.space.lost_table = (header.refcount_table_offset, header.refcount_table_clusters)
        return find()

    def start_search(self) -> None:
        """Free clusters may be looked for: the refcounts can be trusted (F1)."""
        self.space.search_end = self.space.frontier

    def _find_reached(self, *, may_be_damaged: bool) -> None:
        """Find the end of the file or, on a device of fixed size, of all that is named there (F5)."""
        end = self.geometry.clusters(self.medium.size())
        if self.medium.has_fixed_size:
            try:
                end = max(self._ends_of_what_is_known())
            except (CorruptionError, FormatError, UnsupportedFeatureError):
                if not may_be_damaged:
                    raise
        self._reached = ClusterIndex(end)

    def _ends_of_what_is_known(self) -> Iterator[int]:
        yield self.public.snapshots.named_end()
        yield max(self.space.metadata, default=0) + 1
        # Replay may write there, also where a table was freed.
        yield self.geometry.clusters(max(self.blocks.images, default=0) + 1)

    def _find_frontier(self) -> None:
        end = max(self.space.frontier, self._reached, self.public.refcounts.used_end())
        self.space.frontier = ClusterIndex(end)

    def go_live(self, admit: Callable[[], None]) -> None:
        """Set up the journal before the first metadata change. Nothing to do if the image is live.

        Called with the lock free; ``admit`` is called with the turn taken and the lock held.

        Raises:
            OSError: the host refused; the image is as it was.
            UnsupportedFeatureError: the header leaves no room for the root.
        """
        with self.commits.turn.lock:
            self.commits.begin_turn()
            if self.log.journal is None:
                with self.medium.lock:
                    admit()
                    self.prepare_to_change()
                self._set_up()
            if self._uncounted:
                self._count_uncounted()
                self.commits.commit(self.public)

    def _set_up(self) -> None:
        clean = self.blocks.area
        roots.check_room(clean.header, len(clean.data))
        # Autoclear bits that jqcow does not keep are gone from the first header that the journal holds.
        kept = AUTOCLEAR_BITMAPS if self.public.bitmaps.directory.entries else 0
        kept |= clean.header.raw_bit
        live = clean.with_header(replace(clean.header, autoclear_features=kept))
        self.root.settle()
        before = self.medium.pread(SECTOR_BYTES, SECTOR_0)
        self.public.refcounts.allocate_homes()
        # Under the next barrier they become zero-safe: new clusters need not go behind the journal.
        self.log.recycle()
        contents = Contents.opening(live, epoch=1, sequence=0)
        journal = self.log.lay(self.log.journal_bytes, contents, self.log.shortest_bytes)
        try:
            # Durable now: the opening frame and the root copy. The root that names them comes next.
            self.medium.barrier("live.prepare")
            self.root.write(roots.pack_root(clean.header, journal.extent))
            # Durable now: the root, without the autoclear bits that data may break from here on. No record
            # follows an older sector 0 (F4).
            self.medium.barrier("live.root")
        except BaseException:
            self.root.put_back(before)
            self.log.retire(journal.extent)
            raise
        with self.medium.lock, self.medium.section():
            self.blocks.area = live
            self.log.go_on_in(journal)

    # Recovery

    def check_journal_is_free(self, extent: JournalRange) -> None:
        """Raise unless the journal's clusters have refcount 0.

        Raises:
            CorruptionError: the journal is not one that a writer leaves.
        """
        start, end = extent.offset // self.geometry.cluster_bytes, self.geometry.clusters(extent.end)
        if not self.public.refcounts.is_free(start, end):
            raise CorruptionError("journal", extent.offset, "its clusters have a refcount")

    def recover(self, root: LiveRoot, scan: Scan, repair: str | None = None) -> None:
        """Bring a crashed image home: what was replayed into memory becomes durable. Nobody else has it yet.

        Args:
            root: as it was read.
            scan: the journal as it was read.
            repair: what of the refcounts is made right next; None: they are right.

        Raises:
            OSError: recovery can be tried again, from the start.
        """
        if repair is not None:
            self.prepare_to_repair(may_rebuild=repair != "leaks")
        else:
            self.prepare_to_change()
        if self.root.may_be_rewritten(scan.extent):
            # On a device that shows what a failed barrier lost, a cache alone may hold it.
            self.root.rewrite(root.sector)
            # Durable now: the root as it was read. The root copy may be rewritten from here on.
            self.medium.barrier("recover.root")
        self.log.rescue(self.log.journal_bytes, Contents.of_scan(scan))
        self.log.checkpoint()
        with suppress(*EXPECTED):
            # Everything is home: what this cannot give, the next append asks for.
            self.log.settle_in()
        # R3: before the records of this process, not before those that a crash left.
        self.public.refcounts.allocate_homes()
        # The crash may have come before the first record, which was to keep F2.
        self.go_live(self.medium.require_healthy)


def _without(extent: JournalRange, geometry: Geometry, start: int, end: int) -> tuple[int, int]:
    """Return what is left of the clusters in [start, end) where a journal is at one of their ends."""
    first, stop = extent.offset // geometry.cluster_bytes, geometry.clusters(extent.end)
    return stop if first <= start < stop else start, first if first < end <= stop else end
