"""Is the list of rules in docs/crash-consistency.md what the modules say?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import sources


def test_the_list_is_what_the_modules_say() -> None:
    page = sources.PAGE.read_text(encoding="utf-8")
    assert sources.renew(page, sources.render()) == page, "run tools/rules"


def test_every_rule_is_in_it() -> None:
    paths = (path for package in sources.JUDGED for path in (sources.PACKAGE / package).glob("*.py"))
    modules = (path.read_text(encoding="utf-8") for path in paths)
    stated = {rule for module in modules for rule in re.findall(r"^([A-Z]\d+)\. ", module, re.MULTILINE)}
    listed = re.findall(r"^- \*\*([A-Z]\d+)\*\* ", sources.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert stated == sources.judged_rules() == set(listed)


def test_a_rule_ends_where_the_next_one_or_the_paragraph_does(tmp_path: Path) -> None:
    text = '"""A module.\n\nA1. One,\n    ``two``  three.\nA2. Four.\n\nMore.\n"""\n'
    (tmp_path / "module.py").write_text(text)
    assert [(rule.number, rule.text) for rule in sources.rules_of(tmp_path)] == [
        ("A1", "One, `two` three."),
        ("A2", "Four."),
    ]


def test_a_number_is_given_once(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.py").write_text('"""A module.\n\nA1. One.\n"""\n')
    with pytest.raises(ValueError, match="both have a rule A1"):
        sources.render(tmp_path)


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        sources.renew("A page.", "A table.")
