"""Who may have the names inside images followed, and how.

A name is data of whoever wrote the image, and could be ``/etc/shadow``. So no file is opened for the sake of
such a name alone: the caller's `FilePolicy` decides on each `NamedFile`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from jqcow.errors import FileAccessDenied, JqcowError, UnsupportedFeatureError, printable
from jqcow.ondisk.naming import DISK_FORMATS, DiskFormat, NamedFile

if TYPE_CHECKING:
    from jqcow.ondisk.keys import Passphrase

FilePolicy = bool | Callable[[NamedFile], bool]
"""Which files named inside images may be opened: all, none, or those for which a function returns True."""


@dataclass(frozen=True)
class Following:
    """How the names inside images are followed.

    Attributes:
        allow: which files may be opened.
        probe: tell a format that is not stored by the file's magic; otherwise such a file is refused. Whoever
            writes to the guest's disk of a raw file then chooses its format.
        share_writers: read beside programs that write to these files, unless a journal is live; what is read
            may then be old, mixed or wrong.
        passphrase: of the files that are encrypted, the first one included; shown nowhere.
        reads_data: the guest's data is read, so an encrypted file needs a passphrase.
    """

    allow: FilePolicy = False
    probe: bool = False
    share_writers: bool = False
    passphrase: Passphrase | None = field(default=None, repr=False)
    reads_data: bool = True

    def __post_init__(self) -> None:
        check_policy(self.allow)


def check_policy(allow: FilePolicy) -> None:
    """Raise TypeError unless ``allow`` is a policy: a path, say, would allow all files."""
    if not isinstance(allow, bool) and not callable(allow):
        raise TypeError(f"a bool or a function is needed, not {type(allow).__name__}")


NOT_FOLLOWING = Following()
"""No name is followed: an image that needs another file is refused."""


def require_allowed(named: NamedFile, allow: FilePolicy) -> NamedFile:
    """Return a file with what the caller's policy was told of it: it is to be opened as that.

    Raises:
        FileAccessDenied: the policy does not allow it.
    """
    if callable(allow):
        named = replace(named, real_path=os.path.realpath(named.path))
        allowed = allow(named)
    else:
        allowed = allow
    if not allowed:
        raise FileAccessDenied(named.image, named.purpose, named.name, named.path)
    return named


@contextmanager
def naming_the_image(named: NamedFile) -> Iterator[None]:
    """Add a note to errors about a file: which image names it."""
    try:
        yield
    except (JqcowError, OSError) as error:
        error.add_note(f"{printable(named.image)} names it as its {named.purpose} file, by {named.name!r}")
        raise


def allowing_what_it_names(image: str, allow: FilePolicy) -> FilePolicy:
    """Return a policy that also allows what the image at path ``image`` names: the caller named it."""
    check_policy(allow)

    def allow_first(named: NamedFile) -> bool:
        return named.image == image or (allow(named) if callable(allow) else allow)

    return allow_first


def stored_format(named: NamedFile, *, probe: bool) -> DiskFormat | None:
    """Return the format that the image stores of a file; None where it stores none, and the magic may tell.

    Raises:
        UnsupportedFeatureError: a format that jqcow does not read; without ``probe``, none at all.
    """
    if named.format is None:
        if probe:
            return None
        raise UnsupportedFeatureError(
            "a backing file without a format",
            f"{named.image} does not say of which format {named.path} is; a guess could take a guest's bytes "
            "for an image",
        )
    for known in DISK_FORMATS:
        if named.format == known:
            return known
    raise UnsupportedFeatureError(
        f"the format {named.format!r}", f"of {named.path}, the {named.purpose} file of {named.image}"
    )
