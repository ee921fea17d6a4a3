"""Orphans that do not tell where they belong: placed by what is expected of them, and by order.

Files are written in runs, and clusters are allocated as they are written: so neighbours in a run are
neighbours in the file. A *seed* is an orphan that meets what is expected of a guest cluster, mostly by the
length of a file's last block; from there, and from what is placed already, runs are extended both ways for as
long as what they meet is expected.

F1. No run places what something surer has placed, and none is more than LIKELY.
F2. The best runs come first: what they place no other run gets.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from jqcow.salvage.evidence import Certainty, Orphans, Placement
from jqcow.salvage.expecting import IMPOSSIBLE, Expectations, Expected, fingerprint, score
from jqcow.salvage.guestmap import GuestMap

SEEDS_PER_CLUSTER = 8
"""An expectation that more orphans meet says nothing."""
DROP = 6.0
"""A run ends where its score falls by so much from its best."""
LIKELY_SCORE = 8.0
"""A run of a lower score is a guess."""
RUN_MAX = 4096
"""So many clusters a run is extended at most to each side; the next seed goes on from there."""


@dataclass(frozen=True)
class _Run:
    """Guest clusters in an order, and orphans beside them, from a seed on."""

    order: int
    first_guest: int
    first_host: int
    count: int
    total: float


class Filling:
    """Places orphans of one disk by expectations."""

    def __init__(
        self, guest_map: GuestMap, orphans: Orphans, expectations: Expectations, anchored: dict[int, int]
    ) -> None:
        """Begin with all orphans, of which ``anchored`` ones are placed: guest offset by host offset."""
        self._map, self._cluster_bytes = guest_map, orphans.cluster_bytes
        self._block_bytes = expectations.block_bytes
        self._hosts: list[int] = []
        self._lengths: list[tuple[int, ...]] = []
        for host, content in orphans:
            if host not in anchored:
                self._hosts.append(host)
                self._lengths.append(fingerprint(content, self._block_bytes))
        self._orders: list[list[Expected]] = [expectations.by_writing(), expectations.by_place()]
        self._positions = [
            {expected.guest: position for position, expected in enumerate(order)} for order in self._orders
        ]
        self._anchored = anchored
        self._taken_hosts = bytearray(len(self._hosts))
        self._taken_guests: dict[int, int] = {}

    def fill(self) -> None:
        """Place what runs place, then what is left over."""
        self._take_best(list(self._seeds()))
        self._join_gaps()
        self._take_rest()

    # Runs

    def _seeds(self) -> Iterator[tuple[int, int]]:
        """Yield (position in the order of writing, index of an orphan) of pairs to extend from."""
        by_tail: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, lengths in enumerate(self._lengths):
            for block, length in enumerate(lengths):
                if 0 < length < self._block_bytes:
                    by_tail[block, length].append(index)
        for position, expected in enumerate(self._orders[0]):
            for block, valid in expected.tails.items():
                found = by_tail.get((block, valid), ())
                if len(found) <= SEEDS_PER_CLUSTER:
                    yield from ((position, index) for index in found)
        yield from self._beside_anchors()

    def _beside_anchors(self) -> Iterator[tuple[int, int]]:
        """Yield what follows, in the file and on the disk, what is placed already."""
        for host, guest in self._anchored.items():
            index = bisect_left(self._hosts, host)
            for step, beside in ((1, index), (-1, index - 1)):
                position = self._positions[0].get(guest + step * self._cluster_bytes)
                is_beside = 0 <= beside < len(self._hosts) and (
                    self._hosts[beside] == host + step * self._cluster_bytes
                )
                if position is not None and is_beside:
                    yield position, beside

    def _take_best(self, seeds: list[tuple[int, int]]) -> None:
        """Extend all seeds, and take the runs from the best on; one that lost a part is extended anew."""
        queue: list[tuple[float, int, int]] = []
        for position, index in dict.fromkeys(seeds):
            run = self._best_run(position, index)
            if run is not None:
                heapq.heappush(queue, (-run.total, position, index))
        while queue:
            total, position, index = heapq.heappop(queue)
            run = self._best_run(position, index)
            if run is None:
                continue
            if run.total < -total - 0.001:
                heapq.heappush(queue, (-run.total, position, index))
                continue
            self._take(run)

    def _best_run(self, position: int, index: int) -> _Run | None:
        """Return the better run from a seed: in the order of writing, or in that of the disk."""
        expected = self._orders[0][position]
        if self._taken_hosts[index] or expected.guest in self._taken_guests:
            return None
        own = score(expected, self._lengths[index], self._block_bytes)
        if own == IMPOSSIBLE:
            return None
        best: _Run | None = None
        for order, positions in enumerate(self._positions):
            place = positions[expected.guest]
            ahead, gained = self._extend(order, place, index, 1)
            behind, before = self._extend(order, place, index, -1)
            run = _Run(order, place - behind, index - behind, behind + 1 + ahead, own + gained + before)
            if best is None or run.total > best.total:
                best = run
        return best

    def _extend(self, order: int, place: int, index: int, step: int) -> tuple[int, float]:
        """Return how many clusters a run can go on, to one side, and what it gains by them."""
        clusters = self._orders[order]
        count, total, best_count, best = 0, 0.0, 0, 0.0
        while count < RUN_MAX and total > best - DROP:
            place += step
            index += step
            if not (0 <= place < len(clusters) and 0 <= index < len(self._hosts)):
                break
            if self._taken_hosts[index] or clusters[place].guest in self._taken_guests:
                break
            gain = score(clusters[place], self._lengths[index], self._block_bytes)
            if gain == IMPOSSIBLE:
                break
            count += 1
            total += gain + self._nearness(order, place, index, step)
            if total >= best:
                best_count, best = count, total
        return best_count, best

    def _nearness(self, order: int, place: int, index: int, step: int) -> float:
        """Return what it tells if neighbours in a run are neighbours on the disk and in the file."""
        clusters = self._orders[order]
        guest_step = clusters[place].guest - clusters[place - step].guest
        host_step = self._hosts[index] - self._hosts[index - step]
        return 0.2 if guest_step == host_step else -0.2

    def _take(self, run: _Run) -> None:
        certainty = Certainty.LIKELY if run.total >= LIKELY_SCORE else Certainty.GUESS
        for step in range(run.count):
            expected = self._orders[run.order][run.first_guest + step]
            self._put(expected.guest, run.first_host + step, certainty, "what its file system expects there")

    def _put(self, guest: int, index: int, certainty: Certainty, witness: str) -> None:
        self._taken_hosts[index] = 1
        self._taken_guests[guest] = index
        self._map.place(Placement(guest, self._hosts[index], self._cluster_bytes, certainty, witness))

    # What is left

    def _join_gaps(self) -> None:
        """Fill between two runs that follow each other: what is left there of both sides, in order."""
        order = self._orders[0]
        previous: int | None = None
        for position, expected in enumerate(order):
            index = self._taken_guests.get(expected.guest)
            if index is None:
                continue
            if previous is not None and position - previous > 1:
                self._join(previous, position)
            previous = position

    def _join(self, first: int, last: int) -> None:
        """Fill the guest clusters between two positions in the order of writing, if as many orphans are."""
        order = self._orders[0]
        start, stop = self._taken_guests[order[first].guest], self._taken_guests[order[last].guest]
        gap = range(start + 1, stop)
        if len(gap) != last - first - 1 or any(self._taken_hosts[index] for index in gap):
            return
        for offset, index in enumerate(gap, first + 1):
            if score(order[offset], self._lengths[index], self._block_bytes) == IMPOSSIBLE:
                return
        for offset, index in enumerate(gap, first + 1):
            self._put(order[offset].guest, index, Certainty.LIKELY, "the order of writing")

    def _take_rest(self) -> None:
        """Give what is left in the order of the file to what is expected still, in the order of writing."""
        waiting = [expected for expected in self._orders[0] if expected.guest not in self._taken_guests]
        left = [index for index, taken in enumerate(self._taken_hosts) if not taken]
        position = 0
        for index in left:
            for ahead in range(position, min(position + 64, len(waiting))):
                if score(waiting[ahead], self._lengths[index], self._block_bytes) != IMPOSSIBLE:
                    self._put(waiting[ahead].guest, index, Certainty.GUESS, "what was left over, in order")
                    position = ahead + 1
                    break
