"""Who refers to which cluster: the references that a check counts, and the owners of metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jqcow.checker.findings import Findings, Kind
from jqcow.checker.tables import Code, zeroed
from jqcow.errors import UnsupportedFeatureError
from jqcow.ondisk.header import HeaderArea

Read = Callable[[int, int], bytes]
"""Reads (length, offset) in bytes from the image file; what lies past its end reads as zeros."""

MAX_CLUSTERS = 1 << 28
"""The largest file, in clusters, that is checked: 16 TiB with clusters of 64 KiB. It bounds memory."""

OWNERS = (
    "nothing", "header", "refcount table", "refcount block", "L1 table", "snapshot table", "L2 table",
    "bitmap directory", "bitmap table", "bits of a bitmap", "encryption header",
)  # fmt: skip
"""What owns a cluster of metadata; the first stands for a cluster that no metadata owns."""


class Claims:
    """The references to each cluster of one image file, and which structure owns it."""

    def __init__(
        self, read: Read, area: HeaderArea, file_bytes: int, reserved: Sequence[tuple[int, int]]
    ) -> None:
        self.read = read
        self.area = area
        self.header = header = area.header
        self.geometry = header.geometry
        self.cluster_bits = header.cluster_bits
        self.cluster_bytes = 1 << header.cluster_bits
        # As in QEMU, the last cluster may be cut short by the end of the file.
        self.cluster_count = self.geometry.clusters(file_bytes)
        if self.cluster_count > MAX_CLUSTERS:
            raise UnsupportedFeatureError(f"an image file of {self.cluster_count} clusters")
        self.file_bytes = file_bytes
        self.reserved = [
            (offset >> self.cluster_bits, self.geometry.clusters(offset + length))
            for offset, length in reserved
        ]
        self.count_code: Code = "Q" if header.refcount_order > 5 else "I"
        self.refcount_max = (1 << (1 << header.refcount_order)) - 1
        self.references = zeroed(self.count_code, self.cluster_count)
        self.owners = zeroed("B", self.cluster_count)
        self.findings = Findings()
        self.refcounts_are_used_twice = False

    def hull_of_reserved(self) -> tuple[int, int]:
        """Return [first, end) of clusters that has all reserved ranges in it."""
        ends = [end for _, end in self.reserved]
        return (min(first for first, _ in self.reserved), max(ends)) if ends else (0, 0)

    def claim(self, owner: str, offset: int, length: int, source: str, source_offset: int) -> bool:
        """Count a reference to each cluster of a metadata structure, and note their owner.

        ``source`` at ``source_offset`` is what points to it. Returns False, having counted nothing, if
        the structure reaches past the end of the file.
        """
        if not length:
            return True
        first = offset >> self.cluster_bits
        end = self.geometry.clusters(offset + length)
        if end > self.cluster_count:
            self.findings.add(Kind.PAST_END, source, source_offset, f"{owner} at {offset:#x}")
            return False
        for cluster in range(first, end):
            self.claim_cluster(owner, cluster, source, source_offset, 1)
        return True

    def claim_cluster(self, owner: str, cluster: int, source: str, source_offset: int, count: int) -> None:
        """Count references of metadata to a cluster inside the file, which nothing else may use."""
        other = self.owners[cluster] or OWNERS.index(owner)
        self.owners[cluster] = other
        if self.references[cluster]:
            self.report_overlap(owner, cluster << self.cluster_bits, "the cluster is also", other, 1)
        self.refer(cluster, source, source_offset, count)

    def refer(self, cluster: int, source: str, source_offset: int, count: int) -> None:
        """Count references to a cluster inside the file, up to what a refcount can say."""
        total = self.references[cluster] + count
        if total > self.refcount_max:
            # As in QEMU, each further reference is an error of its own.
            detail = (
                f"{cluster << self.cluster_bits:#x} has {total} references, at most {self.refcount_max} count"
            )
            excess = total - self.refcount_max
            self.findings.add(Kind.TOO_MANY_REFERENCES, source, source_offset, detail, excess)
            total = self.refcount_max
        self.references[cluster] = total
        for first, end in self.reserved:
            if first <= cluster < end:
                detail = f"it points to {cluster << self.cluster_bits:#x}"
                self.findings.add(Kind.RESERVED_RANGE, source, source_offset, detail, count)

    def report_overlap(self, structure: str, place: int, what: str, owner: int, count: int) -> None:
        """Report a second use of a cluster that an owner has."""
        used_as = OWNERS[owner]
        self.refcounts_are_used_twice |= "refcount" in f"{structure} {used_as}"
        self.findings.add(Kind.OVERLAP, structure, place, f"{what} in use as {used_as}", count)
