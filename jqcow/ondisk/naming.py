"""What the file names inside an image mean. `jqcow.disks.policy` decides whether they are followed.

The format fixes how a name is stored (qcow2 specification, "Header": ``backing_file_offset`` and
``backing_file_size``; "Backing file format name"). What it names is QEMU's convention, found by trying
QEMU 7.2:

- A colon before the first slash ends the name of a protocol. ``file:`` stands before a path, ``json:`` before
  options that may name one (`jqcow.ondisk.json_names`). jqcow opens regular files only, so all others
  (``nbd:``, ``http:``...) are refused.
- A relative path in a name with a protocol is relative to the working directory.
- Any other relative name is relative to the directory of the image that names it, as the caller spelled the
  path of that image. Symbolic links are not resolved before: a link to an image finds the files beside the
  link.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from jqcow.errors import FormatError, UnsupportedFeatureError
from jqcow.ondisk import root as roots
from jqcow.ondisk.header import (
    EXTENSION_BACKING_FORMAT,
    EXTENSION_EXTERNAL_DATA,
    MAX_BACKING_NAME_BYTES,
    Extension,
    HeaderArea,
)
from jqcow.ondisk.json_names import RefusedName, parse_json_name

DiskFormat = Literal["qcow2", "raw"]
FORMATS: tuple[DiskFormat, ...] = get_args(DiskFormat)
DISK_FORMATS: tuple[DiskFormat, ...] = ("qcow2", "raw")

OTHER_PROTOCOLS = (
    *("ftp", "ftps", "gluster", "http", "https", "iscsi", "iser", "nbd", "nbd+tcp", "nbd+unix"),
    *("nfs", "null-aio", "null-co", "rbd", "sftp", "ssh"),
)
"""Protocols of QEMU's that an image may name for QEMU to follow; jqcow follows none of them there."""

_FORMAT_NAME = re.compile(r"[a-z][a-z0-9_-]{0,14}", re.ASCII)
"""A name of a format that is short enough for QEMU."""
_PROTOCOL = re.compile(r"[^/:]*:")


@dataclass(frozen=True)
class NamedFile:
    """A file that an image names.

    Attributes:
        image: path of the image that names it.
        name: the name as stored, decoded as the host's file names are.
        path: the file that the name means.
        format: as stored, or as a ``json:`` name says; None where the image does not say. Not necessarily one
            that jqcow knows.
        purpose: what the image needs the file for.
        real_path: `path` with all links resolved, when a function was asked whether the file may be opened:
            what is opened has this path, or nothing is. None before.
    """

    image: str
    name: str
    path: str
    format: str | None
    purpose: Literal["backing", "data"] = "backing"
    real_path: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Meaning:
    """What a name means: the path of a file, and its format, None where the name does not tell."""

    path: str
    format: str | None = None


def protocol_of(name: str) -> str | None:
    """Return what stands before the colon of a name with a protocol; None for the path of a file."""
    found = _PROTOCOL.match(name)
    return None if found is None else found[0][:-1]


def resolve(name: str, image: str) -> str:
    """Return the path that a name inside the image at path ``image`` means; errors as `meaning_of`."""
    return meaning_of(name, image).path


def meaning_of(name: str, image: str) -> Meaning:
    """Return what a name inside the image at path ``image`` means; see the module's text.

    Raises:
        UnsupportedFeatureError: the name has a protocol, and is no plain file.
    """
    protocol = protocol_of(name)
    if protocol is None:
        # Not os.path.join: like QEMU, keep the directory as it was spelled, doubled slashes and all.
        return Meaning(name if name.startswith("/") else image[: image.rfind("/") + 1] + name)
    try:
        return _plain_file(protocol, name.partition(":")[2])
    except RefusedName as refused:
        detail = f"{image} names {name!r}, and jqcow opens regular files only: {refused}"
        raise UnsupportedFeatureError(f"the protocol '{protocol}:'", detail) from refused


def _plain_file(protocol: str, rest: str) -> Meaning:
    if protocol == "json":
        return Meaning(*parse_json_name(rest))
    if protocol != "file":
        raise RefusedName("another protocol is not followed")
    if not rest:
        raise RefusedName("no path follows")
    return Meaning(rest)


def decode_name(data: bytes, purpose: str = "backing") -> str:
    """Return a stored name as the host's file names are decoded.

    Raises:
        FormatError: no name at all, one with a NUL byte, or one of more than 1023 bytes.
    """
    if not data:
        raise FormatError(f"the {purpose} file name is empty")
    if b"\0" in data:
        raise FormatError(f"the {purpose} file name has a NUL byte in it")
    if len(data) > MAX_BACKING_NAME_BYTES:
        raise FormatError(
            f"the {purpose} file name has {len(data)} bytes, more than {MAX_BACKING_NAME_BYTES}"
        )
    return os.fsdecode(data)


