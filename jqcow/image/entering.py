"""What every call of an image begins with: it may go on, or it is refused before anything happens."""

from __future__ import annotations

import os
import threading
from typing import Literal

from jqcow.engine.engine import Engine
from jqcow.engine.request import is_mine
from jqcow.errors import ImageClosedError, ImageInUse, PoisonedError, ReadOnlyError, TransactionError

Mode = Literal["r", "r+"]
SmallWrites = Literal["in-place", "journal"]
"""Where small writes go first: to the clusters that they will have, or to the journal."""
SMALL_WRITES: SmallWrites = "in-place"


class Entering:
    """The state of an open image that says who may do what."""

    def __init__(self, engine: Engine, mode: Mode) -> None:
        self._engine = engine
        self._medium = engine.medium
        self._lock = engine.medium.lock
        self._mode: Mode = mode
        self._transaction_thread: int | None = None
        self._owner_pid = os.getpid()
        self._closed = False

    @property
    def mode(self) -> Mode:
        """``"r"`` or ``"r+"``, as it was opened."""
        return self._mode

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    @property
    def _is_foreign(self) -> bool:
        return os.getpid() != self._owner_pid

    def _own(self, *, changing: bool = False) -> None:
        """Refuse a caller who would wait forever, before any lock is taken.

        A forked child has a copy of the locks as they were, and of nothing that could release them.
        """
        if self._is_foreign:
            raise ImageInUse(
                f"the image belongs to process {self._owner_pid}, which this one was forked from: "
                "open it anew, once that process has closed it"
            )
        if changing and self._transaction_thread == threading.get_ident():
            raise TransactionError("this thread has a transaction open: use its own methods")
        if is_mine(self._lock) or is_mine(self._engine.commits.turn.lock):
            raise RuntimeError("the image is in use by this thread: a finaliser must not come back to it")

    def _enter(self, changing: bool) -> None:
        """Refuse a call that the image's state does not allow; called with the lock held."""
        if self._closed:
            raise ImageClosedError
        self._medium.require_known()
        if changing:
            if self._mode != "r+":
                raise ReadOnlyError("the image is open for reading only")
            if self._medium.poisoned:
                raise PoisonedError("the image is read-only since a barrier failed: reopen it to recover")

    def _require_writable(self) -> None:
        """As `_enter` for a change."""
        self._enter(True)
