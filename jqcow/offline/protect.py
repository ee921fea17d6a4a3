"""Protection of an image by path: made, renewed, removed, verified; and what is wrong healed by a backup."""

from __future__ import annotations

import os
from contextlib import closing

from jqcow.disks.chain import open_disk
from jqcow.disks.policy import FilePolicy, Following
from jqcow.image.opening import open as open_image
from jqcow.image.opening import open_alone
from jqcow.image.protection import HealReport, RefreshReport, VerifyReport
from jqcow.offline.compare import Progress
from jqcow.ondisk.naming import DiskFormat


def _nobody(done: int, total: int) -> None:
    """Tell nobody how far it is."""


def protect(
    path: str | os.PathLike[str],
    *,
    refresh: bool = False,
    allow_files: FilePolicy = False,
    probe: bool = False,
    journal_size: int | None = None,
    progress: Progress = _nobody,
) -> RefreshReport:
    """Make sums of all that an image holds, or renew those of what has changed.

    Args:
        path: the image; a crashed one is recovered first.
        refresh: it has protection; False: it has none.
        allow_files: whether its backing files may be opened, as in `jqcow.open`.
        probe: tell formats that are not stored by the magic.
        journal_size: in bytes, as in `jqcow.open`.
        progress: called with the bytes of the disk that are done, and all of them.

    Raises:
        ValueError: it has protection already, or none to refresh.
        JqcowError, OSError: as `ImageProtection.refresh`.
    """
    with open_image(path, "r+", allow_files=allow_files, probe=probe, journal_size=journal_size) as image:
        has_any = image.protection.fault() is not None
        if has_any and not refresh:
            raise ValueError("the image has protection already: refresh renews it")
        if refresh and not has_any:
            raise ValueError("the image has no protection to refresh")
        return image.protection.refresh(progress)


def unprotect(path: str | os.PathLike[str], *, journal_size: int | None = None) -> bool:
    """Take the protection of an image away; return False if there was none.

    Raises:
        JqcowError, OSError: as `jqcow.open`.
    """
    with open_alone(path, "r+", journal_size=journal_size) as image:
        return image.protection.remove()


def verify(
    path: str | os.PathLike[str],
    *,
    allow_files: FilePolicy = False,
    probe: bool = False,
    progress: Progress = _nobody,
) -> VerifyReport:
    """Compare what an image holds with its sums. Nothing is written; arguments as `protect`.

    Raises:
        JqcowError, OSError: as `ImageProtection.verify`.
    """
    with open_image(path, "r", allow_files=allow_files, probe=probe) as image:
        return image.protection.verify(progress)


def heal(
    path: str | os.PathLike[str],
    backup: str | os.PathLike[str],
    backup_format: DiskFormat | None = None,
    *,
    allow_files: FilePolicy = False,
    probe: bool = False,
    journal_size: int | None = None,
    progress: Progress = _nobody,
) -> HealReport:
    """Replace what is wrong in an image by what a backup has, where that has the right sum.

    Args:
        path: the image; arguments as `protect`.
        backup: an image or a raw file; what it names is opened as ``allow_files`` says.
        backup_format: None tells it by the magic.
        allow_files: as in `protect`.
        probe: as in `protect`.
        journal_size: as in `protect`.
        progress: of the comparison, as in `protect`.

    Raises:
        JqcowError, OSError: as `ImageProtection.heal`.
    """
    following = Following(allow_files, probe)
    with (
        closing(open_disk(backup, backup_format, following=following)) as disk,
        open_image(path, "r+", allow_files=allow_files, probe=probe, journal_size=journal_size) as image,
    ):
        return image.protection.heal(disk, progress)
