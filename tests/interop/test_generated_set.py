"""Images of every kind in which two features meet: made by QEMU, read, written here, and given back to QEMU.

The kinds are the rows of a covering array: every two levels of two factors that may be together are, in some
row. `test_the_rows_cover_every_pair` prints the array.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import jqcow
from jqcow.image.transaction import Transaction
from tests.interop.commands import require_same_check, require_same_info, require_same_map
from tests.interop.pairwise import CoveringArray, Row, pairs_of, table_of
from tests.support.qemu import check_clean, done

SECTOR_BYTES = 512
SEED = 20
PATTERN_BYTES = 1 << 16
BELOW_CLUSTER_BYTES = 1 << 16
STEPS = 14

FACTORS = {
    "cluster": (512, 4096, 16384, 65536, 2 << 20),
    "entries": ("standard", "extended"),
    "refcounts": (1, 2, 4, 8, 16, 32, 64),
    "backing": ("none", "raw", "qcow2", "qcow2-raw", "compressed-3"),
    "base": ("-", "shorter", "equal", "longer"),
    "snapshots": ("none", "one", "several", "sizes"),
    "compression": ("none", "zlib", "zstd"),
    "zeroes": ("none", "plain", "kept"),
    "version": (3, 2),
    "disk": ("aligned", "unaligned"),
    "lazy": ("off", "on"),
    "preallocation": ("off", "metadata", "full"),
}
DISK_BYTES = {512: 600 * 1024, 4096: 1 << 20, 16384: 2 << 20, 65536: 3 << 20, 2 << 20: 14 << 20}


def allowed(row: Row) -> bool:
    """Whether QEMU can make such an image; a row without some factors may become one."""

    def has(factor: str, *levels: object) -> bool:
        return row.get(factor) in levels

    def is_not(factor: str, *levels: object) -> bool:
        return factor in row and row[factor] not in levels

    forbidden = (
        has("backing", "none") and is_not("base", "-"),
        is_not("backing", "none") and has("base", "-"),
        is_not("backing", "none") and is_not("preallocation", "off"),
        # QEMU compresses nothing that has a cluster.
        is_not("compression", "none") and is_not("preallocation", "off"),
        # A disk is whole sectors, and that is what such a cluster is.
        has("cluster", 512) and has("disk", "unaligned"),
        has("entries", "extended") and has("cluster", 512, 4096),
        has("version", 2) and has("entries", "extended"),
        has("version", 2) and is_not("refcounts", 16),
        has("version", 2) and (has("compression", "zstd") or has("snapshots", "sizes") or has("lazy", "on")),
        has("version", 2) and is_not("zeroes", "none"),
        # What refcounts of so few bits cannot count.
        has("refcounts", 1) and is_not("snapshots", "none"),
        has("refcounts", 2) and has("snapshots", "several"),
        has("refcounts", 2, 4) and is_not("snapshots", "none") and is_not("compression", "none"),
    )
    return not any(forbidden)


ARRAY = CoveringArray(FACTORS, allowed, SEED)


def test_the_rows_cover_every_pair(capsys: pytest.CaptureFixture[str]) -> None:
    """Held to the pairs of many rows drawn at random, which need no cleverness to be allowed."""
    with capsys.disabled():
        print(f"\n{len(ARRAY.pairs)} pairs in {len(ARRAY.rows)} rows\n{table_of(ARRAY.rows)}")
    assert all(allowed(row) for row in ARRAY.rows)
    covered = set().union(*(pairs_of(row, FACTORS) for row in ARRAY.rows))
    chance = random.Random(1)
    drawn = ({factor: chance.choice(levels) for factor, levels in FACTORS.items()} for _ in range(60_000))
    seen = set().union(*(pairs_of(row, FACTORS) for row in drawn if allowed(row)))
    assert seen <= covered == ARRAY.pairs
    assert len(seen) > 0.9 * len(covered)


@dataclass
class Disk:
    """An image, and what it and each of its snapshots must hold."""

    row: Row
    folder: Path
    chance: random.Random
    content: bytearray = field(default_factory=bytearray)
    snapshots: dict[str, bytes] = field(default_factory=dict)
    snapshots_made: int = 0
    own_clusters: set[int] = field(default_factory=set)
    has_packed: bool = False

    def __post_init__(self) -> None:
        self.path = self.folder / "image.qcow2"
        self.cluster_bytes = int(self.row["cluster"])
        self.pattern = self.folder / "pattern"
        # Half noise, half zeros: every cluster shrinks, but not to nothing.
        noise = b"".join(self.chance.randbytes(160) + bytes(96) for _ in range(PATTERN_BYTES // 256))
        self.pattern.write_bytes(noise)
        self.noise = noise

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def has_room_for_snapshots(self) -> bool:
        """Whether the refcounts can count one more, of which every cluster may be a part."""
        bits = int(self.row["refcounts"])
        if bits <= 4 and self.has_packed:
            return False
        return len(self.snapshots) + 2 <= min(6, (1 << bits) - 1)

    # Where changes go: a few places, so that they meet.

    def place(self, unit: int) -> tuple[int, int]:
        """Return (offset, length) in whole units, or to the end of the disk."""
        hot = self.chance.choice((0, self.size // 3, max(0, self.size - 6 * self.cluster_bytes)))
        offset = min(self.size - 1, hot + self.chance.randrange(5 * self.cluster_bytes)) // unit * unit
        length = unit * self.chance.choice((1, 1, 2, max(1, 3 * self.cluster_bytes // unit)))
        return offset, min(length, self.size - offset)

    def put(self, data: bytes, offset: int) -> None:
        self.content[offset : offset + len(data)] = data

    def note_clusters(self, length: int, offset: int) -> bool:
        """Note clusters that may have a host cluster of their own; return whether none of them had.

        QEMU compresses over no such cluster.
        """
        first, end = offset // self.cluster_bytes, -(-(offset + length) // self.cluster_bytes)
        touched = set(range(first, end))
        were_free = not touched & self.own_clusters
        self.own_clusters |= touched
        return were_free

    def noise_of(self, length: int) -> bytes:
        return (self.noise * (length // PATTERN_BYTES + 1))[:length]

    def resized(self, size: int) -> None:
        self.content = self.content[:size].ljust(size, b"\0")

    def other_size(self, *steps: int) -> int:
        step = self.chance.choice(steps) * self.cluster_bytes + SECTOR_BYTES
        return max(8 * self.cluster_bytes, self.size + step)

    # What QEMU does.

    def by_qemu_io(self, *commands: str) -> None:
        options = [word for command in commands for word in ("-c", command)]
        output = done("qemu-io", "-f", "qcow2", *options, self.path)
        assert not any(word in output.lower() for word in ("failed", "error", "invalid", "not ")), output

    def qemu_changes(self, steps: int) -> None:
        """Change the disk by qemu-io, with the kinds of clusters that the row has.

        QEMU 7.2 packs the next compressed cluster behind the last one of the same process, even when that one
        has been freed and other data is there now. So a process that compresses here frees nothing.
        """
        if self.row["compression"] != "none":
            self.has_packed = True
            self.by_qemu_io(*(self._qemu_compresses() for _ in range(5)))
        kinds = ["write"] * 3
        kinds += ["write -z -u"] * 2 if self.row["zeroes"] != "none" else []
        kinds += ["write -z"] * 2 if self.row["zeroes"] == "kept" else []
        self.by_qemu_io(*(self._qemu_changes(self.chance.choice(kinds)) for _ in range(steps)))

    def _qemu_compresses(self) -> str:
        """Return a command that compresses what has no cluster yet, if it finds some."""
        offset = self.chance.randrange(self.size) // self.cluster_bytes * self.cluster_bytes
        length = min(self.chance.randrange(1, 4) * self.cluster_bytes, self.size - offset)
        if not self.note_clusters(length, offset):
            return "flush"
        self.put(self.noise_of(length), offset)
        return f"write -c -s {self.pattern} {offset} {length}"

    def _qemu_changes(self, kind: str) -> str:
        offset, length = self.place(self.chance.choice((SECTOR_BYTES, self.cluster_bytes)))
        self.note_clusters(length, offset)
        if kind == "write":
            self.put(self.noise_of(length), offset)
            return f"write -s {self.pattern} {offset} {length}"
        self.put(bytes(length), offset)
        return f"{kind} {offset} {length}"

    def qemu_snapshot(self) -> None:
        name = self.next_name()
        done("qemu-img", "snapshot", "-c", name, self.path)
        self.snapshots[name] = bytes(self.content)

    def qemu_resizes(self, *steps: int) -> None:
        size = self.other_size(*steps)
        done("qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", self.path, size)
        self.resized(size)

    def next_name(self) -> str:
        self.snapshots_made += 1
        return f"snap{self.snapshots_made}"

    def forget(self, name: str) -> None:
        del self.snapshots[name]

    # What both must find.

    def require_content(self, title: str) -> None:
        """QEMU and jqcow read the disk and each snapshot as they must be; QEMU's check is clean."""
        check_clean(self.path)
        require_same(self.by_qemu_img(), self.content, f"{title}: the disk, by QEMU")
        with jqcow.open(self.path, allow_files=True) as image:
            require_same(image.pread(image.size, 0), self.content, f"{title}: the disk")
            report = image.check()
            assert report.ok, report
            assert [snapshot.name for snapshot in image.snapshots()] == list(self.snapshots)
        for name, content in self.snapshots.items():
            with jqcow.open(self.path, snapshot=name, allow_files=True) as image:
                require_same(image.pread(image.size, 0), content, f"{title}: {name}")
            # QEMU shows every snapshot with the size that the disk has now.
            shown = min(len(content), self.size)
            by_qemu = self.by_qemu_img("-l", f"snapshot.name={name}")
            require_same(by_qemu[:shown], content[:shown], f"{title}: {name}, by QEMU")

    def by_qemu_img(self, *options: str) -> bytes:
        copy = self.folder / "copy.raw"
        done("qemu-img", "convert", "-f", "qcow2", "-O", "raw", *options, self.path, copy)
        return copy.read_bytes()


