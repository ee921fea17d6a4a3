"""Encrypted images beside QEMU: read with the same bytes, written by one and read by the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import jqcow
from jqcow.cli import main as cli
from jqcow.offline.passphrases import add_passphrase, remove_passphrase
from tests.support.qemu import done, done_in_spite_of_load, run

pytest.importorskip("cryptography")

WORD, OTHER = b"correct horse", b"battery\nstaple\n"
MIB = 1 << 20
CIPHERS = [
    ("aes-256", "xts", "plain64", None, "sha256", "1.1"),
    ("aes-128", "xts", "plain", None, "sha1", "0.10"),
    ("aes-192", "xts", "plain64", None, "sha256", "1.1"),
    ("aes-256", "cbc", "essiv", "sha256", "sha512", "1.1"),
    ("aes-128", "cbc", "plain64", None, "sha384", "0.10"),
    ("aes-128", "ecb", "plain64", None, "sha224", "1.1"),
    ("aes-256", "ctr", "plain64", None, "sha256", "1.1"),
    ("aes-128", "cbc", "essiv", "md5", "md5", "1.1"),
    ("serpent-256", "xts", "plain64", None, "sha256", "1.1"),
    ("serpent-128", "cbc", "essiv", "md5", "sha1", "0.10"),
    ("twofish-192", "xts", "essiv", "sha256", "sha256", "1.1"),
    ("twofish-256", "ctr", "plain64", None, "sha512", "1.1"),
    ("cast5-128", "cbc", "plain64", None, "sha256", "1.1"),
    ("cast5-128", "ctr", "plain", None, "sha256", "0.10"),
]
every_cipher = pytest.mark.parametrize(
    ("cipher", "mode", "ivgen", "ivgen_hash", "digest", "compat"), CIPHERS, ids=str
)


class Secrets:
    """Passphrases in files, and QEMU's options that name them."""

    def __init__(self, folder: Path) -> None:
        self.files = {word: folder / f"word{number}" for number, word in enumerate((WORD, OTHER))}
        for word, file in self.files.items():
            file.write_bytes(word)
        self.objects = [
            part
            for number, file in enumerate(self.files.values())
            for part in ("--object", f"secret,id=s{number},file={file}")
        ]

    def image(self, path: Path, word: bytes = WORD) -> list[str]:
        number = list(self.files).index(word)
        return ["--image-opts", f"driver=qcow2,file.filename={path},encrypt.key-secret=s{number}"]

    def qemu_io(self, path: Path, *commands: str, word: bytes = WORD) -> None:
        told = [part for command in commands for part in ("-c", command)]
        result = done("qemu-io", *self.objects, *self.image(path, word), *told)
        assert "failed" not in result and "error" not in result.lower(), result

    def check(self, path: Path, word: bytes = WORD) -> None:
        done("qemu-img", "check", *self.objects, *self.image(path, word))


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path)


def created(path: Path, secrets: Secrets, *options: str) -> None:
    wanted = ",".join(("encrypt.format=luks", "encrypt.key-secret=s0", "encrypt.iter-time=10", *options))
    done_in_spite_of_load(
        "qemu-img", "create", "-q", *secrets.objects, "-f", "qcow2", "-o", wanted, path, "16M"
    )


