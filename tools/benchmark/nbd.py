"""The same work through NBD by `jqcow serve` and by `qemu-nbd`, in turn, on copies of one image.

fio asks both servers the same; `nbdcopy` copies a disk out of them. Beside times it takes the processor time
of the servers, which a busy machine changes less.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jqcow

DISK_BYTES = 256 << 20
CHUNK_BYTES = 1 << 20
WAIT_SECONDS = 60

WORKS = (
    ("4 KiB random read, depth 1", "randread", 1, False, 1),
    ("4 KiB random read, depth 16", "randread", 16, False, 1),
    ("4 KiB random write, depth 1", "randwrite", 1, False, 1),
    ("4 KiB random write, depth 16", "randwrite", 16, False, 1),
    ("4 KiB random write and flush, depth 1", "randwrite", 1, True, 10),
    ("4 KiB random write and flush, depth 16", "randwrite", 16, True, 10),
)
"""What, fio's rw and iodepth, a flush after each write, and the part of the requests that is asked for."""


@dataclass(frozen=True)
class Measured:
    """One kind of work by one server: what it came to each round, and microseconds of the processor."""

    rates: tuple[float, ...]
    processor: tuple[float, ...]


@dataclass(frozen=True)
class Served:
    """One kind of work by both servers; ``unit`` is what a rate counts in a second."""

    work: str
    unit: str
    jqcow: Measured
    qemu: Measured

    @property
    def ratio(self) -> float:
        """Median of the rounds' ratios, jqcow's rate to QEMU's: above 1, jqcow is faster."""
        return statistics.median(
            ours / theirs for ours, theirs in zip(self.jqcow.rates, self.qemu.rates, strict=True)
        )


@dataclass(frozen=True)
class Servers:
    """All works of one run."""

    rounds: int
    works: tuple[Served, ...]

    def format_table(self) -> str:
        """Return the medians for people."""
        lines = [
            f"medians of {self.rounds} rounds; us: the server's processor time for a request or a MiB",
            "",
            f"{'':40}{'jqcow':>9}{'qemu-nbd':>9}{'':5}{'ratio':>6}{'jqcow us':>9}{'QEMU us':>9}",
        ]
        for work in self.works:
            ours, theirs = (statistics.median(one.rates) for one in (work.jqcow, work.qemu))
            mine, other = (statistics.median(one.processor) for one in (work.jqcow, work.qemu))
            lines.append(
                f"{work.work:40}{ours:9,.0f}{theirs:9,.0f} {work.unit:5}{work.ratio:5.2f}"
                f"{mine:9.1f}{other:9.1f}"
            )
        return "\n".join(
            [*lines, "", "ratio: jqcow's rate to QEMU's, round by round; above 1 jqcow is faster"]
        )


class Server:
    """A server on a socket, and its processor time."""

    def __init__(self, command: list[str], socket: Path) -> None:
        self.uri = f"nbd+unix:///?socket={socket}"
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + WAIT_SECONDS
        while not socket.exists():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} does not come up")
            time.sleep(0.01)

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _served(folder: Path, source: Path) -> Iterator[dict[str, Server]]:
    servers: dict[str, Server] = {}
    try:
        for name in ("jqcow", "qemu"):
            image, socket = folder / f"{name}.qcow2", folder / f"{name}.socket"
            shutil.copyfile(source, image)
            socket.unlink(missing_ok=True)
            ours = [sys.executable, "-m", "jqcow", "serve", "-q", "-t", "-k", str(socket), str(image)]
            theirs = [
                "qemu-nbd",
                "-t",
                "-e",
                "16",
                "-k",
                str(socket),
                "-f",
                "qcow2",
                "--cache=writeback",
                str(image),
            ]
            servers[name] = Server(ours if name == "jqcow" else theirs, socket)
        yield servers
    finally:
        for server in servers.values():
            server.process.terminate()
        for server in servers.values():
            server.process.wait(WAIT_SECONDS)


def _fio(server: Server, rw: str, depth: int, count: int, *, flushes: bool) -> tuple[float, float]:
    command = [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={server.uri}", f"--rw={rw}", "--bs=4k",
        f"--iodepth={depth}", f"--size={DISK_BYTES}", f"--number_ios={count}", "--norandommap",
        "--randseed=7", "--output-format=json", *(["--fsync=1"] if flushes else []),
    ]  # fmt: skip
    before = server.processor_seconds()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    used = server.processor_seconds() - before
    job = json.loads(result.stdout[result.stdout.index("{") :])["jobs"][0]
    return job["read" if rw == "randread" else "write"]["iops"], used / count * 1e6


def _copy(server: Server, target: Path) -> tuple[float, float]:
    target.unlink(missing_ok=True)
    before, start = server.processor_seconds(), time.perf_counter()
    subprocess.run(["nbdcopy", server.uri, target], check=True)
    seconds, used = time.perf_counter() - start, server.processor_seconds() - before
    length = target.stat().st_size / CHUNK_BYTES
    return length / seconds, used / length * 1e6


def _image(path: Path, size: int) -> Path:
    drawn = random.Random(1)
    with jqcow.create(path, size, overwrite=True) as image:
        for offset in range(0, size, CHUNK_BYTES):
            image.pwrite(drawn.randbytes(CHUNK_BYTES), offset)
    return path


def compare_servers(folder: Path, rounds: int, requests: int, copied_bytes: int) -> Servers:
    """Measure all works; each round both servers, in an order that changes from round to round."""
    works: list[Served] = []
    with _served(folder, _image(folder / "small.qcow2", DISK_BYTES)) as servers:
        for work, rw, depth, flushes, part in WORKS:
            ask = partial(_fio, rw=rw, depth=depth, count=requests // part, flushes=flushes)
            found = _rounds(servers, rounds, ask)
            works.append(Served(work, "/s", found["jqcow"], found["qemu"]))
    with _served(folder, _image(folder / "large.qcow2", copied_bytes)) as servers:
        found = _rounds(servers, rounds, lambda one: _copy(one, folder / "copy.raw"))
        works.append(Served(f"nbdcopy of {copied_bytes >> 20} MiB", "MiB/s", found["jqcow"], found["qemu"]))
    return Servers(rounds, tuple(works))


def _rounds(
    servers: dict[str, Server], rounds: int, measure: Callable[[Server], tuple[float, float]]
) -> dict[str, Measured]:
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in servers}
    for number in range(rounds):
        for name in sorted(servers, reverse=bool(number % 2)):
            rate, used = measure(servers[name])
            found[name][0].append(rate)
            found[name][1].append(used)
    return {name: Measured(tuple(rates), tuple(used)) for name, (rates, used) in found.items()}
