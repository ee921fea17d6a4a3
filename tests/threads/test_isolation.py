"""Transactions beside readers and writers: everyone else sees committed states, and nothing in between."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow import Image
from jqcow.errors import TransactionError
from tests.support.beside import Others, run_threads

CLUSTER = 4096
SECTOR = 512
ACCOUNTS = 6 * CLUSTER // SECTOR
"""Sectors over six clusters that always hold one and the same number, if committed."""
ROUNDS = 120


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    path = tmp_path / "disk.qcow2"
    with jqcow.create(path, 64 * CLUSTER, cluster_size=CLUSTER, journal_size=65536) as image:
        yield image


def sector_of(number: int) -> bytes:
    return number.to_bytes(8, "big") * (SECTOR // 8)


def numbers(data: bytes) -> set[int]:
    return {int.from_bytes(data[start : start + 8], "big") for start in range(0, len(data), 8)}


def test_readers_see_committed_states_only(image: Image) -> None:
    done = threading.Event()
    committed = [0]

    def transact() -> None:
        try:
            for number in range(1, ROUNDS + 1):
                commit_or_not(number)
        finally:
            done.set()

    def commit_or_not(number: int) -> None:
        with image.transaction() as transaction:
            for index in range(ACCOUNTS // 2):
                transaction.pwrite(sector_of(number), index * SECTOR)
            point = transaction.savepoint()
            transaction.pwrite(sector_of(1 << 40) * 4, 0)
            transaction.discard(2 * CLUSTER, CLUSTER)
            point.rollback()
            for index in range(ACCOUNTS // 2, ACCOUNTS):
                transaction.pwrite(sector_of(number), index * SECTOR)
            assert numbers(transaction.pread(ACCOUNTS * SECTOR, 0)) == {number}
            if number % 3 == 0:
                transaction.rollback()
        if number % 3:
            committed[0] = number

    def read() -> None:
        last = 0
        while not done.is_set():
            at_least = committed[0]
            found = numbers(image.pread(ACCOUNTS * SECTOR, 0))
            assert len(found) == 1, f"a reader saw a transaction in part: {found}"
            (number,) = found
            assert number % 3 or not number, "a reader saw what was rolled back"
            assert number >= max(last, at_least), "a reader went back in time"
            last = number

    def write_elsewhere(cluster: int) -> None:
        index = 0
        while not done.is_set():
            index += 1
            image.pwrite(bytes([index % 255 + 1]) * CLUSTER, cluster * CLUSTER)
            if index % 5 == 0:
                image.flush()
            if index % 7 == 0:
                image.discard(CLUSTER, cluster * CLUSTER)

    run_threads(transact, read, read, lambda: write_elsewhere(20), lambda: write_elsewhere(40))
    assert not image.check().counts


def test_transactions_of_many_threads_follow_each_other(image: Image) -> None:
    """Each reads a counter and writes it, one higher: none may be lost."""

    def count_up() -> None:
        for _ in range(20):
            with image.transaction() as transaction:
                (number,) = numbers(transaction.pread(SECTOR, 0))
                transaction.pwrite(sector_of(number + 1), 0)

    run_threads(*[count_up] * 6)
    assert numbers(image.pread(SECTOR, 0)) == {120}


def test_changes_wait_for_a_transaction_and_reads_do_not(image: Image) -> None:
    image.pwrite(b"\1" * CLUSTER, 0)
    with Others() as writer, image.transaction() as transaction:
        transaction.pwrite(b"\2" * CLUSTER, 0)
        writer.start(lambda: image.pwrite(b"\3" * CLUSTER, CLUSTER))
        assert writer.is_waiting()
        with Others(image.flush) as flusher:
            assert not flusher.is_waiting(20)
        with Others(lambda: check_old(image)) as reader:
            assert not reader.is_waiting(20)
        transaction.rollback()
        # Rolled back or not, for the others it ends with its block.
        assert writer.is_waiting()
    assert image.pread(2 * CLUSTER, 0) == b"\1" * CLUSTER + b"\3" * CLUSTER


def check_old(image: Image) -> None:
    assert image.pread(CLUSTER, 0) == b"\1" * CLUSTER


def test_a_transaction_waits_for_nobody_but_a_transaction(image: Image) -> None:
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with image.transaction() as transaction:
            transaction.pwrite(b"\1" * SECTOR, 0)
            entered.set()
            assert leave.wait(20)

    def second() -> None:
        with image.transaction() as transaction:
            assert transaction.pread(SECTOR, 0) == b"\1" * SECTOR

    with Others(first):
        assert entered.wait(20)
        with Others(second) as waiting:
            assert waiting.is_waiting()
            leave.set()
            assert not waiting.is_waiting(20)


def test_a_transaction_may_go_from_thread_to_thread(image: Image) -> None:
    with image.transaction() as transaction:
        run_threads(lambda: transaction.pwrite(b"\7" * SECTOR, 0))
        assert transaction.pread(SECTOR, 0) == b"\7" * SECTOR
        with pytest.raises(TransactionError):
            image.pwrite(b"\1", 0)
    assert image.pread(SECTOR, 0) == b"\7" * SECTOR
