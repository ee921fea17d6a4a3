"""Commit: one thread at a time makes a record durable, on behalf of all that wait (group commit).

A flush, from top to bottom: wait while another commit covers it; take the turn; cut what is staged; barrier
for ordered data; make room, and append the record; barrier; publish. The lock is held only to cut and to
publish, so others read, write and stage meanwhile.

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
from jqcow.engine.changes import ChangeSet
from jqcow.engine.log import Log
from jqcow.engine.medium import PLANNED
from jqcow.engine.tables import Tables

STAGED_ZERO_BYTES_MAX = scan.ZEROED_BYTES_MIN // 4
"""New metadata clusters of changes that are not committed: a record must not zero more than an epoch may."""
STAGED_FREE_BYTES_MAX = 1 << 30
"""Clusters freed by changes that are not committed keep their space on the host: no more than this."""


class Turn:
    """Whose turn it is to commit, and how far everything is durable.

    The turn is taken without the lock held, by ``with`` on a lock of the interpreter.

    Attributes:
        taken: held by whoever commits, checkpoints, moves or closes; re-entrant only so that it can tell
            whether the calling thread has it.
        under_way: held during the newest flush that commits: who is covered by it waits for this one, and is
            not kept waiting by the next. When it is free the flush has ended, well or not.
        is_clean: no data was written in place since the newest cut.
        in_doubt: a commit was begun, and is neither published nor taken back yet (C3).
    """

    def __init__(self) -> None:
        self.taken = threading.RLock()
        self.under_way = threading.Lock()
        self.is_clean = False
        self.in_doubt = False
        self._tickets = itertools.count(1)
        self._newest_cut = 0
        self._durable_ticket = 0

    def draw(self, *, nothing_staged: bool) -> int:
        """Return a flush's ticket: that of the newest cut where nothing was changed since, or a new one.

        It is asked first whether anything was changed: a cut in between is newer, and covers as much (C2).
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
    """What a commit makes durable: ``changes``, None if nothing is staged."""

    ticket: int
    changes: ChangeSet | None


