"""btrfs among the orphans: which of its nodes say where they belong, and what it knows of file data."""

from __future__ import annotations

import random
import struct
import subprocess
from functools import cache, cached_property
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jqcow
from jqcow import _native
from jqcow.offline.salvage import salvage
from jqcow.ondisk.header import HeaderArea
from jqcow.salvage.evidence import Certainty, Placement, Volume
from jqcow.salvage.guest import btrfs
from jqcow.salvage.guest.btrfs_chunks import ChunkMap, gaps, system_chunks
from jqcow.salvage.guest.btrfs_layout import Chunk, Node, Superblock
from tests.support.orphans import Disk, Orphans, place_all, runs, used_clusters

SIZE = 128 << 20
CLUSTER_BYTES = 64 << 10
NODE_BYTES = 16 << 10
GENERATION_OFFSET = 80
FIRST_SUPERBLOCK = 64 << 10


def crc_renewed(block: bytes) -> bytes:
    return struct.pack("<I", _native.crc32c(block[32:])) + block[4:]


def with_generation(node: bytes, generation: int) -> bytes:
    return crc_renewed(
        node[:GENERATION_OFFSET] + struct.pack("<Q", generation) + node[GENERATION_OFFSET + 8 :]
    )


class Lab:
    """A file system that mkfs made, and its clusters."""

    def __init__(self, raw: Path, files: dict[str, bytes]) -> None:
        self.raw = raw
        self.files = files
        self.content = raw.read_bytes()
        superblock = Superblock.unpack(self.content[FIRST_SUPERBLOCK : FIRST_SUPERBLOCK + 4096])
        assert superblock is not None
        self.superblock = superblock

    @cache  # noqa: B019 - the file system lives as long as its module's tests
    def clusters(self, cluster_bytes: int) -> dict[int, bytes]:
        return used_clusters(self.raw, cluster_bytes, NODE_BYTES)

    @cached_property
    def nodes(self) -> dict[int, Node]:
        """All nodes that trees lead to, by their physical offset."""
        disk = Disk(SIZE)
        disk.put(0, self.content)
        (structure,) = found(disk, Orphans([], NODE_BYTES))
        places = [piece.guest_offset for piece in structure.pieces(disk) if piece.length == NODE_BYTES]
        read = {
            place: Node.unpack(self.content[place : place + NODE_BYTES], self.superblock.node_uuid)
            for place in places
        }
        return {place: node for place, node in read.items() if node is not None}


def lab_of(folder: Path, *options: str) -> Lab:
    chance = random.Random(5)
    root = folder / "root"
    root.mkdir()
    files = {}
    for number in range(30):
        name = f"file{number}"
        files[name] = chance.randbytes(chance.choice((100, 5_000, 70_000, 150_000)))
        (root / name).write_bytes(files[name])
    raw = folder / "disk.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.btrfs", "-q", *options, "--rootdir", root, raw], check=True)
    return Lab(raw, files)


