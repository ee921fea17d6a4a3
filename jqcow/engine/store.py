"""The transactional store: when staged metadata becomes durable, and when it goes home.

This is where barriers are placed, each once, each named; docs/crash-consistency argues them one by one.

T1. A record is appended only when all that it relies on is durable: the data of ordered pairs, all data of
    a transaction, the opening frame and root copy before the root that names them.
T2. What a flush acknowledges is in a record (or in place) under a completed barrier.
T3. Homes are written only from durable records, and by `_write_homes` alone.
T4. An epoch ends only after all its log images are home under a completed barrier.
T5. Sector 0 and the root copy are never in flight together.
T6. A sector-0 write that failed is followed by the root of the state that goes on; before the root copy
    is next written that has its own barrier.
T7. The file reaches to the end of the highest cluster in use before a checkpoint's barrier, and is never
    cut below that.
T8. A record is never longer than a half; a longer one moves the journal to a larger range first.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType

from jqcow.engine import journal as journals
from jqcow.engine import scan as scans
from jqcow.engine.journal import Journal
from jqcow.engine.mapping import Mapping
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import Layer, Metadata, MetadataMark
from jqcow.engine.refcounts import Refcounts
from jqcow.engine.snapshots import Snapshots
from jqcow.engine.space import Space, SpaceMark
from jqcow.engine.turn import Turn
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import frame as frames
from jqcow.ondisk import layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import EncodedPayload, HeaderOperation
from jqcow.ondisk.header import INCOMPATIBLE_DIRTY, HeaderArea
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.root import DEFAULT_JOURNAL_BYTES, MAX_JOURNAL_BYTES, JournalRange

NewSalt = Callable[[], bytes]

STAGED_ZERO_BYTES_MAX = scans.ZEROED_BYTES_MIN // 4
"""New metadata clusters of changes that are not committed: a record must not zero more than an epoch may."""
STAGED_FREE_BYTES_MAX = 1 << 30
"""Clusters freed by changes that are not committed keep their space on the host: no more than this."""


def random_salt() -> bytes:
    """Return a salt that no journal had before."""
    return secrets.token_bytes(roots.SALT_BYTES)


class Operation:
    """The metadata changes of one operation, as a context manager: all of them, or none."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> None:
        self._store.begin_operation()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.end_operation(succeeded=kind is None)


@dataclass
class _Commit:
    """A commit under way: what was cut, and how many changes that covers. ``durable`` after its barrier."""

    changes: int
    of_transaction: bool
    layer: Layer = field(default_factory=Layer)
    durable: bool = False


