"""Protection of an image: sums of what its disk holds, made, renewed, compared, and used to heal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from jqcow import _native
from jqcow.device.disk import Disk, Extent, read_padded
from jqcow.errors import CorruptionError, FormatError, UnsupportedFeatureError
from jqcow.image.bitmaps import BitmapReader
from jqcow.image.comparing import Comparing
from jqcow.image.known_sums import KnownSums, State, UnitRange, UnitRanges, slices
from jqcow.image.refreshing import Progress, Refresh
from jqcow.image.unit_sums import is_unreadable
from jqcow.ondisk import protection as ondisk
from jqcow.ondisk.protection import CHANGED, RECORD, Units, sum_of

if TYPE_CHECKING:
    from jqcow.image.transaction import Transaction

HEALED_AT_ONCE_BYTES = 16 << 20
"""A transaction replaces so much."""


@dataclass(frozen=True)
class VerifyReport:
    """What `ImageProtection.verify` found; lengths in bytes.

    Attributes:
        fault: why there is nothing to verify by, in words; "" if there is.
        is_protected: False if the image has no protection at all.
        unit_bytes: what one sum is of.
        refreshed: when sums were made last, in seconds since 1970; 0 if there are none.
        right_bytes: of the disk have the content that they had.
        below_bytes: of the disk the image leaves to its backing file.
        ranges: all that is neither.
    """

    fault: str = ""
    is_protected: bool = True
    unit_bytes: int = 0
    refreshed: float = 0
    right_bytes: int = 0
    below_bytes: int = 0
    ranges: tuple[UnitRange, ...] = ()

    def bytes_of(self, *states: State) -> int:
        """Return how many bytes are in one of these states."""
        return sum(found.length for found in self.ranges if found.state in states)

    @property
    def wrong_bytes(self) -> int:
        """How many bytes have not the content that they had, cannot be read, or nobody knows that."""
        return self.bytes_of("wrong", "unreadable", "unsure")

    @property
    def ok(self) -> bool:
        """True if there are sums, and nothing speaks against the content."""
        return not self.fault and not self.wrong_bytes


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh did; lengths in bytes.

    Attributes:
        fault: why all sums were made anew, in words; "" if only those of what had changed.
        renewed_bytes: of the disk got a sum.
        unreadable_bytes: got none, as they cannot be read.
    """

    fault: str = ""
    renewed_bytes: int = 0
    unreadable_bytes: int = 0


@dataclass(frozen=True)
class HealReport:
    """What `ImageProtection.heal` did.

    Attributes:
        found: what was wrong before.
        healed_bytes: of it have the content that they had, again.
        left: what has not: the backup has something else there.
    """

    found: VerifyReport
    healed_bytes: int = 0
    left: tuple[UnitRange, ...] = ()


class ProtectedImage(Protocol):
    """What of an image its protection works on; see `Image`."""

    @property
    def size(self) -> int:
        """Size of the disk."""
        ...

    def extents(self, length: int | None = None, offset: int = 0) -> Iterator[Extent]:
        """Yield what a range holds."""
        ...

    def pread(self, length: int, offset: int) -> bytes:
        """Return the bytes of a range."""
        ...

    def transaction(self) -> AbstractContextManager[Transaction]:
        """Make changes together."""
        ...

    def checkpoint(self) -> None:
        """Bring everything home."""
        ...


def _nobody(done: int, total: int) -> None:
    """Tell nobody how far it is."""


