"""Salvage from end to end: what is lost of a file, and what other structures, sums and the guest tell."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

import jqcow
from jqcow.errors import UnsupportedFeatureError
from jqcow.offline.salvage import SalvageReport, diagnose, salvage
from jqcow.offline.salvaging.in_place import repair_in_place
from jqcow.ondisk.header import HeaderArea
from jqcow.salvage.bare import likeliest_bits, shape_of
from jqcow.salvage.source import Source
from tests.support.orphans import Memory

CLUSTER = 16_384
SIZE = 48 << 20
SECTOR = 512

Damage = Callable[[bytearray], None]


def header_of(image: bytes | bytearray) -> HeaderArea:
    return HeaderArea.parse(bytes(image[:65_536]))


def l2_tables(image: bytes | bytearray) -> list[int]:
    header = header_of(image).header
    table = image[header.l1_table_offset :][: 8 * header.l1_size]
    return [word & 0x00FF_FFFF_FFFF_FE00 for (word,) in struct.iter_unpack(">Q", table)]


def overwrite(image: bytearray, offset: int, length: int) -> None:
    image[offset : offset + length] = random.Random(offset).randbytes(length)


def no_l2(image: bytearray) -> None:
    for table in filter(None, l2_tables(image)):
        overwrite(image, table, CLUSTER)


def no_l1(image: bytearray) -> None:
    start = header_of(image).header.l1_table_offset
    image[start : start + CLUSTER] = bytes(CLUSTER)


def no_refcounts(image: bytearray) -> None:
    start = header_of(image).header.refcount_table_offset
    for (block,) in struct.iter_unpack(">Q", image[start : start + CLUSTER]):
        if block:
            overwrite(image, block, CLUSTER)
    overwrite(image, start, CLUSTER)


def no_header(image: bytearray) -> None:
    image[:CLUSTER] = bytes(CLUSTER)


def all_of(*damages: Damage) -> Damage:
    def damage(image: bytearray) -> None:
        # The header tells where the others are: it goes last.
        for each in sorted(damages, key=lambda one: (one is no_header, one is no_l1)):
            each(image)

    return damage


def wiped_sectors(image: bytearray) -> None:
    for table in filter(None, l2_tables(image)):
        image[table + SECTOR : table + 2 * SECTOR] = bytes(SECTOR)


def cut_off(image: bytearray) -> None:
    del image[len(image) * 5 // 8 // SECTOR * SECTOR + SECTOR :]


EVERYTHING = all_of(no_header, no_l1, no_l2, no_refcounts)


def contents(seed: int = 3) -> dict[int, bytes]:
    """Return what is written to a disk, in the order of the writes: clusters by guest offset."""
    chance = random.Random(seed)
    places = chance.sample(range(SIZE // CLUSTER), 90)
    return {place * CLUSTER: chance.randbytes(CLUSTER) for place in places}


def written(path: Path, **options: object) -> bytes:
    """Make an image; return its disk."""
    with jqcow.create(path, SIZE, cluster_size=CLUSTER, **options) as image:  # type: ignore[arg-type]
        for place, content in contents().items():
            image.pwrite(content, place)
        return image.pread(SIZE, 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    path = tmp_path_factory.mktemp("plain") / "disk.qcow2"
    disk = written(path)
    return path.read_bytes(), disk


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    path = tmp_path_factory.mktemp("protected") / "disk.qcow2"
    disk = written(path)
    with jqcow.open(path, "r+") as image:
        image.protection.refresh()
    return path.read_bytes(), disk


def saved(folder: Path, image: bytes, damage: Damage, disk: bytes) -> tuple[SalvageReport, float]:
    """Salvage what a damage leaves; return the report and the share of right data. Certain data is right."""
    broken = bytearray(image)
    damage(broken)
    path, target, told = folder / "broken.qcow2", folder / "saved.raw", folder / "saved.json"
    path.write_bytes(broken)
    made = salvage(path, target, target_format="raw", report=told)
    assert path.read_bytes() == broken
    found = target.read_bytes()
    for part in json.loads(told.read_text())["ranges"]:
        start, end = part["offset"], part["offset"] + part["length"]
        if part.get("certainty") == "certain":
            assert found[start:end] == disk[start:end], part
    places = [at for at in range(0, len(disk), 512) if any(disk[at : at + 512])]
    return made, sum(found[at : at + 512] == disk[at : at + 512] for at in places) / len(places)


class TestTables:
    def test_nothing_but_the_file_ends_early(self, tmp_path: Path, plain: tuple[bytes, bytes]) -> None:
        """TB2: each entry for what is behind the end is lost, and no other."""
        raw, path, disk = tmp_path / "disk.raw", tmp_path / "disk.qcow2", plain[1]
        raw.write_bytes(disk)
        convert = ("qemu-img", "convert", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}")
        subprocess.run([*convert, raw, path], check=True)
        made, right = saved(tmp_path, path.read_bytes(), cut_off, disk)
        assert 0.4 < right < 0.7 and made.lost and not made.likely + made.guess
        found = diagnose(tmp_path / "broken.qcow2")
        assert any("the file ends before" in each.meaning for each in found.damages)

    def test_wiped_sectors_are_no_holes(self, tmp_path: Path, plain: tuple[bytes, bytes]) -> None:
        """GM1: nothing tells where their data belongs; that nothing is there is not certain."""
        made, right = saved(tmp_path, plain[0], wiped_sectors, plain[1])
        assert right < 1 and not made.lost

    @pytest.mark.parametrize("damage", [no_l1, all_of(no_header, no_l1)], ids=["l1", "header too"])
    def test_tables_that_nothing_names(
        self, tmp_path: Path, plain: tuple[bytes, bytes], damage: Damage
    ) -> None:
        _, right = saved(tmp_path, plain[0], damage, plain[1][: 46 << 20])
        assert right == 1.0

    def test_a_lost_header(self, tmp_path: Path, plain: tuple[bytes, bytes]) -> None:
        made, right = saved(tmp_path, plain[0], no_header, plain[1])
        assert right == 1.0 and made.certain


class TestSums:
    @pytest.mark.parametrize(
        "damage",
        [no_l2, no_l1, wiped_sectors, EVERYTHING],
        ids=["l2", "l1", "sectors", "everything"],
    )
    def test_protected_data_is_certain(
        self, tmp_path: Path, protected: tuple[bytes, bytes], damage: Damage
    ) -> None:
        made, right = saved(tmp_path, protected[0], damage, protected[1])
        assert right == 1.0
        assert made.size == SIZE and made.certain >= len(contents()) * CLUSTER

    def test_compressed_data_too(self, tmp_path: Path, protected: tuple[bytes, bytes]) -> None:
        raw, path = tmp_path / "disk.raw", tmp_path / "packed.qcow2"
        text = b"".join(struct.pack(">Q", number) + b" words " * 9 for number in range(40_000))
        raw.write_bytes(text[: 2 << 20].ljust(4 << 20, b"\0"))
        convert = ("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"cluster_size={CLUSTER}")
        subprocess.run([*convert, raw, path], check=True)
        with jqcow.open(path, "r+") as image:
            image.protection.refresh()
        made, right = saved(tmp_path, path.read_bytes(), all_of(no_l2, no_l1), raw.read_bytes())
        assert right == 1.0 and made.certain >= 2 << 20

    def test_in_place(self, tmp_path: Path, protected: tuple[bytes, bytes]) -> None:
        path, broken = tmp_path / "disk.qcow2", bytearray(protected[0])
        no_l2(broken)
        path.write_bytes(broken)
        made = repair_in_place(str(path))
        assert made.certain >= len(contents()) * CLUSTER
        with jqcow.open(path) as image:
            assert image.check().ok and image.pread(SIZE, 0) == protected[1]


@pytest.fixture(scope="module")
def with_ext4(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return an image of a disk with an ext4, in another order than that of the disk; and the disk."""
    folder = tmp_path_factory.mktemp("ext4")
    raw, path = folder / "disk.raw", folder / "disk.qcow2"
    (folder / "tree").mkdir()
    for number in range(12):
        name = folder / "tree" / f"file{number}"
        name.write_bytes(random.Random(number).randbytes(9_000 * (number + 1)))
    command = (
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-g",
        "1024",
        "-d",
        folder / "tree",
        raw,
        "24M",
    )
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    disk = raw.read_bytes()
    with jqcow.create(path, len(disk), cluster_size=CLUSTER) as image:
        places = [at for at in range(0, len(disk), CLUSTER) if any(disk[at : at + CLUSTER])]
        random.Random(1).shuffle(places)
        for at in places:
            image.pwrite(disk[at : at + CLUSTER], at)
    return path.read_bytes(), disk


