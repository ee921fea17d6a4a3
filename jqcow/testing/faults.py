"""Faults of the host: which call of a device goes wrong, how, and how much of it is done.

A :class:`FaultPlan` counts the calls of the device that it is put on, from the moment it is put there.
So a test can run once with an empty plan, read ``plan.total``, and then fail one call after another.
A :class:`jqcow.testing.SimulatedDevice` takes a plan, and so does a :class:`jqcow.testing.FaultyDevice`
around any other device, a real file among them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

CALLS = ("pread", "pwrite", "barrier", "truncate", "allocate", "punch")
"""The calls that a plan counts; ``pread_into`` counts as ``pread``."""

EVERYTHING = sys.maxsize
"""``Fault.applied_bytes``: the request is done in full, and only then the error is raised."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One call that goes wrong. For the common ones see `tear`, `shorten`, `delay` and `drop_barrier`.

    ``error`` is an errno, or an exception to raise as it is (``KeyboardInterrupt()``, say), or None: the
    call reports success, whatever became of it. That is a device that lies.
    ``at`` is the number of the call, counted from 1: among the calls of kind ``call``, or among all calls
    if ``call`` is None. ``repeats`` makes every matching call from there on go wrong.
    ``barrier_name`` limits the fault, and the counting, to the barrier of that name.

    ``applied_bytes`` of the request happen, cut where a sector ends: no fault tears one. Of a write
    ``applied_sectors`` may say instead which sectors happen, counted from 0 at the one it starts in. A
    truncation is done in full when ``applied_bytes`` is not 0, and so is a barrier with ``EVERYTHING``. A
    barrier that raises an ``OSError`` otherwise loses the changes since the last one; one that raises
    another exception, or nothing, leaves them in flight.

    ``wait`` is called, without arguments, before the call takes effect; other threads go on meanwhile.
    """

    error: int | BaseException | None
    at: int = 1
    call: str | None = None
    applied_bytes: int = 0
    repeats: bool = False
    barrier_name: str | None = None
    applied_sectors: frozenset[int] | None = None
    wait: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        if self.call is not None and self.call not in CALLS:
            raise ValueError(f"no such call: {self.call!r}")
        if self.at < 1 or self.applied_bytes < 0:
            raise ValueError("calls are counted from 1, and applied bytes from 0")
        if self.applied_sectors is not None and self.call != "pwrite":
            raise ValueError("only a write is torn by sectors")

    @classmethod
    def tear(
        cls, applied_sectors: Iterable[int], *, at: int = 1, error: int | BaseException | None = errno.EIO
    ) -> Fault:
        """Tear a write: only these of its sectors happen. With ``error=None`` nobody is told."""
        return cls(error, at, "pwrite", applied_sectors=frozenset(applied_sectors))

    @classmethod
    def shorten(
        cls,
        applied_bytes: int,
        *,
        at: int = 1,
        call: str = "pwrite",
        error: int | BaseException | None = errno.EIO,
    ) -> Fault:
        """Do only the first ``applied_bytes`` of a request. With ``error=None`` nobody is told."""
        return cls(error, at, call, applied_bytes)

    @classmethod
    def delay(
        cls,
        wait: Callable[[], object],
        *,
        at: int = 1,
        call: str | None = None,
        barrier_name: str | None = None,
    ) -> Fault:
        """Let a call take effect only once ``wait`` has returned, ``threading.Event.wait`` for example."""
        return cls(None, at, call, EVERYTHING, barrier_name=barrier_name, wait=wait)

    @classmethod
    def drop_barrier(cls, name: str | None = None, *, at: int = 1, repeats: bool = False) -> Fault:
        """Let a barrier report success and make nothing durable: the next one, or the ``at``-th."""
        return cls(None, at, "barrier", repeats=repeats, barrier_name=name)

    def exception(self) -> BaseException | None:
        """Return what the call raises, if anything."""
        if isinstance(self.error, int):
            return OSError(self.error, os.strerror(self.error))
        return self.error

    def strike(self) -> None:
        """Raise what the call raises, if anything."""
        error = self.exception()
        if error is not None:
            raise error

    def matches(self, call: str, barrier_name: str | None) -> bool:
        """Return True if the fault counts this call."""
        if self.barrier_name is not None and (call != "barrier" or barrier_name != self.barrier_name):
            return False
        return self.call is None or self.call == call

    def applied_parts(self, offset: int, length: int, sector_bytes: int) -> list[range]:
        """Return what of a request happens, as ranges of the device that do not touch."""
        end = offset + length
        if self.applied_sectors is None:
            stop = end
            if self.applied_bytes < length:
                stop = offset + self.applied_bytes
                stop = max(offset, stop - stop % sector_bytes)
            return [range(offset, stop)] if stop > offset else []
        first = offset // sector_bytes
        sectors = range(first, -(-end // sector_bytes))
        kept = sorted({first + number for number in self.applied_sectors} & set(sectors))
        edges = [0, *(n for n, (one, next_) in enumerate(pairwise(kept), 1) if next_ != one + 1), len(kept)]
        runs = [kept[start:stop] for start, stop in pairwise(edges) if stop > start]
        return [
            range(max(offset, run[0] * sector_bytes), min(end, (run[-1] + 1) * sector_bytes)) for run in runs
        ]


class FaultPlan:
    """What will go wrong on a device. A plan serves one device, once.

    From the call numbered ``full_from`` on (all calls counted, from 1) the disk is full: whatever needs
    new host space raises ``ENOSPC``. ``capacity_bytes`` bounds the host space instead: written and
    reserved sectors count, and punching gives space back. A write that does not fit is short: the part that
    fits is there.

    ``fired`` are the faults that were met, in order, and ``fired_calls`` the kinds of the calls that met
    them.
    """

    def __init__(
        self, *faults: Fault, full_from: int | None = None, capacity_bytes: int | None = None
    ) -> None:
        self.faults = faults
        self.full_from = full_from
        self.capacity_bytes = capacity_bytes
        self.calls: Counter[str] = Counter()
        self.fired: list[Fault] = []
        self.fired_calls: list[str] = []
        self._matched = [0] * len(faults)

    @property
    def total(self) -> int:
        """How many calls the plan has counted."""
        return self.calls.total()

    def count(self, call: str, barrier_name: str | None = None) -> Fault | None:
        """Count one call; return the fault that it meets, if any."""
        self.calls[call] += 1
        met = None
        for position, fault in enumerate(self.faults):
            if not fault.matches(call, barrier_name):
                continue
            self._matched[position] += 1
            number = self._matched[position]
            if met is None and (number == fault.at or (fault.repeats and number > fault.at)):
                met = fault
        if met is not None:
            self.fired.append(met)
            self.fired_calls.append(call)
        return met

    @property
    def lost_changes(self) -> bool:
        """True if a barrier failed and lost what was in flight, as far as the caller can know."""
        return any(
            call == "barrier" and isinstance(fault.exception(), OSError)
            for fault, call in zip(self.fired, self.fired_calls, strict=True)
        )

    def free_bytes(self, used_bytes: int) -> int:
        """Return how much more host space may be taken, given what is taken now."""
        if self.full_from is not None and self.total >= self.full_from:
            return 0
        if self.capacity_bytes is None:
            return sys.maxsize
        return max(0, self.capacity_bytes - used_bytes)


def no_space() -> OSError:
    """Return the error of a full disk."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