@pytest.fixture(scope="module")
def dup(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return lab_of(tmp_path_factory.mktemp("dup"), "-m", "dup")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return lab_of(tmp_path_factory.mktemp("single"), "-m", "single")


def shuffled(lab: Lab, cluster_bytes: int, seed: int = 1) -> tuple[list[int], Orphans]:
    """Return guest offsets and orphans in an order of chance; a node's clusters stay together."""
    clusters = lab.clusters(cluster_bytes)
    groups = runs(clusters, max(cluster_bytes, NODE_BYTES))
    random.Random(seed).shuffle(groups)
    order = [offset for group in groups for offset in group]
    return order, Orphans((clusters[offset] for offset in order), cluster_bytes)


def found(disk: Disk, orphans: Orphans, length: int = SIZE) -> list[btrfs.Btrfs]:
    volumes = [Volume(0, length, "the disk")]
    structures = list(btrfs.find(volumes, disk, orphans))
    assert all(isinstance(structure, btrfs.Btrfs) for structure in structures)
    return structures  # type: ignore[return-value]


def placed(lab: Lab, orphans: Orphans) -> tuple[btrfs.Btrfs, Disk, dict[tuple[int, int], Placement]]:
    disk = Disk(SIZE)
    (structure,) = found(disk, orphans)
    return structure, disk, place_all([structure], disk, orphans)


def wrong(lab: Lab, placements: dict[tuple[int, int], Placement], orphans: Orphans) -> list[Placement]:
    """Return certain placements of what the disk does not have there."""
    result = []
    for placement in placements.values():
        start = placement.host_offset % orphans.cluster_bytes
        content = orphans.read(placement.host_offset - start)[start : start + placement.length]
        true = lab.content[placement.guest_offset : placement.guest_offset + placement.length]
        if placement.certainty == Certainty.CERTAIN and content != true:
            result.append(placement)
    return result


@pytest.mark.parametrize("cluster_bytes", [4 << 10, 16 << 10, 64 << 10, 2 << 20])
@pytest.mark.parametrize("kind", ["dup", "single"])
def test_live_nodes_are_placed(kind: str, cluster_bytes: int, request: pytest.FixtureRequest) -> None:
    lab: Lab = request.getfixturevalue(kind)
    _, orphans = shuffled(lab, cluster_bytes)
    structure, disk, placements = placed(lab, orphans)
    assert structure.name == "btrfs in the disk"
    assert not wrong(lab, placements, orphans)
    assert disk.read(FIRST_SUPERBLOCK, 4096) == lab.content[FIRST_SUPERBLOCK : FIRST_SUPERBLOCK + 4096]
    own = [piece for piece in structure.pieces(disk) if not piece.is_data and piece.length == NODE_BYTES]
    assert len(own) > 5
    for piece in own:
        end = piece.guest_offset + piece.length
        assert disk.read(piece.guest_offset, piece.length) == lab.content[piece.guest_offset : end]


@pytest.mark.parametrize("kind", ["dup", "single"])
def test_sums_and_pieces_tell_where_files_are(kind: str, request: pytest.FixtureRequest) -> None:
    lab: Lab = request.getfixturevalue(kind)
    _, orphans = shuffled(lab, CLUSTER_BYTES)
    structure, disk, _ = placed(lab, orphans)
    sums = list(structure.sums(disk))
    assert len(sums) >= sum(len(data) for data in lab.files.values() if len(data) > 4096) // 4096
    for block in sums:
        content = lab.content[block.guest_offset : block.guest_offset + block.length]
        assert _native.crc32c(content) == block.crc32c
    by_file: dict[int, dict[int, bytes]] = {}
    for piece in structure.pieces(disk):
        if piece.is_data:
            _, number, offset = piece.written
            content = lab.content[piece.guest_offset : piece.guest_offset + piece.length]
            assert not any(content[piece.valid_bytes :])
            by_file.setdefault(number, {})[offset] = content[: piece.valid_bytes]
    files = {b"".join(parts[offset] for offset in sorted(parts)) for parts in by_file.values()}
    assert files == {data for data in lab.files.values() if len(data) > 4096}


def test_free_is_what_no_piece_has(dup: Lab) -> None:
    _, orphans = shuffled(dup, CLUSTER_BYTES)
    structure, disk, _ = placed(dup, orphans)
    free = list(structure.free(disk))
    used = [(piece.guest_offset, piece.length) for piece in structure.pieces(disk)]
    assert sum(length for _, length in free) > SIZE // 2
    assert not [
        (place, start)
        for place, length in used
        for start, count in free
        if place < start + count and start < place + length
    ]


def test_nodes_on_the_disk_lead_to_orphans(single: Lab) -> None:
    """The superblock and the half of all nodes may be placed already."""
    order, orphans = shuffled(single, NODE_BYTES)
    disk = Disk(SIZE)
    kept = []
    for place, content in zip(order, orphans.clusters, strict=True):
        if place % (2 * NODE_BYTES) or place <= FIRST_SUPERBLOCK:
            disk.put(place, content)
        else:
            kept.append(content)
    left = Orphans(kept, NODE_BYTES)
    (structure,) = found(disk, left)
    placements = place_all([structure], disk, left)
    assert placements and not wrong(single, placements, left)
    sums = list(structure.sums(disk))
    assert sums and all(
        _native.crc32c(single.content[block.guest_offset : block.guest_offset + 4096]) == block.crc32c
        for block in sums
    )


def live_leaf(lab: Lab, owner: int = 5) -> tuple[int, Node]:
    return next((place, node) for place, node in lab.nodes.items() if node.owner == owner)


@pytest.mark.parametrize("age", [-1, 1])
def test_bt1_what_no_tree_leads_to_is_not_certain(single: Lab, age: int) -> None:
    """The place has a node of an older transaction, or one of a transaction that did not end."""
    place, node = live_leaf(single)
    order, orphans = shuffled(single, NODE_BYTES)
    orphans.clusters[order.index(place)] = with_generation(node.data, node.generation + age)
    _, disk, placements = placed(single, orphans)
    (claim,) = [one for one in placements.values() if one.guest_offset == place]
    assert claim.certainty == Certainty.LIKELY
    assert disk.read(place, NODE_BYTES) is None
    assert not wrong(single, placements, orphans)


def test_bt1_what_may_have_been_discarded_is_not_certain(single: Lab) -> None:
    """No live node is to be in this place: an orphan with a node of it may have been freed since."""
    place, node = live_leaf(single)
    order, orphans = shuffled(single, NODE_BYTES)
    hole = next(at for at in range(place, SIZE, NODE_BYTES) if at not in order)
    address = struct.pack("<Q", node.bytenr + hole - place)
    orphans.clusters.append(with_generation(node.data[:48] + address + node.data[56:], node.generation + 1))
    _, _, placements = placed(single, orphans)
    claim = placements[len(order) * NODE_BYTES, NODE_BYTES]
    assert (claim.guest_offset, claim.certainty) == (hole, Certainty.LIKELY)


def test_bt1_an_orphan_that_lacks_a_live_node_is_not_certain_but_its_nodes_are(single: Lab) -> None:
    nodes = single.nodes
    place, other = next(
        (one, two)
        for one in nodes
        for two in nodes
        if one != two and one // CLUSTER_BYTES == two // CLUSTER_BYTES
        and nodes[one].owner != 3 and nodes[two].owner == 7
    )  # fmt: skip
    order, orphans = shuffled(single, CLUSTER_BYTES)
    cluster = place - place % CLUSTER_BYTES
    index = order.index(cluster)
    content = bytearray(orphans.clusters[index])
    start = other - cluster
    content[start : start + NODE_BYTES] = with_generation(nodes[other].data, 1)
    orphans.clusters[index] = bytes(content)
    _, disk, placements = placed(single, orphans)
    assert placements[index * CLUSTER_BYTES, CLUSTER_BYTES].certainty == Certainty.LIKELY
    assert disk.read(place, NODE_BYTES) == single.content[place : place + NODE_BYTES]
    assert disk.read(other, NODE_BYTES) is None


def test_bt2_live_nodes_that_contradict_each_other_place_nothing(single: Lab) -> None:
    """Two live nodes in one orphan, each where it is to be in another cluster."""
    place, other = next(
        (one, two)
        for one in single.nodes
        for two in single.nodes
        if one // CLUSTER_BYTES != two // CLUSTER_BYTES and one % CLUSTER_BYTES != two % CLUSTER_BYTES
    )
    order, orphans = shuffled(single, CLUSTER_BYTES)
    index = order.index(place - place % CLUSTER_BYTES)
    content = bytearray(CLUSTER_BYTES)
    for at in (place, other):
        start = at % CLUSTER_BYTES
        content[start : start + NODE_BYTES] = single.nodes[at].data
    orphans.clusters[index] = bytes(content)
    _, _, placements = placed(single, orphans)
    assert (index * CLUSTER_BYTES, CLUSTER_BYTES) not in placements


def hole_beside(lab: Lab, place: int) -> int:
    """Return where the cluster of a node has room for another that no tree leads to."""
    cluster = place - place % CLUSTER_BYTES
    return next(at for at in range(cluster, cluster + CLUSTER_BYTES, NODE_BYTES) if at not in lab.nodes)


def test_bt3_the_newest_of_several_orphans_for_a_place_wins(single: Lab) -> None:
    """A cluster was copied on write, and a node written that no tree leads to any more."""
    place, node = live_leaf(single)
    hole = hole_beside(single, place)
    order, orphans = shuffled(single, CLUSTER_BYTES)
    cluster = place - place % CLUSTER_BYTES
    index = order.index(cluster)
    old = orphans.clusters[index]
    _, _, before = placed(single, orphans)
    assert before[index * CLUSTER_BYTES, CLUSTER_BYTES].certainty == Certainty.CERTAIN
    address = struct.pack("<Q", node.bytenr + hole - place)
    other = with_generation(node.data[:48] + address + node.data[56:], node.generation + 1)
    new = bytearray(old)
    new[hole - cluster : hole - cluster + NODE_BYTES] = other
    for clusters in ([*orphans.clusters, bytes(new)], [bytes(new), *orphans.clusters]):
        both = Orphans(clusters, CLUSTER_BYTES)
        newer, older = (clusters.index(content) * CLUSTER_BYTES for content in (bytes(new), old))
        _, disk, placements = placed(single, both)
        assert placements[newer, CLUSTER_BYTES].guest_offset == cluster
        assert placements[newer, CLUSTER_BYTES].certainty == Certainty.LIKELY
        assert (older, CLUSTER_BYTES) not in placements
        assert disk.read(place, NODE_BYTES) == node.data
        assert not wrong(single, placements, both)


def test_bt4_copies_that_differ_beside_their_nodes_are_certain_in_the_nodes(dup: Lab) -> None:
    place, node = live_leaf(dup)
    order, orphans = shuffled(dup, CLUSTER_BYTES)
    cluster = place - place % CLUSTER_BYTES
    hole = hole_beside(dup, place)
    index = order.index(cluster)
    content = bytearray(orphans.clusters[index])
    content[hole - cluster : hole - cluster + 5] = b"waste"
    orphans.clusters[index] = bytes(content)
    _, disk, placements = placed(dup, orphans)
    whole = placements[index * CLUSTER_BYTES, CLUSTER_BYTES]
    assert whole.certainty == Certainty.LIKELY
    assert disk.read(place, NODE_BYTES) == node.data
    assert disk.read(hole, NODE_BYTES) is None


def test_bt5_a_tree_is_left_where_a_node_is_not_what_it_must_be(single: Lab) -> None:
    """The place of the checksum tree's root has a node of another generation: no sums then."""
    place, node = live_leaf(single, owner=7)
    order, orphans = shuffled(single, NODE_BYTES)
    structure, disk, _ = placed(single, orphans)
    assert list(structure.sums(disk))
    stale = Disk(SIZE)
    for at, content in zip(order, orphans.clusters, strict=True):
        stale.put(at, with_generation(node.data, node.generation - 1) if at == place else content)
    assert not list(structure.sums(stale))


def test_a_node_in_pieces_is_joined_from_its_copies(dup: Lab) -> None:
    """The second part of one copy is lost, and the third of the other."""
    _, node = live_leaf(dup)
    copies = [at for at, one in dup.nodes.items() if one.bytenr == node.bytenr]
    assert len(copies) == 2
    order, orphans = shuffled(dup, 4096)
    orphans.clusters[order.index(copies[0] + 4096)] = b"\xa5" * 4096
    orphans.clusters[order.index(copies[1] + 8192)] = b"\xa5" * 4096
    _, disk, placements = placed(dup, orphans)
    assert not wrong(dup, placements, orphans)
    assert node.data in (disk.read(copies[0], NODE_BYTES), disk.read(copies[1], NODE_BYTES))


def test_zeros_in_a_node_may_be_no_orphans(dup: Lab) -> None:
    order, orphans = shuffled(dup, 4096)
    sparse = Orphans(orphans.clusters, 4096, shows_zeros=False)
    assert len(list(sparse)) < len(order)
    _, disk, placements = placed(dup, sparse)
    assert not wrong(dup, placements, sparse)
    for place, node in dup.nodes.items():
        assert disk.read(place, NODE_BYTES) == node.data


@pytest.mark.parametrize("cluster_bytes", [4096, CLUSTER_BYTES])
def test_an_orphan_is_placed_once(dup: Lab, cluster_bytes: int) -> None:
    """One of two copies is lost: the other is not placed anew when it is asked again."""
    place, node = live_leaf(dup)
    order, orphans = shuffled(dup, cluster_bytes)
    first = place - place % cluster_bytes
    copies = {at for at, one in dup.nodes.items() if one.bytenr == node.bytenr}
    lost = max(copies) - max(copies) % cluster_bytes
    kept = [content for at, content in zip(order, orphans.clusters, strict=True) if at != lost]
    left = Orphans(kept, cluster_bytes)
    disk = Disk(SIZE)
    claims: dict[int, set[int]] = {}
    for _ in range(3):
        (structure,) = found(disk, left)
        for placement in list(structure.place(disk, left)):
            if placement.length == cluster_bytes:
                claims.setdefault(placement.host_offset, set()).add(placement.guest_offset)
            if placement.certainty == Certainty.CERTAIN:
                disk.take(placement, left)
    assert first != lost or place != min(copies)
    assert all(len(places) == 1 for places in claims.values())


def test_what_the_extent_tree_has_is_live_without_the_tree_of_roots(single: Lab) -> None:
    order, orphans = shuffled(single, NODE_BYTES)
    root_places = [at for at, one in single.nodes.items() if one.owner == 1]
    kept = [content for at, content in zip(order, orphans.clusters, strict=True) if at not in root_places]
    structure, disk, _ = placed(single, Orphans(kept, NODE_BYTES))
    assert len(list(structure.sums(disk))) > 100
    assert any(piece.is_data for piece in structure.pieces(disk))


def test_an_image_in_a_file_is_not_the_disk(single: Lab) -> None:
    """A superblock of a file system that is shorter than the volume is not taken for certain."""
    _, orphans = shuffled(single, CLUSTER_BYTES)
    disk = Disk(2 * SIZE)
    (structure,) = found(disk, orphans, 2 * SIZE)
    placements = place_all([structure], disk, orphans)
    assert placements
    assert all(placement.certainty < Certainty.CERTAIN for placement in placements.values())


def test_two_that_fill_a_volume_are_guesses(single: Lab, dup: Lab) -> None:
    _, first = shuffled(single, CLUSTER_BYTES)
    _, second = shuffled(dup, CLUSTER_BYTES)
    both = Orphans(first.clusters + second.clusters, CLUSTER_BYTES)
    structures = found(Disk(SIZE), both)
    assert len(structures) == 1
    for structure in structures:
        assert all(p.certainty == Certainty.GUESS for p in structure.place(Disk(SIZE), both))


def test_other_checksums_are_left_alone(tmp_path: Path) -> None:
    lab = tmp_path / "disk.raw"
    with lab.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.btrfs", "-q", "--csum", "xxhash", lab], check=True)
    clusters = used_clusters(lab, CLUSTER_BYTES)
    assert not found(Disk(SIZE), Orphans(clusters.values(), CLUSTER_BYTES))


def test_chunks_that_overlap_or_leave_the_device_are_left_out() -> None:
    chunks = [
        Chunk(1 << 20, 1 << 20, (0,), True),
        Chunk(3 << 19, 1 << 20, (0,), True),
        Chunk(8 << 20, 1 << 20, (5 << 20,), True),
        Chunk(4 << 20, 1 << 20, (2 << 20, 3 << 20), False),
    ]
    chunk_map = ChunkMap(chunks, 4 << 20)
    assert [chunk.logical for chunk in chunk_map.chunks] == [1 << 20, 4 << 20]
    assert chunk_map.places((4 << 20) + 4096, 4096) == ((2 << 20) + 4096, (3 << 20) + 4096)
    assert chunk_map.places((2 << 20) - 1, 2) == ()
    assert list(gaps([(3, 2), (0, 1), (4, 3)], 0, 10)) == [(1, 2), (7, 3)]


def use_everything(orphans: Orphans) -> None:
    disk = Disk(SIZE)
    for structure in found(disk, orphans):
        place_all([structure], disk, orphans)
        assert sum(1 for _ in structure.pieces(disk)) < 1 << 20
        assert sum(1 for _ in structure.free(disk)) < 1 << 20
        assert sum(1 for _ in structure.sums(disk)) < 1 << 20


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_whatever_a_superblock_says_it_ends(data: st.DataObject, single: Lab) -> None:
    order, orphans = shuffled(single, CLUSTER_BYTES)
    block = bytearray(single.content[FIRST_SUPERBLOCK : FIRST_SUPERBLOCK + 4096])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.one_of(st.integers(72, 230), st.integers(811, 1000), st.integers(2859, 3000)))
        block[at] = data.draw(st.sampled_from((0, 1, 2, 16, 255)))
    cluster = bytearray(orphans.clusters[order.index(FIRST_SUPERBLOCK)])
    cluster[:4096] = crc_renewed(bytes(block))
    orphans.clusters[order.index(FIRST_SUPERBLOCK)] = bytes(cluster)
    superblock = Superblock.unpack(bytes(cluster[:4096]))
    if superblock is not None:
        list(system_chunks(superblock))
    use_everything(orphans)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_whatever_nodes_say_it_ends(data: st.DataObject, single: Lab) -> None:
    """Nodes whose checksums are right may name anything: themselves, too."""
    order, orphans = shuffled(single, NODE_BYTES)
    nodes = sorted(single.nodes.items())
    for _ in range(data.draw(st.integers(1, 4))):
        place, node = data.draw(st.sampled_from(nodes))
        content = bytearray(node.data)
        if data.draw(st.booleans()):
            content[100] = data.draw(st.integers(0, 9))
            struct.pack_into("<QBQQQ", content, 101, 0, 0, 0, node.bytenr, node.generation)
        for _ in range(data.draw(st.integers(0, 12))):
            start = data.draw(st.one_of(st.integers(88, 400), st.integers(NODE_BYTES - 2000, NODE_BYTES - 8)))
            content[start] = data.draw(st.sampled_from((0, 1, 2, 127, 255)))
        orphans.clusters[order.index(place)] = crc_renewed(bytes(content))
    use_everything(orphans)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1 << 32), cut=st.integers(0, 4096))
def test_noise_is_nothing(seed: int, cut: int) -> None:
    noise = random.Random(seed).randbytes(4096)
    assert Superblock.unpack(noise[:cut]) is None
    assert Node.unpack(noise, noise[32:48]) is None
    Chunk.unpack(0, noise[:cut], 1)
    assert not found(Disk(SIZE), Orphans([noise], 4096))


def test_tables_are_placed_by_what_they_name(single: Lab, tmp_path: Path) -> None:
    """CT1: no node lies in one piece in the file; the tables that name their parts put them together."""
    path, target = tmp_path / "disk.qcow2", tmp_path / "saved.raw"
    places = list(single.clusters(4096))
    random.Random(1).shuffle(places)
    with jqcow.create(path, SIZE, cluster_size=4096) as image:
        for place in places:
            image.pwrite(single.content[place : place + 4096], place)
    with path.open("r+b") as file:
        header = HeaderArea.parse(file.read(4096)).header
        file.seek(header.l1_table_offset)
        file.write(bytes(8 * header.l1_size))
    made = salvage(path, target, target_format="raw")
    found = target.read_bytes()
    assert [at for at in places if found[at : at + 4096] != single.content[at : at + 4096]] == []
    assert made.certain > 4000 * len(places)
