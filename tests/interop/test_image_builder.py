"""The image builder of the how-to, killed and cut off: the disk is the old one or the new one, no mixture.

The builder is the example that docs/how-to.md shows.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import jqcow
from jqcow.testing import CrashFailure, CrashState, LabOptions, Laboratory, SimulatedDevice, Workload
from tests.support.qemu import check_clean, compare, done

ROOT = Path(__file__).resolve().parents[2]
BUILDER = ROOT / "docs" / "examples" / "build_image.py"

MIB = 1 << 20
SECTOR_BYTES = 512
DISK_BYTES = 64 * MIB
# The smallest one, so that a simulated disk is small too.
JOURNAL_BYTES = 64 << 10
KILLS_WANTED = 20
ATTEMPTS_MAX = 200
KILLED_AT_CLOSING = 5
SALT = b"the same salt..."

# A writer process: it tells when the transaction is about to begin, and when it is durable.
WRITER = """
import json, sys
from pathlib import Path
import builder, jqcow
image_path, pieces = sys.argv[1], json.loads(sys.argv[2])
with jqcow.open(image_path, "r+") as image:
    print("begun", flush=True)
    builder.install(image, [(start, Path(path)) for start, path in pieces])
    print("installed", flush=True)
"""


@dataclass(frozen=True)
class Bench:
    """The builder, what it puts on the disk, and the whole disk before and after."""

    builder: ModuleType
    folder: Path
    pieces: list[tuple[int, Path]]
    old_image: Path
    old: bytes
    new: bytes
    old_raw: Path
    new_raw: Path


def copy_builder(folder: Path) -> ModuleType:
    """Save the example as a module that processes can import, and return it."""
    source = BUILDER.read_text(encoding="utf-8")
    (folder / "builder.py").write_text(source, encoding="utf-8")
    module = ModuleType("builder")
    exec(compile(source, "builder.py", "exec"), module.__dict__)
    return module


def make_tree(folder: Path, names: list[str], seed: int) -> Path:
    """Make a directory of files with random content."""
    chance = random.Random(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(chance.randrange(1, 100_000)))
    return folder


def prepare(builder: ModuleType, folder: Path, release: int) -> list[tuple[int, Path]]:
    """Make the pieces of a release of the operating system."""
    scratch = folder / f"release-{release}"
    efi = make_tree(scratch / "efi", ["EFI/BOOT/BOOTX64.EFI", f"loader/entries/{release}.conf"], release)
    root = make_tree(scratch / "root", [f"usr/lib/release-{release}/{n}" for n in range(20)], release + 100)
    pieces: list[tuple[int, Path]] = builder.prepare(scratch, efi, root, DISK_BYTES)
    return pieces


def disk_of(pieces: list[tuple[int, Path]]) -> bytes:
    """Return the disk that holds the pieces, and zeros elsewhere."""
    disk = bytearray(DISK_BYTES)
    for start, path in pieces:
        content = path.read_bytes()
        disk[start : start + len(content)] = content
    assert len(disk) == DISK_BYTES
    return bytes(disk)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Return a disk with an older release and a user's data on it, and the pieces of a newer release."""
    folder = tmp_path_factory.mktemp("builder")
    builder = copy_builder(folder)
    old_image, chance = folder / "old.qcow2", random.Random(3)
    jqcow.create(old_image, DISK_BYTES, journal_size=JOURNAL_BYTES).close()
    with jqcow.open(old_image, "r+") as image:
        builder.install(image, prepare(builder, folder, release=1))
        for offset in (20 * MIB + 777, 44 * MIB, 52 * MIB - 512):
            image.pwrite(chance.randbytes(200_000), offset)
    with jqcow.open(old_image) as image:
        old = image.pread(DISK_BYTES, 0)
    pieces = prepare(builder, folder, release=2)
    new = disk_of(pieces)
    old_raw, new_raw = folder / "old.raw", folder / "new.raw"
    old_raw.write_bytes(old)
    new_raw.write_bytes(new)
    return Bench(builder, folder, pieces, old_image, old, new, old_raw, new_raw)


# What a disk must be


