"""Runs of orphans that change places as long as that gains."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from jqcow.salvage.expecting import Expectations
from jqcow.salvage.looks import Looks
from jqcow.salvage.mending import Mender, Places
from jqcow.salvage.turns import in_turns, windows
from jqcow.salvage.wanted import Wanted
from jqcow.salvage.weighing import Odds
from tests.unit.test_salvage_growing import COUNT, LEFT, RIGHT, together
from tests.unit.test_salvage_solver import BLOCK, CLUSTER, expectations_of, piece

LONG, SHORT, END = 10, 30, 1234
"""Where two files begin, of four clusters and of three, and how far their last blocks are filled."""
TRUTH = [30, 31, 32, 10, 11, 12, 13, None]


def two_files() -> tuple[Expectations, Odds]:
    """Return what is expected, and how orphans look: the short file, the long one, and a stray."""
    chance = random.Random(1)
    looks = Looks(BLOCK, CLUSTER)
    for clusters in (3, 4, 1):
        length = clusters * CLUSTER - (BLOCK - END - clusters)
        content = (chance.randbytes(length - 1) + b"x").ljust(clusters * CLUSTER, b"\0")
        for step in range(clusters):
            looks.add(content[step * CLUSTER : (step + 1) * CLUSTER])
    expectations = expectations_of(
        [
            piece(LONG * CLUSTER, 4 * CLUSTER, 4 * CLUSTER - (BLOCK - END - 4), 2),
            piece(SHORT * CLUSTER, 3 * CLUSTER, 3 * CLUSTER - (BLOCK - END - 3), 1),
        ]
    )
    return expectations, Odds(looks, 2)


def mended(
    taken: list[int | None],
    sure: frozenset[int] = frozenset(),
    known: tuple[Expectations, Odds] | None = None,
    seeds: Sequence[tuple[int, int]] = (),
) -> Places:
    expectations, odds = known or two_files()
    fixed = {index: taken[index] for index in sure}
    order = [(None, fixed[index]) if index in sure else (index, None) for index in range(len(taken))]
    mender = Mender(
        expectations,
        odds,
        {index: cluster for index, cluster in enumerate(taken) if index not in sure},
        order,
        lambda cluster: cluster >= 0 and cluster not in fixed.values(),
        seeds=seeds,
    )
    mender.mend()
    return dict(sorted((mender.clusters | fixed).items()))


def test_runs_change_places() -> None:
    assert list(mended([10, 11, 12, 30, 31, 32, None, 13]).values()) == TRUTH
    assert list(mended([None, None, None, 31, 32, None, None, None]).values()) == TRUTH


@pytest.mark.parametrize("is_back", [False, True])
def test_a_run_pushes_what_is_in_its_place(is_back: bool) -> None:
    """A file of which no cluster tells its place, but first and last are sure; within it one with an end."""
    chance, first, second = random.Random(2), (6, 8)[is_back], (8, 6)[is_back]
    text = b"".join(b"line %d of it\n" % number for number in range(CLUSTER))
    looks, last = Looks(BLOCK, CLUSTER), 10 + first + second - 1
    for part in (
        *(chance.randbytes(CLUSTER) for _ in range(first)),
        *(text[:CLUSTER], text[CLUSTER : CLUSTER + END].ljust(CLUSTER, b"\0")),
        *(chance.randbytes(CLUSTER) for _ in range(second)),
    ):
        looks.add(part)
    truth = [*range(10, 10 + first), 30, 31, *range(10 + first, last + 1)]
    taken = [10, 30, 31, *range(11, last + 1)]
    if is_back:
        taken = [*range(10, last), 30, 31, last]
    whole = (first + second) * CLUSTER
    pieces = [piece(10 * CLUSTER, whole, whole, 2), piece(30 * CLUSTER, 2 * CLUSTER, CLUSTER + END, 1)]
    known = expectations_of(pieces), Odds(looks, 1)
    assert list(mended(list(taken), frozenset((0, len(truth) - 1)), known).values()) == truth


def noise(ends: Sequence[bool]) -> Odds:
    """Return how orphans of noise look; in some a file of three blocks and a part ends at first."""
    looks, chance = Looks(BLOCK, CLUSTER), random.Random(3)
    for has_end in ends:
        content = chance.randbytes(CLUSTER)
        last = bytes(BLOCK - END) if has_end else content[3 * BLOCK + END : 4 * BLOCK]
        looks.add(content[: 3 * BLOCK + END] + last + content[4 * BLOCK :])
    return Odds(looks, 2)


def test_a_run_goes_no_further_than_its_file() -> None:
    """What is behind it in the file is nowhere: it need not go where files go on."""
    whole = 6 * CLUSTER
    known = expectations_of([piece(9 * CLUSTER, whole, whole, 2), piece(20 * CLUSTER, whole, whole, 3)])
    taken = [*range(10, 15), 9, *[None] * 9, *range(20, 26)]
    found = list(mended(taken, frozenset((5, 20)), (known, noise([False] * len(taken)))).values())
    assert found == [*[None] * 5, *range(9, 15), *[None] * 4, *range(20, 26)]


def test_what_tells_its_place_takes_its_neighbours_along() -> None:
    """Of a run that is nowhere a part belongs somewhere: the end of a file tells which."""
    pieces = [
        piece(10 * CLUSTER, 2 * CLUSTER + 4 * BLOCK, 2 * CLUSTER + 3 * BLOCK + END, 1),
        piece(20 * CLUSTER, 9 * CLUSTER, 9 * CLUSTER, 2),
    ]
    known = expectations_of(pieces), noise([at == 30 for at in range(72)])
    taken = [*[None] * 60, *range(10, 13), *range(20, 29)]
    found = list(mended(taken, known=known, seeds=[(30, 12)]).values())
    assert found[28:31] == [10, 11, 12] and found[63:] == [*range(20, 29)]


def test_what_a_run_takes_the_place_of_goes_where_something_is_missed() -> None:
    """Two clusters may hold the end of a file of one length: neither of both changes gains alone."""
    pieces = [piece(at * CLUSTER, 2 * CLUSTER, 2 * CLUSTER, at) for at in (40, 60)]
    for first, count in ((10, 6), (30, 1)):
        pieces.append(piece(first * CLUSTER, 4 * BLOCK, 3 * BLOCK + END, first))
        rest = count * CLUSTER - 4 * BLOCK
        pieces.append(piece(first * CLUSTER + 4 * BLOCK, rest, rest, first + 1))
    taken = [40, 41, 10, 60, 61, *range(11, 16), None, None, 50]
    known = expectations_of(pieces), noise([at in (2, 5) for at in range(len(taken))])
    found = list(mended(taken, frozenset((0, 1, 3, 4, 12)), known).values())
    assert found == [40, 41, 30, 60, 61, *range(10, 16), None, 50]


def test_what_is_sure_stays() -> None:
    """ME1."""
    found = mended([13, None, None, 10, 11, 12, None, None], frozenset((0,)))
    assert found[0] == 13 and list(found.values()).count(13) == 1


def test_what_is_not_weighed_would_not_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """ME3."""
    starts: list[list[int | None]] = []
    for seed in range(6):
        starts.append([*range(10, 14), *range(30, 33), None])
        random.Random(seed).shuffle(starts[-1])
    found = [mended(list(start)) for start in starts]
    weighed, weigh = list[float](), Mender._worth
    monkeypatch.setattr(Mender, "_worth", lambda *one: weighed.append(1.0) or weigh(*one))
    assert [mended(list(start)) for start in starts] == found
    count = len(weighed)
    monkeypatch.setattr("jqcow.salvage.mending.HOPELESS", float("-inf"))
    assert [mended(list(start)) for start in starts] == found
    assert len(weighed) - count > count


def test_no_cluster_comes_twice_and_it_ends() -> None:
    """ME2: from any start it comes to an end."""
    for seed in range(5):
        places: list[int | None] = [*range(10, 14), *range(30, 33), None]
        random.Random(seed).shuffle(places)
        found = [cluster for cluster in mended(places).values() if cluster is not None]
        assert len(found) == len(set(found)) > 4


def test_what_is_nowhere_may_go_on_and_push_what_is_there() -> None:
    pieces = [piece(9 * CLUSTER, 9 * CLUSTER, 9 * CLUSTER, 1), piece(40 * CLUSTER, CLUSTER, CLUSTER, 2)]
    taken: list[int | None] = [9, None, None, None, 40, 10, 11, 12]
    order = [(index, None) for index in range(len(taken))]
    known = expectations_of(pieces), noise([False] * len(taken))
    mender = Mender(*known, dict(enumerate(taken)), order, lambda cluster: cluster >= 0)
    assert next(mender._pushes(1)) == ([1, 2, 3], 10, 1)
    assert not [run for run, *_ in mender._pushes(5) if set(run) & {1, 2, 3, 4} == {1, 2, 3}]


def test_files_that_grew_in_turns_are_put_in_turns() -> None:
    known = expectations_of(together())
    clusters: Places = {0: 99, 1: 60, 2: 20, 3: None, 4: 21, 5: 61}
    timed = {index for index, cluster in clusters.items() if cluster and known.turn_of(cluster) is not None}
    some = list(windows(sorted(clusters), timed.__contains__))
    assert some == [[1, 2, 4, 5], [1, 2, 4], [2, 4, 5]]
    assert in_turns(some[0], clusters, known.turn_of) == {1: 20, 2: 60, 4: 21, 5: 61}
    assert in_turns(some[2], clusters, known.turn_of) == {2: 20, 4: 21, 5: 61}
    assert not list(windows([1], lambda index: False))


def test_a_change_of_turns_is_kept_where_it_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is tried here: neither runs nor what pushes them."""
    monkeypatch.setattr(Mender, "_all_runs", lambda mender: [])
    monkeypatch.setattr(Mender, "_pushes", lambda mender, at: iter(()))
    known = expectations_of(together()), noise([False] * 2 * COUNT)
    turns = [cluster + at for at in range(COUNT) for cluster in (LEFT, RIGHT)]
    taken = list[int | None](turns)
    random.Random(4).shuffle(taken)
    assert list(mended(taken, known=known).values()) == turns


def test_what_is_wanted_and_vacant() -> None:
    wanted = Wanted([3, 4, 5, 6, 9, 10], lambda cluster: cluster in (3, 6))
    assert wanted.all == [(3, 3), (6, 1), (9, 2)]
    assert wanted.vacant({4, 10}) == [(3, 1), (5, 1), (6, 1), (9, 1)] == wanted.vacant({})
    wanted.changed()
    assert wanted.vacant({3, 5, 6, 9, 10}) == [(4, 1)]
