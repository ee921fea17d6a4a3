"""Sector 0, the root, and its copy: what this process knows of them.

Sector 0 is one write of 512 bytes, which is never torn; the copy stands in for one that the drive lost. It is
in one of these states:

    FOUND       as it was read; the last write of a killed process may be in flight
    SETTLED     durable
    WRITTEN     this process wrote it, and no barrier has covered that yet
    UNDECIDED   a write of it was begun, and it is not decided yet which root goes on

    state              event                                        next state   function
    FOUND, WRITTEN     a barrier that began afterwards completes    SETTLED      _barrier_completed
    FOUND, WRITTEN     the root copy is to be written next          SETTLED      settle
    any                another root is written                      UNDECIDED    write
    UNDECIDED          the new root goes on                         WRITTEN,     decide
                                                                    SETTLED
    UNDECIDED          the change failed: the old root goes on      WRITTEN      put_back
    UNDECIDED          the old root cannot be written               poisoned     put_back
    FOUND, SETTLED     recovery writes the root as it was read      WRITTEN      rewrite
    UNDECIDED          closing failed: the live root goes on        WRITTEN      put_back_on_closing
    UNDECIDED          the change was cut off                       in doubt     Commits.begin_turn

T5. Sector 0 and the root copy are never in flight together.
T6. A sector-0 write that failed is followed by the root of the state that goes on; before the root copy
    is next written that has its own barrier.
"""

from __future__ import annotations

import enum

from jqcow.engine.medium import Medium
from jqcow.engine.scan import read_root_copy
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import Header
from jqcow.ondisk.layout import Geometry, HostOffset
from jqcow.ondisk.root import JournalRange

SECTOR_0 = HostOffset(0)
ROOT_COPY = HostOffset(roots.ROOT_COPY_OFFSET)


class RootState(enum.Enum):
    """What is known of sector 0; see the module's table."""

    FOUND = enum.auto()
    SETTLED = enum.auto()
    WRITTEN = enum.auto()
    UNDECIDED = enum.auto()


class Root:
    """Sector 0 of one image and its copy. Whoever has the turn changes them, with the lock free.

    ``copy_is_stale``: the copy may tell of another journal than sector 0.
    """

    def __init__(self, medium: Medium, geometry: Geometry) -> None:
        self.medium = medium
        self.has_copy = roots.has_room_for_copy(geometry.cluster_bits)
        self.copy_is_stale = False
        # Nothing was changed yet: a barrier can only have been that of `engine.settle`.
        self.state = RootState.SETTLED if medium.barriers_started else RootState.FOUND
        self._barriers_before = 0
        self._is_durable = False
        medium.listeners.append(self._barrier_completed)

    @property
    def is_decided(self) -> bool:
        """False if a change of the root is under way, or was cut off."""
        return self.state is not RootState.UNDECIDED

    # Sector 0

    def settle(self) -> None:
        """Make sector 0 durable as it reads, if that is not known (T5)."""
        if self.state is not RootState.SETTLED:
            # Durable now: sector 0 as it reads, whoever wrote it last. The root copy is written next.
            self.medium.barrier("root.settle")

    def _barrier_completed(self, number: int) -> None:
        if self._barriers_before < number:
            self._is_durable = True
            if self.state is not RootState.UNDECIDED:
                self.state = RootState.SETTLED

    def write(self, sector: bytes) -> None:
        """Write sector 0; `decide` or `put_back` follows."""
        self.state, self._is_durable = RootState.UNDECIDED, False
        self._barriers_before = self.medium.barriers_started
        self.medium.pwrite(sector, SECTOR_0)

    def decide(self) -> None:
        """The root that was written last goes on, and its copy with it."""
        self.copy_is_stale = False
        self.state = RootState.SETTLED if self._is_durable else RootState.WRITTEN

    def put_back(self, before: bytes) -> None:
        """A change failed: write sector 0 as it was ``before``, if it may have been changed (T6).

        Raises:
            OSError: what sector 0 holds is not known: the image is read-only.
        """
        if self.state is not RootState.UNDECIDED:
            return
        if not self.medium.poisoned:
            try:
                self.write(before)
            except OSError:
                self.medium.poisoned = True
                raise
        self.state = RootState.WRITTEN

    def put_back_on_closing(self, live: bytes) -> None:
        """Sector 0 could not be cleared durably: write the live root again, also behind a failed barrier.

        The journal is intact, so the live root is right whatever the disk holds. In the page cache it keeps
        other programs from a disk that may show it again.
        """
        self.medium.device.pwrite(live, SECTOR_0)
        self.state = RootState.WRITTEN

    # The copy

    def write_copy(self, header: Header, extent: JournalRange) -> None:
        """Write the copy of the root that is to name ``extent``; sector 0 is settled (T5)."""
        if self.has_copy:
            self.copy_is_stale = True
            self.medium.pwrite(roots.pack_root_copy(roots.pack_root(header, extent)), ROOT_COPY)

    def clear_copy(self) -> None:
        """Overwrite the copy with zeros."""
        if self.has_copy:
            self.medium.pwrite(bytes(roots.ROOT_COPY_BYTES), ROOT_COPY)

    def leftover(self) -> JournalRange | None:
        """Return the journal of which the copy speaks; on a clean image a crash left it there."""
        copy = read_root_copy(self.medium.device) if self.has_copy else None
        return None if copy is None else roots.unpack_root(copy)[1]

    def may_be_rewritten(self, extent: JournalRange) -> bool:
        """Return True if sector 0 may be rewritten: its copy names the same journal, or there is never one.

        A copy that is torn or names another range was begun while sector 0 was durable (T5), so nothing
        has to be rewritten; and nothing could stand in for sector 0 while that were in flight.
        """
        if not self.has_copy:
            return True
        return self.leftover() == extent

    def rewrite(self, sector: bytes) -> None:
        """Write the root as it was read: a failed barrier of another process may have lost it."""
        self.write(sector)
        self.decide()
