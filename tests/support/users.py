"""Images on a simulated device, and those who use them.

A `Session` is a user of one image: whatever it asks of the image it also tells the `Expectation`, which a
judge later holds against a crashed device. A `Draft` is a transaction of a session.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from random import Random
from typing import Any, Unpack

import jqcow
from jqcow.errors import PoisonedError, UnsupportedFeatureError
from jqcow.image.entering import SmallWrites
from jqcow.image.transaction import Savepoint, Transaction
from jqcow.ondisk.encryption import Encryption
from jqcow.ondisk.form import FormOptions, Preallocation
from jqcow.ondisk.naming import NamedFile
from jqcow.ondisk.root import is_live
from jqcow.testing import SECTOR_BYTES, FaultPlan, SimulatedDevice
from tests.support import inside
from tests.support.below import find_below
from tests.support.encrypted import PASSPHRASE, encryption
from tests.support.expectation import (
    AllNoted,
    AllTaken,
    Expectation,
    Noted,
    State,
    Taken,
    Windows,
    form_of,
    settled,
)
from tests.support.operations import Discard, Disk, PackedWrite, Request, Write, WriteZeroes

JOURNAL_BYTES = 64 << 10
NOISE = (0, 0, 2, 0, 5, 8)
"""Of eight sectors of compressed writes, in turn: how many do not compress."""
DATE = datetime(2024, 2, 29, tzinfo=UTC)
"""Of all snapshots: a run is the same every time."""


def salts_of(device: SimulatedDevice) -> Callable[[], bytes]:
    """Return a maker of salts that differ with the content of the device, and are the same on every run."""

    def new_salt() -> bytes:
        # Sector 0 and the root copy hold the salts before; the counts tell attempts on one root apart.
        seen = (device.size(), len(device.changes), device.barriers.total())
        # Where nothing is given back the frames of earlier journals tell, too: they must not come to life.
        known = device.content() if device.has_fixed_size else device.content()[:8192]
        return blake2b(repr(seen).encode() + known, digest_size=16).digest()

    return new_salt


class Interrupt(BaseException):
    """What KeyboardInterrupt is to a user."""


def create_simulated(
    device: SimulatedDevice,
    size_bytes: int,
    cluster_bytes: int,
    encryption: Encryption | None = None,
    **options: Unpack[FormOptions],
) -> jqcow.Image:
    """Create an image on an empty device, with salts that a replay meets again."""
    options["cluster_size"] = cluster_bytes
    if "data_file" in options:
        device.join(SimulatedDevice(name="beside"))
    return jqcow.create_on_device(
        device,
        size_bytes,
        journal_size=JOURNAL_BYTES,
        new_salt=salts_of(device),
        encryption=encryption,
        data_device=device.companion,
        **options,
    )


def in_place(image: jqcow.Image) -> jqcow.Image:
    """Have small writes of an image go the ordinary way, and return it."""
    image._guest.writes.small = None
    return image


def open_simulated(
    device: SimulatedDevice,
    mode: jqcow.image.Mode = "r+",
    snapshot: str | None = None,
    *,
    journal_bytes: int = JOURNAL_BYTES,
    small_writes: SmallWrites = "in-place",
    backing: Callable[[NamedFile], Any] = find_below,
) -> jqcow.Image:
    """Open the image on a device, closed before or not, with salts that a replay meets again."""
    device.reopen()
    return jqcow.open_device(
        device,
        mode,
        journal_size=journal_bytes,
        new_salt=salts_of(device),
        snapshot=snapshot,
        small_writes=small_writes,
        backing=backing,
        # What is not encrypted needs none.
        passphrase=PASSPHRASE,
        data_file=lambda _: beside(device),
    )


def beside(device: SimulatedDevice) -> SimulatedDevice:
    """Return the device of the data file of the image on a device."""
    if device.companion is None:
        raise RuntimeError("the image has no data file")
    return device.companion


class User(ABC):
    """Who changes a disk through windows, at positions in the model. What is not on the disk is left out."""

    session: Session
    state: State
    """The disk as this user must see it."""

    @abstractmethod
    def _do(self, request: Request, position: int) -> None:
        """Do a request, which begins at a position, and expect what it asks for."""

    @abstractmethod
    def _change(self, act: Callable[[Disk], object], change: Callable[[State], None]) -> None:
        """Do what changes all at once. Where a refcount would not fit nothing happens."""

    @property
    def snapshots(self) -> AllTaken:
        """Those of the disk now."""
        return self.state.snapshots

    def _guest(self, position: int, length: int) -> tuple[int, int]:
        """Return the guest offset of a range, and how much of it lies in its window and on the disk."""
        state = self.state
        return state.windows.guest(position), state.windows.clip(position, length, state.size_bytes)

    def write(self, position: int, length: int, *, fua: bool = False) -> None:
        """Write bytes that no sector ever held before."""
        guest, length = self._guest(position, length)
        if length:
            self._do(Write(guest, self.session.fresh_data(length, position), fua), position)

    def write_compressed(self, position: int, length: int, noise: int | None = None) -> None:
        """Write whole clusters compressed, those that a range touches. ``noise``: see `packable_data`.

        In an encrypted image, and over a data file, which have none, it is any write.
        """
        if self.state.windows.encrypted or self.state.windows.data_file:
            self.write(position, length)
            return
        cluster_bytes, end = self.state.windows.cluster_bytes, position + length
        position -= position % cluster_bytes
        guest, length = self._guest(position, -(-(end - position) // cluster_bytes) * cluster_bytes)
        if length:
            self._do(PackedWrite(guest, self.session.packable_data(length, position, noise)), position)

    def write_zeroes(self, position: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros."""
        guest, length = self._guest(position, length)
        if length:
            self._do(WriteZeroes(guest, length, unmap), position)

    def discard(self, position: int, length: int) -> None:
        """Discard a range: its whole clusters, or subclusters, read as zeros, the rest is as it was."""
        guest, length = self._guest(position, length)
        if length:
            self._do(Discard(guest, length), position)

    def _results(self, request: Request, position: int) -> Iterator[tuple[int, bytes]]:
        """Yield what a request that begins at a position leaves in the model: (position, bytes)."""
        windows = self.state.windows
        offset, data = request.result(windows.unit_bytes, self.state.size_bytes)
        if not isinstance(request, Discard):
            yield position + offset - windows.guest(position), data
            return
        for start in range(offset, offset + len(data), windows.unit_bytes):
            length = min(windows.unit_bytes, offset + len(data) - start)
            if not inside.cannot_hide(self.session.live, start, length):
                yield position + start - windows.guest(position), bytes(length)

    def resize(self, size_bytes: int) -> None:
        """Set the size of the disk. A resize that fails leaves it as it was."""
        self._change(lambda disk: disk.resize(size_bytes), lambda state: state.resize(size_bytes))

    def preallocate(self, size_bytes: int, preallocation: Preallocation) -> None:
        """Make the disk larger, what is added preallocated: a transaction of its own, or part of one."""
        if size_bytes > self.state.size_bytes:
            self._change(
                lambda disk: disk.resize(size_bytes, preallocation), lambda state: state.resize(size_bytes)
            )

    def create_snapshot(self) -> None:
        """Keep the disk as it is now."""
        name = self.session.fresh_name()
        self._change(lambda disk: disk.create_snapshot(name, DATE), lambda state: state.keep(name))

    def apply_snapshot(self, number: int) -> None:
        """Make the disk what one of the snapshots holds, if there is one."""
        taken = self._taken(number)
        if taken is not None:
            name = taken.name
            self._change(lambda disk: disk.apply_snapshot(name), lambda state: state.go_back(taken))

    def delete_snapshot(self, number: int) -> None:
        """Give up one of the snapshots, if there is one."""
        taken = self._taken(number)
        if taken is not None:
            name = taken.name
            self._change(lambda disk: disk.delete_snapshot(name), lambda state: state.give_up(taken))

    @property
    def bitmaps(self) -> AllNoted:
        """Those of the disk now."""
        return self.state.bitmaps

    def add_bitmap(self, granularity: int) -> None:
        """Add a bitmap that takes note of changes."""
        name = self.session.fresh_name()
        self._change(lambda disk: disk.bitmaps.add(name, granularity), lambda state: state.add_bitmap(name))

    def remove_bitmap(self, number: int) -> None:
        """Remove one of the bitmaps, if there is one."""
        for noted in self._noted(number):
            name = noted.name
            self._change(
                lambda disk, name=name: disk.bitmaps.remove(name),
                lambda state, noted=noted: state.change_bitmap(noted, None),
            )

    def clear_bitmap(self, number: int) -> None:
        """Make everything clean in one of them."""
        for noted in self._noted(number):
            name = noted.name

            def clear(state: State, noted: Noted = noted) -> None:
                sectors = settled(state.sectors) if noted.is_enabled else None
                state.change_bitmap(noted, replace(noted, sectors=sectors))

            self._change(lambda disk, name=name: disk.bitmaps.clear(name), clear)

    def enable_bitmap(self, number: int, *, enabled: bool) -> None:
        """Have one of them take note of changes, or not: what it said before is no promise then."""
        for noted in self._noted(number):
            name, sectors = noted.name, noted.sectors if enabled else None
            new = Noted(name, enabled, sectors)
            self._change(
                lambda disk, name=name: (disk.bitmaps.enable if enabled else disk.bitmaps.disable)(name),
                lambda state, noted=noted, new=new: state.change_bitmap(noted, new),
            )

    def rename_bitmap(self, number: int) -> None:
        """Give one of them another name."""
        for noted in self._noted(number):
            name, new_name = noted.name, self.session.fresh_name()
            new = replace(noted, name=new_name)
            self._change(
                lambda disk, name=name, new_name=new_name: disk.bitmaps.rename(name, new_name),
                lambda state, noted=noted, new=new: state.change_bitmap(noted, new),
            )

    def merge_bitmap(self, number: int) -> None:
        """Make dirty in one of them what is dirty in the next."""
        for noted, other in zip(self._noted(number), self._noted(number + 1), strict=True):
            names = noted.name, other.name
            self._change(lambda disk, names=names: disk.bitmaps.merge(*names), lambda state: None)

    def _noted(self, number: int) -> AllNoted:
        """Return one of the bitmaps, counted from zero as often as it takes; none if there is none."""
        there = self.bitmaps
        return (there[number % len(there)],) if there else ()

    def _taken(self, number: int) -> Taken | None:
        """Return one of the snapshots, counted from zero as often as it takes; None if there is none."""
        there = self.snapshots
        return there[number % len(there)] if there else None

    @abstractmethod
    def look(self) -> None:
        """What is read now is what was asked for."""


