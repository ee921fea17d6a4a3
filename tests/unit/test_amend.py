"""jqcow.offline.amend and the command: what changes, what is refused, and that records stay small."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.cli.main import main
from jqcow.errors import CorruptionError, FileAccessDenied, UnsupportedFeatureError
from jqcow.image.amending import AmendReport, amend_image
from jqcow.offline.amend import amend
from jqcow.ondisk import layout
from jqcow.testing import Fault, FaultPlan, SimulatedDevice
from tests.support.patients import Tables

MIB = 1 << 20
CLUSTER = 4096


def make(path: Path, size: int = MIB, **options: Any) -> Path:
    with jqcow.create(path, size, cluster_size=CLUSTER, **options) as image:
        image.pwrite(b"data" * 4096, 0)
    return path


def test_all_at_once_and_back(tmp_path: Path) -> None:
    path = make(tmp_path / "i.qcow2", compat="0.10")
    report = amend(path, compat="1.1", refcount_bits=64, lazy_refcounts=True, size=2 * MIB)
    assert report == AmendReport(compat=True, lazy_refcounts=True, refcount_bits=True, size=True)
    with jqcow.open(path) as image:
        found = image.info()
        assert (found.version, found.refcount_bits, found.lazy_refcounts) == (3, 64, True)
        assert image.size == 2 * MIB
        assert image.check().ok
    assert amend(path, compat="0.10", refcount_bits=16, size=MIB, shrink=True).changed
    with jqcow.open(path) as image:
        assert image.info().version == 2
        assert image.pread(8, 0) == b"datadata"
        assert image.check().ok


def test_what_is_so_already_changes_no_byte(tmp_path: Path) -> None:
    path = make(tmp_path / "i.qcow2")
    before = path.read_bytes()
    assert not amend(path, compat="1.1", refcount_bits=16, lazy_refcounts=False, size=MIB).changed
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"compat": "0.10", "lazy_refcounts": True}, ValueError),
        ({"compat": "0.10", "refcount_bits": 8}, ValueError),
        ({"refcount_bits": 7}, ValueError),
        ({"size": MIB // 2}, ValueError),
        ({"size": 513}, ValueError),
        ({"refcount_bits": 1}, UnsupportedFeatureError),
    ],
)
def test_what_is_refused_changes_no_byte(tmp_path: Path, options: Any, error: type[Exception]) -> None:
    path = make(tmp_path / "i.qcow2")
    with jqcow.open(path, "r+") as image:
        image.create_snapshot("one")
    before = path.read_bytes()
    with pytest.raises(error):
        amend(path, **options)
    assert path.read_bytes() == before


def test_zero_flags_go_in_records_of_bounded_size() -> None:
    device = SimulatedDevice()
    tables = 64
    reach = CLUSTER // 8 * CLUSTER
    with (
        jqcow.create_on_device(device, tables * reach, cluster_size=CLUSTER, journal_size=65536) as image,
        image.transaction() as transaction,
    ):
        transaction.set_backing_file("base", "raw")
        for table in range(tables):
            transaction.hide_below(16 * CLUSTER, table * reach)
    device.reopen()
    image = jqcow.open_device(device, "r+", journal_size=65536, backing=_Ones(tables * reach))
    calls: list[tuple[int, int]] = []
    report = amend_image(image, {"compat": "0.10"}, lambda *call: calls.append(call))
    assert report.zero_clusters == 16 * tables
    assert calls[-1] == (tables, tables)
    journal = image.info().journal
    assert journal is not None
    # It would have had to grow for one record of all.
    assert journal.length == 65536
    assert journal.sequence > tables // 8
    image.close()
    device.reopen()
    with jqcow.open_device(device, backing=_Ones(tables * reach)) as image:
        assert image.info().version == 2
        assert all(image.pread(16 * CLUSTER, at * reach) == bytes(16 * CLUSTER) for at in range(tables))
        assert image.pread(1, 16 * CLUSTER) == b"\1"
        assert image.check().ok


class _Ones:
    """A disk full of ones."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = b"\1" * len(buffer)

    def reads_as_zeros(self, length: int, offset: int) -> bool:
        return False

    def close(self) -> None:
        pass


def test_a_new_width_is_one_small_record() -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, 64 * MIB, cluster_size=512, journal_size=65536) as image:
        image.pwrite(b"x" * 8 * MIB, 0)
        image.close()
    device.reopen()
    image = jqcow.open_device(device, "r+", journal_size=65536)
    amend_image(image, {"refcount_bits": 64})
    journal = image.info().journal
    assert journal is not None
    # The new blocks take 128 KiB and more.
    assert journal.length == 65536
    image.close()
    device.reopen()
    with jqcow.open_device(device) as image:
        assert image.check().ok


