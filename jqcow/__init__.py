"""jqcow: a transactional qcow2 engine.

    with jqcow.create("disk.qcow2", 10 << 30) as image:
        image.pwrite(b"hello", 0)
        image.flush()
        with image.transaction() as transaction:
            transaction.pwrite(b"both of these", 4096)
            transaction.pwrite(b"or neither", 8192)

After a crash, opening with ``"r+"`` brings back everything that a flush or a transaction acknowledged.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from jqcow._version import __version__

if TYPE_CHECKING:
    from jqcow.checker.check import CheckReport
    from jqcow.device.disk import Extent
    from jqcow.device.objects import ObjectDevice
    from jqcow.engine.repair import RepairReport
    from jqcow.errors import (
        BitmapError,
        BitmapNotFound,
        CorruptionError,
        FileAccessDenied,
        FormatError,
        ImageClosedError,
        ImageInUse,
        JqcowError,
        MissingPackageError,
        PassphraseError,
        PoisonedError,
        ReadOnlyError,
        SnapshotNotFound,
        TransactionError,
        UnsupportedFeatureError,
        WrongPassphrase,
    )
    from jqcow.image import (
        Image,
        ImageInfo,
        JournalInfo,
        Recovered,
    )
    from jqcow.image.bitmaps import DirtyExtent, ImageBitmaps, TransactionBitmaps
    from jqcow.image.creating import create, create_on_device
    from jqcow.image.file import ImageFile
    from jqcow.image.opening import open, open_device
    from jqcow.image.transaction import Receipt, Savepoint, Transaction
    from jqcow.nbd import serve
    from jqcow.ondisk.bitmaps import Bitmap
    from jqcow.ondisk.encryption import Encryption
    from jqcow.ondisk.keys import Secret
    from jqcow.ondisk.naming import NamedFile
    from jqcow.ondisk.snapshots import Snapshot

_NAMES = {
    "jqcow.checker.check": ("CheckReport",),
    "jqcow.device.disk": ("Extent",),
    "jqcow.device.objects": ("ObjectDevice",),
    "jqcow.engine.repair": ("RepairReport",),
    "jqcow.errors": (
        "BitmapError",
        "BitmapNotFound",
        "CorruptionError",
        "FileAccessDenied",
        "FormatError",
        "ImageClosedError",
        "ImageInUse",
        "JqcowError",
        "MissingPackageError",
        "PassphraseError",
        "PoisonedError",
        "ReadOnlyError",
        "SnapshotNotFound",
        "TransactionError",
        "UnsupportedFeatureError",
        "WrongPassphrase",
    ),
    "jqcow.image": (
        "Image",
        "ImageInfo",
        "JournalInfo",
        "Recovered",
    ),
    "jqcow.image.bitmaps": (
        "DirtyExtent",
        "ImageBitmaps",
        "TransactionBitmaps",
    ),
    "jqcow.image.creating": (
        "create",
        "create_on_device",
    ),
    "jqcow.image.file": ("ImageFile",),
    "jqcow.image.opening": (
        "open",
        "open_device",
    ),
    "jqcow.image.transaction": (
        "Receipt",
        "Savepoint",
        "Transaction",
    ),
    "jqcow.nbd": ("serve",),
    "jqcow.ondisk.bitmaps": ("Bitmap",),
    "jqcow.ondisk.encryption": ("Encryption",),
    "jqcow.ondisk.keys": ("Secret",),
    "jqcow.ondisk.naming": ("NamedFile",),
    "jqcow.ondisk.snapshots": ("Snapshot",),
}
"""Where names come from. A module is imported with the first of its names: most commands need few of them."""

_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Bitmap",
    "BitmapError",
    "BitmapNotFound",
    "CheckReport",
    "CorruptionError",
    "DirtyExtent",
    "Encryption",
    "Extent",
    "FileAccessDenied",
    "FormatError",
    "Image",
    "ImageBitmaps",
    "ImageClosedError",
    "ImageFile",
    "ImageInUse",
    "ImageInfo",
    "JournalInfo",
    "JqcowError",
    "MissingPackageError",
    "NamedFile",
    "ObjectDevice",
    "PassphraseError",
    "PoisonedError",
    "ReadOnlyError",
    "Receipt",
    "Recovered",
    "RepairReport",
    "Savepoint",
    "Secret",
    "Snapshot",
    "SnapshotNotFound",
    "Transaction",
    "TransactionBitmaps",
    "TransactionError",
    "UnsupportedFeatureError",
    "WrongPassphrase",
    "__version__",
    "create",
    "create_on_device",
    "open",
    "open_device",
    "serve",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what is asked for the first time."""
        home = _HOMES.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(importlib.import_module(home), name)
        return found

    def __dir__() -> list[str]:
        """Return the names that are there, imported or not."""
        return sorted({*globals(), *__all__})
