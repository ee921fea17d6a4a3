"""Repairs and their undoing, cut off anywhere: the undo file gives the very bytes back.

The undo file is a file of its own. It is durable before the repair begins, and each crash finds it as it is
durable at that moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import jqcow
from jqcow.device.base import Device
from jqcow.device.trial import TrialDevice
from jqcow.disks.undo import pack_undo, undo_on
from jqcow.testing import SimulatedDevice
from tests.support.player import Player
from tests.support.users import JOURNAL_BYTES, salts_of


class Repaired:
    """An image as it was before its repair, and the undo file that is beside it now."""

    def __init__(self, before: bytes, undo: SimulatedDevice) -> None:
        """Take over an undo file."""
        self.before = before
        self.undo = undo

    @contextmanager
    def crashed(self) -> Iterator[None]:
        """Within it the power was cut: who goes on has a copy of what is durable of the undo file."""
        kept = self.undo
        self.undo = SimulatedDevice(kept.durable_content())
        try:
            yield
        finally:
            self.undo = kept

    def take_back(self, device: SimulatedDevice) -> None:
        """Do what a user does with an image whose repair or undo was cut off."""
        device.reopen()
        undo_on(device, self.undo, new_salt=salts_of(device))


_NAMED: dict[str, Repaired] = {}


def repaired_of(device: SimulatedDevice) -> Repaired | None:
    """Return the repair that is to be taken back on a device, or on the one that a crash left of it."""
    return _NAMED.get(device.name)


def undone(user: Player) -> None:
    """An image is repaired, and that is taken back."""
    device, undo = user.session.device, SimulatedDevice()
    before = device.content()
    trial = TrialDevice(device)
    _repair(trial, device)
    pack_undo(trial, undo)
    undo.barrier("saved")
    device.name = f"repaired-{blake2b(before, digest_size=6).hexdigest()}"
    _NAMED[device.name] = repaired = Repaired(before, undo)
    _repair(device, device)
    repaired.take_back(device)


def _repair(device: Device, salted_by: SimulatedDevice) -> None:
    jqcow.open_device(
        device,
        "r+",
        repair="all",
        free_lost=True,
        journal_size=JOURNAL_BYTES,
        new_salt=salts_of(salted_by),
    ).close()
