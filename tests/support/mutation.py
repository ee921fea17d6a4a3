"""The judge of mutants: with a mutant's patches in place, does a promise break?

Each mutant is judged in a process of its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from enum import IntEnum
from multiprocessing.connection import Connection
from pathlib import Path

from tests.support import patches
from tests.support.mutant import Mutant

SECONDS_MAX = 120
STUMBLES = (AttributeError, NameError, TypeError)
PATCHING_FILES = (Path(patches.__file__).name, "mutants.py", "mutants_of_threads.py")


class Verdict(IntEnum):
    """What became of a mutant. None is 1 or 2: so a process ends that could not even start."""

    GREEN = 0
    RED = 3
    FAULTY = 4


def judge(mutant: Mutant, actions: Iterable[Callable[[], object]]) -> tuple[Verdict, str]:
    """Run the actions, up to the first that raises, on a jqcow with the mutant's patches.

    RED is a mutant whose every patch was reached, and with which a promise broke. One that was not reached
    proves nothing, nor does one whose own code failed: it is FAULTY.
    """
    failure = _first_failure(mutant, actions)
    if failure is not None and any(is_own_fault(error) for error in _chain(failure)):
        return Verdict.FAULTY, f"the mutant itself failed: {text_of(failure)}"
    unreached = [patch.target for patch in mutant.patches if not patch.reached]
    if unreached:
        return Verdict.FAULTY, f"the mutant was never reached: {', '.join(unreached)}"
    if failure is None:
        return Verdict.GREEN, f"without {mutant.rule} every promise holds"
    return Verdict.RED, text_of(failure)


def _first_failure(mutant: Mutant, actions: Iterable[Callable[[], object]]) -> Exception | None:
    with ExitStack() as stack:
        for patch in mutant.patches:
            stack.enter_context(patch.installed())
        for action in actions:
            try:
                action()
            except Exception as failure:
                return failure
    return None


def is_own_fault(error: BaseException) -> bool:
    """Return True if an exception says nothing of promises.

    The code of patches raised it, not what they call; or jqcow could not work with what a patch gave it.
    """
    if isinstance(error, STUMBLES):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).name in PATCHING_FILES


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        for part in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
            yield from _chain(part)
        error = error.__cause__ or error.__context__


def text_of(failure: Exception) -> str:
    """Return what an exception says, its notes included."""
    return "\n".join([f"{type(failure).__name__}: {failure}", *getattr(failure, "__notes__", ())])


def _tell(
    judging: Callable[[str], tuple[Verdict, str]], name: str, told: Connection[tuple[Verdict, str], None]
) -> None:
    told.send(judging(name))


def run_alone(
    judging: Callable[[str], tuple[Verdict, str]], name: str, seconds_max: float = SECONDS_MAX
) -> tuple[Verdict, str]:
    """Judge a mutant in a process of its own; return its verdict, and what is to be said of it.

    All these processes are forked from one that has imported ``judging`` and what it needs.

    Raises:
        TimeoutError: it takes too long.
        EOFError: the process ended without a verdict.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([judging.__module__])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(judging, name, sending), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(seconds_max):
            raise TimeoutError(f"{name} has no verdict after {seconds_max} s")
        return receiving.recv()
    finally:
        process.kill()
        process.join()
        receiving.close()
