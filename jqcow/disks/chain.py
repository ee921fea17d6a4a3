"""Backing chains: a file, what it names below itself, and what that names, to the end.

A chain is a list, not a nest: a read goes down it in a loop, so a chain may be as long as there are files.
Each layer shows only what is its own. What a layer does not have is the next one's; what lies past the end of
a layer reads as zeros, whatever lies below.

What a chain may do to its reader is bounded: a file is opened only where the policy allows it, no file comes
twice, and no chain is longer than `MAX_CHAIN_FILES`. Every file is locked against writers while it is open.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from jqcow.device.disk import Disk, Extent, joined
from jqcow.device.file import FileDevice, identity_in
from jqcow.device.holes import HostRegions
from jqcow.disks.files import Source, open_to_read
from jqcow.disks.image import ImageDisk
from jqcow.disks.outside import open_data_file
from jqcow.disks.policy import NOT_FOLLOWING, Following, naming_the_image, require_allowed, stored_format
from jqcow.disks.raw import RawDisk
from jqcow.errors import CorruptionError, JqcowError, UnsupportedFeatureError
from jqcow.ondisk import naming
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.naming import DiskFormat, NamedFile

MAX_CHAIN_FILES = 1024
"""The longest chain. QEMU has no such limit; this one bounds memory and open files."""

EXTENTS_AT_ONCE = 1024
"""Extents of a layer that are looked up ahead: it bounds memory."""

Found = TypeVar("Found")
Visit = Callable[[FileDevice, DiskFormat], tuple[Found, NamedFile | None]]
"""Takes an open file of a chain, and its format; returns what it is, and what it names below itself."""

Identity = tuple[int, int]
"""Device and inode."""

FileDisk = RawDisk | ImageDisk


# Following names


def walk(
    path: Source,
    disk_format: DiskFormat | None,
    following: Following,
    visit: Visit[Found],
    visit_below: Visit[Found] | None = None,
) -> Iterator[Found]:
    """Yield what ``visit`` makes of each file of a chain, from the top; it then closes the files.

    Args:
        path: of the file at the top, or that file, open.
        disk_format: of that file; None tells it by its magic.
        following: how names are followed.
        visit: is given each file when it is asked for; where it raises, the file is closed.
        visit_below: is given the files below the top, if not ``visit``.

    Raises:
        JqcowError, OSError: as `walk_below`, and what ``visit`` raises.
    """
    device, known = open_to_read(path, disk_format, share_writers=following.share_writers)
    top = device.identity()
    found, named = _visit(visit, device, known)
    yield found
    yield from walk_below(named, [top], following, visit_below or visit)


def walk_below(
    named: NamedFile | None, above: Iterable[Identity], following: Following, visit: Visit[Found]
) -> Iterator[Found]:
    """Yield what ``visit`` makes of the file that an image names, and of all below it.

    Args:
        named: the first of them; None: there is none.
        above: the files above it, of which none may come again.
        following: how names are followed.
        visit: see `walk`.

    Raises:
        FileAccessDenied: the policy does not allow a file.
        UnsupportedFeatureError: a name that is no plain file, a format that is unknown or, without ``probe``,
            not stored, or too many files.
        CorruptionError: a chain that contains itself.
        JqcowError: a file is damaged or in use by a writer.
        OSError: the host failed. A note names the image that needs the file.
    """
    seen = set(above)
    while named is not None:
        if len(seen) >= MAX_CHAIN_FILES:
            raise UnsupportedFeatureError(f"a backing chain of more than {MAX_CHAIN_FILES} files")
        named = require_allowed(named, following.allow)
        # Before the file is touched: what is refused by name is not opened.
        stored = stored_format(named, probe=following.probe)
        with naming_the_image(named):
            refuse_loop(named, seen)
            device, known = open_to_read(
                named.path, stored, share_writers=following.share_writers, real_path=named.real_path
            )
            seen.add(device.identity())
            found, named = _visit(visit, device, known)
        yield found


def _visit(visit: Visit[Found], device: FileDevice, known: DiskFormat) -> tuple[Found, NamedFile | None]:
    try:
        return visit(device, known)
    except BaseException:
        device.close()
        raise


def refuse_loop(named: NamedFile, above: Iterable[Identity]) -> None:
    """Raise CorruptionError if a named file is one of those above it. The file is not opened.

    Opened it cannot be: a file that is being written is locked, also against its own chain.
    """
    if identity_of(named.path) in above:
        raise CorruptionError("backing file name", 0, f"the chain comes back to {named.path}")


def identity_of(path: str) -> Identity:
    """Return what tells a file from all others, whatever its name."""
    return identity_in(os.stat(path))


# A chain as one disk


@dataclass(frozen=True)
class _Range:
    """A range that is to be looked for at a depth."""

    depth: int
    offset: int
    length: int


class Chain(Disk):
    """The disks of a chain from the top, as one disk."""

    def __init__(self, layers: list[FileDisk]) -> None:
        """Take the layers; `close` closes them."""
        self.layers = layers

    @property
    def size(self) -> int:
        """Size of the first disk in bytes."""
        return self.layers[0].size

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what a range holds, in order; the depth of what is unallocated is the last that was asked."""
        return joined(self._extents(length, offset))

    def _extents(self, length: int, offset: int) -> Iterator[Extent]:
        waiting: list[_Range | Extent] = [_Range(0, offset, length)]
        while waiting:
            item = waiting.pop()
            if isinstance(item, Extent):
                yield item
            else:
                waiting += reversed(self._found_in(item))

    def _found_in(self, whole: _Range) -> list[_Range | Extent]:
        """Return what a layer says of a range: what is its own, and what is to be looked for further on."""
        depth, layer = whole.depth, self.layers[whole.depth]
        reach, end = whole.offset, whole.offset + whole.length
        inside = max(0, min(whole.length, layer.size - whole.offset))
        is_last = depth + 1 == len(self.layers)
        found: list[_Range | Extent] = []
        for own in islice(_own_extents(layer, inside, reach), EXTENTS_AT_ONCE):
            if own.kind == "unallocated" and not is_last:
                found.append(_Range(depth + 1, own.offset, own.length))
            else:
                found.append(Extent(own.offset, own.length, own.kind, own.host_offset, depth))
            reach = own.end
        if reach < whole.offset + inside:
            found.append(_Range(depth, reach, whole.offset + inside - reach))
        if inside < whole.length:
            start = whole.offset + inside
            found.append(Extent(start, end - start, "unallocated", None, max(0, depth - 1)))
        return found

    def stored_extents(self, length: int, offset: int) -> Iterator[Extent]:
        """As `extents`; data in a hole of its file is ``zero``. The files do not change meanwhile."""
        regions: dict[int, HostRegions] = {}
        for extent in self.extents(length, offset):
            layer, host = self.layers[extent.depth], extent.host_offset
            # A hole reads as noise where data is encrypted; a raw disk knows its own.
            if extent.kind != "data" or host is None or isinstance(layer, RawDisk) or layer.is_encrypted:
                yield extent
                continue
            if extent.depth not in regions:
                regions[extent.depth] = HostRegions(layer.data_device)
            for start, count, is_data in regions[extent.depth].pieces(host, extent.length):
                place = extent.offset + start - host
                yield Extent(place, count, "data" if is_data else "zero", start, extent.depth)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``."""
        for extent in self._extents(len(buffer), offset):
            target = buffer[extent.offset - offset : extent.end - offset]
            if extent.holds_data:
                _read_own(self.layers[extent.depth], target, extent.offset)
            else:
                target[:] = bytes(len(target))

    def close(self) -> None:
        """Close all layers."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.close)


