"""The transactional store: when staged metadata becomes durable, and when it goes home.

This is where barriers are placed, each once, each named; docs/crash-consistency argues them one by one.

T1. A record is appended only when all that it relies on is durable: the data of ordered pairs, the
    opening frame and root copy before the root that names them.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from jqcow.engine import journal as journals
from jqcow.engine.journal import Append, Journal
from jqcow.engine.mapping import Mapping, survey
from jqcow.engine.medium import BarrierListener, Medium
from jqcow.engine.metadata import Layer, Metadata
from jqcow.engine.refcounts import Refcounts
from jqcow.engine.space import Space
from jqcow.engine.turn import Turn
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import frame as frames
from jqcow.ondisk import layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.frame import EncodedPayload, HeaderOperation
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.ondisk.root import DEFAULT_JOURNAL_BYTES, MAX_JOURNAL_BYTES, JournalRange

NewSalt = Callable[[], bytes]


def random_salt() -> bytes:
    """Return a salt that no journal had before."""
    return secrets.token_bytes(roots.SALT_BYTES)


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
        self.journal: Journal | None = None
        self.journal_bytes = journal_bytes
        self._new_salt = new_salt
        # A killed process may have left its last sector-0 write in flight.
        self._root_unsettled = True
        self._root_under_barrier = False
        self._root_copy_is_stale = False
        self._surveyed = False
        self.turn = Turn(medium.lock)
        medium.listeners.append(BarrierListener(self._root_settling, self._root_settled))

    @property
    def is_live(self) -> bool:
        """True while the image has a live journal: sector 0 is the root."""
        return self.journal is not None

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

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Make the metadata changes inside all or nothing; the image is live from the first one on.

        Raises:
            OSError: the journal could not be set up, or what the body raises.
        """
        self.go_live()
        self.space.begin()
        try:
            with self.metadata.operation():
                yield
        except BaseException:
            self.space.roll_back()
            raise
        self.space.finish()

    def commit_if_large(self) -> None:
        """Between operations, outside transactions: keep memory and the next record within bounds.

        Raises:
            OSError: as `flush`.
        """
        if self.journal is None or self.metadata.in_transaction:
            return
        if self.metadata.staged_blocks > self._staged_limit(self.journal):
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
            self.refcounts.metadata_clusters = survey(self.mapping, self.refcounts)
            file_end = self.geometry.clusters(self.medium.size())
            self.space.frontier = max(self.space.frontier, file_end, self.refcounts.used_end())
            self.refcounts.start_search(self.space.frontier)
            self._surveyed = True

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
            journal = self._lay_journal(self.journal_bytes, epoch=1, live=())
            with self._given_up_on_error(journal.extent):
                # Durable now: the opening frame and the root copy. The root that names them comes next.
                self.medium.barrier("live.prepare")
                with self._kept_on_error(before):
                    self.medium.pwrite(roots.pack_root(clean.header, journal.extent), 0)
                    if clean.header.autoclear_features:
                        # Durable now: the cleared autoclear bits. Data may change what they vouch for.
                        self.medium.barrier("live.autoclear")
        except BaseException:
            self.metadata.committed_area = clean
            raise
        self.journal, self._root_copy_is_stale = journal, False

    def _lay_journal(self, length: int, epoch: int, live: tuple[bytes, ...], sequence: int = 0) -> Journal:
        """Write a new journal range behind the end of the file, its frames and the root copy.

        Without ``live`` frames it gets an opening frame, which starts ``epoch`` with sequence + 1.
        """
        old_size, old_frontier = self.medium.size(), self.space.frontier
        extent = self._place_range(length)
        try:
            moved = tuple(frames.reframe(frame, extent.salt) for frame in live)
            frames_bytes = moved or (self._opening_frame(extent, epoch, sequence + 1),)
            journals.write_range(self.medium, extent, epoch, frames_bytes)
            self._write_root_copy(extent)
        except BaseException as error:
            self._forget_range(extent, old_size, old_frontier, error)
            raise
        journal = Journal(self.medium, extent, epoch, sequence + 1 if not live else sequence)
        journal.position = sum(len(frame) for frame in frames_bytes)
        return journal

    def _place_range(self, length: int) -> JournalRange:
        """Reserve a range past the end of everything: a wrong refcount must not cost data."""
        unit = max(self.geometry.cluster_bytes, roots.JOURNAL_ALIGNMENT)
        end = max(
            self.medium.size(), self.medium.high_water, self.space.frontier * self.geometry.cluster_bytes
        )
        offset = layout.round_up(end, unit)
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

    def _opening_frame(self, extent: JournalRange, epoch: int, sequence: int) -> bytes:
        header = HeaderOperation(self.metadata.committed_area.data)
        return frames.frame_payload(frames.encode_operations([header]), extent.salt, epoch, sequence)

    def _write_root_copy(self, extent: JournalRange) -> None:
        if self.geometry.cluster_bytes > roots.ROOT_COPY_OFFSET:
            self._root_copy_is_stale = True
            root = roots.pack_root(self.metadata.committed_area.header, extent)
            self.medium.pwrite(roots.pack_root_copy(root), roots.ROOT_COPY_OFFSET)

    @contextmanager
    def _given_up_on_error(self, extent: JournalRange) -> Iterator[None]:
        """Where the body fails, nothing will use the new range; free it once a barrier makes that certain."""
        try:
            yield
        except BaseException:
            self.space.retire(extent.offset, extent.length)
            raise

    @contextmanager
    def _kept_on_error(self, before: bytes) -> Iterator[None]:
        """Where the body fails to change the root, write sector 0 as it was before (T6)."""
        try:
            yield
        except BaseException:
            self._root_unsettled, self._root_under_barrier = True, False
            if not self.medium.poisoned:
                self._write_back(before)
            raise

    def _write_back(self, sector: bytes) -> None:
        try:
            self.medium.pwrite(sector, 0)
        except BaseException:
            self.medium.poison()
            raise

    def _settle_root(self) -> None:
        if self._root_unsettled:
            # Durable now: sector 0 as it reads, whoever wrote it last. The root copy is written next.
            self.medium.barrier("root.settle")

    def _root_settling(self) -> None:
        self._root_under_barrier = self._root_unsettled

    def _root_settled(self) -> None:
        if self._root_under_barrier:
            self._root_unsettled = self._root_under_barrier = False

    # Commit: one barrier

    def flush(self) -> None:
        """Make every completed change durable: data in place, new data, and the metadata that maps it.

        Other threads may go on meanwhile; their flushes share the next commit.

        Raises:
            OSError: nothing is acknowledged. After a failed write the next flush tries anew; after a
                failed barrier the image is read-only.
        """
        ticket = self.turn.changes
        if self.turn.wait_for_commit(ticket):
            return
        with self.turn.take():
            covered = self.turn.changes
            self._commit()
            self.turn.covered(covered)

    def _commit(self) -> None:
        if self.journal is None or self.metadata.in_transaction or not self.metadata.has_staged:
            # Durable now: data written in place, and whatever an earlier process left unsynced.
            self.medium.barrier("flush.data", unlocked=True)
            return
        layer = self._cut()
        try:
            self._log(layer)
        except BaseException:
            self._uncut()
            raise
        self.metadata.publish()
        self.space.publish(self.journal.epoch)
        self.space.give_back()

    def _log(self, layer: Layer) -> None:
        """Make one record of the layer durable. Where that fails, the record cannot come back to life."""
        append: Append | None = None
        try:
            if layer.ordered:
                # Durable now: the data of ordered pairs. The record that maps it may land from here on.
                self.medium.barrier("flush.ordered", unlocked=True)
            payload = self._make_room(layer)
            append = self._require_journal().append(payload)
            # Durable now: the record, and the data of its zero-safe pairs. The flush is acknowledged.
            self.medium.barrier("flush.record", unlocked=True)
        except BaseException:
            if append is not None:
                self._require_journal().revoke(append)
            raise
        self._require_journal().accept(append)

    # User transactions

    def begin_transaction(self) -> None:
        """Commit what is staged; from here on staged changes belong to the transaction.

        Raises:
            OSError: as `flush`; no transaction is open.
        """
        while self.metadata.has_staged:
            self.flush()
        self.go_live()
        self.metadata.begin_transaction()
        self.space.begin_transaction()

    def commit_transaction(self) -> int:
        """Make the transaction durable, whole; return the sequence of its record (or of the last one).

        Raises:
            OSError: nothing of the transaction happened.
        """
        with self.turn.take():
            try:
                layer = self._cut()
                # P3: the data must not be half there, also where the pairs are zero-safe.
                layer.ordered = True
                self._log_transaction(layer)
            except BaseException:
                self.abandon_transaction()
                raise
            self.metadata.end_transaction()
            self.space.end_transaction()
            self.space.publish(self._require_journal().epoch)
            self.turn.covered(self.turn.changes)
            self.space.give_back()
            return self._require_journal().sequence

    def _log_transaction(self, layer: Layer) -> None:
        if layer.is_empty:
            # Durable now: data written in place before the transaction. It changed nothing itself.
            self.medium.barrier("transaction.empty", unlocked=True)
        else:
            self._log(layer)
        self.metadata.publish()

    def abandon_transaction(self) -> None:
        """Undo the whole transaction, also one whose record failed."""
        self.metadata.abandon_transaction()
        self.space.abandon_transaction()

    def _cut(self) -> Layer:
        self.space.cut()
        return self.metadata.cut()

    def _uncut(self) -> None:
        self.metadata.uncut()
        self.space.uncut()

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
        half = layout.round_up(2 * (opening + payload.decoded_length), frames.FRAME_ALIGNMENT)
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
        self.flush()
        with self.turn.take():
            if self.journal is not None and not self.journal.epoch_is_empty:
                self._end_epoch()

    def _end_epoch(self) -> None:
        self._write_homes()
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
        with self._given_up_on_error(journal.extent):
            # Durable now: the new range and the root copy. The root that names them comes next.
            self.medium.barrier("move.range")
            with self._kept_on_error(roots.pack_root(header, old)):
                self.medium.pwrite(roots.pack_root(header, journal.extent), 0)
                # Durable now: the root names the new range. From here on the old one may be lost.
                self.medium.barrier("move.root")
        self.journal, self._root_copy_is_stale = journal, False
        self.space.retire(old.offset, old.length)

    # Recovery and clean close

    @classmethod
    def open_live(
        cls, medium: Medium, sector: bytes, *, journal_bytes: int = 0, new_salt: NewSalt = random_salt
    ) -> tuple[Store, journals.Scan]:
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
        scan = journals.scan(medium, extent, layout.Geometry(cluster_bits))
        first = scan.frames[0].operations[0]
        area = HeaderArea.parse(first.data if isinstance(first, HeaderOperation) else b"")
        length = max(journal_bytes, extent.length)
        store = cls(medium, area, journal_bytes=length, new_salt=new_salt)
        store.metadata.replay(scan.operations)
        store._check_replayed(cluster_bits, extent)
        store.space.reserve(extent.offset, extent.length)
        journal = Journal(medium, extent, scan.epoch, scan.sequence)
        journal.position = sum(len(frame.raw) for frame in scan.frames)
        journal.decoded_bytes = sum(frame.header.decoded_length for frame in scan.frames)
        store.journal = journal
        return store, scan

    def _check_replayed(self, cluster_bits: int, extent: JournalRange) -> None:
        """Raise unless replay leaves the header cluster's geometry and the journal's clusters alone."""
        header = self.metadata.header
        if header.cluster_bits != cluster_bits or header.refcount_order != self.geometry.refcount_order:
            raise CorruptionError("journal", extent.offset, "its header has another geometry than the root")
        for offset in self.metadata.images:
            if extent.offset <= offset < extent.end:
                raise CorruptionError("journal", extent.offset, f"it would write into itself at {offset:#x}")
        start, end = extent.offset // self.geometry.cluster_bytes, self.geometry.clusters(extent.end)
        if not self.refcounts.is_free(start, end):
            raise CorruptionError("journal", extent.offset, "its clusters have a refcount")

    def recover(self, sector: bytes, scan: journals.Scan) -> None:
        """Bring a crashed image home: what `open_live` replayed into memory becomes durable.

        What was read is not thereby durable, and a durable frame must not be put at risk by rewriting it:
        nothing is written into the range that was read, and no home before the frames are safe elsewhere.

        Raises:
            OSError: recovery can be tried again, from the start.
        """
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

    def _root_copy_serves(self, extent: JournalRange) -> bool:
        """Return True if sector 0 may be rewritten: its copy names the same journal, or there is never one.

        A copy that is torn or names another range was begun while sector 0 was durable (T5), so nothing
        has to be rewritten; and nothing could stand in for sector 0 while that were in flight.
        """
        if self.geometry.cluster_bytes <= roots.ROOT_COPY_OFFSET:
            return True
        root = roots.unpack_root_copy(self.medium.pread(roots.ROOT_COPY_BYTES, roots.ROOT_COPY_OFFSET))
        return root is not None and roots.unpack_root(root)[1] == extent

    def clean(self) -> None:
        """Make the image standard qcow2: everything home, sector 0 as any program knows it, journal gone.

        Raises:
            OSError: the image stays live and recoverable, unless only the last step failed: then it is
                clean, and the journal's clusters are not given back.
        """
        while self.metadata.has_staged:
            self.flush()
        with self.turn.take():
            if self.journal is None:
                # Durable now: data written in place.
                self.medium.barrier("close.data")
            else:
                self._bring_home()
            self.turn.covered(self.turn.changes)

    def _bring_home(self) -> None:
        if self._root_copy_is_stale:
            # A move failed after it wrote the copy; sector 0 is about to rely on it.
            self._settle_root()
            self._write_root_copy(self._require_journal().extent)
        self._write_header_tail()
        self._end_epoch()
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
        except OSError:
            # The journal is intact, so the live root is right whatever the disk holds.
            self.medium.device.pwrite(live_root, 0)
            raise

    def _release_journal(self) -> None:
        extent = self._require_journal().extent
        self.journal = None
        if self.geometry.cluster_bytes > roots.ROOT_COPY_OFFSET:
            self.medium.pwrite(bytes(roots.ROOT_COPY_BYTES), roots.ROOT_COPY_OFFSET)
        used_bytes = self.refcounts.used_end() * self.geometry.cluster_bytes
        if used_bytes <= extent.offset:
            self.medium.shrink(used_bytes)
        else:
            self.medium.punch(extent.offset, extent.length)
            self.medium.shrink(max(used_bytes, 0))
        # Durable now: the file without the journal. Closing is complete.
        self.medium.barrier("close.release")
