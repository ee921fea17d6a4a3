"""How many barriers a flush costs when threads flush one image: counted by strace on the real process."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from tools.benchmark.barriers import NOT_SYNCS, read_trace, run_traced

SHARE_MAX = 0.3


@dataclass(frozen=True)
class Share:
    """Sync-like calls made during the flushes of all threads together."""

    threads: int
    flushes: int
    sync_calls: int

    @property
    def per_flush(self) -> float:
        """Sync-like calls for each flush; 1 without sharing, 1 / threads at best."""
        return self.sync_calls / self.flushes

    @property
    def kept(self) -> bool:
        """True if the promise for 8 threads is kept."""
        return self.per_flush <= SHARE_MAX

    def format_table(self) -> str:
        """Return the counts for people."""
        return (
            f"{self.threads} threads made {self.flushes} flushes, each after one allocating write:\n"
            f"{self.sync_calls} sync-like calls, {self.per_flush:.3f} for each flush"
        )


def count_shared(folder: Path, threads: int, flushes: int) -> Share:
    """Let threads flush one image in ``folder``, together ``flushes`` times, and count.

    Raises:
        subprocess.CalledProcessError: strace, or what it traced, failed.
    """
    image, trace = folder / "threads.qcow2", folder / "threads.trace"
    each = max(1, flushes // threads)
    command = [sys.executable, "-m", "tools.benchmark.flushers", str(image), str(threads), str(each)]
    run_traced(trace, command)
    calls = list(read_trace(trace))
    trace.unlink()
    image.unlink()
    start, stop = (position for position, call in enumerate(calls) if call == "mark")
    return Share(threads, threads * each, sum(call not in NOT_SYNCS for call in calls[start:stop]))
