"""Copies of chains, snapshots and compressed images, beside those of qemu-img."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

import jqcow
from jqcow.cli.main import main
from jqcow.offline.convert import convert
from tests.interop.test_backing import CHAINS, MIB, make_chain
from tests.support.qemu import check_clean, compare, done, qemu_io, run


@pytest.mark.parametrize(("base_format", "sizes", "cluster_bytes"), CHAINS)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_chain_becomes_one_file(
    tmp_path: Path, base_format: str, sizes: list[int], cluster_bytes: list[int], compressed: bool
) -> None:
    rounds = make_chain(tmp_path, base_format, sizes, cluster_bytes, seed=31)
    target = tmp_path / "flat.qcow2"
    report = convert(rounds.image, target, allow_files=True, compressed=compressed, verify=True)
    assert report.virtual_size == rounds.model.size
    check_clean(target)
    compare(target, rounds.model.path)
    with jqcow.open(target) as image:
        assert image.backing_file is None
    raw = tmp_path / "flat.raw"
    convert(rounds.image, raw, target_format="raw", allow_files=True)
    assert raw.read_bytes() == rounds.model.read(rounds.model.size, 0)


def test_a_chain_is_not_followed_unasked(tmp_path: Path) -> None:
    rounds = make_chain(tmp_path, "qcow2", [MIB, MIB], [65536, 65536], seed=1)
    with pytest.raises(jqcow.FileAccessDenied):
        convert(rounds.image, tmp_path / "flat.qcow2")
    # The base is in use as long as the chain is open: it is not replaced.
    with pytest.raises(jqcow.ImageInUse):
        convert(rounds.image, tmp_path / "0.qcow2", allow_files=True, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.qcow2", "image.qcow2", "model.raw"]


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_sources(tmp_path: Path, compression: Literal["zlib", "zstd"]) -> None:
    """What QEMU compressed, jqcow compresses anew, and QEMU reads."""
    raw = tmp_path / "source.raw"
    raw.write_bytes(b"".join(bytes([index % 251]) * 3000 for index in range(2048)))
    options = f"compression_type={compression},cluster_size=16384"
    done("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, tmp_path / "c.qcow2")
    report = convert(
        tmp_path / "c.qcow2",
        tmp_path / "again.qcow2",
        compressed=True,
        compression_type=compression,
        verify=True,
    )
    assert report.compressed_bytes > report.packed_bytes > 0
    check_clean(tmp_path / "again.qcow2")
    compare(tmp_path / "again.qcow2", raw)


def test_snapshots_are_copied_by_id_or_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, 4 * MIB)
    qemu_io(path, "write -P 1 0 1M")
    done("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 0 1M", "write -P 3 2M 64k")
    done("qemu-img", "snapshot", "-c", "two", path)
    qemu_io(path, "write -P 4 0 4M")
    for number, name in enumerate(("one", "two"), 1):
        theirs, by_name, by_id = (tmp_path / f"{name}.{kind}" for kind in ("theirs", "name", "id"))
        done("qemu-img", "convert", "-O", "raw", "-l", f"snapshot.name={name}", path, theirs)
        convert(path, by_name, target_format="raw", snapshot=name)
        assert main(["convert", "-q", "-O", "raw", "-l", str(number), str(path), str(by_id)]) == 0
        assert theirs.read_bytes() == by_name.read_bytes() == by_id.read_bytes()
    assert main(["convert", "-q", "-O", "raw", "-l", "none", str(path), str(tmp_path / "no.raw")]) == 1
    assert "no snapshot with the id or name 'none'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="raw file"):
        convert(tmp_path / "one.name", tmp_path / "no.raw", source_format="raw", snapshot="one")
    assert not (tmp_path / "no.raw").exists()


def test_the_command_follows_names_when_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = make_chain(tmp_path, "raw", [MIB, MIB], [0, 65536], seed=1)
    target = tmp_path / "flat.raw"
    assert main(["convert", "-q", "-O", "raw", str(rounds.image), str(target)]) == 1
    assert "--allow-files" in capsys.readouterr().err
    assert main(["convert", "-q", "-O", "raw", "--allow-files", str(rounds.image), str(target)]) == 0
    assert run("cmp", target, rounds.model.path).returncode == 0
