"""A disk as files: the whole of it, and each of its partitions, named as users look for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jqcow.image import Image
from jqcow.image.below import ImageBelow
from jqcow.image.file import ImageFile
from jqcow.offline.partitions import partitions_of

WHOLE_NAME = "disk.img"


class Part:
    """A range of an image's disk that is shown as a file. Offsets and lengths in bytes, from its start."""

    def __init__(self, image: Image, offset: int, length: int | None = None) -> None:
        """Show ``length`` bytes from ``offset``; None: to the end of the disk, also when that changes."""
        self.image = image
        self.offset = offset
        self._length = length

    @property
    def size(self) -> int:
        """Length of the file."""
        return self.image.size - self.offset if self._length is None else self._length

    @property
    def mode(self) -> str:
        """That of the image."""
        return self.image.mode

    @property
    def closed(self) -> bool:
        """True when the image is closed."""
        return self.image.closed

    def pread(self, length: int, offset: int) -> bytes:
        """Return up to ``length`` bytes; fewer where the file ends."""
        inside = max(0, min(length, self.size - offset))
        return self.image.pread(inside, self.offset + offset) if inside else b""

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``, which lies within the file."""
        self.image.pread_into(buffer, self.offset + offset)

    def pwrite(self, buffer: Any, offset: int) -> int:
        """Write ``buffer``; return its length.

        Raises:
            ValueError: it would reach past the end, which does not move.
            JqcowError, OSError: as `Image.pwrite`.
        """
        with memoryview(buffer) as whole:
            if not 0 <= offset <= self.size - whole.nbytes:
                raise ValueError(f"{whole.nbytes} bytes at {offset} are not within a file of {self.size}")
        return self.image.pwrite(buffer, self.offset + offset)

    def write_zeroes(self, length: int, offset: int, unmap: bool = True) -> None:
        """Make a range, which lies within the file, read as zeros; as `Image.write_zeroes`."""
        self.image.write_zeroes(length, self.offset + offset, unmap)

    def flush(self) -> None:
        """Flush the image."""
        self.image.flush()

    def as_file(self) -> ImageFile:
        """Return it as a raw binary file."""
        return ImageFile(self)


def files_of(image: Image) -> dict[str, Part]:
    """Return the files that a disk is shown as, by name: ``disk.img``, and ``partition1.img`` and so on.

    Raises:
        JqcowError: the disk cannot be read.
        OSError: the host failed.
    """
    return dict(_files_of(image))


def _files_of(image: Image) -> Iterator[tuple[str, Part]]:
    yield WHOLE_NAME, Part(image, 0)
    for part in partitions_of(ImageBelow(image)):
        yield f"partition{part.number}.img", Part(image, part.offset, part.length)
