"""Does a compacted image take less, read the same in its disk and all snapshots, and stay standard?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.main import main
from jqcow.offline.compact import _in_both, compact
from tests.support.qemu import done

MIB = 1 << 20
CLUSTER = 65536


def contents(path: Path) -> dict[str | None, bytes]:
    """Return what the disk and each snapshot hold."""
    with jqcow.open(path) as image:
        found: dict[str | None, bytes] = {None: image.pread(image.size, 0)}
        names = [snapshot.id for snapshot in image.snapshots()]
    for name in names:
        with jqcow.open(path, snapshot=name) as image:
            found[name] = image.pread(image.size, 0)
    return found


def zeros_written(path: Path, **options: object) -> None:
    """Make an image of 8 MiB, half of which is zeros that were written out."""
    with jqcow.create(path, 8 * MIB, **options) as image:  # type: ignore[arg-type]
        image.pwrite(random.Random(1).randbytes(4 * MIB), 0)
        image.pwrite(bytes(4 * MIB), 4 * MIB)


def test_zeros_of_the_disk_are_freed(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    zeros_written(path)
    before = contents(path)
    report = compact(path)
    assert report.zeroed_bytes == 4 * MIB
    assert report.before_bytes - report.after_bytes >= 4 * MIB - CLUSTER
    assert report.after_bytes == path.stat().st_blocks * 512
    assert contents(path) == before
    done("qemu-img", "check", "-q", str(path))
    assert compact(path).zeroed_bytes == 0


def test_what_a_snapshot_shares_stays(tmp_path: Path) -> None:
    """Freeing it for the disk alone would cost tables, and save nothing."""
    path = tmp_path / "a.qcow2"
    zeros_written(path)
    with jqcow.open(path, "r+") as image:
        image.create_snapshot("one")
        image.pwrite(bytes(MIB), 0)
    before = contents(path)
    assert compact(path).zeroed_bytes == MIB
    assert contents(path) == before
    done("qemu-img", "check", "-q", str(path))


def test_what_qemu_freed_is_punched(tmp_path: Path) -> None:
    """QEMU writes over compressed clusters, and leaves what they took in the file."""
    path = tmp_path / "a.qcow2"
    with jqcow.create(path, 8 * MIB) as image:
        image.pwrite_compressed(random.Random(1).randbytes(4 * MIB).hex().encode(), 0)
    done("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 4M", str(path))
    before = contents(path)
    report = compact(path)
    assert report.punched_bytes >= MIB and report.zeroed_bytes == 0
    assert contents(path) == before
    done("qemu-img", "check", "-q", str(path))


@pytest.mark.parametrize(
    "options",
    [
        {"preallocation": "full"},
        {"preallocation": "metadata", "extended_l2": True},
        {"cluster_size": 4096, "refcount_bits": 1},
        {"cluster_size": 512},
        {"compat": "0.10"},
        {"encryption": jqcow.Encryption(b"word", iter_time=1)},
    ],
    ids=str,
)
def test_kinds_of_images(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "a.qcow2"
    secret = b"word" if "encryption" in options else None
    with jqcow.create(path, 2 * MIB + 1536, **options) as image:  # type: ignore[arg-type]
        image.pwrite(b"kept" * 50000, 0)
        image.pwrite(bytes(MIB + 1536), MIB)
        before = image.pread(image.size, 0)
    report = compact(path, passphrase=secret)
    assert report.zeroed_bytes >= MIB and report.after_bytes < report.before_bytes
    with jqcow.open(path, passphrase=secret) as image:
        assert image.pread(image.size, 0) == before and image.check().ok
        assert image.reads_as_zeros(MIB, MIB)


def test_over_a_backing_file_zeros_hide_it(tmp_path: Path) -> None:
    with jqcow.create(tmp_path / "base.qcow2", 2 * MIB) as image:
        image.pwrite(b"b" * 2 * MIB, 0)
    path = tmp_path / "top.qcow2"
    with jqcow.create(path, 2 * MIB, backing_file="base.qcow2", backing_format="qcow2") as image:
        image.pwrite(bytes(MIB), 0)
    with pytest.raises(jqcow.FileAccessDenied):
        compact(path)
    assert compact(path, allow_files=True).zeroed_bytes == MIB
    with jqcow.open(path, allow_files=True) as image:
        assert image.pread(2 * MIB, 0) == bytes(MIB) + b"b" * MIB


def test_damaged_image_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    zeros_written(path)
    with path.open("r+b") as file:
        # All refcounts but those of the first clusters.
        file.seek(2 * CLUSTER + 20)
        file.write(bytes(1000))
    before = path.read_bytes()
    with pytest.raises(jqcow.JqcowError, match="repair"):
        compact(path)
    assert path.read_bytes() == before


def test_crashed_image_is_recovered_first(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    zeros_written(path)
    image = jqcow.open(path, "r+")
    image.pwrite(bytes(MIB), 0)
    image.flush()
    copy = path.read_bytes()
    image.close()
    path.write_bytes(copy)
    assert compact(path).zeroed_bytes == 5 * MIB
    done("qemu-img", "check", "-q", str(path))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.qcow2"
    zeros_written(path)
    assert main(["compact", "--output=json", "--progress=json", str(path)]) == 0
    out, told = capsys.readouterr()
    assert json.loads(out)["zeroed-bytes"] == 4 * MIB
    last = json.loads(told.splitlines()[-1])
    assert set(last) == {"transferred", "size", "elapsed", "description"} and last["description"] == "compact"
    assert main(["compact", str(path)]) == 0
    assert "0 B of zeros freed" in capsys.readouterr().out


def test_what_two_rows_have_in_common() -> None:
    chance = random.Random(2)
    for _ in range(200):
        rows = [sorted(chance.sample(range(60), 8)) for _ in range(2)]
        ranges = [list(zip(row[::2], row[1::2], strict=True)) for row in rows]
        expected = set.intersection(*({at for one in row for at in range(*one)} for row in ranges))
        assert {at for one in _in_both(*ranges) for at in range(*one)} == expected