def require_same(found: bytes, expected: bytes | bytearray, title: str) -> None:
    assert len(found) == len(expected), f"{title}: {len(found)} bytes, not {len(expected)}"
    if found != expected:
        at = next(
            index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other
        )
        raise AssertionError(f"{title} differs from byte {at:#x} on")


# Made by QEMU.


def sizes_of(row: Row) -> tuple[int, int]:
    """Return the bytes of the disk, and of each image below it."""
    cluster_bytes = int(row["cluster"])
    size = DISK_BYTES[cluster_bytes] + (3 * SECTOR_BYTES if row["disk"] == "unaligned" else 0)
    below = {"shorter": size * 2 // 3 // SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES, "equal": size}
    return size, below.get(str(row["base"]), size + 4 * cluster_bytes)


def make_below(disk: Disk, size: int) -> list[str]:
    """Make the images below, and return the options that name the upper one; the content becomes its disk."""
    kind = str(disk.row["backing"])
    disk.content = bytearray(size)
    options: list[str] = []
    formats = {"raw": ["raw"], "qcow2": ["qcow2"], "qcow2-raw": ["raw", "qcow2"]}
    for level, image_format in enumerate(formats.get(kind, ["qcow2", "qcow2", "qcow2"])):
        name = f"below{level}.{image_format}"
        path = disk.folder / name
        done("qemu-img", "create", "-q", "-f", image_format, *options, path, size)
        # Compressed first: QEMU compresses nothing that has a cluster.
        compressed = level * BELOW_CLUSTER_BYTES if kind == "compressed-3" else None
        words = write_below(disk, compressed, BELOW_CLUSTER_BYTES, "-c ") if compressed is not None else []
        for _ in range(6):
            offset = disk.chance.randrange(size // SECTOR_BYTES) * SECTOR_BYTES
            length = min(SECTOR_BYTES * disk.chance.randrange(1, 80), size - offset)
            words += write_below(disk, offset, length)
        done("qemu-io", "-f", image_format, *words, path)
        options = ["-b", name, "-F", image_format]
    return options


def write_below(disk: Disk, offset: int, length: int, option: str = "") -> list[str]:
    byte = disk.chance.randrange(1, 256)
    disk.put(bytes([byte]) * length, offset)
    return ["-c", f"write {option}-P {byte} {offset} {length}"]


def make(disk: Disk) -> None:
    """Make the image of a row, by QEMU alone."""
    row = disk.row
    size, below_bytes = sizes_of(row)
    below = [] if row["backing"] == "none" else make_below(disk, below_bytes)
    options = {
        "cluster_size": row["cluster"],
        "compat": "1.1" if row["version"] == 3 else "0.10",
        "refcount_bits": row["refcounts"],
        "lazy_refcounts": row["lazy"],
        "extended_l2": "on" if row["entries"] == "extended" else "off",
        "compression_type": "zstd" if row["compression"] == "zstd" else "zlib",
        "preallocation": row["preallocation"],
    }
    words = ",".join(f"{name}={value}" for name, value in options.items())
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", words, *below, disk.path, size)
    disk.resized(size)
    disk.qemu_changes(STEPS)
    match row["snapshots"]:
        case "one":
            disk.qemu_snapshot()
            disk.qemu_changes(STEPS)
        case "several":
            for _ in range(3):
                disk.qemu_snapshot()
                disk.qemu_changes(STEPS // 2)
            done("qemu-img", "snapshot", "-d", "snap2", disk.path)
            disk.forget("snap2")
        case "sizes":
            # In this order: what QEMU cuts off within a cluster comes back when it grows the disk.
            for steps in ((1, 3), (-5, -1)):
                disk.qemu_snapshot()
                disk.qemu_resizes(*steps)
                disk.qemu_changes(STEPS // 2)


# Written by jqcow.


def jqcow_changes(disk: Disk, image: jqcow.Image, steps: int) -> None:
    """Change the disk at random, alone and within transactions that commit or are rolled back."""
    for _ in range(steps):
        match disk.chance.randrange(10):
            case 0:
                image.flush()
            case 1:
                image.checkpoint()
            case 2 | 3:
                with transaction(disk, image) as open_transaction:
                    for _ in range(disk.chance.randrange(1, 5)):
                        change(disk, open_transaction)
            case _:
                change(disk, image)


@contextmanager
def transaction(disk: Disk, image: jqcow.Image) -> Iterator[Transaction]:
    """A transaction, of which one in four is rolled back."""
    content, snapshots = bytearray(disk.content), dict(disk.snapshots)
    with image.transaction() as opened:
        yield opened
        if disk.chance.random() < 0.25:
            opened.rollback()
            disk.content, disk.snapshots = content, snapshots


def change(disk: Disk, image: jqcow.Image | Transaction) -> None:
    """Make one change of a random kind."""
    offset, length = disk.place(disk.chance.choice((1, SECTOR_BYTES, disk.cluster_bytes)))
    whole = disk.place(disk.cluster_bytes)
    disk.note_clusters(length, offset)
    disk.note_clusters(whole[1], whole[0])
    kinds = ["write"] * 4 + ["compressed"] * 2 + ["zeroes", "resize"]
    # In version 2 a discard leaves what lies over data of a backing file.
    kinds += ["discard"] if disk.row["version"] == 3 or disk.row["backing"] == "none" else []
    kinds += ["create"] if len(disk.snapshots) < 5 else []
    kinds += ["apply", "delete"] if disk.snapshots else []
    match disk.chance.choice(kinds):
        case "write":
            data = disk.chance.randbytes(length)
            image.pwrite(data, offset)
            disk.put(data, offset)
        case "zeroes":
            image.write_zeroes(length, offset, unmap=disk.chance.random() < 0.5)
            disk.put(bytes(length), offset)
        case "discard":
            image.discard(whole[1], whole[0])
            disk.put(bytes(whole[1]), whole[0])
        case "compressed":
            data = disk.noise_of(whole[1])
            image.pwrite_compressed(data, whole[0])
            disk.has_packed = True
            disk.put(data, whole[0])
        case "resize":
            size = disk.other_size(-5, -1, 1, 3)
            image.resize(size)
            disk.resized(size)
        case kind:
            change_snapshots(disk, image, kind)


def change_snapshots(disk: Disk, image: jqcow.Image | Transaction, kind: str) -> None:
    """Make, apply or delete a snapshot; one that the refcounts cannot count changes nothing."""
    before = image.pread(image.size, 0), image.snapshots()
    name = disk.next_name() if kind == "create" else disk.chance.choice(list(disk.snapshots))
    try:
        if kind == "create":
            image.create_snapshot(name)
        elif kind == "apply":
            image.apply_snapshot(name)
        else:
            image.delete_snapshot(name)
    except jqcow.UnsupportedFeatureError as error:
        assert int(disk.row["refcounts"]) <= 4, error
        assert "a refcount above" in str(error)
        assert (image.pread(image.size, 0), image.snapshots()) == before
        return
    if kind == "create":
        disk.snapshots[name] = bytes(disk.content)
    elif kind == "apply":
        disk.content = bytearray(disk.snapshots[name])
    else:
        disk.forget(name)


# Written by QEMU again.


def qemu_goes_on(disk: Disk) -> None:
    """QEMU writes, and makes, applies and deletes snapshots where there is room."""
    disk.qemu_changes(STEPS)
    if disk.has_room_for_snapshots:
        disk.qemu_snapshot()
        disk.qemu_changes(STEPS // 2)
    if disk.snapshots:
        name = disk.chance.choice(list(disk.snapshots))
        # QEMU counts what the disk will have before it drops what the disk has.
        has_room = len(disk.snapshots) + 2 <= (1 << int(disk.row["refcounts"])) - 1
        if has_room and len(disk.snapshots[name]) == disk.size:
            done("qemu-img", "snapshot", "-a", name, disk.path)
            disk.content = bytearray(disk.snapshots[name])
        done("qemu-img", "snapshot", "-d", name, disk.path)
        disk.forget(name)
    disk.qemu_changes(STEPS // 2)


@pytest.mark.parametrize("index", range(len(ARRAY.rows)))
def test_a_row(
    index: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = ARRAY.rows[index]
    print(f"row {index}: {row}")
    disk = Disk(row, tmp_path, random.Random(zlib.crc32(repr(row).encode())))
    make(disk)
    below = {path: path.read_bytes() for path in tmp_path.glob("below*")}
    disk.require_content("as made")
    require_same_map(capsys, "image.qcow2")
    require_same_info(capsys, "image.qcow2")
    require_same_check(capsys, "image.qcow2")
    for turn in ("first", "second"):
        with jqcow.open(disk.path, "r+", allow_files=True) as image:
            jqcow_changes(disk, image, 2 * STEPS)
        disk.require_content(f"written by jqcow, {turn} time")
    require_same_map(capsys, "image.qcow2")
    require_same_info(capsys, "image.qcow2")
    qemu_goes_on(disk)
    disk.require_content("written by QEMU again")
    assert {path: path.read_bytes() for path in below} == below
