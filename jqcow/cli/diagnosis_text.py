"""A diagnosis, and what a salvage came to, for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from jqcow.cli.common import human_size, plural
from jqcow.errors import printable
from jqcow.offline.salvage import SalvageReport
from jqcow.offline.salvaging.in_place import InPlaceReport
from jqcow.salvage.amounts import Amounts
from jqcow.salvage.diagnosis import Diagnosis, DiskDiagnosis
from jqcow.salvage.shape import Damage

DAMAGES_SHOWN = 8
RANGES_SHOWN = 4
_AMOUNTS = (
    ("certain", "certain"),
    ("likely", "likely"),
    ("guess", "a guess"),
    ("zero", "zeros"),
    ("below", "not allocated"),
    ("lost", "lost"),
)


def diagnosis_lines(found: Diagnosis) -> Iterator[str]:
    """Yield a diagnosis, line by line."""
    yield f"{printable(found.image or '')}: {_headline(found)}"
    yield ""
    if found.inferred:
        yield f"  header    lost, and told by the rest of the file: {', '.join(found.inferred)}"
    for damage in found.damages[:DAMAGES_SHOWN]:
        yield from _damage_lines(damage)
    more = found.damage_count - DAMAGES_SHOWN
    if more > 0:
        yield f"            and {more:,} more: see --output=json"
    for disk in found.disks:
        yield from _disk_lines(disk)
    yield from _orphan_lines(found)
    if found.unreadable_bytes:
        yield f"  host      cannot read {human_size(found.unreadable_bytes)} of what was looked at"
    read = "all orphans were read" if found.is_deep else "of the data samples were read"
    yield f"  time      {found.seconds:.2f} s; {read}"
    yield ""
    yield from _step_lines(found)


def _headline(found: Diagnosis) -> str:
    if found.is_damaged:
        journal = ", and its journal is live" if found.has_live_journal else ""
        return f"it is damaged{journal}; nothing was changed"
    if found.may_be_lost:
        return "data may be lost: a table is empty, and clusters hold data that no table names"
    if found.has_live_journal:
        return "it crashed while it was open for writing; nothing else is damaged"
    return "only its refcounts are damaged" if found.damages else "nothing is damaged"


def _damage_lines(damage: Damage) -> Iterator[str]:
    place = "" if damage.host_offset is None else f" at host offset {damage.host_offset:#x}"
    yield f"  damaged   {damage.structure}{place}: {printable(damage.meaning)}"
    if damage.guest_offset is not None and damage.guest_length:
        end = damage.guest_offset + damage.guest_length
        yield f"            guest range {damage.guest_offset:#x} to {end:#x} depends on it"


def _disk_lines(disk: DiskDiagnosis) -> Iterator[str]:
    yield f"  {printable(disk.name):<9} {human_size(disk.size)}: {_amounts(vars(disk))}"
    for part in disk.ranges[:RANGES_SHOWN]:
        yield f"            {part.kind}: guest range {part.offset:#x} to {part.offset + part.length:#x}"
    more = disk.range_count - RANGES_SHOWN
    if more > 0:
        yield f"            and {plural(more, 'more range')}: see --output=json"


def _amounts(numbers: dict[str, int]) -> str:
    return (
        ", ".join(f"{human_size(numbers[name])} {word}" for name, word in _AMOUNTS if numbers[name])
        or "empty"
    )


def _orphan_lines(found: Diagnosis) -> Iterator[str]:
    if not found.orphan_bytes:
        return
    share = found.orphans_with_data or 0
    size = human_size(found.orphan_bytes)
    yield f"  orphans   {size} in use that no table names; by samples {share:.0%} hold data"
    if found.is_deep:
        names = ", ".join(map(printable, found.structures)) or "no structure of a guest"
        yield f"            placed; recognised: {names}"
    elif share:
        yield "            a salvage places them by structures of the guest, runs and order; --deep tries"


def _step_lines(found: Diagnosis) -> Iterator[str]:
    if not found.steps:
        yield "There is nothing to do."
        return
    yield "What to do next, in this order:"
    for number, step in enumerate(found.steps, 1):
        seconds = "" if step.seconds is None else f" (about {_duration(step.seconds)})"
        yield f"  {number}. {step.purpose[0].upper()}{step.purpose[1:]}{seconds}."
        if step.command is not None:
            yield f"         {step.command}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def salvage_lines(report: SalvageReport) -> Iterator[str]:
    """Yield what a salvage came to, line by line."""
    source, target = printable(report.source), printable(report.target)
    yield f"{source} is saved into {target} ({report.target_format})"
    amounts = {name: getattr(report, name) for name in vars(Amounts())}
    yield f"  a disk of {human_size(report.size)}: {_amounts(amounts)}"
    if report.structures:
        yield f"  recognised: {', '.join(map(printable, report.structures))}"
    if report.unreadable_bytes:
        yield f"  the host could not read {human_size(report.unreadable_bytes)} of the source"
    if report.resumed_at:
        yield f"  gone on with from guest offset {report.resumed_at:#x}"
    yield from (f"  note: {printable(note)}" for note in report.notes)
    yield f"  {human_size(report.written_bytes)} written, in {report.seconds:.2f} s"


def in_place_lines(report: InPlaceReport) -> Iterator[str]:
    """Yield what a repair in place did, line by line."""
    name = printable(report.image)
    yield f"{name} has new tables: it is standard qcow2, and a check finds nothing"
    amounts = {name: getattr(report, name) for name in vars(Amounts())}
    yield f"  a disk of {human_size(report.size)}: {_amounts(amounts)}"
    for part in report.lost_ranges[:RANGES_SHOWN]:
        yield f"  zeros now: guest range {part.offset:#x} to {part.offset + part.length:#x}"
    more = report.lost_range_count - RANGES_SHOWN
    if more > 0:
        yield f"  and {plural(more, 'more range')}: see --output=json"
    undo = f"jqcow-recover --undo {shlex.quote(name)}"
    yield f"  {human_size(report.written_bytes)} written; {undo} takes that back"
