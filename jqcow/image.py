"""The image: create, open, read, write, zero, discard, flush, checkpoint, close.

Threads may share an image. Three locks, always taken in this order, each by ``with`` alone:

    the writer's   held by a change, and by a transaction from its begin to its end
    the turn       held by a commit (engine/turn.py)
    the lock       held by whoever looks at the image's state or changes it, never by a flush that waits

So each call sees the calls before it whole. While a flush waits for the device other threads go on, and
their flushes share the next barrier. A forked child must not use its parent's image.
See docs/threads-and-locks.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from jqcow.device.base import Device
from jqcow.device.file import FileDevice
from jqcow.engine import recovery
from jqcow.engine.datapath import DataPath
from jqcow.engine.journal import Scan
from jqcow.engine.mapping import COMPRESSED, DATA, ZERO, MappedRun
from jqcow.engine.medium import Medium
from jqcow.engine.store import random_salt
from jqcow.errors import ImageClosedError, ImageInUse, PoisonedError, ReadOnlyError, TransactionError
from jqcow.offline.check import CheckReport, check_structure
from jqcow.ondisk import header as headers
from jqcow.ondisk import layout
from jqcow.ondisk import root as roots
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.layout import SECTOR_BYTES
from jqcow.transaction import Transaction

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

DEFAULT_CLUSTER_BYTES = 65536
Mode = Literal["r", "r+"]
ExtentKind = Literal["data", "zero", "unallocated", "compressed"]
_KINDS: dict[int, ExtentKind] = {DATA: "data", ZERO: "zero", COMPRESSED: "compressed"}


@dataclass(frozen=True)
class Extent:
    """A guest range of one kind; ``offset`` and ``length`` in bytes.

    ``host_offset`` is where the range lies in the file, None where nothing of it does. A ``zero`` extent
    reads as zeros though it may keep clusters; ``unallocated`` reads as zeros too, as there is no backing
    file.
    """

    offset: int
    length: int
    kind: ExtentKind
    host_offset: int | None


@dataclass(frozen=True)
class JournalInfo:
    """The live journal: its place and length in bytes, the running epoch and the newest sequence."""

    offset: int
    length: int
    epoch: int
    sequence: int


@dataclass(frozen=True)
class ImageInfo:
    """What the header says; sizes in bytes. ``journal`` is None while the image is clean."""

    virtual_size: int
    cluster_size: int
    file_size: int
    version: int
    refcount_bits: int
    lazy_refcounts: bool
    dirty: bool
    corrupt: bool
    compression_type: Literal["zlib", "zstd"]
    snapshot_count: int
    journal: JournalInfo | None


@dataclass(frozen=True)
class Recovered:
    """What opening found in a live journal: records applied, and whether a torn one was dropped."""

    epoch: int
    first_sequence: int
    last_sequence: int
    torn_tail: bool

    @classmethod
    def from_scan(cls, scan: Scan) -> Recovered:
        """Summarise a scan."""
        first = scan.frames[0].header.sequence
        return cls(scan.epoch, first, scan.sequence, scan.torn_tail is not None)


def create(
    path: str | os.PathLike[str],
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_BYTES,
    overwrite: bool = False,
    journal_size: int = roots.DEFAULT_JOURNAL_BYTES,
) -> Image:
    """Create an image and return it open for reading and writing.

    The file appears under its name at once and whole; it and its directory are durable on return.

    Args:
        path: where; an existing file is refused unless ``overwrite``.
        size: of the disk in bytes, a multiple of 512.
        cluster_size: in bytes, a power of two from 512 to 2 MiB.
        overwrite: replace an existing file, if nobody uses it.
        journal_size: in bytes, of the journal that writing will use; a multiple of 8192 from 64 KiB to 1 GiB.

    Raises:
        ValueError: a size that no image can have.
        FileExistsError: the file exists.
        ImageInUse: the file to be replaced is in use.
        OSError: the host failed; nothing is left under the name.
    """
    _check_journal_size(journal_size)
    layout.check_disk_size(size)
    cluster_bits = _cluster_bits(cluster_size)
    device = FileDevice.create_temporary(path)
    try:
        _write_blank(device, size, cluster_bits)
        device.publish(overwrite)
        return open_device(device, "r+", journal_size=journal_size)
    except BaseException:
        device.close()
        raise


def open(
    path: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    journal_size: int | None = None,
    force_share: bool = False,
) -> Image:
    """Open an existing image.

    ``"r"`` never writes a byte: a live journal is replayed into memory. ``"r+"`` recovers a crashed image
    first. A clean image is changed only by the first write.

    Args:
        path: the image.
        mode: ``"r"`` or ``"r+"``.
        journal_size: in bytes, of the journal that writing will use; None keeps what there is, or 8 MiB.
        force_share: with ``"r"``, read also while another program writes, as ``qemu-img -U`` does. What is
            read may then be old, mixed or wrong. A live journal is refused: it would be replayed while its
            writer goes on.

    Raises:
        ValueError: another mode, ``force_share`` for writing, or a journal size that no journal can have.
        FormatError: not a qcow2 image; UnsupportedFeatureError where jqcow refuses it by name.
        CorruptionError: the image is damaged.
        ImageInUse: another process uses it, or this one by another `Image`.
        OSError: the host failed.
    """
    if mode not in ("r", "r+"):
        raise ValueError(f"mode must be 'r' or 'r+', not {mode!r}")
    if journal_size is not None:
        _check_journal_size(journal_size)
    if force_share and mode != "r":
        raise ValueError("force_share is for reading: a writer cannot share an image with other writers")
    device = FileDevice.open(path, writable=mode == "r+", share_writers=force_share)
    try:
        if force_share:
            refuse_live_journal(device)
        return open_device(device, mode, journal_size=journal_size)
    except BaseException:
        device.close()
        raise


def open_device(
    device: Device,
    mode: Mode = "r",
    *,
    journal_size: int | None = None,
    new_salt: Callable[[], bytes] = random_salt,
) -> Image:
    """Open the image on a device of your own; see `open`. `Image.close` closes the device.

    ``new_salt`` makes the 16-byte salt of each new journal; a seeded one makes a simulation replayable.
    """
    opened = recovery.open_store(
        Medium(device), writable=mode == "r+", journal_bytes=journal_size or 0, new_salt=new_salt
    )
    return Image(opened, mode)


def create_on_device(
    device: Device,
    size: int,
    *,
    cluster_size: int = DEFAULT_CLUSTER_BYTES,
    journal_size: int = roots.DEFAULT_JOURNAL_BYTES,
    new_salt: Callable[[], bytes] = random_salt,
) -> Image:
    """Create an image on an empty device of your own, durably, and return it open; see `create`."""
    _check_journal_size(journal_size)
    layout.check_disk_size(size)
    _write_blank(device, size, _cluster_bits(cluster_size))
    # Durable now: the empty image. Nobody has seen it yet.
    device.barrier("create.blank")
    return open_device(device, "r+", journal_size=journal_size, new_salt=new_salt)


def refuse_live_journal(device: FileDevice) -> None:
    """Raise ImageInUse if the file has a live journal: its writer goes on, so it cannot be replayed."""
    if roots.is_live(device.pread(SECTOR_BYTES, 0)):
        raise ImageInUse(
            f"{device.path} has a live journal, which cannot be read beside its writer. "
            "Close the program that holds the image, or open it without force_share if none does."
        )


def _write_blank(device: Device, size: int, cluster_bits: int) -> None:
    blank = blank_image(size, cluster_bits)
    device.truncate(blank.length)
    for offset, data in blank.parts:
        device.pwrite(data, offset)


def _cluster_bits(cluster_size: int) -> int:
    bits = cluster_size.bit_length() - 1
    if cluster_size <= 0 or 1 << bits != cluster_size:
        raise ValueError(f"the cluster size must be a power of two, not {cluster_size}")
    if not layout.MIN_CLUSTER_BITS <= bits <= layout.MAX_CLUSTER_BITS:
        raise ValueError(f"the cluster size must be from 512 to 2 MiB, not {cluster_size}")
    return bits


def _check_journal_size(journal_size: int) -> None:
    if not roots.MIN_JOURNAL_BYTES <= journal_size <= roots.MAX_JOURNAL_BYTES or journal_size % 8192:
        raise ValueError("the journal's size must be a multiple of 8192 from 64 KiB to 1 GiB")


class Image:
    """An open image. Offsets and lengths are in bytes, of the guest's disk.

    As a context manager it closes at the end, also after an exception: what was written before stays.
    """

    def __init__(self, opened: recovery.Opened, mode: Mode) -> None:
        """Not for users: see `open` and `create`."""
        self._store = opened.store
        self._data = DataPath(opened.store)
        self._mode: Mode = mode
        self._lock = opened.store.medium.lock
        self._writer = threading.RLock()
        self._transaction_thread: int | None = None
        self._owner_pid = os.getpid()
        self._closed = False
        self.recovered = None if opened.scan is None else Recovered.from_scan(opened.scan)

    # What it is

    @property
    def size(self) -> int:
        """Size of the disk, as last committed or changed; a transaction's own size is its `size`."""
        with self._own_lock():
            self._store.enter()
            return self._disk_bytes

    @property
    def _disk_bytes(self) -> int:
        return self._store.metadata.header.size

    @property
    def mode(self) -> Mode:
        """``"r"`` or ``"r+"``, as it was opened."""
        return self._mode

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def info(self) -> ImageInfo:
        """Return what the header says.

        Raises:
            ImageClosedError: the image is closed.
        """
        with self._own_lock():
            self._enter()
            header, journal = self._store.metadata.header, self._store.journal
            live = None
            if journal is not None:
                extent = journal.extent
                live = JournalInfo(extent.offset, extent.length, journal.epoch, journal.sequence)
            return ImageInfo(
                virtual_size=header.size,
                cluster_size=1 << header.cluster_bits,
                file_size=self._store.medium.size(),
                version=header.version,
                refcount_bits=1 << header.refcount_order,
                lazy_refcounts=bool(header.compatible_features & headers.COMPATIBLE_LAZY_REFCOUNTS),
                dirty=bool(header.incompatible_features & headers.INCOMPATIBLE_DIRTY),
                corrupt=bool(header.incompatible_features & headers.INCOMPATIBLE_CORRUPT),
                compression_type="zstd" if header.compression_type else "zlib",
                snapshot_count=header.nb_snapshots,
                journal=live,
            )

    def check(self) -> CheckReport:
        """Check the refcounts and tables as they are now, unflushed changes included. Changes nothing.

        Raises:
            JqcowError: the metadata cannot be walked.
            OSError: the host failed.
        """
        with self._own_lock():
            self._enter()
            reserved = [(extent.offset, extent.length) for extent in self._live_extents()]
            return check_structure(self._store.view, self._store.view_bytes, reserved=reserved)

    def _live_extents(self) -> list[roots.JournalRange]:
        return [] if self._store.journal is None else [self._store.journal.extent]

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
        with self._own_lock():
            self._enter()
            length = self._disk_bytes - offset if length is None else length
            self._data.check_range(length, offset)
        return self._joined_extents(length, offset)

    def _joined_extents(self, length: int, offset: int) -> Iterator[Extent]:
        end = offset + length
        joined: Extent | None = None
        while offset < end:
            with self._own_lock():
                self._enter()
                run = self._data.mapping.run(offset, end - offset)
            extent = _as_extent(run, offset)
            if joined is not None and _follows(joined, extent):
                joined = Extent(joined.offset, joined.length + extent.length, joined.kind, joined.host_offset)
            else:
                if joined is not None:
                    yield joined
                joined = extent
            offset += run.length
        if joined is not None:
            yield joined

    # Reading

    def pread(self, length: int, offset: int) -> bytes:
        """Return ``length`` bytes of the disk from ``offset``.

        Raises:
            ValueError: the range reaches past the end.
            UnsupportedFeatureError: the range holds a compressed cluster.
            CorruptionError: a table on the way is damaged.
            OSError: the host failed.
        """
        with self._own_lock():
            self._enter()
            self._data.check_range(length, offset)
        buffer = bytearray(length)
        self.pread_into(buffer, offset)
        return bytes(buffer)

    def pread_into(self, buffer: WriteableBuffer, offset: int) -> None:
        """Fill ``buffer`` from the disk at ``offset``; errors as `pread`."""
        with memoryview(buffer) as whole, whole.cast("B") as view, self._own_lock():
            self._enter()
            self._data.check_range(len(view), offset)
            self._data.read_into(view, offset)

    # Writing

    def pwrite(self, buffer: ReadableBuffer, offset: int, fua: bool = False) -> int:
        """Write ``buffer`` to the disk at ``offset``; return its length.

        A crash before the next `flush` leaves each sector old or new. ``fua`` flushes before returning.

        Raises:
            ValueError: the range reaches past the end.
            ReadOnlyError: the image was opened with ``"r"``, or is read-only since a failed barrier.
            OSError: the host failed; the range may be old or new, all else is as before.
        """
        with memoryview(buffer) as whole, whole.cast("B") as view:
            self._change(
                len(view),
                offset,
                lambda length, start: self._data.write(view[start - offset :][:length], start),
            )
            if fua:
                self.flush()
            return len(view)

    def write_zeroes(self, length: int, offset: int, unmap: bool = True) -> None:
        """Make a range read as zeros, without writing data where that can be avoided.

        ``unmap`` frees the clusters that the range covers whole; without it they stay allocated.
        Errors as `pwrite`.
        """
        self._change(
            length, offset, lambda length, start: self._data.write_zeroes(length, start, unmap=unmap)
        )

    def discard(self, length: int, offset: int) -> None:
        """Free the clusters that a range covers whole: they read as zeros. The rest of it is left alone.

        Errors as `pwrite`.
        """
        self._change(length, offset, self._data.discard)

    def _change(self, length: int, offset: int, change: Callable[[int, int], None]) -> None:
        """Call ``change(length, offset)`` for each part of a range, and keep what is staged within bounds."""
        lock = self._own_lock(changing=True)
        with self._writer:
            with lock:
                self._enter_to_change()
                self._data.check_range(length, offset)
                parts = self._data.spans(offset, length)
            for start, part in parts:
                with lock:
                    self._enter_to_change()
                    change(part, start)
                self._store.commit_if_large()

    def resize(self, size: int) -> None:
        """Set the size of the disk: what is added reads as zeros, what is cut off is freed.

        Atomic. Growing is durable with the next `flush`; shrinking is a transaction, and durable on return.

        Raises:
            ValueError: not a multiple of 512.
            ReadOnlyError, OSError: as `pwrite`; the size is as before.
        """
        layout.check_disk_size(size)
        if size < self.size:
            with self.transaction() as transaction:
                transaction.resize(size)
            return
        lock = self._own_lock(changing=True)
        with self._writer, lock:
            self._enter_to_change()
            if size > self._disk_bytes:
                self._data.resize(size)

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
        lock = self._own_lock(changing=True)
        # Held by the generator's frame: it is released even if this generator is never resumed.
        with self._writer:
            transaction = Transaction(self._data, self._own_lock, self._enter, self._require_writable)
            try:
                self._transaction_thread = threading.get_ident()
                with lock:
                    self._enter_to_change()
                self._store.begin_transaction()
                yield transaction
                if transaction.is_open:
                    transaction._commit()
            finally:
                # No call, so that nothing can come in between. The next change undoes what was not committed.
                self._transaction_thread = None
                transaction._open = False

    def flush(self) -> None:
        """Make everything that was written durable.

        Raises:
            ReadOnlyError: the image is read-only since a failed barrier.
            OSError: nothing more is durable than before. After a failed barrier the image is read-only.
        """
        with self._own_lock():
            self._enter()
            if self._mode == "r+":
                self._require_writable()
        if self._mode == "r+":
            self._store.flush(self._require_writable)

    def checkpoint(self) -> None:
        """Flush, and bring everything that the journal holds to its home.

        Errors as `flush`; the journal stays valid, and a later checkpoint tries again.
        """
        lock = self._own_lock(changing=True)
        with self._writer:
            with lock:
                self._enter()
                self._require_writable()
            self._store.checkpoint()

    def as_file(self) -> ImageFile:
        """Return the disk as a raw binary file, for `io.BufferedRandom` and all that takes a file."""
        with self._own_lock():
            self._enter()
        return ImageFile(self)

    # Closing

    def close(self) -> None:
        """Flush, checkpoint, and leave a standard qcow2 image. Closing again does nothing.

        After a failed barrier nothing is written: the next opening recovers the image. In a forked child this
        only drops the child's descriptor.

        Raises:
            TransactionError: this thread has a transaction open on this image.
            OSError: the host failed; the image is closed all the same, and stays recoverable.
        """
        if self._is_foreign:
            self._store.medium.device.close()
            return
        lock = self._own_lock(changing=True)
        with self._writer:
            self._close(lock)

    def _close(self, lock: threading.RLock) -> None:
        """Close, with no change under way."""
        try:
            with lock:
                self._store.enter(alone=True)
                tidy = self._mode == "r+" and not self._closed and not self._store.medium.poisoned
            if tidy:
                self._store.clean()
        finally:
            with self._store.turn.taken, lock:
                self._closed = True
                self._store.medium.device.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._transaction_thread == threading.get_ident():
            # The end of a ``with image.transaction()`` was cut off on the way to here, by an exception.
            self._close(self._lock)
        else:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._mode
        return f"<jqcow.Image of {self._disk_bytes} bytes, {state}>"

    # Before anything else

    @property
    def _is_foreign(self) -> bool:
        return os.getpid() != self._owner_pid

    def _own_lock(self, *, changing: bool = False) -> threading.RLock:
        """Return the lock, to be taken by ``with``; refuse whom it would keep waiting forever.

        A forked child has a copy of the locks as they were, and of nothing that could release them.
        """
        if self._is_foreign:
            raise ImageInUse(
                f"the image belongs to process {self._owner_pid}, which this one was forked from: "
                "open it anew, once that process has closed it"
            )
        if changing and self._transaction_thread == threading.get_ident():
            raise TransactionError("this thread has a transaction open: use its own methods")
        for taken in (self._lock, self._store.turn.taken, *((self._writer,) if changing else ())):
            if _is_mine(taken):
                raise RuntimeError("the image is in use by this thread: a finaliser must not come back to it")
        return self._lock

    def _enter(self) -> None:
        """First thing with the lock taken."""
        self._store.enter()
        if self._closed:
            raise ImageClosedError

    def _enter_to_change(self) -> None:
        """First thing with the lock taken, and the writer's."""
        self._store.enter(alone=True)
        self._require_writable()
        self._store.turn.changing()

    def _require_writable(self) -> None:
        if self._closed:
            raise ImageClosedError
        if self._mode != "r+":
            raise ReadOnlyError("the image is open for reading only")
        if self._store.medium.poisoned:
            raise PoisonedError("the image is read-only since a barrier failed: reopen it to recover")


