"""Disks that a real kernel wrote through QEMU: clusters lie in the file in the order of a guest's writes.

A qcow2 image is exported by qemu-storage-daemon as a file (FUSE), a loop device is put on it, a file system
is made and mounted, and files are written, grown, rewritten and deleted in a seeded order.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
MAKERS = {
    "ext4": ["mkfs.ext4", "-q", "-F"],
    "xfs": ["mkfs.xfs", "-q", "-f"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
    "ntfs": ["mkntfs", "-q", "-Q", "-F"],
}
STOP = 0x8004587D
"""The request that ext4 and XFS take for "stop here, after the log is written"."""
WORDS = (b"the", b"quick", b"brown", b"fox", b"jumps", b"over", b"a", b"lazy", b"dog", b"and", b"sleeps")


@dataclass(frozen=True)
class Workload:
    """What is done to the mounted file system.

    Attributes:
        files: how many are written.
        bytes_max: length of the longest; short ones are more frequent.
        deleted: share of files that are deleted again on the way.
        appended: share of writes that grow a file that is there already.
        crumbs: how many short files, links and long names are made each time; half of them are deleted again.
        tangled: how many pairs of files grow in turns with a sync between, so that they lie in fragments.
        synced: how often all is written out, for each file.
        rewritten: how often a part of a file is overwritten, for each file.
        scattered: how many files are grown in turn, block by block, so that each has many extents.
        crowd: how many empty files a single folder gets.
        mounts: how often the file system is mounted, the load shared among them.
        trimmed: how often what is free is discarded, for each file.
        has_snapshots: whether QEMU takes a snapshot between two mounts.
        is_cut_off: whether it stops in the end without a clean unmount (ext4 and XFS).
    """

    files: int = 200
    bytes_max: int = 4 << 20
    deleted: float = 0.25
    appended: float = 0.15
    crumbs: int = 0
    tangled: int = 0
    synced: float = 0.05
    rewritten: float = 0.0
    scattered: int = 0
    crowd: int = 0
    mounts: int = 1
    trimmed: float = 0.0
    has_snapshots: bool = False
    is_cut_off: bool = False


def run(*words: object) -> str:
    """Run a program, also one where an ordinary user does not look; return what it prints."""
    command = [str(word) for word in words]
    command[0] = shutil.which(command[0], path=PATH) or command[0]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def secret(passphrase: str) -> list[str]:
    """Return the words that give a program of QEMU's a passphrase, as the secret ``key``."""
    return ["--object", f"secret,id=key,data={passphrase}"] if passphrase else []


@contextmanager
def shown_by_daemon(words: Sequence[str], shown: Path, *, is_quiet: bool = False) -> Iterator[None]:
    """Have qemu-storage-daemon export something over an empty file, as long as that is used."""
    output = subprocess.DEVNULL if is_quiet else None
    daemon = subprocess.Popen(["qemu-storage-daemon", *words], stderr=output)
    try:
        for _ in range(200):
            if shown.stat().st_size:
                break
            time.sleep(0.05)
        else:
            raise TimeoutError(f"nothing is exported over {shown.name}")
        yield
    finally:
        daemon.terminate()
        daemon.wait()


@contextmanager
def exported(image: Path, folder: Path, passphrase: str = "") -> Iterator[Path]:
    """Show a qcow2 image as a file of the disk's bytes, written through QEMU."""
    unlocked = ",encrypt.format=luks,encrypt.key-secret=key" if passphrase else ""
    shown = folder / "exported"
    shown.touch()
    words = [
        *secret(passphrase),
        *("--blockdev", f"driver=file,node-name=file,filename={image}"),
        *("--blockdev", f"driver=qcow2,node-name=disk,file=file,discard=unmap{unlocked}"),
        *("--export", f"type=fuse,id=export,node-name=disk,mountpoint={shown},writable=on,growable=off"),
    ]
    with shown_by_daemon(words, shown):
        yield shown


@contextmanager
def looped(disk: Path) -> Iterator[str]:
    """Show a file as a block device."""
    device = run("losetup", "--find", "--show", disk).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(disk: Path, kind: str, folder: Path) -> Iterator[Path]:
    """Mount a file system that fills a disk."""
    point = folder / "mounted"
    point.mkdir(exist_ok=True)
    with looped(disk) as device:
        if kind == "ntfs":
            run("ntfs-3g", device, point)
        else:
            run("mount", "-t", kind, device, point)
        try:
            yield point
        finally:
            unmount(point)


