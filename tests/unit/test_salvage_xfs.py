"""XFS in orphans: what names its place is found, what lies is not believed."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqcow import _native
from jqcow.salvage.evidence import Certainty, Volume
from jqcow.salvage.guest import xfs
from jqcow.salvage.guest.xfs_ondisk import Inode, Superblock
from tests.salvage.foreign import PATH, run
from tests.salvage.scattered import Placed, Scattered, settle, wrong

pytestmark = pytest.mark.skipif(not shutil.which("mkfs.xfs", path=PATH), reason="xfsprogs")
SIZE = 320 << 20
START = 1 << 20
SIZES = pytest.mark.parametrize("cluster_bytes", [512, 4096, 65536, 2 << 20])


def make(folder: Path, *options: str, seed: int = 1) -> Path:
    """Make a file system with files, a directory of several blocks and links."""
    chance = random.Random(seed)
    lines = ["/dev/null", "0 0", "d--755 0 0"]
    for number, length in enumerate((5_000, 70_000, 1_234_567, 4096)):
        content = folder / f"content{number}"
        content.write_bytes(chance.randbytes(length))
        lines.append(f"file{number} ---644 0 0 {content}")
    lines.append("many d--755 0 0")
    lines += [f"{'long' * 20}{number} ---644 0 0 /dev/null" for number in range(200)]
    lines += [f"link l--777 0 0 {'t' * 900}", "$", "$"]
    prototype = folder / "prototype"
    prototype.write_text("\n".join(lines) + "\n")
    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    run("mkfs.xfs", "-q", "-f", *options, "-p", prototype, disk)
    return disk


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("xfs"))


def found_in(orphans: Scattered, size: int = SIZE, volumes: list[Volume] | None = None) -> xfs.Xfs:
    (structure,) = xfs.find(volumes or [], Placed(size, orphans), orphans)
    return structure


def whole(disk: Path) -> tuple[xfs.Xfs, Placed]:
    orphans = Scattered.of(disk, 65536, chance=random.Random(0))
    return found_in(orphans), Placed.whole(SIZE, orphans, orphans.truth)


@SIZES
def test_what_names_its_place_gets_it(disk: Path, cluster_bytes: int) -> None:
    orphans = Scattered.of(disk, cluster_bytes, chance=random.Random(cluster_bytes))
    structure, placed = found_in(orphans), Placed(SIZE, orphans)
    placements = settle(structure, placed, orphans)
    assert placements and not wrong(placements, orphans)
    _, truth = whole(disk)
    files = {piece for piece in structure.pieces(truth) if piece.is_data}
    assert {piece for piece in structure.pieces(placed) if piece.is_data} == files and len(files) >= 4
    free = set(structure.free(truth))
    assert free.issuperset(structure.free(placed))
    assert cluster_bytes < 4096 or free == set(structure.free(placed)) != set()


@pytest.mark.parametrize(
    "options",
    [
        ("-m", "rmapbt=1,reflink=1"),
        ("-m", "bigtime=0,inobtcount=0,finobt=0,reflink=0", "-i", "sparse=0"),
        ("-b", "size=1024", "-n", "size=8192"),
        ("-s", "size=4096", "-i", "size=1024,nrext64=1"),
    ],
)
def test_features(tmp_path: Path, options: tuple[str, ...]) -> None:
    made = make(tmp_path, *options)
    orphans = Scattered.of(made, 65536, chance=random.Random(3))
    structure, placed = found_in(orphans), Placed(SIZE, orphans)
    assert not wrong(settle(structure, placed, orphans), orphans)
    assert sum(piece.valid_bytes for piece in structure.pieces(placed) if piece.is_data) == 1_313_663


def test_pieces_are_what_xfs_db_says(disk: Path) -> None:
    structure, placed = whole(disk)
    pieces = [piece for piece in structure.pieces(placed) if piece.is_data]
    assert sum(piece.valid_bytes for piece in pieces) == 5_000 + 70_000 + 1_234_567 + 4096
    for piece in pieces:
        asked = (f"inode {piece.written[1]}", f"dblock {piece.written[2] >> 12}", "daddr")
        block = run("xfs_db", "-r", *(word for command in asked for word in ("-c", command)), disk)
        assert int(re.findall(r"current daddr is (\d+)", block)[0]) * 512 == piece.guest_offset


def test_free_space_is_what_xfs_db_says(disk: Path) -> None:
    structure, placed = whole(disk)
    counted = re.findall(r"total free blocks (\d+)", run("xfs_db", "-r", "-c", "freesp -s", disk))
    listed = list(structure.free(placed))
    fixed = re.findall(r"flcount = (\d+)", run("xfs_db", "-r", *("-c", "agf 0", "-c", "p flcount"), disk))
    assert sum(length for _, length in listed) // 4096 <= int(counted[0])
    assert sum(length for _, length in listed) // 4096 >= int(counted[0]) - 4 * (int(fixed[0]) + 8)
    used = {
        offset
        for piece in structure.pieces(placed)
        for offset in range(piece.guest_offset, piece.guest_offset + piece.length, 4096)
    }
    assert not any(
        offset in used for start, length in listed for offset in range(start, start + length, 4096)
    )


def test_a_copy_makes_neither_certain(disk: Path) -> None:
    orphans = Scattered.of(disk, 4096, chance=random.Random(1))
    inodes = next(host for host, content in orphans if content[:2] == Inode.MAGIC)
    orphans.add(orphans.contents[inodes])
    placements = settle(found_in(orphans), Placed(SIZE, orphans), orphans)
    of_it = [one for one in placements if one.guest_offset == orphans.truth[inodes]]
    assert [one.certainty for one in of_it] == [Certainty.LIKELY]


def test_blocks_that_disagree_place_nothing(disk: Path) -> None:
    orphans = Scattered.of(disk, 4096, chance=random.Random(1))
    mixed = Scattered(65536)
    blocks = [content for _, content in orphans if content[:2] == Inode.MAGIC][:2]
    mixed.add(bytes(4096).join(reversed(blocks)).ljust(65536, b"\0"))
    with disk.open("rb") as file:
        mixed.add(file.read(65536), 0)
    placements = settle(found_in(mixed), Placed(SIZE, mixed), mixed)
    assert [one.guest_offset for one in placements] == [0]


def test_another_file_system_is_another(disk: Path, tmp_path: Path) -> None:
    other = make(tmp_path, seed=2)
    chance = random.Random(4)
    orphans = Scattered.of(disk, 65536, chance=chance, start=START)
    for host, content in Scattered.of(other, 65536, chance=chance):
        orphans.add(content, 2 * START + SIZE + host)
    volumes = [Volume(0, START + 2 * SIZE, "disk"), Volume(START, SIZE, "partition 1")]
    empty = Placed(START + 2 * SIZE, orphans)
    certain = [one for one in xfs.find(volumes, empty, orphans) if one._certainty is Certainty.CERTAIN]
    assert not certain  # two file systems fill the one partition alike
    empty.hosts = {START: next(host for host, guest in orphans.truth.items() if guest == START)}
    structure = next(xfs.find(volumes, empty, orphans))
    assert structure.start == START and structure.length == SIZE
    assert not wrong(settle(structure, empty, orphans), orphans)


@pytest.mark.parametrize("start", [START, 63 * 512])
def test_a_partition_is_filled(disk: Path, start: int) -> None:
    orphans = Scattered.of(disk, 65536, chance=random.Random(4), start=start)
    size = start + SIZE + START
    structure = found_in(orphans, size, [Volume(0, size, "disk"), Volume(start, SIZE, "partition 1")])
    placements = settle(structure, Placed(size, orphans), orphans)
    assert structure.start == start and placements and not wrong(placements, orphans)


def test_a_lost_partition_table_leaves_doubt(disk: Path) -> None:
    orphans = Scattered.of(disk, 65536, chance=random.Random(4), start=START)
    size = START + SIZE + START
    placements = settle(found_in(orphans, size), Placed(size, orphans), orphans)
    assert placements and {one.certainty for one in placements} == {Certainty.LIKELY}
    assert all(orphans.truth[one.host_offset] == one.guest_offset for one in placements)


def test_a_copy_of_the_superblock_is_enough(disk: Path) -> None:
    orphans = Scattered.of(disk, 65536, chance=random.Random(4))
    first = next(host for host, guest in orphans.truth.items() if guest == 0)
    del orphans.contents[first], orphans.truth[first]
    placements = settle(found_in(orphans), Placed(SIZE, orphans), orphans)
    assert placements and not wrong(placements, orphans)


def signed(sector: bytearray) -> bytes:
    sector[224:228] = bytes(4)
    sector[224:228] = _native.crc32c(sector).to_bytes(4, "little")
    return bytes(sector)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 263), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_hostile_superblock_is_refused_or_bounded(disk: Path, changes: list[tuple[int, int]]) -> None:
    with disk.open("rb") as file:
        sector = bytearray(file.read(512))
    for at, value in changes:
        sector[at] = value
    superblock = Superblock.unpack(signed(sector))
    if superblock is not None:
        orphans = Scattered(65536)
        orphans.add(signed(sector).ljust(65536, b"\0"), 0)
        assert superblock.length <= superblock.group_count * superblock.group_blocks * superblock.block_bytes
        for structure in xfs.find([], Placed(SIZE, orphans), orphans):
            settle(structure, Placed(SIZE, orphans), orphans)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from(["flip", "cut", "sign"]))
def test_damaged_blocks_never_raise_nor_lie(disk: Path, seed: int, kind: str) -> None:
    chance = random.Random(seed)
    orphans = Scattered.of(disk, 4096, chance=chance) if not CACHE else CACHE[0]
    CACHE[:] = [orphans]
    damaged = Scattered(4096)
    for host, content in orphans:
        if content[:4] == Superblock.MAGIC or chance.random() < 0.7:
            damaged.add(content, orphans.truth[host])
            continue
        block = bytearray(content)
        for _ in range(chance.randrange(1, 30)):
            at = chance.randrange(4, 200)
            block[at] = chance.randrange(256)
        if kind == "cut":
            block[chance.randrange(4096) :] = b""
        if kind == "sign" and block[:2] == Inode.MAGIC:
            block[100:104] = bytes(4)
            block[100:104] = _native.crc32c(block[:512]).to_bytes(4, "little")
        damaged.add(bytes(block).ljust(4096, b"\0"), orphans.truth[host])
    structure, placed = found_in(damaged), Placed(SIZE, damaged)
    placements = settle(structure, placed, damaged)
    if kind != "sign":
        assert not wrong(placements, damaged)
    for piece in structure.pieces(placed):
        assert piece.guest_offset >= 0 and piece.guest_offset + piece.length <= SIZE
        assert 0 < piece.valid_bytes <= piece.length
    assert all(start >= 0 and start + length <= SIZE for start, length in structure.free(placed))


CACHE: list[Scattered] = []
