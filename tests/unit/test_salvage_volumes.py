"""Partition tables, LVM, LUKS and swap among the orphans: where volumes are, and how surely."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jqcow.salvage.evidence import Certainty, Volume
from jqcow.salvage.guest import luks, lvm, lvm_layout, partitions, swap
from jqcow.salvage.guest.find import find
from jqcow.salvage.guest.mapped import Mapped, MappedDisk
from jqcow.salvage.guest.partition_layout import GptHeader, unpack_boot_record
from tests.support.orphans import Disk, Orphans, place_all, used_clusters

SIZE = 1 << 30
MIB = 1 << 20
SECTOR = 512
CLUSTERS = [4 << 10, 64 << 10, 2 << 20]
GPT_SCRIPT = "label: gpt\nsize=300M\nsize=100M,type=swap\ntype=lvm\n"
DOS_SCRIPT = "label: dos\nsize=300M\nsize=100M,type=82\ntype=5\nsize=200M,type=8e\nsize=100M\ntype=83\n"
PV_BYTES = 512 * MIB
EXTENT_BYTES = 4 * MIB
PV_ID = "abcdefGHIJkLmnopQrstuVwXyz012345"


def partitioned(folder: Path, script: str, size: int = SIZE) -> Path:
    raw = folder / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "-q", raw], input=script.encode(), check=True)
    return raw


def told_by_sfdisk(raw: Path, kind: str = "") -> list[tuple[int, int]]:
    """Return (offset, length) of the partitions that can hold something."""
    lines = subprocess.run(
        ["sfdisk", "-d", raw], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    told = []
    for line in lines:
        if " : start=" in line:
            fields = dict(
                word.strip().split("=", 1) for word in line.split(" : ")[1].split(",") if "=" in word
            )
            if fields["type"].strip() != "5":
                told.append((int(fields["start"]) * SECTOR, int(fields["size"]) * SECTOR))
    return told


def lost(raw: Path, cluster_bytes: int, seed: int = 3) -> Orphans:
    clusters = list(used_clusters(raw, cluster_bytes).values())
    random.Random(seed).shuffle(clusters)
    return Orphans(clusters, cluster_bytes)


def ranges(volumes: list[Volume]) -> list[tuple[int, int]]:
    return [(volume.offset, volume.length) for volume in volumes]


@pytest.mark.parametrize("cluster_bytes", CLUSTERS)
@pytest.mark.parametrize("script", [GPT_SCRIPT, DOS_SCRIPT], ids=["gpt", "dos"])
def test_partitions_are_found_and_placed(tmp_path: Path, script: str, cluster_bytes: int) -> None:
    raw = partitioned(tmp_path, script)
    orphans = lost(raw, cluster_bytes)
    disk = Disk(SIZE)
    (table,) = partitions.find(disk, orphans)
    assert ranges(table.volumes) == told_by_sfdisk(raw)
    assert all(volume.certainty == Certainty.CERTAIN for volume in table.volumes)
    place_all([table], disk, orphans)
    with raw.open("rb") as file:
        assert disk.read(0, cluster_bytes) == file.read(cluster_bytes)
    (again,) = partitions.find(disk, orphans)
    assert again.volumes == table.volumes
    (alone,) = partitions.find(disk, Orphans([], cluster_bytes))
    assert alone.volumes == table.volumes


@pytest.mark.parametrize("cluster_bytes", CLUSTERS)
def test_the_backup_gpt_serves_where_the_first_is_gone(tmp_path: Path, cluster_bytes: int) -> None:
    raw = partitioned(tmp_path, GPT_SCRIPT)
    told = told_by_sfdisk(raw)
    with raw.open("r+b") as file:
        file.write(bytes(34 * SECTOR))
    orphans = lost(raw, cluster_bytes)
    (table,) = partitions.find(Disk(SIZE), orphans)
    if cluster_bytes > 16 << 10:
        assert ranges(table.volumes) == told
    assert partitions.disk_sizes(orphans) == [SIZE]
    placements = list(table.place(Disk(SIZE), orphans))
    assert [one.guest_offset for one in placements] == [SIZE - cluster_bytes]
    assert placements[0].certainty == Certainty.CERTAIN


@pytest.mark.parametrize("script", [GPT_SCRIPT, DOS_SCRIPT], ids=["gpt", "dos"])
def test_pt1_a_table_of_a_smaller_disk_is_only_likely(tmp_path: Path, script: str) -> None:
    orphans = lost(partitioned(tmp_path, script), 64 << 10)
    disk = Disk(2 * SIZE)
    (table,) = partitions.find(disk, orphans)
    assert table.volumes
    assert all(volume.certainty == Certainty.LIKELY for volume in table.volumes)
    assert all(one.certainty == Certainty.LIKELY for one in table.place(disk, orphans))


def test_pt1_the_table_that_fills_the_disk_wins(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.mkdir()
    outer.mkdir()
    small = lost(partitioned(inner, GPT_SCRIPT.replace("300M", "200M"), SIZE // 2), 64 << 10)
    raw = partitioned(outer, GPT_SCRIPT)
    both = Orphans(small.clusters + lost(raw, 64 << 10).clusters, 64 << 10)
    (table,) = partitions.find(Disk(SIZE), both)
    assert ranges(table.volumes) == told_by_sfdisk(raw)
    assert partitions.disk_sizes(both) == [SIZE, SIZE // 2]
    assert not list(partitions.find(Disk(4 * SIZE), both))


def test_pt1_two_tables_that_fit_alike_are_none(tmp_path: Path) -> None:
    raw = partitioned(tmp_path, DOS_SCRIPT)
    orphans = lost(raw, 64 << 10)
    (table,) = partitions.find(Disk(SIZE), orphans)
    (placement, *_) = table.place(Disk(SIZE), orphans)
    twice = bytearray(orphans.read(placement.host_offset))
    twice[0] ^= 1
    assert not list(partitions.find(Disk(SIZE), Orphans([*orphans.clusters, bytes(twice)], 64 << 10)))


def test_a_chain_of_logical_partitions_that_breaks_off_is_only_likely(tmp_path: Path) -> None:
    raw = partitioned(tmp_path, DOS_SCRIPT)
    told = told_by_sfdisk(raw)
    with raw.open("r+b") as file:
        file.seek(told[-1][0] - MIB)
        file.write(bytes(SECTOR))
    (table,) = partitions.find(Disk(SIZE), lost(raw, 64 << 10))
    certain = [volume for volume in table.volumes if volume.certainty == Certainty.CERTAIN]
    assert ranges(certain) == told[:2]
    assert ranges(table.volumes) == told[:-1]


def pv_sectors(device_bytes: int, text: bytes, around: bool = False) -> dict[int, bytes]:
    """Return what LVM writes on a physical volume: a label, and a metadata area of 1 MiB less 4 KiB."""
    start, length = 4096, MIB - 4096
    areas = struct.pack("<QQQQQQQQ", MIB, 0, 0, 0, start, length, 0, 0)
    body = struct.pack("<I8s32sQ", 32, b"LVM2 001", PV_ID.encode(), device_bytes) + areas
    body = body.ljust(SECTOR - 20, b"\0")
    label = b"LABELONE" + struct.pack("<QI", 1, lvm_layout.checksum(body)) + body
    offset = length - SECTOR if around else 1536
    head = struct.pack(
        "<16sIQQQQII", b" LVM2 x[5A%r0N*>", 1, start, length, offset, len(text), lvm_layout.checksum(text), 0
    ).ljust(SECTOR - 4, b"\0")
    area = bytearray(length)
    area[:SECTOR] = struct.pack("<I", lvm_layout.checksum(head)) + head
    first = min(len(text), length - offset)
    area[offset : offset + first] = text[:first]
    area[SECTOR : SECTOR + len(text) - first] = text[first:]
    return {SECTOR: label, start: bytes(area)}


def pv_text(
    volumes: dict[str, list[tuple[int, int]]], kind: str = "striped", status: str = "VISIBLE"
) -> bytes:
    parts = []
    for name, segments in volumes.items():
        parts.append(f'{name} {{\nid = "x"\nstatus = ["READ", "{status}"]\nsegment_count = {len(segments)}\n')
        start = 0
        for number, (place, count) in enumerate(segments, 1):
            parts.append(
                f"segment{number} {{\nstart_extent = {start}\nextent_count = {count}\n"
                f'type = "{kind}"\nstripe_count = 1 # linear\nstripes = [\n"pv0", {place}\n]\n}}\n'
            )
            start += count
        parts.append("}\n")
    pv = f'pv0 {{\nid = "{PV_ID[:6]}-{PV_ID[6:]}"\npe_start = 2048\npe_count = 127\n}}\n'
    head = 'vg {\nid = "y"\nseqno = 3\nextent_size = 8192\nphysical_volumes {\n'
    return (head + pv + "}\nlogical_volumes {\n" + "".join(parts) + '}\n}\ndescription = ""\n\0').encode()


def pv_orphans(sectors: dict[int, bytes], cluster_bytes: int) -> Orphans:
    begin = bytearray(2 * MIB)
    for place, content in sectors.items():
        begin[place : place + len(content)] = content
    pieces = [bytes(begin[at : at + cluster_bytes]) for at in range(0, len(begin), cluster_bytes)]
    return Orphans([b"\xff" * cluster_bytes, *(piece for piece in pieces if any(piece))], cluster_bytes)


PV = [Volume(0, PV_BYTES, "the disk")]
LOGICAL = {"root": [(0, 5), (5, 5)], "home": [(20, 3), (10, 7)]}


@pytest.mark.parametrize("cluster_bytes", CLUSTERS)
def test_logical_volumes_are_found(cluster_bytes: int) -> None:
    orphans = pv_orphans(pv_sectors(PV_BYTES, pv_text(LOGICAL)), cluster_bytes)
    disk = Disk(PV_BYTES)
    for _ in range(2):
        (physical,) = lvm.find(PV, disk, orphans)
        segments = {
            volume.name: [(one.start, one.offset, one.length) for one in volume.segments]
            for volume in physical.logical
        }
        assert segments == {
            "vg/root": [(0, MIB, 10 * EXTENT_BYTES)],
            "vg/home": [
                (0, MIB + 20 * EXTENT_BYTES, 3 * EXTENT_BYTES),
                (3 * EXTENT_BYTES, MIB + 10 * EXTENT_BYTES, 7 * EXTENT_BYTES),
            ],
        }
        assert {volume.certainty for volume in physical.logical} == {Certainty.CERTAIN}
        placements = place_all([physical], disk, orphans)
        for one in placements.values():
            assert one.host_offset - cluster_bytes == one.guest_offset


def test_a_text_that_goes_round_is_read_from_the_disk() -> None:
    orphans = pv_orphans(pv_sectors(PV_BYTES, pv_text(LOGICAL), around=True), 2 * MIB)
    disk = Disk(PV_BYTES)
    (physical,) = lvm.find(PV, disk, orphans)
    assert not physical.logical
    place_all([physical], disk, orphans)
    (physical,) = lvm.find(PV, disk, orphans)
    assert len(physical.logical) == 2


def test_lv1_a_label_of_another_length_or_a_text_that_was_changed_is_not_taken() -> None:
    other = pv_orphans(pv_sectors(PV_BYTES - MIB, pv_text(LOGICAL)), 64 << 10)
    assert not list(lvm.find(PV, Disk(PV_BYTES), other))
    sectors = pv_sectors(PV_BYTES, pv_text(LOGICAL))
    sectors[4096] = sectors[4096].replace(b"start_extent = 5", b"start_extent = 6")
    (physical,) = lvm.find(PV, Disk(PV_BYTES), pv_orphans(sectors, 64 << 10))
    assert not physical.logical


@pytest.mark.parametrize(
    "text",
    [
        pv_text(LOGICAL, kind="thin"),
        pv_text(LOGICAL, status="HIDDEN"),
        pv_text({"far": [(120, 100)]}),
        pv_text({"root": LOGICAL["root"]}).replace(b"start_extent = 5", b"start_extent = 4"),
        b"vg {\n" * 40,
        b'vg { id = [1, "2" }',
        b"vg { x = }",
        b"\xff\xfe{}",
    ],
)  # fmt: skip
def test_volumes_that_are_not_linear_are_left_out(text: bytes) -> None:
    orphans = pv_orphans(pv_sectors(PV_BYTES, text), 2 * MIB)
    (physical,) = lvm.find(PV, Disk(PV_BYTES), orphans)
    assert not physical.logical


def luks2(offset: int, magic: bytes, size: int = 16384, sequence: int = 3, payload: int = 16 * MIB) -> bytes:
    area = b'{"segments":{"0":{"type":"crypt","offset":"%d","size":"dynamic"}}}' % payload
    head = struct.pack(
        ">6sHQQ48s32s64s40s48sQ",
        magic, 2, size, sequence, b"", b"sha256", b"", b"12345678-uuid", b"", offset,
    ).ljust(4096, b"\0")  # fmt: skip
    whole = (head + area).ljust(size, b"\0")
    digest = hashlib.sha256(whole).digest()
    return whole[:448] + digest + whole[448 + len(digest) :]


def test_luks2_headers_place_each_other() -> None:
    first, second = luks2(0, luks.MAGIC), luks2(16384, luks.SECOND_MAGIC)
    cluster_bytes = 16384
    disk = Disk(64 * MIB)
    volumes = [Volume(MIB, 63 * MIB, "partition 1")]
    orphans = Orphans([b"\xaa" * cluster_bytes, second, first], cluster_bytes)
    (structure,) = luks.find(volumes, disk, orphans)
    assert structure.name == "LUKS2 in partition 1"
    assert {(one.guest_offset, one.certainty) for one in structure.place(disk, orphans)} == {
        (MIB, Certainty.LIKELY), (MIB + 16384, Certainty.LIKELY)
    }  # fmt: skip
    disk.put(MIB, first)
    (structure,) = luks.find(volumes, disk, orphans)
    assert [(one.guest_offset, one.certainty) for one in structure.place(disk, orphans)] == [
        (MIB + 16384, Certainty.CERTAIN)
    ]
    assert (17 * MIB, 47 * MIB) in [
        (one.guest_offset, one.length) for one in structure.pieces(disk) if one.is_data
    ]
    changed = first[:5000] + b"x" + first[5001:]
    assert luks.unpack(first) and not luks.unpack(changed)


def test_luks1_is_found() -> None:
    header = struct.pack(
        ">6sH32s32s32sII20s32sI40s", luks.MAGIC, 1, b"aes", b"xts-plain64", b"sha256", 4096, 64,
        b"", b"", 1, b"uuid",
    ).ljust(4096, b"\0")  # fmt: skip
    orphans = Orphans([b"\xaa" * 4096, header], 4096)
    volumes = [Volume(0, 10 * MIB, "the disk")]
    disk = Disk(10 * MIB)
    (structure,) = luks.find(volumes, disk, orphans)
    (placement,) = structure.place(disk, orphans)
    assert (placement.guest_offset, placement.certainty) == (0, Certainty.LIKELY)
    (payload,) = [piece for piece in structure.pieces(disk) if piece.is_data]
    assert (payload.guest_offset, payload.length) == (2 * MIB, 8 * MIB)


@pytest.mark.parametrize("cluster_bytes", CLUSTERS)
def test_swap_is_found_by_its_length(tmp_path: Path, cluster_bytes: int) -> None:
    raw = tmp_path / "swap.raw"
    with raw.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkswap", raw], check=True, capture_output=True)
    orphans = lost(raw, cluster_bytes)
    disk = Disk(128 * MIB)
    volumes = [Volume(0, 60 * MIB, "partition 1"), Volume(60 * MIB, 64 * MIB, "partition 2")]
    (structure,) = swap.find(volumes, disk, orphans)
    (placement,) = structure.place(disk, orphans)
    assert (placement.guest_offset, placement.certainty) == (60 * MIB, Certainty.LIKELY)
    twice = Orphans([*orphans.clusters, orphans.clusters[0][:-1] + b"x"], cluster_bytes)
    assert cluster_bytes == 4096 or not list(swap.find(volumes, disk, twice))


def test_a_file_system_in_two_segments_is_found(tmp_path: Path) -> None:
    """Its volume is the last and the first half of a disk, in this order."""
    raw = tmp_path / "disk.raw"
    size = 128 * MIB
    with raw.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.btrfs", "-q", raw], check=True)
    clusters = used_clusters(raw, 64 << 10)
    begin = {
        place: content
        for place, content in pv_sectors(PV_BYTES, pv_text({"root": [(16, 16), (0, 16)]})).items()
    }
    physical = pv_orphans(begin, 64 << 10)
    orphans = Orphans([*clusters.values(), *physical.clusters], 64 << 10)
    disk = Disk(PV_BYTES)
    structures = list(find(disk, orphans))
    assert [structure.name for structure in structures] == ["LVM in the disk", "btrfs in volume vg/root"]
    assert isinstance(structures[1], Mapped)
    place_all(structures, disk, orphans)
    half = 16 * EXTENT_BYTES
    content = raw.read_bytes()
    for place in clusters:
        guest = MIB + (place + half if place < half else place - half)
        assert disk.read(guest, 64 << 10) in (None, content[place : place + (64 << 10)])
    assert disk.read(MIB + half + 65536, 4096) == content[65536 : 65536 + 4096]
    pieces = list(structures[1].pieces(disk))
    assert pieces and all(MIB <= piece.guest_offset < MIB + 2 * half for piece in pieces)
    assert sum(length for _, length in structures[1].free(disk)) > size // 2


def test_a_mapped_disk_reads_across_segments() -> None:
    disk = Disk(64 << 10)
    disk.put(0, bytes(range(256)) * 256)
    segments = [lvm.Segment(0, 40_960, 8192), lvm.Segment(8192, 4096, 4096)]
    view = MappedDisk(disk, segments)
    assert view.size == 12_288
    assert list(view.ranges(4096, 8192)) == [(45_056, 4096), (4096, 4096)]
    assert view.read(8100, 200) == (bytes(range(256)) * 256)[:12_288][8100:8300]
    assert view.read(12_000, 1000) is None
    assert view.is_aligned(4096) and not view.is_aligned(8192)
    assert not MappedDisk(disk, [lvm.Segment(0, 0, 4096), lvm.Segment(4096, 12_288, 8192)]).is_aligned(8192)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_signs_say_it_ends(data: st.DataObject) -> None:
    """Structures with right checksums and hostile numbers, and noise with signs in it."""
    clusters = []
    for _ in range(data.draw(st.integers(1, 5))):
        sector = bytearray(random.Random(data.draw(st.integers(0, 99))).randbytes(16384))
        kind = data.draw(st.sampled_from(("gpt", "mbr", "lvm", "luks", "swap")))
        numbers = [
            data.draw(st.sampled_from((0, 1, 2, 34, 255, 1 << 31, (1 << 52) - 1, (1 << 64) - 1)))
            for _ in range(8)
        ]
        if kind == "gpt":
            head = struct.pack(
                "<8sIIIIQQQQ16sQIII", b"EFI PART", 1 << 16, 92, 0, 0, *numbers[:4], b"g" * 16,
                numbers[4], numbers[5] & 0xFFFF_FFFF, numbers[6] & 0xFFFF_FFFF, 5,
            )  # fmt: skip
            sector[512 : 512 + 92] = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
        elif kind == "mbr":
            for entry in range(4):
                struct.pack_into(
                    "<B3xB3xII",
                    sector,
                    446 + 16 * entry,
                    0,
                    5,
                    *(n & 0xFFFF_FFFF for n in numbers[entry : entry + 2]),
                )
            sector[510:512] = b"\x55\xaa"
        elif kind == "lvm":
            for place, content in pv_sectors(numbers[0], pv_text({"a": [(numbers[1], numbers[2])]})).items():
                sector[place : place + 8192] = content[:8192]
        elif kind == "luks":
            sector[:] = luks2(numbers[0], luks.MAGIC, payload=numbers[1])[:16384]
        else:
            struct.pack_into("<III", sector, 1024, 1, numbers[0] & 0xFFFF_FFFF, numbers[1] & 0xFFFF_FFFF)
            sector[4086:4096] = b"SWAPSPACE2"
        clusters.append(bytes(sector[:16384]))
    orphans = Orphans(clusters, 16384)
    disk = Disk(SIZE)
    structures = list(find(disk, orphans))
    place_all(structures, disk, orphans)
    for structure in [*structures, *find(disk, orphans)]:
        assert sum(1 for _ in structure.pieces(disk)) < 1000
    partitions.disk_sizes(orphans)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1 << 32), cut=st.integers(0, 1024))
def test_noise_is_no_structure(seed: int, cut: int) -> None:
    noise = random.Random(seed).randbytes(1024)[:cut]
    assert GptHeader.unpack(noise) is None
    unpack_boot_record(noise)
    assert lvm_layout.Label.unpack(noise) is None
    assert lvm_layout.MetadataArea.unpack(noise) is None
    assert luks.unpack(noise) is None
    assert swap.length_bytes(noise) == 0


def test_volumes_that_are_only_likely_hold_nothing_certain(tmp_path: Path) -> None:
    raw = partitioned(tmp_path, "label: dos\nsize=128M\n")
    system = tmp_path / "system.raw"
    with system.open("wb") as file:
        file.truncate(128 * MIB)
    subprocess.run(["mkfs.btrfs", "-q", system], check=True)
    clusters = [*used_clusters(system, 64 << 10).values(), *lost(raw, 64 << 10).clusters]
    orphans = Orphans(clusters, 64 << 10)
    disk = Disk(SIZE)
    structures = list(find(disk, orphans))
    assert [structure.name for structure in structures][:2] == ["MBR in the disk", "btrfs in partition 1"]
    placements = place_all(structures, disk, orphans)
    assert len(placements) > 3
    assert all(one.certainty < Certainty.CERTAIN for one in placements.values())
    assert replace(Volume(0, 0, ""), certainty=Certainty.GUESS).certainty == Certainty.GUESS
