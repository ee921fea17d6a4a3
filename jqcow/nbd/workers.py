"""Threads that serve requests: those of one connection, and the one that flushes for all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

Job = Callable[[], None]


class Workers:
    """Up to so many threads, each started when a job comes and none of those there is free."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._free = threading.Semaphore(0)
        self._starting = threading.Lock()

    def submit(self, job: Job) -> None:
        """Have a job done; it raises nothing."""
        if not self._free.acquire(blocking=False):
            with self._starting:
                if len(self._threads) < self._most:
                    thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                    self._threads.append(thread)
                    thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            self._free.release()

    def end(self) -> None:
        """Wait until all jobs are done, and end the threads."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()


FlushDone = Callable[[Exception | None], None]


class Flusher:
    """One thread that flushes: all who ask while it is at it share the next flush."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._asked: SimpleQueue[FlushDone | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="nbd-flush", daemon=True)
        self._thread.start()

    def submit(self, done: FlushDone) -> None:
        """Have everything flushed that was written until now; ``done`` gets what went wrong, if it did."""
        self._asked.put(done)

    def _work(self) -> None:
        ends = False
        while not ends:
            found = [self._asked.get()]
            try:
                while True:
                    found.append(self._asked.get_nowait())
            except Empty:
                pass
            waiting = [done for done in found if done is not None]
            ends = len(waiting) < len(found)
            error = self.flush_here() if waiting else None
            for done in waiting:
                done(error)

    def flush_here(self) -> Exception | None:
        """Flush in the calling thread; return what went wrong, if something did."""
        try:
            self._flush()
        except Exception as error:
            return error
        return None

    def end(self) -> None:
        """Wait until all who asked are answered, and end the thread."""
        self._asked.put(None)
        self._thread.join()
