"""Figures of long runs: tools record them as small JSON files, `tools/figures` makes docs/figures.md of them.

A file holds a ``title`` and a ``note`` that people write, the ``command``, ``totals`` (a name and a value
each), a ``text`` that is shown as it stands, and ``tables``: columns, and rows by their name. The page sums
up the tables of barriers; the others stay in the files.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.support.runs import table

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "figures"
PAGE = ROOT / "docs" / "figures.md"
WIDTH = 120

INTRODUCTION = """# Figures

`tools/figures` makes this page from the files in `docs/figures`; the tools write those with `--record FILE`.
The files also hold the states of every family, operation and barrier interval. The machines were shared and
had two cores.
[crash-laboratory](crash-laboratory.md#the-campaigns-on-jqcow) and [outside](outside.md) tell what the
campaigns do, [benchmarks](benchmarks.md) what is measured.
"""


def record(
    path: str | Path,
    totals: Mapping[str, float | str],
    tables: Mapping[str, Iterable[str]] | None = None,
    text: str = "",
    program: str = "",
    *,
    adds: bool = False,
) -> None:
    """Write the figures of a run; the title and the note of an older file stay.

    Args:
        path: the file, or "" for none.
        totals: names and values, in the order in which the page shows them.
        tables: lines of text, columns apart by two spaces, the first line the names of the columns.
        text: what else is to be shown, such as a small table.
        program: the name of the command, where it is not the script's.
        adds: the run goes on with the one that the file has: numbers are added, shares are of all.
    """
    if not path:
        return
    file = Path(path)
    old = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rows = {name: table_of(lines) for name, lines in (tables or {}).items()}
    if adds and old.get("totals"):
        added = {name: sum_of(old["totals"].get(name, 0), value) for name, value in totals.items()}
        # What this part had nothing of stays.
        totals = {**old["totals"], **added}
        rows = {name: joined(old["tables"].get(name, found), found) for name, found in rows.items()}
    figures = {
        "title": old.get("title", file.stem),
        "note": old.get("note", ""),
        "command": command_of(program, sys.argv),
        "totals": dict(totals),
        "text": text,
        "tables": rows,
    }
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def command_of(program: str, arguments: list[str]) -> str:
    """Return the command line without `--record` and its file; a place of one machine is a DIRECTORY."""
    script, *options = arguments
    words, skip = [program or f"tools/{Path(script).name}"], False
    for option in options:
        if not skip and not option.startswith("--record"):
            words.append("DIRECTORY" if option.startswith("/") else option)
        skip = option == "--record"
    return " ".join(words)


def table_of(lines: Iterable[str]) -> dict[str, Any]:
    """Read a table from lines of text."""
    (_, *columns), *rows = (re.split(r"\s{2,}", line.strip()) for line in lines if line.strip())
    return {"columns": columns, "rows": {name: [number_of(cell) for cell in cells] for name, *cells in rows}}


def recorded(path: str | Path) -> dict[str, float | str]:
    """Return the totals that a file has, none where there is no file."""
    file = Path(path)
    if not path or not file.exists():
        return {}
    totals: dict[str, float | str] = json.loads(file.read_text(encoding="utf-8")).get("totals", {})
    return totals


def sum_of(before: float | str, now: float | str) -> float | str:
    """Return the sum of two numbers; of texts the later one."""
    return now if isinstance(before, str) or isinstance(now, str) else before + now


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return a table with the rows of both: those of one name are added."""
    rows = dict(before["rows"])
    for name, cells in now["rows"].items():
        rows[name] = [sum_of(*pair) for pair in zip(rows.get(name, [0] * len(cells)), cells, strict=True)]
    return {"columns": now["columns"], "rows": rows}


def number_of(text: str) -> float | str:
    """Return a number, or the text where it is none."""
    plain = text.replace(",", "")
    return int(plain) if plain.isdecimal() else text


def render(folder: Path = FOLDER) -> str:
    """Return the page that the files in a folder make."""
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    parts = [INTRODUCTION, *(section_of(run) for run in runs.values()), barrier_section(runs)]
    return "\n".join(parts)


def section_of(run: dict[str, Any]) -> str:
    """Return the part of the page on one run."""
    totals = ", ".join(f"{name} **{shown(value)}**" for name, value in run["totals"].items())
    paragraphs = [f"## {run['title']}", f"`{run['command']}`", totals and f"{totals}.", run["note"]]
    parts = [textwrap.fill(text, WIDTH, break_on_hyphens=False) + "\n" for text in paragraphs if text]
    if run["text"]:
        parts.append(fenced(run["text"].splitlines()))
    return "\n".join(parts)


def barrier_section(runs: dict[str, dict[str, Any]]) -> str:
    """Return the table of the states that each campaign cut just before and just after each barrier."""
    tables = {
        name.removeprefix("campaign-"): run["tables"]["barrier"]["rows"]
        for name, run in runs.items()
        if "barrier" in run["tables"]
    }
    barriers = dict.fromkeys(barrier for rows in tables.values() for barrier in rows)
    lines = []
    for barrier in barriers:
        cells = (rows.get(barrier, [0, 0, 0]) for rows in tables.values())
        lines.append((barrier, *(f"{shown(before)}/{shown(after)}" for _, before, after in cells)))
    heading = (
        "## Barriers\n\nDistinct states that the campaigns cut just before and just after each barrier:\n"
    )
    return f"{heading}\n{fenced(table(('barrier', *tables), lines))}"


def fenced(lines: Iterable[str]) -> str:
    """Return lines as a block that is shown as it stands."""
    return "\n".join(["```", *lines, "```", ""])


def shown(value: float | str) -> str:
    """Return a value as the page shows it."""
    return value if isinstance(value, str) else f"{value:,}"
