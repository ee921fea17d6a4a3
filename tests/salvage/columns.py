"""What each program brings back of a damaged image: as a raw file, of which nothing but the bytes counts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jqcow.cli import main as cli
from jqcow.cli import recover
from tests.salvage import foreign
from tests.salvage.anatomy import Range
from tests.salvage.bases import Base
from tests.salvage.sectors import SECTOR_BYTES

CPU_SECONDS_MAX = 180


@dataclass(frozen=True)
class Ran:
    """How a program ended: its exit status, None if it was killed for its time, and what it took."""

    status: int | None
    cpu_seconds: float
    peak_bytes: int
    told: str


def ran(words: Sequence[object], folder: Path) -> Ran:
    """Run a program to its end."""
    with (folder / "told").open("wb") as file:
        process = subprocess.Popen([str(word) for word in words], stdout=file, stderr=file, cwd=folder)
        ended = _ended(process.pid, folder)
        process.returncode = -1 if ended.status is None else ended.status
    return ended


def ran_here(main: Callable[[list[str]], int], words: Sequence[object], folder: Path) -> Ran:
    """Run a command of jqcow in a process that has its modules already."""
    arguments = [str(word) for word in words]
    sys.stdout.flush()
    sys.stderr.flush()
    number = os.fork()
    if number:
        return _ended(number, folder)
    code = 70
    try:
        told = os.open(folder / "told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(told, 1)
        os.dup2(told, 2)
        code = main(arguments)
        sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _ended(number: int, folder: Path) -> Ran:
    """Wait for a process, which the kernel kills if it takes too long, and return how it ended."""
    resource.prlimit(number, resource.RLIMIT_CPU, (CPU_SECONDS_MAX, CPU_SECONDS_MAX))
    _, status, used = os.wait4(number, 0)
    code = os.waitstatus_to_exitcode(status)
    text = (folder / "told").read_text(encoding="utf-8", errors="replace")
    return Ran(None if code < 0 else code, used.ru_utime + used.ru_stime, used.ru_maxrss << 10, text)


def _read_by_qemu(base: Base, image: Path, target: Path, *words: object) -> list[object]:
    chosen = ["-l", f"snapshot.name={base.snapshot}"] if base.snapshot else []
    source: list[object] = ["-f", "qcow2", "-O", "raw", image]
    if base.passphrase:
        where = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename={image}"
        source = ["--image-opts", "-O", "raw", where]
    return ["qemu-img", "convert", *foreign.secret(base.passphrase), *words, *chosen, *source, target]


def by_qemu(base: Base, image: Path, folder: Path) -> dict[str, Path]:
    """Return what QEMU reads of an image, as it is and repaired, each also with ``--salvage``."""
    found = {}
    for name in ("qemu", "qemu, repaired"):
        if name == "qemu, repaired":
            ran(["qemu-img", "check", "-r", "all", *_checked(base, image)], folder)
        found[name] = folder / f"{name}.raw"
        ended = ran(_read_by_qemu(base, image, found[name]), folder)
        # Without an error there is nothing for it to go on from.
        if ended.status != 0:
            key = f"{name}, --salvage"
            found[key] = folder / f"{key}.raw"
            ran(_read_by_qemu(base, image, found[key], "--salvage"), folder)
    return found


def _checked(base: Base, image: Path) -> list[object]:
    if base.passphrase:
        where = f"driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename={image}"
        return [*foreign.secret(base.passphrase), "--image-opts", where]
    return ["-f", "qcow2", image]


def by_plain_reading(base: Base, image: Path, folder: Path) -> dict[str, Path]:
    """Return what jqcow reads of an image without salvage."""
    found = folder / "plain.raw"
    words = [
        *_unlocking(base, folder),
        *(["-l", base.snapshot] if base.snapshot else []),
        "-q",
        "-f",
        "qcow2",
    ]
    below = ["--allow-files"] if base.has_below else []
    ran_here(cli.main, ["convert", "--salvage", *words, *below, "-O", "raw", image, found], folder)
    return {"plain": found}


def _unlocking(base: Base, folder: Path) -> list[object]:
    if not base.passphrase:
        return []
    secret = folder / "passphrase"
    secret.write_text(base.passphrase)
    return ["--passphrase-file", secret]


@dataclass(frozen=True)
class Salvaged:
    """What ``jqcow-recover --salvage`` made.

    Attributes:
        target: raw, or none.
        ranges: of the report.
        ran: how the command ended.
    """

    target: Path
    ran: Ran
    ranges: list[dict[str, Any]] = field(default_factory=list)


def by_salvage(base: Base, image: Path, folder: Path, *more: object) -> Salvaged:
    """Salvage an image into a raw file."""
    target, report = folder / "salvaged.raw", folder / "salvaged.json"
    for left in (target, report):
        left.unlink(missing_ok=True)
    words = [*_unlocking(base, folder), *(["--snapshot", base.snapshot] if base.snapshot else [])]
    below = ["--allow-files"] if base.has_below else []
    made = ["--salvage", target, "-O", "raw", "--report", report]
    ended = ran_here(recover.main, [*made, *words, *below, *more, image], folder)
    ranges = json.loads(report.read_text())["ranges"] if report.exists() else []
    return Salvaged(target, ended, ranges)


@contextmanager
def failing(image: Path, unreadable: Sequence[Range], folder: Path) -> Iterator[Path]:
    """Show a file whose reads fail in ranges, through FUSE; the file itself where there are none."""
    if not unreadable:
        yield image
        return
    shown = folder / "failing.qcow2"
    shown.touch()
    file = {"driver": "file", "filename": str(image), "discard": "unmap"}
    sectors = sorted(
        {
            sector
            for offset, length in unreadable
            for sector in range(offset // SECTOR_BYTES, -(-(offset + length) // SECTOR_BYTES))
        }
    )
    rules = [
        {"event": "none", "iotype": "read", "errno": 5, "sector": sector, "once": False, "immediately": False}
        for sector in sectors
    ]
    bad = {"driver": "blkdebug", "node-name": "bad", "image": file, "inject-error": rules}
    export = f"type=fuse,id=export,node-name=bad,mountpoint={shown},writable=on,growable=on"
    words = ["--blockdev", json.dumps(bad), "--export", export]
    try:
        with foreign.shown_by_daemon(words, shown, is_quiet=True):
            yield shown
    finally:
        shown.unlink(missing_ok=True)


def copied(source: Path, target: Path) -> Path:
    """Copy a file, holes and all."""
    target.unlink(missing_ok=True)
    foreign.run("cp", "--sparse=always", source, target)
    return target


def copied_beside(base: Base, folder: Path) -> None:
    """Copy what an image needs to be read."""
    if base.has_below:
        shutil.copy(base.folder / "below.qcow2", folder)
