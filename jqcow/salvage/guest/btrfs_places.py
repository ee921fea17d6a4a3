"""Which orphans belong where, by the nodes of btrfs that they hold.

BT1. A place is certain where a node says so that the trees lead to now, and where the orphan has all such
    nodes that are to be there. A node that the trees do not lead to any more says where it lay by the chunks
    of its time: its place is likely, also because the guest may have discarded it since. It is likelier if it
    is not older than a live node of the same chunk: that was never moved, so the chunk was there since then.
    Where the file has older copies of clusters, as with snapshots, the orphan must hold nothing but live
    nodes: the rest of it may be older than what was lost.
BT2. Nodes in one orphan that are both live and contradict each other make nothing certain.
BT3. Several orphans for one place are certain where their content is the same, or where one has newer nodes
    than all others: what was copied on write has all that the older copy has, and more.
BT4. Where nodes are kept twice, two orphans may have the same nodes and differ in the rest. Then it is not
    known which is which, but a live node is right in either place; so it is in an orphan that lacks others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from jqcow.salvage.evidence import Certainty, PlacedDisk, Placement, Volume
from jqcow.salvage.guest.btrfs_layout import Superblock
from jqcow.salvage.guest.btrfs_nodes import FoundNode, FoundNodes
from jqcow.salvage.guest.btrfs_trees import LiveNodes

STALE, KNOWN, LIVE = 1, 2, 3
"""What a node says: where it once was; where it was, in a chunk that is still there; where it is."""

WITNESS = "btrfs tree node"
PROBE_BYTES = 512


@dataclass
class Claim:
    """Where one orphan belongs, as its nodes say.

    Attributes:
        rank: of the surest of its nodes.
        places: guest offsets that all nodes of this rank agree on: two, where nodes are kept twice.
        generation: of the newest node that is at least KNOWN.
        live_count: how many of its nodes are LIVE.
        live_bytes: how much of it they are.
    """

    rank: int
    places: tuple[int, ...]
    generation: int
    live_count: int = 0
    live_bytes: int = 0

    @property
    def age(self) -> tuple[int, int]:
        """What sorts orphans that claim one place: the newest is the highest."""
        return self.rank, self.generation

    def add(self, rank: int, places: tuple[int, ...], generation: int, length: int) -> None:
        """Take what another node says."""
        if rank > self.rank:
            self.rank, self.places = rank, places
        elif rank == self.rank:
            self.places = tuple(place for place in self.places if place in places)
        if rank >= KNOWN:
            self.generation = max(self.generation, generation)
        if rank == LIVE:
            self.live_count += 1
            self.live_bytes += length


def claims(
    found: FoundNodes, live: LiveNodes, superblock: Superblock, volume_offset: int, cluster_bytes: int
) -> dict[int, Claim]:
    """Return what the nodes say of each orphan that holds any."""
    since = _since(live)
    result: dict[int, Claim] = {}
    for bytenr, nodes in found.by_address.items():
        chunk = live.chunks.find(bytenr, superblock.node_bytes)
        if chunk is None:
            continue
        physical = live.chunks.places(bytenr, superblock.node_bytes)
        for node in nodes:
            rank = _rank(node, live.generations.get(bytenr), since.get(chunk.logical))
            if not live.sure_chunks:
                rank = STALE
            starts = [volume_offset + place - node.start for place in physical]
            firsts = tuple(start for start in starts if start >= 0 and start % cluster_bytes == 0)
            if not firsts:
                continue
            for index, host in enumerate(node.clusters):
                places = tuple(first + index * cluster_bytes for first in firsts)
                generation = node.generation if rank >= KNOWN else 0
                begin = node.start - index * cluster_bytes
                length = min(begin + superblock.node_bytes, cluster_bytes) - max(begin, 0)
                result.setdefault(host, Claim(0, (), 0)).add(rank, places, generation, length)
    return result


def _since(live: LiveNodes) -> dict[int, int]:
    """Return of which generation the oldest live node of each chunk is."""
    since: dict[int, int] = {}
    for bytenr, generation in live.generations.items():
        chunk = live.chunks.find(bytenr)
        if chunk is not None:
            since[chunk.logical] = min(generation, since.get(chunk.logical, generation))
    return since


def _rank(node: FoundNode, live_generation: int | None, since: int | None) -> int:
    if node.generation == live_generation:
        return LIVE
    return KNOWN if since is not None and node.generation >= since else STALE


def settle(
    found: FoundNodes,
    live: LiveNodes,
    superblock: Superblock,
    volume: Volume,
    disk: PlacedDisk,
    cluster_bytes: int,
    is_layered: bool,
) -> Iterator[Placement]:
    """Yield who gets which place.

    Args:
        found: the nodes among the orphans.
        live: those that the trees lead to.
        superblock: of the file system.
        volume: that the file system is in; nothing is surer than that.
        disk: where places may be taken already.
        cluster_bytes: of host and guest.
        is_layered: older copies of guest clusters are known to be among the orphans.
    """
    claimed = claims(found, live, superblock, volume.offset, cluster_bytes)
    limit = volume.certainty
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for host in sorted(claimed):
        places = claimed[host].places
        if places:
            groups[places].append(host)
    is_layered = is_layered or any(_has_older(groups[places], places, claimed, found) for places in groups)
    expected = _live_counts(live, superblock, volume.offset, cluster_bytes)
    taken: set[int] = set()
    unsure: dict[int, int] = {}
    for places in sorted(groups, key=len):
        free = [place for place in places if place not in taken and _is_open(disk, place)]
        hosts = _homeless(groups[places], places, claimed, disk, found, cluster_bytes) if free else []
        if not hosts:
            continue
        for place, host, agreed in _share_out(hosts, free, claimed, found, cluster_bytes):
            claim = claimed[host]
            complete = claim.rank == LIVE and claim.live_count >= expected.get(place, 0)
            if is_layered:
                complete = complete and claim.live_bytes >= cluster_bytes
            certainty = agreed if complete else min(agreed, Certainty.LIKELY)
            taken.add(place)
            yield Placement(place, host, cluster_bytes, min(certainty, limit), WITNESS)
            if certainty < Certainty.CERTAIN and claim.rank == LIVE:
                unsure[host] = place
    node_bytes = superblock.node_bytes
    for place, host in _nodes_alone(unsure, found, live, node_bytes):
        yield Placement(place, host, node_bytes, limit, WITNESS)


def _has_older(
    hosts: list[int], places: tuple[int, ...], claimed: dict[int, Claim], found: FoundNodes
) -> bool:
    """Return True if more orphans than there are places claim them, and differ."""
    known = [host for host in hosts if claimed[host].rank >= KNOWN]
    return len(known) > len(places) and len({found.digests[host] for host in known}) > 1


def _live_counts(
    live: LiveNodes, superblock: Superblock, volume_offset: int, cluster_bytes: int
) -> dict[int, int]:
    """Return how many live nodes each guest cluster has a part of."""
    counts: dict[int, int] = defaultdict(int)
    for bytenr in live.generations:
        for place in live.chunks.places(bytenr, superblock.node_bytes):
            first = volume_offset + place
            first -= first % cluster_bytes
            for cluster in range(first, volume_offset + place + superblock.node_bytes, cluster_bytes):
                counts[cluster] += 1
    return counts


def _is_open(disk: PlacedDisk, place: int) -> bool:
    return disk.read(place, PROBE_BYTES) is None


def _homeless(
    hosts: list[int],
    places: tuple[int, ...],
    claimed: dict[int, Claim],
    disk: PlacedDisk,
    found: FoundNodes,
    cluster_bytes: int,
) -> list[int]:
    """Return the orphans of a group but for those that are placed in one of its places already."""
    left = list(hosts)
    for place in places:
        content = disk.read(place, cluster_bytes)
        if content is not None:
            there = [host for host in left if found.digests[host] == hash(content)]
            if there:
                left.remove(max(there, key=lambda host: claimed[host].age))
    return left


def _share_out(
    hosts: list[int], free: list[int], claimed: dict[int, Claim], found: FoundNodes, cluster_bytes: int
) -> Iterator[tuple[int, int, Certainty]]:
    """Yield (place, host offset, certainty) for orphans that all claim the same places (BT3)."""
    best = max(claimed[host].age for host in hosts)
    equal = [host for host in hosts if claimed[host].age == best]
    first = equal[0]
    if any(found.digests[host] != found.digests[first] for host in equal):
        for place, host in zip(free, equal[-len(free) :], strict=False):
            yield place, host, Certainty.LIKELY
        return
    same = [host for host in hosts if found.digests[host] == found.digests[first]]
    same.sort(key=lambda host: claimed[host].age, reverse=True)
    whole = found.covered_bytes[first] >= cluster_bytes
    sure = len(same) >= len(free) or whole
    for place, host in zip(free, same, strict=False):
        yield place, host, Certainty.CERTAIN if sure else Certainty.LIKELY


def _nodes_alone(
    unsure: dict[int, int], found: FoundNodes, live: LiveNodes, node_bytes: int
) -> Iterator[tuple[int, int]]:
    """Yield (guest offset, host offset) of live nodes in orphans that are unsure (BT4)."""
    for bytenr, generation in live.generations.items() if unsure else ():
        for node in found.by_address.get(bytenr, ()):
            place = unsure.get(node.clusters[0])
            if place is not None and node.generation == generation and len(node.clusters) == 1:
                yield place + node.start, node.clusters[0] + node.start
