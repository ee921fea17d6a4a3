"""Images to be damaged and checked: by jqcow's checker, and by qemu-img check."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jqcow.checker.check import CheckReport, check_structure
from jqcow.ondisk import entries
from jqcow.ondisk.entries import ENTRY
from jqcow.ondisk.frame import BlockOperation, HeaderOperation, Operation, encode_operations, frame_payload
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.root import MIN_JOURNAL_BYTES, JournalRange, pack_root


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def make_image(path: Path, *commands: str, size: str = "8M", options: str = "cluster_size=4096") -> bytearray:
    """Create an image, let qemu-io run commands on it, and return its bytes."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    if commands:
        run("qemu-io", "-f", "qcow2", *(part for command in commands for part in ("-c", command)), path)
    return bytearray(path.read_bytes())


def check(image: bytes | bytearray, reserved: Sequence[tuple[int, int]] = ()) -> CheckReport:
    def read(length: int, offset: int) -> bytes:
        return bytes(image[offset : offset + length]).ljust(length, b"\0")

    return check_structure(read, len(image), reserved=reserved)


def qemu_numbers(path: Path) -> tuple[int, ...]:
    """Return what qemu-img check says, in the order of :func:`our_numbers`."""
    answer = subprocess.run(
        ["qemu-img", "check", "--output=json", str(path)], capture_output=True, text=True, check=False
    )
    report = json.loads(answer.stdout)
    assert report["check-errors"] == 0
    names = ("image-end-offset", "total-clusters", "allocated-clusters", "fragmented-clusters")
    return tuple(report.get(name, 0) for name in (*names, "compressed-clusters", "corruptions", "leaks"))


def our_numbers(report: CheckReport) -> tuple[int, ...]:
    return (
        report.image_end_offset,
        report.total_clusters,
        report.allocated_clusters,
        report.fragmented_clusters,
        report.compressed_clusters,
        report.corruptions,
        report.leaks,
    )


class Patient:
    """An image to be damaged: ``l2`` is its first L2 table, ``data`` the cluster of its first entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read_image()

    def read_image(self) -> None:
        """Find the structures of the image file."""
        self.image = bytearray(self.path.read_bytes())
        self.header = Header.unpack(bytes(self.image[:512]))
        self.cluster_bytes = 1 << self.header.cluster_bits
        self.l1 = self.header.l1_table_offset
        self.l2 = self.entry(self.l1) & entries.OFFSET_MASK
        self.refcount_block = self.entry(self.header.refcount_table_offset)
        self.data = self.entry(self.l2) & entries.OFFSET_MASK

    def entry(self, place: int) -> int:
        value: int = ENTRY.unpack_from(self.image, place)[0]
        return value

    def set_entry(self, place: int, value: int) -> None:
        ENTRY.pack_into(self.image, place, value)

    def set_refcount(self, host: int, value: int) -> None:
        struct.pack_into(">H", self.image, self.refcount_block + 2 * (host // self.cluster_bytes), value)

    def change_header(self, place: int, layout: str, value: int) -> None:
        struct.pack_into(layout, self.image, place, value)

    def append_cluster(self, data: bytes = b"", refcount: int = 1) -> int:
        """Add a cluster at the end of the file and return its host offset."""
        self.image += bytes(-len(self.image) % self.cluster_bytes)
        host = len(self.image)
        self.image += data.ljust(self.cluster_bytes, b"\0")
        self.set_refcount(host, refcount)
        return host

    def check(self, reserved: Sequence[tuple[int, int]] = ()) -> CheckReport:
        return check(self.image, reserved)

    def qemu_numbers(self) -> tuple[int, ...]:
        self.path.write_bytes(self.image)
        return qemu_numbers(self.path)


def as_live(image: bytes | bytearray, clusters: Sequence[int]) -> bytes:
    """Return a clean image as one with a live journal, which alone holds the header and some metadata.

    ``clusters`` are the host offsets of these clusters; what lies at their homes is garbage.
    """
    area = HeaderArea.parse(bytes(image))
    geometry = area.header.geometry
    live = bytearray(image) + bytes(-len(image) % max(geometry.cluster_bytes, 4096))
    journal = JournalRange(len(live), MIN_JOURNAL_BYTES, bytes(range(16)))
    operations: list[Operation] = [HeaderOperation(area.data)]
    for cluster in clusters:
        for offset in range(cluster, cluster + geometry.cluster_bytes, geometry.block_bytes):
            operations.append(BlockOperation(offset, bytes(live[offset : offset + geometry.block_bytes])))
        live[cluster : cluster + geometry.cluster_bytes] = b"\xa5" * geometry.cluster_bytes
    live[:512] = pack_root(replace(area.header, nb_snapshots=0, snapshots_offset=0), journal)
    frame = frame_payload(encode_operations(operations), journal.salt, epoch=1, sequence=1)
    live += bytes(journal.half_bytes) + frame.ljust(journal.half_bytes, b"\0")
    return bytes(live)
