"""Chains as files: who is asked before a file is opened, what is refused, and what overlays are made."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.cli import main
from jqcow.device.disk import Extent
from jqcow.disks import chain as chains
from jqcow.disks.policy import FilePolicy, Following
from jqcow.errors import (
    CorruptionError,
    FileAccessDenied,
    FormatError,
    ImageInUse,
    UnsupportedFeatureError,
)
from jqcow.offline.commit import commit
from jqcow.offline.info import read_chain
from jqcow.offline.map import MapLine, map_file
from jqcow.offline.overlay import base_size, create_overlay
from jqcow.ondisk.blank import blank_image
from jqcow.ondisk.form import Form
from jqcow.ondisk.header import HeaderArea
from jqcow.ondisk.naming import NamedFile
from jqcow.testing import SimulatedDevice

MIB = 1 << 20
ALLOWED = Following(True)
PROBING = Following(True, probe=True)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.main(list(arguments))
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def overlay(path: str, base: str, backing_format: Any = "qcow2", size: int = MIB) -> None:
    create_overlay(
        path,
        size,
        cluster_size=65536,
        backing_file=base,
        backing_format=backing_format,
        overwrite=os.path.exists(path),
    )


def store_backing(path: str, name: bytes, backing_format: bytes | None) -> None:
    """Write any name and format into an image, as nobody who means well would."""
    with open(path, "r+b") as file:
        area = HeaderArea.parse(file.read(65536)).with_backing_file(name, backing_format)
        file.seek(0)
        file.write(area.data.ljust(65536, b"\0"))


def make_chain(depth: int) -> list[str]:
    """Return the names of a chain from the top: ``depth`` overlays and a base, each in its own directory."""
    names = [f"d{number}/i" for number in range(depth + 1)]
    for name in names:
        os.mkdir(os.path.dirname(name))
    jqcow.create(names[-1], MIB).close()
    for name, below in zip(names[-2::-1], names[:0:-1], strict=True):
        overlay(name, f"../{below}")
    return names


# Reading a chain


def test_a_chain_is_read_from_the_top() -> None:
    names = make_chain(3)
    facts = read_chain(names[0], following=ALLOWED)
    assert [os.path.normpath(fact.filename) for fact in facts] == ["d0/i", "d1/i", "d2/i", "d3/i"]
    assert facts[1].filename == "d0/../d1/i"
    assert [fact.qcow2 and fact.qcow2.backing_file for fact in facts] == [
        "../d1/i",
        "../d2/i",
        "../d3/i",
        None,
    ]
    assert len(read_chain(names[3], following=Following(False))) == 1


def test_nothing_is_opened_that_was_not_allowed() -> None:
    make_chain(1)
    os.unlink("d1/i")
    for policy in (False, lambda _: False):
        with pytest.raises(FileAccessDenied, match=r"'\.\./d1/i'"):
            read_chain("d0/i", following=Following(policy))
        with pytest.raises(FileAccessDenied):
            map_file("d0/i", None, following=Following(policy))


def test_the_caller_is_asked_for_every_file_before_it_is_opened() -> None:
    names = make_chain(3)
    asked: list[NamedFile] = []

    def two_only(named: NamedFile) -> bool:
        asked.append(named)
        return len(asked) < 3

    with pytest.raises(FileAccessDenied) as denied:
        read_chain(names[0], following=Following(two_only))
    assert asked[0] == NamedFile("d0/i", "../d1/i", "d0/../d1/i", "qcow2", "backing")
    assert asked[1].image == "d0/../d1/i"
    assert denied.value.path == asked[2].path
    assert len(asked) == 3


@pytest.mark.parametrize("links", ["the file", "its directory"])
@pytest.mark.parametrize("write", [False, True])
def test_what_was_judged_is_what_is_opened(links: str, write: bool) -> None:
    jqcow.create("secret", MIB).close()
    for folder in ("good", "bad"):
        os.mkdir(folder)
    jqcow.create("good/base", MIB).close()
    os.rename("secret", "bad/base")
    os.symlink("good/base" if links == "the file" else "good", "link")
    name = "link" if links == "the file" else "link/base"
    jqcow.create("top", MIB, backing_file=name, backing_format="qcow2").close()
    told: list[str | None] = []

    def swap(named: NamedFile) -> bool:
        told.append(named.real_path)
        os.unlink("link")
        os.symlink("bad/base" if links == "the file" else "bad", "link")
        return True

    for call in (commit,) if write else (jqcow.open, read_chain_of):
        told.clear()
        with pytest.raises(ImageInUse, match="leads elsewhere"):
            call("top", allow_files=swap)
        assert told == [os.path.realpath("good/base")]
        os.unlink("link")
        os.symlink("good/base" if links == "the file" else "good", "link")
    jqcow.open("top", allow_files=lambda named: named.real_path == os.path.realpath("good/base")).close()


def read_chain_of(path: str, *, allow_files: FilePolicy) -> None:
    read_chain(path, following=Following(allow_files))


def test_the_format_comes_from_the_header() -> None:
    jqcow.create("base", MIB).close()
    overlay("top", "base", "raw", size=os.path.getsize("base"))
    facts = read_chain("top", following=PROBING)
    assert [fact.format for fact in facts] == ["qcow2", "raw"]
    assert facts[1].virtual_size == os.path.getsize("base")
    assert all(line.extent.depth == 1 and line.present for line in map_file("top", None, following=ALLOWED))


@pytest.mark.parametrize("stored", [None, b""])
def test_a_missing_format_is_refused_unless_probing_is_allowed(stored: bytes | None) -> None:
    jqcow.create("base", MIB).close()
    overlay("top", "base")
    store_backing("top", b"base", stored)
    with pytest.raises(UnsupportedFeatureError, match="without a format"):
        read_chain("top", following=ALLOWED)
    with pytest.raises(UnsupportedFeatureError, match="without a format"):
        map_file("top", None, following=ALLOWED)
    assert [fact.format for fact in read_chain("top", following=PROBING)] == [
        "qcow2",
        "qcow2",
    ]
    Path("base").write_bytes(b"not an image".ljust(MIB))
    assert [fact.format for fact in read_chain("top", following=PROBING)] == [
        "qcow2",
        "raw",
    ]


def test_other_formats_and_protocols_are_refused_by_name() -> None:
    jqcow.create("base", MIB).close()
    overlay("top", "base")
    store_backing("top", b"base", b"vmdk")
    with pytest.raises(UnsupportedFeatureError, match="'vmdk'"):
        read_chain("top", following=PROBING)
    store_backing("top", b"nbd://host/disk", b"raw")
    for allow in (True, False):
        with pytest.raises(UnsupportedFeatureError, match="'nbd:'"):
            read_chain("top", following=Following(allow))


@pytest.mark.parametrize("name", [b"a\0b", b"x\xff/../\0"])
def test_names_that_no_file_has_are_refused(name: bytes) -> None:
    overlay("top", "base")
    store_backing("top", name, b"raw")
    with pytest.raises(FormatError, match="NUL"):
        read_chain("top", following=ALLOWED)


def test_any_bytes_may_name_a_file(run: Run) -> None:
    name = b"b\xff\n"
    Path(os.fsdecode(name)).write_bytes(b"x" * MIB)
    overlay("top", os.fsdecode(name), "raw")
    assert read_chain("top", following=ALLOWED)[1].virtual_size == MIB
    code, told, _ = run("map", "--allow-files", "top")
    assert (code, told.count("b\ufffd\ufffd\n")) == (0, 1)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_chains_that_contain_themselves_are_refused(length: int) -> None:
    os.mkdir("no")
    for number in range(length):
        jqcow.create(f"i{number}", MIB).close()
        store_backing(f"i{number}", f"./no/../i{(number + 1) % length}".encode(), b"qcow2")
    for look in (
        lambda: read_chain("i0", following=ALLOWED),
        lambda: map_file("i0", None, following=ALLOWED),
    ):
        with pytest.raises(CorruptionError, match="comes back"):
            look()


def test_another_name_of_the_same_file_is_the_same_file() -> None:
    jqcow.create("top", MIB).close()
    store_backing("top", b"hard", b"qcow2")
    os.link("top", "hard")
    with pytest.raises(CorruptionError, match="comes back"):
        read_chain("top", following=ALLOWED)
    overlay("first", "soft")
    os.symlink("first", "soft")
    with pytest.raises(CorruptionError, match="comes back"):
        read_chain("first", following=ALLOWED)


def test_symbolic_links_find_the_files_beside_the_link() -> None:
    make_chain(1)
    os.symlink("d0/i", "link")
    with pytest.raises(FileNotFoundError):
        read_chain("link", following=ALLOWED)
    os.mkdir("links")
    os.symlink("../d0/i", "links/link")
    assert len(read_chain("links/link", following=ALLOWED)) == 2


def test_the_longest_chain() -> None:
    """Chains as long as allowed are read and mapped, though Python's calls do not nest as deep."""
    limit = chains.MAX_CHAIN_FILES
    Path("i0").write_bytes(b"x" * MIB)
    for number in range(1, limit + 1):
        below_format = "raw" if number == 1 else "qcow2"
        blank = blank_image(MIB, Form(9), backing_file=f"i{number - 1}", backing_format=below_format)
        with open(f"i{number}", "wb") as file:
            file.truncate(blank.length)
            for offset, data in blank.parts:
                file.seek(offset)
                file.write(data)
    assert len(read_chain(f"i{limit - 1}", following=ALLOWED)) == limit
    with pytest.raises(UnsupportedFeatureError, match=f"more than {limit} files"):
        read_chain(f"i{limit}", following=ALLOWED)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit + 100), hard))
    try:
        (line,) = map_file(f"i{limit - 1}", None, following=ALLOWED)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (line.extent.depth, line.extent.length, line.path) == (limit - 1, MIB, "i0")


