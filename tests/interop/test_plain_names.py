"""Names with a protocol that mean a plain file, `json:` and `file:`: beside QEMU, and as attacks."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jqcow
from jqcow.cli import main
from jqcow.disks.policy import Following
from jqcow.offline.amend import amend
from jqcow.offline.convert import convert
from jqcow.offline.info import read_chain
from jqcow.offline.map import map_file
from jqcow.offline.rebase import rebase
from jqcow.ondisk.header import EXTENSION_BACKING_FORMAT, Extension, HeaderArea
from tests.interop.commands import require_same_map
from tests.support.qemu import check_clean, compare, done, qemu_io

MIB = 1 << 20


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in another folder; all names below are relative to where the programs run, as in QEMU."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("d")
    done("qemu-img", "create", "-q", "-f", "raw", "d/raw", MIB)
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "d/base", MIB)
    qemu_io(Path("d/base"), "write -P 7 64k 64k", "write -P 8 512k 512")


def as_json(filename: str, driver: str = "qcow2", **more: Any) -> str:
    return "json:" + json.dumps(
        {"driver": driver, "file": {"driver": "file", "filename": filename, **more}}, separators=(",", ":")
    )


def test_of_two_formats_the_last_counts_as_in_qemu() -> None:
    """A reader that takes the other one judges another disk than QEMU opens."""
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "d/base", "-F", "raw", "top", MIB)
    content = bytearray(Path("top").read_bytes())
    area = HeaderArea.parse(bytes(content))
    formats = (Extension(EXTENSION_BACKING_FORMAT, name).pack() for name in (b"raw", b"qcow2"))
    listed = b"".join(formats) + bytes(8) + b"d/base"
    start = area.header.header_length
    content[start : start + len(listed)] = listed
    content[8:16] = (start + len(listed) - len(b"d/base")).to_bytes(8, "big")
    Path("top").write_bytes(content)
    theirs = json.loads(done("qemu-img", "info", "--output=json", "top"))["backing-filename-format"]
    with jqcow.open("top", allow_files=True) as image:
        assert image.backing_file is not None and image.backing_file.format == theirs == "qcow2"
        report = image.check()
    assert "another one of its type follows" in str(report.findings[0])


NAMES = [
    (as_json("d/base"), "qcow2"),
    (as_json("d/base", locking="off"), "qcow2"),
    (as_json("./d/../d/base"), "qcow2"),
    (as_json("d/base", "raw"), "raw"),
    ('json:{"driver":"qcow2","file.driver":"file","file.filename":"d/base"}', "qcow2"),
    ('json:{"file.filename":"d/base","read-only":true}', "qcow2"),
    ("file:d/base", "qcow2"),
    ("file:./d/base", "raw"),
]


@pytest.mark.parametrize(("name", "base_format"), NAMES)
def test_chains_read_as_in_qemu(name: str, base_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("e")
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", name, "-F", base_format, "e/theirs", MIB)
    assert main.main(["create", "-q", "-b", name, "-F", base_format, "e/ours", "1M"]) == 0
    for top in ("e/theirs", "e/ours"):
        qemu_io(Path(top), "write -P 9 0 512")
        done("qemu-img", "convert", "-O", "raw", top, f"{top}.raw")
        convert(top, f"{top}.out", allow_files=True, target_format="raw")
        assert Path(f"{top}.raw").read_bytes() == Path(f"{top}.out").read_bytes()
        require_same_map(capsys, top)
        facts = read_chain(top, following=Following(allow=True))
        assert os.path.samefile(facts[1].filename, "d/base") and facts[1].format == base_format
        with jqcow.open(top, "r+", allow_files=True) as image:
            image.pwrite(b"j" * 512, 100_352)
        check_clean(Path(top))
        with pytest.raises(jqcow.FileAccessDenied):
            jqcow.open(top)


def test_absolute_names_are_found_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    base = os.path.abspath("d/base")
    for index, name in enumerate((as_json(base), f"file:{base}")):
        top = os.path.abspath(f"top{index}")
        done("qemu-img", "create", "-q", "-f", "qcow2", "-b", name, "-F", "qcow2", top)
        monkeypatch.chdir("/")
        allowed = {base, f"{os.path.dirname(base)}/raw"}
        with jqcow.open(top, allow_files=lambda named: named.path in allowed) as image:  # noqa: B023
            assert image.pread(1, 65536) == b"\7"
        monkeypatch.chdir(Path(top).parent)


def test_the_format_of_a_name_serves_where_none_is_stored() -> None:
    done(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        "-b",
        as_json("d/base"),
        "-F",
        "qcow2",
        "top",
    )
    whole = Path("top").read_bytes()
    Path("top").write_bytes(whole.replace(b"\xe2\x79\x2a\xca", b"\x00\x79\x2a\xca", 1))
    with jqcow.open("top", allow_files=True) as image:
        assert image.pread(1, 65536) == b"\7"


def test_rebase_and_commit_by_such_a_name() -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", "-b", "d/base", "-F", "qcow2", "top")
    qemu_io(Path("top"), "write -P 9 0 512")
    done("qemu-img", "convert", "-O", "raw", "top", "before")
    rebase("top", as_json("d/raw", "raw"), "raw", allow_files=True)
    compare(Path("top"), Path("before"))
    rebase("top", "file:d/base", "qcow2", allow_files=True)
    compare(Path("top"), Path("before"))
    assert main.main(["commit", "-q", "--allow-files", "top"]) == 0
    compare(Path("d/base"), Path("before"))


# Attacks


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is opened from here on."""
    paths: list[str] = []

    def telling(call: Callable[..., Any]) -> Callable[..., Any]:
        def told(path: Any, *arguments: Any, **options: Any) -> Any:
            paths.append(str(path))
            return call(path, *arguments, **options)

        return told

    monkeypatch.setattr(os, "open", telling(os.open))
    monkeypatch.setattr(builtins, "open", telling(builtins.open))
    return paths


