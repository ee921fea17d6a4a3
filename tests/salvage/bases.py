"""Images of all kinds, whole, with the truth about each: what the damage matrix starts from.

Most are used by a kernel through QEMU (`tests.salvage.foreign`), others are written by jqcow, in an order
drawn by chance, from the disk of one of those.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import jqcow
from jqcow.offline.protect import protect
from jqcow.offline.recover import recover_image
from tests.salvage import foreign
from tests.salvage.allocated import files_of
from tests.salvage.anatomy import Anatomy, Piece
from tests.salvage.foreign import Workload, run
from tests.salvage.sectors import CHUNK_BYTES, SECTOR_BYTES, Sectors, not_zero

MIB = 1 << 20
PASSPHRASE = "correct horse"
IMAGE, TRUTH, STORY = "image.qcow2", "truth.raw", "base.json"
DISK_BYTES = {"ext4": 96 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB, "ntfs": 96 * MIB}
USED = Workload(files=110, bytes_max=MIB, rewritten=0.1)
"""Files written, grown and deleted in an order drawn by chance."""
AGED = {"crumbs": 30, "tangled": 2, "scattered": 2, "deleted": 0.4}
"""More of that: many short files, and files that lie in fragments."""


@dataclass(frozen=True)
class Base:
    """A whole image, and the truth about it.

    Attributes:
        name: of its kind.
        folder: with the image, the truth, and what lies below the image.
        size: of the disk in bytes.
        guest: the file system on it, "" for none.
        files: offset and length in bytes of what its files have on the disk.
        snapshot: its name, where that is looked at instead of the disk.
        passphrase: of an encrypted one.
        has_below: whether another file is needed to read it.
        is_live: whether it crashed while jqcow had it open.
        is_protected: whether it has the sums of `jqcow protect`.
    """

    name: str
    folder: Path
    size: int
    guest: str = ""
    files: list[tuple[int, int]] = field(default_factory=list)
    snapshot: str = ""
    passphrase: str = ""
    has_below: bool = False
    is_live: bool = False
    is_protected: bool = False

    @property
    def image(self) -> Path:
        """The image file."""
        return self.folder / IMAGE

    @property
    def truth(self) -> Path:
        """A raw file of what the disk holds."""
        return self.folder / TRUTH

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where its structures are."""
        return Anatomy.of(self.image, self._recovered)

    @property
    def _recovered(self) -> Path | None:
        return self.folder / "recovered.qcow2" if self.is_live else None

    @cached_property
    def pieces(self) -> list[Piece]:
        """The clusters of the disk, or the snapshot."""
        l1 = self.anatomy.l1
        for number, one in enumerate(self.anatomy.snapshots):
            if one.name == self.snapshot:
                l1 = self.anatomy.snapshot_l1[number]
        return list(self.anatomy.pieces(self._recovered or self.image, l1, self.size))

    @cached_property
    def data(self) -> Sectors:
        """The sectors of the disk that are not zeros."""
        return not_zero(self.truth, self.size)

    @cached_property
    def file_data(self) -> Sectors:
        """Those of them that files have."""
        return self.data & Sectors.of(self.size, self.files)


Make = Callable[[Path, int], Base]


def get(name: str, seed: int, cache: Path) -> Base:
    """Return a base, made anew unless a folder has it from before."""
    folder = cache / f"{name.replace(' ', '-')}-{seed}"
    if (folder / STORY).exists():
        story = json.loads((folder / STORY).read_text())
        story["files"] = [tuple(one) for one in story["files"]]
        return Base(**{**story, "folder": folder, "name": name})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = replace(BASES[name](folder, seed), name=name)
    (folder / STORY).write_text(json.dumps({**asdict(base), "folder": ""}))
    return base


def _told(folder: Path, guest: str = "", **more: object) -> Base:
    """Take down the truth about an image: QEMU reads it."""
    image, truth = folder / IMAGE, folder / TRUTH
    if not truth.exists():
        read = folder / "recovered.qcow2" if more.get("is_live") else image
        snapshot = more.get("snapshot")
        chosen = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
        passphrase = str(more.get("passphrase", ""))
        run("qemu-img", "convert", *foreign.secret(passphrase), *chosen, *source(read, passphrase), truth)
    files = files_of(truth, guest, folder) if guest else []
    return Base("", folder, truth.stat().st_size, guest, files, **more)  # type: ignore[arg-type]


