"""What a check finds, counted by kind."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field

KEPT_FINDINGS = 100


class Kind(enum.StrEnum):
    """What is wrong; the values are for people and JSON."""

    LEAK = "leak"
    LOST_DATA = "lost data?"
    LEAK_PAST_END = "leak past the end of the file"
    REFCOUNT_TOO_LOW = "refcount too low"
    COPIED_FLAG = "wrong COPIED flag"
    NO_REFCOUNT_TABLE = "no refcount table"
    PAST_END = "past the end of the file"
    UNALIGNED = "unaligned offset"
    RESERVED_BITS = "reserved bits set"
    SUBCLUSTERS = "wrong bitmap of subclusters"
    OVERLAP = "overlap"
    RESERVED_RANGE = "entry into a reserved range"
    L1_TOO_SMALL = "L1 table too small"
    L1_TOO_LARGE = "L1 table too large"
    INCOMPLETE_SNAPSHOT = "incomplete snapshot"
    TOO_MANY_REFERENCES = "more references than a refcount can count"
    HEADER = "damaged header"
    BITMAPS = "damaged bitmap"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    ``structure`` names what holds the wrong value, in the specification's words; ``offset`` is its host
    offset in bytes (of the entry in a table, of the cluster for a leak or a wrong refcount).
    """

    kind: Kind
    structure: str
    offset: int
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.structure} at {self.offset:#x}: {self.detail}"


@dataclass
class Findings:
    """Counts all findings and keeps the first."""

    counts: Counter[Kind] = field(default_factory=Counter)
    kept: list[Finding] = field(default_factory=list)

    def add(self, kind: Kind, structure: str, offset: int, detail: str, count: int = 1) -> None:
        self.counts[kind] += count
        if len(self.kept) < KEPT_FINDINGS:
            self.kept.append(Finding(kind, structure, offset, detail))
