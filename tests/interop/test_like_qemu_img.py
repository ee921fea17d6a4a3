"""jqcow-img beside qemu-img: the same commands must say the same, exit alike and leave equal disks."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

import jqcow
from jqcow.cli.main import main_like_qemu_img
from tests.support.qemu import done, done_in_spite_of_load

DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
ICOUNT = re.compile(r" +0?$", re.MULTILINE)
"""Of a new snapshot qemu-img says that no instruction was counted, jqcow that none were."""
SIZES = re.compile(r"(disk size: |\"actual-size\": )[\d.]+( [KM]iB)?")

SECONDS = re.compile(r"in [\d.]+ seconds")


def theirs(words: list[str], folder: Path) -> tuple[int, str, str]:
    found = subprocess.run(["qemu-img", *words], cwd=folder, capture_output=True, check=False)
    return found.returncode, found.stdout.decode(), found.stderr.decode()


def ours(words: list[str], folder: Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main_like_qemu_img(words)
            except SystemExit as left:
                code = int(left.code or 0)
    finally:
        os.chdir(before)
    return code, out.getvalue(), err.getvalue()


def plain(told: tuple[int, str, str]) -> tuple[int, str, str]:
    """Return what was told without dates, and without what a file takes on the host."""
    code, out, err = told
    return code, ICOUNT.sub("", SIZES.sub(r"\1SIZE", DATE.sub("DATE", SECONDS.sub("", out)))), err


STORIES: dict[str, list[str]] = {
    "create": [
        "create -f qcow2 a.qcow2 64M",
        "create -f qcow2 -o cluster_size=4k,lazy_refcounts=on,compat=v3 a.qcow2 1M",
        "create a.raw 1M",
        "create -f qcow2 -o size=3M a.qcow2",
        "create -f qcow2 file:a.qcow2 1M",
        "create -f qcow2 file:a:b.img 1M",
        "info file:a:b.img",
        "info a.qcow2",
        "info --output=json a.raw",
    ],
    "create refuses": [
        "create -f qcow2 a.qcow2",
        "create -f qcow2 a.qcow2 xyz",
        "create -f qcow2 a.qcow2 1M more",
        "create -f qcow2 -o foo=bar a.qcow2 1M",
        "create -f qcow2 -o size=1M a.qcow2 1M",
        "create -f qcow2 -o cluster_size=1000 a.qcow2 1M",
        "create -f qcow2 -o refcount_bits=7 a.qcow2 1M",
        "create -f qcow2 -o refcount_bits=8,compat=0.10 a.qcow2 1M",
        "create -f qcow2 -o compat=0.42 a.qcow2 1M",
        "create -f qcow2 -o preallocation=1234 a.qcow2 1M",
        "create -f qcow2 -b none.qcow2 -F qcow2 a.qcow2",
        "create -f nothing a.qcow2 1M",
        "create -f qcow2 -o ,, a.qcow2 1M",
        "create -f qcow2 --nothing a.qcow2 1M",
        "create -f qcow2 -o help a.qcow2",
        "create -o help",
    ],
    "overlays": [
        "create -f qcow2 base.qcow2 1M",
        "create -f qcow2 -b base.qcow2 a.qcow2",
        "create -f qcow2 -b base.qcow2 -F qcow2 a.qcow2",
        "info --backing-chain a.qcow2",
        "info --output=json a.qcow2",
        "map --output=json a.qcow2",
        "rebase -u -b base.qcow2 a.qcow2",
        "rebase -u -b base.qcow2 -F qcow2 a.qcow2",
        "rebase -b none.qcow2 -F qcow2 a.qcow2",
        "commit a.qcow2",
        "commit base.qcow2",
        "commit -b other a.qcow2",
    ],
    "commits through a chain": [
        "create -q -f qcow2 base.qcow2 1M",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2",
        "create -q -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2",
        "convert -n -O qcow2 data.raw top.qcow2",
        "commit -b other.qcow2 top.qcow2",
        "commit -b ./base.qcow2 top.qcow2",
        "map --output=json base.qcow2",
        "commit -b middle.qcow2 top.qcow2",
        "compare middle.qcow2 base.qcow2",
    ],
    "luks volumes": [
        "create -f luks --object secret,id=s,data=abc -o key-secret=s,iter-time=10 a.luks 1M",
        "create -f luks a.luks 1M",
        "create -f luks -o key-secret=none a.luks 1M",
        "create -f luks -b data.raw a.luks",
        "create -f luks -o help",
        "create -f luks -o help a.luks",
    ],
    "old encryption": [
        "create -f qcow2 --object secret,id=s,data=abc -o encryption=on,encrypt.key-secret=s a.img 1M",
        "info a.img",
        "create -f qcow2 -o encryption=on a.img 1M",
        "create -f qcow2 -o encryption=on,encrypt.key-secret=none a.img 1M",
        "create -f qcow2 -o encryption=on,encrypt.format=luks a.img 1M",
    ],
    "names that others open": [
        "create -q -f qcow2 a.qcow2 1M",
        "rebase -u -b /dev/sdx -F host_device a.qcow2",
        "info --output=json a.qcow2",
        "rebase -u -b x.vmdk -F vmdk a.qcow2",
        "info a.qcow2",
        "rebase -u -b x -F nothing a.qcow2",
        "rebase -u a.qcow2",
    ],
    "measures": [
        "create -q -f qcow2 a.qcow2 1G",
        "bitmap --add --granularity 512 a.qcow2 one",
        "create -q -f qcow2 b.qcow2 1G",
        "bitmap --add b.qcow2 other",
        "bitmap --merge other --source-file b.qcow2 --source-format qcow2 a.qcow2 one",
        "measure -O qcow2 a.qcow2",
        "measure -O qcow2 -o compat=0.10 a.qcow2",
        "measure --output=json -O qcow2 a.qcow2",
        "measure -O qcow2 -o backing_file=x a.qcow2",
        "measure -O qcow2 --image-opts driver=qcow2,file.filename=a.qcow2",
        "create -f raw c.raw 1G",
        "measure -O qcow2 c.raw",
        "measure -O qcow2 -o size=1M",
    ],
    "what cannot be measured": [
        "create -q -f qcow2 a.qcow2 1G",
        "measure",
        "measure --size 2G a.qcow2",
        "measure a.qcow2 data.raw",
        "measure --image-opts",
        "measure -f qcow2",
        "measure -l one",
        "measure -l one a.qcow2",
        "measure -l snapshot.foo=bar",
        "measure -o ,",
        "measure -O qcow2 -o nothing=1 a.qcow2",
        "measure -O qcow2 -o cluster_size=3 a.qcow2",
        "measure --output foo",
        "measure --size -1",
        "measure -O qcow2 --size 7E",
        "measure -O foo a.qcow2",
        "measure -O vdi a.qcow2",
        "measure -f foo a.qcow2",
        "measure none.qcow2",
        "info --output foo a.qcow2",
    ],
    "disks that are no file": [
        "info null-co://",
        "info --image-opts driver=null-aio,force-share=on",
        "info -U --image-opts driver=null-co,force-share=off",
        "create -f qcow2 -b null-co:// -F raw a.img",
        "create -f qcow2 -b null-co:// -F raw a.img 1M",
        "create -f qcow2 -u -b nbd://nowhere/x -F raw a.img 1M",
        "info a.img",
        "rebase -u -b nbd+unix:///x?socket=y -F raw a.img",
        "info a.img",
        "create -f qcow2 -u -b /a/b:x -F raw b.img 1M",
        "convert -O qcow2 json:{'driver':'null-co','size':1048576,'read-zeroes':true} a.qcow2",
        "map --output=json a.qcow2",
        "convert -S 0 -O qcow2 json:{'driver':'null-co','size':1048576,'read-zeroes':true} a.qcow2",
        "map a.qcow2",
        "map --image-opts driver=blkdebug,align=4k,image.driver=qcow2,image.file.filename=a.qcow2",
        "compare json:{'driver':'null-co','size':1048576,'read-zeroes':true} a.qcow2",
        "bench -U -w -c 1 a.qcow2",
        "bench -c 1 a.qcow2",
        "bench -w -c 100 -d 4 --flush-interval 10 --pattern 5 a.qcow2",
        "compare -f raw a.qcow2 none.raw",
    ],
    "a format that is a protocol": ["create -f file a.raw 1M", "info a.raw"],
    "look": [
        "create -q -f qcow2 a.qcow2 1M",
        "check a.qcow2",
        "check --output=json a.qcow2",
        "check --repair all a.qcow2",
        "map a.qcow2",
        "info none.qcow2",
        "info -f qcow2 data.raw",
        "check -f raw data.raw",
        "info json:{'driver':'qcow2','file':{'driver':'file','filename':'a.qcow2'}}",
        "info --image-opts driver=qcow2,file.filename=a.qcow2",
        "measure --size 1G -O qcow2",
    ],
    "snapshots": [
        "create -q -f qcow2 a.qcow2 1M",
        "snapshot -c one a.qcow2",
        "snapshot -l a.qcow2",
        "snapshot -d two a.qcow2",
        "snapshot -d one a.qcow2",
        "check a.qcow2",
    ],
    "sizes": [
        "create -q -f qcow2 a.qcow2 1M",
        "resize a.qcow2 +1M",
        "resize a.qcow2 1M",
        "resize --shrink a.qcow2 1M",
        "resize a.qcow2 -5M",
        "resize a.qcow2 nothing",
        "resize --preallocation=full a.qcow2 1M",
        "resize -f raw data.raw 1M",
        "info data.raw",
    ],
    "amend": [
        "create -q -f qcow2 a.qcow2 1M",
        "amend -o compat=0.10 a.qcow2",
        "amend -o lazy_refcounts=on a.qcow2",
        "amend -o compat=1.1,lazy_refcounts=on a.qcow2",
        "amend -o cluster_size=4k a.qcow2",
        "amend -o nothing=1 a.qcow2",
        "amend -o compat=7 a.qcow2",
        "amend -f qcow2 -o help",
        "amend -f raw -o size=1M data.raw",
        "info a.qcow2",
    ],
    "compare": [
        "create -q -f qcow2 a.qcow2 64k",
        "compare a.qcow2 data.raw",
        "compare data.raw data.raw",
        "compare a.qcow2 short.raw",
        "compare -s a.qcow2 short.raw",
        "compare a.qcow2 none.raw",
        "compare a.qcow2",
    ],
    "convert": [
        "convert -O qcow2 data.raw a.qcow2",
        "compare data.raw a.qcow2",
        "convert -p -O qcow2 a.qcow2 packed.qcow2",
        "convert -c -O qcow2 a.qcow2 packed.qcow2",
        "compare packed.qcow2 a.qcow2",
        "convert -O raw data.raw short.raw two.raw",
        "info two.raw",
        "convert -n -O raw data.raw two.raw",
        "convert -n -O raw two.raw data.raw",
        "convert -n -o size=1 data.raw two.raw",
        "convert --target-is-zero data.raw two.raw",
        "convert -c data.raw two.raw",
        "convert -S 0 -O qcow2 short.raw full.qcow2",
        "check full.qcow2",
        "map full.qcow2",
        "convert -c -S 0 -O qcow2 short.raw full.qcow2",
        "map --output=json full.qcow2",
        "convert --bitmaps -O raw a.qcow2 other.raw",
        "convert -O qcow2 -B a.qcow2 -F qcow2 -o size=1 a.qcow2 top.qcow2",
        "convert none.raw a.qcow2",
        "convert -O qcow2 -o backing_fmt=qcow2,backing_file=none.qcow2 data.raw none-below.img",
        "convert",
        "dd if=data.raw of=part.raw bs=1k count=3 skip=2",
        "compare part.raw two.raw",
        "dd if=data.raw",
        "dd if=data.raw of=part.raw what=1",
    ],
}


@pytest.mark.parametrize("name", sorted(STORIES))
def test_both_say_the_same(name: str, tmp_path: Path) -> None:
    folders = tmp_path / "theirs", tmp_path / "ours"
    for folder in folders:
        folder.mkdir()
        (folder / "data.raw").write_bytes(b"\x55" * 20480 + bytes(45056))
        (folder / "short.raw").write_bytes(bytes(32768))
    for story in STORIES[name]:
        words = story.split()
        assert plain(ours(words, folders[1])) == plain(theirs(words, folders[0])), story
    for found in folders[1].glob("*.qcow2"):
        done("qemu-img", "check", found)
        done("qemu-img", "compare", found, folders[0] / found.name)


@pytest.mark.parametrize("options", ["", ",preallocation=full"])
def test_qemu_opens_a_luks_volume(tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "--object", "secret,id=s,data=abc"
    words = [
        "create",
        "-q",
        "-f",
        "luks",
        *secret,
        "-o",
        f"key-secret=s,iter-time=10{options}",
        "a.luks",
        "1M",
    ]
    assert ours(words, tmp_path) == (0, "", "")
    image = f"driver=luks,key-secret=s,file.filename={tmp_path / 'a.luks'}"
    asked = ["-c", "length", "-c", "write -P 7 1000k 24k", "-c", "read -P 7 1000k 24k"]
    found = done("qemu-io", *secret, *asked, "--image-opts", image)
    assert "1 MiB" in found and "Pattern verification failed" not in found
    monkeypatch.chdir(tmp_path)
    done_in_spite_of_load("qemu-img", *words)
    (tmp_path / "theirs.luks").write_bytes((tmp_path / "a.luks").read_bytes())
    ours(words, tmp_path)
    assert (tmp_path / "a.luks").stat().st_size == (tmp_path / "theirs.luks").stat().st_size


@pytest.mark.parametrize(
    "options",
    ["", "-o cluster_size=512", "-o compat=0.10", "-o preallocation=metadata", "-b base.qcow2 -F qcow2"],
)
def test_a_new_file_is_as_long_as_that_of_qemu_img(options: str, tmp_path: Path) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "8M")
    for made_by, name in ((ours, "ours"), (theirs, "theirs")):
        assert made_by(f"create -q -f qcow2 {options} {name} 8M".split(), tmp_path) == (0, "", "")
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    with jqcow.open(tmp_path / "ours", "r+", allow_files=True) as image:
        image.pwrite(b"x" * 4096, 1 << 20)
    done("qemu-img", "check", tmp_path / "ours")
    assert "Pattern verification failed" not in done("qemu-io", "-c", "read -P 120 1M 4k", tmp_path / "ours")


def test_each_file_of_a_chain_has_the_secret_that_names_it(tmp_path: Path) -> None:
    secrets = "--object secret,id=one,data=abc --object secret,id=two,data=xyz"
    luks = "create -q -f qcow2 -o encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret"
    assert ours(f"{luks}=one {secrets} base.qcow2 1M".split(), tmp_path) == (0, "", "")
    assert ours(f"{luks}=two {secrets} -b base.qcow2 -F qcow2 a.qcow2".split(), tmp_path) == (0, "", "")
    top = f"driver=qcow2,encrypt.key-secret=two,file.filename={tmp_path / 'a.qcow2'}"
    base = tmp_path / "base.qcow2"
    below = f"backing.driver=qcow2,backing.encrypt.key-secret=one,backing.file.filename={base}"
    done("qemu-io", *secrets.split(), "-c", "write -P 7 8k 24k", "--image-opts", f"{top},{below}")
    for words in (f"info --image-opts {top}", f"info --output=json --image-opts {top}"):
        assert plain(ours(words.split(), tmp_path)) == plain(theirs(words.split(), tmp_path))
    code, _, told = ours(
        f"commit {secrets} --image-opts {top},{below.replace('base', 'a')}".split(), tmp_path
    )
    assert code == 1 and "jqcow takes no other" in told
    assert ours(f"commit {secrets} --image-opts {top}".split(), tmp_path)[0] == 1
    assert ours(f"commit -q {secrets} --image-opts {top},{below}".split(), tmp_path) == (0, "", "")
    opened = f"driver=qcow2,encrypt.key-secret=one,file.filename={base}"
    found = done("qemu-io", *secrets.split(), "-c", "read -P 7 8k 24k", "--image-opts", opened)
    assert "Pattern verification failed" not in found


def test_qemu_opens_old_encryption(tmp_path: Path) -> None:
    secret = "--object", "secret,id=s,data=abc"
    done("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "1M")
    options = "encryption=on,encrypt.key-secret=s"
    words = [
        "create",
        "-q",
        "-f",
        "qcow2",
        *secret,
        "-o",
        options,
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "a.qcow2",
    ]
    assert ours(words, tmp_path) == (0, "", "")
    image = f"encrypt.format=aes,encrypt.key-secret=s,file.filename={tmp_path / 'a.qcow2'}"
    asked = ["-c", "write -P 7 8k 24k", "-c", "read -P 7 8k 24k", "-c", "read -P 0 32k 32k"]
    found = done("qemu-io", *secret, *asked, "--image-opts", f"driver=qcow2,{image}")
    assert "Pattern verification failed" not in found


def test_convert_encrypts_or_refuses(tmp_path: Path) -> None:
    (tmp_path / "data.raw").write_bytes(bytes(65536))
    secret = "--object", "secret,id=s,data=abc"
    for options in ("encryption=on,encrypt.key-secret=s", "encrypt.format=aes,encrypt.key-secret=s"):
        code, _, told = ours(["convert", "-O", "qcow2", *secret, "-o", options, "data.raw", "a"], tmp_path)
        assert code == 1 and "encrypt.format=luks" in told
    assert ours(["convert", "-O", "luks", "data.raw", "a"], tmp_path)[0] == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0x2000A, b"\0\2"),  # the refcount of a cluster of data
        (0x2000C, b"\0\1"),  # that of one that nothing uses
        (0x40008, (1 << 63 | 0x50000).to_bytes(8, "big")),  # a second reference to that data
        (0x30000, (0x40000).to_bytes(8, "big")),  # the L1 entry, without its COPIED flag
        (0x18, (1 << 40).to_bytes(8, "big")),  # the size of the disk
        (0x18, (1 << 60).to_bytes(8, "big")),
    ],
)
def test_checks_of_damage_say_the_same(tmp_path: Path, place: int, value: bytes) -> None:
    image = tmp_path / "image"
    done("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    done("qemu-io", "-c", "write 0 64k", image)
    content = bytearray(image.read_bytes())
    content[place : place + len(value)] = value
    folders = tmp_path / "theirs", tmp_path / "ours"
    for folder in folders:
        folder.mkdir()
        (folder / "a.qcow2").write_bytes(content)
    for words in (
        "check a.qcow2",
        "check -r leaks a.qcow2",
        "check --output=json -r all a.qcow2",
        "check a.qcow2",
    ):
        assert plain(ours(words.split(), folders[1])) == plain(theirs(words.split(), folders[0])), words


def test_of_two_extensions_of_a_type_both_take_the_last(tmp_path: Path) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", tmp_path / "a.qcow2", "1M")
    content = bytearray((tmp_path / "a.qcow2").read_bytes())
    content[72:104] = b"".join(b"\xe2\x79\x2a\xca\0\0\0\3" + name + bytes(5) for name in (b"raw", b"foo"))
    (tmp_path / "a.qcow2").write_bytes(content)
    found, wanted = (told(["info", "a.qcow2"], tmp_path) for told in (ours, theirs))
    assert found[0] == wanted[0] == 0 and not found[2]
    assert plain(found)[1].replace("backing file format: foo\n", "") == plain(wanted)[1]


def test_data_past_the_end_is_told_alike(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    done("qemu-io", "-c", "write 0 64k", image)
    content = bytearray(image.read_bytes())
    content[0x40000:0x40008] = (0x50 << 32).to_bytes(8, "big")
    image.write_bytes(content)
    assert ours(["check", "a.qcow2"], tmp_path) == theirs(["check", "a.qcow2"], tmp_path)


@pytest.mark.parametrize(("place", "value"), [(0x4F, 8), (0x68, 1)])
def test_compression_types_that_contradict_are_refused_alike(tmp_path: Path, place: int, value: int) -> None:
    image = tmp_path / "a.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    content = bytearray(image.read_bytes())
    content[place] = value
    image.write_bytes(content)
    assert ours(["info", "a.qcow2"], tmp_path)[0] == theirs(["info", "a.qcow2"], tmp_path)[0] == 1


def test_maps_of_exports_say_the_same(tmp_path: Path) -> None:
    image, path = tmp_path / "a.qcow2", tmp_path / "s"
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", tmp_path / "b", "-F", "raw", "-u", image, "4M")
    (tmp_path / "b").write_bytes(bytes(1 << 20) + b"b" * (1 << 20))
    done("qemu-img", "bitmap", "--add", image, "b0")
    done("qemu-io", "-c", "write 1M 64k", "-c", "write -z 3M 64k", image)
    done("qemu-img", "bitmap", "--disable", image, "b0")
    server = ["qemu-nbd", "-t", "-r", "-f", "qcow2", "-A", "-B", "b0", "-x", "exp", "-k", path, image]
    uri, options = (
        f"nbd+unix:///exp?socket={path}",
        f"driver=nbd,server.type=unix,server.path={path},export=exp",
    )
    asked = [["map", uri], ["map", "--output=json", uri]]
    for context in ("qemu:dirty-bitmap:b0", "qemu:allocation-depth"):
        asked.append(["map", "--output=json", "--image-opts", f"{options},x-dirty-bitmap={context}"])
    with subprocess.Popen([*map(str, server)]) as running:
        try:
            while running.poll() is None and not path.exists():
                time.sleep(0.02)
            for words in asked:
                assert ours(words, tmp_path) == theirs(words, tmp_path), words
            for words in (["map", f"nbd+unix:///none?socket={path}"], ["map", "nbd+unix:///exp"]):
                assert ours(words, tmp_path)[0] == theirs(words, tmp_path)[0] == 1
        finally:
            running.terminate()
    assert ours(["map", uri], tmp_path)[0] == theirs(["map", uri], tmp_path)[0] == 1


def test_a_preallocated_growth_leaves_a_short_file(tmp_path: Path) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "1M")
    assert ours(["resize", "-q", "--preallocation=falloc", "a.qcow2", "2M"], tmp_path) == (0, "", "")
    assert (tmp_path / "a.qcow2").stat().st_size < 16 << 20


def test_bitmaps_in_use_are_told_alike(tmp_path: Path) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "1M")
    for name in ("one", "two", "three"):
        done("qemu-img", "bitmap", "--add", tmp_path / "a.qcow2", name)
    # Whoever has it open, and is killed, leaves all of them in use.
    subprocess.run(["qemu-io", "-c", "abort", tmp_path / "a.qcow2"], capture_output=True, check=False)
    done("qemu-img", "bitmap", "--add", tmp_path / "a.qcow2", "four")
    for words in (
        ["convert", "--bitmaps", "-O", "qcow2", "a.qcow2", "b.qcow2"],
        ["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "a.qcow2", "b.qcow2"],
        ["info", "b.qcow2"],
        ["bitmap", "--remove", "--add", "a.qcow2", "one"],
    ):
        assert plain(ours(words, tmp_path)) == plain(theirs(words, tmp_path)), words


IN_USE = [
    "amend -o size=32M a.qcow2",
    "resize a.qcow2 2G",
    "snapshot -c x a.qcow2",
    "snapshot -l a.qcow2",
    "snapshot -l -U a.qcow2",
    "commit a.qcow2",
    "rebase -u -b x -F raw a.qcow2",
    "bitmap --add a.qcow2 b",
    "check a.qcow2",
    "check -U a.qcow2",
    "info a.qcow2",
    "map a.qcow2",
    "measure a.qcow2",
]


def test_of_an_image_in_use_both_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    done("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    with jqcow.open(path, "r+"):
        for line in IN_USE:
            words = line.split()
            assert plain(ours(words, tmp_path)) == plain(theirs(words, tmp_path)), line
