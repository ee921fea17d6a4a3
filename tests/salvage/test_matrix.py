"""A small sample of the damage matrix (`tools/salvage` has the whole), on images that need no mount."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest

import jqcow
from jqcow.offline.protect import protect
from tests.salvage import matrix, summary
from tests.salvage.bases import IMAGE, STORY, TRUTH, Base
from tests.salvage.damages import KINDS
from tests.salvage.foreign import content, run
from tests.salvage.sectors import Sectors, alike, not_zero

MIB = 1 << 20
SEED = 1
UUID = "6c1e0f5a-7f0e-4b8e-9d53-1f2d0c3b4a59"
KINDS_TRIED = (
    "header zeroed", "L1 noise", "L2 sectors", "all L2 noise", "refcounts", "truncated a bit",
    "double allocation", "crossed copy", "header + L1 + refcounts", "all metadata",
)  # fmt: skip


def _populated(folder: Path, chance: Random) -> Path:
    """Return a raw ext4 with files in it, made without a mount."""
    files, disk = folder / "files", folder / TRUTH
    for number in range(12):
        path = files / f"d{number % 5}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(chance, chance.randrange(1, 300_000)))
    # The same bytes in every run, as far as a program can be asked for that.
    same = f"hash_seed={UUID},lazy_itable_init=0"
    run("mkfs.ext4", "-q", "-F", "-U", UUID, "-E", same, "-d", files, disk, "12M")
    return disk


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases: an ext4 that jqcow wrote, in pieces, in any order; one of them protected."""
    made = tmp_path_factory.mktemp("bases")
    chance = Random(SEED)
    disk = _populated(made, chance)
    size = disk.stat().st_size
    pieces = [
        (place, min(65536, start + length - place))
        for start, length in not_zero(disk, size).ranges()
        for place in range(start, start + length, 65536)
    ]
    for name, cluster_bytes in (("plain", 4096), ("protected", 65536), ("other", 4096)):
        folder = made / f"{name}-{SEED}"
        folder.mkdir()
        chance.shuffle(pieces)
        with jqcow.create(folder / IMAGE, size, cluster_size=cluster_bytes) as image, disk.open("rb") as file:
            for start, length in pieces[: 20 if name == "other" else None]:
                image.pwrite(os.pread(file.fileno(), length, start), start)
        if name == "protected":
            protect(folder / IMAGE)
        run("cp", "--sparse=always", disk, folder / TRUTH)
        story = asdict(Base(name, folder, size, is_protected=name == "protected"))
        (folder / STORY).write_text(json.dumps({**story, "folder": ""}))
    return made


@pytest.fixture(autouse=True)
def other(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A crossed copy takes the other image."""
    monkeypatch.setattr(matrix, "other_of", lambda *_: cache / f"other-{SEED}" / IMAGE)


@pytest.mark.parametrize("kind", KINDS_TRIED)
def test_cell(kind: str, cache: Path) -> None:
    found = matrix.try_cell(matrix.Part("plain", kind, SEED, cache))
    assert [broken for cell in found.cells for broken in cell.broken] == []


@pytest.mark.parametrize("kind", ["all L2 noise", "all metadata"])
def test_protected_cell(kind: str, cache: Path) -> None:
    (cell,) = matrix.try_cell(matrix.Part("protected", kind, SEED, cache)).cells
    assert not cell.broken and cell.right["jqcow"] == cell.data


def test_sums_of_cells() -> None:
    one = matrix.Cell("a", "x", 1, data=100, present=90, right={"qemu": 10, "plain": 20, "jqcow": 80})
    other = matrix.Cell("a", "y", 1, data=100, present=100, right={"qemu": 50, "plain": 0, "jqcow": 100})
    names, *rows = summary.by([one, other], "kind")
    assert names.split()[:5] == ["kind", "cells", "present", "QEMU", "plain"]
    assert [row.split()[:6] for row in rows][-1] == ["all", "2", "95.0", "30.0", "10.0", "90.0"]
    assert summary.totals([one, other])["jqcow"] == "90.0"


def test_sets_of_sectors(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    left.write_bytes(bytes(70_000) + b"x")
    right.write_bytes(bytes(1024) + b"y" + bytes(68_975))
    data = not_zero(left, 70_001)
    assert list(data.ranges()) == [(69632, 512)]
    same = alike(left, right, 70_001)
    assert not same & data and len(same) == 135
    assert list((Sectors.of(70_001, [(100, 1000)]) - same).ranges()) == [(1024, 512)]


def test_all_kinds_say_whether_they_hit() -> None:
    assert all(kind in KINDS for kind in KINDS_TRIED)