def backing_file_of(area: HeaderArea, image: str) -> NamedFile | None:
    """Return the backing file that the header of the image at path ``image`` names; None without one.

    Raises:
        FormatError: a name that no file has.
        UnsupportedFeatureError: the name has a protocol and is no plain file, or contradicts the format.
    """
    stored = area.backing_file_name
    if stored is None:
        return None
    name = decode_name(stored)
    extension = area.find(EXTENSION_BACKING_FORMAT)
    # QEMU, too, takes an empty format for none.
    stored_format = extension.data.decode("utf-8", "backslashreplace") if extension else ""
    return named_file(image, name, stored_format or None)


def named_file(image: str, name: str, stored_format: str | None) -> NamedFile:
    """Return the backing file of the image at path ``image``: of this name and, if one is stored, format.

    Raises:
        UnsupportedFeatureError: the name has a protocol and is no plain file, or contradicts the format.
    """
    meaning = meaning_of(name, image)
    if stored_format and meaning.format and stored_format != meaning.format:
        raise UnsupportedFeatureError(
            f"a backing file of format {stored_format!r} and driver {meaning.format!r}",
            f"{image} names {name!r}",
        )
    return NamedFile(image, name, meaning.path, stored_format or meaning.format)


def data_file_of(area: HeaderArea, image: str) -> NamedFile | None:
    """Return the external data file that the header names; None where it names none.

    A relative path is relative to the working directory, as in QEMU 7.2.

    Raises:
        FormatError: a name that no file has.
        UnsupportedFeatureError: the name has a protocol and is no plain file.
    """
    extension = area.find(EXTENSION_EXTERNAL_DATA)
    if extension is None:
        return None
    name = decode_name(extension.data, "data")
    return NamedFile(image, name, meaning_of(name, "").path, "raw", "data")


def name_data_file(area: HeaderArea, name: str) -> HeaderArea:
    """Return the header of an image with an external data file, with another name for that.

    Args:
        area: the header; all that it holds besides is kept.
        name: to be stored as it is, so relative to the working directory.

    Raises:
        ValueError: the image has no external data file.
        FormatError: a name that no file has, or the header's cluster has no room for it.
        UnsupportedFeatureError: a name with a protocol that is no plain file, or a header that would be too
            long for the journal.
    """
    if not area.header.has_data_file:
        raise ValueError("the image has no external data file")
    stored = os.fsencode(name)
    meaning_of(decode_name(stored, "data"), "")
    extension = Extension(EXTENSION_EXTERNAL_DATA, stored)
    named = area.with_extension(extension, autoclear_features=area.header.autoclear_features)
    roots.check_room(named.header, len(named.data))
    return named


def name_backing_file(
    area: HeaderArea,
    name: str | None,
    backing_format: str | None,
    *,
    foreign: bool = False,
    elsewhere: bool = False,
) -> HeaderArea:
    """Return the header with another backing file and its format, or with none.

    Args:
        area: the header; all that it holds besides is kept.
        name: to be stored as it is, so relative to the directory of the image; None for no backing file.
        backing_format: ``raw`` or ``qcow2``; None with no backing file.
        foreign: it may be another one, that other programs know.
        elsewhere: the name may have a protocol that other programs know.

    Raises:
        ValueError: one without the other, another format, or a name that cannot be stored.
        FormatError: the header's cluster has no room for the name.
        UnsupportedFeatureError: a name with a protocol that is no plain file, or contradicts the format, or a
            header that would be too long for the journal.
    """
    if name is None:
        if backing_format is not None:
            raise ValueError("a backing format needs a backing file")
        return area.with_backing_file(None, None)
    if not isinstance(name, str):
        raise TypeError(f"the name of a backing file is a str, not {type(name).__name__}")
    if area.header.is_raw_outside:
        raise ValueError("a raw data file cannot show a backing file")
    is_known = backing_format in DISK_FORMATS
    is_stored = foreign and backing_format is not None and _FORMAT_NAME.fullmatch(backing_format)
    if backing_format is None or not (is_known or is_stored):
        raise ValueError(f"the format of a backing file is raw or qcow2, not {backing_format!r}")
    stored = os.fsencode(name)
    decode_name(stored)
    if is_known and not (elsewhere and protocol_of(name) in OTHER_PROTOCOLS):
        named_file("the new header", name, backing_format)
    named = area.with_backing_file(stored, backing_format.encode())
    if area.header.version >= 3:
        roots.check_room(named.header, len(named.data))
    return named


def check_format(value: DiskFormat) -> None:
    """Raise ValueError for a format that there is not."""
    if value not in FORMATS:
        raise ValueError(f"a format is {' or '.join(FORMATS)}, not {value!r}")