class Commits:
    """The commits of one image."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.public = log.public
        self.medium = log.medium
        self.turn = Turn()

    def begin_turn(self) -> None:
        """Called first by whoever has taken the turn.

        Raises:
            PoisonedError: an earlier commit or change of the root was cut off half-way.
        """
        with self.medium.lock:
            if self.turn.in_doubt or not self.log.root.is_decided:
                self.medium.in_doubt = True
            self.medium.require_known()

    # Flush

    def flush(self, check: Callable[[], None]) -> None:
        """Make every completed change durable: data in place, new data, and the metadata that maps it.

        Called with the lock free. Other threads may go on meanwhile; their flushes share the next commit.
        ``check`` is called just before a commit, with the lock held: much may have happened before.

        Raises:
            OSError: nothing is acknowledged. After a failed write the next flush tries anew; after a
                failed barrier the image is read-only.
        """
        ticket = self.turn.draw(nothing_staged=self.public.changes.is_empty)
        if self._others_cover(ticket):
            return
        under_way = threading.Lock()
        with self.turn.taken, under_way:
            # At once: who comes now waits for this flush, and not for the turn, which may be long in coming.
            self.turn.under_way = under_way
            self.begin_turn()
            # Not before the turn: this flush may be covered by the commit that it waited for.
            if not self.turn.is_covered(ticket):
                with self.medium.lock:
                    check()
                self.run(self.public)

    def _others_cover(self, ticket: int) -> bool:
        """Wait while others commit; return True once everything up to ``ticket`` is durable."""
        ended = None
        while not self.turn.is_covered(ticket):
            under_way = self.turn.under_way
            if under_way is ended:
                return False
            with under_way:
                ended = under_way
        return True

    def flush_if_large(self, check: Callable[[], None]) -> None:
        """Between changes, with the lock free: keep memory and the next record within bounds.

        Raises:
            OSError: as `flush`.
        """
        journal, changes = self.log.journal, self.public.changes
        if (
            journal is not None
            and not self.log.in_transaction
            and (
                len(changes.blocks) > self.staged_limit()
                or changes.zeroed_bytes > STAGED_ZERO_BYTES_MAX
                or changes.freed_clusters * self.log.geometry.cluster_bytes > STAGED_FREE_BYTES_MAX
            )
        ):
            self.flush(check)

    def staged_limit(self) -> int:
        """Return how many staged blocks call for a commit."""
        half_bytes = self.log.require_journal().extent.half_bytes
        return max(2, half_bytes // self.log.geometry.block_bytes // 4)

    # One commit

    def run(self, tables: Tables) -> None:
        """Commit what is staged in ``tables``: the public ones, or a transaction's. The turn is taken.

        Raises:
            OSError: nothing is durable; of the public tables the same changes travel in the next record.
        """
        self.turn.in_doubt = True
        try:
            self._commit(tables)
        except PLANNED:
            raise
        except BaseException:
            self._leave_in_doubt()
            raise
        # The commit is durable, whatever the host says of the space that it frees: an error here would read
        # as if it had failed. Who needs the space next meets the error again.
        if self.log.journal is not None:
            with suppress(*PLANNED):
                self.log.recycle()

    def _commit(self, tables: Tables) -> None:
        try:
            cut = self._cut(tables)
            if cut.changes is None:
                # Durable now: data written in place, and whatever an earlier process left unsynced.
                self.medium.barrier("flush.data")
            else:
                self._log(cut.changes)
        except BaseException:
            self._take_back()
            self.turn.in_doubt = False
            raise
        self._publish(tables, cut)
        self.turn.in_doubt = False

    def _leave_in_doubt(self) -> None:
        """Who reads on would see what an image that is opened again may not show (C3)."""
        if self.turn.in_doubt:
            with self.medium.lock:
                self.medium.in_doubt = True

    def _cut(self, tables: Tables) -> _Cut:
        """Freeze what is staged: what is staged from here on travels in a later record."""
        with self.medium.lock, self.medium.section():
            if self.public.staged.in_flight is not None:
                raise RuntimeError("one record is in flight at a time")
            ticket, changes = self.turn.cut(), tables.changes
            if changes.is_empty:
                return _Cut(ticket, None)
            if tables is self.public:
                tables.staged.in_flight = changes
                tables.staged.changes = ChangeSet(changes.geometry, packed_end=changes.packed_end)
            return _Cut(ticket, changes)

    def _log(self, changes: ChangeSet) -> None:
        """Make one record of the cut durable."""
        if changes.ordered:
            # Durable now: the data of ordered pairs (T1). The record that maps it may land from here on.
            self.medium.barrier("flush.ordered")
        payload = self.log.make_room(changes)
        self.log.require_journal().append(payload)
        # Durable now: the record, and the data of its zero-safe pairs. The flush is acknowledged.
        self.medium.barrier("flush.record")

    def _publish(self, tables: Tables, cut: _Cut) -> None:
        with self.medium.lock, self.medium.section():
            if cut.changes is not None:
                journal = self.log.require_journal()
                journal.accept()
                self.public.blocks.publish(cut.changes)
                self.public.space.publish(cut.changes, journal.epoch)
            if tables is self.public:
                tables.staged.in_flight = None
            else:
                tables.staged.changes = ChangeSet(tables.geometry)
            self.turn.cover(cut.ticket)

    def _take_back(self) -> None:
        """The commit failed: the frame must not come back to life, and what was cut is staged again."""
        self.turn.is_clean = False
        try:
            if self.log.journal is not None:
                self.log.journal.revoke()
        finally:
            self.medium.undo(self._restage)

    def _restage(self) -> None:
        """Lay what was staged since the cut over what was cut: both travel in the next record."""
        staged, failed = self.public.staged, self.public.staged.in_flight
        if failed is not None:
            failed.absorb(staged.changes)
            staged.changes, staged.in_flight = failed, None

    def checkpoint(self, check: Callable[[], None]) -> None:
        """Commit, and write everything that durable records hold to its home; the journal is empty then.

        ``check`` is called with the turn taken and the lock held.

        Raises:
            OSError: the log stays live, and the checkpoint can be tried again (unless a barrier failed).
        """
        with self.turn.taken:
            self.begin_turn()
            with self.medium.lock:
                check()
            self.run(self.public)
            if self.log.journal is not None and not self.log.journal.epoch_is_empty:
                self.log.end_epoch()
