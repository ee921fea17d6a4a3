"""The disk as a file: `io.BufferedRandom` on an image does what it does on bytes in memory."""

from __future__ import annotations

import io
import random
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import jqcow
from jqcow.testing import SimulatedDevice

DISK_BYTES = 100_352
STEPS = 400


@pytest.fixture
def image() -> Iterator[jqcow.Image]:
    with jqcow.create_on_device(
        SimulatedDevice(), DISK_BYTES, cluster_size=1024, journal_size=64 << 10
    ) as image:
        yield image


def step(chance: random.Random, ours: io.BufferedRandom, theirs: io.BytesIO) -> None:
    """Do one random thing to both files, within the disk, and compare what comes back."""
    position = chance.randrange(DISK_BYTES)
    length = min(chance.choice([1, 17, 512, 5000, 30_000]), DISK_BYTES - position)
    match chance.choice(["read", "write", "seek", "relative", "end", "line", "readinto", "flush"]):
        case "read":
            assert ours.read(length) == theirs.read(length)
        case "write":
            data = chance.randbytes(length)
            ours.seek(position)
            theirs.seek(position)
            assert ours.write(data) == theirs.write(data)
        case "seek":
            assert ours.seek(position) == theirs.seek(position)
        case "relative":
            distance = chance.randrange(-min(1000, ours.tell()), 1000)
            assert ours.seek(distance, io.SEEK_CUR) == theirs.seek(distance, io.SEEK_CUR)
        case "end":
            assert ours.seek(-length, io.SEEK_END) == theirs.seek(-length, io.SEEK_END)
        case "line":
            assert ours.readline(length) == theirs.readline(length)
        case "readinto":
            left, right = bytearray(length), bytearray(length)
            assert ours.readinto(left) == theirs.readinto(right)
            assert left == right
        case "flush":
            ours.flush()
    assert ours.tell() == theirs.tell()


@pytest.mark.parametrize("seed", range(12))
def test_buffered_file_is_like_bytes(image: jqcow.Image, seed: int) -> None:
    chance = random.Random(seed)
    theirs = io.BytesIO(bytes(DISK_BYTES))
    with io.BufferedRandom(image.as_file(), buffer_size=chance.choice([16, 512, 8192, 65536])) as ours:
        for _ in range(STEPS):
            step(chance, ours, theirs)
    assert image.pread(DISK_BYTES, 0) == theirs.getvalue()
    assert image.check().ok


def test_file_outlives_neither_more_nor_less_than_asked(image: jqcow.Image) -> None:
    """Closing the file leaves the image open; closing the image ends the file."""
    first, second = image.as_file(), image.as_file()
    first.close()
    assert image.pread(1, 0) == b"\0"
    image.close()
    with pytest.raises(jqcow.ImageClosedError):
        second.read(1)


def test_what_io_expects(image: jqcow.Image) -> None:
    """Its modes, what it cannot do, and that a closed file says so."""
    file = image.as_file()
    assert (file.mode, file.readable(), file.writable(), file.seekable()) == ("rb+", True, True, True)
    assert not file.isatty()
    for call in (file.fileno, file.truncate):
        with pytest.raises(io.UnsupportedOperation):
            call()
    file.seek(DISK_BYTES - 3)
    assert file.read() == bytes(3) and file.readall() == b""
    file.seek(0)
    image.pwrite(b"one\ntwo\n", 0)
    assert io.TextIOWrapper(io.BufferedReader(file), encoding="ascii").readline() == "one\n"
    file.close()
    used = (file.tell, lambda: file.seek(0), file.read, lambda: file.write(b""), file.readable, file.flush)
    for use in used:
        with pytest.raises(ValueError, match="closed"):
            use()


def test_file_of_an_image_that_is_only_read(image: jqcow.Image, tmp_path: Path) -> None:
    jqcow.create(tmp_path / "a.qcow2", DISK_BYTES).close()
    with jqcow.open(tmp_path / "a.qcow2") as read:
        file = read.as_file()
        assert file.mode == "rb" and not file.writable()
        with pytest.raises(io.UnsupportedOperation, match="reading only"):
            file.write(b"x")
        assert io.BufferedReader(file).peek(1)[:1] == b"\0"


def test_archives_and_copies(image: jqcow.Image, tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(b"notes" * 1000)
    with io.BufferedRandom(image.as_file()) as disk, tarfile.open(fileobj=disk, mode="w") as archive:
        archive.add(tmp_path / "notes", "notes")
    with tarfile.open(fileobj=image.as_file()) as archive:
        found = archive.extractfile("notes")
        assert found is not None and found.read() == b"notes" * 1000
    with (tmp_path / "copy").open("wb") as copy:
        shutil.copyfileobj(image.as_file(), copy)
    assert (tmp_path / "copy").read_bytes() == image.pread(DISK_BYTES, 0)


def test_writing_past_the_end_is_refused(image: jqcow.Image) -> None:
    file = image.as_file()
    file.seek(-10, io.SEEK_END)
    with pytest.raises(ValueError, match="not within the disk"):
        file.write(bytes(11))
    assert file.tell() == DISK_BYTES - 10
    assert file.write(bytes(10)) == 10
    assert file.read(1) == b""
    file.seek(5, io.SEEK_END)
    assert file.read(1) == b""


@pytest.mark.parametrize(("offset", "whence"), [(-1, io.SEEK_SET), (-DISK_BYTES - 1, io.SEEK_END), (0, 9)])
def test_impossible_seeks(image: jqcow.Image, offset: int, whence: int) -> None:
    with pytest.raises(ValueError, match="cannot seek"):
        image.as_file().seek(offset, whence)


def test_library_that_takes_files(image: jqcow.Image) -> None:
    """An archive is written to the disk and read back by the standard library."""
    with io.BufferedRandom(image.as_file()) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hello", b"world" * 1000)
    copy = io.BytesIO()
    shutil.copyfileobj(image.as_file(), copy)
    assert copy.tell() == DISK_BYTES
    with zipfile.ZipFile(io.BytesIO(copy.getvalue().rstrip(b"\0") + bytes(22))) as archive:
        assert archive.read("hello") == b"world" * 1000