@dataclass(frozen=True, eq=False)
class DraftPoint:
    """A state of a draft to go back to; it stays as it is."""

    savepoint: Savepoint
    state: State


class Draft(User):
    """A transaction of a `Session`: what it asks for, and what it expects to read."""

    def __init__(self, session: Session, transaction: Transaction) -> None:
        """Start with what the session expects of its image."""
        self.session = session
        self.transaction = transaction
        self.state = session.state.copy()

    def _do(self, request: Request, position: int) -> None:
        with ExitStack() as changes:
            for place, data in self._results(request, position):
                changes.enter_context(self.state.sectors.write(place, data))
            request.on(self.transaction)

    def _change(self, act: Callable[[Disk], object], change: Callable[[State], None]) -> None:
        with suppress(UnsupportedFeatureError):
            act(self.transaction)
            change(self.state)

    def savepoint(self) -> DraftPoint:
        """Return a state to go back to."""
        return DraftPoint(self.transaction.savepoint(), self.state.copy())

    def return_to(self, point: DraftPoint) -> None:
        """Go back to a state; it stays valid."""
        point.savepoint.rollback()
        self.state = point.state.copy()

    def rollback(self) -> None:
        """Undo all, and end."""
        self.transaction.rollback()

    def look(self) -> None:
        """The transaction reads its own state; everyone else the last committed one."""
        wrong = self.state.expect_now(self.transaction)
        assert not wrong, f"the transaction reads something else: {wrong[0]}"
        self.session.look()


