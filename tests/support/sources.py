"""What the source of jqcow says about itself: its barriers, and its numbered rules."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jqcow"
RULE = re.compile(r"^([A-Z]\d+)\. ", re.MULTILINE)
LISTED_RULE = re.compile(r"^- \*\*([A-Z]\d+)\*\* ", re.MULTILINE)


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


def engine_barrier_names() -> list[str]:
    """Return the names of the barriers that an image places: not those of commands on whole files."""
    return [name for name, module in barrier_calls() if not module.startswith("jqcow/offline/")]


def engine_rules() -> list[tuple[str, str]]:
    """Return (rule, module) of every rule that stands at the top of an engine module."""
    found = []
    for path in sorted((PACKAGE / "engine").glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found += [(rule, path.relative_to(ROOT).as_posix()) for rule in RULE.findall(docstring)]
    return found


def documented_rules() -> list[str]:
    """Return the rules that the crash argument lists."""
    text = (ROOT / "docs" / "crash-consistency.md").read_text(encoding="utf-8")
    return LISTED_RULE.findall(text[text.index("\n## Rules") :])