def source(image: Path, passphrase: str) -> list[str]:
    """Return the words by which ``qemu-img convert`` reads an image."""
    if passphrase:
        return [
            "--image-opts",
            "-O",
            "raw",
            f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename={image}",
        ]
    return ["-f", "qcow2", "-O", "raw", str(image)]


def used(guest: str, options: str = "", *, passphrase: str = "", size: int = 0, **load: object) -> Make:
    """Return what makes an image that a kernel used."""

    def make(folder: Path, seed: int) -> Base:
        work = Workload(**{**asdict(USED), **load})
        foreign.make(
            folder / IMAGE,
            guest,
            size or DISK_BYTES[guest],
            seed,
            options=options,
            load=work,
            passphrase=passphrase,
        )
        return _told(folder, guest, passphrase=passphrase)

    return make


def with_snapshots(snapshot: str = "") -> Make:
    """Return what makes an image with two snapshots, between which it was used."""

    def make(folder: Path, seed: int) -> Base:
        load = Workload(**{**asdict(USED), "mounts": 3, "has_snapshots": True})
        foreign.make(folder / IMAGE, "ext4", DISK_BYTES["ext4"], seed, load=load)
        return _told(folder, "ext4", snapshot=snapshot)

    return make


def overlay(folder: Path, seed: int) -> Base:
    """Make an image over another, both used; its L2 tables show much of the one below."""
    below, image, guest = folder / "below.qcow2", folder / IMAGE, "ext4"
    foreign.make(below, guest, DISK_BYTES[guest], seed, load=USED)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", image)
    with foreign.exported(image, folder) as disk, foreign.mounted(disk, guest, folder) as point:
        foreign.work(point, random.Random(seed), USED, "above-")
    return _told(folder, guest, has_below=True)


def compressed(guest: str, options: str = "") -> Make:
    """Return what makes an image of streams, out of order, some of them written over since."""

    def make(folder: Path, seed: int) -> Base:
        plain, image = folder / "plain.qcow2", folder / IMAGE
        foreign.make(plain, guest, DISK_BYTES[guest], seed, load=USED)
        words = ["-o", options] if options else []
        run("qemu-img", "convert", "-c", "-W", "-O", "qcow2", *words, plain, image)
        plain.unlink()
        with foreign.exported(image, folder) as disk, foreign.mounted(disk, guest, folder) as point:
            foreign.work(point, random.Random(seed), Workload(files=20, bytes_max=MIB), "since-")
        return _told(folder, guest)

    return make


def with_bitmaps(folder: Path, seed: int) -> Base:
    """Make an image with a bitmap that takes note of what is written."""
    image, guest = folder / IMAGE, "ext4"
    foreign.make(image, guest, DISK_BYTES[guest], seed, load=USED)
    run("qemu-img", "bitmap", "--add", "-g", "65536", image, "changed")
    with foreign.exported(image, folder) as disk, foreign.mounted(disk, guest, folder) as point:
        foreign.work(point, random.Random(seed), Workload(files=20, bytes_max=MIB), "since-")
    return _told(folder, guest)


def protected(make: Make) -> Make:
    """Return what protects the image of another base."""

    def make_protected(folder: Path, seed: int) -> Base:
        base = make(folder, seed)
        protect(base.image)
        return replace(base, is_protected=True)

    return make_protected