def _own_extents(layer: FileDisk, length: int, offset: int) -> Iterator[Extent]:
    with _telling_of(layer, length, offset):
        yield from layer.extents(length, offset) if length else ()


def _read_own(layer: FileDisk, buffer: memoryview, offset: int) -> None:
    with _telling_of(layer, len(buffer), offset):
        layer.read_into(buffer, offset)


@contextmanager
def _telling_of(layer: FileDisk, length: int, offset: int) -> Iterator[None]:
    """Add to an error which file it is in; its range is what of it the chain reads there, and no more."""
    try:
        yield
    except JqcowError as error:
        error.add_note(f"in {layer.path}")
        if isinstance(error, CorruptionError) and error.guest_range is not None:
            start, count = error.guest_range
            first, end = max(start, offset), min(start + count, offset + length)
            error.guest_range = (first, end - first) if first < end else (offset, length)
        raise


def open_disk(
    path: Source,
    disk_format: DiskFormat | None = None,
    *,
    snapshot: str | None = None,
    following: Following = NOT_FOLLOWING,
) -> Chain:
    """Open the disk in a file for reading, with all that it names below itself.

    Args:
        path: the file, or an open one.
        disk_format: None tells it by its magic.
        snapshot: id or name of an internal snapshot to read instead of the disk.
        following: how names are followed.

    Raises:
        ValueError: a snapshot of a raw file.
        JqcowError: not an image of this format, damaged, unsupported or in use, or a file is not allowed.
        OSError: the host failed.
    """

    if disk_format is not None:
        naming.check_format(disk_format)

    met: set[Identity] = set()

    def visit_top(device: FileDevice, known: DiskFormat) -> tuple[FileDisk, NamedFile | None]:
        if known == "raw" and snapshot is not None:
            raise ValueError(f"{device.path} is a raw file, which has no snapshots")
        return _as_layer(device, known, following, met, snapshot)

    return _collected(walk(path, disk_format, following, visit_top, _visiting_layers(following, met)))


def open_below(named: NamedFile, above: Iterable[Identity], following: Following) -> Chain:
    """Open what an image names below itself, and what that names, to the end; arguments as `walk_below`."""
    above = set(above)
    return _collected(walk_below(named, above, following, _visiting_layers(following, set(above))))


def _visiting_layers(following: Following, met: set[Identity]) -> Visit[FileDisk]:
    return lambda device, known: _as_layer(device, known, following, met)


def _as_layer(
    device: FileDevice,
    known: DiskFormat,
    following: Following,
    met: set[Identity],
    snapshot: str | None = None,
) -> tuple[FileDisk, NamedFile | None]:
    """Return an open file as a layer; it joins those that were ``met``, which are no data file of others."""
    met.add(device.identity())
    if known == "raw":
        return RawDisk(device), None

    def open_data(area: HeaderArea) -> FileDevice | None:
        return open_data_file(area, device.path, met, following)

    disk = ImageDisk(
        device,
        snapshot=snapshot,
        passphrase=following.passphrase,
        reads_data=following.reads_data,
        open_data=open_data,
    )
    return disk, disk.backing_file()


def _collected(found: Iterable[FileDisk]) -> Chain:
    """Return the chain of all layers; where one cannot be opened, those before it are closed."""
    chain = Chain([])
    try:
        for layer in found:
            chain.layers.append(layer)
    except BaseException:
        chain.close()
        raise
    return chain
