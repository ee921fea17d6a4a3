"""Are exported chunks what their names say, shared where disks are equal, and is the disk had back whole?"""

from __future__ import annotations

import hashlib
import json
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.cli.main import main
from jqcow.device.file import FileDevice
from jqcow.offline.export import ExportedDisk, export, read_index
from tests.support.qemu import done

MIB = 1 << 20
CHUNK = 65536


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "a.qcow2"
    with jqcow.create(path, 3 * MIB + 1536) as image:
        image.pwrite(random.Random(1).randbytes(MIB), CHUNK)
        image.pwrite(b"the end", 3 * MIB + 1000)
        image.create_snapshot("before")
        image.pwrite(b"changed", CHUNK + 100)
    return path


def chunks_of(store: Path) -> set[Path]:
    return {path for path in (store / "chunks").rglob("*") if path.is_file()}


def content_of(path: Path) -> bytes:
    with closing(ExportedDisk(path)) as disk:
        buffer = bytearray(disk.size)
        disk.read_into(memoryview(buffer), 0)
    return bytes(buffer)


def test_chunks_and_index(disk: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    report = export(disk, store, "monday", chunk_bytes=CHUNK)
    with jqcow.open(disk) as image:
        content = image.pread(image.size, 0)
    parts = [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
    expected = [hashlib.sha256(part).hexdigest() if any(part) else None for part in parts]
    told = json.loads((store / "monday.json").read_text())
    assert told == {"format": "jqcow chunks 1", "size": len(content), "chunk-size": CHUNK, "chunks": expected}
    assert {path.name for path in chunks_of(store)} == set(expected) - {None}
    for path in chunks_of(store):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert path.parent.name == path.name[:2]
    assert (report.chunk_count, report.new_chunk_count) == (17, 17)
    assert content_of(store / "monday.json") == content


def test_what_two_exports_share_is_there_once(disk: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    export(disk, store, "before", snapshot="before", chunk_bytes=CHUNK)
    report = export(disk, store, "after", chunk_bytes=CHUNK)
    assert (report.chunk_count, report.new_chunk_count, report.new_bytes) == (17, 1, CHUNK)
    assert len(chunks_of(store)) == 18
    assert content_of(store / "before.json") != content_of(store / "after.json")


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
def test_commands(disk: Path, tmp_path: Path, target_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    store, target = tmp_path / "store", tmp_path / "target"
    assert main(["export", "--output=json", "--progress=json", str(disk), str(store), "one"]) == 0
    out, told = capsys.readouterr()
    assert json.loads(out)["new-chunk-count"] == 3
    assert json.loads(told.splitlines()[-1])["description"] == "export"
    assert main(["import", "-O", target_format, str(store / "one.json"), str(target)]) == 0
    done("qemu-img", "compare", "-q", "-f", target_format, "-F", "qcow2", str(target), str(disk))
    assert main(["export", str(disk), str(store), "one"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["export", "-l", "before", "--chunk-size=64k", str(disk), str(store), "two"]) == 0
    # The last chunk is short, and the same whatever the length of the others.
    assert "16 of them are new" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("chunk_bytes", "name"),
    [(1000, "n"), (2048, "n"), (128 * MIB, "n"), (4096, "a/b"), (4096, ".n"), (4096, "")],
)
def test_refused(disk: Path, tmp_path: Path, chunk_bytes: int, name: str) -> None:
    with pytest.raises(ValueError, match=r"chunks are|plain name"):
        export(disk, tmp_path / "store", name, chunk_bytes=chunk_bytes)
    assert not (tmp_path / "store").exists()


def test_wrong_chunk_is_told(disk: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    export(disk, store, "n", chunk_bytes=CHUNK)
    for path in chunks_of(store):
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    with pytest.raises(jqcow.CorruptionError, match="name says"):
        content_of(store / "n.json")
    assert main(["import", str(store / "n.json"), str(tmp_path / "target")]) == 1
    assert not (tmp_path / "target").exists()
    next(iter(chunks_of(store))).unlink()
    with pytest.raises((jqcow.CorruptionError, FileNotFoundError)):
        content_of(store / "n.json")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"size": -512},
        {"size": 1000},
        {"size": True},
        {"chunk-size": 0},
        {"chunks": []},
        {"chunks": ["../../../etc/passwd"]},
        {"chunks": ["A" * 64]},
        {"chunks": [5]},
        {"chunks": None},
    ],
    ids=str,
)
def test_hostile_index(tmp_path: Path, change: dict[str, Any]) -> None:
    good = {"format": "jqcow chunks 1", "size": 4096, "chunk-size": 4096, "chunks": [None]}
    path = tmp_path / "n.json"
    path.write_text(json.dumps(good))
    assert read_index(path).chunks == (None,)
    path.write_text(json.dumps(good | change))
    with pytest.raises(jqcow.FormatError):
        read_index(path)
    for text in ("[" * 100_000, "", "[]", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(jqcow.FormatError):
            read_index(path)


def test_cut_off_before_its_index(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunks that are there are whole, and the next export uses them."""
    count = 0
    publish = FileDevice.publish

    def dying(file: FileDevice, overwrite: bool) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        publish(file, overwrite)

    monkeypatch.setattr(FileDevice, "publish", dying)
    store = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        export(disk, store, "n", chunk_bytes=CHUNK)
    assert not list(store.glob("*.json")) and len(chunks_of(store)) == 5
    monkeypatch.undo()
    assert export(disk, store, "n", chunk_bytes=CHUNK).new_chunk_count == 12
