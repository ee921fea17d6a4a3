"""What is wrong with an image file that does not stop reading its disk."""

from __future__ import annotations

import os
from contextlib import closing

from jqcow.checker.warnings import warnings_of
from jqcow.disks.files import open_to_read
from jqcow.disks.view import FileView
from jqcow.ondisk.naming import DiskFormat


def read_warnings(
    path: str | os.PathLike[str], image_format: DiskFormat | None = None, *, force_share: bool = False
) -> tuple[str, ...]:
    """Return what `Image.warnings` says of an image file opened for reading; of a raw file, nothing.

    Args:
        path: the file.
        image_format: None tells it by the magic.
        force_share: look also while another program writes, unless its journal is live.

    Raises:
        JqcowError: the file cannot be read as this format, or is in use by a writer.
        OSError: the host failed.
    """
    device, known = open_to_read(path, image_format, share_writers=force_share)
    with closing(device):
        if known == "raw":
            return ()
        view = FileView.of_file(device)
        return warnings_of(view.read, view.area, device.size())
