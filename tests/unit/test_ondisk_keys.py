"""Passphrases and keys: what opens a slot, and that a secret shows nowhere."""

from __future__ import annotations

import pickle
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jqcow.errors import UnsupportedFeatureError, WrongPassphrase
from jqcow.offline.passphrases import add_passphrase
from jqcow.ondisk import keys, luks
from jqcow.ondisk.encryption import Encryption, NewLuks, new_luks
from jqcow.ondisk.keys import Secret
from jqcow.ondisk.luks import LuksHeader

WORD = b"hunter2-the-secret"


@given(key=st.binary(min_size=16, max_size=64), stripes=st.integers(1, 9))
def test_what_is_split_is_merged(key: bytes, stripes: int) -> None:
    material = keys.split(key, stripes, "sha256")
    assert len(material) == len(key) * stripes
    assert keys.merge(material, len(key), "sha256") == key


def test_a_secret_shows_nowhere() -> None:
    secret = Secret(WORD)
    assert WORD.decode() not in f"{secret!r} {secret} {Encryption(secret)!r} {Encryption(WORD)!r}"
    assert Secret(secret).reveal() == WORD
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError) as refused:
        Secret(WORD.decode())  # type: ignore[arg-type]
    assert WORD.decode() not in str(refused.value)
    with pytest.raises(ValueError):
        Secret(bytes((1 << 20) + 1))


@pytest.mark.parametrize("word", [b"hunter\xff-the-secret", b"hunter\0-the-secret", b"\xed\xa0\x80hunter"])
def test_a_new_passphrase_is_one_that_qemu_takes(word: bytes) -> None:
    with pytest.raises(ValueError, match="UTF-8") as refused:
        Encryption(word)
    assert refused.value.__context__ is None and "hunter" not in str(refused.value)
    with pytest.raises(ValueError, match="UTF-8"):
        add_passphrase("no image is opened", WORD, word)
    assert keys.new_secret("\N{SNOWMAN}".encode()).reveal().decode() == "\N{SNOWMAN}"


def test_a_passphrase_may_be_asked_for() -> None:
    assert keys.secret_for(WORD, "a").reveal() == WORD
    assert keys.secret_for(lambda path: path.encode(), "a").reveal() == b"a"


def made() -> tuple[NewLuks, LuksHeader, bytes]:
    pytest.importorskip("cryptography")
    new = new_luks(Encryption(WORD, "aes-128", iter_time=1, _stripes=3))
    content = bytearray(new.length)
    for offset, data in new.parts:
        content[offset : offset + len(data)] = data
    return new, LuksHeader.unpack(bytes(content)), bytes(content)


def test_the_passphrase_opens_its_slot_and_no_other_does() -> None:
    _, header, content = made()

    def read(length: int, offset: int) -> bytes:
        return content[offset : offset + length]

    number, key = keys.unlock(header, read, Secret(WORD))
    assert number == 0 and len(key.reveal()) == 32
    with pytest.raises(WrongPassphrase) as refused:
        keys.unlock(header, read, Secret(b"another-word"), "the.qcow2")
    told = f"{refused.value} {refused.value.args} {getattr(refused.value, '__notes__', '')}"
    assert "the.qcow2" in told and "another-word" not in told


def test_a_second_passphrase_opens_the_same_key() -> None:
    _, header, content = made()
    space = bytearray(content)

    def read(length: int, offset: int) -> bytes:
        return bytes(space[offset : offset + length])

    _, key = keys.unlock(header, read, Secret(WORD))
    slot, material = keys.lock(header, 5, key, Secret(b"other"), 1000)
    space[slot.material_offset : slot.material_offset + len(material)] = material
    changed = header.with_slot(5, slot)
    changed.validate(len(space))
    number, other_key = keys.unlock(changed, read, Secret(b"other"))
    assert (number, other_key.reveal()) == (5, key.reveal())
    assert keys.emptied(slot).state == luks.INACTIVE


@pytest.mark.parametrize("hash_name", keys.HASHES)
@pytest.mark.parametrize("key_bytes", [16, 64])
def test_all_slots_of_what_takes_the_longest_are_read_again(hash_name: str, key_bytes: int) -> None:
    starts, length = luks.slot_places(key_bytes, 4)
    with patch("jqcow.ondisk.keys.pbkdf2"):
        most = keys.iterations_for(hash_name, 1 << 40, key_bytes)
    slots = tuple(luks.KeySlot(luks.ACTIVE, most, bytes(32), start, 4) for start in starts)
    header = LuksHeader("aes", "xts-plain64", hash_name, 0, key_bytes, b"", b"", most // 8, "", slots)
    header.validate(length)


@pytest.mark.parametrize("name", ["whirlpool", "sha3_256", "x" * 40])
def test_other_hashes_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match="the hash"):
        keys.pbkdf2(name, Secret(b""), b"", 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cipher": "camellia-256"},
        {"cipher": "cast5-128"},
        {"cipher": "serpent-192", "mode": "cbc"},
        {"mode": "gcm"},
        {"ivgen": "benbi"},
        {"ivgen_hash": "sha256"},
        {"hash": "md4"},
        {"iter_time": 0},
        {"cipher": "aes-192", "mode": "cbc"},
    ],
)
def test_encryption_that_there_is_not(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Encryption(WORD, **wrong)  # type: ignore[arg-type]