def test_a_missing_file_names_who_needs_it() -> None:
    overlay("top", "gone")
    for look in (
        lambda: read_chain("top", following=ALLOWED),
        lambda: map_file("top", None, following=ALLOWED),
    ):
        with pytest.raises(FileNotFoundError) as missing:
            look()
        assert missing.value.__notes__ == ["top names it as its backing file, by 'gone'"]


def test_a_damaged_base_is_told_from_its_overlay(run: Run) -> None:
    Path("base").write_bytes(b"garbage" * 10000)
    overlay("top", "base")
    code, _, told = run("info", "--backing-chain", "--allow-files", "top")
    assert code == 1
    assert "top names it as its backing file, by 'base'" in told


def test_a_base_that_is_being_written_to_is_in_use() -> None:
    jqcow.create("base", MIB).close()
    overlay("top", "base")
    with jqcow.open("base", "r+") as writer:
        writer.pwrite(b"x", 0)
        with pytest.raises(ImageInUse):
            read_chain("top", following=ALLOWED)
        with pytest.raises(ImageInUse, match="live journal"):
            read_chain("top", following=Following(True, share_writers=True))
    assert len(read_chain("top", following=ALLOWED)) == 2


def test_a_crashed_base_is_read_as_recovered() -> None:
    device = SimulatedDevice()
    made = jqcow.create_on_device(device, MIB)
    made.pwrite(b"a" * 65536, 65536)
    made.flush()
    left = device.killed()
    Path("base").write_bytes(left.pread(left.size(), 0))
    before = Path("base").read_bytes()
    overlay("top", "base")
    facts = read_chain("top", following=ALLOWED)
    assert facts[1].qcow2 is not None and facts[1].qcow2.journal is not None
    data = [line.extent for line in map_file("top", None, following=ALLOWED) if line.data]
    assert [(extent.offset, extent.length, extent.depth) for extent in data] == [(65536, 65536, 1)]
    assert Path("base").read_bytes() == before


