"""The simulation: a sample of its seeds, and what it says of itself: the same on every run, sharp, small."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from tests.crash.simulation import Program, SimulationFailure, run, without_step
from tests.crash.simulation_minimise import minimise
from tests.crash.simulation_programs import describe, program_of, run_seeds
from tests.support import sources
from tests.support.operations import Step

SEEDS = 200
GROUPS = 8
BROKEN = ("flush.record",)

# What the simulation found, minimised. Each once broke a promise, or a test's idea of one.
FOUND = {
    "a write with FUA is durable when it returns": "1024/used/0/65536 write:0:1 cut:4:0 fua:4096:1536",
    "an interrupt after the barrier of a commit leaves what is durable": (
        "4096/full/0/65536 fail:punch:1:INT:0 begin unmap:0:8192 commit flush"
    ),
    "a failed barrier may lose a growth of the disk": (
        "4096/full/0/65536 resize:3:11264 write:102693:4096 fail:any:3:EIO:4096 "
        "resize:3:32256 write:104448:4096"
    ),
    "a sector at the file's end, whose write lands without the growth that it brings": (
        "512/qemu/0/65536 fua:24576:1 write:27136:651 cut:6:8192 flush write:27136:768"
    ),
    "a commit that failed may come back until the next flush, also when the disk shrinks meanwhile": (
        "4096/used/0/65536 write:77824:1 fail:pwrite:4:EIO:512 begin write:0:1 write:0:2 commit "
        "cut:0:1 resize:0:0"
    ),
    "a cluster that is compressed anew into the host cluster that it was in is counted once": (
        "4096/empty/0/65536 packed:0:1 packed:0:1 look"
    ),
}


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_seed_breaks_a_promise(group: int) -> None:
    size = SEEDS // GROUPS
    outcome = run_seeds(range(group * size, (group + 1) * size))
    assert not outcome.failures, outcome.failures[0]
    for met in ("cuts with changes in flight", "recovery cuts", "errors met"):
        assert outcome.counts[met], f"the sample is too quiet: no {met}"


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name: str) -> None:
    run(Program.parse(FOUND[name]))


def test_the_same_seed_makes_the_same_run() -> None:
    """In this process and in another one, in which strings have other hashes."""
    seeds = (1, 5, 12)
    here = [run(program_of(seed)).fingerprint for seed in seeds]
    assert here == [run(program_of(seed)).fingerprint for seed in seeds]
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    there = [simulate("--replay", str(seed), environment=environment).stdout.split()[-1] for seed in seeds]
    assert here == there
    assert len(set(here)) == len(seeds)


def test_a_program_can_be_written_down() -> None:
    kinds = set()
    for seed in range(300):
        program = program_of(seed, BROKEN if seed % 2 else ())
        assert Program.parse(str(program)) == program
        kinds |= {step.kind for step in program.steps}
    documented = {"recut", "refail", "outgrow", "savepoint", "return", "tear", "full", "kill", "cut", "fail"}
    documented |= {"snapshot", "apply", "delete", "packed"}
    assert documented <= kinds


def test_any_part_of_a_program_is_a_program() -> None:
    """Steps that make no sense where they stand do nothing: so a program can be minimised."""
    program = program_of(3)
    for number in range(0, len(program.steps), 3):
        run(without_step(program, number))
    for step in ("commit", "return:1", "savepoint", "rollback", "recut:1:1", "refail:any:1:EIO:0", "outgrow"):
        run(Program(4096, "used", 0, 65536, (Step.parse(step), Step("close"), Step.parse(step))))


@functools.cache
def failure_without_barrier() -> SimulationFailure:
    for seed in range(40):
        program = program_of(seed, BROKEN)
        try:
            run(program)
        except SimulationFailure as failure:
            if len(program.steps) > 20 and failure.nature == "PromiseBroken: P1":
                return failure
    pytest.fail("an engine without the barrier of its records went unnoticed")


def test_a_failing_program_is_minimised() -> None:
    """What is left fails alike, needs each of its steps, and passes on the engine as it is."""
    failure = failure_without_barrier()
    small = minimise(failure)
    assert len(small.program.steps) <= 6 < len(failure.program.steps)
    assert small.nature == failure.nature
    for number in range(len(small.program.steps)):
        assert nature_of(without_step(small.program, number)) != small.nature
    assert nature_of(Program.parse(str(small.program).replace(f"/{BROKEN[0]}", ""))) is None


def nature_of(program: Program) -> str | None:
    try:
        run(program)
    except SimulationFailure as failure:
        return failure.nature
    return None


def test_a_failure_is_printed_with_its_replay() -> None:
    failure = failure_without_barrier()
    line = describe(failure, "seed").rsplit("--replay ", maxsplit=1)[1].strip("'")
    done = simulate("--replay", line)
    assert done.returncode == 1
    assert failure.nature in done.stdout


def test_the_tool_runs_seeds_and_refuses_nonsense() -> None:
    done = simulate("--seeds", "2", "--from", "30")
    assert done.returncode == 0
    assert "2 seeds from 30, 0 failed" in done.stdout
    assert simulate("--replay", "4096/nowhere/0/65536 flush").returncode == 2


def simulate(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(sources.ROOT / "tools" / "simulate"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("name", ["live.prepare", "flush.data", "checkpoint.homes", "close.release"])
def test_a_missing_barrier_is_noticed(name: str) -> None:
    assert any(nature_of(program_of(seed, (name,))) for seed in range(400))