def patterned(options: str, size: int) -> Make:
    """Return what makes an image without a file system: text and noise, in pieces, in any order."""

    def make(folder: Path, seed: int) -> Base:
        image, chance = folder / IMAGE, random.Random(seed)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, size)
        starts = list(range(0, size, size // 64))
        chance.shuffle(starts)
        with foreign.exported(image, folder) as disk, disk.open("r+b", buffering=0) as file:
            for start in starts[:48]:
                length = min(size // 64, chance.randrange(1, 200) * SECTOR_BYTES)
                file.seek(start)
                file.write(foreign.content(chance, length))
                os.fsync(file.fileno())
        return _told(folder)

    return make


def by_jqcow(guest: str, cluster_bytes: int, *, is_live: bool = False) -> Make:
    """Return what lets jqcow write the disk of a used image, in pieces, in any order; and crash."""

    def make(folder: Path, seed: int) -> Base:
        plain, truth, image = folder / "plain.qcow2", folder / TRUTH, folder / IMAGE
        foreign.make(plain, guest, DISK_BYTES[guest], seed, load=USED)
        run("qemu-img", "convert", *source(plain, ""), truth)
        plain.unlink()
        _replay(truth, folder / "open.qcow2", cluster_bytes, random.Random(seed), image if is_live else None)
        if is_live:
            shutil.copy(image, folder / "recovered.qcow2")
            recover_image(folder / "recovered.qcow2")
            truth.unlink()
        else:
            (folder / "open.qcow2").rename(image)
        return _told(folder, guest, is_live=is_live)

    return make


def _replay(
    truth: Path, image: Path, cluster_bytes: int, chance: random.Random, crashed: Path | None
) -> None:
    """Write a raw disk into a new image; take a copy before it is closed, as a crash leaves it."""
    size = truth.stat().st_size
    runs = []
    for start, length in not_zero(truth, size).ranges():
        for place in range(start, start + length, 4 * CHUNK_BYTES):
            runs.append((place, min(4 * CHUNK_BYTES, start + length - place)))
    chance.shuffle(runs)
    with jqcow.create(image, size, cluster_size=cluster_bytes) as disk, truth.open("rb") as file:
        for number, (start, length) in enumerate(runs):
            disk.pwrite(os.pread(file.fileno(), length, start), start)
            if number % 50 == 0:
                disk.flush()
        disk.flush()
        if crashed is not None:
            shutil.copy(image, crashed)


BASES: dict[str, Make] = {
    "ext4": used("ext4"),
    "xfs": used("xfs"),
    "btrfs": used("btrfs"),
    "ntfs": used("ntfs"),
    "ext4 aged": used("ext4", **AGED),
    "xfs aged": used("xfs", **AGED),
    "btrfs aged": used("btrfs", **AGED),
    "ntfs aged": used("ntfs", **AGED),
    "ext4 4 GiB": used("ext4", size=4096 * MIB),
    "xfs 2 GiB": used("xfs", size=2048 * MIB),
    "ext4 512 B": used("ext4", "cluster_size=512", files=30),
    "ext4 4 KiB": used("ext4", "cluster_size=4096"),
    "xfs 4 KiB": used("xfs", "cluster_size=4096"),
    "ntfs 4 KiB": used("ntfs", "cluster_size=4096"),
    "ext4 2 MiB": used("ext4", "cluster_size=2M"),
    "btrfs 2 MiB": used("btrfs", "cluster_size=2M"),
    "ext4 version 2": used("ext4", "compat=0.10"),
    "ext4 extended L2": used("ext4", "cluster_size=128k,extended_l2=on"),
    "xfs extended L2": used("xfs", "cluster_size=64k,extended_l2=on"),
    "ext4 compressed": compressed("ext4"),
    "btrfs zstd 4 KiB": compressed("btrfs", "compression_type=zstd,cluster_size=4096"),
    "ext4 overlay": overlay,
    "ext4 snapshots": with_snapshots(),
    "ext4 a snapshot": with_snapshots("after0"),
    "ext4 bitmaps": with_bitmaps,
    "ext4 encrypted": used(
        "ext4",
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
        passphrase=PASSPHRASE,
    ),
    "ext4 protected": protected(used("ext4")),
    "xfs protected": protected(used("xfs")),
    "btrfs protected 2 MiB": protected(used("btrfs", "cluster_size=2M")),
    "ntfs protected 4 KiB": protected(used("ntfs", "cluster_size=4096")),
    "ext4 by jqcow": by_jqcow("ext4", 65536),
    "xfs by jqcow 4 KiB": by_jqcow("xfs", 4096),
    "ext4 crashed": by_jqcow("ext4", 65536, is_live=True),
    "ntfs crashed 4 KiB": by_jqcow("ntfs", 4096, is_live=True),
    "no guest": patterned("cluster_size=64k", 64 * MIB),
    "no guest 4 KiB": patterned("cluster_size=4k", 32 * MIB),
    "no guest 512 B": patterned("cluster_size=512", 4 * MIB),
    "no guest 2 MiB": patterned("cluster_size=2M", 256 * MIB),
}
