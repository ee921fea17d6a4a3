"""Internal snapshots: made, applied and deleted by jqcow and QEMU in turn, on one image."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import jqcow
from tests.interop.rounds import RawModel, Rounds
from tests.support.qemu import check_clean, done

MIB = 1 << 20


@dataclass
class Kept:
    """What a snapshot holds: a raw file, and the size of the disk when it was made."""

    path: Path
    size: int


@dataclass
class Turns(Rounds):
    """Rounds with snapshots: names map to raw files that hold what each of them must."""

    kept: dict[str, Kept] = field(default_factory=dict)

    def keep(self, name: str) -> None:
        """Note that a snapshot holds the disk as it is now."""
        path = self.model.path.with_name(f"{name}.raw")
        done("cp", "--sparse=always", self.model.path, path)
        self.kept[name] = Kept(path, self.model.size)

    def go_back(self, name: str) -> None:
        """Note that the disk is what a snapshot holds."""
        done("cp", "--sparse=always", self.kept[name].path, self.model.path)
        self.model.size = self.kept[name].size
        self.__post_init__()

    def snapshot_by_jqcow(self, name: str) -> None:
        """Make a snapshot."""
        with jqcow.open(self.image, "r+") as image:
            made = image.create_snapshot(name)
            assert (made.name, made.disk_bytes) == (name, self.model.size)
        self.keep(name)

    def snapshot_by_qemu(self, name: str) -> None:
        """Make a snapshot."""
        done("qemu-img", "snapshot", "-c", name, self.image)
        self.keep(name)

    def apply(self, name: str, *, by_qemu: bool) -> None:
        """Go back to a snapshot."""
        if by_qemu:
            done("qemu-img", "snapshot", "-a", name, self.image)
        else:
            with jqcow.open(self.image, "r+") as image:
                image.apply_snapshot(name)
                assert image.size == self.kept[name].size
        self.go_back(name)

    def delete(self, name: str, *, by_qemu: bool) -> None:
        """Give up a snapshot."""
        if by_qemu:
            done("qemu-img", "snapshot", "-d", name, self.image)
        else:
            with jqcow.open(self.image, "r+") as image:
                image.delete_snapshot(name)
        del self.kept[name]

    def judge(self) -> None:
        """QEMU finds nothing wrong, and reads what it must: the disk, and each snapshot."""
        super().judge()
        with jqcow.open(self.image) as image:
            assert [snapshot.name for snapshot in image.snapshots()] == list(self.kept)
        for name, kept in self.kept.items():
            copy = self.image.with_name("shown.raw")
            done(
                "qemu-img",
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                "-l",
                f"snapshot.name={name}",
                self.image,
                copy,
            )
            # QEMU shows every snapshot with the size that the disk has now.
            done("cmp", "-n", min(kept.size, self.model.size), copy, kept.path)
            with jqcow.open(self.image, snapshot=name) as image:
                assert image.size == kept.size
                for offset in range(0, kept.size, 4 * MIB):
                    length = min(4 * MIB, kept.size - offset)
                    with kept.path.open("rb") as file:
                        file.seek(offset)
                        assert image.pread(length, offset) == file.read(length), (
                            f"{name} differs near {offset:#x}"
                        )


def start(folder: Path, options: str, cluster_bytes: int, size: int, seed: int) -> Turns:
    image = folder / "image.qcow2"
    done(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"cluster_size={cluster_bytes},{options}",
        image,
        size,
    )
    return Turns(image, RawModel(folder / "model.raw", size), cluster_bytes, random.Random(seed))


@pytest.mark.parametrize(
    ("cluster_bytes", "refcount_bits", "size"),
    [
        (512, 16, 2 * MIB + 1536),
        (4096, 64, 10 * MIB + 512),
        (65536, 16, 20 * MIB),
        (65536, 4, 20 * MIB),
        (2 * MIB, 8, 40 * MIB),
    ],
)
def test_in_turn(tmp_path: Path, cluster_bytes: int, refcount_bits: int, size: int) -> None:
    turns = start(
        tmp_path, f"refcount_bits={refcount_bits}", cluster_bytes, size, cluster_bytes + refcount_bits
    )
    turns.by_jqcow(20)
    turns.snapshot_by_jqcow("first")
    turns.judge()
    turns.by_jqcow(20)
    turns.by_qemu(10)
    turns.snapshot_by_qemu("second")
    turns.by_jqcow(20)
    turns.snapshot_by_jqcow("third")
    turns.by_qemu(20)
    turns.apply("first", by_qemu=False)
    turns.judge()
    turns.by_jqcow(20)
    turns.delete("second", by_qemu=False)
    turns.judge()
    turns.by_qemu(10)
    turns.apply("third", by_qemu=True)
    turns.by_jqcow(20)
    turns.delete("first", by_qemu=True)
    turns.by_jqcow(10)
    turns.delete("third", by_qemu=False)
    turns.judge()
    turns.by_jqcow(10)


def test_snapshots_of_other_disk_sizes(tmp_path: Path) -> None:
    turns = start(tmp_path, "refcount_bits=16", 4096, 3 * MIB + 512, 9)
    turns.by_jqcow(20)
    turns.snapshot_by_jqcow("small")
    turns.resize_by_jqcow(7 * MIB + 1024)
    turns.by_jqcow(20)
    turns.snapshot_by_jqcow("large")
    turns.apply("small", by_qemu=False)
    turns.judge()
    turns.by_qemu(10)
    turns.apply("large", by_qemu=False)
    turns.by_jqcow(20)
    with jqcow.open(turns.image, "r+") as image:
        image.resize(MIB)
    turns.model.resize(MIB)
    turns.__post_init__()
    turns.judge()
    turns.apply("small", by_qemu=True)
    turns.by_jqcow(10)
    turns.apply("large", by_qemu=True)
    turns.by_jqcow(10)


TIB = 1 << 40
ON_AND_ON = """
import sys, jqcow
with jqcow.open(sys.argv[1], "r+") as image:
    print("begin", flush=True)
    image.create_snapshot("new")
    print("created", flush=True)
    image.pwrite(b"x" * 65536, 5 << 30)
    image.apply_snapshot("new")
    print("applied", flush=True)
    image.delete_snapshot("new")
    print("deleted", flush=True)
