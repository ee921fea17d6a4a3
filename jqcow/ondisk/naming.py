"""What the file names inside an image mean. `jqcow.disks.policy` decides whether they are followed.

The format fixes how a name is stored (qcow2 specification, "Header": ``backing_file_offset`` and
``backing_file_size``; "Backing file format name"). What it names is QEMU's convention, found by trying
QEMU 7.2:

- A colon before the first slash ends the name of a protocol (``nbd:``, ``http:``, ``json:``, ``file:``...).
  jqcow opens regular files only, so such a name is refused.
- A relative name is relative to the directory of the image that names it, as the caller spelled the path of
  that image. Symbolic links are not resolved before: a link to an image finds the files beside the link.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal, get_args

from jqcow.errors import FormatError, UnsupportedFeatureError
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import EXTENSION_BACKING_FORMAT, MAX_BACKING_NAME_BYTES, HeaderArea

DiskFormat = Literal["qcow2", "raw"]
FORMATS: tuple[DiskFormat, ...] = get_args(DiskFormat)
DISK_FORMATS: tuple[DiskFormat, ...] = ("qcow2", "raw")

_PROTOCOL = re.compile(r"[^/:]*:")


@dataclass(frozen=True)
class NamedFile:
    """A file that an image names.

    Attributes:
        image: path of the image that names it.
        name: the name as stored, decoded as the host's file names are.
        path: the file that the name means.
        format: as stored; None where the image does not say. Not necessarily one that jqcow knows.
        purpose: what the image needs the file for.
    """

    image: str
    name: str
    path: str
    format: str | None
    purpose: Literal["backing"] = "backing"


def protocol_of(name: str) -> str | None:
    """Return what stands before the colon of a name with a protocol; None for the path of a file."""
    found = _PROTOCOL.match(name)
    return None if found is None else found[0][:-1]


def resolve(name: str, image: str) -> str:
    """Return the path that a name inside the image at path ``image`` means; see the module's text.

    Raises:
        UnsupportedFeatureError: the name has a protocol.
    """
    protocol = protocol_of(name)
    if protocol is not None:
        raise UnsupportedFeatureError(
            f"the protocol '{protocol}:'", f"{image} names {name!r}, and jqcow opens regular files only"
        )
    if name.startswith("/"):
        return name
    # Not os.path.join: like QEMU, keep the directory as it was spelled, doubled slashes and all.
    return image[: image.rfind("/") + 1] + name


def decode_name(data: bytes) -> str:
    """Return a stored name as the host's file names are decoded.

    Raises:
        FormatError: no name at all, one with a NUL byte, or one of more than 1023 bytes.
    """
    if not data:
        raise FormatError("the backing file name is empty")
    if b"\0" in data:
        raise FormatError("the backing file name has a NUL byte in it")
    if len(data) > MAX_BACKING_NAME_BYTES:
        raise FormatError(f"the backing file name has {len(data)} bytes, more than {MAX_BACKING_NAME_BYTES}")
    return os.fsdecode(data)


def backing_file_of(area: HeaderArea, image: str) -> NamedFile | None:
    """Return the backing file that the header of the image at path ``image`` names; None without one.

    Raises:
        FormatError: a name that no file has.
        UnsupportedFeatureError: the name has a protocol.
    """
    stored = area.backing_file_name
    if stored is None:
        return None
    name = decode_name(stored)
    extension = area.find(EXTENSION_BACKING_FORMAT)
    # QEMU, too, takes an empty format for none.
    stored_format = extension.data.decode("utf-8", "backslashreplace") if extension else ""
    return NamedFile(image, name, resolve(name, image), stored_format or None)


def name_backing_file(area: HeaderArea, name: str | None, backing_format: str | None) -> HeaderArea:
    """Return the header with another backing file and its format, or with none.

    Args:
        area: the header; all that it holds besides is kept.
        name: to be stored as it is, so relative to the directory of the image; None for no backing file.
        backing_format: ``raw`` or ``qcow2``; None with no backing file.

    Raises:
        ValueError: one without the other, another format, or a name that cannot be stored.
        FormatError: the header's cluster has no room for the name.
        UnsupportedFeatureError: a name with a protocol, or a header that would be too long for the journal.
    """
    if name is None:
        if backing_format is not None:
            raise ValueError("a backing format needs a backing file")
        return area.with_backing_file(None, None)
    if not isinstance(name, str):
        raise TypeError(f"the name of a backing file is a str, not {type(name).__name__}")
    if backing_format not in DISK_FORMATS:
        raise ValueError(f"the format of a backing file is raw or qcow2, not {backing_format!r}")
    resolve(name, "the new header")
    stored = os.fsencode(name)
    decode_name(stored)
    named = area.with_backing_file(stored, backing_format.encode())
    if area.header.version >= 3:
        roots.check_room(named.header, len(named.data))
    return named


def check_format(value: DiskFormat) -> None:
    """Raise ValueError for a format that there is not."""
    if value not in FORMATS:
        raise ValueError(f"a format is {' or '.join(FORMATS)}, not {value!r}")
