"""What requests that cross each other may leave: in a read, on the disk, in a snapshot, after a crash.

A sector is a register. What is found in it, at a moment between two ticks, must be the result of a read in
some order of the calls (linear.py). A crash shows what the sector held at some moment since the newest flush
that was acknowledged began. What a read returned meanwhile does not count there: a flush is for the writes
that had returned before it, and not for all that could be seen.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.threads.linear import Call, is_linearisable

SECTOR = 512
TOKEN_BYTES = 8
ZERO = bytes(TOKEN_BYTES)


class Broken(AssertionError):
    """What was found is in no order of the calls."""


@dataclass
class Change:
    """Writes that one call asks for: a value for each sector.

    ``whole``: they happen together, and are durable once the call has returned.
    """

    values: dict[int, bytes]
    began: int
    returned: int | None = None
    whole: bool = False

    def returned_before(self, tick: int) -> bool:
        return self.returned is not None and self.returned < tick


@dataclass
class Taking:
    """A snapshot that is being made, or was; it may be deleted too."""

    began: int
    returned: int | None = None
    is_leaving: bool = False
    is_gone: bool = False


@dataclass
class Record:
    """The calls so far. All of them are told here, by one thread at a time."""

    changes: list[Change] = field(default_factory=list)
    reads: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))
    takings: dict[str, Taking] = field(default_factory=dict)
    flushed_from: int = 0
    _ticks: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def now(self) -> int:
        """Return the next tick."""
        return next(self._ticks)

    @contextmanager
    def changing(self, values: dict[int, bytes], *, whole: bool = False) -> Iterator[None]:
        """Wrap a call that writes."""
        change = Change(values, self.now(), whole=whole)
        self.changes.append(change)
        yield
        change.returned = self.now()
        if whole:
            self._flushed(change.began)

    @contextmanager
    def flushing(self) -> Iterator[None]:
        """Wrap a call that makes all durable that had returned before."""
        began = self.now()
        yield
        self._flushed(began)

    @contextmanager
    def taking(self, name: str) -> Iterator[None]:
        """Wrap a call that makes a snapshot."""
        self.takings[name] = taking = Taking(self.now())
        yield
        taking.returned = self.now()
        self._flushed(taking.began)

    @contextmanager
    def deleting(self, name: str) -> Iterator[None]:
        """Wrap a call that deletes a snapshot."""
        taking, began = self.takings[name], self.now()
        taking.is_leaving = True
        yield
        taking.is_gone = True
        self._flushed(began)

    def was_read(self, first: int, data: bytes, began: int) -> None:
        """Note what a read returned that began at a tick."""
        returned = self.now()
        for sector, value in enumerate(values_of(data), first):
            self.reads[sector].append(Call(False, value, began, returned))

    def _flushed(self, began: int) -> None:
        self.flushed_from = max(self.flushed_from, began)

    def writes(self, sector: int) -> list[Call]:
        """Return the calls that write a sector."""
        return [
            Call(True, change.values[sector], change.began, change.returned)
            for change in self.changes
            if sector in change.values
        ]

    def calls(self, sector: int) -> list[Call]:
        """Return all calls on a sector."""
        return self.writes(sector) + self.reads[sector]

    def judge_reads(self, sectors: range) -> None:
        """Raise Broken unless the calls of each sector have an order."""
        for sector in sectors:
            if not is_linearisable(self.calls(sector), ZERO):
                raise Broken(f"sector {sector}: no order of {self.calls(sector)}")


class Window(NamedTuple):
    """From which tick until which one a sector may have held what is found in it.

    Atomic changes that returned before ``shows_before`` must be there. ``counts_reads``: what reads returned
    counts, too.
    """

    since: int
    until: int
    shows_before: int
    counts_reads: bool = True


class Judgement:
    """What may be found at one moment; many crashes at this moment are judged by one."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.moment = record.now()
        self._known: dict[tuple[int, bytes, Window], bool] = {}

    def judge_disk(self, data: bytes, *, crashed: bool) -> None:
        """Judge the whole disk, as it is or as a crash left it."""
        since = self.record.flushed_from if crashed else self.moment
        self._judge(values_of(data), Window(since, self.moment, self.moment, not crashed))

    def judge_snapshots(self, found: dict[str, bytes]) -> None:
        """Judge which snapshots there are, and what they hold."""
        for name, taking in self.record.takings.items():
            if name in found:
                if taking.is_gone:
                    raise Broken(f"snapshot {name} is back")
                until = taking.returned or self.moment
                self._judge(values_of(found[name]), Window(taking.began, until, taking.began))
            elif taking.returned is not None and not taking.is_leaving:
                raise Broken(f"snapshot {name} is lost")
        if not found.keys() <= self.record.takings.keys():
            raise Broken("a snapshot that nobody made")

    def _judge(self, values: list[bytes], window: Window) -> None:
        for sector, value in enumerate(values):
            if not self._may_hold(sector, value, window):
                raise Broken(f"sector {sector} holds {value!r} in {window}: {self.record.calls(sector)}")
        for change in self.record.changes:
            if change.whole:
                self._judge_whole(change, values, must_show=change.returned_before(window.shows_before))

    def _judge_whole(self, change: Change, values: list[bytes], *, must_show: bool) -> None:
        """All of an atomic change is there, or has been written over, if any of it is."""
        shows = any(value != ZERO and values[sector] == value for sector, value in change.values.items())
        if not shows and not must_show:
            return
        for sector in change.values:
            if self._is_older(sector, values[sector], change):
                raise Broken(f"sector {sector} holds {values[sector].hex()}, and is older than {change}")

    def _may_hold(self, sector: int, value: bytes, window: Window) -> bool:
        key = sector, value, window
        if key not in self._known:
            calls = self.record.calls(sector) if window.counts_reads else self.record.writes(sector)
            calls.append(Call(False, value, window.since, window.until))
            self._known[key] = is_linearisable(calls, ZERO)
        return self._known[key]

    def _is_older(self, sector: int, value: bytes, change: Change) -> bool:
        writers = [other for other in self.record.changes if other.values.get(sector) == value]
        return all(other.returned_before(change.began) for other in writers)


def values_of(data: bytes) -> list[bytes]:
    """Return the value that each sector is filled with."""
    values = []
    for start in range(0, len(data), SECTOR):
        sector = data[start : start + SECTOR]
        value = sector[:TOKEN_BYTES]
        if sector != value * (SECTOR // TOKEN_BYTES):
            raise Broken(f"the sector at {start} of {len(data)} bytes is torn")
        values.append(value)
    return values


def filled(value: bytes, sectors: int) -> bytes:
    """Return sectors filled with a value."""
    return value * (sectors * SECTOR // TOKEN_BYTES)
