"""Images that test scripts left behind, read, checked and told of by jqcow and by qemu-img, and compared.

The same reasons hold as for images that were damaged on purpose (`tests.differential.categories`).
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jqcow.cli.main import main as jqcow_command
from jqcow.errors import JqcowError
from tests.differential import categories, evidence, scripts
from tests.differential.campaign import broken_promises, differences
from tests.differential.categories import INFO, Difference
from tests.differential.evidence import Evidence, Reading, Told
from tests.differential.scripts import Script, State
from tests.differential.tables import Tables
from tests.support import runs
from tests.support.runs import Outcome

DISK_BYTES_MAX = 1 << 34
"""Larger disks are checked and told of alone."""

MAGIC = b"QFI\xfb"
NOT_COMPARED = ("children", "actual-size", "dirty-flag")


@dataclass(frozen=True)
class Task:
    """A script to be run and judged.

    Attributes:
        states_max: at most so many of its states are judged, evenly chosen.
        kept: folder for the images of failures, None for none.
    """

    script: Script
    folder: Path
    seconds: float
    states_max: int
    kept: Path | None = None


@dataclass
class Seen:
    """What of a script's states was judged already: an image, together with all that it may name."""

    keys: set[tuple[str, ...]] = field(default_factory=set)

    def is_new(self, state: State, name: str) -> bool:
        contents = dict(state.files)
        image = state.store / contents[name]
        with image.open("rb") as file:
            names_others = any(file.read(20)[8:20]) or b"data_file" in file.read(4096)
        key = (contents[name], *(f"{other} {kept}" for other, kept in state.files if names_others))
        is_new = key not in self.keys
        self.keys.add(key)
        return is_new


def judge_script(task: Task) -> Outcome:
    """Run a script, and judge the images that it leaves."""
    found = Outcome(Counter(scripts=1))
    work = Path(tempfile.mkdtemp(prefix="jqcow-it-"))
    try:
        ended, states = scripts.run(task.script, task.folder, work, task.seconds)
        found.counts[f"scripts: {ended}"] += 1
        found.counts["states"] += len(states)
        step = max(1, -(-len(states) // task.states_max))
        seen = Seen()
        for number, state in list(enumerate(states))[::-1][::step][::-1]:
            state.restore(work / "scratch")
            for name, _ in state.files:
                path = work / "scratch" / name
                with path.open("rb") as file:
                    is_image = file.read(4) == MAGIC
                if is_image and seen.is_new(state, name):
                    found.add(judge(path, work, f"{task.script.name}: state {number}, {name}", task.kept))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return found


def judge(image: Path, folder: Path, title: str, kept: Path | None = None) -> Outcome:
    """Compare the two on one image, which lies where what it names is found."""
    found = Outcome(Counter(images=1))
    failures: list[str] = []
    try:
        with image.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            seen = gather(image, folder, content)
            tables = Tables(content)  # type: ignore[arg-type]
            failures += broken_promises(seen, tables)
            for difference in (*differences(seen, tables), *_difference_in_info(image, seen, tables)):
                category = categories.explain(difference)
                if category is None:
                    failures.append(f"unexplained: {difference.aspect}: {difference.seen}")
                else:
                    found.counts[f"{category.aspect}: {category.name}"] += 1
            found.counts += _agreements(seen)
            del seen, tables
    except Exception as error:
        failures.append(f"{type(error).__name__}: {error}")
    if failures and kept is not None:
        place = kept / title.replace("/", "_").replace(" ", "_")
        shutil.copytree(image.parent, place, dirs_exist_ok=True)
    found.failures += [f"FAILED {failure}\n  {title}" for failure in failures]
    return found


def gather(image: Path, folder: Path, content: Any) -> Evidence:
    """Let both read and check an image."""
    seen = Evidence(None, content)
    if evidence.disk_bytes(content[:512]) <= DISK_BYTES_MAX:
        seen.readings.append(evidence.read(image, image, "", folder))
        if seen.readings[0].theirs.status is None:
            # QEMU would not come to an end again, nor again.
            return seen
        name = evidence.snapshot_of(image, 0)
        if name:
            seen.readings.append(evidence.read(image, image, name, folder))
    seen.checking = evidence.check(image, image)
    return seen


def _agreements(seen: Evidence) -> Counter[str]:
    found: Counter[str] = Counter()
    for reading in seen.readings:
        found["disks read alike"] += reading.same
        found["disks that both refuse"] += not reading.ours.done and not reading.theirs.done
    checking = seen.checking
    if checking is not None and checking.our_verdict == checking.their_verdict:
        found[f"checks alike: {checking.our_verdict}"] += 1
    return found


def _difference_in_info(image: Path, seen: Evidence, tables: Tables) -> Iterator[Difference]:
    """Yield a difference where both tell of the image, but not the same."""
    if any(reading.theirs.status is None for reading in seen.readings):
        return
    ours, our_facts = _our_info(image)
    theirs, printed = evidence.run("qemu-img", "info", "-f", "qcow2", "--output=json", image)
    if not (ours.done and theirs.done):
        return
    told, expected = (_compared(json.loads(text)) for text in (our_facts, printed))
    if told != expected:
        names = sorted(name for name in told.keys() | expected if told.get(name) != expected.get(name))
        seen_facts = "; ".join(
            f"{name}: {told.get(name)!s:.300}, QEMU {expected.get(name)!s:.300}" for name in names
        )
        yield Difference(INFO, seen_facts, seen, tables, Reading("", ours, theirs))


def _our_info(image: Path) -> tuple[Told, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            status = jqcow_command(["info", "-f", "qcow2", "--output=json", str(image)])
        except JqcowError as error:
            return Told(1, str(error)), ""
    return Told(status, err.getvalue()), out.getvalue()


def _compared(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what is compared, the facts of the format beside the others."""
    own = facts.pop("format-specific", {}).get("data", {})
    return {name: value for name, value in {**facts, **own}.items() if name not in NOT_COMPARED}


def run(tasks: Sequence[Task], jobs: int) -> Iterator[Outcome]:
    """Judge scripts; yield the total after each."""
    return runs.run_parts(judge_script, tasks, jobs)
