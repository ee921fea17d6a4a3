"""Counting crash states: which were judged, how many differ, and where they came from.

A state counts if a change was in flight. States are told apart by their digest, so the same bytes count once,
however they came about. Ledgers of several processes can be merged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class IntervalRow:
    """One barrier interval of the code: how often it was met, and the states that it gave.

    ``judged`` counts all states with a change in flight; ``distinct`` those with different bytes.
    """

    name: str
    occurrences: int
    judged: int
    distinct: int


@dataclass(frozen=True, slots=True)
class WorkloadRow:
    """One workload and its distinct states; ``share`` is their part of all distinct states, 0 to 1."""

    name: str
    judged: int
    distinct: int
    share: float


@dataclass(frozen=True, slots=True)
class LabReport:
    """The result of a campaign. ``quiet_states`` were judged with nothing in flight and do not count."""

    judged_states: int
    distinct_states: int
    quiet_states: int
    intervals: tuple[IntervalRow, ...]
    workloads: tuple[WorkloadRow, ...]
    barriers: tuple[tuple[str, int], ...]

    @property
    def largest_share(self) -> float:
        """The part of the distinct states that the largest workload gave, 0 to 1."""
        return max((row.share for row in self.workloads), default=0.0)

    def format_table(self) -> str:
        """Return the report as lines of text: intervals, workloads, totals."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        names = [interval.name for interval in self.intervals] + [row.name for row in self.workloads]
        width = max(map(len, ["barrier interval", *names]))
        yield f"{'barrier interval':<{width}}  {'met':>8}  {'judged':>9}  {'distinct':>9}"
        for interval in self.intervals:
            yield (
                f"{interval.name:<{width}}  {interval.occurrences:>8,}  "
                f"{interval.judged:>9,}  {interval.distinct:>9,}"
            )
        yield ""
        yield f"{'workload':<{width}}  {'share':>8}  {'judged':>9}  {'distinct':>9}"
        for workload in self.workloads:
            yield (
                f"{workload.name:<{width}}  {workload.share:>8.2%}  "
                f"{workload.judged:>9,}  {workload.distinct:>9,}"
            )
        yield ""
        yield (
            f"{self.distinct_states:,} distinct crash states with a change in flight "
            f"({self.judged_states:,} judged, and {self.quiet_states:,} quiet ones)"
        )


@dataclass
class _Tally:
    judged: int = 0
    digests: set[bytes] = field(default_factory=set)

    def merge(self, other: _Tally) -> None:
        self.judged += other.judged
        self.digests |= other.digests


class Ledger:
    """The running count of a campaign. It can be pickled, and merged with that of another process."""

    def __init__(self) -> None:
        self._digests: dict[bytes, bytes] = {}
        self._intervals: dict[str, _Tally] = {}
        self._workloads: dict[str, _Tally] = {}
        self._occurrences: Counter[str] = Counter()
        self._barriers: Counter[str] = Counter()
        self._quiet_states = 0

    def enter_interval(self, interval: str) -> None:
        """Count one occurrence of an interval."""
        self._occurrences[interval] += 1

    def barrier(self, name: str) -> None:
        """Count one call of a barrier."""
        self._barriers[name] += 1

    def record(self, workload: str, interval: str, digest: bytes, *, in_flight: bool) -> None:
        """Count one judged state."""
        if not in_flight:
            self._quiet_states += 1
            return
        digest = self._digests.setdefault(digest, digest)
        for tally in (
            self._intervals.setdefault(interval, _Tally()),
            self._workloads.setdefault(workload, _Tally()),
        ):
            tally.judged += 1
            tally.digests.add(digest)

    def distinct_of(self, workload: str) -> int:
        """Return how many distinct states a workload has given."""
        tally = self._workloads.get(workload)
        return len(tally.digests) if tally else 0

    def merge(self, other: Ledger) -> None:
        """Add the counts of another ledger."""
        self._digests |= other._digests
        for mine, theirs in ((self._intervals, other._intervals), (self._workloads, other._workloads)):
            for name, tally in theirs.items():
                mine.setdefault(name, _Tally()).merge(tally)
        self._occurrences.update(other._occurrences)
        self._barriers.update(other._barriers)
        self._quiet_states += other._quiet_states

    def report(self) -> LabReport:
        """Return the counts so far; intervals and workloads by name."""
        distinct = len(self._digests)
        return LabReport(
            judged_states=sum(tally.judged for tally in self._intervals.values()),
            distinct_states=distinct,
            quiet_states=self._quiet_states,
            intervals=tuple(self._interval_row(name) for name in sorted(self._occurrences)),
            workloads=tuple(
                WorkloadRow(name, tally.judged, len(tally.digests), len(tally.digests) / distinct)
                for name, tally in sorted(self._workloads.items())
            ),
            barriers=tuple(sorted(self._barriers.items())),
        )

    def _interval_row(self, name: str) -> IntervalRow:
        tally = self._intervals.get(name, _Tally())
        return IntervalRow(name, self._occurrences[name], tally.judged, len(tally.digests))
