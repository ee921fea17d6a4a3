"""Orphans that do not tell where they belong: placed by what is expected of them, and by order.

Files are written in runs, and clusters are allocated as they are written: so neighbours in a run are
neighbours in the file. Paths through the orphans (`aligning`) begin where an orphan looks as a cluster
should, mostly by the length of a file's last block, and beside what is placed. What a path is surest of is
placed, and the search is made anew with what is left. What files had that are deleted is a file's, too: where
its place is known it is not taken for part of another. What is a guess then moves to where it tells more
(`mending`).

FI1. No path places what something surer has placed, and none is more than LIKELY.
FI2. The best stretches come first: what they place no other gets.
FI3. What is placed and holds nothing of a file neither ends nor begins a run: a file system writes its own
    blocks, a journal above all, whenever it wants to.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from heapq import nlargest
from itertools import islice, pairwise
from operator import itemgetter

from jqcow.salvage.aligning import END, JUMP, LAND, RESUME, Aligner, Gap, Pair, Stretch
from jqcow.salvage.evidence import Certainty, Placement
from jqcow.salvage.expecting import Expectations
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.looks import Looks
from jqcow.salvage.mending import Mender
from jqcow.salvage.weighing import Odds

SEEDS_PER_TAIL = 8
"""An expectation that more orphans meet says nothing."""
SEED_GAIN = 3.0
"""A path begins where an orphan meets what is expected so well."""
TELLING = 2.0
"""Early on, stretches begin and end with a cluster that tells so much by itself, or beside what is placed."""
NO_GAIN, LOOSE_GAIN = -1e9, 8.0
"""What a stretch gains at least, and one that neither goes on from what is placed nor leads to it."""
LAST_ROUNDS = 8
ROUNDS = (
    (16.0, 1, True),
    (10.0, 1, True),
    (8.0, 4, True),
    (4.5, 4, True),
    (4.5, 4, False),
    *[(NO_GAIN, 3, False)] * LAST_ROUNDS,
)
"""What a stretch must gain in each round, its passes, and whether stretches are cut to what tells."""
MANY = 4096
"""Of more orphans each round has one pass, and the last round comes once: time matters, too."""
SYSTEM_ROUNDS = 2
"""So many of the last rounds are made again for what the file system itself uses."""
PLACES_MAX, PLACES_EACH = 16_384, 4
"""So many places are looked at for the rest, and so many more for each orphan: a piece may claim any size."""
LIKELY_GAIN = 8.0
"""A stretch that gains less is a guess."""
PLAIN = 0.9
"""A pair tells nothing that gains no more."""
DEAR = -0.9
"""A stretch is parted at steps that cost so much."""
CLUSTERS_MAX, BLOCKS_MAX = 1 << 18, 1 << 23
"""So many orphans are looked at together, of no more blocks: memory does not grow with the image. What lies
further apart in the file is not compared."""
REST_AHEAD, REST_GAIN = 64, -4.0
"""What is left over goes to one of so many places that wait, where nothing speaks so much against it."""
WHOLE = 0.7
"""A stretch of which others have taken more is searched for anew."""
PERIOD_OF = 4
"""So many pieces before and behind an orphan tell when it was written."""
GAP_ENDS = 6
"""So many at each end of what lies placed between orphans may go on from these, or lead to them."""
LARGE_TRIED, BREAKS_TRIED = 48, 48
"""So many of the largest pieces of files are tried where so many of the longest runs of orphans begin."""
GROUPS_TRIED = 12
"""A run that was interrupted may go on in one of so many gaps that follow in the file."""


class Filling:
    """Places orphans of one disk by expectations."""

    def __init__(
        self,
        guest_map: GuestMap,
        cluster_bytes: int,
        found: Iterable[tuple[int, bytes]],
        expectations: Expectations,
        anchored: Sequence[tuple[int, int]],
        offset_of: Callable[[int], int] = int,
    ) -> None:
        """Take orphans, as (host offset, content) in the order of the file; zeros may have no content.

        Args:
            guest_map: where they will be placed.
            cluster_bytes: length of each.
            found: the orphans.
            expectations: what may be expected of the disk.
            anchored: (place in the file, guest offset) of all clusters that are placed, in the order of the
                file.
            offset_of: returns the place in the file of what is shown at a host offset.
        """
        self._map, self._cluster_bytes = guest_map, cluster_bytes
        self._expectations = expectations
        self._hosts, self._offsets = array("Q"), array("Q")
        self._looks = Looks(expectations.block_bytes, cluster_bytes)
        for host, content in found:
            self._hosts.append(host)
            self._offsets.append(offset_of(host))
            self._looks.add(content)
        self._odds = Odds(self._looks, sum(1 for _ in expectations.tails()))
        self._anchors: list[tuple[int, int]] = []
        if self._offsets:
            first = max(0, bisect_left(anchored, (self._offsets[0],)) - GAP_ENDS)
            last = bisect_left(anchored, (self._offsets[-1],)) + GAP_ENDS
            self._anchors = [(host, guest // cluster_bytes) for host, guest in anchored[first:last]]
        self._guests: dict[int, int] = {cluster: host for host, cluster in self._anchors}
        self._anchors = [one for one in self._anchors if expectations.of(one[1]).is_data]
        self._taken: dict[int, int] = {}
        self._said: dict[int, tuple[Certainty, str]] = {}
        self._indices: dict[int, int] = {}
        self._is_open = lru_cache(maxsize=1 << 16)(self._find_open)
        self._aligner = Aligner(expectations, self._odds, self._is_waiting, self._indices.get)

    def __len__(self) -> int:
        """Return how many orphans there are."""
        return len(self._hosts)

    def _is_waiting(self, cluster: int) -> bool:
        """Return whether a cluster of the disk may be placed."""
        return cluster not in self._guests and self._is_open(cluster)

    def _find_open(self, cluster: int) -> bool:
        guest = cluster * self._cluster_bytes
        return 0 <= guest < self._map.size and self._map.is_open(guest) and not self._map.is_placed(guest)

    def fill(self) -> None:
        """Place what paths place: of files first, then of the file system itself; then what is left over."""
        for counts_system, rounds in ((False, ROUNDS), (True, ROUNDS[-SYSTEM_ROUNDS:])):
            self._expectations.count_system(counts_system)
            self._aligner.changed()
            self._go_through(rounds)
            if not counts_system and len(self._hosts) <= MANY:
                self._mend()
        self._expectations.count_system(False)
        self._aligner.changed()
        self._take_rest()
        for index, cluster in self._taken.items():
            guest = cluster * self._cluster_bytes
            self._map.place(Placement(guest, self._hosts[index], self._cluster_bytes, *self._said[index]))

    def _mend(self) -> None:
        """Move what is a guess, or has no place, to where it tells more."""
        taken = {index: self._taken.get(index) for index in range(len(self._hosts))}
        order = heapq.merge(
            ((offset, index, None) for index, offset in enumerate(self._offsets)),
            ((host, None, cluster) for host, cluster in self._anchors),
            key=itemgetter(0),
        )
        anchored = {cluster for _, cluster in self._anchors}
        self._expectations.count_system(True)
        mender = Mender(
            self._expectations,
            self._odds,
            taken,
            [one[1:] for one in order],
            lambda cluster: cluster not in anchored and self._is_open(cluster),
            self._periods(are_guesses_left_out=True),
            sorted(set(self._seeds())),
        )
        mender.mend()
        self._expectations.count_system(False)
        moved = {index for index, cluster in mender.clusters.items() if cluster != taken[index]}
        for index in moved & self._taken.keys():
            self._take_back(index)
        for index in moved:
            if (cluster := mender.clusters[index]) is not None:
                self._put(cluster, index, Certainty.GUESS, "all that is expected, taken together")

    def _is_guess(self, index: int) -> bool:
        return self._said.get(index, (Certainty.GUESS,))[0] == Certainty.GUESS

    def _take_back(self, index: int) -> None:
        cluster = self._taken.pop(index)
        del self._indices[cluster], self._guests[cluster], self._said[index]

    def _go_through(self, rounds: Sequence[tuple[float, int, bool]]) -> None:
        seeds = sorted(set(self._seeds()))
        if len(self._hosts) > MANY:
            rounds = list(dict.fromkeys(rounds))
        for number, (wanted, passes, is_cut) in enumerate(rounds, 1):
            items = [index for index in range(len(self._hosts)) if index not in self._taken]
            if not items:
                return
            self._aligner.period_of = self._periods()
            stretches = self._aligner.best_once(
                items, self._proposals(items, seeds), self._gaps(items), passes if len(items) <= MANY else 1
            )
            parts = [part for stretch in stretches for part in _parts(stretch)]
            before = len(self._taken)
            for stretch in sorted(parts, key=lambda part: -_gain_of(part)):
                self._take(stretch, wanted, is_cut=is_cut, least=0.0 if number == len(rounds) else WHOLE)
            if wanted == NO_GAIN and len(self._taken) == before:
                break
            self._aligner.changed()

    # Where paths may begin

    def _seeds(self) -> Iterator[tuple[int, int]]:
        """Yield (index of an orphan, cluster) where a file ends as it should."""
        looks, per = self._looks, self._looks.per_cluster
        by_tail: dict[int, list[int]] = defaultdict(list)
        for at, length in enumerate(looks.lengths):
            if 0 < length < looks.block_bytes:
                found = by_tail[(at % per) << 16 | length]
                if len(found) <= SEEDS_PER_TAIL:
                    found.append(at // per)
        for cluster, block, valid in self._expectations.tails():
            found = by_tail.get(block << 16 | valid, [])
            if len(found) <= SEEDS_PER_TAIL:
                yield from ((index, cluster) for index in found)

    def _proposals(self, items: list[int], seeds: list[tuple[int, int]]) -> dict[int, dict[int, float]]:
        """Return for orphans the clusters where a path may begin, and what that costs."""
        proposals: dict[int, dict[int, float]] = defaultdict(dict)
        starts = self._starts(items)
        large = [cluster for cluster in self._expectations.large(LARGE_TRIED) if self._is_waiting(cluster)]
        for position, cluster in self._beside(items, starts):
            self._propose(proposals, items, position, cluster, RESUME)
        for position in self._breaks(items, starts):
            for cluster in large:
                self._propose(proposals, items, position, cluster, JUMP)
        first_ones = {items[position] for position in starts}
        for index, cluster in seeds:
            if index in self._taken or not self._is_waiting(cluster):
                continue
            if self._aligner.gain(cluster, index) >= SEED_GAIN:
                position = bisect_left(items, index)
                self._propose(proposals, items, position, cluster, JUMP)
                for other, place in self._aligner.walk_back(items, position, cluster):
                    if place in proposals.get(other, ()):
                        break
                    if self._aligner.is_natural(place) or other in first_ones:
                        proposals[other][place] = JUMP
        return proposals

    def _propose(
        self,
        proposals: dict[int, dict[int, float]],
        items: list[int],
        position: int,
        cluster: int,
        price: float,
    ) -> None:
        if 0 <= position < len(items):
            known = proposals[items[position]]
            known[cluster] = max(price, known.get(cluster, price))

    def _starts(self, items: list[int]) -> list[int]:
        """Return the positions in ``items`` of orphans right before which something else lies in the file."""
        return [
            position
            for position, index in enumerate(items)
            if not position
            or items[position - 1] != index - 1
            or self._offsets[index] - self._offsets[index - 1] > self._cluster_bytes
        ]

    def _breaks(self, items: list[int], starts: list[int]) -> list[int]:
        """Return where runs may begin among orphans of which nothing is known: the longest first."""
        looks, per = self._looks, self._looks.per_cluster
        found = set(starts)
        for position, index in enumerate(items):
            kind, before = looks.kinds[index * per], looks.kinds[index * per - 1] if index else 0
            length = looks.lengths[index * per - 1] if index else 0
            if kind and (kind != before or length < looks.block_bytes):
                found.add(position)
        order = sorted(found)
        lengths = {start: stop - start for start, stop in pairwise([*order, len(items)])}
        return nlargest(BREAKS_TRIED, order, key=lengths.__getitem__)

    def _beside(self, items: list[int], starts: list[int]) -> Iterator[tuple[int, int]]:
        """Yield (position in ``items``, cluster) of what may go on from what is placed.

        That is the orphan behind it in the file, or one that begins a gap soon after: runs are interrupted.
        """
        offsets = [self._offsets[index] for index in items]
        at_start = set(starts)
        walked: set[tuple[int, int]] = set()
        for offset, cluster in self._placed():
            position = bisect_left(offsets, offset)
            group = bisect_left(starts, position)
            for other in self._aligner.beside(cluster, 1):
                yield from ((start, other) for start in starts[group : group + GROUPS_TRIED])
            ends = [position - 1, *(start - 1 for start in starts[max(0, group - GROUPS_TRIED) : group])]
            for other in self._aligner.beside(cluster, -1):
                for end in ends:
                    if end >= 0 and (end, other) not in walked:
                        walked.add((end, other))
                        yield end, other
                        back = self._aligner.walk_back(items, end, other)
                        for (_, place), before in zip(back, range(end - 1, -1, -1), strict=False):
                            if self._aligner.is_natural(place) or before in at_start:
                                yield before, place

    def _gaps(self, items: list[int]) -> dict[int, Gap]:
        """Return between which orphans others lie that are placed."""
        gaps: dict[int, Gap] = defaultdict(lambda: Gap([], []))
        offsets = [self._offsets[index] for index in items]
        for offset, cluster in self._placed():
            position = bisect_left(offsets, offset)
            gap = gaps[items[position] if position < len(items) else END]
            if len(gap.first) < GAP_ENDS:
                gap.first.append(cluster)
            gap.last.insert(0, cluster)
            del gap.last[GAP_ENDS:]
        return gaps

    def _periods(self, *, are_guesses_left_out: bool = False) -> Callable[[int], tuple[int, int, int] | None]:
        """Return what tells when an orphan was written: numbers in that order, the first, usual, and last."""
        indices = [one for one in sorted(self._taken) if not (are_guesses_left_out and self._is_guess(one))]
        known = [
            (index, rank)
            for index in indices
            if (rank := self._expectations.rank(self._taken[index])) is not None
        ]
        places, ranks = [index for index, _ in known], [rank for _, rank in known]

        def period_of(index: int) -> tuple[int, int, int] | None:
            at = bisect_left(places, index)
            before, behind = _distinct(ranks[max(0, at - 64) : at][::-1]), _distinct(ranks[at : at + 64])
            if len(before) < PERIOD_OF or len(behind) < PERIOD_OF:
                return None
            return min(before), sorted(before + behind)[PERIOD_OF], max(behind)

        return lru_cache(maxsize=1 << 12)(period_of)

    def _placed(self) -> list[tuple[int, int]]:
        """Return (place in the file, cluster) of what is placed, in the order of the file."""
        taken = ((self._offsets[index], cluster) for index, cluster in self._taken.items())
        return sorted([*self._anchors, *taken])

    # What becomes of paths

    def _cut(self, stretch: Stretch) -> list[Pair]:
        """Return a stretch without what tells nothing at its ends, where these are loose."""
        telling = [place for place, pair in enumerate(stretch.pairs) if pair.gain >= TELLING]
        if not telling:
            return stretch.pairs if stretch.is_attached and stretch.has_landed else []
        first = 0 if stretch.is_attached else telling[0]
        last = len(stretch.pairs) if stretch.has_landed else telling[-1] + 1
        return stretch.pairs[first:last]

    def _take(self, stretch: Stretch, wanted: float, *, is_cut: bool, least: float) -> None:
        """Place a stretch if it gains enough, and others have not taken more than a share of it by now."""
        pairs = self._cut(stretch) if is_cut else stretch.pairs
        free = [pair for pair in pairs if self._is_waiting(pair.cluster)]
        free = [pair for pair in free if not self._expectations.of(pair.cluster).is_free]
        if len(free) < least * sum(not self._expectations.of(pair.cluster).is_free for pair in pairs):
            return
        gain = _gain_of(replace(stretch, pairs=free))
        is_loose = not stretch.is_attached and not stretch.has_landed
        if not free or gain < wanted or (is_loose and LOOSE_GAIN > wanted > NO_GAIN):
            return
        certainty = Certainty.LIKELY if gain >= LIKELY_GAIN else Certainty.GUESS
        for pair in free:
            if pair.cluster not in self._guests:
                self._put(pair.cluster, pair.index, certainty, "what its file system expects there")

    def _put(self, cluster: int, index: int, certainty: Certainty, witness: str) -> None:
        self._taken[index], self._indices[cluster] = cluster, index
        self._odds.learn(self._expectations.of(cluster), index)
        self._guests[cluster] = self._hosts[index]
        self._said[index] = certainty, witness

    def _take_rest(self) -> None:
        """Give what is left in the order of the file to what is expected still, in the order of writing."""
        looked_at = islice(self._expectations.by_writing(), PLACES_MAX + PLACES_EACH * len(self._hosts))
        coming = (cluster for cluster in looked_at if self._is_waiting(cluster))
        waiting = deque(islice(coming, REST_AHEAD))
        for index in range(len(self._hosts)):
            if index in self._taken:
                continue
            for _ in range(len(waiting)):
                cluster = waiting[0]
                if self._is_waiting(cluster) and self._aligner.gain(cluster, index) > REST_GAIN:
                    self._put(cluster, index, Certainty.GUESS, "what was left over, in order")
                    waiting.popleft()
                    break
                waiting.rotate(-1)
            waiting.extend(islice(coming, REST_AHEAD - len(waiting)))


def _distinct(ranks: Iterable[int]) -> list[int]:
    """Return the first few numbers that differ."""
    return list(islice(dict.fromkeys(ranks), PERIOD_OF))


def _gain_of(stretch: Stretch) -> float:
    """Return what tells that a stretch is right; that it is long does not."""
    told = sum(max(pair.gain - PLAIN, -1.0) for pair in stretch.pairs if abs(pair.gain) > PLAIN)
    return told + LAND * (stretch.is_attached + stretch.has_landed)


def _parts(stretch: Stretch) -> Iterator[Stretch]:
    """Yield the parts of a stretch between steps that were dear: each has to tell that it is right."""
    pairs = stretch.pairs
    starts = [0, *(at for at, pair in enumerate(pairs) if at and pair.price <= DEAR), len(pairs)]
    for start, stop in pairwise(starts):
        yield Stretch(
            pairs[start:stop], stretch.is_attached and not start, stretch.has_landed and stop == len(pairs)
        )
