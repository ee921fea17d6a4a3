"""A file that was cut off: what is gone raises, what is there reads as before, and nothing is changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import jqcow
from jqcow import CorruptionError
from jqcow.cli.main import main
from jqcow.engine.medium import Medium
from jqcow.engine.request import Guard
from jqcow.engine.space import Space
from jqcow.offline.info import check_file
from jqcow.ondisk.layout import ClusterIndex, Geometry
from jqcow.testing import SimulatedDevice

CLUSTER = 512
"""Small, so that an image has several L2 tables and an L1 table of more than one cluster."""

DISK = 100 * 64 * CLUSTER
STEP = 97 * CLUSTER
"""Between the clusters that are written: most of them have an L2 table of their own."""

CLUSTERS = {offset: random.Random(offset).randbytes(CLUSTER) for offset in range(0, DISK, STEP)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image with data, zeros that keep clusters, compressed data and a snapshot."""
    path = tmp_path_factory.mktemp("truncated") / "whole.qcow2"
    with jqcow.create(path, DISK, cluster_size=CLUSTER, journal_size=1 << 16) as image:
        for number, (offset, data) in enumerate(CLUSTERS.items()):
            if number % 3:
                image.pwrite(data, offset)
            else:
                image.pwrite_compressed(data[:16] * (CLUSTER // 16), offset)
        image.write_zeroes(CLUSTER, STEP, unmap=False)
        image.create_snapshot("early")
        image.pwrite(b"late" * (CLUSTER // 4), 2 * STEP)
    return path


def contents(path: Path) -> dict[int, bytes]:
    with jqcow.open(path) as image:
        return {offset: image.pread(CLUSTER, offset) for offset in CLUSTERS}


def cut(whole: Path, target: Path, length: int) -> Path:
    target.write_bytes(whole.read_bytes()[:length])
    return target


def with_data_last(path: Path) -> jqcow.Extent:
    """Make an image that ends with a long run of data; return that."""
    with jqcow.create(path, 8 << 20, journal_size=1 << 16) as image:
        image.pwrite(b"l2", 7 << 20)
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"x" * (4 << 20), 0)
    with jqcow.open(path) as image:
        longest = max(image.extents(), key=lambda extent: extent.length * (extent.host_offset is not None))
    assert longest.host_offset is not None
    assert longest.host_offset + longest.length == path.stat().st_size
    return longest


def lengths(whole: Path) -> list[int]:
    """Return lengths that leave the header: of whole clusters, and some that cut the last one short."""
    size = whole.stat().st_size
    chosen = random.Random(size).sample(range(CLUSTER, size, CLUSTER), 40)
    return [*range(CLUSTER, 30 * CLUSTER, CLUSTER), *chosen, *(length + 104 for length in chosen)]


def test_every_read_is_right_or_raises(whole: Path, tmp_path: Path) -> None:
    before = contents(whole)
    lost_somewhere = 0
    for length in lengths(whole):
        path = cut(whole, tmp_path / "cut.qcow2", length)
        try:
            image = jqcow.open(path)
        except jqcow.JqcowError:
            continue
        with image:
            for offset, data in before.items():
                try:
                    found = image.pread(CLUSTER, offset)
                except CorruptionError as error:
                    lost_somewhere += 1
                    assert error.guest_range is not None
                    start, count = error.guest_range
                    assert start <= offset < start + count
                    continue
                kept = CLUSTER if length % CLUSTER == 0 else length % CLUSTER
                assert found == data or found[:kept] + data[kept:] == data, (length, offset)
    assert lost_somewhere > 1000


def test_what_is_whole_of_a_run_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "run.qcow2"
    run = with_data_last(path)
    cut(path, path, path.stat().st_size - (1 << 20))
    lost = run.end - (1 << 20)
    with jqcow.open(path) as image:
        assert image.pread(lost, 0) == b"x" * lost
        with pytest.raises(
            CorruptionError, match=f"past the end of the file.* guest offset {lost:#x}, 65536"
        ):
            image.pread(1, lost)
        with pytest.raises(CorruptionError, match="past the end"):
            list(image.extents())
        with pytest.raises(CorruptionError, match="past the end"):
            image.reads_as_zeros(1 << 20, lost)
    with jqcow.open(path, "r+") as image, pytest.raises(CorruptionError, match="past the end") as refused:
        image.pwrite(b"new", 6 << 20)
    assert "cut off" in refused.value.__notes__[0]


def test_a_file_that_ends_within_its_last_cluster_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "short.qcow2"
    run = with_data_last(path)
    cut(path, path, path.stat().st_size - 65536 + 512)
    last = run.end - 65536
    with jqcow.open(path, "r+") as image:
        assert image.pread(1024, last) == b"x" * 512 + bytes(512)
        image.pwrite(b"y" * 512, last + 512)
        assert image.pread(1024, last) == b"x" * 512 + b"y" * 512
    assert check_file(path).ok


def test_nothing_is_changed_where_something_mapped_is_lost(whole: Path, tmp_path: Path) -> None:
    size = whole.stat().st_size
    for length in range(size - 40 * CLUSTER, size, CLUSTER):
        path = cut(whole, tmp_path / "cut.qcow2", length)
        with jqcow.open(path, "r+") as image:
            changes: list[Callable[[], object]] = [
                lambda: image.pwrite(b"new", 5 * CLUSTER),
                lambda: image.create_snapshot("no"),
                lambda: image.resize(DISK + CLUSTER),
            ]
            for change in changes:
                with pytest.raises(CorruptionError) as refused:
                    change()
                assert "past the end of the file" in str(refused.value)
        assert path.read_bytes() == whole.read_bytes()[:length]


def test_leaks_past_the_end_are_no_loss(tmp_path: Path) -> None:
    path = tmp_path / "leaks.qcow2"
    with jqcow.create(path, 1 << 20, cluster_size=4096, journal_size=1 << 16) as image:
        image.pwrite(b"x" * 4096, 0)
    end = path.stat().st_size // 4096
    with path.open("r+b") as file:
        # The refcount block is the third cluster of a new image.
        file.seek(2 * 4096 + 2 * end)
        file.write(b"\0\1" * 8)
    assert check_file(path).leaks == 8
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"z" * 65536, 131072)
        assert image.pread(65536, 131072) == b"z" * 65536
        assert image.pread(4096, 0) == b"x" * 4096
    assert not check_file(path).errors


@pytest.mark.parametrize("command", ["convert", "verify", "map", "check"])
def test_commands_tell_it(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = cut(whole, tmp_path / "cut.qcow2", whole.stat().st_size - 8 * CLUSTER)
    target = tmp_path / "target"
    arguments = {
        "convert": ["convert", "-q", str(path), str(target)],
        "verify": ["convert", "--verify", str(path), str(target)],
        "map": ["map", "--output=json", str(path)],
        "check": ["check", str(path)],
    }[command]
    assert main(arguments) == (2 if command == "check" else 1)
    assert "past the end of the file" in capsys.readouterr().err
    assert not target.exists()


def test_a_live_image_reaches_as_far_as_its_checkpoint_will() -> None:
    device = SimulatedDevice(bytes(8 * CLUSTER))
    geometry = Geometry(9)
    medium = Medium(device)
    space = Space(medium, geometry, Guard(medium))
    assert space.reaches(8 * CLUSTER)
    assert not space.reaches(8 * CLUSTER + 1)
    space.find_used_end = lambda: ClusterIndex(12)
    assert space.reaches(12 * CLUSTER)
    assert not space.reaches(12 * CLUSTER + 1)
    space.frontier = ClusterIndex(20)
    assert space.reaches(20 * CLUSTER)
    # What another program appended meanwhile is there, too.
    device.truncate(30 * CLUSTER)
    assert space.reaches(30 * CLUSTER)
