"""jqcow and QEMU keep each other out of an image, in both directions and in every combination."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jqcow.device import FileDevice, locks
from jqcow.errors import ImageInUse, UnsupportedFeatureError
from tests.support.qemu import done, holding, run


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    return path


@pytest.mark.parametrize("writable", [False, True])
def test_a_qemu_writer_keeps_us_out(image: Path, writable: bool) -> None:
    with holding(image), pytest.raises(ImageInUse, match="has it open for writing") as caught:
        FileDevice.open(image, writable=writable)
    assert str(image) in str(caught.value)
    assert caught.value.errno == errno.EAGAIN


def test_a_qemu_reader_keeps_our_writer_out_but_not_our_reader(image: Path) -> None:
    with holding(image, "-r"):
        with pytest.raises(ImageInUse, match="does not let it be written"):
            FileDevice.open(image, writable=True)
        FileDevice.open(image, writable=False).close()


def test_a_shared_reader_may_stand_beside_a_qemu_writer(image: Path) -> None:
    with holding(image):
        device = FileDevice.open(image, writable=False, share_writers=True)
        assert device.pread(4, 0) == b"QFI\xfb"
        device.close()


def test_our_writer_keeps_qemu_out(image: Path) -> None:
    device = FileDevice.open(image, writable=True)
    refused = run("qemu-img", "info", image)
    assert refused.returncode == 1
    assert "lock" in refused.stderr
    assert run("qemu-img", "info", "-U", image).returncode == 0
    refused = subprocess.run(["qemu-io", image], capture_output=True, text=True, input="q", check=False)
    assert "lock" in refused.stderr
    device.close()
    assert run("qemu-img", "info", image).returncode == 0


def test_our_reader_keeps_a_qemu_writer_out_but_not_a_reader(image: Path) -> None:
    device = FileDevice.open(image, writable=False)
    refused = run("qemu-img", "resize", image, "2M")
    assert refused.returncode == 1
    assert "lock" in refused.stderr
    assert run("qemu-img", "info", image).returncode == 0
    device.close()
    assert run("qemu-img", "resize", image, "2M").returncode == 0


def test_our_shared_reader_lets_a_qemu_writer_in(image: Path) -> None:
    device = FileDevice.open(image, writable=False, share_writers=True)
    assert run("qemu-img", "resize", image, "2M").returncode == 0
    device.close()


def test_qemu_nbd_and_we_keep_each_other_out(image: Path) -> None:
    socket = image.with_suffix(".sock")
    server = [
        "qemu-nbd",
        "--fork",
        "-f",
        "qcow2",
        "-k",
        str(socket),
        "--pid-file",
        f"{socket}.pid",
        str(image),
    ]
    device = FileDevice.open(image, writable=True)
    refused = run(*server)
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    device.close()
    done(*server)
    pid = int(Path(f"{socket}.pid").read_text())
    try:
        with pytest.raises(ImageInUse):
            FileDevice.open(image, writable=True)
    finally:
        os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("first_writes", [False, True])
@pytest.mark.parametrize("second_writes", [False, True])
def test_two_of_us(image: Path, first_writes: bool, second_writes: bool) -> None:
    first = FileDevice.open(image, writable=first_writes)
    if first_writes or second_writes:
        with pytest.raises(ImageInUse):
            FileDevice.open(image, writable=second_writes)
    else:
        FileDevice.open(image, writable=second_writes).close()
    first.close()
    FileDevice.open(image, writable=second_writes).close()


def test_a_refused_open_leaves_no_lock_behind(image: Path) -> None:
    with holding(image, "-r"), pytest.raises(ImageInUse):
        FileDevice.open(image, writable=True)
    assert run("qemu-img", "resize", image, "2M").returncode == 0


def test_the_locks_end_with_a_killed_process(image: Path) -> None:
    program = textwrap.dedent("""
        import sys, time
        from jqcow.device import FileDevice
        device = FileDevice.open(sys.argv[1], writable=True)
        print("open", flush=True)
        time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", program, str(image)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "open\n"
    with pytest.raises(ImageInUse):
        FileDevice.open(image, writable=False)
    process.kill()
    process.wait()
    process.stdout.close()
    FileDevice.open(image, writable=True).close()


def test_an_exclusive_foreign_lock_is_a_user_too(image: Path) -> None:
    descriptor = os.open(image, os.O_RDWR)
    locks._set(descriptor, fcntl.F_WRLCK, locks.HOLD_OFFSET)
    with pytest.raises(ImageInUse, match="exclusively"):
        FileDevice.open(image, writable=False)
    os.close(descriptor)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_is_refused(
    image: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_locks(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "fcntl", no_locks)
    for writable in (False, True):
        with pytest.raises(UnsupportedFeatureError, match="open file description locks"):
            FileDevice.open(image, writable=writable)
    # Who lets writers be needs no locks to read.
    FileDevice.open(image, writable=False, share_writers=True).close()


def test_another_error_of_the_lock_call_passes_through(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int, command: int, argument: bytes) -> bytes:
        kind = locks._FLOCK.unpack(argument)[0]
        if kind == fcntl.F_UNLCK:
            return argument
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", interrupted)
    with pytest.raises(OSError) as caught:
        FileDevice.open(image, writable=True)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == str(image)
