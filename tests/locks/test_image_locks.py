"""jqcow and QEMU's tools keep each other out of an image; readers share it. Shown against the real tools."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import jqcow
from jqcow import ImageInUse
from jqcow.ondisk.root import is_live
from tests.support.qemu import WAIT_SECONDS, holding, run

CLUSTER = 4096
DISK = 1 << 20
Mode = Literal["r", "r+"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A clean image with some data."""
    path = tmp_path / "disk.qcow2"
    with jqcow.create(path, DISK, cluster_size=CLUSTER, journal_size=65536) as image:
        image.pwrite(b"\7" * 65536, 0)
    return path


# Who may hold an image


@contextlib.contextmanager
def qemu_nbd(path: Path, *options: str) -> Iterator[None]:
    socket_path = path.with_suffix(".sock")
    command = ["qemu-nbd", "--persistent", "-f", "qcow2", *options, "-k", str(socket_path), str(path)]
    process = subprocess.Popen(command)
    try:
        wait_for_greeting(socket_path)
        yield
    finally:
        process.terminate()
        try:
            process.wait(WAIT_SECONDS)
        finally:
            process.kill()
            process.wait()
            socket_path.unlink(missing_ok=True)


def wait_for_greeting(socket_path: Path) -> None:
    """The socket is there before the image is locked, and before the program listens to signals."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(socket_path))
                assert client.recv(8) == b"NBDMAGIC"
                return
        except (FileNotFoundError, ConnectionRefusedError):
            assert time.monotonic() < deadline
            time.sleep(0.01)


HOLDER = """
import sys, jqcow
image = jqcow.open(sys.argv[1], sys.argv[2], force_share=sys.argv[3] == "share")
if sys.argv[2] == "r+":
    image.pwrite(b"\\1" * 4096, 512 * 1024)
    image.flush()
