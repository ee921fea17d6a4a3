"""One target under atheris, in its own process: ``python -m tests.fuzz.guided TARGET SECONDS OPTION...``.

The options are libFuzzer's. After so many seconds of CPU time the process ends as libFuzzer ends by itself.
`tests.fuzz.guiding` starts it.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time

import atheris

with atheris.instrument_imports(include=["jqcow"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS

SECONDS_MAX = 20
"""Of CPU time for one input: some ten commands, slower than they are for being watched."""


def main() -> None:
    """Fuzz until libFuzzer or the time ends it."""
    name, seconds, *options = sys.argv[1:]
    run, cpu_seconds = TARGETS[name].run, float(seconds)

    def run_one(data: bytes) -> None:
        started = time.process_time()
        run(data)
        ended = time.process_time()
        if ended - started > SECONDS_MAX:
            raise AssertionError(f"an input took {ended - started:.1f} s of CPU time")
        if cpu_seconds and ended > cpu_seconds:
            # libFuzzer's own handler: it prints its figures and ends.
            os.kill(os.getpid(), signal.SIGUSR1)

    # libFuzzer starts itself anew to merge, through a shell.
    command = f"{shlex.quote(sys.executable)} -m {__spec__.name} {name} 0"
    atheris.Setup([command, *options], run_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
