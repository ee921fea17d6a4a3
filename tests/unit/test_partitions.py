"""Are partitions found where sfdisk says that they are, and never outside of their disk?"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import zlib
from contextlib import closing
from pathlib import Path

import pytest

import jqcow
from jqcow.device.file import FileDevice
from jqcow.disks.raw import RawDisk
from jqcow.offline.partitions import Partition, partitions_of
from jqcow.offline.shown import files_of

MIB = 1 << 20
SCRIPTS = {
    "mbr": "label: dos\n,8M,L\n,8M,L,*\n",
    "logical": "label: dos\n1: size=8M\n2: size=40M,type=E\n5: size=8M\n6: size=8M\n7: size=4M\n",
    "gpt": "label: gpt\nsize=8M,name=one\nsize=16M\n",
    "no table": "",
    "empty gpt": "label: gpt\n",
}


def partitioned(path: Path, script: str, size: int = 64 * MIB) -> list[Partition]:
    """Make a raw disk with a partition table; return what sfdisk says of it."""
    with path.open("wb") as file:
        file.truncate(size)
    if not script:
        return []
    subprocess.run(["sfdisk", "-q", path], input=script, text=True, check=True, capture_output=True)
    told = subprocess.run(["sfdisk", "--json", path], text=True, check=True, capture_output=True).stdout
    table = json.loads(told)["partitiontable"]
    found = []
    for entry in table.get("partitions", ()):
        number = int(entry["node"].removeprefix(str(path)).lstrip("p"))
        if entry["type"] not in ("5", "f", "85"):
            found.append(Partition(number, entry["start"] * 512, entry["size"] * 512))
    return found


def found_on(path: Path) -> list[Partition]:
    with closing(RawDisk(FileDevice.open(path, writable=False))) as disk:
        return sorted(partitions_of(disk), key=lambda part: part.number)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_as_sfdisk_says(kind: str, tmp_path: Path) -> None:
    expected = partitioned(tmp_path / "disk", SCRIPTS[kind])
    assert found_on(tmp_path / "disk") == expected
    assert len(expected) == {"mbr": 2, "logical": 4, "gpt": 2}.get(kind, 0)


def test_second_gpt_serves_where_the_first_is_lost(tmp_path: Path) -> None:
    expected = partitioned(tmp_path / "disk", SCRIPTS["gpt"])
    with (tmp_path / "disk").open("r+b") as file:
        file.seek(512)
        file.write(bytes(512))
    assert found_on(tmp_path / "disk") == expected


def test_gpt_of_long_sectors(tmp_path: Path) -> None:
    entries = struct.pack("<16s16sQQ", b"k" * 16, b"u" * 16, 256, 256 + 4095).ljust(128 * 128, b"\0")
    last = 64 * MIB // 4096 - 1
    fields = (1, last, 6, last - 6, b"g" * 16, 2, 128, 128, zlib.crc32(entries))
    header = bytearray(struct.pack("<8sIII4xQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, *fields))
    header[16:20] = zlib.crc32(header).to_bytes(4, "little")
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(64 * MIB)
        for place, data in ((4096, header), (8192, entries)):
            file.seek(place)
            file.write(data)
    assert found_on(tmp_path / "disk") == [Partition(1, MIB, 16 * MIB)]


def test_file_system_without_partitions_has_none(tmp_path: Path) -> None:
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(8 * MIB)
    subprocess.run(["mkfs.fat", tmp_path / "disk"], check=True, capture_output=True)
    assert found_on(tmp_path / "disk") == []


def test_damaged_tables_stay_within_their_disk(tmp_path: Path) -> None:
    """Whatever the bytes are, it ends, and names no place outside."""
    chance = random.Random(11)
    for kind in ("mbr", "logical", "gpt"):
        partitioned(tmp_path / "disk", SCRIPTS[kind])
        places = [*range(446, 510), *range(512, 604), *range(1024, 1280)]
        if kind == "logical":
            places += range(9 * MIB + 446, 9 * MIB + 510)
        with (tmp_path / "disk").open("r+b", buffering=0) as file:
            for _ in range(60):
                changed = chance.sample(places, 3)
                before = [os.pread(file.fileno(), 1, place) for place in changed]
                for place in changed:
                    os.pwrite(file.fileno(), chance.randbytes(1), place)
                for part in found_on(tmp_path / "disk"):
                    assert 0 < part.offset < part.end <= 64 * MIB
                for place, byte in zip(changed, before, strict=True):
                    os.pwrite(file.fileno(), byte, place)


def test_chain_of_logical_partitions_that_comes_back_ends(tmp_path: Path) -> None:
    partitioned(tmp_path / "disk", SCRIPTS["logical"])
    with (tmp_path / "disk").open("r+b") as file:
        # The second record of the chain names the first one as the next.
        file.seek(18 * MIB + 446 + 16)
        file.write(
            bytes.fromhex("0000000005000000") + (0x800).to_bytes(4, "little") + bytes.fromhex("00080000")
        )
    assert len(found_on(tmp_path / "disk")) <= 129


def test_files_of_a_disk(tmp_path: Path) -> None:
    expected = partitioned(tmp_path / "disk", SCRIPTS["mbr"])
    with jqcow.create(tmp_path / "a.qcow2", 64 * MIB) as image:
        image.pwrite((tmp_path / "disk").read_bytes()[:MIB], 0)
        files = files_of(image)
        assert list(files) == ["disk.img", "partition1.img", "partition2.img"]
        first = files["partition1.img"]
        assert (first.size, files["disk.img"].size) == (expected[0].length, 64 * MIB)
        assert first.pwrite(b"inside", 0) == 6
        assert files["disk.img"].pread(6, expected[0].offset) == b"inside"
        assert first.pread(100, first.size - 10) == bytes(10) and first.pread(1, first.size + 5) == b""
        with pytest.raises(ValueError, match="not within"):
            first.pwrite(b"xx", first.size - 1)
        file = first.as_file()
        assert file.read(6) == b"inside" and file.seek(0, 2) == first.size
        image.resize(128 * MIB)
        assert files["disk.img"].size == 128 * MIB
