"""The exception tree of jqcow.

Everything that jqcow itself raises about an image derives from :class:`JqcowError`. An ``OSError``
from the kernel (EIO, ENOSPC, EACCES...) passes through unchanged. Wrong arguments (an offset past the
end of the disk, a negative length) are a plain ``ValueError``, as everywhere in Python.

    JqcowError
    +-- FormatError (ValueError)          the bytes are not a qcow2 image, or break the specification
    |   +-- UnsupportedFeatureError       a feature that the header announces and jqcow refuses by name
    +-- CorruptionError                   ours, but broken: carries the structure and its offset
    +-- PassphraseError (PermissionError) an encrypted image, and no passphrase for it
    |   +-- WrongPassphrase               ... or one that opens none of its key slots
    +-- MissingPackageError (ImportError) an optional package that the image needs is not installed
    +-- FileAccessDenied (PermissionError) an image names another file, and the caller did not allow it
    +-- ImageInUse (OSError)              another user holds the image's locks
    +-- ReadOnlyError (OSError)           a change was asked of an image that cannot be changed
    |   +-- PoisonedError                 ... because a barrier failed earlier: the image must be reopened
    +-- TransactionError (RuntimeError)   a call that the state of a transaction does not allow
    +-- SnapshotNotFound (LookupError)    the image has no snapshot of this id or name
    +-- ImageClosedError (ValueError)     the image was closed before the call
"""

from __future__ import annotations

import errno


def printable(text: str) -> str:
    """Return a text that neither steers a terminal nor ends a line: names come from whoever made the image.

    What cannot be printed, and what is not UTF-8, is replaced by U+FFFD.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


class JqcowError(Exception):
    """Base of every error that jqcow raises about an image. Its text and notes are `printable`."""

    def __str__(self) -> str:
        return printable(super().__str__())

    def add_note(self, note: str) -> None:
        """Add a note, as to any exception."""
        super().add_note(printable(note))


class FormatError(JqcowError, ValueError):
    """The bytes are not a qcow2 image, or break the qcow2 specification."""


class UnsupportedFeatureError(FormatError):
    """The image announces a feature that jqcow refuses; ``feature`` names it."""

    def __init__(self, feature: str, detail: str = "") -> None:
        super().__init__(f"{feature}: {detail}" if detail else f"{feature} is not supported")
        self.feature = feature


class CorruptionError(JqcowError):
    """A structure of the image is damaged.

    ``structure`` names it in the specification's words; ``offset`` is its host offset in bytes. Where a guest
    range cannot be read for it, ``guest_range`` is that range: (offset, length) in bytes.
    """

    def __init__(self, structure: str, offset: int, detail: str) -> None:
        super().__init__(f"{structure} at host offset {offset:#x}: {detail}")
        self.structure = structure
        self.offset = offset
        self.detail = detail
        self.guest_range: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.guest_range is None:
            return super().__str__()
        offset, length = self.guest_range
        return f"{super().__str__()}; it maps guest offset {offset:#x}, {length} bytes"


class FileAccessDenied(JqcowError, PermissionError):
    """An image names another file that it needs, and the caller did not allow that file to be opened.

    ``image`` names the file, ``purpose`` says what it is for (``backing``), ``name`` is the name as stored,
    and ``path`` the file that it means. That file was not touched.
    """

    def __init__(self, image: str, purpose: str, name: str, path: str) -> None:
        place = "" if name == path else f", which is {path!r}"
        message = (
            f"{image} needs the {purpose} file that it names: {name!r}{place}. A name inside an image is "
            "followed only where you allow it: --allow-files, or allow_files in Python"
        )
        super().__init__(errno.EACCES, message)
        self.image = image
        self.purpose = purpose
        self.name = name
        self.path = path


class PassphraseError(JqcowError, PermissionError):
    """An image is encrypted, and its passphrase is needed. ``image`` is its path, empty where it has none."""

    def __init__(self, message: str, image: str = "") -> None:
        super().__init__(errno.EACCES, f"{image}: {message}" if image else message)
        self.image = image


class WrongPassphrase(PassphraseError):
    """A passphrase opens none of the image's key slots."""


class MissingPackageError(JqcowError, ImportError):
    """A package is not installed that this image needs; the text names the extra to install."""


class ImageInUse(JqcowError, OSError):
    """Another process, or another part of this one, uses the image in a way that excludes this use.

    ``refused`` is True if that user lets nobody use it so, False if this one would not let the other go on.
    """

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(errno.EAGAIN, message)
        self.refused = refused


class ReadOnlyError(JqcowError, OSError):
    """A change was asked of an image that was opened read-only, or turned read-only."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EROFS, message)


class PoisonedError(ReadOnlyError):
    """The image turned read-only in this process after a failed barrier.

    What an earlier successful flush acknowledged is safe; what was written since may be lost. Close
    the image and open it again: recovery brings back the last durable state.
    """


class ImageClosedError(JqcowError, ValueError):
    """The image was already closed."""

    def __init__(self) -> None:
        super().__init__("the image is closed")


class SnapshotNotFound(JqcowError, LookupError):
    """The image has no internal snapshot with this id or name."""

    def __init__(self, id_or_name: str) -> None:
        super().__init__(f"there is no snapshot with the id or name {id_or_name!r}")
        self.id_or_name = id_or_name


class BitmapNotFound(JqcowError, LookupError):
    """The image has no persistent bitmap of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no bitmap {name!r}")
        self.name = name


class BitmapError(JqcowError):
    """A persistent bitmap is not in a state for what was asked: it may be wrong, or the name is taken."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"bitmap {name!r}: {detail}")
        self.name = name


class TransactionError(JqcowError, RuntimeError):
    """The call does not fit the state of a transaction: it has ended, or the thread would wait for itself."""
