"""An overlay on another backing file: its disk reads as before (safe), or the name alone changes (unsafe)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jqcow import _native
from jqcow.backing import Chain
from jqcow.device.base import Backing
from jqcow.errors import UnsupportedFeatureError
from jqcow.image import Extent, Image
from jqcow.offline.compare import Progress
from jqcow.ondisk.naming import BackingFormat, FilePolicy
from jqcow.opening import open as open_image
from jqcow.opening import open_alone, open_backing
from jqcow.transaction import Transaction

WINDOW_BYTES = 4 << 20


@dataclass(frozen=True)
class RebaseReport:
    """What a rebase copied into the overlay, in bytes, since the new backing file reads otherwise."""

    compared_bytes: int
    copied_bytes: int


def rebase(
    path: str | os.PathLike[str],
    backing_file: str | None,
    backing_format: BackingFormat | None = None,
    *,
    unsafe: bool = False,
    allow_files: FilePolicy = False,
    probe: bool = False,
    progress: Progress = lambda done, total: None,
) -> RebaseReport:
    """Give an image another backing file, or none, in one transaction.

    Args:
        path: the image; a crashed one is recovered first.
        backing_file: stored as it is, relative to the directory of the image; None: no backing file.
        backing_format: of the file, needed with it.
        unsafe: change the name alone and open neither backing file: for a file that was moved or renamed.
            Otherwise what the new file reads differently, the old one's is copied into the image.
        allow_files: whether the backing file that the image names may be opened, and what it and the new one
            name, as in `jqcow.open`. The new one itself is the caller's own.
        probe: tell formats that are not stored by the magic.
        progress: called with the bytes of the disk that are done, and all of them.

    Raises:
        ValueError: a name that cannot be stored.
        UnsupportedFeatureError: the image has internal snapshots, which show the backing file too; an unsafe
            rebase leaves that to the caller.
        JqcowError: one of the files cannot be read, or is in use.
        OSError: the host failed; the image is as it was.
    """
    if unsafe:
        with open_alone(path, "r+") as image, image.transaction() as transaction:
            transaction.set_backing_file(backing_file, backing_format)
        return RebaseReport(0, 0)
    with (
        open_image(path, "r+", allow_files=allow_files, probe=probe) as image,
        _new_chain(path, backing_file, backing_format, allow_files, probe=probe) as new,
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
    backing_format: BackingFormat | None,
    allow_files: FilePolicy,
    *,
    probe: bool,
) -> Iterator[Chain | None]:
    if backing_file is None:
        yield None
        return
    chain = open_backing(path, backing_file, backing_format, allow_files=allow_files, probe=probe)
    try:
        yield chain
    finally:
        chain.close()


def copy_differences(
    image: Image,
    transaction: Transaction,
    new: Backing | None,
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
    start = end = 0
    for extent in image.extents():
        if not _is_below(extent):
            continue
        if extent.offset != end:
            if start < end:
                yield start, end - start
            start = extent.offset
        end = extent.offset + extent.length
    if start < end:
        yield start, end - start


def _is_below(extent: Extent) -> bool:
    return extent.depth > 0 or extent.kind == "unallocated"


def _copy_window(
    image: Image, transaction: Transaction, new: Backing | None, offset: int, length: int, cluster_bytes: int
) -> int:
    """Copy the clusters of a range that read otherwise on the new chain; return how many bytes those are."""
    if image.reads_as_zeros(length, offset) and _reads_as_zeros(new, length, offset):
        return 0
    old, other = image.pread(length, offset), _read(new, length, offset)
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


def _reads_as_zeros(chain: Backing | None, length: int, offset: int) -> bool:
    inside = 0 if chain is None else min(length, chain.size - offset)
    return chain is None or inside <= 0 or chain.reads_as_zeros(inside, offset)


def _read(chain: Backing | None, length: int, offset: int) -> bytes:
    buffer = bytearray(length)
    inside = 0 if chain is None else min(length, chain.size - offset)
    if chain is not None and inside > 0:
        chain.read_into(memoryview(buffer)[:inside], offset)
    return bytes(buffer)
