"""Does a file's hole read as a hole, and is a region that is known not asked for again?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from jqcow.device.file import FileDevice
from jqcow.device.holes import HostRegions
from jqcow.testing import SimulatedDevice

BLOCK = 1 << 16


def test_pieces_of_a_file(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(10 * BLOCK)
        for block in (2, 3, 7):
            os.pwrite(file.fileno(), b"x" * BLOCK, block * BLOCK)
    device = FileDevice.open(tmp_path / "a", writable=False)
    regions = HostRegions(device)
    expected = [(0, 2, False), (2, 2, True), (4, 3, False), (7, 1, True), (8, 4, False)]
    whole = [(start * BLOCK, count * BLOCK, is_data) for start, count, is_data in expected]
    assert list(regions.pieces(0, 12 * BLOCK)) == whole
    # From the middle of one to the middle of another, backwards too, and past the end.
    assert list(regions.pieces(3 * BLOCK + 5, 2 * BLOCK)) == [
        (3 * BLOCK + 5, BLOCK - 5, True),
        (4 * BLOCK, BLOCK + 5, False),
    ]
    assert list(regions.pieces(20 * BLOCK, BLOCK)) == [(20 * BLOCK, BLOCK, False)]
    device.close()


class _Counting(SimulatedDevice):
    """A device with data in its second half, that counts how often it is asked where."""

    asked = 0

    def data_extents(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        self.asked += 1
        start, end = max(offset, 50 * BLOCK), min(offset + length, 100 * BLOCK)
        if start < end:
            yield start, end - start


def test_neighbours_are_asked_for_once() -> None:
    device = _Counting()
    device.truncate(100 * BLOCK)
    regions = HostRegions(device)
    found = [piece for block in range(100) for piece in regions.pieces(block * BLOCK, BLOCK)]
    assert [is_data for *_, is_data in found] == [False] * 50 + [True] * 50
    assert device.asked == 1


def test_what_cannot_tell_is_data() -> None:
    class Plain:
        def size(self) -> int:
            return 5

        def pread(self, length: int, offset: int) -> bytes:
            return bytes(length)

    regions = HostRegions(Plain())
    assert list(regions.pieces(0, 3)) == [(0, 3, True)]
    assert list(regions.pieces(2, 9)) == [(2, 1, True), (3, 8, True)]
