"""Committing into a base and changing the base, beside QEMU's commit and rebase."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import jqcow
from jqcow.offline.commit import commit
from jqcow.offline.rebase import rebase
from tests.interop.rounds import RawModel, Rounds
from tests.interop.test_backing import CHAINS, MIB, make_chain, scribble
from tests.support.qemu import check_clean, compare, done, qemu_io


def extents_of(path: Path) -> int:
    """Return how many bytes an overlay has of its own."""
    with jqcow.open(path, allow_files=True) as image:
        own = (extent for extent in image.extents() if extent.depth == 0 and extent.kind != "unallocated")
        return sum(extent.length for extent in own)


@pytest.mark.parametrize(("base_format", "sizes", "cluster_bytes"), CHAINS)
def test_commit(tmp_path: Path, base_format: str, sizes: list[int], cluster_bytes: list[int]) -> None:
    rounds = make_chain(tmp_path, base_format, sizes, cluster_bytes, seed=11)
    rounds.by_jqcow(20)
    named = f"{len(sizes) - 2}.{base_format if len(sizes) == 2 else 'qcow2'}"
    base_kind = base_format if len(sizes) == 2 else "qcow2"
    report = commit(rounds.image, allow_files=True)
    assert report.base == str(tmp_path / named) and report.emptied
    assert report.base_size == max(sizes[-2], rounds.model.size)
    assert extents_of(rounds.image) == 0
    rounds.judge()
    if base_kind == "qcow2":
        check_clean(tmp_path / named)
    # The base itself holds all of it now.
    raw = tmp_path / "base.raw"
    done("qemu-img", "convert", "-f", base_kind, "-O", "raw", tmp_path / named, raw)
    assert raw.read_bytes()[: rounds.model.size] == rounds.model.read(rounds.model.size, 0)
    rounds.by_jqcow(10)
    rounds.by_qemu(10)


def test_commit_and_keep(tmp_path: Path) -> None:
    rounds = make_chain(tmp_path, "qcow2", [4 * MIB, 4 * MIB], [65536, 4096], seed=2)
    before = rounds.image.read_bytes()
    report = commit(rounds.image, keep=True, allow_files=True)
    assert not report.emptied and report.written_bytes > 0
    assert rounds.image.read_bytes() == before
    rounds.judge()
    compare(tmp_path / "0.qcow2", rounds.model.path)


@pytest.mark.parametrize("sizes", [[MIB, 4 * MIB, 2 * MIB, 3 * MIB], [4 * MIB, 4 * MIB, 4 * MIB]])
def test_commit_through_a_chain(tmp_path: Path, sizes: list[int]) -> None:
    rounds = make_chain(tmp_path, "qcow2", sizes, [65536, 4096, 65536, 65536][: len(sizes)], seed=23)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for path in tmp_path.glob("*.qcow2"):
        shutil.copy(path, theirs)
    above = {path: path.read_bytes() for path in tmp_path.glob("*.qcow2") if path.name != "0.qcow2"}
    report = commit(rounds.image, base="0.qcow2", allow_files=True)
    assert report.base == str(tmp_path / "0.qcow2") and not report.emptied
    assert {path: path.read_bytes() for path in above} == above
    check_clean(tmp_path / "0.qcow2")
    done("qemu-img", "commit", "-q", "-b", str(theirs / "0.qcow2"), theirs / rounds.image.name)
    done("qemu-img", "compare", tmp_path / "0.qcow2", theirs / "0.qcow2")
    rounds.judge()
    with pytest.raises(ValueError, match="not in the backing chain"):
        commit(rounds.image, base="other.qcow2", allow_files=True)
    done("qemu-img", "snapshot", "-c", "kept", tmp_path / "1.qcow2")
    with pytest.raises(jqcow.UnsupportedFeatureError, match=r"1\.qcow2"):
        commit(rounds.image, base="0.qcow2", allow_files=True)


def test_what_commit_refuses(tmp_path: Path) -> None:
    rounds = make_chain(tmp_path, "qcow2", [MIB, MIB], [65536, 65536], seed=2)
    files = {path: path.read_bytes() for path in (rounds.image, tmp_path / "0.qcow2")}
    with pytest.raises(jqcow.FileAccessDenied):
        commit(rounds.image)
    with pytest.raises(ValueError, match="no backing file"):
        commit(tmp_path / "0.qcow2", allow_files=True)
    with jqcow.open(tmp_path / "0.qcow2"), pytest.raises(jqcow.ImageInUse):
        commit(rounds.image, allow_files=True)
    assert {path: path.read_bytes() for path in files} == files
    done("qemu-img", "snapshot", "-c", "kept", rounds.image)
    with pytest.raises(jqcow.UnsupportedFeatureError, match="commit of an image with internal snapshots"):
        commit(rounds.image, allow_files=True)


def other_base(folder: Path, size: int, seed: int) -> tuple[Path, RawModel]:
    path, model = folder / "other.qcow2", RawModel(folder / "other.raw", size)
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=8192", path, size)
    scribble(path, "qcow2", model, random.Random(seed))
    return path, model


@pytest.mark.parametrize(("base_format", "sizes", "cluster_bytes"), CHAINS)
@pytest.mark.parametrize("new_size", [2 * MIB + 512, 8 * MIB])
def test_safe_rebase(
    tmp_path: Path, base_format: str, sizes: list[int], cluster_bytes: list[int], new_size: int
) -> None:
    rounds = make_chain(tmp_path, base_format, sizes, cluster_bytes, seed=13)
    other_base(tmp_path, new_size, seed=1)
    report = rebase(rounds.image, "other.qcow2", "qcow2", allow_files=True)
    assert report.copied_bytes > 0
    assert '"backing-filename": "other.qcow2"' in done("qemu-img", "info", "--output=json", rounds.image)
    rounds.judge()
    rounds.by_jqcow(15)
    rounds.by_qemu(10)


@pytest.mark.parametrize(("base_format", "sizes", "cluster_bytes"), CHAINS)
def test_rebase_to_nothing(
    tmp_path: Path, base_format: str, sizes: list[int], cluster_bytes: list[int]
) -> None:
    rounds = make_chain(tmp_path, base_format, sizes, cluster_bytes, seed=17)
    rebase(rounds.image, None, allow_files=True)
    for path in tmp_path.iterdir():
        if path.name[0].isdigit():
            path.unlink()
    rounds.judge()
    with jqcow.open(rounds.image) as image:
        assert image.backing_file is None
    rounds.by_qemu(10)


def test_rebase_of_subclusters(tmp_path: Path) -> None:
    """What shows from below begins in the middle of clusters, also where the old base has zeros."""
    base, model = tmp_path / "base.raw", RawModel(tmp_path / "model", MIB)
    other, image = tmp_path / "other.raw", tmp_path / "image"
    base.write_bytes(bytes(MIB // 2) + b"b" * (MIB // 2))
    other.write_bytes(b"o" * MIB)
    options = ["-o", "extended_l2=on,cluster_size=16k", "-b", "base.raw", "-F", "raw"]
    done("qemu-img", "create", "-q", "-f", "qcow2", *options, image)
    model.write(base.read_bytes(), 0)
    for offset in (1536, 70144, 190464, MIB - 16896):
        done("qemu-io", "-c", f"write -P 0x77 {offset} 512", image)
        model.write(b"w" * 512, offset)
    rebase(image, "other.raw", "raw", allow_files=True)
    base.unlink()
    rounds = Rounds(image, model, 16384, random.Random(5))
    rounds.judge()
    rounds.by_jqcow(10)
    rounds.by_qemu(5)


def test_rebase_to_the_same_content_copies_nothing(tmp_path: Path) -> None:
    rounds = make_chain(tmp_path, "qcow2", [4 * MIB, 4 * MIB], [65536, 65536], seed=19)
    done("qemu-img", "convert", "-f", "qcow2", "-O", "raw", tmp_path / "0.qcow2", tmp_path / "copy.raw")
    before = extents_of(rounds.image)
    assert rebase(rounds.image, "copy.raw", "raw", allow_files=True).copied_bytes == 0
    assert extents_of(rounds.image) == before
    rounds.judge()


def test_unsafe_rebase_opens_nothing(tmp_path: Path) -> None:
    rounds = make_chain(tmp_path, "qcow2", [4 * MIB, 4 * MIB], [65536, 65536], seed=23)
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "0.qcow2", tmp_path / "moved" / "base.qcow2")
    rebase(rounds.image, "moved/base.qcow2", "qcow2", unsafe=True)
    rounds.judge()
    rebase(rounds.image, "not/there.raw", "raw", unsafe=True)
    with pytest.raises(FileNotFoundError):
        jqcow.open(rounds.image, allow_files=True)
    with pytest.raises(jqcow.UnsupportedFeatureError):
        rebase(rounds.image, "nbd:host", "raw", unsafe=True)


def test_rebase_refuses_snapshots(tmp_path: Path) -> None:
    rounds = make_chain(tmp_path, "qcow2", [MIB, MIB], [65536, 65536], seed=2)
    other_base(tmp_path, MIB, 3)
    done("qemu-img", "snapshot", "-c", "kept", rounds.image)
    with pytest.raises(jqcow.UnsupportedFeatureError, match="rebase of an image with internal snapshots"):
        rebase(rounds.image, "other.qcow2", "qcow2", allow_files=True)
    check_clean(rounds.image)
    rounds.judge()


def test_created_overlays(tmp_path: Path) -> None:
    """An overlay made by jqcow: QEMU reads the base through it."""
    base = tmp_path / "base.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", base, 4 * MIB)
    qemu_io(base, "write -P 9 1M 1M")
    top = tmp_path / "top.qcow2"
    with jqcow.create(top, 6 * MIB, backing_file="base.qcow2", backing_format="qcow2") as image:
        assert image.pread(MIB, MIB) == b"\x09" * MIB
        image.pwrite(b"\x08" * 1000, MIB + 500)
    check_clean(top)
    qemu_io(top, "read -P 9 1M 500", f"read -P 8 {MIB + 500} 1000", "read -P 0 4M 2M")
    with pytest.raises(FileNotFoundError):
        jqcow.create(tmp_path / "no.qcow2", MIB, backing_file="missing.raw", backing_format="raw")
    with pytest.raises(ValueError, match="format"):
        jqcow.create(tmp_path / "no.qcow2", MIB, backing_file="base.qcow2")
    with pytest.raises(jqcow.FileAccessDenied):
        jqcow.create(tmp_path / "no.qcow2", MIB, backing_file="top.qcow2", backing_format="qcow2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.qcow2", "top.qcow2"]
    with jqcow.create(
        tmp_path / "third.qcow2", MIB, backing_file="top.qcow2", backing_format="qcow2", allow_files=True
    ) as image:
        assert image.pread(1, MIB - 1) == b"\0"


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("compression_type", ["zlib", "zstd"])
def test_created_with_other_widths_and_compression(
    tmp_path: Path, bits: int, compression_type: jqcow.image.opening.CompressionType
) -> None:
    path = tmp_path / "image.qcow2"
    with jqcow.create(
        path, 8 * MIB, cluster_size=4096, refcount_bits=bits, compression_type=compression_type
    ) as image:
        for offset in range(0, 4 * MIB, MIB):
            image.pwrite_compressed(bytes(range(256)) * (MIB // 256), offset)
        image.pwrite(b"\x01" * 70_000, 5 * MIB + 700)
        if bits >= 8:
            image.create_snapshot("kept")
        else:
            # As in QEMU: what is packed side by side leaves no room for more references.
            with pytest.raises(jqcow.UnsupportedFeatureError, match="a refcount above"):
                image.create_snapshot("kept")
        image.pwrite(b"\x02" * 5000, 100)
        assert image.check().ok
    check_clean(path)
    qemu_io(path, "read -P 2 100 5000", f"read -P 1 {5 * MIB + 700} 70000")
    done("qemu-img", "convert", "-O", "raw", path, tmp_path / "read.raw")
    expected = bytearray(bytes(range(256)) * (4 * MIB // 256) + bytes(4 * MIB))
    expected[100:5100] = b"\x02" * 5000
    expected[5 * MIB + 700 : 5 * MIB + 70_700] = b"\x01" * 70_000
    assert (tmp_path / "read.raw").read_bytes() == bytes(expected)
