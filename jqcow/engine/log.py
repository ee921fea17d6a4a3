"""The log of a live image: from records to homes, and from one journal range to the next.

A checkpoint is due when the next record does not fit, on request, in recovery and on closing. It brings all
blocks home; the header stays in the journal, at the start of each epoch (J4), until the image is closed.

Whoever calls in here has the turn (commit.py), or nobody else has the image yet. The lock is free while the
device works on anything but metadata.

T3. Homes of blocks are written only from durable records, and by `write_homes` alone (save A1).
T4. An epoch ends only after all its log images are home under a completed barrier.
T7. The file reaches to the end of the highest cluster in use before a checkpoint's barrier, and is never
    cut below that.
T8. A record is never longer than a half; a longer one moves the journal to a larger range first.
I3. The first frame of an epoch, and the opening frame of a new range, carries every intent that is not
    declared done: the frames that held it count no more.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from jqcow.device.base import no_space
from jqcow.engine.clusters import Run
from jqcow.engine.journal import HEADER_FRAME_BYTES, Contents, Journal, dead_parts, write_range
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import Blocks, ChangeSet
from jqcow.engine.pending import Pending, Piece
from jqcow.engine.root import Root
from jqcow.engine.scan import ZEROED_BYTES_MIN
from jqcow.engine.space import Space
from jqcow.engine.tables import Tables
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk import frame as frames
from jqcow.ondisk import layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import EncodedPayload, HeaderOperation, IntentOperation, Operation
from jqcow.ondisk.layout import ClusterIndex, HostOffset
from jqcow.ondisk.root import MAX_JOURNAL_BYTES, MIN_JOURNAL_BYTES, JournalRange

NewSalt = Callable[[], bytes]

SPACE_PER_JOURNAL = 4
"""The host has so many times a journal's length free, or the journal is shorter: others need space, too."""


