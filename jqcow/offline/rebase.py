"""An overlay on another backing file: its disk reads as before (safe), or the name alone changes (unsafe)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import cast

from jqcow import _native
from jqcow.device.disk import Disk, Extent, joined, read_padded, shows_zeros
from jqcow.disks.chain import Chain, open_disk
from jqcow.disks.policy import FilePolicy, Following
from jqcow.errors import UnsupportedFeatureError
from jqcow.image import Image
from jqcow.image.arguments import optional_path, optional_text
from jqcow.image.opening import open as open_image
from jqcow.image.opening import open_alone, open_backing
from jqcow.image.transaction import Transaction
from jqcow.offline.compare import Progress
from jqcow.offline.losses import refuse_lost_data
from jqcow.ondisk.keys import Passphrase, hidden
from jqcow.ondisk.naming import DiskFormat

WINDOW_BYTES = 4 << 20


@dataclass(frozen=True)
class RebaseReport:
    """What a rebase copied into the overlay, in bytes, since the new backing file reads otherwise."""

    compared_bytes: int
    copied_bytes: int


def rebase(
    path: str | os.PathLike[str],
    backing_file: str | os.PathLike[str] | None,
    backing_format: str | None = None,
    *,
    unsafe: bool = False,
    elsewhere: bool = False,
    allow_files: FilePolicy = False,
    probe: bool = False,
    journal_size: int | None = None,
    progress: Progress = lambda done, total: None,
    passphrase: Passphrase | None = None,
) -> RebaseReport:
    """Give an image another backing file, or none, in one transaction.

    Args:
        path: the image; a crashed one is recovered first.
        backing_file: stored as it is, relative to the directory of the image; None: no backing file.
        backing_format: of the file, needed with it; an unsafe rebase stores others, too.
        unsafe: change the name alone and open neither backing file: for a file that was moved or renamed.
            Otherwise what the new file reads differently, the old one's is copied into the image.
        elsewhere: an unsafe rebase may store a name with a protocol that other programs follow.
        allow_files: whether files that the image and the new one name may be opened, as in `jqcow.open`.
        probe: tell formats that are not stored by the magic.
        journal_size: in bytes, as in `jqcow.open`.
        progress: called with the bytes of the disk that are done, and all of them.
        passphrase: of the files that are encrypted, as in `jqcow.open`.

    Raises:
        ValueError: a name that cannot be stored.
        UnsupportedFeatureError: snapshots show the backing file, too; an unsafe rebase does not look.
        JqcowError: one of the files cannot be read, or is in use.
        OSError: the host failed; the image is as it was.
    """
    backing_file, backing_format = optional_path(backing_file), optional_text(backing_format)
    passphrase = hidden(passphrase)
    if unsafe:
        with open_alone(path, "r+", journal_size=journal_size) as image, image.transaction() as transaction:
            transaction.set_backing_file(backing_file, backing_format, foreign=True, elsewhere=elsewhere)
        return RebaseReport(0, 0)
    following = Following(allow_files, probe, passphrase=passphrase)
    with closing(open_disk(path, "qcow2", following=following)) as chain:
        # What a hole in a table hides would be copied from below, or be zeros from then on.
        refuse_lost_data(chain.layers)
    with (
        open_image(
            path,
            "r+",
            journal_size=journal_size,
            allow_files=allow_files,
            probe=probe,
            passphrase=passphrase,
        ) as image,
        _new_chain(path, backing_file, backing_format, following) as new,
        image.transaction() as transaction,
    ):
        refuse_snapshots(transaction, "a rebase")
        report = copy_differences(image, transaction, new, progress)
        transaction.set_backing_file(backing_file, backing_format)
    return report


def refuse_snapshots(image: Image | Transaction, what: str) -> None:
    """Raise UnsupportedFeatureError for an image with snapshots: they show the backing file too."""
    if image.snapshots():
        raise UnsupportedFeatureError(
            f"{what} of an image with internal snapshots", "what they read would change: delete them first"
        )


@contextmanager
def _new_chain(
    path: str | os.PathLike[str],
    backing_file: str | None,
    backing_format: str | None,
    following: Following,
) -> Iterator[Chain | None]:
    if backing_file is None:
        yield None
        return
    chain = open_backing(
        path,
        backing_file,
        cast("DiskFormat | None", backing_format),
        allow_files=following.allow,
        probe=following.probe,
        passphrase=following.passphrase,
    )
    try:
        yield chain
    finally:
        chain.close()


def copy_differences(
    image: Image,
    transaction: Transaction,
    new: Disk | None,
    progress: Progress = lambda done, total: None,
) -> RebaseReport:
    """Copy what the disk shows of its old backing file, and would show otherwise of the new one.

    ``transaction`` is an open one of ``image`` that has changed nothing yet.
    """
    cluster_bytes = image.info().cluster_size
    compared = copied = 0
    # Taken before the copying: the transaction alone sees what it copies.
    for start, length in _shown_from_below(image):
        for offset in range(start, start + length, WINDOW_BYTES):
            count = min(WINDOW_BYTES, start + length - offset)
            compared += count
            copied += _copy_window(image, transaction, new, offset, count, cluster_bytes)
            progress(offset + count, image.size)
    progress(image.size, image.size)
    return RebaseReport(compared, copied)


def _shown_from_below(image: Image) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what the image has nothing of its own for, joined."""
    below = (
        Extent(found.offset, found.length, "data", None) for found in image.extents() if _is_below(found)
    )
    return ((extent.offset, extent.length) for extent in joined(below))


def _is_below(extent: Extent) -> bool:
    return extent.depth > 0 or extent.kind == "unallocated"


def _copy_window(
    image: Image, transaction: Transaction, new: Disk | None, offset: int, length: int, cluster_bytes: int
) -> int:
    """Copy the parts of a range that read otherwise on the new chain; return how many bytes those are.

    A part is as long as a cluster. Where clusters have subclusters, it may begin at any of them.
    """
    if image.reads_as_zeros(length, offset) and shows_zeros(new, length, offset):
        return 0
    old, other = image.pread(length, offset), bytearray(length)
    read_padded(new, memoryview(other), offset)
    if old == other:
        return 0
    copied = 0
    for start in range(0, length, cluster_bytes):
        part = old[start : start + cluster_bytes]
        if part == other[start : start + cluster_bytes]:
            continue
        if _native.is_zero(part):
            transaction.hide_below(len(part), offset + start)
        else:
            transaction.pwrite(part, offset + start)
        copied += len(part)
    return copied
