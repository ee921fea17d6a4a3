"""The crash campaign: workload after workload, on several processes, until enough states are judged."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field

from jqcow.testing import CrashFailure, LabOptions, Laboratory, LabReport, Ledger
from tests.support.judge import Judge, recover_and_close
from tests.support.sources import engine_barrier_names
from tests.support.workloads import FAMILIES, workload_named

MAX_SHARE = 0.01
MIN_WORKLOADS = 150
BUDGET = 120
NESTED_EVERY = 40
NESTED_BUDGET = 4


@dataclass(frozen=True)
class Plan:
    """What a campaign aims at: ``states`` distinct ones; one in ``qemu_every`` is judged by QEMU too."""

    states: int = 200_000
    seed: int = 1
    jobs: int = 2
    only: tuple[str, ...] = ()
    qemu_every: int = 80

    @property
    def budget(self) -> int:
        """States of one interval."""
        return min(BUDGET, max(2, self.states // 1000))

    def names(self) -> Iterator[str]:
        """Yield workload names without end: every family in every cluster size, seed after seed."""
        for seed in itertools.count(self.seed):
            for family in FAMILIES.values():
                if not self.only or family.name in self.only:
                    for cluster_bytes in family.cluster_sizes:
                        yield f"{family.name}/{cluster_bytes}/{seed}"


@dataclass
class Outcome:
    """What came of a campaign, or of one workload of it."""

    ledger: Ledger = field(default_factory=Ledger)
    failures: list[str] = field(default_factory=list)
    workloads: int = 0
    qemu_judged: int = 0
    seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        """Take the outcome of another workload in."""
        self.ledger.merge(other.ledger)
        self.failures += other.failures
        self.workloads += other.workloads
        self.qemu_judged += other.qemu_judged


def laboratory(plan: Plan, name: str, judge: Judge) -> Laboratory:  # type: ignore[type-arg]
    """Return the laboratory in which a workload runs; a replay needs the same."""
    family = FAMILIES[name.split("/", maxsplit=1)[0]]
    options = LabOptions(
        budget=max(2, math.ceil(plan.budget * family.weight)),
        seed=plan.seed,
        depth=2,
        nested_every=NESTED_EVERY,
        nested_budget=NESTED_BUDGET,
        kill=True,
        # A little less than is allowed: the total may end a little below what is still running.
        target_states=max(plan.states, 2000),
        max_share=MAX_SHARE * 0.9,
    )
    return Laboratory(judge, recover=recover_and_close, options=options)


def run_workload(plan: Plan, name: str) -> Outcome:
    """Run one workload with all its crashes."""
    judge = Judge(qemu_every=plan.qemu_every)
    running = laboratory(plan, name, judge)
    outcome = Outcome(ledger=running.ledger, workloads=1)
    try:
        running.run(workload_named(name))
    except CrashFailure as failure:
        outcome.failures.append(f"{failure}\n  campaign: --seed {plan.seed} --states {plan.states}")
    except Exception as error:
        outcome.failures.append(f"{type(error).__name__}: {error}\n  workload: {name} itself, no crash")
    outcome.qemu_judged = judge.qemu_judged
    return outcome


def replay(plan: Plan, line: str) -> None:
    """Judge one state again. Raises CrashFailure if it is still not accepted."""
    name = line.split(" ", maxsplit=1)[0]
    laboratory(plan, name, Judge(qemu_every=1)).replay(workload_named(name), line)


def run_campaign(plan: Plan) -> Iterator[Outcome]:
    """Run workloads until the plan is met or a round of them failed; yield the running total after each."""
    total = Outcome()
    started = time.monotonic()
    names = plan.names()
    with ProcessPoolExecutor(plan.jobs) as pool:
        running: set[Future[Outcome]] = set()
        while not _is_met(plan, total):
            running |= {pool.submit(run_workload, plan, next(names)) for _ in range(plan.jobs - len(running))}
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                total.add(future.result())
            total.seconds = time.monotonic() - started
            yield total
        for future in running:
            total.add(future.result())
    total.seconds = time.monotonic() - started
    yield total


def _is_met(plan: Plan, total: Outcome) -> bool:
    if len(total.failures) >= 10:
        return True
    enough_workloads = total.workloads >= min(MIN_WORKLOADS, max(1, plan.states // 1000))
    return enough_workloads and total.ledger.report().distinct_states >= plan.states


def quiet_barriers(report: LabReport) -> list[str]:
    """Return the barriers of the source that no state comes from: no interval that ends there gave one."""
    ends = {row.name.split(" -> ")[1] for row in report.intervals if row.distinct}
    return [name for name in engine_barrier_names() if name not in ends]


def format_barriers(report: LabReport) -> Iterable[str]:
    """Yield a table: each barrier of the source, its calls, and the states cut just before and after it."""
    calls = dict(report.barriers)
    yield f"{'barrier':<20}  {'calls':>8}  {'before':>9}  {'after':>9}"
    for name in engine_barrier_names():
        before = sum(row.distinct for row in report.intervals if row.name.endswith(f"-> {name}"))
        starts = (name, f"recovery: {name}")
        after = sum(row.distinct for row in report.intervals if row.name.split(" -> ")[0] in starts)
        yield f"{name:<20}  {calls.get(name, 0):>8,}  {before:>9,}  {after:>9,}"


def format_families(report: LabReport) -> Iterable[str]:
    """Yield a table of the workload families."""
    families: dict[str, list[int]] = {}
    for row in report.workloads:
        families.setdefault(row.name.split("/")[0], []).append(row.distinct)
    yield f"{'family':<20}  {'workloads':>9}  {'distinct':>9}"
    for name, distinct in sorted(families.items()):
        yield f"{name:<20}  {len(distinct):>9,}  {sum(distinct):>9,}"


def totals_of(total: Outcome) -> dict[str, float | str]:
    """Return the sums of a campaign by their names, as docs/figures shows them."""
    report = total.ledger.report()
    return {
        "distinct states": report.distinct_states,
        "judged": report.judged_states,
        "quiet": report.quiet_states,
        "broken": len(total.failures),
        "workloads": total.workloads,
        "largest workload": f"{report.largest_share:.2%}",
        "judged by QEMU too": total.qemu_judged,
        "seconds": round(total.seconds),
    }


def tables_of(report: LabReport) -> dict[str, Iterable[str]]:
    """Return the tables that docs/figures keeps, as lines of text."""
    intervals = itertools.takewhile(bool, report.format_table().splitlines())
    return {"barrier": format_barriers(report), "family": format_families(report), "interval": intervals}