def require_bootable(image_path: Path) -> None:
    """QEMU reads a disk on which the tools find nothing wrong: partition tables and both file systems."""
    raw = image_path.with_suffix(".raw")
    done("qemu-img", "convert", "-O", "raw", image_path, raw)
    assert "No errors detected" in done("sfdisk", "--verify", raw)
    table = json.loads(done("sfdisk", "--json", raw))["partitiontable"]
    assert table["label"] == "gpt"
    disk = raw.read_bytes()
    require_checksums(disk)
    for partition, command in zip(table["partitions"], (["fsck.fat", "-n"], ["e2fsck", "-fn"]), strict=True):
        start, length = partition["start"] * SECTOR_BYTES, partition["size"] * SECTOR_BYTES
        part = image_path.with_suffix(".part")
        part.write_bytes(disk[start : start + length])
        done(*command, part)


def require_checksums(disk: bytes) -> None:
    """Both headers of the partition table, and the entries of each, have their CRC-32."""
    for sector in (1, len(disk) // SECTOR_BYTES - 1):
        header = bytearray(disk[sector * SECTOR_BYTES :][:92])
        assert header[:8] == b"EFI PART"
        (checksum,) = struct.unpack_from("<I", header, 16)
        struct.pack_into("<I", header, 16, 0)
        assert zlib.crc32(header) == checksum, f"the partition table at sector {sector} is broken"
        entries_sector, count, entry_bytes, entries_checksum = struct.unpack_from("<QIII", header, 72)
        entries = disk[entries_sector * SECTOR_BYTES :][: count * entry_bytes]
        assert zlib.crc32(entries) == entries_checksum, f"the entries at sector {entries_sector} are broken"
    assert disk[510:512] == b"\x55\xaa"
    assert disk[450] == 0xEE


def test_the_builder_makes_a_bootable_disk(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    jqcow.create(path, DISK_BYTES).close()
    efi, root = bench.folder / "release-2" / "efi", bench.folder / "release-2" / "root"
    bench.builder.build_image(path, efi, root)
    check_clean(path)
    require_bootable(path)
    partition = tmp_path / "image.part"
    assert "usr" in done("debugfs", "-R", "ls -p /", partition)


def test_the_judge_sees_one_wrong_byte(bench: Bench, tmp_path: Path) -> None:
    """Each part of the judge finds its part of the disk broken."""
    path = tmp_path / "image.qcow2"
    for offset, complaint in (
        (SECTOR_BYTES + 60, "table at sector 1 is broken"),  # a byte of the disk's own number
        (2 * SECTOR_BYTES + 20, "entries at sector 2 are broken"),  # and of a partition's
        (DISK_BYTES - SECTOR_BYTES + 60, "table at sector 131071 is broken"),
        (MIB + 16, "fsck.fat"),  # how many tables the FAT file system has
        (MIB + bench.builder.EFI_BYTES + 1024 + 56, "e2fsck"),  # the signature of the root file system
    ):
        with jqcow.create(path, DISK_BYTES, overwrite=True) as image:
            bench.builder.install(image, bench.pieces)
            image.pwrite(bytes([image.pread(1, offset)[0] ^ 1]), offset)
        with pytest.raises(AssertionError, match=complaint):
            require_bootable(path)


# Killed


class Installer:
    """The builder as a process."""

    def __init__(self, bench: Bench, image_path: Path) -> None:
        """Start it, and wait until its transaction is about to begin."""
        pieces = json.dumps([(start, str(path)) for start, path in bench.pieces])
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, image_path, pieces],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{bench.folder}"},
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        assert self.output.readline() == "begun\n"
        self.lines: list[str] = []

    def wait_until_durable(self) -> None:
        """Wait until it says that its transaction is durable. It closes the image then."""
        self.lines.append(self.output.readline())

    def end(self) -> tuple[bool, bool]:
        """Wait for its end; return whether it was killed, and whether it had said that all is durable."""
        self.lines += self.output.readlines()
        acknowledged = "installed\n" in self.lines
        self.output.close()
        status = self.process.wait()
        assert status in (0, -signal.SIGKILL)
        return status != 0, acknowledged


def judge_process(bench: Bench, path: Path, *, acknowledged: bool) -> bool:
    """Recover the image that a process left, and judge it; return True if it holds the new disk.

    It is compared byte by byte, by jqcow and by QEMU, with disks that the tools have seen.
    """
    with jqcow.open(path, "r+") as image:
        found = image.pread(DISK_BYTES, 0)
    check_clean(path)
    # Compared outside of the assertions, which would print how two disks differ.
    is_new, is_old = found == bench.new, found == bench.old
    assert is_new or is_old, "the disk is neither the old one nor the new one"
    assert is_new or not acknowledged, "what was acknowledged is lost"
    compare(path, bench.new_raw if is_new else bench.old_raw)
    return is_new


def test_killed_at_random_moments_it_is_all_or_nothing(bench: Bench, tmp_path: Path) -> None:
    """The moments are spread over what an undisturbed process takes, from its transaction to its end.

    The commit comes late in that, and later on a busy machine. So every fifth process is killed while it
    closes the image, to see the new disk in any case.
    """
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"the moments of the kills: seed {seed}")
    chance = random.Random(seed)
    path = tmp_path / "image.qcow2"
    path.write_bytes(bench.old_image.read_bytes())
    installer, started = Installer(bench, path), time.monotonic()
    assert installer.end() == (False, True)
    usual_seconds = time.monotonic() - started
    is_new = judge_process(bench, path, acknowledged=True)
    assert is_new
    require_bootable(path)
    old_count = new_count = attempts = 0
    while old_count + new_count < KILLS_WANTED or not (old_count and new_count):
        attempts += 1
        assert attempts <= ATTEMPTS_MAX, f"after so many processes: {old_count} old disks, {new_count} new"
        # What the last kill left goes on, unless it was the new disk already.
        if is_new:
            path.write_bytes(bench.old_image.read_bytes())
        installer = Installer(bench, path)
        if attempts % KILLED_AT_CLOSING == 0:
            installer.wait_until_durable()
        else:
            time.sleep(chance.uniform(0, usual_seconds))
        installer.process.kill()
        was_killed, acknowledged = installer.end()
        is_new = judge_process(bench, path, acknowledged=acknowledged)
        old_count += was_killed and not is_new
        new_count += was_killed and is_new
    print(f"{old_count} killed processes left the old disk, {new_count} the new one; {attempts} were started")


