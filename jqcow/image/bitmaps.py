"""Persistent bitmaps, as an image and a transaction show them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from jqcow.engine.bitmaps import Bitmaps
from jqcow.engine.bits import STEP_BYTES, dirty_ranges
from jqcow.engine.tables import Tables
from jqcow.engine.tracking import Tracking
from jqcow.errors import BitmapNotFound
from jqcow.image.arguments import number, optional_number, text
from jqcow.ondisk import bitmaps as ondisk
from jqcow.ondisk.bitmaps import Bitmap, BitmapEntry

if TYPE_CHECKING:
    from jqcow.image.transaction import Transaction

_DEFAULT_MIN, _DEFAULT_MAX = 4096, 65536
MARKED_AT_ONCE = 4096


@dataclass(frozen=True)
class DirtyExtent:
    """A range of the disk, in bytes, that a bitmap calls dirty."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + self.length


def check_name(name: str) -> str:
    """Return a name that a bitmap can have.

    Raises:
        ValueError: it cannot.
    """
    encoded = text(name).encode("utf-8", "surrogateescape")
    if not encoded or len(encoded) > ondisk.MAX_NAME_BYTES or b"\0" in encoded:
        raise ValueError(
            f"the name of a bitmap has 1 to {ondisk.MAX_NAME_BYTES} bytes, none of them 0: {name!r}"
        )
    return name


def searched(name: str) -> str:
    """Return a name to look for, before anything is changed.

    Raises:
        TypeError: it is no text.
        BitmapNotFound: no bitmap can have it.
    """
    try:
        text(name).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise BitmapNotFound(name) from None
    return name


def _range_of(extent: DirtyExtent) -> tuple[int, int]:
    offset, length = number(extent.offset), number(extent.length)
    if offset < 0 or length < 0:
        raise ValueError(f"{length} bytes at {offset} are no range of a disk")
    return offset, length


def granularity_bits(granularity: int | None, cluster_bytes: int) -> int:
    """Return a granularity as a power of two; None: QEMU's default.

    Raises:
        ValueError: no bitmap can have it.
    """
    if granularity is None:
        granularity = min(max(cluster_bytes, _DEFAULT_MIN), _DEFAULT_MAX)
    bits = number(granularity).bit_length() - 1
    if not ondisk.MIN_GRANULARITY_BITS <= bits <= ondisk.MAX_GRANULARITY_BITS or granularity != 1 << bits:
        raise ValueError(f"a granularity is a power of two from 512 bytes to 2 GiB, not {granularity}")
    return bits


