"""Files as disks, by every way that leads to them: what one way refuses, all refuse, in the same words."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import jqcow
from jqcow.device.base import Reader
from jqcow.device.disk import Extent, found_below, joined, read_padded, shows_zeros
from jqcow.device.file import FileDevice
from jqcow.disks.chain import open_disk
from jqcow.disks.files import open_to_read
from jqcow.disks.image import ImageDisk
from jqcow.disks.policy import Following
from jqcow.disks.raw import RawDisk
from jqcow.disks.view import FileView, open_view
from jqcow.errors import CorruptionError, FileAccessDenied, UnsupportedFeatureError
from jqcow.offline.commit import commit
from jqcow.offline.compare import first_difference
from jqcow.offline.convert import convert
from jqcow.offline.info import read_chain
from jqcow.offline.map import map_file
from jqcow.offline.overlay import create_overlay
from jqcow.offline.rebase import rebase
from jqcow.ondisk.header import HeaderArea
from jqcow.testing import SimulatedDevice
from tests.support.qemu import done, qemu_io

MIB = 1 << 20
CLUSTER = 65536


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def store_backing(path: str, name: str, backing_format: bytes | None) -> None:
    with open(path, "r+b") as file:
        area = HeaderArea.parse(file.read(CLUSTER)).with_backing_file(name.encode(), backing_format)
        file.seek(0)
        file.write(area.data.ljust(CLUSTER, b"\0"))


def overlay(path: str, base: str, backing_format: bytes | None = b"qcow2") -> None:
    create_overlay(path, MIB, cluster_size=CLUSTER, backing_file=base, backing_format="qcow2")
    store_backing(path, base, backing_format)


def crashed(path: str) -> bytes:
    """Make an image that lost power with a live journal; return its bytes."""
    device = SimulatedDevice()
    image = jqcow.create_on_device(device, MIB)
    image.pwrite(b"a" * CLUSTER, CLUSTER)
    image.flush()
    left = device.killed()
    Path(path).write_bytes(left.pread(left.size(), 0))
    return Path(path).read_bytes()


def lose_sector_0(path: str) -> None:
    with open(path, "r+b") as file:
        file.write(bytes(512))


# Every way to what lies below an image; each takes the policy about it


def by_open(top: str, following: Following) -> None:
    jqcow.open(top, allow_files=following.allow, probe=following.probe).close()


def by_open_to_write(top: str, following: Following) -> None:
    jqcow.open(top, "r+", allow_files=following.allow, probe=following.probe).close()


def by_disk(top: str, following: Following) -> None:
    open_disk(top, following=following).close()


def by_info(top: str, following: Following) -> None:
    read_chain(top, following=following)


def by_map(top: str, following: Following) -> None:
    map_file(top, None, following=following)


def by_convert(top: str, following: Following) -> None:
    try:
        convert(top, "target", allow_files=following.allow, probe=following.probe)
    finally:
        assert not os.path.exists("target")


def by_compare(top: str, following: Following) -> None:
    with closing(open_disk(top, following=following)) as one:
        first_difference(one, one)


def by_commit(top: str, following: Following) -> None:
    commit(top, allow_files=following.allow, probe=following.probe)


def by_rebase(top: str, following: Following) -> None:
    jqcow.create("other", MIB, overwrite=True).close()
    rebase(top, "other", "qcow2", allow_files=following.allow, probe=following.probe)


def by_rebase_onto(top: str, following: Following) -> None:
    """What is refused lies below the new backing file."""
    jqcow.create("moved", MIB, overwrite=True).close()
    rebase("moved", top, "qcow2", allow_files=following.allow, probe=following.probe)


Way = Callable[[str, Following], None]
WAYS: list[Way] = [
    by_open, by_open_to_write, by_disk, by_info, by_map, by_convert, by_compare, by_commit, by_rebase,
    by_rebase_onto,
]  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@every_way
@pytest.mark.parametrize("stored", [None, b"qcow2"])
def test_a_crashed_base_that_lost_sector_0_is_refused_by_name(way: Way, stored: bytes | None) -> None:
    """Read as a raw file it would show garbage; its root copy tells what it is."""
    crashed("base")
    lose_sector_0("base")
    overlay("top", "base", stored)
    before = Path("base").read_bytes()
    with pytest.raises(CorruptionError, match="run jqcow-recover"):
        way("top", Following(True, probe=True))
    assert Path("base").read_bytes() == before


@every_way
@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_loop_is_refused_by_one_error(way: Way, length: int) -> None:
    for number in range(length):
        jqcow.create(f"i{number}", MIB).close()
        store_backing(f"i{number}", f"./i{(number + 1) % length}", b"qcow2")
    before = [Path(f"i{number}").read_bytes() for number in range(length)]
    with pytest.raises(CorruptionError, match="the chain comes back to"):
        way("i0", Following(True))
    assert [Path(f"i{number}").read_bytes() for number in range(length)] == before


@every_way
def test_a_format_that_is_not_stored_is_refused_unless_probed(way: Way) -> None:
    jqcow.create("base", MIB).close()
    overlay("top", "base", None)
    with pytest.raises(UnsupportedFeatureError, match="without a format"):
        way("top", Following(True))
    if way is not by_convert:
        way("top", Following(True, probe=True))


@every_way
@pytest.mark.parametrize("probe", [False, True])
def test_an_unknown_format_is_refused(way: Way, probe: bool) -> None:
    jqcow.create("base", MIB).close()
    overlay("top", "base", b"vmdk")
    with pytest.raises(UnsupportedFeatureError, match="the format 'vmdk'"):
        way("top", Following(True, probe=probe))


@every_way
def test_a_file_that_is_not_allowed_is_not_touched(way: Way) -> None:
    overlay("top", "gone")
    with pytest.raises(FileAccessDenied):
        way("top", Following(lambda named: named.name == "top"))


@every_way
def test_a_missing_file_names_who_needs_it(way: Way) -> None:
    overlay("top", "gone")
    with pytest.raises(FileNotFoundError) as missing:
        way("top", Following(True))
    assert missing.value.__notes__ == ["top names it as its backing file, by 'gone'"]


# Extents


def test_neighbours_are_joined_where_the_host_goes_on() -> None:
    parts = [
        Extent(0, 10, "data", 100),
        Extent(10, 5, "data", 110),
        Extent(15, 5, "data", 200),
        Extent(20, 5, "zero", None),
        Extent(25, 5, "zero", None),
        Extent(30, 5, "zero", 300),
        Extent(35, 5, "compressed", None),
        Extent(40, 5, "compressed", None),
        Extent(45, 5, "compressed", None, 1),
    ]
    assert list(joined(parts)) == [
        Extent(0, 15, "data", 100),
        Extent(15, 5, "data", 200),
        Extent(20, 10, "zero", None),
        Extent(30, 5, "zero", 300),
        Extent(35, 10, "compressed", None),
        Extent(45, 5, "compressed", None, 1),
    ]
    assert list(joined([])) == []


def test_past_the_end_of_a_disk_below_there_is_nothing() -> None:
    Path("raw").write_bytes(b"x" * 1024)
    with closing(open_disk("raw", "raw")) as disk:
        assert list(found_below(disk, 2048, 512)) == [
            Extent(512, 512, "data", 512, 1),
            Extent(1024, 1536, "unallocated", None),
        ]
        assert list(found_below(disk, 512, 4096)) == [Extent(4096, 512, "unallocated", None)]
        buffer = bytearray(b"?" * 1024)
        read_padded(disk, memoryview(buffer), 512)
        assert buffer == b"x" * 512 + bytes(512)
        assert not shows_zeros(disk, 1024, 512) and shows_zeros(disk, 512, 1024)
    read_padded(None, memoryview(buffer), 0)
    assert not any(buffer) and shows_zeros(None, 512, 0)


def test_an_image_shows_what_its_chain_does() -> None:
    """One vocabulary: the extents of an image and of the chain that is the same disk are the same."""
    jqcow.create("base", MIB).close()
    with jqcow.open("base", "r+") as image:
        image.pwrite(b"a" * 3 * CLUSTER, 0)
        image.pwrite_compressed(b"b" * 2 * CLUSTER, 4 * CLUSTER)
    overlay("top", "base")
    with jqcow.open("top", "r+", allow_files=True) as image:
        image.pwrite(b"c" * CLUSTER, CLUSTER)
        image.write_zeroes(CLUSTER, 4 * CLUSTER)
    with (
        jqcow.open("top", allow_files=True) as image,
        closing(open_disk("top", following=Following(True))) as disk,
    ):
        shown, found = list(image.extents()), list(disk.extents(disk.size, 0))
        # What no file has was found in none, says the image; the chain says which file was asked last.
        assert shown == [replace(each, depth=0) if each.kind == "unallocated" else each for each in found]
        kinds = ["data", "data", "data", "unallocated", "zero", "compressed", "unallocated"]
        assert [extent.kind for extent in shown] == kinds
        buffer = bytearray(MIB)
        disk.read_into(memoryview(buffer), 0)
        assert buffer == image.pread(MIB, 0)


# Raw disks


def test_a_raw_disk_is_written_in_place() -> None:
    Path("raw").write_bytes(b"x" * 1000)
    with closing(RawDisk(FileDevice.open("raw", writable=True))) as disk:
        assert disk.size == 1024
        disk.resize(8192)
        disk.pwrite(b"y" * 512, 4096)
        disk.write_zeroes(512, 0)
        assert disk.size == 8192
    expected = bytes(512) + b"x" * 488 + bytes(3096) + b"y" * 512 + bytes(3584)
    assert Path("raw").read_bytes() == expected


def test_a_raw_disk_on_a_device_without_holes_is_all_data() -> None:
    disk = RawDisk(SimulatedDevice(bytes(4096)))
    assert list(disk.extents(1024, 512)) == [Extent(512, 1024, "data", 512)]


# Opening


def test_a_live_journal_is_refused_beside_its_writer_whatever_the_magic_says_of_raw_files() -> None:
    crashed("image")
    with pytest.raises(jqcow.ImageInUse, match="live journal"):
        open_to_read("image", share_writers=True)
    device, known = open_to_read("image", "raw", share_writers=True)
    device.close()
    assert known == "raw"


def test_a_snapshot_is_a_disk() -> None:
    with jqcow.create("image", MIB) as image:
        image.pwrite(b"old", 0)
        image.create_snapshot("then")
        image.pwrite(b"new", 0)
    for snapshot, expected in (("then", b"old"), (None, b"new")):
        with closing(open_disk("image", snapshot=snapshot)) as disk:
            buffer = bytearray(3)
            disk.read_into(memoryview(buffer), 0)
            assert buffer == expected


# The file as a clean close would leave it


def test_the_view_of_a_crashed_file_is_the_file_once_it_is_recovered() -> None:
    crashed("image")
    with open_view("image") as view:
        seen = view.read(view.size(), 0)
        (start, length), area = view.reserved[0], view.area
    jqcow.open("image", "r+").close()
    recovered = Path("image").read_bytes()
    # What of the header's cluster is not its own is left as it is.
    assert seen[CLUSTER:start] == recovered[CLUSTER:start]
    assert length and area == HeaderArea.parse(recovered)


def test_a_view_shows_blocks_and_a_header_that_are_in_memory() -> None:
    """As of an engine: what it would write home is laid over the file."""
    jqcow.create("image", MIB).close()
    content = Path("image").read_bytes()
    reader: Reader = SimulatedDevice(content)
    area = HeaderArea.parse(content[:CLUSTER])
    other = area.with_backing_file(b"base", b"raw")
    place = 2 * CLUSTER
    view = FileView(reader, other, {place: bytearray(b"z" * 4096)})
    assert HeaderArea.parse(view.read(CLUSTER, 0)) == other
    assert view.read(4096, place) == b"z" * 4096
    assert view.read(100, place - 50) == content[place - 50 : place] + b"z" * 50


@pytest.mark.parametrize("lost", [False, True])
def test_a_view_takes_the_root_from_its_copy_where_that_is_asked_for(lost: bool) -> None:
    crashed("image")
    with open_view("image") as view:
        area = view.area
    if lost:
        lose_sector_0("image")
    content = SimulatedDevice(Path("image").read_bytes())
    assert FileView.of_file(content, use_root_copy=True).area == area
    if lost:
        with pytest.raises(CorruptionError, match="jqcow-recover"):
            FileView.of_file(content)


def test_clusters_that_zeros_keep_are_told() -> None:
    with jqcow.create("image", MIB) as image:
        image.pwrite(b"x" * 3 * CLUSTER, 0)
        image.write_zeroes(2 * CLUSTER, CLUSTER, unmap=False)
        image.write_zeroes(CLUSTER, 3 * CLUSTER)
    with closing(ImageDisk(FileDevice.open("image", writable=False))) as disk:
        (data, zeros, _) = disk.extents(MIB, 0)
        assert data.host_offset is not None and zeros.host_offset is None
        kept = [(part.offset, part.length, part.host_offset) for part in disk.kept_clusters(zeros)]
    assert kept[0] == (CLUSTER, 2 * CLUSTER, data.host_offset + CLUSTER)
    assert kept[1:] in ([], [(3 * CLUSTER, CLUSTER, None)])


def test_tables_are_walked_whole_as_they_are_in_pieces(tmp_path: Path) -> None:
    """Runs over the borders of blocks and tables, and others: a chain looks at tables, an image at blocks."""
    path = tmp_path / "a.qcow2"
    done("qemu-img", "create", "-qf", "qcow2", "-o", "cluster_size=8k", path, "64M")
    chance = random.Random(3)
    places = (chance.randrange(7000) for _ in range(40))
    writes = [f"write -q -P 1 {place * 8}k {chance.choice((8, 24, 900))}k" for place in places]
    qemu_io(path, *writes, "write -q -z 3M 5M", "write -q -c 20M 8k", "discard -q 30M 1M")
    with jqcow.open(path) as image, closing(open_disk(path)) as chain:
        expected = list(image.extents())
        assert len(expected) > 30 and list(chain.extents(chain.size, 0)) == expected
        part = [extent.kind for extent in chain.extents(5 << 20, (1 << 20) + 4096)]
        assert part == [extent.kind for extent in image.extents(5 << 20, (1 << 20) + 4096)]