def affordable_length(length: int, free_bytes: int | None, shortest: int = MIN_JOURNAL_BYTES) -> int:
    """Return ``length`` of a journal, or what a host with so many bytes free has room for; all in bytes."""
    if free_bytes is None or free_bytes >= SPACE_PER_JOURNAL * length:
        return length
    return max(shortest, _rounded_down(free_bytes // SPACE_PER_JOURNAL))


def _rounded_down(length: int) -> int:
    """Return the next lower length that a journal can have."""
    unit = 2 * frames.FRAME_ALIGNMENT
    return length // unit * unit


class Log:
    """The journal of one image, the homes that it leads to, and the range that it lies in.

    Attributes:
        journal: None while the image is clean.
        journal_bytes: length of the next range.
        distance_bytes: how far behind the end of everything the next range is laid.
        shortest_bytes: the least that the first range may have, where the host is short of space.
        new_salt: makes the salt of each new range.
        in_transaction: a transaction is open: what it took looks free in the public tables, which must not be
            searched for free clusters then.
        is_sparse: the range does not have all its space on the host yet.
        pending: what the guest wrote and the tables do not tell yet.
    """

    def __init__(self, public: Tables, root: Root, journal_bytes: int, new_salt: NewSalt) -> None:
        self.public = public
        self.medium: Medium = public.blocks.medium
        self.blocks: Blocks = public.blocks
        self.space: Space = public.space
        self.geometry = public.geometry
        self.root = root
        self.journal: Journal | None = None
        self.journal_bytes = journal_bytes
        self.distance_bytes = 0
        self.shortest_bytes = MIN_JOURNAL_BYTES
        self.new_salt = new_salt
        self.in_transaction = False
        self.is_sparse = False
        self.pending = Pending()

    def require_journal(self) -> Journal:
        """Return the journal of a live image."""
        if self.journal is None:
            raise RuntimeError("the image has no live journal")
        return self.journal

    # Room for a record

    def make_room(self, changes: ChangeSet | None, pieces: Sequence[Piece] = ()) -> EncodedPayload:
        """Encode a record for the place where its frame goes; that may take a checkpoint, and a move.

        Args:
            changes: of metadata; None: there are none.
            pieces: what the guest wrote, which the record has as intents.

        Raises:
            OSError: the checkpoint or the move failed; the log is live as before.
            UnsupportedFeatureError: the record is too large for any journal.
        """
        payload = self._encode_if_it_fits(changes, pieces)
        if payload is None and not self.require_journal().epoch_is_empty:
            self.checkpoint()
            # Now the record opens an epoch.
            payload = self._encode_if_it_fits(changes, pieces)
        if payload is None:
            self._grow(*self._lengths_for(self._operations(changes, pieces)))
            payload = self._encode(changes, pieces)
        return payload

    def _encode_if_it_fits(self, changes: ChangeSet | None, pieces: Sequence[Piece]) -> EncodedPayload | None:
        """Encode a record, unless it has no room where its frame goes."""
        journal = self.require_journal()
        if changes is not None and changes.least_bytes > journal.extent.half_bytes:
            # To encode all tables in vain would take seconds.
            return None
        payload = self._encode(changes, pieces)
        return payload if journal.has_room(payload) else None

    def _encode(self, changes: ChangeSet | None, pieces: Sequence[Piece]) -> EncodedPayload:
        return frames.encode_operations(self._operations(changes, pieces))

    def _operations(self, changes: ChangeSet | None, pieces: Sequence[Piece]) -> list[Operation]:
        """Return what a record has; first in an epoch come the header, and what is not done (J4, I3)."""
        journal = self.require_journal()
        operations: list[Operation] = [] if changes is None else changes.operations()
        if journal.epoch_is_empty:
            if changes is None or changes.area is None:
                operations.insert(0, HeaderOperation(self.blocks.area.data))
            operations += self.pending.carried(0 if changes is None else changes.done)
        sequence = journal.sequence + 1
        return [
            *operations,
            *(IntentOperation(sequence, piece.offset, bytes(piece.data)) for piece in pieces),
        ]

    def _lengths_for(self, operations: Sequence[Operation]) -> tuple[int, int]:
        """Return journal lengths for an opening frame and a record: with room to spare, the shortest."""
        carried = sum(len(intent.data) + frames.INTENT_BYTES_MAX for intent in self.pending.carried(0))
        opening = roots.MAX_LIVE_HEADER_BYTES + 2 * frames.FRAME_ALIGNMENT + carried
        most = MAX_JOURNAL_BYTES // 2
        length = frames.decoded_length(operations)
        zeroed = frames.zeroed_length(operations) - ZEROED_BYTES_MIN
        # A frame is never longer than one whose payload is not compressed.
        needed = opening + layout.round_up(frames.FRAME_HEADER_BYTES + length, frames.FRAME_ALIGNMENT)
        if max(needed, zeroed) > most:
            detail = f"the change is too large: {length} bytes of metadata in one record"
            raise UnsupportedFeatureError("a journal of more than 1 GiB", detail)
        shortest = max(needed, zeroed, MIN_JOURNAL_BYTES // 2)
        half_bytes = max(shortest, min(most, max(2 * needed, self.journal_bytes // 2)))
        longest, shortest = (layout.round_up(each, frames.FRAME_ALIGNMENT) for each in (half_bytes, shortest))
        return 2 * longest, 2 * shortest

    # Checkpoint: from the log to the homes

    def checkpoint(self, *, recycle: bool = True) -> None:
        """Write every block that durable records hold to its home; the next epoch goes to the other half.

        Raises:
            OSError: the log stays live, and this can be tried again (unless a barrier failed).
        """
        self.write_homes()
        if recycle:
            self.recycle()
        # Durable now: every log image of the epoch is home. The next epoch's first frame says so.
        self.medium.barrier("checkpoint.homes")
        with self.medium.lock, self.medium.section():
            self.blocks.images_are_home()
            self.require_journal().start_epoch()

    def write_homes(self) -> None:
        """Write the log images of durable records to their homes (T3), and grow the file to hold all (T7)."""
        # Only whoever has the turn changes the log images.
        for offset, data in self.blocks.image_runs():
            self.medium.pwrite(data, offset)
        self._grow_file()

    def _grow_file(self) -> None:
        with self.medium.lock:
            self.medium.grow(self.geometry.offset_of(self.space.frontier))

    # Space that comes back

    def recycle(self, *, refill: bool = True) -> None:
        """Punch what durable records freed and, to ``refill`` the zero-safe clusters, some others.

        All of them are zero-safe after the next barrier.

        Raises:
            OSError: the host failed; what it did not punch is free, and punched anew before it is used.
        """
        with self.medium.lock, self.medium.section():
            refill = refill and not self.in_transaction
            if refill:
                self.public.refcounts.search_if_short()
            runs = self.space.start_recycling(refill=refill)
        failure: OSError | None = None
        for run in runs:
            punched = False
            try:
                punched = failure is None and self._punch(run)
            except OSError as error:
                failure = error
            with self.medium.lock, self.medium.section():
                self.space.end_recycling(run, punched=punched)
        if failure is not None:
            raise failure
        if self.space.vacated is not None:
            self.space.vacated.give_back()

    def _punch(self, run: Run) -> bool:
        offset, length = self.geometry.offset_of(run.start), run.count * self.geometry.cluster_bytes
        self.space.host_punches = self.medium.punch(offset, length)
        return self.space.host_punches

    # A new range

    def lay(
        self, length: int, contents: Contents, shortest: int = MIN_JOURNAL_BYTES, *, is_home: bool = True
    ) -> Journal:
        """Write a new range behind the end of everything, with ``contents``, and the root copy that names it.

        Nothing names the range yet. A wrong refcount must not cost data, so no free cluster is used for it,
        unless a device of fixed size has no room elsewhere.

        Args:
            length: in bytes; where the host is short of space the range is shorter.
            contents: its frames.
            shortest: the least that does, in bytes.
            is_home: False if the frames have log images, which may target what is free now (S2).

        Raises:
            OSError: the range is given up, and the root copy may be stale.
        """
        length = affordable_length(length, self.space.free_bytes(), shortest)
        while True:
            try:
                return self._lay(length, contents, may_reuse=is_home and length <= shortest)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                if length <= shortest:
                    raise self._no_space(shortest, error) from error
            length = max(shortest, _rounded_down(length // 2))

    def _no_space(self, needed_bytes: int, error: OSError) -> OSError:
        told = no_space("the journal", needed_bytes, self.space.free_bytes())
        if error.filename is not None:
            told.filename = error.filename
        return told

    def _lay(
        self, length: int, contents: Contents, *, sparse: bool = False, may_reuse: bool = False
    ) -> Journal:
        with self.medium.lock, self.medium.section():
            extent = self._place(length, may_reuse=may_reuse)
        try:
            if sparse:
                self._grow_file()
            write_range(self.medium, extent, contents, sparse=sparse)
            self.root.write_copy(self.blocks.area.header, extent)
        except BaseException as error:
            self._give_up(extent, error)
            raise
        return Journal(self.medium, extent, contents)

    def _place(self, length: int, *, may_reuse: bool) -> JournalRange:
        """Reserve a place: behind the end of everything or, if need be, in free clusters in a row."""
        unit = max(self.geometry.cluster_bytes, roots.JOURNAL_ALIGNMENT)
        end = int(self.geometry.offset_of(self.space.frontier))
        if not self.medium.has_fixed_size:
            end = max(self.medium.size(), end)
        distance_bytes = 0 if self.medium.has_fixed_size else self.distance_bytes
        offset = HostOffset(layout.round_up(end + distance_bytes, unit))
        try:
            self.space.require_room(self.geometry.clusters(offset + length))
        except OSError:
            found = self._free_row(self.geometry.clusters(length), unit) if may_reuse else None
            if found is None:
                raise
            offset = self.geometry.offset_of(found)
        if offset + length > layout.MAX_HOST_OFFSET:
            raise UnsupportedFeatureError("a file of more than 64 PiB")
        self.space.reserve(
            offset, length, ClusterIndex(self.geometry.clusters(end)) if distance_bytes else None
        )
        return JournalRange(offset, length, self.new_salt())

    def _free_row(self, count: int, unit: int) -> ClusterIndex | None:
        """Return where so many clusters in a row are free, below the end of everything."""
        align_clusters = unit // self.geometry.cluster_bytes
        while True:
            found = self.space.free_row(count, align_clusters)
            if found is not None or self.in_transaction or not self.public.refcounts.search_on():
                return found

    def _give_up(self, extent: JournalRange, error: BaseException) -> None:
        """A range could not be written, and nothing names it: its space goes back, as far as that works."""
        try:
            with self.medium.lock:
                is_last = self.geometry.offset_of(self.space.frontier) <= layout.round_up(
                    extent.end, self.geometry.cluster_bytes
                )
                if is_last:
                    self.medium.shrink(extent.offset)
        except OSError as second:
            error.add_note(f"the file could not be cut back to {extent.offset} bytes either: {second}")
        self.retire(extent)

    def retire(self, extent: JournalRange) -> None:
        """Give a range up that no root names, or will name once a barrier has completed."""
        self.medium.undo(lambda: self.space.unreserve(HostOffset(extent.offset), extent.length))

    # Move: one procedure for growing, moving and recovering

    def _grow(self, length: int, shortest: int) -> None:
        """Go on in a new range of ``length`` bytes, or of fewer. The running epoch is home."""
        journal = self.require_journal()
        carried = self.pending.carried(0)
        contents = Contents.opening(self.blocks.area, journal.epoch, journal.sequence, carried)
        self.root.settle()
        self._move_to(self.lay(length, contents, shortest))

    def rescue(self, length: int, contents: Contents) -> None:
        """Copy the live frames of a range that was found to a new one, and make the root name that.

        On a full disk the new range takes the space of what is dead in the old one (J7), and no more of it
        than the frames are long. It gets the rest of its space when the old range has gone (`settle_in`). If
        recoveries before have left not even that much, the old range goes on: what was read is durable (M7).

        Raises:
            OSError: recovery can be tried again.
        """
        self.root.settle()
        shortest = contents.smallest_length()
        try:
            journal = self.lay(max(length, shortest), contents, shortest, is_home=False)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            found = self._lay_in_dead_parts(shortest, contents)
            self.is_sparse = True
            if found is None:
                self.root.copy_is_stale = True
                return
            journal = found
        self._move_to(journal)

    def _lay_in_dead_parts(self, length: int, contents: Contents) -> Journal | None:
        """Give back what no crash state replays of the range that was found, and lay a sparse range there.

        Returns None if there is too little space, and the device forgets what is not durable.
        """
        if not self.medium.has_fixed_size:
            for offset, part_bytes in dead_parts(self.require_journal().extent, contents):
                self.medium.punch(offset, part_bytes)
        try:
            return self._lay(length, contents, sparse=True)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            if self.medium.can_forget:
                return None
            raise self._no_space(contents.used_bytes + HEADER_FRAME_BYTES, error) from error

    def settle_in(self) -> None:
        """Give the old range's space back, and the new one what it still needs, after a rescue in need.

        Raises:
            OSError: there is none; appends will find out.
        """
        if self.is_sparse:
            self.is_sparse = False
            self.recycle(refill=False)
            extent = self.require_journal().extent
            self.medium.allocate(HostOffset(extent.offset), extent.length)

    def _move_to(self, journal: Journal) -> None:
        """Make the root name a new range.

        Raises:
            OSError: the old range goes on.
        """
        old = self.require_journal().extent
        header = self.blocks.area.header
        try:
            # Durable now: the new range and the root copy. The root that names them comes next.
            self.medium.barrier("move.range")
            self.root.write(roots.pack_root(header, journal.extent))
            # Durable now: the root names the new range. Homes are written from here on, and the old
            # range's frames need not be durable: a failed barrier may have lost them.
            self.medium.barrier("move.root")
        except BaseException:
            self.root.put_back(roots.pack_root(header, old))
            self.retire(journal.extent)
            raise
        with self.medium.lock, self.medium.section():
            self.go_on_in(journal)
        self.retire(old)

    def go_on_in(self, journal: Journal) -> None:
        """The root names the range of ``journal``, which is the image's from here on; the lock is held."""
        self.journal = journal
        self.root.decide()
