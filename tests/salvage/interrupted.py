"""Commands about damaged and protected images, killed at moments drawn by chance, as real processes.

K1. A salvage changes nothing of its source; what comes of it, after any number of kills, is what one makes.
K2. A repair in place that was cut off, and an undo that was cut off, are taken back to the very bytes.
K3. A protection, a refresh and a healing that were cut off leave a disk of the right bytes, an image without
    errors, and no sum that is wrong of what was not wrong before.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import jqcow
from tests.salvage.anatomy import Anatomy
from tests.salvage.foreign import content
from tests.support import qemu

ROOT = Path(__file__).resolve().parents[2]
CLUSTER_BYTES = 4096
DISK_BYTES = 12 << 20
WAIT_SECONDS = 120
ENDED = (0, 2, 3)
"""Exit codes of a command that did all that it could."""
PROGRAMS = {"jqcow": "main", "jqcow-recover": "recover"}


class Failure(AssertionError):
    """A promise is broken."""


def require(holds: object, promise: str, *found: object) -> None:
    """Raise unless a promise holds."""
    if not holds:
        raise Failure(promise, *found)


def start(program: str, *words: object) -> subprocess.Popen[bytes]:
    """Start a command of jqcow."""
    code = f"from jqcow.cli.{PROGRAMS[program]} import main; raise SystemExit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def finish(program: str, *words: object) -> int:
    """Run a command to its end, which must be a good one, and return its exit code."""
    process = start(program, *words)
    _, told = process.communicate(timeout=WAIT_SECONDS)
    require(process.returncode in ENDED, f"{program} {words}", process.returncode, told[-500:])
    return process.returncode


def kill_within(seconds: float, program: str, *words: object) -> bool:
    """Run a command and kill it after a time; return True if it had ended by then."""
    process = start(program, *words)
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    require(process.returncode in ENDED, f"{program} {words}", process.returncode, told[-500:])
    return True


@dataclass(frozen=True)
class Patient:
    """A disk, an image of it, and a damaged copy of that.

    Attributes:
        disk: its bytes.
        whole: the image.
        damaged: the same with lost tables.
    """

    disk: bytes
    whole: bytes
    damaged: bytes

    @classmethod
    def make(cls, folder: Path, seed: int) -> Patient:
        """Make one, the same for the same seed."""
        chance, path = Random(seed), folder / "made.qcow2"
        path.unlink(missing_ok=True)
        disk = bytearray(DISK_BYTES)
        starts = list(range(0, DISK_BYTES, 16 * CLUSTER_BYTES))
        chance.shuffle(starts)
        with jqcow.create(path, DISK_BYTES, cluster_size=CLUSTER_BYTES, journal_size=1 << 16) as image:
            for place in starts[: len(starts) * 3 // 4]:
                data = content(chance, CLUSTER_BYTES * chance.randrange(1, 16))
                disk[place : place + len(data)] = data
                image.pwrite(data, place)
        whole = path.read_bytes()
        anatomy, damaged = Anatomy.of(path), bytearray(whole)
        for offset, length in chance.sample(anatomy.l2, len(anatomy.l2) // 3):
            damaged[offset : offset + length] = chance.randbytes(length)
        path.unlink()
        return cls(bytes(disk), whole, bytes(damaged))


def timed(run: Callable[[], object]) -> float:
    """Return how long something takes."""
    started = time.monotonic()
    run()
    return time.monotonic() - started


def salvage(patient: Patient, folder: Path, chance: Random, kills: int) -> int:
    """Kill a salvage again and again; return how often it was cut off (K1)."""
    source, cut = folder / "damaged.qcow2", 0
    source.write_bytes(patient.damaged)
    source.chmod(0o400)
    before = source.stat().st_mtime_ns

    def words(name: str) -> Sequence[object]:
        target = folder / f"{name}.{kind}"
        return "--salvage", target, "-O", kind, "--report", folder / f"{name}.json", source

    for kind in ("raw", "qcow2"):
        seconds = timed(lambda: finish("jqcow-recover", *words("once")))
        for number in range(kills):
            target = folder / f"again.{kind}"
            while not kill_within(seconds * chance.uniform(0.3, 1.6), "jqcow-recover", *words("again")):
                cut += 1
                # A target that has its name is whole: the kill came when all was done.
                if target.exists():
                    break
            for name in (f"once.{kind}", "once.json"):
                other = folder / name.replace("once", "again")
                same = told_by(folder / name) == told_by(other)
                require(same, "K1: after kills another file", name, number)
                other.unlink()
            require(not list(folder.glob("*.jqcow-*")), "K1: files are left behind")
        for name in (f"once.{kind}", "once.json"):
            (folder / name).unlink()
    require(source.read_bytes() == patient.damaged, "K1: the source was changed")
    require(source.stat().st_mtime_ns == before, "K1: the source was written to")
    source.unlink()
    return cut


def told_by(path: Path) -> object:
    """Return what a file holds: of a report its ranges, as the summary tells of the run."""
    return json.loads(path.read_text())["ranges"] if path.suffix == ".json" else path.read_bytes()


def in_place(patient: Patient, folder: Path, chance: Random, kills: int) -> int:
    """Kill repairs in place, and what takes them back; return how often one was cut off (K2)."""
    path, cut = folder / "damaged.qcow2", 0
    path.write_bytes(patient.damaged)
    seconds = timed(lambda: finish("jqcow-recover", "--in-place", path))
    repaired = path.read_bytes()
    undoing = timed(lambda: finish("jqcow-recover", "--undo", path))
    require(path.read_bytes() == patient.damaged, "K2: the undo gives other bytes")
    for _ in range(kills):
        clear(folder)
        path.write_bytes(patient.damaged)
        if not kill_within(seconds * chance.uniform(0.3, 1.1), "jqcow-recover", "--in-place", path):
            cut += 1
            if path.read_bytes() == patient.damaged and chance.random() < 0.5:
                finish("jqcow-recover", "--in-place", path)
                require(path.read_bytes() == repaired, "K2: after a kill another repair")
        if not list(folder.glob("*.jqcow-undo")):
            require(path.read_bytes() == patient.damaged, "K2: changed, and no undo file is there")
            continue
        while not kill_within(undoing * chance.uniform(0.3, 1.5), "jqcow-recover", "--undo", path):
            cut += 1
            if path.read_bytes() == patient.damaged and not list(folder.glob("*.jqcow-undo")):
                break
        require(path.read_bytes() == patient.damaged, "K2: the undo gives other bytes")
    clear(folder)
    return cut


def clear(folder: Path) -> None:
    """Remove the files of a folder."""
    for left in folder.iterdir():
        left.unlink()


def protection(patient: Patient, folder: Path, chance: Random, kills: int) -> int:
    """Kill what makes, renews and removes sums, and what heals by them; return how often (K3)."""
    path, backup, cut = folder / "disk.qcow2", folder / "backup.raw", 0
    backup.write_bytes(patient.disk)
    for _ in range(kills):
        path.write_bytes(patient.whole)
        seconds = timed(lambda: finish("jqcow", "protect", path))
        path.write_bytes(patient.whole)
        cut += not kill_within(seconds * chance.uniform(0.2, 1.1), "jqcow", "protect", path)
        _require_sound(path, patient)
        finish("jqcow", "protect", *_how(path), path)
        require(finish("jqcow", "verify", path) == 0, "K3: a sum is wrong")
        rotten = rot(path, chance)
        require(finish("jqcow", "verify", path) == 2, "K3: what is wrong is not found", rotten)
        heal = ("heal", "--from", backup, "-F", "raw", path)
        while not kill_within(seconds * chance.uniform(0.2, 1.5), "jqcow", *heal):
            cut += 1
        require(finish("jqcow", "verify", path) == 0, "K3: after healing a sum is wrong")
        _require_sound(path, patient)
        cut += not kill_within(seconds * chance.uniform(0.2, 1.1), "jqcow", "protect", "--remove", path)
        _require_sound(path, patient)
    clear(folder)
    return cut


def _how(path: Path) -> tuple[str, ...]:
    """Return the words that protect an image, which may be protected already."""
    with jqcow.open(path) as image:
        return ("--refresh",) if any("protect" in one.name for one in image.bitmaps) else ()


def _require_sound(path: Path, patient: Patient) -> None:
    """The image has no errors once it is recovered, and its disk is as it was."""
    require(finish("jqcow-recover", path) == 0, "K3: after recovery there are errors or leaks")
    told = qemu.complaint(path)
    require(not told, "K3: QEMU finds errors or leaks", told)
    with jqcow.open(path) as image:
        require(image.pread(len(patient.disk), 0) == patient.disk, "K3: the disk has other bytes")


def rot(path: Path, chance: Random) -> list[int]:
    """Change bits of some data clusters in a file; return their guest offsets."""
    anatomy = Anatomy.of(path)
    pieces = [one for one in anatomy.pieces(path, anatomy.l1, DISK_BYTES) if one.host_offset > 0]
    some = chance.sample(pieces, 5)
    with path.open("r+b") as file:
        for piece in some:
            file.seek(piece.host_offset + chance.randrange(CLUSTER_BYTES))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1 << chance.randrange(8)]))
    return [piece.guest_offset for piece in some]


STORIES = {"salvage": salvage, "in place": in_place, "protection": protection}
