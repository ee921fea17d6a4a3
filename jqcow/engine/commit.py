"""Commit: one thread at a time makes a record durable, on behalf of all that wait (group commit).

A flush, from top to bottom: wait while another commit covers it; take the turn; cut what is staged; barrier
for ordered data; make room, which may take a checkpoint or a move, and append the record; barrier; publish.
The lock is held only to cut and to publish, so others read, write and stage meanwhile. What changes metadata
has made the image live before (request.py).

T1. A record is appended only when all that it relies on is durable: the data of ordered pairs, all data of
    a transaction, the opening frame and root copy before the root that names them.
T2. What a flush acknowledges is in a record (or in place) under a completed barrier.
C1. At most one commit is under way; whoever holds the turn alone appends, checkpoints or moves.
C2. A flush shares a commit only if that commit was cut after all was complete that the flush is for.
C3. A commit that was cut off, and is neither published nor taken back, leaves the image in doubt.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from jqcow.engine import scan
from jqcow.engine.log import Log
from jqcow.engine.medium import EXPECTED
from jqcow.engine.metadata import ChangeSet
from jqcow.engine.pending import Piece
from jqcow.engine.tables import Tables
from jqcow.engine.tracking import Cold, Region, Tracking

STAGED_ZERO_BYTES_MAX = scan.ZEROED_BYTES_MIN // 4
"""New metadata clusters of changes that are not committed: a record must not zero more than an epoch may."""
INTENTS_BYTES_MAX = 256 << 10
"""More than this one record does not take of what the guest wrote: the ordinary path writes it once."""
CARRIED_PARTS = 4
"""Of what may be pending the next epoch begins with no more than such a part."""
HALF_PARTS = 2**3
"""Nor does it take more than such a part of a half; and so much is left for the record of destaging."""
DESTAGED_AT_ONCE = 64
"""So many pending writes are staged together at most: it bounds how long others wait."""
STAGED_FREE_BYTES_MAX = 1 << 30
"""Clusters freed by changes that are not committed keep their space on the host: no more than this."""


class Turn:
    """Whose turn it is to commit, and how far everything is durable.

    The turn is taken without the lock held, by ``with`` on a lock of the interpreter.

    Attributes:
        lock: held by whoever commits, checkpoints, moves or closes; re-entrant only so that it can tell
            whether the calling thread has it.
        under_way: held during the newest flush that commits: who is covered by it waits for this one, and is
            not kept waiting by the next. When it is free the flush has ended, well or not.
        is_clean: no data was written since the newest cut. Whoever writes data clears it, well or not: what
            can be read the next flush acknowledges, and must not take an older commit for its own (C2).
        is_undecided: a commit was begun, and is neither published nor taken back yet (C3).
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.under_way = threading.Lock()
        self.is_clean = False
        self.is_undecided = False
        self._tickets = itertools.count(1)
        self._newest_cut = 0
        self._durable_ticket = 0

    def draw(self, *, nothing_staged: bool) -> int:
        """Return a flush's ticket: that of the newest cut where nothing was changed since, or a new one.

        The caller has looked whether anything is staged: a cut since then is newer, and covers as much (C2).
        """
        return self._newest_cut if nothing_staged and self.is_clean else next(self._tickets)

    def cut(self) -> int:
        """Return the ticket of a commit that is about to cut, with the lock held."""
        self._newest_cut = next(self._tickets)
        self.is_clean = True
        return self._newest_cut

    def cover(self, ticket: int) -> None:
        """The commit of that ticket is durable."""
        self._durable_ticket = max(self._durable_ticket, ticket)

    def is_covered(self, ticket: int) -> bool:
        """Return True if everything that was complete when a flush drew ``ticket`` is durable."""
        return ticket <= self._durable_ticket


@dataclass(frozen=True)
class _Cut:
    """What a commit makes durable: ``changes``, None if nothing is staged; the regions with it; and
    ``pieces`` that the guest wrote."""

    ticket: int
    changes: ChangeSet | None
    warm: list[Region]
    pieces: list[Piece]


def _nothing() -> None:
    """There is nothing to destage."""


