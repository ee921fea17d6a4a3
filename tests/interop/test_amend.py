"""Amendments as QEMU makes them: the same `qemu-img info` and bytes after both, and nothing for check."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.cli.main import main
from jqcow.errors import UnsupportedFeatureError
from jqcow.offline.amend import amend
from jqcow.ondisk.amendment import AmendOptions
from tests.support.qemu import check_clean, done, qemu_io, run

MIB = 1 << 20
SIZE = 24 * MIB
OWN_TO_THE_FILE = {"actual-size", "children", "filename"}


@dataclass
class Sample:
    """An image by QEMU, with what its disk and its snapshots hold."""

    path: Path
    snapshots: int

    @classmethod
    def make(cls, folder: Path, chance: random.Random) -> Sample:
        """Return an image of some kind, with zeros of all kinds, perhaps over another file."""
        path = folder / "sample.qcow2"
        version = chance.choice(("0.10", "1.1"))
        options = f"cluster_size={chance.choice((512, 4096, 65536))},compat={version}"
        if version == "1.1" and chance.random() < 0.3:
            options += ",lazy_refcounts=on"
        below = ["-b", folder / "base.qcow2", "-F", "qcow2"] if chance.random() < 0.5 else []
        done("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *below, path, str(SIZE))
        sample = cls(path, chance.randrange(3))
        for layer in range(sample.snapshots + 1):
            qemu_io(path, *(_some_request(chance) for _ in range(6)))
            if layer < sample.snapshots:
                done("qemu-img", "snapshot", "-c", f"snapshot-{layer}", path)
        return sample

    def read(self, path: Path | None = None) -> list[bytes]:
        """Return the disk and its snapshots, as QEMU reads them."""
        chosen = [[], *(["-l", f"snapshot.name=snapshot-{layer}"] for layer in range(self.snapshots))]
        return [_converted(path or self.path, *which) for which in chosen]


def _some_request(chance: random.Random) -> str:
    what = chance.choice(("write -P 5", "write -z", "write -z -u", "discard"))
    offset = chance.randrange(60) * 4096 * chance.choice((1, 64))
    return f"{what} {offset} {chance.randrange(1, 40) * 4096}"


def _converted(path: Path, *which: str) -> bytes:
    raw = path.with_suffix(".raw")
    done("qemu-img", "convert", "-O", "raw", *which, path, raw)
    return raw.read_bytes()


def _info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done("qemu-img", "info", "--output=json", path))
    return {key: value for key, value in found.items() if key not in OWN_TO_THE_FILE}


def _options(chance: random.Random) -> AmendOptions:
    options: AmendOptions = {"compat": chance.choice(("0.10", "1.1"))}
    if options["compat"] == "1.1":
        if chance.random() < 0.6:
            options["refcount_bits"] = chance.choice((2, 4, 8, 16, 32, 64))
        if chance.random() < 0.5:
            options["lazy_refcounts"] = chance.random() < 0.5
    return options


def _in_words(options: AmendOptions) -> str:
    words = {True: "on", False: "off"}
    return ",".join(f"{key}={words.get(value, value)}" for key, value in options.items())  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a file to lie below."""
    folder = tmp_path_factory.mktemp("amend")
    done("qemu-img", "create", "-q", "-f", "qcow2", folder / "base.qcow2", str(SIZE // 2))
    qemu_io(folder / "base.qcow2", f"write -P 1 0 {SIZE // 2}")
    return folder


@pytest.mark.parametrize("seed", range(12))
def test_amended_as_by_qemu(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    sample, theirs = Sample.make(folder, chance), folder / "theirs.qcow2"
    shutil.copy(sample.path, theirs)
    content, options = sample.read(), _options(chance)
    done("qemu-img", "amend", "-o", _in_words(options), theirs)
    amend(sample.path, **options)
    check_clean(sample.path)
    assert sample.read() == content
    assert _info(sample.path) == _info(theirs)
    # Each goes on with what the other made.
    qemu_io(sample.path, "write -P 8 1M 1M", "write -z 3M 1M", "discard 0 1M")
    check_clean(sample.path)
    for path in (sample.path, theirs):
        if run("qemu-img", "check", "-q", path).returncode:
            # What QEMU 7.2 leaves of snapshots in version 2 may have wrong flags.
            continue
        with jqcow.open(path, "r+", allow_files=True) as image:
            image.pwrite(b"\x21" * 70_000, 5 * MIB)
            image.write_zeroes(MIB, 2 * MIB)
            image.discard(MIB, MIB)
            with suppress(UnsupportedFeatureError):
                # Refcounts of 2 bits count no more of them.
                image.create_snapshot("by jqcow")
        check_clean(path)
        assert _converted(path)[5 * MIB : 5 * MIB + 70_000] == b"\x21" * 70_000


def test_a_size_as_by_qemu(folder: Path) -> None:
    sample, theirs = Sample.make(folder, random.Random(7)), folder / "theirs.qcow2"
    shutil.copy(sample.path, theirs)
    for size in (2 * SIZE, SIZE // 3 // 512 * 512):
        done("qemu-img", "amend", "-o", f"size={size}", theirs)
        amend(sample.path, size=size, shrink=True, allow_files=True)
        assert _info(sample.path) == _info(theirs)
        assert _converted(sample.path) == _converted(theirs)
        check_clean(sample.path)


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ("extended_l2=on", "compat=0.10"),
        ("refcount_bits=8", "compat=0.10"),
        ("compat=0.10", "refcount_bits=8"),
        ("compat=0.10", "lazy_refcounts=on"),
        ("compat=1.1", "compat=0.10,lazy_refcounts=on"),
        ("compat=1.1", "refcount_bits=3"),
    ],
)
def test_refused_as_by_qemu(tmp_path: Path, made: str, asked: str) -> None:
    path = tmp_path / "i.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", made, path, "1M")
    assert run("qemu-img", "amend", "-o", asked, path).returncode == 1
    assert main(["amend", "-o", asked, str(path)]) == 1


def test_a_kept_cluster_that_a_snapshot_reads_is_not_zeroed(tmp_path: Path) -> None:
    """QEMU keeps the cluster of zeros without unmap, though a snapshot has it too; 7.2 zeroes it then."""
    path = tmp_path / "i.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    qemu_io(path, "write -P 7 0 256k")
    done("qemu-img", "snapshot", "-c", "kept", path)
    qemu_io(path, "write -z 0 256k")
    amend(path, compat="0.10")
    check_clean(path)
    assert _converted(path) == bytes(MIB)
    assert _converted(path, "-l", "snapshot.name=kept")[: 256 << 10] == b"\7" * (256 << 10)
