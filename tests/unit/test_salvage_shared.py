"""Compressed data that two entries name is right for one of them at most."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from random import Random

import pytest

from jqcow.offline.salvage import diagnose, salvage
from jqcow.salvage import marks
from tests.support.patients import Tables

CLUSTER = 65536
COUNT = 12


def packed(folder: Path, options: str, count: int) -> tuple[Path, Tables]:
    """Return an image of compressed clusters, and its tables."""
    raw, path, chance = folder / "disk.raw", folder / "disk.qcow2", Random(1)
    raw.write_bytes(b"".join(chance.randbytes(256) * 16 for _ in range(count * CLUSTER >> 12)))
    words = ["-f", "raw", "-O", "qcow2", "-o", options]
    subprocess.run(["qemu-img", "convert", "-c", *words, raw, path], check=True)
    return path, Tables(path.read_bytes())


def test_a_stream_that_two_entries_name_is_certain_for_none(tmp_path: Path) -> None:
    path, tables = packed(tmp_path, "cluster_size=64k", COUNT)
    entries = range(tables.l2, tables.l2 + 8 * COUNT, 8)
    tables.image[entries[7] : entries[7] + 8] = tables.image[entries[2] : entries[2] + 8]
    path.write_bytes(tables.image)
    made = salvage(path, tmp_path / "saved.raw", target_format="raw")
    assert (made.certain, made.likely) == ((COUNT - 2) * CLUSTER, 2 * CLUSTER)
    (disk,) = diagnose(path).disks
    assert (disk.certain, disk.likely) == (made.certain, made.likely)


@pytest.mark.parametrize("starts_max", [marks.STARTS_MAX, 0])
def test_a_stream_that_two_tables_name_is_certain_for_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts_max: int
) -> None:
    """Of more streams than are compared at once that is not seen."""
    monkeypatch.setattr(marks, "STARTS_MAX", starts_max)
    path, tables = packed(tmp_path, "cluster_size=4k", 64)
    other = int.from_bytes(tables.image[tables.l1 + 8 : tables.l1 + 16], "big") & ~(1 << 63)
    tables.image[other : other + 8] = tables.image[tables.l2 : tables.l2 + 8]
    path.write_bytes(tables.image)
    made = salvage(path, tmp_path / "saved.raw", target_format="raw")
    (disk,) = diagnose(path).disks
    assert made.likely == disk.likely == (2 * 4096 if starts_max else 0)
    assert made.certain == disk.certain == 64 * CLUSTER - made.likely


def test_nothing_of_an_extended_entry_is_certain_that_two_have(tmp_path: Path) -> None:
    path, cluster = tmp_path / "disk.qcow2", 2 * CLUSTER
    options = f"extended_l2=on,cluster_size={cluster}"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "4M"], check=True)
    writes = [f"write -P {1 + number} {number * cluster + number * 8192} 4k" for number in range(3)]
    subprocess.run(["qemu-io", *(word for write in writes for word in ("-c", write)), path], check=True)
    tables = Tables(path.read_bytes())
    tables.image[tables.l2 + 16 : tables.l2 + 32] = tables.image[tables.l2 : tables.l2 + 16]
    path.write_bytes(tables.image)
    salvage(path, tmp_path / "saved.raw", target_format="raw", report=tmp_path / "saved.json")
    ranges = json.loads((tmp_path / "saved.json").read_text())["ranges"]
    certain = [one["offset"] for one in ranges if one["certainty"] == "certain"]
    assert min(certain) == 2 * cluster
