"""The clean close: what it leaves, and what a failure at each write of it does."""

from __future__ import annotations

import errno

from jqcow.engine.scan import LiveRoot, read_journal
from jqcow.ondisk import root as roots
from jqcow.testing import Fault, FaultPlan
from tests.unit.test_engine_lifecycle import clean_device, first_bytes, is_live, opened


def test_the_journal_is_gone() -> None:
    device = clean_device()
    size = device.size()
    engine = opened(device)
    engine.lifecycle.go_live(lambda: None)
    assert device.size() > size
    engine.closing.clean()
    assert not is_live(device) and device.size() == size
    assert engine.log.journal is None and not device.changes


def test_a_failure_at_each_write_can_be_tried_again() -> None:
    for at in range(1, 5):
        device = clean_device()
        engine = opened(device)
        engine.lifecycle.go_live(lambda: None)
        device.faults = FaultPlan(Fault(errno.EIO, at=at, call="pwrite"))
        try:
            engine.closing.clean()
        except OSError:
            assert first_bytes(device) == b"first"
            device.faults = None
            engine.closing.clean()
        assert not is_live(device) and first_bytes(device) == b"first"


def test_the_last_epoch_is_the_header_alone() -> None:
    """F4: durable before sector 0 is cleared."""
    device = clean_device()
    engine = opened(device)
    engine.lifecycle.go_live(lambda: None)
    root = LiveRoot(roots.pack_root(engine.blocks.area.header, engine.log.require_journal().extent))
    found: dict[str, int] = {}

    def look(name: str, _: object) -> None:
        if name in ("close.epoch", "close.clear"):
            found[name] = len(read_journal(device, root)[1].blocks)

    device.barrier_listeners.append(look)
    engine.closing.clean()
    assert found == {"close.epoch": 0, "close.clear": 0}
