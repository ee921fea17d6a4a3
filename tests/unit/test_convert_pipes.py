"""Does a disk go through pipes whole, in order, with nothing beside it, and is it what a file would hold?"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest

import jqcow
from jqcow.device import names
from jqcow.device.stream import OutputStream, Spool, spool_of
from jqcow.disks.chain import open_disk
from jqcow.offline.convert import convert
from jqcow.offline.streaming import Plan
from tests.support.qemu import done
from tests.unit.test_convert import MIB, scattered

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "jqcow"]


def run(*arguments: object, given: bytes = b"", code: int = 0) -> subprocess.CompletedProcess[bytes]:
    """Run a command with pipes at both ends."""
    command = [*COMMAND, *map(str, arguments)]
    result = subprocess.run(command, input=given, capture_output=True, check=False, cwd=ROOT)
    assert result.returncode == code, result.stderr.decode()
    return result


def streamed(source: Path, directory: Path, **options: object) -> Path:
    """Convert into a pipe; return a file of what came out of it."""
    reader, writer = os.pipe()
    target = directory / "streamed"
    with target.open("wb") as file, subprocess.Popen(["cat"], stdin=reader, stdout=file) as cat:
        os.close(reader)
        try:
            convert(source, OutputStream(writer, directory), **options)  # type: ignore[arg-type]
        finally:
            os.close(writer)
    assert cat.returncode == 0
    return target


FORMS = [
    {"cluster_size": 512},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 65536},
    {"cluster_size": 2 * MIB, "refcount_bits": 64},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "compat": "0.10"},
    {"cluster_size": 65536, "compression_type": "zstd"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("size", [512, 9 * MIB + 1536])
def test_stream_is_a_standard_image(tmp_path: Path, form: dict[str, object], size: int) -> None:
    """QEMU reads what comes out of the pipe, and finds neither error nor leak."""
    scattered(tmp_path / "a.raw", size)
    target = streamed(tmp_path / "a.raw", tmp_path, **form)
    done("qemu-img", "check", "-q", "-f", "qcow2", str(target))
    done("qemu-img", "compare", "-q", "-F", "raw", "-f", "qcow2", str(target), str(tmp_path / "a.raw"))
    with jqcow.open(target) as image:
        assert image.check().ok
    convert(tmp_path / "a.raw", tmp_path / "file.qcow2", **form)  # type: ignore[arg-type]
    assert target.stat().st_size == (tmp_path / "file.qcow2").stat().st_size


@pytest.mark.parametrize("size", [1 << 20, 1 << 40])
def test_empty_disk(tmp_path: Path, size: int) -> None:
    with (tmp_path / "a.raw").open("wb") as file:
        file.truncate(size)
    target = streamed(tmp_path / "a.raw", tmp_path)
    with jqcow.open(target) as image:
        assert image.size == size and image.check().ok and image.reads_as_zeros(size, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"compressed": True},
        {"compressed": True, "compression_type": "zstd", "cluster_size": 4096},
        {"preallocation": "metadata"},
    ],
    ids=str,
)
def test_what_needs_a_spool(tmp_path: Path, options: dict[str, object]) -> None:
    """It is what a file would hold, byte for byte, and nothing stays behind."""
    scattered(tmp_path / "a.raw", 3 * MIB)
    before = set(os.listdir(tmp_path))
    target = streamed(tmp_path / "a.raw", tmp_path, **options)
    assert set(os.listdir(tmp_path)) - before == {"streamed"}
    convert(tmp_path / "a.raw", tmp_path / "file.qcow2", **options)  # type: ignore[arg-type]
    assert target.read_bytes() == (tmp_path / "file.qcow2").read_bytes()
    done("qemu-img", "check", "-q", str(target))


def test_bitmaps_and_encryption_go_too(tmp_path: Path) -> None:
    with jqcow.create(tmp_path / "a.qcow2", MIB) as image:
        image.bitmaps.add("b")
        image.pwrite(b"x" * 70000, 0)
    target = streamed(tmp_path / "a.qcow2", tmp_path, bitmaps="all")
    with jqcow.open(target) as image:
        assert [bitmap.name for bitmap in image.bitmaps] == ["b"] and image.check().ok
    secret = jqcow.Encryption(b"word", iter_time=1)
    target = streamed(tmp_path / "a.qcow2", tmp_path, encryption=secret)
    with jqcow.open(target, passphrase=b"word") as image:
        assert image.pread(70000, 0) == b"x" * 70000


@pytest.mark.parametrize(
    "options", [{"verify": True}, {"data_file": "d"}, {"preallocation": "full"}, {"nocow": True}], ids=str
)
def test_what_a_pipe_cannot_have_is_refused_before_the_first_byte(
    tmp_path: Path, options: dict[str, object]
) -> None:
    scattered(tmp_path / "a.raw", MIB)
    with pytest.raises(ValueError, match="pipe"):
        streamed(tmp_path / "a.raw", tmp_path, **options)
    assert (tmp_path / "streamed").read_bytes() == b""


def test_nothing_but_the_image_on_standard_output(tmp_path: Path) -> None:
    content = scattered(tmp_path / "a.raw", 3 * MIB + 512)
    out = run("convert", "-p", tmp_path / "a.raw", "-")
    assert out.stdout == content
    assert b"standard output (raw)" in out.stderr and b"100%" in out.stderr
    image = run("convert", "-f", "raw", "-O", "qcow2", "-c", tmp_path / "a.raw", "-").stdout
    assert run("convert", "-q", "-O", "raw", "-", "-", given=image).stdout == content


def test_from_standard_input(tmp_path: Path) -> None:
    """Raw and qcow2 come in, are told apart, and become any target; names inside are relative to here."""
    content = scattered(tmp_path / "a.raw", 2 * MIB)
    result = run("convert", "-O", "qcow2", "--verify", "-", tmp_path / "b.qcow2", given=content)
    assert b"the format of 'standard input' was not given" in result.stderr
    with jqcow.open(tmp_path / "b.qcow2") as image:
        assert image.pread(len(content), 0) == content
    given = (tmp_path / "b.qcow2").read_bytes()
    run("convert", "-n", "-O", "raw", "-", tmp_path / "a.raw", given=given)
    assert (tmp_path / "a.raw").read_bytes() == content
    with jqcow.create(
        tmp_path / "over.qcow2", 2 * MIB, backing_file=str(tmp_path / "b.qcow2"), backing_format="qcow2"
    ) as image:
        image.pwrite(b"above", 0)
    given = (tmp_path / "over.qcow2").read_bytes()
    refused = run("convert", "-", "-", given=given, code=1)
    assert b"standard input" in refused.stderr and not refused.stdout
    shown = run("convert", "-q", "--allow-files", "-", "-", given=given).stdout
    assert shown == b"above" + content[5:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "a.raw", "-"],
        ["a.raw", "a.raw", "-"],
        ["-", "-", "b"],
        ["-S", "0", "a.raw", "-"],
        ["--output=json", "a.raw", "-"],
    ],
    ids=" ".join,
)
def test_refused_by_name(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    from jqcow.cli.main import main

    assert main(["convert", *arguments]) == 1
    out, told = capfd.readouterr()
    assert not out and "'-'" in told


def test_as_jqcow_img_it_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jqcow.cli.main import main_like_qemu_img

    monkeypatch.chdir(tmp_path)
    content = scattered(tmp_path / "a.raw", MIB)
    assert main_like_qemu_img(["convert", "-f", "raw", "-O", "raw", "a.raw", "-"]) == 0
    assert Path("-").read_bytes() == content


def test_terminal_gets_no_image(tmp_path: Path) -> None:
    leader, terminal = os.openpty()
    try:
        with pytest.raises(OSError, match="terminal"):
            OutputStream(terminal, tmp_path)
    finally:
        os.close(leader)
        os.close(terminal)


def test_reader_that_goes_away_ends_it(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"x" * (4 * MIB))
    with subprocess.Popen(
        [*COMMAND, "convert", str(tmp_path / "a.raw"), "-"], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 1


def test_spool_has_holes_and_no_name(tmp_path: Path) -> None:
    content = bytes(8 * MIB) + b"end" + bytes(4096)
    (tmp_path / "given").write_bytes(content)
    with (tmp_path / "given").open("rb") as file, closing(spool_of(file.fileno(), tmp_path)) as spool:
        assert spool.size() == len(content)
        assert spool.pread(len(content), 0) == content
        assert sum(length for _, length in spool.data_extents(0, len(content))) <= 8192
        assert os.listdir(tmp_path) == ["given"]


def test_spool_loses_its_name_where_it_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every file system knows files without a name."""
    monkeypatch.setattr(names, "open_unnamed", lambda directory: None)
    with closing(Spool.create(tmp_path, "standard input")) as spool:
        spool.pwrite(b"kept", 0)
        assert os.listdir(tmp_path) == [] and spool.pread(4, 0) == b"kept"
        assert spool.path == "standard input"


