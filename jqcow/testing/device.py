"""A device in memory that knows what is durable, what is in flight, and what the next call will break.

The device keeps one view, the one that reads see: the page cache. Beside it stands a history of every
sector that changed since the last completed barrier, from its durable value to the current one. Nothing
else is needed to say what a crash may leave: :mod:`jqcow.testing.crash` picks a value for each sector.

    S1  Bytes past the current size are zero, also in the part of the buffer past it.
    S2  A sector without a history is durable: the disk holds what reads see.
    S3  A history starts with the durable value and ends with the current one.
    S4  A completed barrier ends all histories but those of lost changes, which only a later change
        of the same sector, made durable, can end.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random
from typing import Protocol

from jqcow.device.base import ReadBuffer
from jqcow.testing.changes import Allocate, Change, InFlight, Noted, Punch, Sight, Truncate, Version, Write
from jqcow.testing.faults import EVERYTHING, Fault, FaultPlan, no_space

SECTOR_BYTES = 512
_NOISE = Random("noise").randbytes(4093)
"""Of a length that puts other noise into each sector."""


class DurableState(Protocol):
    """What :meth:`SimulatedDevice.crash` needs to know of a crash state."""

    def content(self) -> bytes:
        """Return the bytes that the crash left."""
        ...

    def data_sectors(self) -> set[int]:
        """Return the indices of the sectors that are not holes."""
        ...

    @property
    def beside(self) -> DurableState | None:
        """What it left of the companion, None where there is none."""
        ...


BarrierListener = Callable[[str, "SimulatedDevice"], None]
ChangeListener = Callable[[str, "SimulatedDevice"], None]


class SimulatedDevice:
    """A :class:`jqcow.device.base.Device` in memory, for images of up to a few MiB.

    ``initial`` is durable at once. ``can_punch`` False models a file system without holes: ``punch``
    returns False. ``can_forget`` False models a cache that shows lost changes for ever. ``has_fixed_size``
    models a block device: it holds as much as ``initial``, and what is given back turns into noise. The
    attributes below may be changed at any time.

    ``faults``             the :class:`FaultPlan` in force, or None
    ``companion``          a second device that shares the fate of this one, see `join`
    ``drop_barriers``      names of barriers that do nothing; they are counted, and listeners hear them
    ``shown_free_bytes``   what ``free_bytes`` tells of the host, None: nothing
    ``barriers``           how often each barrier was called
    ``barrier_listeners``  called as ``listener(name, device)`` before a barrier completes or fails
    ``change_listeners``   called as ``listener(call, device)`` before each call that changes the device

    Calls are serialised by a lock, which is held while a listener runs, but not while a fault delays a
    call. The device raises ``OSError(EBADF)`` when it is closed, or read-only and asked to change.
    """

    def __init__(
        self,
        initial: bytes = b"",
        *,
        sector_bytes: int = SECTOR_BYTES,
        name: str = "simulated",
        read_only: bool = False,
        can_punch: bool = True,
        can_forget: bool = True,
        has_fixed_size: bool = False,
    ) -> None:
        if sector_bytes <= 0:
            raise ValueError("a sector has at least one byte")
        self.name = name
        self.sector_bytes = sector_bytes
        self.can_punch = can_punch
        self.can_forget = can_forget
        self.has_fixed_size = has_fixed_size
        self.closed = False
        self.faults: FaultPlan | None = None
        self.companion: SimulatedDevice | None = None
        self.drop_barriers: set[str] = set()
        self.shown_free_bytes: int | None = None
        self.barriers: Counter[str] = Counter()
        self.barrier_listeners: list[BarrierListener] = []
        self.change_listeners: list[ChangeListener] = []
        self._lock = threading.RLock()
        self._read_only = read_only
        self._zero_sector = bytes(sector_bytes)
        self._size = len(initial)
        self._bytes = bytearray(initial)
        self._pad()
        everything = set(range(len(self._bytes) // sector_bytes))
        self._data = everything
        self._backed = set(everything)
        # By the number of the change that reserved the sector; 0: durably.
        self._reserved: dict[int, int] = {}
        self._folded: dict[int, list[Version]] = {}
        # Changes whose sectors have no history yet: most are durable before anybody asks for one.
        self._noted: list[Noted] = []
        self._sizes: list[tuple[int, int]] = [(0, self._size)]
        self._changes: list[Change] = []
        self._last_change = 0
        self._lost_through = 0
        # Counts how often the numbers of changes started anew.
        self._generation = 0

    # The device protocol: reading

    @property
    def read_only(self) -> bool:
        """True when every changing method raises."""
        return self._read_only

    def size(self) -> int:
        """Return the current length of the device in bytes."""
        with self._lock:
            self._check_open()
            return self._size

    def free_bytes(self) -> int | None:
        """Return ``shown_free_bytes``."""
        return self.shown_free_bytes

    def pread(self, length: int, offset: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset``; what lies past the end reads as zeros."""
        with self._lock:
            _check_range(offset, length)
            self._begin("pread", changes=False)
            found = bytes(self._bytes[offset : offset + length])
            return found + bytes(length - len(found))

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``; what lies past the end reads as zeros."""
        target = memoryview(buffer).cast("B")
        target[:] = self.pread(len(target), offset)

    # The device protocol: changing

    def pwrite(self, buffer: ReadBuffer, offset: int) -> None:
        """Write the whole of ``buffer`` at ``offset``, growing the device where needed, or raise."""
        with self._lock:
            data = bytes(buffer)
            _check_range(offset, len(data))
            fault = self._begin("pwrite")
            for part in self._applied_parts(fault, offset, len(data)):
                length = self._bytes_with_room(part.start, len(part))
                if length:
                    self._write(part.start, data[part.start - offset :][:length])
                if length < len(part):
                    self._strike(fault)
                    raise no_space()
            self._strike(fault)

    def truncate(self, size_bytes: int) -> None:
        """Set the length. Growth reads as zeros; shrinking discards what lay past the new end."""
        with self._lock:
            _check_range(0, size_bytes)
            fault = self._begin("truncate")
            if self.has_fixed_size and size_bytes > self._size:
                raise no_space()
            if not self.has_fixed_size and (fault is None or fault.applied_bytes):
                self._truncate(size_bytes)
            self._strike(fault)

    def allocate(self, offset: int, length: int) -> None:
        """Reserve host space for a range; the device grows to its end. A full disk raises ``ENOSPC``."""
        with self._lock:
            _check_range(offset, length)
            fault = self._begin("allocate")
            for part in self._applied_parts(fault, offset, length):
                if self._bytes_with_room(part.start, len(part)) < len(part):
                    raise no_space()
                if not self.has_fixed_size:
                    self._allocate(part.start, len(part))
            self._strike(fault)

    def punch(self, offset: int, length: int) -> bool:
        """Give a range back to the host; it then reads as zeros. Return False if the host cannot."""
        with self._lock:
            _check_range(offset, length)
            fault = self._begin("punch")
            for part in self._applied_parts(fault, offset, length) if self.can_punch else ():
                if self.has_fixed_size:
                    self._write(part.start, noise(part.start, len(part)))
                else:
                    self._punch(part.start, len(part))
            self._strike(fault)
            return self.can_punch and not self.has_fixed_size

    def barrier(self, name: str) -> None:
        """Make everything changed before this call durable, unless a fault or ``drop_barriers`` forbids.

        What changes while a fault delays the barrier is not covered by it.
        """
        with self._lock:
            self._check_open()
            for listener in list(self.barrier_listeners):
                listener(name, self)
            self.barriers[name] += 1
            fault = self.faults.count("barrier", name) if self.faults is not None else None
            covered = self._generation, self._last_change
            self._wait(fault)
            if fault is not None and fault.applied_bytes != EVERYTHING:
                self._fail_barrier(fault, covered)
            elif name not in self.drop_barriers:
                self._make_durable(covered)
            self._strike(fault)

    def forget_cached(self) -> None:
        """Have reads show what the disk has: what a failed barrier lost is gone. What is pending stays.

        Sizes stay too, for a host keeps them apart from what it caches of the content.
        """
        with self._lock:
            self._check_open()
            if self._lost_through and self.can_forget:
                self._forget_lost()

    def close(self) -> None:
        """Close the device. Makes nothing durable; closing twice is allowed."""
        with self._lock:
            self.closed = True

    def reopen(self, *, read_only: bool = False) -> None:
        """Open the device again, as a program opens a file that it closed: what is in flight stays so."""
        with self._lock:
            self.closed = False
            self._read_only = read_only
        if self.companion is not None:
            self.companion.reopen(read_only=read_only)

    def join(self, companion: SimulatedDevice) -> None:
        """Take a second device along, with barriers of its own: neither makes the other durable.

        The names of barriers that do nothing are those of both.
        """
        self.companion = companion
        companion.drop_barriers = self.drop_barriers

    # The laboratory's side

    @property
    def changes(self) -> tuple[Change, ...]:
        """The changes that a crash may lose, in order: lost ones of failed barriers, then pending ones."""
        with self._lock:
            return tuple(self._changes)

    @property
    def used_bytes(self) -> int:
        """Host space that is taken: written and reserved sectors. ``FaultPlan.capacity_bytes`` bounds it."""
        with self._lock:
            return len(self._backed) * self.sector_bytes

    def is_hole(self, offset: int, length: int) -> bool:
        """Return True if no sector of the range was written since it was punched, cut off or made."""
        with self._lock:
            _check_range(offset, length)
            return self._data.isdisjoint(self._sectors(offset, min(length, max(0, self._size - offset))))

    def content(self) -> bytes:
        """Return what reads see now, also when closed."""
        with self._lock:
            return bytes(self._bytes[: self._size])

    def durable_content(self) -> bytes:
        """Return what is certainly on the disk: the content if none of ``changes`` landed."""
        with self._lock:
            return bytes(self._durable_buffer()[: self._sizes[0][1]])

    def in_flight(self) -> InFlight:
        """Return a snapshot of what is durable and what is not."""
        with self._lock:
            return InFlight(
                sector_bytes=self.sector_bytes,
                durable=bytes(self._durable_buffer()),
                sizes=tuple(self._sizes),
                changes=tuple(self._changes),
                histories={sector: tuple(history) for sector, history in self._histories.items()},
                data_sectors=frozenset(self._data),
            )

    def killed(self) -> SimulatedDevice:
        """Return what the next process finds after SIGKILL: all is readable, what was in flight still is.

        Faults and listeners stay behind; ``drop_barriers`` goes with the new device.
        """
        with self._lock:
            heir = self._successor(self.content(), self._data)
            heir._backed, heir._reserved = set(self._backed), dict(self._reserved)
            heir._folded = {sector: list(history) for sector, history in self._histories.items()}
            heir._sizes = list(self._sizes)
            heir._changes = list(self._changes)
            heir._last_change = self._last_change
            heir._lost_through = self._lost_through
            heir._generation = self._generation
        if self.companion is not None:
            heir.join(self.companion.killed())
        return heir

    def crash(self, state: DurableState) -> SimulatedDevice:
        """Return the device after a power cut that left ``state``: nothing is in flight.

        Faults and listeners stay behind; ``drop_barriers`` goes with the new device. Space that was reserved
        durably stays so.
        """
        heir = self._successor(state.content(), state.data_sectors())
        in_flight = {change.number for change in self._changes}
        heir._reserved = {sector: 0 for sector, number in self._reserved.items() if number not in in_flight}
        heir._backed.update(heir._reserved)
        if self.companion is not None and state.beside is not None:
            heir.join(self.companion.crash(state.beside))
        return heir

    def _successor(self, content: bytes, data_sectors: Iterable[int]) -> SimulatedDevice:
        heir = SimulatedDevice(
            content,
            sector_bytes=self.sector_bytes,
            name=self.name,
            can_punch=self.can_punch,
            can_forget=self.can_forget,
            has_fixed_size=self.has_fixed_size,
        )
        heir.drop_barriers = set(self.drop_barriers)
        heir._data = set(data_sectors)
        heir._backed = set(heir._data)
        return heir

    # Before a call

    def _begin(self, call: str, *, changes: bool = True) -> Fault | None:
        self._check_open()
        if changes:
            if self._read_only:
                raise OSError(errno.EBADF, f"{self.name} is read-only")
            for listener in list(self.change_listeners):
                listener(call, self)
        fault = self.faults.count(call) if self.faults is not None else None
        self._wait(fault)
        if not changes:
            self._strike(fault)
        return fault

    def _wait(self, fault: Fault | None) -> None:
        """Hold a delayed call up, and let others go on meanwhile."""
        if fault is None or fault.wait is None:
            return
        self._lock.release()
        try:
            fault.wait()
        finally:
            self._lock.acquire()
        self._check_open()

    def _strike(self, fault: Fault | None) -> None:
        if fault is not None:
            fault.strike()

    def _applied_parts(self, fault: Fault | None, offset: int, length: int) -> list[range]:
        """Return what of a request happens."""
        if fault is None:
            return [range(offset, offset + length)] if length else []
        return fault.applied_parts(offset, length, self.sector_bytes)

    def _check_open(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, f"{self.name}: {os.strerror(errno.EBADF)}")

    def _bytes_with_room(self, offset: int, length: int) -> int:
        """Return how much of a range, from its start, the host has space for."""
        if self.has_fixed_size:
            return max(0, min(length, self._size - offset))
        if self.faults is None or not length:
            return length
        free = self.faults.free_bytes(self.used_bytes) // self.sector_bytes
        for sector in self._sectors(offset, length):
            if sector in self._backed:
                continue
            if not free:
                return max(0, sector * self.sector_bytes - offset)
            free -= 1
        return length

    # Changes to the current view

    def _write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        sectors = self._sectors(offset, len(data))
        before = self._sight(sectors)
        change = Write(self._next_number(), offset, data)
        self._grow(change.number, end)
        self._bytes[offset:end] = data
        self._data.update(sectors)
        self._backed.update(sectors)
        self._note(change, sectors, before)

    def _punch(self, offset: int, length: int) -> None:
        change = Punch(self._next_number(), offset, length)
        self._zero(offset, min(offset + length, len(self._bytes)), change)

    def _truncate(self, size_bytes: int) -> None:
        change = Truncate(self._next_number(), size_bytes)
        if size_bytes <= self._size:
            self._zero(size_bytes, len(self._bytes), change)
            del self._bytes[size_bytes:]
            self._pad()
            self._set_size(change.number, size_bytes)
        else:
            self._grow(change.number, size_bytes)
            self._changes.append(change)
        self._backed = {sector for sector in self._backed if sector * self.sector_bytes < size_bytes}
        self._give_up_reserved(range(-(-size_bytes // self.sector_bytes), sys.maxsize))

    def _allocate(self, offset: int, length: int) -> None:
        change = Allocate(self._next_number(), offset, length)
        self._grow(change.number, offset + length)
        sectors = self._sectors(offset, length)
        self._reserved = dict.fromkeys(sectors, change.number) | self._reserved
        self._backed.update(sectors)
        self._changes.append(change)

    def _zero(self, start: int, end: int, change: Change) -> None:
        """Zero a range of the buffer; the sectors that lie in it as a whole become holes."""
        length = max(0, end - start)
        sectors = self._sectors(start, length)
        before = self._sight(sectors)
        self._bytes[start : start + length] = bytes(length)
        whole = range(-(-start // self.sector_bytes), (start + length) // self.sector_bytes)
        self._data.difference_update(whole)
        self._backed.difference_update(whole)
        self._give_up_reserved(whole)
        self._note(change, sectors, before)

    def _give_up_reserved(self, sectors: range) -> None:
        for sector in [sector for sector in self._reserved if sector in sectors]:
            del self._reserved[sector]

    def _grow(self, number: int, size_bytes: int) -> None:
        if size_bytes > self._size:
            self._bytes.extend(bytes(max(0, size_bytes - len(self._bytes))))
            self._pad()
            self._set_size(number, size_bytes)

    def _set_size(self, number: int, size_bytes: int) -> None:
        self._size = size_bytes
        self._sizes.append((number, size_bytes))

    def _pad(self) -> None:
        self._bytes.extend(bytes(-len(self._bytes) % self.sector_bytes))

    def _next_number(self) -> int:
        self._last_change += 1
        return self._last_change

    # Histories

    def _sectors(self, offset: int, length: int) -> range:
        if not length:
            return range(0)
        return range(offset // self.sector_bytes, -(-(offset + length) // self.sector_bytes))

    def _sight(self, sectors: range) -> Sight:
        content = self._bytes[sectors.start * self.sector_bytes : sectors.stop * self.sector_bytes]
        return Sight(bytes(content), self._data.intersection(sectors))

    def _note(self, change: Change, sectors: range, before: Sight) -> None:
        self._changes.append(change)
        self._noted.append(Noted(change.number, sectors, before, self._sight(sectors)))

    @property
    def _histories(self) -> dict[int, list[Version]]:
        """What every sector that is not durable was since the last barrier, the durable version first."""
        histories = self._folded
        for noted in self._noted:
            for place, sector in enumerate(noted.sectors):
                if sector not in histories:
                    histories[sector] = [self._version(0, sector, place, noted.before)]
                histories[sector].append(self._version(noted.number, sector, place, noted.after))
        self._noted.clear()
        return histories

    def _version(self, number: int, sector: int, place: int, sight: Sight) -> Version:
        value = sight.content[place * self.sector_bytes : (place + 1) * self.sector_bytes]
        # One shared object for all zero sectors: a pre-written range costs no memory of its own.
        is_zero = not value or value == self._zero_sector
        return Version(number, self._zero_sector if is_zero else value, sector in sight.data_sectors)

    def _durable_buffer(self) -> bytearray:
        durable = bytearray(self._bytes)
        histories = self._histories
        touched_end = (max(histories, default=-1) + 1) * self.sector_bytes
        needed = max(touched_end, *(size for _, size in self._sizes))
        needed += -needed % self.sector_bytes
        durable.extend(bytes(max(0, needed - len(durable))))
        for sector, history in histories.items():
            start = sector * self.sector_bytes
            durable[start : start + self.sector_bytes] = history[0].value
        return durable

    # Barriers

    def _make_durable(self, covered: tuple[int, int]) -> None:
        """End the histories up to ``covered``: a generation of numbers, and the number of a change in it."""
        generation, through = covered
        if generation != self._generation:
            # Another barrier completed meanwhile and left nothing in flight: all that is covered was in it.
            return
        if through == self._last_change and not self._lost_through:
            self._folded.clear()
            self._noted.clear()
        for sector, history in list(self._histories.items()):
            self._settle_sector(sector, history, through)
        self._settle_size(through)
        self._forget_past_the_end()
        self._drop_settled_changes(through)

    def _drop_settled_changes(self, through: int) -> None:
        """Drop the changes up to ``through`` that no sector and no size can be lost by any more."""
        uncertain = {number for number, _ in self._sizes}
        uncertain.update(version.change for history in self._histories.values() for version in history)
        self._changes = [c for c in self._changes if c.number in uncertain or c.number > through]
        if not self._changes:
            self._lost_through = 0
            self._last_change = 0
            self._generation += 1
            self._reserved = dict.fromkeys(self._reserved, 0)

    def _settle_sector(self, sector: int, history: list[Version], through: int) -> None:
        later = [version for version in history if version.change > through]
        newest = history[-1 - len(later)]
        if newest.change <= self._lost_through:
            return
        if later:
            self._histories[sector] = [Version(0, newest.value, newest.is_data), *later]
        else:
            del self._histories[sector]

    def _settle_size(self, through: int) -> None:
        later = [pair for pair in self._sizes if pair[0] > through]
        newest, size_bytes = self._sizes[-1 - len(later)]
        if newest > self._lost_through:
            self._sizes = [(0, size_bytes), *later]
            return
        # Bytes that this barrier made durable cannot lie past the end, whatever became of the lost size.
        pending = (
            c for c in self._changes if isinstance(c, Write) and self._lost_through < c.number <= through
        )
        least = max((change.end for change in pending), default=0)
        sizes = [(number, size if number > through else max(size, least)) for number, size in self._sizes]
        self._sizes = sizes if any(size != self._size for _, size in sizes) else [(0, self._size)]

    def _forget_past_the_end(self) -> None:
        """What lies past a durable end is gone, lost changes included: growth reads as zeros again."""
        if len(self._sizes) == 1:
            past = -(-self._size // self.sector_bytes)
            for sector in [sector for sector in self._histories if sector >= past]:
                del self._histories[sector]

    def _forget_lost(self) -> None:
        for sector, history in list(self._histories.items()):
            start = sector * self.sector_bytes
            if history[-1].change <= self._lost_through and start + self.sector_bytes <= self._size:
                durable = history[0]
                self._bytes[start : start + self.sector_bytes] = durable.value
                (self._data.add if durable.is_data else self._data.discard)(sector)
                del self._histories[sector]
        self._drop_settled_changes(self._lost_through)

    def _fail_barrier(self, fault: Fault, covered: tuple[int, int]) -> None:
        generation, through = covered
        if isinstance(fault.exception(), OSError) and generation == self._generation:
            # The kernel reports a write-back error once and marks the pages clean: later barriers skip them.
            self._lost_through = max(self._lost_through, through)


def noise(offset: int, length: int) -> bytes:
    """Return what a device of fixed size may show where nothing was written."""
    start = offset % len(_NOISE)
    return (_NOISE * ((start + length) // len(_NOISE) + 1))[start : start + length]


def _check_range(offset: int, length: int) -> None:
    if offset < 0 or length < 0:
        raise ValueError(f"negative offset or length: {offset}, {length}")
