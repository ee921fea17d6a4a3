"""The proof of need: without any one barrier, without any one rule, a promise breaks."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.crash.mutants import BARRIER_TRIALS, MUTANTS, TRIALS, Mutant, judge_named
from tests.crash.mutants_of_salvage import MUTANTS_OF_SALVAGE
from tests.crash.trials import is_special, judge_trial
from tests.support import mutation, sources
from tests.support.mutation import Verdict

every_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


def repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def test_every_barrier_is_placed_once() -> None:
    assert not repeated(sources.barrier_names())


def test_every_barrier_has_a_trial() -> None:
    assert set(sources.barrier_names()) == set(BARRIER_TRIALS)


def test_every_rule_has_a_mutant_and_every_mutant_a_rule() -> None:
    rules = {mutant.rule for mutant in MUTANTS}
    # Of salvage the rules have mutants without which something false would be certain.
    of_salvage = {mutant.rule for mutant in MUTANTS_OF_SALVAGE}
    assert sources.judged_rules() == rules - of_salvage
    assert of_salvage <= {rule.number for rule in sources.rules_of()}


def test_every_mutant_has_a_name_of_its_own() -> None:
    assert not repeated([mutant.name for mutant in MUTANTS])


@every_mutant
def test_mutant_fits_the_code(mutant: Mutant) -> None:
    """A rewrite that takes a target away must tell what takes its place."""
    assert mutant.patches and mutant.trials
    for patch in mutant.patches:
        patch.check()


@pytest.mark.parametrize("trial", [trial for trial in TRIALS if is_special(trial)])
def test_unchanged_jqcow_keeps_its_promises(trial: str) -> None:
    """Otherwise a mutant would prove nothing. The first workload of each family is in the sample."""
    assert judge_trial(trial) is None


@pytest.mark.parametrize("name", sorted(BARRIER_TRIALS))
def test_barrier_is_needed(name: str) -> None:
    broken = [judge_trial(trial, drop_barriers=(name,)) for trial in BARRIER_TRIALS[name]]
    assert any(broken), f"without the barrier {name} every promise holds"


@every_mutant
def test_rule_is_needed(mutant: Mutant) -> None:
    verdict, text = mutation.run_alone(judge_named, mutant.name)
    assert verdict is Verdict.RED, text
