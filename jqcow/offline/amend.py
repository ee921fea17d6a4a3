"""An image in another format: its version, lazy refcounts, the width of its refcounts, its size."""

from __future__ import annotations

import os
from typing import Unpack

from jqcow.disks.policy import FilePolicy
from jqcow.image import Image
from jqcow.image.amending import AmendReport, amend_image
from jqcow.image.opening import open as open_image
from jqcow.image.opening import open_alone
from jqcow.offline.compare import Progress
from jqcow.ondisk.amendment import AmendOptions
from jqcow.ondisk.keys import Passphrase


def amend(
    path: str | os.PathLike[str],
    *,
    shrink: bool = False,
    allow_files: FilePolicy = False,
    probe: bool = False,
    journal_size: int | None = None,
    passphrase: Passphrase | None = None,
    progress: Progress = lambda done, total: None,
    **options: Unpack[AmendOptions],
) -> AmendReport:
    """Give an image another format, in one transaction, and close it.

    Going to version 2, entries with a zero flag are replaced in transactions of their own before, if they are
    many; each leaves the disk as it is.

    Args:
        path: the image; a crashed one is recovered first.
        shrink: ``size`` may be less than the disk has: what lies behind it is lost.
        allow_files: with ``size``, whether the backing files may be opened, as in `jqcow.open`: what a larger
            disk adds must hide what they have there. Otherwise none is opened.
        probe: with ``size``, tell formats that are not stored by the magic.
        journal_size: in bytes, as in `jqcow.open`.
        passphrase: of encrypted images, as in `jqcow.open`: needed with ``size``, and for version 2 over a
            backing file.
        progress: called with how much of the mapping was looked at for zero flags, and all of it.
        options: see `AmendOptions`; what is not given stays.

    Raises:
        TypeError, ValueError: an option, or what is asked for is nothing that this image can be.
        UnsupportedFeatureError: a refcount does not fit the width asked for, or the image is refused.
        JqcowError: the image, or with ``size`` a file below it, cannot be read or is in use.
        OSError: the host failed; the image has its old format.
    """
    if "size" in options:
        image = open_image(
            path,
            "r+",
            journal_size=journal_size,
            allow_files=allow_files,
            probe=probe,
            passphrase=passphrase,
        )
    else:
        image = open_alone(path, "r+", journal_size=journal_size)
    with image:
        _check_size(image, options, shrink=shrink)
        return amend_image(image, options, progress, passphrase)


def _check_size(image: Image, options: AmendOptions, *, shrink: bool) -> None:
    """Raise ValueError if the disk would shrink, which nobody allowed."""
    size = options.get("size", image.size)
    if size < image.size and not shrink:
        told = f"the disk has {image.size} bytes; what lies behind {size} would be lost"
        raise ValueError(f"{told}: shrink allows that")
