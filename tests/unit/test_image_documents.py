"""The page on the Python interface names everything public, and what it shows works."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import jqcow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
TEXT = PAGE.read_text(encoding="utf-8")


def public_members(owner: type) -> list[str]:
    """Return the names of the methods, properties and fields that a class itself offers."""
    fields = [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
    members = [name for name, _ in inspect.getmembers_static(owner) if name in vars(owner)]
    return [name for name in {*fields, *members} if not name.startswith("_")]


def is_documented(name: str, text: str = TEXT) -> bool:
    """Return True if a text has the name in code, alone or with its arguments."""
    return re.search(rf"`(?:\w+\.)*{re.escape(name)}[`(]", text) is not None


def section_of(name: str) -> str:
    """Return the section that a class has for itself or shares with others of its kind."""
    for level in ("###", "##"):
        found = re.search(
            rf"^{level} `{name}`\n(.*?)(?=^#{{2,{len(level)}}} |\Z)", TEXT, re.DOTALL | re.MULTILINE
        )
        if found is not None:
            return found[1]
    return TEXT[TEXT.index("## Reports") : TEXT.index("## Errors")]


def test_every_public_name_is_documented() -> None:
    assert [name for name in jqcow.__all__ if not is_documented(name)] == []


@pytest.mark.parametrize(
    "owner",
    [
        jqcow.Image,
        jqcow.ImageFile,
        jqcow.Extent,
        jqcow.ImageInfo,
        jqcow.JournalInfo,
        jqcow.CheckReport,
        jqcow.Transaction,
        jqcow.Savepoint,
        jqcow.Receipt,
    ],
)
def test_every_public_member_is_documented(owner: type) -> None:
    section = section_of(owner.__name__)
    assert [name for name in public_members(owner) if not is_documented(name, section)] == []


@pytest.mark.parametrize(
    "function",
    [
        jqcow.create,
        jqcow.open,
        jqcow.serve,
        jqcow.Image.pread,
        jqcow.Image.pread_into,
        jqcow.Image.pwrite,
        jqcow.Image.write_zeroes,
        jqcow.Image.discard,
        jqcow.Image.resize,
        jqcow.Image.extents,
        jqcow.Image.transaction,
        jqcow.Transaction.pread,
        jqcow.Transaction.pread_into,
        jqcow.Transaction.pwrite,
        jqcow.Transaction.write_zeroes,
        jqcow.Transaction.discard,
        jqcow.Transaction.resize,
        jqcow.Transaction.savepoint,
        jqcow.Transaction.rollback,
        jqcow.Savepoint.rollback,
    ],
    ids=lambda function: function.__qualname__,
)
def test_signatures_are_those_of_the_code(function: Any) -> None:
    """Names, order and defaults of the arguments."""
    owner, _, name = function.__qualname__.rpartition(".")
    shown = re.search(rf"`(?:{owner}\.)?{name}\(([^`]*)\)`", section_of(owner) if owner else TEXT)
    assert shown is not None
    parts = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}".replace("'", '"')
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        parts.append(stars + parameter.name + default)
    assert shown[1] == ", ".join(parts)


def test_errors_are_in_their_tree() -> None:
    """The drawing has every error under its parent."""
    errors = [getattr(jqcow, name) for name in jqcow.__all__ if isinstance(getattr(jqcow, name), type)]
    errors = [error for error in errors if issubclass(error, jqcow.JqcowError)]
    drawing = TEXT[TEXT.index("```text") : TEXT.index("| error |")]
    for error in errors:
        assert re.search(rf"\b{error.__name__}\b", drawing)
        for other in ("OSError", "RuntimeError", "ValueError"):
            if other in [base.__name__ for base in error.__bases__]:
                assert f"{error.__name__} ({other})" in drawing


def test_examples_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    assert "not within the disk" in capsys.readouterr().out
