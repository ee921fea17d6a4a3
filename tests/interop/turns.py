"""What QEMU and jqcow do in turn to an image of a kind, and how both are held to its model."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jqcow
from jqcow.image.transaction import Transaction
from tests.interop.commands import Capture, require_same_check, require_same_info, require_same_map
from tests.interop.disk import COMPLAINTS, Disk, Noted
from tests.interop.kinds import (
    DATA_FILE,
    DISK_BYTES,
    SECTOR_BYTES,
    UNKNOWN_BIT,
    UNKNOWN_EXTENSION,
    name_in,
    option_words,
    sizes_of,
)
from tests.interop.pairwise import Row
from tests.support.loops import loop_device
from tests.support.qemu import done

BELOW_CLUSTER_BYTES = 1 << 16
STEPS = 14
DEVICE_DISKS = 12
"""A device holds so many disks: the snapshots, and what is not used again at once."""
FEATURES_AT = {"compatible": 80, "autoclear": 88}
GRANULARITIES = (512, 4096, 65536, 1 << 20)


def judge(row: Row, folder: Path, capture: Capture) -> None:
    """Make an image of a kind; let jqcow write, QEMU write, and require after each that all is as it must be.

    The working directory must be ``folder``: names with a protocol start there.
    """
    with place_of(row, folder) as path, data_of(row, folder) as data:
        judge_at(path, data, row, folder, capture)


@contextmanager
def place_of(row: Row, folder: Path) -> Iterator[Path]:
    """Where the image of a row is to be: in a file, or on a device."""
    kind, _, sector_bytes = str(row["place"]).partition("-")
    if kind == "file":
        yield folder / "image.qcow2"
    else:
        size = DEVICE_DISKS * max(DISK_BYTES[int(row["cluster"])], 4 << 20)
        with loop_device(folder / "device.img", size, int(sector_bytes)) as device:
            yield Path(device)


@contextmanager
def data_of(row: Row, folder: Path) -> Iterator[str]:
    """Where an image of a row has the data that is not inside: in a file, or on a device."""
    if row["data"] == "device":
        size = 4 * DISK_BYTES[int(row["cluster"])]
        with loop_device(folder / "data-device.img", size) as device:
            yield device
    else:
        yield DATA_FILE


def judge_at(path: Path, data: str, row: Row, folder: Path, capture: Capture) -> None:
    """As `judge`, in given places."""
    disk = Disk(row, path, folder, random.Random(zlib.crc32(repr(row).encode())))
    make(disk, data)
    below = {path: path.read_bytes() for path in folder.glob("below*")}
    is_dirty = row["lazy"] == "on" and row["ended"] == "killed"
    disk.require_content("as made", is_dirty=is_dirty)
    require_same_words(disk, capture, is_dirty=is_dirty)
    for turn in ("first", "second"):
        with disk.opened("r+") as image:
            if row["bitmaps"] != "none" and turn == "first":
                image.bitmaps.add("by-jqcow", 4096)
                disk.model.bitmaps["by-jqcow"] = Noted(4096)
            jqcow_changes(disk, image, 2 * STEPS)
        disk.require_content(f"written by jqcow, {turn} time")
        require_unknown(disk)
    require_same_words(disk, capture)
    qemu_goes_on(disk)
    disk.require_content("written by QEMU again")
    require_unknown(disk)
    disk.require_states()
    assert {path: path.read_bytes() for path in below} == below


def require_same_words(disk: Disk, capture: Capture, *, is_dirty: bool = False) -> None:
    """Both tell the same of the image in their commands."""
    name = str(disk.path) if disk.row["place"] != "file" else os.path.relpath(disk.path)
    words = disk.for_qemu() if disk.is_encrypted else []
    require_same_map(capture, name, for_qemu=words)
    require_same_info(capture, name)
    require_same_check(capture, name, for_qemu=words, is_clean=not is_dirty)


# Made by QEMU.


def make_below(disk: Disk, size: int) -> list[str]:
    """Make the images below, and return the options that name the upper one; the content becomes its disk."""
    kind = str(disk.row["backing"])
    disk.model.disk = bytearray(size)
    options: list[str] = []
    formats = {"raw": ["raw"], "qcow2": ["qcow2"], "qcow2-raw": ["raw", "qcow2"]}
    for level, image_format in enumerate(formats.get(kind, ["qcow2", "qcow2", "qcow2"])):
        path = disk.folder / f"below{level}.{image_format}"
        # A name is seen from the image.
        name = path.name if disk.row["place"] == "file" else str(path)
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
    options[1] = name_in(disk.row, options[1], options[3])
    return options


def write_below(disk: Disk, offset: int, length: int, option: str = "") -> list[str]:
    byte = disk.chance.randrange(1, 256)
    disk.put(bytes([byte]) * length, offset)
    return ["-c", f"write {option}-P {byte} {offset} {length}"]


def make(disk: Disk, data: str) -> None:
    """Make the image of a row, by QEMU alone; what is unknown comes later."""
    row = disk.row
    size, below_bytes = sizes_of(row)
    below = [] if row["backing"] == "none" else make_below(disk, below_bytes)
    disk.qemu_creates(option_words(row, data), below, size)
    if row["bitmaps"] != "none":
        disk.qemu_adds_bitmap("one", 65536)
    disk.qemu_changes(STEPS)
    if row["bitmaps"] == "several":
        disk.qemu_adds_bitmap("finer", 512)
        disk.qemu_adds_bitmap("coarser", 1 << 20)
        disk.qemu_adds_bitmap("asleep", 4096, is_enabled=False)
    match row["snapshots"]:
        case "one":
            disk.qemu_snapshot()
            disk.qemu_changes(STEPS)
        case "several":
            for _ in range(3):
                disk.qemu_snapshot()
                disk.qemu_changes(STEPS // 2)
            disk.qemu_snapshot("-d", "snap2")
        case "sizes":
            # In this order: what QEMU cuts off within a cluster comes back when it grows the disk.
            for steps in ((1, 3), (-5, -1)):
                disk.qemu_snapshot()
                disk.qemu_resizes(*steps)
                disk.qemu_changes(STEPS // 2)
    if row["ended"] == "killed":
        kill_qemu(disk)
    add_unknown(disk)


def kill_qemu(disk: Disk) -> None:
    """QEMU writes, flushes and dies: what it had open stays so."""
    commands = [*disk.qemu_commands(STEPS // 2), "flush", "sigraise 9"]
    options = [word for command in commands for word in ("-c", command)]
    ended = subprocess.run(
        ["qemu-io", *options, *disk.for_qemu()], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -9, ended
    assert not any(word in ended.stdout.lower() for word in COMPLAINTS), ended.stdout
    for noted in disk.model.bitmaps.values():
        noted.is_consistent = False


def add_unknown(disk: Disk) -> None:
    """Put into the header what no specification knows (qcow2 specification, header and header extensions)."""
    with disk.path.open("r+b") as file:
        header = bytearray(file.read(disk.cluster_bytes))
        match disk.row["unknown"]:
            case "compatible" | "autoclear" as kind:
                at = FEATURES_AT[kind]
                (bits,) = struct.unpack_from(">Q", header, at)
                struct.pack_into(">Q", header, at, bits | 1 << UNKNOWN_BIT)
            case "extension":
                at = end_of_extensions(header)
                length = len(UNKNOWN_EXTENSION)
                assert not any(header[-length:])
                header[at:at] = UNKNOWN_EXTENSION
                del header[-length:]
                (name_at,) = struct.unpack_from(">Q", header, 8)
                struct.pack_into(">Q", header, 8, name_at + length if name_at else 0)
        file.seek(0)
        file.write(header)


def end_of_extensions(header: bytes | bytearray) -> int:
    """Return where the end marker of the header extensions is."""
    (at,) = struct.unpack_from(">I", header, 100)
    while True:
        kind, length = struct.unpack_from(">II", header, at)
        if kind == 0:
            return int(at)
        at += 8 + (length + 7) // 8 * 8


def require_unknown(disk: Disk) -> None:
    """Who writes keeps compatible bits and extensions, and clears the bits that vouch for all writers."""
    with disk.path.open("rb") as file:
        header = file.read(disk.cluster_bytes)
    match disk.row["unknown"]:
        case "compatible" | "autoclear" as kind:
            (bits,) = struct.unpack_from(">Q", header, FEATURES_AT[kind])
            assert bool(bits >> UNKNOWN_BIT & 1) == (kind == "compatible")
        case "extension":
            assert UNKNOWN_EXTENSION in header[: end_of_extensions(header)]


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
    """A transaction, of which one in four is rolled back, and that may be refused."""
    before = disk.model.copied()
    try:
        with image.transaction() as opened:
            yield opened
            if disk.chance.random() < 0.25:
                opened.rollback()
                disk.model = before
    except jqcow.UnsupportedFeatureError as error:
        # What it overwrites there has no second place.
        assert disk.row["data"] != "inside" and "in a transaction" in str(error), error
        disk.model = before


def change(disk: Disk, image: jqcow.Image | Transaction) -> None:
    """Make one change of a random kind."""
    offset, length = disk.place(disk.chance.choice((1, SECTOR_BYTES, disk.cluster_bytes)))
    whole = disk.place(disk.cluster_bytes)
    disk.note_clusters(length, offset)
    disk.note_clusters(whole[1], whole[0])
    kinds = ["write"] * 4 + ["zeroes", "resize"]
    # QEMU stores encrypted clusters as they are, jqcow none.
    is_inside = disk.row["data"] == "inside"
    kinds += ["compressed"] * 2 if is_inside and not disk.is_encrypted else []
    # In version 2 a discard leaves what lies over data of a backing file.
    kinds += ["discard"] if disk.row["version"] == 3 or disk.row["backing"] == "none" else []
    kinds += ["create"] if is_inside and len(disk.model.snapshots) < 5 else []
    kinds += ["apply", "delete"] if disk.model.snapshots else []
    kinds += ["bitmap"] if any(noted.is_consistent for noted in disk.model.bitmaps.values()) else []
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
            disk.resized(size, by_jqcow=True)
        case "bitmap":
            change_bitmaps(disk, image)
        case kind:
            change_snapshots(disk, image, kind)


def change_bitmaps(disk: Disk, image: jqcow.Image | Transaction) -> None:
    """Enable, disable, clear, rename, merge or remove a bitmap, or add one."""
    bitmaps = disk.model.bitmaps
    usable = [name for name, noted in bitmaps.items() if noted.is_consistent]
    name, other = (disk.chance.choice(usable) for _ in range(2))
    noted = bitmaps[name]
    match disk.chance.randrange(7):
        case 0 | 1:
            change = image.bitmaps.disable if noted.is_enabled else image.bitmaps.enable
            change(name)
            noted.is_enabled = not noted.is_enabled
        case 2:
            image.bitmaps.clear(name)
            noted.must, noted.may = set(), set()
        case 3:
            image.bitmaps.rename(name, name[::-1])
            disk.model.bitmaps = {(name[::-1] if key == name else key): bitmaps[key] for key in bitmaps}
        case 4 if name != other:
            image.bitmaps.merge(name, other)
            source = bitmaps[other]
            for granule in source.must:
                start = granule * source.granularity
                # One bit of a coarser bitmap may stand for any of its bytes.
                noted.must |= noted.granules(start, min(disk.size, start + source.granularity))
            for granule in source.may:
                start = granule * source.granularity
                noted.may |= noted.granules(start, min(disk.size, start + source.granularity))
        case 5 if len(usable) > 1:
            image.bitmaps.remove(name)
            del bitmaps[name]
        case _ if len(bitmaps) < 6:
            name = f"new{disk.chance.randrange(1 << 30)}"
            granularity = disk.chance.choice(GRANULARITIES)
            image.bitmaps.add(name, granularity)
            bitmaps[name] = Noted(granularity)


def change_snapshots(disk: Disk, image: jqcow.Image | Transaction, kind: str) -> None:
    """Make, apply or delete a snapshot; one that the refcounts cannot count changes nothing."""
    before = image.pread(image.size, 0), image.snapshots()
    name = disk.next_name() if kind == "create" else disk.chance.choice(list(disk.model.snapshots))
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
        disk.model.snapshots[name] = bytes(disk.model.disk)
    elif kind == "apply":
        disk.applied(name)
    else:
        disk.forget(name)


# Written by QEMU again.


def qemu_goes_on(disk: Disk) -> None:
    """QEMU writes, and makes, applies and deletes snapshots where there is room."""
    disk.qemu_changes(STEPS)
    if disk.model.bitmaps:
        disk.qemu_adds_bitmap("by-qemu", 65536)
    if disk.has_room_for_snapshots:
        disk.qemu_snapshot()
        disk.qemu_changes(STEPS // 2)
    snapshots = disk.model.snapshots
    if snapshots:
        name = disk.chance.choice(list(snapshots))
        # QEMU counts what the disk will have before it drops what the disk has.
        has_room = len(snapshots) + 2 <= (1 << int(disk.row["refcounts"])) - 1
        # It applies none over bitmaps.
        if has_room and len(snapshots[name]) == disk.size and not disk.model.bitmaps:
            disk.qemu_snapshot("-a", name)
        disk.qemu_snapshot("-d", name)
    disk.qemu_changes(STEPS // 2)