class Commits:
    """The commits of one image."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.public = log.public
        self.medium = log.medium
        self.turn = Turn()
        self.pending = log.pending
        self.tracking = Tracking(log.public)
        self.destage: Callable[[], None] = _nothing
        """With the turn taken and the lock free: does what is pending by the ordinary path (destaging.py)."""

    def begin_turn(self) -> None:
        """Called first by whoever has taken the turn.

        Raises:
            PoisonedError: an earlier commit or change of the root was cut off half-way.
        """
        with self.medium.lock:
            if self.turn.is_undecided or not self.log.root.is_decided:
                self.medium.leave_in_doubt()
            self.medium.require_known()

    # Flush

    def flush(self, admit: Callable[[], None]) -> None:
        """Make every completed change durable: data in place, new data, and the metadata that maps it.

        Called with the lock free. Other threads may go on meanwhile; their flushes share the next commit.
        ``admit`` is called just before a commit, with the lock held: much may have happened before.

        Raises:
            OSError: nothing is acknowledged. After a failed write the next flush tries anew; after a
                failed barrier the image is read-only.
        """
        nothing_staged = self.public.changes.is_empty
        ticket = self.turn.draw(nothing_staged=nothing_staged)
        if self._others_cover(ticket):
            return
        under_way = threading.Lock()
        with self.turn.lock, under_way:
            # At once: who comes now waits for this flush, and not for the turn, which may be long in coming.
            self.turn.under_way = under_way
            self.begin_turn()
            # Not before the turn: this flush may be covered by the commit that it waited for.
            if not self.turn.is_covered(ticket):
                with self.medium.lock:
                    admit()
                if self._is_tight():
                    self.destage()
                self.commit(self.public)

    def _is_tight(self) -> bool:
        """Return True if the journal has more for pending writes than it should: they are done first."""
        journal, pending = self.log.journal, self.pending
        if journal is None or pending.is_empty:
            return False
        fresh_bytes = pending.fresh.length_bytes
        part_bytes = journal.extent.half_bytes // HALF_PARTS
        if fresh_bytes > min(INTENTS_BYTES_MAX, part_bytes):
            return True
        limit = self.pending_limit()
        # What is left when the epoch ends is carried into the next: that is not to be much.
        is_short = journal.room_bytes - part_bytes < fresh_bytes
        return pending.is_full(0, limit) or (
            is_short and pending.logged.length_bytes > limit // CARRIED_PARTS
        )

    def pending_limit(self) -> int:
        """Return how many bytes may be pending; none where there is no journal."""
        journal = self.log.journal
        return 0 if journal is None else journal.extent.half_bytes // 4

    def _others_cover(self, ticket: int) -> bool:
        """Wait while others commit; return True once everything up to ``ticket`` is durable."""
        waited_for = None
        while not self.turn.is_covered(ticket):
            under_way = self.turn.under_way
            if under_way is waited_for:
                return False
            with under_way:
                waited_for = under_way
        return True

    def flush_if_large(self, admit: Callable[[], None]) -> None:
        """Between changes, with the lock free: keep memory and the next record within bounds.

        Raises:
            OSError: as `flush`.
        """
        is_live = self.log.journal is not None
        if is_live and not self.log.in_transaction and self.is_large(self.public.changes):
            self.flush(admit)

    def is_large(self, changes: ChangeSet) -> bool:
        """Return True if changes of a live image should be committed before more is staged."""
        return (
            len(changes.blocks) > self.staged_limit()
            or changes.zeroed_bytes > STAGED_ZERO_BYTES_MAX
            or changes.freed_clusters * self.log.geometry.cluster_bytes > STAGED_FREE_BYTES_MAX
        )

    def heat(self, cold: Cold, admit: Callable[[], None]) -> None:
        """Have the bitmaps durably call dirty what is about to be written in place (tracking.py, B1).

        Called with the lock free; ``admit`` is called with the turn taken and the lock held.

        Raises:
            OSError: nothing is hot that was not before.
        """
        with self.turn.lock:
            self.begin_turn()
            with self.medium.lock:
                admit()
                self.tracking.warm_for(cold)
            self.commit(self.public)

    def cool(self, admit: Callable[[], None]) -> None:
        """Stage what the bitmaps have a reason for, with the lock free (tracking.py, B3).

        Nothing is pending then, if the caller is alone.

        Raises:
            OSError: as `flush`.
        """
        self.settle(admit)
        with self.medium.lock:
            admit()
            self.tracking.cool()

    def settle(self, admit: Callable[[], None]) -> None:
        """Do what is pending by the ordinary path, with the lock free. The next record says that it is done.

        So whatever comes over it is acknowledged by that record, or a later one.

        Raises:
            OSError: the host failed; it is pending still.
        """
        if not self.pending.is_empty:
            with self.turn.lock:
                self.begin_turn()
                with self.medium.lock:
                    admit()
                self.destage()

    def staged_limit(self) -> int:
        """Return how many staged blocks call for a commit."""
        half_bytes = self.log.require_journal().extent.half_bytes
        return max(2, half_bytes // self.log.geometry.block_bytes // 4)

    def destaged_at_once(self) -> int:
        """Return how many pending writes may be staged together: each may take a table, and some blocks."""
        tables = STAGED_ZERO_BYTES_MAX // self.log.geometry.cluster_bytes
        return max(1, min(DESTAGED_AT_ONCE, self.staged_limit() // 2, tables))

    # One commit

    def commit(self, tables: Tables) -> None:
        """Commit what is staged in ``tables``: the public ones, or a transaction's. The turn is taken.

        Raises:
            OSError: nothing is acknowledged, and the same changes are staged again. After a failed barrier
                the record may be found when the image is opened again.
        """
        self.turn.is_undecided = True
        try:
            changed = self._make_durable(tables)
        except BaseException:
            self._leave_in_doubt_if_undecided()
            raise
        # The commit is durable, whatever the host says of the space that it frees: an error here would read
        # as if it had failed. Who needs the space next meets the error again.
        if self.log.journal is not None and (changed or self.public.space.is_waiting):
            with suppress(*EXPECTED):
                self.log.recycle()

    def _make_durable(self, tables: Tables) -> bool:
        """Return True if there were changes of metadata."""
        try:
            cut = self._cut(tables)
            if cut.changes is None and not cut.pieces:
                # Durable now: data written in place, and whatever an earlier process left unsynced.
                self.medium.barrier("flush.data")
            else:
                self._write_record(cut.changes, cut.pieces)
        except BaseException:
            self._take_back(tables)
            raise
        self._publish(tables, cut)
        return cut.changes is not None

    def _leave_in_doubt_if_undecided(self) -> None:
        """Who reads on would see what an image that is opened again may not show (C3)."""
        if self.turn.is_undecided:
            with self.medium.lock:
                self.medium.leave_in_doubt()

    def _cut(self, tables: Tables) -> _Cut:
        with self.medium.lock, self.medium.section():
            # A transaction finds nothing warm (tracking.py, B4).
            # Who has a transaction finds nothing pending (destaging.py, I4).
            return _Cut(self.turn.cut(), tables.staged.cut(), self.tracking.cut(), self.pending.cut())

    def _write_record(self, changes: ChangeSet | None, pieces: list[Piece]) -> None:
        """Make one record of the cut durable."""
        if changes is not None and changes.ordered:
            # Durable now: the data of ordered pairs (T1), and of what the record declares done (I2). The
            # record that maps it may land from here on.
            self.medium.barrier("flush.ordered")
        else:
            # Durable now: what the record maps in a data file, and all that was overwritten there (X1).
            self.medium.data_barrier()
        payload = self.log.make_room(changes, pieces)
        self.log.require_journal().append(payload)
        # Durable now: the record, with what the guest wrote in it, and the data of its zero-safe pairs. The
        # flush is acknowledged.
        self.medium.barrier("flush.record")

    def _publish(self, tables: Tables, cut: _Cut) -> None:
        """Everybody sees what is durable. A transaction's covers all flushes: nothing else is staged then."""
        with self.medium.lock, self.medium.section():
            if cut.changes is not None or cut.pieces:
                journal = self.log.require_journal()
                journal.accept()
                self.pending.landed(journal.sequence, 0 if cut.changes is None else cut.changes.done)
                if cut.changes is not None:
                    self.public.blocks.publish(cut.changes)
                    self.public.space.publish(cut.changes, journal.epoch)
            tables.staged.landed()
            self.tracking.made_durable(cut.warm)
            self.turn.cover(cut.ticket)
            self.turn.is_undecided = False

    def _take_back(self, tables: Tables) -> None:
        """The commit failed: the frame must not come back to life, and what was cut is staged again.

        Where the frame cannot be revoked either the image is read-only; what it shows was never acknowledged.
        """
        self.turn.is_clean = False
        try:
            if self.log.journal is not None:
                self.log.journal.revoke()
        finally:
            self.medium.undo(lambda: self._restage(tables))

    def _restage(self, tables: Tables) -> None:
        tables.staged.take_back()
        self.pending.take_back()
        # A frame that is still pending may yet be found.
        journal = self.log.journal
        self.turn.is_undecided = journal is not None and journal.is_pending

    def checkpoint(self, admit: Callable[[], None]) -> None:
        """Commit, and bring every block home: the next record starts in the other half of the journal.

        ``admit`` is called with the turn taken and the lock held.

        Raises:
            OSError: the log stays live, and the checkpoint can be tried again (unless a barrier failed).
        """
        with self.turn.lock:
            self.begin_turn()
            with self.medium.lock:
                admit()
            self.destage()
            self.commit(self.public)
            if self.log.journal is not None and not self.log.journal.epoch_is_empty:
                self.log.checkpoint()
