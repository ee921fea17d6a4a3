"""Protection of images: what verify finds, what refresh renews, what heal replaces; and what commands say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import jqcow
from jqcow.cli import main
from jqcow.image import refreshing
from jqcow.offline.protect import heal, protect, unprotect, verify
from jqcow.ondisk.protection import CHANGED, NAMES, RECORD, SUMS

MIB = 1 << 20
CLUSTER = 65536


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def made(path: Path, **options: Any) -> Path:
    chance = Random(1)
    with jqcow.create(path, 8 * MIB + 1536, **options) as image:
        for _ in range(10):
            image.pwrite(chance.randbytes(100_000), chance.randrange(6 * MIB))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return made(tmp_path / "disk.qcow2")


def rotten(path: Path) -> int:
    """Flip a bit of the image's data; return the guest offset of the cluster."""
    with jqcow.open(path) as image:
        extent = next(extent for extent in image.extents() if extent.kind == "data")
    assert extent.host_offset is not None
    content = bytearray(path.read_bytes())
    content[extent.host_offset + 1000] ^= 4
    path.write_bytes(content)
    return extent.offset


def payload_of(path: Path, name: str) -> int:
    """Return the host offset of the first cluster of a bitmap."""
    with jqcow.open(path) as image:
        bitmaps = image._engine.public.bitmaps
        return next(place for _, place in bitmaps.allocated(bitmaps.find(name)))


@pytest.mark.parametrize(
    "options",
    [{}, {"cluster_size": 512}, {"cluster_size": 4096}, {"cluster_size": 2 << 20}, {"extended_l2": True}],
    ids=str,
)
def test_what_is_protected_is_right_until_it_rots(tmp_path: Path, options: dict[str, Any]) -> None:
    path = made(tmp_path / "disk.qcow2", **options)
    assert not verify(path).is_protected
    protect(path)
    report = verify(path)
    assert report.ok and not report.ranges and report.right_bytes == 8 * MIB + 1536
    offset = rotten(path)
    report = verify(path)
    assert [found.state for found in report.ranges] == ["wrong"]
    assert report.ranges[0].offset <= offset < report.ranges[0].offset + report.ranges[0].length
    protect(path, refresh=True)
    assert not verify(path).ok


def test_what_is_written_has_changed_until_it_is_renewed(image: Path) -> None:
    protect(image)
    with jqcow.open(image, "r+") as opened:
        opened.pwrite(b"new", 3 * CLUSTER)
        # Also before the image is closed.
        assert [found.state for found in opened.protection.verify().ranges] == ["changed"]
    report = verify(image)
    assert report.ok and report.bytes_of("changed") == CLUSTER
    assert protect(image, refresh=True).renewed_bytes == CLUSTER
    assert not verify(image).ranges


def test_a_clean_close_renews_if_asked(image: Path) -> None:
    with jqcow.open(image, "r+", protect=True) as opened:
        opened.pwrite(b"new", 3 * CLUSTER)
    assert verify(image).ok and not verify(image).ranges
    with pytest.raises(ValueError, match="protect"):
        jqcow.open(image, "r", protect=True)


