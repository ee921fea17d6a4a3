"""Does an ext4 tell where its blocks belong, and never wrongly for certain?"""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jqcow import _native
from jqcow.salvage.evidence import Certainty, Placement, Volume
from jqcow.salvage.guest import crc_inverse, ext4, ext4_journal
from jqcow.salvage.guest.ext4_folders import half_md4
from jqcow.salvage.guest.ext4_log_places import LogPlaces, offsets
from jqcow.salvage.guest.ext4_ondisk import (
    REGULAR,
    ExtentNode,
    GroupDescriptor,
    Inode,
    Superblock,
    raw,
)

SIZE = 24 << 20
CLUSTER = 4096
VARIANTS = {
    "default": ("-b", "4096"),
    "small blocks": ("-b", "1024"),
    "no flexible groups": ("-b", "1024", "-O", "^flex_bg"),
    "no journal": ("-b", "1024", "-O", "^has_journal"),
    "meta groups": ("-b", "1024", "-O", "meta_bg,^resize_inode"),
    "two backups": ("-b", "1024", "-O", "sparse_super2,^resize_inode"),
    "seed of its own": ("-b", "1024", "-O", "metadata_csum_seed"),
}
UNSUMMED = {
    "ext4 without checksums": ("-b", "1024", "-O", "^metadata_csum"),
    "ext3": ("-b", "1024", "-t", "ext3"),
    "ext2": ("-b", "4096", "-t", "ext2"),
}


@dataclass
class Scattered:
    """Orphans by host offset, and the part of the guest's disk that is placed."""

    cluster_bytes: int
    size: int
    content: dict[int, bytes]
    placed: dict[int, int] = field(default_factory=dict)
    reads_zeros: bool = False

    def __len__(self) -> int:
        return len(self.content)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        yield from sorted(self.content.items())


class Orphans(Scattered):
    def read(self, host_offset: int) -> bytes:
        return self.content[host_offset]


class Disk(Scattered):
    def read(self, offset: int, length: int) -> bytes | None:
        if offset < 0 or offset + length > self.size:
            return None
        parts = []
        at = offset
        while at < offset + length:
            start = at - at % self.cluster_bytes
            end = min(offset + length, start + self.cluster_bytes)
            if start in self.placed:
                parts.append(self.content[self.placed[start]][at - start : end - start])
            elif self.reads_zeros:
                parts.append(bytes(end - at))
            else:
                return None
            at = end
        return b"".join(parts)


def tool(*words: object) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


def make(folder: Path, *options: str, start: int = 0) -> bytes:
    """Return a disk with an ext4 of many files, directories and a file of many extents, made without root."""
    source = folder / "source"
    chance = random.Random(7)
    for number in range(40):
        name = source / f"d{number % 5}" / f"file{number}"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(chance.randbytes(chance.randrange(60_000)))
    crowd = source / "crowd"
    crowd.mkdir()
    for number in range(400):
        (crowd / f"one of a large crowd of files {number}").touch()
    image = folder / "image"
    image.write_bytes(b"")
    with image.open("r+b") as file:
        file.truncate(SIZE)
    kind = () if "-t" in options else ("-t", "ext4")
    tool("mke2fs", "-q", "-F", *kind, *options, "-d", source, image)
    # Each second block stays a hole, so that the extents need a node of their own.
    holed = folder / "holed"
    with holed.open("wb") as file:
        for number in range(20):
            file.seek(number * 8192)
            file.write(b"x" * 4096)
    tool("debugfs", "-w", "-R", f"write {holed} holed", image)
    # Only the kernel and the check give large directories an index. 1: something was changed.
    checked = subprocess.run(["e2fsck", "-f", "-y", "-D", image], check=False, capture_output=True)
    assert checked.returncode in (0, 1)
    return bytes(start) + image.read_bytes()


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def disk_bytes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("ext4"), *VARIANTS[request.param])


@pytest.fixture(scope="module")
def default_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("ext4"), *VARIANTS["default"])


