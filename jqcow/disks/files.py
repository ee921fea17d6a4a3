"""Files that are opened to be read: locked against writers, of a format that is given or probed."""

from __future__ import annotations

import os

from jqcow.device.base import Reader
from jqcow.device.file import FileDevice
from jqcow.engine import scan as scans
from jqcow.errors import ImageInUse, UnsupportedFeatureError
from jqcow.ondisk import foreign
from jqcow.ondisk.header import MAGIC
from jqcow.ondisk.naming import DiskFormat

Source = str | os.PathLike[str] | FileDevice
"""A file by its path, or an open one, which whoever opens the disk in it takes over."""


def probe_format(reader: Reader) -> DiskFormat:
    """Tell the format by its magic; a crashed jqcow image that lost sector 0 counts as qcow2.

    Raises:
        UnsupportedFeatureError: the magic is that of another program's images. Taken for raw, they would be
            another disk.
    """
    head = reader.pread(foreign.HEAD_BYTES, 0)
    tail = reader.pread(foreign.TAIL_BYTES, max(0, reader.size() - foreign.TAIL_BYTES))
    found = foreign.foreign_format(head, tail)
    if found is not None:
        raise UnsupportedFeatureError(
            f"the format {found}", "the file has its magic; given the format raw, its bytes are the disk"
        )
    is_image = head.startswith(MAGIC) or scans.read_root_copy(reader) is not None
    return "qcow2" if is_image else "raw"


def open_to_read(
    path: Source,
    disk_format: DiskFormat | None = None,
    *,
    share_writers: bool = False,
    real_path: str | None = None,
) -> tuple[FileDevice, DiskFormat]:
    """Open a file for reading, and tell its format.

    Args:
        path: the file. An open one is taken as it is.
        disk_format: None tells it by the magic.
        share_writers: also while another program writes; what is read may then be old, mixed or wrong.
        real_path: see `FileDevice.open`.

    Raises:
        UnsupportedFeatureError: the magic is that of another program's images.
        ImageInUse: a writer has the file, or it is not the one of ``real_path``; with ``share_writers``, its
            journal is live.
        OSError: the host failed.
    """
    if isinstance(path, FileDevice):
        device = path
    else:
        device = FileDevice.open(path, writable=False, share_writers=share_writers, real_path=real_path)
    try:
        known = disk_format or probe_format(device)
        if share_writers and known == "qcow2":
            refuse_live_journal(device)
        return device, known
    except BaseException:
        device.close()
        raise


def refuse_live_journal(device: FileDevice) -> None:
    """Raise ImageInUse if the file has a live journal: its writer goes on, so it cannot be replayed."""
    if scans.find_live_root(device) is not None:
        raise ImageInUse(
            f"{device.path} has a live journal, which cannot be read beside its writer. "
            "Close the program that holds the image, or open it without force_share if none does."
        )
