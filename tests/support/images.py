"""Images on a simulated device, and what a crash may leave of them.

A `Session` is a user of one image: whatever it asks of the image it also tells the `Expectation`, which a
judge later holds against a crashed device. The disk is seen through *windows*: ranges that lie an L2 table's
reach apart, so that a small model meets many tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b

import jqcow
from jqcow.errors import PoisonedError
from jqcow.ondisk.root import is_live
from jqcow.testing import FaultPlan, SectorModel, SimulatedDevice
from jqcow.transaction import Savepoint, Transaction

SECTOR_BYTES = 512
JOURNAL_BYTES = 64 << 10
WINDOW_CLUSTERS = {512: 16, 1024: 16, 4096: 8, 8192: 8, 65536: 3}


def salts_of(device: SimulatedDevice) -> Callable[[], bytes]:
    """Return a maker of salts that differ with the content of the device, and are the same on every run."""

    def new_salt() -> bytes:
        # Sector 0 and the root copy hold the salts before; the counts tell attempts on one root apart.
        seen = (device.size(), len(device.changes), device.barriers.total())
        return blake2b(repr(seen).encode() + device.content()[:8192], digest_size=16).digest()

    return new_salt


def open_simulated(device: SimulatedDevice, mode: jqcow.image.Mode = "r+") -> jqcow.Image:
    """Open the image on a device, closed before or not, with salts that a replay meets again."""
    device.reopen()
    return jqcow.open_device(device, mode, journal_size=JOURNAL_BYTES, new_salt=salts_of(device))


@dataclass(frozen=True)
class Windows:
    """The parts of a disk that are used: ``count`` ranges of ``window_bytes``, one every ``stride_bytes``."""

    count: int
    window_bytes: int
    stride_bytes: int

    @classmethod
    def of(cls, cluster_bytes: int, count: int = 4) -> Windows:
        """Return windows that start where L2 tables do."""
        window_bytes = WINDOW_CLUSTERS[cluster_bytes] * cluster_bytes
        return cls(count, window_bytes, cluster_bytes * cluster_bytes // 8)

    @property
    def model_bytes(self) -> int:
        """Bytes in all windows."""
        return self.count * self.window_bytes

    @property
    def disk_bytes(self) -> int:
        """Size of a disk that shows all windows."""
        return self.count * self.stride_bytes

    def guest(self, position: int) -> int:
        """Return the guest offset of a position in the model."""
        index, within = divmod(position, self.window_bytes)
        return index * self.stride_bytes + within

    def reader(self, image: jqcow.Image | Transaction) -> Callable[[int, int], bytes]:
        """Return a function that reads (length, position) in the model; past the disk's end are zeros."""

        def read(length: int, position: int) -> bytes:
            parts = []
            end = position + length
            while position < end:
                step = min(end - position, self.window_bytes - position % self.window_bytes)
                guest = self.guest(position)
                there = self.clip(position, step, image.size)
                parts.append((image.pread(there, guest) if there else b"") + bytes(step - there))
                position += step
            return b"".join(parts)

        return read

    def clip(self, position: int, length: int, size_bytes: int) -> int:
        """Return how much of a range lies in its window, and on a disk of ``size_bytes``."""
        length = min(length, self.window_bytes - position % self.window_bytes)
        return max(0, min(length, size_bytes - self.guest(position)))

    def cut_off(self, sectors: SectorModel, size_bytes: int) -> None:
        """The disk ends at ``size_bytes`` now: what lies behind reads as zeros, should it come back."""
        for start in range(0, self.model_bytes, self.window_bytes):
            kept = self.clip(start, self.window_bytes, size_bytes)
            sectors.zero(start + kept, self.window_bytes - kept).complete()


@dataclass
class Rival:
    """What else a crash may leave, whole, while a commit is in doubt: the disk with the transaction."""

    windows: Windows
    sectors: SectorModel
    size_bytes: int

    def copy(self) -> Rival:
        """Return an independent copy."""
        return replace(self, sectors=self.sectors.copy())