# Cut off


class Progress(list[str]):
    """The laboratory's model: ``installed`` is in it once the transaction is durable."""

    def copy(self) -> Progress:
        return Progress(self)


def workload(bench: Bench, *, transaction: bool = True) -> Workload[Progress]:
    """Return the builder at work on a simulated disk; without its transaction if that is asked for."""
    content = bench.old_image.read_bytes()

    def run(device: SimulatedDevice, progress: Progress) -> None:
        with jqcow.open_device(device, "r+", journal_size=JOURNAL_BYTES, new_salt=lambda: SALT) as image:
            bench.builder.install(image if transaction else PlainWrites(image), bench.pieces)
            image.flush()
            progress.append("installed")

    return Workload("builder", run, Progress, make_device=lambda: SimulatedDevice(content))


class PlainWrites:
    """Stands in for an image; its transactions are none."""

    def __init__(self, image: jqcow.Image) -> None:
        self.image = image
        self.size = image.size

    @contextmanager
    def transaction(self) -> Iterator[jqcow.Image]:
        yield self.image


class CutJudge:
    """Recovers and judges crash states; counts which disk each one left."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.path = folder / "state.qcow2"
        self.found = bytearray(DISK_BYTES)
        self.old_count = self.new_count = 0

    def judge(self, device: SimulatedDevice, progress: Progress, state: CrashState) -> None:
        with jqcow.open_device(device, "r+") as image:
            image.pread_into(self.found, 0)
        is_new = self.found == self.bench.new
        is_old = self.found == self.bench.old
        assert is_new or is_old, "the disk is neither the old one nor the new one"
        assert is_new or "installed" not in progress, "what was acknowledged is lost"
        self.path.write_bytes(device.content())
        check_clean(self.path)
        self.old_count += not is_new
        self.new_count += is_new


def recover(device: SimulatedDevice) -> None:
    jqcow.open_device(device, "r+").close()


def test_with_the_power_cut_anywhere_it_is_all_or_nothing(bench: Bench, tmp_path: Path) -> None:
    """The recovery is cut too. What is found is compared byte by byte, so the tools need to see it once."""
    judge = CutJudge(bench, tmp_path)
    options = LabOptions(budget=20, seed=5, depth=2, nested_every=20, nested_budget=1)
    laboratory = Laboratory(judge.judge, recover=recover, options=options)
    laboratory.run(workload(bench))
    report = laboratory.report()
    print(report.format_table())
    assert report.distinct_states >= 80
    assert judge.old_count and judge.new_count


def test_without_its_transaction_the_disk_is_a_mixture(bench: Bench, tmp_path: Path) -> None:
    laboratory = Laboratory(CutJudge(bench, tmp_path).judge, options=LabOptions(budget=6, seed=5))
    with pytest.raises(CrashFailure, match="neither the old one nor the new one"):
        laboratory.run(workload(bench, transaction=False))
