"""Going live, recovery and clean close: what a failure at each call leaves."""

from __future__ import annotations

import errno

import pytest

import jqcow
from jqcow.engine.engine import Engine, make_writable, open_engine
from jqcow.engine.medium import Medium
from jqcow.ondisk import root as roots
from jqcow.testing import Fault, FaultPlan, SimulatedDevice

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


class TestClean:
    def test_the_journal_is_gone(self) -> None:
        device = clean_device()
        size = device.size()
        engine = opened(device)
        engine.lifecycle.go_live(lambda: None)
        assert device.size() > size
        engine.lifecycle.clean()
        assert not is_live(device) and device.size() == size
        assert engine.log.journal is None and not device.changes

    def test_a_failure_at_each_write_can_be_tried_again(self) -> None:
        for at in range(1, 4):
            device = clean_device()
            engine = opened(device)
            engine.lifecycle.go_live(lambda: None)
            device.faults = FaultPlan(Fault(errno.EIO, at=at, call="pwrite"))
            try:
                engine.lifecycle.clean()
            except OSError:
                assert first_bytes(device) == b"first"
                device.faults = None
                engine.lifecycle.clean()
            assert not is_live(device) and first_bytes(device) == b"first"


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