def scatter(data: bytes, seed: int, cluster_bytes: int = CLUSTER) -> tuple[Orphans, Disk, dict[int, int]]:
    """Return the disk in pieces in any order, none placed, and which belongs where."""
    offsets = [
        at for at in range(0, len(data), cluster_bytes) if not _native.is_zero(data[at : at + cluster_bytes])
    ]
    hosts = [index * cluster_bytes for index in range(len(offsets))]
    random.Random(seed).shuffle(hosts)
    truth = dict(zip(offsets, hosts, strict=True))
    content = {host: data[at : at + cluster_bytes].ljust(cluster_bytes, b"\0") for at, host in truth.items()}
    return Orphans(cluster_bytes, len(data), content), Disk(cluster_bytes, len(data), content), truth


def solve(found: ext4.Ext4, disk: Disk, orphans: Orphans) -> list[Placement]:
    """Take over what is certain until nothing new comes; return all that was said."""
    said: dict[tuple[int, int], Placement] = {}
    for _ in range(10):
        before = len(disk.placed)
        for placement in found.place(disk, orphans):
            said[placement.guest_offset, placement.host_offset] = placement
            if placement.certainty is Certainty.CERTAIN:
                disk.placed.setdefault(placement.guest_offset, placement.host_offset)
        if len(disk.placed) == before:
            return list(said.values())
    raise AssertionError("there is always something new")


def whole(data: bytes, cluster_bytes: int = CLUSTER) -> tuple[Orphans, Disk]:
    _, disk, truth = scatter(data, 1, cluster_bytes)
    disk.placed, disk.reads_zeros = truth, True
    return Orphans(cluster_bytes, len(data), {}), disk


def volumes(data: bytes, start: int = 0) -> list[Volume]:
    return [Volume(start, len(data) - start, "the test")]


@pytest.mark.parametrize("cluster_bytes", [CLUSTER, 65_536])
def test_all_metadata_that_tell_are_placed_and_none_wrongly(disk_bytes: bytes, cluster_bytes: int) -> None:
    orphans, disk, truth = scatter(disk_bytes, 5, cluster_bytes)
    (found,) = ext4.find(volumes(disk_bytes), disk, orphans)
    said = solve(found, disk, orphans)
    for placement in said:
        right = disk_bytes[placement.guest_offset : placement.guest_offset + placement.length]
        assert orphans.read(placement.host_offset) == right.ljust(cluster_bytes, b"\0"), placement
    _, all_placed = whole(disk_bytes, cluster_bytes)
    inside = {
        at
        for piece in found.pieces(all_placed)
        if not piece.is_data
        for at in range(
            piece.guest_offset // cluster_bytes * cluster_bytes,
            piece.guest_offset + piece.length,
            cluster_bytes,
        )
    } & truth.keys()
    assert len(inside & disk.placed.keys()) >= 0.9 * len(inside) - 2


@pytest.mark.parametrize("options", [*VARIANTS.values(), *UNSUMMED.values()], ids=[*VARIANTS, *UNSUMMED])
def test_pieces_and_free_are_what_the_tools_say(options: tuple[str, ...], tmp_path: Path) -> None:
    data = make(tmp_path, *options)
    orphans, disk = whole(data)
    (found,) = ext4.find(volumes(data), disk, orphans)
    block = int(options[1])
    free = {at for offset, length in found.free(disk) for at in range(offset, offset + length, block)}
    used = [
        at
        for piece in found.pieces(disk)
        for at in range(piece.guest_offset, piece.guest_offset + piece.length, block)
    ]
    assert len(used) == len(set(used))
    first = block if block == 1024 else 0
    assert free == set(range(first, len(data), block)) - set(used)
    assert free == free_by_tool(tmp_path / "image", block)
    for name in ("holed", "d1/file1", "d3/file38"):
        number = int(
            re.search(r"Inode: (\d+)", tool("debugfs", "-R", f"stat /{name}", tmp_path / "image"))[1]
        )
        told = re.findall(r"\d+", tool("debugfs", "-R", f"blocks /{name}", tmp_path / "image"))
        mine = {
            at // block
            for piece in found.pieces(disk)
            if piece.written[1] == number
            for at in range(piece.guest_offset, piece.guest_offset + piece.length, block)
        }
        assert mine == {int(word) for word in told}


def free_by_tool(image: Path, block: int) -> set[int]:
    found: set[int] = set()
    for line in re.findall(r"^  Free blocks: (.+)$", tool("dumpe2fs", image), re.MULTILINE):
        for part in line.split(", "):
            start, _, end = part.partition("-")
            found.update(number * block for number in range(int(start), int(end or start) + 1))
    return found


