"""Disk images of other programs, told by their magic: what has one of these is no raw disk.

Taken for raw, such a file is read as another disk than it holds: the container's bytes.
"""

from __future__ import annotations

HEAD_BYTES = 4096
"""How much of a file's start is looked at."""

TAIL_BYTES = 512
"""How much of its end: a fixed VHD has its footer there, a DMG its trailer."""

_AT_START: tuple[tuple[bytes, str], ...] = (
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
    (b"QED\0", "qed"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
    (b"Bochs Virtual HD Image", "bochs"),
    (b"#!/bin/sh\n#V2.0 Format\n", "cloop"),
    (b"QFI\xfb\0\0\0\1", "qcow"),
)
_VDI_SIGNATURE = (0x40, b"\x7f\x10\xda\xbe")
_AT_END: tuple[tuple[bytes, str], ...] = ((b"conectix", "vpc"), (b"koly", "dmg"))


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
    return next((name for magic, name in _AT_END if tail.startswith(magic)), None)
