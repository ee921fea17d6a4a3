"""The guest's data on the device: as it is, encrypted, or out of reach for want of a passphrase.

Data and nothing else is encrypted: tables, refcounts, header and journal are not, and compressed clusters,
which QEMU stores as they are, are not either.

E1. Nothing of an encrypted image reads as zeros for want of writing: no pair of it is zero-safe.
E2. A sector is encrypted, and written, as a whole. Requests that touch one guest cluster of an encrypted
    image follow each other if one of them writes there: nobody sees half a sector.
"""

from __future__ import annotations

from typing import NoReturn, Protocol

from jqcow.device.base import ReadBuffer
from jqcow.device.file import path_of
from jqcow.engine.datafile import DataFile
from jqcow.engine.medium import Medium
from jqcow.engine.metadata import View
from jqcow.errors import CorruptionError, PassphraseError, UnsupportedFeatureError, WrongPassphrase
from jqcow.ondisk import keys, layout, luks
from jqcow.ondisk.header import CRYPT_NONE
from jqcow.ondisk.keys import Passphrase, Secret, secret_for
from jqcow.ondisk.layout import DATA_FILE, SECTOR_BYTES, HostOffset
from jqcow.ondisk.luks import LuksHeader, Pointer
from jqcow.ondisk.sectors import SectorCipher

ENCRYPTED_AT_ONCE = 1 << 20
"""So many bytes are encrypted before they are written: it bounds memory."""
NEEDED = "the image is encrypted, and its passphrase is needed"


