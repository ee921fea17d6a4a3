"""The driver of QEMU's image fuzzer, with a stand-in for it: what is run, what is found, what replays."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jqcow.cli import looking
from tests.fuzz import image_fuzzer
from tests.fuzz.image_fuzzer import Chance, load, make_image, run, run_some

LAYOUT = """
import random
from os import urandom
from . import fuzz
import jqcow

def create_image(path, backing_name, backing_format, parts):
    size = random.sample({1, 2, 3, 4}, 1)[0] << 20
    backing = {"backing_file": backing_name, "backing_format": backing_format}
    jqcow.create(path, size, allow_files=True, **backing).close()
    with open(path, "r+b") as image:
        image.seek(fuzz.place(parts))
        image.write(urandom(4))
"""
FUZZ = """
import random

def place(parts):
    return random.randint(24, 100) if parts is None else 1 << 16
"""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Return where a generator is that has the form of QEMU's."""
    package = tmp_path / "qcow2"
    package.mkdir()
    (package / "__init__.py").write_text("from .layout import create_image\n")
    (package / "layout.py").write_text(LAYOUT)
    (package / "fuzz.py").write_text(FUZZ)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "qcow2"]:
        del sys.modules[name]


def test_every_command_runs_on_every_image(directory: Path) -> None:
    outcomes = run_some(directory, 1, 3)
    assert sum(outcomes.values()) == 3 * len(image_fuzzer.COMMANDS)
    assert any(name.endswith("exit status 0") for name in outcomes)


def test_a_number_replays_an_image(directory: Path) -> None:
    generator = load(directory)
    (directory / image_fuzzer.BACKING).write_bytes(bytes(512))
    contents = []
    for state in (1, 2):
        random.seed(state)
        path = make_image(generator, 7, directory)
        contents.append(path.read_bytes())
        path.unlink()
    assert contents[0] == contents[1]
    assert Chance(3).sample({5, 1}, 2) == Chance(3).sample([1, 5], 2)


def test_what_a_command_lets_through_is_found(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(looking, "check_file", broken)
    with pytest.raises(ZeroDivisionError) as raised:
        run_some(directory, 1, 6)
    assert "image 1" in raised.value.__notes__


def test_the_tool_tells_what_came_of_it(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(directory, 1, 2) == 0
    assert "2 images from 1, 0 groups failed" in capsys.readouterr().out
    (directory / "qcow2" / "fuzz.py").write_text("broken")
    assert run(directory, 1, 1) == 1


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path)
