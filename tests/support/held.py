"""Whether a lock is taken, by whichever thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol


class _Lock(Protocol):
    def acquire(self, blocking: bool = True) -> bool: ...

    def release(self) -> None: ...


def is_taken(lock: _Lock) -> bool:
    """Return True unless another thread than the caller's could take the lock now."""

    def take() -> bool:
        taken = lock.acquire(blocking=False)
        if taken:
            lock.release()
        return taken

    with ThreadPoolExecutor(1) as other:
        return not other.submit(take).result()
