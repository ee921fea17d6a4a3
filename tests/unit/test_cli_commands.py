"""Do the commands print what they should, exit with the documented codes, and appear in their document?"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

import jqcow
from jqcow import _native
from jqcow.cli import common, main, recover
from jqcow.cli import progress as progress_of
from jqcow.device import names
from jqcow.device.disk import Extent, ExtentKind
from jqcow.device.file import FileDevice
from jqcow.ondisk.form import Preallocation
from jqcow.testing import SimulatedDevice

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
MIB = 1 << 20
CLUSTER = 65536


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    with jqcow.create(path, 10 * MIB) as made:
        made.pwrite(b"a" * CLUSTER, 0)
        made.pwrite(b"b" * CLUSTER, 5 * MIB)
    return path


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    device = SimulatedDevice()
    made = jqcow.create_on_device(device, 10 * MIB)
    made.pwrite(b"a" * CLUSTER, 0)
    made.flush()
    left = device.killed()
    path = tmp_path / "crashed.qcow2"
    path.write_bytes(left.pread(left.size(), 0))
    return path


# Sizes


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("0", 0),
        ("1", 512),
        ("512", 512),
        ("513", 1024),
        ("1k", 1024),
        ("1K", 1024),
        ("10M", 10 << 20),
        ("1.5G", 3 << 29),
        ("0.5k", 512),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
        ("0x1000", 4096),
        ("100b", 512),
    ],
)
def test_sizes(text: str, length: int) -> None:
    assert common.parse_size(text) == length


@pytest.mark.parametrize("text", ["", "k", "-1", "1X", "1kk", "1 k", "8E", "1.5.5G", "nan", "+5", "\u0661"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|large"):
        common.parse_size(text)


@pytest.mark.parametrize(
    ("length", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1 << 20, "1 MiB"), (1511424, "1.44 MiB")],
)
def test_human_sizes_are_those_of_qemu_img(length: int, text: str) -> None:
    assert common.human_size(length) == text


# create, resize, info, check


def test_create_refuses_what_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new.qcow2"
    assert run("create", "-o", "cluster_size=4k", path, "1G") == 0
    assert "cluster_size=4096 size=1073741824" in capsys.readouterr().out
    assert run("create", path, "2G") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("create", "-q", "--overwrite", path, "2G") == 0
    assert capsys.readouterr().out == ""
    with jqcow.open(path) as made:
        assert made.size == 2 << 30


def test_create_raw_rounds_up(tmp_path: Path) -> None:
    assert run("create", "-f", "raw", tmp_path / "new.raw", "1000") == 0
    assert (tmp_path / "new.raw").stat().st_size == 1024


@pytest.mark.parametrize("options", ["cluster_size=1000", "cluster_size=100", "hash=sha1", "cluster_size"])
def test_create_refuses_options_by_name(
    tmp_path: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("create", "-o", options, tmp_path / "new.qcow2", "1M") == 1
    told = capsys.readouterr().err
    assert options in told or "cluster size" in told
    assert list(tmp_path.iterdir()) == []


def test_info_of_a_crashed_image_says_what_to_do(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = crashed.read_bytes()
    assert run("info", crashed) == 0
    told = capsys.readouterr().out
    assert "Live journal: 2 records" in told
    assert "jqcow-recover" in told
    assert run("info", "--output=json", crashed) == 0
    assert json.loads(capsys.readouterr().out)["jqcow-journal"]["record-count"] == 2
    assert crashed.read_bytes() == before


def test_check_of_a_crashed_image_writes_nothing(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = crashed.read_bytes()
    assert run("check", crashed) == 0
    told = capsys.readouterr()
    assert "as after recovery" in told.err
    assert "No errors were found" in told.out
    assert crashed.read_bytes() == before


def test_check_exit_codes(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", image) == 0
    with jqcow.open(image, "r+") as made:
        made.discard(CLUSTER, 0)
    raw = bytearray(image.read_bytes())
    assert run("check", "-f", "raw", image) == 63
    table = int.from_bytes(raw[48:56], "big")
    block = int.from_bytes(raw[table : table + 8], "big")
    free = next(index for index in range(32768) if not any(raw[block + 2 * index : block + 2 * index + 2]))
    raw[block + 2 * free + 1] = 1
    image.write_bytes(raw)
    assert run("check", image) == 3
    lose_refcount_of_data(image)
    assert run("check", "-q", image) == 2
    assert run("check", image.parent / "missing") == 1
    capsys.readouterr()


def lose_refcount_of_data(path: Path) -> None:
    content = bytearray(path.read_bytes())
    table = int.from_bytes(content[48:56], "big")
    block = int.from_bytes(content[table : table + 8], "big")
    with jqcow.open(path) as made:
        host = next(extent.host_offset for extent in made.extents() if extent.host_offset)
    place = block + host // CLUSTER * 2
    content[place : place + 2] = bytes(2)
    path.write_bytes(content)


def size_of(path: Path) -> int:
    with jqcow.open(path) as image:
        return image.size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("20M", 20 * MIB),
        ("+2M", 12 * MIB),
        ("+1", 10 * MIB + 512),
        ("1000", 1024),
        ("-2M", 8 * MIB),
        ("-0.5M", 10 * MIB - MIB // 2),
        ("10M", 10 * MIB),
    ],
)
def test_resize_to_and_by(image: Path, size: str, expected: int) -> None:
    assert run("resize", "-q", "--shrink", image, size) == 0
    assert size_of(image) == expected
    assert run("check", "-q", image) == 0


def test_resize_takes_a_signed_size_after_two_dashes(image: Path) -> None:
    assert run("resize", "--shrink", image, "--", "-1M") == 0
    assert size_of(image) == 9 * MIB


def test_shrinking_is_asked_for_and_says_what_is_lost(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = image.read_bytes()
    assert run("resize", image, "-6M") == 1
    told = capsys.readouterr().err
    assert "64 KiB of data behind the new end would be lost" in told
    assert "--shrink" in told
    assert run("resize", image, "6M") == 1
    assert "no data would be lost" in capsys.readouterr().err
    assert image.read_bytes() == before
    assert run("resize", "--shrink", image, "-6M") == 0
    assert capsys.readouterr().out == "Image resized.\nData behind the new end, now lost: 64 KiB.\n"
    with jqcow.open(image) as made:
        assert made.size == 4 * MIB
        assert made.pread(CLUSTER, 0) == b"a" * CLUSTER
    assert run("resize", image, "10M") == 0
    assert capsys.readouterr().out == "Image resized.\n"
    with jqcow.open(image) as made:
        assert not any(made.pread(CLUSTER, 5 * MIB))


@pytest.mark.parametrize("size", ["0", "-10M", "-20M", "+-1M", "--1M", "1X", "+", ""])
def test_resize_refuses_sizes_that_no_disk_has(
    image: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = image.read_bytes()
    try:
        assert run("resize", "--shrink", image, size) == 1
    except SystemExit as left:
        assert left.code == 1
    assert capsys.readouterr().err.startswith("jqcow")
    assert image.read_bytes() == before


def test_resize_of_other_images(image: Path, crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("resize", "-f", "raw", image, "30M") == 1
    assert run("resize", crashed, "+1M") == 0
    assert "recovered first" in capsys.readouterr().err
    with jqcow.open(crashed) as made:
        assert made.recovered is None
        assert made.size == 11 * MIB


def test_resize_chooses_the_size_of_its_journal(
    image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = []
    resize = jqcow.Image.resize

    def resize_and_look(opened: jqcow.Image, size: int, preallocation: Preallocation) -> None:
        resize(opened, size, preallocation)
        journal = opened.info().journal
        lengths.append(None if journal is None else journal.length)

    monkeypatch.setattr(jqcow.Image, "resize", resize_and_look)
    assert run("resize", "-q", image, "+1M") == 0
    assert run("resize", "-q", "--journal-size", "64k", image, "+1M") == 0
    assert lengths == [8 * MIB, 65536]
    assert run("resize", "--journal-size", "10k", image, "+1M") == 1
    assert "multiple of 8192 from 64 KiB to 1 GiB" in capsys.readouterr().err
    assert size_of(image) == 12 * MIB


# map, journal


def test_map(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("map", image) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [["0", "0x10000"], ["0x500000", "0x10000"]]
    assert run("map", "--output=json", "-s", "5M", "-l", "1M", image) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(row["start"], row["length"], row["data"]) for row in told] == [
        (5 * MIB, CLUSTER, True),
        (5 * MIB + CLUSTER, MIB - CLUSTER, False),
    ]


def test_map_of_a_crashed_image_is_that_of_the_recovered_one(
    crashed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("map", "--output=json", crashed) == 0
    before = capsys.readouterr().out
    assert recover.main(["--no-check", str(crashed)]) == 0
    capsys.readouterr()
    assert run("map", "--output=json", crashed) == 0
    assert capsys.readouterr().out == before


def test_journal_tells_what_records_hold(crashed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("journal", crashed) == 0
    told = capsys.readouterr().out
    assert re.search(r"record 2, epoch 1, 4 KiB", told)
    assert "header: a disk of 10485760 bytes" in told
    assert "new L2 table, guest range 0x0 to 0xa00000" in told
    assert "refcount block, host range 0x0 to" in told
    assert "L1 table, guest range 0x0 to 0xa00000" in told
    assert "the newest record is whole" in told
    assert run("journal", "--output=json", crashed) == 0
    listing = json.loads(capsys.readouterr().out)
    assert [record["sequence"] for record in listing["records"]] == [1, 2]
    assert [half["live"] for half in listing["halves"]] == [False, True]


def test_journal_of_a_clean_image(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("journal", image) == 0
    assert "clean, no live journal" in capsys.readouterr().out
    assert run("journal", "--output=json", image) == 0
    assert json.loads(capsys.readouterr().out) is None


# convert


def test_convert_warns_of_a_guessed_raw_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * 4096)
    assert run("convert", "-O", "qcow2", "--verify", tmp_path / "a.raw", tmp_path / "b.qcow2") == 0
    told = capsys.readouterr()
    assert "WARNING: the format" in told.err
    assert "source and target are equal" in told.out
    assert run("convert", "-f", "raw", "-O", "qcow2", tmp_path / "a.raw", tmp_path / "c.qcow2") == 0
    assert capsys.readouterr().err == ""


def test_convert_reports_as_json(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "--output=json", image, tmp_path / "b.raw") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["source-format"], told["target-format"], told["written-bytes"]) == (
        "qcow2",
        "raw",
        2 * CLUSTER,
    )
    assert run("convert", image, tmp_path / "b.raw") == 1


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_convert_tells_how_much_it_compressed(
    kind: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("convert", "-O", "qcow2", "-c", "-o", f"compression_type={kind},cluster_size=4k", image)
    assert run(*command, "--output=json", tmp_path / "b.qcow2") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["compression-type"], told["compressed-bytes"]) == (kind, 2 * CLUSTER)
    # A sector for each cluster of 4096 bytes.
    assert told["packed-bytes"] == 2 * CLUSTER // 8
    assert run(*command, "--overwrite", "--compression-level=9", tmp_path / "b.qcow2") == 0
    assert f"  128 KiB of it compressed to 16 KiB ({kind})\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-c",), "a raw file cannot be compressed"),
        (("-O", "qcow2", "-o", "compression_type=lz4"), "must be zlib or zstd, not lz4"),
        (("-O", "raw", "-o", "compression_type=zstd"), "not supported for raw"),
        (("-O", "qcow2", "--compression-level=3"), "of use only"),
        (("-O", "qcow2", "-c", "--compression-level=0"), "from 1 to 9"),
        (("-O", "qcow2", "-c", "--compression-level=x"), "invalid int value"),
    ],
)
def test_convert_refuses_other_compressions(
    options: tuple[str, ...],
    message: str,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        assert run("convert", *options, image, tmp_path / "b") == 1
    except SystemExit as left:
        assert left.code == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_progress_as_json_lines(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "-q", "--progress=json", image, tmp_path / "b.raw") == 0
    steps = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert steps[-1].pop("elapsed") >= 0
    assert steps[-1] == {"transferred": 10 * MIB, "size": 10 * MIB, "description": "convert"}


def test_progress_as_a_bar() -> None:
    stream = io.StringIO()
    with progress_of.shown_progress("bar", stream, "convert") as progress:
        progress(0, 100)
        progress(100, 100)
    assert stream.getvalue().endswith("100% of 100 B\n")
    assert stream.getvalue().count("\r") == 2


def test_progress_as_lines_is_short() -> None:
    stream = io.StringIO()
    with progress_of.shown_progress("lines", stream, "convert") as progress:
        for done in range(1001):
            progress(done, 1000)
    assert 11 <= len(stream.getvalue().splitlines()) <= 12


@pytest.mark.parametrize(
    ("kinds", "shown"),
    [("dud", ["0.00", "50.00", "100.00", "100.00"]), ("uuu", ["0.00", "100.00"])],
)
def test_progress_as_in_qemu_img_is_that_of_data(kinds: str, shown: list[str]) -> None:
    names: dict[str, ExtentKind] = {"d": "data", "u": "unallocated"}
    extents = [Extent(10 * number, 10, names[kind], None) for number, kind in enumerate(kinds)]
    stream = io.StringIO()
    with progress_of.shown_percent(stream, progress_of.Allocated(extents)) as progress:
        for done in (10, 20, 30):
            progress(done, 30)
    assert stream.getvalue() == "".join(f"    ({percent}/100%)\r" for percent in shown) + "\n"


# Errors and exit codes


def test_errors_are_one_line_without_a_traceback(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(b"hello" * 100)
    cases = [
        ("info", "-f", "qcow2", tmp_path / "text"),
        ("info", tmp_path / "missing"),
        ("check", tmp_path),
        ("map", "-s", "x", image),
        ("journal", tmp_path / "text"),
        ("convert", image, image),
        ("convert", image, tmp_path / "no" / "such"),
        ("create", tmp_path / "no" / "such", "1M"),
        ("resize", tmp_path / "text", "1M"),
    ]
    for case in cases:
        assert run(*case) in (1, 63), case
        told = capsys.readouterr().err
        assert told.startswith("jqcow: ") or told.startswith("WARNING"), case
        assert "Traceback" not in told


def test_an_image_in_use(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with jqcow.open(image, "r+"):
        for case in (
            ("info", image),
            ("check", image),
            ("resize", image, "+1M"),
            ("convert", image, tmp_path / "x"),
        ):
            assert run(*case) == 4, case
    told = capsys.readouterr().err
    assert f"{image} is in use: another process, or another part of this one, has it open for writing" in told
    assert "Close the program that holds it" in told


def test_force_share_looks_beside_a_writer(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = []
    for command in ("info", "check", "map"):
        assert run(command, "--output=json", image) == 0
        alone.append(capsys.readouterr().out)
    with jqcow.open(image, "r+") as writer:
        for command, told in zip(("info", "check", "map"), alone, strict=True):
            assert run(command, image) == 4
            assert run(command, "-U", "--output=json", image) == 0
            assert capsys.readouterr().out == told
        writer.pwrite(b"x", 9 * MIB)
        for command in ("info", "check", "map"):
            assert run(command, "--force-share", image) == 4
            assert "live journal" in capsys.readouterr().err
    assert run("info", "-U", "-f", "raw", image) == 0


def test_force_share_maps_part_of_a_disk(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for limits in (("-s", "5M", "-l", "1M"), ("-s", "11M"), ("-l", "100M")):
        assert run("map", "--output=json", *limits, image) == 0
        alone = capsys.readouterr().out
        assert run("map", "-U", "--output=json", *limits, image) == 0
        assert capsys.readouterr().out == alone


def test_an_unsupported_image(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray(image.read_bytes())
    content[79] |= 1 << 2
    image.write_bytes(content)
    assert run("info", "--output=json", image) == 0
    assert json.loads(capsys.readouterr().out)["format-specific"]["data"]["data-file-raw"] is False
    for case in (("map", image), ("convert", image, tmp_path / "x")):
        assert run(*case) == 63, case
        assert "external data file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["info"], ["info", "--outp=json", "x"], ["check", "-r", "some", "x"]]
)
def test_wrong_arguments_exit_with_1(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.main(arguments)
    assert left.value.code == 1


@pytest.mark.parametrize("command", [main.main, recover.main])
def test_version_tells_which_kernels_serve(
    command: Callable[[Sequence[str] | None], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"jqcow {jqcow.__version__}, {_native.build_info()}\n"


@pytest.mark.parametrize("module", main.GROUPS)
def test_every_module_has_the_commands_that_it_is_known_for(module: str) -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    importlib.import_module(f"jqcow.cli.{module}").add_parsers(commands)
    assert tuple(commands.choices) == main.GROUPS[module]


_WRITERS = frozenset({"jqcow.engine.engine", "jqcow.image.image", "jqcow.nbd", "msgpack", "zstandard"})


@pytest.mark.parametrize(
    ("arguments", "needed", "others"),
    [
        (["info", "a.qcow2"], "jqcow.disks.view", {"jqcow.checker.check", "hashlib"}),
        (["create", "-f", "qcow2", "b.qcow2", "1M"], "jqcow.disks.making", {"jqcow.disks.view", "hashlib"}),
        (["check", "a.qcow2"], "jqcow.checker.check", {"hashlib"}),
    ],
)
@pytest.mark.parametrize("start", ["main", "main_like_qemu_img"])
def test_a_command_imports_what_it_needs_and_nothing_that_writes_to_images(
    start: str, arguments: list[str], needed: str, others: set[str], tmp_path: Path
) -> None:
    jqcow.create(tmp_path / "a.qcow2", 1 << 20).close()
    code = f"import sys\nfrom jqcow.cli import main\nmain.{start}(sys.argv[1:])\nprint(*sys.modules)"
    path = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    told = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | path,
    )
    loaded = set(told.stdout.splitlines()[-1].split())
    assert needed in loaded
    assert not loaded & (_WRITERS | others)


# The document


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command with its parser."""
    yield "jqcow-recover", recover.build_parser()
    whole = main.build_parser()
    yield "jqcow", whole
    groups = [action for action in whole._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in groups[0].choices.items():
        yield f"jqcow {name}", parser


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_ended_leaves_no_temporary_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    monkeypatch.setattr(names, "open_unnamed", lambda directory: None)

    def command() -> int:
        with closing(FileDevice.create_temporary(tmp_path / "new")):
            assert len(list(tmp_path.iterdir())) == 1
            os.kill(os.getpid(), number)
            raise AssertionError("the signal did nothing")

    assert common.run("jqcow", command) == 128 + number
    assert f"ended by {number.name}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert common.run("jqcow", lambda: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        warnings.simplefilter("always")
        warnings.warn("its owner was not kept", stacklevel=1)
        return 0

    assert common.run("jqcow", command) == 0
    assert capsys.readouterr().err == "jqcow: warning: its owner was not kept\n"


@pytest.mark.parametrize(
    ("name", "parser"), list(parsers()), ids=lambda part: part if isinstance(part, str) else ""
)
def test_every_command_and_option_is_documented(name: str, parser: argparse.ArgumentParser) -> None:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next((part for part in sections if part.splitlines()[0].strip("` ") == name), None)
    assert section is not None, f"no section on {name}"
    general = next(part for part in sections if part.startswith("Options of qemu-img"))
    for action in parser._actions:
        for option in action.option_strings:
            told = f"`{option}" in section or f"`{option}`" in general
            assert option in ("-h", "--help") or told, f"{name} {option}"
        if not action.option_strings and action.metavar not in (None, "COMMAND"):
            assert str(action.metavar) in section


def test_exit_codes_are_documented() -> None:
    text = PAGE.read_text(encoding="utf-8")
    codes = [value for name, value in vars(common).items() if name.startswith("EXIT_")]
    for code in codes:
        assert re.search(rf"^\| {code} \|", text, flags=re.MULTILINE), code
