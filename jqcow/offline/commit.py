"""What an overlay has of its own, written into its backing file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from jqcow.device.base import Device
from jqcow.device.disk import Extent, WritableDisk
from jqcow.device.file import FileDevice
from jqcow.disks.chain import Chain, Identity, identity_of, open_disk, refuse_loop
from jqcow.disks.files import open_to_read
from jqcow.disks.image import ImageDisk
from jqcow.disks.policy import FilePolicy, Following, naming_the_image, require_allowed, stored_format
from jqcow.disks.raw import RawDisk
from jqcow.errors import UnsupportedFeatureError
from jqcow.image import Image
from jqcow.image.arguments import optional_text
from jqcow.image.opening import open_alone, open_base
from jqcow.offline.compare import Progress
from jqcow.offline.losses import refuse_lost_data, refuse_lost_data_in
from jqcow.offline.rebase import refuse_snapshots
from jqcow.ondisk.keys import Passphrase, hidden
from jqcow.ondisk.naming import DiskFormat, NamedFile, resolve

WINDOW_BYTES = 4 << 20


@dataclass(frozen=True)
class CommitReport:
    """What a commit did; sizes in bytes.

    Attributes:
        base: path of the backing file that took the data.
        written_bytes: data that was written to it.
        zeroed_bytes: what was made to read as zeros in it.
        base_size: size of its disk now.
        emptied: the overlay holds nothing of its own any more.
    """

    base: str
    written_bytes: int
    zeroed_bytes: int
    base_size: int
    emptied: bool


def commit(
    path: str | os.PathLike[str],
    *,
    base: str | None = None,
    keep: bool = False,
    allow_files: FilePolicy = False,
    probe: bool = False,
    journal_size: int | None = None,
    progress: Progress = lambda done, total: None,
    passphrase: Passphrase | None = None,
) -> CommitReport:
    """Write what an overlay has of its own into its backing file; then empty the overlay.

    A qcow2 base takes all of it in one transaction. Until that is durable the overlay stays as it is, so a
    crash at any time leaves an overlay whose disk reads as before. A raw base, and one with an external data
    file, is written in place: other readers of it see it change. A base that is smaller grows.

    Args:
        path: the overlay; a crashed one is recovered first.
        base: a file of the chain, named as an image above it does, or by a path relative to the directory of
            that image: it takes what all images above it have, and these stay as they are. None: the backing
            file of the overlay.
        keep: leave the overlay as it is.
        allow_files: whether the backing file may be opened, and what it names, as in `jqcow.open`.
        probe: tell formats that are not stored by the magic.
        journal_size: in bytes, of the journals of both images, as in `jqcow.open`.
        progress: called with the bytes of the overlay's disk that are done, and all of them.
        passphrase: of the files that are encrypted, as in `jqcow.open`.

    Raises:
        ValueError: the image has no backing file, or no such base below it.
        FileAccessDenied: the backing file is not allowed.
        UnsupportedFeatureError: an image above the base has internal snapshots, which show the base too.
        JqcowError: one of the files cannot be read, or is in use.
        OSError: the host failed; the overlay reads as before.
    """
    passphrase, base = hidden(passphrase), optional_text(base)
    following = Following(allow_files, probe, passphrase=passphrase)
    if base is not None:
        return _commit_chain(os.fspath(path), base, following, journal_size, progress)
    # What a hole in a table hides would be the base's from then on.
    refuse_lost_data_in(path)
    alone = open_alone(
        path, "r+", journal_size=journal_size, passphrase=passphrase, reads_data=True, allow_files=allow_files
    )
    with alone as overlay:
        named = overlay.backing_file
        if named is None:
            raise ValueError(f"{os.fspath(path)} has no backing file to commit to")
        refuse_snapshots(overlay, "a commit")
        named = require_allowed(named, allow_files)
        with _open_base(named, [identity_of(os.fspath(path))], following, journal_size) as below:
            written, zeroed = copy_into(overlay, below, progress)
            base_size = below.size
        if not keep:
            with overlay.transaction() as transaction:
                transaction.make_empty()
    return CommitReport(named.path, written, zeroed, base_size, emptied=not keep)


def _commit_chain(
    path: str, base: str, following: Following, journal_size: int | None, progress: Progress
) -> CommitReport:
    """Write what all images of a chain above a base have into it; they stay as they are."""
    with closing(open_disk(path, "qcow2", following=following)) as chain:
        named = named_down_to(chain, base)
        if not named:
            raise ValueError(f"'{base}' is not in the backing chain of {path}")
        # The base is opened again, to be written.
        for layer in chain.layers[len(named) :]:
            layer.close()
        above = Chain(chain.layers[: len(named)])
        refuse_lost_data(above.layers)
        for layer in above.layers:
            if isinstance(layer, ImageDisk) and layer.has_snapshots:
                raise UnsupportedFeatureError(f"a commit of an image with internal snapshots: {layer.path}")
        identities = [identity_of(layer.path) for layer in above.layers]
        with _open_base(named[-1], identities, following, journal_size) as below:
            written, zeroed = _copy_chain(above, below, progress)
            base_size = below.size
    return CommitReport(named[-1].path, written, zeroed, base_size, emptied=False)


def named_down_to(chain: Chain, base: str | None) -> list[NamedFile]:
    """Return what images of a chain name, from the top down to a base (see `commit`); nothing without it."""
    found = list[NamedFile]()
    for layer in chain.layers:
        named = layer.backing_file() if isinstance(layer, ImageDisk) else None
        if named is None:
            break
        found.append(named)
        if base in (None, named.name) or _is_same(resolve(base or "", layer.path), named.path):
            return found
    return []


def _is_same(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


@contextmanager
def _open_base(
    named: NamedFile, above: list[Identity], following: Following, journal_size: int | None
) -> Iterator[WritableDisk]:
    """Open the backing file for writing; at the end of the block all changes are durable."""
    with naming_the_image(named):
        refuse_loop(named, above)
        known = stored_format(named, probe=following.probe) or _probe(named)
        opened: Image | FileDevice
        if known == "qcow2":
            opened = open_base(named, above, following, journal_size=journal_size)
        else:
            opened = FileDevice.open(named.path, writable=True, real_path=named.real_path)
    if isinstance(opened, Image) and opened.data_file is not None:
        # There is no second place for what is overwritten. Closing makes all of it durable.
        with opened:
            yield opened
    elif isinstance(opened, Image):
        with opened, opened.transaction() as transaction:
            yield transaction
    else:
        with closing(opened), raw_base(opened) as base:
            yield base


def _probe(named: NamedFile) -> DiskFormat:
    device, known = open_to_read(named.path, real_path=named.real_path)
    device.close()
    return known


@contextmanager
def raw_base(device: Device) -> Iterator[RawDisk]:
    """Take a raw disk as a base; at the end of the block all changes are durable."""
    yield RawDisk(device)
    # Durable now: all that the overlay had. The overlay may be emptied from here on.
    device.barrier("commit.base")


def copy_into(
    overlay: Image, base: WritableDisk, progress: Progress = lambda done, total: None
) -> tuple[int, int]:
    """Copy the overlay's own data and zeros; return the bytes of both."""
    return _copy(overlay.extents(), overlay.size, overlay.pread_into, base, progress)


def _copy_chain(above: Chain, base: WritableDisk, progress: Progress) -> tuple[int, int]:
    """Copy what all images above a base have; what lies past the end of a shorter one hides what is below."""
    last = len(above.layers) - 1
    extents = (
        replace(extent, kind="zero") if extent.kind == "unallocated" and extent.depth < last else extent
        for extent in above.extents(above.size, 0)
    )
    return _copy(extents, above.size, above.read_into, base, progress)


def _copy(
    extents: Iterator[Extent],
    size: int,
    read_into: Callable[[memoryview, int], object],
    base: WritableDisk,
    progress: Progress,
) -> tuple[int, int]:
    if base.size < size:
        base.resize(size)
    written = zeroed = 0
    for extent in extents:
        if extent.kind == "zero":
            base.write_zeroes(extent.length, extent.offset)
            zeroed += extent.length
        elif extent.holds_data:
            for start in range(extent.offset, extent.end, WINDOW_BYTES):
                buffer = bytearray(min(WINDOW_BYTES, extent.end - start))
                read_into(memoryview(buffer), start)
                base.pwrite(buffer, start)
            written += extent.length
        progress(extent.end, size)
    return written, zeroed
