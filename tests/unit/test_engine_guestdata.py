"""Encrypted data on its way to the device: whole sectors, and one request at a time in each cluster."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import jqcow
from jqcow.engine.request import Busy, Request

pytest.importorskip("cryptography")

WORD = b"correct horse"
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "secret.qcow2"
    how = jqcow.Encryption(WORD, "aes-128", iter_time=1, _stripes=2)
    with jqcow.create(path, 8 * MIB, cluster_size=4096, encryption=how) as image:
        image.pwrite(b"a guest's words" * 500, 5000)
    return path


def test_small_writes_keep_what_lies_beside(path: Path) -> None:
    model = bytearray(8 * MIB)
    model[5000:12500] = b"a guest's words" * 500
    with jqcow.open(path, "r+", passphrase=WORD) as image:
        for offset, length in ((5001, 1), (5100, 511), (4095, 2), (20_000, 3), (511, 514), (8192, 4096)):
            model[offset : offset + length] = bytes([offset % 251]) * length
            image.pwrite(bytes([offset % 251]) * length, offset)
        assert image.pread(30_000, 0) == model[:30_000]
        image.create_snapshot("before")
        image.pwrite(b"new", 6000)
        image.discard(4096, 8192)
    with jqcow.open(path, passphrase=WORD, snapshot="before") as image:
        assert image.pread(30_000, 0) == model[:30_000]


def test_writes_to_one_cluster_follow_each_other(path: Path) -> None:
    with jqcow.open(path, "r+", passphrase=WORD) as image:
        guard, writes, reads = image._engine.guard, image._guest.writes, image._guest.reads
        image.pread(8192, 4096)
        image.pwrite(b"x", 9000)
        with image._lock:
            writes.plan(Request(), 5000, 10)  # type: ignore[arg-type]
            with pytest.raises(Busy):
                writes.plan(Request(), 5020, 10)  # type: ignore[arg-type]
            with pytest.raises(Busy):
                reads._plan_read(Request(), 5020, 10)
            reads._plan_read(Request(), 9000, 10)
            with pytest.raises(Busy):
                writes.plan(Request(), 9100, 10)  # type: ignore[arg-type]
        guard.end_all()


def test_threads_write_beside_each_other(path: Path) -> None:
    with jqcow.open(path, "r+", passphrase=WORD) as image:

        def write(at: int) -> None:
            for _ in range(40):
                image.pwrite(bytes([at + 1]) * 100, 5120 + at * 100)

        threads = [threading.Thread(target=write, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert image.pread(400, 5120) == b"".join(bytes([at + 1]) * 100 for at in range(4))
