"""Man pages and completion: made of the parsers, whole, and understood by the programs that read them."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from pathlib import Path

import pytest

from jqcow.cli import examples, manual, recover
from jqcow.cli.main import build_parser

PARSERS = {**manual.commands_of(build_parser()), "": build_parser()}
PAGES = dict(manual.man_pages())


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def test_files_are_below_share(tmp_path: Path) -> None:
    places = manual.write_below(tmp_path)
    assert {"man/man1/jqcow.1", "man/man1/jqcow-convert.1", "man/man1/jqcow-recover.1"} <= set(places)
    for place, text in manual.files().items():
        assert (tmp_path / place).read_text() == text


def test_groff_takes_all_pages() -> None:
    text = "".join(PAGES.values())
    found = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-z"], input=text, text=True, capture_output=True, check=True
    )
    assert found.stderr == ""


@pytest.mark.parametrize("name", [name for name in PARSERS if name])
def test_page_has_every_option(name: str) -> None:
    page = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-c", "-P-b", "-P-o", "-P-u"],
        input=PAGES[f"jqcow-{name}"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert not [option for option in options_of(PARSERS[name]) if option not in page]
    for _, line in examples.EXAMPLES[name]:
        assert line.split("|")[0].strip() in page


def completed(line: str) -> list[str]:
    """Return what bash offers at the end of a line."""
    words = [part for word in line.split(" ") for part in word.replace("=", " = ").split(" ")]
    script = f"""
        {manual.bash_completion()}
        COMP_WORDS=({" ".join(map(shlex.quote, words))})
        COMP_CWORD={len(words) - 1}
        "_{words[0].replace("-", "_")}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    result = subprocess.run(["bash", "-euc", script], text=True, capture_output=True, check=True)
    return result.stdout.split()


@pytest.mark.parametrize("name", PARSERS)
def test_bash_offers_every_option(name: str) -> None:
    line = f"jqcow {name} -" if name else "jqcow -"
    assert set(completed(line)) == options_of(PARSERS[name])


def test_bash_offers_commands_values_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk.qcow2").touch()
    assert completed("jqcow res") == ["resize"]
    assert set(completed("jqcow ")) >= {"convert", "mount", "--version"}
    assert completed("jqcow convert -O q") == ["qcow2"]
    assert completed("jqcow convert --progress=") == ["bar", "lines", "json"]
    assert completed("jqcow convert --progress=j") == ["json"]
    assert completed("jqcow info d") == ["disk.qcow2"]
    assert completed("jqcow-recover --dia") == ["--diagnose"]
    assert completed("jqcow-recover d") == ["disk.qcow2"]
    assert set(options_of(recover.build_parser())) == set(completed("jqcow-recover -"))


@pytest.mark.parametrize("name", [name for name in PARSERS if name])
def test_every_command_has_examples_that_it_takes(name: str) -> None:
    parser = build_parser()
    assert examples.EXAMPLES[name]
    for what, line in examples.EXAMPLES[name]:
        program, *arguments = shlex.split(line.partition("|")[0])
        assert program == "jqcow" and parser.parse_args(arguments) and what
        assert line in PARSERS[name].format_help()
