"""Threads that read, write, zero, discard and flush one image: each sector behaves as one register."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow import Image
from tests.support.beside import run_threads
from tests.threads.linear import Call, History, is_linearisable

SECTOR = 512
CLUSTER = 4096
SECTORS = 24 * CLUSTER // SECTOR
ZERO = bytes(8)


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Worker:
    """One thread's share: random calls on a hot range, each write with a value of its own."""

    def __init__(self, image: Image, history: History, number: int, calls: int) -> None:
        self.image = image
        self.history = history
        self.number = number
        self.calls = calls
        self.random = random.Random(number)
        self.written = 0

    def __call__(self) -> None:
        for _ in range(self.calls):
            action = self.random.choices(
                (self.write, self.read, self.zero, self.discard, self.flush, self.commit),
                (30, 40, 8, 6, 8, 6),
            )[0]
            action()

    def sectors(self, most: int) -> range:
        count = self.random.randint(1, most)
        start = self.random.randrange(SECTORS - count)
        return range(start, start + count)

    def fresh_value(self) -> bytes:
        self.written += 1
        return self.number.to_bytes(2, "big") + self.written.to_bytes(6, "big")

    def write(self) -> None:
        sectors, value = self.sectors(12), self.fresh_value()
        data = value * (SECTOR // 8) * len(sectors)
        offset, fua = sectors[0] * SECTOR, self.random.random() < 0.1
        self.history.write(sectors, [value] * len(sectors), lambda: self.image.pwrite(data, offset, fua=fua))

    def read(self) -> None:
        sectors = self.sectors(16)

        def read() -> list[bytes]:
            data = self.image.pread(len(sectors) * SECTOR, sectors[0] * SECTOR)
            pieces = [data[start : start + SECTOR] for start in range(0, len(data), SECTOR)]
            assert all(piece == piece[:8] * (SECTOR // 8) for piece in pieces), "a torn sector was read"
            return [piece[:8] for piece in pieces]

        self.history.read(sectors, read)

    def zero(self) -> None:
        sectors, unmap = self.sectors(20), self.random.random() < 0.5
        self.history.write(
            sectors,
            [ZERO] * len(sectors),
            lambda: self.image.write_zeroes(len(sectors) * SECTOR, sectors[0] * SECTOR, unmap=unmap),
        )

    def discard(self) -> None:
        per_cluster = CLUSTER // SECTOR
        first = self.random.randrange(SECTORS // per_cluster - 1)
        sectors = range(first * per_cluster, (first + self.random.randint(1, 2)) * per_cluster)
        self.history.write(
            sectors,
            [ZERO] * len(sectors),
            lambda: self.image.discard(len(sectors) * SECTOR, sectors[0] * SECTOR),
        )

    def flush(self) -> None:
        self.image.flush()

    def commit(self) -> None:
        """A transaction's write counts from the begin to the commit."""
        sectors, value = self.sectors(12), self.fresh_value()
        data = value * (SECTOR // 8) * len(sectors)

        def commit() -> None:
            with self.image.transaction() as transaction:
                transaction.pwrite(data, sectors[0] * SECTOR)

        self.history.write(sectors, [value] * len(sectors), commit)


@pytest.mark.parametrize("threads", [2, 8])
def test_sectors_are_linearisable(tmp_path: Path, threads: int) -> None:
    history = History()
    path = tmp_path / "disk.qcow2"
    size = SECTORS * SECTOR
    with jqcow.create(path, size, cluster_size=CLUSTER, journal_size=65536) as image:
        run_threads(*(Worker(image, history, number, 1600 // threads) for number in range(1, threads + 1)))
        assert not image.check().counts
        final = image.pread(size, 0)
    assert history.call_count > 5000
    assert not history.violations(ZERO)
    with jqcow.open(path) as image:
        assert image.pread(size, 0) == final


# The checker itself


def write(value: bytes, began: int, returned: int | None) -> Call:
    return Call(True, value, began, returned)


def read(value: bytes, began: int, returned: int) -> Call:
    return Call(False, value, began, returned)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([write(b"a", 1, 2), read(b"a", 3, 4)], True),
        ([write(b"a", 1, 2), read(b"0", 3, 4)], False),
        ([write(b"a", 1, 4), read(b"0", 2, 3)], True),
        ([write(b"a", 1, 6), read(b"a", 2, 3), read(b"0", 4, 5)], False),
        ([write(b"a", 1, 2), write(b"b", 3, 8), read(b"b", 4, 5), read(b"a", 6, 7)], False),
        ([write(b"a", 1, 8), write(b"b", 2, 9), read(b"b", 3, 4), read(b"a", 5, 6)], True),
        ([write(b"a", 1, None), read(b"0", 2, 3), read(b"a", 4, 5)], True),
        ([write(b"a", 1, None), read(b"a", 2, 3), read(b"0", 4, 5)], False),
        ([read(b"c", 1, 2)], False),
    ],
)
def test_the_checker_knows_what_one_register_may_do(calls: list[Call], expected: bool) -> None:
    assert is_linearisable(calls, b"0") is expected
    assert is_linearisable(calls[::-1], b"0") is expected
