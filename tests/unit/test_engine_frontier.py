"""The end of everything, on files and on devices of fixed size."""

from __future__ import annotations

import errno

import pytest

from jqcow.engine.frontier import Frontier
from jqcow.engine.medium import Medium
from jqcow.ondisk.layout import ClusterIndex, Geometry
from jqcow.testing import SimulatedDevice

CLUSTER = 512


def frontier_of(clusters: int, *, at: int, has_fixed_size: bool = False) -> Frontier:
    device = SimulatedDevice(b"\xaa" * (clusters * CLUSTER), has_fixed_size=has_fixed_size)
    frontier = Frontier(Medium(device), Geometry(9))
    frontier.frontier = ClusterIndex(at)
    return frontier


def test_a_file_has_room_without_end() -> None:
    frontier = frontier_of(16, at=16)
    assert not frontier.is_full
    frontier.require_room(1 << 30)


def test_a_device_ends() -> None:
    """S7."""
    frontier = frontier_of(16, at=12, has_fixed_size=True)
    assert frontier.free_bytes() == 4 * CLUSTER and not frontier.is_full
    frontier.require_room(16)
    with pytest.raises(OSError) as caught:
        frontier.require_room(17)
    assert caught.value.errno == errno.ENOSPC
    assert frontier_of(16, at=16, has_fixed_size=True).is_full


def test_the_file_reaches_to_the_frontier_or_to_its_end() -> None:
    """What lies behind both is lost, unless a live image is found to have grown."""
    frontier = frontier_of(16, at=18)
    assert frontier.reaches(18 * CLUSTER) and not frontier.reaches(18 * CLUSTER + 1)
    frontier.find_used_end = lambda: ClusterIndex(20)
    assert frontier.reaches(20 * CLUSTER) and not frontier.reaches(20 * CLUSTER + 1)
