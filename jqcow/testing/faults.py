"""Faults of the host: which call of a device fails, how, and how much of it was done before.

A :class:`FaultPlan` counts the calls of the device that it is put on, from the moment it is put there.
So a test can run once with an empty plan, read ``plan.total``, and then fail one call after another.
"""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from dataclasses import dataclass

CALLS = ("pread", "pwrite", "barrier", "truncate", "allocate", "punch", "is_hole")
"""The calls that a plan counts; ``pread_into`` counts as ``pread``."""

EVERYTHING = sys.maxsize
"""``Fault.applied_bytes``: the request is done in full, and only then the error is raised."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One failing call.

    ``error`` is an errno, or an exception to raise as it is (``KeyboardInterrupt()``, say).
    ``at`` is the number of the failing call, counted from 1: among the calls of kind ``call``, or among
    all calls if ``call`` is None. ``repeats`` makes every matching call from there on fail.
    ``barrier_name`` limits the fault, and the counting, to the barrier of that name.

    ``applied_bytes`` of the request happen before the error is raised. A truncation is done in full
    when the number is not 0. A barrier that raises an ``OSError`` loses the changes since the last
    one; with ``EVERYTHING`` it completes first. Any other exception leaves them in flight.
    """

    error: int | BaseException
    at: int = 1
    call: str | None = None
    applied_bytes: int = 0
    repeats: bool = False
    barrier_name: str | None = None

    def __post_init__(self) -> None:
        if self.call is not None and self.call not in CALLS:
            raise ValueError(f"no such call: {self.call!r}")
        if self.at < 1 or self.applied_bytes < 0:
            raise ValueError("calls are counted from 1, and applied bytes from 0")

    def exception(self) -> BaseException:
        """Return what the call raises."""
        if isinstance(self.error, int):
            return OSError(self.error, os.strerror(self.error))
        return self.error

    def matches(self, call: str, barrier_name: str | None) -> bool:
        """Return True if the fault counts this call."""
        if self.barrier_name is not None:
            return call == "barrier" and barrier_name == self.barrier_name
        return self.call is None or self.call == call


class FaultPlan:
    """What will go wrong on a device. A plan serves one device, once.

    From the call numbered ``full_from`` on (all calls counted, from 1) the disk is full: whatever needs
    new host space raises ``ENOSPC``. ``capacity_bytes`` bounds the host space instead: written and
    reserved sectors count, and punching gives space back. A write that does not fit is short: the part that
    fits is there.
    """

    def __init__(
        self, *faults: Fault, full_from: int | None = None, capacity_bytes: int | None = None
    ) -> None:
        self.faults = faults
        self.full_from = full_from
        self.capacity_bytes = capacity_bytes
        self.calls: Counter[str] = Counter()
        self.fired: list[Fault] = []
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
        return met

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
