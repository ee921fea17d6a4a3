"""Disks below the images of the laboratory: known by name, never changed, and so no part of any crash."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from jqcow.ondisk.naming import NamedFile
from tests.support.expectation import Windows


class Below:
    """A disk of ``size_bytes`` that shows ``content`` through windows, and zeros elsewhere."""

    def __init__(self, windows: Windows, content: bytes, size_bytes: int) -> None:
        self.windows = windows
        self.content = content
        self.size = size_bytes

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        assert offset + len(buffer) <= self.size, "read past the end of the backing disk"
        buffer[:] = bytes(len(buffer))
        for place, start, end in self._parts(len(buffer), offset):
            part = self.content[start:end]
            buffer[place : place + len(part)] = part

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        """Return True if nothing of a range is in a window with data."""
        return not any(any(self.content[start:end]) for _, start, end in self._parts(length, offset))

    @property
    def seen(self) -> bytes:
        """What the windows show: nothing past the end of the disk."""
        content = bytearray(self.windows.model_bytes)
        for start in range(0, len(content), self.windows.window_bytes):
            length = max(0, min(self.windows.window_bytes, self.size - self.windows.guest(start)))
            content[start : start + length] = self.content[start : start + length]
        return bytes(content)

    def _parts(self, length: int, offset: int) -> Iterator[tuple[int, int, int]]:
        """Yield where windows meet a range: (offset in the range, start and end in the content)."""
        for start in range(0, self.windows.model_bytes, self.windows.window_bytes):
            guest = self.windows.guest(start)
            first, end = max(offset, guest), min(offset + length, guest + self.windows.window_bytes)
            if first < end:
                yield first - offset, start + first - guest, start + end - guest

    def close(self) -> None:
        """Nothing is open."""


_NAMED: dict[str, Below] = {}


def name_of(below: Below) -> str:
    """Return the name by which images may call a disk from now on."""
    digest = blake2b(below.content + below.size.to_bytes(8, "big"), digest_size=6).hexdigest()
    _NAMED[f"below-{digest}"] = below
    return f"below-{digest}"


def find_below(named: NamedFile) -> Below:
    """Return the disk that an image names."""
    return _NAMED[named.name]


def find_below_by_name(name: str) -> Below:
    """Return the disk of a name."""
    return _NAMED[name]