def test_valid_bytes_end_with_the_file(default_bytes: bytes) -> None:
    orphans, disk = whole(default_bytes)
    (found,) = ext4.find(volumes(default_bytes), disk, orphans)
    by_file: dict[int, int] = {}
    for piece in found.pieces(disk):
        if piece.is_data:
            by_file[piece.written[1]] = by_file.get(piece.written[1], 0) + piece.valid_bytes
    chance = random.Random(7)
    lengths = []
    for _ in range(40):
        length = chance.randrange(60_000)
        chance.randbytes(length)
        lengths.append(length)
    assert sorted(by_file.values()) == sorted([*(length for length in lengths if length), 20 * 4096])


@pytest.mark.parametrize(
    ("start", "cluster_bytes"), [(1 << 20, 65_536), (1 << 20, 2 << 20), (63 * 512, 65_536)]
)
def test_a_partition_may_start_anywhere(tmp_path: Path, start: int, cluster_bytes: int) -> None:
    data = make(tmp_path, "-b", "1024", start=start)
    orphans, disk, truth = scatter(data, 2, cluster_bytes)
    known = [Volume(0, len(data), "the disk"), Volume(start, len(data) - start, "partition 1")]
    (found,) = ext4.find(known, disk, orphans)
    assert "partition 1" in found.name
    said = solve(found, disk, orphans)
    assert any(placement.certainty is Certainty.CERTAIN for placement in said)
    assert all(truth[placement.guest_offset] == placement.host_offset for placement in said)


def test_an_unknown_start_makes_nothing_certain(tmp_path: Path) -> None:
    data = make(tmp_path, "-b", "1024", start=1 << 20)
    orphans, disk, _ = scatter(data, 2, 2 << 20)
    (found,) = ext4.find([], disk, orphans)
    assert all(placement.certainty < Certainty.CERTAIN for placement in solve(found, disk, orphans))


@pytest.mark.parametrize("options", UNSUMMED.values(), ids=UNSUMMED)
def test_without_checksums_nothing_is_certain(options: tuple[str, ...], tmp_path: Path) -> None:
    data = make(tmp_path, *options)
    orphans, disk, _ = scatter(data, 3)
    for found in ext4.find(volumes(data), disk, orphans):
        assert all(placement.certainty < Certainty.CERTAIN for placement in found.place(disk, orphans))


def test_a_copy_in_the_journal_does_not_speak_for_its_home(default_bytes: bytes) -> None:
    """EX1: a block of inodes, once more as an old copy that a descriptor names."""
    superblock = Superblock.unpack(default_bytes[1024:2048])
    assert superblock
    table = GroupDescriptor.unpack(superblock, 0, default_bytes[4096 : 4096 + superblock.descriptor_bytes])
    assert table
    home = table.inode_table + 2
    block = default_bytes[home * 4096 :][:4096]
    old = older(superblock, block, 2 * superblock.inodes_per_block + 1)
    orphans, disk, truth = scatter(default_bytes, 4)
    # The tools make a journal without checksums; the kernel turns them on.
    (journal,) = (host for host, content in orphans if content[:8] == b"\xc0\x3b\x39\x98\0\0\0\4")
    content = orphans.content[journal]
    orphans.content[journal] = disk.content[journal] = content[:0x28] + (0x12).to_bytes(4) + content[0x2C:]
    for content in (descriptor(superblock, [(home, old)], 1), old):
        host = len(orphans.content) * CLUSTER
        orphans.content[host] = disk.content[host] = content
    (found,) = ext4.find(volumes(default_bytes), disk, orphans)
    solve(found, disk, orphans)
    assert disk.placed[home * 4096] == truth[home * 4096]
    lost = truth[home * 4096]
    del orphans.content[lost]
    disk.placed.clear()
    (found,) = ext4.find(volumes(default_bytes), disk, orphans)
    solve(found, disk, orphans)
    assert home * 4096 not in disk.placed