@dataclass
class Expectation:
    """What a crash may leave. ``copy`` makes it a model for the laboratory.

    ``sizes``       sizes that the disk may have; the last is the current one
    ``exists``      False until the image was created: nobody was told of it
    ``closed``      the file's bytes since a clean close, while nothing was asked of the image: exactly these
    ``lost``        True since a barrier failed: what is free may hold anything, ``closed`` is not promised
    ``vouched``     the guest's bytes that autoclear bits vouch for: with the bits set, exactly these
    ``extensions``  the header extensions, which no crash may change
    ``rival``       where a commit did not return, or failed: the disk with all of the transaction (P3)
    """

    windows: Windows
    sectors: SectorModel
    sizes: tuple[int, ...]
    exists: bool = True
    closed: bytes | None = None
    lost: bool = False
    vouched: bytes | None = None
    extensions: bytes = b""
    rival: Rival | None = None

    def copy(self) -> Expectation:
        """Return an independent copy."""
        rival = None if self.rival is None else self.rival.copy()
        return replace(self, sectors=self.sectors.copy(), rival=rival)

    def check(self, image: jqcow.Image) -> list[str]:
        """Return what is wrong with a recovered image: nothing, if one of the disks that may be is there."""
        wrong = _compare(image, self.windows, self.sectors, self.sizes)
        if wrong and self.rival is not None:
            rival = _compare(image, self.windows, self.rival.sectors, (self.rival.size_bytes,))
            return [*wrong, "and with the transaction", *rival] if rival else []
        return wrong

    def expect_now(self, image: jqcow.Image | Transaction) -> list[str]:
        """Return the sectors of the running image that do not read as asked for."""
        return list(map(str, self.sectors.expect_now(self.windows.reader(image))))

    def adopt_rival(self) -> None:
        """The transaction is there, and durable."""
        if self.rival is not None:
            self.sectors, self.sizes, self.rival = self.rival.sectors, (self.rival.size_bytes,), None

    @contextmanager
    def change(self, position: int, data: bytes, *, durable: bool = False) -> Iterator[None]:
        """Wrap a change of a range: afterwards it reads as ``data``, if nothing is raised.

        On a disk to which a failed commit came back, the change may be there or not.
        """
        if self.rival is not None:
            length = self.windows.clip(position, len(data), self.rival.size_bytes)
            self.rival.sectors.write(position, data[:length])
        with self.sectors.write(position, data, durable=durable):
            yield

    def observe(self, image: jqcow.Image) -> None:
        """A process was killed, and the next one reads what is there: that is the current version now.

        It is no more durable than before: all older versions stay possible until a flush. But recovery
        has made durable which transactions there are.
        """
        if self.rival is not None and _compare(image, self.windows, self.sectors, self.sizes):
            self.sectors, self.sizes = self.rival.sectors, (self.rival.size_bytes,)
        self.rival = None
        if self.lost:
            # What a failed barrier lost still reads as if it were there.
            self.forget_order()
            self.sizes = (*self.sizes, image.size)
            return
        read = self.windows.reader(image)
        for offset in range(0, self.sectors.size_bytes, SECTOR_BYTES):
            if len(self.sectors.versions(offset)) > 1:
                self.sectors.write(offset, read(SECTOR_BYTES, offset)).complete()
        self.sizes = (*self.sizes, image.size)

    def forget_order(self) -> None:
        """A barrier failed: what it should have kept may come or go until it is written again."""
        self.lost = True
        for sectors in (self.sectors, *([self.rival.sectors] if self.rival else [])):
            for offset in range(0, sectors.size_bytes, SECTOR_BYTES):
                versions = sectors.versions(offset)
                if len(versions) > 1:
                    for version in versions:
                        # An operation that never completes leaves old and new possible, also after a flush.
                        sectors.write(offset, version)


def _compare(image: jqcow.Image, windows: Windows, sectors: SectorModel, sizes: tuple[int, ...]) -> list[str]:
    if image.size not in sizes:
        return [f"the disk has {image.size} bytes, not {' or '.join(map(str, sizes))}"]
    return list(map(str, sectors.check(windows.reader(image))))


def _settled(sectors: SectorModel) -> SectorModel:
    """Return a copy in which all is durable: of each sector there is what a read may return now."""
    copy = sectors.copy()
    copy.flush_end(copy.flush_begin())
    return copy


