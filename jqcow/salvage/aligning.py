"""The best way to give orphans, in the order of the file, places on the disk: a search with a beam.

A path goes through the orphans one by one and has each in a cluster of the disk, or nowhere. It mostly goes
on to the next cluster: of the disk, of the file, or of what was written next. It may also jump, at a price,
to one of the places that were proposed for an orphan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Literal, NamedTuple

from jqcow.salvage.expecting import Expectations
from jqcow.salvage.weighing import Odds

NEXT, NEXT_IN_USE, NEXT_IN_FILE, NEXT_WRITTEN, NEXT_IN_TIME = -0.02, -1.5, -1.0, -1.5, -2.5
"""What it costs to go on."""
IN_TURN, OUT_OF_TURN = -0.02, -1.5
"""What it costs to go on with what came next where files grew in turns, and with a file out of turn."""
ENTER_FREE, LEAVE_FREE, STAY_FREE = -1.5, -0.5, -0.02
"""What it costs to go on to a cluster that is free, and back."""
JUMP, RESUME = -8.0, -5.0
"""What it costs to jump: to a place that a look suggests, or beside what is placed already."""
NATURAL = 3.5
"""What it tells that a jump leads to where a run would begin: with a piece of a file, or beside others."""
UNTIMELY, UNTIMELY_EACH, UNTIMELY_MAX = -1.5, 0.15, -6.0
"""What it tells that what lies around an orphan was written earlier or later: the more files are between, the
more."""
UNUSUAL_EACH, UNUSUAL_MAX = 0.03, 2.0
"""What it tells, for each file between, that it is not what was written in the middle of that time."""
BROKEN = -2.5
"""What it costs to jump from where a run would go on."""
NEAR = -1.6
"""What goes on at a higher price is not said to go on from what is placed."""
LAND, LAND_FAR, INTERRUPT = 5.0, 3.0, -1.0
"""What it tells to come to where what is placed goes on, and what it costs to be interrupted by it."""
GIVE_UP, STAY_LOST = -4.0, -0.05
"""What it costs that an orphan belongs nowhere, and that the one behind it does not, either."""
BEAM, BEHIND_MAX = 80, 14.0
"""So many paths are followed, none of which is so far behind the best."""
SKIP, SKIPPED_MAX = -1.0, 4
"""So many clusters that are placed may lie between one and the next."""
DROP, WALK_MAX = 8.0, 512
"""A walk back from a likely place ends when it has lost so much, or has come so far."""

RISE = 2.0
"""By so much a stretch of clusters that come twice gets dearer each time."""

NOWHERE, END = -1, -1


@dataclass(frozen=True)
class Pair:
    """An orphan in a place.

    Attributes:
        index: of the orphan.
        cluster: its place.
        gain: how well it meets what is expected there, and how well it goes on from the pair before.
        price: of going on, a part of the gain.
    """

    index: int
    cluster: int
    gain: float
    price: float = 0.0


@dataclass(frozen=True)
class Stretch:
    """Pairs of a path that follow each other without a jump.

    Attributes:
        pairs: in the order of the file.
        is_attached: it goes on from what is placed.
        has_landed: what is placed goes on from it.
    """

    pairs: list[Pair]
    is_attached: bool
    has_landed: bool

    def repriced(self, paid: Mapping[int, float]) -> Stretch:
        """Return the stretch without what was paid for clusters that came twice."""
        pairs = [replace(pair, gain=pair.gain + paid.get(pair.cluster, 0.0)) for pair in self.pairs]
        return replace(self, pairs=pairs)


class _Node(NamedTuple):
    """A step of a path: an orphan's index, its cluster, how it came there, and what that gained.

    ``item`` is negative for what is placed; ``how`` tells whether it is a start, a landing, or neither.
    """

    item: int
    cluster: int
    before: _Node | None
    gain: float
    price: float = 0.0
    how: Literal["start", "on", "landing"] = "on"


_Paths = dict[int, tuple[float, _Node | None]]


Proposals = Mapping[int, Mapping[int, float]]
"""For orphans, clusters to jump to, each with its price."""


@dataclass(frozen=True)
class Gap:
    """Clusters that orphans are placed in which lie between two others.

    Attributes:
        first: the first of them in the order of the file.
        last: the last of them, beginning with the very last.
    """

    first: list[int]
    last: list[int]


Gaps = Mapping[int, Gap]
"""What lies before orphans that is placed; for END, behind the last."""


class Aligner:
    """Finds paths for orphans."""

    def __init__(
        self,
        expectations: Expectations,
        odds: Odds,
        is_waiting: Callable[[int], bool],
        index_at: Callable[[int], int | None],
    ) -> None:
        """Go through clusters of which ``is_waiting`` says that they may be placed.

        ``index_at`` returns the index of the orphan that a cluster has by now.
        """
        self._expectations, self._odds = expectations, odds
        self._is_waiting, self._index_at = is_waiting, index_at
        self._told = lru_cache(maxsize=1 << 18)(self._tell)
        self._prices: dict[int, float] = {}
        self.ahead = lru_cache(maxsize=1 << 15)(self._find_ahead)
        self._rank = lru_cache(maxsize=1 << 16)(expectations.rank)
        self.period_of: Callable[[int], tuple[int, int, int] | None] = lambda index: None
        self.is_natural = lru_cache(maxsize=1 << 15)(self._is_natural)
        self.is_end = lru_cache(maxsize=1 << 15)(self._is_end)

    def gain(self, cluster: int, index: int) -> float:
        """Return what it tells that an orphan is in a cluster, less what the cluster costs by now."""
        total, joints = self._told(cluster, index)
        total -= self._prices.get(cluster, 0.0)
        for joint in joints:
            total += joint
        return total

    def _tell(self, cluster: int, index: int) -> tuple[float, list[float]]:
        """Return what the cluster itself tells, and what its neighbours do that are placed."""
        expected, joints = self._expectations.of(cluster), list[float]()
        if (before := self._index_at(cluster - 1)) is not None:
            joints.append(self._odds.joint(self._expectations.of(cluster - 1), before, expected, index))
        if (behind := self._index_at(cluster + 1)) is not None:
            joints.append(self._odds.joint(expected, index, self._expectations.of(cluster + 1), behind))
        return self._odds.of(expected, index), joints

    def changed(self) -> None:
        """Forget what rests on which clusters are waiting, and what is placed."""
        for cached in (self._told, self.ahead, self.is_natural, self.is_end):
            cached.cache_clear()

    def beside(self, cluster: int, step: int) -> set[int]:
        """Return the clusters right behind a cluster, or before it, in some order, that are waiting."""
        found = {cluster + step, self._expectations.next_in_use(cluster, step)}
        found.update(self._expectations.beside_in_file(cluster, step))
        found.update(self._expectations.beside_in_time(cluster, step))
        return {other for other in found if other is not None and other >= 0 and self._is_waiting(other)}

    def _find_ahead(self, cluster: int, step: int) -> dict[int, float]:
        found: dict[int, float] = {}
        nearest = self._next_waiting(cluster + step, step)
        skipped = 0 if nearest is None else abs(nearest - cluster) - 1
        self._offer(found, cluster, nearest, NEXT + SKIP * skipped)
        in_use = self._expectations.next_in_use(cluster, step)
        if in_use is not None and abs(in_use - cluster) > 1:
            self._offer(found, cluster, self._next_waiting(in_use, step), NEXT_IN_USE)
        for other in self._expectations.beside_in_file(cluster, step):
            self._offer(found, cluster, self._next_waiting(other, step), NEXT_IN_FILE)
        for other in self._expectations.beside_in_time(cluster, step):
            self._offer(found, cluster, self._next_waiting(other, step), NEXT_IN_TIME)
        written = self._expectations.next_written(cluster, step)
        if written is not None and self._is_waiting(written):
            self._offer(found, cluster, written, NEXT_WRITTEN)
        turn = self._expectations.turn(cluster, step)
        if turn is not None and turn != cluster + step:
            if cluster + step in found and self._expectations.turn(cluster + step, -step) is not None:
                found[cluster + step] += OUT_OF_TURN
            self._offer(found, cluster, turn if self._is_waiting(turn) else None, IN_TURN)
        for near in self._expectations.near_turns(cluster, step):
            self._offer(found, cluster, near if self._is_waiting(near) else None, OUT_OF_TURN)
        found.pop(cluster, None)
        return found

    def _offer(self, found: dict[int, float], cluster: int, other: int | None, price: float) -> None:
        if other is None:
            return
        was_free, is_free = self._expectations.of(cluster).is_idle, self._expectations.of(other).is_idle
        if was_free or is_free:
            price += STAY_FREE if was_free and is_free else ENTER_FREE if is_free else LEAVE_FREE
        found[other] = max(price, found.get(other, price))

    def landing(self, cluster: int, other: int) -> float:
        """Return what it tells that a run comes from one cluster to the other, that is placed."""
        if self._expectations.of(cluster).is_idle:
            return 0.0
        if other == cluster + 1:
            return LAND
        is_next = other == self._expectations.next_in_use(cluster, 1)
        return LAND_FAR if is_next or other in self._expectations.beside_in_file(cluster, 1) else 0.0

    def _is_natural(self, cluster: int) -> bool:
        """Return whether a run would begin with a cluster."""
        return (
            not self._is_waiting(cluster - 1)
            or not self._expectations.in_use(cluster - 1)
            or self._expectations.begins(cluster)
        )

    def _is_end(self, cluster: int) -> bool:
        """Return whether a run would end with a cluster."""
        return (
            not self._is_waiting(cluster + 1)
            or not self._expectations.in_use(cluster + 1)
            or (self._expectations.begins(cluster + 1))
        )

    def _next_waiting(self, cluster: int, step: int) -> int | None:
        for _ in range(SKIPPED_MAX):
            if cluster < 0:
                return None
            if self._is_waiting(cluster):
                return cluster
            cluster += step
        return None

    def timely(self, cluster: int, index: int) -> float:
        """Return what it tells that a run begins with an orphan, by when its neighbours were written."""
        period, rank = self.period_of(index), self._rank(cluster)
        if period is None or rank is None:
            return 0.0
        earliest, usual, latest = period
        total = -min(UNUSUAL_MAX, UNUSUAL_EACH * abs(rank - usual))
        away = max(earliest - rank, rank - latest, 0)
        return total if not away else total + max(UNTIMELY_MAX, UNTIMELY - UNTIMELY_EACH * away)

    def joint(self, one: _Node, cluster: int, index: int) -> float:
        """Return what it tells that an orphan in a cluster goes on from a step before."""
        if one.item < 0:
            return 0.0
        return self._odds.joint(
            self._expectations.of(one.cluster), one.item, self._expectations.of(cluster), index
        )

    def walk_back(self, items: Sequence[int], position: int, cluster: int) -> Iterable[tuple[int, int]]:
        """Yield (index of an orphan, cluster) from a likely pair backwards, as long as it goes well."""
        total = best = 0.0
        for place in range(position - 1, max(-1, position - 1 - WALK_MAX), -1):
            index = items[place]
            options = self.ahead(cluster, -1)
            if not options:
                return
            gain, cluster = max((self.gain(other, index) + price, other) for other, price in options.items())
            total += gain
            best = max(best, total)
            if total < best - DROP:
                return
            yield index, cluster

    def best(self, items: Sequence[int], proposals: Proposals, gaps: Gaps) -> list[Stretch]:
        """Return the stretches of the best path through orphans; what is between two of them is nowhere.

        Args:
            items: the indices of the orphans.
            proposals: where paths may begin.
            gaps: before which orphans others lie in the file that are placed.
        """
        paths: _Paths = {NOWHERE: (0.0, None)}
        for index in items:
            if index in gaps:
                paths = self._cross(paths, gaps[index])
            paths = self._step(paths, index, proposals.get(index, {}))
        if END in gaps:
            paths = self._cross(paths, gaps[END])
        _, node = max(paths.values(), key=lambda path: path[0])
        return _stretches(node)

    def _cross(self, paths: _Paths, gap: Gap) -> _Paths:
        """Return paths that have come by what is placed: they stop there, or go on behind it."""
        found: _Paths = {}
        best: tuple[float, _Node | None] = (-1e9, None)
        for cluster, (score, node) in paths.items():
            landed = 0.0
            if cluster != NOWHERE:
                prices = (self.landing(cluster, first) + INTERRUPT * at for at, first in enumerate(gap.first))
                landed = max(0.0, *prices)
                if node is not None and node.item >= 0:
                    found[cluster] = (score + INTERRUPT, node)
            if score + landed > best[0]:
                how: Literal["on", "landing"] = "landing" if landed else "on"
                best = score + landed, _Node(-1, NOWHERE, node, 0.0, 0.0, how)
        score, node = best
        for at, last in enumerate(gap.last):
            if last not in found:
                found[last] = (score + INTERRUPT * at, _Node(-1, last, node, 0.0))
        found[NOWHERE] = (score + STAY_LOST, node)
        return found

    def best_once(self, items: Sequence[int], proposals: Proposals, gaps: Gaps, passes: int) -> list[Stretch]:
        """Return the stretches of the best path on which few clusters come more than once.

        What does is made dear, a little more each time, until those of its users leave that have the least
        of it.
        """
        for _ in range(passes):
            stretches = self.best(items, proposals, gaps)
            users = Counter(pair.cluster for stretch in stretches for pair in stretch.pairs)
            rises: dict[int, float] = {}
            for stretch in stretches:
                twice = [pair.cluster for pair in stretch.pairs if users[pair.cluster] > 1]
                twice = [cluster for cluster in twice if not self._expectations.of(cluster).is_idle]
                for cluster in twice:
                    rises[cluster] = min(rises.get(cluster, RISE), RISE / len(twice))
            if not rises:
                break
            before = dict(self._prices)
            for cluster, rise in rises.items():
                self._prices[cluster] = before.get(cluster, 0.0) + rise
        paid = before if rises else dict(self._prices)
        self._prices.clear()
        best: list[Stretch] = []
        most = -1e9
        for _ in range(passes):
            paid = dict(self._prices)
            stretches = [stretch.repriced(paid) for stretch in self.best(items, proposals, gaps)]
            worth = self._worth(stretches)
            if worth > most:
                best, most = stretches, worth
            if not self._raise_prices(stretches):
                break
        self._prices.clear()
        return best

    def _raise_prices(self, stretches: list[Stretch]) -> bool:
        """Make dearer what comes twice; return whether something does."""
        users = self.users(stretches)
        rises: dict[int, float] = {}
        for stretch in stretches:
            twice = [pair.cluster for pair in stretch.pairs if users[pair.cluster] > 1]
            for cluster in twice:
                rises[cluster] = min(rises.get(cluster, RISE), RISE / len(twice))
        for cluster, rise in rises.items():
            self._prices[cluster] = self._prices.get(cluster, 0.0) + rise
        return bool(rises)

    def users(self, stretches: list[Stretch]) -> Counter[int]:
        """Return how often each cluster comes in which a file has something."""
        clusters = (pair.cluster for stretch in stretches for pair in stretch.pairs)
        return Counter(cluster for cluster in clusters if not self._expectations.of(cluster).is_idle)

    def _worth(self, stretches: list[Stretch]) -> float:
        """Return what stretches gain if each cluster counts once, for the stretch that gains most."""
        seen: set[int] = set()
        worth = 0.0
        for stretch in sorted(stretches, key=lambda one: -sum(pair.gain for pair in one.pairs)):
            ends = LAND * (stretch.is_attached + stretch.has_landed)
            fresh = [pair for pair in stretch.pairs if pair.cluster not in seen]
            worth += sum(pair.gain for pair in fresh) + ends * len(fresh) / len(stretch.pairs)
            seen.update(pair.cluster for pair in fresh if not self._expectations.of(pair.cluster).is_idle)
        return worth

    def _step(self, paths: _Paths, index: int, proposed: Mapping[int, float]) -> _Paths:
        """Return the paths with one more orphan, by the cluster that they have it in."""
        top, leader = max(paths.values(), key=lambda path: path[0])
        left, leaver = max(
            ((score + self._price_to_leave(cluster), node) for cluster, (score, node) in paths.items()),
            key=itemgetter(0),
        )
        lost, lost_node = paths.get(NOWHERE, (-1e9, None))
        if lost + STAY_LOST < top + GIVE_UP:
            lost, lost_node = top + GIVE_UP, leader
        found: _Paths = {NOWHERE: (lost + STAY_LOST, _nowhere(lost_node, index))}
        for cluster, (score, node) in paths.items():
            if node is None or cluster == NOWHERE:
                continue
            ahead = self.ahead(cluster, 1)
            for other, price in ahead.items():
                gain = price + self.gain(other, index) + self.joint(node, other, index)
                if node.item < 0:
                    gain += self.timely(other, index)
                if score + gain > found.get(other, (-1e9, None))[0]:
                    found[other] = (score + gain, _Node(index, other, node, gain, price))
        for cluster, price in proposed.items():
            if not self._is_waiting(cluster):
                continue
            own = self.gain(cluster, index)
            natural = NATURAL if self.is_natural(cluster) else 0.0
            score = left + price + natural + self.timely(cluster, index) + own
            if score > found.get(cluster, (-1e9, None))[0]:
                found[cluster] = (score, _Node(index, cluster, leaver, own, 0.0, "start"))
        best = max(score for score, _ in found.values())
        kept = {at: path for at, path in found.items() if path[0] > best - BEHIND_MAX or at == NOWHERE}
        if len(kept) > BEAM:
            order = sorted(kept.items(), key=lambda item: -item[1][0])
            kept = dict(order[:BEAM]) | {NOWHERE: kept[NOWHERE]}
        return kept

    def _price_to_leave(self, cluster: int) -> float:
        return 0.0 if cluster == NOWHERE or self.is_end(cluster) else BROKEN


def _nowhere(before: _Node | None, index: int) -> _Node | None:
    """Return a node for an orphan that belongs nowhere; of several in a row one is kept."""
    if before is None or before.cluster == NOWHERE:
        return before
    return _Node(index, NOWHERE, before, 0.0)


def _stretches(node: _Node | None) -> list[Stretch]:
    """Return the stretches of a path that ends with a node."""
    stretches: list[Stretch] = []
    pairs: list[Pair] = []
    has_landed = False
    while node is not None:
        is_orphan = node.item >= 0 and node.cluster != NOWHERE
        if is_orphan:
            pairs.append(Pair(node.item, node.cluster, node.gain, node.price))
        if not is_orphan or node.how == "start":
            if pairs:
                is_attached = node.item < 0 and pairs[-1].price > NEAR
                stretches.append(Stretch(pairs[::-1], is_attached, has_landed))
            pairs, has_landed = [], node.how == "landing"
        node = node.before
    if pairs:
        stretches.append(Stretch(pairs[::-1], False, has_landed))
    return stretches[::-1]
