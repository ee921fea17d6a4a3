"""Taking a repair back: the image gets the bytes that it had before."""

from __future__ import annotations

import os
import stat
from contextlib import closing
from dataclasses import replace

from jqcow.device.file import FileDevice, remove_file
from jqcow.disks.undo import UndoFile, UndoReport, undo_on, undo_path
from jqcow.errors import UnsupportedFeatureError


def undo_repair(image: str | os.PathLike[str], *, force: bool = False) -> UndoReport:
    """Give an image the bytes that it had before its last repair, from the undo file beside it.

    It may be cut off at any point, and done again; then the undo file goes. A crashed image is recovered
    first.

    Args:
        image: the file.
        force: also where the image was written since.

    Raises:
        FileNotFoundError: there is no undo file.
        UnsupportedFeatureError: a block device, beside which no undo file is written.
        CorruptionError: the undo file is damaged or of another file, or the image was written since; nothing
            was changed.
        ImageInUse: another process uses the image.
        OSError: the host failed; it can be done again.
    """
    name = os.fspath(image)
    if os.path.exists(name) and stat.S_ISBLK(os.stat(name).st_mode):
        raise UnsupportedFeatureError("undo on a block device", f"the repair of {name} wrote no undo file")
    with closing(FileDevice.open(undo_path(name), writable=True)) as undo:
        UndoFile.read(undo)
        with closing(FileDevice.open(name, writable=True)) as device:
            report = replace(undo_on(device, undo, force=force), image=name)
            remove_file(undo)
            return report
