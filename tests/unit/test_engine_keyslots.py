"""Passphrases come and go, and one always stays."""

from __future__ import annotations

from pathlib import Path

import pytest

import jqcow
from jqcow.errors import CorruptionError, PassphraseError, UnsupportedFeatureError, WrongPassphrase
from jqcow.offline.passphrases import add_passphrase, remove_passphrase, replace_passphrase, slots_opened
from jqcow.ondisk import luks
from jqcow.ondisk.header import HeaderArea

pytest.importorskip("cryptography")

WORD, OTHER = b"correct horse", b"battery staple"
MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "secret.qcow2"
    how = jqcow.Encryption(WORD, "aes-128", iter_time=1, _stripes=2)
    with jqcow.create(path, 8 * MIB, cluster_size=4096, encryption=how) as image:
        image.pwrite(b"a guest's words" * 500, 5000)
    return path


def test_passphrases_come_and_go(path: Path) -> None:
    assert add_passphrase(path, WORD, OTHER, iter_time=1) == 1
    with pytest.raises(PassphraseError):
        remove_passphrase(path, OTHER, slot=1)
    assert remove_passphrase(path, OTHER, slot=0) == 0
    with pytest.raises(WrongPassphrase):
        jqcow.open(path, passphrase=WORD)
    with pytest.raises(ValueError, match="last passphrase"):
        remove_passphrase(path, OTHER)
    for number in (0, 2, 3, 4, 5, 6, 7):
        assert add_passphrase(path, OTHER, b"%d" % number, iter_time=1) == number
    with pytest.raises(UnsupportedFeatureError):
        add_passphrase(path, OTHER, WORD, iter_time=1)
    with jqcow.open(path, passphrase=b"7") as image:
        assert image.pread(7, 5000) == b"a guest" and image.check().ok


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_passphrase_is_replaced(path: Path, count: int) -> None:
    for _ in range(count - 1):
        add_passphrase(path, WORD, WORD, iter_time=1)
    replace_passphrase(path, WORD, OTHER, 0, iter_time=1)
    assert slots_opened(path, OTHER) == (0,)
    if count == 1:
        with pytest.raises(WrongPassphrase):
            jqcow.open(path, passphrase=WORD)
    else:
        assert slots_opened(path, WORD) == tuple(range(1, count))


def test_the_last_passphrase_goes_on_purpose(path: Path) -> None:
    remove_passphrase(path, WORD, last_too=True)
    with pytest.raises(WrongPassphrase):
        jqcow.open(path, passphrase=WORD)


def header_of(content: bytearray) -> int:
    """Return where the LUKS header lies."""
    place = HeaderArea.parse(bytes(content[:4096])).data.index(b"\x05\x37\xbe\x77") + 8
    return int.from_bytes(content[place : place + 8], "big")


def test_a_passphrase_that_cannot_be_wiped_is_not_removed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = header_of(content)
    slot = start + luks.FIXED_BYTES
    # Another program may begin the key material right behind the header, in the block that a record has.
    content[start + 1024 : start + 1088] = content[start + 4096 : start + 4160]
    content[slot + 40 : slot + 44] = (2).to_bytes(4, "big")
    path.write_bytes(content)
    assert add_passphrase(path, WORD, OTHER, iter_time=1) == 1
    with pytest.raises(UnsupportedFeatureError, match="removing this passphrase"):
        remove_passphrase(path, WORD)
    jqcow.open(path, passphrase=WORD).close()
    assert remove_passphrase(path, OTHER) == 1


def test_key_material_behind_the_end_of_the_file_is_damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = header_of(content)
    place = content.index(start.to_bytes(8, "big"))
    end = len(content)
    content[place : place + 8] = end.to_bytes(8, "big")
    path.write_bytes(content + content[start : start + 4096])
    with pytest.raises(CorruptionError, match="key slot 0 lies past the end"):
        jqcow.open(path, passphrase=WORD)


def test_an_image_that_is_not_encrypted_has_no_passphrases(tmp_path: Path) -> None:
    plain = tmp_path / "plain.qcow2"
    jqcow.create(plain, MIB).close()
    jqcow.open(plain, passphrase=WORD).close()
    with pytest.raises(ValueError, match="not encrypted"):
        add_passphrase(plain, WORD, OTHER)
