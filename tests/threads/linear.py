"""Are the results of concurrent calls those of some order of the calls, one after the other?

A history records when each call began and when it returned. It is *linearisable* if each call can be put at
one moment between the two so that every read returns the last value written before. A disk promises that for
each sector; sectors are independent registers, so each is judged alone.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Call:
    """A read or write of one register, from tick ``began`` to tick ``returned``; None: it never returned."""

    is_write: bool
    value: bytes
    began: int
    returned: int | None


class History:
    """The calls of many threads on many registers."""

    def __init__(self) -> None:
        self._ticks = itertools.count(1)
        self._lock = threading.Lock()
        self.calls: dict[int, list[Call]] = defaultdict(list)

    def write(
        self, registers: Iterable[int], values: Iterable[bytes], function: Callable[[], object]
    ) -> None:
        """Call ``function``, which writes ``values`` to ``registers``."""
        began = next(self._ticks)
        returned: int | None = None
        try:
            function()
            returned = next(self._ticks)
        finally:
            self._record(True, registers, values, began, returned)

    def read(self, registers: Iterable[int], function: Callable[[], list[bytes]]) -> list[bytes]:
        """Call ``function``, which returns what it read from ``registers``."""
        began = next(self._ticks)
        values = function()
        self._record(False, registers, values, began, next(self._ticks))
        return values

    def _record(
        self,
        is_write: bool,
        registers: Iterable[int],
        values: Iterable[bytes],
        began: int,
        returned: int | None,
    ) -> None:
        with self._lock:
            for register, value in zip(registers, values, strict=True):
                self.calls[register].append(Call(is_write, value, began, returned))

    @property
    def call_count(self) -> int:
        return sum(map(len, self.calls.values()))

    def violations(self, initial: bytes) -> list[int]:
        """Return the registers whose history is not linearisable."""
        return [register for register, calls in self.calls.items() if not is_linearisable(calls, initial)]


def is_linearisable(calls: list[Call], initial: bytes) -> bool:
    """Search an order, after Wing and Gong: try each call that no other one must precede, then the rest.

    What is left to try depends on the calls that are placed and on the value only: no pair is tried twice.
    """
    calls = sorted(calls, key=lambda call: call.began)
    never = len(calls) * 2 + max((call.returned or 0 for call in calls), default=0) + 1
    ends = [call.returned if call.returned is not None else never for call in calls]
    must = sum(1 << index for index, call in enumerate(calls) if call.returned is not None)
    todo = [(0, initial)]
    seen = set(todo)
    while todo:
        placed, value = todo.pop()
        if placed & must == must:
            return True
        deadline = never + 1
        for index, call in enumerate(calls):
            if placed >> index & 1:
                continue
            if call.began > deadline:
                # Sorted by beginning: from here on every call began after one returned that is not placed.
                break
            deadline = min(deadline, ends[index])
            if call.is_write or call.value == value:
                state = (placed | 1 << index, call.value)
                if state not in seen:
                    seen.add(state)
                    todo.append(state)
    return False
