"""The image: read, write, zero, discard, snapshot, flush, checkpoint, close.

Threads may share an image. Its locks are taken in this order, each by ``with`` alone:

    the turnstile   held by whoever is alone: a transaction, a resize, a close (engine/request.py)
    a request's     held by that request from before its plan until after its end
    the turn        held by a commit, and beside it one that later flushes wait for (engine/commit.py)
    the lock        held by whoever looks at the image's state or changes it, never while guest data moves

Each call plans and stages under the lock, and reads and writes without it. A forked child must not use its
parent's image. See docs/threads-and-locks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING

from jqcow.checker.check import CheckReport, check_structure
from jqcow.checker.warnings import warnings_of
from jqcow.device.disk import Disk, Extent, found_below, joined
from jqcow.device.file import path_of
from jqcow.disks.image import extent_of
from jqcow.disks.view import FileView
from jqcow.engine.engine import Guest, Opened
from jqcow.engine.mapping import L1Table
from jqcow.engine.repair import RepairReport
from jqcow.engine.tables import Tables
from jqcow.engine.transaction import PrivateChanges
from jqcow.errors import JqcowError
from jqcow.image.arguments import number, optional_number, require_writable
from jqcow.image.bitmaps import BitmapReader, ImageBitmaps
from jqcow.image.entering import Entering, Mode
from jqcow.image.file import ImageFile
from jqcow.image.protection import ImageProtection
from jqcow.image.reports import ImageInfo, Recovered, image_info
from jqcow.image.transaction import Transaction
from jqcow.ondisk import layout, naming
from jqcow.ondisk.form import Preallocation, preallocation_of
from jqcow.ondisk.l2 import UNALLOCATED
from jqcow.ondisk.naming import NamedFile
from jqcow.ondisk.snapshots import Snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

UNCHECKED_BYTES_MAX = 1 << 20
"""A buffer of this length is made before the range is known to lie within the disk."""


def _raise(error: Exception) -> None:
    raise error


class Image(Entering):
    """An open image. Offsets and lengths are in bytes, of the guest's disk.

    As a context manager it closes at the end, also after an exception: what was written before stays.

    Attributes:
        repaired: what `open` made right, None if it was not to.
        recovered: what a crash left in the journal, None if there was none.
        warnings: with mode ``"r"``, what is wrong with structures that only writing needs, in words.
    """

    def __init__(
        self,
        opened: Opened,
        mode: Mode,
        backing: Disk | None = None,
        *,
        copy_on_read: bool = False,
        shown: L1Table | None = None,
        repaired: RepairReport | None = None,
        protect: bool = False,
    ) -> None:
        """Not for users: see `open` and `create`."""
        super().__init__(opened.engine, mode)
        self._backing = backing
        self._guest = opened.engine.guest(self._enter, backing, shown=shown)
        self._copy_on_read = copy_on_read and backing is not None
        self._shows_snapshot, self._protect = shown is not None, protect
        self.repaired: RepairReport | None = repaired
        self.warnings: tuple[str, ...] = () if mode == "r+" else self._find_warnings()
        self.recovered = None if opened.scan is None else Recovered.from_scan(opened.scan)

    # What it is

    @property
    def size(self) -> int:
        """Size of the disk, as last committed or changed; a transaction's own size is its `size`."""
        self._own()
        with self._lock:
            self._medium.require_known()
            return self._disk_bytes

    @property
    def _disk_bytes(self) -> int:
        return self._guest.tables.mapping.disk_bytes

    @property
    def backing_file(self) -> NamedFile | None:
        """What the header names as the file below, None if it names none.

        Raises:
            FormatError, UnsupportedFeatureError: a name that jqcow refuses.
        """
        self._own()
        with self._lock:
            self._enter(False)
            return naming.backing_file_of(self._guest.tables.view.area, self._name)

    @property
    def data_file(self) -> NamedFile | None:
        """What the header names as the external data file, None if the image has its data itself.

        Raises:
            FormatError, UnsupportedFeatureError: a name that jqcow refuses.
        """
        self._own()
        with self._lock:
            self._enter(False)
            area = self._guest.tables.view.area
            return naming.data_file_of(area, self._name) if area.header.has_data_file else None

    @property
    def end_offset(self) -> int:
        """Host offset in bytes behind all that is in use: what lies further of a block device is free.

        It rises with what is written, and falls only as the image is closed: a volume manager that extends
        a volume in time looks here. The journal is counted where there is one.

        Raises:
            CorruptionError: the refcounts are damaged.
        """
        self._own()
        with self._lock:
            self._enter(False)
            return self._engine.lifecycle.end_offset()

    @property
    def _name(self) -> str:
        """Path of the image, as it was opened; of a device of the caller's own, nothing."""
        return path_of(self._medium.device)

    def info(self) -> ImageInfo:
        """Return what the header says.

        Raises:
            ImageClosedError: the image is closed.
        """
        self._own()
        with self._lock:
            self._enter(False)
            return image_info(
                self._guest.tables.view.header,
                virtual_size=self._disk_bytes,
                file_size=self._medium.size(),
                journal=self._engine.log.journal,
                bitmaps=self._engine.public.bitmaps.told(),
            )

    def check(self) -> CheckReport:
        """Check the refcounts and tables as they are now, unflushed changes included. Changes nothing.

        Raises:
            JqcowError: the metadata cannot be walked.
            OSError: the host failed.
        """
        self._own()
        with self._lock:
            self._enter(False)
            view, journal = self._engine.public.view, self._engine.log.journal
            extent = None if journal is None else journal.extent
            file = FileView(self._medium.device, view.area, view.newest(), journal=extent)
            return check_structure(file.read, file.size(), reserved=file.reserved)

    def _find_warnings(self) -> tuple[str, ...]:
        view = self._engine.public.view
        file = FileView(self._medium.device, view.area, view.newest())
        return warnings_of(file.read, view.area, self._medium.size())

    def extents(self, length: int | None = None, offset: int = 0) -> Iterator[Extent]:
        """Yield what a guest range holds, in order, neighbours of one kind joined.

        Each step is taken under the lock; a change meanwhile may show in the later ones.

        Args:
            length: of the range; None: to the end of the disk.
            offset: of the range.

        Raises:
            ValueError: the range reaches past the end.
            CorruptionError: a table on the way is damaged.
        """
        length, offset = optional_number(length), number(offset)
        self._own()
        with self._lock:
            self._enter(False)
            length = self._disk_bytes - offset if length is None else length
            self._guest.requests.check_range(offset, length)
        return joined(self._found(length, offset))

    def _found(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield the runs of the image's own tables, and what lies below where they have nothing."""
        end, walk = offset + length, self._guest.reads.walk()
        while offset < end:
            self._own()
            run = self._guest.reads.first_run(offset, end - offset, walk)
            if run.kind == UNALLOCATED and self._backing is not None:
                yield from found_below(self._backing, run.length, offset)
            else:
                yield extent_of(run, offset)
            offset += run.length

    # Reading

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes of the disk from ``offset``.

        Raises:
            ValueError: the range reaches past the end.
            UnsupportedFeatureError: the range holds a compressed cluster.
            CorruptionError: a table on the way is damaged.
            OSError: the host failed.
        """
        length, offset = number(length), number(offset)
        self._own()
        if not 0 <= length <= UNCHECKED_BYTES_MAX:
            # Before the buffer is made; the request checks the range again, with the lock held.
            with self._lock:
                self._enter(False)
                self._guest.requests.check_range(offset, length)
        buffer = bytearray(length)
        self._read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def pread_into(self, buffer: WriteableBuffer, offset: int) -> None:
        """Fill ``buffer`` from the disk at ``offset``; errors as `pread`."""
        offset = number(offset)
        self._own()
        with memoryview(buffer) as whole, whole.cast("B") as view:
            require_writable(view)
            self._read_into(view, offset)

    def _read_into(self, view: memoryview, offset: int) -> None:
        self._guest.reads.read_into(view, offset)
        # A later read copies what is read while a transaction is open.
        copies = self._copy_on_read and self._transaction_thread is None
        if copies and self._guest.reads.reads_from_below(offset, len(view)):
            self._guest.copying.copy_up(offset, len(view))

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        """Return True if a range is known to read as zeros, by the tables of the image and of those below.

        Nothing of the data is read: False may mean data that is zero.

        Raises:
            ValueError: the range reaches past the end.
            CorruptionError: a table on the way is damaged.
        """
        length, offset = number(length), number(offset)
        self._own()
        with self._lock:
            self._enter(False)
            self._guest.requests.check_range(offset, length)
        return self._guest.reads.reads_as_zeros(offset, length)

    # Writing

    def pwrite(self, buffer: ReadableBuffer, offset: int, fua: bool = False) -> int:
        """Write ``buffer`` to the disk at ``offset``; return its length.

        A crash before the next `flush` leaves each sector old or new. ``fua`` flushes before returning.

        Raises:
            ValueError: the range reaches past the end.
            ReadOnlyError: the image was opened with ``"r"``, or is read-only since a failed barrier.
            OSError: the host failed; the range may be old or new, all else is as before.
        """
        offset = number(offset)
        self._own(changing=True)
        with memoryview(buffer) as whole, whole.cast("B") as view:
            self._guest.writes.write(view, offset)
            if fua:
                self.flush()
            return len(view)

    def write_zeroes(self, length: int, offset: int, unmap: bool = True) -> None:
        """Make a range read as zeros, without writing data where that can be avoided.

        ``unmap`` frees the clusters that the range covers whole; without it they stay allocated.
        Errors as `pwrite`.
        """
        length, offset = number(length), number(offset)
        self._own(changing=True)
        self._guest.zeroing.write_zeroes(offset, length, unmap=unmap)

    def discard(self, length: int, offset: int) -> None:
        """Free the clusters that a range covers whole: they read as zeros. The rest of it is left alone.

        Errors as `pwrite`.
        """
        length, offset = number(length), number(offset)
        self._own(changing=True)
        self._guest.zeroing.discard(offset, length)

    def pwrite_compressed(self, buffer: ReadableBuffer, offset: int, level: int | None = None) -> int:
        """Write whole clusters compressed, as the image's header says how; return the buffer's length.

        A cluster that would not get smaller is written as it is. The disk reads the same either way; writing
        to a compressed cluster later stores it uncompressed.

        Args:
            buffer: whole clusters, or what is left to the end of the disk.
            offset: of a cluster.
            level: of the compression; None: the method's own default.

        Raises:
            ValueError: not whole clusters, or they reach past the end.
            ReadOnlyError, OSError: as `pwrite`; the failed cluster is as before.
        """
        offset, level = number(offset), optional_number(level)
        self._own(changing=True)
        with memoryview(buffer) as whole, whole.cast("B") as view:
            self._guest.packed.write(view, offset, level)
            return len(view)

    def resize(self, size: int, preallocation: Preallocation = "off") -> None:
        """Set the size of the disk: what is added reads as zeros, what is cut off is freed.

        Atomic. Growing is durable with the next `flush`. Shrinking, growing over a longer backing file, and
        growing with preallocation is a transaction, and durable on return.

        Args:
            size: of the disk.
            preallocation: of what is added, as in `create`.

        Raises:
            ValueError: not a multiple of 512, or preallocation of a disk that does not grow.
            ReadOnlyError, OSError: as `pwrite`; the size is as before.
        """
        size, preallocation = layout.disk_size(size), preallocation_of(preallocation)
        self._own(changing=True)
        if preallocation != "off":
            with self.transaction() as transaction:
                transaction.resize(size, preallocation)
            return
        guard = self._engine.guard
        with guard.turnstile, guard.alone():
            with self._lock:
                self._enter(True)
                if size == self._disk_bytes:
                    return
            guest = self._alone()
            if guest.resizing.is_one_operation(size):
                guest.resizing.resize(size)
                return
        with self.transaction() as transaction:
            transaction.resize(size)

    def _alone(self) -> Guest:
        """Return a way in for whoever is alone."""
        return self._engine.guest(self._enter, self._backing, alone=True)

    # Transactions

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Make all changes inside atomic and durable together.

        Entering waits for other transactions and commits what was written before. Inside, use the
        transaction's own methods; other threads' changes wait, their reads see the last committed state.
        `flush` makes nothing of the transaction durable. At the end of the block it is committed, and the
        receipt is in ``receipt``; an exception, or `Transaction.rollback`, undoes all of it.

        Raises:
            TransactionError: this thread has a transaction open on this image.
            ReadOnlyError: the image cannot be changed.
            OSError: entering or committing failed; nothing of the transaction happened.
        """
        self._own(changing=True)
        engine, guard = self._engine, self._engine.guard
        # Held by the generator's frame: it is released even if this generator is never resumed.
        with guard.turnstile, guard.alone():
            self._transaction_thread = threading.get_ident()
            try:
                with self._lock:
                    self._enter(True)
                engine.commits.cool(self._require_writable)
                engine.commits.flush(self._require_writable)
                engine.lifecycle.go_live(self._require_writable)
                transaction = Transaction(PrivateChanges(engine.lifecycle), self._private_guest, self._own)
                with transaction._running():
                    yield transaction
            finally:
                self._transaction_thread = None
                if engine.log.in_transaction:
                    # Cut off before its changes were given up.
                    with self._lock:
                        self._medium.leave_in_doubt()

    def _private_guest(self, tables: Tables) -> Guest:
        return self._engine.guest(self._enter, self._backing, tables=tables, alone=True)

    # Bitmaps and snapshots

    @property
    def bitmaps(self) -> ImageBitmaps:
        """The persistent bitmaps, to be looked at and changed."""
        self._own()
        return ImageBitmaps(self._bitmap_reader, self.transaction)

    @property
    def protection(self) -> ImageProtection:
        """Sums of what the disk holds, to be made, renewed, compared and used to heal.

        Raises:
            ValueError: the image was opened to read a snapshot, of which there are no sums.
        """
        self._own()
        if self._shows_snapshot:
            raise ValueError("the sums of an image are of its disk, not of a snapshot")
        return ImageProtection(self, self._bitmap_reader, has_below=self._backing is not None)

    def _bitmap_reader(self) -> BitmapReader:
        self._own()
        engine = self._engine
        return BitmapReader(self._lock, self._enter, engine.public.bitmaps, engine.commits.tracking)

    def snapshots(self) -> tuple[Snapshot, ...]:
        """Return the internal snapshots, in the order of the image's table.

        Raises:
            FormatError, CorruptionError: the snapshot table is not one that an image can have.
        """
        self._own()
        with self._lock:
            self._enter(False)
            return self._engine.public.snapshots.read_table().snapshots

    def create_snapshot(self, name: str, date: datetime | None = None) -> Snapshot:
        """Keep the disk as it is now as an internal snapshot; durable on return.

        It is a transaction: it waits for changes under way, and holds all that was written before. Names
        need not differ; the id does.

        Args:
            name: 1 to 255 bytes of UTF-8.
            date: what to date it; None: now.

        Raises:
            ValueError: a name or date that no snapshot can have.
            UnsupportedFeatureError: the image has as many snapshots as it can have, or its refcounts are too
                narrow to count another user of its clusters.
            TransactionError, ReadOnlyError, OSError: as `transaction`; there is no snapshot.
        """
        with self.transaction() as transaction:
            return transaction.create_snapshot(name, date)

    def apply_snapshot(self, id_or_name: str) -> None:
        """Make the disk what it was when a snapshot was made, its size included; durable on return.

        What the disk held until now is gone, unless another snapshot has it. The snapshot stays.

        Args:
            id_or_name: the id, or the name where no snapshot has this id.

        Raises:
            SnapshotNotFound: there is no such snapshot.
            UnsupportedFeatureError, TransactionError, ReadOnlyError, OSError: as `create_snapshot`; the disk
                is as before.
        """
        with self.transaction() as transaction:
            transaction.apply_snapshot(id_or_name)

    def delete_snapshot(self, id_or_name: str) -> None:
        """Give up a snapshot, and the space of what it alone holds; durable on return.

        Errors as `apply_snapshot`; the snapshot is still there.
        """
        with self.transaction() as transaction:
            transaction.delete_snapshot(id_or_name)

    def flush(self) -> None:
        """Make everything that was written durable.

        Raises:
            ReadOnlyError: the image is read-only since a failed barrier.
            OSError: nothing more is durable than before. After a failed barrier the image is read-only.
        """
        self._own()
        with self._lock:
            self._enter(self._mode == "r+")
        if self._mode == "r+":
            self._engine.commits.flush(self._require_writable)

    def checkpoint(self) -> None:
        """Flush, and bring everything that the journal holds to its home.

        Errors as `flush`; the journal stays valid, and a later checkpoint tries again.
        """
        self._own(changing=True)
        with self._lock:
            self._enter(True)
        self._engine.commits.checkpoint(self._require_writable)

    def as_file(self) -> ImageFile:
        """Return the disk as a raw binary file, for `io.BufferedRandom` and all that takes a file."""
        self._own()
        with self._lock:
            self._enter(False)
        return ImageFile(self)

    # Closing

    def close(self) -> None:
        """Flush, checkpoint, and leave a standard qcow2 image. Closing again does nothing.

        First the protection is renewed, where the opening asked for that; its failure is raised last.
        After a failed barrier, or a call that was cut off, nothing is written: the next opening recovers the
        image. In a forked child this only drops the child's descriptor.

        Raises:
            TransactionError: this thread has a transaction open on this image.
            OSError: the host failed; the image is closed all the same, and stays recoverable.
        """
        if self._is_foreign:
            self._close_files()
            return
        self._own(changing=True)
        guard = self._engine.guard
        guard.require_not_mine()
        with self._refreshed(), guard.turnstile:
            try:
                if self._is_tidy():
                    with guard.alone():
                        self._engine.closing.clean()
                        # Before others may change anything again: nobody makes a closed image live.
                        self._closed = True
            finally:
                self._end()

    @contextmanager
    def _refreshed(self) -> Iterator[None]:
        """Renew the protection before the close, if that was asked for; what fails there fails behind it."""
        with ExitStack() as stack:
            try:
                if self._protect and self._is_tidy() and self.protection.needs_refresh():
                    self.protection.refresh()
            except (JqcowError, OSError) as error:
                stack.callback(_raise, error)
            yield

    def _is_tidy(self) -> bool:
        """Return True if closing has something to write, and may."""
        with self._lock:
            is_usable = not (self._closed or self._medium.poisoned or self._medium.in_doubt)
        return self._mode == "r+" and is_usable

    def _end(self) -> None:
        """Refuse all calls from here on, wait for those in flight, and close the files."""
        with self._engine.commits.turn.lock, self._lock:
            self._closed = True
        self._engine.guard.end_all()
        self._close_files()

    def _close_files(self) -> None:
        with ExitStack() as stack:
            if self._backing is not None:
                stack.callback(self._backing.close)
            if self._medium.data_file is not None:
                stack.callback(self._medium.data_file.device.close)
            stack.callback(self._medium.device.close)

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._transaction_thread == threading.get_ident():
            # The end of a ``with image.transaction()`` was cut off on the way to here, by an exception.
            with self._lock:
                self._medium.leave_in_doubt()
            self._end()
        else:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._mode
        return f"<jqcow.Image of {self._disk_bytes} bytes, {state}>"