@every_cipher
def test_ciphers(
    cipher: str,
    mode: str,
    ivgen: str,
    ivgen_hash: str | None,
    digest: str,
    compat: str,
    secrets: Secrets,
    tmp_path: Path,
) -> None:
    by_qemu, by_jqcow = tmp_path / "qemu.qcow2", tmp_path / "jqcow.qcow2"
    chosen = {"cipher-alg": cipher, "cipher-mode": mode, "ivgen-alg": ivgen, "hash-alg": digest}
    if ivgen_hash is not None:
        chosen["ivgen-hash-alg"] = ivgen_hash
    created(
        by_qemu, secrets, f"compat={compat}", *(f"encrypt.{name}={value}" for name, value in chosen.items())
    )
    form = jqcow.Encryption(WORD, cipher, mode, ivgen, ivgen_hash, digest, iter_time=1)
    jqcow.create(by_jqcow, 16 * MIB, encryption=form, compat=compat).close()  # type: ignore[arg-type]
    for path in (by_qemu, by_jqcow):
        secrets.qemu_io(path, "write -P 0x5a 1000 5000", "write -P 0x33 1M 200k", "write -z 1100k 64k")
        with jqcow.open(path, "r+", passphrase=WORD) as image:
            assert image.pread(5002, 999) == b"\0" + b"\x5a" * 5000 + b"\0"
            assert image.pread(76 << 10, MIB) == b"\x33" * (76 << 10)
            assert image.pread(64 << 10, 1100 << 10) == bytes(64 << 10)
            image.pwrite(b"\x44" * 777, MIB + 100)
            image.pwrite(b"\x45" * 70_000, 5 * MIB)
            assert image.check().ok
        secrets.check(path)
        secrets.qemu_io(
            path,
            "read -P 0x33 1M 100",
            "read -P 0x44 1048676 777",
            "read -P 0x33 1049453 1000",
            "read -P 0x45 5M 70000",
            "read -P 0 5312880 2000",
        )


def test_legacy_aes_is_refused_by_name(secrets: Secrets, tmp_path: Path) -> None:
    path = tmp_path / "aes.qcow2"
    wanted = "encrypt.format=aes,encrypt.key-secret=s0"
    done("qemu-img", "create", "-q", *secrets.objects, "-f", "qcow2", "-o", wanted, path, "1M")
    with pytest.raises(jqcow.UnsupportedFeatureError, match="AES without LUKS"):
        jqcow.open(path, passphrase=WORD)


def test_passphrases_of_both(secrets: Secrets, tmp_path: Path) -> None:
    path = tmp_path / "slots.qcow2"
    created(path, secrets)
    secrets.qemu_io(path, "write -P 7 0 1M")
    amend = ["qemu-img", "amend", *secrets.objects]
    change = "encrypt.state=active,encrypt.new-secret=s1,encrypt.keyslot=5,encrypt.iter-time=10"
    done_in_spite_of_load(*amend, *secrets.image(path), "-o", change)
    with jqcow.open(path, passphrase=OTHER) as image:
        assert image.pread(3, 0) == b"\7\7\7"
    assert remove_passphrase(path, WORD) == 0
    assert run("qemu-io", *secrets.objects, *secrets.image(path), "-c", "read 0 1k").returncode
    secrets.qemu_io(path, "read -P 7 0 1M", word=OTHER)
    assert add_passphrase(path, OTHER, WORD, iter_time=1) == 0
    secrets.qemu_io(path, "read -P 7 0 1M")
    secrets.check(path)
    done(*amend, *secrets.image(path), "-o", "encrypt.state=inactive,encrypt.old-secret=s1")
    with pytest.raises(jqcow.WrongPassphrase):
        jqcow.open(path, passphrase=OTHER)
    with jqcow.open(path, passphrase=WORD) as image:
        assert image.check().ok


REFUSED = [
    ("active", ""),
    ("active", "encrypt.new-secret=none"),
    ("active", "encrypt.new-secret=s1,encrypt.keyslot=8"),
    ("active", "encrypt.new-secret=s1,encrypt.keyslot=0"),
    ("active", "encrypt.new-secret=s1,encrypt.old-secret=s0"),
    ("some", "encrypt.new-secret=s1"),
    ("inactive", ""),
    ("inactive", "encrypt.old-secret=s1"),
    ("inactive", "encrypt.old-secret=s0"),
    ("inactive", "encrypt.keyslot=0"),
    ("inactive", "encrypt.keyslot=3"),
    ("inactive", "encrypt.keyslot=-1"),
    ("inactive", "encrypt.keyslot=0,encrypt.old-secret=s1"),
    ("inactive", "encrypt.keyslot=0,encrypt.new-secret=s1"),
    ("inactive", "encrypt.keyslot=0,encrypt.iter-time=4"),
]