class TestGuests:
    def test_a_file_without_any_structure(self, tmp_path: Path, with_ext4: tuple[bytes, bytes]) -> None:
        """The guest's own structures tell cluster size, size of the disk, and places."""
        image, disk = with_ext4
        made, _ = saved(tmp_path, image, EVERYTHING, disk)
        assert made.size == len(disk) and made.anchored and made.structures
        assert not made.certain, "it rests on what was supposed"
        broken = bytearray(image)
        EVERYTHING(broken)
        assert shape_of(Source(Memory(bytes(broken)))).geometry.cluster_bytes == CLUSTER

    def test_lost_tables(self, tmp_path: Path, with_ext4: tuple[bytes, bytes]) -> None:
        made, _ = saved(tmp_path, with_ext4[0], no_l2, with_ext4[1])
        assert made.certain and made.structures == ("ext4 in the disk",)

    def test_the_size_of_a_disk_with_partitions(self, tmp_path: Path) -> None:
        path = tmp_path / "disk.qcow2"
        with jqcow.create(path, SIZE, cluster_size=CLUSTER) as image:
            image.pwrite(gpt_header(SIZE), 512)
            image.pwrite(b"data" * 1024, 1 << 20)
            disk = image.pread(SIZE, 0)
        made, right = saved(tmp_path, path.read_bytes(), no_header, disk)
        assert (made.size, right) == (SIZE, 1.0)


