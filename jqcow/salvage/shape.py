"""What a file must be read as: the numbers of its header, read or inferred.

SH1. A number that the header has and that cannot be is no number: it is a damage, and what can be inferred
    takes its place. Which numbers were inferred is kept, and nothing that rests on them alone is certain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from jqcow.ondisk import layout
from jqcow.ondisk.frame import IntentOperation
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.l2 import L2Codec, codec_of, reserved_bits
from jqcow.ondisk.layout import Geometry
from jqcow.ondisk.root import JournalRange


@dataclass(frozen=True)
class Damage:
    """Something of the file that is not as it must be.

    Attributes:
        structure: such as "L2 table".
        host_offset: where it lies in the file, in bytes; None where that is not known.
        meaning: what is wrong, and what it was for, in words.
        guest_offset: of what it maps of the disk, in bytes; None where it maps nothing, or nobody knows.
        guest_length: of that in bytes.
    """

    structure: str
    host_offset: int | None
    meaning: str
    guest_offset: int | None = None
    guest_length: int = 0


DAMAGES_MAX = 4096
"""So many are told one by one: whoever has more has one damage."""


class Damages(list[Damage]):
    """Damages in the order in which they were found.

    Attributes:
        left_out: how many came when there were `DAMAGES_MAX` already.
    """

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()
        self.left_out = 0

    def append(self, damage: Damage) -> None:
        """Add a damage; one that goes on where the last one ended on the disk becomes one with it."""
        last = self[-1] if self else None
        if last is not None and _goes_on(last, damage):
            self[-1] = replace(last, guest_length=last.guest_length + damage.guest_length)
        elif len(self) < DAMAGES_MAX:
            super().append(damage)
        else:
            self.left_out += 1


def _goes_on(one: Damage, other: Damage) -> bool:
    if (one.structure, one.meaning) != (other.structure, other.meaning) or one.guest_offset is None:
        return False
    return one.guest_offset + one.guest_length == other.guest_offset


@dataclass(frozen=True)
class Shape:
    """The numbers by which a file is read.

    Attributes:
        area: the header, with inferred numbers in the place of lost ones.
        inferred: the names of those numbers, in the specification's words.
        lost: the names of those for which nothing was found, either.
        doubtful: the names of those for which others would do as well.
        damages: what is wrong with the header.
        journal: where a live journal lies; None without one, or where that is lost.
        intents: writes of the guest in a damaged journal, which the tables do not show, in their order.
    """

    area: HeaderArea
    inferred: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    doubtful: frozenset[str] = frozenset()
    damages: tuple[Damage, ...] = ()
    journal: JournalRange | None = None
    intents: tuple[IntentOperation, ...] = ()

    def resized(self, size: int) -> Shape:
        """Return the shape with a better size of the disk, in bytes, where the header's is lost."""
        if "size" not in self.inferred | self.lost or size == self.area.header.size:
            return self
        geometry = self.geometry
        entry_count = min(geometry.l1_entries_for(size), layout.MAX_L1_ENTRIES)
        header = replace(self.area.header, size=size, l1_size=max(entry_count, self.area.header.l1_size))
        return replace(self, area=self.area.with_header(header))

    @cached_property
    def geometry(self) -> Geometry:
        """Sizes that follow from the header."""
        return self.area.header.geometry

    @cached_property
    def codec(self) -> L2Codec:
        """How L2 tables are read."""
        return codec_of(self.geometry)

    @cached_property
    def reserved(self) -> int:
        """Bits that no standard L2 entry, or first word of an extended one, has set."""
        return reserved_bits(self.geometry)
