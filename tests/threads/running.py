"""Running bodies of code in threads, with a deadlock as a failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PATIENCE_SECONDS = 120


def run_threads(*bodies: Callable[[], object]) -> None:
    """Run the bodies at the same time; raise what the first of them raised. A deadlock fails."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], object]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "deadlock"


class Background:
    """A body in a thread of its own, until the ``with`` block ends; what it raised is raised there."""

    def __init__(self, body: Callable[[], object]) -> None:
        self._body = body
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._body()
        except BaseException as error:
            self._error = error

    def is_waiting(self, seconds: float = 0.2) -> bool:
        """Return True if the body has not ended after that time."""
        self.thread.join(seconds)
        return self.thread.is_alive()

    def __enter__(self) -> Background:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.thread.join(PATIENCE_SECONDS)
        if exception[0] is None:
            assert not self.thread.is_alive(), "deadlock"
            if self._error is not None:
                raise self._error
