"""The lists of numbered rules in docs/crash-consistency.md, made from the docstrings of the modules.

A rule is a paragraph "X1. What holds." at the top of a module; its further lines are indented, or follow
without an empty line.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.sources import PACKAGE, ROOT

PAGE = ROOT / "docs" / "crash-consistency.md"
START, END = "<!-- rules: made by tools/rules -->\n", "<!-- end of rules -->"
RULE = re.compile(r"^([A-Z]\d+)\. (.+?)(?=^[A-Z]\d+\. |^\s*$|\Z)", re.MULTILINE | re.DOTALL)


WIDTH = 120


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
    """Return the lists, one for each module.

    Raises:
        ValueError: two rules have one number.
    """
    lines: list[str] = []
    seen: dict[str, str] = {}
    for rule in rules_of(package):
        if rule.number in seen:
            raise ValueError(f"{rule.module} and {seen[rule.number]} both have a rule {rule.number}")
        if rule.module not in seen.values():
            lines += ["", f"`{rule.module}`:", ""]
        seen[rule.number] = rule.module
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