def _is_mine(lock: threading.RLock) -> bool:
    """Return True if the calling thread has the lock: a finaliser runs in the midst of anything."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]


def _as_extent(run: MappedRun, offset: int) -> Extent:
    kind = _KINDS.get(run.kind, "unallocated")
    return Extent(offset, run.length, kind, run.host_offset if kind == "data" else None)


def _follows(before: Extent, after: Extent) -> bool:
    if before.kind != after.kind or before.kind == "compressed":
        return False
    if before.host_offset is None or after.host_offset is None:
        return before.host_offset is after.host_offset
    return before.host_offset + before.length == after.host_offset


class ImageFile(io.RawIOBase):
    """A disk as a raw binary file with a position.

    Closing it leaves the image open, and flushes nothing: it may be closed by the garbage collector, at any
    time.
    """

    def __init__(self, image: Image) -> None:
        """Start at offset 0."""
        super().__init__()
        self._image = image
        self._position = 0
        self._closing = False

    def readable(self) -> bool:
        """Always True."""
        return True

    def writable(self) -> bool:
        """True if the image was opened for writing."""
        return self._image.mode == "r+"

    def seekable(self) -> bool:
        """Always True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position; past the end is allowed, as in files."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._image.size}
        if whence not in base or base[whence] + offset < 0:
            raise ValueError(f"cannot seek to {offset} from {whence}")
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read up to the end of the disk."""
        with memoryview(buffer) as whole, whole.cast("B") as view:
            length = min(len(view), max(0, self._image.size - self._position))
            self._image.pread_into(view[:length], min(self._position, self._image.size))
        self._position += length
        return length

    def write(self, buffer: Any) -> int:
        """Write at the position; what would lie past the end raises ValueError, as a disk does not grow."""
        written = self._image.pwrite(buffer, self._position)
        self._position += written
        return written

    def flush(self) -> None:
        """Flush the image, unless it is closed or open for reading only."""
        super().flush()
        if not self._closing and not self._image.closed and self.writable():
            self._image.flush()

    def close(self) -> None:
        """Close the file alone."""
        self._closing = True
        super().close()