def gpt_header(disk_bytes: int) -> bytes:
    last = disk_bytes // 512 - 1
    fields = (b"EFI PART", 0x10000, 92, 0, 0, 1, last, 34, last - 33, b"g" * 16, 2, 128, 128, 0)
    packed = struct.pack("<8sIIIIQQQQ16sQIII", *fields)
    crc = struct.pack("<I", zlib.crc32(packed))
    return (packed[:16] + crc + packed[20:]).ljust(512, b"\0")


class TestSnapshots:
    def test_one_whose_entry_is_lost(self, tmp_path: Path) -> None:
        """Its L1 table is in use, so it is one, under another name; nothing of it is certain."""
        path = tmp_path / "disk.qcow2"
        old = contents(1)
        with jqcow.create(path, SIZE, cluster_size=CLUSTER) as image:
            for place, content in old.items():
                image.pwrite(content, place)
            image.create_snapshot("before")
            for place in old:
                image.pwrite(b"new" * 1000, place)
        broken = bytearray(path.read_bytes())
        header = header_of(broken).header
        overwrite(broken, header.snapshots_offset, 512)
        path.write_bytes(broken)
        found = diagnose(path)
        assert [disk.name for disk in found.disks] == ["disk", "snapshot 1"]
        with pytest.raises(jqcow.SnapshotNotFound):
            salvage(path, tmp_path / "none", snapshot="before")
        made = salvage(path, tmp_path / "saved", target_format="raw", snapshot="1")
        shown = (tmp_path / "saved").read_bytes()
        assert all(shown[place : place + CLUSTER] == content for place, content in old.items())
        assert made.likely and not made.certain


def test_an_external_data_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    jqcow.create(path, SIZE, data_file=str(tmp_path / "other.raw"), allow_files=True).close()
    with pytest.raises(UnsupportedFeatureError, match=r"other\.raw"):
        diagnose(path)


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_distances_tell_the_cluster_size(cluster_bits: int) -> None:
    chance = random.Random(cluster_bits)
    right = [chance.randrange(-5000, 5000) << cluster_bits for _ in range(40)]
    wrong = [chance.randrange(-5000, 5000) << min(12, cluster_bits) for _ in range(6)]
    assert likeliest_bits(right) == likeliest_bits(right + wrong) == cluster_bits


def test_three_quarters_of_the_distances_may_be_even() -> None:
    even, odd = [2 << 16, 6 << 16, 4 << 16], [3 << 16]
    assert likeliest_bits(even * 18 + odd * 18) == 16
