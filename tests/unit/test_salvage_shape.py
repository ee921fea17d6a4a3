"""What a file's own structures tell of it when some of them are lost."""

from __future__ import annotations

import random
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jqcow
from jqcow import _native
from jqcow._native import twins
from jqcow.errors import JqcowError, UnsupportedFeatureError
from jqcow.offline import salvage as verb
from jqcow.offline.protect import protect
from jqcow.ondisk import luks
from jqcow.ondisk.header import Header, HeaderArea
from jqcow.salvage.candidates import TableSearch
from jqcow.salvage.evidence import Certainty
from jqcow.salvage.guestmap import GuestMap
from jqcow.salvage.heading import read_shape
from jqcow.salvage.inference import Structures
from jqcow.salvage.marks import Bits, Marks
from jqcow.salvage.orphans import Unnamed, mark_header
from jqcow.salvage.packed import MixedOrphans
from jqcow.salvage.reading import PieceReader
from jqcow.salvage.shape import Shape
from jqcow.salvage.snapshots import copies_of_l1, find_snapshots
from jqcow.salvage.source import Source
from jqcow.salvage.streams import StreamOrphans, find_streams
from jqcow.salvage.tables import Fate, read_tables
from tests.support.encrypted import PASSPHRASE, encryption
from tests.support.orphans import Memory

WORDS = st.one_of(
    st.just(0),
    st.integers(0, 40).map(lambda cluster: cluster << 16 | 1 << 63),
    st.integers(0, 64).map(lambda sector: sector << 9),
    st.sampled_from([1, 0xFFFF_FFFF, 0x0001_0001_0001_0001, 0x0F0F, 1 << 62 | 5 << 54 | 70_000]),
    st.integers(0, (1 << 64) - 1),
)


@dataclass
class Made:
    """An image and the bytes of its disk."""

    data: bytes
    disk: bytes

    @property
    def header(self) -> Header:
        return HeaderArea.parse(self.data[:65_536]).header

    def without(self, *lost: str) -> Memory:
        """Return the file with structures wiped."""
        header, data = self.header, bytearray(self.data)
        cluster = 1 << header.cluster_bits
        places = {
            "header": [(0, cluster)],
            "l1": [(header.l1_table_offset, max(512, 8 * header.l1_size))],
            "snapshots": [(header.snapshots_offset, 512)],
            "refcounts": [(header.refcount_table_offset, cluster), (2 * cluster, cluster)],
        }
        for name in lost:
            for offset, length in places[name]:
                data[offset : offset + length] = bytes(length)
        return Memory(bytes(data))


def qemu(*words: object, script: str | None = None) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, input=script, text=True)


