"""Orphans that do not tell where they belong: placed by what is expected of them, and by order.

Files are written in runs, and clusters are allocated as they are written: so neighbours in a run are
neighbours in the file. A *seed* is an orphan that meets what is expected of a guest cluster, mostly by the
length of a file's last block; from there, and from what is placed already, runs are extended both ways for as
long as what they meet is expected.

FI1. No run places what something surer has placed, and none is more than LIKELY.
FI2. The best runs come first: what they place no other run gets.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

from jqcow.salvage.evidence import Certainty, Orphans, Placement
from jqcow.salvage.expecting import IMPOSSIBLE, Expectations, Expected, Fingerprint, Odds, fingerprint
from jqcow.salvage.guestmap import GuestMap

SEEDS_PER_CLUSTER = 8
"""An expectation that more orphans meet says nothing."""
TELLING = 2.0
"""Runs end, as long as there are better ones, with a cluster that tells so much by itself."""
DROP = 6.0
"""A run ends where its score falls by so much from its best."""
LIKELY_SCORE = 8.0
"""A run of a lower score is a guess."""
NEAR, APART = 0.02, 0.3
"""What it tells that neighbours are as far from each other on the disk as in the file, or are not."""
ALIKE, UNLIKE = 0.3, 2.0
"""What it tells that two clusters of a file have the same kind of bytes, or have not."""
SKIPPED_MAX = 64
"""So many orphans that other runs have taken may lie within a run."""
RUN_MAX = 4096
"""So many clusters a run is extended at most to each side; the next seed goes on from there."""


Reach = Literal["telling", "file", "any"]
"""How far runs go: between clusters that tell, within a file, or as far as nothing speaks against them."""


@dataclass(frozen=True)
class _Run:
    """Guest clusters and the orphans that they are given."""

    pairs: tuple[tuple[int, int], ...]
    total: float


class Filling:
    """Places orphans of one disk by expectations."""

    def __init__(
        self,
        guest_map: GuestMap,
        orphans: Orphans,
        zeros: Iterable[int],
        expectations: Expectations,
        anchored: dict[int, int],
    ) -> None:
        """Begin with all orphans, of which ``anchored`` ones are placed: guest offset by host offset.

        ``zeros``: host offsets of clusters of zeros that nothing names. They take places in the runs.
        """
        self._map, self._cluster_bytes = guest_map, orphans.cluster_bytes
        self._block_bytes = expectations.block_bytes
        self._hosts: list[int] = []
        self._looks: list[Fingerprint] = []
        for host, content in orphans:
            if host not in anchored:
                self._hosts.append(host)
                self._looks.append(fingerprint(content, self._block_bytes))
        self._add_zeros(zeros)
        self._odds = Odds(self._looks, self._block_bytes)
        self._orders: list[list[Expected]] = [expectations.by_writing(), expectations.by_place()]
        self._positions = [
            {expected.guest: position for position, expected in enumerate(order)} for order in self._orders
        ]
        self._anchored = anchored
        self._taken_hosts = bytearray(len(self._hosts))
        self._taken_guests: dict[int, int] = {}
        self._reach: Reach = "telling"

    def fill(self) -> None:
        """Place what runs place, then what is left over."""
        self._take_best(list(self._seeds()))
        self._close_gaps()
        self._reach = "file"
        self._take_best(list(self._ends()))
        self._close_gaps()
        self._reach = "any"
        self._take_best(list(self._ends()))
        self._close_gaps()
        self._take_rest()

    def _add_zeros(self, zeros: Iterable[int]) -> None:
        """Put clusters of zeros between the orphans, in the order of the file."""
        look = fingerprint(bytes(self._cluster_bytes), self._block_bytes)
        found = heapq.merge(
            zip(self._hosts, self._looks, strict=True), ((host, look) for host in zeros), key=itemgetter(0)
        )
        pairs = list(found)
        self._hosts, self._looks = [host for host, _ in pairs], [look for _, look in pairs]

    # Runs

    def _seeds(self) -> Iterator[tuple[int, int]]:
        """Yield (guest offset, index of an orphan) of pairs to extend from."""
        by_tail: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, look in enumerate(self._looks):
            for block, length in enumerate(look.lengths):
                if 0 < length < self._block_bytes:
                    by_tail[block, length].append(index)
        for expected in self._orders[0]:
            for block, valid in expected.tails.items():
                found = by_tail.get((block, valid), ())
                if len(found) <= SEEDS_PER_CLUSTER:
                    yield from ((expected.guest, index) for index in found)
        yield from self._beside_anchors()

    def _beside_anchors(self) -> Iterator[tuple[int, int]]:
        """Yield what follows, in the file and on the disk, what is placed already."""
        for host, guest in self._anchored.items():
            index = bisect_left(self._hosts, host)
            for step, beside in ((1, index), (-1, index - 1)):
                neighbour = guest + step * self._cluster_bytes
                is_beside = 0 <= beside < len(self._hosts) and (
                    self._hosts[beside] == host + step * self._cluster_bytes
                )
                if neighbour in self._positions[1] and is_beside:
                    yield neighbour, beside

    def _take_best(self, seeds: list[tuple[int, int]]) -> None:
        """Extend all seeds, and take the runs from the best on; one that lost a part is extended anew."""
        queue: list[tuple[float, int, int]] = []
        for guest, index in dict.fromkeys(seeds):
            run = self._best_run(guest, index)
            if run is not None:
                heapq.heappush(queue, (-run.total, guest, index))
        while queue:
            total, guest, index = heapq.heappop(queue)
            run = self._best_run(guest, index)
            if run is None:
                continue
            if run.total < -total - 0.001:
                heapq.heappush(queue, (-run.total, guest, index))
                continue
            self._take(run)

    def _best_run(self, guest: int, index: int) -> _Run | None:
        """Return the better run from a seed: in the order of writing, or in that of the disk."""
        expected = self._orders[1][self._positions[1][guest]]
        if self._taken_hosts[index] or guest in self._taken_guests:
            return None
        own = self._odds.score(expected, self._looks[index])
        if own == IMPOSSIBLE:
            return None
        best: _Run | None = None
        for order, positions in enumerate(self._positions):
            if guest not in positions:
                continue
            place = positions[guest]
            ahead, gained = self._extend(order, place, index, 1)
            behind, before = self._extend(order, place, index, -1)
            total = own + gained + before
            if best is None or total > best.total:
                best = _Run(((guest, index), *ahead, *behind), total)
        return best

    def _extend(self, order: int, place: int, index: int, step: int) -> tuple[list[tuple[int, int]], float]:
        """Return how a run can go on to one side, as pairs, and what it gains by them."""
        clusters = self._orders[order]
        pairs: list[tuple[int, int]] = []
        total, best_count, best = 0.0, 0, 0.0
        while len(pairs) < RUN_MAX and total > best - DROP:
            before = index
            place += step
            index = self._next_free(index, step)
            if index < 0 or not 0 <= place < len(clusters) or clusters[place].guest in self._taken_guests:
                break
            gain = self._odds.score(clusters[place], self._looks[index])
            is_one_file = self._is_one_file(clusters[place], clusters[place - step])
            if gain == IMPOSSIBLE or (self._reach == "file" and not is_one_file):
                break
            pairs.append((clusters[place].guest, index))
            total += gain + self._nearness(order, place, index, before, step, is_one_file=is_one_file)
            if total >= best and (gain >= TELLING or self._reach != "telling"):
                best_count, best = len(pairs), total
        return pairs[:best_count], best

    def _next_free(self, index: int, step: int) -> int:
        """Return the next orphan to one side that no run has taken, or -1."""
        for _ in range(SKIPPED_MAX):
            index += step
            if not 0 <= index < len(self._hosts):
                return -1
            if not self._taken_hosts[index]:
                return index
        return -1

    def _nearness(
        self, order: int, place: int, index: int, before: int, step: int, *, is_one_file: bool
    ) -> float:
        """Return what it tells if neighbours in a run are neighbours on the disk and in the file."""
        clusters = self._orders[order]
        guest_step = clusters[place].guest - clusters[place - step].guest
        total = NEAR if guest_step == self._hosts[index] - self._hosts[before] else -APART
        if is_one_file:
            textures = {self._looks[index].texture, self._looks[before].texture}
            if 0 not in textures:
                total += ALIKE if len(textures) == 1 else -UNLIKE
        return total

    def _is_one_file(self, one: Expected, other: Expected) -> bool:
        """Return True if a file goes on from one cluster to the other, and was the first to write to both."""
        if one.written is None or other.written is None or one.written[1] != other.written[1]:
            return False
        number = one.written[1]
        if number not in one.files or number not in other.files:
            return False
        return abs(one.files[number] - other.files[number]) == self._cluster_bytes

    def _take(self, run: _Run) -> None:
        certainty = Certainty.LIKELY if run.total >= LIKELY_SCORE else Certainty.GUESS
        for guest, index in run.pairs:
            self._put(guest, index, certainty, "what its file system expects there")

    def _put(self, guest: int, index: int, certainty: Certainty, witness: str) -> None:
        self._taken_hosts[index] = 1
        self._taken_guests[guest] = index
        self._map.place(Placement(guest, self._hosts[index], self._cluster_bytes, certainty, witness))

    # What is left

    def _ends(self) -> Iterator[tuple[int, int]]:
        """Yield pairs that lie beside what is placed, in one of the orders."""
        if self._reach == "any":
            yield from self._beside_anchors()
        for order, positions in zip(self._orders, self._positions, strict=True):
            taken = [pair for pair in self._taken_guests.items() if pair[0] in positions]
            for guest, index in taken:
                for step in (1, -1):
                    place, beside = positions[guest] + step, index + step
                    if not (0 <= place < len(order) and 0 <= beside < len(self._hosts)):
                        continue
                    if self._reach == "any" or self._is_one_file(order[place], order[positions[guest]]):
                        yield order[place].guest, beside

    def _close_gaps(self) -> None:
        """Fill between two clusters that follow each other in an order: what is left there of both sides."""
        for order in self._orders:
            previous: int | None = None
            for position, expected in enumerate(order):
                if expected.guest not in self._taken_guests:
                    continue
                if previous is not None and position - previous > 1:
                    self._close(order[previous : position + 1])
                previous = position

    def _close(self, clusters: list[Expected]) -> None:
        """Fill between the first and the last of guest clusters, if as many orphans are left there."""
        start, stop = self._taken_guests[clusters[0].guest], self._taken_guests[clusters[-1].guest]
        if stop - start > 2 * RUN_MAX:
            return
        gap = [index for index in range(start + 1, stop) if not self._taken_hosts[index]]
        between = clusters[1:-1]
        if len(gap) != len(between):
            return
        pairs = list(zip(between, gap, strict=True))
        if any(self._odds.score(expected, self._looks[index]) == IMPOSSIBLE for expected, index in pairs):
            return
        for expected, index in pairs:
            self._put(expected.guest, index, Certainty.LIKELY, "the order of writing")

    def _take_rest(self) -> None:
        """Give what is left in the order of the file to what is expected still, in the order of writing."""
        waiting = [expected for expected in self._orders[0] if expected.guest not in self._taken_guests]
        left = [index for index, taken in enumerate(self._taken_hosts) if not taken]
        position = 0
        for index in left:
            for ahead in range(position, min(position + 64, len(waiting))):
                if self._odds.score(waiting[ahead], self._looks[index]) != IMPOSSIBLE:
                    self._put(waiting[ahead].guest, index, Certainty.GUESS, "what was left over, in order")
                    position = ahead + 1
                    break