def test_a_disk_far_larger_than_its_tables_is_refused() -> None:
    jqcow.create("base", MIB, cluster_size=512).close()
    content = bytearray(Path("base").read_bytes())
    content[24:32] = ((1 << 63) - 512).to_bytes(8, "big")
    Path("base").write_bytes(content)
    overlay("top", "base", size=1 << 40)
    with pytest.raises(FormatError, match="too small for"):
        map_file("top", None, following=ALLOWED)


def test_what_no_file_has_is_one_extent_at_the_depth_of_the_last_file() -> None:
    jqcow.create("base", MIB, cluster_size=512).close()
    overlay("top", "base", size=1 << 40)
    lines = map_file("top", None, following=ALLOWED)
    assert lines == [
        MapLine(Extent(0, MIB, "unallocated", None, 1), "base"),
        MapLine(Extent(MIB, (1 << 40) - MIB, "unallocated", None, 0), "top"),
    ]


# Making an overlay


def test_create_takes_the_size_of_the_base(run: Run) -> None:
    os.mkdir("d")
    jqcow.create("d/base", 3 * MIB).close()
    code, told, _ = run("create", "-b", "base", "-F", "qcow2", "-o", "cluster_size=4k", "d/top")
    assert code == 0
    assert told == (
        f"Formatting 'd/top', fmt=qcow2 cluster_size=4096 size={3 * MIB} "
        "backing_file=base backing_fmt=qcow2\n"
    )
    (facts, base) = read_chain("d/top", following=ALLOWED)
    assert (facts.virtual_size, base.filename) == (3 * MIB, "d/base")
    Path("odd").write_bytes(b"x" * 1000)
    assert run("create", "-q", "-b", "../odd", "-F", "raw", "d/small") == (0, "", "")
    assert read_chain("d/small", following=ALLOWED)[0].virtual_size == 1024
    assert run("create", "-q", "-b", "base", "-F", "qcow2", "d/large", "1G")[0] == 0
    assert read_chain("d/large", following=ALLOWED)[0].virtual_size == 1 << 30


def test_what_the_base_names_is_not_opened(run: Run) -> None:
    overlay("base", "gone", size=2 * MIB)
    assert base_size("top", "base", "qcow2") == 2 * MIB
    assert run("create", "-q", "-b", "base", "-F", "qcow2", "top")[0] == 0