SECRET = "/etc/passwd"
ATTACKS = [
    SECRET,
    f"file:{SECRET}",
    as_json(SECRET, "raw"),
    as_json(SECRET),
    f'json:{{"driver":"raw","file.filename":"{SECRET}"}}',
]
REFUSED_ATTACKS = [
    f"blkdebug::{SECRET}",
    "fat:/etc",
    "fat:rw:/etc",
    "nbd://169.254.169.254/x",
    "http://169.254.169.254/latest/meta-data",
    "ssh://root@host/etc/shadow",
    "rbd:pool/image",
    f'json:{{"driver":"raw","file":{{"driver":"raw","file":{{"driver":"file","filename":"{SECRET}"}}}}}}',
    f'json:{{"driver":"raw","offset":512,"file":{{"driver":"file","filename":"{SECRET}"}}}}',
    f'json:{{"driver":"qcow2","file":{{"driver":"blkverify","raw":{{"filename":"{SECRET}"}}}}}}',
    f'json:{{"driver":"file","filename":"{SECRET}"}}',
    f'json:{{"driver":"qcow2","data-file":{{"driver":"file","filename":"{SECRET}"}},"file.filename":"d/base"}}',
    f'json:{{"driver":"qcow2","backing":{{"driver":"file","filename":"{SECRET}"}},"file.filename":"d/base"}}',
    'json:{"driver":"host_device","filename":"/dev/sda"}',
    "json:" + '{"file":' * 100 + "0" + "}" * 100,
]


def uses(path: str, *, allow_files: bool) -> list[Callable[[], object]]:
    return [
        lambda: jqcow.open(path, allow_files=allow_files),
        lambda: jqcow.open(path, "r+", allow_files=allow_files),
        lambda: convert(path, "target", allow_files=allow_files),
        lambda: map_file(path, "qcow2", following=Following(allow_files)),
        lambda: read_chain(path, following=Following(allow_files)),
    ]


@pytest.mark.parametrize("name", [*ATTACKS, *REFUSED_ATTACKS])
def test_backing_files_are_not_opened_without_permission(name: str, opened: list[str]) -> None:
    for image_format in ("raw", "qcow2"):
        for options in ([], ["-o", "cluster_size=4k"]):
            done(
                "qemu-img",
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                *options,
                "-b",
                name,
                "-F",
                image_format,
                "evil",
                MIB,
            )
            for use in uses("evil", allow_files=False):
                with pytest.raises((jqcow.FileAccessDenied, jqcow.UnsupportedFeatureError)):
                    use()
    assert not any(SECRET in path or "shadow" in path for path in opened)


@pytest.mark.parametrize("name", REFUSED_ATTACKS)
def test_other_names_are_refused_also_with_permission(name: str, opened: list[str]) -> None:
    done("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", "evil", MIB)
    for use in uses("evil", allow_files=True):
        with pytest.raises(jqcow.UnsupportedFeatureError, match="the protocol '"):
            use()
    jqcow.create("good", MIB).close()
    for attempt in (
        lambda: jqcow.create("new", MIB, backing_file=name, backing_format="raw"),
        lambda: rebase("good", name, "raw", allow_files=True),
        lambda: rebase("good", name, "raw", unsafe=True),
    ):
        with pytest.raises(jqcow.UnsupportedFeatureError, match="the protocol '"):
            attempt()
    assert main.main(["create", "-q", "-b", name, "-F", "raw", "new", "1M"]) == 63
    assert not os.path.exists("new")
    assert not any(SECRET in path for path in opened)


@pytest.mark.parametrize("name", [*ATTACKS, *REFUSED_ATTACKS])
def test_data_files_are_not_opened(name: str, opened: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    done("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=placeholder", "evil", MIB)
    whole = Path("evil").read_bytes()
    place = whole.index(b"DATA") + 4
    rest = whole[place + 4 + 16 :]
    stored = name.encode()
    padded = stored + bytes(-len(stored) % 8)
    forged = whole[:place] + len(stored).to_bytes(4, "big") + padded + rest
    Path("evil").write_bytes(forged[:65536] + whole[65536:])
    # `info` shows what it does not follow.
    for use in uses("evil", allow_files=False)[:-1]:
        with pytest.raises((jqcow.FileAccessDenied, jqcow.UnsupportedFeatureError)):
            use()
    for use in uses("evil", allow_files=True)[:-1] if name in REFUSED_ATTACKS else ():
        with pytest.raises(jqcow.UnsupportedFeatureError, match=r"the protocol '"):
            use()
    for attempt in (
        lambda: jqcow.create("new", MIB, data_file=name),
        lambda: amend("evil", data_file=name),
    ):
        if name in REFUSED_ATTACKS:
            with pytest.raises(jqcow.UnsupportedFeatureError, match="the protocol '"):
                attempt()
    assert not os.path.exists("new")
    assert main.main(["info", "evil"]) == 0
    assert f"data file: {name}" in capsys.readouterr().out
    assert not any(SECRET in path for path in opened)
