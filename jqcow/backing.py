"""What lies below an image: the disks of its backing chain, opened for reading.

The chain is a list, not a nest: a read goes down it in a loop, so a chain may be as long as there are files.
Each layer shows only what is its own. What a layer does not have is the next one's; what lies past the end of
a layer reads as zeros, whatever lies below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

from jqcow.device.file import FileDevice
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import layout
from jqcow.ondisk.header import MAGIC
from jqcow.ondisk.naming import BackingFormat, FilePolicy, NamedFile, known_format, require_allowed

MAX_DEPTH = 1024
"""The longest chain: each layer keeps a file open."""

PARTS_AT_ONCE = 1024
"""Parts of a layer that are looked up ahead: it bounds memory."""

PartKind = Literal["data", "zero", "compressed"]


@dataclass(frozen=True)
class Part:
    """A part of a layer's disk: ``length`` bytes of one kind, None where the layer has nothing of its own.

    ``host_offset`` is where a ``data`` part begins in the layer's file.
    """

    length: int
    kind: PartKind | None
    host_offset: int | None = None


class Layer(Protocol):
    """One disk of a chain, as it is without those below."""

    @property
    def size(self) -> int:
        """Size of the disk in bytes."""
        ...

    def parts(self, length: int, offset: int) -> Iterator[Part]:
        """Yield what a range within the disk holds, in order."""
        ...

    def read_own(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; the range is the layer's own."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class RawLayer:
    """A raw file; its last sector is padded with zeros."""

    def __init__(self, device: FileDevice) -> None:
        """Read from ``device``; `close` closes it."""
        self._device = device
        self.size = layout.round_up(device.size(), layout.SECTOR_BYTES)

    def parts(self, length: int, offset: int) -> Iterator[Part]:
        """Yield data and holes: a raw file has all of its disk."""
        position, end = offset, offset + length
        for start, count in self._device.data_extents(offset, length):
            if position < start:
                yield Part(start - position, "zero", position)
            yield Part(count, "data", start)
            position = start + count
        if position < end:
            yield Part(end - position, "zero", position)

    def read_own(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what lies past the end of the file reads as zeros."""
        self._device.pread_into(buffer, offset)

    def close(self) -> None:
        """Close the device."""
        self._device.close()


@dataclass(frozen=True)
class ChainPart:
    """A part of a chain's disk: what a `Part` says, its offset, and how deep it was found."""

    offset: int
    length: int
    kind: PartKind | None
    host_offset: int | None
    depth: int


@dataclass(frozen=True)
class _Range:
    """A range that is to be looked for at a depth."""

    depth: int
    offset: int
    length: int


