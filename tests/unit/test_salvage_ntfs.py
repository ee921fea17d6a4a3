"""NTFS in orphans: certain is what several facts say, copies and torn records are not believed."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqcow.salvage.evidence import Certainty, Placement, Volume
from jqcow.salvage.guest import ntfs
from jqcow.salvage.guest.ntfs_ondisk import Boot, IndexBuffer, Record, fixed_up, unpacked_runs
from tests.salvage.foreign import PATH, run
from tests.salvage.scattered import Placed, Scattered, settle, wrong

pytestmark = pytest.mark.skipif(not shutil.which("mkntfs", path=PATH), reason="ntfs-3g")
SIZE = 40 << 20
START = 1 << 20
SNAPSHOTS = bytes.fromhex("6b87083876c1484eb7ae04046e6cc752")


def make(folder: Path, *options: str, seed: int = 1, size: int = SIZE, files: int = 80) -> Path:
    """Make a volume with files, more than its root keeps in its record."""
    chance = random.Random(seed)
    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate(size)
    run("mkntfs", "-q", "-Q", "-F", *options, disk)
    for number in range(files):
        source = folder / f"file{number}"
        source.write_bytes(chance.randbytes(chance.choice((10, 3_000, 9_999, 300_000 if number < 9 else 5))))
        run("ntfscp", "-q", "-f", disk, source, f"{'name' * 12}{number}")
    return disk


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("ntfs"))


def found_in(orphans: Scattered, size: int = SIZE, volumes: list[Volume] | None = None) -> ntfs.Ntfs:
    (structure,) = ntfs.find(volumes or [], Placed(size, orphans), orphans)
    return structure


def whole(disk: Path) -> tuple[ntfs.Ntfs, Placed]:
    orphans = Scattered.of(disk, 4096, chance=random.Random(0))
    return found_in(orphans), Placed.whole(SIZE, orphans, orphans.truth)


def certain(placements: list[Placement], witness: str) -> list[Placement]:
    return [
        one for one in placements if one.certainty is Certainty.CERTAIN and one.witness == f"NTFS {witness}"
    ]


def check(disk: Path, cluster_bytes: int) -> None:
    orphans = Scattered.of(disk, cluster_bytes, chance=random.Random(cluster_bytes))
    structure, placed = found_in(orphans), Placed(SIZE, orphans)
    placements = settle(structure, placed, orphans)
    assert certain(placements, "records") and not wrong(placements, orphans)
    truth = Placed.whole(SIZE, orphans, orphans.truth)
    files = {piece for piece in structure.pieces(truth) if piece.is_data}
    assert {piece for piece in structure.pieces(placed) if piece.is_data} == files and len(files) > 15
    kept = {truth.read(piece.guest_offset, piece.valid_bytes) for piece in files if piece.length > 4096}
    sources = [disk.with_name(f"file{number}").read_bytes() for number in range(80)]
    assert sum(source in kept for source in sources if len(source) > 4096) > 10


@pytest.mark.parametrize("cluster_bytes", [1024, 4096, 65536])
def test_records_say_their_places(disk: Path, cluster_bytes: int) -> None:
    check(disk, cluster_bytes)


@pytest.mark.parametrize("options", [("-c", "512"), ("-c", "65536"), ("-s", "4096")])
def test_geometries(tmp_path: Path, options: tuple[str, ...]) -> None:
    check(make(tmp_path, *options), 65536)


def test_directories_follow_their_records(disk: Path) -> None:
    orphans = Scattered.of(disk, 4096, chance=random.Random(2))
    assert len(certain(settle(found_in(orphans), Placed(SIZE, orphans), orphans), "directory")) >= 2


def test_free_space_is_what_ntfsinfo_says(disk: Path) -> None:
    structure, truth = whole(disk)
    counted = re.search(r"Free Clusters: (\d+)", run("ntfsinfo", "-m", "-f", disk))
    by_bitmap = sum(length for _, length in structure.free(truth)) // 4096
    assert counted and by_bitmap == int(counted[1])
    orphans = Scattered.of(disk, 4096, chance=random.Random(2))
    placed = Placed(SIZE, orphans)
    structure = found_in(orphans)
    settle(structure, placed, orphans)
    assert sum(length for _, length in structure.free(placed)) // 4096 == by_bitmap


def test_a_copy_makes_neither_certain(disk: Path) -> None:
    orphans = Scattered.of(disk, 4096, chance=random.Random(1))
    host = next(
        host
        for host, content in orphans
        if content[:4] == Record.MAGIC and int.from_bytes(content[44:48], "little") >= 64
    )
    orphans.add(orphans.contents[host])
    placements = settle(found_in(orphans), Placed(SIZE, orphans), orphans)
    of_it = [one for one in placements if one.guest_offset == orphans.truth[host]]
    assert [one.certainty for one in of_it] == [Certainty.LIKELY]


@pytest.mark.parametrize("kind", ["snapshots", "volume", "layout"])
def test_where_copies_are_known_records_are_in_doubt(disk: Path, tmp_path: Path, kind: str) -> None:
    orphans = Scattered.of(disk, 4096, chance=random.Random(1))
    if kind == "snapshots":
        orphans.add(SNAPSHOTS.ljust(4096, b"\0"))
    elif kind == "volume":
        for _, content in Scattered.of(make(tmp_path, seed=2), 4096, chance=random.Random(1)):
            orphans.add(content)
    else:
        first = bytearray(next(content for _, content in orphans if content[:4] == Record.MAGIC
                               and int.from_bytes(content[44:48], "little") == 0
                               and b"$\0M\0F\0T\0" in content))  # fmt: skip
        first[8:16] = (99).to_bytes(8, "little")
        at = first.index(bytes.fromhex("80000000"), 56)  # the attribute with the MFT's runs
        first[at + 24] -= 1
        first[at + 65] -= 1
        orphans.add(bytes(first))
    found = list(ntfs.find([], Placed(SIZE, orphans), orphans))
    for structure in found:
        assert not certain(settle(structure, Placed(SIZE, orphans), orphans), "records")
    assert found


@pytest.mark.parametrize("cluster_bytes", [4096, 65536])
def test_a_smaller_volume_takes_only_what_both_can_have(
    disk: Path, tmp_path: Path, cluster_bytes: int
) -> None:
    other = make(tmp_path, seed=2, size=SIZE // 2, files=20)
    orphans = Scattered.of(disk, cluster_bytes, chance=random.Random(1))
    for _, content in Scattered.of(other, cluster_bytes, chance=random.Random(1)):
        orphans.add(content)
    (structure,) = ntfs.find([], Placed(SIZE, orphans), orphans)
    placements = settle(structure, Placed(SIZE, orphans), orphans)
    assert certain(placements, "records") and not wrong(placements, orphans)


@pytest.mark.parametrize("is_child", [True, False])
def test_one_record_in_a_cluster_needs_its_directory(disk: Path, is_child: bool) -> None:
    orphans = Scattered.of(disk, 4096, chance=random.Random(1))
    host, content = next(
        (host, content)
        for host, content in orphans
        if content[:4] == Record.MAGIC and int.from_bytes(content[44:48], "little") >= 64
    )
    alone = bytearray(content[:1024] + bytes(3072))
    if not is_child:
        parent = alone.index((5 << 48 | 5).to_bytes(8, "little"))
        alone[parent + 6] = 9  # the directory was used again since
    orphans.contents[host] = bytes(alone)
    placements = settle(found_in(orphans), Placed(SIZE, orphans), orphans)
    said = [one.certainty for one in placements if one.host_offset == host]
    assert said == [Certainty.CERTAIN if is_child else Certainty.LIKELY]


def test_an_old_buffer_is_not_certain(disk: Path) -> None:
    orphans = Scattered.of(disk, 4096, chance=random.Random(1))
    host, content = next(
        (host, content)
        for host, content in orphans
        if (found := IndexBuffer.unpack(content)) and len(found.files) > 3
    )
    start = 24 + int.from_bytes(content[24:28], "little")
    old = bytearray(content)
    old[start + 6] += 1  # the file's record was used again since
    orphans.contents[host] = bytes(old)
    placements = settle(found_in(orphans), Placed(SIZE, orphans), orphans)
    assert [one.certainty for one in placements if one.host_offset == host] == [Certainty.LIKELY]


@pytest.mark.parametrize("start", [START, 63 * 512])
def test_a_partition_is_filled(disk: Path, start: int) -> None:
    orphans = Scattered.of(disk, 65536, chance=random.Random(4), start=start)
    size = start + SIZE + START
    structure = found_in(orphans, size, [Volume(0, size, "disk"), Volume(start, SIZE, "partition 1")])
    placements = settle(structure, Placed(size, orphans), orphans)
    assert structure.start == start and certain(placements, "records") and not wrong(placements, orphans)


def test_the_copy_of_the_boot_sector_is_enough(disk: Path) -> None:
    orphans = Scattered.of(disk, 4096, chance=random.Random(4))
    first = next(host for host, guest in orphans.truth.items() if guest == 0)
    del orphans.contents[first], orphans.truth[first]
    placements = settle(found_in(orphans), Placed(SIZE, orphans), orphans)
    assert certain(placements, "records") and not wrong(placements, orphans)


def test_torn_records_are_refused(disk: Path) -> None:
    with disk.open("rb") as file:
        boot = Boot.unpack(file.read(512))
        assert boot is not None
        file.seek(boot.mft_cluster * boot.cluster_bytes)
        record = file.read(boot.record_bytes)
    assert Record.unpack(record, boot)
    torn = bytearray(record)
    torn[1022] ^= 1
    assert fixed_up(bytes(torn)) is None and Record.unpack(bytes(torn), boot) is None


@given(st.binary(max_size=200), st.integers(0, 1 << 60), st.integers(1, 1 << 56))
def test_runs_stay_in_the_volume(data: bytes, first: int, clusters: int) -> None:
    for run_ in unpacked_runs(data, first, clusters) or []:
        assert run_.count > 0
        assert run_.cluster is None or (run_.cluster >= 0 and run_.cluster + run_.count <= clusters)


@given(st.binary(min_size=512, max_size=512))
def test_boot_sectors_of_chance(data: bytes) -> None:
    boot = Boot.unpack(data[:3] + Boot.MAGIC + data[11:510] + b"\x55\xaa")
    assert boot is None or boot.mft_cluster < boot.cluster_count


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 32))
def test_damaged_clusters_never_raise(disk: Path, seed: int) -> None:
    chance = random.Random(seed)
    if not CACHE:
        CACHE.append(Scattered.of(disk, 4096, chance=random.Random(5)))
    damaged = Scattered(4096)
    for host, content in CACHE[0]:
        if content[:4] not in (Record.MAGIC, IndexBuffer.MAGIC) or chance.random() < 0.6:
            damaged.add(content, CACHE[0].truth[host])
            continue
        block = bytearray(content)
        for _ in range(chance.randrange(1, 40)):
            block[chance.randrange(4, 400) + 1024 * chance.randrange(4) - 400] = chance.randrange(256)
        damaged.add(bytes(block), CACHE[0].truth[host])
    for structure in ntfs.find([], Placed(SIZE, damaged), damaged):
        placed = Placed(SIZE, damaged)
        settle(structure, placed, damaged)
        for piece in structure.pieces(placed):
            assert piece.guest_offset >= 0 and piece.guest_offset + piece.length <= SIZE
            assert 0 < piece.valid_bytes <= piece.length
        assert all(start + length <= SIZE for start, length in structure.free(placed))


CACHE: list[Scattered] = []


def test_a_cleared_log_takes_what_is_cleared(disk: Path) -> None:
    orphans = Scattered.of(disk, 65536, chance=random.Random(4))
    cleared = {host for host, content in orphans if content.count(0xFF) == len(content)}
    placements = settle(found_in(orphans), Placed(SIZE, orphans), orphans)
    found = [one for one in placements if one.witness == "NTFS log, cleared"]
    assert {one.host_offset for one in found} == cleared and len(cleared) > 8
    by_guest = {guest: orphans.contents[host] for host, guest in orphans.truth.items()}
    assert all(by_guest[one.guest_offset] == orphans.contents[one.host_offset] for one in found)
    assert len({one.guest_offset for one in found}) == len(found)
    assert all(one.certainty is Certainty.LIKELY for one in found)
