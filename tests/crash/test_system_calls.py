"""The same with the kernel's own calls: strace makes one fail in a process that writes to a real file."""

from __future__ import annotations

import errno
import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.crash.traced import start
from tests.support import sources
from tests.support.patients import check

CALLS = ("pwrite64", "fdatasync", "fallocate", "ftruncate", "pread64")
SAMPLES = 3
SECONDS_MAX = 60
CASES = [
    *(
        (call, f"error={name}", number)
        for call in CALLS
        for name in ("EIO", "ENOSPC")
        for number in range(SAMPLES)
    ),
    # A call that writes nothing, and says so.
    *(("pwrite64", "retval=0", number) for number in range(SAMPLES)),
]


def run_traced(image: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the workload on the image under strace, which sees the calls on that file alone."""
    image.write_bytes(start().content)
    command = ["strace", "-f", "-qq", "-P", str(image), "-o", str(image.with_suffix(".trace")), *options]
    return subprocess.run(
        [*command, sys.executable, "-m", "tests.crash.traced", str(image)],
        cwd=sources.ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )


@functools.cache
def count_calls() -> Counter[str]:
    """Count the calls of all three rounds of the workload."""
    with tempfile.TemporaryDirectory(prefix="jqcow-calls-") as folder:
        image = Path(folder, "image.qcow2")
        done = run_traced(image, "-e", f"trace={','.join(CALLS)}")
        assert done.stdout == "none\n", done.stderr
        trace = image.with_suffix(".trace").read_text(encoding="utf-8")
    return Counter(re.findall(r"^\d+ +(\w+)\(", trace, re.MULTILINE))


@pytest.mark.parametrize(("call", "injection", "number"), CASES)
def test_one_system_call_fails(call: str, injection: str, number: int, tmp_path: Path) -> None:
    calls = count_calls()[call] // 3
    assert calls, f"the workload makes no {call}"
    when = 1 + number * max(0, calls - 1) // max(1, SAMPLES - 1)
    image = tmp_path / "image.qcow2"
    done = run_traced(image, "-e", f"trace={call}", "-e", f"inject={call}:{injection}:when={when}")
    assert done.returncode == 0, done.stderr
    (failed,) = re.findall(r".*\(INJECTED\)", image.with_suffix(".trace").read_text(encoding="utf-8"))[:1]
    # Space that could not be given back behind a durable record is no failure of what the user asked for.
    may_be_kept_quiet = "PUNCH_HOLE" in failed and done.stdout.strip() == "none"
    if injection.startswith("error=") and not may_be_kept_quiet:
        assert done.stdout.strip() == str(getattr(errno, injection.removeprefix("error=")))
    content = image.read_bytes()
    report = check(content)
    assert report.ok, report.findings
    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True, timeout=SECONDS_MAX)
