"""Taking a repair back: the image gets the bytes that it had before."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace

from jqcow.device.file import FileDevice
from jqcow.disks.undo import UndoReport, read_runs, undo_on, undo_path
from jqcow.image.opening import bring_home


def undo_repair(image: str | os.PathLike[str], *, force: bool = False) -> UndoReport:
    """Give an image the bytes that it had before its last repair, from the undo file beside it.

    It may be cut off at any point, and done again. The undo file stays. A crashed image is recovered first.

    Args:
        image: the file.
        force: also where the image was written since.

    Raises:
        FileNotFoundError: there is no undo file.
        CorruptionError: the undo file is damaged, or the image was written since; nothing was changed.
        ImageInUse: another process uses the image.
        OSError: the host failed; it can be done again.
    """
    name = os.fspath(image)
    with closing(FileDevice.open(undo_path(name), writable=False)) as undo:
        read_runs(undo)
        with closing(FileDevice.open(name, writable=True)) as device:
            used_bytes = bring_home(device)
            return replace(undo_on(device, undo, force=force, used_bytes=used_bytes), image=name)