print("holding", flush=True)
sys.stdin.read()
image.close()
"""


@contextlib.contextmanager
def jqcow_process(path: Path, mode: Mode, share: bool = False) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(path), mode, "share" if share else ""]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "holding\n"
        yield process
    finally:
        process.communicate("", timeout=WAIT_SECONDS)


# Others hold it


WRITERS = {
    "qemu-io": holding,
    "qemu-nbd": qemu_nbd,
    "jqcow": lambda path: jqcow_process(path, "r+"),
}
READERS = {
    "qemu-io": lambda path: holding(path, "-r"),
    "qemu-nbd": lambda path: qemu_nbd(path, "-r"),
    "jqcow": lambda path: jqcow_process(path, "r"),
}


@pytest.mark.parametrize("holder", WRITERS)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_writer_keeps_us_out(path: Path, holder: str, mode: Mode) -> None:
    with WRITERS[holder](path):
        with pytest.raises(ImageInUse) as caught:
            jqcow.open(path, mode)
        message = str(caught.value)
        assert str(path) in message
        assert "has it open for writing" in message
        assert "Close the program that holds it" in message
    jqcow.open(path, mode).close()


@pytest.mark.parametrize("holder", READERS)
def test_a_reader_keeps_our_writer_out_and_lets_our_reader_in(path: Path, holder: str) -> None:
    with READERS[holder](path):
        with pytest.raises(ImageInUse, match="uses it and does not let it be written") as caught:
            jqcow.open(path, "r+")
        assert "Close the program that holds it" in str(caught.value)
        with jqcow.open(path) as image:
            assert image.pread(512, 0) == b"\7" * 512
    jqcow.open(path, "r+").close()


@pytest.mark.parametrize("holder", WRITERS | READERS)
def test_an_image_in_use_is_not_overwritten(path: Path, holder: str) -> None:
    for holders in (WRITERS, READERS):
        with holders[holder](path):
            content = path.read_bytes()
            with pytest.raises(ImageInUse):
                jqcow.create(path, DISK * 2, overwrite=True)
            assert path.read_bytes() == content
            assert [entry.name for entry in path.parent.iterdir() if "partial" in entry.name] == []
    with jqcow.create(path, DISK * 2, overwrite=True) as image:
        assert image.size == DISK * 2


# We hold it


OTHER_WRITERS: dict[str, tuple[str, ...]] = {
    "qemu-io": ("qemu-io", "-c", "write 0 512", "-f", "qcow2"),
    "qemu-img check": ("qemu-img", "check", "-r", "all", "-f", "qcow2"),
    "qemu-img resize": ("qemu-img", "resize", "-f", "qcow2"),
    "qemu-img amend": ("qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on"),
    "qemu-nbd": ("qemu-nbd", "-f", "qcow2", "-k", "SOCKET"),
}
OTHER_READERS: dict[str, tuple[str, ...]] = {
    "qemu-io": ("qemu-io", "-r", "-c", "read -P 7 0 65536", "-f", "qcow2"),
    "qemu-img info": ("qemu-img", "info", "-f", "qcow2"),
    "qemu-img check": ("qemu-img", "check", "-f", "qcow2"),
    "qemu-img map": ("qemu-img", "map", "-f", "qcow2"),
}


def run_on(path: Path, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    socket_path = str(path.with_suffix(".sock"))
    filled = [socket_path if part == "SOCKET" else part for part in command]
    return run(*filled, path, *(["2M"] if "resize" in command else []))


@pytest.mark.parametrize("command", OTHER_WRITERS.values(), ids=OTHER_WRITERS)
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_we_keep_qemu_writers_out(path: Path, command: tuple[str, ...], mode: Mode) -> None:
    with jqcow.open(path, mode):
        content = path.read_bytes()
        done = run_on(path, command)
        assert 'Failed to get "write" lock' in done.stderr
        assert path.read_bytes() == content


@pytest.mark.parametrize("command", OTHER_READERS.values(), ids=OTHER_READERS)
@pytest.mark.parametrize("live", [False, True], ids=["clean", "live"])
def test_our_writer_keeps_qemu_readers_out(path: Path, command: tuple[str, ...], live: bool) -> None:
    with jqcow.open(path, "r+") as image:
        if live:
            image.pwrite(b"\1" * 512, 512 * 1024)
            image.flush()
        done = run_on(path, command)
        assert done.returncode
        assert 'Failed to get shared "write" lock' in done.stderr
    assert run_on(path, command).returncode == 0


@pytest.mark.parametrize("command", OTHER_READERS.values(), ids=OTHER_READERS)
def test_our_reader_lets_qemu_readers_in(path: Path, command: tuple[str, ...]) -> None:
    with jqcow.open(path):
        done = run_on(path, command)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["r", "r+"])
@pytest.mark.parametrize("second", ["r", "r+"])
def test_two_processes(path: Path, first: Mode, second: Mode) -> None:
    with jqcow_process(path, first):
        if first == second == "r":
            jqcow.open(path, second).close()
        else:
            with pytest.raises(ImageInUse):
                jqcow.open(path, second)
    jqcow.open(path, second).close()


# The end of a holder


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_killed_holder_leaves_no_lock(path: Path, mode: Mode) -> None:
    with jqcow_process(path, mode) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(WAIT_SECONDS)
        with jqcow.open(path, "r+") as image:
            assert (image.recovered is not None) == (mode == "r+")
    assert run("qemu-img", "check", path).returncode == 0


def test_a_refused_opening_holds_nothing(path: Path) -> None:
    with jqcow.open(path), pytest.raises(ImageInUse):
        jqcow.open(path, "r+")
    damaged = path.with_name("damaged.qcow2")
    shutil.copy(path, damaged)
    damaged.write_bytes(b"\0" * 4096)
    for mode in ("r", "r+"):
        with pytest.raises(jqcow.JqcowError):
            jqcow.open(damaged, mode)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jqcow.open(path, "r+"))
    assert run_on(path, OTHER_WRITERS["qemu-io"]).returncode == 0


# Forced sharing


def test_forced_sharing_reads_beside_a_writer(path: Path) -> None:
    with holding(path), pytest.raises(ImageInUse):
        jqcow.open(path)
    with holding(path), jqcow.open(path, force_share=True) as image:
        assert image.pread(65536, 0) == b"\7" * 65536
    with jqcow.open(path, "r+"), jqcow.open(path, force_share=True) as image:
        assert image.pread(65536, 0) == b"\7" * 65536


def test_a_forced_sharer_keeps_no_writer_out(path: Path) -> None:
    with jqcow.open(path, force_share=True):
        assert run_on(path, OTHER_WRITERS["qemu-io"]).returncode == 0
        with jqcow.open(path, "r+") as image:
            image.pwrite(b"\1" * 512, 0)
    with jqcow_process(path, "r", share=True):
        jqcow.open(path, "r+").close()


def test_qemu_img_shares_by_force_with_our_writer_while_the_image_is_clean(path: Path) -> None:
    with jqcow.open(path, "r+") as image:
        assert run("qemu-img", "info", "-U", path).returncode == 0
        image.pwrite(b"\1" * 512, 512 * 1024)
        image.flush()
        done = run("qemu-img", "info", "-U", path)
        assert done.returncode and "jqcow" in done.stderr


def test_forced_sharing_refuses_a_live_journal(path: Path) -> None:
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"\1" * 512, 512 * 1024)
        image.flush()
        assert is_live(path.read_bytes()[:512])
        with pytest.raises(ImageInUse, match=r"has a live journal.*without force_share") as caught:
            jqcow.open(path, force_share=True)
        assert str(path) in str(caught.value)
    jqcow.open(path, force_share=True).close()


def test_a_crashed_image_is_read_without_force(path: Path) -> None:
    with jqcow_process(path, "r+") as process:
        process.kill()
        process.wait(WAIT_SECONDS)
    with pytest.raises(ImageInUse, match="live journal"):
        jqcow.open(path, force_share=True)
    with jqcow.open(path) as image:
        assert image.pread(4096, 512 * 1024) == b"\1" * 4096


def test_forced_sharing_is_for_readers(path: Path) -> None:
    with pytest.raises(ValueError, match="force_share is for reading"):
        jqcow.open(path, "r+", force_share=True)
