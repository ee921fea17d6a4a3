"""All tables of one image as one reader sees them, and the operations that change them."""

from __future__ import annotations

from copy import copy
from types import TracebackType

from jqcow.engine.bitmaps import Bitmaps
from jqcow.engine.mapping import L1Table, Mapping, MappingEditor, TableMapping
from jqcow.engine.medium import EXPECTED
from jqcow.engine.metadata import Blocks, ChangeSet, Mark, MemoryView, Staged, View
from jqcow.engine.refcounts import Allocation, Refcounts
from jqcow.engine.snapshots import Snapshots
from jqcow.engine.space import Space


class Tables:
    """Mapping, refcounts and snapshots through one view: the public one, or that of a transaction.

    Attributes:
        mapping_at_hand, refcounts_at_hand: for requests. They raise `Absent` for a block that is not in
            memory; all others read it with the lock held.
    """

    def __init__(
        self, blocks: Blocks, space: Space, changes: ChangeSet, shown: L1Table | None = None
    ) -> None:
        self.blocks = blocks
        self.space = space
        self.staged = Staged(changes)
        self.geometry = blocks.geometry
        self.view = View(blocks, self.staged)
        self.refcounts = Allocation(self.view, space)
        self.mapping = MappingEditor(self.view, space, self.refcounts, shown)
        self.bitmaps = Bitmaps(self.view, self.refcounts)
        self.snapshots = Snapshots(self.view, self.mapping, self.refcounts, self.bitmaps)
        memory = MemoryView(blocks, self.staged)
        self.mapping_at_hand = Mapping(memory, space, shown)
        self.refcounts_at_hand = Refcounts(memory, space)

    def of_whole_tables(self) -> Tables:
        """Return the same for walks over an image that nobody changes: they take L2 tables whole."""
        tables = copy(self)
        tables.mapping_at_hand = TableMapping(self.view, self.space, self.mapping.shown)
        return tables

    @property
    def changes(self) -> ChangeSet:
        """The set that changes go to."""
        return self.staged.changes

    def operation(self) -> Operation:
        """Make the changes inside all or nothing; the lock is held, and the image is live."""
        return Operation(self)

    def undo(self, mark: Mark) -> None:
        """Return to a mark: what was taken since is free again, what was freed is in use."""
        self.space.undo(self.changes.return_to(mark))


class Operation:
    """The metadata changes of one operation, as a context manager: all of them, or none (metadata.py, D3).

    It is a critical section: what is not planned for leaves the image in doubt (medium.py, M6).
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._section = tables.blocks.medium.section()
        self._mark: Mark | None = None

    def __enter__(self) -> None:
        # Before the section: what is cut off here leaves no doubt.
        self._tables.blocks.known.forget()
        self._section.__enter__()
        self._mark = self._tables.changes.mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mark is not None and (kind is None or issubclass(kind, EXPECTED)):
            if kind is not None:
                self._tables.undo(self._mark)
            self._tables.changes.release(self._mark)
        self._section.__exit__(kind, error, trace)
