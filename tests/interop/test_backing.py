"""Backing chains, read, written and resized by jqcow and QEMU in turn; no file is opened unasked."""

from __future__ import annotations

import os
import random
import re
import subprocess
from pathlib import Path

import pytest

import jqcow
from jqcow.ondisk.naming import NamedFile
from tests.interop.rounds import RawModel, Rounds
from tests.support.qemu import check_clean, compare, done, qemu_io

MIB = 1 << 20


def make_chain(
    folder: Path, base_format: str, sizes: list[int], cluster_bytes: list[int], seed: int
) -> Rounds:
    """Make a chain by QEMU, base first, each file written at random; the model holds what the top reads."""
    chance, model = random.Random(seed), RawModel(folder / "model.raw", sizes[0])
    names = [f"{index}.{base_format if not index else 'qcow2'}" for index in range(len(sizes))]
    names[-1] = "image.qcow2"
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        path, is_base = folder / name, not index
        options = [] if is_base and base_format == "raw" else ["-o", f"cluster_size={cluster_bytes[index]}"]
        below = [] if is_base else ["-b", names[index - 1], "-F", base_format if index == 1 else "qcow2"]
        done(
            "qemu-img",
            "create",
            "-q",
            "-f",
            base_format if is_base else "qcow2",
            *options,
            *below,
            path,
            size,
        )
        model.resize(size)
        scribble(path, base_format if is_base else "qcow2", model, chance)
    return Rounds(folder / "image.qcow2", model, cluster_bytes[-1], chance)