def unmount(point: Path) -> None:
    """Unmount; what a process of the file system still closes keeps it busy for a moment."""
    for _ in range(50):
        if subprocess.run(["umount", point], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    run("umount", point)


def content(chance: random.Random, length: int) -> bytes:
    """Return what a file may hold: noise, text, or text with long runs of zeros."""
    kind = chance.choice(("noise", "text", "holes"))
    if kind == "noise":
        return chance.randbytes(length)
    text = b" ".join(chance.choices(WORDS, k=min(length // 4 + 1, 20_000)))
    text = (text * (length // len(text) + 1))[:length]
    if kind == "holes" and length > 65_536:
        start = chance.randrange(length // 2)
        text = text[:start] + bytes(length // 4) + text[start + length // 4 :]
    return text[:length]


def work(point: Path, chance: random.Random, load: Workload, prefix: str = "") -> None:
    """Write, grow, rewrite and delete files, now and then with a sync between."""
    names: list[Path] = []
    for number in range(load.files):
        folder = point / f"d{chance.randrange(12)}"
        folder.mkdir(exist_ok=True)
        length = min(load.bytes_max, int(chance.paretovariate(0.5) * 2_000))
        draw = chance.random()
        if names and draw < load.appended:
            with chance.choice(names).open("ab") as file:
                file.write(content(chance, length))
        else:
            name = folder / f"{prefix}file{number}"
            name.write_bytes(content(chance, length))
            names.append(name)
        if names and chance.random() < load.deleted:
            names.pop(chance.randrange(len(names))).unlink()
        if names and chance.random() < load.rewritten:
            rewrite(chance.choice(names), chance)
        if chance.random() < load.synced:
            run("sync", "-f", point)
        if chance.random() < load.trimmed:
            run("fstrim", point)
    scatter(point, chance, load.scattered)
    for number in range(load.crowd):
        crowd = point / "crowd"
        crowd.mkdir(exist_ok=True)
        (crowd / f"one of many {number} {chance.random()}").touch()
    crumble(point, chance, load.crumbs)
    for number in range(load.tangled):
        tangle(point, chance, number)


def crumble(point: Path, chance: random.Random, crumbs: int) -> None:
    """Make directories of several blocks, and inodes that come and go."""
    names: list[Path] = []
    for number in range(crumbs):
        folder = point / f"crumbs{chance.randrange(3)}"
        folder.mkdir(exist_ok=True)
        name = folder / f"{number}-{chance.randrange(1 << 60):x}{'n' * chance.randrange(150)}"
        name.unlink(missing_ok=True)
        if chance.random() < 0.1:
            name.symlink_to("t" * chance.choice((20, 100, 1000)))
        else:
            name.write_bytes(content(chance, chance.choice((0, 10, 300, 5000))))
        names.append(name)
    for name in chance.sample(names, len(names) // 2):
        name.unlink()


def tangle(point: Path, chance: random.Random, number: int) -> None:
    """Grow two files in turns."""
    with (point / f"left{number}").open("ab") as left, (point / f"right{number}").open("ab") as right:
        for _ in range(chance.randrange(10, 80)):
            for file in (left, right):
                file.write(chance.randbytes(chance.randrange(1, 5) * 4096))
                file.flush()
                os.fsync(file.fileno())


def rewrite(name: Path, chance: random.Random) -> None:
    """Overwrite a part of a file in its place."""
    with name.open("r+b") as file:
        file.seek(chance.randrange(name.stat().st_size + 1))
        file.write(content(chance, chance.randrange(1, 100_000)))


def scatter(point: Path, chance: random.Random, count: int) -> None:
    """Grow files in turn, each written out before the next goes on."""
    handles = [os.open(point / f"scattered{number}", os.O_CREAT | os.O_WRONLY) for number in range(count)]
    for step in range(60 if count else 0):
        for handle in handles:
            os.pwrite(handle, chance.randbytes(4096), step * 8192)
            os.fdatasync(handle)
    for handle in handles:
        os.close(handle)


def cut_off(point: Path) -> None:
    """Let a file system stop as by a crash, with what its journal has by now."""
    folder = os.open(point, os.O_RDONLY)
    try:
        fcntl.ioctl(folder, STOP, (1).to_bytes(4, "little"))
    finally:
        os.close(folder)


def make(
    image: Path,
    kind: str,
    size: int,
    seed: int,
    *,
    options: str = "",
    load: Workload | None = None,
    making: Sequence[str] = (),
    passphrase: str = "",
) -> None:
    """Make a qcow2 image with a file system that was used for a while.

    Args:
        image: to make; its folder is used for mounting.
        kind: one of MAKERS.
        size: of the disk in bytes.
        seed: of all that is written.
        options: for ``qemu-img create -o``.
        making: more words for the program that makes the file system.
        load: what is done.
        passphrase: of an image that the options encrypt with the secret ``key``.
    """
    folder = image.parent
    load = load or Workload()
    chance = random.Random(seed)
    words = ["-o", options] if options else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *secret(passphrase), *words, image, size)
    for number in range(load.mounts):
        with exported(image, folder, passphrase) as disk:
            if number == 0:
                with looped(disk) as device:
                    run(*MAKERS[kind], *making, device)
            with mounted(disk, kind, folder) as point:
                work(point, chance, replace(load, files=load.files // load.mounts), f"{number}-")
                if load.is_cut_off and number == load.mounts - 1:
                    cut_off(point)
        if load.has_snapshots and number < load.mounts - 1:
            run("qemu-img", "snapshot", "-c", f"after{number}", image)
