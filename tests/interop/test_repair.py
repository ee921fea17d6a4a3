"""Refcounts of images that QEMU left wrong, or that were damaged since: made right as QEMU would."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import jqcow
from jqcow.ondisk.header import Header
from tests.support.qemu import check_clean, done, qemu_io, run

MIB = 1 << 20
DIRTY, CORRUPT = 1, 2


def qemu_check(path: Path) -> dict[str, Any]:
    """Return QEMU's report, whatever it found."""
    found: dict[str, Any] = json.loads(run("qemu-img", "check", "--output=json", path).stdout)
    return found


@dataclass
class Patient:
    """An image with a snapshot and compressed clusters, by QEMU, and a copy of what its disk holds."""

    path: Path
    cluster_bytes: int
    refcount_bits: int

    @property
    def header(self) -> Header:
        """The header of the file as it is."""
        return Header.unpack(self.path.read_bytes()[:512])

    def set_feature(self, bit: int) -> None:
        """Set an incompatible feature bit."""
        content = bytearray(self.path.read_bytes())
        content[79] |= bit
        self.path.write_bytes(content)

    def refcounts(self) -> tuple[bytearray, int, int]:
        """Return the file, where the first refcount block is, and how many clusters the file has."""
        content = bytearray(self.path.read_bytes())
        table = self.header.refcount_table_offset
        return content, int.from_bytes(content[table : table + 8], "big"), len(content) // self.cluster_bytes

    def read(self) -> bytes:
        """Return the disk, as QEMU reads it."""
        raw = self.path.with_name("read.raw")
        done("qemu-img", "convert", "-O", "raw", self.path, raw)
        return raw.read_bytes()


def make(folder: Path, cluster_bytes: int = 65536, refcount_bits: int = 16, options: str = "") -> Patient:
    source, path = folder / "source.qcow2", folder / "image.qcow2"
    disk_bytes = 24 * max(cluster_bytes, 4096)
    settings = f"cluster_size={cluster_bytes},refcount_bits={refcount_bits}{options}"
    done("qemu-img", "create", "-q", "-f", "qcow2", source, disk_bytes)
    qemu_io(source, f"write -P 0x11 0 {disk_bytes // 2}")
    done("qemu-img", "convert", "-c", "-O", "qcow2", "-o", settings, source, path)
    qemu_io(path, f"write -P 0x22 {disk_bytes // 4} {disk_bytes // 2}")
    done("qemu-img", "snapshot", "-c", "kept", path)
    qemu_io(path, f"write -P 0x33 {disk_bytes // 2} {disk_bytes // 3 // 512 * 512}")
    check_clean(path)
    return Patient(path, cluster_bytes, refcount_bits)


def repair(path: Path, what: Literal["leaks", "all"] | None) -> jqcow.RepairReport | None:
    with jqcow.open(path, "r+", repair=what) as image:
        return image.repaired


WIDTHS = [(512, 16), (4096, 8), (65536, 16), (65536, 64), (2 * MIB, 32)]


