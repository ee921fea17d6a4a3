"""One pass over a file, or a part of it: which sectors look as those of qcow2 structures do.

What looks like a table need not be one: a guest's disk may hold images, too. Whoever believes a run asks what
names it, and what it names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jqcow import _native
from jqcow._native import SECTOR_ALIGNMENT, SECTOR_PAIRS
from jqcow.ondisk.frame import FRAME_ALIGNMENT, FRAME_MAGIC
from jqcow.ondisk.layout import SECTOR_BYTES, round_up
from jqcow.salvage.source import LOOK_BYTES, Source

RUNS_MAX = 1 << 19
"""So many runs are kept: a file that was made to have more tells nothing."""
_POINTERS = re.compile(rb"[\x40-\xff]+")
_COUNTS = re.compile(rb"[\x13-\x16]+")
_SNAPSHOTS = re.compile(rb"\x02")
_NO_ALIGNMENT = 63


class Run(NamedTuple):
    """Neighbouring sectors that look like a table: ``offset`` and ``length`` in bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The host offset behind the last of them."""
        return self.offset + self.length


@dataclass
class Sweep:
    """What was seen.

    Attributes:
        pointers: runs that may be of L1, L2 and refcount tables.
        counts: runs that may be of refcount blocks.
        snapshots: host offsets at which a snapshot table may begin.
        frames: host offsets at which a frame of a journal may begin.
        alignments: how many sectors have offsets that are aligned so, as a power of two.
        pairs: how many sectors look like extended L2 entries.
        is_whole: False if there was more than is kept.
    """

    pointers: list[Run] = field(default_factory=list)
    counts: list[Run] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    alignments: Counter[int] = field(default_factory=Counter)
    pairs: int = 0
    is_whole: bool = True

    def take(self, data: bytes, offset: int, host_bytes: int) -> None:
        """Look at whole sectors that lie at ``offset``."""
        kinds = _native.sector_kinds(data, host_bytes)
        for pattern, runs in ((_POINTERS, self.pointers), (_COUNTS, self.counts)):
            for match in pattern.finditer(kinds):
                if pattern is _POINTERS:
                    self._count(match.group())
                first = offset + match.start() * SECTOR_BYTES
                self._add(runs, first, (match.end() - match.start()) * SECTOR_BYTES)
        for match in _SNAPSHOTS.finditer(kinds):
            self._keep(self.snapshots, offset + match.start() * SECTOR_BYTES)
        place = data.find(FRAME_MAGIC)
        while place >= 0:
            if (offset + place) % FRAME_ALIGNMENT == 0:
                self._keep(self.frames, offset + place)
            place = data.find(FRAME_MAGIC, place + 1)

    def _count(self, kinds: bytes) -> None:
        for kind, count in Counter(kinds).items():
            alignment = kind & SECTOR_ALIGNMENT
            if alignment != _NO_ALIGNMENT:
                self.alignments[alignment] += count
            if kind - alignment == SECTOR_PAIRS:
                self.pairs += count

    def _add(self, runs: list[Run], offset: int, length: int) -> None:
        if runs and runs[-1].end == offset:
            runs[-1] = Run(runs[-1].offset, runs[-1].length + length)
        elif len(runs) < RUNS_MAX:
            runs.append(Run(offset, length))
        else:
            self.is_whole = False

    def _keep(self, places: list[int], offset: int) -> None:
        if len(places) < RUNS_MAX:
            places.append(offset)
        else:
            self.is_whole = False

    def clusters(self, cluster_bytes: int, *, of: str = "pointers") -> Iterator[int]:
        """Yield the host offsets of the clusters that have a part of a run, in order."""
        seen = -1
        for run in self.counts if of == "counts" else self.pointers:
            first = max(seen + 1, run.offset // cluster_bytes)
            last = (run.end - 1) // cluster_bytes
            yield from range(first * cluster_bytes, (last + 1) * cluster_bytes, cluster_bytes)
            seen = max(seen, last)


def sweep(source: Source, parts: Iterable[tuple[int, int]] | None = None) -> Sweep:
    """Look at the parts of a file, each (offset, length), that have data; at all of it without ``parts``."""
    found = Sweep()
    for offset, length in [(0, source.size())] if parts is None else parts:
        seen = offset
        for start, count in source.data_extents(offset, length):
            place = max(seen, start - start % SECTOR_BYTES)
            end = round_up(start + count, SECTOR_BYTES)
            while place < end:
                # Windows end at their own multiples, so that no frame's start lies across two.
                stop = min(end, place - place % LOOK_BYTES + LOOK_BYTES)
                found.take(source.pread(stop - place, place), place, source.size())
                place = stop
            seen = max(seen, end)
    return found