Make = Callable[..., Made]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Make images with QEMU: written in a random order, with a snapshot in the middle if asked for."""
    made: dict[object, Made] = {}

    def build(options: str, size: int, cluster: int, *, snapshot: bool = False, packed: bool = False) -> Made:
        key = (options, size, snapshot, packed)
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp("image")
        image, chance = folder / "a.qcow2", random.Random(7)
        qemu("qemu-img", "create", "-f", "qcow2", "-o", options, image, size)
        for part in range(2 if snapshot else 1):
            lines = []
            # Compressed data cannot be written where something is.
            for number in chance.sample(range(size // cluster), min(30, size // cluster)):
                guest = number * cluster
                how = "-c" if packed else ""
                lines.append(f"write {how} -P {chance.randrange(1, 255)} {guest} {cluster}")
            qemu("qemu-io", image, script="\n".join([*lines, "q", ""]))
            if snapshot and not part:
                qemu("qemu-img", "snapshot", "-c", "first", image)
        qemu("qemu-img", "convert", "-O", "raw", image, folder / "raw")
        made[key] = Made(image.read_bytes(), (folder / "raw").read_bytes())
        return made[key]

    return build


@dataclass
class Salvaged:
    """What became of a file."""

    shape: Shape
    guest_map: GuestMap
    search: TableSearch
    reader: PieceReader

    def right(self, disk: bytes) -> float:
        """Return how much of what the disk has is right; what is certain must be."""
        total = good = 0
        for piece in self.guest_map.pieces(0, len(disk)):
            want = disk[piece.guest_offset : piece.end]
            got = self.reader.read(piece) or bytes(piece.length)
            assert piece.certainty < Certainty.CERTAIN or got == want
            for at in range(0, len(want), 512):
                if want[at : at + 512].strip(b"\0"):
                    total += 1
                    good += got[at : at + 512] == want[at : at + 512]
        return good / max(1, total)


def salvage(file: Memory, known: dict[int, int] | None = None) -> Salvaged:
    source = Source(file)
    shape = read_shape(source)
    marks = Marks(shape.geometry.cluster_bits, source.size())
    mark_header(shape, marks)
    tables = read_tables(source, shape, marks)
    snapshots, _ = find_snapshots(source, shape)
    unnamed = Unnamed(source, shape, marks)
    for found in snapshots:
        if found.snapshot is not None:
            unnamed.leave_out(found.read(source, shape)[1])
    search = TableSearch(tables, marks, unnamed, copies_of_l1(source, shape, snapshots, unnamed))
    search.place(known or {})
    search.place_in_order()
    return Salvaged(shape, GuestMap(tables, marks), search, PieceReader(source, shape))


def places_of(made: Made) -> dict[int, int]:
    """Return the guest offset of each data cluster, by its host offset."""
    whole = salvage(Memory(made.data))
    step = 1 << made.header.cluster_bits
    return {
        piece.host_offset + at: piece.guest_offset + at
        for piece in whole.guest_map.pieces(0, len(made.disk))
        if piece.kind == "data"
        for at in range(0, piece.length, step)
    }


FORMS = [
    ("cluster_size=512", 512 << 10, 512),
    ("cluster_size=4096", 8 << 20, 4096),
    ("cluster_size=65536", 4 << 20, 65_536),
    ("cluster_size=16384,extended_l2=on", 24 << 20, 16_384),
    ("cluster_size=4096,refcount_bits=1", 8 << 20, 4096),
    ("compat=0.10,cluster_size=4096", 8 << 20, 4096),
]


@given(st.lists(WORDS, max_size=3), st.integers(0, 1 << 30))
def test_kinds_of_sectors(words: list[int], seed: int) -> None:
    chance = random.Random(seed)
    pool = [*words, 0]
    data = struct.pack(">64Q", *(chance.choice(pool) for _ in range(64)))
    pairs = struct.pack(">64Q", *(chance.choice(pool[:2] if place % 2 else pool) for place in range(64)))
    assert _native.sector_kinds(data + pairs, 1 << 21) == twins.sector_kinds(data + pairs, 1 << 21)


def test_what_kinds_mean() -> None:
    kinds = {
        _native.SECTOR_ZERO: bytes(512),
        _native.SECTOR_POINTERS | 16: struct.pack(">64Q", *(place << 16 for place in range(64))),
        _native.SECTOR_PAIRS | 16: struct.pack(">QQ", 3 << 16 | 1 << 63, 0xFFFF) * 32,
        _native.SECTOR_COUNTS + 4: struct.pack(">256H", *[1] * 255, 200),
        0: b"text" * 128,
    }
    assert _native.sector_kinds(b"".join(kinds.values()), 1 << 30) == bytes(kinds)


@pytest.mark.parametrize(("options", "size", "cluster"), FORMS)
@pytest.mark.parametrize("lost", [("header", "snapshots")])
def test_header_is_inferred(make: Make, options: str, size: int, cluster: int, lost: tuple[str, ...]) -> None:
    made = make(options, size, cluster, snapshot="bits=1" not in options)
    found = salvage(made.without(*lost))
    header, wanted = found.shape.area.header, made.header
    for name in ("cluster_bits", "l1_table_offset", "refcount_table_offset", "refcount_order"):
        assert getattr(header, name) == getattr(wanted, name)
    assert header.has_subclusters == wanted.has_subclusters
    assert "cluster_bits" in found.shape.inferred
    assert found.right(made.disk) == 1.0


@pytest.mark.parametrize(("options", "size", "cluster"), FORMS)
def test_header_and_refcounts(make: Make, options: str, size: int, cluster: int) -> None:
    made = make(options, size, cluster)
    found = salvage(made.without("header", "refcounts"))
    assert found.shape.area.header.cluster_bits == made.header.cluster_bits
    assert found.right(made.disk) == 1.0


@pytest.mark.parametrize(("options", "size", "cluster"), FORMS)
@pytest.mark.parametrize("lost", [("l1",), ("header", "l1", "refcounts")])
def test_data_of_known_place_places_tables(
    make: Make, options: str, size: int, cluster: int, lost: tuple[str, ...]
) -> None:
    made = make(options, size, cluster)
    found = salvage(made.without(*lost), places_of(made))
    assert found.right(made.disk) > 0.95


def test_tables_shared_with_a_snapshot_are_certain(make: Make) -> None:
    made = make("cluster_size=4096", 8 << 20, 4096, snapshot=True)
    found = salvage(made.without("l1"))
    assert found.right(made.disk) > 0.8
    assert Fate.WHOLE in found.guest_map.tables.fates


def test_wrong_places_make_nothing_certain(make: Make) -> None:
    made = make("cluster_size=4096", 8 << 20, 4096)
    shifted = {host: guest + 4096 for host, guest in places_of(made).items()}
    found = salvage(made.without("l1"), shifted)
    assert Fate.WHOLE not in found.guest_map.tables.fates


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_streams_without_tables(make: Make, kind: str) -> None:
    made = make(f"cluster_size=65536,compression_type={kind}", 4 << 20, 65_536, packed=True)
    data = bytearray(made.without("l1").data)
    for offset in filter(None, salvage(Memory(made.data)).guest_map.tables.offsets):
        data[offset : offset + 65_536] = bytes(65_536)
    source = Source(Memory(bytes(data)))
    shape = read_shape(source)
    marks = Marks(16, source.size())
    mark_header(shape, marks)
    read_tables(source, shape, marks)
    unnamed = Unnamed(source, shape, marks)
    orphans = StreamOrphans(source, shape, find_streams(source, shape, unnamed.bits))
    contents = {content for _, content in orphans}
    wanted = {made.disk[at : at + 65_536] for at in range(0, len(made.disk), 65_536)} - {bytes(65_536)}
    assert wanted <= contents
    assert all(orphans.stored_bytes(offset) for offset, _ in orphans)


def test_streams_come_where_they_lie_among_clusters(make: Make) -> None:
    """They are shown behind the end of the file, and tell of the order of the file all the same."""
    made, chance = make("cluster_size=65536", 4 << 20, 65_536, packed=True), random.Random(1)
    end = -(-len(made.data) // 65_536) * 65_536
    noise = [chance.randbytes(65_536) for _ in range(2)]
    packer = zlib.compressobj(wbits=-12)
    stream = packer.compress(b"ab" * 32_768) + packer.flush()
    packed = (stream + stream).ljust(65_536, b"\0")
    source = Source(Memory(made.data.ljust(end, b"\0") + noise[0] + packed + noise[1]))
    shape, bits = read_shape(source), Bits(end // 65_536 + 3)
    for cluster in range(3):
        bits.add(end // 65_536 + cluster)
    streams = StreamOrphans(source, shape, find_streams(source, shape, bits))
    orphans = MixedOrphans(source, 16, bits, streams, source.size())
    found = list(orphans.in_file_order())
    assert [content for _, content in found] == [noise[0], b"ab" * 32_768, b"ab" * 32_768, noise[1]]
    places = [orphans.offset_of(host) - end for host, _ in found]
    assert places == [0, 65_536, 65_536 + len(stream), 2 * 65_536]
    assert sorted(found) == sorted(orphans)


def hostile_files() -> Iterator[tuple[str, bytes]]:
    chance = random.Random(3)
    sectors = 96
    count = sectors * 64
    yield "noise", chance.randbytes(count * 8)
    yield "zeros", bytes(count * 8)
    yield "flags", struct.pack(">Q", 1) * count
    yield "pointers", struct.pack(f">{count}Q", *(chance.randrange(1, sectors) << 9 for _ in range(count)))
    snapshot = struct.pack(">QIHHIIQII", 65_536, 1 << 22, 1, 1, 0, 0, 0, 0, 0).ljust(64, b"a")
    yield "snapshots", snapshot * (count // 8)
    frame = struct.pack(">8sHBBI16sQQQII", b"jqcowFRM", 1, 0, 0, 0, b"x" * 16, 1, 1, 0, 60_000, 1 << 30)
    yield "frames", frame.ljust(4096, b"\0") * (count // 512)


@pytest.mark.parametrize(
    ("name", "data"), list(hostile_files()), ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("has_header", [False, True])
def test_hostile_files(name: str, data: bytes, has_header: bool) -> None:
    if has_header:
        head = (b"QFI\xfb", 3, 0, 0, 9, 1 << 40, 0, 1 << 20, 512, 1024, 1, 60_000, 1536, 0, 0, 0, 4, 104)
        data = struct.pack(">4sIQIIQIIQQIIQQQQII", *head) + data[104:]
    try:
        salvage(Memory(data), {host: host for host in range(0, len(data), 4096)})
    except JqcowError:
        assert not has_header or name != "zeros"


def test_external_data(make: Make) -> None:
    """Without the name of the file there is none; with it, there is nothing to be had here."""
    made = make("cluster_size=4096", 8 << 20, 4096)
    data = bytearray(made.data)
    data[79] |= 4
    assert salvage(Memory(bytes(data))).right(made.disk) == 1.0
    name = b"other.raw".ljust(16, b"\0")
    data[112:136] = struct.pack(">II", 0x44415441, 9) + name
    with pytest.raises(UnsupportedFeatureError):
        read_shape(Source(Memory(bytes(data))))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_changed_bytes(make: Make, data: st.DataObject) -> None:
    made = make("cluster_size=4096", 8 << 20, 4096, snapshot=True)
    changed = bytearray(made.data)
    for _ in range(data.draw(st.integers(1, 12))):
        place = data.draw(st.one_of(st.integers(0, 112), st.integers(0, len(changed) - 1)))
        changed[place] = data.draw(st.integers(0, 255))
    try:
        found = salvage(Memory(bytes(changed)))
        list(found.guest_map.pieces(0, found.guest_map.size))
    except JqcowError:
        pass


@pytest.mark.parametrize(("lost", "is_certain"), [(0, True), (512, True), (8192, False)])
def test_live_journal(tmp_path: Path, lost: int, is_certain: bool) -> None:
    """What only the journal has is replayed; without its root and the copy of that it is likely, no more."""
    image, disk, chance = tmp_path / "a.qcow2", bytearray(8 << 20), random.Random(1)
    with jqcow.create(str(image), len(disk), cluster_size=16_384) as opened:
        for number in chance.sample(range(len(disk) >> 14), 40):
            content = chance.randbytes(16_384)
            opened.pwrite(content, number << 14)
            disk[number << 14 : (number + 1) << 14] = content
        opened.flush()
        data = bytes(lost) + image.read_bytes()[lost:]
    found = salvage(Memory(data))
    assert found.right(bytes(disk)) == 1.0
    pieces = found.guest_map.pieces(0, len(disk))
    assert all((piece.certainty == Certainty.CERTAIN) is is_certain for piece in pieces)


def test_l1_table_of_a_lost_snapshot_is_not_taken_for_the_disks(make: Make) -> None:
    made = make("cluster_size=4096", 8 << 20, 4096, snapshot=True)
    for lost in (("l1", "snapshots"), ("header", "l1", "snapshots", "refcounts")):
        found = salvage(made.without(*lost))
        found.right(made.disk)
        assert all(piece.certainty < Certainty.CERTAIN for piece in found.guest_map.pieces(0, 8 << 20))
    snapshots, damages = find_snapshots(source := Source(made.without("snapshots")), read_shape(source))
    assert [found.snapshot for found in snapshots] == [None]
    assert damages or snapshots


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("has_noise", [False, True])
def test_impossible_entries_do_not_tell_their_kind(make: Make, extended: bool, has_noise: bool) -> None:
    """The file ends before what the last word names, or that is noise: all others could be pairs, too."""
    made = make(f"cluster_size=16384,extended_l2={'on' if extended else 'off'}", 24 << 20, 16_384)
    header, data = made.header, bytearray(made.data)
    (word,) = struct.unpack_from(">Q", data, header.l1_table_offset)
    table = word & ~(1 << 63)
    last = bytes.fromhex("e1a5" * 4) if has_noise else struct.pack(">Q", 1 << 63 | len(data) + 16_384)
    words = [1 << 63 | header.l1_table_offset + place * 16_384 for place in range(5, 11)]
    data[table : table + 16_384] = bytes(16_384)
    if extended:
        words[1::2] = [0xFFFF_FFFF, 0x0F0F, 0xFF00_0000_0000]
        data[table : table + 48] = struct.pack(">6Q", *words)
        data[table + 48 : table + 56] = last
    else:
        data[table : table + 48] = struct.pack(">6Q", *words)
        data[table + 8 : table + 16] = last
    assert read_shape(Source(Memory(bytes(data)))).area.header.has_subclusters == extended


def test_an_l1_table_of_many_clusters_may_name_empty_tables(tmp_path: Path) -> None:
    """What the guest discarded leaves L2 tables of zeros behind."""
    image, count = tmp_path / "a.qcow2", 256
    qemu("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=512", image, count << 15)
    lines = [f"write -P {1 + place % 99} {place << 15} 512" for place in range(count)]
    qemu("qemu-io", image, script="\n".join([*lines, "q", ""]))
    made, data = Made(image.read_bytes(), b""), bytearray(image.read_bytes())
    for place, (entry,) in enumerate(
        struct.iter_unpack(">Q", data[made.header.l1_table_offset :][: 8 * count])
    ):
        if place % 17:
            table = entry & ~(1 << 63)
            data[table : table + 512] = bytes(512)
    found = read_shape(Source(Made(bytes(data), b"").without("header")))
    assert found.area.header.l1_table_offset == made.header.l1_table_offset
    assert found.area.header.l1_size == count and not found.doubtful


def test_a_table_of_a_bitmap_is_none_of_a_lost_l1_table(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=4096", image, "8M")
    qemu("qemu-io", image, script="write -P 1 0 4M\nq\n")
    protect(image)
    header = HeaderArea.parse(image.read_bytes()[:4096]).header
    shape = read_shape(Source(Made(image.read_bytes(), b"").without("header")))
    assert shape.area.header.l1_table_offset == header.l1_table_offset and not shape.doubtful


def test_a_table_by_chance_tells_no_cluster_size() -> None:
    data = bytearray(random.Random(8).randbytes(1 << 20))
    data[512:1024] = struct.pack(">Q", 1 << 63 | 4096).ljust(512, b"\0")
    structures = Structures(Source(Memory(bytes(data))))
    assert structures.find_cluster_bits() == (None, False)
    assert structures.find_cluster_bits(by_chance=True) == (9, False)
    data = data[: 64 << 10]
    assert Structures(Source(Memory(bytes(data)))).find_cluster_bits() == (9, False)


def test_bits_of_a_dirty_bitmap_are_no_refcounts() -> None:
    """Where a table names a bitmap, its bits may count the table, the bitmap and the header by chance."""
    data = bytearray(random.Random(8).randbytes(12 << 20))
    data[1 << 18 : 1 << 19] = struct.pack(">Q", 3 << 18).ljust(1 << 18, b"\0")
    data[3 << 18 : 1 << 20] = bytes.fromhex("0b0ba6a37a73").ljust(1 << 18, b"\0")
    assert Structures(Source(Memory(bytes(data)))).refcounts_at(1 << 18, 18) is None
    data[3 << 18 : (3 << 18) + 6] = b"\xff" * 6
    assert Structures(Source(Memory(bytes(data)))).refcounts_at(1 << 18, 18) is not None


def test_the_header_of_an_encryption_is_found(tmp_path: Path) -> None:
    """The header and the L1 table are lost; a LUKS header that a table names would be the guest's."""
    pytest.importorskip("cryptography")
    path, content = tmp_path / "disk.qcow2", random.Random(9).randbytes(1 << 20)
    with jqcow.create(path, 4 << 20, cluster_size=65536, encryption=encryption()) as image:
        image.pwrite(content, 0)
    data = bytearray(path.read_bytes())
    area = HeaderArea.parse(bytes(data[:65536]))
    place = luks.pointer_of(area)
    l1 = area.header.l1_table_offset
    (table,) = (word & ~(1 << 63) for (word,) in struct.iter_unpack(">Q", data[l1 : l1 + 8]))
    assert place is not None
    data[:65536] = data[l1 : l1 + 65536] = bytes(65536)
    path.write_bytes(data)
    assert luks.pointer_of(read_shape(Source(Memory(bytes(data)))).area) == place
    verb.salvage(path, tmp_path / "saved", target_format="raw", passphrase=PASSPHRASE)
    assert (tmp_path / "saved").read_bytes()[: len(content)] == content
    data[table + 512 : table + 520] = struct.pack(">Q", 1 << 63 | place.offset)
    assert read_shape(Source(Memory(bytes(data)))).area.header.crypt_method == 0
