"""What tells by itself where it belongs: each placement of evidence, weighed against the others.

AN1. A host cluster for which evidence names two places is certain in neither.
AN2. A guest cluster for which two host clusters are named, with other bytes, is certain in neither: one of
    them is old, and evidence does not know which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from jqcow.ondisk.protection import reversed_crc
from jqcow.salvage.evidence import Certainty, GuestStructure, Orphans, PlacedDisk, Placement
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.protection import Protection
from jqcow.salvage.sums import SumIndex
from jqcow.salvage.unit_runs import UnitRuns

MAX_ROUNDS = 8
"""So often evidence is asked anew; each round costs a pass over the orphans."""

Find = Callable[[PlacedDisk, Orphans], Iterable[GuestStructure]]
"""Finds the structures of a guest, as `jqcow.salvage.guest.find` does."""


@dataclass(frozen=True)
class _Claim:
    """Where evidence says that a host cluster belongs, and how surely."""

    guest: int
    certainty: Certainty
    witness: str


class Anchors:
    """Takes placements, whatever part of a cluster they are about, and places whole clusters by them.

    Attributes:
        placed: the guest offset of each host cluster that was placed, by its host offset.
    """

    def __init__(self, guest_map: GuestMap, orphans: Orphans) -> None:
        """Place ``orphans`` in ``guest_map``."""
        self._map, self._orphans = guest_map, orphans
        self._claims: dict[int, dict[int, _Claim]] = defaultdict(dict)
        self.placed: dict[int, int] = {}

    def add(self, placement: Placement) -> bool:
        """Take a placement; return False if it says nothing new, or what cannot be."""
        cluster_bytes = self._orphans.cluster_bytes
        within = placement.host_offset % cluster_bytes
        guest = placement.guest_offset - within
        if guest < 0 or guest % cluster_bytes or not self._map.is_open(guest):
            return False
        claims = self._claims[placement.host_offset - within]
        known = claims.get(guest)
        if known is not None and known.certainty >= placement.certainty:
            return False
        claims[guest] = _Claim(guest, placement.certainty, placement.witness)
        return True

    def settle(self) -> int:
        """Place what the claims agree on; return how many clusters are new, or surer than before."""
        wanted: dict[int, list[tuple[int, _Claim]]] = defaultdict(list)
        for host, claims in self._claims.items():
            best = max(claims.values(), key=lambda claim: claim.certainty)
            rivals = [claim for claim in claims.values() if claim.certainty == best.certainty]
            if len(rivals) > 1:
                best = replace(best, certainty=min(best.certainty, Certainty.GUESS))
            wanted[best.guest].append((host, best))
        count = 0
        for guest, hosts in wanted.items():
            host, claim = self._newest(hosts)
            placement = Placement(guest, host, self._orphans.cluster_bytes, claim.certainty, claim.witness)
            if self._map.place(placement):
                self.placed[host] = guest
                count += 1
        return count

    def _newest(self, hosts: list[tuple[int, _Claim]]) -> tuple[int, _Claim]:
        """Return which of several host clusters a guest cluster is given; the last one in the file.

        Files grow: what was written later lies further out, more often than not.
        """
        surest = max(claim.certainty for _, claim in hosts)
        rivals = sorted((host, claim) for host, claim in hosts if claim.certainty == surest)
        host, claim = rivals[-1]
        if len({self._orphans.read(rival) for rival, _ in rivals[-3:]}) > 1:
            claim = replace(claim, certainty=min(surest, Certainty.LIKELY))
        return host, claim


def anchor(
    guest_map: GuestMap,
    disk: PlacedDisk,
    orphans: Orphans,
    find: Find,
    protection: Protection | None = None,
) -> tuple[Anchors, list[GuestStructure]]:
    """Place what tells by itself where it belongs, by structures of the guest and by their checksums.

    Returns:
        What was placed, and the structures that were found.
    """
    anchors = Anchors(guest_map, orphans)
    if protection is not None:
        for placement in by_protection(protection, guest_map, orphans):
            anchors.add(placement)
        anchors.settle()
    structures: list[GuestStructure] = []
    for _ in range(MAX_ROUNDS):
        structures = list(find(disk, orphans))
        for structure in structures:
            for placement in structure.place(disk, orphans):
                anchors.add(placement)
        for placement in by_sums(structures, guest_map, disk, orphans):
            anchors.add(placement)
        if not anchors.settle():
            break
    return anchors, structures


def by_sums(
    structures: Iterable[GuestStructure], guest_map: GuestMap, disk: PlacedDisk, orphans: Orphans
) -> Iterator[Placement]:
    """Yield where the orphans belong whose blocks have checksums that a guest keeps."""
    index = SumIndex(guest_map, orphans.cluster_bytes)
    for structure in structures:
        for block_sum in structure.sums(disk):
            index.add(block_sum)
    yield from index.placements(orphans)


def by_protection(protection: Protection, guest_map: GuestMap, orphans: Orphans) -> Iterator[Placement]:
    """Yield where the orphans belong of which `jqcow protect` kept the sums."""
    witness, unit_bytes = "sums of jqcow protect", protection.units.unit_bytes
    index: SumIndex | UnitRuns
    if unit_bytes > orphans.cluster_bytes:
        index = UnitRuns(guest_map, orphans.cluster_bytes, unit_bytes, witness, protection.certainty)
    else:
        index = SumIndex(guest_map, orphans.cluster_bytes, witness, protection.certainty, reversed_crc)
    for block_sum in protection.sums():
        index.add(block_sum)
    yield from index.placements(orphans)
