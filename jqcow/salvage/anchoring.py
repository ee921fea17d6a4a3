"""What tells by itself where it belongs: each placement of evidence, weighed against the others.

AN1. A host cluster for which evidence names two places is certain in neither.
AN2. A guest cluster for which two host clusters are named, with other bytes, is certain in neither: one of
    them is old, and evidence does not know which.
AN3. What tells the place of a part of a cluster is certain of that part alone, unless no orphan is an old
    copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter

from jqcow.ondisk.protection import reversed_crc
from jqcow.salvage.evidence import Certainty, GuestStructure, Orphans, PlacedDisk, Placement
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.protection import Protection
from jqcow.salvage.ranges import Ranges
from jqcow.salvage.reading import MappedDisk
from jqcow.salvage.sums import SumIndex
from jqcow.salvage.unit_runs import UnitRuns

MAX_ROUNDS = 8
"""So often evidence is asked anew; each round costs a pass over the orphans."""
MAX_TRUSTING_ROUNDS = 3
"""So often it is asked for what is likely by what is likely."""

Find = Callable[[PlacedDisk, Orphans], Iterable[GuestStructure]]
"""Finds the structures of a guest, as `jqcow.salvage.guest.find` does."""


@dataclass
class _Claim:
    """Where evidence says that a host cluster belongs, and how surely.

    Attributes:
        guest: offset on the disk.
        certainty: of the whole cluster.
        witness: who says so.
        parts: (offset in the cluster, length) of what is certain though the whole is not.
    """

    guest: int
    certainty: Certainty
    witness: str
    parts: list[tuple[int, int]] = field(default_factory=list)


class Anchors:
    """Takes placements, whatever part of a cluster they are about, and places whole clusters by them.

    Attributes:
        placed: the guest offset of each host cluster that was placed, by its host offset.
    """

    def __init__(
        self,
        guest_map: GuestMap,
        orphans: Orphans,
        parts: Ranges | None = None,
        *,
        are_current: bool = False,
    ) -> None:
        """Place ``orphans`` in ``guest_map``.

        Args:
            guest_map: of the disk.
            orphans: what is to be placed.
            parts: takes the guest ranges that are certain where their cluster is not.
            are_current: none of the orphans is an old copy (AN3).
        """
        self._map, self._orphans, self._are_current = guest_map, orphans, are_current
        self._parts = Ranges() if parts is None else parts
        self._claims: dict[int, dict[int, _Claim]] = defaultdict(dict)
        self.placed: dict[int, int] = {}

    def add(self, placement: Placement, most: Certainty = Certainty.CERTAIN) -> bool:
        """Take a placement; return False if it says nothing new, or what cannot be.

        Args:
            placement: of a cluster, or a part of it.
            most: nothing by it is surer.
        """
        cluster_bytes = self._orphans.cluster_bytes
        within = placement.host_offset % cluster_bytes
        guest = placement.guest_offset - within
        if guest < 0 or guest % cluster_bytes or not self._map.is_open(guest):
            return False
        sure = min(placement.certainty, most)
        length = min(placement.length, cluster_bytes - within)
        is_part = length < min(cluster_bytes, self._map.size - guest)
        part = (within, length)
        whole = min(sure, Certainty.LIKELY) if is_part and not self._are_current else sure
        claims = self._claims[placement.host_offset - within]
        known = claims.get(guest)
        is_new = known is None or known.certainty < whole
        if known is None:
            known = claims[guest] = _Claim(guest, whole, placement.witness)
        elif known.certainty < whole:
            known.certainty, known.witness = whole, placement.witness
        if sure > whole and part not in known.parts:
            known.parts.append(part)
            is_new = True
        return is_new

    def settle(self) -> int:
        """Place what the claims agree on; return how many clusters are new, or surer than before."""
        wanted: dict[int, list[tuple[int, _Claim]]] = defaultdict(list)
        for host, claims in self._claims.items():
            best = max(claims.values(), key=lambda claim: claim.certainty)
            rivals = [claim for claim in claims.values() if claim.certainty == best.certainty]
            if len(rivals) > 1:
                best = _Claim(best.guest, min(best.certainty, Certainty.GUESS), best.witness)
            wanted[best.guest].append((host, best))
        count = 0
        for guest, hosts in wanted.items():
            host, claim = self._newest(hosts)
            placement = Placement(guest, host, self._orphans.cluster_bytes, claim.certainty, claim.witness)
            if self._map.place(placement):
                self.placed[host] = guest
                count += 1
            if self.placed.get(host) == guest:
                count += self._settle_parts(guest, claim)
        return count

    def _settle_parts(self, guest: int, claim: _Claim) -> bool:
        """Take over the parts of a cluster that are certain; return whether one is new."""
        is_new = False
        for within, length in claim.parts:
            if not self._parts.has(guest + within, length):
                self._parts.add(guest + within, length)
                is_new = True
        return is_new

    def _newest(self, hosts: list[tuple[int, _Claim]]) -> tuple[int, _Claim]:
        """Return which of several host clusters a guest cluster is given; the last one in the file.

        Files grow: what was written later lies further out, more often than not.
        """
        surest = max(claim.certainty for _, claim in hosts)
        rivals = sorted((pair for pair in hosts if pair[1].certainty == surest), key=itemgetter(0))
        host, claim = rivals[-1]
        if len({self._orphans.read(rival) for rival, _ in rivals[-3:]}) > 1:
            claim = _Claim(claim.guest, min(surest, Certainty.LIKELY), claim.witness)
        return host, claim


def anchor(
    guest_map: GuestMap,
    disk: MappedDisk,
    orphans: Orphans,
    find: Find,
    protection: Protection | None = None,
    *,
    are_current: bool = False,
) -> tuple[Anchors, list[GuestStructure]]:
    """Place what tells by itself where it belongs, by structures of the guest and by their checksums.

    Once nothing new is certain, what is likely is believed, too, and tells more that is likely.

    Args:
        guest_map: of the disk.
        disk: as far as it is placed.
        orphans: what is to be placed.
        find: finds the structures of the guest.
        protection: the sums that `jqcow protect` made, where there are any.
        are_current: none of the orphans is an old copy (AN3).

    Returns:
        What was placed, and the structures that were found.
    """
    anchors = Anchors(guest_map, orphans, disk.parts, are_current=are_current)
    if protection is not None:
        for placement in by_protection(protection, guest_map, disk, orphans):
            anchors.add(placement)
        anchors.settle()
    structures: list[GuestStructure] = []
    for most, rounds in ((Certainty.CERTAIN, MAX_ROUNDS), (Certainty.LIKELY, MAX_TRUSTING_ROUNDS)):
        seen = disk.trusting(most)
        for _ in range(rounds):
            structures = list(find(seen, orphans))
            for structure in structures:
                for placement in structure.place(seen, orphans):
                    anchors.add(placement, most)
            for placement in by_sums(structures, guest_map, seen, orphans):
                anchors.add(placement, most)
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


def by_protection(
    protection: Protection, guest_map: GuestMap, disk: MappedDisk, orphans: Orphans
) -> Iterator[Placement]:
    """Yield where the orphans belong of which `jqcow protect` kept the sums."""
    witness, unit_bytes = "sums of jqcow protect", protection.units.unit_bytes
    index: SumIndex | UnitRuns
    if unit_bytes > orphans.cluster_bytes:
        index = UnitRuns(guest_map, disk, orphans.cluster_bytes, unit_bytes, witness, protection.certainty)
    else:
        index = SumIndex(guest_map, orphans.cluster_bytes, witness, protection.certainty, reversed_crc)
    likely = disk.trusting(Certainty.LIKELY)
    for block_sum in protection.sums():
        start, end = block_sum.guest_offset, min(block_sum.guest_offset + unit_bytes, disk.size)
        if any(guest_map.is_open(offset) for offset in range(start, end, orphans.cluster_bytes)):
            # What a table says and the sum confirms is looked for nowhere else.
            content = likely.read(start, end - start)
            if content is None or block_sum.crc32c != reversed_crc(content.ljust(unit_bytes, b"\0")):
                index.add(block_sum)
    yield from index.placements(orphans)