def test_a_refresh_that_fails_at_the_close_leaves_a_clean_image(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protect(image)
    opened = jqcow.open(image, "r+", protect=True)
    opened.pwrite(b"new", 3 * CLUSTER)

    def fails(*_: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(refreshing.Refresh, "run", fails)
    with pytest.raises(OSError, match="no space"):
        opened.close()
    assert opened.closed
    report = verify(image)
    assert report.ok and report.bytes_of("changed") == CLUSTER


def test_many_steps_are_as_one(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refreshing, "STEP_BYTES", 1)
    protect(image)
    assert verify(image).right_bytes == 8 * MIB + 1536


def test_another_size(image: Path) -> None:
    protect(image)
    for size in (20 * MIB, 5 * MIB + 512, 40 * MIB):
        with jqcow.open(image, "r+") as opened:
            opened.resize(size)
        assert verify(image).ok
        protect(image, refresh=True)
        report = verify(image)
        assert report.right_bytes == size and not report.ranges


def test_sums_that_are_damaged_themselves_are_told_apart(image: Path) -> None:
    protect(image)
    place = payload_of(image, SUMS)
    content = bytearray(image.read_bytes())
    first = next(at for at in range(place, place + 4096, 4) if any(content[at : at + 4]))
    content[first] ^= 1
    image.write_bytes(content)
    assert [found.state for found in verify(image).ranges] == ["unsure"]
    with jqcow.open(image, "r+") as opened:
        opened.pwrite(b"new", 7 * MIB)
    protect(image, refresh=True)
    assert [found.state for found in verify(image).ranges] == ["unsure"]


def test_a_damaged_record_is_no_protection(image: Path) -> None:
    protect(image)
    content = bytearray(image.read_bytes())
    content[payload_of(image, RECORD) + 30] ^= 1
    image.write_bytes(content)
    report = verify(image)
    assert report.is_protected and "record" in report.fault and not report.ok
    assert "record" in protect(image, refresh=True).fault
    assert verify(image).ok


def test_a_bitmap_that_was_changed_by_hand_is_told(image: Path) -> None:
    protect(image)
    with jqcow.open(image, "r+") as opened:
        opened.bitmaps.disable(CHANGED)
    assert "disabled" in verify(image).fault
    with jqcow.open(image, "r+") as opened:
        opened.bitmaps.remove(SUMS)
    assert SUMS in verify(image).fault


def test_removed_protection_leaves_no_record(image: Path) -> None:
    protect(image)
    place = payload_of(image, RECORD)
    assert unprotect(image) and not unprotect(image)
    assert not any(bitmap.name in NAMES for bitmap in jqcow.open(image).bitmaps)
    assert image.read_bytes()[place : place + 16] != b"jqcow-protection"
    assert jqcow.open(image).check().ok


def test_heal_takes_from_a_backup_what_has_the_sum(image: Path, tmp_path: Path) -> None:
    protect(image)
    backup, raw = tmp_path / "backup.qcow2", tmp_path / "backup.raw"
    backup.write_bytes(image.read_bytes())
    with jqcow.open(image) as opened:
        good = opened.pread(opened.size, 0)
    offset = rotten(image)
    other = bytearray(good)
    other[offset] ^= 1
    raw.write_bytes(other)
    report = heal(image, raw)
    assert (report.healed_bytes, [found.offset for found in report.left]) == (0, [offset])
    report = heal(image, backup)
    assert report.healed_bytes == CLUSTER and not report.left
    with jqcow.open(image) as opened:
        assert opened.pread(opened.size, 0) == good
        assert opened.check().ok
    assert not verify(image).ranges


@pytest.mark.parametrize(
    "spoil",
    [lambda image: image.resize(512 * 1024), lambda image: None],
    ids=["small", "encrypted"],
)
def test_what_cannot_be_protected_is_refused(tmp_path: Path, spoil: Callable[[jqcow.Image], None]) -> None:
    path = tmp_path / "disk.qcow2"
    with jqcow.create(path, 4 * MIB) as image:
        spoil(image)
        if image.size == 4 * MIB:
            object.__setattr__(image._engine.blocks.area.header, "crypt_method", 2)
        with pytest.raises(jqcow.UnsupportedFeatureError, match="protecting"):
            image.protection.refresh()
        object.__setattr__(image._engine.blocks.area.header, "crypt_method", 0)


def test_a_snapshot_has_no_sums(image: Path) -> None:
    with jqcow.open(image, "r+") as opened:
        opened.create_snapshot("s")
    with jqcow.open(image, snapshot="s") as opened, pytest.raises(ValueError, match="snapshot"):
        _ = opened.protection


def test_commands_and_their_codes(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", image) == 3
    assert "no protection" in capsys.readouterr().out
    assert run("protect", "--refresh", image) == 1
    assert run("protect", image) == 0
    assert run("protect", image) == 1
    assert run("verify", image) == 0
    backup = tmp_path / "backup.qcow2"
    backup.write_bytes(image.read_bytes())
    offset = rotten(image)
    capsys.readouterr()
    assert run("verify", "--output=json", image) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["ranges"] == [{"start": offset, "length": CLUSTER, "state": "wrong"}]
    assert told["wrong-bytes"] == CLUSTER and told["protected"]
    assert run("verify", image) == 2
    assert f"{offset:#x} 0x10000 wrong" in capsys.readouterr().out
    assert run("heal", "--from", image, image) != 0
    assert run("heal", "--from", backup, image) == 0
    assert run("heal", "--output=json", "--from", backup, image) == 0
    assert run("protect", "--refresh", "--output=json", image) == 0
    assert run("protect", "--remove", image) == 0
    assert run("heal", "--from", backup, image) == 3