class Store:
    """The metadata of one image and its journal, clean or live. All offsets are host offsets in bytes."""

    def __init__(
        self,
        medium: Medium,
        area: HeaderArea,
        *,
        journal_bytes: int = DEFAULT_JOURNAL_BYTES,
        new_salt: NewSalt = random_salt,
    ) -> None:
        """Take an image whose header is ``area``; ``journal_bytes`` is the length of the next journal."""
        self.medium = medium
        self.metadata = Metadata(medium, area)
        self.geometry = self.metadata.geometry
        self.space = Space(medium, self.geometry)
        self.refcounts = Refcounts(self.metadata, self.space)
        self.mapping = Mapping(self.metadata, self.space)
        self.snapshots = Snapshots(self.metadata, self.mapping, self.refcounts)
        self.journal: Journal | None = None
        self.journal_bytes = journal_bytes
        self._new_salt = new_salt
        # A killed process may have left its last sector-0 write in flight.
        self._root_is_settled = False
        self._root_written = 0
        self._root_in_doubt = False
        self._root_copy_is_stale = False
        self._surveyed = False
        self.kept_bytes = 0
        """The file is never cut below this: refcounts that are known to be wrong do not tell its end."""
        self._operation_succeeded = False
        self._commit: _Commit | None = None
        self.lock = medium.lock
        self.turn = Turn()
        medium.listeners.append(self._barrier_completed)

    # The metadata as it is now, for checking

    @property
    def view_bytes(self) -> int:
        """Length of the file that `view` shows: at least to the end of the highest cluster in use."""
        return max(self.medium.size(), self.refcounts.used_end() * self.geometry.cluster_bytes)

    def view(self, length: int, offset: int) -> bytes:
        """Return bytes of the file as a checkpoint and clean close would leave them."""
        size = self.geometry.block_bytes
        start = offset - offset % size
        buffer = bytearray(self.medium.pread(layout.round_up(offset + length - start, size), start))
        self.metadata.overlay(buffer, start)
        header = self.metadata.area.data
        if start < len(header):
            buffer[: len(header) - start] = header[start : start + len(buffer)]
        return bytes(buffer[offset - start : offset - start + length])

    # One operation

    def operation(self) -> Operation:
        """Make the metadata changes inside all or nothing; the image is live from the first one on.

        Raises:
            OSError: the journal could not be set up, or what the body raises.
        """
        return Operation(self)

    def begin_operation(self) -> None:
        """For `Operation`: start to note what changes."""
        self.go_live()
        self._operation_succeeded = False
        self.space.begin()
        self.metadata.begin()

    def end_operation(self, *, succeeded: bool) -> None:
        """For `Operation`: keep what changed, or take it back. Where this is cut off, `enter` goes on."""
        self._operation_succeeded = succeeded
        self._settle_operation()

    def _settle_operation(self) -> None:
        if self._operation_succeeded:
            self.metadata.finish()
            self.space.finish()
        else:
            self.refcounts.stop_packing()
            self.metadata.roll_back()
            self.space.roll_back()
        self._operation_succeeded = False

    # Coming in

    def enter(self, *, private: bool = False, alone: bool = False) -> None:
        """Called by whoever takes the lock, before anything else: bring to an end what was cut off.

        An exception can come between any two steps, also in the cleaning up after another one. What was
        under way then is still noted as such; as nobody can be in the middle of it who does not hold the
        lock, it is finished or taken back here.

        Args:
            private: see the open transaction's own state.
            alone: the caller keeps all others from changing the image: a transaction that is still open was
                left, and is undone.
        """
        self.metadata.select_view(private=private)
        if self.metadata.in_operation or self.space.in_operation:
            self._settle_operation()
        if self._commit is not None and self._commit.durable:
            self._end_commit()
        if alone:
            self.abandon_transaction()
        if self._root_in_doubt:
            # What sector 0 holds is not known, and a move that failed could not put it right.
            self.medium.poisoned = True

    # Large changes

    def commit_if_large(self) -> None:
        """Between changes, with the lock free: keep memory and the next record within bounds.

        Raises:
            OSError: as `flush`.
        """
        if self.journal is None or self.metadata.in_transaction:
            return
        cluster_bytes = self.geometry.cluster_bytes
        if (
            self.metadata.staged_blocks > self._staged_limit(self.journal)
            or self.metadata.staged_zeros * cluster_bytes > STAGED_ZERO_BYTES_MAX
            or self.space.staged_frees * cluster_bytes > STAGED_FREE_BYTES_MAX
        ):
            self.flush()

    def _staged_limit(self, journal: Journal) -> int:
        return max(2, journal.extent.half_bytes // self.geometry.block_bytes // 4)

    # From clean to live

    def prepare_to_change(self) -> None:
        """Check, once, that the image may be changed: no metadata cluster is used twice or uncounted.

        Raises:
            CorruptionError: changing this image would destroy it.
        """
        if not self._surveyed:
            self.refcounts.metadata_clusters = self.snapshots.survey()
            self._find_frontier()
            self.refcounts.start_search(self.space.frontier)
            self._surveyed = True

    def prepare_to_repair(self) -> None:
        """As `prepare_to_change`, where refcounts may be wrong: nothing below the frontier is free (F1).

        Raises:
            CorruptionError: a metadata cluster is used twice.
        """
        if not self._surveyed:
            self.refcounts.metadata_clusters = set(self.snapshots.find_metadata())
            self._find_frontier()
            self._surveyed = True

    def _find_frontier(self) -> None:
        file_end = self.geometry.clusters(self.medium.size())
        self.space.frontier = max(self.space.frontier, file_end, self.refcounts.used_end())

    def go_live(self) -> None:
        """Set up the journal before the first metadata change. Nothing to do if the image is live.

        Raises:
            OSError: the host refused; the image is as it was.
            UnsupportedFeatureError: the header leaves no room for the root.
        """
        if self.journal is not None:
            return
        self.prepare_to_change()
        clean = self.metadata.committed_area
        roots.check_room(clean.header, len(clean.data))
        # Autoclear bits that jqcow does not keep are gone from the first header that the journal holds.
        self.metadata.committed_area = clean.with_header(replace(clean.header, autoclear_features=0))
        try:
            self._settle_root()
            before = self.medium.pread(SECTOR_BYTES, 0)
            self.refcounts.allocate_homes()
            # Under the next barrier they become zero-safe: new clusters need not go behind the journal.
            self.refcounts.recycle()
            journal = self._lay_journal(self.journal_bytes, epoch=1, live=())
            try:
                # Durable now: the opening frame and the root copy. The root that names them comes next.
                self.medium.barrier("live.prepare")
                self._write_root(roots.pack_root(clean.header, journal.extent))
                if clean.header.autoclear_features:
                    # Durable now: the cleared autoclear bits. Data may change what they vouch for.
                    self.medium.barrier("live.autoclear")
            except BaseException:
                self._give_up(journal.extent, before)
                raise
        except BaseException:
            self.metadata.committed_area = clean
            raise
        self.journal, self._root_copy_is_stale, self._root_in_doubt = journal, False, False

    def _lay_journal(self, length: int, epoch: int, live: tuple[bytes, ...], sequence: int = 0) -> Journal:
        """Write a new journal range behind the end of the file, its frames and the root copy.

        Without ``live`` frames it gets an opening frame, which starts ``epoch`` with sequence + 1.
        """
        old_size, old_frontier = self.medium.size(), self.space.frontier
        extent = self._place_range(length)
        try:
            moved = tuple(frames.reframe(frame, extent.salt) for frame in live)
            opening = frames.encode_operations([HeaderOperation(self.metadata.committed_area.data)])
            frames_bytes = moved or (frames.frame_payload(opening, extent.salt, epoch, sequence + 1),)
            journals.write_range(self.medium, extent, epoch, frames_bytes)
            self._write_root_copy(extent)
        except BaseException as error:
            self._forget_range(extent, old_size, old_frontier, error)
            raise
        journal = Journal(self.medium, extent, epoch, sequence + 1 if not live else sequence)
        journal.position = sum(len(frame) for frame in frames_bytes)
        journal.decoded_bytes = opening.decoded_length
        return journal

    def _place_range(self, length: int) -> JournalRange:
        """Reserve a range past the end of everything: a wrong refcount must not cost data."""
        unit = max(self.geometry.cluster_bytes, roots.JOURNAL_ALIGNMENT)
        end = max(
            self.medium.size(), self.medium.high_water, self.space.frontier * self.geometry.cluster_bytes
        )
        offset = layout.round_up(end, unit)
        if offset + length > layout.MAX_HOST_OFFSET:
            raise UnsupportedFeatureError("a file of more than 64 PiB")
        extent = JournalRange(offset, length, self._new_salt())
        self.space.reserve(offset, length)
        return extent

    def _forget_range(self, extent: JournalRange, size: int, frontier: int, error: BaseException) -> None:
        """A range could not be written and nothing names it: the file is cut back, as far as that works."""
        self.space.unreserve(extent.offset, extent.length)
        self.space.frontier = frontier
        try:
            self.medium.shrink(size)
        except OSError as second:
            error.add_note(f"the file could not be cut back to {size} bytes either: {second}")
            self.space.frontier = max(frontier, self.geometry.clusters(extent.end))

    def _write_root_copy(self, extent: JournalRange) -> None:
        if self._has_root_copy:
            self._root_copy_is_stale = True
            root = roots.pack_root(self.metadata.committed_area.header, extent)
            self.medium.pwrite(roots.pack_root_copy(root), roots.ROOT_COPY_OFFSET)

    def _write_root(self, root: bytes) -> None:
        """Write sector 0. It is in doubt until the caller knows which state goes on, and then not settled."""
        self._root_in_doubt = True
        self._root_is_settled, self._root_written = False, self.medium.barriers_started
        self.medium.pwrite(root, 0)

    def _give_up(self, extent: JournalRange, before: bytes) -> None:
        """A change of the root failed: write sector 0 as it was ``before`` if it may be changed (T6).

        Nothing will use the new range; it is freed once a barrier has made that certain.
        """
        if self._root_in_doubt and not self.medium.poisoned:
            try:
                self._write_root(before)
            except OSError:
                self.medium.poisoned = True
                raise
        self._root_in_doubt = False
        self.space.retire(extent.offset, extent.length)

    def _settle_root(self) -> None:
        if not self._root_is_settled:
            # Durable now: sector 0 as it reads, whoever wrote it last. The root copy is written next.
            self.medium.barrier("root.settle")

    def _barrier_completed(self, number: int) -> None:
        if self._root_written < number:
            self._root_is_settled = True

    # Commit: one barrier

    def flush(self, check: Callable[[], None] | None = None) -> None:
        """Make every completed change durable: data in place, new data, and the metadata that maps it.

        Called with the lock free, as is all that commits. Other threads may go on meanwhile; their flushes
        share the next commit.

        Raises:
            OSError: nothing is acknowledged. After a failed write the next flush tries anew; after a
                failed barrier the image is read-only. Also what ``check`` raises, which is called just before
                a commit, as much may have happened while another one was waited for.
        """
        with self.lock:
            self.enter()
            ticket = self.turn.changes
        if self._others_cover(ticket):
            return
        under_way = threading.Lock()
        with self.turn.taken, under_way:
            self.turn.under_way = under_way
            self._settle_commit()
            if self.turn.is_covered(ticket):
                return
            if check is not None:
                with self.lock:
                    check()
            self._run_commit()

    def _others_cover(self, ticket: int) -> bool:
        """Wait while others commit; return True once everything up to ``ticket`` is durable."""
        ended = None
        while True:
            with self.lock:
                if self.turn.is_covered(ticket):
                    return True
                under_way = self.turn.under_way
            if under_way is ended:
                return False
            with under_way:
                ended = under_way

    def _run_commit(self, *, of_transaction: bool = False) -> None:
        """Commit what is staged: cut, log, and publish or take back. The turn is taken, the lock is free."""
        try:
            with self.lock:
                self.enter()
                self._commit = commit = _Commit(self.turn.changes, of_transaction)
                if self.metadata.has_staged and of_transaction == self.metadata.in_transaction:
                    self._cut(commit)
            self._log(commit)
            commit.durable = True
        finally:
            with self.lock:
                self.enter()
                self._end_commit()
        with self.lock:
            self.enter()
            self.space.give_back()

    def _cut(self, commit: _Commit) -> None:
        self.space.cut()
        commit.layer = self.metadata.cut()
        # T1: a transaction's data must not be half there (P3), also where the pairs are zero-safe.
        commit.layer.ordered |= commit.of_transaction

    def _log(self, commit: _Commit) -> None:
        """Make one record of the cut durable."""
        layer = commit.layer
        if layer.is_empty:
            # Durable now: data written in place, and whatever an earlier process left unsynced.
            self.medium.barrier("flush.data", unlocked=True)
            return
        if layer.ordered:
            # Durable now: the data of ordered pairs. The record that maps it may land from here on.
            self.medium.barrier("flush.ordered", unlocked=True)
        with self.lock:
            self.enter()
            payload = self._make_room(layer)
            self._require_journal().append(payload)
        # Durable now: the record, and the data of its zero-safe pairs. The flush is acknowledged.
        self.medium.barrier("flush.record", unlocked=True)

    def _settle_commit(self) -> None:
        """Called by whoever takes the turn: bring a commit to an end that was cut off."""
        with self.lock:
            self.enter()
            self._end_commit()

    def _end_commit(self) -> None:
        """Publish a commit that is durable, take back one that is not. Where cut off it can be done again."""
        commit = self._commit
        if commit is None:
            return
        if commit.durable:
            self._publish(commit)
        else:
            self._take_back(commit)
        self._commit = None

    def _publish(self, commit: _Commit) -> None:
        if not commit.layer.is_empty:
            journal = self._require_journal()
            if journal.pending is not None:
                journal.accept(journal.pending)
            self.metadata.publish()
            self.space.publish(journal.epoch)
        if commit.of_transaction:
            self.metadata.end_transaction()
            self.space.end_transaction()
        self.turn.cover(commit.changes)

    def _take_back(self, commit: _Commit) -> None:
        try:
            if self.journal is not None and self.journal.pending is not None:
                # The record must not come back to life.
                self.journal.revoke(self.journal.pending)
        finally:
            if commit.of_transaction:
                self.abandon_transaction()
            else:
                self.metadata.uncut()
                self.space.uncut()

    # User transactions

    def begin_transaction(self) -> None:
        """Commit what is staged; from here on staged changes belong to the transaction.

        Raises:
            OSError: as `flush`; no transaction is open.
        """
        self.flush()
        with self.lock:
            self.enter()
            self.turn.changing()
            self.prepare_to_change()
            self.go_live()
            self.space.begin_transaction()
            self.metadata.begin_transaction()

    def commit_transaction(self) -> int:
        """Make the transaction durable, whole; return the sequence of its record (or of the last one).

        Raises:
            OSError: nothing of the transaction happened.
        """
        with self.turn.taken:
            self._settle_commit()
            self._run_commit(of_transaction=True)
            return self._require_journal().sequence

    def abandon_transaction(self) -> None:
        """Undo the whole transaction, also one whose record failed. Where cut off it can be done again."""
        if self.metadata.in_transaction:
            self.refcounts.stop_packing()
        self.metadata.abandon_transaction()
        self.space.abandon_transaction()

    def mark(self) -> tuple[MetadataMark, SpaceMark]:
        """Return the open transaction's state, for `return_to`. Its fresh clusters are closed."""
        return self.metadata.mark(), self.space.mark()

    def return_to(self, mark: tuple[MetadataMark, SpaceMark]) -> None:
        """Undo what the transaction did since ``mark``. Where cut off it can be done again."""
        self.refcounts.stop_packing()
        self.metadata.return_to(mark[0])
        self.space.return_to(mark[1])

    def _make_room(self, layer: Layer) -> EncodedPayload:
        """Encode the layer for the place where its frame goes; end the epoch or move where it must.

        Raises:
            OSError: the checkpoint or the move failed; the log is live as before.
        """
        journal = self._require_journal()
        if not journal.epoch_is_empty:
            payload = frames.encode_operations(layer.operations())
            if journal.has_room(payload):
                return payload
            self._end_epoch()
        # J4: the first frame of an epoch starts with the header.
        first = frames.encode_operations(self._with_header(layer))
        if journal.has_room(first):
            return first
        self._move(self._length_for(first))
        return frames.encode_operations(layer.operations())

    def _with_header(self, layer: Layer) -> list[frames.Operation]:
        operations = layer.operations()
        if layer.area is not None:
            return operations
        return [HeaderOperation(self.metadata.committed_area.data), *operations]

    def _length_for(self, payload: EncodedPayload) -> int:
        """Return a journal length whose half holds an opening frame and this payload, with room to spare."""
        opening = roots.MAX_LIVE_HEADER_BYTES + 2 * frames.FRAME_ALIGNMENT
        needed = max(2 * (opening + payload.decoded_length), payload.zeroed_length)
        half = layout.round_up(needed, frames.FRAME_ALIGNMENT)
        if 2 * half > MAX_JOURNAL_BYTES:
            raise UnsupportedFeatureError("a journal of more than 1 GiB", "the transaction is too large")
        return max(2 * half, self.journal_bytes)

    def _require_journal(self) -> Journal:
        if self.journal is None:
            raise RuntimeError("the image has no live journal")
        return self.journal

    # Checkpoint: from the log to the homes

    def checkpoint(self) -> None:
        """Write everything that durable records hold to its home. The journal is then free to be reused.

        Raises:
            OSError: the log stays live, and the checkpoint can be tried again (unless a barrier failed).
        """
        with self.turn.taken:
            self._settle_commit()
            self._run_commit()
            with self.lock:
                self.enter()
                if self.journal is not None and not self.journal.epoch_is_empty:
                    self._end_epoch()

    def _end_epoch(self, *, closing: bool = False) -> None:
        self._write_homes()
        if not closing and not self.metadata.in_transaction:
            # After the homes: a cluster that was freed may be among them. What a transaction took looks free.
            self.refcounts.recycle()
        # Durable now: every log image of the epoch is home. The next epoch's first frame says so.
        self.medium.barrier("checkpoint.homes")
        self.metadata.images_are_home()
        self._require_journal().start_epoch()

    def _write_homes(self) -> None:
        """Write the log images of durable records to their homes (T3), and grow the file to hold all (T7)."""
        for offset, blocks in self.metadata.image_runs():
            self.medium.pwrite(blocks, offset)
        self.medium.grow(self.refcounts.used_end() * self.geometry.cluster_bytes)

    # Move: one procedure for growing, moving and recovering

    def _move(self, length: int) -> None:
        """Go on in a new range of ``length`` bytes. The running epoch must be home."""
        journal = self._require_journal()
        self._relocate(length, journal.epoch, (), journal.sequence)

    def _relocate(self, length: int, epoch: int, live: tuple[bytes, ...], sequence: int) -> None:
        """Lay a new range with the live frames, or an opening frame, and make the root name it."""
        old = self._require_journal().extent
        self._settle_root()
        journal = self._lay_journal(length, epoch, live, sequence)
        header = self.metadata.committed_area.header
        try:
            # Durable now: the new range and the root copy. The root that names them comes next.
            self.medium.barrier("move.range")
            self._write_root(roots.pack_root(header, journal.extent))
            # Durable now: the root names the new range. Homes are written from here on, and the old
            # range's frames need not be durable: a failed barrier may have lost them.
            self.medium.barrier("move.root")
        except BaseException:
            self._give_up(journal.extent, roots.pack_root(header, old))
            raise
        self.journal, self._root_copy_is_stale, self._root_in_doubt = journal, False, False
        self.space.retire(old.offset, old.length)

    # Recovery and clean close

    @classmethod
    def open_live(
        cls, medium: Medium, sector: bytes, *, journal_bytes: int = 0, new_salt: NewSalt = random_salt
    ) -> tuple[Store, scans.Scan]:
        """Read an image with a live journal: scan, and replay into memory. Not one byte is written.

        Args:
            medium: the device.
            sector: sector 0, or the root that stands for it.
            journal_bytes: length of the next journal; 0 keeps the length that the image has.
            new_salt: makes the salt of each new journal.

        Raises:
            FormatError, CorruptionError: the root, a frame or the header in the journal is damaged.
        """
        cluster_bits, extent = roots.unpack_root(sector)
        geometry = layout.Geometry(cluster_bits)
        scan = scans.scan(medium, extent, geometry)
        replayed = scans.replay(scan.operations, geometry)
        length = max(journal_bytes, extent.length)
        store = cls(medium, replayed.area, journal_bytes=length, new_salt=new_salt)
        store.metadata.take_replayed(replayed)
        store._check_replayed(extent)
        store.space.reserve(extent.offset, extent.length)
        journal = Journal(medium, extent, scan.epoch, scan.sequence)
        journal.position = sum(len(frame.raw) for frame in scan.frames)
        journal.decoded_bytes = scan.decoded_bytes
        store.journal = journal
        return store, scan

    def _check_replayed(self, extent: JournalRange) -> None:
        """Raise unless replay leaves the journal's clusters alone."""
        roots.check_room(self.metadata.header, len(self.metadata.area.data))
        for offset in self.metadata.images:
            if extent.offset <= offset < extent.end:
                raise CorruptionError("journal", extent.offset, f"it would write into itself at {offset:#x}")
        start, end = extent.offset // self.geometry.cluster_bytes, self.geometry.clusters(extent.end)
        if not self.refcounts.is_free(start, end):
            raise CorruptionError("journal", extent.offset, "its clusters have a refcount")

    def recover(self, sector: bytes, scan: scans.Scan, *, repairing: bool = False) -> None:
        """Bring a crashed image home: what `open_live` replayed into memory becomes durable.

        What was read is not thereby durable, and a durable frame must not be put at risk by rewriting it:
        nothing is written into the range that was read, and no home before the frames are safe elsewhere.

        Args:
            sector: the root as it was read.
            scan: the journal as it was read.
            repairing: the refcounts may be wrong, and are made right next.

        Raises:
            OSError: recovery can be tried again, from the start.
        """
        if repairing or self.metadata.header.incompatible_features & INCOMPATIBLE_DIRTY:
            self.prepare_to_repair()
        else:
            self.prepare_to_change()
        # Durable now: what a killed writer left unsynced, a root copy in flight among it.
        self.medium.barrier("recover.settle")
        if self._root_copy_serves(scan.extent):
            # A failed barrier may have lost this write; what was read may be in the page cache alone.
            self.medium.pwrite(sector[:SECTOR_BYTES], 0)
            # Durable now: the root as it was read. The root copy may be rewritten from here on.
            self.medium.barrier("recover.root")
        live = tuple(frame.raw for frame in scan.frames)
        self._relocate(max(scan.extent.length, self.journal_bytes), scan.epoch, live, scan.sequence)
        self._end_epoch()
        self.refcounts.allocate_homes()

    def _root_copy_serves(self, extent: JournalRange) -> bool:
        """Return True if sector 0 may be rewritten: its copy names the same journal, or there is never one.

        A copy that is torn or names another range was begun while sector 0 was durable (T5), so nothing
        has to be rewritten; and nothing could stand in for sector 0 while that were in flight.
        """
        if not self._has_root_copy:
            return True
        root = scans.read_root_copy(self.medium)
        return root is not None and roots.unpack_root(root)[1] == extent

    @property
    def _has_root_copy(self) -> bool:
        """True where offset 4096 is in the header cluster."""
        return self.geometry.cluster_bytes > roots.ROOT_COPY_OFFSET

    def clean(self) -> None:
        """Make the image standard qcow2: everything home, sector 0 as any program knows it, journal gone.

        Raises:
            OSError: the image stays live and recoverable, unless only the last step failed: then it is
                clean, and the journal's clusters are not given back.
        """
        with self.turn.taken:
            self._settle_commit()
            with self.lock:
                self.enter()
                has_staged = self.metadata.has_staged
            if has_staged:
                self._run_commit()
            with self.lock:
                self.enter()
                if self.journal is None:
                    self._close_clean()
                else:
                    self._bring_home()
                self.turn.cover(self.turn.changes)

    def _close_clean(self) -> None:
        if self._root_copy_is_stale or (
            self._has_root_copy and scans.read_root_copy(self.medium) is not None
        ):
            self._settle_root()
            self._clear_root_copy()
        # Durable now: data written in place; no root copy that a crash or a failed start left.
        self.medium.barrier("close.data")

    def _bring_home(self) -> None:
        if self._root_copy_is_stale:
            # A move failed after it wrote the copy; sector 0 is about to rely on it.
            self._settle_root()
            self._write_root_copy(self._require_journal().extent)
        self._write_header_tail()
        self._end_epoch(closing=True)
        self._clear_root()
        self._release_journal()

    def _write_header_tail(self) -> None:
        """Write the header's bytes from 512 on where the file differs; the journal still has them all."""
        tail = self.metadata.committed_area.data[SECTOR_BYTES:]
        if tail and self.medium.pread(len(tail), SECTOR_BYTES) != tail:
            self.medium.pwrite(tail, SECTOR_BYTES)

    def _clear_root(self) -> None:
        area = self.metadata.committed_area
        live_root = roots.pack_root(area.header, self._require_journal().extent)
        try:
            self.medium.pwrite(area.data[:SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0"), 0)
            # Durable now: sector 0 in standard layout. The journal and the root copy may go.
            self.medium.barrier("close.clear")
        except BaseException:
            # The journal is intact, so the live root is right whatever the disk holds.
            self.medium.device.pwrite(live_root, 0)
            raise

    def _release_journal(self) -> None:
        extent = self._require_journal().extent
        self.journal = None
        self.space.give_back()
        self._clear_root_copy()
        used_bytes = max(self.kept_bytes, self.refcounts.used_end() * self.geometry.cluster_bytes)
        if used_bytes > extent.offset:
            self.medium.punch(extent.offset, extent.length)
        self.medium.shrink(used_bytes)
        # Durable now: the file without the journal. Closing is complete.
        self.medium.barrier("close.release")

    def _clear_root_copy(self) -> None:
        if self._has_root_copy:
            self.medium.pwrite(bytes(roots.ROOT_COPY_BYTES), roots.ROOT_COPY_OFFSET)
