"""User transactions: any number of changes, atomic and durable together.

Inside, a transaction reads its own state; everyone else reads the last committed one. Its writes go to
fresh clusters, also where the guest cluster was allocated, so that leaving them out leaves the old disk.
Committing switches the mapping in one record.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from jqcow.engine.datapath import DataPath
from jqcow.engine.metadata import MetadataMark
from jqcow.engine.snapshots import NewSnapshot
from jqcow.engine.space import SpaceMark
from jqcow.errors import TransactionError
from jqcow.ondisk import layout, naming
from jqcow.ondisk.naming import DiskFormat
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
    encoded = name.encode("utf-8", "surrogateescape")
    if not encoded or len(encoded) > MAX_NAME_BYTES or b"\0" in encoded:
        raise ValueError(f"the name of a snapshot has 1 to {MAX_NAME_BYTES} bytes, none of them 0: {name!r}")
    moment = datetime.now(UTC) if date is None else date
    seconds = math.floor(moment.timestamp())
    if not 0 <= seconds < 1 << 32:
        raise ValueError(f"a snapshot is dated from 1970 to 2106, not {moment}")
    return NewSnapshot(name, seconds, moment.microsecond * 1000)


class Savepoint:
    """A state of a transaction to come back to; any number of times, until the transaction ends."""

    def __init__(self, transaction: Transaction, metadata: MetadataMark, space: SpaceMark) -> None:
        """Not for users: see `Transaction.savepoint`."""
        self._transaction = transaction
        self._metadata = metadata
        self._space = space

    def rollback(self) -> None:
        """Undo every change of the transaction since this savepoint was made.

        Raises:
            TransactionError: the transaction has ended, or went back behind this savepoint.
        """
        self._transaction._return_to(self)


class Transaction:
    """An open transaction on an image; see `Image.transaction`. Offsets and lengths are in bytes.

    Its methods may be called by one thread at a time. ``receipt`` is set by a commit.
    """

    def __init__(
        self,
        data: DataPath,
        lock: Callable[[], threading.RLock],
        enter: Callable[[], None],
        check_writable: Callable[[], None],
    ) -> None:
        """Not for users.

        ``lock`` returns the image's lock, or refuses the calling process. The other two are called with it
        taken: ``enter`` refuses a closed image, ``check_writable`` one that cannot be changed.
        """
        self._data = data
        self._store = data.store
        self._image_lock = lock
        self._enter_image = enter
        self._check_writable = check_writable
        self._open = True
        self._savepoints: list[Savepoint] = []
        self._going_back: tuple[MetadataMark, SpaceMark] | None = None
        self.receipt: Receipt | None = None

    @property
    def is_open(self) -> bool:
        """False after the commit, a rollback or an error that ended it."""
        return self._open

    @property
    def size(self) -> int:
        """Size of the disk as the transaction sees it."""
        with self._image_lock():
            self._enter()
            return self._store.metadata.header.size

    def _enter(self) -> None:
        """With the lock taken: see the transaction's own state from here on."""
        self._enter_image()
        if not self._open:
            raise TransactionError("the transaction has ended")
        self._store.enter(private=True)
        if self._going_back is not None:
            self._go_back()

    def _enter_to_change(self) -> None:
        self._enter()
        self._check_writable()

    def pread(self, length: int, offset: int) -> bytes:
        """Return the disk's bytes as the transaction sees them; errors as `Image.pread`."""
        with self._image_lock():
            self._enter()
            self._data.check_range(length, offset)
            buffer = bytearray(length)
            self._data.read_into(memoryview(buffer), offset)
            return bytes(buffer)

    def pread_into(self, buffer: WriteableBuffer, offset: int) -> None:
        """Fill ``buffer`` with the disk's bytes as the transaction sees them; errors as `Image.pread`."""
        with memoryview(buffer) as whole, whole.cast("B") as view, self._image_lock():
            self._enter()
            self._data.check_range(len(view), offset)
            self._data.read_into(view, offset)

    def pwrite(self, buffer: ReadableBuffer, offset: int) -> int:
        """Write ``buffer``; return its length. A failed write leaves the transaction open.

        Raises:
            TransactionError: the transaction has ended.
            ValueError, OSError: as `Image.pwrite`.
        """
        with memoryview(buffer) as whole, whole.cast("B") as view, self._image_lock():
            self._enter_to_change()
            self._data.check_range(len(view), offset)
            if view:
                self._data.write(view, offset)
            return len(view)

    def write_zeroes(self, length: int, offset: int, unmap: bool = True) -> None:
        """Make a range read as zeros; see `Image.write_zeroes`."""
        with self._image_lock():
            self._enter_to_change()
            self._data.check_range(length, offset)
            if length:
                self._data.write_zeroes(length, offset, unmap=unmap)

    def discard(self, length: int, offset: int) -> None:
        """Free the clusters that a range covers whole; see `Image.discard`."""
        with self._image_lock():
            self._enter_to_change()
            self._data.check_range(length, offset)
            if length:
                self._data.discard(length, offset)

    def resize(self, size: int) -> None:
        """Set the size of the disk: what is added reads as zeros, what is cut off is freed.

        Raises:
            ValueError: not a multiple of 512.
            TransactionError, OSError: as `pwrite`.
        """
        layout.check_disk_size(size)
        with self._image_lock():
            self._enter_to_change()
            if size == self._store.metadata.header.size:
                return
            # A resize is several operations. Whatever cuts it off, the next call goes back to here.
            self._going_back = self._mark()
            self._data.resize(size)
            self._going_back = None

    def pwrite_compressed(self, buffer: ReadableBuffer, offset: int, level: int | None = None) -> int:
        """Write whole clusters compressed; see `Image.pwrite_compressed`."""
        with memoryview(buffer) as whole, whole.cast("B") as view, self._image_lock():
            self._enter_to_change()
            self._data.check_whole_clusters(len(view), offset)
            if view:
                self._data.write_compressed(view, offset, level)
            return len(view)

    # Snapshots

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return the snapshots as the transaction sees them; errors as `Image.snapshots`."""
        with self._image_lock():
            self._enter()
            return self._store.snapshots.read_table().snapshots

    def create_snapshot(self, name: str, date: datetime | None = None) -> Snapshot:
        """Make a snapshot of the disk as the transaction sees it; see `Image.create_snapshot`."""
        new = new_snapshot(name, date)
        with self._image_lock():
            self._enter_to_change()
            with self._store.operation():
                return self._store.snapshots.create(new)

    def apply_snapshot(self, id_or_name: str) -> None:
        """Make the disk what it was when a snapshot was made; see `Image.apply_snapshot`."""
        with self._image_lock():
            self._enter_to_change()
            snapshot = self._store.snapshots.find(id_or_name)
            with self._store.operation():
                self._store.snapshots.apply(snapshot)

    def delete_snapshot(self, id_or_name: str) -> None:
        """Give up a snapshot; see `Image.delete_snapshot`."""
        with self._image_lock():
            self._enter_to_change()
            snapshot = self._store.snapshots.find(id_or_name)
            with self._store.operation():
                self._store.snapshots.delete(snapshot)

    # Below the image

    def set_backing_file(self, name: str | None, backing_format: DiskFormat | None = None) -> None:
        """Name another backing file in the header, or none. Nothing is copied and nothing is opened.

        Whoever opens the image next sees the other file's disk where this one has nothing of its own; until
        then this image goes on with what it has: so close it, and open it again, before more is zeroed or
        discarded. `jqcow.offline.rebase` keeps what the disk reads.

        Args:
            name: stored as it is, relative to the directory of the image; None: no backing file.
            backing_format: of the file, needed with it.

        Raises:
            ValueError: a name that cannot be stored.
            FormatError: the header has no room for it.
            TransactionError, OSError: as `pwrite`.
        """
        with self._image_lock():
            self._enter_to_change()
            area = naming.name_backing_file(self._store.metadata.area, name, backing_format)
            with self._store.operation():
                self._store.metadata.set_area(area)

    def hide_below(self, length: int, offset: int) -> None:
        """Make whole clusters read as zeros whatever file is put below them.

        `write_zeroes` leaves out what reads as zeros by the present backing file.

        Raises:
            ValueError: not whole clusters, or they reach past the end.
            TransactionError, OSError: as `pwrite`.
        """
        with self._image_lock():
            self._enter_to_change()
            self._data.check_whole_clusters(length, offset)
            if length:
                self._data.hide_below(length, offset)

    def make_empty(self) -> None:
        """Give up all that the disk has of its own: what is below shows, or zeros. Its size stays.

        Raises:
            TransactionError, OSError: as `pwrite`.
        """
        with self._image_lock():
            self._enter_to_change()
            self._going_back = self._mark()
            self._data.make_empty()
            self._going_back = None

    # Going back

    def savepoint(self) -> Savepoint:
        """Remember the transaction's state. The next write to any cluster takes a fresh one again.

        Raises:
            TransactionError: the transaction has ended.
        """
        with self._image_lock():
            self._enter()
            savepoint = Savepoint(self, *self._mark())
            self._savepoints.append(savepoint)
            return savepoint

    def _mark(self) -> tuple[MetadataMark, SpaceMark]:
        """Take a mark. What is in fresh clusters so far belongs to it: they are closed."""
        return self._store.mark()

    def _go_back(self) -> None:
        """Return to the mark that is noted. Where this is cut off, the next call goes on."""
        if self._going_back is not None:
            self._store.return_to(self._going_back)
            self._going_back = None

    def _return_to(self, savepoint: Savepoint) -> None:
        with self._image_lock():
            self._enter()
            if savepoint not in self._savepoints:
                raise TransactionError("the transaction went back behind this savepoint")
            self._going_back = savepoint._metadata, savepoint._space
            del self._savepoints[self._savepoints.index(savepoint) + 1 :]
            self._go_back()

    def rollback(self) -> None:
        """Undo everything and end the transaction; leaving the ``with`` block then does nothing."""
        with self._image_lock():
            self._enter()
            self._open = False
            self._store.abandon_transaction()

    # Ending, for Image.transaction

    def _commit(self) -> None:
        with self._image_lock():
            self._enter_to_change()
            self._open = False
        self.receipt = Receipt(self._store.commit_transaction())
