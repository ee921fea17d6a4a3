"""Do the documents hold together, and does what they show work?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.ondisk.entries import OFFSET_MASK
from tests.support.patients import Tables

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]

WORDS_MAX = 47_900
"""The engine, its use and its tests are told in 22,000; what can be wrong with an image takes tables more."""

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.~<-])/(?:home|opt|root|tmp|var|work|Users)/\w+")
NAMED_TEST = re.compile(r"`((?:tests/)?[a-z]+/test_\w+\.py)`")
COMMANDS = {"jqcow": "main", "jqcow-recover": "recover"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page in order: language and text."""
    return FENCED.findall(page.read_text(encoding="utf-8"))


def prose_of(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def links_of(page: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file and the anchor that each link within the project names."""
    for target in LINK.findall(prose_of(page)):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            yield (page.parent / name).resolve() if name else page, anchor


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that a page offers, as the usual renderers make them from its headings."""
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose_of(page)))
    return {heading.replace(" ", "-") for heading in words}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links_of(page):
        assert target.exists(), f"{page.name} links to {target.name}, which does not exist"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name} links to {target.name}#{anchor}"


def test_every_document_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            waiting += [target for target, _ in links_of(page)]
    assert sorted(page.name for page in set(PAGES) - reached) == []


@every_page
def test_pages_name_no_place_of_one_machine(page: Path) -> None:
    assert not MACHINE_PATH.findall(page.read_text(encoding="utf-8"))


@every_page
def test_tests_that_a_page_names_exist(page: Path) -> None:
    for name in NAMED_TEST.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / "tests" / name.removeprefix("tests/")).is_file(), name


def test_all_pages_together_are_short() -> None:
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in PAGES) <= WORDS_MAX


@every_page
def test_python_blocks_are_python(page: Path) -> None:
    for language, text in blocks_of(page):
        if language == "python":
            compile(text, page.name, "exec")


@pytest.fixture
def command_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a PATH on which the commands of this checkout are found, installed or not."""
    folder = tmp_path_factory.mktemp("commands")
    for name, module in COMMANDS.items():
        script = folder / name
        script.write_text(
            f"#!{sys.executable}\nimport sys\nfrom jqcow.cli.{module} import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)
    python = folder / "python3"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def run_blocks(page: Path) -> None:
    """Run the Python and shell blocks of a page in order, in the current directory, with one set of names."""
    names: dict[str, Any] = {"__name__": "page"}
    for language, text in blocks_of(page):
        if language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "sh" and "tools/" not in text:
            result = subprocess.run(["bash", "-eu", "-c", text], capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{text}{result.stdout}{result.stderr}"


@pytest.mark.parametrize("name", ["README.md", "docs/how-to.md", "docs/serving.md"])
def test_recipes_work(name: str, command_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", command_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for example in (DOCS / "examples").iterdir():
        (tmp_path / example.name).write_bytes(example.read_bytes())
    run_blocks(ROOT / name)


@pytest.mark.parametrize("damage", ["L2 table", "refcount table too"])
def test_the_page_for_the_worst_night_works(
    damage: str, command_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/recovery.md, in their order, on an image that is really damaged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", command_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with jqcow.create("disk.qcow2", 64 << 20, cluster_size=4096) as image:
        image.pwrite(b"what is wanted back" * 1000, 0)
        image.pwrite(b"what no table names" * 1000, 8 << 20)
    tables = Tables(Path("disk.qcow2").read_bytes())
    lost = tables.entry(tables.l1 + 8 * 4) & OFFSET_MASK
    tables.image[lost : lost + 4096] = b"\xee" * 4096
    if damage != "L2 table":
        tables.set_entry(48, 0)
    Path("disk.qcow2").write_bytes(tables.image)
    page = DOCS / "recovery.md"
    texts = [text for language, text in blocks_of(page) if language == "sh"]
    first = texts.index(next(text for text in texts if "--diagnose" in text))
    for text in texts[first : first + 3]:
        result = subprocess.run(["bash", "-eu", "-c", text], capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{text}{result.stdout}{result.stderr}"
    assert Path("disk.qcow2").read_bytes() == tables.image
    with jqcow.open("saved.qcow2") as image:
        assert image.pread(19, 0) == b"what is wanted back"
    assert {"look.html", "saved.json"} <= set(os.listdir())
    # The rest is about an image that crashed.
    with jqcow.create("disk.qcow2", 1 << 20, overwrite=True):
        pass
    for text in texts[first + 3 :]:
        subprocess.run(["bash", "-eu", "-c", text], check=True, capture_output=True)
