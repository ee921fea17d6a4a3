"""What lies below an image on a device of the caller's own: a disk, an open image, or a device again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jqcow.device.base import Device
from jqcow.device.disk import Disk, Extent
from jqcow.device.objects import SeekableFile, as_device
from jqcow.disks.own import Adopted, OwnDisk
from jqcow.disks.policy import stored_format
from jqcow.disks.raw import RawDisk
from jqcow.errors import UnsupportedFeatureError
from jqcow.image.image import Image
from jqcow.ondisk.naming import NamedFile

MAX_OWN_IMAGES = 64
"""How many images may lie over each other; a read goes through all of them."""

Below = OwnDisk | Image | Device | SeekableFile
"""What may be given for a backing file. A device is read as what the image says that the file is."""
FindBelow = Callable[[NamedFile], Below]


class ImageBelow(Disk):
    """An open image as the disk below another one."""

    def __init__(self, image: Image) -> None:
        """Read from ``image``, which `close` closes."""
        self._image = image

    @property
    def size(self) -> int:
        """Size of the disk."""
        return self._image.size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``."""
        self._image.pread_into(buffer, offset)

    def extents(self, length: int, offset: int) -> Iterator[Extent]:
        """Yield what a range holds, with all that lies below."""
        yield from self._image.extents(length, offset)

    def close(self) -> None:
        """Close the image."""
        self._image.close()


class Counted:
    """A caller's function that finds backing files, for a chain of so many at most."""

    def __init__(self, find: FindBelow, left: int = MAX_OWN_IMAGES) -> None:
        """Call ``find`` for the files of a chain, and refuse more than ``left``."""
        self._find = find
        self._left = left

    def __call__(self, named: NamedFile) -> Below:
        """Return what is below.

        Raises:
            UnsupportedFeatureError: the chain is longer, or comes back to itself.
        """
        if not self._left:
            raise UnsupportedFeatureError(f"a backing chain of more than {MAX_OWN_IMAGES} images")
        return self._find(named)

    def below(self) -> Counted:
        """Return the same for the next image."""
        return Counted(self._find, self._left - 1)


def counted(backing: Below | FindBelow | None) -> tuple[Below | FindBelow | None, FindBelow | None]:
    """Return what finds the disk below an image, and the one below that, in a chain of bounded length."""
    if not callable(backing):
        return backing, None
    finding = backing if isinstance(backing, Counted) else Counted(backing)
    return finding, finding.below()


def disk_below(given: Below, named: NamedFile, open_image: Callable[[Device], Image]) -> Disk:
    """Return what a caller gives for a backing file as a disk.

    Args:
        given: a disk, an open image, a device or a file object.
        named: what the image says of the file: of which format it is.
        open_image: opens a device that is a qcow2 image.

    Raises:
        TypeError: it is none of these.
        UnsupportedFeatureError: a device of a format that is not stored, or unknown.
        JqcowError, OSError: what opening raises.
    """
    if isinstance(given, Disk):
        return given
    if isinstance(given, Image):
        return ImageBelow(given)
    if isinstance(given, OwnDisk):
        return Adopted(given)
    device = as_device(given)
    if stored_format(named, probe=False) == "raw":
        return RawDisk(device)
    return ImageBelow(open_image(device))