def scribble(path: Path, image_format: str, model: RawModel, chance: random.Random) -> None:
    commands = []
    for _ in range(12):
        offset = chance.randrange(model.size // 512) * 512
        length = min(
            chance.choice((512, 4096, 70_000 // 512 * 512, 200_000 // 512 * 512)), model.size - offset
        )
        if chance.random() < 0.25:
            commands.append(f"write -z {offset} {length}")
            model.zero(length, offset)
        else:
            byte = chance.randrange(1, 256)
            commands.append(f"write -P {byte} {offset} {length}")
            model.write(bytes([byte]) * length, offset)
    done("qemu-io", "-f", image_format, *(word for command in commands for word in ("-c", command)), path)


CHAINS = [
    pytest.param("raw", [4 * MIB, 4 * MIB], [0, 65536], id="raw base"),
    pytest.param("qcow2", [4 * MIB, 4 * MIB], [65536, 65536], id="qcow2 base"),
    pytest.param("qcow2", [3 * MIB + 512, 6 * MIB + 1536], [4096, 65536], id="shorter base"),
    pytest.param("raw", [6 * MIB + 1536, 4 * MIB + 512], [0, 4096], id="longer raw base"),
    pytest.param("qcow2", [2 * MIB, 5 * MIB, 3 * MIB + 512, 4 * MIB], [512, 65536, 4096, 1024], id="depth 3"),
    pytest.param(
        "raw", [MIB, 2 * MIB, 3 * MIB, 2 * MIB, 4 * MIB], [0, 512, 2 * MIB, 65536, 512], id="depth 4"
    ),
]


@pytest.mark.parametrize(("base_format", "sizes", "cluster_bytes"), CHAINS)
def test_in_turn(tmp_path: Path, base_format: str, sizes: list[int], cluster_bytes: list[int]) -> None:
    rounds = make_chain(tmp_path, base_format, sizes, cluster_bytes, seed=len(sizes) + sizes[0])
    below = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name[0].isdigit()}
    rounds.judge()
    with jqcow.open(rounds.image, allow_files=True) as image:
        assert image.pread(image.size, 0) == rounds.model.read(rounds.model.size, 0)
    for _ in range(3):
        rounds.by_jqcow(30)
        rounds.by_qemu(15)
    assert {path: path.read_bytes() for path in below} == below


@pytest.mark.parametrize(("base_format", "sizes", "cluster_bytes"), CHAINS)
def test_resizing_shows_nothing_of_the_base(
    tmp_path: Path, base_format: str, sizes: list[int], cluster_bytes: list[int]
) -> None:
    """What a larger disk adds reads as zeros, whatever the backing file has there."""
    rounds = make_chain(tmp_path, base_format, sizes, cluster_bytes, seed=5)
    for size in (MIB + 512, 7 * MIB + 1024, 2 * MIB - 512, 2 * MIB + 512, 9 * MIB):
        rounds.resize_by_jqcow(size)
        rounds.by_jqcow(10)
    rounds.resize_by_qemu(3 * MIB + 512)
    rounds.by_jqcow(10)
    rounds.resize_by_jqcow(8 * MIB)
    rounds.by_qemu(10)


def test_snapshots_and_transactions_over_a_base(tmp_path: Path) -> None:
    rounds = make_chain(tmp_path, "qcow2", [4 * MIB, 4 * MIB], [65536, 4096], seed=3)
    before = rounds.model.read(rounds.model.size, 0)
    with jqcow.open(rounds.image, "r+", allow_files=True) as image:
        image.create_snapshot("before")
        with image.transaction() as transaction:
            transaction.pwrite(b"\1" * 100, 5000)
            transaction.discard(MIB, MIB)
            transaction.pwrite_compressed(b"\2" * 65536, 2 * MIB)
        assert image.check().ok
    rounds.model.write(b"\1" * 100, 5000)
    rounds.model.zero(MIB, MIB)
    rounds.model.write(b"\2" * 65536, 2 * MIB)
    rounds.judge()
    with jqcow.open(rounds.image, snapshot="before", allow_files=True) as image:
        assert image.pread(image.size, 0) == before
    with jqcow.open(rounds.image, "r+", allow_files=True) as image:
        image.apply_snapshot("before")
        assert image.pread(image.size, 0) == before
    check_clean(rounds.image)


def test_a_new_overlay_adds_nothing_for_what_is_zero_already(tmp_path: Path) -> None:
    """Zeroing and discarding where the base has nothing needs no entry."""
    base, top = tmp_path / "base.qcow2", tmp_path / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", base, "1T")
    qemu_io(base, "write -P 1 512G 64k")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    with jqcow.open(top, "r+", allow_files=True) as image:
        image.discard(1 << 40, 0)
        image.write_zeroes(1 << 40, 0)
        assert [
            (extent.offset, extent.kind)
            for extent in image.extents()
            if extent.depth == 0 and extent.kind == "zero"
        ] == [(1 << 39, "zero")]
    check_clean(top)


@pytest.mark.parametrize(("base_format", "sizes", "cluster_bytes"), CHAINS)
def test_copy_on_read(tmp_path: Path, base_format: str, sizes: list[int], cluster_bytes: list[int]) -> None:
    """What was read is the image's own: without its backing file it reads the same."""
    rounds = make_chain(tmp_path, base_format, sizes, cluster_bytes, seed=29)
    size = rounds.model.size
    with jqcow.open(rounds.image, "r+", allow_files=True, copy_on_read=True) as image:
        for offset in range(0, size, 70_000):
            length = min(70_000, size - offset)
            assert image.pread(length, offset) == rounds.model.read(length, offset)
        with image.transaction() as transaction:
            # Reads within change nothing: neither the transaction's nor others'.
            assert transaction.pread(size, 0) == image.pread(size, 0)
        assert not [extent for extent in image.extents() if extent.depth > 0 and extent.kind != "zero"]
        assert image.check().ok
    rounds.judge()
    done("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", rounds.image)
    compare(rounds.image, rounds.model.path)
    with pytest.raises(ValueError, match="copy_on_read"):
        jqcow.open(rounds.image, copy_on_read=True)


# What may be opened


def two_files(folder: Path, stored: str = "base.qcow2") -> Path:
    base, top = folder / "base.qcow2", folder / "image.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", base, MIB)
    qemu_io(base, "write -P 7 0 64k")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", stored, "-F", "qcow2", top, MIB)
    return top


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_denied_unless_allowed(tmp_path: Path, mode: jqcow.image.Mode) -> None:
    top = two_files(tmp_path)
    with pytest.raises(jqcow.FileAccessDenied, match=r"'base\.qcow2'.*allow_files") as caught:
        jqcow.open(top, mode)
    assert isinstance(caught.value, PermissionError) and caught.value.path == str(tmp_path / "base.qcow2")
    asked: list[NamedFile] = []

    def decide(named: NamedFile) -> bool:
        asked.append(named)
        return named.name == "base.qcow2"

    with jqcow.open(top, mode, allow_files=decide) as image:
        assert image.pread(512, 0) == b"\7" * 512
    assert asked == [NamedFile(str(top), "base.qcow2", str(tmp_path / "base.qcow2"), "qcow2")]
    with pytest.raises(jqcow.FileAccessDenied):
        jqcow.open(top, mode, allow_files=lambda named: False)
    done("qemu-img", "info", "-U", top)


@pytest.mark.parametrize(
    "stored",
    [
        "nbd:localhost:10809",
        "nbd+unix:///disk?socket=/s",
        "json:{}",
        "file:",
        "http://host/disk",
        "C:\\disk",
    ],
)
def test_protocols_are_refused_by_name(tmp_path: Path, stored: str) -> None:
    top = two_files(tmp_path, stored)
    with pytest.raises(
        jqcow.UnsupportedFeatureError, match=re.escape(f"the protocol '{stored.partition(chr(58))[0]}:'")
    ):
        jqcow.open(top, allow_files=True)


def test_names_are_relative_to_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    top = two_files(tmp_path / "in")
    for folder, name in ((tmp_path, "in/image.qcow2"), (tmp_path / "in", "image.qcow2"), (Path("/"), top)):
        monkeypatch.chdir(folder)
        with jqcow.open(name, allow_files=True) as image:
            assert image.pread(1, 0) == b"\7"
    os.symlink(top, tmp_path / "link.qcow2")
    # As in QEMU: the directory is that of the name by which the image was opened.
    assert subprocess.run(
        ["qemu-io", "-c", "read 0 512", tmp_path / "link.qcow2"], capture_output=True, check=False
    ).returncode
    with pytest.raises(FileNotFoundError) as caught:
        jqcow.open(tmp_path / "link.qcow2", allow_files=True)
    assert "names it as its backing file" in caught.value.__notes__[0]


def test_chains_that_come_back_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.qcow2", tmp_path / "two.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", two, MIB)
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "two.qcow2", "-F", "qcow2", one)
    done("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", "./one.qcow2", "-F", "qcow2", two)
    with pytest.raises(jqcow.CorruptionError, match="comes back"):
        jqcow.open(one, allow_files=True)
    done("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", "one.qcow2", "-F", "qcow2", one)
    with pytest.raises(jqcow.CorruptionError, match="comes back"):
        jqcow.open(one, allow_files=True)


