"""User transactions: any number of changes, atomic and durable together.

Inside, a transaction reads its own state; everyone else reads the last committed one. Its writes go to
fresh clusters, also where the guest cluster was allocated, so that leaving them out leaves the old disk.
Committing switches the mapping in one record.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jqcow.engine.engine import Guest
from jqcow.engine.metadata import Mark
from jqcow.engine.snapshots import NewSnapshot
from jqcow.engine.tables import Tables
from jqcow.engine.transaction import PrivateChanges
from jqcow.errors import TransactionError
from jqcow.image.arguments import (
    check_date,
    number,
    optional_number,
    optional_path,
    optional_text,
    require_writable,
    text,
)
from jqcow.image.bitmaps import TransactionBitmaps
from jqcow.ondisk import layout, naming
from jqcow.ondisk.form import Preallocation, preallocation_of
from jqcow.ondisk.snapshots import Snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


MAX_NAME_BYTES = 255
"""The longest name of a snapshot that QEMU shows whole."""


@dataclass(frozen=True)
class Receipt:
    """What a commit returned: ``sequence`` of the durable record that holds the transaction."""

    sequence: int


def new_snapshot(name: str, date: datetime | None) -> NewSnapshot:
    """Return what a snapshot is to be called and dated; None: now.

    Raises:
        ValueError: a name that no snapshot can have, or a date outside 1970 to 2106.
    """
    check_date(date)
    encoded = text(name).encode("utf-8", "surrogateescape")
    if not encoded or len(encoded) > MAX_NAME_BYTES or b"\0" in encoded:
        raise ValueError(f"the name of a snapshot has 1 to {MAX_NAME_BYTES} bytes, none of them 0: {name!r}")
    moment = datetime.now(UTC) if date is None else date
    seconds = math.floor(moment.timestamp())
    if not 0 <= seconds < 1 << 32:
        raise ValueError(f"a snapshot is dated from 1970 to 2106, not {moment}")
    return NewSnapshot(name, seconds, moment.microsecond * 1000)


class Savepoint:
    """A state of a transaction to come back to; any number of times, until the transaction ends."""

    def __init__(self, changes: PrivateChanges, enter: Callable[[], None], mark: Mark) -> None:
        """Not for users: see `Transaction.savepoint`."""
        self._changes = changes
        self._enter = enter
        self._mark = mark

    def rollback(self) -> None:
        """Undo every change of the transaction since this savepoint was made.

        Raises:
            TransactionError: the transaction has ended, or went back behind this savepoint.
        """
        self._enter()
        if not self._changes.tables.changes.has_mark(self._mark):
            raise TransactionError("the transaction went back behind this savepoint")
        self._changes.return_to(self._mark)


class Transaction:
    """An open transaction on an image; see `Image.transaction`. Offsets and lengths are in bytes.

    Its methods may be called by one thread at a time. ``receipt`` is set by a commit.
    """

    def __init__(
        self, changes: PrivateChanges, guest: Callable[[Tables], Guest], own: Callable[[], None]
    ) -> None:
        """Not for users.

        ``guest`` gives a way in through the transaction's tables; ``own`` refuses who would wait forever.
        """
        self._changes = changes
        self._tables = changes.tables
        self._guest = guest(changes.tables)
        self._lock = changes.medium.lock
        self._own = own
        self._bitmaps = TransactionBitmaps(self._tables, self._enter)
        self._open = True
        self._is_given_up = False
        self.receipt: Receipt | None = None

    @property
    def is_open(self) -> bool:
        """False after the commit, a rollback or an error that ended it."""
        return self._open

    @property
    def size(self) -> int:
        """Size of the disk as the transaction sees it."""
        self._enter()
        with self._lock:
            return self._tables.view.header.size

    def _enter(self, *, changing: bool = False) -> None:
        """Refuse a call that the state of the transaction, or of the image, does not allow."""
        self._own()
        if not self._open:
            raise TransactionError("the transaction has ended")
        with self._lock:
            self._guest.requests.admit(changing)

    def pread(self, length: int, offset: int) -> bytes:
        """Return the disk's bytes as the transaction sees them; errors as `Image.pread`."""
        length, offset = number(length), number(offset)
        self._enter()
        self._guest.requests.check_range(offset, length)
        buffer = bytearray(length)
        self._guest.reads.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def pread_into(self, buffer: WriteableBuffer, offset: int) -> None:
        """Fill ``buffer`` with the disk's bytes as the transaction sees them; errors as `Image.pread`."""
        offset = number(offset)
        self._enter()
        with memoryview(buffer) as whole, whole.cast("B") as view:
            require_writable(view)
            self._guest.reads.read_into(view, offset)

    def pwrite(self, buffer: ReadableBuffer, offset: int) -> int:
        """Write ``buffer``; return its length. A failed write leaves the transaction open.

        Raises:
            TransactionError: the transaction has ended.
            ValueError, OSError: as `Image.pwrite`.
        """
        offset = number(offset)
        self._enter(changing=True)
        with memoryview(buffer) as whole, whole.cast("B") as view:
            self._guest.writes.write(view, offset)
            return len(view)

    def write_zeroes(self, length: int, offset: int, unmap: bool = True) -> None:
        """Make a range read as zeros; see `Image.write_zeroes`."""
        length, offset = number(length), number(offset)
        self._enter(changing=True)
        self._guest.zeroing.write_zeroes(offset, length, unmap=unmap)

    def discard(self, length: int, offset: int) -> None:
        """Free the clusters that a range covers whole; see `Image.discard`."""
        length, offset = number(length), number(offset)
        self._enter(changing=True)
        self._guest.zeroing.discard(offset, length)

    def resize(self, size: int, preallocation: Preallocation = "off") -> None:
        """Set the size of the disk: what is added reads as zeros, what is cut off is freed.

        Args:
            size: of the disk.
            preallocation: of what is added, as in `create`.

        Raises:
            ValueError: not a multiple of 512, or preallocation of a disk that does not grow.
            TransactionError, OSError: as `pwrite`.
        """
        size, preallocation = layout.disk_size(size), preallocation_of(preallocation)
        self._enter(changing=True)
        if size != self._tables.view.header.size or preallocation != "off":
            with self._changes.whole():
                self._guest.resizing.resize(size, preallocation)

    def pwrite_compressed(self, buffer: ReadableBuffer, offset: int, level: int | None = None) -> int:
        """Write whole clusters compressed; see `Image.pwrite_compressed`."""
        offset, level = number(offset), optional_number(level)
        self._enter(changing=True)
        with memoryview(buffer) as whole, whole.cast("B") as view:
            self._guest.packed.write(view, offset, level)
            return len(view)

    @property
    def bitmaps(self) -> TransactionBitmaps:
        """The persistent bitmaps as the transaction sees them, to be looked at and changed."""
        self._enter()
        return self._bitmaps

    # Snapshots

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return the snapshots as the transaction sees them; errors as `Image.snapshots`."""
        self._enter()
        with self._lock:
            return self._tables.snapshots.read_table().snapshots

    def create_snapshot(self, name: str, date: datetime | None = None) -> Snapshot:
        """Make a snapshot of the disk as the transaction sees it; see `Image.create_snapshot`."""
        new = new_snapshot(name, date)
        self._enter(changing=True)
        with self._lock, self._tables.operation():
            return self._tables.snapshots.create(new)

    def apply_snapshot(self, id_or_name: str) -> None:
        """Make the disk what it was when a snapshot was made; see `Image.apply_snapshot`."""
        self._enter(changing=True)
        with self._lock:
            snapshot = self._tables.snapshots.find(id_or_name)
            with self._tables.operation():
                self._tables.bitmaps.resize(snapshot.disk_bytes, replaced=True)
                self._tables.snapshots.apply(snapshot)

    def delete_snapshot(self, id_or_name: str) -> None:
        """Give up a snapshot; see `Image.delete_snapshot`."""
        self._enter(changing=True)
        with self._lock:
            snapshot = self._tables.snapshots.find(id_or_name)
            with self._tables.operation():
                self._tables.snapshots.delete(snapshot)

    # Below the image

    def set_backing_file(
        self,
        name: str | os.PathLike[str] | None,
        backing_format: str | None = None,
        *,
        foreign: bool = False,
        elsewhere: bool = False,
    ) -> None:
        """Name another backing file in the header, or none. Nothing is copied and nothing is opened.

        Whoever opens the image next sees the other file's disk where this one has nothing of its own; until
        then this image goes on with what it has: so close it, and open it again, before more is zeroed or
        discarded. `jqcow.offline.rebase` keeps what the disk reads.

        Args:
            name: stored as it is, relative to the directory of the image; None: no backing file.
            backing_format: of the file, needed with it.
            foreign: it may be a format that jqcow does not have, for an image that others are to open.
            elsewhere: the name may have a protocol that jqcow does not follow, for such an image.

        Raises:
            ValueError: a name that cannot be stored.
            FormatError: the header has no room for it.
            TransactionError, OSError: as `pwrite`.
        """
        name, stored = optional_path(name), optional_text(backing_format)
        self._enter(changing=True)
        with self._lock:
            area = naming.name_backing_file(
                self._tables.view.area, name, stored, foreign=foreign, elsewhere=elsewhere
            )
            with self._tables.operation():
                self._tables.view.set_area(area)

    def hide_below(self, length: int, offset: int) -> None:
        """Make whole clusters, or subclusters if it has them, read as zeros whatever is put below.

        `write_zeroes` leaves out what reads as zeros by the present backing file.

        Raises:
            ValueError: not whole ones, or they reach past the end.
            TransactionError, OSError: as `pwrite`.
        """
        length, offset = number(length), number(offset)
        self._enter(changing=True)
        self._guest.zeroing.hide_below(offset, length)

    def make_empty(self) -> None:
        """Give up all that the disk has of its own: what is below shows, or zeros. Its size stays.

        Raises:
            TransactionError, OSError: as `pwrite`.
        """
        self._enter(changing=True)
        with self._changes.whole():
            self._guest.resizing.make_empty()

    def _operate(self, act: Callable[[Tables], None]) -> None:
        """Not for users: do something with the tables, in one operation."""
        self._enter(changing=True)
        with self._lock, self._tables.operation():
            act(self._tables)

    @property
    def _is_large(self) -> bool:
        """True when so much is staged that another transaction should go on."""
        return self._changes.commits.is_large(self._tables.changes)

    # Going back

    def savepoint(self) -> Savepoint:
        """Remember the transaction's state. The next write to any cluster takes a fresh one again.

        Raises:
            TransactionError: the transaction has ended.
        """
        self._enter()
        return Savepoint(self._changes, self._enter, self._changes.savepoint())

    def rollback(self) -> None:
        """Undo everything and end the transaction; leaving the ``with`` block then does nothing."""
        self._enter()
        self._open = False
        self._give_up()

    # For Image.transaction

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Commit at the end of the block; an exception undoes everything, there and then."""
        try:
            yield
            if self._open:
                self._enter(changing=True)
                self._open = False
                self.receipt = Receipt(self._changes.commit())
        except BaseException:
            self._open = False
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Undo everything, once, unless it is committed."""
        if not self._is_given_up and self.receipt is None:
            self._is_given_up = True
            self._changes.give_up()
