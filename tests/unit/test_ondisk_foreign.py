"""Images of other programs are told by their magic, and are no raw disks."""

from __future__ import annotations

from pathlib import Path

import pytest

import jqcow
from jqcow import UnsupportedFeatureError
from jqcow.cli.main import main
from jqcow.offline.convert import convert
from jqcow.ondisk.foreign import foreign_format

STARTS = {
    "vmdk": [
        b"KDMV\1\0\0\0",
        b"COWD\1\0\0\0",
        b"# Disk DescriptorFile\nversion=1\n",
        b"\n  \n# a\nversion=3\r\n",
    ],
    "vhdx": [b"vhdxfile"],
    "vdi": [b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(0x40, b"\0") + b"\x7f\x10\xda\xbe"],
    "vpc": [b"conectix"],
    "qed": [b"QED\0"],
    "parallels": [b"WithoutFreeSpace", b"WithouFreSpacExt"],
    "bochs": [b"Bochs Virtual HD Image"],
    "cloop": [b"#!/bin/sh\n#V2.0 Format\n"],
    "qcow": [b"QFI\xfb\0\0\0\1"],
    "luks": [b"LUKS\xba\xbe\0\1"],
}
FILES = [(name, start.ljust(8192, b"x")) for name, starts in STARTS.items() for start in starts]
FILES += [
    ("vpc", bytes(8192) + b"conectix".ljust(512, b"\0")),
    ("vpc", bytes(8192) + b"conectix".ljust(511, b"\0")),
    ("dmg", bytes(8192) + b"koly".ljust(512, b"\0")),
]


@pytest.mark.parametrize(("name", "content"), FILES)
def test_it_is_refused_by_name_wherever_a_format_is_probed(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = tmp_path / "file", tmp_path / "target"
    path.write_bytes(content)
    for command in (["info"], ["info", "--output=json"], ["map"], ["check"], ["convert", "-q"]):
        arguments = [*command, str(path), *([str(target)] if command[0] == "convert" else [])]
        assert main(arguments) == 63, command
        told = capsys.readouterr()
        assert f"the format {name}" in told.err
        assert not told.out
    assert not target.exists()
    with pytest.raises(UnsupportedFeatureError, match=name):
        convert(path, target)
    assert main(["convert", "-q", "-f", "raw", str(path), str(target)]) == 0
    assert target.read_bytes()[: len(content)] == content


def test_a_backing_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"KDMV".ljust(8192, b"x"))
    overlay = tmp_path / "overlay"
    assert main(["create", "-q", "-b", "base", "-F", "raw", str(overlay)]) == 0
    # The format's extension becomes one that nobody knows: none is stored then.
    data = overlay.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\xe2\x79\x2a\xcb", 1)
    overlay.write_bytes(data)
    with pytest.raises(UnsupportedFeatureError, match="the format vmdk"):
        convert(overlay, tmp_path / "target", allow_files=True, probe=True)


@pytest.mark.parametrize(
    "content", [b"", b"QFI\xfb\0\0\0\3", b"KDM", b"# Disk", bytes(4096), b"\x55\xaa" * 256]
)
def test_others_are_not(content: bytes) -> None:
    assert foreign_format(content, content[-512:]) is None


def test_a_disk_of_size_0_with_clusters_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "empty"
    assert main(["create", "-q", str(path), "1M"]) == 0
    with jqcow.open(path, "r+") as image:
        image.pwrite(b"x", 0)
    with path.open("r+b") as file:
        file.seek(24)
        file.write(bytes(8))
    assert main(["check", str(path)]) == 0
    assert "1/0 = 100.00% allocated" in capsys.readouterr().out