"""


@pytest.fixture
def mapped_tebibyte(tmp_path: Path) -> Path:
    """A disk of 1 TiB of which every cluster is mapped, in a sparse file: its tables take 160 MiB."""
    path = tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, TIB)
    return path


def test_tables_larger_than_the_journal(mapped_tebibyte: Path) -> None:
    path = mapped_tebibyte
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"old" * 1000, 700 << 30)
        image.create_snapshot("kept")
        journal = image.info().journal
        assert journal is not None and journal.length > 64 * MIB
        image.pwrite(b"new" * 1000, 700 << 30)
    check_clean(path)
    with jqcow.open(path, snapshot="kept") as image:
        assert image.pread(3000, 700 << 30) == b"old" * 1000
    with jqcow.open(path, "r+") as image:
        assert image.info().journal is None and image.info().file_size < TIB + (1 << 30)
        image.apply_snapshot("kept")
        assert image.pread(3000, 700 << 30) == b"old" * 1000
        image.delete_snapshot("kept")
    check_clean(path)


def test_large_tables_are_all_or_nothing(mapped_tebibyte: Path) -> None:
    """A process killed while it makes, applies and deletes a snapshot of 1 TiB."""
    path, chance = mapped_tebibyte, random.Random(1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(3):
        command = [sys.executable, "-c", ON_AND_ON, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None and process.stdout.readline() == "begin\n"
            time.sleep(chance.uniform(0.2, 6))
            process.kill()
            told = process.stdout.read().split()
        with jqcow.open(path, "r+") as image:
            names = [snapshot.name for snapshot in image.snapshots()]
            assert names in (["new"], []) and (names == ["new"] or not told or "applied" in told)
            if names:
                image.delete_snapshot("new")
        check_clean(path)


def test_a_snapshot_of_an_impossible_disk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    with jqcow.create(path, MIB) as image:
        image.pwrite(b"x" * 65536, 0)
        image.create_snapshot("huge")
    content = bytearray(path.read_bytes())
    table = int.from_bytes(content[64:72], "big")
    content[table + 48 : table + 56] = (1 << 56).to_bytes(8, "big")
    path.write_bytes(content)
    with jqcow.open(path, "r+") as image:
        with pytest.raises(jqcow.CorruptionError, match="too large"):
            image.apply_snapshot("huge")
        assert image.pread(65536, 0) == b"x" * 65536 and image.size == MIB
        image.delete_snapshot("huge")
    check_clean(path)


@pytest.mark.parametrize("repair", [None, "all"])
def test_tables_past_the_end_of_the_file_cost_nothing(tmp_path: Path, repair: Literal["all"] | None) -> None:
    """Each of 65,536 snapshots names an L1 table of 32 MiB that is not there."""
    path = tmp_path / "image.qcow2"
    with jqcow.create(path, MIB, cluster_size=512) as image:
        image.pwrite(b"x" * 512, 0)
        image.create_snapshot("s")
    content = bytearray(path.read_bytes())
    content += bytes(-len(content) % 512)
    content[60:72] = (65536).to_bytes(4, "big") + len(content).to_bytes(8, "big")
    for number in range(65536):
        place = (1 << 40) + number * (32 << 20)
        fixed = place.to_bytes(8, "big") + (4 << 20).to_bytes(4, "big") + bytes((0, 1, 0, 1)) + bytes(20)
        extra = bytes(3) + bytes((16,)) + bytes(8) + MIB.to_bytes(8, "big")
        content += fixed + extra + b"aa" + bytes(6)
    path.write_bytes(content)
    with (
        pytest.raises(jqcow.UnsupportedFeatureError, match="snapshots with L1 tables of 2199023255552 bytes"),
        jqcow.open(path, "r+", repair=repair) as image,
    ):
        image.write_zeroes(512, 0)