def test_full_directory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(spool: Spool, data: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "pwrite", full)
    (tmp_path / "given").write_bytes(b"x")
    with (tmp_path / "given").open("rb") as file, pytest.raises(OSError, match="No space") as caught:
        spool_of(file.fileno(), tmp_path)
    assert str(tmp_path) in caught.value.__notes__[0]


def test_plan_is_small(tmp_path: Path) -> None:
    """A bit for each cluster of the tables that have data: every other cluster of 2 GiB takes 4 KiB."""
    tracemalloc.start()
    try:
        plan = Plan(8192)
        for cluster in range(0, 1 << 15, 2):
            plan.add(cluster, 1)
        assert tracemalloc.get_traced_memory()[0] < 16 << 10
    finally:
        tracemalloc.stop()
    assert plan.cluster_count == 1 << 14


def test_runs_of_a_plan() -> None:
    chance = random.Random(5)
    for _ in range(200):
        plan, clusters = Plan(32), set[int]()
        for _ in range(chance.randrange(1, 6)):
            first, count = chance.randrange(100), chance.randrange(1, 40)
            plan.add(first, count)
            clusters |= set(range(first, first + count))
        found = {
            table * 32 + first + at
            for table in plan.tables
            for first, count in plan.runs(table)
            for at in range(count)
        }
        assert found == clusters and plan.cluster_count == len(clusters)


def test_salvage_into_a_pipe_tells_each_loss_once(tmp_path: Path) -> None:
    path = tmp_path / "cut.qcow2"
    with jqcow.create(path, MIB, cluster_size=4096) as image:
        image.pwrite(b"x" * MIB, 0)
        host = next(image.extents()).host_offset
    assert host is not None
    os.truncate(path, host + 512 * 1024)
    file = convert(path, tmp_path / "file", target_format="raw", salvage=True)
    assert file.lost
    reader, writer = os.pipe()
    with (tmp_path / "out").open("wb") as out, subprocess.Popen(["cat"], stdin=reader, stdout=out):
        os.close(reader)
        report = convert(path, OutputStream(writer, tmp_path), salvage=True)
        os.close(writer)
    assert report.lost == file.lost
    with closing(open_disk(tmp_path / "out", "qcow2")) as disk:
        found = bytearray(MIB)
        disk.read_into(memoryview(found), 0)
    assert found == (tmp_path / "file").read_bytes()