def older(superblock: Superblock, block: bytes, number: int, size: int | None = None) -> bytes:
    """Return a block of inodes as it was before the first of them changed, with its checksum."""
    inode = bytearray(block[: superblock.inode_bytes])
    inode[0x0C:0x10] = (int.from_bytes(inode[0x0C:0x10], "little") - 100).to_bytes(4, "little")
    if size is not None:
        inode[0x04:0x08] = size.to_bytes(4, "little")
    inode[0x7C:0x7E] = inode[0x82:0x84] = b"\0\0"
    crc = _native.crc32c(number.to_bytes(4, "little"), raw(superblock.seed))
    crc = raw(_native.crc32c(bytes(inode), _native.crc32c(bytes(inode[0x64:0x68]), crc)))
    inode[0x7C:0x7E], inode[0x82:0x84] = crc.to_bytes(4, "little")[:2], crc.to_bytes(4, "little")[2:]
    return bytes(inode) + block[superblock.inode_bytes :]


def test_the_journal_s_copies_tell_how_files_grew(default_bytes: bytes) -> None:
    """Copies in the order of transactions, not in that of the journal's blocks: it begins anew at its end."""
    superblock = Superblock.unpack(default_bytes[1024:2048])
    node = ExtentNode.unpack(superblock.journal_map) if superblock else None
    assert superblock and node
    journal = [block for one in node.extents for block in range(one.start, one.start + one.blocks)]
    table = GroupDescriptor.unpack(superblock, 0, default_bytes[4096 : 4096 + superblock.descriptor_bytes])
    assert table
    for index in range(40):
        block = default_bytes[(table.inode_table + index) * 4096 :][:4096]
        inode = Inode.unpack(block[: superblock.inode_bytes])
        if inode.kind == REGULAR and inode.size > 3 * 4096 and inode.is_used:
            break
    home, number = table.inode_table + index, index * superblock.inodes_per_block + 1
    data, at = bytearray(default_bytes), journal[0] * 4096 + 0x28
    data[at : at + 4] = (0x12).to_bytes(4)
    first, second = (older(superblock, block, number, size) for size in (4096, 8192))
    for place, content in (
        (1, second),
        (2, descriptor(superblock, [(home, first)], 4)),
        (3, first),
        (-1, descriptor(superblock, [(home, second)], 5)),
    ):
        data[journal[place] * 4096 : journal[place] * 4096 + 4096] = content
    orphans, disk, truth = scatter(bytes(data), 3)
    (found,) = ext4.find(volumes(bytes(data)), disk, orphans)
    disk.placed, disk.reads_zeros = truth, True
    list(found.place(disk, orphans))
    pieces = [one for one in found.pieces(disk) if one.is_data and one.written[1] == number]
    assert all(one.is_timed for one in pieces)
    assert [one.written[2] for one in pieces][:3] == [0, 4096, 8192]
    assert pieces[0].written[0] < pieces[1].written[0] < pieces[2].written[0]


def descriptor(superblock: Superblock, copies: list[tuple[int, bytes]], sequence: int) -> bytes:
    """Return a descriptor block of the journal."""
    seed = _native.crc32c(superblock.uuid)
    block = b"\xc0\x3b\x39\x98" + (1).to_bytes(4) + sequence.to_bytes(4)
    for index, (home, content) in enumerate(copies):
        crc = raw(_native.crc32c(content, _native.crc32c(sequence.to_bytes(4), seed)))
        flags = 0x2 | (0x8 if index == len(copies) - 1 else 0)
        block += home.to_bytes(4) + flags.to_bytes(4) + bytes(4) + crc.to_bytes(4)
    block = block.ljust(4092, b"\0")
    return block + raw(_native.crc32c(block + bytes(4), seed)).to_bytes(4)


def test_orphans_that_name_two_places_have_none(default_bytes: bytes) -> None:
    """EX2: the first cluster, with a block of inodes in the midst of it."""
    superblock = Superblock.unpack(default_bytes[1024:2048])
    assert superblock
    table = GroupDescriptor.unpack(superblock, 0, default_bytes[4096 : 4096 + superblock.descriptor_bytes])
    assert table
    orphans, disk, truth = scatter(default_bytes, 6, 65_536)
    first = truth[0]
    inodes = default_bytes[(table.inode_table + 2) * 4096 :][:4096]
    mixed = default_bytes[:0x8000] + inodes + default_bytes[0x9000:0x10000]
    orphans.content[first] = disk.content[first] = mixed
    (found,) = ext4.find(volumes(default_bytes), disk, orphans)
    solve(found, disk, orphans)
    assert disk.placed
    assert first not in disk.placed.values()


