"""A disk of which all is lost, for what places orphans."""

from __future__ import annotations

from dataclasses import dataclass, field

from jqcow.salvage.evidence import Placement


@dataclass
class LostDisk:
    """A disk of which all is lost, and what was placed of it."""

    size: int = 1 << 30
    placed: dict[int, Placement] = field(default_factory=dict)

    def is_open(self, guest_offset: int) -> bool:
        return 0 <= guest_offset < self.size

    def is_placed(self, guest_offset: int) -> bool:
        return guest_offset in self.placed

    def place(self, placement: Placement) -> bool:
        known = self.placed.get(placement.guest_offset)
        if known is not None and known.certainty >= placement.certainty:
            return False
        self.placed[placement.guest_offset] = placement
        return True
