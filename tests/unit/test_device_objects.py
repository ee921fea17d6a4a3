"""Images, and what lies below them, on objects of the caller's own."""

from __future__ import annotations

import io
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.device.base import Device
from jqcow.device.file import FileDevice
from jqcow.device.objects import ObjectDevice, as_device
from jqcow.image.below import MAX_OWN_IMAGES
from jqcow.offline.overlay import create_overlay
from jqcow.testing import SimulatedDevice
from tests.support.qemu import done

MIB = 1 << 20


def written(size: int = MIB, data: bytes = b"hello", offset: int = 4096, **options: Any) -> io.BytesIO:
    """Return the bytes of an image that was written into memory."""
    file = io.BytesIO()
    device = ObjectDevice(file, barrier=lambda: None)
    with jqcow.create_on_device(device, size, cluster_size=4096, journal_size=65536, **options) as image:
        image.pwrite(data, offset)
    return file


def test_image_in_memory_is_a_standard_one(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(written().getvalue())
    done("qemu-img", "check", "-q", "-f", "qcow2", str(tmp_path / "image"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("kind", ["BytesIO", "file", "raw file", "zip member", "an image's file"])
def test_read_from_any_object(kind: str, tmp_path: Path, stack: ExitStack) -> None:
    content = written().getvalue()
    (tmp_path / "image").write_bytes(content)
    if kind == "BytesIO":
        file: Any = io.BytesIO(content)
    elif kind == "zip member":
        with zipfile.ZipFile(tmp_path / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / "image", "image")
        file = stack.enter_context(zipfile.ZipFile(tmp_path / "zip")).open("image")
    elif kind == "an image's file":
        outer = jqcow.create_on_device(SimulatedDevice(), MIB)
        outer.pwrite(content, 0)
        file = outer.as_file()
    else:
        file = (tmp_path / "image").open("rb", buffering=0 if kind == "raw file" else -1)
    with jqcow.open(file) as image:
        assert image.pread(6, 4095) == b"\0hello"
        assert image.check().ok
    assert not file.closed
    file.close()


def test_what_has_no_barrier_is_not_written() -> None:
    with pytest.raises(jqcow.ReadOnlyError, match="barrier"):
        jqcow.open(written(), "r+")
    device = ObjectDevice(io.BytesIO(b"x"))
    assert device.read_only and isinstance(device, Device)
    for change in (
        lambda: device.pwrite(b"x", 0),
        lambda: device.truncate(0),
        lambda: device.allocate(0, 1),
        lambda: device.barrier("name"),
    ):
        with pytest.raises(jqcow.ReadOnlyError):
            change()


def test_barrier_is_called_and_its_error_is_final() -> None:
    file, called = written(), list[int]()
    device = ObjectDevice(file, barrier=lambda: called.append(len(file.getvalue())))
    image = jqcow.open(device, "r+", journal_size=65536)
    image.pwrite(b"more", 8192)
    before = len(called)
    image.flush()
    assert len(called) > before

    def fail() -> None:
        raise OSError(5, "lost")

    device._barrier = fail
    image.pwrite(b"lost", 8192)
    with pytest.raises(OSError, match="lost"):
        image.flush()
    with pytest.raises(jqcow.ReadOnlyError):
        image.pwrite(b"x", 0)
    image.close()
    with jqcow.open(ObjectDevice(file, barrier=lambda: None), "r+") as image:
        assert image.recovered is not None and image.check().ok


class Slow(io.RawIOBase):
    """A file that gives and takes seven bytes at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = io.BytesIO()

    def read(self, length: int = -1) -> bytes:
        return self.inner.read(min(length, 7))

    def write(self, data: Any) -> int:
        return self.inner.write(bytes(data[:7]))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.inner.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        return self.inner.truncate(size)


def test_short_reads_and_writes() -> None:
    device = ObjectDevice(Slow(), barrier=lambda: None)
    device.pwrite(b"a long enough text", 100)
    assert device.size() == 118
    assert device.pread(30, 95) == bytes(5) + b"a long enough text" + bytes(7)
    device.truncate(105)
    device.truncate(110)
    assert device.pread(20, 100) == b"a lon" + bytes(15)
    device.allocate(200, 8)
    assert device.size() == 208 and not device.punch(0, 8)


def test_object_that_became_shorter_is_an_error() -> None:
    file = io.BytesIO(bytes(100))
    device = ObjectDevice(file)
    file.truncate(50)
    with pytest.raises(OSError, match="50 of 100 bytes"):
        device.pread(100, 0)


def test_threads_share_the_one_position() -> None:
    file = written(data=bytes(range(256)) * 1024, offset=0)
    wrong = list[int]()
    with jqcow.open(file) as image:

        def read(first: int) -> None:
            for at in range(first, 262144 - 512, 8192):
                if image.pread(512, at) != bytes((at + i) % 256 for i in range(512)):
                    wrong.append(at)

        threads = [threading.Thread(target=read, args=(first * 100,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("given", [None, 5, object(), b"".join])
def test_no_device(given: object) -> None:
    with pytest.raises(TypeError, match="nor read and seek"):
        as_device(given)
    with pytest.raises(TypeError, match="has no"):
        ObjectDevice(io.BytesIO().getbuffer())
    with pytest.raises(TypeError, match="has no write and no truncate"):
        ObjectDevice(ReadOnly(), barrier=lambda: None)


class ReadOnly:
    def read(self, length: int) -> bytes:
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0


# Below


def overlay(name: str, backing_format: str, below: Any, data: bytes = b"above") -> io.BytesIO:
    return written(
        data=data, offset=0, backing_file=name, backing_format=backing_format, backing=lambda named: below
    )


def test_below_may_be_a_device_of_either_format() -> None:
    raw = io.BytesIO(b"raw" * 4096)
    over_raw = overlay("base.raw", "raw", raw)
    with jqcow.open_device(over_raw, backing=raw) as image:
        assert image.pread(8, 0) == b"above" + (b"raw" * 3)[5:8]
        kinds = {extent.depth for extent in image.extents() if extent.holds_data}
        assert kinds == {0, 1}
    files = {"base.raw": raw, "middle.qcow2": over_raw}
    asked = []

    def find(named: jqcow.NamedFile) -> io.BytesIO:
        asked.append(named.name)
        return files[named.name]

    device = ObjectDevice(io.BytesIO(), barrier=lambda: None)
    below = {"backing_file": "middle.qcow2", "backing_format": "qcow2", "backing": find}
    with jqcow.create_on_device(device, MIB, **below) as image:
        image.pwrite(b"top", 0)
        assert image.pread(5, 0) == b"topve"
    assert asked == ["middle.qcow2", "base.raw"]
    with jqcow.open_device(device, backing=find) as image:
        assert image.pread(9, 0) == b"topve" + (b"raw" * 3)[5:9]


def test_below_may_be_an_open_image() -> None:
    base = jqcow.open(written(data=b"base", offset=0))
    file = overlay("anything", "qcow2", base, b"")
    base = jqcow.open(written(data=b"base", offset=0))
    with jqcow.open_device(file, backing=base) as image:
        assert image.pread(4, 0) == b"base"
    assert base.closed


def test_chain_that_comes_back_ends() -> None:
    file = overlay("me.qcow2", "qcow2", jqcow.open(written()))
    with pytest.raises(jqcow.UnsupportedFeatureError, match=f"more than {MAX_OWN_IMAGES}"):
        jqcow.open_device(file, backing=lambda named: io.BytesIO(file.getvalue()))


def test_what_is_named_and_not_given_is_refused() -> None:
    file = overlay("base.raw", "raw", io.BytesIO(b"raw"))
    with pytest.raises(jqcow.FileAccessDenied):
        jqcow.open(file, allow_files=True)
    with pytest.raises(jqcow.FileAccessDenied):
        jqcow.open_device(file)
    with pytest.raises(TypeError, match="nor read and seek"):
        jqcow.open_device(file, backing=lambda named: "base.raw")  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="force_share"):
        jqcow.open(file, force_share=True)


def test_local_overlay_over_a_remote_base(tmp_path: Path) -> None:
    """The way to work on a base that is somewhere else: changes go into a file, with its locks."""
    remote = io.BytesIO(b"remote" * 100_000)
    create_overlay(tmp_path / "mine.qcow2", 1 << 20, backing_file=Path("there.raw"), backing_format="raw")
    device = FileDevice.open(tmp_path / "mine.qcow2", writable=True)
    with jqcow.open_device(device, "r+", backing=lambda named: remote) as image:
        image.pwrite(b"mine", 6)
        image.flush()
        assert image.pread(12, 0) == b"remoteminete"
    assert remote.getvalue()[:12] == b"remoteremote"
    (tmp_path / "there.raw").write_bytes(remote.getvalue())
    with jqcow.open(tmp_path / "mine.qcow2", allow_files=True) as image:
        assert image.pread(12, 0) == b"remoteminete"


def test_paths_may_be_of_pathlib(tmp_path: Path) -> None:
    base, other = tmp_path / "base.qcow2", tmp_path / "other.qcow2"
    for path in (base, other):
        jqcow.create(path, MIB).close()
    top = tmp_path / "top.qcow2"
    with jqcow.create(
        top, MIB, backing_file=base, backing_format="qcow2", data_file=tmp_path / "data"
    ) as image:
        assert image.backing_file is not None and image.backing_file.name == str(base)
        with image.transaction() as transaction:
            transaction.set_backing_file(other, "qcow2")
    with jqcow.open(top, allow_files=True) as image:
        assert image.backing_file is not None and image.backing_file.path == str(other)


def test_spooled_file_of_tempfile() -> None:
    """What rolls over to the disk meanwhile is one object all the same."""
    with tempfile.SpooledTemporaryFile(max_size=4096) as file:
        file.write(written().getvalue())
        with jqcow.open(file) as image:  # type: ignore[arg-type]
            assert image.pread(5, 4096) == b"hello"
