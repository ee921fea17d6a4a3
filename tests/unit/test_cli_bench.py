"""bench: requests that are made as announced, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jqcow
from jqcow.cli import nulls
from jqcow.cli.main import main, main_like_qemu_img


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "a.qcow2"
    jqcow.create(path, 64 << 10).close()
    return str(path)


def content(path: str) -> bytes:
    with jqcow.open(path) as image:
        return image.pread(image.size, 0)


@pytest.mark.parametrize("depth", ["1", "3"])
def test_it_writes_where_it_says_and_begins_anew_behind_the_end(
    depth: str, image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-w", "-c", "4", "-s", "4k", "-S", "16k", "-o", "16k", "--pattern", "7", "-d", depth]
    assert main(["bench", *words, "--flush-interval", "3", image]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [
        f"Sending 4 write requests, 4096 bytes each, {depth} in parallel "
        "(starting at offset 16384, step size 16384)",
        "Sending flush every 3 requests",
    ]
    assert re.fullmatch(r"Run completed in \d+\.\d{3} seconds, \d+ requests/s\.", told[2])
    assert content(image) == (b"\x07" * 4096 + bytes(12288)) * 4
    assert main_like_qemu_img(["bench", "-c", "3", "-d", depth, image]) == 0
    assert capsys.readouterr().out.endswith(" seconds.\n")


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "0"],
        ["-d", "0"],
        ["-d", "1025"],
        ["-s", "0"],
        ["-s", "128k"],
        ["-w", "--pattern", "256"],
        ["--flush-interval", "100"],
        ["-w", "--flush-interval", "1"],
        ["-w", "-f", "raw"],
        ["-w", "-U"],
    ],
)
def test_what_no_run_is(words: list[str], image: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path(image).read_bytes()
    assert main(["bench", *words, image]) == 1
    assert capsys.readouterr().err.startswith("jqcow: ")
    assert Path(image).read_bytes() == before


@pytest.mark.parametrize(
    "options", ["size=x", "size=9223372036854775808", "size=-1", "file.filename=x", "read-zero=on"]
)
def test_what_no_disk_of_zeros_is(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--image-opts", f"driver=null-co,{options}"]) == 1
    assert "null-co" in capsys.readouterr().err


def test_nobody_writes_to_a_disk_of_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.raw"
    source.write_bytes(b"x" * 4096)
    assert main(["convert", "-n", "-f", "raw", "-O", "raw", str(source), "null-co://"]) == 1
    assert "not permitted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "driver=blkdebug",
        "driver=blkdebug,config=x,image.driver=qcow2,image.file.filename={}",
        "driver=blkdebug,inject-error.0.event=read_aio,image.driver=qcow2,image.file.filename={}",
    ],
)
def test_no_errors_are_made(text: str, image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "--image-opts", text.format(image)]) == 1
    assert "blkdebug" in capsys.readouterr().err


def test_a_name_is_no_disk_of_zeros_for_its_letters(tmp_path: Path) -> None:
    assert nulls.is_null("null-co://") and nulls.is_null("null-aio:")
    assert not any(map(nulls.is_null, ("null-co", "./null-co://", str(tmp_path / "null-co:"), "nbd://x")))
