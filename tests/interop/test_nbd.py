"""`jqcow serve` beside clients that others wrote: libnbd's tools, QEMU's, fio."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.main import main
from tests.support import nbd
from tests.support.nbd import Served, connected, served
from tests.support.qemu import check_clean, compare, done, qemu_io

SIZE = 16 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    with jqcow.create(path, SIZE) as image:
        image.bitmaps.add("nightly")
        image.pwrite(random.Random(1).randbytes(3 << 20), 1 << 20)
    return path


def mapped(uri: str, context: str) -> list[tuple[int, int, int]]:
    found = json.loads(done("nbdinfo", "--json", f"--map={context}", uri))
    return [(part["offset"], part["length"], part["type"]) for part in found]


def test_what_nbdinfo_tells(disk: Path) -> None:
    with served("-t", "-x", "vda", "-D", "the disk", disk) as server:
        told = json.loads(done("nbdinfo", "--json", "--list", server.uri))
        (export,) = told["exports"]
        assert (export["export-name"], export["description"], export["export-size"]) == (
            "vda",
            "the disk",
            SIZE,
        )
        assert export["contexts"] == ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:nightly"]
        can = [name for name in export if name.startswith("can_") and export[name]]
        assert len(can) == 8 and not export["is_read_only"]
        end = SIZE - (4 << 20)
        assert mapped(server.uri, "base:allocation") == [
            (0, 1 << 20, 3), (1 << 20, 3 << 20, 0), (4 << 20, end, 3)
        ]  # fmt: skip
        dirty = [(0, 1 << 20, 0), (1 << 20, 3 << 20, 1), (4 << 20, end, 0)]
        assert mapped(server.uri, "qemu:allocation-depth") == dirty
        assert mapped(server.uri, "qemu:dirty-bitmap:nightly") == dirty


def test_what_nbdinfo_tells_is_what_qemu_nbd_tells(disk: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", disk, overlay)
    qemu_io(overlay, "write 2M 512k", "write -z 8M 1M", "discard 12M 1M")
    told = []
    with served("-t", "-r", "--allow-files", overlay) as server:
        told.append([mapped(server.uri, "base:allocation"), mapped(server.uri, "qemu:allocation-depth")])
    found = [
        json.loads(
            done(
                "nbdinfo", "--json", f"--map={context}", "--", "[", "qemu-nbd", "-rAf", "qcow2", overlay, "]"
            )
        )
        for context in ("base:allocation", "qemu:allocation-depth")
    ]
    told.append([[(part["offset"], part["length"], part["type"]) for part in one] for one in found])
    assert told[0] == told[1]


def test_nbdcopy_there_and_back(disk: Path, tmp_path: Path) -> None:
    raw, back = tmp_path / "raw", tmp_path / "back"
    raw.write_bytes(random.Random(2).randbytes(5 << 20) + bytes(3 << 20) + b"end" + bytes((8 << 20) - 3))
    with served("-t", disk) as server:
        done("nbdcopy", "--flush", raw, server.uri)
        done("nbdcopy", server.uri, back)
    assert back.read_bytes() == raw.read_bytes()
    compare(disk, raw)
    check_clean(disk)


def test_qemu_over_nbd(disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    with served("-t", disk) as server:
        where = f"nbd+unix:///?socket={server.socket}"
        commands = (
            "write -P 7 65000 70000", "write -f -P 8 200k 4k", "write -z 1M 100k", "write -zu 2M 1M", "flush",
            "discard 3M 1M", "read -P 7 65000 70000", "read -P 8 200k 4k", "read -P 0 2M 2M",
            "aio_write -P 9 5M 1M", "aio_write -P 9 6M 1M", "aio_flush", "read -P 9 5M 2M",
        )  # fmt: skip
        qemu_io(where, *commands, kind="raw")
        done("qemu-img", "convert", "-f", "raw", "-O", "qcow2", where, copy)
        assert (
            json.loads(done("qemu-img", "info", "--output=json", "-f", "raw", where))["virtual-size"] == SIZE
        )
    done("qemu-img", "compare", disk, copy)
    check_clean(disk)


def test_fio_verifies_what_it_wrote(disk: Path) -> None:
    with served("-t", disk) as server:
        done(
            "fio", "--name=x", "--ioengine=nbd", f"--uri={server.uri}", "--rw=randrw", "--bsrange=512-64k",
            "--bs_unaligned", "--size=8M", "--iodepth=16", "--fsync=7", "--verify=crc32c", "--randseed=5",
            "--minimal",
        )  # fmt: skip
    check_clean(disk)


# The process


def test_it_ends_with_its_last_client(disk: Path) -> None:
    server = Served(disk)
    # Who only looks who is there does not count.
    with connected(server.socket):
        done("nbdinfo", "--list", server.uri)
        assert server.process.poll() is None
    assert server.wait() == 0
    assert not os.path.exists(server.socket)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_close_the_image_cleanly(disk: Path, tmp_path: Path, number: int) -> None:
    pid_file = tmp_path / "pid"
    server = Served("--pid-file", pid_file, "-t", disk)
    assert pid_file.read_text() == f"{server.process.pid}\n"
    with connected(server.socket) as client:
        client.write(b"unflushed", 8 << 20)
        assert server.end(number) == 0
    assert not pid_file.exists() and not os.path.exists(server.socket)
    check_clean(disk)
    with jqcow.open(disk) as image:
        assert image.recovered is None
        assert image.pread(9, 8 << 20) == b"unflushed"


def test_a_killed_server_loses_nothing_acknowledged(disk: Path) -> None:
    """O2. Its socket, which it could not remove, is in nobody's way."""
    for count in range(3):
        server = Served("-t", disk)
        with connected(server.socket) as first, connected(server.socket) as second:
            first.write(b"by the first" + bytes([count]), 8 << 20)
            second.write(b"by itself" + bytes([count]), 9 << 20, nbd.FUA)
            # Several connections are one: this covers what the first one wrote.
            second.flush()
            server.end(signal.SIGKILL)
        with jqcow.open(disk, "r+") as image:
            assert image.pread(13, 8 << 20) == b"by the first" + bytes([count])
            assert image.pread(10, 9 << 20) == b"by itself" + bytes([count])
        check_clean(disk)


def test_an_image_in_use_and_others_that_cannot_be_served(disk: Path, tmp_path: Path) -> None:
    with served("-t", disk):
        assert main(["serve", "-k", str(tmp_path / "other"), str(disk)]) == 4
    (tmp_path / "raw").write_bytes(bytes(512))
    assert main(["serve", str(tmp_path / "raw")]) == 1
    for wrong in (["-k", "s", "-p", "1"], ["-p", "70000"], ["-e", "0"], ["-x", "x" * 5000]):
        assert main(["serve", *wrong, str(disk)]) == 1
    assert main(["serve"]) == 1
    (tmp_path / "file").write_text("mine")
    assert main(["serve", "-k", str(tmp_path / "file"), str(disk)]) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_tcp(disk: Path) -> None:
    with served("-t", "-r", "-p", "0", disk) as server:
        assert server.uri.startswith("nbd://")
        assert done("nbdinfo", "--size", server.uri).strip() == str(SIZE)
        port = int(server.uri.rpartition(":")[2].strip("/"))
        with connected(("localhost", port)) as client:
            assert client.do(nbd.WRITE, 0, data=b"x").error == nbd.EPERM
        with socket.create_connection(("localhost", port)):
            pass
