"""Encrypted images through the interface: passphrases, data in the file, who needs no passphrase."""

from __future__ import annotations

import errno
import itertools
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

import jqcow
from jqcow.checker.check import Kind
from jqcow.cli import main as cli
from jqcow.device.file import FileDevice
from jqcow.disks.policy import NOT_FOLLOWING
from jqcow.errors import (
    CorruptionError,
    FormatError,
    PassphraseError,
    UnsupportedFeatureError,
    WrongPassphrase,
)
from jqcow.image.opening import open_alone
from jqcow.offline.amend import amend
from jqcow.offline.commit import commit
from jqcow.offline.convert import convert
from jqcow.offline.info import check_file, read_info
from jqcow.offline.map import map_file
from jqcow.offline.passphrases import add_passphrase
from jqcow.offline.recover import recover_image
from jqcow.ondisk import keys
from jqcow.ondisk.header import HeaderArea

pytest.importorskip("cryptography")

WORD, OTHER = b"correct horse", b"battery staple"
MIB = 1 << 20


def encryption(word: bytes = WORD) -> jqcow.Encryption:
    return jqcow.Encryption(word, "aes-128", iter_time=1, _stripes=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "secret.qcow2"
    with jqcow.create(path, 8 * MIB, cluster_size=4096, encryption=encryption()) as image:
        image.pwrite(b"a guest's words" * 500, 5000)
    return path


def test_data_is_encrypted_in_the_file_and_read_back(path: Path) -> None:
    assert b"guest's" not in path.read_bytes()
    with jqcow.open(path, passphrase=WORD) as image:
        assert image.pread(7500, 5000) == b"a guest's words" * 500
        assert image.pread(5000, 0) == bytes(5000)
        assert image.check().ok


def test_without_the_passphrase_nothing_opens(path: Path) -> None:
    with pytest.raises(PassphraseError, match="passphrase is needed") as needed:
        jqcow.open(path)
    assert needed.value.image == str(path)
    with pytest.raises(WrongPassphrase) as wrong:
        jqcow.open(path, "r+", passphrase=b"tr0ub4dor")
    assert b"tr0ub4dor" not in repr((wrong.value, wrong.value.args)).encode()
    asked: list[str] = []
    with jqcow.open(path, passphrase=lambda name: asked.append(name) or WORD):  # type: ignore[func-returns-value]
        assert asked == [str(path)]


def test_a_map_names_no_place_of_encrypted_data(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies there is not what the guest reads; a hole in the file reads as noise, not as zeros."""
    with jqcow.open(path, "r+", passphrase=WORD) as image:
        image.pwrite(b"x" * MIB, MIB)
        places = [extent.host_offset for extent in image.extents() if extent.kind == "data"]
    content = path.read_bytes()
    holey = tmp_path / "holey.qcow2"
    with holey.open("wb") as file:
        file.write(content[: places[-1]])
        os.truncate(holey, len(content))
    tables_alone = replace(NOT_FOLLOWING, reads_data=False)
    for name in (path, holey):
        lines = map_file(name, "qcow2", following=tables_alone)
        assert sum(line.extent.length for line in lines if line.data) >= MIB
        assert all(line.zero != line.data and line.extent.host_offset is None for line in lines)
        assert cli.main(["map", str(name)]) == 1
        assert "encrypted clusters have no offset" in capsys.readouterr().err


def shown_with_variables(error: BaseException) -> str:
    """Return a traceback that has the variables of each function of jqcow, bytes of them whole."""
    parts = []
    package = str(Path(jqcow.__file__).parent)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith(package):
            parts += [repr(value) for value in frame.f_locals.values()]
    return "\n".join([*parts, *traceback.format_exception(error)])


def the_host_fails(name: str, count: int) -> Callable[..., object]:
    """Return a method of `FileDevice` that fails when it is called for the ``count``-th time."""
    real, calls = getattr(FileDevice, name), itertools.count(1)

    def call(*arguments: object) -> object:
        if next(calls) == count:
            raise OSError(errno.EIO, "the host failed")
        return real(*arguments)

    return call


@pytest.mark.parametrize("failing", [("barrier", count) for count in range(1, 6)] + [("pread", 5)], ids=str)
def test_no_traceback_shows_a_secret(path: Path, failing: tuple[str, int]) -> None:
    with patch("jqcow.ondisk.keys.merge", side_effect=keys.merge) as merged:
        jqcow.open(path, passphrase=WORD).close()
    key = keys.merge(*merged.call_args.args)
    calls = [lambda: add_passphrase(path, WORD, OTHER, iter_time=1)]
    if failing[0] == "pread":
        calls = [lambda: jqcow.open(path, passphrase=WORD), lambda: convert(path, path, passphrase=WORD)]
    for call in calls:
        with (
            patch.object(FileDevice, failing[0], the_host_fails(*failing)),
            pytest.raises((OSError, ValueError)) as error,
        ):
            call()
        shown = shown_with_variables(error.value)
        assert not any(repr(secret)[2:-1] in shown for secret in (WORD, OTHER, key))


def test_tables_need_no_passphrase(path: Path) -> None:
    assert check_file(path).ok
    facts = read_info(path).qcow2
    assert facts is not None and facts.luks is not None and facts.luks.cipher_alg == "aes-128"
    with open_alone(path, "r+") as image:
        image.create_snapshot("kept")
        with pytest.raises(PassphraseError):
            image.pread(1, 5000)
        with pytest.raises(PassphraseError):
            image.pwrite(b"x", 5000)
        assert image.check().ok
    assert recover_image(path).verification is not None


def test_compressed_writing_is_refused(path: Path, tmp_path: Path) -> None:
    with jqcow.open(path, "r+", passphrase=WORD) as image, pytest.raises(UnsupportedFeatureError):
        image.pwrite_compressed(bytes(4096), 0)
    with pytest.raises(ValueError):
        convert(path, tmp_path / "t", passphrase=WORD, compressed=True, encryption=encryption())


def test_converting_in_and_out(path: Path, tmp_path: Path) -> None:
    raw, back = tmp_path / "plain.raw", tmp_path / "back.qcow2"
    with pytest.raises(PassphraseError):
        convert(path, raw, target_format="raw", salvage=True)
    convert(path, raw, target_format="raw", passphrase=WORD)
    assert raw.read_bytes()[5000:12500] == b"a guest's words" * 500
    convert(raw, back, encryption=encryption(OTHER), verify=True)
    with jqcow.open(back, passphrase=OTHER) as image:
        assert image.pread(7500, 5000) == b"a guest's words" * 500 and image.check().ok


def test_an_overlay_and_its_base_have_a_passphrase_each(path: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    words = {str(path): WORD, str(top): OTHER}
    jqcow.create(
        top,
        8 * MIB,
        backing_file=str(path),
        backing_format="qcow2",
        allow_files=True,
        encryption=encryption(OTHER),
        passphrase=words.__getitem__,
    ).close()
    with jqcow.open(top, "r+", allow_files=True, passphrase=words.__getitem__) as image:
        image.pwrite(b"over", 6000)
        assert image.pread(15, 5000) == b"a guest's words"
    commit(top, allow_files=True, passphrase=words.__getitem__)
    with jqcow.open(path, passphrase=WORD) as image:
        assert image.pread(4, 6000) == b"over"


def test_a_damaged_header_is_an_error_and_no_leak(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = HeaderArea.parse(bytes(content[:4096])).data.index(b"\x05\x37\xbe\x77") + 8
    offset = int.from_bytes(content[place : place + 8], "big")
    content[offset : offset + 6] = b"\0" * 6
    path.write_bytes(content)
    with pytest.raises(FormatError):
        jqcow.open(path, passphrase=WORD)
    assert check_file(path).ok
    content[place : place + 8] = (offset + 512).to_bytes(8, "big")
    path.write_bytes(content)
    with pytest.raises(CorruptionError):
        jqcow.open(path, passphrase=WORD)
    assert check_file(path).counts[Kind.HEADER] == 1


def test_version_2_over_a_backing_file_has_encrypted_zeros(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"b" * MIB)
    path = tmp_path / "i.qcow2"
    with jqcow.create(
        path,
        MIB,
        backing_file="base.raw",
        backing_format="raw",
        allow_files=True,
        cluster_size=4096,
        encryption=encryption(),
    ) as image:
        image.pwrite(b"x" * 8192, 0)
        image.write_zeroes(16384, 4096)
    before = path.read_bytes()
    with pytest.raises(PassphraseError):
        amend(path, compat="0.10")
    with pytest.raises(WrongPassphrase):
        amend(path, compat="0.10", passphrase=OTHER)
    assert path.read_bytes()[: len(before)] == before
    # Neither asks for it.
    amend(path, compat="1.1", refcount_bits=64)
    assert amend(path, compat="0.10", refcount_bits=16, passphrase=WORD).zero_clusters == 4
    with jqcow.open(path, passphrase=WORD, allow_files=True) as image:
        assert image.pread(24576, 0) == b"x" * 4096 + bytes(16384) + b"b" * 4096
        assert image.check().ok
    assert amend(path, size=2 * MIB, passphrase=WORD, allow_files=True).size
