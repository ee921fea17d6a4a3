"""Disk images of other programs, told by their magic: what has one of these is no raw disk.

Taken for raw, such a file is read as another disk than it holds: the container's bytes.
"""

from __future__ import annotations

import re

HEAD_BYTES = 4096
"""How much of a file's start is looked at."""

TAIL_BYTES = 512
"""How much of its end: a fixed VHD has its footer there, a DMG its trailer."""

_AT_START: tuple[tuple[bytes, str], ...] = (
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
    (b"QED\0", "qed"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
    (b"Bochs Virtual HD Image", "bochs"),
    (b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    (b"QFI\xfb\0\0\0\1", "qcow"),
    (b"LUKS\xba\xbe\0\1", "luks"),
)
_VDI_SIGNATURE = (0x40, b"\x7f\x10\xda\xbe")
_AT_END: tuple[tuple[int, bytes, str], ...] = (
    (512, b"conectix", "vpc"),
    (511, b"conectix", "vpc"),
    (512, b"koly", "dmg"),
)
"""Bytes before the end; the footer of an old VHD has 511."""
_VMDK_VERSION = re.compile(rb"version=[123]\r?\n")


def foreign_format(head: bytes, tail: bytes) -> str | None:
    """Return qemu-img's name of the format that a file is of, None where it is none of these.

    Args:
        head: the first HEAD_BYTES bytes of the file, or all that there are.
        tail: the last TAIL_BYTES bytes.
    """
    for magic, name in _AT_START:
        if head.startswith(magic):
            return name
    offset, signature = _VDI_SIGNATURE
    if head[offset : offset + len(signature)] == signature:
        return "vdi"
    if _is_vmdk_descriptor(head):
        return "vmdk"
    return next((name for length, magic, name in _AT_END if tail[-length:].startswith(magic)), None)


def _is_vmdk_descriptor(head: bytes) -> bool:
    """Return True for a text that, comments and blank lines aside, begins as that of a VMDK does."""
    for line in head.splitlines(keepends=True):
        if line.strip() and not line.startswith(b"#"):
            return _VMDK_VERSION.fullmatch(line) is not None
    return False
