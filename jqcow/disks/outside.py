"""The external data file that an image names: opened where the policy allows it, locked like the image."""

from __future__ import annotations

import os
from collections.abc import Iterable

from jqcow.device.file import FileDevice, identity_in
from jqcow.disks.policy import Following, naming_the_image, require_allowed
from jqcow.errors import CorruptionError, UnsupportedFeatureError
from jqcow.ondisk import naming
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.naming import NamedFile


def data_file_named(area: HeaderArea, image: str) -> NamedFile | None:
    """Return the data file that the image at path ``image`` needs; None where its data is its own.

    Raises:
        UnsupportedFeatureError: the header does not name it, or by a name that is no plain file.
        FormatError: a name that no file has.
    """
    if not area.header.has_data_file:
        return None
    named = naming.data_file_of(area, image)
    if named is None:
        raise UnsupportedFeatureError("an external data file without a name", f"of {image}")
    return named


def open_data_file(
    area: HeaderArea,
    image: str,
    others: Iterable[tuple[int, int]],
    following: Following,
    *,
    writable: bool = False,
) -> FileDevice | None:
    """Open the data file of an image; None where its data is its own.

    Args:
        area: the header of the image.
        image: its path.
        others: device and inode of the image, and of files above it: it is none of them.
        following: how the names inside images are followed.
        writable: it is to be written.

    Raises:
        FileAccessDenied: the policy does not allow the file.
        UnsupportedFeatureError, FormatError: as `data_file_named`, or neither a regular file nor a device.
        CorruptionError: it is one of the others.
        ImageInUse: another program uses it.
        OSError: it is not there, or the host failed. A note names the image that needs it.
    """
    named = data_file_named(area, image)
    if named is None:
        return None
    named = require_allowed(named, following.allow)
    with naming_the_image(named):
        # By name: opened it cannot be, for the image is locked.
        if identity_in(os.stat(named.path)) in others:
            raise CorruptionError("data file name", 0, f"{named.path} is the image itself, or above it")
        return FileDevice.open(
            named.path,
            writable=writable,
            share_writers=following.share_writers,
            real_path=named.real_path,
        )
