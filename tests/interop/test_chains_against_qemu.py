"""Backing chains: do `map` and `info --backing-chain` say what qemu-img says, and are overlays QEMU's too?"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jqcow.cli import main
from jqcow.disks.policy import Following
from jqcow.offline.map import map_file
from tests.interop.commands import ours, require_same_info, require_same_map
from tests.support.qemu import check_clean, done, qemu_io, run

KIB = 1 << 10
MIB = 1 << 20
SECTOR_BYTES = 512


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fill_raw(path: str, chance: random.Random, size: int) -> None:
    """Make a raw file of data and holes."""
    with open(path, "wb") as file:
        file.truncate(size)
        for _ in range(chance.randrange(1, 5)):
            file.seek(chance.randrange(size))
            file.write(b"r" * min(chance.randrange(1, 100_000), size - file.tell()))


def scribble(path: str, chance: random.Random, size: int, cluster_bytes: int) -> None:
    """Write data, zero clusters with and without room, and discards."""
    commands = []
    for _ in range(chance.randrange(2, 9)):
        unit = chance.choice((SECTOR_BYTES, cluster_bytes))
        offset = chance.randrange(size) // unit * unit
        length = min(chance.randrange(1, 6) * unit, size - offset) // SECTOR_BYTES * SECTOR_BYTES
        if length:
            command = chance.choice(("write -P 7", "write -P 8", "write -z", "write -z -u", "discard"))
            commands.append(f"{command} {offset} {length}")
    qemu_io(Path(path), *commands)


@dataclass
class Chain:
    """A random chain; ``names`` from the base to the top."""

    chance: random.Random
    depth: int
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._make_base()
        for level in range(1, self.depth + 1):
            self._make_overlay(level)

    def _size(self) -> int:
        return self.chance.randrange(1, 3 * MIB // SECTOR_BYTES) * SECTOR_BYTES

    def _cluster_bytes(self) -> int:
        return 1 << self.chance.choice((9, 12, 12, 16, 16, 18))

    def _make_base(self) -> None:
        chance, size = self.chance, self._size()
        self.base_format = chance.choice(("raw", "qcow2", "compressed"))
        self.names.append("base")
        if self.base_format == "raw":
            # A raw file may end anywhere; its disk has whole sectors.
            fill_raw("base", chance, size - chance.choice((0, 0, 1, 511)))
            return
        cluster_bytes = self._cluster_bytes()
        done("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_bytes}", "base", size)
        scribble("base", chance, size, cluster_bytes)
        if self.base_format == "compressed":
            os.rename("base", "plain")
            options = f"cluster_size={cluster_bytes}"
            done("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, "plain", "base")
            scribble("base", chance, size, cluster_bytes)

    def _make_overlay(self, level: int) -> None:
        os.makedirs(f"d{level}", exist_ok=True)
        name, below = f"d{level}/i", os.path.relpath(self.names[-1], f"d{level}")
        below_format = "raw" if level == 1 and self.base_format == "raw" else "qcow2"
        cluster_bytes = self._cluster_bytes()
        options = ["-o", f"cluster_size={cluster_bytes}", "-b", below, "-F", below_format, name]
        size = self.chance.choice((None, self._size(), self._size()))
        if size is not None:
            options.append(str(size))
        if self.chance.random() < 0.5:
            done("qemu-img", "create", "-q", "-f", "qcow2", *options)
        else:
            assert main.main(["create", "-q", *options]) == 0
        length = json.loads(done("qemu-img", "info", "--output=json", name))["virtual-size"]
        scribble(name, self.chance, length, cluster_bytes)
        self.names.append(name)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_chains_are_told_as_qemu_img_tells_them(
    depth: int, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(f"{depth} {seed}")
    chain = Chain(chance, depth)
    top = chain.names[-1]
    whole = require_same_map(capsys, top)
    assert sum(extent["length"] for extent in whole) == whole[-1]["start"] + whole[-1]["length"]
    start, length = (chance.randrange(MIB // SECTOR_BYTES) * SECTOR_BYTES for _ in range(2))
    if start < whole[-1]["start"] + whole[-1]["length"] and length:
        require_same_map(capsys, top, "-s", str(start), "-l", str(length))
    require_same_info(capsys, top)
    for name in chain.names[1:]:
        check_clean(Path(name))


def test_each_kind_of_extent_at_its_depth(capsys: pytest.CaptureFixture[str]) -> None:
    """A chain of which every row is known: who has it, and what lies below is not seen through."""
    done("qemu-img", "create", "-q", "-f", "qcow2", "base", "1M")
    qemu_io(Path("base"), "write -P 1 0 256k", "write -z 512k 64k")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "middle", "2M")
    qemu_io(Path("middle"), "write -P 2 64k 64k", "write -z -u 128k 64k", "write -P 3 1M 64k")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", "top", "3M")
    qemu_io(Path("top"), "write -P 4 1088k 64k")
    extents = require_same_map(capsys, "top")
    kinds = [
        (extent["start"] // KIB, extent["length"] // KIB, extent["depth"], extent["present"], extent["zero"])
        for extent in extents
    ]
    assert kinds == [
        (0, 64, 2, True, False),
        (64, 64, 1, True, False),
        (128, 64, 1, True, True),
        (192, 64, 2, True, False),
        (256, 256, 2, False, True),
        (512, 64, 2, True, True),
        (576, 448, 2, False, True),
        (1024, 64, 1, True, False),
        (1088, 64, 0, True, False),
        (1152, 896, 1, False, True),
        (2048, 1024, 0, False, True),
    ]
    paths = {line.extent.depth: line.path for line in map_file("top", None, following=Following(True))}
    assert paths == {0: "top", 1: "middle", 2: "base"}


def test_a_fragmented_overlay_over_large_clusters(capsys: pytest.CaptureFixture[str]) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "base", "2M")
    qemu_io(Path("base"), "write -P 1 100k 700k")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "-b", "base", "-F", "qcow2", "m")
    options = ["-o", "cluster_size=512", "-b", "m", "-F", "qcow2"]
    done("qemu-img", "create", "-q", "-f", "qcow2", *options, "top")
    qemu_io(Path("top"), *(f"write -P 2 {index * 1024} 512" for index in range(300)))
    assert len(require_same_map(capsys, "top")) > 600


@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 * MIB])
def test_qemu_uses_overlays_made_here(base_format: str, cluster_size: int) -> None:
    done("qemu-img", "create", "-q", "-f", base_format, "base", 5 * MIB)
    done("qemu-io", "-f", base_format, "-c", "write -P 1 0 5M", "base")
    arguments = ["create", "-q", "-o", f"cluster_size={cluster_size}", "-b", "base", "-F", base_format, "top"]
    assert main.main(arguments) == 0
    check_clean(Path("top"))
    done("qemu-img", "compare", "-f", "qcow2", "-F", base_format, "top", "base")
    qemu_io(
        Path("top"), "read -P 1 0 5M", "write -P 2 1000k 512", "read -P 1 1001k 4k", "read -P 2 1000k 512"
    )
    check_clean(Path("top"))


@pytest.mark.parametrize("name", ["base", "./base", "../d/base", "sub/../base", "/nonexistent/base", "a b"])
def test_names_are_stored_and_shown_as_by_qemu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.makedirs("d/sub")
    assert main.main(["create", "-q", "-u", "-b", name, "-F", "qcow2", "d/ours", "1M"]) == 0
    done("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "qcow2", "d/theirs", "1M")
    for image in ("d/ours", "d/theirs"):
        assert ours(capsys, "info", image) == done("qemu-img", "info", image)
        told = json.loads(ours(capsys, "info", "--output=json", image))
        assert told == json.loads(done("qemu-img", "info", "--output=json", image))


@pytest.mark.parametrize("name", ["nbd://host/disk", "json:{}", "file:", "http://host/a"])
def test_info_shows_the_names_that_it_does_not_follow(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    done("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "image", "1M")
    assert ours(capsys, "info", "image") == done("qemu-img", "info", "image")
    told = json.loads(ours(capsys, "info", "--output=json", "image"))
    assert told == json.loads(done("qemu-img", "info", "--output=json", "image"))
    assert main.main(["info", "--backing-chain", "--allow-files", "image"]) == 63
    assert name.split(":", maxsplit=1)[0] in capsys.readouterr().err


def test_links_are_resolved_as_by_qemu(capsys: pytest.CaptureFixture[str]) -> None:
    os.makedirs("d/links")
    done("qemu-img", "create", "-q", "-f", "qcow2", "d/base", "1M")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "d/top")
    os.symlink("d/top", "astray")
    os.symlink("../top", "d/links/astray")
    os.symlink("top", "d/found")
    for link, code in (("astray", 1), ("d/links/astray", 1), ("d/found", 0)):
        assert run("qemu-img", "info", "--backing-chain", link).returncode == code
        assert main.main(["info", "--backing-chain", "--allow-files", link]) == code
    require_same_info(capsys, "d/found")
    # A link to the base is what the link beside it finds.
    os.symlink("d/base", "base")
    require_same_info(capsys, "astray")
