"""jqcow: a transactional qcow2 engine.

    with jqcow.create("disk.qcow2", 10 << 30) as image:
        image.pwrite(b"hello", 0)
        image.flush()
        with image.transaction() as transaction:
            transaction.pwrite(b"both of these", 4096)
            transaction.pwrite(b"or neither", 8192)

After a crash, opening with ``"r+"`` brings back everything that a flush or a transaction acknowledged.
"""

from jqcow._version import __version__
from jqcow.checker.check import CheckReport
from jqcow.device.disk import Extent
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
from jqcow.ondisk.bitmaps import Bitmap
from jqcow.ondisk.encryption import Encryption
from jqcow.ondisk.keys import Secret
from jqcow.ondisk.naming import NamedFile
from jqcow.ondisk.snapshots import Snapshot

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
]