class ImageProtection:
    """Sums of what the disk holds, kept in the image in bitmaps of three names; see docs/format."""

    def __init__(self, image: ProtectedImage, reader: Callable[[], BitmapReader], *, has_below: bool) -> None:
        """Not for users: see `Image.protection`."""
        self._image, self._reader, self._has_below = image, reader, has_below

    def _known(self) -> KnownSums:
        reader = self._reader()
        with reader.lock:
            reader.enter(False)
            return KnownSums.of(reader.bitmaps)

    def fault(self) -> str | None:
        """Return why the sums of the image do not count, in words; "" if they do, None if it has none.

        Raises:
            CorruptionError: the bitmap directory or a table is damaged.
            UnsupportedFeatureError: protection of a newer version.
        """
        known = self._known()
        return known.fault if known.entries else None

    def needs_refresh(self) -> bool:
        """Return True if a refresh has something to do. Errors as `fault`."""
        reader, known = self._reader(), self._known()
        if known.fault or known.known_record.units != known.units:
            return True
        with reader.lock:
            return any(any(known.changed(*part)) for part in slices(known.units))

    def refresh(self, progress: Progress = _nobody) -> RefreshReport:
        """Make the sums of all that has changed since the last time; of everything if there are none.

        It is done in transactions, each durable: what is interrupted goes on from there the next time.

        Args:
            progress: called with the bytes of the disk that are done, and all of them.

        Raises:
            UnsupportedFeatureError: an encrypted image, one of version 2, a disk below 1 MiB, or one so large
                that its sums are no bitmap.
            JqcowError, OSError: as `Image.transaction`.
        """
        renewed, unreadable, position = 0, 0, 0
        known, fault = self._known(), self.fault() or ""
        _require_possible(known)
        if fault:
            self.remove()
        while True:
            with self._image.transaction() as transaction:
                step = Refresh(self._image, transaction, has_below=self._has_below)
                if not position:
                    step.begin()
                position = step.run(position, progress)
                step.finish()
            renewed, unreadable = renewed + step.renewed_bytes, unreadable + step.unreadable_bytes
            if position >= step.known.units.count:
                return RefreshReport(fault, renewed, unreadable)

    def remove(self) -> bool:
        """Take the protection away; return False if there was none.

        Its record is overwritten first: what is left of it in freed clusters is never taken for the sums of
        what the image holds then.

        Raises:
            JqcowError, OSError: as `Image.transaction`.
        """
        if self.fault() is None:
            return False
        with self._image.transaction() as transaction:
            known = KnownSums.of(transaction._tables.bitmaps)
            if RECORD in known.entries:
                _write(transaction, known, RECORD, 0, bytes(len(known.record_payload())))
        # Home, and not in the journal alone: what is freed next is not written any more.
        self._image.checkpoint()
        with self._image.transaction() as transaction:
            for name in known.entries:
                transaction.bitmaps.remove(name)
        return True

    def verify(self, progress: Progress = _nobody) -> VerifyReport:
        """Read all that has a sum, and compare. Nothing is changed.

        Args:
            progress: as in `refresh`.

        Raises:
            JqcowError, OSError: a file cannot be read for a reason that is not damage.
        """
        known = self._known()
        if known.fault:
            return VerifyReport(known.fault, is_protected=bool(known.entries))
        comparing = Comparing(self._image, self._reader(), known, has_below=self._has_below)
        for first, end in slices(known.units):
            comparing.compare(first, end)
            progress(known.units.length(0, end), known.units.disk_bytes)
        return VerifyReport(
            unit_bytes=known.units.unit_bytes,
            refreshed=known.known_record.stamp / 1e9,
            right_bytes=comparing.right_bytes,
            below_bytes=comparing.below_bytes,
            ranges=comparing.found.ranges(),
        )

    def heal(self, backup: Disk, progress: Progress = _nobody) -> HealReport:
        """Replace what is wrong by what a backup has there, if that has the right sum.

        Args:
            backup: any disk; what lies past its end is zeros.
            progress: as in `verify`.

        Raises:
            JqcowError, OSError: as `verify` and `Image.transaction`; what was healed before stays.
        """
        known, found = self._known(), self.verify(progress)
        bits, at_once = known.units.bits, max(1, HEALED_AT_ONCE_BYTES >> known.units.bits)
        waiting = [
            (unit, bad.state)
            for bad in found.ranges
            if bad.state != "changed"
            for unit in range(bad.offset >> bits, (bad.offset + bad.length - 1 >> bits) + 1)
        ]
        left, healed = UnitRanges(known.units), 0
        for start in range(0, len(waiting), at_once):
            part = waiting[start : start + at_once]
            with self._image.transaction() as transaction:
                known = KnownSums.of(transaction._tables.bitmaps)
                good = {unit for unit, _ in part if _heal(transaction, known, backup, unit)}
            for unit, state in part:
                if unit in good:
                    healed += known.units.length(unit, unit + 1)
                else:
                    left.add(unit, state)
        return HealReport(found, healed, left.ranges())


def _require_possible(known: KnownSums) -> None:
    """Raise UnsupportedFeatureError for an image that is not to be protected."""
    if known.bitmaps.view.header.crypt_method:
        told = "the sums would tell about what it holds"
        raise UnsupportedFeatureError("protecting an encrypted image", told)
    if known.units.disk_bytes < ondisk.MIN_DISK_BYTES:
        raise UnsupportedFeatureError("protecting a disk of less than 1 MiB")


def _heal(transaction: Transaction, known: KnownSums, backup: Disk, unit: int) -> bool:
    """Replace a unit by that of a backup, if this has its sum; then it is as clean as before (Y2)."""
    units = known.units
    if known.fault or unit >= min(known.sure_units, units.count):
        return False
    bits = known.changed(unit & ~7, (unit & ~7) + 1)
    content = _read_unit(backup, units, unit)
    if bits[0] >> (unit & 7) & 1 or content is None:
        return False
    if sum_of(content, units.unit_bytes) != ondisk.unpack_sums(known.sums(unit, unit + 1))[0]:
        return False
    offset = unit << units.bits
    try:
        if _native.is_zero(content):
            transaction.write_zeroes(len(content), offset)
        else:
            transaction.pwrite(content, offset)
    except (OSError, CorruptionError, FormatError) as error:
        if not is_unreadable(error):
            raise
        return False
    _write(transaction, known, CHANGED, unit >> 3, bits)
    return True


def _read_unit(backup: Disk, units: Units, unit: int) -> bytes | None:
    """Return what a backup has of a unit; None if it cannot be read there."""
    content = bytearray(units.length(unit, unit + 1))
    try:
        read_padded(backup, memoryview(content), unit << units.bits)
    except (OSError, CorruptionError, FormatError) as error:
        if not is_unreadable(error):
            raise
        return None
    return bytes(content)


def _write(transaction: Transaction, known: KnownSums, name: str, start: int, data: bytes) -> None:
    """Replace bytes of the payload of one of the bitmaps."""
    entry = known.entries[name]
    transaction._operate(lambda _: known.bitmaps.write(entry, start, data))
