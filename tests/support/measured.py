"""One command of jqcow under limits: ``python -m tests.support.measured jqcow ...`` tells what it took.

A process of its own: the memory of the tests is not its memory.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jqcow.cli import main as commands
from jqcow.cli import recover

ADDRESS_SPACE_BYTES = 4 << 30
"""The interpreter and its libraries take some of it; a table that is claimed and not there takes more."""
CPU_SECONDS = 60
_MARK = "measured: "


@dataclass(frozen=True)
class Measured:
    """What a command took: CPU time in seconds, and the most memory that it had at once, in bytes."""

    code: int
    cpu_seconds: float
    peak_bytes: int
    errors: str


def measure(*arguments: str) -> Measured:
    """Run ``jqcow`` or ``jqcow-recover`` with arguments, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.measured", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    errors, mark, told = done.stderr.rpartition(_MARK)
    if not mark:
        raise AssertionError(f"{arguments} was killed: {done.returncode} {done.stderr[-2000:]}")
    return Measured(**json.loads(told), errors=errors)


def peak_bytes() -> int:
    """Return the most memory that this process had at once. What its parent had before does not count."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("the kernel does not tell the peak of the memory")


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    program, arguments = sys.argv[1], sys.argv[2:]
    code = (recover if program == "jqcow-recover" else commands).main(arguments)
    used = resource.getrusage(resource.RUSAGE_SELF)
    told = {"code": code, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": peak_bytes()}
    print(f"{_MARK}{json.dumps(told)}", file=sys.stderr)


if __name__ == "__main__":
    _main()
