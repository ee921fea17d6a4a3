"""External data files beside QEMU: each writes what the other made, and both read the same."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import jqcow
from jqcow.cli import recover
from jqcow.cli.main import main
from jqcow.device.file import FileDevice
from jqcow.offline.amend import amend
from jqcow.offline.commit import commit
from jqcow.offline.convert import convert
from jqcow.offline.rebase import rebase
from jqcow.offline.undo import undo_repair
from jqcow.ondisk.encryption import Encryption
from tests.interop.commands import require_same_info, require_same_map
from tests.support.qemu import check_clean, compare, complaint, done, done_in_spite_of_load, holding, qemu_io

SIZE = 1 << 20
CLUSTER = 65536
FORMS = [
    pytest.param(options, id=options.replace("=on", ""))
    for options in (
        "cluster_size=4096",
        "cluster_size=65536",
        "extended_l2=on",
        "cluster_size=4096,data_file_raw=on",
        "cluster_size=65536,data_file_raw=on",
        "extended_l2=on,data_file_raw=on",
    )
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Names of data files are relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_qemu(options: str, *more: str) -> Path:
    done("qemu-img", "create", "-q", "-f", "qcow2", *more, "-o", f"data_file=data,{options}", "image", SIZE)
    return Path("image")


def by_jqcow(options: str, *more: str) -> Path:
    assert main(["create", "-q", *more, "-o", f"data_file=data,{options}", "image", str(SIZE)]) == 0
    return Path("image")


class Guest:
    """A disk and what it must hold, written by turns by both programs."""

    def __init__(self, image: Path, seed: str) -> None:
        self.image = image
        self.chance = random.Random(seed)
        self.model = bytearray(SIZE)
        with jqcow.open(image, allow_files=True) as opened:
            self.unit = opened.info().cluster_size // (32 if "extended_l2" in seed else 1)
        self.is_raw = "data_file_raw" in seed

    def _range(self) -> tuple[int, int]:
        offset = self.chance.randrange(SIZE // 512)
        return offset * 512, 512 * self.chance.randint(1, min(200, SIZE // 512 - offset))

    def by_jqcow(self) -> None:
        with jqcow.open(self.image, "r+", allow_files=True) as opened:
            for _ in range(10):
                offset, length = self._range()
                kind = self.chance.choice("wwzud")
                if kind == "w":
                    self.model[offset : offset + length] = self.chance.randbytes(length)
                    opened.pwrite(self.model[offset : offset + length], offset)
                elif kind == "d":
                    opened.discard(length, offset)
                    start = -(-offset // self.unit) * self.unit
                    stop = offset + length
                    stop = stop if stop == SIZE else stop // self.unit * self.unit
                    self.model[start:stop] = bytes(max(0, stop - start))
                else:
                    opened.write_zeroes(length, offset, unmap=kind == "u")
                    self.model[offset : offset + length] = bytes(length)
                if self.chance.random() < 0.3:
                    opened.flush()
            assert opened.pread(SIZE, 0) == self.model
            assert opened.check().ok

    def by_qemu(self) -> None:
        commands = []
        for _ in range(8):
            (offset, length), byte = self._range(), self.chance.choice((0, 0, 3, 5, 7))
            zeroes = self.chance.choice(("write -z", "write -z -u"))
            commands.append(f"{f'write -P {byte}' if byte else zeroes} {offset} {length}")
            self.model[offset : offset + length] = bytes([byte]) * length
        qemu_io(self.image, *commands)

    def judge(self) -> None:
        check_clean(self.image)
        assert main(["check", "-q", str(self.image)]) == 0
        Path("model").write_bytes(self.model)
        compare(self.image, Path("model"))
        convert(self.image, "out", allow_files=True, target_format="raw", overwrite=True)
        assert Path("out").read_bytes() == self.model
        if self.is_raw:
            assert Path("data").read_bytes() == self.model


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("make", [by_qemu, by_jqcow])
def test_both_write_and_both_read(
    make: Callable[[str], Path], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    guest = Guest(make(options), options)
    for turn in range(4):
        (guest.by_qemu if turn % 2 else guest.by_jqcow)()
        guest.judge()
    capsys.readouterr()
    assert main(["map", "--allow-files", "--output=json", "image"]) == 0
    assert capsys.readouterr().out == done("qemu-img", "map", "--output=json", "image")
    for size in (SIZE + 5 * 512, SIZE // 2 + 512, SIZE):
        with jqcow.open("image", "r+", allow_files=True) as opened:
            opened.resize(size)
        guest.model = guest.model[:size].ljust(size, b"\0")
        guest.judge()


@pytest.mark.parametrize("options", ["preallocation=metadata", "preallocation=falloc", "preallocation=full"])
def test_preallocation_is_of_both_files(options: str) -> None:
    guest = Guest(by_jqcow(options), options)
    assert os.path.getsize("data") == SIZE
    with jqcow.open("image", "r+", allow_files=True) as opened:
        opened.resize(2 * SIZE, options.partition("=")[2])  # type: ignore[arg-type]
    guest.model = guest.model.ljust(2 * SIZE, b"\0")
    guest.judge()
    if options != "preallocation=metadata":
        assert os.stat("data").st_blocks * 512 >= 2 * SIZE


def test_data_moves_in_and_out() -> None:
    content = random.Random(1).randbytes(SIZE // 2).ljust(SIZE - 512, b"\0")
    Path("raw").write_bytes(content)
    for raw, extended in ((False, False), (True, False), (False, True), (True, True)):
        report = convert(
            "raw",
            "image",
            overwrite=True,
            verify=True,
            data_file="data",
            data_file_raw=raw,
            extended_l2=extended,
        )
        assert report.target_bytes < SIZE
        check_clean(Path("image"))
        compare(Path("image"), Path("raw"))
        if raw:
            assert Path("data").read_bytes() == content
        else:
            assert os.stat("data").st_blocks * 512 < SIZE
        with pytest.raises(FileExistsError):
            convert("raw", "other", data_file="data")
        convert("image", "back", allow_files=True, overwrite=True, target_format="raw")
        assert Path("back").read_bytes() == content
    with pytest.raises(ValueError, match="without compression"):
        convert("raw", "other", data_file="more", compressed=True)
    with pytest.raises(ValueError, match="a qcow2 image"):
        convert("raw", "other", data_file="more", target_format="raw")
    assert not os.path.exists("other")
    assert not os.path.exists("more")


def test_a_sparse_file_is_told_of_as_by_qemu(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ("preallocation=metadata", "data_file_raw=on"):
        qemu_io(by_qemu(options), "write 300k 8k")
        require_same_map(capsys, "image")
    Path("key").write_text("secret")
    secret = ("--object", "secret,id=key,file=key")
    luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10,data_file=data"
    done_in_spite_of_load("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", luks, "image", SIZE)
    require_same_info(capsys, "image")


def test_what_cannot_be() -> None:
    for options, match in (
        ({"data_file_raw": True}, "needs a data_file"),
        ({"data_file": "data", "compat": "0.10"}, "no data_file"),
        ({"data_file": "image"}, "its own data file"),
        (
            {"data_file": "data", "data_file_raw": True, "encryption": Encryption(b"secret", iter_time=1)},
            "encrypted disk",
        ),
        (
            {"data_file": "data", "data_file_raw": True, "backing_file": "base", "backing_format": "raw"},
            "cannot show a backing file",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            jqcow.create("image", SIZE, **options)  # type: ignore[arg-type]
        assert not os.path.exists("image")
        assert not os.path.exists("data")
    by_jqcow("data_file_raw=on")
    with pytest.raises(FileExistsError):
        jqcow.create("other", SIZE, data_file="data")
    with jqcow.open("image", "r+", allow_files=True) as image:
        with pytest.raises(jqcow.UnsupportedFeatureError, match="snapshot"):
            image.create_snapshot("now")
        with pytest.raises(jqcow.UnsupportedFeatureError, match="compressed"):
            image.pwrite_compressed(bytes(CLUSTER), 0)
        with (
            pytest.raises(jqcow.UnsupportedFeatureError, match="in a transaction"),
            image.transaction() as tx,
        ):
            tx.pwrite(b"x", 0)
        with pytest.raises(ValueError, match="cannot show a backing file"), image.transaction() as tx:
            tx.set_backing_file("base", "raw")
        assert image.check().ok


def test_a_data_file_is_no_other_file_of_the_image(capsys: pytest.CaptureFixture[str]) -> None:
    done("qemu-img", "create", "-q", "-f", "raw", "base", SIZE)
    Path("base").write_bytes(bytes(range(256)) * (SIZE // 256))
    os.link("base", "same")
    options = ["-q", "--overwrite", "-b", "base", "-F", "raw", "-o"]
    assert main(["create", *options, "data_file=base", "image"]) == 1
    assert "its backing file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="its backing file"):
        jqcow.create(
            "image", SIZE, backing_file="base", backing_format="raw", data_file="base", overwrite=True
        )
    assert not os.path.exists("image") and Path("base").read_bytes()[:4] == bytes(range(4))
    # In a chain: the data file of the base is the overlay.
    jqcow.create("lower", SIZE, data_file="data").close()
    jqcow.create("upper", SIZE, backing_file="lower", backing_format="qcow2", allow_files=True).close()
    os.unlink("data")
    os.symlink("upper", "data")
    for mode in ("r", "r+"):
        with pytest.raises(jqcow.CorruptionError, match="or above it"):
            jqcow.open("upper", mode, allow_files=True)  # type: ignore[arg-type]
    with pytest.raises(jqcow.CorruptionError, match="or above it"):
        convert("upper", "out", allow_files=True)


@pytest.mark.parametrize("in_use", ["image", "data"])
def test_who_replaces_both_leaves_both_where_one_is_in_use(in_use: str) -> None:
    with jqcow.create("image", SIZE, data_file="data") as image:
        image.pwrite(b"old", 0)
    with closing(FileDevice.open(in_use, writable=True)), pytest.raises(jqcow.ImageInUse):
        jqcow.create("image", 2 * SIZE, data_file="data", overwrite=True)
    assert sorted(os.listdir()) == ["data", "image"]
    os.chmod("image", 0o640)
    with jqcow.open("image", allow_files=True) as image:
        assert image.pread(3, 0) == b"old"
    jqcow.create("image", 2 * SIZE, data_file="data", overwrite=True).close()
    assert sorted(os.listdir()) == ["data", "image"] and os.stat("image").st_mode & 0o777 == 0o640
    with jqcow.open("image", allow_files=True) as image:
        assert image.pread(2 * SIZE, 0) == bytes(2 * SIZE)


def test_permission_is_needed() -> None:
    by_qemu("cluster_size=64k")
    for use in (
        lambda: jqcow.open("image"),
        lambda: jqcow.open("image", "r+"),
        lambda: jqcow.open("image", "r+", repair="all"),
        lambda: convert("image", "out"),
    ):
        with pytest.raises(jqcow.FileAccessDenied, match="needs the data file that it names: 'data'"):
            use()
    asked = []
    with jqcow.open("image", allow_files=lambda named: not asked.append(named)) as image:
        assert image.data_file == asked[0]
        assert (asked[0].purpose, asked[0].name, asked[0].path) == ("data", "data", "data")


def test_a_file_that_is_not_there_or_too_short(capsys: pytest.CaptureFixture[str]) -> None:
    by_qemu("data_file_raw=on")
    os.truncate("data", SIZE // 2 - 512)
    with jqcow.open("image", allow_files=True) as image:
        assert image.pread(SIZE // 2, 0) == bytes(SIZE // 2)
        with pytest.raises(jqcow.CorruptionError, match="past the end of the data file 'data'"):
            image.pread(CLUSTER, SIZE // 2)
    report = convert("image", "out", allow_files=True, target_format="raw", salvage=True)
    assert [(lost.offset, lost.length) for lost in report.lost] == [(SIZE // 2, SIZE // 2)]
    os.unlink("data")
    with pytest.raises(FileNotFoundError, match="data") as missing:
        jqcow.open("image", allow_files=True)
    assert "image names it as its data file" in missing.value.__notes__[0]
    assert main(["info", "image"]) == 0
    assert "data file: data" in capsys.readouterr().out
    Path("data").symlink_to("image")
    with pytest.raises(jqcow.CorruptionError, match="the image itself"):
        jqcow.open("image", allow_files=True)


def test_one_writer() -> None:
    by_qemu("cluster_size=64k")
    with holding(Path("image")), pytest.raises(jqcow.ImageInUse):
        jqcow.open("image", allow_files=True)
    shutil.copy("image", "twin")
    # The data file is locked too, should another image name it.
    with holding(Path("image")), pytest.raises(jqcow.ImageInUse, match="data is in use"):
        jqcow.open("twin", allow_files=True)
    with jqcow.open("image", "r+", allow_files=True), pytest.raises(AssertionError, match="lock"):
        qemu_io(Path("data"), "write 0 512", kind="raw")


def test_another_name(capsys: pytest.CaptureFixture[str]) -> None:
    guest = Guest(by_qemu("cluster_size=64k"), "renamed")
    guest.by_jqcow()
    os.rename("data", "moved")
    assert main(["amend", "-o", "data_file=moved", "image"]) == 0
    assert "data file amended" in capsys.readouterr().out
    assert "data file: moved" in done("qemu-img", "info", "image")
    guest.judge()
    assert not amend("image", data_file="moved").changed
    with pytest.raises(ValueError, match="external data file"):
        jqcow.create("plain", SIZE).close()
        amend("plain", data_file="x")


def test_no_raw_file_any_more() -> None:
    guest = Guest(by_qemu("cluster_size=64k,data_file_raw=on"), "given up")
    guest.by_jqcow()
    jqcow.create("plain", SIZE).close()
    with pytest.raises(ValueError, match="cannot be set"):
        amend("plain", data_file_raw=True)
    assert not amend("image", data_file_raw=True).changed
    shutil.copy("image", "theirs")
    done("qemu-img", "amend", "-o", "data_file_raw=off", "theirs")
    assert main(["amend", "-q", "-o", "data_file_raw=off,lazy_refcounts=on", "image"]) == 0
    told = [done("qemu-img", "info", name).partition("Format specific")[2] for name in ("theirs", "image")]
    assert told[1] == told[0].replace("lazy refcounts: false", "lazy refcounts: true")
    assert "data file raw: false" in told[1]
    guest.by_qemu()
    guest.by_jqcow()
    guest.judge()


def test_over_a_backing_file() -> None:
    base = random.Random(2).randbytes(SIZE)
    Path("base").write_bytes(base)
    guest = Guest(by_qemu("cluster_size=64k", "-b", "base", "-F", "raw"), "overlay")
    guest.model[:] = base
    guest.by_qemu()
    with jqcow.open("image", "r+", allow_files=True) as image:
        image.pwrite(b"jqcow", 3 * CLUSTER + 77)
        image.write_zeroes(CLUSTER, 5 * CLUSTER)
    guest.model[3 * CLUSTER + 77 : 3 * CLUSTER + 82] = b"jqcow"
    guest.model[5 * CLUSTER : 6 * CLUSTER] = bytes(CLUSTER)
    guest.judge()
    Path("new").write_bytes(base[: SIZE // 2])
    rebase("image", "new", "raw", allow_files=True)
    guest.judge()
    commit("image", allow_files=True)
    assert Path("new").read_bytes() == guest.model
    guest.judge()


@pytest.mark.parametrize("options", ["cluster_size=64k", "extended_l2=on"])
@pytest.mark.parametrize("is_written", [False, True])
def test_growth_hides_what_a_longer_backing_file_has(options: str, is_written: bool) -> None:
    Path("base").write_bytes(b"b" * 2 * SIZE)
    size = SIZE + 3 * 512
    words = ["-o", f"data_file=data,{options}", "-b", "base", "-F", "raw", "image", size]
    done("qemu-img", "create", "-q", "-f", "qcow2", *words)
    guest = Guest(Path("image"), options)
    guest.model[:] = b"b" * size
    with jqcow.open("image", "r+", allow_files=True) as image:
        if is_written:
            image.pwrite(b"x" * 512, SIZE)
            guest.model[SIZE : SIZE + 512] = b"x" * 512
        image.resize(SIZE + 3 * CLUSTER)
    guest.model += bytes(SIZE + 3 * CLUSTER - size)
    guest.judge()


def test_below_an_overlay() -> None:
    guest = Guest(by_qemu("cluster_size=64k"), "base")
    guest.by_qemu()
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "image", "-F", "qcow2", "overlay")
    with jqcow.open("overlay", "r+", allow_files=True) as overlay:
        assert overlay.pread(SIZE, 0) == guest.model
        overlay.pwrite(b"x" * 700, 300)
    guest.model[300:1000] = b"x" * 700
    commit("overlay", allow_files=True)
    guest.judge()


def test_encryption(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"passphrase")
    encryption = Encryption(b"passphrase", iter_time=10)
    with jqcow.create("image", SIZE, data_file="data", encryption=encryption) as image:
        image.pwrite(b"\x44" * 1000, 70000)
        image.write_zeroes(512, 70656)
    told = [
        "--object", f"secret,id=key,file={secret}",
        "--image-opts", "driver=qcow2,encrypt.key-secret=key,file.filename=image",
    ]  # fmt: skip
    output = done("qemu-io", "-c", "read -P 0x44 70000 656", "-c", "read -P 0 70656 512", *told)
    assert "verification failed" not in output
    done("qemu-io", "-c", "write -P 0x55 70000 2000", *told)
    with jqcow.open("image", allow_files=True, passphrase=b"passphrase") as image:
        assert image.pread(2000, 70000) == b"\x55" * 2000
    assert b"\x55" * 16 not in Path("data").read_bytes()


def test_bitmaps_and_repairs(capsys: pytest.CaptureFixture[str]) -> None:
    by_qemu("cluster_size=64k")
    done("qemu-img", "bitmap", "--add", "image", "changes")
    with jqcow.open("image", "r+", allow_files=True) as image:
        image.pwrite(b"x", 3 * CLUSTER)
        assert [part.offset for part in image.bitmaps.dirty_extents("changes")] == [3 * CLUSTER]
    check_clean(Path("image"))
    content = bytearray(Path("image").read_bytes())
    content[2 * CLUSTER + 1] = 2
    Path("image").write_bytes(content)
    assert complaint(Path("image"))
    os.rename("data", "away")
    with pytest.raises(FileNotFoundError):
        jqcow.open("image", "r+", repair="all", allow_files=True)
    os.rename("away", "data")
    with jqcow.open("image", "r+", repair="all", allow_files=True) as image:
        assert image.pread(1, 3 * CLUSTER) == b"x"
    check_clean(Path("image"))
    if os.path.exists("image.jqcow-undo"):
        undo_repair("image")
        assert Path("image").read_bytes() == content


def test_recovery_needs_no_data_file() -> None:
    by_jqcow("cluster_size=64k")
    with jqcow.open("image", "r+", allow_files=True) as image:
        image.pwrite(b"kept", 0)
        image.flush()
        shutil.copy("image", "crashed")
        shutil.copy("data", "kept")
    os.rename("crashed", "image")
    os.unlink("data")
    assert recover.main(["image"]) == 0
    os.rename("kept", "data")
    check_clean(Path("image"))
    with jqcow.open("image", allow_files=True) as image:
        assert image.pread(4, 0) == b"kept"