class Chain:
    """The disks below an image, the nearest first; as one disk (`jqcow.device.base.Backing`)."""

    def __init__(self, layers: list[Layer]) -> None:
        """Take the layers; `close` closes them."""
        self.layers = layers

    @property
    def size(self) -> int:
        """Size of the nearest disk in bytes."""
        return self.layers[0].size

    def parts(self, length: int, offset: int) -> Iterator[ChainPart]:
        """Yield what a range holds, in order; ``kind`` None, found at the last depth: nothing at all.

        Raises:
            CorruptionError: a table on the way is damaged.
            OSError: the host failed.
        """
        waiting: list[_Range | ChainPart] = [_Range(0, offset, length)]
        while waiting:
            item = waiting.pop()
            if isinstance(item, ChainPart):
                yield item
            elif item.depth == len(self.layers):
                yield ChainPart(item.offset, item.length, None, None, item.depth)
            else:
                waiting += reversed(self._parts_of(item))

    def _parts_of(self, whole: _Range) -> list[_Range | ChainPart]:
        """Return what a layer says of a range: parts of its own, and what is to be looked for further on."""
        layer, position = self.layers[whole.depth], whole.offset
        inside = max(0, min(whole.length, layer.size - whole.offset))
        found: list[_Range | ChainPart] = []
        for part in islice(layer.parts(inside, position) if inside else (), PARTS_AT_ONCE):
            if part.kind is None:
                found.append(_Range(whole.depth + 1, position, part.length))
            else:
                found.append(ChainPart(position, part.length, part.kind, part.host_offset, whole.depth))
            position += part.length
        if position < whole.offset + inside:
            found.append(_Range(whole.depth, position, whole.offset + inside - position))
        if inside < whole.length:
            found.append(_Range(len(self.layers), whole.offset + inside, whole.length - inside))
        return found

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``.

        Raises:
            JqcowError: a layer cannot be read.
            OSError: the host failed.
        """
        for part in self.parts(len(buffer), offset):
            target = buffer[part.offset - offset : part.offset - offset + part.length]
            if part.kind in ("data", "compressed"):
                self.layers[part.depth].read_own(target, part.offset)
            else:
                target[:] = bytes(len(target))

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        """Return True if a range reads as zeros, as far as tables and holes tell."""
        return all(part.kind in ("zero", None) for part in self.parts(length, offset))

    def close(self) -> None:
        """Close all layers."""
        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.close)


@dataclass(frozen=True)
class Opened:
    """A layer that was opened, and what it names below itself."""

    layer: Layer
    names: NamedFile | None


OpenLayer = Callable[[FileDevice], Opened]


def open_chain(
    first: NamedFile,
    top: tuple[int, int],
    allow: FilePolicy,
    open_image: OpenLayer,
    *,
    probe: bool = False,
    share_writers: bool = False,
) -> Chain:
    """Open what an image names below itself, and what that names, to the end.

    Args:
        first: what the image at the top names.
        top: device and inode of that image: a chain must not contain it.
        allow: decides for each file.
        open_image: opens a qcow2 layer.
        probe: tell a format that is not stored by the file's magic.
        share_writers: read beside programs that write to these files; what is read may be inconsistent.

    Raises:
        FilePolicyDenied: a file is not allowed.
        UnsupportedFeatureError: a protocol, a format that is not given or not known, too many files.
        CorruptionError: the chain contains itself.
        OSError: a file cannot be opened; a note tells which image names it.
    """
    layers: list[Layer] = []
    seen = {top}
    named: NamedFile | None = first
    try:
        while named is not None:
            if len(layers) >= MAX_DEPTH:
                raise UnsupportedFeatureError(f"a backing chain of more than {MAX_DEPTH} files")
            require_allowed(named, allow)
            # Before the file is touched: what is refused by name is not opened.
            stored = _stored_format(named, probe=probe)
            device = _open_file(named, share_writers=share_writers)
            opened = _open_layer(named, stored, device, open_image, seen)
            layers.append(opened.layer)
            named = opened.names
    except BaseException:
        Chain(layers).close()
        raise
    return Chain(layers)


def _open_file(named: NamedFile, *, share_writers: bool) -> FileDevice:
    try:
        return FileDevice.open(named.path, writable=False, share_writers=share_writers)
    except OSError as error:
        error.add_note(f"{named.image} names it as its backing file, by {named.name!r}")
        raise


def _stored_format(named: NamedFile, *, probe: bool) -> BackingFormat | None:
    """Return the format that the image stores; None where it stores none, and the file's magic may tell."""
    stored = known_format(named)
    if stored is None and not probe:
        detail = f"{named.image} names {named.name!r}; a guess could take a guest's bytes for an image"
        raise UnsupportedFeatureError("a backing file without a format", detail)
    return stored


def _open_layer(
    named: NamedFile,
    stored: BackingFormat | None,
    device: FileDevice,
    open_image: OpenLayer,
    seen: set[tuple[int, int]],
) -> Opened:
    """Return the layer on a file, which is closed where this raises."""
    try:
        if device.identity() in seen:
            raise CorruptionError("backing file name", 0, f"the chain comes back to {named.path}")
        seen.add(device.identity())
        disk_format = stored or _format_of(device)
        return Opened(RawLayer(device), None) if disk_format == "raw" else open_image(device)
    except BaseException:
        device.close()
        raise


def _format_of(device: FileDevice) -> BackingFormat:
    return "qcow2" if device.pread(len(MAGIC), 0) == MAGIC else "raw"
