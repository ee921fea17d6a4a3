"""The copy of a damaged disk into a target, window by window, with a state from time to time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from jqcow.device.base import Device
from jqcow.offline.compare import Progress
from jqcow.offline.salvaging.parts import Part
from jqcow.offline.salvaging.report import RangeReport
from jqcow.offline.salvaging.state import SalvageState
from jqcow.offline.salvaging.targets import WINDOW_BYTES, Target, fill_window
from jqcow.salvage.amounts import Amounts
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.ranges import Ranges

SAVE_SECONDS = 15.0
"""So much work is lost at most where a salvage is cut off."""

Save = Callable[[SalvageState], None]


class Copying:
    """Copies the parts of a disk, which come in order.

    Attributes:
        position: the guest offset up to which the target is written.
        amounts: what the disk came to so far.
    """

    def __init__(
        self,
        target: Target,
        device: Device,
        report: RangeReport | None,
        *,
        size: int,
        bad: Ranges,
        begin: SalvageState,
        save: Save,
        save_seconds: float = SAVE_SECONDS,
    ) -> None:
        """Write a disk of ``size`` bytes into ``target``, which is on ``device``.

        ``begin`` is where to go on; ``save`` makes a state durable; ``bad`` is what of the source is.
        """
        self._target, self._device, self._report = target, device, report
        self._size, self._bad, self._begin, self._save = size, bad, begin, save
        self._save_seconds, self._saved_at = save_seconds, time.monotonic()
        self._window_bytes = max(WINDOW_BYTES, target.unit)
        self._pending: list[Part] = []
        self.position = begin.position
        self.amounts = Amounts(**begin.amounts)

    def run(self, parts: Iterable[Part], progress: Progress) -> None:
        """Copy all parts, then write what the target still lacks.

        Raises:
            OSError: the host failed; what is saved can be gone on with.
        """
        progress(self.position, self._size)
        for part in parts:
            self._take(part)
            progress(self.position, self._size)
        self._flush(self._size)
        self._target.finish()
        progress(self._size, self._size)

    @property
    def written_bytes(self) -> int:
        """Bytes of data in the target."""
        return self._begin.written_bytes + self._target.written_bytes

    def _take(self, part: Part) -> None:
        unit = self._target.unit
        while part.length:
            reached = self._pending[-1].end if self._pending else self.position
            if not self._pending and part.content is None:
                end = part.end if part.end == self._size else part.end - part.end % unit
                if end > part.offset:
                    self._skip(part.cut(part.offset, end))
                    part = part.cut(end, part.end)
                    continue
            end = self.position + self._window_bytes
            if part.content is None:
                # What has no bytes fills the unit that was begun, and no more.
                end = min(end, -(-(reached + 1) // unit) * unit)
            end = min(end, self._size)
            self._pending.append(part.cut(part.offset, min(end, part.end)))
            if part.end < end:
                return
            self._flush(end)
            part = part.cut(end, part.end)

    def _skip(self, part: Part) -> None:
        self._target.skip(part)
        self._told(part)
        self._reached(part.end)

    def _flush(self, end: int) -> None:
        if not self._pending:
            return
        window = bytearray(end - self.position)
        fill_window(memoryview(window), self.position, self._pending)
        self._target.take(memoryview(window), self.position, self._pending)
        for part in self._pending:
            self._told(part)
        self._pending = []
        self._reached(end)

    def _told(self, part: Part) -> None:
        # What is shown for want of anything else is not what a table leaves to the backing disk.
        is_supposed = part.kind == "below" and part.certainty == Certainty.GUESS
        kind = "data" if is_supposed else part.kind
        self.amounts.take(kind, part.certainty or Certainty.GUESS, part.length)
        if self._report is not None:
            self._report.add(part)

    def _reached(self, position: int) -> None:
        self.position = position
        if time.monotonic() - self._saved_at >= self._save_seconds and position < self._size:
            self.save()
            self._saved_at = time.monotonic()

    def save(self) -> None:
        """Make what is written durable, and then the state that says so (Z1)."""
        # Durable now: what the state says of the target is there before the state says so.
        self._device.barrier("salvage.target")
        self._save(
            SalvageState(
                self._begin.plan,
                self.position,
                list(self._bad),
                dict(vars(self.amounts)),
                self.written_bytes,
                self._target.state(),
                None if self._report is None else self._report.state(),
            )
        )
