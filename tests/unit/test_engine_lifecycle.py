"""Going live and recovery: what a failure at each call leaves."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import jqcow
from jqcow.device.file import FileDevice
from jqcow.engine.engine import Engine, make_writable, open_engine
from jqcow.engine.medium import Medium
from jqcow.ondisk import root as roots
from jqcow.ondisk.entries import COPIED
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.patients import Tables

CLUSTER = 4096
JOURNAL = 1 << 16


def clean_device() -> SimulatedDevice:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 1 << 20, cluster_size=CLUSTER, journal_size=JOURNAL) as image:
        image.pwrite(b"first", 0)
    device.reopen()
    return device


def opened(device: SimulatedDevice) -> Engine:
    opened = open_engine(Medium(device), writable=True, journal_bytes=JOURNAL)
    make_writable(opened)
    return opened.engine


def is_live(device: SimulatedDevice) -> bool:
    return roots.is_live(device.pread(512, 0))


def first_bytes(device: SimulatedDevice) -> bytes:
    with jqcow.open_device(device.killed(), "r+") as image:
        assert image.check().ok
        return image.pread(5, 0)


class TestGoLive:
    def test_once(self) -> None:
        device = clean_device()
        engine = opened(device)
        engine.lifecycle.go_live(lambda: None)
        assert is_live(device)
        journal, before = engine.log.journal, device.barriers.total()
        engine.lifecycle.go_live(lambda: None)
        assert engine.log.journal is journal and device.barriers.total() == before
        assert first_bytes(device) == b"first"

    def test_a_failure_at_each_call_leaves_the_image_as_it_was(self) -> None:
        device = clean_device()
        device.faults = plan = FaultPlan()
        opened(device).lifecycle.go_live(lambda: None)
        for call in ("pread", "pwrite", "barrier"):
            for at in range(1, plan.calls[call] + 1):
                device = clean_device()
                engine = opened(device)
                device.faults = FaultPlan(Fault(errno.EIO, at=at, call=call))
                try:
                    engine.lifecycle.go_live(lambda: None)
                except OSError:
                    assert engine.log.journal is None
                    device.faults = None
                    if not engine.medium.poisoned:
                        assert not is_live(device)
                        engine.lifecycle.go_live(lambda: None)
                        assert is_live(device)
                assert first_bytes(device) == b"first", (call, at)


class TestRecover:
    def test_order(self) -> None:
        """What was read is durable and copied elsewhere before any home is written."""
        device = clean_device()
        opened(device).lifecycle.go_live(lambda: None)
        crashed = device.killed()
        names: list[str] = []
        crashed.barrier_listeners.append(lambda name, _: names.append(name))
        engine = opened(crashed)
        assert names == [
            "open.settle",
            "recover.root",
            "move.range",
            "move.root",
            "checkpoint.homes",
        ]
        assert engine.log.require_journal().epoch == 2 and is_live(crashed)

    @pytest.mark.parametrize("name", ["open.settle", "move.range", "move.root", "checkpoint.homes"])
    def test_it_can_be_tried_again(self, name: str) -> None:
        device = clean_device()
        with_journal = jqcow.open_device(device, "r+", journal_size=JOURNAL)
        with_journal.pwrite(b"second", 8 * CLUSTER)
        with_journal.flush()
        crashed = device.killed()
        crashed.faults = FaultPlan(Fault(errno.EIO, call="barrier", barrier_name=name))
        with pytest.raises(OSError):
            opened(crashed)
        again = crashed.killed()
        with jqcow.open_device(again, "r+") as image:
            assert image.pread(6, 8 * CLUSTER) == b"second" and image.check().ok


class TestUncountedData:
    """F2: the last clusters of the file are mapped and have refcount 0, in an image that no bit marks."""

    WRITTEN = 4
    COUNT = 2

    def device(self, tail: int = 0) -> SimulatedDevice:
        """Return an image whose last data clusters count as free, with ``tail`` bytes behind them."""
        device = SimulatedDevice()
        with jqcow.create_on_device(device, 1 << 20, cluster_size=CLUSTER, journal_size=JOURNAL) as image:
            # Its L2 table first: the data is to be the last of the file.
            image.pwrite(b"x", 200 * CLUSTER)
            image.pwrite(b"data" * (self.WRITTEN * CLUSTER // 4), 0)
        tables = Tables(device.content())
        for cluster in range(self.WRITTEN - self.COUNT, self.WRITTEN):
            tables.set_refcount(tables.entry(tables.place_of(cluster * CLUSTER)) & ~COPIED, 0)
        return SimulatedDevice(bytes(tables.image) + bytes(tail))

    def look(self, device: SimulatedDevice) -> None:
        device.reopen()
        with jqcow.open_device(device) as image:
            assert image.pread(self.WRITTEN * CLUSTER, 0) == b"data" * (self.WRITTEN * CLUSTER // 4)

    @pytest.mark.parametrize("tail", [0, 100, CLUSTER, 5 * CLUSTER + 1])
    @pytest.mark.parametrize("sessions", [1, 3])
    def test_a_write_elsewhere_counts_it(self, sessions: int, tail: int) -> None:
        device = self.device(tail)
        for session in range(sessions):
            device.reopen()
            with jqcow.open_device(device, "r+") as image:
                image.pwrite(b"x" * CLUSTER, (20 + session) * CLUSTER)
            self.look(device)
        device.reopen()
        with jqcow.open_device(device) as image:
            assert image.check().ok

    @pytest.mark.parametrize("tail", [0, 2 * CLUSTER])
    @pytest.mark.parametrize("damage", ["", "a table"])
    def test_of_a_live_image(self, tail: int, damage: str) -> None:
        """A refcount is damaged while the journal is live: recovery cuts nothing off, a write counts it."""
        device = SimulatedDevice()
        with jqcow.create_on_device(device, 1 << 20, cluster_size=512, journal_size=JOURNAL) as image:
            # The L2 tables first: the data is to be the last of the file.
            for offset in range(0, 200_000, 64 * 512):
                image.pwrite(b"x", offset)
            image.pwrite(b"x" * 200_000, 0)
        device.reopen()
        # Its refcount is far from those that the journal holds.
        last = device.size() // 512 - 1
        live = jqcow.open_device(device, "r+", journal_size=JOURNAL)
        live.discard(512, 0)
        live.flush()
        tables = Tables(device.content() + bytes(tail))
        tables.set_refcount(last * 512, 0)
        if damage:
            l2_table = tables.entry(tables.l1 + 8) & ~COPIED
            tables.set_entry(l2_table + 8, 0x1FE)
        for changes in (False, True):
            crashed = SimulatedDevice(bytes(tables.image))
            with jqcow.open_device(crashed, "r+") as image:
                read = [image.pread(512, offset) for offset in range(128 * 512, 200_000 - 512, 512)]
                if changes:
                    image.pwrite(b"y" * 512, 300_000)
                    image.flush()
            crashed.reopen()
            assert crashed.size() > last * 512, (damage, changes)
            with jqcow.open_device(crashed) as image:
                assert read == [image.pread(512, offset) for offset in range(128 * 512, 200_000 - 512, 512)]
                if changes and not damage:
                    assert image.check().ok

    def test_in_a_transaction_that_is_undone(self) -> None:
        device = self.device()
        with jqcow.open_device(device, "r+") as image, image.transaction() as transaction:
            transaction.pwrite(b"x" * CLUSTER, 20 * CLUSTER)
            transaction.rollback()
        self.look(device)

    def test_by_a_snapshot(self) -> None:
        """What it shares it counts on."""
        device = self.device()
        with jqcow.open_device(device, "r+") as image:
            image.create_snapshot("kept")
            assert image.check().ok
        self.look(device)

    def test_reading_alone_leaves_the_file_as_it_is(self) -> None:
        device = self.device()
        before = device.content()
        with jqcow.open_device(device, "r+") as image:
            image.flush()
        assert device.content() == before

    def test_what_behind_the_last_counted_cluster_nothing_maps_is_cut_off(self) -> None:
        device = clean_device()
        size = device.size()
        device = SimulatedDevice(device.content() + b"\xee" * (3 * CLUSTER))
        with jqcow.open_device(device, "r+") as image:
            image.discard(1 << 20, 0)
        device.reopen()
        assert device.size() <= size

    def test_where_the_host_refuses_the_next_change_tries_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device = self.device()
        image = jqcow.open_device(device, "r+")
        lifecycle = image._engine.lifecycle

        def correct(*_: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(lifecycle.public.refcounts, "correct", correct)
        with pytest.raises(OSError, match="full"):
            image.pwrite(b"x", 20 * CLUSTER)
        assert lifecycle.log.journal is not None and not lifecycle.is_live
        monkeypatch.undo()
        image.pwrite(b"x", 20 * CLUSTER)
        image.close()
        self.look(device)


def test_a_full_disk_says_what_the_tables_may_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has holes under them; which are these nobody can tell."""
    path = tmp_path / "disk.qcow2"
    jqcow.create(path, 1 << 20, cluster_size=CLUSTER).close()

    def full(device: FileDevice, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileDevice, "allocate", full)
    monkeypatch.setattr(FileDevice, "free_bytes", lambda device: 4095)
    with jqcow.open(path, "r+") as image:
        with pytest.raises(OSError, match="No space") as caught:
            image.pwrite(b"x", 0)
        assert caught.value.__notes__ == ["the tables of the image may need 16384 bytes, 4095 are free"]