@pytest.mark.parametrize(("cluster_bytes", "refcount_bits"), WIDTHS)
@pytest.mark.parametrize("seed", range(3))
def test_any_wrong_refcounts(tmp_path: Path, cluster_bytes: int, refcount_bits: int, seed: int) -> None:
    """Random refcounts, for data and metadata alike: all that the tables say is found again."""
    patient = make(tmp_path, cluster_bytes, refcount_bits)
    before = patient.read()
    content, block, clusters = patient.refcounts()
    chance = random.Random(f"{cluster_bytes} {refcount_bits} {seed}")
    width = refcount_bits // 8
    count = min(clusters, cluster_bytes // width)
    for cluster in chance.sample(range(count), k=max(1, count // 3)):
        place = block + cluster * width
        content[place : place + width] = chance.choice((0, 1, 2, 7)).to_bytes(width, "big")
    patient.path.write_bytes(content)
    assert run("qemu-img", "check", "-q", patient.path).returncode in (2, 3)

    report = repair(patient.path, "all")
    assert report is not None and report.changed
    check_clean(patient.path)
    assert patient.read() == before
    with jqcow.open(patient.path, "r+") as image:
        assert image.repaired is None
        image.pwrite(b"x" * 5000, 700)
        assert image.check().ok
    check_clean(patient.path)


def test_nothing_to_repair_changes_nothing(tmp_path: Path) -> None:
    patient = make(tmp_path)
    before = patient.path.read_bytes()
    assert repair(patient.path, "all") == jqcow.RepairReport()
    assert patient.path.read_bytes() == before


def test_unknown_autoclear_bits_go(tmp_path: Path) -> None:
    """As in QEMU, also where nothing is wrong."""
    patient = make(tmp_path)
    content = bytearray(patient.path.read_bytes())
    content[88] |= 0x80
    patient.path.write_bytes(content)
    jqcow.open(patient.path, "r+", repair="all").close()
    assert patient.header.autoclear_features == 0
    check_clean(patient.path)


def test_leaks_alone(tmp_path: Path) -> None:
    """A leak is taken away; what is too low stays, and no flag is set by its word."""
    patient = make(tmp_path)
    content, block, clusters = patient.refcounts()
    content += bytes(patient.cluster_bytes)
    content[block + 2 * clusters + 1] = 3
    patient.path.write_bytes(content)
    assert qemu_check(patient.path)["leaks"] == 1
    report = repair(patient.path, "leaks")
    assert report == jqcow.RepairReport(leaks=1)
    check_clean(patient.path)


def test_leaks_beside_refcounts_that_are_too_low(tmp_path: Path) -> None:
    patient = make(tmp_path)
    content, block, clusters = patient.refcounts()
    content += bytes(patient.cluster_bytes)
    content[block + 2 * clusters + 1] = 3
    shared = next(cluster for cluster in range(clusters) if content[block + 2 * cluster + 1] == 2)
    content[block + 2 * shared + 1] = 1
    patient.path.write_bytes(content)
    wrong = qemu_check(patient.path)
    assert wrong["leaks"] == 1 and wrong["corruptions"] > 0
    report = repair(patient.path, "leaks")
    assert report == jqcow.RepairReport(leaks=1)
    after = qemu_check(patient.path)
    assert after["corruptions"] == wrong["corruptions"] and not after.get("leaks")


def test_nothing_that_counts_as_free_by_mistake_is_used(tmp_path: Path) -> None:
    """After a repair of leaks alone, clusters of refcount 0 may hold data and tables: they are left alone."""
    patient = make(tmp_path)
    before = patient.read()
    content, block, clusters = patient.refcounts()
    content += bytes(patient.cluster_bytes)
    content[block + 2 * clusters + 1] = 1
    for cluster in range(2, clusters):
        content[block + 2 * cluster : block + 2 * cluster + 2] = bytes(2)
    patient.path.write_bytes(content)
    with jqcow.open(patient.path, "r+", repair="leaks") as image:
        assert image.repaired == jqcow.RepairReport(leaks=1)
        with pytest.raises(jqcow.CorruptionError):
            image.pwrite(b"x" * 512, 0)
        size = image.size
        image.resize(size + (64 << 20))
        with pytest.raises(jqcow.CorruptionError):
            image.pwrite(b"y" * (4 << 20), size + (8 << 20))
    with jqcow.open(patient.path, "r+", repair="all") as image:
        image.resize(size)
    check_clean(patient.path)
    assert patient.read() == before


@pytest.mark.parametrize("cluster_bytes", [4096, 65536])
def test_a_dirty_image_is_counted_anew(tmp_path: Path, cluster_bytes: int) -> None:
    """QEMU killed with lazy refcounts: its new clusters have refcount 0."""
    path = tmp_path / "image.qcow2"
    done(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"lazy_refcounts=on,cluster_size={cluster_bytes}",
        path,
        "8M",
    )
    run("qemu-io", "-c", "write -P 0x44 0 3M", "-c", "write -P 0x55 5M 1M", "-c", "sigraise 9", path)
    header = Header.unpack(path.read_bytes()[:512])
    assert header.incompatible_features & DIRTY
    copy = tmp_path / "copy.qcow2"
    shutil.copyfile(path, copy)
    with jqcow.open(copy) as image:
        assert image.info().dirty and image.pread(3 * MIB, 0) == b"\x44" * (3 * MIB)

    with jqcow.open(copy, "r+") as image:
        assert image.repaired is not None and image.repaired.too_low > 0
        assert not image.info().dirty
        assert image.check().ok
        image.pwrite(b"\x66" * MIB, 4 * MIB)
    check_clean(copy)
    qemu_io(copy, "read -P 0x44 0 3M", "read -P 0x66 4M 1M", "read -P 0x55 5M 1M")


def test_an_image_marked_corrupt(tmp_path: Path) -> None:
    patient = make(tmp_path)
    before = patient.read()
    patient.set_feature(CORRUPT)
    with pytest.raises(jqcow.UnsupportedFeatureError, match="marked corrupt"):
        repair(patient.path, None)
    with pytest.raises(jqcow.UnsupportedFeatureError, match="marked corrupt"):
        repair(patient.path, "leaks")
    assert repair(patient.path, "all") is not None
    assert not patient.header.incompatible_features & CORRUPT
    check_clean(patient.path)
    assert patient.read() == before


def test_what_cannot_be_repaired_stays_as_it_is(tmp_path: Path) -> None:
    """An L2 entry that names a refcount block: whose cluster it is cannot be told."""
    patient = make(tmp_path)
    content, block, _ = patient.refcounts()
    l1 = patient.header.l1_table_offset
    l2 = int.from_bytes(content[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    content[l2 : l2 + 8] = (block | 1 << 63).to_bytes(8, "big")
    patient.path.write_bytes(content)
    for bit in (0, DIRTY, CORRUPT):
        patient.set_feature(bit)
        before = patient.path.read_bytes()
        with pytest.raises(jqcow.CorruptionError, match="maps metadata"):
            repair(patient.path, "all")
        assert patient.path.read_bytes() == before


def test_a_missing_refcount_block_comes_back(tmp_path: Path) -> None:
    """All its refcounts read as 0: new blocks are taken behind the end of the file."""
    patient = make(tmp_path)
    before = patient.read()
    content, _, _ = patient.refcounts()
    table = patient.header.refcount_table_offset
    content[table : table + 8] = bytes(8)
    patient.path.write_bytes(content)
    report = repair(patient.path, "all")
    assert report is not None and report.too_low > 20
    check_clean(patient.path)
    assert patient.read() == before


def test_leaks_alone_are_not_enough_for_a_dirty_image(tmp_path: Path) -> None:
    """The bit goes, so everything must be right: the next opening would trust the refcounts."""
    patient = make(tmp_path)
    before = patient.read()
    content, block, clusters = patient.refcounts()
    for cluster in range(4, clusters):
        content[block + 2 * cluster : block + 2 * cluster + 2] = bytes(2)
    patient.path.write_bytes(content)
    patient.set_feature(DIRTY)
    report = repair(patient.path, "leaks")
    assert report is not None and report.too_low > 0
    check_clean(patient.path)
    assert patient.read() == before
