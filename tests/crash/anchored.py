"""Evidence that contradicts itself: what salvage makes of clusters that say where they belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from jqcow.offline.salvaging.patient import patient_on
from jqcow.salvage.anchoring import Anchors
from jqcow.salvage.evidence import Certainty, FilePiece, Placement
from jqcow.salvage.expecting import Expectations
from jqcow.salvage.filling import Filling
from jqcow.salvage.ranges import Ranges
from jqcow.salvage.reading import MappedDisk
from tests.crash.certain import CLUSTER_BYTES, Failing, made
from tests.crash.judge import require
from tests.support.lost_disk import LostDisk
from tests.support.patients import Tables

SURE = Certainty.CERTAIN


class Clusters:
    """Orphans, each with its number in all bytes."""

    cluster_bytes = CLUSTER_BYTES

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return ((number * CLUSTER_BYTES, self.read(number * CLUSTER_BYTES)) for number in range(self._count))

    def read(self, host_offset: int) -> bytes:
        return bytes([host_offset // CLUSTER_BYTES]) * CLUSTER_BYTES


def anchored(*placements: Placement) -> tuple[LostDisk, Ranges]:
    """Return what becomes of placements, and the parts that are certain alone."""
    disk, parts = LostDisk(1 << 20), Ranges()
    anchors = Anchors(disk, Clusters(4), parts)  # type: ignore[arg-type]
    for each in placements:
        anchors.add(each)
    anchors.settle()
    return disk, parts


def placement(cluster: int, host_cluster: int, length: int = CLUSTER_BYTES) -> Placement:
    return Placement(cluster * CLUSTER_BYTES, host_cluster * CLUSTER_BYTES, length, SURE, "a checksum")


def require_doubt(disk: LostDisk, what: str) -> None:
    sure = [one for one in disk.placed.values() if one.certainty == SURE]
    require(disk.placed, f"{what}: something is placed")
    require(not sure, what, sure)


def a_cluster_for_two_places() -> None:
    """AN1: a cluster that says that it belongs in two places is certain in neither."""
    disk, _ = anchored(placement(1, 0), placement(2, 0))
    require_doubt(disk, "AN1: a cluster is certain in one place alone")


def two_clusters_for_a_place() -> None:
    """AN2: of two clusters of one place one is old, and nobody knows which."""
    disk, _ = anchored(placement(1, 0), placement(1, 2))
    require_doubt(disk, "AN2: of rivals with other bytes none is certain")


def a_part_of_a_cluster() -> None:
    """AN3: the rest of a cluster may be older than the part that tells its place."""
    disk, parts = anchored(placement(1, 0, 512))
    require_doubt(disk, "AN3: what tells the place of a part is certain of that alone")
    require(parts.has(CLUSTER_BYTES, 512), "AN3: the part is certain")


class OneFile:
    """A file system with one file, that has so many clusters."""

    def __init__(self, clusters: int) -> None:
        length = clusters * CLUSTER_BYTES
        self._piece = FilePiece(0, length, length - 100, (1, 1, 0))

    def pieces(self, _: object) -> Iterator[FilePiece]:
        yield self._piece

    def deleted(self, _: object) -> Iterator[FilePiece]:
        return iter(())

    def free(self, _: object) -> Iterator[tuple[int, int]]:
        return iter(())


def a_file_that_is_expected() -> None:
    """FI1: what looks as its file system expects it may be another's."""
    disk, drawn = LostDisk(1 << 20), Random(1)
    expectations = Expectations(CLUSTER_BYTES)
    expectations.take([OneFile(4)], disk)  # type: ignore[list-item, arg-type]
    contents = [drawn.randbytes(CLUSTER_BYTES) for _ in range(3)]
    contents.append(drawn.randbytes(CLUSTER_BYTES - 100).ljust(CLUSTER_BYTES, b"\0"))
    found = [(number * CLUSTER_BYTES, content) for number, content in enumerate(contents, 7)]
    Filling(disk, CLUSTER_BYTES, found, expectations, []).fill()  # type: ignore[arg-type]
    require_doubt(disk, "FI1: what paths place is no more than likely")


def what_nobody_placed() -> None:
    """EV2: evidence is not given zeros for what is lost."""
    content, _ = made()
    tables = Tables(content)
    tables.image[tables.l2 : tables.l2 + CLUSTER_BYTES] = b"\xff" * CLUSTER_BYTES
    found = patient_on(Failing(bytes(tables.image)), "", (0, 0)).survey()
    seen = MappedDisk(found.guest_map, found.reader()).read(0, CLUSTER_BYTES)
    require(seen is None, "EV2: what nobody placed is None")


ANCHORED_SCENARIOS: tuple[Callable[[], None], ...] = (
    a_cluster_for_two_places,
    two_clusters_for_a_place,
    a_part_of_a_cluster,
    a_file_that_is_expected,
    what_nobody_placed,
)
