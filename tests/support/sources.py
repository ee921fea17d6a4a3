"""What the source of jqcow says about itself: its barriers, and its numbered rules.

A rule is a paragraph "X1. What holds." at the top of a module; its further lines are indented, or follow
without an empty line. docs/crash-consistency.md lists those that are about crashes; those of salvage, with
two letters, stand in its modules alone.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jqcow"
PAGE = ROOT / "docs" / "crash-consistency.md"
START, END = "<!-- rules: made by tools/rules -->\n", "<!-- end of rules -->"
RULE = re.compile(r"^([A-Z]{1,2}\d+)\. (.+?)(?=^[A-Z]{1,2}\d+\. |^\s*$|\Z)", re.MULTILINE | re.DOTALL)
WIDTH = 120


def barrier_calls() -> list[tuple[str, str]]:
    """Return (name, module) of every barrier that jqcow places, in the order of the source.

    A call whose name is not a literal passes another's name on, as the medium does; it is none of its own.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(ROOT).as_posix()
        if module.startswith("jqcow/testing/"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                if node.func.attr == "barrier" and names:
                    found.append((str(names[0]), module))
    return found


def barrier_names() -> list[str]:
    """Return the names of all barriers."""
    return [name for name, _ in barrier_calls()]


OF_WHOLE_FILES = ("jqcow/offline/", "jqcow/disks/")


def engine_barrier_names() -> list[str]:
    """Return the names of the barriers that an image places: not those of commands on whole files."""
    return [name for name, module in barrier_calls() if not module.startswith(OF_WHOLE_FILES)]


class Rule(NamedTuple):
    """A numbered rule: its number, the module that states it, and its words."""

    number: str
    module: str
    text: str


def rules_of(package: Path = PACKAGE) -> Iterator[Rule]:
    """Yield the rules of all modules of a package but those for testing, by module."""
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        if inside.parts[0] == "testing":
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        for number, text in RULE.findall(docstring):
            words = " ".join(text.split()).replace("``", "`")
            yield Rule(number, f"{package.name}/{inside.as_posix()}", words)


def render(package: Path = PACKAGE) -> str:
    """Return the lists, one for each module whose rules are about crashes.

    Raises:
        ValueError: two rules have one number.
    """
    lines: list[str] = []
    seen: dict[str, str] = {}
    for rule in rules_of(package):
        if rule.number in seen:
            raise ValueError(f"{rule.module} and {seen[rule.number]} both have a rule {rule.number}")
        is_first = rule.module not in seen.values()
        seen[rule.number] = rule.module
        if not rule.module.startswith(tuple(f"{package.name}/{name}/" for name in JUDGED)):
            continue
        if is_first:
            lines += ["", f"`{rule.module}`:", ""]
        lines += textwrap.wrap(
            f"- **{rule.number}** {rule.text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False
        )
    return "\n".join([*lines, "", ""])


def renew(page: str, lists: str) -> str:
    """Return the page with its lists replaced."""
    before, _, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError("the page has no place for the rules")
    return before + START + lists + END + after


JUDGED = ("engine", "disks", "device", "image", "ondisk")
"""The packages whose rules are about crashes; each of these rules has a mutant."""


def judged_rules() -> set[str]:
    """Return the rules that stand at the top of a module of these packages."""
    folders = tuple(f"jqcow/{package}/" for package in JUDGED)
    return {rule.number for rule in rules_of() if rule.module.startswith(folders)}
