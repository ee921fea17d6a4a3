"""A user transaction, as the engine sees it: a private change set, committed whole or given up.

Its writes go to fresh clusters, also where the guest cluster was allocated, so that leaving them out leaves
the old disk. Committing switches the mapping in one record. Whoever has one is alone (request.py, Q2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from jqcow.engine.datafile import DataFile
from jqcow.engine.lifecycle import Lifecycle
from jqcow.engine.medium import EXPECTED
from jqcow.engine.metadata import ChangeSet, Mark
from jqcow.engine.tables import Tables
from jqcow.errors import PoisonedError


class PrivateChanges:
    """The changes of an open transaction: ``tables`` shows them, and nobody else does."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        """Start with what is durable: everything is committed, the image is live, the caller is alone."""
        self.lifecycle = lifecycle
        self.commits = lifecycle.commits
        self.log = lifecycle.log
        self.medium = lifecycle.medium
        public = lifecycle.public
        with self.medium.lock, self.medium.section():
            if not public.changes.is_empty:
                raise RuntimeError("a transaction starts with nothing staged")
            # R4: what the transaction frees, the public changes must not go on packing into.
            public.changes.packed_end = 0
            self._old_size = public.view.header.size
            changes = ChangeSet(public.geometry, private=True)
            changes.reach_bytes = self._old_size
            self.tables = Tables(public.blocks, public.space, changes)
            self.log.in_transaction = True
        self._is_halfway = False
        """True within `whole`, and for good where it was cut off before it could be undone."""

    def commit(self) -> int:
        """Make the changes durable, whole; return the sequence of their record (or of the last one).

        Raises:
            OSError: nothing of them happened; `give_up` follows.
        """
        if self._is_halfway:
            raise PoisonedError("a change of the transaction was cut off half-way")
        with self.commits.turn.lock:
            self.commits.begin_turn()
            size, data_file = self.tables.view.header.size, self.medium.data_file
            if data_file is not None:
                data_file.promised_bytes = max(size, data_file.promised_bytes)
            self.commits.commit(self.tables)
            self.log.in_transaction = False
            if data_file is not None:
                data_file.promised_bytes = 0
                self._cut_data_file(data_file)
            return self.log.require_journal().sequence

    def _cut_data_file(self, data_file: DataFile) -> None:
        """What a smaller disk has lost leaves the data file, if the host can do that (X6, X8)."""
        header = self.tables.view.header
        if header.size < self._old_size or header.is_raw_outside:
            with suppress(*EXPECTED):
                data_file.cut(max(header.size, data_file.promised_bytes))

    def give_up(self) -> None:
        """Forget all changes. Should their record come back to life it needs its clusters (space.py, S5)."""
        self.medium.undo(self._forget)
        if self.medium.data_file is not None and not self.medium.in_doubt:
            self._cut_data_file(self.medium.data_file)

    def _forget(self) -> None:
        changes, space = self.tables.changes, self.tables.space
        space.forget_frees((*changes.freed_data, *changes.freed_metadata))
        space.retire(changes.taken)
        self.tables.staged.changes = ChangeSet(self.tables.geometry, private=True)
        self.log.in_transaction = False

    # Going back

    def savepoint(self) -> Mark:
        """Return a mark of the present state; what is in fresh clusters so far belongs to it."""
        with self.medium.lock, self.medium.section():
            return self.tables.changes.savepoint()

    def return_to(self, mark: Mark) -> None:
        """Undo everything since a mark."""
        with self.medium.lock, self.medium.section():
            self.tables.undo(mark)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All operations inside, or none of them."""
        mark = self.savepoint()
        self._is_halfway = True
        try:
            yield
        except BaseException:
            self.medium.undo(lambda: self._undo(mark))
            raise
        with self.medium.lock, self.medium.section():
            self.tables.changes.release(mark)
        self._is_halfway = False

    def _undo(self, mark: Mark) -> None:
        self.tables.undo(mark)
        self.tables.changes.release(mark)
        self._is_halfway = False
