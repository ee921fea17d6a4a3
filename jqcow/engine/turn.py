"""Whose turn it is to commit: one thread at a time, on behalf of all that wait (group commit).

C1. At most one commit is under way; whoever holds the turn alone appends, checkpoints or moves.
C2. A flush shares a commit only if that commit was cut after its changes were complete.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turn:
    """The commit turn. All methods are called with the lock held; waiting lets others have it."""

    def __init__(self, lock: threading.Lock) -> None:
        self._ended = threading.Condition(lock)
        self._taken = False
        self._changes = 0
        self._durable_changes = -1

    @property
    def changes(self) -> int:
        """How many changes were completed, or failed, so far: a ticket for `wait_for_commit`."""
        return self._changes

    def changed(self) -> None:
        """A change is complete, or failed half-way. Never called while it still goes on (C2)."""
        self._changes += 1

    def covered(self, ticket: int) -> None:
        """Everything up to ``ticket`` is durable."""
        self._durable_changes = max(self._durable_changes, ticket)

    def wait_for_commit(self, ticket: int) -> bool:
        """Wait while another thread commits; return True once everything up to ``ticket`` is durable."""
        while self._taken and self._durable_changes < ticket:
            self._ended.wait()
        return self._durable_changes >= ticket

    @contextmanager
    def take(self) -> Iterator[None]:
        """Wait for the turn, hold it inside (C1)."""
        while self._taken:
            self._ended.wait()
        self._taken = True
        try:
            yield
        finally:
            self._taken = False
            self._ended.notify_all()
