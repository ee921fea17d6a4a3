"""Whose turn it is to commit: one thread at a time, on behalf of all that wait (group commit).

C1. At most one commit is under way; whoever holds the turn alone appends, checkpoints or moves.
C2. A flush shares a commit only if that commit was cut after its changes were complete.

The turn is taken without the image's lock held; whoever has it may then take the lock, and leave it to
others while the device works. Both are taken by ``with`` on a lock of the interpreter, and by nothing else:
there is no point at which an exception, a KeyboardInterrupt say, could leave one of them taken. They are
re-entrant only so that they can tell whether the calling thread has them; nobody takes one twice.
"""

from __future__ import annotations

import threading


class Turn:
    """The commit turn. But for the two locks it is part of the image's state.

    Attributes:
        taken: held by whoever commits.
        under_way: held during the newest flush that commits: who is covered by it waits for this one, and is
            not kept waiting by the next. When it is free the flush has ended, well or not.
    """

    def __init__(self) -> None:
        self.taken = threading.RLock()
        self.under_way = threading.Lock()
        self._changes = 0
        self._durable_changes = -1

    @property
    def changes(self) -> int:
        """How many changes there were so far: a ticket for `is_covered`, and for `cover`."""
        return self._changes

    def changing(self) -> None:
        """A change begins, and will be complete, or have failed, before the lock is free again (C2)."""
        self._changes += 1

    def cover(self, ticket: int) -> None:
        """Everything up to ``ticket`` is durable."""
        self._durable_changes = max(self._durable_changes, ticket)

    def is_covered(self, ticket: int) -> bool:
        """Return True if everything up to ``ticket`` is durable."""
        return self._durable_changes >= ticket