def test_unsafe_creation_opens_no_base(run: Run) -> None:
    assert run("create", "-q", "-b", "gone", "-F", "qcow2", "-u", "top", "1M")[0] == 0
    code, told, _ = run("info", "--output=json", "top")
    assert (code, json.loads(told)["backing-filename"]) == (0, "gone")
    code, _, told = run("create", "-b", "gone", "-F", "qcow2", "other", "1M")
    assert (code, told) == (
        1,
        "jqcow: gone: No such file or directory; gone would be the backing file of other\n",
    )
    assert not os.path.exists("other")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["top"], 1, "needs a size"),
        (["-F", "raw", "top", "1M"], 1, "-b"),
        (["-u", "top", "1M"], 1, "-b"),
        (["-b", "base", "top"], 1, "-F qcow2"),
        (["-b", "base", "-F", "qcow2", "-u", "top"], 1, "size must be given"),
        (["-f", "raw", "-b", "base", "-F", "qcow2", "top"], 1, "raw file"),
        (["-b", "base", "-F", "qcow2", "-o", "cluster_size=1000", "top"], 1, "power of two"),
        (["-b", "base", "-F", "qcow2", "-o", "cluster_size=4M", "top"], 1, "2 MiB"),
        (["-b", "", "-F", "qcow2", "top"], 1, "empty"),
        (["-b", "nbd://x", "-F", "raw", "top"], 63, "nbd:"),
        (["-b", "file:", "-F", "qcow2", "-u", "top", "1M"], 63, "file:"),
        (["-b", "text", "-F", "qcow2", "top"], 1, "not a qcow2 image"),
        (["-b", "base", "-F", "qcow2", "base"], 1, "its own backing file"),
        (["-b", "./d/../base", "-F", "qcow2", "--overwrite", "base"], 1, "its own backing file"),
        (["-b", "base", "-F", "qcow2", "text"], 1, "--overwrite"),
        (["-b", "x" * 400, "-F", "qcow2", "-u", "-o", "cluster_size=512", "top", "1M"], 1, "does not fit"),
    ],
)
def test_what_create_refuses(run: Run, arguments: list[str], code: int, words: str) -> None:
    os.mkdir("d")
    jqcow.create("base", MIB).close()
    Path("text").write_bytes(b"text" * 1000)
    before = Path("base").read_bytes()
    found, _, told = run("create", *arguments)
    assert (found, words in told) == (code, True), told
    assert sorted(os.listdir()) == ["base", "d", "text"]
    assert Path("base").read_bytes() == before


def test_an_unknown_backing_format_is_a_usage_error(run: Run) -> None:
    with pytest.raises(SystemExit) as left:
        run("create", "-b", "base", "-F", "vmdk", "top")
    assert left.value.code == 1


def test_a_base_with_a_writer_is_in_use(run: Run) -> None:
    with jqcow.create("base", MIB):
        assert run("create", "-b", "base", "-F", "qcow2", "top")[0] == 4


def test_a_hard_link_may_replace_the_other_name(run: Run) -> None:
    jqcow.create("base", MIB).close()
    os.link("base", "top")
    assert run("create", "-q", "--overwrite", "-b", "base", "-F", "qcow2", "top")[0] == 0
    assert len(read_chain("top", following=ALLOWED)) == 2


# Commands


@pytest.mark.parametrize("command", [["info", "--backing-chain"], ["map"]])
def test_commands_follow_names_only_when_allowed(run: Run, command: list[str]) -> None:
    jqcow.create("base", MIB).close()
    overlay("top", "base")
    code, out, told = run(*command, "top")
    assert (code, out) == (1, "")
    assert "top needs the backing file that it names: 'base'" in told and "--allow-files" in told
    assert run(*command, "--allow-files", "top")[0] == 0
    assert run(*command, "base")[0] == 0
    store_backing("top", b"base", None)
    assert run(*command, "--allow-files", "top")[0] == 63
    assert run(*command, "--allow-files", "--probe", "top")[0] == 0
    assert run("info", "top")[0] == 0


def test_a_crashed_image_is_not_written_to_before_its_backing_file_may_be_opened() -> None:
    """Trying again and again must not make the file longer each time."""
    jqcow.create("base", MIB).close()
    overlay("top", "base", "qcow2")
    image = jqcow.open("top", "r+", allow_files=True)
    image.pwrite(b"x", 0)
    image.flush()
    crashed = Path("top").read_bytes()
    image.close()
    Path("top").write_bytes(crashed)
    for _ in range(2):
        with pytest.raises(FileAccessDenied):
            jqcow.open("top", "r+")
    os.rename("base", "gone")
    with pytest.raises(FileNotFoundError):
        jqcow.open("top", "r+", allow_files=True)
    assert Path("top").read_bytes() == crashed