@given(st.binary(min_size=0, max_size=300), st.integers(0, 2**32 - 1))
def test_a_checksum_tells_what_it_was_begun_with(data: bytes, seed: int) -> None:
    after = raw(_native.crc32c(data, raw(seed)))
    if data:
        assert crc_inverse.backward(len(data))(after ^ crc_inverse.alone(data)) == seed
        assert crc_inverse.forward(len(data))(seed) ^ crc_inverse.alone(data) == after


@pytest.mark.parametrize("name", ["a", "lost+found", "a name that has more than thirty-two bytes"])
def test_names_have_the_hash_that_the_tools_give(name: str, default_bytes: bytes, tmp_path: Path) -> None:
    superblock = Superblock.unpack(default_bytes[1024:2048])
    assert superblock
    seed = default_bytes[1024 + 0xEC :][:16].hex()
    uuid = "-".join((seed[:8], seed[8:12], seed[12:16], seed[16:20], seed[20:]))
    image = tmp_path / "image"
    image.write_bytes(default_bytes)
    told = tool("debugfs", "-R", f'dx_hash -h half_md4 -s {uuid} "{name}"', image)
    assert half_md4(name.encode(), superblock) in {int(word, 16) for word in re.findall(r"0x[0-9a-f]+", told)}


def test_blocks_of_the_journal_are_counted_from_where_it_starts() -> None:
    copies = [ext4_journal.Copy(500, 7, 1), ext4_journal.Copy(501, 7, 2)]
    log = LogPlaces()
    log.add(ext4_journal.REVOKE, 7, (0, 0), [])
    log.add(ext4_journal.DESCRIPTOR, 7, (4096, 0), copies)
    log.add(ext4_journal.COMMIT, 7, (8192, 0), [])
    log.add(ext4_journal.DESCRIPTOR, 8, (12288, 0), copies[:1])
    log.add(ext4_journal.COMMIT, 8, (16384, 0), [])
    log.add(ext4_journal.DESCRIPTOR, 10, (20480, 0), copies)
    journal = ext4_journal.JournalSuperblock(10, 1, 8, 4, 0x12, bytes(16), 0)
    wrapped = [((0, 0), 8), ((4096, 0), 9), (copies[0], 1), (copies[1], 2), ((8192, 0), 3)]
    forth = [((12288, 0), 4), (copies[0], 5), ((16384, 0), 6)]
    assert [(what, number) for number, what in log.blocks(journal)] == wrapped + forth
    place = {number: number * 4096 for number in range(10)}
    found = offsets(log.blocks(journal), {(501, 2): [(65_536, 0)]}, place, 4096)
    assert found[65_536] == 2 * 4096
    assert found[16_384] == 6 * 4096


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_hostile_bytes_end_in_an_answer(default_bytes: bytes, data: st.DataObject) -> None:
    """Structures with a few bytes changed."""
    changed = bytearray(default_bytes)
    for _ in range(data.draw(st.integers(1, 8))):
        block = data.draw(st.sampled_from([0, 1, 2, 66, 67, 68, 69, 70, 71, 72, 73, 600]))
        at = block * 4096 + data.draw(st.integers(0, 4095))
        changed[at] = data.draw(st.integers(0, 255))
    # What a checksum covers gets through only with a right one.
    changed[1024 + 0x3FC : 2048] = raw(_native.crc32c(bytes(changed[1024 : 1024 + 0x3FC]))).to_bytes(
        4, "little"
    )
    hostile = bytes(changed)
    orphans, disk, _ = scatter(hostile, 1)
    for found in ext4.find(volumes(hostile), disk, orphans):
        list(found.place(disk, orphans))
    _, disk = whole(hostile)
    for found in ext4.find(volumes(hostile), disk, orphans):
        for piece in found.pieces(disk):
            assert 0 <= piece.valid_bytes <= piece.length
        list(found.free(disk))


@given(st.binary(min_size=1024, max_size=1024))
def test_any_bytes_may_stand_for_a_structure(data: bytes) -> None:
    Superblock.unpack(b"".join((data[:0x38], b"\x53\xef", data[0x3A:])))
    Inode.unpack(data[:256])
    ExtentNode.unpack(b"\x0a\xf3" + data[2:])
    journal = ext4_journal.JournalSuperblock.unpack(data) or ext4_journal.JournalSuperblock(
        9, 1, 1, 0, 0, data[:16], 0
    )
    assert len(list(ext4_journal.copies(data, journal))) <= 128
