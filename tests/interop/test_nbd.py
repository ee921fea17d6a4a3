"""`jqcow serve` beside clients that others wrote: libnbd's tools, QEMU's, fio."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import ssl
import struct
import sys
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.main import main
from tests.support import nbd
from tests.support.nbd import Served, connected, served
from tests.support.qemu import check_clean, compare, done, qemu_io, run

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
            "--minimal", "--verify_state_save=0",
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


# Other ways to be served


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as libnbd and QEMU want it: an authority, a server and a client; and one of strangers."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in (folder, folder / "strangers"):
        name.mkdir(exist_ok=True)
        done("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
             "-subj", "/CN=ca", "-keyout", name / "ca-key.pem", "-out", name / "ca-cert.pem")  # fmt: skip
        for who in ("server", "client"):
            done("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                 "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                 "-keyout", name / f"{who}-key.pem", "-out", name / "request.pem")  # fmt: skip
            done("openssl", "x509", "-req", "-in", name / "request.pem", "-CA", name / "ca-cert.pem",
                 "-CAkey", name / "ca-key.pem", "-copy_extensions", "copy", "-CAcreateserial",
                 "-out", name / f"{who}-cert.pem")  # fmt: skip
    return folder


def test_tls(disk: Path, certificates: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with served("-t", "-p", "0", "--tls-certificates", certificates, "--tls-verify-peer", disk) as server:
        assert server.uri.startswith("nbds://")
        uri = f"{server.uri}?tls-certificates={certificates}"
        done("nbdcopy", uri, raw)
        done("nbdcopy", raw, uri)
        port = int(server.uri.rpartition(":")[2].strip("/"))
        for wrong in (
            uri.replace("nbds:", "nbd:"),
            f"{server.uri}?tls-certificates={certificates}/strangers",
        ):
            assert run("nbdinfo", "--size", wrong).returncode != 0
        with contextlib.closing(nbd.Client(("localhost", port))) as client:
            client.greet()
            assert [kind for kind, _ in client.option(nbd.LIST)] == [nbd.TLS_REQD]
            assert [kind for kind, _ in client.go()] == [nbd.TLS_REQD]
            # What follows in the clear is not taken for what came by TLS.
            client.send(
                b"IHAVEOPT" + struct.pack(">II", nbd.STARTTLS, 0) + b"IHAVEOPT" + struct.pack(">II", 3, 0)
            )
            assert client.is_hung_up()
    compare(disk, raw)
    check_clean(disk)


def test_tls_with_keys_is_refused_where_python_has_none(disk: Path, tmp_path: Path) -> None:
    """From Python 3.13 on it serves."""
    (tmp_path / "keys").write_text(f"me:{'ab' * 32}\n")
    if not hasattr(ssl.SSLContext, "set_psk_server_callback"):
        assert main(["serve", "--tls-psk", str(tmp_path / "keys"), str(disk)]) == 1
        return
    with served("-t", "--tls-psk", tmp_path / "keys", disk) as server:
        uri = f"nbds+unix://me@/?socket={server.socket}&tls-psk-file={tmp_path / 'keys'}"
        assert done("nbdinfo", "--size", uri).strip() == str(SIZE)


def test_sockets_from_systemd(disk: Path) -> None:
    """libnbd does as systemd does."""
    told = done("nbdinfo", "--size", "--", "[", sys.executable, "-m", "jqcow", "serve", "-q", disk, "]")
    assert told.strip() == str(SIZE)


def test_a_snapshot_is_served_read_only(disk: Path) -> None:
    with jqcow.open(disk, "r+") as image:
        image.create_snapshot("before")
        before = image.pread(10, 1 << 20)
        image.pwrite(b"after", 1 << 20)
    content = disk.read_bytes()
    with served("-t", "-l", "before", disk) as server, connected(server.socket) as client:
        assert client.read(10, 1 << 20) == before
        assert client.do(nbd.WRITE, 0, data=b"x").error == nbd.EPERM
    assert disk.read_bytes() == content


def test_changes_that_are_forgotten(disk: Path) -> None:
    content = disk.read_bytes()
    with served("-t", "-s", disk) as server, connected(server.socket) as client:
        kept = client.read(512, 2 << 20)
        client.write(b"for now" * 1000, 1 << 20, nbd.FUA)
        assert client.read(7000, 1 << 20) == b"for now" * 1000
        assert client.read(512, 2 << 20) == kept
    assert disk.read_bytes() == content
