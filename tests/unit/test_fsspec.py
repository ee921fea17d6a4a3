"""The disk by fsspec: its URLs, what its file systems promise, and the file systems that images lie in."""

from __future__ import annotations

import importlib
import io
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import jqcow
from jqcow.fsspec import Qcow2FileSystem
from tests.unit.test_partitions import MIB, SCRIPTS, partitioned

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def registered() -> None:
    """As an installed entry point does."""
    fsspec.register_implementation("qcow2", Qcow2FileSystem, clobber=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    partitioned(tmp_path / "raw", SCRIPTS["gpt"])
    with jqcow.create(tmp_path / "vm.qcow2", 64 * MIB) as image:
        image.pwrite((tmp_path / "raw").read_bytes()[:MIB], 0)
        image.pwrite(b"one line\nand more\n", MIB)
        image.create_snapshot("before")
        image.pwrite(b"NEW", MIB)
    return tmp_path / "vm.qcow2"


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()


def test_entry_point_names_the_class() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["fsspec.specs"]
    module, _, name = points["qcow2"].partition(":")
    assert getattr(importlib.import_module(module), name) is Qcow2FileSystem


def test_urls(disk: Path, memory: Any) -> None:
    memory.pipe("/images/vm.qcow2", disk.read_bytes())
    for url in (f"qcow2://partition1.img::file://{disk}", "qcow2://partition1.img::memory://images/vm.qcow2"):
        with fsspec.open(url, "rt") as file:
            assert file.readline() == "NEW line\n"
        with fsspec.open(url, "rb", qcow2={"snapshot": "before"}) as file:
            assert file.read(8) == b"one line"


def test_what_a_file_system_promises(disk: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("qcow2", fo=str(disk))
    names = ["disk.img", "partition1.img", "partition2.img"]
    assert system.ls("", detail=False) == system.find("") == system.glob("*.img") == names
    assert system.info("qcow2://disk.img") == {"name": "disk.img", "size": 64 * MIB, "type": "file"}
    assert system.isdir("") and system.isfile("disk.img") and not system.exists("other.img")
    assert system.du("") == 64 * MIB + 24 * MIB
    assert system.cat_file("disk.img", MIB, MIB + 3) == b"NEW"
    assert system.cat_file("partition1.img", -4) == bytes(4)
    assert system.cat_ranges(["disk.img"] * 2, [0, MIB], [2, MIB + 3])[1] == b"NEW"
    system.get("partition1.img", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes()[:8] == b"NEW line"
    with pytest.raises(OSError, match="not written"):
        system.open("disk.img", "wb")
    with pytest.raises(FileNotFoundError):
        system.open("other.img")
    with pytest.raises(jqcow.ImageInUse):
        jqcow.open(disk, "r+")
    system.close()
    jqcow.open(disk, "r+").close()


def test_open_file_serves(disk: Path) -> None:
    system = Qcow2FileSystem(io.BytesIO(disk.read_bytes()))
    assert system.cat_file("disk.img", MIB, MIB + 3) == b"NEW"
    system.close()


def test_backing_files_elsewhere(tmp_path: Path, memory: Any) -> None:
    """Names are paths beside the image, and followed only where the caller says so."""
    with jqcow.create(tmp_path / "base.qcow2", MIB) as image:
        image.pwrite(b"base", 0)
    with jqcow.create(
        tmp_path / "top.qcow2", MIB, backing_file="base.qcow2", backing_format="qcow2"
    ) as image:
        image.pwrite(b"top", 65536)
    for name in ("base", "top"):
        memory.pipe(f"/dir/{name}.qcow2", (tmp_path / f"{name}.qcow2").read_bytes())
    with pytest.raises(jqcow.FileAccessDenied):
        fsspec.filesystem("qcow2", fo="memory://dir/top.qcow2")
    asked = []

    def allow(named: jqcow.NamedFile) -> bool:
        asked.append(named.name)
        return True

    for place in ("memory://dir/top.qcow2", str(tmp_path / "top.qcow2")):
        system = fsspec.filesystem("qcow2", fo=place, allow_files=allow)
        assert system.cat_file("disk.img", 0, 4) == b"base"
        assert system.cat_file("disk.img", 65536, 65539) == b"top"
        system.close()
    assert asked == ["base.qcow2", "base.qcow2"]
    memory.rm("/dir/base.qcow2")
    with pytest.raises(FileNotFoundError):
        fsspec.filesystem("qcow2", fo="memory://dir/top.qcow2", allow_files=True)