@dataclass
class Session(User):
    """One user of the image on ``device``.

    ``written`` counts the writes, so that no two write the same bytes; users of one image start it far apart.
    ``faults_seen`` counts the errors that reached the user.
    """

    device: SimulatedDevice
    expectation: Expectation
    image: jqcow.Image | None = None
    faults_seen: int = 0
    written: int = 0
    journal_bytes: int = JOURNAL_BYTES
    small_writes: SmallWrites = "in-place"
    _was_killed: bool = False

    # Coming and going

    def create(self, size_bytes: int) -> None:
        """Create the image on the empty device."""
        windows = self.expectation.windows
        how = encryption() if windows.encrypted else None
        self.image = create_simulated(
            self.device, size_bytes, windows.cluster_bytes, encryption=how, **windows.options
        )
        if self.small_writes == "in-place":
            in_place(self.image)
        self.expectation.exists = True

    def new_image(self) -> jqcow.Image:
        """Return the image, opened for writing."""
        return open_simulated(self.device, journal_bytes=self.journal_bytes, small_writes=self.small_writes)

    def open(self) -> None:
        """Open for writing; a live image is recovered."""
        self.image = self.new_image()
        self.expectation.damaged = False
        if self.expectation.forms and self.device.can_forget:
            self.expectation.forms = (form_of(inside.header_of(self.image).header),)
        if self._was_killed or self.expectation.rival is not None:
            violations = self.expectation.check(self.image)
            assert not violations, f"a killed writer left something else: {violations[0]}"
            self.expectation.observe(self.image)
            if self.device.can_forget:
                self.expectation.hold_to(self.image)
            self._was_killed = False

    def close(self) -> None:
        """Close: a promise like a flush, and for every byte of the file."""
        image = self.live
        with self._promise():
            image.close()
        assert not is_live(self.device.content()[:SECTOR_BYTES]), "a closed image is not standard qcow2"
        self.expectation.closed = None if self.expectation.lost else self.device.content()
        self.image = None

    def kill(self) -> None:
        """The process is gone: what it wrote is readable and no more durable than before."""
        self.image = None
        self._was_killed = True

    @property
    def live(self) -> jqcow.Image:
        """The open image."""
        if self.image is None:
            raise RuntimeError("the session has no open image")
        return self.image

    # Requests

    @property
    def session(self) -> Session:  # type: ignore[override]
        """The session itself."""
        return self

    @property
    def windows(self) -> Windows:
        """The parts of the disk that are used."""
        return self.expectation.windows

    @property
    def state(self) -> State:  # type: ignore[override]
        """What is expected of the image, with the size that it has."""
        return replace(self.expectation.state, size_bytes=self.live.size)

    def _do(self, request: Request, position: int) -> None:
        durable = isinstance(request, Write) and request.fua
        self.expectation.closed = None
        with ExitStack() as changes:
            for place, data in self._results(request, position):
                changes.enter_context(self.expectation.change(place, data, durable=durable))
            request.on(self.live)
        if durable:
            # The flush in it covers all, as any flush.
            self.flush()

    def resize(self, size_bytes: int) -> None:
        """Set the size of the disk: a larger one with the next flush, a smaller one at once and durably."""
        if size_bytes < self.live.size:
            super().resize(size_bytes)
            return
        before = self.expectation.sizes
        self.expectation.closed = None
        self.expectation.sizes = (size_bytes, *before)
        self.live.resize(size_bytes)
        self.expectation.sizes = (*before, size_bytes)

    def change_at_once(self, act: Callable[[Disk], object], change: Callable[[State], None]) -> None:
        """Do what is a transaction of its own; ``change`` is what the disk is then."""
        self._change(act, change)

    def _change(self, act: Callable[[Disk], object], change: Callable[[State], None]) -> None:
        """Do what is a transaction of its own.

        What was written before becomes durable first, or with it; a crash may show it without.
        """
        if self.expectation.rival is not None:
            # One commit at a time can be in doubt.
            self.flush()
        self.expectation.closed = None
        state = self.state.copy()
        change(state)
        self.expectation.rival = state.settled()
        try:
            act(self.live)
        except UnsupportedFeatureError:
            # The transaction was undone, and never logged.
            self.expectation.rival = None
            return
        self.expectation.adopt_rival()

    def flush(self) -> None:
        """Flush: what was asked before is promised now."""
        with self._promise():
            self.live.flush()

    def checkpoint(self) -> None:
        """Flush and bring everything home."""
        with self._promise():
            self.live.checkpoint()

    @contextmanager
    def _promise(self) -> Iterator[None]:
        size = self.live.size
        with self.expectation.sectors.flush():
            yield
        self.expectation.sizes, self.expectation.rival = (size,), None

    @contextmanager
    def transaction(self) -> Iterator[Draft]:
        """Open a transaction; at the end of the body it is committed, unless it was rolled back.

        Entering is a promise like a flush. A commit that fails is in doubt until the next flush: a crash may
        bring it back, whole.
        """
        self.expectation.closed = None
        manager = self.live.transaction()
        with self._promise():
            transaction = manager.__enter__()
        draft = Draft(self, transaction)
        try:
            yield draft
        except BaseException as error:
            assert not manager.__exit__(type(error), error, error.__traceback__)
            raise
        if self.image is None:
            # Killed within: nothing of the process goes on, its locks are gone with it.
            return
        if transaction.is_open:
            self.expectation.rival = draft.state.settled()
        manager.__exit__(None, None, None)
        self.expectation.adopt_rival()

    # Errors of the host

    @contextmanager
    def faults(self, plan: FaultPlan) -> Iterator[None]:
        """Let the host fail meanwhile. An error of the host ends the body; the session then goes on.

        After a failed barrier the image must refuse every change and read as before; the next process
        recovers it.
        """
        devices = [self.device] if self.device.companion is None else [self.device, self.device.companion]
        for device in devices:
            device.faults = plan
        try:
            yield
        except OSError:
            self.faults_seen += 1
        finally:
            for device in devices:
                device.faults = None
        if self.image is not None and self.image.closed:
            # What a failed close did not make durable is as if the process had been killed.
            self.kill()
        if plan.lost_changes or self.is_poisoned:
            self.recover_from_poison()
        self.look()

    @property
    def is_poisoned(self) -> bool:
        """True if the open image turned read-only."""
        return self.image is not None and inside.is_poisoned(self.image)

    def recover_from_poison(self) -> None:
        """After a failed barrier: no change is accepted, reading works, and the next opening recovers.

        An image in doubt accepts nothing at all.
        """
        if self.image is not None and self._accepts_changes():
            # It claims that nothing was lost: its flush is a promise, and a crash will tell.
            return
        if self.image is not None:
            if not inside.is_in_doubt(self.image):
                self.look()
            self.image.close()
        self.image, self._was_killed = None, False
        self.expectation.forget_order()
        self.open()
        # What a failed barrier lost may have been a growth: the disk has any size that was possible.
        sizes, size = self.expectation.sizes, self.live.size
        assert size in sizes, "the disk has a size that nobody asked for"
        self.expectation.sizes = (*sizes, size)
        if self.device.can_forget:
            violations = self.expectation.check(self.live)
            assert not violations, f"a failed barrier left something else: {violations[0]}"
            self.expectation.hold_to(self.live)

    def _accepts_changes(self) -> bool:
        """Ask for what a poisoned image must refuse. Returns True if it does not."""
        try:
            self.flush()
            self.write(0, SECTOR_BYTES)
        except PoisonedError:
            return False
        return True

    def look(self) -> None:
        """The running image reads as asked for, and its refcounts are exact."""
        if self.image is None:
            self.open()
        violations = self.expectation.expect_now(self.live)
        assert not violations, f"the running image is wrong: {violations[0]}"
        report = self.live.check()
        assert report.ok, f"the running image is inconsistent: {report.findings[0]}"

    # What no other write has

    def fresh_name(self) -> str:
        """Return a name that no other snapshot has."""
        self.written += 1
        return f"snapshot-{self.written}"

    def fresh_data(self, length: int, position: int) -> bytes:
        """Return bytes for a write at a position that no other write has."""
        self.written += 1
        words = []
        for sector in range(position // SECTOR_BYTES, (position + length - 1) // SECTOR_BYTES + 1):
            words.append(((self.written << 32) | (sector << 1) | 1).to_bytes(8, "big") * (SECTOR_BYTES // 8))
        start = position % SECTOR_BYTES
        return b"".join(words)[start : start + length]

    def packable_data(self, length: int, position: int, noise: int | None = None) -> bytes:
        """Return `fresh_data` of whole sectors: ``noise`` of eight do not compress; None: some, or none."""
        data = bytearray(self.fresh_data(length, position))
        noise = NOISE[self.written % len(NOISE)] if noise is None else noise
        for start in range(0, length, SECTOR_BYTES):
            if (position + start) // SECTOR_BYTES % 8 < noise:
                random = Random(f"{self.written} {position + start}")
                data[start : start + SECTOR_BYTES] = random.randbytes(SECTOR_BYTES)
        return bytes(data)
