"""An overlay whose tables are lost shows the disk below, rather than zeros or a mere guess."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

import jqcow
from jqcow.offline.salvage import salvage
from tests.support.patients import Tables

CLUSTER = 4096
SIZE = 2 << 20
BELOW = Random(1).randbytes(SIZE // 2)
OWN = Random(2).randbytes(CLUSTER)


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An overlay with some clusters of its own, all of whose L2 tables are noise."""
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(BELOW.ljust(SIZE, b"\0"))
    path = Path("overlay.qcow2")
    below = {"backing_file": "base.raw", "backing_format": "raw"}
    with jqcow.create(path, SIZE, cluster_size=CLUSTER, **below) as image:  # type: ignore[arg-type]
        for start in (0, 8 * CLUSTER, SIZE // 2):
            image.pwrite(OWN, start)
    tables = Tables(path.read_bytes())
    tables.image[tables.l2 : tables.l2 + CLUSTER] = Random(3).randbytes(CLUSTER)
    path.write_bytes(tables.image)
    return path


def test_what_is_lost_shows_the_disk_below(overlay: Path) -> None:
    made = salvage(overlay, "saved.raw", target_format="raw", allow_files=True)
    saved = Path("saved.raw").read_bytes()
    assert saved[: SIZE // 2] == BELOW
    assert not made.is_whole and made.guess >= SIZE // 2


def test_so_does_a_new_overlay(overlay: Path) -> None:
    assert not salvage(overlay, "saved.qcow2").is_whole
    with jqcow.open("saved.qcow2", allow_files=True) as image:
        shown = image.pread(SIZE // 2, 0)
    same = sum(shown[at : at + CLUSTER] == BELOW[at : at + CLUSTER] for at in range(0, len(shown), CLUSTER))
    assert same >= len(shown) // CLUSTER - 3


def test_not_where_it_must_be_certain(overlay: Path) -> None:
    salvage(overlay, "saved.raw", target_format="raw", allow_files=True, certain_only=True)
    assert not any(Path("saved.raw").read_bytes()[: SIZE // 2])