def test_jqcow_img_amends_passphrases(
    secrets: Secrets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "slots.qcow2"
    created(path, secrets)

    def ours(change: str, word: bytes = WORD, *more: str) -> tuple[int, str]:
        words = ["amend", *more, *secrets.objects, *secrets.image(path, word), "-o", change]
        return cli.main_like_qemu_img(words), capsys.readouterr().err

    before = path.read_bytes()
    for state, more in REFUSED:
        change = f"encrypt.state={state}" + (f",{more}" if more else "")
        theirs = run("qemu-img", "amend", *secrets.objects, *secrets.image(path), "-o", change)
        assert ours(change) == (1, theirs.stderr) and theirs.returncode == 1, change
    wrong = run("qemu-img", "amend", *secrets.objects, *secrets.image(path, OTHER), "-o", "encrypt.state=x")
    assert ours("encrypt.state=inactive", OTHER) == (1, wrong.stderr)
    assert path.read_bytes() == before
    added = "encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=1"
    assert ours(f"{added},encrypt.keyslot=5,size=3M") == (0, "")
    assert ours(added, OTHER) == (0, "")
    secrets.qemu_io(path, "write -P 7 2M 1M", word=OTHER)
    # Both slots that have it; then a slot that the passphrase itself opens.
    assert ours("encrypt.state=inactive,encrypt.old-secret=s1") == (0, "")
    assert run("qemu-io", *secrets.objects, *secrets.image(path, OTHER), "-c", "read 0 1k").returncode
    assert ours(added) == (0, "")
    assert ours("encrypt.state=inactive,encrypt.keyslot=0") == (0, "")
    assert run("qemu-io", *secrets.objects, *secrets.image(path), "-c", "read 0 1k").returncode
    secrets.qemu_io(path, "read -P 7 2M 1M", word=OTHER)
    secrets.check(path, OTHER)
    replaced = "encrypt.state=active,encrypt.new-secret=s0,encrypt.iter-time=1,encrypt.keyslot=1"
    assert ours(replaced, OTHER)[0] == 1
    assert ours(replaced, OTHER, "--force") == (0, "")
    assert run("qemu-io", *secrets.objects, *secrets.image(path, OTHER), "-c", "read 0 1k").returncode
    secrets.qemu_io(path, "read -P 7 2M 1M")
    assert ours("encrypt.state=inactive,encrypt.keyslot=1")[0] == 1
    assert ours("encrypt.state=inactive,encrypt.keyslot=3", WORD, "--force") == (0, "")
    assert ours("encrypt.state=inactive,encrypt.keyslot=1", WORD, "--force") == (0, "")
    assert run("qemu-io", *secrets.objects, *secrets.image(path), "-c", "read 0 1k").returncode


def test_info_has_the_fields_of_qemu(
    secrets: Secrets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "info.qcow2"
    created(path, secrets, "encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256")
    expected = json.loads(done("qemu-img", "info", "--output=json", path))
    assert cli.main(["info", "--output=json", str(path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format-specific"] == expected["format-specific"] and told["encrypted"]


def test_compressed_clusters_are_read_as_qemu_reads_them(secrets: Secrets, tmp_path: Path) -> None:
    path, raw = tmp_path / "packed.qcow2", tmp_path / "packed.raw"
    created(path, secrets)
    secrets.qemu_io(path, "write -c -P 0x33 64k 64k", "write -P 0x44 128k 64k")
    done("qemu-img", "convert", *secrets.objects, *secrets.image(path), "-O", "raw", raw)
    with jqcow.open(path, "r+", passphrase=WORD) as image:
        assert image.pread(1 << 20, 0) == raw.read_bytes()[: 1 << 20]
        image.pwrite(b"\x55" * 100, 66_000)
    secrets.qemu_io(path, "read -P 0x33 64k 464", "read -P 0x55 66000 100", "read -P 0x33 66100 64972")
    secrets.check(path)


def test_commands(secrets: Secrets, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, path, back = tmp_path / "a.raw", tmp_path / "b.qcow2", tmp_path / "c.raw"
    raw.write_bytes(b"\x33" * 100_000 + bytes(MIB - 100_000))
    file = str(secrets.files[WORD])
    options = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1"
    arguments = ["convert", "-q", "-f", "raw", "-O", "qcow2", *secrets.objects, "-o", options]
    assert cli.main([*arguments, str(raw), str(path)]) == 0
    secrets.qemu_io(path, "read -P 0x33 0 100000", "read -P 0 100000 900000")
    assert cli.main(["convert", "-q", "--passphrase-file", file, str(path), str(back)]) == 0
    assert back.read_bytes() == raw.read_bytes()
    for text, is_read in ((b"Y29y\ncmVjdCBob3JzZQ==\n", True), (b"Y29ycmVjdCBob3JzZQ==!", False)):
        (tmp_path / "b64").write_bytes(text)
        coded = ["--object", f"secret,id=s0,file={tmp_path / 'b64'},format=base64", "--overwrite"]
        without = [part for part in arguments if part not in secrets.objects]
        assert cli.main([*without, *coded, str(raw), str(path)]) == (0 if is_read else 1)
        timed_options = ["-f", "qcow2", "-o", options, str(tmp_path / "q"), "1M"]
        if is_read:
            done_in_spite_of_load("qemu-img", "create", *coded[:2], *timed_options)
        else:
            assert "Base64" in run("qemu-img", "create", *coded[:2], *timed_options).stderr
        secrets.qemu_io(path, "read -P 0x33 0 100000")
    capsys.readouterr()
    wrong = str(secrets.files[OTHER])
    assert cli.main(["convert", "-q", "--passphrase-file", wrong, str(path), str(tmp_path / "d")]) == 1
    told = capsys.readouterr()
    assert "opens no key slot" in told.err
    assert not any(word.decode().split()[0] in told.err + told.out for word in (WORD, OTHER))
    assert cli.main(["create", "--object", "secret,id=x,data=hidden", str(tmp_path / "e"), "1M"]) == 1
    assert "hidden" not in capsys.readouterr().err


def test_a_name_that_says_which_secret_opens_the_base(secrets: Secrets, tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    created(base, secrets)
    secrets.qemu_io(base, "write -P 7 0 1M")
    name = json.dumps(
        {"driver": "qcow2", "encrypt.key-secret": "s0", "file": {"driver": "file", "filename": str(base)}}
    )
    command = [
        "qemu-img",
        "create",
        "-q",
        *secrets.objects,
        "-f",
        "qcow2",
        "-b",
        f"json:{name}",
        "-F",
        "qcow2",
    ]
    done(*command, top)
    done("qemu-io", *secrets.objects, "-c", "write -P 8 64k 64k", top)
    with jqcow.open(top, "r+", passphrase=WORD, allow_files=lambda named: named.path == str(base)) as image:
        assert image.pread(3, 65535) == b"\7\x08\x08"
        image.pwrite(b"\x09", 0)
    told = done("qemu-io", *secrets.objects, "-c", "read -P 9 0 1", "-c", "read -P 7 1 65535", top)
    assert "failed" not in told


def test_at_a_terminal_each_passphrase_is_asked_for_once(
    secrets: Secrets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    words = {str(base): WORD.decode(), str(top): OTHER.decode()}
    how = {name: jqcow.Encryption(word.encode(), iter_time=1) for name, word in words.items()}
    jqcow.create(base, MIB, encryption=how[str(base)]).close()
    below = {"backing_file": "base.qcow2", "backing_format": "qcow2", "passphrase": WORD}
    jqcow.create(top, MIB, encryption=how[str(top)], **below).close()  # type: ignore[arg-type]
    asked: list[str] = []

    def typed(prompt: str) -> str:
        asked.append(prompt.removeprefix("Passphrase of ").removesuffix(": "))
        return words[asked[-1]]

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", typed)
    assert cli.main(["rebase", "-b", "", "--allow-files", str(top)]) == 0
    assert sorted(asked) == sorted(words)
