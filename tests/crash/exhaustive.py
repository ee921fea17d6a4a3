"""The exhaustive search: every short sequence of operations, cut in every barrier interval.

The sequences are a tree: without its last operation a sequence is one of the search too. So a sequence is cut
only where its last operation adds something: at each barrier within it, and at its end, before any close.

    X1  Every barrier of every sequence is cut, once: within some operation, and so in the sequence that ends
        with it. So is the end of every operation.
    X2  A cut at a barrier covers all moments since the barrier before: what is in flight only grows until a
        barrier completes, and a crash state takes any version of each sector.
    X3  What may be expected grows alike. So the end of each operation is cut on its own, before the next one
        adds what it asks for; within an operation what it asks for may be there.
    X4  The same state with the same expectation is judged once. The verdict depends on nothing else.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from jqcow.testing import (
    CrashFailure,
    CrashState,
    InFlight,
    LabOptions,
    Laboratory,
    LabReport,
    SectorModel,
    SimulatedDevice,
    Workload,
)
from tests.crash.exhaustive_operations import OPERATIONS, Places, start
from tests.crash.judge import Judge, judge_closed, recover_and_close
from tests.support.expectation import SECTOR_BYTES, Expectation
from tests.support.runs import Outcome, run_parts, table
from tests.support.users import Session

STATES_MAX = 128
NESTED_SEQUENCES_EVERY = 16
"""Of one sequence in so many the recovery is crashed too, after a killed writer and after..."""
NESTED_STATES_EVERY = 16
"""... one state in so many of an interval, in..."""
NESTED_STATES_MAX = 8
"""... so many states of each interval of the recovery."""
SEED = 1
FIRST_WRITE = 1 << 16
"""The writes of a sequence are numbered from here, so that they differ from those of the start image."""

Sequence = tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What to search.

    ``depth``          the longest sequence
    ``cluster_bytes``  of the image
    ``only``           the operations to take; none: all
    ``having``         a sequence must have one of these; none: it need not
    ``part``           (k, n): the kth of n parts of the sequences, which are equal up to chance
    ``states``         of an interval, at most: all if it has no more, else a sample of so many
    ``qemu_every``     one state in so many is shown to QEMU too; 0: none
    """

    depth: int = 3
    cluster_bytes: int = 1024
    only: Sequence = ()
    having: Sequence = ()
    part: tuple[int, int] = (1, 1)
    states: int = STATES_MAX
    qemu_every: int = 400
    jobs: int = 2

    @property
    def operations(self) -> Sequence:
        """The names of the operations, in the order of the table."""
        return tuple(name for name in OPERATIONS if not self.only or name in self.only)

    def sequences(self) -> Iterator[Sequence]:
        """Yield the sequences of this plan, shorter ones first."""
        for length in range(1, self.depth + 1):
            for sequence in itertools.product(self.operations, repeat=length):
                if self.having and not set(self.having) & set(sequence):
                    continue
                if _token(sequence) // NESTED_SEQUENCES_EVERY % self.part[1] == self.part[0] - 1:
                    yield sequence


def _token(sequence: Sequence) -> int:
    """Return a number by which sequences are drawn, with no regard to their place in the order."""
    return int.from_bytes(blake2b("+".join(sequence).encode(), digest_size=8).digest(), "big")