@pytest.mark.parametrize("at", range(1, 12))
def test_a_host_that_fails_leaves_the_old_format(at: int) -> None:
    device = SimulatedDevice()
    with jqcow.create_on_device(device, MIB, cluster_size=CLUSTER, journal_size=65536) as image:
        image.pwrite(b"x" * CLUSTER, 0)
    device.reopen()
    image = jqcow.open_device(device, "r+", journal_size=65536)
    device.faults = plan = FaultPlan(Fault(errno.EIO, at=at))
    try:
        amend_image(image, {"compat": "0.10"})
    except OSError:
        assert image.info().version == 3
    else:
        assert not plan.fired
    device.faults = None
    image.close()
    device.reopen()
    with jqcow.open_device(device) as image:
        assert image.info().version == (3 if plan.fired else 2)
        assert image.check().ok


def test_a_zero_flag_in_version_2_does_not_become_zeros(tmp_path: Path) -> None:
    path = make(tmp_path / "i.qcow2", compat="0.10")
    tables = Tables(path.read_bytes())
    tables.set_entry(tables.l2, tables.entry(tables.l2) | 1)
    path.write_bytes(tables.image)
    with pytest.raises(CorruptionError, match="zero flag"):
        amend(path, compat="1.1")
    assert path.read_bytes() == bytes(tables.image)


def test_only_a_size_opens_what_lies_below(tmp_path: Path) -> None:
    jqcow.create(tmp_path / "base.qcow2", MIB).close()
    path = tmp_path / "i.qcow2"
    jqcow.create(path, MIB, backing_file="base.qcow2", backing_format="qcow2").close()
    (tmp_path / "base.qcow2").rename(tmp_path / "moved.qcow2")
    amend(path, lazy_refcounts=True)
    with pytest.raises(FileAccessDenied):
        amend(path, size=2 * MIB)
    (tmp_path / "moved.qcow2").rename(tmp_path / "base.qcow2")
    assert amend(path, size=2 * MIB, allow_files=True).size


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(make(tmp_path / "i.qcow2"))
    assert main(["amend", "-o", "compat=v2", path]) == 0
    assert capsys.readouterr().out == f"{path}: compat amended.\n"
    assert main(["amend", "-o", "compat=1.1", "-o", "refcount_bits=8", "--output=json", path]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "compat": True,
        "lazy-refcounts": False,
        "refcount-bits": True,
        "size": False,
        "data-file": False,
        "data-file-raw": False,
        "zero-clusters": 0,
    }
    assert main(["amend", "-q", "-p", "-o", "lazy_refcounts=on,size=2M", path]) == 0
    assert main(["amend", "-o", "data_file_raw=off", path]) == 0
    assert "nothing to change" in capsys.readouterr().out
    assert main(["amend", "-o", "size=1M", path]) == 1
    assert "would be lost" in capsys.readouterr().err
    assert main(["amend", "--shrink", "-o", "size=1M", path]) == 0


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("backing_file=x", "jqcow rebase"),
        ("backing_fmt=raw", "jqcow rebase"),
        ("data_file=x", "external data file"),
        ("data_file_raw=on", "existing image"),
        ("cluster_size=65536", "new images"),
        ("compression_type=zstd", "new images"),
        ("extended_l2=on", "new images"),
        ("preallocation=off", "new images"),
        ("encryption=off", "new images"),
        ("encrypt.state=active", "jqcow passphrase"),
        ("nocow=on", "no such option"),
        ("compat", "needs a value"),
        ("compat=0.11", "0.10 or 1.1"),
        ("refcount_bits=3", "not 3"),
        ("refcount_bits=many", "number"),
        ("lazy_refcounts=maybe", "on or off"),
        ("", "no option"),
    ],
)
def test_options_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, why: str
) -> None:
    path = make(tmp_path / "i.qcow2")
    before = path.read_bytes()
    assert main(["amend", "-o", option, str(path)]) == 1
    assert why in capsys.readouterr().err
    assert path.read_bytes() == before


def test_raw_files_have_no_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["amend", "-f", "raw", "-o", "size=1M", str(tmp_path / "raw")]) == 1
    assert "raw file" in capsys.readouterr().err


def test_a_crashed_image_is_recovered_first(tmp_path: Path) -> None:
    path = make(tmp_path / "i.qcow2")
    image = jqcow.open(path, "r+")
    image.pwrite(b"after" * 1000, CLUSTER * 20)
    image.flush()
    live = path.read_bytes()
    image.close()
    path.write_bytes(live)
    amend(path, refcount_bits=32)
    with jqcow.open(path) as image:
        assert image.pread(5, CLUSTER * 20) == b"after"
        assert image.check().ok


def test_a_table_that_is_too_large_is_refused_before_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "i.qcow2"
    with jqcow.create(path, 4 * MIB, cluster_size=512, journal_size=65536) as image:
        image.pwrite(b"x" * 3 * MIB, 0)
    before = path.read_bytes()
    # 64 blocks of 64 refcounts count 2 MiB of clusters.
    monkeypatch.setattr(layout, "MAX_REFCOUNT_TABLE_BYTES", 512)
    with pytest.raises(UnsupportedFeatureError, match="refcount table"):
        amend(path, refcount_bits=64)
    assert path.read_bytes() == before
    assert amend(path, refcount_bits=32, journal_size=65536).changed
