"""Runs of clusters placed by one sum of several clusters, where clusters are smaller than units.

A sum is linear: that of a unit is the XOR of what each of its clusters adds where it lies. So the sum of
each run of neighbours in the file, at each place within a unit of which the rest is zeros, costs one XOR.

UR1. A run is certain in a unit if no other content has that sum, and chance is ruled out as in sums.py (SU1):
    each cluster is tried at many places, and each of these counts.
UR2. What is left is tried as units of two runs, zeros between them or not: the sum of one leaves that of the
    other. There are many pairs, so none of these is certain.
UR3. What of a unit is not open must be certain: it is left out of the sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from jqcow import _native
from jqcow.ondisk.protection import sum_of, zeros_crc
from jqcow.salvage.evidence import BlockSum, Certainty, Orphans, PlacedDisk, Placement
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.sums import CHANCE_MAX

MAX_PAIRS = 1 << 22
"""So many runs are tried as the first of two, each with each unit."""
MAX_RIVALS = 8
"""Of so many runs that have the sum of one unit the contents are compared."""


@dataclass(frozen=True)
class _Run:
    """Neighbours in the file that have the sum of a unit from its cluster ``first`` on."""

    host: int
    first: int
    count: int
    value: int


class _Shifts:
    """What a cluster adds to the sum of a unit, by its place in the unit."""

    def __init__(self, cluster_bytes: int, count: int) -> None:
        self._cluster_bytes = cluster_bytes
        # Bytes are taken from the last to the first: those before a cluster come behind it.
        self._behind = [bytes(place * cluster_bytes) for place in range(count)]
        self._nothing = [_native.crc32c(zeros) for zeros in self._behind]

    def of(self, content: bytes) -> list[int]:
        """Return what a cluster adds at each place."""
        value = sum_of(content, self._cluster_bytes)
        pairs = zip(self._behind, self._nothing, strict=True)
        return [_native.crc32c(zeros, value) ^ nothing for zeros, nothing in pairs]


class UnitRuns:
    """Finds runs of clusters by sums of units, each of which has several clusters."""

    def __init__(
        self,
        guest_map: GuestMap,
        disk: PlacedDisk,
        cluster_bytes: int,
        unit_bytes: int,
        witness: str,
        most: Certainty,
    ) -> None:
        """Look for places that are open in ``guest_map``, of ``disk``; none will be surer than ``most``."""
        self._map, self._cluster_bytes, self._unit_bytes = guest_map, cluster_bytes, unit_bytes
        self._disk = disk
        self._shifts = _Shifts(cluster_bytes, unit_bytes // cluster_bytes)
        self._witness, self._most = witness, most
        self._units: dict[int, list[int]] = defaultdict(list)
        self._unit_count = 0

    def add(self, block_sum: BlockSum) -> None:
        """Take the sum of a unit, by its guest offset; one of which nothing is open is left out."""
        end = min(block_sum.guest_offset + self._unit_bytes, self._map.size)
        clusters = range(block_sum.guest_offset, end, self._cluster_bytes)
        known = [offset for offset in clusters if not self._map.is_open(offset)]
        if len(known) == len(clusters):
            return
        value = block_sum.crc32c ^ zeros_crc(self._unit_bytes)
        for offset in known:
            content = self._disk.read(offset, min(self._cluster_bytes, self._map.size - offset))
            if content is None:
                return
            value ^= self._shifts.of(content)[(offset - block_sum.guest_offset) // self._cluster_bytes]
        self._units[value].append(block_sum.guest_offset)
        self._unit_count += 1

    def placements(self, orphans: Orphans) -> Iterator[Placement]:
        """Yield where orphans belong."""
        if not self._units:
            return
        found: dict[int, list[_Run]] = defaultdict(list)
        tried, matched = 0, set[int]()
        for run, trials in self._tried(orphans):
            tried += trials
            if run is not None:
                found[run.value].append(run)
                matched.update(self._hosts(run))
        placed = self._placed(found)
        is_few = (tried - len(matched)) * (self._unit_count - len(placed)) <= CHANCE_MAX
        starts = {self._ends(guest, run)[0] for guest, run in placed.items()}
        stops = {self._ends(guest, run)[1] for guest, run in placed.items()}
        for guest, run in placed.items():
            start, stop = self._ends(guest, run)
            is_ruled_out = is_few or start in stops or stop in starts
            is_certain = is_ruled_out and self._is_one(found[run.value], placed, orphans)
            certainty = min(self._most, Certainty.CERTAIN if is_certain else Certainty.LIKELY)
            for host, offset in zip(
                self._hosts(run), range(start[1], stop[1], self._cluster_bytes), strict=True
            ):
                yield Placement(offset, host, self._cluster_bytes, certainty, self._witness)
        yield from self._in_two(orphans, placed)

    def _ends(self, guest: int, run: _Run) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the (host offset, guest offset) where a run in a unit begins, and where it ends."""
        offset, length = guest + run.first * self._cluster_bytes, run.count * self._cluster_bytes
        return (run.host, offset), (run.host + length, offset + length)

    def _tried(self, orphans: Orphans) -> Iterator[tuple[_Run | None, int]]:
        """Yield the runs that have the sum of a unit, and how often one was looked for."""
        cluster_bytes, units = self._cluster_bytes, self._units
        for host, longer in self._sums(orphans):
            for length, values in enumerate(longer, 1):
                for place, value in enumerate(values):
                    if value in units:
                        yield _Run(host - (length - 1) * cluster_bytes, place, length, value), 0
            yield None, sum(map(len, longer))

    def _sums(self, orphans: Orphans, taken: Container[int] = ()) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield each host offset, and the sums of the runs that end there, by length and place in a unit."""
        cluster_bytes = self._cluster_bytes
        count = self._unit_bytes // cluster_bytes
        before, last = list[list[int]](), -1
        for host, content in orphans:
            if host in taken:
                continue
            adds = self._shifts.of(content)
            longer = [adds]
            if last + cluster_bytes == host:
                # One more cluster: each run before it, one place further on.
                longer += [
                    [one ^ other for one, other in zip(values, adds[length:], strict=True)]
                    for length, values in enumerate((values[:-1] for values in before[: count - 1]), 1)
                ]
            yield host, longer
            before, last = longer, host

    def _in_two(self, orphans: Orphans, placed: dict[int, _Run]) -> Iterator[Placement]:
        """Yield where the clusters belong of units that are two runs (UR2)."""
        missed = [
            (value, guest) for value, found in self._units.items() for guest in found if guest not in placed
        ]
        taken = {host for run in placed.values() for host in self._hosts(run)}
        if not missed:
            return
        firsts, likely = list[_Run](), min(self._most, Certainty.LIKELY)
        seconds: dict[tuple[int, int], _Run] = {}
        for host, longer in self._sums(orphans, taken):
            for length, values in enumerate(longer, 1):
                start = host - (length - 1) * self._cluster_bytes
                for place, value in enumerate(values):
                    run = _Run(start, place, length, value)
                    if place:
                        seconds.setdefault((place, value), run)
                    else:
                        firsts.append(run)
            if len(firsts) * len(missed) > MAX_PAIRS:
                return
        for value, guest in missed:
            for first in firsts:
                rest, places = (
                    value ^ first.value,
                    range(first.count, self._unit_bytes // self._cluster_bytes),
                )
                second = next(filter(None, (seconds.get((place, rest)) for place in places)), None)
                hosts = set(self._hosts(first)) | set(self._hosts(second) if second is not None else ())
                if second is None or hosts & taken or len(hosts) < first.count + second.count:
                    continue
                taken |= hosts
                for run in (first, second):
                    start = self._ends(guest, run)[0][1]
                    for number, host in enumerate(self._hosts(run)):
                        offset = start + number * self._cluster_bytes
                        yield Placement(offset, host, self._cluster_bytes, likely, self._witness)
                break

    def _placed(self, found: dict[int, list[_Run]]) -> dict[int, _Run]:
        """Return a run for each unit, none of which shares a cluster with another."""
        placed: dict[int, _Run] = {}
        taken: set[int] = set()
        for value, runs in sorted(found.items(), key=lambda item: -max(run.count for run in item[1])):
            waiting = sorted(self._units[value], reverse=True)
            for run in sorted(runs, key=lambda run: (-run.count, run.host)):
                hosts = set(self._hosts(run))
                if waiting and not hosts & taken:
                    placed[waiting.pop()] = run
                    taken |= hosts
        return placed

    def _hosts(self, run: _Run) -> Iterable[int]:
        return range(run.host, run.host + run.count * self._cluster_bytes, self._cluster_bytes)

    def _is_one(self, rivals: list[_Run], placed: dict[int, _Run], orphans: Orphans) -> bool:
        """Return True if all runs of one sum have one content, and there is one for each unit of that sum."""
        if any(guest not in placed for guest in self._units[rivals[0].value]):
            return False
        contents = {self._content(run, orphans) for run in rivals[:MAX_RIVALS]}
        return len(contents) == 1

    def _content(self, run: _Run, orphans: Orphans) -> bytes:
        hosts = self._hosts(run)
        before = bytes(run.first * self._cluster_bytes)
        return (before + b"".join(orphans.read(host) for host in hosts)).ljust(self._unit_bytes, b"\0")
