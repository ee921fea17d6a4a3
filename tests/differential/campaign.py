"""Damaged images, read and checked by jqcow and by qemu-img: every difference has a reason, or is a failure.

Whatever the reasons: jqcow never says that all is well where data is missing, and never misses an error or a
leak that QEMU finds. QEMU is given a live image after ``jqcow-recover``, and must not open it before.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.differential import categories, samples
from tests.differential.categories import BYTES, NUMBERS, ONLY_JQCOW, ONLY_QEMU, VERDICT, Difference
from tests.differential.damages import make_case
from tests.differential.evidence import Checking, Evidence, Reading, gather
from tests.differential.tables import Tables
from tests.support import runs
from tests.support.runs import Outcome

CASES_AT_ONCE = 25

_HARMLESS = ("clean", "leaks")


def broken_promises(evidence: Evidence, tables: Tables) -> Iterator[str]:
    """Yield what no reason excuses."""
    if evidence.live_opened_by_qemu:
        yield "QEMU opens an image with a live journal"
    for told in evidence.all_told():
        if told.status is None or "Traceback" in told.complaint:
            yield f"jqcow ends with {told.reason}"
    for reading in evidence.readings:
        l1 = tables.table_of(reading.snapshot)
        gone = next(tables.missing(l1), None) if l1 is not None and reading.ours.done else None
        if gone is not None:
            yield f"jqcow reads the disk{reading.snapshot and ' of a snapshot'}, and {gone:#x} is missing"
    if evidence.checking is not None:
        yield from _missed(evidence.checking)


def _missed(checking: Checking) -> Iterator[str]:
    ours, theirs = checking.our_verdict, checking.their_verdict
    if theirs == "errors" and ours in _HARMLESS:
        yield f"QEMU finds errors, jqcow: {ours}"
    if theirs == "leaks" and ours == "clean":
        yield "QEMU finds leaks, jqcow none"
    status = {"clean": (0,), "leaks": (3,), "errors": (2,), "refused": (1, 63)}[ours]
    if checking.ours.status not in status:
        yield f"jqcow check finds {ours} and ends with {checking.ours.status}"


def differences(evidence: Evidence, tables: Tables) -> Iterator[Difference]:
    """Yield how the two differ."""
    for reading in evidence.readings:
        aspect, seen = _difference_in(reading)
        if aspect:
            yield Difference(aspect, seen, evidence, tables, reading)
    checking = evidence.checking
    if checking is None:
        return
    if checking.our_verdict != checking.their_verdict:
        seen = f"jqcow {checking.our_verdict}, QEMU {checking.their_verdict}"
        yield Difference(VERDICT, f"{seen}: {checking.theirs.reason}", evidence, tables)
    report = checking.report
    if report is not None and checking.corruptions is not None:
        ours = (
            report.corruptions,
            report.leaks - report.counts.get(categories.Kind.LEAK_PAST_END, 0) + report.lost,
        )
        theirs = (checking.corruptions, checking.leaks)
        if ours != theirs:
            yield Difference(NUMBERS, f"(errors, leaks): jqcow {ours}, QEMU {theirs}", evidence, tables)


def _difference_in(reading: Reading) -> tuple[str, str]:
    ours, theirs = reading.ours, reading.theirs
    if ours.done and theirs.done:
        seen = f"{reading.our_bytes} and {reading.their_bytes} bytes, {len(reading.differing)} sectors differ"
        return ("", "") if reading.same else (BYTES, seen)
    if ours.done:
        return ONLY_JQCOW, theirs.reason
    return (ONLY_QEMU, ours.reason) if theirs.done else ("", "")


def judge(number: int, folder: Path) -> Outcome:
    """Compare the two on the image of a number."""
    case = make_case(number)
    found = Outcome(Counter(images=1))
    try:
        evidence = gather(case, folder)
        tables = Tables(evidence.content)
        failures = list(broken_promises(evidence, tables))
        for difference in differences(evidence, tables):
            category = categories.explain(difference)
            if category is None:
                failures.append(f"unexplained: {difference.aspect}: {difference.seen}")
            else:
                found.counts[f"{category.aspect}: {category.name}"] += 1
    except Exception as error:
        failures = [f"{type(error).__name__}: {error}"]
    else:
        found.counts += _agreements(evidence)
    for failure in failures:
        told = failure.replace(str(folder), "")
        found.failures.append(f"FAILED {told}\n  {case}\n  replay: tools/differential --only {number}")
    return found


def _agreements(evidence: Evidence) -> Counter[str]:
    found: Counter[str] = Counter()
    if evidence.recovered is not None:
        found["live images recovered" if evidence.recovered.done else "live images refused"] += 1
    for reading in evidence.readings:
        if reading.same:
            found["disks read alike"] += 1
        elif not reading.ours.done and not reading.theirs.done:
            found["disks that both refuse"] += 1
    checking = evidence.checking
    if checking is not None and checking.our_verdict == checking.their_verdict:
        found[f"checks alike: {checking.our_verdict}"] += 1
    return found


def judge_part(numbers: range) -> Outcome:
    """Judge some images, one after the other."""
    found = Outcome()
    with tempfile.TemporaryDirectory(prefix="jqcow-differential-") as folder:
        Path(folder, samples.BASE_NAME).write_bytes(samples.base_content())
        for number in numbers:
            found.add(judge(number, Path(folder)))
    return found


def run(first: int, count: int, jobs: int) -> Iterator[Outcome]:
    """Judge images by number; yield the total after each part."""
    parts = (
        range(start, min(start + CASES_AT_ONCE, first + count))
        for start in range(first, first + count, CASES_AT_ONCE)
    )
    return runs.run_parts(judge_part, parts, jobs)