@dataclass(frozen=True)
class BitmapReader:
    """Looks at the bitmaps of one image, under its lock."""

    lock: threading.RLock
    enter: Callable[[bool], None]
    bitmaps: Bitmaps
    tracking: Tracking | None = None

    def told(self) -> tuple[Bitmap, ...]:
        """Return what people are told of the bitmaps."""
        with self.lock:
            self.enter(False)
            return self.bitmaps.told()

    def dirty_extents(self, name: str, length: int | None, offset: int) -> Iterator[DirtyExtent]:
        """Yield what is dirty, as `ImageBitmaps.dirty_extents`."""
        with self.lock:
            self.enter(False)
            entry, size = self.bitmaps.usable(name), self.bitmaps.view.header.size
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} are not within the disk of {size} bytes")
        end = offset + length
        return self._within(
            dirty_ranges(self._chunks(name, offset, end), entry.granularity_bits, size), offset, end
        )

    def _within(self, ranges: Iterable[tuple[int, int]], offset: int, end: int) -> Iterator[DirtyExtent]:
        for first, last in ranges:
            start, stop = max(first, offset), min(last, end)
            if start < stop:
                yield DirtyExtent(start, stop - start)

    def _chunks(self, name: str, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield the bytes of a bitmap, each step under the lock: a change meanwhile may show later."""
        position = None
        while True:
            with self.lock:
                self.enter(False)
                entry = self.bitmaps.usable(name)
                if position is None:
                    position = offset >> entry.granularity_bits + 3
                stop = min(
                    end - 1 >> entry.granularity_bits + 3,
                    (entry.bits_for(self.bitmaps.view.header.size) - 1) >> 3,
                )
                if position > stop or end <= offset:
                    return
                chunk = self._exact(entry, position, min(STEP_BYTES, stop + 1 - position))
            yield position, chunk
            position += len(chunk)

    def _exact(self, entry: BitmapEntry, start: int, length: int) -> bytes:
        chunk = self.bitmaps.read(entry, start, length)
        return chunk if self.tracking is None else self.tracking.exact(entry, start, chunk)


class _Shown(Protocol):
    def __call__(self) -> BitmapReader: ...


class _Bitmaps:
    """What an image and a transaction show alike."""

    def __init__(self, reader: _Shown) -> None:
        self._reader = reader

    def __iter__(self) -> Iterator[Bitmap]:
        """Yield the bitmaps in the order of the image's directory."""
        return iter(self._reader().told())

    def __len__(self) -> int:
        return len(self._reader().told())

    def dirty_extents(self, name: str, length: int | None = None, offset: int = 0) -> Iterator[DirtyExtent]:
        """Yield what a bitmap calls dirty, in order, neighbours joined. Unflushed changes show.

        Args:
            name: of the bitmap.
            length: of the range of the disk to look at; None: to its end.
            offset: of that range.

        Raises:
            BitmapNotFound: there is no such bitmap.
            BitmapError: it was left in use, and may be wrong.
            ValueError: the range reaches past the end.
            CorruptionError: the directory or a table is damaged.
        """
        return self._reader().dirty_extents(searched(name), optional_number(length), number(offset))


class TransactionBitmaps(_Bitmaps):
    """The bitmaps of a transaction; what is changed here is durable with it, or undone."""

    def __init__(self, tables: Tables, enter: Callable[..., None]) -> None:
        """Not for users: see `Transaction.bitmaps`."""
        self._tables = tables
        self._enter = enter
        self._lock = tables.blocks.medium.lock
        super().__init__(lambda: BitmapReader(self._lock, lambda _: None, tables.bitmaps))

    def _change(self, change: Callable[[Bitmaps], None]) -> None:
        self._enter(changing=True)
        with self._lock, self._tables.operation():
            change(self._tables.bitmaps)

    def add(self, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        """Add a bitmap; see `ImageBitmaps.add`."""
        bits = granularity_bits(granularity, self._tables.geometry.cluster_bytes)
        checked = check_name(name)
        self._change(lambda bitmaps: bitmaps.add(checked, bits, enabled=enabled))

    def remove(self, name: str) -> None:
        """Remove a bitmap; see `ImageBitmaps.remove`."""
        known = searched(name)
        self._change(lambda bitmaps: bitmaps.remove(known))

    def clear(self, name: str) -> None:
        """Make everything clean; see `ImageBitmaps.clear`."""
        known = searched(name)
        self._change(lambda bitmaps: bitmaps.clear(known))

    def enable(self, name: str) -> None:
        """Take note of changes from here on; see `ImageBitmaps.enable`."""
        known = searched(name)
        self._change(lambda bitmaps: bitmaps.set_enabled(known, enabled=True))

    def disable(self, name: str) -> None:
        """Take no note of changes any more; see `ImageBitmaps.disable`."""
        known = searched(name)
        self._change(lambda bitmaps: bitmaps.set_enabled(known, enabled=False))

    def rename(self, name: str, new: str) -> None:
        """Give a bitmap another name; see `ImageBitmaps.rename`."""
        known, checked = searched(name), check_name(new)
        self._change(lambda bitmaps: bitmaps.rename(known, checked))

    def merge(self, name: str, *sources: str) -> None:
        """Make dirty what is dirty in others; see `ImageBitmaps.merge`."""
        known, others = searched(name), [searched(source) for source in sources]

        def change(bitmaps: Bitmaps) -> None:
            for other in others:
                bitmaps.merge(known, other)

        self._change(change)

    def mark(self, name: str, extents: Iterable[DirtyExtent]) -> None:
        """Make ranges of the disk dirty; see `ImageBitmaps.mark`. A failure leaves some of them dirty."""
        # They may come from another image, under its lock, and be very many.
        known, left = searched(name), map(_range_of, extents)
        found = list(islice(left, MARKED_AT_ONCE))

        def change(bitmaps: Bitmaps) -> None:
            entry = bitmaps.usable(known)
            for offset, length in found:
                bitmaps.mark(entry, offset, length)

        self._change(change)
        while found := list(islice(left, MARKED_AT_ONCE)):
            self._change(change)


class ImageBitmaps(_Bitmaps):
    """The bitmaps of an image. Each change is a transaction, durable on return; iterating yields `Bitmap`.

    All raise TransactionError, ReadOnlyError and OSError as `Image.transaction`, CorruptionError where the
    directory is damaged, BitmapNotFound, and BitmapError where the bitmap is not one for this; then nothing
    is changed.
    """

    def __init__(
        self, reader: _Shown, transaction: Callable[[], AbstractContextManager[Transaction]]
    ) -> None:
        """Not for users: see `Image.bitmaps`."""
        super().__init__(reader)
        self._transaction = transaction

    def add(self, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        """Add a bitmap in which nothing is dirty.

        Args:
            name: 1 to 1023 bytes of UTF-8 that no other bitmap has.
            granularity: what one bit stands for: a power of two from 512 bytes to 2 GiB; None: the cluster
                size, but 4 to 64 KiB.
            enabled: it takes note of every change from here on.

        Raises:
            ValueError: a name or granularity that no bitmap can have.
            UnsupportedFeatureError: an image of version 2, or a bitmap of more than 512 MiB.
        """
        with self._transaction() as transaction:
            transaction.bitmaps.add(name, granularity, enabled=enabled)

    def remove(self, name: str) -> None:
        """Remove a bitmap, also one that was left in use."""
        with self._transaction() as transaction:
            transaction.bitmaps.remove(name)

    def clear(self, name: str) -> None:
        """Make everything clean in a bitmap."""
        with self._transaction() as transaction:
            transaction.bitmaps.clear(name)

    def enable(self, name: str) -> None:
        """Have a bitmap take note of every change from here on."""
        with self._transaction() as transaction:
            transaction.bitmaps.enable(name)

    def disable(self, name: str) -> None:
        """Have a bitmap stay as it is, whatever changes."""
        with self._transaction() as transaction:
            transaction.bitmaps.disable(name)

    def rename(self, name: str, new: str) -> None:
        """Give a bitmap another name."""
        with self._transaction() as transaction:
            transaction.bitmaps.rename(name, new)

    def merge(self, name: str, *sources: str) -> None:
        """Make dirty in a bitmap what is dirty in others of the image too; granularities may differ."""
        with self._transaction() as transaction:
            transaction.bitmaps.merge(name, *sources)

    def mark(self, name: str, extents: Iterable[DirtyExtent]) -> None:
        """Make ranges of the disk dirty in a bitmap, as those of a bitmap in another image.

        Raises:
            ValueError: an offset or length is negative. What lies past the end of the disk is left out.
        """
        with self._transaction() as transaction:
            transaction.bitmaps.mark(name, extents)