class Draft:
    """A transaction of a `Session`: what it asks for, and what it expects to read."""

    def __init__(self, session: Session, transaction: Transaction) -> None:
        """Start with what the session expects of its image."""
        self.session = session
        self.transaction = transaction
        self.sectors = session.expectation.sectors.copy()
        self.size_bytes = session.live.size

    @property
    def windows(self) -> Windows:
        """Those of the session."""
        return self.session.expectation.windows

    def write(self, position: int, length: int) -> None:
        """Write bytes that no sector ever held before."""
        length = self.windows.clip(position, length, self.size_bytes)
        if length:
            data = self.session.fresh_data(length, position)
            with self.sectors.write(position, data):
                self.transaction.pwrite(data, self.windows.guest(position))

    def write_zeroes(self, position: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros."""
        length = self.windows.clip(position, length, self.size_bytes)
        if length:
            with self.sectors.zero(position, length):
                self.transaction.write_zeroes(length, self.windows.guest(position), unmap=unmap)

    def discard(self, position: int, length: int) -> None:
        """Discard a range: its whole clusters read as zeros, the rest is as it was."""
        length = self.windows.clip(position, length, self.size_bytes)
        head, tail = self.session.whole_clusters(position, length, self.size_bytes)
        if length:
            with self.sectors.discard(head, max(0, tail - head)):
                self.transaction.discard(length, self.windows.guest(position))

    def resize(self, size_bytes: int) -> None:
        """Set the size of the disk. A resize that fails leaves it as it was."""
        self.transaction.resize(size_bytes)
        self.windows.cut_off(self.sectors, size_bytes)
        self.size_bytes = size_bytes

    def savepoint(self) -> tuple[Savepoint, SectorModel, int]:
        """Return a state to go back to."""
        return self.transaction.savepoint(), self.sectors.copy(), self.size_bytes

    def return_to(self, savepoint: tuple[Savepoint, SectorModel, int]) -> None:
        """Go back to a state; it stays valid."""
        point, sectors, size_bytes = savepoint
        point.rollback()
        self.sectors, self.size_bytes = sectors.copy(), size_bytes

    def rollback(self) -> None:
        """Undo all, and end."""
        self.transaction.rollback()

    def look(self) -> None:
        """The transaction reads its own state; everyone else the last committed one."""
        violations = self.sectors.expect_now(self.windows.reader(self.transaction))
        assert not violations, f"the transaction reads something else: {violations[0]}"
        assert self.transaction.size == self.size_bytes, "the transaction's disk has another size"
        self.session.look()

    def as_rival(self) -> Rival:
        """Return the disk that the commit makes, were it durable."""
        return Rival(self.windows, _settled(self.sectors), self.size_bytes)


@dataclass
class Session:
    """One user of the image on ``device``.

    ``written`` counts the writes, so that no two write the same bytes; users of one image start it far apart.
    ``faults_seen`` counts the errors that reached the user.
    """

    device: SimulatedDevice
    expectation: Expectation
    image: jqcow.Image | None = None
    faults_seen: int = 0
    written: int = 0
    _was_killed: bool = False

    # Coming and going

    def create(self, cluster_bytes: int, size_bytes: int) -> None:
        """Create the image on the empty device."""
        self.image = jqcow.create_on_device(
            self.device,
            size_bytes,
            cluster_size=cluster_bytes,
            journal_size=JOURNAL_BYTES,
            new_salt=salts_of(self.device),
        )
        self.expectation.exists = True

    def new_image(self) -> jqcow.Image:
        """Return the image, opened for writing."""
        return open_simulated(self.device)

    def open(self) -> None:
        """Open for writing; a live image is recovered."""
        self.image = self.new_image()
        if self._was_killed or self.expectation.rival is not None:
            violations = self.expectation.check(self.image)
            assert not violations, f"a killed writer left something else: {violations[0]}"
            self.expectation.observe(self.image)
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

    def write(self, position: int, length: int, *, fua: bool = False) -> None:
        """Write bytes that no sector ever held before."""
        length = self._clip(position, length)
        if not length:
            return
        data = self.fresh_data(length, position)
        self._changes()
        with self.expectation.change(position, data, durable=fua):
            self.live.pwrite(data, self._guest(position), fua=fua)
        if fua:
            # The flush in it covers all, as any flush.
            self.flush()

    def write_zeroes(self, position: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros."""
        length = self._clip(position, length)
        if length:
            self._changes()
            with self.expectation.change(position, bytes(length)):
                self.live.write_zeroes(length, self._guest(position), unmap=unmap)

    def discard(self, position: int, length: int) -> None:
        """Discard a range: its whole clusters read as zeros, the rest is as it was."""
        length = self._clip(position, length)
        head, tail = self.whole_clusters(position, length, self.live.size)
        if length:
            self._changes()
            with self.expectation.change(head, bytes(max(0, tail - head))):
                self.live.discard(length, self._guest(position))

    def resize(self, size_bytes: int) -> None:
        """Set the size of the disk: a larger one with the next flush, a smaller one at once and durably."""
        if size_bytes < self.live.size and self.expectation.rival is not None:
            # One commit at a time can be in doubt.
            self.flush()
        before = self.expectation.sizes
        self._changes()
        if size_bytes < self.live.size:
            # What was written before becomes durable first, or with it; a crash may show it without.
            rival = self.expectation.sectors.copy()
            self.expectation.windows.cut_off(rival, size_bytes)
            self.expectation.rival = Rival(self.expectation.windows, _settled(rival), size_bytes)
            self.live.resize(size_bytes)
            self.expectation.adopt_rival()
            return
        self.expectation.sizes = (size_bytes, *before)
        self.live.resize(size_bytes)
        self.expectation.sizes = (*before, size_bytes)

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
        self._changes()
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
            self.expectation.rival = draft.as_rival()
        manager.__exit__(None, None, None)
        self.expectation.adopt_rival()

    # Errors of the host

    @contextmanager
    def faults(self, plan: FaultPlan) -> Iterator[None]:
        """Let the host fail meanwhile. An error of the host ends the body; the session then goes on.

        After a failed barrier the image must refuse every change and read as before; the next process
        recovers it.
        """
        self.device.faults = plan
        try:
            yield
        except OSError:
            self.faults_seen += 1
        finally:
            self.device.faults = None
        if self.image is not None and self.image.closed:
            # What a failed close did not make durable is as if the process had been killed.
            self.kill()
        if plan.lost_changes or self.is_poisoned:
            self.recover_from_poison()
        self.look()

    @property
    def is_poisoned(self) -> bool:
        """True if the open image turned read-only."""
        return self.image is not None and self.image._store.medium.poisoned

    def recover_from_poison(self) -> None:
        """After a failed barrier: no change is accepted, reading works, and the next opening recovers."""
        if self.image is not None and self._accepts_changes():
            # It claims that nothing was lost: its flush is a promise, and a crash will tell.
            return
        if self.image is not None:
            self.look()
            self.image.close()
        self.image, self._was_killed = None, False
        self.expectation.forget_order()
        self.open()

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

    # Positions

    def _guest(self, position: int) -> int:
        return self.expectation.windows.guest(position)

    def _clip(self, position: int, length: int) -> int:
        """Return how much of a range lies in its window and on the disk."""
        return self.expectation.windows.clip(position, length, self.live.size)

    def whole_clusters(self, position: int, length: int, size_bytes: int) -> tuple[int, int]:
        """Return the positions of the whole clusters of a range: (start, end)."""
        cluster_bytes = self.live.info().cluster_size
        head = -(-position // cluster_bytes) * cluster_bytes
        end = position + length
        at_disk_end = self._guest(position) + length == size_bytes
        return head, end if at_disk_end else end - end % cluster_bytes

    def fresh_data(self, length: int, position: int) -> bytes:
        """Return bytes for a write at a position that no other write has."""
        self.written += 1
        words = []
        for sector in range(position // SECTOR_BYTES, (position + length - 1) // SECTOR_BYTES + 1):
            words.append(((self.written << 32) | (sector << 1) | 1).to_bytes(8, "big") * (SECTOR_BYTES // 8))
        start = position % SECTOR_BYTES
        return b"".join(words)[start : start + length]

    def _changes(self) -> None:
        self.expectation.closed = None
