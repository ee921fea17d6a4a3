"""What paths left in doubt, put in better places: runs of orphans change places as long as that gains.

A path goes through the orphans in the order of the file and knows nothing of clusters that it leaves empty.
Here all of a disk counts at once: what each orphan tells in its place, beside its neighbours on the disk and
in the file, and what is missed. A run is tried where clusters are empty or in doubt; what is there takes the
places that the run leaves, or none. Or a run pushes what is there on, by as much as it is long. Two runs of
about one length may have each other's place: of a run that gains much as a whole each part may be wrong. And
where files grew in turns, clusters are put in the order of these.

ME1. What evidence has placed stays where it is.
ME2. Each change gains; so it ends, and so many are tried at most.
ME3. What tells far less in itself is not weighed with its neighbours: these never make up for so much.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from heapq import nlargest
from itertools import islice, pairwise
from math import inf

from jqcow.salvage.aligning import BROKEN, JUMP, NATURAL, RESUME, Aligner
from jqcow.salvage.expecting import Expectations
from jqcow.salvage.turns import in_turns, windows
from jqcow.salvage.wanted import Wanted
from jqcow.salvage.weighing import Odds

MISSED = -3.0
"""What it costs that nobody has a cluster in which a file has something."""
NOWHERE = -2.0
"""What it costs where placed orphans and others are neighbours in the file."""
SMOOTH, PARTED = -3.0, -1.9
"""Steps that cost less go on with a run: with what is nowhere, or without."""
GAIN_MIN = 0.5
TRIED_MAX, TRIED_OF = 240_000, 256
"""So many changes are tried, and with each so many orphans a smaller part: each takes longer then."""
HOPELESS, WEIGHED = -20.0, 8
"""What a change gains at least in itself, before neighbours are weighed: that counts as so many tries."""
LOOKED_AT = 64
"""A look at so many orphans that might be pushed counts as a change that is tried."""
RUN_MAX, NEEDED_EACH = 1024, 16
PUSHED_MAX, STOPS_TRIED, MISSED_TRIED = 16, 3, 2
"""So long a run may push others, so many places are tried up to which it does, and for those behind them."""
PUSH_GAIN = -4.0
"""What is pushed may tell so much less in itself: neighbours count, too."""
SEED_GAIN = 3.0
"""An orphan is tried where it tells so much by itself."""
ALIKE_WITHIN = 1
"""Runs are of about one length that differ by so much."""
RESUMED_WITHIN = 96
"""So many orphans after it was interrupted a run may go on."""

Places = dict[int, int | None]
"""Where orphans are put, by index; None for nowhere."""


class Mender:
    """Moves runs of orphans.

    Attributes:
        clusters: where each orphan is, by index; None for nowhere.
    """

    def __init__(
        self,
        expectations: Expectations,
        odds: Odds,
        taken: Places,
        order: Sequence[tuple[int | None, int | None]],
        is_free: Callable[[int], bool],
        period_of: Callable[[int], tuple[int, int, int] | None] = lambda index: None,
        seeds: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Take what paths found.

        Args:
            expectations: of clusters.
            odds: of what they look like.
            taken: where each orphan is by now.
            order: (index, None) of orphans and (None, cluster) of what is placed, in the order of the file.
            is_free: whether a cluster of the disk may be given to orphans.
            period_of: when an orphan was written, as `Aligner.period_of`.
            seeds: (index, cluster) of orphans that may tell their place by themselves.
        """
        self._expectations, self._odds, self._order = expectations, odds, order
        self._aligner = Aligner(expectations, odds, is_free, lambda cluster: None)
        self._aligner.period_of = period_of
        self.clusters = dict(taken)
        self._holders = {cluster: index for index, cluster in taken.items() if cluster is not None}
        self._at = {index: at for at, (index, _) in enumerate(order) if index is not None}
        self._is_missed = lru_cache(maxsize=1 << 16)(self._find_missed)
        self._is_free = is_free
        self._left = TRIED_MAX // (1 + len(taken) // TRIED_OF)
        self._starts: dict[int | None, int] = {}
        wanted = islice(expectations.needed(), NEEDED_EACH * len(taken))
        self._wanted = Wanted(filter(is_free, wanted), self._aligner.is_natural)
        self._seeds = [
            seed for seed in seeds if is_free(seed[1]) and self._aligner.gain(*seed[::-1]) >= SEED_GAIN
        ]

    def _find_missed(self, cluster: int) -> bool:
        return self._expectations.of(cluster).is_needed

    # What a part of it gains

    def _cluster_at(self, at: int) -> int | None:
        index, cluster = self._order[at]
        return cluster if index is None else self.clusters[index]

    def _step(self, at: int) -> float:
        """Return what it costs to go on to a place in the order of the file from the one before."""
        if not 0 < at < len(self._order):
            return 0.0
        one, other = self._cluster_at(at - 1), self._cluster_at(at)
        is_fixed = self._order[at - 1][0] is None and self._order[at][0] is None
        if is_fixed or (one is None and other is None):
            return 0.0
        index = self._order[at][0]
        timely = 0.0 if other is None or index is None else self._aligner.timely(other, index)
        if one is None or other is None:
            natural = self._aligner.is_end(one) if one is not None else self._aligner.is_natural(other or 0)
            return timely + (NOWHERE if natural else NOWHERE + BROKEN)
        price = self._aligner.ahead(one, 1).get(other)
        if price is not None:
            return price
        if index is None and self._aligner.landing(one, other):
            return 0.0
        before = self._holders.get(other - 1)
        if before is not None and 0 < at - self._at[before] < RESUMED_WITHIN:
            price = RESUME
        else:
            price = JUMP + NATURAL if self._aligner.is_natural(other) else JUMP
        return price + timely + (0.0 if self._aligner.is_end(one) else BROKEN)

    def _worth(self, indices: Iterable[int], clusters: Iterable[int]) -> float:
        """Return what these orphans and clusters gain, with their neighbours."""
        holders, of = self._holders, self._expectations.of
        steps: set[int] = set()
        total = 0.0
        for index in indices:
            steps.update((self._at[index], self._at[index] + 1))
            if (cluster := self.clusters[index]) is not None:
                total += self._aligner.gain(cluster, index)
        pairs = {cluster - step for cluster in clusters for step in (0, 1)}
        for cluster in pairs:
            first, second = holders.get(cluster), holders.get(cluster + 1)
            if second is not None:
                steps.add(self._at[second])
                if first is not None:
                    total += self._odds.joint(of(cluster), first, of(cluster + 1), second)
        for cluster in set(clusters):
            if cluster not in holders and self._is_missed(cluster):
                total += MISSED
        return total + sum(map(self._step, steps))

    def _put(self, changes: Places) -> Places:
        """Put orphans elsewhere; return where they were."""
        before = {index: self.clusters[index] for index in changes}
        for cluster in before.values():
            if cluster is not None:
                self._holders.pop(cluster, None)
        for index, cluster in changes.items():
            self.clusters[index] = cluster
            if cluster is not None:
                self._holders[cluster] = index
        return before

    def _try(self, changes: Places) -> bool:
        """Keep a change if it gains."""
        self._left -= 1 + len(changes) // LOOKED_AT
        changes = {index: cluster for index, cluster in changes.items() if self.clusters[index] != cluster}
        if not changes or self._told(changes) < HOPELESS:
            return False
        self._left -= WEIGHED
        every = [*changes.values(), *(self.clusters[index] for index in changes)]
        clusters = [cluster for cluster in every if cluster is not None]
        worth = self._worth(changes, clusters)
        before = self._put(changes)
        if self._worth(changes, clusters) >= worth + GAIN_MIN:
            self._wanted.changed()
            return True
        self._put(before)
        return False

    def _told(self, changes: Places) -> float:
        """Return what a change gains without what neighbours tell."""
        gain = self._aligner.gain
        told = sum(gain(cluster, index) for index, cluster in changes.items() if cluster is not None)
        before, after = {self.clusters[index] for index in changes}, set(changes.values())
        missed = sum(map(self._misses, before - after))
        missed -= sum(map(self._misses, after - before - self._holders.keys()))
        return told - sum(map(self._gain_now, changes)) + MISSED * missed

    def _misses(self, cluster: int | None) -> bool:
        return cluster is not None and self._is_missed(cluster)

    # What is tried

    def mend(self) -> None:
        """Move runs as long as that gains."""
        is_better = True
        while is_better and self._left > 0:
            is_better = False
            for index, cluster in self._seeds:
                if self._left > 0 and self.clusters[index] != cluster and self._grow(index, cluster):
                    is_better = True
            self._starts = {self.clusters[run[0]]: len(run) for run in self._runs(PARTED)}
            for some in windows(sorted(self.clusters, key=self._at.__getitem__), self._is_timed):
                is_better |= self._left > 0 and self._try(
                    in_turns(some, self.clusters, self._expectations.turn_of)
                )
            for run in self._all_runs():
                for start in list(self._targets(run)):
                    if self._left > 0 and self._move(run, start):
                        is_better = True
                        break
            for at in range(1, len(self._order)):
                for run, start, step in self._pushes(at):
                    if self._left > 0 and self._push(run, start, step):
                        is_better = True
                        break

    def _all_runs(self) -> list[list[int]]:
        """Return runs, in several ways, the most likely first."""
        found = [run for least in (SMOOTH, PARTED, -inf) for run in self._runs(least)]
        for run in self._runs(-inf):
            starts = [0, *(at for at in range(1, len(run)) if self._odds.parts(run[at])), len(run)]
            found += [run[start:stop] for start, stop in pairwise(starts)]
        return [list(run) for run in dict.fromkeys(map(tuple, found))]

    def _runs(self, least: float) -> Iterator[list[int]]:
        """Yield runs of orphans: neighbours in the file, whose steps cost no more."""
        run: list[int] = []
        for at, (index, _) in enumerate(self._order):
            if run and (index is None or self._step(at) < least or len(run) == RUN_MAX):
                yield run
                run = []
            if index is not None:
                run.append(index)
            elif run:
                yield run
                run = []
        if run:
            yield run

    def _targets(self, run: list[int]) -> Iterator[int]:
        """Yield where a run might begin: where clusters are missed, or go on from others."""
        found: set[int] = set()
        at = self._at[run[0]]
        for place in range(max(0, at - RESUMED_WITHIN), at):
            cluster = self._cluster_at(place)
            if cluster is not None:
                found.update(self._aligner.ahead(cluster, 1))
        for start, length in self._wanted.all:
            found.add(start)
            if length >= len(run):
                found.add(start + length - len(run))
        # Two runs of about one length may have each other's place.
        alike = range(len(run) - ALIKE_WITHIN, len(run) + ALIKE_WITHIN + 1)
        found.update(start for start, length in self._starts.items() if start is not None and length in alike)
        found.discard(self.clusters[run[0]] if self.clusters[run[0]] is not None else -1)
        yield from sorted(found)

    def _move(self, run: list[int], start: int) -> bool:
        """Try a run from a cluster on: where runs mostly go, and through one cluster after the other."""
        ways = [self._places(run, start, is_plain=is_plain) for is_plain in (False, True)]
        return any(bool(places) and self._put_run(run, places) for places in ways[: 1 + (ways[0] != ways[1])])

    def _grow(self, index: int, cluster: int) -> bool:
        """Try an orphan in a cluster, with its neighbours as far as a piece of a file reaches, or alone."""
        before, behind = self._neighbours(index, cluster, -1), self._neighbours(index, cluster, 1)
        first = cluster - len(before)
        run = [*before[::-1], index, *behind]
        ways = dict.fromkeys(
            (start, stop) for start in (0, len(before)) for stop in (len(run), len(before) + 1)
        )
        return any(
            self._put_run(run[start:stop], [*range(first + start, first + stop)]) for start, stop in ways
        )

    def _is_timed(self, index: int) -> bool:
        cluster = self.clusters[index]
        return cluster is not None and self._expectations.turn_of(cluster) is not None

    def _neighbours(self, index: int, cluster: int, step: int) -> list[int]:
        """Return the orphans beside one that a piece of a file has place for beside a cluster."""
        found: list[int] = []
        at, is_edge = self._at[index], self._aligner.is_natural if step < 0 else self._aligner.is_end
        while not is_edge(cluster) and len(found) < RUN_MAX:
            at, cluster = at + step, cluster + step
            other = self._order[at][0] if 0 <= at < len(self._order) else None
            if other is None or self.clusters[other] == cluster:
                break
            found.append(other)
        return found

    def _places(self, run: list[int], start: int, *, is_plain: bool) -> list[int]:
        """Return where a run goes from a cluster on."""
        places: list[int] = []
        cluster: int | None = start
        while cluster is not None and len(places) < len(run):
            if not self._is_free(cluster) or self._expectations.of(cluster).is_idle:
                break
            places.append(cluster)
            cluster = cluster + 1 if is_plain else self._next(cluster, 1, places)
        return places

    def _put_run(self, run: list[int], places: list[int]) -> bool:
        """Try a run in places, with what is there elsewhere, and what of the run has none nowhere."""
        moved: Places = dict(zip(run, places, strict=False))
        left = [self.clusters[index] for index in moved]
        evicted = [self._holders[place] for place in places if place in self._holders]
        evicted = [index for index in evicted if index not in moved]
        nowhere: Places = dict.fromkeys(evicted)
        rest: Places = dict.fromkeys(run[len(places) :])
        swapped: Places = dict(zip(evicted, [one for one in left if one not in places], strict=False))
        if self._try(nowhere | moved):
            return True
        if rest and self._try(nowhere | rest | moved):
            return True
        if swapped and self._try(nowhere | swapped | moved):
            return True
        for vacant in self._best_of(
            self._wanted.vacant(self._holders), sorted(evicted, key=self._at.__getitem__)
        ):
            elsewhere = zip(evicted, (place for place in vacant if place not in places), strict=False)
            if self._try(nowhere | dict(elsewhere) | moved):
                return True
        return False

    def _next(self, cluster: int, step: int, passed: Collection[int]) -> int | None:
        """Return where a run goes on, or comes from; None where it would come to a cluster again."""
        ahead = self._aligner.ahead(cluster, step)
        other = max(ahead, key=ahead.__getitem__, default=None)
        return None if other in passed else other

    def _pushes(self, at: int) -> Iterator[tuple[list[int], int, int]]:
        """Yield (run, cluster, step) of what may push others on, or back, where neighbours in the file part.

        That is the end of what comes before a place in the file, if it belongs before what comes behind it,
        or the start of what comes behind, if it belongs behind what comes before. What is nowhere may
        go on from what comes before it.
        """
        if self._step(at) > NOWHERE:
            return
        before, waiting = self._cluster_at(at - 1), list[int]()
        for index, _ in self._order[at : at + RUN_MAX]:
            if before is None or index is None or self.clusters[index] is not None:
                break
            waiting.append(index)
        if before is not None and waiting and (following := self._next(before, 1, ())) is not None:
            yield waiting, following, 1
        for step, places in ((1, range(at - 1, -1, -1)), (-1, range(at, len(self._order)))):
            start, run = self._cluster_at(at if step > 0 else at - 1), list[int]()
            for place in places[:PUSHED_MAX] if start is not None else ():
                index = self._order[place][0]
                if index is None:
                    break
                run.insert(0, index)
                yield run, start or 0, step

    def _push(self, run: list[int], start: int, step: int) -> bool:
        """Try a run from a cluster on, or back: what is there moves by as much, as far as it tells most."""
        items, moved, own = list(run), list[tuple[int, int]](), set(run)
        told = -sum(map(self._gain_now, run))
        stops: list[tuple[float, int, int]] = []
        passed: set[int] = set()
        cluster: int | None = start
        while cluster is not None and len(moved) < min(len(items), RUN_MAX):
            if not self._is_free(cluster) or self._expectations.of(cluster).is_idle:
                break
            index, holder = items[len(moved)], self._holders.get(cluster)
            if holder is not None and holder not in own:
                items.append(holder)
                told -= self._gain_now(holder)
            told += self._aligner.gain(cluster, index)
            moved.append((index, cluster))
            stops.append((told, len(moved), len(items)))
            passed.add(cluster)
            cluster = self._next(cluster, step, passed)
        self._left -= len(moved) // LOOKED_AT
        left = [self.clusters[index] for index in run]
        promising = [one for one in nlargest(STOPS_TRIED, stops) if one[0] >= PUSH_GAIN]
        missed = self._wanted.vacant(self._holders) if promising else []
        for _, count, stop in promising:
            changes: Places = dict(moved[:count])
            rest = sorted(items[count:stop], key=self._at.__getitem__)
            used = set(changes.values())
            vacant = sorted(place for place in left if place is not None and place not in used)
            for places in (vacant, *self._best_of(missed, rest), []):
                free = [place for place in places if place not in used]
                elsewhere = {**dict.fromkeys(rest), **dict(zip(rest, free, strict=False))}
                if self._try(changes | elsewhere):
                    return True
        return False

    def _gain_now(self, index: int) -> float:
        cluster = self.clusters[index]
        return 0.0 if cluster is None else self._aligner.gain(cluster, index)

    def _best_of(self, missed: list[tuple[int, int]], run: list[int]) -> list[range]:
        """Return the places among those that are missed where a run tells most."""
        found = [range(first, first + min(count, len(run))) for first, count in missed]
        found = [places for places in found if self._holders.keys().isdisjoint(places)]
        told = {places: sum(map(self._aligner.gain, places, run)) for places in found}
        return nlargest(MISSED_TRIED, told, key=told.__getitem__) if run else []
