"""Options that scripts written for qemu-img give: they do here what they do there, or are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import jqcow
from jqcow.cli import common, main
from tests.interop.commands import ours
from tests.support.qemu import check_clean, done, qemu_io, run

MIB = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=4k",
        "compression_type=zstd",
        "cluster_size=2M,compression_type=zstd,refcount_bits=8",
        "backing_file=base,backing_fmt=raw",
        "backing_file=base,backing_fmt=raw,compression_type=zstd,refcount_bits=32",
    ],
)
def test_create_takes_the_options_of_qemu_img(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    done("qemu-img", "create", "-q", "-f", "raw", "base", 3 * MIB)
    size = [] if "backing_file" in options else ["5M"]
    for name in ("ours", "theirs"):
        os.mkdir(name)
        os.link("base", f"{name}/base")
    ours(capsys, "create", "-q", "-o", options, "ours/image", *size)
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "theirs/image", *size)
    check_clean(Path("ours/image"))
    told = [
        json.loads(done("qemu-img", "info", "--output=json", f"{name}/image")) for name in ("ours", "theirs")
    ]
    for facts in told:
        assert facts.pop("filename") and facts.pop("actual-size")
        facts.pop("full-backing-filename", None)
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("refcount_bits=3", "1, 2, 4, 8, 16, 32 or 64 bits"),
        ("refcount_bits=x", "must be a number"),
        ("compression_type=lz4", "zlib or zstd"),
        ("backing_file=base", "needs its format"),
        ("backing_file=base,backing_fmt=vmdk", "qcow2 or raw"),
        ("backing_fmt=raw", "name it with -b"),
    ],
)
def test_create_refuses_other_values(options: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("base").write_bytes(bytes(MIB))
    assert main.main(["create", "-o", options, "image", "1M"]) == 1
    assert words in capsys.readouterr().err
    assert not Path("image").exists()


def test_create_refuses_two_bases(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["create", "-b", "base", "-F", "raw", "-u", "-o", "backing_file=other", "image", "1M"]
    assert main.main(command) == 1
    assert "contradicts -b" in capsys.readouterr().err


def make_overlay() -> None:
    done("qemu-img", "create", "-q", "-f", "raw", "base", 4 * MIB)
    done("qemu-io", "-f", "raw", "-c", "write -P 1 0 4M", "base")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "image")
    qemu_io(Path("image"), "write -P 2 1M 1M")


@pytest.mark.parametrize("command", [["commit"], ["rebase", "-b", ""]])
def test_progress_of_long_commands(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    make_overlay()
    assert main.main([*command, "-q", "--allow-files", "--progress=json", "image"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[-1].pop("elapsed") >= 0
    assert lines[-1] == {"transferred": 4 * MIB, "size": 4 * MIB, "description": command[0]}


def test_a_format_of_no_backing_file_is_not_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ours", "theirs"):
        make_overlay()
        os.rename("image", name)
    ours(capsys, "rebase", "--allow-files", "-F", "raw", "-b", "", "ours")
    done("qemu-img", "rebase", "-F", "raw", "-b", "", "theirs")
    done("qemu-img", "compare", "ours", "theirs")
    assert "backing" not in done("qemu-img", "info", "ours")


def test_snapshot_takes_the_size_of_its_journal(capsys: pytest.CaptureFixture[str]) -> None:
    make_overlay()
    ours(capsys, "snapshot", "--journal-size", "64k", "-c", "first", "image")
    assert "first" in done("qemu-img", "snapshot", "-l", "image")
    check_clean(Path("image"))
    assert main.main(["snapshot", "--journal-size", "64k", "-l", "image"]) == 1
    assert main.main(["snapshot", "--journal-size", "1k", "-c", "second", "image"]) == 1
    assert "journal" in capsys.readouterr().err


def test_a_format_that_is_not_known_is_refused_before_its_file_is_touched() -> None:
    make_overlay()
    done("qemu-img", "rebase", "-u", "-b", "base", "-F", "vmdk", "image")
    os.unlink("base")
    # Opening a pipe would wait for its other end.
    os.mkfifo("base")
    with pytest.raises(jqcow.UnsupportedFeatureError, match="vmdk"):
        jqcow.open("image", allow_files=True)


def test_a_snapshot_is_found_by_id_first_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a name is another one's id: `-a` of qemu-img does as ours, its `-d` knows names alone."""
    for image in ("ours", "theirs"):
        done("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
        done("qemu-img", "snapshot", "-c", "2", image)
        done("qemu-img", "snapshot", "-c", "other", image)
    ours(capsys, "snapshot", "-d", "2", "ours")
    run("qemu-img", "snapshot", "-d", "2", "theirs")
    assert "other" not in done("qemu-img", "snapshot", "-l", "ours")
    assert "other" in done("qemu-img", "snapshot", "-l", "theirs")


def test_two_commas_in_a_name_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.split_options("a=1,,2,b=,,,,,c") == ["a=1,2", "b=,,", "c"]
    done("qemu-img", "create", "-q", "-f", "raw", "b,ase", MIB)
    for name, create in (
        ("ours", lambda *options: ours(capsys, "create", "-q", *options)),
        ("theirs", lambda *options: done("qemu-img", "create", "-q", "-f", "qcow2", *options)),
    ):
        create("-o", f"data_file={name},,data,backing_file=b,,ase,backing_fmt=raw", name)
        assert os.path.exists(f"{name},data")
        facts = json.loads(done("qemu-img", "info", "--output=json", name))
        assert facts["backing-filename"] == "b,ase"
        assert facts["format-specific"]["data"]["data-file"] == f"{name},data"
    ours(capsys, "amend", "-q", "-o", "data_file=theirs,,data", "ours")
    assert "theirs,data" in done("qemu-img", "info", "ours")


def test_two_commas_in_the_name_of_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    Path("k,ey").write_bytes(b"secret")
    secret = "secret,id=s,file=k,,ey"
    ours(
        capsys,
        "create",
        "-q",
        "--object",
        secret,
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
        "image",
        "1M",
    )
    done(
        "qemu-io",
        "--object",
        secret,
        "-c",
        "read 0 4k",
        "--image-opts",
        "file.filename=image,encrypt.key-secret=s",
    )
