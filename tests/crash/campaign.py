"""The crash campaign: workload after workload, on several processes, until enough states are judged."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jqcow.testing import CrashFailure, LabOptions, Laboratory, LabReport
from tests.crash.judge import Judge, recover_and_close
from tests.crash.workloads import FAMILIES, WITH_SMALL_WRITES, family_named, workload_named
from tests.support.runs import Outcome, run_parts, table
from tests.support.sources import engine_barrier_names

MAX_SHARE = 0.01
MIN_WORKLOADS = 150
BUDGET = 120
NESTED_EVERY = 40
NESTED_BUDGET = 4
CUT_ELSEWHERE = ("slots.material", "slots.wiped", "anew.begin", "anew.content", "anew.end")
"""Barriers that scenarios cut: no workload changes passphrases, or writes a device anew."""


@dataclass(frozen=True)
class Plan:
    """What a campaign aims at: ``states`` distinct ones; one in ``qemu_every`` is judged by QEMU too.

    ``with_small_writes``: small writes wait in the journal in every family.

    A campaign may be made in pieces: this one goes on after ``workloads_before``, with ``states_before``, and
    ends after ``workloads_max`` more.
    """

    states: int = 200_000
    seed: int = 1
    jobs: int = 2
    only: tuple[str, ...] = ()
    with_small_writes: bool = False
    qemu_every: int = 80
    workloads_before: int = 0
    states_before: int = 0
    workloads_max: int | None = None

    @property
    def budget(self) -> int:
        """States of one interval."""
        return min(BUDGET, max(2, self.states // 1000))

    def names(self) -> Iterator[str]:
        """Yield the workloads of this piece, at most."""
        end = None if self.workloads_max is None else self.workloads_before + self.workloads_max
        return itertools.islice(self._all_names(), self.workloads_before, end)

    def _all_names(self) -> Iterator[str]:
        """Yield workload names without end: every family in every cluster size, seed after seed."""
        for seed in itertools.count(self.seed):
            for family in FAMILIES.values():
                if not self.only or family.name in self.only:
                    adds = self.with_small_writes and family.small_writes == "in-place"
                    name = f"{family.name}{WITH_SMALL_WRITES}" if adds else family.name
                    for cluster_bytes in family.cluster_sizes:
                        yield f"{name}/{cluster_bytes}/{seed}"

    def is_met(self, total: Outcome) -> bool:
        """Return True if that is enough."""
        workloads = self.workloads_before + total.counts["workloads"]
        enough_workloads = workloads >= min(MIN_WORKLOADS, max(1, self.states // 1000))
        return enough_workloads and self.states_before + total.ledger.report().distinct_states >= self.states


def laboratory(plan: Plan, name: str, judge: Judge) -> Laboratory:  # type: ignore[type-arg]
    """Return the laboratory in which a workload runs; a replay needs the same."""
    family = family_named(name.split("/", maxsplit=1)[0])
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
    outcome = Outcome(Counter(workloads=1), running.ledger)
    try:
        running.run(workload_named(name))
    except CrashFailure as failure:
        outcome.failures.append(f"{failure}\n  campaign: --seed {plan.seed} --states {plan.states}")
    except Exception as error:
        outcome.failures.append(f"{type(error).__name__}: {error}\n  workload: {name} itself, no crash")
    outcome.counts["judged by QEMU too"] = judge.qemu_judged
    return outcome


def replay(plan: Plan, line: str) -> None:
    """Judge one state again. Raises CrashFailure if it is still not accepted."""
    name = line.split(" ", maxsplit=1)[0]
    laboratory(plan, name, Judge(qemu_every=1)).replay(workload_named(name), line)


def run_campaign(plan: Plan) -> Iterator[Outcome]:
    """Run workloads until the plan is met or ten of them failed; yield the running total after each."""
    return run_parts(functools.partial(run_workload, plan), plan.names(), plan.jobs, plan.is_met)


def quiet_barriers(report: LabReport) -> list[str]:
    """Return the barriers of the source that no state comes from: no interval that ends there gave one."""
    ends = {row.name.split(" -> ")[1] for row in report.intervals if row.distinct}
    return [name for name in engine_barrier_names() if name not in ends and name not in CUT_ELSEWHERE]


def format_barriers(report: LabReport) -> Iterable[str]:
    """Yield a table: each barrier of the source, its calls, and the states cut just before and after it."""
    calls, before, after = dict(report.barriers), Counter[str](), Counter[str]()
    for row in report.intervals:
        first, _, last = row.name.partition(" -> ")
        before[last] += row.distinct
        after[first.removeprefix("recovery: ")] += row.distinct
    rows = ((name, calls.get(name, 0), before[name], after[name]) for name in engine_barrier_names())
    return table(("barrier", "calls", "before", "after"), rows)


def format_families(report: LabReport) -> Iterable[str]:
    """Yield a table of the workload families."""
    workloads, distinct = Counter[str](), Counter[str]()
    for row in report.workloads:
        name = row.name.split("/")[0]
        workloads[name] += 1
        distinct[name] += row.distinct
    rows = ((name, workloads[name], distinct[name]) for name in sorted(workloads))
    return table(("family", "workloads", "distinct"), rows)


def totals_of(total: Outcome) -> dict[str, float | str]:
    """Return the sums of a campaign by their names."""
    report = total.ledger.report()
    return {
        "distinct states": report.distinct_states,
        "judged": report.judged_states,
        "quiet": report.quiet_states,
        "broken": len(total.failures),
        "workloads": total.counts["workloads"],
        "largest workload": f"{report.largest_share:.2%}",
        "judged by QEMU too": total.counts["judged by QEMU too"],
        "seconds": round(total.seconds),
    }


def tables_of(report: LabReport) -> dict[str, Iterable[str]]:
    """Return the tables that docs/figures keeps, as lines of text."""
    intervals = itertools.takewhile(bool, report.format_table().splitlines())
    return {"barrier": format_barriers(report), "family": format_families(report), "interval": intervals}