@pytest.mark.parametrize("stored_format", ["vmdk", "luks"])
def test_other_formats_are_refused_by_name(tmp_path: Path, stored_format: str) -> None:
    top = two_files(tmp_path)
    content = bytearray(top.read_bytes())
    place = content.index(b"qcow2\0\0\0")
    content[place : place + 5] = stored_format.encode().ljust(5, b"\0")
    content[place - 1] = len(stored_format)
    top.write_bytes(content)
    with pytest.raises(jqcow.UnsupportedFeatureError, match=f"the format '{stored_format}'"):
        jqcow.open(top, allow_files=True)


def test_a_format_is_never_guessed(tmp_path: Path) -> None:
    """Without a stored format a guest could have written a header into its raw disk."""
    top = two_files(tmp_path)
    content = bytearray(top.read_bytes())
    place = content.index((0xE2792ACA).to_bytes(4, "big"))
    content[place : place + 4] = (0x12345678).to_bytes(4, "big")
    top.write_bytes(content)
    with pytest.raises(jqcow.UnsupportedFeatureError, match="without a format"):
        jqcow.open(top, allow_files=True)
    with jqcow.open(top, allow_files=True, probe=True) as image:
        assert image.pread(1, 0) == b"\7"


def test_a_chain_of_three_hundred_files(tmp_path: Path) -> None:
    previous = "0.raw"
    (tmp_path / previous).write_bytes(b"\5" * MIB)
    for index in range(1, 301):
        name = f"{index}.qcow2"
        below = "raw" if index == 1 else "qcow2"
        done(
            "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", previous, "-F", below, tmp_path / name, MIB
        )
        previous = name
    with jqcow.open(tmp_path / previous, allow_files=True) as image:
        assert image.pread(MIB, 0) == b"\5" * MIB
        assert [extent.depth for extent in image.extents()] == [300]


def test_writers_are_kept_off_the_base(tmp_path: Path) -> None:
    top = two_files(tmp_path)
    with jqcow.open(top, "r+", allow_files=True):
        with pytest.raises(jqcow.ImageInUse):
            jqcow.open(tmp_path / "base.qcow2", "r+")
        with jqcow.open(tmp_path / "base.qcow2") as base:
            assert base.pread(1, 0) == b"\7"
    jqcow.open(tmp_path / "base.qcow2", "r+").close()