class GuestData(Protocol):
    """Reads and writes data of the guest by host offset, in bytes; errors as `Medium`."""

    @property
    def is_encrypted(self) -> bool:
        """True if E1 and E2 are to be kept."""
        ...

    def pread_into(self, buffer: memoryview, offset: HostOffset) -> None:
        """Fill ``buffer`` with the guest's bytes."""
        ...

    def pwrite(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        """Write all of ``buffer`` or raise."""
        ...


class Store(Protocol):
    """Where the data lies, as it is stored: the image's medium, or its data file."""

    def pread_into(self, buffer: memoryview, offset: HostOffset) -> None:
        """Fill ``buffer``."""
        ...

    def pwrite(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        """Write all of ``buffer`` or raise."""
        ...


class Outside:
    """The data file of an image, which nobody changes once the medium's state is not known."""

    def __init__(self, medium: Medium, data_file: DataFile) -> None:
        self._medium = medium
        self._data_file = data_file
        self.pread_into = data_file.pread_into

    def pwrite(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        """Write all of ``buffer`` or raise."""
        self._medium.require_healthy()
        self._data_file.pwrite(buffer, offset)


class NoDataFile:
    """A data file that nobody opened: for who needs the tables alone."""

    def __init__(self, medium: Medium) -> None:
        self._medium = medium

    def _refuse(self) -> NoReturn:
        image = path_of(self._medium.device)
        raise UnsupportedFeatureError("data without its external data file", f"that of {image} is not open")

    def pread_into(self, buffer: memoryview, offset: HostOffset) -> None:
        """Raise UnsupportedFeatureError."""
        self._refuse()

    def pwrite(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        """Raise UnsupportedFeatureError."""
        self._refuse()


def _store_of(medium: Medium, view: View) -> Store:
    if not view.header.has_data_file:
        return medium
    return NoDataFile(medium) if medium.data_file is None else Outside(medium, medium.data_file)


class PlainData:
    """Data as it is stored."""

    is_encrypted = False

    def __init__(self, store: Store) -> None:
        self.pread_into = store.pread_into
        self.pwrite = store.pwrite


class LockedData:
    """Encrypted data, and no passphrase: for who changes metadata alone."""

    is_encrypted = True

    def __init__(self, medium: Medium) -> None:
        self._medium = medium

    def _refuse(self) -> NoReturn:
        raise PassphraseError(NEEDED, path_of(self._medium.device))

    def pread_into(self, buffer: memoryview, offset: HostOffset) -> None:
        """Raise PassphraseError."""
        self._refuse()

    def pwrite(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        """Raise PassphraseError."""
        self._refuse()


class EncryptedData:
    """Data that is encrypted on its way to the device, by sectors numbered from host offset 0, as in QEMU.

    In a data file it is the offset there that counts.
    """

    is_encrypted = True

    def __init__(self, store: Store, cipher: SectorCipher) -> None:
        self._store = store
        self._cipher = cipher

    def pread_into(self, buffer: memoryview, offset: HostOffset) -> None:
        """Fill ``buffer`` with the guest's bytes."""
        start, end = _whole_sectors(offset, len(buffer))
        if end - start == len(buffer):
            self._read_sectors(buffer, start)
        else:
            whole = memoryview(bytearray(end - start))
            self._read_sectors(whole, start)
            buffer[:] = whole[offset - start : offset - start + len(buffer)]

    def _read_sectors(self, buffer: memoryview, start: int) -> None:
        self._store.pread_into(buffer, HostOffset(start))
        self._cipher.decrypt(buffer, start % DATA_FILE // SECTOR_BYTES)

    def pwrite(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        """Write all of ``buffer`` or raise; a part of a sector with what else the sector holds (E2)."""
        view = memoryview(buffer).cast("B")
        start, end = _whole_sectors(offset, len(view))
        if end - start != len(view):
            view = self._completed(view, offset, start, end)
        for position in range(0, len(view), ENCRYPTED_AT_ONCE):
            part = view[position : position + ENCRYPTED_AT_ONCE]
            encrypted = self._cipher.encrypt(part, (start + position) % DATA_FILE // SECTOR_BYTES)
            self._store.pwrite(encrypted, HostOffset(start + position))

    def _completed(self, view: memoryview, offset: int, start: int, end: int) -> memoryview:
        """Return whole sectors: the bytes to be written, and the old ones beside them."""
        whole = memoryview(bytearray(end - start))
        for sector in {start, end - SECTOR_BYTES}:
            self._read_sectors(whole[sector - start : sector - start + SECTOR_BYTES], sector)
        whole[offset - start : offset - start + len(view)] = view
        return whole


def _whole_sectors(offset: int, length: int) -> tuple[int, int]:
    end = layout.round_up(offset + length, SECTOR_BYTES)
    return offset - offset % SECTOR_BYTES, end


def data_on(medium: Medium, view: View) -> GuestData:
    """Return the data of an image, out of reach where it is encrypted."""
    if view.header.crypt_method == CRYPT_NONE:
        return PlainData(_store_of(medium, view))
    return LockedData(medium)


def read_luks(view: View) -> tuple[Pointer, LuksHeader] | None:
    """Return the LUKS header of an image, and where it lies; None where it is not encrypted.

    Raises:
        FormatError, UnsupportedFeatureError: a header that jqcow does not read.
        CorruptionError: it is not in the file.
    """
    pointer = luks.pointer_of(view.area)
    if pointer is None:
        return None
    if not view.holds(pointer.offset):
        raise CorruptionError("encryption header", pointer.offset, "it lies past the end of the file")
    header = LuksHeader.unpack(view.read(pointer.offset, luks.HEADER_BYTES))
    header.validate(pointer.length)
    return pointer, header


def unlock(medium: Medium, view: View, passphrase: Passphrase) -> tuple[int, Secret] | None:
    """Return the key slot that a passphrase opens, and the master key; None where nothing is encrypted.

    Raises:
        WrongPassphrase: it opens none.
        CorruptionError: it opens none, and key material lies past the end of the file.
        JqcowError: as `read_luks`, or cryptography is not installed.
    """
    found = read_luks(view)
    if found is None:
        return None
    pointer, header = found
    keys.form_of(header)
    image = path_of(medium.device)

    def read(length: int, offset: int) -> bytes:
        return medium.pread(length, HostOffset(pointer.offset + offset))

    try:
        return keys.unlock(header, read, secret_for(passphrase, image), image)
    except WrongPassphrase:
        for number in header.active_slots():
            _, end = header.place_of(number, pointer.length)
            if not view.holds(HostOffset(pointer.offset + end - 1)):
                detail = f"the key material of key slot {number} lies past the end of the file"
                raise CorruptionError("encryption header", pointer.offset, detail) from None
        raise


def unlocked_data(medium: Medium, view: View, passphrase: Passphrase | None) -> GuestData:
    """Return the data of an image; errors as `unlock`, and PassphraseError where none is given and needed."""
    if passphrase is None:
        if view.header.crypt_method != CRYPT_NONE:
            raise PassphraseError(NEEDED, path_of(medium.device))
        return PlainData(_store_of(medium, view))
    found, opened = read_luks(view), unlock(medium, view, passphrase)
    if found is None or opened is None:
        return data_on(medium, view)
    cipher = SectorCipher(keys.form_of(found[1]), opened[1].reveal())
    return EncryptedData(_store_of(medium, view), cipher)
