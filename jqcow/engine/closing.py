"""From live to clean: the close, and what of it a crash cut off.

From top to bottom: everything staged is committed, and brought home. A last epoch of the header alone begins.
Sector 0 gets its standard layout, then the root copy and the journal go.

F4. When sector 0 is in standard layout, the journal that the root copy still names holds the header alone:
    should another program change the image, and lose sector 0, no older tables come back.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.medium import EXPECTED
from jqcow.engine.scan import scan
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import frame as frames
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import FRAME_ALIGNMENT, HeaderOperation
from jqcow.ondisk.layout import SECTOR_BYTES, HostOffset
from jqcow.ondisk.root import JournalRange

HEADER_TAIL = HostOffset(SECTOR_BYTES)


@dataclass(frozen=True)
class Leftover:
    """A journal of which a clean image's root copy speaks. ``is_unused``: its space can be given back."""

    extent: JournalRange
    is_unused: bool


class Closing:
    """The end of one image's session, and of one that a crash cut off there."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.lifecycle = lifecycle
        self.commits = lifecycle.commits
        self.log = lifecycle.log
        self.root = lifecycle.root
        self.public = lifecycle.public
        self.medium = lifecycle.medium
        self.blocks = lifecycle.blocks
        self.space = lifecycle.space
        self.geometry = lifecycle.geometry

    def clean(self) -> None:
        """Make the image standard qcow2: everything home, sector 0 as any program knows it, journal gone.

        The caller is alone.

        Raises:
            OSError: the image stays live and recoverable, unless only the last step failed: then it is
                clean, and the journal's clusters are not given back.
        """
        with self.commits.turn.lock:
            self.commits.begin_turn()
            # First: what it writes has bits.
            self.commits.destage()
            with self.medium.lock:
                self.commits.tracking.cool()
            if not self.public.changes.is_empty:
                self.commits.commit(self.public)
            if self.log.journal is None:
                self._close_clean()
            else:
                self._settle_copy()
                self._write_header_tail()
                # No clusters are needed any more, so none are punched before the journal is gone.
                self.log.checkpoint(recycle=False)
                self._begin_last_epoch()
                self._clear_root()
                self._release_journal()

    def _close_clean(self) -> None:
        if self.root.copy_is_stale:
            self.root.settle()
            self.root.clear_copy()
        # Durable now: data written in place; no root copy that a failed start left.
        self.medium.barrier("close.data")

    def _settle_copy(self) -> None:
        if self.root.copy_is_stale:
            # A move failed after it wrote the copy; sector 0 is about to rely on it.
            self.root.settle()
            self.root.write_copy(self.blocks.area.header, self.log.require_journal().extent)

    def _write_header_tail(self) -> None:
        """Write what of the header is behind sector 0; the journal has all of it until sector 0 follows."""
        tail = self.blocks.area.data[SECTOR_BYTES:]
        if tail and self.medium.pread(len(tail), HEADER_TAIL) != tail:
            self.medium.pwrite(tail, HEADER_TAIL)

    def _begin_last_epoch(self) -> None:
        """Append a frame of the header alone, behind homes that are all written (F4)."""
        journal = self.log.require_journal()
        try:
            journal.append(frames.encode_operations([HeaderOperation(self.blocks.area.data)]))
            # Durable now: the last epoch. The one before may go, and sector 0 be cleared.
            self.medium.barrier("close.epoch")
        except BaseException:
            journal.revoke()
            raise
        journal.accept()

    def _clear_root(self) -> None:
        area, journal = self.blocks.area, self.log.require_journal()
        journal.drop_epoch_before()
        try:
            self.root.write(area.data[:SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0"))
            # Durable now: sector 0 in standard layout. The journal and the root copy may go.
            self.medium.barrier("close.clear")
        except BaseException:
            self.root.put_back_on_closing(roots.pack_root(area.header, journal.extent))
            raise

    def _release_journal(self) -> None:
        extent = self.log.require_journal().extent
        with self.medium.lock, self.medium.section():
            # Until here the root is undecided: no record goes into a journal that nothing names.
            self.log.journal = None
            self.root.decide()
            if not self.lifecycle.kept_bytes:
                self.space.journal_is_gone()
        with suppress(*EXPECTED):
            # Space that cannot be given back is no reason to leave more of it.
            self.log.recycle(refill=False)
        self._give_back(extent)

    def _give_back(self, extent: JournalRange | None) -> None:
        """Clear the root copy, and give back the journal's space, if there is any."""
        self.root.clear_copy()
        if extent is not None:
            self._cut_file(extent)
        # Durable now: the file without the journal. Closing is complete.
        self.medium.barrier("close.release")

    def _cut_file(self, extent: JournalRange) -> None:
        """The file ends behind the highest cluster in use (T7)."""
        with self.medium.lock:
            data_end = self.lifecycle.data_end()
        used_bytes = max(self.lifecycle.kept_bytes, self.geometry.offset_of(data_end))
        if used_bytes > extent.offset:
            self.medium.punch(HostOffset(extent.offset), extent.length)
        self.medium.shrink(used_bytes)

    # After a crash

    def find_leftover(self, *, repairing: bool = False) -> Leftover | None:
        """Return the journal that a crash left behind on a clean image: it cut going live or closing off.

        Args:
            repairing: the refcounts may be wrong: they do not tell that its space is unused.
        """
        extent = self.root.leftover()
        return None if extent is None else Leftover(extent, not repairing and self._is_unused(extent))

    def _is_unused(self, extent: JournalRange) -> bool:
        """Return True if the refcounts can be trusted, and nothing that a table names goes with the range."""
        size_bytes, clusters = self.medium.size(), self.geometry.clusters
        end = min(extent.end, size_bytes)
        try:
            self.public.snapshots.survey()
            given_up = [(self.public.refcounts.used_end(), clusters(size_bytes))]
            if extent.offset < end:
                self.lifecycle.check_journal_is_free(replace(extent, length=end - extent.offset))
                given_up.append((self.geometry.cluster_of(HostOffset(extent.offset)), clusters(end)))
            # F2: data there is in use, whatever its refcount.
            return not any(self.public.snapshots.data_within(*part) for part in given_up)
        except (CorruptionError, UnsupportedFeatureError):
            return False

    def finish_closing(self, leftover: Leftover) -> None:
        """Clear the root copy, which must not speak for what the image becomes, and give the space back.

        Raises:
            OSError: this can be tried again.
        """
        self.root.settle()
        if leftover.is_unused:
            self._drop_epoch_before(leftover.extent)
            self._cut_file(leftover.extent)
            # Durable now: the file without the journal. The root copy, which alone tells of it, goes next.
            self.medium.barrier("finish.cut")
        self._give_back(None)

    def _drop_epoch_before(self, extent: JournalRange) -> None:
        """Overwrite the start of the epoch before the last one, if the close was cut off before it had."""
        try:
            last = scan(self.medium.device, extent, self.geometry).epoch
        except (CorruptionError, UnsupportedFeatureError):
            # What cannot be read brings no tables back.
            return
        place = HostOffset(extent.half_offset(last - 1))
        if self.medium.pread(FRAME_ALIGNMENT, place).strip(b"\0"):
            self.medium.pwrite(bytes(FRAME_ALIGNMENT), place)
            # Durable now: no epoch before the last one, which may be the first to go with its space (F4).
            self.medium.barrier("finish.epoch")
