"""Images as bytes, to be changed by hand and checked: by jqcow's checker, and by qemu-img check."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from jqcow.checker.check import CheckReport, check_structure
from jqcow.ondisk import entries
from jqcow.ondisk.frame import BlockOperation, HeaderOperation, Operation, encode_operations, frame_payload
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.ondisk.root import MIN_JOURNAL_BYTES, JournalRange, pack_root
from tests.support.qemu import done, qemu_io, run

DIRTY_BYTE = 79
"""The last byte of the incompatible features."""


def make_image(path: Path, *commands: str, size: str = "8M", options: str = "cluster_size=4096") -> bytearray:
    """Create an image, let qemu-io run commands on it, and return its bytes."""
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    if commands:
        qemu_io(path, *commands)
    return bytearray(path.read_bytes())


def check(image: bytes | bytearray, reserved: Sequence[tuple[int, int]] = ()) -> CheckReport:
    """Return what the independent checker finds in a file; past its end it reads zeros."""

    def read(length: int, offset: int) -> bytes:
        return bytes(image[offset : offset + length]).ljust(length, b"\0")

    return check_structure(read, len(image), reserved=reserved)


def qemu_numbers(path: Path) -> tuple[int, ...]:
    """Return what qemu-img check says, in the order of :func:`our_numbers`."""
    report = json.loads(run("qemu-img", "check", "--output=json", path).stdout)
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
        # QEMU calls lost data leaked.
        report.leaks + report.lost,
    )


class Tables:
    """The bytes of a closed image, with refcounts of 16 bits, and its tables.

    ``l2`` is the first L2 table, ``data`` the cluster of its first entry.
    """

    def __init__(self, content: bytes | bytearray) -> None:
        self.image = bytearray(content)
        self.header = Header.unpack(bytes(self.image[:512]))
        self.cluster_bytes = 1 << self.header.cluster_bits
        self.l1 = self.header.l1_table_offset
        self.l2 = self.entry(self.l1) & entries.OFFSET_MASK
        self.refcount_block = self.entry(self.header.refcount_table_offset)
        self.data = self.entry(self.l2) & entries.OFFSET_MASK

    def entry(self, place: int) -> int:
        """Return the entry of a table at a host offset."""
        return int.from_bytes(self.image[place : place + 8], "big")

    def set_entry(self, place: int, value: int) -> None:
        """Change the entry of a table at a host offset."""
        self.image[place : place + 8] = value.to_bytes(8, "big")

    def place_of(self, guest: int) -> int:
        """Return where the L2 entry of a guest offset stands; its L2 table is there."""
        l1_index, l2_index = divmod(guest // self.cluster_bytes, self.cluster_bytes // 8)
        return (self.entry(self.l1 + 8 * l1_index) & entries.OFFSET_MASK) + 8 * l2_index

    def refcount_place(self, host: int) -> int:
        """Return where the refcount of a host offset stands; 0: in no block yet."""
        index, within = divmod(host // self.cluster_bytes, self.header.geometry.refcounts_per_cluster)
        block = self.entry(self.header.refcount_table_offset + 8 * index)
        return block and block + 2 * within

    def set_refcount(self, host: int, value: int) -> None:
        """Change the refcount of a host cluster."""
        place = self.refcount_place(host)
        self.image[place : place + 2] = value.to_bytes(2, "big")

    def refcount_places(self) -> list[int]:
        """Return where the refcounts of the file's whole clusters stand."""
        end = len(self.image) - len(self.image) % self.cluster_bytes
        return [self.refcount_place(host) for host in range(0, end, self.cluster_bytes)]

    def free_clusters(self) -> list[int]:
        """Return the numbers of the file's clusters that have refcount 0, or none yet."""
        places = enumerate(self.refcount_places())
        return [number for number, place in places if not place or not any(self.image[place : place + 2])]

    def spoil_refcounts(self, random: Random, share: float, values: tuple[int, ...]) -> None:
        """Change a share of the refcounts. What was free, and is not any more, loses its old bytes.

        They would look like lost data, which stays (tests/unit/test_lost_data.py).
        """
        free = self.free_clusters()
        for place in self.refcount_places():
            if place and random.random() < share:
                self.image[place : place + 2] = random.choice(values).to_bytes(2, "big")
        for cluster in set(free).difference(self.free_clusters()):
            start = cluster * self.cluster_bytes
            self.image[start : start + self.cluster_bytes] = bytes(self.cluster_bytes)


class Patient(Tables):
    """An image file to be damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.read_image()

    def read_image(self) -> None:
        """Find the structures of the image file."""
        super().__init__(self.path.read_bytes())

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
