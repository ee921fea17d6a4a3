"""Where garbage may come from: which writes in flight are metadata homes, journal, or sector 0.

In garbage mode a power cut tears a whole 4 KiB block, also the parts of it that were not written. jqcow
survives that for its own in-place writes, with clusters larger than 4 KiB; not for the guest's data, and
not for the root copy, which is what sector 0 is rebuilt from.
"""

from __future__ import annotations

from jqcow.ondisk.frame import FRAME_MAGIC
from jqcow.testing import SimulatedDevice, Write
from jqcow.testing.crash import GARBAGE_BLOCK_BYTES
from tests.support.inside import Range, metadata_ranges


class GarbageRule:
    """The rule for a laboratory: ``rule(offset, length)`` about a write in flight on the device that runs.

    `follow` each device before it is used; the rule then reads off its content what lies where. What it
    cannot place is left alone.
    """

    def __init__(self) -> None:
        self._device: SimulatedDevice | None = None
        self._key: tuple[int, int] = (0, 0)
        self._allowed: list[Range] = []

    def follow(self, device: SimulatedDevice) -> None:
        """Take ``device`` as the one that runs, from its next change on."""
        self._device = device
        device.change_listeners.append(self._changing)

    def _changing(self, call: str, device: SimulatedDevice) -> None:
        self._device = device

    def __call__(self, offset: int, length: int) -> bool:
        """Return True if the blocks under a write may come back as garbage."""
        device = self._device
        if device is None:
            return False
        changes = device.changes
        key = (id(device), changes[-1].number if changes else 0)
        if key != self._key:
            self._key, self._allowed = key, metadata_ranges(device) + _new_ranges(device)
        start = offset - offset % GARBAGE_BLOCK_BYTES
        end = -(-(offset + length) // GARBAGE_BLOCK_BYTES) * GARBAGE_BLOCK_BYTES
        return end <= GARBAGE_BLOCK_BYTES or any(low <= start and end <= high for low, high in self._allowed)


def _new_ranges(device: SimulatedDevice) -> list[Range]:
    """Return what is being laid as a new journal: a large write of zeros, with a frame inside."""
    writes = [change for change in device.changes if isinstance(change, Write)]
    frames = [write for write in writes if write.data[: len(FRAME_MAGIC)] == FRAME_MAGIC]
    return [
        (write.offset, write.end)
        for write in writes
        if any(write.offset <= frame.offset and frame.end <= write.end for frame in frames)
    ]
