"""Build a bootable image, all or nothing: one transaction replaces the whole disk.

    python3 build_image.py IMAGE EFI_TREE ROOT_TREE

The disk gets a partition table, an EFI system partition and a root file system, made of two directories. When
the builder dies, the image holds what it held before. It needs the Debian packages dosfstools, mtools and
e2fsprogs.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
import uuid
import zlib
from pathlib import Path

import jqcow

SECTOR_BYTES = 512
MIB = 1 << 20
EFI_BYTES = 40 * MIB
EFI_SYSTEM = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX_ROOT_X86_64 = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")

# GPT, the partition table of UEFI: signature, revision, size, CRC-32, 0; own sector, the other header's,
# first and last usable sector; disk; first sector of the entries, their number, their size, their CRC-32.
GPT_HEADER = struct.Struct("<8s4I4Q16sQ3I")
GPT_ENTRY = struct.Struct("<16s16s3Q72s")  # kind, partition, first and last sector, flags, name
GPT_ENTRY_COUNT = 128
GPT_SECTORS = 1 + GPT_ENTRY_COUNT * GPT_ENTRY.size // SECTOR_BYTES

Pieces = list[tuple[int, Path]]  # byte offset on the disk, and the file to put there


def prepare(scratch: Path, efi_tree: Path, root_tree: Path, disk_bytes: int) -> Pieces:
    """Make the parts of the disk as files in ``scratch``."""
    efi, root = scratch / "efi.raw", scratch / "root.raw"
    subprocess.run(["mkfs.fat", "-C", "-F", "32", "-n", "EFI", efi, str(EFI_BYTES // 1024)], check=True)
    subprocess.run(["mcopy", "-s", "-i", efi, *sorted(efi_tree.iterdir()), "::/"], check=True)
    root_start = MIB + EFI_BYTES
    root_bytes = disk_bytes - MIB - root_start
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", root_tree, root, f"{root_bytes // 1024}k"], check=True
    )
    entries = gpt_entry(EFI_SYSTEM, MIB, EFI_BYTES, "EFI system partition")
    entries += gpt_entry(LINUX_ROOT_X86_64, root_start, root_bytes, "root")
    first, second = scratch / "first-table.raw", scratch / "second-table.raw"
    tables = partition_tables(entries, disk_bytes // SECTOR_BYTES)
    first.write_bytes(tables[0])
    second.write_bytes(tables[1])
    return [(0, first), (MIB, efi), (root_start, root), (disk_bytes - len(tables[1]), second)]


def gpt_entry(kind: uuid.UUID, start: int, length: int, name: str) -> bytes:
    first, last = start // SECTOR_BYTES, (start + length) // SECTOR_BYTES - 1
    return GPT_ENTRY.pack(kind.bytes_le, uuid.uuid4().bytes_le, first, last, 0, name.encode("utf-16-le"))


def partition_tables(entries: bytes, sector_count: int) -> tuple[bytes, bytes]:
    """Return what stands at the start of the disk, behind a protective MBR, and at its end."""
    entries = entries.ljust(GPT_ENTRY_COUNT * GPT_ENTRY.size, b"\0")
    last, disk = sector_count - 1, uuid.uuid4()

    def header(own: int, other: int, entries_start: int) -> bytes:
        def pack(crc: int) -> bytes:
            usable = GPT_SECTORS + 1, last - GPT_SECTORS
            start = b"EFI PART", 0x10000, GPT_HEADER.size, crc, 0, own, other, *usable, disk.bytes_le
            shape = entries_start, GPT_ENTRY_COUNT, GPT_ENTRY.size, zlib.crc32(entries)
            return GPT_HEADER.pack(*start, *shape)

        return pack(zlib.crc32(pack(0))).ljust(SECTOR_BYTES, b"\0")

    covering = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff" * 3, 1, min(last, 0xFFFFFFFF))
    mbr = bytes(446) + covering + bytes(48) + b"\x55\xaa"
    first = mbr + header(1, last, 2) + entries
    return first, entries + header(last, 1, last - GPT_SECTORS + 1)


def install(image: jqcow.Image, pieces: Pieces) -> None:
    """Replace all that is on the disk by the pieces, or nothing."""
    with image.transaction() as transaction:
        transaction.write_zeroes(image.size, 0)
        for start, path in pieces:
            with path.open("rb") as file:
                while chunk := file.read(MIB):
                    if chunk != bytes(len(chunk)):
                        transaction.pwrite(chunk, start + file.tell() - len(chunk))


def build_image(image_path: Path, efi_tree: Path, root_tree: Path) -> None:
    """Make a bootable disk of two directories."""
    with tempfile.TemporaryDirectory() as scratch, jqcow.open(image_path, "r+") as image:
        install(image, prepare(Path(scratch), efi_tree, root_tree, image.size))


if __name__ == "__main__":
    build_image(*map(Path, sys.argv[1:]))
