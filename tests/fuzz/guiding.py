"""Runs of the guided fuzzer: processes started, their figures read, corpora grown and minimised."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from tests.fuzz.corpora import FINDINGS, findings_of, name_of, read_corpus, write_corpus
from tests.fuzz.targets import TARGETS
from tests.support import figures
from tests.support.runs import table

ROOT = Path(__file__).resolve().parents[2]
GROWN = ROOT / ".fuzz"
"""Where corpora grow, a folder for each target; not kept."""
SLICE_SECONDS = 600
"""CPU time of one process: its figures are recorded then, and the memory of libFuzzer starts anew."""
MEMORY_MIB = 256
HANGING_SECONDS = 3600
COLUMNS = ("target", "executions", "CPU seconds", "edges", "features", "peak MiB", "findings")
ARTIFACTS = ("crash-", "oom-", "timeout-")

_PROGRESS = re.compile(r"cov: (\d+) ft: (\d+)")
_STATISTIC = re.compile(r"stat::(\w+):\s+(\d+)")


@dataclass(frozen=True)
class Run:
    """What came of fuzzing a target. ``peak_mib`` is libFuzzer's memory and the target's together."""

    executions: int = 0
    cpu_seconds: int = 0
    edges: int = 0
    features: int = 0
    peak_mib: int = 0
    findings: int = 0

    def __add__(self, other: Run) -> Run:
        """Return this run and one that went on from it."""
        return Run(
            self.executions + other.executions,
            self.cpu_seconds + other.cpu_seconds,
            max(self.edges, other.edges),
            max(self.features, other.features),
            max(self.peak_mib, other.peak_mib),
            self.findings + other.findings,
        )


def command_of(target: str, cpu_seconds: float, *options: str) -> list[str]:
    """Return the command that runs a target under atheris."""
    return [sys.executable, "-m", "tests.fuzz.guided", target, str(cpu_seconds), *options]


def environment() -> dict[str, str]:
    """Return the environment in which the command finds the tests."""
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}


def grown_folder(target: str) -> Path:
    """Return the growing corpus of a target, with all that is kept, and good inputs, in it."""
    folder = GROWN / target
    folder.mkdir(parents=True, exist_ok=True)
    for data in (*TARGETS[target].seeds(), *read_corpus(target), *findings_of(target).values()):
        path = folder / name_of(data)
        if not path.exists():
            path.write_bytes(data)
    return folder


def fuzz(target: str, cpu_seconds: float, seed: int) -> tuple[Run, str]:
    """Fuzz a target in one process; return the figures, and what is to be told of a finding.

    A finding ends the run, since it would be met again and again; its input is among the findings then.
    """
    folder, findings = grown_folder(target), FINDINGS / target
    findings.mkdir(parents=True, exist_ok=True)
    options = (
        f"-seed={seed}",
        f"-max_len={TARGETS[target].length_max}",
        "-len_control=0",
        f"-timeout={HANGING_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={findings}/",
        "-print_final_stats=1",
        # Slow by the clock, on a busy machine, is no finding: the CPU time of each input is bounded.
        f"-report_slow_units={HANGING_SECONDS}",
        str(folder),
    )
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command_of(target, cpu_seconds, *options),
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        told = output.read()
    run = run_of(told, round(usage.ru_utime + usage.ru_stime), found=process.returncode != 0)
    return run, told[-4000:] if process.returncode else ""


def run_of(told: str, cpu_seconds: int, *, found: bool) -> Run:
    """Read the figures of a run from what libFuzzer told."""
    progress = _PROGRESS.findall(told)
    edges, features = map(int, progress[-1]) if progress else (0, 0)
    statistics = {name: int(value) for name, value in _STATISTIC.findall(told)}
    return Run(
        statistics.get("number_of_executed_units", 0),
        cpu_seconds,
        edges,
        features,
        statistics.get("peak_rss_mb", 0),
        int(found),
    )


def minimise(target: str) -> list[bytes]:
    """Keep of a grown corpus what covers all that it covers; return what is kept."""
    folder = grown_folder(target)
    with tempfile.TemporaryDirectory(prefix="jqcow-corpus-") as small:
        subprocess.run(
            command_of(target, 0, "-set_cover_merge=1", small, str(folder)),
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            check=True,
        )
        # The merge writes first what covers most.
        chosen = sorted(Path(small).iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return write_corpus(target, [path.read_bytes() for path in chosen])


def recorded(path: str) -> dict[str, Run]:
    """Return the figures that a file has already: a long run may be made in pieces."""
    file = Path(path)
    if not path or not file.exists():
        return {}
    tables = json.loads(file.read_text(encoding="utf-8")).get("tables", {})
    return {name: Run(*values) for name, values in tables.get("target", {}).get("rows", {}).items()}


def lines_of(runs: dict[str, Run]) -> list[str]:
    """Return the figures as a table."""
    ordered = sorted(runs, key=lambda name: list(TARGETS).index(name))
    return list(table(COLUMNS, ((name, *astuple(runs[name])) for name in ordered)))


def record(path: str, runs: dict[str, Run]) -> None:
    """Write the figures for docs/figures."""
    total = sum(runs.values(), Run())
    totals = {
        "executions": total.executions,
        "CPU hours": round(total.cpu_seconds / 3600, 1),
        "findings": total.findings,
    }
    lines = lines_of(runs)
    figures.record(path, totals, {"target": lines}, "\n".join(lines))


def artifacts(targets: Iterable[str]) -> list[Path]:
    """Return the findings that libFuzzer named, not yet looked at: whoever mends one gives it a name."""
    found = (path for name in targets for path in sorted((FINDINGS / name).glob("*")))
    return [path for path in found if path.name.startswith(ARTIFACTS)]