class OnceJudge:
    """Judges a state with an expectation once (X4)."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.repeated = 0
        self._seen: set[bytes] = set()

    def __call__(self, device: SimulatedDevice, expectation: Expectation, state: CrashState) -> None:
        """Judge, as `Judge` does; what was accepted before is accepted."""
        key = fingerprint(expectation, state)
        if key in self._seen:
            self.repeated += 1
            return
        self.judge(device, expectation, state)
        self._seen.add(key)


def fingerprint(expectation: Expectation, state: CrashState) -> bytes:
    """Return what tells apart everything that a verdict depends on."""
    rival = expectation.rival
    parts: list[object] = [
        state.digest,
        state.kind == "killed",
        expectation.sizes,
        expectation.exists,
        expectation.closed,
        expectation.lost,
        expectation.vouched,
        expectation.extensions,
        expectation.renamed,
        expectation.forms,
        rival and rival.size_bytes,
        _versions(expectation.sectors),
        rival and _versions(rival.sectors),
    ]
    for snapshots in (expectation.snapshots, rival.snapshots if rival else ()):
        parts.append([(taken.name, taken.size_bytes, _versions(taken.sectors)) for taken in snapshots])
    for bitmaps in (expectation.bitmaps, rival.bitmaps if rival else ()):
        parts.append(
            [(noted.name, noted.is_enabled, noted.sectors and _versions(noted.sectors)) for noted in bitmaps]
        )
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def _versions(sectors: SectorModel) -> list[tuple[bytes, ...]]:
    return [sectors.versions(offset) for offset in range(0, sectors.size_bytes, SECTOR_BYTES)]


class Run:
    """One sequence, from the start image on; the laboratory watches the last operation."""

    def __init__(self, sequence: Sequence, cluster_bytes: int, drop_barriers: Iterable[str] = ()) -> None:
        """Take a sequence; ``drop_barriers`` do nothing from its start on."""
        self.sequence = sequence
        self.cluster_bytes = cluster_bytes
        self.drop_barriers = set(drop_barriers)

    @property
    def name(self) -> str:
        """The sequence with the cluster size: where a replay line starts."""
        return f"{self.cluster_bytes}/{'+'.join(self.sequence)}"

    @property
    def workload(self) -> Workload[Expectation]:
        """The sequence as a workload. The laboratory asks for the model first, and then for the device."""
        return Workload(self.name, self.last_operation, self.before_last, lambda: self.session.device)

    def before_last(self) -> Expectation:
        """Run all but the last operation; return what may be expected then."""
        image = start(self.cluster_bytes)
        device = image.device()
        device.drop_barriers |= self.drop_barriers
        self.session = Session(device, image.expectation(), written=FIRST_WRITE)
        self.session.open()
        self.places = Places(self.session)
        for name in self.sequence[:-1]:
            OPERATIONS[name](self.places)
        return self.session.expectation

    def last_operation(self, device: SimulatedDevice, expectation: Expectation) -> None:
        """Run the last operation; afterwards the running image is right."""
        OPERATIONS[self.sequence[-1]](self.places)
        self.session.look()

    def close(self) -> None:
        """Close after the last power cut; the file is exact standard qcow2."""
        self.session.close()
        judge_closed(self.session.device, self.session.expectation)


def state_count(moment: InFlight) -> int:
    """Return how many states a crash may leave: a value of each sector, and a size."""
    values = [len({version.value for version in history}) for history in moment.histories.values()]
    return math.prod(values) * len({size for _, size in moment.sizes})


class Search:
    """Runs sequences of a plan, one after another, with all their crashes."""

    def __init__(self, plan: Plan) -> None:
        """Start with nothing judged."""
        self.plan = plan
        self.outcome = Outcome()
        self._judge = OnceJudge(Judge(qemu_every=plan.qemu_every))

    def run(self, sequence: Sequence, *, drop_barriers: Iterable[str] = ()) -> None:
        """Run a sequence. Raises CrashFailure, or what the sequence itself raises."""
        run = Run(sequence, self.plan.cluster_bytes, drop_barriers)
        crash_recovery = _token(sequence) % NESTED_SEQUENCES_EVERY == 0
        self._laboratory(crash_recovery=crash_recovery).run(self._counting(run))
        self._count(run.session.device)
        run.close()
        self.outcome.counts.update(("sequences", f"sequences of {len(sequence)}"))
        self.outcome.counts["known with the same expectation"] = self._judge.repeated
        self.outcome.counts["judged by QEMU too"] = self._judge.judge.qemu_judged

    def replay(self, line: str, *, drop_barriers: Iterable[str] = ()) -> None:
        """Judge the state of a replay line again, or run the sequence whose name is all of the line.

        Raises as `run` does, and ``ValueError`` for a line of no state.
        """
        name = line.split(" ", maxsplit=1)[0]
        sequence = tuple(name.split("/", maxsplit=1)[1].split("+"))
        if name == line:
            self.run(sequence, drop_barriers=drop_barriers)
            return
        workload = Run(sequence, self.plan.cluster_bytes, drop_barriers).workload
        self._laboratory(crash_recovery=True).replay(workload, line)

    def _laboratory(self, *, crash_recovery: bool) -> Laboratory[Expectation]:
        options = LabOptions(
            budget=self.plan.states,
            seed=SEED,
            depth=2,
            nested_every=NESTED_STATES_EVERY,
            nested_budget=NESTED_STATES_MAX,
            kill=True,
        )
        recover = recover_and_close if crash_recovery else None
        return Laboratory(self._judge, recover=recover, options=options, ledger=self.outcome.ledger)

    def _counting(self, run: Run) -> Workload[Expectation]:
        """Return the workload of a run that counts its intervals, whole ones and sampled ones."""
        workload = run.workload

        def counted(device: SimulatedDevice, expectation: Expectation) -> None:
            device.barrier_listeners.append(lambda name, device: self._count(device))
            workload.run(device, expectation)
            device.barrier_listeners.pop()

        return Workload(workload.name, counted, workload.make_model, workload.make_device)

    def _count(self, device: SimulatedDevice) -> None:
        is_whole = state_count(device.in_flight()) <= self.plan.states
        self.outcome.counts["intervals judged in all their states" if is_whole else "intervals sampled"] += 1


def search_group(plan: Plan, sequences: list[Sequence]) -> Outcome:
    """Run sequences; whatever one of them raises is a failure, and the next one is run."""
    search = Search(plan)
    for sequence in sequences:
        try:
            search.run(sequence)
        except CrashFailure as failure:
            search.outcome.failures.append(str(failure))
        except Exception as error:
            name = Run(sequence, plan.cluster_bytes).name
            search.outcome.failures.append(f"{type(error).__name__}: {error}\n  replay:   {name}")
    return search.outcome


def run_search(plan: Plan) -> Iterator[Outcome]:
    """Run all sequences of a plan, or until ten failed; yield the running total after each group of them."""
    # What begins alike meets the same states most often.
    groups: dict[Sequence, list[Sequence]] = {}
    for sequence in plan.sequences():
        groups.setdefault(sequence[:1], []).append(sequence)
    return run_parts(functools.partial(search_group, plan), groups.values(), plan.jobs)


def format_operations(report: LabReport) -> Iterable[str]:
    """Yield a table: for each operation, the sequences that end with it and give states, and the states."""
    sequences, states = Counter[str](), Counter[str]()
    for row in report.workloads:
        last = row.name.split("/", maxsplit=1)[1].split("+")[-1]
        sequences[last] += 1
        states[last] += row.judged
    rows = ((name, sequences[name], states[name]) for name in OPERATIONS if name in sequences)
    return table(("last operation", "giving states", "states"), rows)


def format_intervals(report: LabReport) -> Iterable[str]:
    """Yield a table of the barrier intervals; ``start`` is where the last operation begins."""
    rows = ((row.name, row.occurrences, row.judged, row.distinct) for row in report.intervals)
    return table(("barrier interval", "met", "states", "distinct"), rows)


def totals_of(total: Outcome) -> dict[str, float]:
    """Return the sums by their names."""
    report, counts = total.ledger.report(), dict(total.counts)
    return {
        "sequences": counts.pop("sequences"),
        "distinct states": report.distinct_states,
        "judged": report.judged_states,
        "quiet": report.quiet_states,
        "broken": len(total.failures),
        **dict(sorted(counts.items())),
        "seconds": round(total.seconds),
    }
