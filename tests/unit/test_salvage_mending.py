"""Runs of orphans that change places as long as that gains."""

from __future__ import annotations

import random

from jqcow.salvage.expecting import Expectations
from jqcow.salvage.looks import Looks
from jqcow.salvage.mending import Mender, Places
from jqcow.salvage.weighing import Odds
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


def mended(taken: list[int | None], sure: frozenset[int] = frozenset()) -> Places:
    expectations, odds = two_files()
    order = [(index, None) for index in range(len(taken))]
    mender = Mender(
        expectations,
        odds,
        dict(enumerate(taken)),
        order,
        lambda cluster: cluster >= 0,
        lambda index: index not in sure,
    )
    mender.mend()
    return mender.clusters


def test_runs_change_places() -> None:
    assert list(mended([10, 11, 12, 30, 31, 32, None, 13]).values()) == TRUTH
    assert list(mended([None, None, None, 31, 32, None, None, None]).values()) == TRUTH


def test_what_is_sure_stays() -> None:
    """ME1."""
    found = mended([13, None, None, 10, 11, 12, None, None], frozenset((0,)))
    assert found[0] == 13 and list(found.values()).count(13) == 1


def test_no_cluster_comes_twice_and_it_ends() -> None:
    """ME2: from any start it comes to an end."""
    for seed in range(5):
        places: list[int | None] = [*range(10, 14), *range(30, 33), None]
        random.Random(seed).shuffle(places)
        found = [cluster for cluster in mended(places).values() if cluster is not None]
        assert len(found) == len(set(found)) > 4
